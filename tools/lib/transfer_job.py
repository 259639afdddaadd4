"""One file to bring in, again and again, by bedplate and by the tools that people use for it.

Every command ends with the file's data on the disk: bedplate by itself, the rest with `sync --data`
(fdatasync). What a contender brought in is compared with the source once, outside the timing.
"""

import functools
import os
import shlex
import shutil
import sys
from pathlib import Path

from lib import bedplate, corpus, nbd, procs, rounds

CHECKED = "bedplate pull --sha256"
BARE = "bedplate pull --no-digest"
CURL_CHECKED = "curl, sync, sha256sum"
CURL = "curl, sync"
_PACKAGES = {"aria2c": "aria2", "nbdkit": "nbdkit", "nbdcopy": "libnbd-bin"}
_LIBRARIES = {"requests": "apt-get install python3-requests", "awscrt": "pip install awscrt"}


class Job:
    """A URL, the bytes that it has to become, and every way to get them."""

    def __init__(self, bench, server, url, source, sha256=None, cacert=None, wanted=None):
        """`wanted` is what comes out, if it is not what is served; `server` has `cpu_s`."""
        self._bench, self._server, self.url, self._source = bench, server, url, source
        self._sha256, self._cacert, self._wanted = sha256, cacert, wanted or source
        self.size_bytes = self._wanted.stat().st_size
        self.out = bench.scratch.path / "fetched"
        self._sh_out = shlex.quote(str(self.out))
        self._verified = set()

    # ---- bedplate ----

    def checked(self):
        return self.pull(CHECKED, "--sha256", self._sha256)

    def bare(self):
        return self.pull(BARE, "--no-digest")

    def pull(self, name, *options):
        """`bedplate pull`; absent if this build's `pull` has not all of the options."""
        if self._cacert:
            options = (*options, "--cacert", self._cacert)
        for option in options:
            if str(option).startswith("--") and not bedplate.offers(
                    self._bench.program, "pull", option):
                return rounds.Contender(name, None, ours=True,
                                        absent=f"`bedplate pull` has no {option} yet")
        return self.command(name, [self._bench.program, "-q", "pull", self.url, "-o", self.out,
                                   *options], ours=True)

    def serving(self):
        """`bedplate run` until its export answers."""
        return rounds.Contender("bedplate run --sha256, to ready", self._run, ours=True)

    # ---- peers ----

    def curl_checked(self):
        digest = f"echo '{self._sha256}  {self.out}' | sha256sum --check --quiet"
        return self.shell(CURL_CHECKED, "curl", f"{self._curl()} && {digest}")

    def curl_openssl(self):
        digest = f"openssl dgst -sha256 -r {self._sh_out} | grep -q ^{self._sha256}"
        return self.shell("curl, sync, openssl sha256", "openssl", f"{self._curl()} && {digest}")

    def curl(self):
        return self.shell(CURL, "curl", self._curl())

    def nowhere(self):
        """No peer: what the server and the loopback take by themselves, with nothing kept."""
        name = "curl, nothing kept"
        return rounds.Contender(name, lambda: self._once(name, [
            "sh", "-c", f"curl -sSf {self._trust('--cacert ')}-o /dev/null {self.url}"], False), floor=True)

    def aria2c(self, connections):
        return self.shell(f"aria2c -x{connections} --checksum, sync", "aria2c", self._synced(
            f"aria2c -q -x{connections} -s{connections} -k1M --file-allocation=none "
            f"{self._trust('--ca-certificate=')}--checksum=sha-256={self._sha256} "
            f"-d / -o {self._sh_out} {self.url}"))

    def wget(self):
        return self.shell("wget, sync", "wget", self._synced(
            f"wget -q {self._trust('--ca-certificate=')}-O {self._sh_out} {self.url}"))

    def nbdkit(self):
        copy = shlex.quote(f'nbdcopy "$uri" {self._sh_out}')
        return self.shell("nbdkit curl | nbdcopy, sync", "nbdkit", self._synced(
            f"nbdkit -U - curl {self.url} {self._trust('cainfo=')}--run {copy}"))

    def requests(self):
        return self._python("python requests, sha256, sync", "requests", "peer_requests.py",
                            self._sha256, *([self._cacert] if self._cacert else []))

    def crt(self, *options):
        name = "AWS CRT, direct I/O, sync" if "--direct" in options else "AWS CRT, sync"
        return self._python(name, "awscrt", "peer_crt.py", *options,
                            *(["--cacert", self._cacert] if self._cacert else []))

    def _curl(self):
        return self._synced(
            f"curl -sSf {self._trust('--cacert ')}-o {self._sh_out} {self.url}")

    def _synced(self, line):
        return f"{line} && sync --data {self._sh_out}"

    def _trust(self, option):
        return f"{option}{shlex.quote(str(self._cacert))} " if self._cacert else ""

    def _python(self, name, library, script, *options):
        python = _python_with(library)
        if python is None:
            return rounds.Contender(
                name, None, absent=f"no {library} ({_LIBRARIES[library]}; BENCH_PYTHON=FILE names "
                                   "the Python that has it)")
        return self.command(name, [python, Path(__file__).with_name(script), self.url, self.out,
                                   *options])

    # ---- running ----

    def shell(self, name, tool, line):
        if shutil.which(tool) is None:
            return rounds.Contender(
                name, None, absent=f"not installed (apt-get install {_PACKAGES.get(tool, tool)})")
        return self.command(name, ["sh", "-c", line])

    def command(self, name, argv, ours=False):
        return rounds.Contender(name, lambda: self._once(name, argv), ours)

    def _once(self, name, argv, leaves_a_file=True):
        self._prepare()
        server_s = self._server.cpu_s()
        usage = procs.measure(argv, self._bench.prefix)
        sample = rounds.Sample(
            self.size_bytes / usage.wall_s, usage.wall_s, self.size_bytes, usage.cpu_s,
            self._server.cpu_s() - server_s, rss_bytes=usage.rss_bytes,
            allocated_bytes=corpus.allocated(self.out) if leaves_a_file else 0,
            written_bytes=usage.written_bytes)
        if not leaves_a_file:
            return sample
        self._verify(name)
        self.out.unlink()
        return sample

    def _run(self):
        self._prepare()
        data, socket_path = self._bench.scratch.dir("data"), self._bench.scratch.path / "run.sock"
        server_s = self._server.cpu_s()
        server, wall_s = bedplate.start_run(self._bench.scratch, bedplate.run_argv(
            self._bench.program, self.url, "mixed", data, socket_path, self._sha256),
            self._bench.prefix)
        sample = rounds.Sample(
            self.size_bytes / wall_s, wall_s, self.size_bytes, server.cpu_s(),
            self._server.cpu_s() - server_s, rss_bytes=procs.resident(server.pid)[0],
            allocated_bytes=sum(corpus.allocated(path) for path in data.rglob("backing*")
                                if path.is_file()),
            written_bytes=procs.written(server.pid))
        if "run" not in self._verified:
            procs.run("nbdcopy", nbd.uri(socket_path), self.out)
            self._verify("run")
            self.out.unlink()
        self._bench.scratch.retire(server)
        shutil.rmtree(data)
        return sample

    def _prepare(self):
        self.out.unlink(missing_ok=True)
        corpus.warm(self._source)
        # What earlier runs left to write back is not this run's cost.
        procs.run("sync", "--file-system", self._bench.scratch.path)

    def _verify(self, name):
        """Once per contender: the bytes that were wanted."""
        if name in self._verified:
            return
        self._verified.add(name)
        if not corpus.equal(self._wanted, self.out):
            raise procs.Failure(f"{self.out.name}: differs from {self._wanted.name}")


@functools.cache
def _python_with(library):
    """A Python that can import a library: the one in `BENCH_PYTHON`, this one, or the system's."""
    for python in (os.environ.get("BENCH_PYTHON"), sys.executable, "/usr/bin/python3"):
        if not python:
            continue
        try:
            procs.run(python, "-c", f"import {library}")
        except (procs.Failure, OSError):
            continue
        return python
    return None
