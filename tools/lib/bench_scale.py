"""A node with many images: how long it takes to start, and what a change costs.

Why: every change looks at all images, and a start looks at all files.
How: 1,000 images with a copy on each of four disks and 200 attachments, made through the control
socket; the daemon is then started anew. A change is an attachment that comes and goes: a round of
the manager, and a record that is durable.
"""

import http.client
import json
import re
import signal
import socket
import statistics
import time

from lib import procs, rounds
from lib.nginx import Nginx

NAME = "scale"
_IMAGES, _DISKS, _ATTACHMENTS = 1000, 4, 200
_QUICK_IMAGES, _QUICK_ATTACHMENTS = 60, 20
_START_S, _ROUND_S = 2.0, 0.05


class Client(http.client.HTTPConnection):
    """HTTP over a Unix socket."""

    def __init__(self, path):
        super().__init__("localhost")
        self._path = str(path)

    def connect(self):
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(self._path)

    def call(self, method, path, body=None):
        self.request(method, path, body and json.dumps(body))
        answer = self.getresponse()
        text = answer.read()
        if answer.status >= 400:
            raise procs.Failure(f"{method} {path}: {answer.status} {text.decode()}")
        return text


def run(bench):
    images, attachments = ((_QUICK_IMAGES, _QUICK_ATTACHMENTS) if bench.quick
                           else (_IMAGES, _ATTACHMENTS))
    root = bench.scratch.dir("www")
    (root / "small.img").write_bytes(b"\x5a" * (64 << 10))
    nginx = Nginx(bench.scratch, root)
    disks = [bench.scratch.dir(f"disk-{number}") for number in range(_DISKS)]
    config = bench.scratch.path / "scale.toml"
    config.write_text(f"disks = {json.dumps([str(disk) for disk in disks])}\n"
                      "allow_loopback = true\nmax_transfers = 64\n")
    path = disks[0] / "bedplate" / "control.sock"
    rounds.say(f"\n{NAME}: {images} images, {_DISKS} copies of each, {attachments} attachments")
    server = _start(bench, config, path, 0)
    client = Client(path)
    uuids = [disk["uuid"] for disk in json.loads(client.call("GET", "/v1/disks"))["disks"]]
    client.call("PATCH", "/v1/settings", {"max_disk_copies": 64})
    began = time.monotonic()
    for number in range(images):
        client.call("POST", "/v1/images", {"name": f"image-{number}", "min_copies": _DISKS,
                                           "url": f"{nginx.url}/small.img"})
        for uuid in uuids:
            client.call("POST", f"/v1/images/image-{number}/fetch", {"disk": uuid})
    for number in range(attachments):
        client.call("POST", "/v1/attachments", {"image": f"image-{number}", "reader": "vm"})
    _until_ready(path, images * _DISKS, 1800)
    rounds.say(f"  made in {time.monotonic() - began:.0f} s; RSS "
               f"{rounds.size(procs.resident(server.pid)[1])} anonymous")
    bench.scratch.retire(server)

    starts = []
    for sign in (signal.SIGKILL, signal.SIGTERM, signal.SIGKILL):
        began = time.monotonic()
        server = _start(bench, config, path, images * _DISKS)
        starts.append(time.monotonic() - began)
        if len(starts) < 3:
            bench.scratch.retire(server, sign)
    rss_bytes = procs.resident(server.pid)[1]
    client = Client(path)
    changes = []
    for number in range(200):
        began = time.monotonic()
        held = client.call("POST", "/v1/attachments",
                           {"image": f"image-{number % images}", "reader": f"r{number}"})
        changes.append(time.monotonic() - began)
        client.call("DELETE", f"/v1/attachments/{json.loads(held)['id']}")
    reads = []
    for _ in range(20):
        began = time.monotonic()
        client.call("GET", "/v1/images")
        reads.append(time.monotonic() - began)
    changes.sort()
    rounds.say(f"  start to all copies adopted: {_seconds(starts)}; "
               f"RSS {rounds.size(rss_bytes)} anonymous, "
               f"{rss_bytes / (images * _DISKS) / 1024:.1f} KiB a copy")
    rounds.say(f"  a change, durable: median {statistics.median(changes) * 1e3:.1f} ms, "
               f"99 of 100 within {changes[len(changes) * 99 // 100] * 1e3:.1f} ms; "
               f"GET /v1/images: median {statistics.median(reads) * 1e3:.0f} ms")
    bench.bound(NAME, f"start to all copies adopted, of {_START_S:g} s",
                _of(starts, _START_S), most=1)
    bench.bound(NAME, f"a change, of {_ROUND_S * 1e3:g} ms", _of(changes, _ROUND_S), most=1)
    bench.scratch.retire(server)
    bench.scratch.retire(nginx.server)


def _start(bench, config, path, copies):
    server = bench.scratch.serve("bedplate serve", [bench.program, "serve", "--config", config],
                                 bench.prefix)
    server.wait_for(lambda: _answers(path), "an answer", every_s=0.005)
    _until_ready(path, copies, 120)
    return server


def _answers(path):
    try:
        Client(path).call("GET", "/healthz")
        return True
    except OSError:
        return False


def _until_ready(path, copies, limit_s):
    """Until the daemon's own metrics have so many ready copies."""
    client, deadline = Client(path), time.monotonic() + limit_s
    while copies:
        text = client.call("GET", "/metrics").decode()
        found = re.search(r'^bedplate_copies\{state="ready"\} (\d+)$', text, re.MULTILINE)
        if found and int(found.group(1)) >= copies:
            return
        if time.monotonic() > deadline:
            raise procs.Failure(f"{found and found.group(1)} of {copies} copies are ready")
        time.sleep(0.02)


def _seconds(values):
    return ", ".join(f"{value:.2f} s" for value in values)


def _of(values, whole):
    return (statistics.median(values) / whole, min(values) / whole, max(values) / whole)
