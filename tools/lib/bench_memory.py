"""Resident set while a large image is brought in: it must not grow with the image."""

import hashlib
import shutil

from lib import bedplate, corpus, procs, rounds
from lib.corpus import GIB, MIB
from lib.nginx import Nginx

NAME = "memory"
_BOUND_BYTES = 200 * MIB


def run(bench):
    size_bytes = GIB if bench.quick else 8 * GIB
    root = bench.scratch.dir("www")
    source = root / "large.img"
    sha256, data_bytes = corpus.sparse(source, size_bytes)
    nginx = Nginx(bench.scratch, root)
    url = f"{nginx.url}/{source.name}"
    rounds.say(f"\n{NAME}: URL to durable file, {rounds.size(size_bytes)} of which "
               f"{rounds.size(data_bytes)} are data; bound {rounds.size(_BOUND_BYTES)}")
    rounds.say("  max RSS is the process's VmHWM: pages of mapped files count, other page cache "
               "does not")
    out = bench.scratch.path / "fetched"
    commands = {
        "bedplate pull --sha256": [bench.program, "pull", url, "-o", out, "--sha256", sha256],
        "curl": ["curl", "-sSf", "-o", out, url],
    }
    for name, argv in commands.items():
        if shutil.which(str(argv[0])) is None:
            rounds.say(f"  {name:<32}  not installed")
            continue
        usage = procs.measure(argv)
        ours = name.startswith("bedplate")
        if ours and not corpus.equal(source, out):
            bench.fail(f"{name}: differs from {source.name}")
        out.unlink()
        _report(bench, name, usage.rss_bytes, usage.anon_bytes, usage.wall_s, ours)
    _run(bench, "bedplate run --sha256, to ready", url, sha256)
    qcow2 = root / "large.qcow2"
    procs.run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", source, qcow2)
    with open(qcow2, "rb") as image:
        qcow2_sha256 = hashlib.file_digest(image, "sha256").hexdigest()
    _run(bench, "the same image as qcow2", f"{nginx.url}/{qcow2.name}", qcow2_sha256)
    bench.scratch.retire(nginx.server)
    shutil.rmtree(root)


def _run(bench, name, url, sha256):
    """`bedplate run`: the kernel's high-water mark, read when the export answers."""
    data, socket_path = bench.scratch.dir("data"), bench.scratch.path / "memory.sock"
    server, wall_s = bedplate.start_run(bench.scratch, bedplate.run_argv(
        bench.program, url, "large", data, socket_path, sha256))
    rss_bytes, anon_bytes = procs.resident(server.pid)
    bench.scratch.retire(server)
    shutil.rmtree(data)
    _report(bench, name, rss_bytes, anon_bytes, wall_s, ours=True)


def _report(bench, name, rss_bytes, anon_bytes, wall_s, ours):
    verdict = ""
    if ours:
        verdict = "within the bound" if rss_bytes <= _BOUND_BYTES else "OVER THE BOUND"
    rounds.say(f"  {name:<32}  max RSS {rss_bytes / MIB:7.1f} MiB  anonymous "
               f"{anon_bytes / MIB:7.1f} MiB  {wall_s:7.2f} s  {verdict}")
    bench.notes.append({"group": NAME, "name": name, "max_rss_bytes": rss_bytes,
                        "anon_bytes": anon_bytes, "wall_s": wall_s,
                        "bound_bytes": _BOUND_BYTES if ours else None})
    if ours and rss_bytes > _BOUND_BYTES:
        bench.fail(f"{name}: {rss_bytes / MIB:.0f} MiB resident, the bound is "
                   f"{_BOUND_BYTES / MIB:.0f} MiB")
