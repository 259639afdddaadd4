"""Readers on the node: what attaching costs, what many processes share, and a first byte by URL.

Why: one engine serves many replicas; each is a process of its own.
How: `bedplate serve` with one image, and reader processes (tools/peers, `replica-load`); qemu-nbd has
the same file. The origin of what arrives is far away: 50 ms for each answer, 20 MB/s for all.
"""

import json
import re
import statistics
import subprocess
import time
from pathlib import Path

from lib import bench_reads, corpus, nbd, nbd_load, procs, rounds
from lib.bench_scale import Client
from lib.corpus import GIB, KIB, MIB

NAME = "serving"
_MANY = 16
_ATTACH_US, _TIMES_QEMU = 100, 20
_SHARE = 1.1
_ROUND_TRIPS = 3
_DELAY_S, _RATE = 0.050, 20_000_000


CASES = ("readers", "stream")


def run(bench, part=None):
    if part in (None, "readers"):
        _readers(bench)
    if part in (None, "stream"):
        _stream(bench)


def _readers(bench):
    driver = bench_reads.build("replica-load")
    size_bytes = 64 * MIB if bench.quick else 1024 * MIB
    raw = bench.scratch.path / "disk.raw"
    corpus.dense(raw, size_bytes)
    _Node(bench, driver, raw, size_bytes).all()
    raw.unlink()


def _serve(bench, disk, *lines):
    config = bench.scratch.path / f"{disk.name}.toml"
    config.write_text("\n".join([f"disks = [{json.dumps(str(disk))}]", "allow_loopback = true",
                                 *lines]) + "\n")
    server = bench.scratch.serve("bedplate serve", [bench.program, "serve", "--config", config],
                                 bench.prefix)
    server.wait_for_socket(disk / "bedplate" / "control.sock")
    return server, Client(disk / "bedplate" / "control.sock")


class _Node:
    """A daemon with one raw image, ready."""

    def __init__(self, bench, driver, raw, size_bytes):
        self._bench, self._driver, self._raw, self._size_bytes = bench, driver, raw, size_bytes
        self._disk = bench.scratch.dir("serving-disk")
        self._server, client = _serve(bench, self._disk)
        client.call("POST", "/v1/images", {"name": "disk", "url": f"file://{raw}"})
        client.call("POST", "/v1/attachments", {"image": "disk", "reader": "bench"})
        while json.loads(client.call("GET", "/v1/images/disk"))["copies"][0]["state"] != "ready":
            time.sleep(0.05)
        corpus.warm(next(self._disk.glob("backing-images/*/backing")))
        self._socket = self._disk / "bedplate" / "replica.sock"

    def all(self):
        self._attaching()
        self._against_qemu()
        self._many()
        self._bench.scratch.retire(self._server)

    def _attaching(self):
        count = 200 if self._bench.quick else 2000
        found = []
        for _ in range(self._bench.rounds):
            usage = procs.measure([self._driver, self._socket, "disk", "attach", count],
                                  self._bench.prefix)
            found.append(json.loads(usage.output))
        median_us = [one["median_ns"] / 1000 for one in found]
        p99_us = statistics.median(one["p99_ns"] / 1000 for one in found)
        rounds.say(f"\n{NAME}: attaching, {count} times: 99 of 100 within {p99_us:.0f} us")
        self._bench.bound(NAME, "attaching, us at the median", rounds.spread(median_us),
                          most=_ATTACH_US)

    def _against_qemu(self):
        bench, qemu = self._bench, "qemu-nbd"
        path = bench.scratch.path / "serving-q.sock"
        export = nbd_load.start(bench, qemu, ["qemu-nbd", "-r", "-t", "-f", "raw", "-k", path,
                                              self._raw], path)
        corpus.warm(self._raw)
        load = nbd_load.RANDOM_1
        case = nbd_load.case(bench, NAME, load, self._size_bytes, {qemu: export}, qemu)
        for mode in ("pread", "mapped"):
            case.contenders.append(rounds.Contender(
                f"bedplate replica, {mode}", lambda mode=mode: self._together(mode, 1)[0], True))
        bench.compare([case])
        for ours in case.contenders[1:]:
            bench.bound(case.title(), f"{ours.name}, speed of {qemu}",
                        rounds.ratios(ours, case.contenders[0], rounds.speed), least=_TIMES_QEMU)
        nbd_load.stop(bench, {qemu: export})

    def _many(self):
        bench = self._bench
        shares = []

        def once(count):
            sample, share = self._together("mapped", count)
            if count == _MANY:
                shares.append(share)
            return sample

        names = {1: "1 process", 2: "2 processes", _MANY: f"{_MANY} processes"}
        case = rounds.Case(NAME, "4 KiB random read, mapped", self._size_bytes, "1 each", "IOPS",
                           "op", names[1], [
                               rounds.Contender(name, lambda count=count: once(count), True)
                               for count, name in names.items()])
        bench.compare([case])
        one = case.contenders[0]
        for other in case.contenders[1:]:
            ratio = rounds.ratios(other, one, rounds.speed)
            rounds.say(f"  {other.name}, speed of {one.name}: {rounds.ratio_text(ratio)} (two cores: 2)")
        bench.bound(case.title(), f"pages of the image in all {_MANY} processes, of its size",
                    rounds.spread(shares), most=_SHARE)

    def _together(self, mode, count):
        """`count` processes that read at the same time; a sample, and what their pages are of the image."""
        argv = [*self._bench.prefix, self._driver, self._socket, "disk", mode, self._bench.seconds]
        started = [subprocess.Popen([str(word) for word in argv], stdin=subprocess.PIPE,
                                    stdout=subprocess.PIPE, text=True) for _ in range(count)]
        try:
            for process in started:
                if process.stdout.readline() != "ready\n":
                    raise procs.Failure("a reader has not become ready")
            before_s, began = self._server.cpu_s(), time.monotonic()
            for process in started:
                process.stdin.write("go\n")
                process.stdin.flush()
            reports = [json.loads(process.stdout.readline()) for process in started]
            # Not each one's own: more processes than processors read one after another in part.
            wall_s = time.monotonic() - began
            if len({report["xxh3"] for report in reports}) != 1:
                raise procs.Failure("readers read different bytes")
            pages = sum(_pss_file(process.pid) for process in started)
        finally:
            for process in started:
                process.stdin.close()
                process.wait()
        ops = sum(report["ops"] for report in reports)
        cpu_s = sum(report["cpu_ns"] for report in reports) / 1e9
        return rounds.Sample(ops / wall_s, wall_s, ops, cpu_s,
                             self._server.cpu_s() - before_s), pages / self._size_bytes


def _pss_file(pid):
    """Bytes of file pages that this process maps, each divided by how many map it."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return int(re.search(r"^Pss_File:\s+(\d+) kB", text, re.MULTILINE).group(1)) * KIB


def _stream(bench):
    """The first block of images whose download has not begun."""
    size_bytes = (1 if bench.quick else 10) * GIB
    root = bench.scratch.dir("stream")
    raw = root / "disk.raw"
    corpus.sparse(raw, size_bytes, every=64)
    image = root / "disk.qcow2"
    # Compressed, of content that is not all holes.
    small = root / "small.raw"
    corpus.text(small, min(size_bytes, 512 * MIB))
    procs.run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", "-c", small, image)
    procs.run("qemu-img", "resize", "-f", "qcow2", image, str(size_bytes))
    small.unlink()
    for path in (raw, image):
        waits = [_first_block(bench, path, f"{path.suffix[1:]}-{number}")
                 for number in range(bench.rounds)]
        rounds.say(f"\n{NAME}: the first block of a {rounds.size(size_bytes)} {path.suffix[1:]} image, "
                   f"origin {_DELAY_S * 1e3:.0f} ms and {_RATE // 10**6} MB/s away: median "
                   f"{statistics.median(waits) * 1e3:.0f} ms")
        bench.bound(NAME, f"first block of {path.name}, in round trips of {_DELAY_S * 1e3:.0f} ms",
                    rounds.spread(wait / _DELAY_S for wait in waits), most=_ROUND_TRIPS)
        path.unlink()


def _first_block(bench, path, name):
    origin = bench.scratch.serve("slow server", [
        "python3", Path(__file__).with_name("slow_server.py"), path, _RATE])
    origin.wait_for(lambda: "port" in origin.output(), "its port")
    port = re.search(r"port (\d+)", origin.output()).group(1)
    disk = bench.scratch.dir(f"stream-{name}")
    server, client = _serve(bench, disk)
    client.call("POST", "/v1/images", {"name": "disk",
                                       "url": f"http://127.0.0.1:{port}/{path.name}"})
    began = time.monotonic()
    held = json.loads(client.call("POST", "/v1/attachments",
                                  {"image": "disk", "reader": "bench", "wait": "stream"}))
    while held["state"] != "ready":
        if held["state"] == "failed":
            raise procs.Failure(held["message"])
        time.sleep(0.002)
        held = json.loads(client.call("GET", f"/v1/attachments/{held['id']}"))
    data, _ = nbd.first_bytes(disk / "bedplate" / "nbd.sock", name="disk")
    wait_s = time.monotonic() - began
    if not any(data):
        raise procs.Failure("the first block is empty")
    bench.scratch.retire(server)
    bench.scratch.retire(origin)
    return wait_s
