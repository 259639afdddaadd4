//! The memory of a guest, that a VMM shares with us, as addresses that may fail at any time.
//!
//! Why: a virtual disk's bytes go straight into the guest's memory; but the VMM owns the files
//! behind it and can cut them short, or have no memory left for a page: a plain load or store would
//! then be a SIGBUS, and the end of every reader of the node.
//! How: regions are mapped shared from files of tmpfs or hugetlbfs only (a page of another file
//! system may wait for a program for ever). All access goes through the guarded routines of
//! `guard`, or, where there are none, through the kernel (`process_vm_readv`); both say
//! [`Unreachable`] where a plain access would be a signal.
//! Never: hands out a reference into a guest's memory, which the guest changes as it likes.
//! Start at [`GuestMemory::new`].

use std::ffi::c_void;
use std::fs::File;
use std::io;
use std::marker::PhantomData;
use std::os::fd::AsRawFd;
use std::ptr::{self, NonNull};
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use rustix::fs::{FileType, FsWord, OFlags};
use rustix::mm::{MapFlags, ProtFlags};

use super::guard::{self, Copied};
use super::guest_error::GuestMemoryError;
use crate::units::FileOffset;

/// All of them together: 64 TiB, half of what a process can address.
const MAX_BYTES: u64 = 1 << 46;
/// `statfs` type of tmpfs, which memfds are in.
const TMPFS: FsWord = 0x0102_1994;
/// `statfs` type of hugetlbfs.
const HUGETLBFS: FsWord = 0x9584_58f6;
/// Slices that one call to the kernel takes (`IOV_MAX`).
const MAX_SLICES: usize = 1024;

static ZEROES: [u8; 4096] = [0; 4096];

/// What a VMM says of one region.
#[derive(Debug)]
pub struct GuestRegion {
    /// Where the guest sees it.
    pub guest_at: u64,
    /// Where the VMM has it mapped in itself.
    pub user_at: u64,
    /// Its length in bytes.
    pub len_bytes: u64,
    /// The file behind it.
    pub file: File,
    /// Where in that file it begins.
    pub file_at: u64,
}

/// A page of the guest's memory is not there, or not to be had.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Unreachable;

/// A guest's memory. A region is unmapped with the last memory that has it.
#[derive(Debug)]
pub struct GuestMemory {
    regions: Vec<Arc<Region>>,
}

#[derive(Debug)]
struct Region {
    guest_at: u64,
    user_at: u64,
    len_bytes: u64,
    base: NonNull<c_void>,
    len: usize,
}

// SAFETY: a region is only an address range, followed by the guarded routines and the kernel, which
// may be used from any thread; what its bytes are is nobody's assumption.
unsafe impl Send for Region {}
// SAFETY: as above: nothing is changed through `&self` but the guest's bytes, which change anyway.
unsafe impl Sync for Region {}

impl Drop for Region {
    fn drop(&mut self) {
        // SAFETY: `base` and `len` are those of our own mmap; slices borrow the memory, so that no
        // address into it outlives this.
        let unmapped = unsafe { rustix::mm::munmap(self.base.as_ptr(), self.len) };
        debug_assert!(unmapped.is_ok(), "munmap of our own map cannot fail");
    }
}

impl GuestMemory {
    /// Regions that it may be made of.
    pub const MAX_REGIONS: usize = 64;

    /// Maps the regions.
    ///
    /// # Errors
    /// [`GuestMemoryError`]: too many regions, or one that is empty, overlaps another, is larger
    /// than its file, or is in a file that is no shared memory.
    pub fn new(mut regions: Vec<GuestRegion>) -> Result<Self, GuestMemoryError> {
        if regions.is_empty() || regions.len() > Self::MAX_REGIONS {
            return Err(GuestMemoryError::Count { regions: regions.len() });
        }
        regions.sort_by_key(|region| region.user_at);
        check_apart(&regions, |region| region.user_at)?;
        regions.sort_by_key(|region| region.guest_at);
        check_apart(&regions, |region| region.guest_at)?;
        let total = regions.iter().try_fold(0_u64, |sum, region| {
            sum.checked_add(region.len_bytes).filter(|sum| *sum <= MAX_BYTES)
        });
        if let (None, Some(region)) = (total, regions.first()) {
            return Err(refuse(region, "the regions together are more than 64 TiB"));
        }
        let map = |region: &GuestRegion| Region::map(region).map(Arc::new);
        let regions = regions.iter().map(map).collect::<Result<_, _>>()?;
        Ok(Self { regions })
    }

    /// This memory and one region more.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn with(&self, region: &GuestRegion) -> Result<Self, GuestMemoryError> {
        if self.regions.len() >= Self::MAX_REGIONS {
            return Err(GuestMemoryError::Count { regions: self.regions.len() + 1 });
        }
        check_apart(std::slice::from_ref(region), |region| region.user_at)?;
        check_apart(std::slice::from_ref(region), |region| region.guest_at)?;
        let len = region.len_bytes;
        let meet = |a, a_len, b, b_len| a < b + b_len && b < a + a_len;
        let overlaps = |other: &Arc<Region>| {
            meet(region.guest_at, len, other.guest_at, other.len_bytes)
                || meet(region.user_at, len, other.user_at, other.len_bytes)
        };
        if self.regions.iter().any(overlaps) {
            return Err(refuse(region, "it overlaps another region"));
        }
        let others: u64 = self.regions.iter().map(|region| region.len_bytes).sum();
        if others.checked_add(len).is_none_or(|sum| sum > MAX_BYTES) {
            return Err(refuse(region, "the regions together are more than 64 TiB"));
        }
        let mut regions = self.regions.clone();
        regions.push(Arc::new(Region::map(region)?));
        Ok(Self { regions })
    }

    /// This memory without the region of these addresses and length, which may leave none; `None` if
    /// there is no such region.
    #[must_use]
    pub fn without(&self, guest_at: u64, user_at: u64, len_bytes: u64) -> Option<Self> {
        let is_it = |region: &Arc<Region>| {
            (region.guest_at, region.user_at, region.len_bytes) == (guest_at, user_at, len_bytes)
        };
        let mut regions = self.regions.clone();
        regions.remove(regions.iter().position(is_it)?);
        Some(Self { regions })
    }

    /// Memory at an address of the guest: as much of `[at, at + len)` as is in one region, at least
    /// a byte; `None` for no memory, or a length of 0.
    #[must_use]
    pub fn at_guest(&self, at: u64, len: u64) -> Option<GuestSlice<'_>> {
        self.regions.iter().find_map(|region| region.slice(at.wrapping_sub(region.guest_at), len))
    }

    /// Memory at an address of the VMM: all of `[at, at + len)`, which must be in one region.
    #[must_use]
    pub fn at_user(&self, at: u64, len: u64) -> Option<GuestSlice<'_>> {
        let found = self.regions.iter();
        let mut found = found.filter_map(|r| r.slice(at.wrapping_sub(r.user_at), len));
        found.next().filter(|slice| slice.len() as u64 == len)
    }

    /// Fills `buf` from the guest's address `at` on, across regions.
    ///
    /// # Errors
    /// [`Unreachable`] if not all of it is memory.
    pub fn read(&self, buf: &mut [u8], mut at: u64) -> Result<(), Unreachable> {
        let mut rest = buf;
        while !rest.is_empty() {
            let slice = self.at_guest(at, rest.len() as u64).ok_or(Unreachable)?;
            let (part, after) = rest.split_at_mut(slice.len());
            slice.read_into(part)?;
            at = at.checked_add(part.len() as u64).ok_or(Unreachable)?;
            rest = after;
        }
        Ok(())
    }
}

fn refuse(region: &GuestRegion, rule: &'static str) -> GuestMemoryError {
    let GuestRegion { guest_at, len_bytes, .. } = *region;
    GuestMemoryError::Region { guest_at, len_bytes, rule }
}

/// `regions` are sorted by `start`.
fn check_apart(
    regions: &[GuestRegion],
    start: impl Fn(&GuestRegion) -> u64,
) -> Result<(), GuestMemoryError> {
    let mut end = 0;
    for region in regions {
        if region.len_bytes == 0 {
            return Err(refuse(region, "a region has at least one byte"));
        }
        if start(region) < end {
            return Err(refuse(region, "it overlaps another region"));
        }
        end = start(region)
            .checked_add(region.len_bytes)
            .ok_or_else(|| refuse(region, "it ends after the last address"))?;
    }
    Ok(())
}

impl Region {
    fn map(region: &GuestRegion) -> Result<Self, GuestMemoryError> {
        let GuestRegion { guest_at, user_at, len_bytes, ref file, file_at } = *region;
        let failed = |source| GuestMemoryError::Map { guest_at, len_bytes, source };
        let stat = rustix::fs::fstat(file).map_err(|errno| failed(errno.into()))?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
            return Err(refuse(region, "what is behind it is no file"));
        }
        let system = rustix::fs::fstatfs(file).map_err(|errno| failed(errno.into()))?;
        if ![TMPFS, HUGETLBFS].contains(&system.f_type) {
            let rule = "its file is no shared memory; use a memfd (memory-backend-memfd,share=on)";
            return Err(refuse(region, rule));
        }
        let flags = rustix::fs::fcntl_getfl(file).map_err(|errno| failed(errno.into()))?;
        if flags & OFlags::RWMODE != OFlags::RDWR {
            return Err(refuse(region, "its file is not open for reading and writing"));
        }
        let end = file_at.checked_add(len_bytes);
        let has = u64::try_from(stat.st_size).unwrap_or(0);
        if end.is_none_or(|end| end > has) {
            return Err(refuse(region, "its file ends before it does"));
        }
        // Of a huge page the kernel unmaps all or nothing, so a region has whole ones. The last of
        // other pages may be a part of the file's: what is behind its end is in no slice.
        let page = u64::try_from(stat.st_blksize).unwrap_or(4096).max(4096);
        let (page, end) = if system.f_type == HUGETLBFS { (page, len_bytes) } else { (4096, 0) };
        if end % page != 0 || file_at % page != 0 {
            return Err(refuse(region, "it does not begin and end at pages of its file"));
        }
        let too_large = || failed(io::ErrorKind::OutOfMemory.into());
        let len = usize::try_from(len_bytes).map_err(|_| too_large())?;
        let prot = ProtFlags::READ | ProtFlags::WRITE;
        let map = MapFlags::SHARED | MapFlags::NORESERVE;
        // SAFETY: a fresh mapping at an address of the kernel's choice replaces nothing, and its
        // bytes are never seen as Rust memory: whatever the guest does to them is harmless.
        let base = unsafe { rustix::mm::mmap(ptr::null_mut(), len, prot, map, file, file_at) };
        let base = base.map_err(|errno| failed(errno.into()))?;
        let base = NonNull::new(base).ok_or_else(too_large)?;
        Ok(Self { guest_at, user_at, len_bytes, base, len })
    }

    /// What there is of `len` bytes `skip` bytes after the region's beginning.
    fn slice(&self, skip: u64, len: u64) -> Option<GuestSlice<'_>> {
        if skip >= self.len_bytes || len == 0 {
            return None;
        }
        let len = usize::try_from(len.min(self.len_bytes - skip)).ok()?;
        let base = self.base.as_ptr().cast::<u8>().wrapping_add(usize::try_from(skip).ok()?);
        Some(GuestSlice { base, len, memory: PhantomData })
    }
}

/// A range of a guest's memory, as an address that only the guarded routines and the kernel follow.
#[derive(Clone, Copy, Debug)]
pub struct GuestSlice<'a> {
    base: *mut u8,
    len: usize,
    memory: PhantomData<&'a GuestMemory>,
}

// SAFETY: as for a region; the borrow keeps the range mapped.
unsafe impl Send for GuestSlice<'_> {}
// SAFETY: a shared slice gives no more than a copy of it does, which `Send` allows already.
unsafe impl Sync for GuestSlice<'_> {}

impl<'a> GuestSlice<'a> {
    /// Length in bytes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// True for a slice of no bytes.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// For the guarded routines and the kernel.
    pub(super) fn as_ptr(&self) -> *mut u8 {
        self.base
    }

    /// The first `len` bytes, or all if there are less, and the rest.
    #[must_use]
    pub fn split_at(self, len: usize) -> (Self, Self) {
        let len = len.min(self.len);
        let rest = Self { base: self.base.wrapping_add(len), len: self.len - len, ..self };
        (Self { len, ..self }, rest)
    }

    /// The `len` bytes after the first `at`; `None` if they are not all in the slice.
    #[must_use]
    pub fn part(self, at: usize, len: usize) -> Option<Self> {
        let is_inside = at.checked_add(len).is_some_and(|end| end <= self.len);
        is_inside.then(|| Self { base: self.base.wrapping_add(at), len, ..self })
    }

    /// Fills as much of `buf` as the slice has, from its beginning.
    ///
    /// # Errors
    /// [`Unreachable`]; `buf` then holds anything.
    pub fn read_into(&self, buf: &mut [u8]) -> Result<(), Unreachable> {
        let len = buf.len().min(self.len);
        // SAFETY: the slice's memory is mapped as long as it lives; `buf` is ours, and long enough.
        unsafe { copy(self.base, buf.as_mut_ptr(), len, Direction::In) }
    }

    /// Writes as much of `bytes` as there is room for, at the slice's beginning.
    ///
    /// # Errors
    /// [`Unreachable`]; a part may have been written.
    pub fn write_from(&self, bytes: &[u8]) -> Result<(), Unreachable> {
        let len = bytes.len().min(self.len);
        // SAFETY: the slice's memory is mapped writable as long as it lives, and never seen as Rust
        // memory; `bytes` is long enough.
        unsafe { copy(bytes.as_ptr(), self.base, len, Direction::Out) }
    }

    /// Writes zeroes over all of it.
    ///
    /// # Errors
    /// As [`write_from`](Self::write_from).
    pub fn fill_with_zeroes(&self) -> Result<(), Unreachable> {
        let mut rest = *self;
        while !rest.is_empty() {
            let (part, after) = rest.split_at(ZEROES.len());
            part.write_from(&ZEROES)?;
            rest = after;
        }
        Ok(())
    }

    /// Two bytes at an even place of a ring, in the processor's order, read before whatever is read
    /// after.
    ///
    /// # Errors
    /// [`Unreachable`], also past the slice's end.
    pub fn load_u16(&self, at: usize) -> Result<u16, Unreachable> {
        let mut bytes = [0; 2];
        self.part(at, 2).ok_or(Unreachable)?.read_into(&mut bytes)?;
        fence(Ordering::Acquire);
        Ok(u16::from_ne_bytes(bytes))
    }

    /// Writes two bytes at an even place of a ring, after whatever was written before.
    ///
    /// # Errors
    /// As [`load_u16`](Self::load_u16).
    pub fn store_u16(&self, at: usize, value: u16) -> Result<(), Unreachable> {
        fence(Ordering::Release);
        self.part(at, 2).ok_or(Unreachable)?.write_from(&value.to_ne_bytes())
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Direction {
    In,
    Out,
}

/// Copies `len` bytes, of which one side is a guest's. Lengths of a word are copied whole.
///
/// # Safety
/// As for [`guard::copy`].
unsafe fn copy(
    from: *const u8,
    to: *mut u8,
    len: usize,
    direction: Direction,
) -> Result<(), Unreachable> {
    // SAFETY: both ranges are mapped, one of them is a guest's and the other ours, which is what the
    // caller vouches for, and both routines ask for no more.
    let done = unsafe {
        match len {
            0 => true,
            1 | 2 | 4 | 8 | 16 => guard::copy_word(from, to, len),
            _ => guard::copy(from, to, len) != Copied::Not,
        }
    };
    if done {
        return Ok(());
    }
    // SAFETY: the same two ranges.
    unsafe { copy_by_kernel(from, to, len, direction) }
}

/// The same, where there is no guarded routine: a bad page is EFAULT.
///
/// # Safety
/// As for [`guard::copy`].
#[cold]
unsafe fn copy_by_kernel(
    from: *const u8,
    to: *mut u8,
    len: usize,
    direction: Direction,
) -> Result<(), Unreachable> {
    let from = libc::iovec { iov_base: from.cast_mut().cast(), iov_len: len };
    let to = libc::iovec { iov_base: to.cast(), iov_len: len };
    let own = rustix::process::getpid().as_raw_nonzero().get();
    // SAFETY: the kernel copies between the two ranges, which are of our own process and which the
    // caller vouches for; of what cannot be had it copies nothing.
    let done = unsafe {
        match direction {
            Direction::In => libc::process_vm_readv(own, &raw const to, 1, &raw const from, 1, 0),
            Direction::Out => libc::process_vm_writev(own, &raw const from, 1, &raw const to, 1, 0),
        }
    };
    if usize::try_from(done).is_ok_and(|done| done == len) { Ok(()) } else { Err(Unreachable) }
}

/// Fills `to` in order with the bytes of `file` from `at` on.
pub(super) fn read_file(file: &File, to: &[GuestSlice<'_>], mut at: FileOffset) -> io::Result<()> {
    let iovec = |s: &GuestSlice<'_>| libc::iovec { iov_base: s.base.cast(), iov_len: s.len };
    let mut left: Vec<libc::iovec> = to.iter().map(iovec).collect();
    let mut rest = left.as_mut_slice();
    while let Some(first) = rest.first_mut() {
        if first.iov_len == 0 {
            rest = rest.get_mut(1..).unwrap_or_default();
            continue;
        }
        let count = libc::c_int::try_from(rest.len().min(MAX_SLICES)).unwrap_or(1);
        let place = libc::off_t::try_from(at.0).map_err(|_| io::ErrorKind::InvalidInput)?;
        // SAFETY: the vectors are parts of the slices, whose memory is mapped writable as long as
        // they live and never seen as Rust memory; what the kernel cannot write is EFAULT.
        let read = unsafe { libc::preadv(file.as_raw_fd(), rest.as_ptr(), count, place) };
        let Ok(mut read) = usize::try_from(read) else {
            match io::Error::last_os_error() {
                error if error.kind() == io::ErrorKind::Interrupted => continue,
                error => return Err(error),
            }
        };
        if read == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        at = at.advance(read as u64);
        while let Some(first) = rest.first_mut().filter(|_| read > 0) {
            let part = read.min(first.iov_len);
            first.iov_base = first.iov_base.wrapping_byte_add(part);
            first.iov_len -= part;
            read -= part;
            if first.iov_len == 0 {
                rest = rest.get_mut(1..).unwrap_or_default();
            }
        }
    }
    Ok(())
}

#[cfg(test)]
#[path = "guest_tests.rs"]
mod tests;
