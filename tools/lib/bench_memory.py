"""Resident set while ever larger images are brought in: it must not grow with the image."""

import hashlib
import shutil

from lib import bedplate, corpus, procs, rounds
from lib.corpus import GIB, MIB
from lib.nginx import Nginx

NAME = "memory"
_BOUND_BYTES = 200 * MIB
_GROWTH = 1.25
_SIZES = ((1, 4), (8, 8), (64, 32))
"""(GiB, one MiB of data in how many): the largest has only 2 GiB of data."""
_QUICK_SIZES = _SIZES[:2]
_PULL = "bedplate pull --sha256"
_RUN = "bedplate run --sha256, to ready"


def run(bench):
    root = bench.scratch.dir("www")
    nginx = Nginx(bench.scratch, root)
    rounds.say(f"\n{NAME}: URL to durable file; bound {rounds.size(_BOUND_BYTES)}")
    rounds.say("  max RSS is the process's VmHWM: pages of mapped files count, other page cache "
               "does not")
    sizes = _QUICK_SIZES if bench.quick else _SIZES
    seen = {_PULL: [], _RUN: []}
    for gib, every in sizes:
        source = root / f"sparse-{gib}.img"
        sha256, data_bytes = corpus.sparse(source, gib * GIB, every)
        rounds.say(f"  {gib} GiB, of which {rounds.size(data_bytes)} are data:")
        # Others write the holes too: of the largest they would fill the disk.
        seen[_PULL].append(_pull(bench, nginx, source, sha256, with_curl=gib <= 8))
        seen[_RUN].append(_run(bench, _RUN, f"{nginx.url}/{source.name}", sha256))
        if gib == 8:
            _qcow2(bench, nginx, root, source)
        source.unlink()
    for name, (first, *later) in seen.items():
        growth = rounds.spread(rss_bytes / first for rss_bytes in later)
        bench.bound(NAME, f"max RSS of {name} from {sizes[1][0]} GiB on, of that with 1 GiB",
                    growth and (growth[2], growth[1], growth[2]), most=_GROWTH)
    bench.scratch.retire(nginx.server)
    shutil.rmtree(root)


def _pull(bench, nginx, source, sha256, with_curl):
    """`bedplate pull`, and curl beside it; returns the first one's high-water mark."""
    url, out = f"{nginx.url}/{source.name}", bench.scratch.path / "fetched"
    usage = procs.measure([bench.program, "-q", "pull", url, "-o", out, "--sha256", sha256])
    if not corpus.equal(source, out):
        bench.fail(f"{_PULL}: differs from {source.name}")
    out.unlink()
    _report(bench, _PULL, usage.rss_bytes, usage.anon_bytes, usage.wall_s, ours=True)
    if with_curl:
        peer = procs.measure(["curl", "-sSf", "-o", out, url])
        out.unlink()
        _report(bench, "curl", peer.rss_bytes, peer.anon_bytes, peer.wall_s, ours=False)
    return usage.rss_bytes


def _qcow2(bench, nginx, root, source):
    image = root / "large.qcow2"
    procs.run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", source, image)
    with open(image, "rb") as opened:
        sha256 = hashlib.file_digest(opened, "sha256").hexdigest()
    _run(bench, "the same image as qcow2", f"{nginx.url}/{image.name}", sha256)
    image.unlink()


def _run(bench, name, url, sha256):
    """`bedplate run`: the kernel's high-water mark, read when the export answers."""
    data, socket_path = bench.scratch.dir("data"), bench.scratch.path / "memory.sock"
    server, wall_s = bedplate.start_run(bench.scratch, bedplate.run_argv(
        bench.program, url, "large", data, socket_path, sha256))
    rss_bytes, anon_bytes = procs.resident(server.pid)
    bench.scratch.retire(server)
    shutil.rmtree(data)
    _report(bench, name, rss_bytes, anon_bytes, wall_s, ours=True)
    return rss_bytes


def _report(bench, name, rss_bytes, anon_bytes, wall_s, ours):
    verdict = ""
    if ours:
        verdict = "within the bound" if rss_bytes <= _BOUND_BYTES else "OVER THE BOUND"
    rounds.say(f"    {name:<32}  max RSS {rss_bytes / MIB:7.1f} MiB  anonymous "
               f"{anon_bytes / MIB:7.1f} MiB  {wall_s:7.2f} s  {verdict}")
    bench.notes.append({"group": NAME, "name": name, "max_rss_bytes": rss_bytes,
                        "anon_bytes": anon_bytes, "wall_s": wall_s,
                        "bound_bytes": _BOUND_BYTES if ours else None})
    if ours and rss_bytes > _BOUND_BYTES:
        bench.fail(f"{name}: {rss_bytes / MIB:.0f} MiB resident, the bound is "
                   f"{_BOUND_BYTES / MIB:.0f} MiB")
