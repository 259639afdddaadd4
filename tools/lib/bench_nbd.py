"""NBD reads of a raw file in the page cache, against qemu-nbd and nbdkit."""

from lib import corpus, nbd_load, rounds

NAME = "nbd"
_REFERENCE = "qemu-nbd"


def run(bench):
    size_bytes = nbd_load.image_bytes(bench)
    raw = bench.scratch.path / "dense.raw"
    corpus.dense(raw, size_bytes)
    corpus.warm(raw)
    exports = _exports(bench, raw)
    nbd_load.verify(bench, exports, raw)
    group = f"{NAME}, raw"
    rounds.say(f"  load from {nbd_load.generator()}; max RSS counts pages of the mapped image, "
               "which are page cache")
    cases = [nbd_load.case(bench, group, load, size_bytes, exports, _REFERENCE) for load in (
        nbd_load.RANDOM_1, nbd_load.RANDOM_16, nbd_load.RANDOM_16X2, nbd_load.SEQUENTIAL_256K)]
    cases.append(nbd_load.copy_case(bench, group, size_bytes, exports, _REFERENCE))
    bench.compare(cases)
    nbd_load.stop(bench, exports)
    raw.unlink()


def _exports(bench, raw):
    sockets = {name: bench.scratch.path / f"{name}.sock" for name in ("b", "q", "qu", "k")}
    qemu = ["qemu-nbd", "-r", "-t", "-e", "8", "-f", "raw"]
    commands = {
        "bedplate export": ([bench.program, "export", raw, "--nbd", sockets["b"]], sockets["b"]),
        _REFERENCE: ([*qemu, "-k", sockets["q"], raw], sockets["q"]),
        "qemu-nbd --aio=io_uring": ([*qemu, "--aio=io_uring", "-k", sockets["qu"], raw],
                                    sockets["qu"]),
        "nbdkit file": (["nbdkit", "-f", "-r", "-U", sockets["k"], "file", raw], sockets["k"]),
    }
    return {name: nbd_load.start(bench, name, command, path)
            for name, (command, path) in commands.items()}
