"""The program under test: building it, and `bedplate run` as the tools use it."""

import functools
import json
import os
import re
import subprocess
import time
from pathlib import Path

from lib import procs

ROOT = Path(__file__).resolve().parent.parent.parent


def binary():
    """Builds the release binary and returns its path; `BEDPLATE=FILE` names one that is there."""
    given = os.environ.get("BEDPLATE")
    if given:
        path = Path(given).resolve()
        if not os.access(path, os.X_OK):
            raise procs.Failure(f"BEDPLATE={given}: not a program; name an executable file")
        return path
    try:
        subprocess.run(["cargo", "build", "--release", "--locked", "--bin", "bedplate"], cwd=ROOT,
                       check=True)
        described = subprocess.run(
            ["cargo", "metadata", "--no-deps", "--format-version", "1"], cwd=ROOT, check=True,
            capture_output=True)
    except FileNotFoundError:
        raise procs.Failure("cargo: not installed; see https://rustup.rs, or set BEDPLATE=FILE to "
                            "a built binary") from None
    except subprocess.CalledProcessError as failed:
        raise procs.Failure(f"`{' '.join(failed.cmd)}` ended with status {failed.returncode}; its "
                            "output is above") from None
    return Path(json.loads(described.stdout)["target_directory"]) / "release" / "bedplate"


@functools.cache
def offers(program, command, option):
    """Whether `bedplate COMMAND --help` has an option: a comparison may be ahead of a build."""
    shown = subprocess.run([program, command, "--help"], capture_output=True, text=True,
                           check=False).stdout
    return re.search(rf"{re.escape(option)}(?![\w-])", shown) is not None


def run_argv(program, url, name, data, socket_path, sha256):
    """The command line of `bedplate run`."""
    return [program, "run", url, "--name", name, "--data", data, "--nbd", socket_path, "--sha256",
            sha256]


def start_run(scratch, argv, prefix=()):
    """Starts `bedplate run` and waits until it says how to use it; returns (server, seconds).

    Its NBD socket is there from the start, so that a connection says nothing.
    """
    began = time.monotonic()
    server = scratch.serve("bedplate run", argv, prefix)
    server.wait_for(lambda: "nbd+unix" in server.output(), "its NBD URI", limit_s=1800)
    return server, time.monotonic() - began
