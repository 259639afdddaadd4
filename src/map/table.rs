//! A table of 64-bit words in shared memory that other processes may map read-only.
//!
//! Why: what is worked out once (where a guest's cluster lies) serves every reader of the node.
//! How: a memfd of fixed size, mapped writable here, then sealed: it can neither shrink nor grow,
//! and nobody else can get a writable mapping or write to it (F_SEAL_FUTURE_WRITE).
//! Never: is resized. A read of an untouched word costs a page of memory, so a caller asks only
//! for words that it has reason to ask for.
//! Start at [`SharedTable::new`].

use std::fmt;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::{MemfdFlags, SealFlags};
use rustix::mm::{MapFlags, ProtFlags};

/// A fixed number of `AtomicU64`, zero at first, in a sealed memfd.
pub struct SharedTable {
    words: NonNull<AtomicU64>,
    len: usize,
    fd: OwnedFd,
}

// SAFETY: the words are atomics in memory that stays mapped until drop; nothing is thread-bound.
unsafe impl Send for SharedTable {}
// SAFETY: as above, all access through `&self` is atomic.
unsafe impl Sync for SharedTable {}

impl fmt::Debug for SharedTable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SharedTable").field("len", &self.len).finish_non_exhaustive()
    }
}

impl SharedTable {
    /// A table of `len` words that all read 0. `name` shows in `/proc/<pid>/maps`.
    ///
    /// # Errors
    /// `InvalidInput` for no words or more than an address space holds, otherwise the system's
    /// (out of descriptors or memory, or seals refused before Linux 5.1).
    pub fn new(name: &str, len: u64) -> io::Result<Self> {
        let bytes = len.checked_mul(8).filter(|&n| n > 0).ok_or(io::ErrorKind::InvalidInput)?;
        let size = usize::try_from(bytes).map_err(|_| io::ErrorKind::InvalidInput)?;
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let fd = rustix::fs::memfd_create(name, flags)?;
        rustix::fs::ftruncate(&fd, bytes)?;
        let prot = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a fresh mapping at an address of the kernel's choice replaces nothing. It covers
        // the whole memfd, which is sealed against shrinking below, before anybody else has it.
        let base =
            unsafe { rustix::mm::mmap(ptr::null_mut(), size, prot, MapFlags::SHARED, &fd, 0) }?;
        let words = NonNull::new(base.cast()).ok_or(io::ErrorKind::AddrNotAvailable)?;
        let table = Self { words, len: size / 8, fd };
        let seals = SealFlags::SHRINK | SealFlags::GROW | SealFlags::FUTURE_WRITE | SealFlags::SEAL;
        rustix::fs::fcntl_add_seals(&table.fd, seals)?;
        Ok(table)
    }

    /// Number of words.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.len as u64
    }

    /// Never true: a table of no words is refused.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// All words.
    #[must_use]
    pub fn words(&self) -> &[AtomicU64] {
        // SAFETY: `words` is page-aligned and maps `len` words of a memfd that cannot shrink, until
        // drop; every bit pattern is a valid AtomicU64, and all access to it is atomic.
        unsafe { std::slice::from_raw_parts(self.words.as_ptr(), self.len) }
    }

    /// Word `index`, or `None` outside the table. Acquire: what was written before the matching
    /// [`set`](Self::set) is seen.
    #[must_use]
    pub fn get(&self, index: u64) -> Option<u64> {
        let index = usize::try_from(index).ok()?;
        self.words().get(index).map(|word| word.load(Ordering::Acquire))
    }

    /// Sets word `index` (release), or returns false outside the table.
    #[must_use]
    pub fn set(&self, index: u64, value: u64) -> bool {
        let word = usize::try_from(index).ok().and_then(|index| self.words().get(index));
        word.map(|word| word.store(value, Ordering::Release)).is_some()
    }

    /// The memfd, to be handed to a reader; it can only be mapped and read from now on.
    #[must_use]
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Drop for SharedTable {
    fn drop(&mut self) {
        // SAFETY: the range is that of our own mmap, and every `&[AtomicU64]` borrows `self`.
        let unmapped = unsafe { rustix::mm::munmap(self.words.as_ptr().cast(), self.len * 8) };
        debug_assert!(unmapped.is_ok(), "munmap of our own map cannot fail");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::os::unix::fs::{FileExt, MetadataExt};

    #[test]
    fn words_are_zero_until_set_and_bounds_are_checked() {
        let table = SharedTable::new("test", 1000).unwrap();
        assert_eq!((table.len(), table.get(999), table.get(1000)), (1000, Some(0), None));
        assert!(table.set(999, 5));
        assert!(!table.set(1000, 5));
        assert_eq!(table.get(999), Some(5));
        assert!(SharedTable::new("test", 0).is_err());
        assert!(SharedTable::new("test", u64::MAX).is_err());
    }

    #[test]
    fn untouched_words_cost_no_memory() {
        let table = SharedTable::new("test", 1 << 31).unwrap();
        assert!(table.set(1 << 30, 1));
        let file = File::from(table.fd().try_clone_to_owned().unwrap());
        assert!(file.metadata().unwrap().blocks() * 512 <= 2 << 20, "at most one huge page");
    }

    #[test]
    fn a_handed_out_descriptor_reads_and_cannot_write_or_resize() {
        let table = SharedTable::new("test", 10).unwrap();
        assert!(table.set(1, 0x0102_0304_0506_0708));
        let file = File::from(table.fd().try_clone_to_owned().unwrap());
        let mut word = [0; 8];
        file.read_exact_at(&mut word, 8).unwrap();
        assert_eq!(u64::from_ne_bytes(word), 0x0102_0304_0506_0708);
        assert!(file.write_at(&[1], 0).is_err());
        assert!(file.set_len(0).is_err());
        assert!(file.set_len(1 << 20).is_err());
        assert!(table.set(1, 6), "our own mapping stays writable");
    }
}
