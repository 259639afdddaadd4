"""URL to a durable, checked file: bedplate against the tools that people use for it.

The reference is what a careful script does: curl, sync, sha256sum. coreutils' sha256sum may lack
the CPU's SHA instructions, so the same with openssl is a row of its own. After each table stand the
bounds that the project has set itself, met or missed; a miss is no failure.
"""

import shlex
import shutil
import sys
from pathlib import Path

from lib import bench_many, corpus, procs, rounds
from lib.corpus import GIB, MIB
from lib.nginx import Nginx, certificate
from lib.transfer_job import BARE, CHECKED, CURL, CURL_CHECKED, Job

NAME = "transfer"
_SPARSE_ROUNDS = 3
_KINDS = {"zlib": [], "zstd": ["-o", "compression_type=zstd"]}


def run(bench, only=None):
    root = bench.scratch.dir("www")
    for name in [only] if only else CASES:
        try:
            CASES[name](bench, root)
        except procs.Failure as failure:
            bench.fail(f"{NAME}:{name}: {failure}")
    shutil.rmtree(root)


# ---- mixed content, http and https ----

def _http(bench, root):
    _mixed(bench, root, "URL to durable file, mixed content, nginx on loopback", None)


def _https(bench, root):
    tls = certificate(bench.scratch.dir("tls"))
    if tls is None:
        rounds.say(f"\n{NAME}:https: openssl is not installed (apt-get install openssl): skipped")
        return
    _mixed(bench, root, "the same over HTTPS (TLS 1.3)", tls)


def _mixed(bench, root, workload, tls):
    source = root / "mixed.img"
    sha256, data_bytes = corpus.mixed(source, 256 * MIB if bench.quick else 2 * GIB)
    nginx = Nginx(bench.scratch, root, bench.prefix, tls, workers=True)
    rounds.say(f"  the file: half random, a quarter zero, a quarter text, 64 KiB units; "
               f"{rounds.size(data_bytes)} are data")
    rounds.say("  CPU time of kernel writeback threads is in nobody's column; what is written "
               "counts a block as often as it is sent to the disk")
    url = f"{nginx.tls_url if tls else nginx.url}/{source.name}"
    job = Job(bench, nginx, url, source, sha256, cacert=tls[2] if tls else None)
    case = rounds.Case(NAME, workload, job.size_bytes, "", "B/s", "GiB", CURL_CHECKED, [
        job.checked(), job.bare(), *([] if tls else [job.serving()]), job.curl_checked(),
        job.curl_openssl(), job.curl(), job.aria2c(8), job.wget(), job.nbdkit(), job.requests(),
        job.crt(), job.crt("--direct"), job.nowhere()])
    bench.compare([case])
    _wall(bench, case, CHECKED, CURL_CHECKED, 0.45)
    _wall(bench, case, CHECKED, CURL, 0.6)
    _wall(bench, case, BARE, CURL, 0.4)
    spent = rounds.ratios(rounds.named(case, CHECKED), rounds.named(case, CURL_CHECKED),
                          rounds.client_cpu)
    bench.bound(case.title(), f"client CPU of {CHECKED}, of {CURL_CHECKED}", spent, most=0.6)
    _allocation(bench, case, data_bytes)
    bench.scratch.retire(nginx.server)
    source.unlink()


def _allocation(bench, case, data_bytes):
    """Zeroes must have taken no room: the file's own data, and a little for its records."""
    slack = max(data_bytes // 50, MIB)
    for contender in case.contenders:
        if not contender.ours or not contender.samples:
            continue
        share = rounds.spread(sample.allocated_bytes / data_bytes for sample in contender.samples)
        bench.bound(case.title(), f"blocks on disk of {contender.name}, of the data's own", share,
                    most=1.01)
        if share[2] * data_bytes > data_bytes + slack:
            bench.fail(f"{contender.name}: {rounds.size(share[2] * data_bytes)} allocated for "
                       f"{rounds.size(data_bytes)} of data")


# ---- a server far away ----

def _slow(bench, root):
    """A server that gives each connection 40 MB/s, 50 ms after it was asked."""
    source = root / "slow.img"
    sha256, _ = corpus.mixed(source, 128 * MIB if bench.quick else GIB)
    script = Path(__file__).with_name("slow_server.py")
    server = bench.scratch.serve("slow server", [sys.executable, script, source], bench.prefix)
    server.wait_for(lambda: "port " in server.output(), "its port")
    port = server.output().split("port ")[1].split()[0]
    job = Job(bench, server, f"http://127.0.0.1:{port}/{source.name}", source, sha256)
    case = rounds.Case(
        NAME, "40 MB/s a connection, 50 ms before each answer", job.size_bytes, "", "B/s", "GiB",
        CURL, [job.checked(), job.bare(), job.curl(), job.aria2c(8), job.aria2c(16), job.crt()])
    bench.compare([case], most_rounds=_SPARSE_ROUNDS)
    _times(bench, case, CHECKED, CURL, 5)
    bench.scratch.retire(server)
    source.unlink()


# ---- compressed QCOW2 ----

def _qcow2(bench, root):
    """A compressed QCOW2 image by URL to a raw, sparse file. Nobody makes a digest of that."""
    size_bytes = 256 * MIB if bench.quick else 2 * GIB
    raw = bench.scratch.path / "expanded.img"
    for content, make, kinds in (("mixed", corpus.mixed, _KINDS), ("text", corpus.text, ["zlib"])):
        _, data_bytes = make(raw, size_bytes)
        for kind in kinds:
            image = root / f"{content}-{kind}.qcow2"
            try:
                procs.run("qemu-img", "convert", "-m", "16", "-f", "raw", "-O", "qcow2", "-c",
                          *_KINDS[kind], raw, image)
            except procs.Failure:
                rounds.say(f"\n{NAME}:qcow2: qemu-img here cannot compress with {kind}: skipped")
                continue
            _expand(bench, root, image, raw, f"{kind} QCOW2, {content} content", data_bytes)
            image.unlink()
    raw.unlink()


def _expand(bench, root, image, raw, what, data_bytes):
    nginx = Nginx(bench.scratch, root, bench.prefix)
    job = Job(bench, nginx, f"{nginx.url}/{image.name}", image, wanted=raw)
    out, packed = shlex.quote(str(job.out)), shlex.quote(f"{job.out}.packed")
    usual, ours = "curl, qemu-img convert, sync", "bedplate pull --layout raw"

    def convert(name, options):
        return job.shell(name, "qemu-img", (
            f"curl -sSf -o {packed} {job.url} && qemu-img convert {options}-O raw {packed} {out} "
            f"&& sync --data {out} && rm {packed}"))

    case = rounds.Case(
        NAME, f"{what} ({rounds.size(image.stat().st_size)}) by URL to raw file", job.size_bytes,
        "", "B/s", "GiB", usual, [
            job.pull(ours, "--layout", "raw"),
            job.pull(f"{ours} --no-digest", "--layout", "raw", "--no-digest"),
            convert(usual, ""),
            convert("curl, qemu-img convert -m 16 -W, sync", "-m 16 -W ")])
    bench.compare([case])
    _times(bench, case, ours, usual, 2.5)
    _allocation(bench, case, data_bytes)
    bench.scratch.retire(nginx.server)


# ---- a large image with little in it ----

def _sparse(bench, root):
    """A twentieth of the image is data: nothing is to be written, or hashed, twice."""
    size_bytes = 2 * GIB if bench.quick else 20 * GIB
    source = root / "sparse.img"
    sha256, data_bytes = corpus.sparse(source, size_bytes, every=20)
    nginx = Nginx(bench.scratch, root, bench.prefix)
    job = Job(bench, nginx, f"{nginx.url}/{source.name}", source, sha256)
    curl, free_bytes = job.curl(), shutil.disk_usage(bench.scratch.path).free
    if bench.quick:
        curl = rounds.Contender(CURL, None, absent="not with --quick: it writes the holes too")
    elif free_bytes < size_bytes + 4 * GIB:
        curl = rounds.Contender(CURL, None, absent=(
            f"writes the holes too, and only {rounds.size(free_bytes)} are free here"))
    case = rounds.Case(
        NAME, f"sparse image, {rounds.size(data_bytes)} of data (curl writes all of it)",
        size_bytes, "", "B/s", "GiB", CHECKED, [job.checked(), job.bare(), curl])
    bench.compare([case], most_rounds=_SPARSE_ROUNDS)
    _allocation(bench, case, data_bytes)
    ours, bare = rounds.named(case, CHECKED), rounds.named(case, BARE)
    written = rounds.spread(sample.written_bytes and sample.written_bytes / data_bytes
                            for sample in ours.samples)
    bench.bound(case.title(), f"bytes written by {CHECKED}, of the data's own (written once)",
                written, most=1.02)
    if shutil.which("openssl"):
        pass_s = procs.measure(["openssl", "dgst", "-sha256", source]).cpu_s
        digest = rounds.spread((one.client_cpu_s - other.client_cpu_s) / pass_s
                               for one, other in zip(ours.samples, bare.samples))
        bench.bound(case.title(), "CPU that --sha256 adds, of one pass of openssl (hashed once)",
                    digest, most=1.5)
    bench.scratch.retire(nginx.server)
    source.unlink()


# ---- bounds ----

def _wall(bench, case, ours, peer, most):
    spent = rounds.ratios(rounds.named(case, ours), rounds.named(case, peer), rounds.wall)
    bench.bound(case.title(), f"wall time of {ours}, of {peer}", spent, most=most)


def _times(bench, case, ours, peer, least):
    faster = rounds.ratios(rounds.named(case, ours), rounds.named(case, peer), rounds.speed)
    bench.bound(case.title(), f"speed of {ours}, of {peer}", faster, least=least)


CASES = {"http": _http, "https": _https, "slow": _slow, "qcow2": _qcow2, "sparse": _sparse,
         "many": bench_many.run}
