"""32 transfers at the same time: one daemon against as many curls. Does each get its share?

Two signs of it: the last one's time by the first one's, and the least that one has on the disk by
the most that one has when half of the time is over. (The kernel places buffered data late; curl's
half time says little then.) No number is promised; the peer's stand beside ours.
"""

import contextlib
import http.client
import json
import resource
import shlex
import shutil
import socket
import threading
import time

from lib import bedplate, corpus, nbd, procs, rounds
from lib.corpus import MIB
from lib.nginx import Nginx

_COUNT = 32
_CURLS = f"{_COUNT} x (curl, sync)"
_LIMIT_S = 600
_BOUND_BYTES = 200 * MIB


def run(bench, root):
    each_bytes = (16 if bench.quick else 64) * MIB
    digests = {f"one-{index}": corpus.noise(root / f"one-{index}", each_bytes, index)[0]
               for index in range(_COUNT)}
    nginx = Nginx(bench.scratch, root, bench.prefix)
    many = _Many(bench, nginx, root, digests, each_bytes)
    case = rounds.Case(
        "transfer", f"{_COUNT} files at once", each_bytes * _COUNT, "", "B/s", "GiB", _CURLS, [
            rounds.Contender(f"bedplate serve, {_COUNT} images", many.daemon, ours=True),
            rounds.Contender(_CURLS, many.curls)])
    bench.compare([case])
    for contender in case.contenders:
        many.say_shares(contender)
    ours = case.contenders[0]
    bench.bound(case.title(), f"max RSS of {ours.name}, of the {rounds.size(_BOUND_BYTES)} of one",
                rounds.spread(sample.rss_bytes / _BOUND_BYTES for sample in ours.samples), most=1)
    bench.scratch.retire(nginx.server)
    for name in digests:
        (root / name).unlink()


class _Many:
    """The files, and the two ways to bring all of them in."""

    def __init__(self, bench, nginx, root, digests, each_bytes):
        self._bench, self._nginx, self._root = bench, nginx, root
        self._digests, self._each_bytes = digests, each_bytes
        self._shares = {True: [], False: []}
        self._verified = set()

    def daemon(self):
        """From the first request to the last image that is ready: checked and durable."""
        self._prepare()
        scratch, program = self._bench.scratch, self._bench.program
        data = scratch.dir("many")
        control, export = scratch.path / "control.sock", scratch.path / "many.sock"
        lines = [f"disks = ['{data}']", f"control_socket = '{control}'",
                 f"nbd_socket = '{export}'", f"max_transfers = {_COUNT}"]
        if bedplate.offers(program, "serve", "--allow-loopback"):
            lines.append("allow_loopback = true")
        config = scratch.path / "many.toml"
        config.write_text("\n".join(lines) + "\n")
        server = scratch.serve("bedplate serve", [program, "serve", "--config", config],
                               self._bench.prefix)
        server.wait_for_socket(control)
        for name, sha256 in self._digests.items():
            _Asked(control, "POST", "/v1/images", {
                "name": name, "url": f"{self._nginx.url}/{name}", "sha256": sha256}).answer()
        server_s, cpu_s = self._nginx.cpu_s(), server.cpu_s()
        with procs.not_starved(self._bench.prefix):
            watch = _Watch()
            # All are asked before one answers, so that they start together.
            asked = [_Asked(control, "POST", f"/v1/images/{name}/fetch") for name in self._digests]
            ready = _Ready(control)
            while not watch.look(self._progress(data, ready)):
                time.sleep(0.02)
        for one in asked:
            one.answer()
        sample = self._sample(watch, server.cpu_s() - cpu_s, server_s,
                              procs.resident(server.pid)[0])
        sample.allocated_bytes = sum(corpus.allocated(path) for path in data.rglob("*")
                                     if path.is_file())
        sample.written_bytes = procs.written(server.pid)
        self._shares[True].append(watch.shares())
        if True not in self._verified:
            self._verify_exports(control, export)
        scratch.retire(server)
        shutil.rmtree(data)
        return sample

    def curls(self):
        self._prepare()
        scratch = self._bench.scratch
        out = scratch.dir("many")
        before, server_s = resource.getrusage(resource.RUSAGE_CHILDREN), self._nginx.cpu_s()
        with procs.not_starved(self._bench.prefix):
            watch, running = _Watch(), {}
            for name in self._digests:
                target = shlex.quote(str(out / name))
                running[name] = scratch.serve("curl", ["sh", "-c", (
                    f"curl -sSf -o {target} {self._nginx.url}/{name} && sync --data {target}")],
                    self._bench.prefix)
            while not watch.look({name: self._fetched(out / name, server)
                                  for name, server in running.items()}):
                time.sleep(0.02)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        for server in running.values():
            scratch.retire(server)
        sample = self._sample(watch, after.ru_utime + after.ru_stime - before.ru_utime
                              - before.ru_stime, server_s, None)
        sample.allocated_bytes = sum(corpus.allocated(path) for path in out.iterdir())
        self._shares[False].append(watch.shares())
        if False not in self._verified:
            for name in self._digests:
                self._verify(False, name, out / name)
        shutil.rmtree(out)
        return sample

    def say_shares(self, contender):
        shares = self._shares[contender.ours]
        if not shares:
            return
        last, least = (rounds.spread(values) for values in zip(*shares))
        rounds.say(f"  shares of {contender.name}: last done / first done "
                   f"{rounds.ratio_text(last)}; least / most at half time "
                   f"{rounds.ratio_text(least)}")
        self._bench.notes.append({"shares": contender.name, "last_by_first": last,
                                  "least_by_most_at_half_time": least})

    def _progress(self, data, ready):
        """{name: (bytes on disk, done)} of the daemon's images."""
        arrived = dict.fromkeys(self._digests, 0)
        for path in data.glob("backing-images/*/*"):
            name = path.parent.name.rpartition("-")[0]
            with contextlib.suppress(FileNotFoundError):
                arrived[name] = max(arrived[name], corpus.allocated(path))
        names = ready.names()
        return {name: (count, name in names) for name, count in arrived.items()}

    def _fetched(self, path, server):
        status = server.process.poll()
        if status:
            raise procs.Failure(f"curl ended with status {status}: {server.output()}")
        return (corpus.allocated(path) if path.exists() else 0, status == 0)

    def _sample(self, watch, cpu_s, server_s, rss_bytes):
        total = self._each_bytes * _COUNT
        return rounds.Sample(total / watch.wall_s, watch.wall_s, total, cpu_s,
                             self._nginx.cpu_s() - server_s, rss_bytes=rss_bytes)

    def _prepare(self):
        for name in self._digests:
            corpus.warm(self._root / name)
        procs.run("sync", "--file-system", self._bench.scratch.path)

    def _verify_exports(self, control, export):
        """Once, through NBD: a reader sees the bytes of the source."""
        copy = self._bench.scratch.path / "copied"
        for name in self._digests:
            _Asked(control, "POST", "/v1/attachments", {"image": name}).answer()
            procs.run("nbdcopy", nbd.uri(export, name), copy)
            self._verify(True, name, copy)
            copy.unlink()

    def _verify(self, ours, name, path):
        if not corpus.equal(self._root / name, path):
            raise procs.Failure(f"{path.name}: differs from {name}")
        self._verified.add(ours)


class _Watch:
    """Who has how much, from start to end."""

    def __init__(self):
        self._began = time.monotonic()
        self._seen, self._done = [], {}
        self.wall_s = 0.0

    def look(self, progress):
        """Takes {name: (bytes, done)}; says whether all are done."""
        now = time.monotonic() - self._began
        if now > _LIMIT_S:
            raise procs.Failure(f"{_COUNT - len(self._done)} of {_COUNT} files not there after "
                                f"{_LIMIT_S} s")
        self._seen.append((now, [count for count, _ in progress.values()]))
        for name, (_, done) in progress.items():
            if done:
                self._done.setdefault(name, now)
        self.wall_s = now
        return len(self._done) == _COUNT

    def shares(self):
        """(last done by first done, least by most at half time); `None` where nothing is known."""
        _, half = min(self._seen, key=lambda seen: abs(seen[0] - self.wall_s / 2))
        return (self.wall_s / min(self._done.values()),
                min(half) / max(half) if max(half) > 0 else None)


class _Control(http.client.HTTPConnection):
    """HTTP over the daemon's socket."""

    def __init__(self, path):
        super().__init__("bedplate", timeout=60)
        self._path = str(path)

    def connect(self):
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


class _Ready:
    """Asks the daemon all the time which images are ready: a busy one takes its time to answer."""

    def __init__(self, control):
        self._control, self._names, self._failure = control, set(), None
        threading.Thread(target=self._follow, daemon=True).start()

    def names(self):
        if self._failure:
            raise self._failure
        return self._names

    def _follow(self):
        try:
            while True:
                images = _Asked(self._control, "GET", "/v1/images").answer()["images"]
                for image in images:
                    for copy in image["copies"]:
                        if copy["refused"]:
                            raise procs.Failure(f"{image['name']}: {copy['message']}")
                self._names = {image["name"] for image in images
                               if any(copy["state"] == "ready" for copy in image["copies"])}
                if len(self._names) == len(images):
                    return
                time.sleep(0.02)
        except procs.Failure as failure:
            self._failure = failure


class _Asked:
    """A request that was sent, and whose answer is still to be read."""

    def __init__(self, control, method, target, body=None):
        self._what, self._connection = f"{method} {target}", _Control(control)
        try:
            self._connection.request(
                method, target, json.dumps(body) if body is not None else None,
                {"Content-Type": "application/json"} if body is not None else {})
        except OSError as error:
            raise procs.Failure(f"{self._what}: {error}") from error

    def answer(self):
        try:
            answer = self._connection.getresponse()
            text = answer.read().decode(errors="replace")
        except (OSError, http.client.HTTPException) as error:
            raise procs.Failure(f"{self._what}: {error}") from error
        finally:
            self._connection.close()
        if answer.status >= 300:
            raise procs.Failure(f"{self._what}: status {answer.status}: {text[:500]}")
        return json.loads(text) if text else None
