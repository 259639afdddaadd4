"""Python's usual library brings one URL into a file: large writes, SHA-256 on the way, fdatasync.

  peer_requests.py URL FILE SHA256 [CACERT]
"""

import hashlib
import os
import sys

import requests


def main(url, path, sha256, cacert=None):
    digest = hashlib.sha256()
    with requests.get(url, stream=True, verify=cacert or True, timeout=60) as got:
        got.raise_for_status()
        with open(path, "wb") as out:
            for piece in got.iter_content(1 << 20):
                out.write(piece)
                digest.update(piece)
            out.flush()
            os.fdatasync(out.fileno())
    return 0 if digest.hexdigest() == sha256 else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
