"""An HTTP server far away: every answer comes 50 ms late, every connection has 40 MB/s.

A thread a connection, `sendfile` in small steps paced by the clock: cheap enough that it does not
compete with what is measured. Serves one file, with ranges and a strong ETag.
"""

import os
import re
import socket
import sys
import threading
import time

DELAY_S = 0.050
RATE = 40_000_000
STEP = 256 * 1024


def main(path):
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(("127.0.0.1", 0))
    listener.listen(64)
    print(f"port {listener.getsockname()[1]}", flush=True)
    while True:
        client, _ = listener.accept()
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        threading.Thread(target=_serve, args=(client, path), daemon=True).start()


def _serve(client, path):
    with client, open(path, "rb") as source:
        total = os.fstat(source.fileno()).st_size
        pending = b""
        try:
            while True:
                while b"\r\n\r\n" not in pending:
                    more = client.recv(65536)
                    if not more:
                        return
                    pending += more
                head, _, pending = pending.partition(b"\r\n\r\n")
                _answer(client, source, head.decode("latin-1"), total)
        except OSError:
            # The client has what it wants, and went.
            return


def _answer(client, source, head, total):
    time.sleep(DELAY_S)
    asked = re.search(r"(?im)^range: *bytes=(\d+)-(\d*)", head)
    start, end = (int(asked[1]), int(asked[2] or total - 1) + 1) if asked else (0, total)
    end = min(end, total)
    lines = ["HTTP/1.1 206 Partial Content" if asked else "HTTP/1.1 200 OK", 'ETag: "one"',
             "Accept-Ranges: bytes", f"Content-Length: {end - start}"]
    if asked:
        lines.append(f"Content-Range: bytes {start}-{end - 1}/{total}")
    client.sendall(("\r\n".join(lines) + "\r\n\r\n").encode())
    if head.startswith("HEAD"):
        return
    began = time.monotonic()
    at = start
    while at < end:
        at += os.sendfile(client.fileno(), source.fileno(), at, min(STEP, end - at))
        ahead = (at - start) / RATE - (time.monotonic() - began)
        if ahead > 0.002:
            time.sleep(ahead)


if __name__ == "__main__":
    main(sys.argv[1])
