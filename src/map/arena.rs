//! Shared memory that this process writes and others may only read.
//!
//! Why: what is decoded once is read in place by many processes, and one bad reader must not change
//! what the others see; memory that is not used should go back to the system.
//! How: a file in a tmpfs of its own, which is mounted nowhere: it is made by a short-lived thread in
//! a mount namespace that ends with it. We have the file open for writing; what readers get came
//! through another mount of it that is read-only (as [`crate::read_only`]), and can't be opened anew
//! for writing, by root neither. Where that may not be done (no CAP_SYS_ADMIN), it is a memfd with
//! F_SEAL_FUTURE_WRITE, which can't be punched: it keeps what it once had.
//! Never: becomes shorter. A page is there before it is handed out: a lack of memory is an error
//! then, where at the first touch it would be a signal. A reader who reads what was punched has the
//! kernel make pages of zeroes, of which there are never more than the arena is long.
//! Start at [`Arena::new`].

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::{self, NonNull};

use rustix::fs::{FallocateFlags, MemfdFlags, Mode, OFlags, SealFlags};
use rustix::mm::{MapFlags, ProtFlags};
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountPropagationFlags, MoveMountFlags,
};

use crate::protect::read_only;

/// Bytes of a chunk: a huge page.
pub const CHUNK_BYTES: usize = 2 << 20;
/// Of one page the kernel makes a whole huge one.
const SEED_BYTES: usize = 4096;
/// `MADV_COLLAPSE`: makes a huge page of a range, whatever the system's setting for shared memory.
const MADV_COLLAPSE: libc::c_int = 25;
/// Shows in `/proc/<pid>/maps`.
const NAME: &str = "bedplate-decoded";

/// A file in memory and our writable map of it.
pub(crate) struct Arena {
    pub(crate) base: NonNull<u8>,
    /// What was mapped, of which `base` is the first huge page's beginning.
    mapped: (NonNull<u8>, usize),
    pub(crate) len_bytes: usize,
    fd: OwnedFd,
    /// What readers get, if that is not `fd` itself, whose seals forbid punching.
    readers: Option<OwnedFd>,
    /// The file system makes huge pages by itself.
    is_huge: bool,
}

// SAFETY: the memory belongs to no thread; who may touch which part of it is for the slots to say.
unsafe impl Send for Arena {}
// SAFETY: through `&self` there is only an address and a descriptor.
unsafe impl Sync for Arena {}

impl Arena {
    /// Memory of `len_bytes`, a whole number of chunks, of which none is there yet.
    ///
    /// # Errors
    /// The system is out of descriptors or address space, or has no seals (before Linux 5.1).
    pub(crate) fn new(len_bytes: usize) -> io::Result<Self> {
        Self::punchable(len_bytes).or_else(|_not_for_us| Self::sealed(len_bytes))
    }

    /// One whose memory can be given back.
    ///
    /// # Errors
    /// EPERM without CAP_SYS_ADMIN, ENOSYS before Linux 5.12.
    pub(crate) fn punchable(len_bytes: usize) -> io::Result<Self> {
        let thread = std::thread::Builder::new().name("arena".into());
        let made = thread.spawn(move || in_private_tmpfs(len_bytes))?.join();
        let made = made.map_err(|_panic| io::Error::other("making an arena panicked"))??;
        let mut arena = Self::of(made.ours, Some(made.readers), len_bytes)?;
        arena.is_huge = made.is_huge;
        Ok(arena)
    }

    /// One that keeps what it once had.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub(crate) fn sealed(len_bytes: usize) -> io::Result<Self> {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let fd = rustix::fs::memfd_create(NAME, flags)?;
        rustix::fs::ftruncate(&fd, len_bytes as u64)?;
        let arena = Self::of(fd, None, len_bytes)?;
        let seals = SealFlags::SHRINK | SealFlags::GROW | SealFlags::FUTURE_WRITE | SealFlags::SEAL;
        rustix::fs::fcntl_add_seals(&arena.fd, seals)?;
        Ok(arena)
    }

    /// Maps `fd`, at a multiple of a huge page.
    fn of(fd: OwnedFd, readers: Option<OwnedFd>, len_bytes: usize) -> io::Result<Self> {
        let mapped_bytes = len_bytes + CHUNK_BYTES;
        // SAFETY: a fresh mapping at an address of the kernel's choice replaces nothing; it only
        // keeps a range of addresses, with room for the alignment.
        let start = unsafe {
            rustix::mm::mmap_anonymous(
                ptr::null_mut(),
                mapped_bytes,
                ProtFlags::empty(),
                MapFlags::PRIVATE | MapFlags::NORESERVE,
            )
        }?;
        let start = NonNull::new(start.cast::<u8>()).ok_or(io::ErrorKind::OutOfMemory)?;
        let base = start.as_ptr().wrapping_add(start.as_ptr().align_offset(CHUNK_BYTES));
        let base = NonNull::new(base).ok_or(io::ErrorKind::OutOfMemory)?;
        let arena =
            Self { base, mapped: (start, mapped_bytes), len_bytes, fd, readers, is_huge: false };
        let prot = ProtFlags::READ | ProtFlags::WRITE;
        let flags = MapFlags::SHARED | MapFlags::FIXED;
        // SAFETY: replaces a part of the range just kept, which nobody else knows of; nobody else can
        // cut the file short: it is sealed before anybody has it, or others have it read-only.
        unsafe { rustix::mm::mmap(base.as_ptr().cast(), len_bytes, prot, flags, &arena.fd, 0) }?;
        Ok(arena)
    }

    /// True if memory can be given back.
    pub(crate) fn is_punchable(&self) -> bool {
        self.readers.is_some()
    }

    /// What readers may have.
    pub(crate) fn readers_fd(&self) -> BorrowedFd<'_> {
        self.readers.as_ref().unwrap_or(&self.fd).as_fd()
    }

    /// Bytes of memory that the system has in it now.
    pub(crate) fn memory_bytes(&self) -> u64 {
        let blocks = rustix::fs::fstat(&self.fd).map_or(0, |stat| stat.st_blocks);
        u64::try_from(blocks).unwrap_or(0) * 512
    }

    /// Gives chunk `index` its memory, if possible as one huge page.
    ///
    /// # Errors
    /// `StorageFull` past the arena's end; otherwise the system has none to give.
    pub(crate) fn populate_chunk(&self, index: usize) -> io::Result<()> {
        let at = index * CHUNK_BYTES;
        if at >= self.len_bytes {
            return Err(io::ErrorKind::StorageFull.into());
        }
        // A huge page, if one is free; to have the system make room for one takes as long as decoding
        // what comes into it. Its zeroes are written at the first touch.
        if self.is_huge {
            return self.populate(at..at + CHUNK_BYTES);
        }
        // Of one page it takes half the time that 512 pages take.
        self.populate(at..at + SEED_BYTES)?;
        // Slower without.
        if self.collapse(index) { Ok(()) } else { self.populate(at..at + CHUNK_BYTES) }
    }

    /// Gives a range its memory.
    ///
    /// # Errors
    /// The system has none to give.
    pub(crate) fn populate(&self, range: Range<usize>) -> io::Result<()> {
        self.allocate(FallocateFlags::empty(), range)
    }

    /// Makes one huge page of chunk `index`, whatever is in it; false if there is none to be had.
    pub(crate) fn collapse(&self, index: usize) -> bool {
        let at = index * CHUNK_BYTES;
        debug_assert!(at < self.len_bytes, "a chunk of ours");
        // SAFETY: the chunk is in our own map, and its content does not change.
        let refused =
            unsafe { libc::madvise(self.base.as_ptr().add(at).cast(), CHUNK_BYTES, MADV_COLLAPSE) };
        refused == 0
    }

    /// Gives the memory of a range back: zeroes are left of it.
    ///
    /// # Errors
    /// EPERM of one that is sealed.
    pub(crate) fn punch(&self, range: Range<usize>) -> io::Result<()> {
        self.allocate(FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, range)
    }

    fn allocate(&self, flags: FallocateFlags, range: Range<usize>) -> io::Result<()> {
        let (at, len) = (range.start as u64, range.len() as u64);
        // A signal, of whatever thread, interrupts it.
        Ok(rustix::io::retry_on_intr(|| rustix::fs::fallocate(&self.fd, flags, at, len))?)
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        let (start, len) = self.mapped;
        // SAFETY: the range is that of our own mappings, and every slot holds the arena.
        let unmapped = unsafe { rustix::mm::munmap(start.as_ptr().cast(), len) };
        debug_assert!(unmapped.is_ok(), "munmap of our own arena cannot fail");
    }
}

/// A file that only its descriptors know of.
struct Private {
    ours: OwnedFd,
    readers: OwnedFd,
    is_huge: bool,
}

/// A file of `len_bytes` in a tmpfs of its own. For a thread that ends then: it stays in a mount
/// namespace of its own.
fn in_private_tmpfs(len_bytes: usize) -> io::Result<Private> {
    // SAFETY: takes a number; only this thread's view of mounts (and its directory) is another then.
    if unsafe { libc::unshare(libc::CLONE_NEWNS) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // What is mounted here shows nowhere else.
    let alone = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
    rustix::mount::mount_change("/", alone)?;
    let tmpfs = rustix::mount::fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    // No limit but the file's length: by default it is half the memory.
    rustix::mount::fsconfig_set_string(&tmpfs, "size", "0")?;
    rustix::mount::fsconfig_set_string(&tmpfs, "mode", "0700")?;
    // Not every kernel has them.
    let is_huge = rustix::mount::fsconfig_set_string(&tmpfs, "huge", "always").is_ok();
    rustix::mount::fsconfig_create(&tmpfs)?;
    let attributes = MountAttrFlags::MOUNT_ATTR_NOSUID
        | MountAttrFlags::MOUNT_ATTR_NODEV
        | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    let mount = rustix::mount::fsmount(&tmpfs, FsMountFlags::FSMOUNT_CLOEXEC, attributes)?;
    // A mount can be cloned only where it has a place.
    let by_descriptor = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
    rustix::mount::move_mount(&mount, "", rustix::fs::CWD, "/", by_descriptor)?;
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
    let file = rustix::fs::openat(&mount, NAME, flags, Mode::RUSR)?;
    rustix::fs::ftruncate(&file, len_bytes as u64)?;
    let file = File::from(file);
    let readers = read_only(&file)?;
    Ok(Private { ours: file.into(), readers: readers.into(), is_huge })
}
