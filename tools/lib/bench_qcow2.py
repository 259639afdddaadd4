"""NBD reads of qcow2 images: plain, zlib and zstd clusters, against qemu-nbd.

Two costs are shown apart: a server that has run a while (which may keep decoded clusters), and
the first read through a server that was just started. That one is the codec's work for both, and the
same codec for zstd: it is to be no slower, although what was decoded is kept.
"""

import re
import subprocess
from pathlib import Path

from lib import corpus, nbd_load, procs, rounds

NAME = "qcow2"
_REFERENCE = "qemu-nbd"
_LOADS = (nbd_load.RANDOM_1, nbd_load.RANDOM_16X2, nbd_load.SEQUENTIAL_4K,
          nbd_load.SEQUENTIAL_256K)
_OURS, _OURS_RAW = "bedplate export", "bedplate export, the raw file"
_OF_RAW, _TIMES, _FIRST_TIMES = 0.9, 3.0, 1.0
_KINDS = {"plain": [], "zlib": ["-c"], "zstd": ["-c", "-o", "compression_type=zstd"]}


def run(bench):
    size_bytes = nbd_load.image_bytes(bench)
    raw = bench.scratch.path / "dense.raw"
    corpus.dense(raw, size_bytes)
    rounds.say(f"  load from {nbd_load.generator()}; max RSS counts pages of the mapped image, "
               "which are page cache")
    for kind, options in _KINDS.items():
        image = bench.scratch.path / f"{kind}.qcow2"
        procs.run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", *options, raw, image)
        procs.run("sync", "--data", image)
        corpus.warm(image)
        _one_kind(bench, kind, image, raw, size_bytes)
        image.unlink()
    raw.unlink()


def _one_kind(bench, kind, image, raw, size_bytes):
    exports = {name: nbd_load.start(bench, name, command, socket_path)
               if command else "not installed (nbdkit with the qcow2dec filter, 1.36 and later)"
               for name, (command, socket_path) in _commands(bench, image, "kept").items()}
    if kind == "plain":
        # What an image costs that is read where it is.
        path = bench.scratch.path / "kept-raw.sock"
        corpus.warm(raw)
        exports[_OURS_RAW] = nbd_load.start(
            bench, _OURS_RAW, [bench.program, "export", raw, "--nbd", path], path)
    nbd_load.verify(bench, exports, raw)
    group = f"{NAME}, {kind} clusters"
    cases = [nbd_load.case(bench, group, load, size_bytes, exports, _REFERENCE) for load in _LOADS]
    cases.append(nbd_load.copy_case(bench, group, size_bytes, exports, _REFERENCE))
    first = _first_read_case(bench, group, image, size_bytes, exports)
    bench.compare([*cases, first])
    for case in cases:
        if kind == "plain":
            nbd_load.bound_speed(bench, case, _OURS, _OURS_RAW, _OF_RAW)
        else:
            nbd_load.bound_speed(bench, case, _OURS, _REFERENCE, _TIMES)
    if kind != "plain":
        nbd_load.bound_speed(bench, first, _OURS, _REFERENCE, _FIRST_TIMES)
    nbd_load.stop(bench, exports)


def _commands(bench, image, label):
    """{contender: (command or None, socket)}"""
    sockets = [bench.scratch.path / f"{label}-{index}.sock" for index in range(3)]
    return {
        _OURS: ([bench.program, "export", image, "--nbd", sockets[0]], sockets[0]),
        _REFERENCE: (["qemu-nbd", "-r", "-t", "-e", "8", "-f", "qcow2", "-k", sockets[1], image],
                     sockets[1]),
        "nbdkit qcow2dec": (["nbdkit", "-f", "-r", "-U", sockets[2], "--filter=noextents",
                             "--filter=qcow2dec", "file", image] if _has_qcow2dec() else None,
                            sockets[2]),
    }


def _has_qcow2dec():
    try:
        listed = subprocess.run(["nbdkit", "--dump-config"], capture_output=True, text=True,
                                check=True)
    except (OSError, subprocess.CalledProcessError):
        return False
    where = re.search(r"^filterdir=(.*)$", listed.stdout, re.MULTILINE)
    return where is not None and (
        Path(where.group(1)) / "nbdkit-qcow2dec-filter.so").exists()


def _first_read_case(bench, group, image, size_bytes, exports):
    commands = _commands(bench, image, "fresh")

    def once(name):
        command, socket_path = commands[name]
        socket_path.unlink(missing_ok=True)
        export = nbd_load.start(bench, name, command, socket_path)
        if isinstance(export, str):
            raise procs.Failure(export)
        try:
            return nbd_load.copy(bench, export, size_bytes)
        finally:
            bench.scratch.retire(export.server)

    return rounds.Case(
        group, "nbdcopy to null:, server just started", size_bytes, "64 x 4 connections", "B/s",
        "GiB", _REFERENCE,
        [nbd_load.contender(name, export, lambda name=name: once(name))
         for name, export in exports.items() if name in commands])
