//! The places of an image's L1 and L2 tables, in little memory.
//!
//! Why: an L1 table may have four million entries, and a stranger chooses how many: what is kept of
//! them must stay below 64 MiB, the cluster map included.
//! How: L1 entries are kept in parts, which are let go one by one while a cluster map is filled
//! from them. The places that entries are held against are sorted cluster numbers of 4 bytes,
//! or of 6 in a file of more than 2^32 clusters.
//! Never: keeps an offset that was not judged.
//! Start at [`L2Tables::contains`].

use super::header::ClusterBits;

/// Bytes of a cluster number: an offset has 56 bits, a cluster at least 512 bytes.
const NUMBER_BYTES: usize = 6;
/// L1 entries that are kept in one piece.
const PART_ENTRIES: usize = 1 << 16;

/// Where the L2 tables of an image are, to be searched.
#[derive(Clone, Debug)]
pub struct L2Tables {
    bits: ClusterBits,
    numbers: Numbers,
}

/// Cluster numbers, ascending.
#[derive(Clone, Debug)]
enum Numbers {
    /// Those of nearly every file: searched in half the time.
    Narrow(Vec<u32>),
    /// Big-endian, so that they are in order as bytes.
    Wide(Vec<[u8; NUMBER_BYTES]>),
}

impl L2Tables {
    /// These places, in any order, each a multiple of the cluster size below 2^56.
    #[must_use]
    pub fn of(places: impl Iterator<Item = u64> + Clone, bits: ClusterBits) -> Self {
        let last = places.clone().max().unwrap_or(0);
        Self::collect(places.clone(), places.count(), last, bits)
    }

    /// Those that an L1 table names, in a file of this length.
    pub(super) fn of_l1(l1: &L1, file_len_bytes: u64, bits: ClusterBits) -> Self {
        Self::collect(l1.iter().filter(|&at| at != 0), l1.tables, file_len_bytes, bits)
    }

    /// These `count` places, none of which is behind `last`; in memory for just as many.
    fn collect(
        places: impl Iterator<Item = u64>,
        count: usize,
        last: u64,
        bits: ClusterBits,
    ) -> Self {
        let numbers = places.map(|at| at >> bits.get());
        let numbers = if u32::try_from(last >> bits.get()).is_ok() {
            let narrow = numbers.filter_map(|number| u32::try_from(number).ok());
            Numbers::Narrow(sorted(narrow, count))
        } else {
            Numbers::Wide(sorted(numbers.map(wide), count))
        };
        Self { bits, numbers }
    }

    /// True if there is an L2 table in the cluster around `offset`.
    #[must_use]
    pub fn contains(&self, offset: u64) -> bool {
        let number = offset >> self.bits.get();
        match &self.numbers {
            Numbers::Narrow(all) => {
                u32::try_from(number).is_ok_and(|number| all.binary_search(&number).is_ok())
            }
            Numbers::Wide(all) => all.binary_search(&wide(number)).is_ok(),
        }
    }

    /// A place that is there twice.
    pub(super) fn twice(&self) -> Option<u64> {
        let number = match &self.numbers {
            Numbers::Narrow(all) => u64::from(same_as_the_next(all)?),
            Numbers::Wide(all) => {
                let mut bytes = [0; 8];
                *bytes.last_chunk_mut()? = same_as_the_next(all)?;
                u64::from_be_bytes(bytes)
            }
        };
        Some(number << self.bits.get())
    }
}

fn sorted<T: Ord>(numbers: impl Iterator<Item = T>, count: usize) -> Vec<T> {
    let mut all = Vec::new();
    all.reserve_exact(count);
    for number in numbers {
        all.push(number);
    }
    all.sort_unstable();
    all
}

/// The low 48 bits, which are all of a cluster's number.
fn wide(number: u64) -> [u8; NUMBER_BYTES] {
    *number.to_be_bytes().last_chunk().expect("6 of 8 bytes")
}

fn same_as_the_next<T: PartialEq + Copy>(all: &[T]) -> Option<T> {
    let pair = all.windows(2).find(|pair| pair.first() == pair.last())?;
    pair.first().copied()
}

/// For each L1 entry that the disk needs, the place of its L2 table; 0 for none.
#[derive(Debug, Default)]
pub(super) struct L1 {
    parts: Vec<Vec<u64>>,
    len: usize,
    /// How many there will be.
    wanted: usize,
    /// How many of them are not 0.
    tables: usize,
}

impl L1 {
    /// Room for so many entries.
    pub(super) fn new(entries: u64) -> Self {
        let wanted = usize::try_from(entries).unwrap_or(usize::MAX);
        Self { wanted, ..Self::default() }
    }

    pub(super) fn push(&mut self, at: u64) {
        if self.len.is_multiple_of(PART_ENTRIES) {
            let left = self.wanted.saturating_sub(self.len);
            self.parts.push(Vec::with_capacity(left.min(PART_ENTRIES)));
        }
        if let Some(part) = self.parts.last_mut() {
            part.push(at);
            self.len += 1;
            self.tables += usize::from(at != 0);
        }
    }

    pub(super) fn len(&self) -> usize {
        self.len
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = u64> + Clone {
        self.parts.iter().flatten().copied()
    }

    /// Gives each entry to `each`; a part is let go when all of it was given.
    pub(super) fn take(self, mut each: impl FnMut(u64)) {
        for part in self.parts {
            part.into_iter().for_each(&mut each);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_place_that_is_there_twice_is_found() {
        let bits = ClusterBits::new(9).unwrap();
        let last = 0x00ff_ffff_ffff_fe00;
        assert_eq!(L2Tables::of([last, 512, 1024].into_iter(), bits).twice(), None);
        assert_eq!(L2Tables::of([last, 512, last].into_iter(), bits).twice(), Some(last));
        assert_eq!(L2Tables::of([1024, 512, 1024].into_iter(), bits).twice(), Some(1024));
        assert_eq!(L2Tables::of([1024, 512].into_iter(), bits).twice(), None);
    }

    #[test]
    fn entries_come_out_in_order() {
        for count in [0, 1, PART_ENTRIES, PART_ENTRIES + 1] {
            let (mut l1, want) = (L1::new(count as u64), 0..count as u64);
            want.clone().for_each(|at| l1.push(at));
            assert!(l1.iter().eq(want.clone()) && l1.len() == count);
            assert_eq!(l1.tables, count.saturating_sub(1), "entry 0 is none");
            let mut got = Vec::new();
            l1.take(|at| got.push(at));
            assert!(got.into_iter().eq(want));
        }
    }

    /// Cluster numbers on both sides of 2^32, and so few that some are hit.
    const LAST: u64 = 1 << 33;

    proptest! {
        #[test]
        fn what_was_put_in_is_found_and_nothing_else(
            clusters in proptest::collection::btree_set(0_u64..LAST, 0..50),
            other in 0_u64..LAST,
            bits in 9_u32..=21,
        ) {
            let places = clusters.iter().map(|n| n << bits);
            let tables = L2Tables::of(places.clone(), ClusterBits::new(bits).unwrap());
            for at in places {
                prop_assert!(tables.contains(at) && tables.contains(at + (1 << bits) - 1));
            }
            prop_assert_eq!(tables.contains(other << bits), clusters.contains(&other));
        }
    }
}
