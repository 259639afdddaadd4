//! A whole file mapped read-only, as addresses for the kernel.
//!
//! Why: one page cache for all readers, no copy between the file and a socket, and reads without a
//! system call.
//! How: MAP_SHARED, PROT_READ, MADV_RANDOM (a fault reads one page, not a window around it).
//! Never: follows an address of the map but in the guarded copy; see [`KernelSlice`].
//! Start at [`FileMap::new`].

use std::ffi::c_void;
use std::fs::File;
use std::io;
use std::marker::PhantomData;
use std::ptr::{self, NonNull};

use rustix::mm::{Advice, MapFlags, ProtFlags};

use super::arena::CHUNK_BYTES;
use super::guard::{self, Copied};
use super::guest::GuestSlice;
use crate::units::FileOffset;

/// A whole file, mapped shared and read-only. Unmapped on drop.
#[derive(Debug)]
pub struct FileMap {
    base: NonNull<c_void>,
    len_bytes: usize,
}

// SAFETY: the map is only an address range; it is never read or written through `base` in user
// space, and mmap, madvise and munmap may be called from any thread.
unsafe impl Send for FileMap {}
// SAFETY: as above; all methods that take `&self` are system calls or address arithmetic.
unsafe impl Sync for FileMap {}

/// Bytes of a mapped file, as an address that only the kernel may follow.
///
/// The file may be cut short, or its disk may fail: a load from this address would then be a
/// SIGBUS, while a system call returns EFAULT. So there is no way to a `&[u8]` from here.
#[derive(Clone, Copy, Debug)]
pub struct KernelSlice<'a> {
    base: *const u8,
    len_bytes: usize,
    map: PhantomData<&'a FileMap>,
}

// SAFETY: the address is never dereferenced in user space, and the borrow keeps the range mapped.
unsafe impl Send for KernelSlice<'_> {}
// SAFETY: as above.
unsafe impl Sync for KernelSlice<'_> {}

impl<'a> KernelSlice<'a> {
    /// Address of the first byte, for a system call or a ring entry; never for a load.
    #[must_use]
    pub fn as_ptr(&self) -> *const u8 {
        self.base
    }

    /// Length in bytes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len_bytes
    }

    /// True for a slice of no bytes.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len_bytes == 0
    }

    /// The part after the first `count` bytes: what a short send has left over.
    /// Empty if `count` is the length or more.
    #[must_use]
    pub fn skip(self, count: usize) -> KernelSlice<'a> {
        let count = count.min(self.len_bytes);
        Self {
            base: self.base.wrapping_add(count),
            len_bytes: self.len_bytes - count,
            map: PhantomData,
        }
    }

    /// Copies its first bytes into `buf`, as [`FileMap::copy_to`] does; `buf` must not be longer.
    pub fn copy_to(&self, buf: &mut [u8]) -> Copied {
        if buf.len() > self.len_bytes {
            return Copied::Not;
        }
        // SAFETY: the first `len_bytes` bytes from `base` on are in a map that the borrow `'a` keeps
        // mapped, and `buf`, which is no longer than that, is borrowed mutably: they do not overlap.
        unsafe { guard::copy(self.base, buf.as_mut_ptr(), buf.len()) }
    }

    /// As the kernel takes it in sendmsg, writev and IORING_OP_SENDMSG; for reading from only.
    #[must_use]
    pub fn iovec(&self) -> libc::iovec {
        libc::iovec { iov_base: self.base.cast_mut().cast(), iov_len: self.len_bytes }
    }
}

impl FileMap {
    /// Maps the first `len_bytes` of `file`; `len_bytes` is the file's length when it was opened.
    ///
    /// # Errors
    /// EINVAL for no bytes, ENOMEM without address space, ENODEV on a file system without mmap.
    pub fn new(file: &File, len_bytes: u64) -> io::Result<Self> {
        let len_bytes = usize::try_from(len_bytes).map_err(|_| io::ErrorKind::OutOfMemory)?;
        // SAFETY: a fresh mapping at an address of the kernel's choice replaces nothing, and
        // its bytes are never seen as Rust memory, so that later changes of the file are harmless.
        let base = unsafe {
            rustix::mm::mmap(ptr::null_mut(), len_bytes, ProtFlags::READ, MapFlags::SHARED, file, 0)
        }?;
        let base = NonNull::new(base).ok_or(io::ErrorKind::AddrNotAvailable)?;
        let map = Self { base, len_bytes };
        map.advise(FileOffset(0), len_bytes, Advice::Random)?;
        Ok(map)
    }

    /// Maps all of a [`Slab`](crate::Slab)'s arena of `len_bytes` so that its huge pages are huge
    /// here, too.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn of_arena(file: &File, len_bytes: u64) -> io::Result<Self> {
        let len_bytes = usize::try_from(len_bytes).map_err(|_| io::ErrorKind::OutOfMemory)?;
        let room = len_bytes.checked_add(CHUNK_BYTES).ok_or(io::ErrorKind::OutOfMemory)?;
        // SAFETY: a fresh mapping at an address of the kernel's choice replaces nothing; it only
        // finds a range of addresses with room for the alignment.
        let start = unsafe {
            let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
            rustix::mm::mmap_anonymous(ptr::null_mut(), room, ProtFlags::empty(), flags)
        }?;
        let start = start.cast::<u8>();
        let before = start.align_offset(CHUNK_BYTES);
        let base = start.wrapping_add(before);
        let (prot, flags) = (ProtFlags::READ, MapFlags::SHARED | MapFlags::FIXED);
        // SAFETY: replaces a part of the range just found, which nobody else knows of; its bytes are
        // never seen as Rust memory.
        let mapped = unsafe { rustix::mm::mmap(base.cast(), len_bytes, prot, flags, file, 0) };
        let used = if mapped.is_ok() { len_bytes } else { 0 };
        for (from, len) in [(start, before), (base.wrapping_add(used), room - before - used)] {
            if len > 0 {
                // SAFETY: both ranges are parts of what was found that nothing is mapped in.
                unsafe { rustix::mm::munmap(from.cast(), len) }?;
            }
        }
        let base = NonNull::new(mapped?).ok_or(io::ErrorKind::AddrNotAvailable)?;
        Ok(Self { base, len_bytes })
    }

    /// Length of the map in bytes.
    #[must_use]
    pub fn len_bytes(&self) -> u64 {
        self.len_bytes as u64
    }

    /// The bytes `[at, at + len)` as an address for the kernel; `None` if not all in the map.
    #[must_use]
    pub fn slice(&self, at: FileOffset, len: usize) -> Option<KernelSlice<'_>> {
        let start = self.checked_start(at, len)?;
        let base = self.base.as_ptr().cast::<u8>().cast_const().wrapping_add(start);
        Some(KernelSlice { base, len_bytes: len, map: PhantomData })
    }

    /// Brings the pages of `[at, at + len)` into the page cache and into this map, and waits.
    ///
    /// # Errors
    /// EFAULT or EIO if a page cannot be read (never a signal); EINVAL if the range is not all in
    /// the map, or before Linux 5.14.
    pub fn populate(&self, at: FileOffset, len: usize) -> io::Result<()> {
        self.advise(at, len, Advice::LinuxPopulateRead)
    }

    /// Asks the kernel to start reading `[at, at + len)`, and does not wait. Only a hint: a range
    /// that is not all in the map is ignored, and so are errors.
    pub fn will_need(&self, at: FileOffset, len: usize) {
        let _hint_only = self.advise(at, len, Advice::WillNeed);
    }

    /// Copies the bytes from `at` on into `buf`, with no system call. What is not in memory is read
    /// from the disk, page by page: meant for ranges that [`super::Resident`] holds.
    pub fn copy_to(&self, buf: &mut [u8], at: FileOffset) -> Copied {
        let Some(start) = self.checked_start(at, buf.len()) else { return Copied::Not };
        let from = self.base.as_ptr().cast::<u8>().cast_const().wrapping_add(start);
        // SAFETY: the range is in our own map, which `&self` keeps mapped; `buf` is ours to write.
        unsafe { guard::copy(from, buf.as_mut_ptr(), buf.len()) }
    }

    /// As [`copy_to`](Self::copy_to), into the memory of a guest.
    pub fn copy_to_guest(&self, to: GuestSlice<'_>, at: FileOffset) -> Copied {
        let Some(start) = self.checked_start(at, to.len()) else { return Copied::Not };
        let from = self.base.as_ptr().cast::<u8>().cast_const().wrapping_add(start);
        // SAFETY: the range is in our own map, which `&self` keeps mapped; the slice's memory is
        // mapped as long as it lives, writable, and never seen as Rust memory.
        unsafe { guard::copy(from, to.as_ptr(), to.len()) }
    }

    fn checked_start(&self, at: FileOffset, len: usize) -> Option<usize> {
        let start = usize::try_from(at.0).ok()?;
        (start.checked_add(len)? <= self.len_bytes).then_some(start)
    }

    fn advise(&self, at: FileOffset, len: usize, advice: Advice) -> io::Result<()> {
        let start = self.checked_start(at, len).ok_or(io::ErrorKind::InvalidInput)?;
        let in_page = start % rustix::param::page_size();
        let page = self.base.as_ptr().cast::<u8>().wrapping_add(start - in_page);
        // SAFETY: page and length lie in the map (`base` is page-aligned), and the kinds of advice
        // given here (random, will-need, populate-read) change no content and unmap nothing.
        unsafe { rustix::mm::madvise(page.cast(), len + in_page, advice) }?;
        Ok(())
    }
}

impl Drop for FileMap {
    fn drop(&mut self) {
        // SAFETY: `base` and `len_bytes` are those of our own mmap, and every `KernelSlice`
        // borrows `self`, so that no address into the range outlives it.
        let unmapped = unsafe { rustix::mm::munmap(self.base.as_ptr(), self.len_bytes) };
        debug_assert!(unmapped.is_ok(), "munmap of our own map cannot fail");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn file_of(bytes: &[u8]) -> File {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(bytes).unwrap();
        file
    }

    #[test]
    fn a_slice_outside_the_map_is_none() {
        let map = FileMap::new(&file_of(&[7; 5000]), 5000).unwrap();
        assert_eq!(map.slice(FileOffset(0), 5000).unwrap().len(), 5000);
        assert_eq!(map.slice(FileOffset(4999), 1).unwrap().len(), 1);
        assert!(map.slice(FileOffset(5000), 0).unwrap().is_empty());
        assert!(map.slice(FileOffset(4999), 2).is_none());
        assert!(map.slice(FileOffset(u64::MAX), 1).is_none());
        assert!(map.slice(FileOffset(1), usize::MAX).is_none());
    }

    #[test]
    fn a_file_of_no_bytes_cannot_be_mapped() {
        assert!(FileMap::new(&file_of(&[]), 0).is_err());
    }

    #[test]
    fn populate_of_a_file_cut_short_is_an_error_and_no_signal() {
        let file = file_of(&vec![7; 1 << 20]);
        let map = FileMap::new(&file, 1 << 20).unwrap();
        map.populate(FileOffset(12_345), 70_000).unwrap();
        file.set_len(4096).unwrap();
        map.populate(FileOffset(0), 4096).unwrap();
        let error = map.populate(FileOffset(500_000), 4096).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EFAULT));
        map.will_need(FileOffset(500_000), 4096);
        assert!(map.populate(FileOffset(1 << 20), 1).is_err());
    }

    #[test]
    fn skip_leaves_what_a_short_send_has_not_sent() {
        let map = FileMap::new(&file_of(&[7; 100]), 100).unwrap();
        let slice = map.slice(FileOffset(10), 50).unwrap();
        let rest = slice.skip(20);
        assert_eq!((rest.len(), rest.as_ptr() as usize), (30, slice.as_ptr() as usize + 20));
        assert!(slice.skip(51).is_empty());
    }

    #[test]
    fn a_slice_is_copied_within_its_bounds_and_a_page_that_is_gone_is_no_signal() {
        let file = file_of(&[7; 8192]);
        let map = FileMap::new(&file, 8192).unwrap();
        let slice = map.slice(FileOffset(4000), 200).unwrap();
        assert_eq!(slice.copy_to(&mut [0; 201]), Copied::Not);
        let mut buf = [0; 200];
        if cfg!(target_arch = "x86_64") {
            assert_ne!(slice.copy_to(&mut buf), Copied::Not);
            assert_eq!(buf, [7; 200]);
        }
        file.set_len(4096).unwrap();
        assert_eq!(slice.copy_to(&mut buf), Copied::Not);
    }

    #[test]
    fn a_copy_is_of_any_length_and_place() {
        let bytes: Vec<u8> = (0..20_000_u32).map(|n| (n % 251).to_le_bytes()[0]).collect();
        let map = FileMap::new(&file_of(&bytes), 20_000).unwrap();
        for (at, len) in [(0, 0), (0, 1), (1, 63), (7, 64), (4095, 65), (5, 4096), (0, 20_000)] {
            let mut buf = vec![0xee; len + 2];
            let copied = map.copy_to(&mut buf[1..=len], FileOffset(at as u64));
            if cfg!(target_arch = "x86_64") {
                assert_ne!(copied, Copied::Not);
                assert_eq!(buf[1..=len], bytes[at..at + len]);
            }
            assert_eq!((buf[0], buf[len + 1]), (0xee, 0xee), "nothing beside it");
        }
        assert_eq!(map.copy_to(&mut [0; 2], FileOffset(19_999)), Copied::Not);
    }

    #[test]
    fn a_copy_from_a_file_cut_short_is_an_error_and_no_signal_on_any_thread() {
        let file = file_of(&vec![7; 1 << 20]);
        let map = FileMap::new(&file, 1 << 20).unwrap();
        file.set_len(8192).unwrap();
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for n in 0..1000 {
                        let mut buf = [0; 5000];
                        assert_eq!(map.copy_to(&mut buf, FileOffset(4000 + n)), Copied::Not);
                        assert_eq!(map.copy_to(&mut buf, FileOffset(500_000)), Copied::Not);
                    }
                });
            }
        });
        let mut buf = [0; 8192];
        if cfg!(target_arch = "x86_64") {
            assert_ne!(map.copy_to(&mut buf, FileOffset(0)), Copied::Not);
            assert_eq!(buf, [7; 8192]);
        }
    }

    /// A fault of other code must end the process as ever.
    #[test]
    fn a_fault_elsewhere_is_still_a_signal() {
        use std::os::unix::process::ExitStatusExt;
        const NAME: &str = "file::tests::a_fault_elsewhere_is_still_a_signal";
        if std::env::var_os("BEDPLATE_TEST_FAULT").is_some() {
            let file = file_of(&[7; 8192]);
            let map = FileMap::new(&file, 8192).unwrap();
            file.set_len(0).unwrap();
            assert_eq!(map.copy_to(&mut [0; 10], FileOffset(0)), Copied::Not);
            let bad = map.slice(FileOffset(4096), 1).unwrap().as_ptr();
            // SAFETY: none: the page is gone, which is what this process is to die of.
            unsafe { bad.read_volatile() };
            std::process::exit(0);
        }
        let this = std::env::current_exe().unwrap();
        let child = std::process::Command::new(this)
            .args(["--exact", NAME, "--nocapture"])
            .env("BEDPLATE_TEST_FAULT", "1")
            .output()
            .unwrap();
        assert_eq!(child.status.signal(), Some(libc::SIGBUS), "{:?}", child.status);
    }
}
