//! Which slots of an arena are free, and which of those have memory.
//!
//! Why: slots of all sizes share one arena, what is evicted lies scattered over it, and memory that
//! nobody uses is to go back to the system, piece by piece.
//! How: a chunk is cut into slots of one size, and may be cut anew once all are free. A free slot is
//! ready, if its memory is there, or bare. Who takes one gets the lowest chunk's, so that others
//! become empty; what is given back is taken from the highest. What somebody punches or fills with
//! memory is in no list meanwhile, so that nobody else gets it.
//! Never: calls the system, or hands out a slot twice.
//! Start at [`Chunks::take`] and [`Chunks::part_with`].

use std::collections::BTreeSet;

use crate::arena::CHUNK_BYTES;

/// Smaller slots gain nothing.
pub(crate) const MIN_SLOT_BYTES: usize = 4096;
pub(crate) const SIZES: usize = (CHUNK_BYTES / MIN_SLOT_BYTES).ilog2() as usize + 1;

/// All chunks that were ever used.
#[derive(Default)]
pub(crate) struct Chunks {
    chunks: Vec<Chunk>,
    /// Chunks that are cut and have ready slots, by size.
    ready: [BTreeSet<usize>; SIZES],
    /// Chunks that are cut and have bare slots, by size.
    bare: [BTreeSet<usize>; SIZES],
    /// Chunks of which no slot is taken, and all memory is there; a part of it; none of it.
    full: BTreeSet<usize>,
    holed: BTreeSet<usize>,
    void: BTreeSet<usize>,
    held_bytes: usize,
    free_bytes: usize,
    /// The least that was free since somebody asked.
    least_free_bytes: usize,
}

#[derive(Default)]
struct Chunk {
    ready: Vec<usize>,
    bare: Vec<usize>,
    memory_bytes: usize,
}

/// A slot that is somebody's now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Slot {
    pub(crate) chunk: usize,
    pub(crate) number: usize,
    /// Of [`slot_bytes`] bytes.
    pub(crate) size: usize,
}

/// What is to be had for a slot of one size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Taken {
    /// Its memory is there.
    Ready(Slot),
    /// Its memory is to be brought, then [`Chunks::filled`], or [`Chunks::failed`].
    Bare(Slot),
    /// There is none: this chunk is to be given all its memory, then [`Chunks::made`], and asked again.
    Make(usize),
}

/// Free memory that is in no list, to be given back to the system: then [`Chunks::parted`].
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Parted {
    /// A whole chunk.
    Chunk(usize),
    /// Slots of one, in order.
    Slots { chunk: usize, size: usize, numbers: Vec<usize> },
}

/// Bytes of a slot of this size.
pub(crate) fn slot_bytes(size: usize) -> usize {
    MIN_SLOT_BYTES << size
}

fn slots_of(size: usize) -> usize {
    CHUNK_BYTES / slot_bytes(size)
}

impl Slot {
    /// Where it begins in the arena.
    pub(crate) fn at(&self) -> usize {
        self.chunk * CHUNK_BYTES + self.number * slot_bytes(self.size)
    }
}

impl Chunks {
    /// Bytes of memory of all chunks.
    pub(crate) fn held_bytes(&self) -> usize {
        self.held_bytes
    }

    /// Those of them in slots that nobody has.
    pub(crate) fn free_bytes(&self) -> usize {
        self.free_bytes
    }

    /// What was free all the time since this was asked.
    pub(crate) fn take_least_free_bytes(&mut self) -> usize {
        std::mem::replace(&mut self.least_free_bytes, self.free_bytes)
    }

    /// A free slot of `size < SIZES`: before memory is asked for, what has some is used.
    pub(crate) fn take(&mut self, size: usize) -> Taken {
        let ready = self.ready[size].first().copied();
        if let Some(chunk) = ready.or_else(|| self.cut(size)) {
            let slots = &mut self.chunks[chunk].ready;
            let number = slots.pop().expect("a chunk in this list has a ready slot");
            if slots.is_empty() {
                self.ready[size].remove(&chunk);
            }
            self.set_free(self.free_bytes - slot_bytes(size));
            return Taken::Ready(Slot { chunk, number, size });
        }
        if let Some(chunk) = self.bare[size].first().copied() {
            let slots = &mut self.chunks[chunk].bare;
            let number = slots.pop().expect("a chunk in this list has a bare slot");
            if slots.is_empty() {
                self.bare[size].remove(&chunk);
            }
            return Taken::Bare(Slot { chunk, number, size });
        }
        let index = self.holed.first().or(self.void.first()).copied();
        Taken::Make(index.unwrap_or(self.chunks.len()))
    }

    /// The memory of a bare slot is there. True if all of its chunk's is now.
    pub(crate) fn filled(&mut self, slot: Slot) -> bool {
        self.held_bytes += slot_bytes(slot.size);
        let memory = &mut self.chunks[slot.chunk].memory_bytes;
        *memory += slot_bytes(slot.size);
        *memory == CHUNK_BYTES
    }

    /// There is no memory for a bare slot, and nobody has it any more.
    pub(crate) fn failed(&mut self, slot: Slot) {
        self.chunks[slot.chunk].bare.push(slot.number);
        self.bare[slot.size].insert(slot.chunk);
        self.see_if_empty(slot.chunk, slot.size);
    }

    /// All memory of a chunk, which [`take`](Self::take) named, is there.
    pub(crate) fn made(&mut self, index: usize) {
        if index == self.chunks.len() {
            self.chunks.push(Chunk::default());
        }
        let missing = CHUNK_BYTES - self.chunks[index].memory_bytes;
        self.chunks[index].memory_bytes = CHUNK_BYTES;
        self.held_bytes += missing;
        self.set_free(self.free_bytes + missing);
        self.holed.remove(&index);
        self.void.remove(&index);
        self.full.insert(index);
    }

    /// Cuts the lowest full chunk into slots of `size`.
    fn cut(&mut self, size: usize) -> Option<usize> {
        let index = self.full.pop_first()?;
        self.chunks[index].ready = (0..slots_of(size)).rev().collect();
        self.ready[size].insert(index);
        Some(index)
    }

    /// A slot is nobody's any more.
    pub(crate) fn give_back(&mut self, slot: Slot) {
        self.chunks[slot.chunk].ready.push(slot.number);
        self.ready[slot.size].insert(slot.chunk);
        self.set_free(self.free_bytes + slot_bytes(slot.size));
        self.see_if_empty(slot.chunk, slot.size);
    }

    /// A chunk of which all slots are free may be cut anew.
    fn see_if_empty(&mut self, index: usize, size: usize) {
        let chunk = &mut self.chunks[index];
        if chunk.ready.len() + chunk.bare.len() < slots_of(size) {
            return;
        }
        (chunk.ready, chunk.bare) = (Vec::new(), Vec::new());
        self.ready[size].remove(&index);
        self.bare[size].remove(&index);
        self.put_empty(index);
    }

    fn put_empty(&mut self, index: usize) {
        let list = match self.chunks[index].memory_bytes {
            0 => &mut self.void,
            CHUNK_BYTES => &mut self.full,
            _ => &mut self.holed,
        };
        list.insert(index);
    }

    /// Free memory to be given back: chunks of which no slot is taken, before slots of others, of
    /// which about `most_bytes`. None if nothing is free.
    pub(crate) fn part_with(&mut self, most_bytes: usize) -> Option<Parted> {
        if let Some(index) = self.holed.pop_last().or_else(|| self.full.pop_last()) {
            self.set_free(self.free_bytes - self.chunks[index].memory_bytes);
            return Some(Parted::Chunk(index));
        }
        let highest = (0..SIZES).filter_map(|size| Some((*self.ready[size].last()?, size))).max();
        let (chunk, size) = highest?;
        let slots = &mut self.chunks[chunk].ready;
        slots.sort_unstable();
        let kept = slots.len().saturating_sub(most_bytes.div_ceil(slot_bytes(size)).max(1));
        let numbers = slots.split_off(kept);
        if slots.is_empty() {
            self.ready[size].remove(&chunk);
        }
        self.set_free(self.free_bytes - numbers.len() * slot_bytes(size));
        Some(Parted::Slots { chunk, size, numbers })
    }

    /// What was parted with is without memory now. How many bytes went.
    pub(crate) fn parted(&mut self, parted: Parted) -> usize {
        let gone = match parted {
            Parted::Chunk(index) => {
                let memory = std::mem::take(&mut self.chunks[index].memory_bytes);
                self.put_empty(index);
                memory
            }
            Parted::Slots { chunk, size, mut numbers } => {
                let memory = numbers.len() * slot_bytes(size);
                self.chunks[chunk].memory_bytes -= memory;
                self.chunks[chunk].bare.append(&mut numbers);
                self.bare[size].insert(chunk);
                self.see_if_empty(chunk, size);
                memory
            }
        };
        self.held_bytes -= gone;
        gone
    }

    fn set_free(&mut self, bytes: usize) {
        self.free_bytes = bytes;
        self.least_free_bytes = self.least_free_bytes.min(bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Of 64 KiB.
    const SIZE: usize = 4;

    fn take(chunks: &mut Chunks, size: usize) -> Slot {
        match chunks.take(size) {
            Taken::Ready(slot) => slot,
            Taken::Bare(slot) => {
                chunks.filled(slot);
                slot
            }
            Taken::Make(index) => {
                chunks.made(index);
                take(chunks, size)
            }
        }
    }

    fn part(chunks: &mut Chunks, most_bytes: usize) -> usize {
        let parted = chunks.part_with(most_bytes).unwrap();
        chunks.parted(parted)
    }

    #[test]
    fn empty_chunks_go_before_slots_and_slots_come_back_bare() {
        let mut chunks = Chunks::default();
        let slots: Vec<Slot> = (0..96).map(|_| take(&mut chunks, SIZE)).collect();
        assert_eq!((chunks.held_bytes(), chunks.free_bytes()), (3 * CHUNK_BYTES, 0));
        // All of the second, and every other slot of the others.
        for slot in slots.iter().filter(|slot| slot.chunk == 1 || slot.number % 2 == 1) {
            chunks.give_back(*slot);
        }
        assert_eq!(chunks.free_bytes(), 2 * CHUNK_BYTES);
        assert_eq!(chunks.part_with(1), Some(Parted::Chunk(1)));
        assert_eq!(chunks.parted(Parted::Chunk(1)), CHUNK_BYTES);
        assert_eq!(part(&mut chunks, CHUNK_BYTES), CHUNK_BYTES / 2, "the highest chunk's");
        assert_eq!(part(&mut chunks, 65_536 * 2), 65_536 * 2, "no more than is wanted");
        assert_eq!(chunks.held_bytes(), CHUNK_BYTES * 3 / 2 - 65_536 * 2);
        for _ in 0..14 {
            assert!(matches!(chunks.take(SIZE), Taken::Ready(Slot { chunk: 0, .. })));
        }
        let Taken::Bare(slot) = chunks.take(SIZE) else { panic!("no memory is left") };
        assert_eq!(slot.chunk, 0);
        chunks.failed(slot);
        assert_eq!(chunks.take(SIZE), Taken::Bare(slot));
        assert!(!chunks.filled(slot));
        let Taken::Bare(slot) = chunks.take(SIZE) else { panic!("no memory is left") };
        assert!(chunks.filled(slot), "the chunk is whole again");
    }

    #[test]
    fn a_chunk_that_lost_a_part_of_its_memory_is_whole_before_it_is_cut_anew() {
        let mut chunks = Chunks::default();
        let slots: Vec<Slot> = (0..32).map(|_| take(&mut chunks, SIZE)).collect();
        slots[..8].iter().for_each(|slot| chunks.give_back(*slot));
        assert_eq!(part(&mut chunks, CHUNK_BYTES), CHUNK_BYTES / 4);
        slots[8..].iter().for_each(|slot| chunks.give_back(*slot));
        assert_eq!(chunks.take(0), Taken::Make(0));
        chunks.made(0);
        assert_eq!((chunks.held_bytes(), chunks.free_bytes()), (CHUNK_BYTES, CHUNK_BYTES));
        let slots: Vec<Slot> = (0..512).map(|_| take(&mut chunks, 0)).collect();
        assert!(slots.iter().all(|slot| slot.chunk == 0));
        assert_eq!(chunks.take(0), Taken::Make(1));
    }

    #[test]
    fn what_is_being_given_back_is_nobodys_until_then() {
        let mut chunks = Chunks::default();
        let slots: Vec<Slot> = (0..32).map(|_| take(&mut chunks, SIZE)).collect();
        slots[1..].iter().for_each(|slot| chunks.give_back(*slot));
        let out = chunks.part_with(CHUNK_BYTES).unwrap();
        chunks.give_back(slots[0]);
        let Taken::Ready(again) = chunks.take(SIZE) else { panic!("one is there") };
        assert_eq!(again, slots[0]);
        assert_eq!(chunks.take(SIZE), Taken::Make(1));
        chunks.give_back(again);
        assert_eq!(chunks.parted(out), 31 * 65_536);
        assert_eq!((chunks.held_bytes(), chunks.free_bytes()), (65_536, 65_536));
        assert_eq!(chunks.take(9), Taken::Make(0), "all are free");
    }

    #[test]
    fn the_least_that_was_free_is_what_nobody_needed() {
        let mut chunks = Chunks::default();
        let slot = take(&mut chunks, SIZE);
        chunks.take_least_free_bytes();
        let others: Vec<Slot> = (0..10).map(|_| take(&mut chunks, SIZE)).collect();
        others.iter().for_each(|slot| chunks.give_back(*slot));
        chunks.give_back(slot);
        assert_eq!(chunks.take_least_free_bytes(), 21 * 65_536);
        assert_eq!(chunks.take_least_free_bytes(), CHUNK_BYTES);
    }
}
