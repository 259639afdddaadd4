"""Reads of a VM's disk over vhost-user, against qemu-storage-daemon, by a driver of our own.

The driver (tools/peers, `vm-disk`) is one process with one queue, and works as Linux's does. Both
servers have the image in the page cache. A guest under emulation would measure the emulator.
"""

import dataclasses
import json
import re
import shutil

from lib import bedplate, bench_reads, corpus, procs, rounds
from lib.corpus import KIB, MIB

NAME = "vm"
_OURS, _QSD = "bedplate export", "qemu-storage-daemon"
_TIMES = 2.0


@dataclasses.dataclass(frozen=True)
class _Load:
    block_bytes: int
    depth: int
    mode: str
    """`irq`: the driver sleeps until it is called; `poll`: it looks at the ring."""

    def name(self):
        return f"{self.block_bytes // KIB} KiB random read, {self.mode}"


_SMALL = (_Load(4 * KIB, 1, "irq"), _Load(4 * KIB, 1, "poll"), _Load(4 * KIB, 16, "irq"),
          _Load(4 * KIB, 16, "poll"), _Load(4 * KIB, 64, "irq"), _Load(256 * KIB, 4, "irq"))
_OF_QCOW2 = (_Load(4 * KIB, 16, "irq"), _Load(4 * KIB, 16, "poll"))


def run(bench):
    driver = bench_reads.build("vm-disk")
    size_bytes = 64 * MIB if bench.quick else 512 * MIB
    raw = bench.scratch.path / "disk.raw"
    corpus.dense(raw, size_bytes)
    corpus.warm(raw)
    _image(bench, driver, raw, "raw", size_bytes, _SMALL)
    image = bench.scratch.path / "disk.qcow2"
    procs.run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, image)
    procs.run("sync", "--data", image)
    raw.unlink()
    corpus.warm(image)
    _image(bench, driver, image, "qcow2", size_bytes, _OF_QCOW2)
    image.unlink()


def _image(bench, driver, path, kind, size_bytes, loads):
    servers = _start(bench, path, kind)
    hashes = {}

    def once(name, socket, load):
        server = servers[name][0]
        before_s = server.cpu_s()
        usage = procs.measure(
            [driver, socket, load.block_bytes, load.depth, load.mode, bench.seconds], bench.prefix)
        report = json.loads(usage.output)
        wanted = hashes.setdefault("disk", (report["xxh3"], name))
        if report["xxh3"] != wanted[0]:
            raise procs.Failure(f"reads other bytes than {wanted[1]}")
        wall_s, small = report["wall_ns"] / 1e9, load.block_bytes <= 4 * KIB
        work = report["ops" if small else "bytes"]
        # The hash before the load is in the server's time, and the same for both.
        return rounds.Sample(work / wall_s, wall_s, work, report["cpu_ns"] / 1e9,
                             server.cpu_s() - before_s, p99_us=report["p99_ns"] / 1000,
                             rss_bytes=procs.resident(server.pid)[0])

    cases = []
    for load in loads:
        contenders = []
        for name, server in servers.items():
            absent = server if isinstance(server, str) else ""
            make = None if absent else (
                lambda name=name, load=load: once(name, servers[name][1], load))
            contenders.append(rounds.Contender(name, make, name == _OURS, absent))
        small = load.block_bytes <= 4 * KIB
        cases.append(rounds.Case(f"{NAME}, {kind}", load.name(), size_bytes, str(load.depth),
                                 "IOPS" if small else "B/s", "op" if small else "GiB", _QSD,
                                 contenders))
    bench.compare(cases)
    for case, load in zip(cases, loads):
        if (load.block_bytes, load.depth) == (4 * KIB, 16):
            ratio = rounds.ratios(rounds.named(case, _OURS), rounds.named(case, _QSD), rounds.speed)
            bench.bound(case.title(), f"{kind}, {load.name()}, depth 16, speed of {_QSD}", ratio,
                        least=_TIMES)
    for server in servers.values():
        if not isinstance(server, str):
            bench.scratch.retire(server[0])


def _start(bench, path, kind):
    """{name: (server, socket)}, or why there is none."""
    ours, theirs = bench.scratch.path / "ours.sock", bench.scratch.path / "qsd.sock"
    server = bench.scratch.serve(
        _OURS, [bench.program, "export", path, "--vhost-user", ours], bench.prefix)
    server.wait_for(lambda: re.search("vhost-user-blk", server.output()), "its socket")
    servers = {_OURS: (server, ours)}
    if shutil.which(_QSD) is None:
        servers[_QSD] = "not installed"
        return servers
    qsd = bench.scratch.serve(_QSD, [
        _QSD, "--blockdev", f"driver=file,node-name=file,filename={path},read-only=on",
        "--blockdev", f"driver={kind},node-name=disk,file=file,read-only=on",
        "--object", "iothread,id=thread",
        "--export", f"type=vhost-user-blk,id=export,addr.type=unix,addr.path={theirs},"
        "node-name=disk,num-queues=1,writable=off,iothread=thread"], bench.prefix)
    qsd.wait_for(theirs.exists, "its socket")
    servers[_QSD] = (qsd, theirs)
    return servers
