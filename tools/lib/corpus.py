"""Content for comparisons: the same bytes on every run and every machine."""

import errno
import hashlib
import os
import random

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30
UNIT = 64 * KIB

_WORDS = ("base block cluster copy digest disk engine export extent hole image journal kernel "
          "layout map node page presence queue read replica ring seal sector share size source "
          "store table token unit view volume write zero").split()


class _Random:
    """Bytes that no codec makes smaller."""

    def __init__(self, seed):
        self._source = random.Random(seed)

    def unit(self):
        return self._source.randbytes(UNIT)


class _Text:
    """Lines of words in random order: shrinks to about a quarter, no two units are equal."""

    def __init__(self, seed):
        self._source = random.Random(seed)
        self._lines = [" ".join(self._source.choices(_WORDS, k=8)) + "\n" for _ in range(4096)]

    def unit(self):
        # A line has at least 32 bytes (eight words of three), so that these always fill a unit.
        lines = self._source.choices(self._lines, k=UNIT // 32)
        return "".join(lines).encode()[:UNIT]


def mixed(path, size):
    """Half random, a quarter zero, a quarter text, changing every 64 KiB; zeroes are written.

    Returns (sha256, bytes that are not zero), the second in whole units of 64 KiB.
    """
    return _write(path, size, "RZRT")


def dense(path, size):
    """Half random, half text, changing every 64 KiB: no zeroes. Returns what `mixed` does."""
    return _write(path, size, "RT")


def text(path, size):
    """Text alone, which compresses as the files of a system do. Returns what `mixed` does."""
    return _write(path, size, "T")


def _write(path, size, pattern):
    makers = {"R": _Random(1), "T": _Text(2)}
    zero, digest, data_bytes = bytes(UNIT), hashlib.sha256(), 0
    with open(path, "wb") as out:
        for index in range(size // UNIT):
            kind = pattern[index % len(pattern)]
            unit = zero if kind == "Z" else makers[kind].unit()
            data_bytes += 0 if kind == "Z" else UNIT
            digest.update(unit)
            out.write(unit)
        out.flush()
        # Dirty pages written back during the first round would be that round's cost.
        os.fdatasync(out.fileno())
    return digest.hexdigest(), data_bytes


def sparse(path, size, every=4):
    """One MiB of random data in every `every` MiB, the rest holes. Returns what `mixed` does."""
    source, zero, digest, data_bytes = random.Random(3), bytes(MIB), hashlib.sha256(), 0
    with open(path, "wb") as out:
        out.truncate(size)
        for index in range(size // MIB):
            block = zero
            if index % every == 0:
                block = source.randbytes(MIB)
                os.pwrite(out.fileno(), block, index * MIB)
                data_bytes += MIB
            digest.update(block)
        os.fdatasync(out.fileno())
    return digest.hexdigest(), data_bytes


def noise(path, size, seed):
    """Random data, other for each seed. Returns what `mixed` does."""
    source, digest = random.Random(seed), hashlib.sha256()
    with open(path, "wb") as out:
        for _ in range(size // MIB):
            block = source.randbytes(MIB)
            digest.update(block)
            out.write(block)
        out.flush()
        os.fdatasync(out.fileno())
    return digest.hexdigest(), size


def warm(path):
    """Brings a file's data into the page cache; its holes would only push other things out."""
    with open(path, "rb", buffering=0) as source:
        for start, end in _data(source):
            source.seek(start)
            left = end - start
            while left > 0:
                got = len(source.read(min(4 * MIB, left)))
                left -= got or left


def allocated(path):
    """Bytes that the file takes on its disk."""
    return os.stat(path).st_blocks * 512


def equal(left, right):
    """Whether two files have the same bytes; what is a hole in both is not read."""
    if os.path.getsize(left) != os.path.getsize(right):
        return False
    with open(left, "rb", buffering=0) as first, open(right, "rb", buffering=0) as second:
        for start, end in sorted([*_data(first), *_data(second)]):
            first.seek(start)
            second.seek(start)
            while start < end:
                count = min(4 * MIB, end - start)
                ours, theirs = first.read(count), second.read(count)
                if ours != theirs or not ours:
                    return False
                start += len(ours)
    return True


def _data(source):
    """(start, end) of each stretch of an open file that is no hole."""
    size, found, end = os.fstat(source.fileno()).st_size, [], 0
    while end < size:
        try:
            start = os.lseek(source.fileno(), end, os.SEEK_DATA)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            break
        end = os.lseek(source.fileno(), start, os.SEEK_HOLE)
        found.append((start, end))
    source.seek(0)
    return found
