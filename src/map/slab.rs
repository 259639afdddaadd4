//! Memory for decoded clusters: equal slots in huge pages, which other processes may map.
//!
//! Why: a cache of clusters in pages of 4 KiB spends more on address translation than on copying;
//! memory that an allocator gives back and takes anew is zeroed page by page each time; and what is
//! decoded once serves the readers of all processes.
//! How: an arena ([`crate::arena`]), which only this process may write, in chunks of a huge page, each
//! cut into slots of one power of two ([`crate::chunks`]). A slot is one owner's until it is dropped. It
//! may be published: its place is in the word of a table then, with a number that never comes again, and
//! the word is cleared before the slot is used again or its memory given back: what a reader copied
//! after that, be it another's or zeroes, it does not take.
//! Never: hands out a slot twice, or one without memory. What an earlier owner left in a slot, the next
//! one may see.
//! Start at [`Slab::take`], [`SlabBuf::publish`] and [`Slab::give_back`].

use std::fmt;
use std::io;
use std::os::fd::BorrowedFd;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering, fence};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::SharedTable;
use crate::arena::{Arena, CHUNK_BYTES};
use crate::chunks::{Chunks, MIN_SLOT_BYTES, Parted, SIZES, Slot, Taken, slot_bytes};
use crate::format::{PLACE_BITS, PLACE_BYTES, place};
use crate::guard::{self, Copied};

const _: () = assert!(MIN_SLOT_BYTES as u64 == PLACE_BYTES);
/// The largest arena: what a place can name.
const MAX_ARENA_BYTES: u64 = PLACE_BYTES << PLACE_BITS;

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
    /// Bytes of memory that were ever asked for.
    asked_bytes: AtomicU64,
}

/// A slot, and bytes in it: the first `len` of them.
pub struct SlabBuf {
    bytes: NonNull<u8>,
    len: usize,
    slot: Slot,
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
        Self::on(max_bytes, Arena::new)
    }

    /// One that never gives memory back, as where the system does not let this process mount.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn keeping(max_bytes: u64) -> io::Result<Self> {
        Self::on(max_bytes, Arena::sealed)
    }

    fn on(max_bytes: u64, arena: impl FnOnce(usize) -> io::Result<Arena>) -> io::Result<Self> {
        let max_bytes = max_bytes.clamp(1, MAX_ARENA_BYTES);
        let chunks = usize::try_from(max_bytes.div_ceil(CHUNK_BYTES as u64));
        let chunks = chunks.map_err(|_| io::ErrorKind::InvalidInput)?;
        let shared = Shared {
            arena: arena(chunks * CHUNK_BYTES)?,
            chunks: Mutex::default(),
            published: AtomicU64::new(1),
            asked_bytes: AtomicU64::new(0),
        };
        Ok(Self { shared: Arc::new(shared) })
    }

    /// A slot for `len` bytes, which hold anything.
    ///
    /// # Errors
    /// `InvalidInput` for more than [`CHUNK_BYTES`]; the arena is full, or the system is.
    pub fn take(&self, len: usize) -> io::Result<SlabBuf> {
        let bytes = len.next_power_of_two().max(MIN_SLOT_BYTES);
        let size = (bytes / MIN_SLOT_BYTES).ilog2() as usize;
        if size >= SIZES {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let slot = self.slot(size)?;
        // SAFETY: the slot ends inside its chunk, which lies inside the arena.
        let bytes = unsafe { self.shared.arena.base.add(slot.at()) };
        Ok(SlabBuf { bytes, len, slot, slab: self.clone(), published: None })
    }

    fn slot(&self, size: usize) -> io::Result<Slot> {
        let arena = &self.shared.arena;
        let mut chunks = self.chunks();
        loop {
            match chunks.take(size) {
                Taken::Ready(slot) => return Ok(slot),
                Taken::Bare(slot) => {
                    // It is in no list: nobody waits for this.
                    drop(chunks);
                    return self.fill(slot);
                }
                // Others that want a slot wait: each would make a chunk of its own.
                Taken::Make(index) => {
                    arena.populate_chunk(index)?;
                    chunks.made(index);
                    self.count(CHUNK_BYTES);
                }
            }
        }
    }

    /// Brings the memory of a bare slot.
    fn fill(&self, slot: Slot) -> io::Result<Slot> {
        let (at, arena) = (slot.at(), &self.shared.arena);
        if let Err(error) = arena.populate(at..at + slot_bytes(slot.size)) {
            self.chunks().failed(slot);
            return Err(error);
        }
        self.count(slot_bytes(slot.size));
        let is_whole = self.chunks().filled(slot);
        if is_whole {
            // Its pages were torn apart when a part of it was given back. Slower without.
            arena.collapse(slot.chunk);
        }
        Ok(slot)
    }

    fn count(&self, bytes: usize) {
        self.shared.asked_bytes.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    /// Gives free memory back to the system until not more than `keep_bytes` are free, and says how
    /// much went. Takes the lock for each piece anew. Nothing goes where
    /// [`can_give_back`](Self::can_give_back) is false.
    pub fn give_back(&self, keep_bytes: u64) -> u64 {
        let keep_bytes = usize::try_from(keep_bytes).unwrap_or(usize::MAX);
        let mut gone = 0;
        while self.can_give_back() {
            let mut chunks = self.chunks();
            let most = chunks.free_bytes().saturating_sub(keep_bytes);
            let parted = if most == 0 { None } else { chunks.part_with(most) };
            drop(chunks);
            let Some(parted) = parted else { break };
            let punched = self.punch(&parted);
            // If it failed, a part of it may be gone: it is given memory again before it is used.
            gone += self.chunks().parted(parted) as u64;
            if punched.is_err() {
                break;
            }
        }
        gone
    }

    fn punch(&self, parted: &Parted) -> io::Result<()> {
        let arena = &self.shared.arena;
        match parted {
            Parted::Chunk(index) => arena.punch(index * CHUNK_BYTES..(index + 1) * CHUNK_BYTES),
            Parted::Slots { chunk, size, numbers } => {
                let (start, bytes) = (chunk * CHUNK_BYTES, slot_bytes(*size));
                let mut runs = numbers.chunk_by(|one, next| one + 1 == *next);
                runs.try_for_each(|run| match (run.first(), run.last()) {
                    (Some(first), Some(last)) => {
                        arena.punch(start + first * bytes..start + (last + 1) * bytes)
                    }
                    (None, _) | (_, None) => Ok(()),
                })
            }
        }
    }

    /// True if free memory can be given back to the system.
    #[must_use]
    pub fn can_give_back(&self) -> bool {
        self.shared.arena.is_punchable()
    }

    /// Bytes of memory that were asked for, ever: slots that were used again did not ask.
    #[must_use]
    pub fn asked_bytes(&self) -> u64 {
        self.shared.asked_bytes.load(Ordering::Relaxed)
    }

    /// Bytes of memory that slots have, those that nobody uses too.
    #[must_use]
    pub fn held_bytes(&self) -> u64 {
        self.chunks().held_bytes() as u64
    }

    /// Bytes of memory in slots that nobody uses.
    #[must_use]
    pub fn free_bytes(&self) -> u64 {
        self.chunks().free_bytes() as u64
    }

    /// The least that was free since this was asked.
    #[must_use]
    pub fn take_least_free_bytes(&self) -> u64 {
        self.chunks().take_least_free_bytes() as u64
    }

    /// Bytes of memory that the system has in the arena: what slots have, and what readers touched
    /// that had none.
    #[must_use]
    pub fn memory_bytes(&self) -> u64 {
        self.shared.arena.memory_bytes()
    }

    /// Length of the arena in bytes, most of which may be no memory yet.
    #[must_use]
    pub fn len_bytes(&self) -> u64 {
        self.shared.arena.len_bytes as u64
    }

    /// The arena, to be handed to a reader, who can map and read it and nothing else.
    #[must_use]
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.shared.arena.readers_fd()
    }

    /// Copies what is published for word `index` of `table`, from its byte `skip` on; false if there is
    /// nothing, or it went away meanwhile: `buf` holds anything then. Takes no lock. `skip` and the
    /// length of `buf` are within what was published.
    pub fn copy_published(
        &self,
        table: &SharedTable,
        index: u64,
        skip: u64,
        buf: &mut [u8],
    ) -> bool {
        let Some(word) = table.get(index) else { return false };
        let from = place(word).and_then(|place| usize::try_from(place + skip).ok());
        let arena = &self.shared.arena;
        let Some(from) = from
            .filter(|from| from.checked_add(buf.len()).is_some_and(|end| end <= arena.len_bytes))
        else {
            return false;
        };
        // What was written before the word was set is seen by the loads after this.
        fence(Ordering::Acquire);
        // SAFETY: the range is inside the arena, which stays mapped, and `buf` is no part of it. The
        // slot may be another owner's by now, who writes into it: the copy is not made of Rust's loads,
        // and what came is not taken then.
        let copied =
            unsafe { guard::copy(arena.base.as_ptr().add(from), buf.as_mut_ptr(), buf.len()) };
        // Before a slot is used again its word is cleared.
        fence(Ordering::Acquire);
        copied != Copied::Not && table.get(index) == Some(word)
    }

    /// A panic of another owner leaves the lists whole: none is inside them.
    fn chunks(&self) -> MutexGuard<'_, Chunks> {
        self.shared.chunks.lock().unwrap_or_else(PoisonError::into_inner)
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
        let place = self.slot.at() as u64 / PLACE_BYTES;
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
        self.slab.chunks().give_back(self.slot);
    }
}

#[cfg(test)]
#[path = "slab_tests.rs"]
mod tests;
