//! What of a file is still to be asked for, in the order of the file.
//!
//! Why: digests are made in order from memory, so connections take what is lowest and nobody runs
//! far ahead.
//! How: the missing ranges, ascending. A piece ends at a MiB boundary of the file (that of a
//! buffer) or at the end of its range.
//! Never: gives a byte to two.
//! Start at [`Todo::take`].

use std::collections::VecDeque;
use std::ops::Range;

use crate::disk::UNIT_BYTES;
use crate::ring::BLOCK_BYTES;

const BLOCK: u64 = BLOCK_BYTES as u64;

/// The ranges that nobody has taken yet.
#[derive(Debug, Default)]
pub(super) struct Todo(VecDeque<Range<u64>>);

impl Todo {
    /// All of `missing`, which is ascending and without empty ranges.
    pub(super) fn new(missing: Vec<Range<u64>>) -> Self {
        debug_assert!(missing.windows(2).all(|pair| pair[0].end <= pair[1].start));
        Self(missing.into())
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Bytes that nobody has taken.
    pub(super) fn len_bytes(&self) -> u64 {
        self.0.iter().map(|range| range.end - range.start).sum()
    }

    /// The lowest range as a whole; it stays here.
    pub(super) fn lowest(&self) -> Option<Range<u64>> {
        self.0.front().cloned()
    }

    /// Takes the lowest bytes: so many that they touch at most `blocks` MiBs of the file.
    pub(super) fn take(&mut self, blocks: usize) -> Option<Range<u64>> {
        let lowest = self.0.front_mut()?;
        let cut = (lowest.start / BLOCK).saturating_add(blocks.max(1) as u64).saturating_mul(BLOCK);
        let piece = lowest.start..lowest.end.min(cut);
        lowest.start = piece.end;
        if lowest.is_empty() {
            self.0.pop_front();
        }
        Some(piece)
    }

    /// Takes the first bytes of `wanted` that nobody has, in whole units, to the end of a MiB at most;
    /// not what begins in `but`.
    pub(super) fn take_within(
        &mut self,
        wanted: &Range<u64>,
        but: &Range<u64>,
    ) -> Option<Range<u64>> {
        let index = self.0.partition_point(|range| range.end <= wanted.start);
        let whole = self.0.get(index).cloned().filter(|range| range.start < wanted.end)?;
        let start = (wanted.start / UNIT_BYTES * UNIT_BYTES).max(whole.start);
        let cut = (start / BLOCK + 1) * BLOCK;
        let end = wanted.end.next_multiple_of(UNIT_BYTES).min(cut).min(whole.end);
        if but.contains(&start) || start >= end {
            return None;
        }
        let parts = [whole.start..start, end..whole.end];
        let left = parts.into_iter().filter(|part| !part.is_empty());
        self.0.remove(index);
        for (offset, part) in left.enumerate() {
            self.0.insert(index + offset, part);
        }
        Some(start..end)
    }

    /// Takes the MiB that begins at `at`, if nobody has it and nothing lower is left.
    pub(super) fn take_at(&mut self, at: u64) -> Option<Range<u64>> {
        (self.0.front()?.start == at).then(|| self.take(1))?
    }
}

/// How many MiBs of the file `range` touches: the buffers that it needs.
pub(super) fn blocks_of(range: &Range<u64>) -> usize {
    let count = range.end.div_ceil(BLOCK) - range.start / BLOCK;
    usize::try_from(count).unwrap_or(usize::MAX)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const UNIT: u64 = 64 * 1024;

    #[test]
    fn pieces_are_the_lowest_and_end_at_a_mib() {
        let mut todo = Todo::new(vec![UNIT..3 * BLOCK, 5 * BLOCK..5 * BLOCK + 7]);
        assert_eq!(todo.take(2), Some(UNIT..2 * BLOCK));
        assert_eq!(todo.take_at(0), None);
        assert_eq!(todo.take_at(2 * BLOCK), Some(2 * BLOCK..3 * BLOCK));
        assert_eq!(todo.take_at(3 * BLOCK), None);
        assert_eq!(todo.take(9), Some(5 * BLOCK..5 * BLOCK + 7));
        assert_eq!(todo.take(9), None);
    }

    #[test]
    fn what_is_wanted_is_taken_in_whole_units_out_of_the_middle() {
        let mut todo = Todo::new(vec![UNIT..3 * BLOCK, 5 * BLOCK..5 * BLOCK + 7]);
        let none = 0..0;
        assert_eq!(todo.take_within(&(BLOCK + 5..BLOCK + 6), &none), Some(BLOCK..BLOCK + UNIT));
        assert_eq!(todo.take_within(&(BLOCK + 5..BLOCK + 6), &none), None);
        assert_eq!(todo.take_within(&(0..1), &none), None);
        let soon = UNIT..BLOCK;
        assert_eq!(todo.take_within(&(0..9 * BLOCK), &soon), None);
        assert_eq!(todo.take_within(&(0..9 * BLOCK), &none), Some(UNIT..BLOCK));
        let last = 5 * BLOCK..5 * BLOCK + 7;
        assert_eq!(todo.take_within(&(4 * BLOCK..9 * BLOCK), &none), Some(last));
        assert_eq!(todo.take(9), Some(BLOCK + UNIT..3 * BLOCK));
        assert!(todo.is_empty());
    }

    #[test]
    fn an_end_that_nobody_knows_is_no_trouble() {
        let mut todo = Todo::new(vec![0..u64::MAX]);
        assert_eq!(todo.take(usize::MAX), Some(0..u64::MAX));
    }

    proptest! {
        #[test]
        fn every_byte_is_given_once(
            ranges in proptest::collection::vec((1u64..9, 1u64..200), 1..9), blocks in 1usize..9,
        ) {
            let mut at = 0;
            let mut missing = Vec::new();
            for (gap, units) in ranges {
                missing.push(at + gap * UNIT..at + (gap + units) * UNIT);
                at += (gap + units) * UNIT;
            }
            let mut todo = Todo::new(missing.clone());
            let mut given: Vec<Range<u64>> = Vec::new();
            while let Some(piece) = todo.take(blocks) {
                prop_assert!(blocks_of(&piece) <= blocks);
                match given.last_mut() {
                    Some(last) if last.end == piece.start => last.end = piece.end,
                    Some(_) | None => given.push(piece),
                }
            }
            prop_assert_eq!(given, missing);
        }
    }
}
