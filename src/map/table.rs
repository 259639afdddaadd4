//! A table of 64-bit words in shared memory that other processes may map read-only.
//!
//! Why: what is worked out once (where a guest's cluster lies) serves every reader of the node.
//! How: a memfd of fixed size, mapped writable here, then sealed: it can neither shrink nor grow,
//! and nobody else can get a writable mapping or write to it (F_SEAL_FUTURE_WRITE). It begins with a
//! [`Header`]; a reader maps it as a [`ReadTable`], after a look at seals, length and header.
//! Never: is resized. A read of an untouched word costs a page of memory, so a caller asks only
//! for words that it has reason to ask for.
//! Start at [`SharedTable::new`] and [`ReadTable::open`].

use std::fmt;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::{MemfdFlags, SealFlags};
use rustix::mm::{MapFlags, ProtFlags};

use crate::format::{HEADER_WORDS, Header};

/// Bytes of the longest table that a reader maps: enough for 64 TiB in units of 64 KiB.
const MAX_READ_BYTES: u64 = 16 << 30;

/// A fixed number of `AtomicU64`, zero at first, in a sealed memfd.
pub struct SharedTable {
    words: NonNull<AtomicU64>,
    /// All words, the header's too.
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
    /// A table with `header`, whose other words all read 0. `name` shows in `/proc/<pid>/maps`.
    ///
    /// # Errors
    /// `InvalidInput` for no words or more than an address space holds, otherwise the system's
    /// (out of descriptors or memory, or seals refused before Linux 5.1).
    pub fn new(name: &str, header: &Header) -> io::Result<Self> {
        let body = header.body_words().filter(|&words| words > 0);
        let bytes = body.and_then(|body| body.checked_add(HEADER_WORDS as u64)?.checked_mul(8));
        let bytes = bytes.ok_or(io::ErrorKind::InvalidInput)?;
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
        for (word, value) in table.all().iter().zip(header.to_words()) {
            word.store(value, Ordering::Release);
        }
        Ok(table)
    }

    /// Number of words after the header.
    #[must_use]
    pub fn len(&self) -> u64 {
        (self.len - HEADER_WORDS) as u64
    }

    /// Never true: a table of no words is refused.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// All words after the header.
    #[must_use]
    pub fn words(&self) -> &[AtomicU64] {
        self.all().get(HEADER_WORDS..).unwrap_or_default()
    }

    fn all(&self) -> &[AtomicU64] {
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

/// A table of another process, mapped read-only.
pub struct ReadTable {
    words: NonNull<AtomicU64>,
    len: usize,
    header: Header,
}

// SAFETY: the words are only read, as atomics, in memory that stays mapped until drop.
unsafe impl Send for ReadTable {}
// SAFETY: loads through `&self` need no other thread's consent.
unsafe impl Sync for ReadTable {}

impl fmt::Debug for ReadTable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ReadTable").field("header", &self.header).finish_non_exhaustive()
    }
}

impl ReadTable {
    /// Maps the table in `fd`, which may be anything.
    ///
    /// # Errors
    /// `InvalidData` for what is no table of this version, or could be cut short under its reader;
    /// otherwise the system's.
    pub fn open(fd: BorrowedFd<'_>) -> io::Result<Self> {
        let bad = |what: &'static str| io::Error::new(io::ErrorKind::InvalidData, what);
        let seals = rustix::fs::fcntl_get_seals(fd).map_err(|_| bad("is no memfd"))?;
        if !seals.contains(SealFlags::SHRINK) {
            return Err(bad("is not sealed, and could be cut short"));
        }
        let bytes = u64::try_from(rustix::fs::fstat(fd)?.st_size).unwrap_or(0);
        if !(HEADER_WORDS as u64 * 8..=MAX_READ_BYTES).contains(&bytes) {
            return Err(bad("is too short for a header, or too long"));
        }
        let size = usize::try_from(bytes).map_err(|_| io::ErrorKind::OutOfMemory)?;
        let prot = ProtFlags::READ;
        // SAFETY: a fresh mapping at an address of the kernel's choice replaces nothing. It covers
        // the whole of a file that can not get shorter.
        let base =
            unsafe { rustix::mm::mmap(ptr::null_mut(), size, prot, MapFlags::SHARED, fd, 0) }?;
        let words = NonNull::new(base.cast()).ok_or(io::ErrorKind::AddrNotAvailable)?;
        let mut table = Self { words, len: size / 8, header: Header::EMPTY };
        let mut words = [0; HEADER_WORDS];
        for (to, from) in words.iter_mut().zip(table.all()) {
            *to = from.load(Ordering::Acquire);
        }
        table.header = Header::of_words(words, table.len as u64)
            .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
        Ok(table)
    }

    /// What it begins with.
    #[must_use]
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// All words after the header, to be read only: a store is a signal.
    fn all(&self) -> &[AtomicU64] {
        // SAFETY: page-aligned, and maps `len` words of a memfd that cannot shrink, until drop; all
        // bit patterns are valid, and this type only loads.
        unsafe { std::slice::from_raw_parts(self.words.as_ptr(), self.len) }
    }

    /// Word `index` after the header (relaxed), or `None` outside the table.
    #[must_use]
    #[inline]
    pub fn get(&self, index: u64) -> Option<u64> {
        let index = usize::try_from(index).ok()?.checked_add(HEADER_WORDS)?;
        self.all().get(index).map(|word| word.load(Ordering::Relaxed))
    }
}

impl Drop for ReadTable {
    fn drop(&mut self) {
        // SAFETY: the range is that of our own mapping, and nothing borrowed from it is left.
        let unmapped = unsafe { rustix::mm::munmap(self.words.as_ptr().cast(), self.len * 8) };
        debug_assert!(unmapped.is_ok(), "munmap of our own map cannot fail");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::os::unix::fs::{FileExt, MetadataExt};

    fn units(units: u64) -> Header {
        Header { kind: crate::format::Kind::Decoded, unit_bits: 16, units, ..Header::EMPTY }
    }

    #[test]
    fn words_are_zero_until_set_and_bounds_are_checked() {
        let table = SharedTable::new("test", &units(1000)).unwrap();
        assert_eq!((table.len(), table.get(999), table.get(1000)), (1000, Some(0), None));
        assert!(table.set(999, 5));
        assert!(!table.set(1000, 5));
        assert_eq!(table.get(999), Some(5));
        assert!(SharedTable::new("test", &units(0)).is_err());
        assert!(SharedTable::new("test", &units(u64::MAX)).is_err());
    }

    #[test]
    fn untouched_words_cost_no_memory() {
        let table = SharedTable::new("test", &units(1 << 31)).unwrap();
        assert!(table.set(1 << 30, 1));
        let file = File::from(table.fd().try_clone_to_owned().unwrap());
        assert!(file.metadata().unwrap().blocks() * 512 <= 2 << 20, "at most one huge page");
    }

    #[test]
    fn a_handed_out_descriptor_reads_and_cannot_write_or_resize() {
        let table = SharedTable::new("test", &units(10)).unwrap();
        assert!(table.set(1, 0x0102_0304_0506_0708));
        let file = File::from(table.fd().try_clone_to_owned().unwrap());
        let mut word = [0; 8];
        file.read_exact_at(&mut word, 72).unwrap();
        assert_eq!(u64::from_ne_bytes(word), 0x0102_0304_0506_0708);
        assert!(file.write_at(&[1], 0).is_err());
        assert!(file.set_len(0).is_err());
        assert!(file.set_len(1 << 20).is_err());
        assert!(table.set(1, 6), "our own mapping stays writable");
    }

    #[test]
    fn a_reader_sees_what_is_set_and_nothing_else_is_a_table() {
        let table = SharedTable::new("test", &units(10)).unwrap();
        let read = ReadTable::open(table.fd()).unwrap();
        assert_eq!((read.header(), read.get(9), read.get(10)), (&units(10), Some(0), None));
        assert!(table.set(9, 77));
        assert_eq!((read.get(9), read.get(u64::MAX)), (Some(77), None));

        let file = tempfile::tempfile().unwrap();
        assert!(ReadTable::open(file.as_fd()).is_err(), "a file");
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let memfd = File::from(rustix::fs::memfd_create("test", flags).unwrap());
        let mut bytes = vec![0; 4096];
        file_of(&table).read_exact_at(&mut bytes[..144], 0).unwrap();
        memfd.write_all_at(&bytes, 0).unwrap();
        assert!(ReadTable::open(memfd.as_fd()).is_err(), "not sealed");
        rustix::fs::fcntl_add_seals(&memfd, SealFlags::SHRINK).unwrap();
        assert_eq!(ReadTable::open(memfd.as_fd()).unwrap().get(9), Some(77));
        memfd.write_all_at(b"x", 0).unwrap();
        assert!(ReadTable::open(memfd.as_fd()).is_err(), "no magic number");
    }

    fn file_of(table: &SharedTable) -> File {
        File::from(table.fd().try_clone_to_owned().unwrap())
    }
}
