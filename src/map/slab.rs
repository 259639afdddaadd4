//! Memory for decoded clusters: equal slots in huge pages.
//!
//! Why: a cache of clusters in pages of 4 KiB spends more on address translation than on copying,
//! and memory that an allocator gives back and takes anew is zeroed page by page each time.
//! How: chunks of 2 MiB, aligned and advised as huge pages, each cut into slots of one power of
//! two. A slot is one owner's until it is dropped; a chunk whose slots are all free is unmapped, but
//! for one of each size.
//! Never: hands out a slot twice. What an earlier owner left in a slot, the next one may see.
//! Start at [`Slab::take`].

use std::collections::BTreeSet;
use std::fmt;
use std::io;
use std::ptr::{self, NonNull};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::mm::{Advice, MapFlags, ProtFlags};

/// Bytes of a chunk, and the largest slot: a huge page.
pub const CHUNK_BYTES: usize = 2 << 20;
/// Smaller slots gain nothing.
const MIN_SLOT_BYTES: usize = 4096;
const SIZES: usize = (CHUNK_BYTES / MIN_SLOT_BYTES).ilog2() as usize + 1;

/// Slots of all sizes. Cheap to clone.
#[derive(Clone, Default)]
pub struct Slab {
    sizes: Arc<[Mutex<Chunks>; SIZES]>,
}

/// The chunks of one size of slots.
#[derive(Default)]
struct Chunks {
    /// `None` where one was unmapped.
    chunks: Vec<Option<Chunk>>,
    /// Chunks with free slots; the lowest is used first, so that others become empty.
    open: BTreeSet<usize>,
}

struct Chunk {
    mapping: Mapping,
    free: Vec<usize>,
}

/// A huge page's worth of memory of our own.
struct Mapping {
    base: NonNull<u8>,
}

// SAFETY: the memory is private to this process and belongs to no thread.
unsafe impl Send for Mapping {}

/// A slot, and bytes in it: the first `len` of them.
pub struct SlabBuf {
    bytes: NonNull<u8>,
    len: usize,
    chunk: usize,
    slot: usize,
    size: usize,
    slab: Slab,
}

// SAFETY: a slot has one owner, and its memory belongs to no thread.
unsafe impl Send for SlabBuf {}
// SAFETY: through `&self` the bytes are only read.
unsafe impl Sync for SlabBuf {}

impl fmt::Debug for Slab {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Slab").field("held_bytes", &self.held_bytes()).finish()
    }
}

impl fmt::Debug for SlabBuf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SlabBuf").field("len", &self.len).finish_non_exhaustive()
    }
}

impl Slab {
    /// A slot for `len` bytes, which hold anything.
    ///
    /// # Errors
    /// `InvalidInput` for more than [`CHUNK_BYTES`]; the system is out of memory.
    pub fn take(&self, len: usize) -> io::Result<SlabBuf> {
        let slot_bytes = len.next_power_of_two().max(MIN_SLOT_BYTES);
        let size = (slot_bytes / MIN_SLOT_BYTES).ilog2() as usize;
        let chunks = self.sizes.get(size).ok_or(io::ErrorKind::InvalidInput)?;
        let (chunk, slot, base) = lock(chunks).take(slot_bytes)?;
        // SAFETY: slot `slot` ends inside its chunk, which stays mapped while the slot is taken.
        let bytes = unsafe { base.add(slot * slot_bytes) };
        Ok(SlabBuf { bytes, len, chunk, slot, size, slab: self.clone() })
    }

    /// Bytes of all chunks that are mapped now.
    #[must_use]
    pub fn held_bytes(&self) -> u64 {
        let mapped = |chunks: &Mutex<Chunks>| lock(chunks).chunks.iter().flatten().count();
        self.sizes.iter().map(mapped).sum::<usize>() as u64 * CHUNK_BYTES as u64
    }
}

impl Chunks {
    fn take(&mut self, slot_bytes: usize) -> io::Result<(usize, usize, NonNull<u8>)> {
        let index = match self.open.first() {
            Some(&index) => index,
            None => self.grow(slot_bytes)?,
        };
        let chunk = self.chunks.get_mut(index).and_then(Option::as_mut);
        let chunk = chunk.expect("an open chunk is mapped");
        let slot = chunk.free.pop().expect("an open chunk has a free slot");
        if chunk.free.is_empty() {
            self.open.remove(&index);
        }
        Ok((index, slot, chunk.mapping.base))
    }

    fn grow(&mut self, slot_bytes: usize) -> io::Result<usize> {
        let free = (0..CHUNK_BYTES / slot_bytes).rev().collect();
        let chunk = Chunk { mapping: Mapping::new()?, free };
        let gap = self.chunks.iter().position(Option::is_none);
        let index = gap.unwrap_or(self.chunks.len());
        match gap {
            Some(gap) => self.chunks[gap] = Some(chunk),
            None => self.chunks.push(Some(chunk)),
        }
        self.open.insert(index);
        Ok(index)
    }

    fn give_back(&mut self, index: usize, slot: usize, slot_bytes: usize) {
        let Some(place) = self.chunks.get_mut(index) else { return };
        let Some(chunk) = place else { return };
        chunk.free.push(slot);
        self.open.insert(index);
        if chunk.free.len() == CHUNK_BYTES / slot_bytes && self.open.len() > 1 {
            self.open.remove(&index);
            *place = None;
        }
    }
}

impl Mapping {
    fn new() -> io::Result<Self> {
        let prot = ProtFlags::READ | ProtFlags::WRITE;
        // Twice the size, so that an aligned half is inside.
        let len = 2 * CHUNK_BYTES;
        // SAFETY: a fresh private mapping at an address of the kernel's choice replaces nothing.
        let start =
            unsafe { rustix::mm::mmap_anonymous(ptr::null_mut(), len, prot, MapFlags::PRIVATE) }?;
        let before = start.cast::<u8>().align_offset(CHUNK_BYTES);
        let base = start.cast::<u8>().wrapping_add(before);
        let after = base.wrapping_add(CHUNK_BYTES);
        for (from, len) in [(start.cast(), before), (after, CHUNK_BYTES - before)] {
            if len > 0 {
                // SAFETY: both ranges are parts of the mapping just made that nobody knows of; the
                // aligned chunk between them stays.
                unsafe { rustix::mm::munmap(from.cast(), len) }?;
            }
        }
        for advice in [Advice::LinuxHugepage, Advice::LinuxPopulateWrite] {
            // Populated now: two threads that touch one huge page first would both make one.
            // SAFETY: advice on our own range that changes no content.
            let _hint_only = unsafe { rustix::mm::madvise(base.cast(), CHUNK_BYTES, advice) };
        }
        NonNull::new(base).map(|base| Self { base }).ok_or(io::ErrorKind::OutOfMemory.into())
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the range is that of our own chunk, and a chunk is dropped when no slot of it is
        // taken.
        let unmapped = unsafe { rustix::mm::munmap(self.base.as_ptr().cast(), CHUNK_BYTES) };
        debug_assert!(unmapped.is_ok(), "munmap of our own chunk cannot fail");
    }
}

impl SlabBuf {
    /// The bytes, to be filled.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: the slot is this owner's alone, has room for `len` bytes, and was zero or written
        // before: every byte is initialised.
        unsafe { std::slice::from_raw_parts_mut(self.bytes.as_ptr(), self.len) }
    }

    /// Only the first `len` bytes count from now on.
    pub fn truncate(&mut self, len: usize) {
        self.len = self.len.min(len);
    }
}

impl AsRef<[u8]> for SlabBuf {
    fn as_ref(&self) -> &[u8] {
        // SAFETY: as for `bytes_mut`, and nobody writes while `&self` is borrowed.
        unsafe { std::slice::from_raw_parts(self.bytes.as_ptr(), self.len) }
    }
}

impl Drop for SlabBuf {
    fn drop(&mut self) {
        if let Some(chunks) = self.slab.sizes.get(self.size) {
            lock(chunks).give_back(self.chunk, self.slot, MIN_SLOT_BYTES << self.size);
        }
    }
}

/// A panic of another owner leaves the lists whole: each change is one push or pop.
fn lock(chunks: &Mutex<Chunks>) -> MutexGuard<'_, Chunks> {
    chunks.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_do_not_overlap_and_come_back() {
        let slab = Slab::default();
        let mut bufs: Vec<SlabBuf> = (0..70).map(|_| slab.take(65_536).unwrap()).collect();
        for (n, buf) in (0..).zip(&mut bufs) {
            buf.bytes_mut().fill(n);
        }
        for (n, buf) in (0..).zip(&bufs) {
            assert!(buf.as_ref().len() == 65_536 && buf.as_ref().iter().all(|&byte| byte == n));
        }
        assert_eq!(slab.held_bytes(), 3 * CHUNK_BYTES as u64);
        drop(bufs);
        assert_eq!(slab.held_bytes(), CHUNK_BYTES as u64, "one is kept");
    }

    #[test]
    fn every_size_has_its_slots_and_a_buffer_may_be_cut() {
        let slab = Slab::default();
        for len in [1, 512, 4096, 4097, 1 << 20, CHUNK_BYTES] {
            let mut buf = slab.take(len).unwrap();
            buf.bytes_mut().fill(9);
            buf.truncate(len - 1);
            assert_eq!(buf.as_ref().len(), len - 1);
        }
        assert!(slab.take(CHUNK_BYTES + 1).is_err());
    }

    #[test]
    fn a_chunk_in_the_middle_is_given_back_and_its_place_is_used_again() {
        let slab = Slab::default();
        let mut bufs: Vec<_> = (0..5).map(|_| slab.take(CHUNK_BYTES).unwrap()).collect();
        bufs.drain(1..4);
        assert_eq!(slab.held_bytes(), 3 * CHUNK_BYTES as u64);
        bufs.extend((0..3).map(|_| slab.take(CHUNK_BYTES).unwrap()));
        assert_eq!(slab.held_bytes(), 5 * CHUNK_BYTES as u64);
    }

    #[test]
    fn many_threads_take_and_give_back() {
        let slab = Slab::default();
        std::thread::scope(|scope| {
            for n in 0..8_u8 {
                let slab = slab.clone();
                scope.spawn(move || {
                    for round in 0..200 {
                        let mut held: Vec<_> =
                            (0..round % 7).map(|_| slab.take(131_072).unwrap()).collect();
                        held.iter_mut().for_each(|buf| buf.bytes_mut().fill(n));
                        assert!(held.iter().all(|buf| buf.as_ref().iter().all(|&b| b == n)));
                    }
                });
            }
        });
        assert!(slab.held_bytes() <= CHUNK_BYTES as u64);
    }
}
