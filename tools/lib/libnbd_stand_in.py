#!/usr/bin/env python3
"""Stands in for nbdkit and qemu-nbd in libnbd's tests: bedplate serves what they were asked to.

Why: the tests start their server themselves, by name, and connect to it in four ways.
How: what an nbdkit plugin would serve is copied to a file by the real nbdkit, once; `bedplate export`
serves the file on a socket of the caller's kind: passed (LISTEN_FDS), named (-U, -p), for a command
(--run), or standard input and output (-s), for which bytes are passed on.
Never: serves by anything else without a word in STAND_IN_LOG; takes an option that it does not know.
"""
import contextlib
import ctypes
import json
import os
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile

BEDPLATE = os.environ["BEDPLATE"]
REAL = os.environ["STAND_IN_REAL_PATH"]
# Options of nbdkit: without a value, with one, and those that only the real one has.
PLAIN = {"-f", "-v", "-fv", "-r", "-s", "-n", "--exit-with-parent", "--tls-verify-peer"}
VALUED = {"-U", "-P", "-p", "-e", "-D", "-t", "--run", "--filter", "--tls", "--tls-certificates",
          "-i"}
ASKING = {"--version", "--help", "--dump-config", "--dump-plugin"}
# What they change is nothing that a reader sees.
HARMLESS_FILTERS = {"exportname", "blocksize-policy"}


def note(text):
    with open(os.environ["STAND_IN_LOG"], "a") as log:
        log.write(text + "\n")


def fail(text):
    note(f"fail: {text}")
    sys.exit(f"stand-in: {text}")


def exec_real(name, args):
    os.environ["PATH"] = REAL
    os.execvp(name, [name, *args])


def exec_bedplate(arguments):
    """In place of this process, which a test knows by its number, and as silent as nbdkit."""
    with open(os.devnull, "w") as nothing:
        os.dup2(nothing.fileno(), 1)
    os.execv(BEDPLATE, [BEDPLATE, "export", *arguments])


def die_with_parent():
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


class Options:
    """nbdkit's command line, in this order: options anywhere, the plugin, its parameters."""

    def __init__(self, args):
        self.flags, self.values, self.filters, self.words = set(), {}, [], []
        args = list(args)
        while args:
            arg = args.pop(0)
            name, equals, value = arg.partition("=")
            if arg in PLAIN:
                self.flags.add(arg)
            elif name in VALUED and (equals or not name.startswith("--") or args):
                value = value if equals else args.pop(0)
                if name == "--filter":
                    self.filters.append(value)
                else:
                    self.values[name] = value
            elif arg.startswith("-") and len(arg) > 1:
                fail(f"nbdkit has no option {arg} here")
            else:
                self.words.append(arg)
        self.plugin, self.parameters = self.words[0], self.words[1:]


def content(options, directory):
    """A file of what the plugin serves: raw, or a .qcow2."""
    strange = [one for one in options.filters if one not in HARMLESS_FILTERS]
    if strange:
        fail(f"filter {strange[0]}")
    parameters = [one for one in options.parameters
                  if not one.startswith(("exportname", "default-export", "exportdesc", "blocksize-"))]
    if options.plugin == "file":
        return parameters[0].removeprefix("file=")
    image = os.path.join(directory, "disk.raw")
    open(image, "w").close()
    if options.plugin == "null" and not parameters:
        # Of no bytes, which bedplate does not serve; nobody looks at its size.
        parameters = ["1M"]
    command = [options.plugin, *parameters, "--run", f'nbdcopy --allocated -- "$uri" {image}']
    if options.plugin in ("memory", "null", "eval"):
        # All zeroes; only its size is asked for.
        command[-1] = f'truncate -s $(nbdinfo --size "$uri") {image}'
    elif options.plugin in ("data", "sparse-random"):
        # Holes where the plugin says so, and nowhere else.
        command[-1] = command[-1].replace("--allocated", "-S 0 --request-size=32768")
    environment = {**os.environ, "PATH": REAL}
    subprocess.run(["nbdkit", "-U", "-", "-r", *command], env=environment, check=True)
    if options.plugin != "data" or os.path.getsize(image) % 512 != 0:
        return image
    # What is a hole is told by units of 32 KiB, as the plugin does, which are clusters here.
    packed = os.path.join(directory, "disk.qcow2")
    subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", "-o", "cluster_size=32k",
                    image, packed], env=environment, check=True)
    return packed


@contextlib.contextmanager
def serving(file, arguments):
    """`bedplate export` of the file, ready; what it says of itself."""
    command = [BEDPLATE, "export", file, "--json", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL,
                          preexec_fn=die_with_parent) as server:
        try:
            yield json.loads(server.stdout.readline() or fail(f"{command} does not start"))
        finally:
            server.terminate()
            if server.wait() != 0:
                fail(f"bedplate ended with {server.returncode}")


def relay(stream):
    """Passes bytes on between standard input and output, one socket, and the server."""
    client = socket.socket(fileno=os.dup(0))
    for fd in (0, 1):
        os.close(fd)
    others = {client: stream, stream: client}
    with selectors.DefaultSelector() as selector:
        for one in others:
            selector.register(one, selectors.EVENT_READ)
        while selector.get_map():
            for key, _ in selector.select():
                try:
                    data = key.fileobj.recv(1 << 20)
                    others[key.fileobj].sendall(data)
                except OSError:
                    return
                if not data:
                    if key.fileobj is stream:
                        return
                    selector.unregister(client)
                    stream.shutdown(socket.SHUT_WR)


def run_command(text, place, name):
    uri = f"nbd+unix:///{name}?socket={place}"
    variables = {"uri": uri, "nbd": f"unix:{place}", "unixsocket": place, "exportname": name, "port": ""}
    return subprocess.run(["sh", "-c", text], env={**os.environ, **variables}).returncode


def wait_for_the_end(pid_file):
    """The file says that clients may come; a signal says that it is over."""
    ended = {signal.SIGTERM, signal.SIGINT}
    signal.pthread_sigmask(signal.SIG_BLOCK, ended)
    if pid_file:
        with open(pid_file + ".new", "w") as file:
            file.write(f"{os.getpid()}\n")
        os.rename(pid_file + ".new", pid_file)
    signal.sigwait(ended)


def tls(directory, verify):
    files = {"--tls-cert": "server-cert.pem", "--tls-key": "server-key.pem"}
    if verify:
        files["--tls-clients-ca"] = "ca-cert.pem"
    return [word for option, file in files.items() for word in (option, os.path.join(directory, file))]


def nbdkit(args):
    if ASKING.intersection(args) or not args:
        exec_real("nbdkit", args)
    options = Options(args)
    real = os.environ.get("STAND_IN_REAL", "").split()
    if options.plugin in real:
        note(f"nbdkit {options.plugin}")
        exec_real("nbdkit", args)
    if "--exit-with-parent" in options.flags:
        die_with_parent()
    name = options.values.get("-e", "disk")
    with tempfile.TemporaryDirectory() as directory:
        file = content(options, directory)
        note(f"bedplate {options.plugin}")
        arguments = ["--name", name, "--format", "qcow2" if file.endswith(".qcow2") else "raw"]
        if os.environ.get("LISTEN_FDS"):
            # The process stays the same, as LISTEN_PID wants it, and nothing is left behind.
            if file.startswith(directory):
                kept = os.open(file, os.O_RDONLY)
                os.set_inheritable(kept, True)
                shutil.rmtree(directory)
                file = f"/proc/self/fd/{kept}"
            exec_bedplate([file, *arguments])
        place = options.values.get("-U", "-")
        place = os.path.join(directory, "s") if place == "-" else place
        if options.values.get("--tls", "off") != "off":
            arguments += tls(options.values["--tls-certificates"], "--tls-verify-peer" in options.flags)
            arguments += ["--tcp", f"127.0.0.1:{options.values.get('-p', 0)}"]
        elif "-p" in options.values:
            host = os.environ.get("STAND_IN_HOST", "127.0.0.1")
            arguments += ["--tcp", f"{host}:{options.values['-p']}", "--plain"]
        else:
            arguments += ["--nbd", place]
        with serving(file, arguments) as said:
            if "--run" in options.values:
                return run_command(options.values["--run"], place, name)
            if "-s" not in options.flags:
                wait_for_the_end(options.values.get("-P"))
                return 0
            if said["uri"].startswith("nbds://"):
                port = int(said["uri"].split("/")[2].rpartition(":")[2])
                relay(socket.create_connection(("127.0.0.1", port)))
            else:
                stream = socket.socket(socket.AF_UNIX)
                stream.connect(place)
                relay(stream)
    return 0


def qemu_nbd(args):
    if "--list" in args or "--version" in args:
        exec_real("qemu-nbd", args)
    valued = {"-f": "--format", "-x": "--name", "-k": "--nbd", "-e": None, "-D": None}
    command, args = [], list(args)
    while args:
        arg = args.pop(0)
        if arg in valued:
            value = args.pop(0)
            command += [valued[arg], value] if valued[arg] else []
        elif arg in ("-t", "-r"):
            continue
        elif arg.startswith("-"):
            fail(f"qemu-nbd has no option {arg} here")
        else:
            command.append(arg)
    note("bedplate as qemu-nbd")
    exec_bedplate(command)


if __name__ == "__main__":
    stands_for = os.path.basename(sys.argv[0])
    sys.exit(nbdkit(sys.argv[1:]) if stands_for == "nbdkit" else qemu_nbd(sys.argv[1:]))
