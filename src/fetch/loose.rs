//! Digests of single MiBs, for files of which nothing else is hashed.
//!
//! Why: the clusters of an expanded image come in an order of their own; to hash them in the file's
//! order, most would have to be read back from the disk.
//! How: a whole MiB is hashed when it comes, if who handed it over has not done so. Parts of one are gathered until it is whole, a bounded
//! number of them; what was here before this run is read back while nothing comes, and what could
//! not be gathered at the end.
//! Never: keeps a buffer, or reads back what the writer has not written.
//! Start at [`Loose::run`].

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::ops::Range;
use std::sync::mpsc::{Receiver, TryRecvError};

use super::digest::{Handed, Stored};
use crate::disk::{
    Block, DigestSet, Digests, DiskError, Hasher, UNIT_BYTES, hash_range, xxh3_of, xxh3_of_zero_mib,
};
use crate::units::MIB;

/// MiBs that are gathered at the same time.
const MAX_OPEN: usize = 48;
/// Units of a MiB.
const UNITS: u64 = MIB / UNIT_BYTES;

/// Which units of a MiB have come.
#[derive(Clone, Copy, Default)]
struct Came {
    /// One bit for each.
    units: u64,
    /// How far they go: less than a MiB at the end of the file.
    end: u64,
}

impl Came {
    /// All parts begin at a unit, and end at one or with the file.
    fn add(&mut self, part: &Range<u64>) {
        let units = part.start / UNIT_BYTES..part.end.div_ceil(UNIT_BYTES).min(UNITS);
        self.units |= units.fold(0, |mask, unit| mask | 1 << unit);
        self.end = self.end.max(part.end);
    }

    fn and(self, other: Self) -> Self {
        Self { units: self.units | other.units, end: self.end.max(other.end) }
    }

    fn is_whole(self, len: u64) -> bool {
        let mut whole = Self::default();
        whole.add(&(0..len));
        self.units == whole.units && self.end == len
    }
}

/// A MiB of which bytes have come; the rest is zero.
struct Open {
    bytes: Box<[u8]>,
    came: Came,
}

/// The digests of a file's MiBs, in any order.
pub(super) struct Loose {
    stored: Stored,
    done: HashMap<u64, u64>,
    /// MiBs that are all zero: begin and end of ranges of them.
    zero: BTreeMap<u64, u64>,
    /// Of other MiBs, the units that are zero.
    zero_units: HashMap<u64, Came>,
    open: HashMap<u64, Open>,
    /// The numbers of `open`, those begun first in front; some may be gone.
    begun: VecDeque<u64>,
    /// MiBs that were here before this run.
    here: VecDeque<Range<u64>>,
}

impl Loose {
    /// `missing` are the ranges that will be handed over, ascending.
    pub(super) fn new(stored: Stored, missing: VecDeque<Range<u64>>) -> Self {
        let (mut here, mut at) = (VecDeque::new(), 0);
        for range in missing {
            // Of a MiB that begins before its gap, the rest comes later.
            let whole = at..range.start / MIB;
            if !whole.is_empty() {
                here.push_back(whole);
            }
            at = range.end.div_ceil(MIB);
        }
        Self {
            stored,
            done: HashMap::new(),
            zero: BTreeMap::new(),
            zero_units: HashMap::new(),
            open: HashMap::new(),
            begun: VecDeque::new(),
            here,
        }
    }

    /// Takes all blocks; `end` gives the file's length if it became whole.
    pub(super) fn run(
        mut self,
        blocks: &Receiver<Handed>,
        end: &Receiver<u64>,
        go_on: &dyn Fn() -> bool,
    ) -> Result<Digests, DiskError> {
        loop {
            let next = match blocks.try_recv() {
                Err(TryRecvError::Empty) if self.here.is_empty() => blocks.recv().ok(),
                Err(TryRecvError::Empty) => {
                    self.read_one(go_on)?;
                    continue;
                }
                next => next.ok(),
            };
            let Some(Handed { block, xxh3, .. }) = next else { break };
            match xxh3 {
                Some(digest) => drop(self.done.insert(block.range().start / MIB, digest)),
                None => self.take(&block),
            }
        }
        // No end means that the transfer failed: then the digests are wanted by nobody.
        let Ok(total) = end.recv() else { return Ok(Digests::default()) };
        let count = total.div_ceil(MIB);
        let mut blocks = Vec::with_capacity(usize::try_from(count).unwrap_or(0));
        let mut mib = 0;
        while mib < count {
            let zero_up_to = self.zero_up_to(mib).min(total / MIB);
            if zero_up_to > mib {
                blocks.extend((mib..zero_up_to).map(|_| xxh3_of_zero_mib()));
                mib = zero_up_to;
                continue;
            }
            blocks.push(self.digest(mib, total, go_on)?);
            mib += 1;
        }
        Ok(Digests { xxh3_per_mib: blocks, ..Digests::default() })
    }

    fn zero_up_to(&self, mib: u64) -> u64 {
        self.zero.range(..=mib).next_back().map_or(mib, |(_, &end)| end.max(mib))
    }

    /// The digest of one MiB of a file of `total` bytes that is whole.
    fn digest(&mut self, mib: u64, total: u64, go_on: &dyn Fn() -> bool) -> Result<u64, DiskError> {
        if let Some(digest) = self.done.get(&mib) {
            return Ok(*digest);
        }
        let len = (total - mib * MIB).min(MIB);
        match self.whole(mib, len) {
            Some(digest) => Ok(digest),
            None => self.read_back(mib * MIB..mib * MIB + len, go_on),
        }
    }

    /// The digest of a MiB of `len` bytes if all of it has come.
    fn whole(&self, mib: u64, len: u64) -> Option<u64> {
        static ZEROES: [u8; 1 << 20] = [0; 1 << 20];
        let zero = self.zero_units.get(&mib).copied().unwrap_or_default();
        let open = self.open.get(&mib);
        let came = open.map_or(zero, |open| open.came.and(zero));
        let bytes = open.map_or(&ZEROES[..], |open| &open.bytes);
        let len_here = usize::try_from(len).unwrap_or(0);
        came.is_whole(len).then(|| xxh3_of(&bytes[..len_here]))
    }

    fn read_back(&self, range: Range<u64>, go_on: &dyn Fn() -> bool) -> Result<u64, DiskError> {
        let mut hasher = Hasher::new(DigestSet::default());
        // A hasher counts from byte 0; what it makes of one MiB does not depend on where it is.
        let Stored { file, path } = &self.stored;
        hash_range(file, path, range, &mut hasher, &mut |_| go_on())?;
        Ok(hasher.finish().xxh3_per_mib.first().copied().unwrap_or_default())
    }

    /// Reads back one MiB that was here before.
    fn read_one(&mut self, go_on: &dyn Fn() -> bool) -> Result<(), DiskError> {
        let Some(range) = self.here.front_mut() else { return Ok(()) };
        let mib = range.start;
        range.start += 1;
        if range.is_empty() {
            self.here.pop_front();
        }
        let digest = self.read_back(mib * MIB..(mib + 1) * MIB, go_on)?;
        self.done.insert(mib, digest);
        Ok(())
    }

    fn take(&mut self, block: &Block) {
        let range = block.range();
        match block {
            Block::Data { buf, .. } => self.bytes(range.start, buf.bytes()),
            Block::Zero { .. } => self.zeroes(range),
            // It is in the file only.
            Block::Written { .. } => {}
        }
    }

    /// Takes bytes of one MiB, or of several: from `at` on.
    fn bytes(&mut self, mut at: u64, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let room = usize::try_from(MIB - at % MIB).unwrap_or(usize::MAX);
            let (part, rest) = bytes.split_at(room.min(bytes.len()));
            if part.len() as u64 == MIB {
                self.done.insert(at / MIB, xxh3_of(part));
            } else {
                self.gather(at, part);
            }
            (at, bytes) = (at + part.len() as u64, rest);
        }
    }

    fn zeroes(&mut self, range: Range<u64>) {
        let whole = range.start.div_ceil(MIB)..range.end / MIB;
        if whole.is_empty() {
            let mut at = range.start;
            while at < range.end {
                let end = range.end.min((at / MIB + 1) * MIB);
                self.zero_units.entry(at / MIB).or_default().add(&(at % MIB..at % MIB + end - at));
                self.close(at / MIB);
                at = end;
            }
            return;
        }
        let before = self.zero.range(..=whole.start).next_back().map(|(&start, &end)| start..end);
        let start = before.filter(|r| r.end >= whole.start).map_or(whole.start, |r| r.start);
        let known = self.zero.entry(start).or_insert(whole.end);
        *known = whole.end.max(*known);
        for part in [range.start..whole.start * MIB, whole.end * MIB..range.end] {
            if !part.is_empty() {
                self.zeroes(part);
            }
        }
    }

    /// Puts a part of a MiB to the others of it.
    fn gather(&mut self, at: u64, part: &[u8]) {
        let (mib, within) = (at / MIB, at % MIB);
        if !self.open.contains_key(&mib) {
            self.make_room();
            self.begun.push_back(mib);
        }
        let open = self.open.entry(mib).or_insert_with(|| Open {
            bytes: vec![0; usize::try_from(MIB).unwrap_or(0)].into(),
            came: Came::default(),
        });
        let start = usize::try_from(within).unwrap_or(0);
        open.bytes[start..start + part.len()].copy_from_slice(part);
        open.came.add(&(within..within + part.len() as u64));
        self.close(mib);
    }

    /// Hashes a MiB that has become whole.
    fn close(&mut self, mib: u64) {
        if let Some(digest) = self.whole(mib, MIB) {
            self.done.insert(mib, digest);
            self.open.remove(&mib);
            self.zero_units.remove(&mib);
        }
    }

    /// Gives up the MiB that is waiting longest, if there are too many.
    fn make_room(&mut self) {
        while self.open.len() >= MAX_OPEN {
            let Some(oldest) = self.begun.pop_front() else { return };
            self.open.remove(&oldest);
        }
        if self.begun.len() > 2 * MAX_OPEN {
            let open = &self.open;
            self.begun.retain(|mib| open.contains_key(mib));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;
    use std::sync::Arc;
    use std::sync::mpsc;

    use proptest::prelude::*;

    use super::*;
    use crate::ring::BufPool;
    use crate::units::FileOffset;

    /// A unit is absent, zero, or full of a byte; absent ones are here before.
    fn file_of(units: &[u8], tail: usize) -> Vec<u8> {
        let mut bytes = Vec::new();
        for &unit in units {
            bytes.resize(bytes.len() + usize::try_from(UNIT_BYTES).unwrap(), unit);
        }
        bytes.truncate(bytes.len() - tail);
        bytes
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(40))]
        #[test]
        fn any_order_gives_the_digests_of_the_file(
            units in proptest::collection::vec(0u8..4, 1..90),
            here in proptest::collection::vec(any::<bool>(), 90),
            order in proptest::collection::vec(any::<prop::sample::Index>(), 90),
            tail in 0usize..4096,
        ) {
            let bytes = file_of(&units, tail);
            let total = bytes.len() as u64;
            let file = tempfile::tempfile().unwrap();
            file.write_all_at(&bytes, 0).unwrap();
            let (pool, unit) = (BufPool::new(90), usize::try_from(UNIT_BYTES).unwrap());
            let (mut missing, mut blocks) = (VecDeque::new(), Vec::new());
            for (index, part) in bytes.chunks(unit).enumerate().filter(|(index, _)| !here[*index]) {
                let at = index as u64 * UNIT_BYTES;
                missing.push_back(at..at + part.len() as u64);
                blocks.push(match units[index] {
                    0 => Block::Zero { at: FileOffset(at), len_bytes: part.len() as u64 },
                    1 => Block::Written { at: FileOffset(at), len_bytes: part.len() as u64 },
                    _ => {
                        let mut buf = pool.try_take().unwrap();
                        buf.fill(part, part.len());
                        Block::Data { at: FileOffset(at), buf: Arc::new(buf) }
                    }
                });
            }
            for (index, other) in order.iter().enumerate().take(blocks.len()) {
                let other = other.index(blocks.len());
                blocks.swap(index, other);
            }
            let (send, queue) = mpsc::channel();
            let (end, end_queue) = mpsc::channel();
            let handed = |block| Handed::new(block, true, true);
            blocks.into_iter().for_each(|block| send.send(handed(block)).unwrap());
            end.send(total).unwrap();
            drop(send);
            let stored = Stored { file: Arc::new(file), path: "x".into() };
            let found = Loose::new(stored, missing).run(&queue, &end_queue, &|| true).unwrap();
            let mut hasher = Hasher::new(DigestSet::default());
            hasher.update(&bytes);
            prop_assert_eq!(found, hasher.finish());
            prop_assert_eq!(pool.in_use(), 0);
        }
    }

    #[test]
    fn a_whole_mib_is_hashed_by_who_hands_it_over() {
        let (pool, mib) = (BufPool::new(2), usize::try_from(MIB).unwrap());
        let block = |at, len: usize| {
            let mut buf = pool.try_take().unwrap();
            buf.fill(&vec![3; len], len);
            Block::Data { at: FileOffset(at), buf: Arc::new(buf) }
        };
        let whole = xxh3_of(&vec![3; mib]);
        assert_eq!(Handed::new(block(5 * MIB, mib), true, true).xxh3, Some(whole));
        assert_eq!(Handed::new(block(5 * MIB, mib), true, false).xxh3, None);
        assert_eq!(Handed::new(block(0, mib - 1), true, true).xxh3, None);
        // Of the next MiB another part comes.
        assert_eq!(Handed::new(block(UNIT_BYTES, mib), true, true).xxh3, None);
        let (send, queue) = mpsc::channel();
        let (end, end_queue) = mpsc::channel();
        send.send(Handed::new(block(0, mib), true, true)).unwrap();
        send.send(Handed::new(block(MIB, 7), true, true)).unwrap();
        end.send(MIB + 7).unwrap();
        drop(send);
        let stored = Stored { file: Arc::new(tempfile::tempfile().unwrap()), path: "x".into() };
        let missing = VecDeque::from([0..MIB + 7]);
        let found = Loose::new(stored, missing).run(&queue, &end_queue, &|| true).unwrap();
        assert_eq!(found.xxh3_per_mib, [whole, xxh3_of(&[3; 7])]);
    }

    #[test]
    fn a_hole_of_terabytes_costs_nothing_and_too_many_open_ones_are_read_back() {
        let (total, file) = (1 << 40, tempfile::tempfile().unwrap());
        file.set_len(total).unwrap();
        let stored = Stored { file: Arc::new(file), path: "x".into() };
        let mut loose = Loose::new(stored, std::iter::once(0..total).collect());
        let zeroes = |at: u64, len_bytes| Block::Zero { at: FileOffset(at), len_bytes };
        let pool = BufPool::new(1);
        for mib in 0..2 * MAX_OPEN as u64 {
            let mut buf = pool.try_take().unwrap();
            buf.fill(&[0; 4096], 4096);
            let (at, buf) = (FileOffset(mib * MIB), Arc::new(buf));
            loose.take(&Block::Data { at, buf });
        }
        assert_eq!(loose.open.len(), MAX_OPEN);
        let begun = 2 * MAX_OPEN as u64 * MIB;
        loose.take(&zeroes(begun, total - begun));
        let (end, end_queue) = mpsc::channel();
        end.send(total).unwrap();
        let (_, nothing) = mpsc::channel();
        let digests = loose.run(&nothing, &end_queue, &|| true).unwrap();
        assert_eq!(digests.xxh3_per_mib.len(), 1 << 20);
        assert!(digests.xxh3_per_mib.iter().all(|&digest| digest == xxh3_of_zero_mib()));
    }
}
