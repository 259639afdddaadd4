"""Resident set while ever larger images are brought in: it must not grow with the image."""

import hashlib
import json
import shutil
import time

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
    _growth(bench)
    _many(bench)


def _growth(bench):
    """The same transfer of ever larger, ever sparser images."""
    sizes = (GIB // 4, GIB) if bench.quick else (GIB, 8 * GIB, 64 * GIB)
    rounds.say(f"\n{NAME}: larger images, 256 MiB of data in each, no digest")
    root = bench.scratch.dir("growth")
    nginx, out = Nginx(bench.scratch, root), bench.scratch.path / "grown"
    for size_bytes in sizes:
        source = root / f"{size_bytes // MIB}.img"
        corpus.holes(source, size_bytes, 256 * MIB)
        argv = [bench.program, "-q", "pull", f"{nginx.url}/{source.name}", "-o", out, "--no-digest"]
        usage = procs.measure(argv)
        if not corpus.equal(source, out):
            bench.fail(f"{source.name}: differs")
        stored = corpus.allocated(out)
        _report(bench, f"pull of {rounds.size(size_bytes)}, {rounds.size(stored)} stored",
                usage.rss_bytes, usage.anon_bytes, usage.wall_s, ours=True)
        out.unlink()
        source.unlink()
    bench.scratch.retire(nginx.server)
    shutil.rmtree(root)


def _many(bench, count=32):
    """Transfers that share one daemon: none may starve."""
    size_bytes = (16 if bench.quick else 128) * MIB
    root, disk = bench.scratch.dir("many"), bench.scratch.dir("disk")
    sources = [root / f"image-{index}.img" for index in range(count)]
    for index, source in enumerate(sources):
        corpus.random_bytes(source, size_bytes, index)
    nginx, socket = Nginx(bench.scratch, root), bench.scratch.path / "many.sock"
    config = bench.scratch.path / "many.toml"
    config.write_text(f'disks = ["{disk}"]\nallow_loopback = true\nmax_transfers = {count}\n'
                      f'control_socket = "{socket}"\n')
    server = bench.scratch.serve("serve", [bench.program, "serve", "--config", config])
    server.wait_for(socket.exists, "its control socket")
    client = [bench.program, "-q", "--socket", socket]
    began = time.monotonic()
    for source in sources:
        procs.run(*client, "create", f"{nginx.url}/{source.name}", "--name", source.stem, "--fetch")
    ended = {}
    while len(ended) < count:
        for line in procs.run(*client, "--json", "list").splitlines():
            image = json.loads(line)
            states = [copy["state"] for copy in image["copies"]]
            if "ready" in states:
                ended.setdefault(image["name"], time.monotonic() - began)
        time.sleep(0.05)
    rss_bytes, anon_bytes = procs.resident(server.pid)
    first, last = min(ended.values()), max(ended.values())
    rounds.say(f"\n{NAME}: {count} transfers of {rounds.size(size_bytes)} in one daemon: "
               f"{count * size_bytes / last / GIB:.2f} GiB/s together, the first ready after "
               f"{first:.1f} s, the last after {last:.1f} s ({first / last:.2f} of it)")
    _report(bench, f"daemon with {count} transfers", rss_bytes, anon_bytes, last, ours=False)
    bench.notes.append({"group": NAME, "name": "fairness", "first_s": first, "last_s": last})
    bench.scratch.retire(server)
    bench.scratch.retire(nginx.server)
    shutil.rmtree(root)
    shutil.rmtree(disk)


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
