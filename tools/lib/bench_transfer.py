"""URL to a durable, checked file: bedplate against the tools that people use for it.

Every command ends with the file's data on the disk (`sync --data` is fdatasync). The reference is
what a careful script does: curl, sync, sha256sum. coreutils' sha256sum may lack the CPU's SHA
instructions, so the same with openssl is a row of its own.
"""

import shlex
import shutil

from lib import bedplate, corpus, nbd, procs, rounds
from lib.corpus import GIB, MIB
from lib.nginx import Nginx

NAME = "transfer"
_REFERENCE = "curl, sync, sha256sum"


def run(bench):
    size_bytes = 64 * MIB if bench.quick else GIB
    root = bench.scratch.dir("www")
    source = root / "mixed.img"
    sha256, data_bytes = corpus.mixed(source, size_bytes)
    nginx = Nginx(bench.scratch, root, bench.prefix)
    job = _Job(bench, nginx, source, sha256, size_bytes)
    rounds.say(f"  the file: half random, a quarter zero, a quarter text, 64 KiB units; "
               f"{rounds.size(data_bytes)} are data")
    rounds.say("  CPU time of kernel writeback threads is in nobody's column")
    case = rounds.Case(
        NAME, "URL to durable file, mixed content, nginx on loopback", size_bytes, "", "B/s",
        "GiB", _REFERENCE, job.contenders())
    bench.compare([case])
    _check_allocation(bench, case, data_bytes)
    bench.scratch.retire(nginx.server)
    shutil.rmtree(root)


class _Job:
    """One file to bring in, again and again."""

    def __init__(self, bench, nginx, source, sha256, size_bytes):
        self._bench, self._nginx, self._source = bench, nginx, source
        self._sha256, self._size_bytes = sha256, size_bytes
        self._out = bench.scratch.path / "fetched"
        self._verified = set()

    def contenders(self):
        url = f"{self._nginx.url}/{self._source.name}"
        out, digest = shlex.quote(str(self._out)), self._sha256
        curl = f"curl -sSf -o {out} {url} && sync --data {out}"
        sha256sum = f"echo '{digest}  {self._out}' | sha256sum --check --quiet"
        openssl = f"openssl dgst -sha256 -r {out} | grep -q ^{digest}"
        pull = [self._bench.program, "pull", url, "-o", self._out]
        return [
            self._command("bedplate pull --sha256", [*pull, "--sha256", digest], ours=True),
            self._command("bedplate pull, no digest given", pull, ours=True),
            rounds.Contender("bedplate run --sha256, to ready", lambda: self._run(url), ours=True),
            self._shell(_REFERENCE, "curl", f"{curl} && {sha256sum}"),
            self._shell("curl, sync, openssl sha256", "openssl", f"{curl} && {openssl}"),
            self._shell("curl, sync", "curl", curl),
            self._shell("aria2c -x8 --checksum, sync", "aria2c", (
                f"aria2c -q -x8 -s8 -k1M --file-allocation=none --checksum=sha-256={digest} "
                f"-d / -o {out} {url} && sync --data {out}")),
            self._shell("wget, sync", "wget", f"wget -q -O {out} {url} && sync --data {out}"),
        ]

    def _shell(self, name, tool, line):
        if shutil.which(tool) is None:
            return rounds.Contender(name, None, absent="not installed")
        return self._command(name, ["sh", "-c", line])

    def _command(self, name, argv, ours=False):
        return rounds.Contender(name, lambda: self._once(name, argv), ours)

    def _once(self, name, argv):
        self._prepare()
        server_s = self._nginx.cpu_s()
        usage = procs.measure(argv, self._bench.prefix)
        sample = rounds.Sample(
            self._size_bytes / usage.wall_s, usage.wall_s, self._size_bytes, usage.cpu_s,
            self._nginx.cpu_s() - server_s, rss_bytes=usage.rss_bytes,
            allocated_bytes=corpus.allocated(self._out))
        self._verify(name, self._out)
        self._out.unlink()
        return sample

    def _run(self, url):
        """`bedplate run` until its export answers; the bytes are verified through NBD."""
        self._prepare()
        data, socket_path = self._bench.scratch.dir("data"), self._bench.scratch.path / "run.sock"
        server_s = self._nginx.cpu_s()
        server, wall_s = bedplate.start_run(self._bench.scratch, bedplate.run_argv(
            self._bench.program, url, "mixed", data, socket_path, self._sha256), self._bench.prefix)
        sample = rounds.Sample(
            self._size_bytes / wall_s, wall_s, self._size_bytes, server.cpu_s(),
            self._nginx.cpu_s() - server_s, rss_bytes=procs.resident(server.pid)[0],
            allocated_bytes=sum(corpus.allocated(path) for path in data.rglob("backing*")
                                if path.is_file()))
        if "run" not in self._verified:
            procs.run("nbdcopy", nbd.uri(socket_path), self._out)
            self._verify("run", self._out)
            self._out.unlink()
        self._bench.scratch.retire(server)
        shutil.rmtree(data)
        return sample

    def _prepare(self):
        self._out.unlink(missing_ok=True)
        corpus.warm(self._source)
        # What earlier runs left to write back is not this run's cost.
        procs.run("sync", "--file-system", self._bench.scratch.path)

    def _verify(self, name, path):
        """Once per contender: the same bytes as the source."""
        if name in self._verified:
            return
        self._verified.add(name)
        if not corpus.equal(self._source, path):
            raise procs.Failure(f"{path.name}: differs from {self._source.name}")


def _check_allocation(bench, case, data_bytes):
    """Zeroes must have taken no room: the file's own data, and a little for its records."""
    slack = max(data_bytes // 50, MIB)
    for contender in case.contenders:
        if not contender.ours or not contender.samples:
            continue
        most = max(sample.allocated_bytes for sample in contender.samples)
        if most > data_bytes + slack:
            bench.fail(f"{contender.name}: {rounds.size(most)} allocated for "
                       f"{rounds.size(data_bytes)} of data")
