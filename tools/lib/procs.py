"""Child processes that never outlive their parent, and what they cost.

Every child is in a session of its own and is ended by `Scratch`, on success, on failure and on a
signal; if this process is killed outright, the kernel ends the child.
"""

import contextlib
import ctypes
import dataclasses
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None, use_errno=True)
_TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")
_SAMPLE_EVERY_S = 0.01


class Failure(Exception):
    """Something that the user has to read; the message is one sentence."""


def _die_with_parent():
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


@dataclasses.dataclass
class Usage:
    """What a finished command took, its own children included."""

    wall_s: float
    cpu_s: float
    rss_bytes: int
    """Largest resident set (VmHWM) of any process of the command, sampled every 10 ms."""
    anon_bytes: int
    """Largest anonymous part of it (RssAnon): without mapped pages of files."""
    written_bytes: int | None
    """Bytes sent to disks, rewritten ones again (write_bytes of /proc/PID/io), if it is known."""
    output: str


class _RssWatch:
    """Follows the resident set of a process and its descendants until they are gone.

    Why not `ru_maxrss`: it starts from the resident set of the process that forked, so that a
    small child of a Python parent looks as large as Python.
    """

    def __init__(self, pid, prefix=()):
        self._pid, self._prefix = pid, prefix
        self._stop = threading.Event()
        self.rss_bytes = 0
        self.anon_bytes = 0
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._thread.start()

    def _follow(self):
        with not_starved(self._prefix):
            self._sample()

    def _sample(self):
        parent = Path("/proc/self/cmdline").read_bytes()
        while not self._stop.wait(_SAMPLE_EVERY_S):
            for pid in [self._pid, *descendants(self._pid)]:
                try:
                    # Between fork and exec a child still is this Python.
                    if Path(f"/proc/{pid}/cmdline").read_bytes() == parent:
                        continue
                    rss, anon = resident(pid)
                except OSError:
                    continue
                self.rss_bytes = max(self.rss_bytes, rss)
                self.anon_bytes = max(self.anon_bytes, anon)

    def stop(self):
        self._stop.set()
        self._thread.join()


@contextlib.contextmanager
def not_starved(prefix):
    """Lets this thread see what happens while real-time children keep every core busy.

    Without it, what is sampled of them is what they were before they got to work.
    """
    if "chrt" not in prefix:
        yield
        return
    os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(2))
    try:
        yield
    finally:
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))


def descendants(pid):
    """Process ids of all living children of `pid`, and of theirs."""
    found = []
    try:
        threads = os.listdir(f"/proc/{pid}/task")
    except OSError:
        return found
    for thread in threads:
        try:
            children = Path(f"/proc/{pid}/task/{thread}/children").read_text().split()
        except OSError:
            continue
        for child in children:
            found += [int(child), *descendants(int(child))]
    return found


def resident(pid):
    """(VmHWM, RssAnon) of a process in bytes. VmHWM is a high-water mark kept by the kernel."""
    fields = {}
    with open(f"/proc/{pid}/status", encoding="ascii", errors="replace") as status:
        for line in status:
            name, _, value = line.partition(":")
            fields[name] = value.split()
    return tuple(int(fields.get(name, ["0"])[0]) * 1024 for name in ("VmHWM", "RssAnon"))


def written(pid):
    """Bytes that a process and its ended children sent to disks; `None` if the kernel hides it."""
    try:
        text = Path(f"/proc/{pid}/io").read_text()
    except OSError:
        return None
    return int(dict(line.split(": ") for line in text.splitlines())["write_bytes"])


def cpu_seconds(pid):
    """User and system time of all threads of a process so far, to 1/100 s."""
    # The name in parentheses may hold spaces; utime and stime are fields 14 and 15 of the line.
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS_PER_SECOND


class Server:
    """A running server process."""

    def __init__(self, name, argv, log, prefix=()):
        self.name = name
        self.argv = [str(part) for part in argv]
        self.log = Path(log)
        with open(self.log, "wb") as out:
            self.process = subprocess.Popen(
                [*prefix, *self.argv], stdin=subprocess.DEVNULL, stdout=out, stderr=out,
                start_new_session=True, preexec_fn=_die_with_parent)

    @property
    def pid(self):
        return self.process.pid

    def cpu_s(self):
        """CPU time of the process and of its children that are alive."""
        total = cpu_seconds(self.pid)
        for pid in descendants(self.pid):
            with contextlib.suppress(OSError):
                total += cpu_seconds(pid)
        return total

    def output(self):
        return self.log.read_text(errors="replace")

    def wait_for(self, ready, what, limit_s=60.0, every_s=0.001):
        """Polls `ready()` until it is true; fails at once if the process ends before."""
        end = time.monotonic() + limit_s
        while True:
            # Asked before `ready`, so that a last word before the end is heard.
            ended = self.process.poll() is not None
            if ready():
                return
            if ended:
                raise Failure(f"{self.name}: ended with status {self.process.returncode} before "
                              f"{what}; its output:\n{self.output()[-2000:]}")
            if time.monotonic() > end:
                raise Failure(f"{self.name}: no sign of {what} in {limit_s:g} s; its output:\n"
                              f"{self.output()[-2000:]}")
            time.sleep(every_s)

    def wait_for_socket(self, path, limit_s=60.0):
        """Waits until a connection to the Unix socket is taken."""
        self.wait_for(lambda: accepts(path), f"the socket {path}", limit_s)

    def stop(self, sign=signal.SIGTERM, patience_s=20.0):
        """Asks the process to end, kills it if it does not, and returns its exit status."""
        if self.process.poll() is None:
            self.process.send_signal(sign)
            try:
                self.process.wait(patience_s)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        # Children that it left behind are still in its group.
        try:
            os.killpg(self.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        return self.process.returncode


def accepts(path):
    """Whether a server takes connections on the Unix socket at `path`."""
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            return False
    return True


class Scratch:
    """One temporary directory and all child processes: gone when the `with` block is left."""

    def __init__(self, label, parent=None):
        self._label = label
        self._parent = parent
        self._servers = []
        self._logs = 0
        self.path = None

    def __enter__(self):
        for sign in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(sign, _leave)
        self.path = Path(tempfile.mkdtemp(prefix=f"bedplate-{self._label}-", dir=self._parent))
        return self

    def __exit__(self, *_):
        # A second signal must not stop the cleaning up.
        for sign in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(sign, signal.SIG_IGN)
        for server in reversed(self._servers):
            server.stop(patience_s=5.0)
        shutil.rmtree(self.path, ignore_errors=True)

    def dir(self, name):
        """An empty directory of this name: what was in it is removed."""
        path = self.path / name
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir()
        return path

    def serve(self, name, argv, prefix=()):
        """Starts a server; it is stopped at the end if not before."""
        self._logs += 1
        server = Server(name, argv, self.path / f"{self._logs:03}.log", prefix)
        self._servers.append(server)
        return server

    def retire(self, server, sign=signal.SIGTERM):
        """Stops a server before the end and returns its exit status."""
        self._servers.remove(server)
        return server.stop(sign)


def _leave(sign, _frame):
    raise SystemExit(128 + sign)


def measure(argv, prefix=(), cwd=None):
    """Runs a command to its end and says what it took. A failure is an exception."""
    argv = [str(part) for part in argv]
    with tempfile.TemporaryFile() as out:
        start = time.monotonic()
        process = subprocess.Popen(
            [*prefix, *argv], stdin=subprocess.DEVNULL, stdout=out, stderr=out, cwd=cwd,
            start_new_session=True, preexec_fn=_die_with_parent)
        watch = _RssWatch(process.pid, prefix)
        try:
            # Ended but not reaped: what it wrote can still be read.
            os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
            wall_s = time.monotonic() - start
            written_bytes = written(process.pid)
            _, status, usage = os.wait4(process.pid, 0)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            raise
        finally:
            watch.stop()
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        output = out.read().decode(errors="replace")
    if process.returncode != 0:
        raise Failure(f"`{' '.join(argv)}` ended with status {process.returncode}; its output:\n"
                      f"{output[-2000:]}")
    return Usage(wall_s, usage.ru_utime + usage.ru_stime, watch.rss_bytes, watch.anon_bytes,
                 written_bytes, output)


def run(*argv, cwd=None):
    """Runs a command that has to succeed; returns what it printed."""
    return measure(argv, cwd=cwd).output


def missing(packages):
    """Which of the tools in {tool: Debian package} are not installed."""
    path = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    return {tool: package for tool, package in packages.items()
            if shutil.which(tool, path=path) is None}


def with_sbin():
    """Debian keeps nginx and mke2fs out of an ordinary user's PATH; this puts them in."""
    os.environ["PATH"] = os.environ.get("PATH", "/usr/bin:/bin") + ":/usr/sbin:/sbin"


def main(function):
    """Runs a tool's main function; a `Failure` is printed as one message, status 1."""
    try:
        status = function()
    except Failure as failure:
        sys.stdout.flush()
        print(f"{Path(sys.argv[0]).name}: {failure}", file=sys.stderr)
        status = 1
    except KeyboardInterrupt:
        status = 130
    sys.exit(status)
