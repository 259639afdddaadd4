"""A small Linux guest for the demonstration: its files, its disk image, and how to boot it.

How: the root file system holds real files of this machine and a list of their sha256. At boot an
initramfs of busybox and the virtio modules mounts /dev/vda read-only, checks the list and prints
one line. Nothing here needs root or a network; a kernel that is not on this machine does.
"""

import dataclasses
import hashlib
import lzma
import os
import re
import shutil
import subprocess
from pathlib import Path

from lib import procs
from lib.corpus import GIB, MIB

# Large and varied: programs, libraries, text, databases. What is missing is passed over.
_SOURCES = ("usr/bin", "usr/sbin", "usr/lib/x86_64-linux-gnu", "usr/lib/python3", "usr/share/doc",
            "usr/share/perl", "usr/share/zoneinfo", "etc")
_LARGEST_FILE = 24 * MIB
_LIST = "files.sha256"
_MODULES = ("virtio.ko", "virtio_ring.ko", "virtio_pci_legacy_dev.ko", "virtio_pci_modern_dev.ko",
            "virtio_pci.ko", "virtio_blk.ko", "crc16.ko", "mbcache.ko", "jbd2.ko", "crc32c_generic.ko",
            "ext4.ko")
MARKER = "BEDPLATE-GUEST"

_INIT = f"""#!/bin/busybox sh
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t devtmpfs dev /dev
exec > /dev/console 2>&1
# Which needs which differs between kernels: each pass loads those whose needs are met.
for pass in 1 2 3 4 5; do
    for module in $(cat /modules); do insmod /$module 2> /dev/null; done
done
tries=0
while [ ! -b /dev/vda ] && [ $tries -lt 100 ]; do sleep 0.1; tries=$((tries + 1)); done
mount -t ext4 -o ro /dev/vda /root || echo "{MARKER} FAILED: no root file system"
cd /root && sha256sum -c {_LIST} > /result 2>&1
status=$?
echo "{MARKER} checked $(grep -c ': OK$' /result) files, status $status," \\
     "list $(sha256sum < {_LIST} | cut -d ' ' -f 1)"
grep -v ': OK$' /result | head -n 5
sync
poweroff -f
"""


@dataclasses.dataclass
class Tree:
    """A directory of real files and what is in it."""

    path: Path
    files: int
    data_bytes: int
    list_sha256: str


def collect(path, budget_bytes):
    """Copies files of this machine below `path` until the budget is used, and lists digests."""
    files, total, lines = 0, 0, []
    share = budget_bytes // len(_SOURCES)
    for source in _SOURCES:
        # Each source gets what the ones before it left, at least its share.
        limit = min(budget_bytes, total + max(share, budget_bytes // 4))
        for found in _regular_files(Path("/") / source):
            length = found.stat().st_size
            if total + length > limit:
                continue
            digest = _copy(found, path / found.relative_to("/"))
            if digest is None:
                continue
            files, total = files + 1, total + length
            lines.append(f"{digest}  {found.relative_to('/')}\n")
    text = "".join(lines).encode()
    (path / _LIST).write_bytes(text)
    if files == 0:
        raise procs.Failure("no readable files below /usr to make a guest image from")
    return Tree(path, files, total, hashlib.sha256(text).hexdigest())


def _regular_files(top):
    for where, folders, names in os.walk(top):
        folders.sort()
        for name in sorted(names):
            path = Path(where) / name
            # `sha256sum --check` reads the list by lines, so that odd names stay out of it.
            if not re.fullmatch(r"[\w./+@,:=-]+", str(path), re.ASCII) or path.is_symlink():
                continue
            if path.is_file() and os.access(path, os.R_OK) and path.stat().st_size <= _LARGEST_FILE:
                yield path


def _copy(source, target):
    try:
        data = source.read_bytes()
    except OSError:
        return None
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(data)
    return hashlib.sha256(data).hexdigest()


def make_image(tree, image, scratch_path):
    """An ext4 disk with the tree in it, as a compressed qcow2 as vendors ship them."""
    raw = scratch_path / "guest.raw"
    # Inodes, journal and free room; a virtual disk is larger than its files.
    size_bytes = max(GIB, -(-(tree.data_bytes * 3 // 2) // GIB) * GIB)
    with open(raw, "wb") as disk:
        disk.truncate(size_bytes)
    procs.run("mke2fs", "-q", "-t", "ext4", "-L", "guest", "-E", "lazy_itable_init=0,root_owner=0:0",
              "-d", tree.path, raw)
    procs.run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", "-c", raw, image)
    raw.unlink()
    return size_bytes


def check_files(tree, raw, out):
    """Reads all files out of the file system in `raw` and holds them against the list."""
    procs.run("debugfs", "-R", f"rdump / {out}", raw)
    listed = out / _LIST
    if hashlib.sha256(listed.read_bytes()).hexdigest() != tree.list_sha256:
        raise procs.Failure(f"{_LIST} in the served image is not the one that was put there")
    procs.run("sha256sum", "--check", "--quiet", "--strict", _LIST, cwd=out)


# ---- booting ----

@dataclasses.dataclass
class Kernel:
    """A kernel and the directory with its modules."""

    image: Path
    modules: Path


def find_kernel(scratch_path):
    """A kernel of this machine, else Debian's cloud kernel from its mirror.

    Returns (Kernel or None, where it came from or why there is none).
    """
    for image in sorted(Path("/boot").glob("vmlinuz-*"), reverse=True):
        modules = Path("/lib/modules") / image.name.removeprefix("vmlinuz-")
        if modules.is_dir() and os.access(image, os.R_OK):
            return Kernel(image, modules), str(image)
    return _download_kernel(scratch_path)


def _download_kernel(scratch_path):
    if shutil.which("apt-get") is None or shutil.which("dpkg") is None:
        return None, "no kernel in /boot, and no apt-get to fetch one"
    depends = subprocess.run(["apt-cache", "depends", "linux-image-cloud-amd64"],
                             capture_output=True, text=True, check=False).stdout
    named = re.search(r"Depends: (linux-image-\S+)", depends)
    if named is None:
        return None, "no kernel in /boot, and apt knows no linux-image-cloud-amd64"
    where = scratch_path / "kernel"
    where.mkdir()
    # apt's own sandbox user may not write here; a warning about that is no failure.
    fetched = subprocess.run(
        ["apt-get", "-q", "-o", "Acquire::Retries=0", "-o", "Acquire::http::Timeout=10",
         "download", named.group(1)], cwd=where, capture_output=True, text=True, check=False)
    packages = list(where.glob("*.deb"))
    if fetched.returncode != 0 or not packages:
        return None, f"no kernel in /boot, and no mirror gives {named.group(1)}"
    procs.run("dpkg", "-x", packages[0], where)
    image = next((where / "boot").glob("vmlinuz-*"))
    modules = where / "lib/modules" / image.name.removeprefix("vmlinuz-")
    return Kernel(image, modules), f"{named.group(1)} from the package mirror"


def busybox():
    """A busybox that needs no libraries, or None."""
    path = shutil.which("busybox")
    if path is None:
        return None
    kind = subprocess.run(["ldd", path], capture_output=True, text=True, check=False)
    return Path(path) if "not a dynamic executable" in kind.stdout + kind.stderr else None


def make_initramfs(kernel, target, scratch_path):
    """busybox, the modules that the kernel does not have built in, and an init."""
    root = scratch_path / "initramfs"
    for name in ("bin", "proc", "dev", "root"):
        (root / name).mkdir(parents=True)
    shutil.copy(busybox(), root / "bin/busybox")
    loaded = []
    for name in _MODULES:
        for path in kernel.modules.rglob(f"{name}*"):
            data = path.read_bytes()
            (root / name).write_bytes(lzma.decompress(data) if path.suffix == ".xz" else data)
            loaded.append(name)
            break
    (root / "modules").write_text("".join(f"{name}\n" for name in loaded))
    init = root / "init"
    init.write_text(_INIT)
    init.chmod(0o755)
    listing = "\n".join(str(path.relative_to(root)) for path in sorted(root.rglob("*")))
    with open(target, "wb") as out:
        subprocess.run(["busybox", "cpio", "-o", "-H", "newc"], cwd=root, input=listing.encode(),
                       stdout=out, stderr=subprocess.DEVNULL, check=True)


def boot(scratch, kernel, uri, limit_s):
    """Boots the guest from the export; returns (the line about its files, all that it printed)."""
    initramfs = scratch.path / "initramfs.cpio"
    make_initramfs(kernel, initramfs, scratch.path)
    server = scratch.serve("qemu-system-x86_64", [
        "qemu-system-x86_64", "-machine", "q35", "-accel", "tcg", "-m", "512", "-smp", "2",
        "-cpu", "max", "-nodefaults", "-display", "none", "-serial", "stdio", "-no-reboot",
        "-kernel", kernel.image, "-initrd", initramfs, "-append", "console=ttyS0 panic=-1 quiet",
        "-drive", f"file={uri},format=raw,if=none,id=root,readonly=on",
        "-device", "virtio-blk-pci,drive=root"])

    def said():
        return re.search(rf"^{MARKER} .*\n", server.output(), re.MULTILINE)

    server.wait_for(said, "the guest's report", limit_s, every_s=0.05)
    line = said().group(0).strip()
    scratch.retire(server)
    return line, server.output()
