"""Loads on an NBD export: fio where it speaks NBD, else `qemu-img bench`; and nbdcopy."""

import dataclasses
import json
import re
import shutil
import subprocess

from lib import corpus, nbd, procs, rounds
from lib.corpus import KIB, MIB


@dataclasses.dataclass(frozen=True)
class Load:
    """A pattern of reads."""

    name: str
    block_bytes: int
    depth: int
    jobs: int = 1
    random: bool = True

    def depth_text(self):
        return f"{self.depth} x {self.jobs} clients" if self.jobs > 1 else f"{self.depth}"


RANDOM_1 = Load("4 KiB random read", 4 * KIB, 1)
RANDOM_16 = Load("4 KiB random read", 4 * KIB, 16)
RANDOM_16X2 = Load("4 KiB random read", 4 * KIB, 16, jobs=2)
RANDOM_64 = Load("4 KiB random read", 4 * KIB, 64)
SEQUENTIAL_4K = Load("4 KiB sequential read", 4 * KIB, 1, random=False)
SEQUENTIAL_256K = Load("256 KiB sequential read", 256 * KIB, 4, random=False)
SEQUENTIAL_256KX2 = Load("256 KiB sequential read", 256 * KIB, 4, jobs=2, random=False)


@dataclasses.dataclass
class Export:
    """A running server and where its export is."""

    server: procs.Server
    uri: str


def generator():
    """The program that makes the load: `fio`, or `qemu-img bench` where fio lacks NBD."""
    if shutil.which("fio"):
        engines = subprocess.run(["fio", "--enghelp"], capture_output=True, text=True, check=False)
        if re.search(r"^\s*nbd\s*$", engines.stdout, re.MULTILINE):
            return "fio"
    return "qemu-img bench"


def run(bench, export, load, size_bytes):
    """One run of a load on an export; the server's CPU time is what it used meanwhile."""
    before_s = export.server.cpu_s()
    measured = _fio if generator() == "fio" else _qemu_img_bench
    ops, wall_s, cpu_s, p99_us = measured(bench, export.uri, load, size_bytes)
    server_cpu_s = export.server.cpu_s() - before_s
    as_iops = load.block_bytes <= 4 * KIB
    return rounds.Sample(
        value=ops / wall_s * (1 if as_iops else load.block_bytes), wall_s=wall_s,
        work=ops * (1 if as_iops else load.block_bytes), client_cpu_s=cpu_s,
        server_cpu_s=server_cpu_s, p99_us=p99_us, rss_bytes=procs.resident(export.server.pid)[0])


def _fio(bench, uri, load, size_bytes):
    usage = procs.measure([
        "fio", "--name=load", "--ioengine=nbd", f"--uri={uri}", "--output-format=json",
        f"--rw={'randread' if load.random else 'read'}", f"--bs={load.block_bytes}",
        f"--iodepth={load.depth}", f"--numjobs={load.jobs}", "--group_reporting", "--time_based",
        f"--runtime={int(bench.seconds * 1000)}ms", f"--size={size_bytes}", "--norandommap",
        "--randrepeat=0"], bench.prefix)
    # Warnings may stand before and after the document.
    report = json.loads(usage.output[usage.output.index("{"):usage.output.rindex("}") + 1])
    job = report["jobs"][0]
    read = job["read"]
    if job["error"] != 0 or read["total_ios"] == 0:
        raise procs.Failure(f"fio: error {job['error']} after {read['total_ios']} reads of {uri}")
    p99_us = read["clat_ns"]["percentile"]["99.000000"] / 1000
    return read["total_ios"], read["runtime"] / 1000, usage.cpu_s, p99_us


def _qemu_img_bench(bench, uri, load, size_bytes):
    if load.jobs > 1:
        raise procs.Failure("`qemu-img bench` has one client; install a fio with the nbd engine")
    count = int(bench.seconds * (20_000 if load.block_bytes <= 4 * KIB else 2_000))
    # A stride with no common factor with the size visits blocks all over the image.
    step = 104_729 * load.block_bytes % size_bytes if load.random else load.block_bytes
    usage = procs.measure([
        "qemu-img", "bench", "-f", "raw", "-c", count, "-d", load.depth, "-s", load.block_bytes,
        "-S", step, uri], bench.prefix)
    seconds = re.search(r"Run completed in ([0-9.]+) seconds", usage.output)
    if seconds is None:
        raise procs.Failure(f"`qemu-img bench` printed no time: {usage.output}")
    return count, float(seconds.group(1)), usage.cpu_s, None


def copy(bench, export, size_bytes):
    """`nbdcopy` of the whole export to nowhere."""
    before_s = export.server.cpu_s()
    usage = procs.measure(["nbdcopy", export.uri, "null:"], bench.prefix)
    return rounds.Sample(
        value=size_bytes / usage.wall_s, wall_s=usage.wall_s, work=size_bytes,
        client_cpu_s=usage.cpu_s, server_cpu_s=export.server.cpu_s() - before_s,
        rss_bytes=procs.resident(export.server.pid)[0])


def case(bench, group, load, size_bytes, exports, reference):
    """A case of one load over {contender's name: `Export`, or why there is none}."""
    as_iops = load.block_bytes <= 4 * KIB
    return rounds.Case(
        group, load.name, size_bytes, load.depth_text(), "IOPS" if as_iops else "B/s",
        "op" if as_iops else "GiB", reference,
        contenders(exports, lambda export: run(bench, export, load, size_bytes)))


def copy_case(bench, group, size_bytes, exports, reference):
    """A case of `nbdcopy` over the same."""
    return rounds.Case(
        group, "nbdcopy to null:", size_bytes, "64 x 4 connections", "B/s", "GiB", reference,
        contenders(exports, lambda export: copy(bench, export, size_bytes)))


def bound_speed(bench, case, ours, other, least):
    """A bound on how fast `ours` is, as a multiple of `other`."""
    ratio = rounds.ratios(rounds.named(case, ours), rounds.named(case, other), rounds.speed)
    bench.bound(case.title(), f"{case.title()}: {ours}, speed of {other}", ratio, least=least)


def contenders(exports, once):
    """Contenders in the order of `exports`; those named `bedplate ...` are ours."""
    return [contender(name, export, lambda export=export: once(export))
            for name, export in exports.items()]


def contender(name, export, once):
    """A contender that runs `once`, or the reason why there is no export."""
    absent = export if isinstance(export, str) else ""
    return rounds.Contender(name, None if absent else once, name.startswith("bedplate"), absent)


def start(bench, name, command, socket_path):
    """Starts a server and waits for its socket; `not installed`, or why it does not start."""
    if shutil.which(str(command[0])) is None:
        return "not installed"
    server = bench.scratch.serve(name, command, bench.prefix)
    try:
        server.wait_for_socket(socket_path)
    except procs.Failure as failure:
        bench.scratch.retire(server)
        if name.startswith("bedplate"):
            raise
        rounds.say(f"  {failure}")
        return "does not start, see above"
    return Export(server, nbd.uri(socket_path))


def stop(bench, exports):
    """Ends the servers."""
    for export in exports.values():
        if isinstance(export, Export):
            bench.scratch.retire(export.server)


def verify(bench, exports, expected):
    """Copies every export once and compares it with the file; this also warms every server."""
    for name, export in exports.items():
        if isinstance(export, str):
            continue
        copied = bench.scratch.path / "verify.raw"
        procs.run("nbdcopy", export.uri, copied)
        same = corpus.equal(copied, expected)
        copied.unlink()
        if not same:
            message = f"{name}: serves other bytes than {expected.name} has"
            if name.startswith("bedplate"):
                bench.fail(message)
            else:
                rounds.say(f"  {message}")


def image_bytes(bench):
    """Size of the image that the NBD cases read."""
    return 64 * MIB if bench.quick else 1024 * MIB
