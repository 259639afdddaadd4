"""An HTTP server far away: every answer comes 50 ms late, every connection has 40 MB/s.

A thread a connection, `sendfile` in small steps paced by the clock: cheap enough that it does not
compete with what is measured. What a connection may send is counted over all its answers, so that
many small ranges are no way around the rate. Serves one file, with ranges and a strong ETag.

  slow_server.py FILE         40 MB/s for each connection
  slow_server.py FILE RATE    RATE bytes a second for all of them together
"""

import os
import re
import socket
import sys
import threading
import time

DELAY_S = 0.050
RATE = 40_000_000
STEP = 256 * 1024
_NAP_S = 0.002


class _Pace:
    """When all that was sent so far may have been sent, at the rate."""

    def __init__(self, rate):
        self._rate, self._paid_until, self._lock = rate, 0.0, threading.Lock()

    def pay(self, count):
        with self._lock:
            now = time.monotonic()
            self._paid_until = max(self._paid_until, now) + count / self._rate
            wait_s = self._paid_until - now
        if wait_s > _NAP_S:
            time.sleep(wait_s)


def main(path, rate=None):
    shared = rate and _Pace(float(rate))
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(("127.0.0.1", 0))
    listener.listen(256)
    print(f"port {listener.getsockname()[1]}", flush=True)
    while True:
        client, _ = listener.accept()
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        threading.Thread(target=_Connection(client, path, shared or _Pace(RATE)).serve, daemon=True).start()


class _Connection:
    """One client, request after request."""

    def __init__(self, client, path, pace):
        self._client, self._path, self._pace = client, path, pace

    def serve(self):
        pending = b""
        with self._client, open(self._path, "rb") as source:
            try:
                while True:
                    while b"\r\n\r\n" not in pending:
                        more = self._client.recv(65536)
                        if not more:
                            return
                        pending += more
                    head, _, pending = pending.partition(b"\r\n\r\n")
                    self._answer(source, head.decode("latin-1"))
            except OSError:
                # The client has what it wants, and went.
                return

    def _answer(self, source, head):
        time.sleep(DELAY_S)
        total = os.fstat(source.fileno()).st_size
        asked = re.search(r"(?im)^range: *bytes=(\d+)-(\d*)", head)
        start, end = (int(asked[1]), int(asked[2] or total - 1) + 1) if asked else (0, total)
        end = min(end, total)
        if start > end or (asked and start == end):
            return self._client.sendall(
                b"HTTP/1.1 416 Range Not Satisfiable\r\nContent-Length: 0\r\n"
                b"Content-Range: bytes */%d\r\n\r\n" % total)
        lines = ["HTTP/1.1 206 Partial Content" if asked else "HTTP/1.1 200 OK", 'ETag: "one"',
                 "Accept-Ranges: bytes", f"Content-Length: {end - start}"]
        if asked:
            lines.append(f"Content-Range: bytes {start}-{end - 1}/{total}")
        self._client.sendall(("\r\n".join(lines) + "\r\n\r\n").encode())
        if head.startswith("HEAD"):
            return None
        while start < end:
            count = os.sendfile(
                self._client.fileno(), source.fileno(), start, min(STEP, end - start))
            start += count
            self._pace.pay(count)
        return None


if __name__ == "__main__":
    main(*sys.argv[1:])
