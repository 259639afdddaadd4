"""Reads within one process: bedplate's `image::View` beside imago and qcow2-rs, on the same image.

Each run is a process of its own (tools/peers): one reader, one workload. The floor is a copy out of
a map of the raw file, and for a first read of compressed clusters the codec alone: once with one
buffer for all that it makes, which nobody could read again, and once with memory for all of it, which
the kernel has to clear first. All readers have to read the same bytes: their hashes are compared in
every run.
"""

import json
import re
import subprocess
from pathlib import Path

from lib import bedplate, corpus, procs, rounds
from lib.corpus import GIB, KIB, MIB

NAME = "reads"
_PROJECT = bedplate.ROOT / "tools" / "peers"
_OURS, _QEMU = "bedplate View", "qemu-img bench, a command"
_PEERS = {"imago 0.2.6": "imago", "qcow2-rs 0.1.6": "qcow2-rs"}
_MAP, _PREAD = "copy from a map, raw file", "pread, raw file"
_REPLICA, _MAPPED = "bedplate replica", "bedplate replica, mapped"
_CODEC, _CODEC_1 = "codec alone, all cores", "codec alone, one core"
_CODEC_KEEPS = "codec that keeps all, all cores"
_KINDS = {"plain": [], "zlib": ["-c"], "zstd": ["-c", "-o", "compression_type=zstd"]}
_WORKLOADS = {"4 KiB random read": "random-4k", "1 MiB sequential read": "sequential-1m",
              "1 MiB sequential read, the first": "first-1m"}
_OPEN = "open, read 4 KiB, close"
_REPLICA_TIMES = 1.3
_PLAIN_TIMES, _DECODED_TIMES, _CODEC_SPEED, _OPEN_MS = 1.3, 1.5, 0.9, 5


def run(bench):
    program = build("read-peers")
    rounds.say("  one thread reads; bedplate may keep 512 MiB decoded, which is more than the "
               "image has. What is not `the first` was read once before")
    rounds.say("  max RSS counts pages of mapped files")
    size_bytes = 32 * MIB if bench.quick else 256 * MIB
    raw = bench.scratch.path / "text.raw"
    # Text: no cluster of it is stored as it is, so that all of them have to be decoded.
    corpus.text(raw, size_bytes)
    for kind, options in _KINDS.items():
        image = bench.scratch.path / f"{kind}.qcow2"
        procs.run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", *options, raw, image)
        procs.run("sync", "--data", image)
        for path in (raw, image):
            corpus.warm(path)
        _one_kind(_Reads(bench, program, image, size_bytes), kind, raw)
        image.unlink()
    raw.unlink()
    _large(bench, program)


def build(name):
    """Builds a program of the peers' project, which is no part of bedplate's own build."""
    manifest = _PROJECT / "Cargo.toml"
    argv = ["cargo", "build", "--release", "--locked", "--bin", name, "--manifest-path", manifest]
    rounds.say(f"\n{NAME}: `cargo build --release` in {_PROJECT.relative_to(bedplate.ROOT)} makes "
               "one program of bedplate and its peers; some minutes for the first time")
    try:
        subprocess.run(argv, check=True)
        described = subprocess.run(
            ["cargo", "metadata", "--no-deps", "--format-version", "1", "--manifest-path",
             manifest], check=True, capture_output=True)
    except (FileNotFoundError, subprocess.CalledProcessError) as failed:
        raise procs.Failure(f"cannot build tools/peers: {failed}") from None
    return Path(json.loads(described.stdout)["target_directory"]) / "release" / name


class _Reads:
    """One image, and what it takes to read it."""

    def __init__(self, bench, program, image, size_bytes):
        self.bench, self._program = bench, program
        self.image, self.size_bytes = image, size_bytes
        self._hashes = {}

    def contender(self, name, reader, workload, unit, file=None, ours=False, floor=False):
        """A reader of the image, or of `file`; a peer that cannot read it says so."""
        def once():
            return self._once(name, reader, workload, unit, file or self.image)

        made = rounds.Contender(name, once, ours=ours, floor=floor)
        if not ours and not floor:
            try:
                self._read(reader, workload, "1", self.image)
            except procs.Failure as failure:
                made.run, made.absent = None, f"cannot read it: {_reason(failure)}"
        return made

    def qemu(self):
        """`qemu-img bench`, in a process with a thread pool and its own block layer."""
        count = int(self.bench.seconds * (2_000 if self.image.stem == "plain" else 500))
        # A stride with no common factor with the size visits blocks all over the image.
        step = 104_729 * 4 * KIB % self.size_bytes

        def once():
            usage = procs.measure(["qemu-img", "bench", "-f", "qcow2", "-c", count, "-d", 1, "-s",
                                   4 * KIB, "-S", step, self.image], self.bench.prefix)
            seconds = re.search(r"Run completed in ([0-9.]+) seconds", usage.output)
            if seconds is None:
                raise procs.Failure(f"`qemu-img bench` printed no time: {usage.output}")
            wall_s = float(seconds.group(1))
            return rounds.Sample(count / wall_s, wall_s, count, usage.cpu_s, 0.0,
                                 rss_bytes=usage.rss_bytes or None)

        return rounds.Contender(_QEMU, once)

    def _read(self, reader, workload, limit, file):
        usage = procs.measure([self._program, reader, file, workload, limit], self.bench.prefix)
        # A process that ends within a few samples was not seen.
        return json.loads(usage.output), usage.rss_bytes or None

    def _once(self, name, reader, workload, unit, file):
        report, rss_bytes = self._read(reader, workload, f"{self.bench.seconds / 4}s", file)
        wanted = self._hashes.setdefault(workload, (report["xxh3"], name))
        if report["xxh3"] != wanted[0]:
            raise procs.Failure(f"reads other bytes than {wanted[1]}")
        wall_s, work = report["wall_ns"] / 1e9, report["bytes" if unit == "B/s" else "ops"]
        return rounds.Sample(work / wall_s, wall_s, work, report["cpu_ns"] / 1e9, 0.0,
                             rss_bytes=rss_bytes)


def _reason(failure):
    """The last thing that a reader said, without what every reader says."""
    line = str(failure).strip().splitlines()[-1]
    quoted = re.search(r'description: "([^"]*)"', line)
    return quoted.group(1) if quoted else re.sub(r"^read-peers: [^:]*: ", "", line)


def _one_kind(reads, kind, raw):
    group, cases = f"{NAME}, {kind} clusters", []
    for title, workload in _WORKLOADS.items():
        small = workload == "random-4k"
        unit, work_unit = ("IOPS", "op") if small else ("B/s", "GiB")
        # The raw file comes first: what it holds is what all others are compared with.
        contenders = [
            reads.contender(_MAP, "mmap", workload, unit, raw, floor=True),
            reads.contender(_PREAD, "pread", workload, unit, raw, floor=True),
            reads.contender(_OURS, "bedplate", workload, unit, ours=True),
            reads.contender(_REPLICA, "replica", workload, unit, ours=True),
            reads.contender(_MAPPED, "replica-mapped", workload, unit, ours=True)]
        contenders += [reads.contender(name, reader, workload, unit)
                       for name, reader in _PEERS.items()]
        if small:
            contenders.append(reads.qemu())
        if workload == "first-1m" and kind != "plain":
            contenders += [
                reads.contender(_CODEC, "codec", workload, unit, floor=True),
                reads.contender(_CODEC_KEEPS, "codec-keeps", workload, unit, floor=True),
                reads.contender(_CODEC_1, "codec-1", workload, unit, floor=True)]
        cases.append(rounds.Case(group, title, reads.size_bytes, "", unit, work_unit, _MAP,
                                 contenders))
    reads.bench.compare(cases)
    _bounds(reads.bench, kind, *cases)


def _bounds(bench, kind, random, _sequential, first):
    decoded = kind != "plain"
    bench.bound(random.title(), f"{kind}, random 4 KiB{' once decoded' if decoded else ''}, "
                "time of the copy from a map", _times(random, _OURS, _MAP),
                most=_DECODED_TIMES if decoded else _PLAIN_TIMES)
    for name, floor, what in ((_REPLICA, _PREAD, "a pread"), (_MAPPED, _MAP, "the copy from a map")):
        bench.bound(random.title(), f"{kind}, random 4 KiB, {name}, time of {what}",
                    _times(random, name, floor), most=_REPLICA_TIMES)
    if decoded:
        ours = rounds.named(first, _OURS)
        bench.bound(first.title(), f"{kind}, first decode, speed of the codec that keeps it, on all "
                    "cores", rounds.ratios(ours, rounds.named(first, _CODEC_KEEPS), rounds.speed),
                    least=_CODEC_SPEED)


def _times(case, over, under):
    """How many times as long an operation of `over` takes as one of `under`."""
    return rounds.ratios(rounds.named(case, over), rounds.named(case, under), _each_s)


def _each_s(sample):
    return sample.wall_s / sample.work


def _large(bench, program):
    """Opening a disk whose tables nobody would want to read in full."""
    size_bytes = 64 * GIB if bench.quick else 1024 * GIB
    image = bench.scratch.path / "large.qcow2"
    procs.run("qemu-img", "create", "-f", "qcow2", image, str(size_bytes))
    # At the places that are compared: each 64th of the disk from its start on.
    places = [size_bytes // 64 * part for part in (0, 1, 17, 40, 63)]
    writes = [word for place in places
              for word in ("-c", f"write -P {place % 251 + 1} {place} 64k")]
    procs.run("qemu-io", "-f", "qcow2", *writes, image)
    reads = _Reads(bench, program, image, size_bytes)
    case = rounds.Case(NAME, _OPEN, size_bytes, "", "opens/s", "op", _OURS, [
        reads.contender(_OURS, "bedplate", "open", "opens/s", ours=True),
        *(reads.contender(name, reader, "open", "opens/s") for name, reader in _PEERS.items())])
    bench.compare([case])
    each_ms = rounds.spread(1000 * _each_s(sample)
                            for sample in rounds.named(case, _OURS).samples)
    bench.bound(case.title(), f"{_OPEN}, ms", each_ms, most=_OPEN_MS)
    image.unlink()
