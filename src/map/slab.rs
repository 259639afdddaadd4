//! Memory for decoded clusters: equal slots in huge pages, which other processes may map.
//!
//! Why: a cache of clusters in pages of 4 KiB spends more on address translation than on copying;
//! memory that an allocator gives back and takes anew is zeroed page by page each time; and what is
//! decoded once serves the readers of all processes.
//! How: an arena in one memfd, which only this process may write, in chunks of a huge page, each cut
//! into slots of one power of two. A slot is one owner's until it is dropped; a chunk whose slots are
//! all free may be cut anew. A slot may be published: its place is in the word of a table then, with
//! a number that never comes again, and the word is cleared before the slot is used again.
//! Never: hands out a slot twice. What an earlier owner left in a slot, the next one may see. The
//! arena keeps what it once had: a memfd that nobody else can write can't be punched either.
//! Start at [`Slab::take`] and [`SlabBuf::publish`].

use std::collections::BTreeSet;
use std::fmt;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicU64, Ordering, fence};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::fs::{FallocateFlags, MemfdFlags, SealFlags};
use rustix::mm::{MapFlags, ProtFlags};

use crate::SharedTable;
use crate::format::{PLACE_BITS, PLACE_BYTES};

/// Bytes of a chunk, and the largest slot: a huge page.
pub const CHUNK_BYTES: usize = 2 << 20;
/// Smaller slots gain nothing.
const MIN_SLOT_BYTES: usize = 4096;
const _: () = assert!(MIN_SLOT_BYTES as u64 == PLACE_BYTES);
const SIZES: usize = (CHUNK_BYTES / MIN_SLOT_BYTES).ilog2() as usize + 1;
/// The largest arena: what a place can name.
const MAX_ARENA_BYTES: u64 = PLACE_BYTES << PLACE_BITS;
/// `MADV_COLLAPSE`: makes a huge page of a range, whatever the system's setting for shared memory.
const MADV_COLLAPSE: libc::c_int = 25;

/// Slots of all sizes in one arena. Cheap to clone.
#[derive(Clone)]
pub struct Slab {
    shared: Arc<Shared>,
}

struct Shared {
    arena: Arena,
    chunks: Mutex<Chunks>,
    /// Numbers publications, so that no word comes twice.
    published: AtomicU64,
}

/// All chunks that were ever used.
#[derive(Default)]
struct Chunks {
    chunks: Vec<Chunk>,
    /// Chunks that are cut and have free slots, by size; the lowest is used first, so that others
    /// become empty.
    open: [BTreeSet<usize>; SIZES],
    /// Chunks of which no slot is taken.
    empty: Vec<usize>,
}

#[derive(Default)]
struct Chunk {
    free: Vec<usize>,
}

/// A memfd and our writable map of it.
struct Arena {
    base: NonNull<u8>,
    /// What was mapped, of which `base` is the first huge page's beginning.
    mapped: (NonNull<u8>, usize),
    len_bytes: usize,
    fd: OwnedFd,
}

// SAFETY: the memory belongs to no thread; who may touch which part of it is for the slots to say.
unsafe impl Send for Arena {}
// SAFETY: through `&self` there is only an address and a descriptor.
unsafe impl Sync for Arena {}

/// A slot, and bytes in it: the first `len` of them.
pub struct SlabBuf {
    bytes: NonNull<u8>,
    len: usize,
    chunk: usize,
    slot: usize,
    size: usize,
    slab: Slab,
    published: Option<Published>,
}

/// The word that tells readers of a slot.
struct Published {
    table: Arc<SharedTable>,
    index: u64,
    word: u64,
}

// SAFETY: a slot has one owner, and its memory belongs to no thread.
unsafe impl Send for SlabBuf {}
// SAFETY: through `&self` the bytes are only read.
unsafe impl Sync for SlabBuf {}

impl fmt::Debug for Slab {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Slab").field("held_bytes", &self.held_bytes()).finish_non_exhaustive()
    }
}

impl fmt::Debug for SlabBuf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SlabBuf").field("len", &self.len).finish_non_exhaustive()
    }
}

impl Slab {
    /// An arena that grows up to `max_bytes`, rounded to chunks; one at least, 64 GiB at most.
    ///
    /// # Errors
    /// The system is out of descriptors or address space, or has no seals (before Linux 5.1).
    pub fn new(max_bytes: u64) -> io::Result<Self> {
        let max_bytes = max_bytes.clamp(1, MAX_ARENA_BYTES);
        let chunks = usize::try_from(max_bytes.div_ceil(CHUNK_BYTES as u64));
        let chunks = chunks.map_err(|_| io::ErrorKind::InvalidInput)?;
        let arena = Arena::new(chunks * CHUNK_BYTES)?;
        let shared = Shared { arena, chunks: Mutex::default(), published: AtomicU64::new(1) };
        Ok(Self { shared: Arc::new(shared) })
    }

    /// A slot for `len` bytes, which hold anything.
    ///
    /// # Errors
    /// `InvalidInput` for more than [`CHUNK_BYTES`]; the arena is full, or the system is.
    pub fn take(&self, len: usize) -> io::Result<SlabBuf> {
        let slot_bytes = len.next_power_of_two().max(MIN_SLOT_BYTES);
        let size = (slot_bytes / MIN_SLOT_BYTES).ilog2() as usize;
        if size >= SIZES {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let (chunk, slot) = self.chunks().take(size, &self.shared.arena)?;
        // SAFETY: slot `slot` ends inside chunk `chunk`, which lies inside the arena.
        let bytes = unsafe { self.shared.arena.base.add(chunk * CHUNK_BYTES + slot * slot_bytes) };
        Ok(SlabBuf { bytes, len, chunk, slot, size, slab: self.clone(), published: None })
    }

    /// Bytes of memory that the arena has taken so far.
    #[must_use]
    pub fn held_bytes(&self) -> u64 {
        self.chunks().chunks.len() as u64 * CHUNK_BYTES as u64
    }

    /// Length of the arena in bytes, most of which may be no memory yet.
    #[must_use]
    pub fn len_bytes(&self) -> u64 {
        self.shared.arena.len_bytes as u64
    }

    /// The arena, to be handed to a reader, who can map and read it and nothing else.
    #[must_use]
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.shared.arena.fd.as_fd()
    }

    /// A panic of another owner leaves the lists whole: each change is one push or pop.
    fn chunks(&self) -> MutexGuard<'_, Chunks> {
        self.shared.chunks.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Chunks {
    fn take(&mut self, size: usize, arena: &Arena) -> io::Result<(usize, usize)> {
        let open = self.open.get(size).and_then(|open| open.first().copied());
        let index = match open {
            Some(index) => index,
            None => self.cut(size, arena)?,
        };
        let free = self.chunks.get_mut(index).map(|chunk| &mut chunk.free);
        let free = free.expect("an open chunk is there");
        let slot = free.pop().expect("an open chunk has a free slot");
        if free.is_empty() {
            self.open[size].remove(&index);
        }
        Ok((index, slot))
    }

    /// Cuts an empty chunk, or a new one, into slots of `size`.
    fn cut(&mut self, size: usize, arena: &Arena) -> io::Result<usize> {
        let index = match self.empty.pop() {
            Some(index) => index,
            None => {
                arena.populate(self.chunks.len())?;
                self.chunks.push(Chunk::default());
                self.chunks.len() - 1
            }
        };
        self.chunks[index].free = (0..slots_of(size)).rev().collect();
        self.open[size].insert(index);
        Ok(index)
    }

    fn give_back(&mut self, index: usize, slot: usize, size: usize) {
        let Some(chunk) = self.chunks.get_mut(index) else { return };
        chunk.free.push(slot);
        if chunk.free.len() == slots_of(size) {
            chunk.free = Vec::new();
            self.open[size].remove(&index);
            self.empty.push(index);
        } else {
            self.open[size].insert(index);
        }
    }
}

fn slots_of(size: usize) -> usize {
    CHUNK_BYTES / (MIN_SLOT_BYTES << size)
}

impl Arena {
    fn new(len_bytes: usize) -> io::Result<Self> {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let fd = rustix::fs::memfd_create("bedplate-decoded", flags)?;
        rustix::fs::ftruncate(&fd, len_bytes as u64)?;
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
        let arena = Self { base, mapped: (start, mapped_bytes), len_bytes, fd };
        let prot = ProtFlags::READ | ProtFlags::WRITE;
        let flags = MapFlags::SHARED | MapFlags::FIXED;
        // SAFETY: replaces a part of the range just kept, which nobody else knows of; the memfd is
        // sealed against shrinking before anybody else has it.
        unsafe { rustix::mm::mmap(base.as_ptr().cast(), len_bytes, prot, flags, &arena.fd, 0) }?;
        let seals = SealFlags::SHRINK | SealFlags::GROW | SealFlags::FUTURE_WRITE | SealFlags::SEAL;
        rustix::fs::fcntl_add_seals(&arena.fd, seals)?;
        Ok(arena)
    }

    /// Gives chunk `index` its memory, if possible as one huge page.
    fn populate(&self, index: usize) -> io::Result<()> {
        let at = index * CHUNK_BYTES;
        if at >= self.len_bytes {
            return Err(io::ErrorKind::StorageFull.into());
        }
        let fill = |len: usize| {
            rustix::fs::fallocate(&self.fd, FallocateFlags::empty(), at as u64, len as u64)
        };
        // Of one page the kernel makes a whole huge one, in half the time that 512 pages take.
        fill(MIN_SLOT_BYTES)?;
        // SAFETY: the chunk is in our own map, and its content does not change.
        let refused =
            unsafe { libc::madvise(self.base.as_ptr().add(at).cast(), CHUNK_BYTES, MADV_COLLAPSE) };
        // Slower without. Here a lack of memory is an error; at the first touch it would be a signal.
        if refused != 0 { Ok(fill(CHUNK_BYTES)?) } else { Ok(()) }
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

impl SlabBuf {
    /// The bytes, to be filled. Not after [`publish`](Self::publish): readers would see both.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        debug_assert!(self.published.is_none(), "others read it already");
        // SAFETY: the slot is this owner's alone, has room for `len` bytes, and was zero or written
        // before: every byte is initialised.
        unsafe { std::slice::from_raw_parts_mut(self.bytes.as_ptr(), self.len) }
    }

    /// Only the first `len` bytes count from now on.
    pub fn truncate(&mut self, len: usize) {
        self.len = self.len.min(len);
    }

    /// Tells readers of `table`, by its word `index`, where the bytes are, until this is dropped.
    /// Of several that are published for one word the last one counts.
    pub fn publish(&mut self, table: &Arc<SharedTable>, index: u64) {
        let slot_bytes = MIN_SLOT_BYTES << self.size;
        let place = (self.chunk * CHUNK_BYTES + self.slot * slot_bytes) as u64 / PLACE_BYTES;
        let number = self.slab.shared.published.fetch_add(1, Ordering::Relaxed);
        let word = number << PLACE_BITS | place;
        if table.set(index, word) {
            self.published = Some(Published { table: Arc::clone(table), index, word });
        }
    }
}

impl Published {
    /// No reader who looks after this takes what comes into the slot for what was there.
    fn withdraw(&self) {
        let word = usize::try_from(self.index).ok().and_then(|n| self.table.words().get(n));
        if let Some(word) = word {
            let _another_by_now =
                word.compare_exchange(self.word, 0, Ordering::AcqRel, Ordering::Relaxed);
        }
        fence(Ordering::Release);
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
        if let Some(published) = &self.published {
            published.withdraw();
        }
        self.slab.chunks().give_back(self.chunk, self.slot, self.size);
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::unix::fs::FileExt;

    use super::*;
    use crate::format::{Header, Kind, place};

    #[test]
    fn slots_do_not_overlap_and_come_back() {
        let slab = Slab::new(64 << 20).unwrap();
        let mut bufs: Vec<SlabBuf> = (0..70).map(|_| slab.take(65_536).unwrap()).collect();
        for (n, buf) in (0..).zip(&mut bufs) {
            buf.bytes_mut().fill(n);
        }
        for (n, buf) in (0..).zip(&bufs) {
            assert!(buf.as_ref().len() == 65_536 && buf.as_ref().iter().all(|&byte| byte == n));
        }
        assert_eq!(slab.held_bytes(), 3 * CHUNK_BYTES as u64);
        drop(bufs);
        let other: Vec<SlabBuf> = (0..96).map(|_| slab.take(32_768).unwrap()).collect();
        assert!(other.iter().all(|buf| buf.as_ref().len() == 32_768));
        assert_eq!(slab.held_bytes(), 3 * CHUNK_BYTES as u64, "cut anew into other slots");
    }

    #[test]
    fn every_size_has_its_slots_and_a_buffer_may_be_cut() {
        let slab = Slab::new(64 << 20).unwrap();
        for len in [1, 512, 4096, 4097, 1 << 20, CHUNK_BYTES] {
            let mut buf = slab.take(len).unwrap();
            buf.bytes_mut().fill(9);
            buf.truncate(len - 1);
            assert_eq!(buf.as_ref().len(), len - 1);
        }
        assert!(slab.take(CHUNK_BYTES + 1).is_err());
    }

    /// Huge pages for this process, or none from now on.
    fn allow_huge(yes: bool) {
        let disable = libc::c_ulong::from(!yes);
        // SAFETY: takes numbers; what is mapped stays as it is.
        let done = unsafe { libc::prctl(libc::PR_SET_THP_DISABLE, disable, 0, 0, 0) };
        assert_eq!(done, 0, "{}", io::Error::last_os_error());
    }

    #[test]
    fn all_memory_of_a_chunk_is_there_before_it_is_touched_with_huge_pages_and_without() {
        for huge in [true, false] {
            allow_huge(huge);
            let slab = Slab::new(2 * CHUNK_BYTES as u64).unwrap();
            let slots = [slab.take(CHUNK_BYTES).unwrap(), slab.take(4096).unwrap()];
            allow_huge(true);
            let stored_bytes = 512 * rustix::fs::fstat(slab.fd()).unwrap().st_blocks;
            assert_eq!(stored_bytes, 2 * CHUNK_BYTES as i64, "huge pages: {huge}");
            assert!(slots.iter().all(|slot| slot.as_ref().iter().all(|&byte| byte == 0)));
        }
    }

    #[test]
    fn a_chunk_in_the_middle_is_used_again_and_a_full_arena_is_an_error() {
        let slab = Slab::new(64 << 20).unwrap();
        let mut bufs: Vec<_> = (0..5).map(|_| slab.take(CHUNK_BYTES).unwrap()).collect();
        bufs.drain(1..4);
        bufs.extend((0..3).map(|_| slab.take(CHUNK_BYTES).unwrap()));
        assert_eq!(slab.held_bytes(), 5 * CHUNK_BYTES as u64);
        bufs.extend((5..32).map(|_| slab.take(CHUNK_BYTES).unwrap()));
        assert!(slab.take(1).is_err());
        bufs.pop();
        assert!(slab.take(1).is_ok());
    }

    #[test]
    fn a_published_slot_is_found_by_its_word_until_it_is_dropped() {
        let slab = Slab::new(8 << 20).unwrap();
        let header = Header { kind: Kind::Decoded, unit_bits: 16, units: 4, ..Header::EMPTY };
        let table = Arc::new(SharedTable::new("test", &header).unwrap());
        let first = slab.take(65_536).unwrap();
        let mut buf = slab.take(65_536).unwrap();
        buf.bytes_mut().fill(7);
        buf.publish(&table, 3);
        let word = table.get(3).unwrap();
        let mut found = [0; 65_536];
        let arena = File::from(slab.fd().try_clone_to_owned().unwrap());
        arena.read_exact_at(&mut found, place(word).unwrap()).unwrap();
        assert!(found.iter().all(|&byte| byte == 7));
        assert!(arena.write_at(&[1], 0).is_err(), "nobody else writes");

        let mut again = slab.take(65_536).unwrap();
        again.publish(&table, 3);
        drop(buf);
        assert_ne!(table.get(3), Some(word), "the later one's");
        assert_ne!(table.get(3), Some(0));
        drop(again);
        assert_eq!(table.get(3), Some(0));
        let mut last = slab.take(65_536).unwrap();
        last.publish(&table, 3);
        assert_ne!(table.get(3), Some(word), "no word comes twice");
        drop(first);
    }

    #[test]
    fn many_threads_take_and_give_back() {
        let slab = Slab::new(64 << 20).unwrap();
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
        assert!(slab.held_bytes() <= 4 * CHUNK_BYTES as u64, "{}", slab.held_bytes());
    }
}
