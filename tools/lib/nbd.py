"""The least NBD client: enough to time the first byte of an export. Spec: NBD `doc/proto.md`."""

import socket
import struct
import time

from lib import procs

_IHAVEOPT = 0x49484156454F5054
_REQUEST_MAGIC = 0x25609513
_REPLY_MAGIC = 0x67446698
_FIXED_NEWSTYLE_NO_ZEROES = 3
_OPT_EXPORT_NAME = 1
_CMD_READ = 0
_CMD_DISC = 2


def first_bytes(path, length_bytes=4096, name=""):
    """Connects to the default export (or `name`), reads its start; returns (bytes, seconds)."""
    try:
        return _first_bytes(path, length_bytes, name)
    except OSError as error:
        raise procs.Failure(f"{path}: no {length_bytes} bytes from the NBD export: {error}"
                            ) from error


def _first_bytes(path, length_bytes, name):
    start = time.monotonic()
    with socket.socket(socket.AF_UNIX) as stream:
        stream.connect(str(path))
        magic, option_magic, _flags = struct.unpack(">8sQH", _exactly(stream, 18))
        if magic != b"NBDMAGIC" or option_magic != _IHAVEOPT:
            raise OSError("not a newstyle NBD server")
        encoded = name.encode()
        stream.sendall(struct.pack(">IQII", _FIXED_NEWSTYLE_NO_ZEROES, _IHAVEOPT, _OPT_EXPORT_NAME,
                                   len(encoded)) + encoded)
        _exactly(stream, 10)
        stream.sendall(struct.pack(">IHHQQI", _REQUEST_MAGIC, 0, _CMD_READ, 1, 0, length_bytes))
        reply, error, _cookie = struct.unpack(">IIQ", _exactly(stream, 16))
        if reply != _REPLY_MAGIC or error != 0:
            raise OSError(f"the read failed with error {error}")
        data = _exactly(stream, length_bytes)
        elapsed_s = time.monotonic() - start
        stream.sendall(struct.pack(">IHHQQI", _REQUEST_MAGIC, 0, _CMD_DISC, 2, 0, 0))
    return data, elapsed_s


def _exactly(stream, count):
    parts = bytearray()
    while len(parts) < count:
        part = stream.recv(count - len(parts))
        if not part:
            raise OSError("the server closed the connection")
        parts += part
    return bytes(parts)


def uri(path, name=""):
    """The NBD URI of an export on a Unix socket."""
    return f"nbd+unix:///{name}?socket={path}"
