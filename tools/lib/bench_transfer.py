"""URL to a durable, checked file: bedplate against the tools that people use for it.

Every command ends with the file's data on the disk (`sync --data` is fdatasync). The reference is
what a careful script does: curl, sync, sha256sum. coreutils' sha256sum may lack the CPU's SHA
instructions, so the same with openssl is a row of its own. After each table stand the bounds that
the project has set itself, met or missed; a miss is no failure.
"""

import shlex
import shutil
import sys
from pathlib import Path

from lib import bedplate, corpus, nbd, procs, rounds
from lib.corpus import GIB, MIB
from lib.nginx import Nginx

NAME = "transfer"
_REFERENCE = "curl, sync, sha256sum"
_CURL = "curl, sync"
_OURS = "bedplate pull --sha256"
_BARE = "bedplate pull --no-digest"


def run(bench):
    root = bench.scratch.dir("www")
    _mixed(bench, root)
    _slow(bench, root)
    _expand(bench, root)
    shutil.rmtree(root)


def _mixed(bench, root):
    """The same file over http and https."""
    size_bytes = 64 * MIB if bench.quick else 2 * GIB
    source = root / "mixed.img"
    sha256, data_bytes = corpus.mixed(source, size_bytes)
    tls = _certificate(bench.scratch.dir("tls"))
    nginx = Nginx(bench.scratch, root, bench.prefix, tls)
    rounds.say(f"  the file: half random, a quarter zero, a quarter text, 64 KiB units; "
               f"{rounds.size(data_bytes)} are data")
    rounds.say("  CPU time of kernel writeback threads is in nobody's column")
    plain = _Job(bench, nginx, f"{nginx.url}/{source.name}", source, sha256)
    case = rounds.Case(
        NAME, "URL to durable file, mixed content, nginx on loopback", size_bytes, "", "B/s",
        "GiB", _REFERENCE, plain.contenders())
    bench.compare([case])
    _check_allocation(bench, case, data_bytes)
    _wall(case, _OURS, _REFERENCE, 0.45)
    _wall(case, _OURS, _CURL, 0.6)
    _wall(case, _BARE, _CURL, 0.4)
    ours, peer = rounds.named(case, _OURS), rounds.named(case, _REFERENCE)
    spent = rounds.ratios(ours, peer, lambda sample: sample.client_cpu_s)
    _bound("client CPU with the digest, of curl and sha256sum", spent, 0.6)
    if tls:
        secure = _Job(bench, nginx, f"{nginx.tls_url}/{source.name}", source, sha256, tls[2])
        case = rounds.Case(NAME, "the same over HTTPS", size_bytes, "", "B/s", "GiB", _REFERENCE,
                           secure.contenders(short=True))
        bench.compare([case])
        _wall(case, _OURS, _REFERENCE, 0.45)
        _wall(case, _OURS, _CURL, 0.6)
    bench.scratch.retire(nginx.server)
    source.unlink()


def _slow(bench, root):
    """A server that gives each connection 40 MB/s, 50 ms after it was asked."""
    size_bytes = 128 * MIB if bench.quick else GIB
    source = root / "slow.img"
    sha256, _ = corpus.mixed(source, size_bytes)
    script = Path(__file__).with_name("slow_server.py")
    server = bench.scratch.serve("slow server", [sys.executable, script, source], bench.prefix)
    server.wait_for(lambda: "port " in server.output(), "its port")
    port = server.output().split("port ")[1].split()[0]
    job = _Job(bench, server, f"http://127.0.0.1:{port}/slow.img", source, sha256)
    case = rounds.Case(NAME, "40 MB/s a connection, 50 ms before each answer", size_bytes, "",
                       "B/s", "GiB", _CURL, job.contenders(slow=True))
    bench.compare([case])
    _wall(case, _OURS, _CURL, 0.2)
    bench.scratch.retire(server)
    source.unlink()


def _expand(bench, root):
    """A compressed QCOW2 image by URL to a raw, sparse file. Nobody makes a digest of that."""
    size_bytes = 128 * MIB if bench.quick else 2 * GIB
    raw = bench.scratch.path / "expanded.img"
    for kind in ("text", "mixed"):
        (corpus.text if kind == "text" else corpus.mixed)(raw, size_bytes)
        image = root / f"{kind}.qcow2"
        procs.run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", "-c", raw, image)
        nginx = Nginx(bench.scratch, root, bench.prefix)
        job = _Job(bench, nginx, f"{nginx.url}/{image.name}", image, None, same_as=raw)
        out, packed = shlex.quote(str(job.out)), shlex.quote(f"{job.out}.packed")
        fetch = f"curl -sSf -o {packed} {job.url}"
        finish = f"{packed} {out} && sync --data {out} && rm {packed}"
        usual = "curl, qemu-img convert, sync"
        pull = [bench.program, "-q", "pull", job.url, "-o", job.out, "--layout", "raw"]
        case = rounds.Case(
            NAME, f"zlib QCOW2 ({kind}) by URL to raw file", size_bytes, "", "B/s", "GiB", usual, [
                job.command("bedplate pull --layout raw", pull, ours=True),
                job.shell(usual, "curl", f"{fetch} && qemu-img convert -O raw {finish}"),
                job.shell("curl, qemu-img convert -m 16 -W, sync", "curl",
                          f"{fetch} && qemu-img convert -m 16 -W -O raw {finish}"),
            ])
        bench.compare([case])
        _wall(case, "bedplate pull --layout raw", usual, 0.4)
        bench.scratch.retire(nginx.server)
        image.unlink()
    raw.unlink()


def _wall(case, ours, peer, most):
    spent = rounds.ratios(rounds.named(case, ours), rounds.named(case, peer),
                          lambda sample: sample.wall_s)
    _bound(f"wall time of {ours}, of {peer}", spent, most)


def _bound(what, ratio, most):
    if ratio is None:
        return rounds.say(f"  bound: {what}: not measured")
    verdict = "met" if ratio[0] <= most else "MISSED"
    return rounds.say(f"  bound: {what} at most {most}: {rounds.ratio_text(ratio)}  {verdict}")


def _certificate(directory):
    """(certificate, key, authority) for 127.0.0.1; `None` without openssl."""
    if shutil.which("openssl") is None:
        rounds.say("  openssl is not installed: no HTTPS rows")
        return None
    names = ("ca.pem", "ca.key", "cert.pem", "key.pem", "cert.csr", "cert.ext")
    authority, authority_key, cert, key, request, extensions = (directory / name for name in names)
    new = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")
    procs.run("openssl", "req", "-x509", *new, "-days", "2", "-subj", "/CN=test authority",
              "-keyout", authority_key, "-out", authority)
    procs.run("openssl", "req", *new, "-subj", "/CN=127.0.0.1", "-keyout", key, "-out", request)
    extensions.write_text("subjectAltName=IP:127.0.0.1\n")
    procs.run("openssl", "x509", "-req", "-in", request, "-CA", authority, "-CAkey", authority_key,
              "-CAcreateserial", "-days", "2", "-extfile", extensions, "-out", cert)
    return cert, key, authority


class _Job:
    """One file to bring in, again and again."""

    def __init__(self, bench, server, url, source, sha256, cacert=None, same_as=None):
        self._bench, self._server, self.url, self._source = bench, server, url, source
        self._sha256, self._cacert = sha256, cacert
        self._wanted = same_as or source
        self._size_bytes = self._wanted.stat().st_size
        self.out = bench.scratch.path / "fetched"
        self._verified = set()

    def contenders(self, short=False, slow=False):
        out, digest, url = shlex.quote(str(self.out)), self._sha256, self.url
        trust = {tool: f"{flag}={self._cacert} " if self._cacert else "" for tool, flag in (
            ("aria2c", "--ca-certificate"), ("wget", "--ca-certificate"))}
        cacert = f"--cacert {self._cacert} " if self._cacert else ""
        curl = f"curl -sSf {cacert}-o {out} {url} && sync --data {out}"
        sha256sum = f"echo '{digest}  {self.out}' | sha256sum --check --quiet"
        openssl = f"openssl dgst -sha256 -r {out} | grep -q ^{digest}"
        pull = [self._bench.program, "-q", "pull", url, "-o", self.out, *cacert.split()]

        def aria2c(count):
            name = f"aria2c -x{count} --checksum, sync"
            return self.shell(name, "aria2c", (
                f"aria2c -q -x{count} -s{count} -k1M --file-allocation=none {trust['aria2c']}"
                f"--checksum=sha-256={digest} -d / -o {out} {url} && sync --data {out}"))

        ours = [self.command(_OURS, [*pull, "--sha256", digest], ours=True),
                self.command(_BARE, [*pull, "--no-digest"], ours=True)]
        reference = self.shell(_REFERENCE, "curl", f"{curl} && {sha256sum}")
        plain = self.shell(_CURL, "curl", curl)
        if slow:
            return [*ours, plain, aria2c(8), aria2c(16)]
        if short:
            return [*ours, reference, plain, aria2c(8)]
        return [
            *ours,
            rounds.Contender("bedplate run --sha256, to ready", lambda: self._run(url), ours=True),
            reference,
            self.shell("curl, sync, openssl sha256", "openssl", f"{curl} && {openssl}"),
            plain,
            aria2c(8),
            self.shell("wget, sync", "wget",
                       f"wget -q {trust['wget']}-O {out} {url} && sync --data {out}"),
            self.shell("nbdkit curl | nbdcopy, sync", "nbdkit", (
                f"rm -f {out}; truncate -s {self._size_bytes} {out}; "
                f"nbdkit -U - curl {url} --run 'nbdcopy \"$uri\" {out}' && sync --data {out}")),
            self._requests(),
        ]

    def _requests(self):
        """Python's usual library, with large writes and the digest on the way."""
        name, program = "python requests, sha256, sync", (
            "import hashlib, os, requests, sys\n"
            "digest = hashlib.sha256()\n"
            "with requests.get(sys.argv[1], stream=True) as got, open(sys.argv[2], 'wb') as out:\n"
            "    for piece in got.iter_content(1 << 20):\n"
            "        out.write(piece)\n"
            "        digest.update(piece)\n"
            "    out.flush()\n"
            "    os.fdatasync(out.fileno())\n"
            "sys.exit(digest.hexdigest() != sys.argv[3])\n")
        python = "/usr/bin/python3"
        try:
            procs.run(python, "-c", "import requests")
        except (procs.Failure, OSError):
            return rounds.Contender(name, None, absent="not installed (python3-requests)")
        return self.command(name, [python, "-c", program, self.url, self.out, self._sha256])

    def shell(self, name, tool, line):
        if shutil.which(tool) is None:
            return rounds.Contender(name, None, absent="not installed")
        return self.command(name, ["sh", "-c", line])

    def command(self, name, argv, ours=False):
        return rounds.Contender(name, lambda: self._once(name, argv), ours)

    def _once(self, name, argv):
        self._prepare()
        server_s = self._server.cpu_s()
        usage = procs.measure(argv, self._bench.prefix)
        sample = rounds.Sample(
            self._size_bytes / usage.wall_s, usage.wall_s, self._size_bytes, usage.cpu_s,
            self._server.cpu_s() - server_s, rss_bytes=usage.rss_bytes,
            allocated_bytes=corpus.allocated(self.out))
        self._verify(name, self.out)
        self.out.unlink()
        return sample

    def _run(self, url):
        """`bedplate run` until its export answers; the bytes are verified through NBD."""
        self._prepare()
        data, socket_path = self._bench.scratch.dir("data"), self._bench.scratch.path / "run.sock"
        server_s = self._server.cpu_s()
        server, wall_s = bedplate.start_run(self._bench.scratch, bedplate.run_argv(
            self._bench.program, url, "mixed", data, socket_path, self._sha256), self._bench.prefix)
        sample = rounds.Sample(
            self._size_bytes / wall_s, wall_s, self._size_bytes, server.cpu_s(),
            self._server.cpu_s() - server_s, rss_bytes=procs.resident(server.pid)[0],
            allocated_bytes=sum(corpus.allocated(path) for path in data.rglob("backing*")
                                if path.is_file()))
        if "run" not in self._verified:
            procs.run("nbdcopy", nbd.uri(socket_path), self.out)
            self._verify("run", self.out)
            self.out.unlink()
        self._bench.scratch.retire(server)
        shutil.rmtree(data)
        return sample

    def _prepare(self):
        self.out.unlink(missing_ok=True)
        corpus.warm(self._source)
        # What earlier runs left to write back is not this run's cost.
        procs.run("sync", "--file-system", self._bench.scratch.path)

    def _verify(self, name, path):
        """Once per contender: the same bytes as the source."""
        if name in self._verified:
            return
        self._verified.add(name)
        if not corpus.equal(self._wanted, path):
            raise procs.Failure(f"{path.name}: differs from {self._wanted.name}")


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
