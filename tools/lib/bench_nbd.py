"""NBD reads of a raw file: in the page cache against qemu-nbd and nbdkit, and cold beside a server that
faults its map in (tools/peers, `fault-server`).

Cold: the page cache of the file is dropped and the servers are started anew for every sample, as a page
that somebody has mapped is not dropped.
"""

import os
import time

from lib import bench_reads, corpus, nbd_load, rounds

NAME = "nbd"
CASES = ("hot", "cold")
_OURS, _REFERENCE, _FAULTING = "bedplate export", "qemu-nbd", "server that faults its map in"
_CPU_US = 3
_COLD_TIMES = 2.0


def run(bench, part=None):
    size_bytes = nbd_load.image_bytes(bench)
    raw = bench.scratch.path / "dense.raw"
    corpus.dense(raw, size_bytes)
    for name, run_part in (("hot", _hot), ("cold", _cold)):
        if part in (None, name):
            run_part(bench, raw, size_bytes)
    raw.unlink()


def _hot(bench, raw, size_bytes):
    corpus.warm(raw)
    exports = _exports(bench, raw)
    nbd_load.verify(bench, exports, raw)
    group = f"{NAME}, raw"
    rounds.say(f"  load from {nbd_load.generator()}; max RSS counts pages of the mapped image, "
               "which are page cache")
    least = {nbd_load.RANDOM_1: 2.0, nbd_load.RANDOM_16: None, nbd_load.RANDOM_16X2: 2.5,
             nbd_load.SEQUENTIAL_256K: None, nbd_load.SEQUENTIAL_256KX2: 2.0}
    cases = {load: nbd_load.case(bench, group, load, size_bytes, exports, _REFERENCE)
             for load in least}
    copy = nbd_load.copy_case(bench, group, size_bytes, exports, _REFERENCE)
    bench.compare([*cases.values(), copy])
    for load, times in least.items():
        if times is not None:
            nbd_load.bound_speed(bench, cases[load], _OURS, _REFERENCE, times)
    nbd_load.bound_speed(bench, copy, _OURS, _REFERENCE, 1.8)
    case = cases[nbd_load.RANDOM_16X2]
    used = [sample.server_cpu_s / sample.work * 1e6
            for sample in rounds.named(case, _OURS).samples]
    bench.bound(case.title(), f"{_OURS}, server CPU, us per request",
                rounds.spread(used) if used else None, most=_CPU_US)
    nbd_load.stop(bench, exports)


def _exports(bench, raw):
    sockets = {name: bench.scratch.path / f"{name}.sock" for name in ("b", "q", "qu", "k")}
    qemu = ["qemu-nbd", "-r", "-t", "-e", "8", "-f", "raw"]
    commands = {
        _OURS: ([bench.program, "export", raw, "--nbd", sockets["b"]], sockets["b"]),
        _REFERENCE: ([*qemu, "-k", sockets["q"], raw], sockets["q"]),
        "qemu-nbd --aio=io_uring": ([*qemu, "--aio=io_uring", "-k", sockets["qu"], raw],
                                    sockets["qu"]),
        "nbdkit file": (["nbdkit", "-f", "-r", "-U", sockets["k"], "file", raw], sockets["k"]),
    }
    return {name: nbd_load.start(bench, name, command, path)
            for name, (command, path) in commands.items()}


def _cold(bench, raw, size_bytes):
    peer = bench_reads.build("fault-server")
    sockets = {name: bench.scratch.path / f"cold-{name}.sock" for name in ("b", "f", "q")}
    commands = {
        _OURS: ([bench.program, "export", raw, "--nbd", sockets["b"]], sockets["b"]),
        _FAULTING: ([peer, sockets["f"], raw], sockets["f"]),
        _REFERENCE: (["qemu-nbd", "-r", "-t", "-e", "8", "-f", "raw", "-k", sockets["q"], raw],
                     sockets["q"]),
    }
    load = nbd_load.RANDOM_64

    def once(name):
        command, path = commands[name]
        path.unlink(missing_ok=True)
        _drop(raw)
        export = nbd_load.start(bench, name, command, path)
        try:
            return nbd_load.run(bench, export, load, size_bytes)
        finally:
            bench.scratch.retire(export.server)

    case = rounds.Case(f"{NAME}, raw, cold", load.name, size_bytes, load.depth_text(), "IOPS", "op",
                       _FAULTING, [rounds.Contender(name, lambda name=name: once(name), name == _OURS)
                                   for name in commands])
    bench.compare([case])
    nbd_load.bound_speed(bench, case, _OURS, _FAULTING, _COLD_TIMES)


def _drop(path):
    """Takes a file out of the page cache. Nobody has it mapped."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    time.sleep(0.05)
