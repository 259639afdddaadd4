//! What is to be asked for next: from what the server says of its holes to blocks and requests.
//!
//! Why: a hole costs no request and no byte, and what is data is asked for in requests that the server
//! likes.
//! How: extents are taken in as they are told, and the wanted ranges are walked in order. A hole of whole
//! units is one step; else the next step is a block up to a MiB boundary of the file, with the parts
//! of it that are data.
//! Never: does I/O, or keeps more extents than a limit: those beyond are asked for again.
//! Start at [`Plan::next`].

use std::collections::VecDeque;
use std::ops::Range;

use super::handshake::Export;
use crate::disk::UNIT_BYTES;
use crate::ring::BLOCK_BYTES;

/// Extents that are kept.
const MAX_EXTENTS: usize = 16 * 1024;
/// Of so many bytes holes are asked for at once.
const STATUS_BYTES: u64 = 1 << 30;
/// What is known ahead before more is asked for.
const AHEAD_BYTES: u64 = 64 << 20;
/// Answers about holes that tell of less than a unit, of one export; then all of it is read.
const MAX_POOR: u32 = 4096;
/// A hole within a block that is not worth a request more.
const SMALL_HOLE: u64 = 16 * 1024;

/// A run of one kind, up to `end`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Extent {
    end: u64,
    zero: bool,
}

/// What to do next.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// A range reads as zeroes.
    Zeroes(Range<u64>),
    /// These parts of the block are data; the rest of it reads as zeroes.
    Block { range: Range<u64>, parts: Vec<Range<u64>> },
    /// Nothing before more is known of what is data.
    Unknown,
    /// All has been given out.
    Done,
}

/// The ranges that are wanted, and what is known of them.
#[derive(Debug)]
pub(super) struct Plan {
    export: Export,
    wanted: VecDeque<Range<u64>>,
    /// From where the first wanted range begins, one after the other.
    known: VecDeque<Extent>,
    /// A question for holes is under way; what was known when it was asked.
    asked: Option<u64>,
    /// Answers that told next to nothing.
    poor: u32,
    /// The server can tell holes, as far as is known.
    tells: bool,
}

impl Plan {
    /// For the ranges `wanted` of `export`: ascending, each at a unit's begin and in its bounds.
    pub(super) fn new(export: Export, wanted: Vec<Range<u64>>) -> Self {
        let wanted = wanted.into_iter().filter(|range| !range.is_empty()).collect();
        let tells = export.holes.is_some();
        Self { export, wanted, known: VecDeque::new(), asked: None, poor: 0, tells }
    }

    /// Up to where it is known what is data.
    fn known_to(&self, from: u64) -> u64 {
        self.known.back().map_or(from, |extent| extent.end)
    }

    /// The server does not tell holes after all: all is data.
    pub(super) fn all_is_data(&mut self) {
        (self.tells, self.asked) = (false, None);
    }

    /// A range of which holes should be asked for now; not empty, and at most as long as a request
    /// can say.
    pub(super) fn question(&mut self) -> Option<Range<u64>> {
        let range = self.wanted.front().filter(|_| self.tells && self.asked.is_none())?;
        let start = self.known_to(range.start);
        let ahead = start - range.start;
        if start >= range.end || ahead >= AHEAD_BYTES || self.known.len() >= MAX_EXTENTS {
            return None;
        }
        let min = u64::from(self.export.min_block);
        self.asked = Some(start);
        let start = start / min * min;
        let end = range.end.min(start + STATUS_BYTES).next_multiple_of(min).min(self.export.size);
        Some(start..end)
    }

    /// Takes in the next extent of the answer to the question.
    pub(super) fn tell(&mut self, extent: Range<u64>, zero: bool) {
        let Some(range) = self.wanted.front() else { return };
        let from = self.known_to(range.start);
        if extent.end <= from || extent.start > from {
            // Known already (a question begins at a multiple of the smallest block), or after one
            // that was not kept.
            return;
        }
        let end = extent.end.min(range.end);
        let is_full = self.known.len() >= MAX_EXTENTS;
        match self.known.back_mut() {
            _ if end <= from => {}
            Some(last) if last.zero == zero => last.end = end,
            _ if is_full => {}
            Some(_) | None => self.known.push_back(Extent { end, zero }),
        }
    }

    /// The answer is complete: what it did not tell will be asked for, unless too many answers told
    /// next to nothing.
    pub(super) fn told(&mut self) {
        let (Some(before), Some(range)) = (self.asked.take(), self.wanted.front()) else { return };
        let now = self.known_to(range.start);
        if now < range.end && now < before.saturating_add(UNIT_BYTES) {
            self.poor += 1;
        }
        if now <= before || self.poor > MAX_POOR {
            self.all_is_data();
        }
    }

    /// The next step.
    pub(super) fn next(&mut self) -> Step {
        let Some(range) = self.wanted.front().cloned() else { return Step::Done };
        let first = match self.known.front() {
            _ if !self.tells => Extent { end: range.end, zero: false },
            Some(extent) => *extent,
            None => return Step::Unknown,
        };
        if first.zero {
            let zeroes = match first.end >= range.end {
                true => range.start..range.end,
                false => range.start..first.end - first.end % UNIT_BYTES,
            };
            if !zeroes.is_empty() {
                self.advance(zeroes.end);
                return Step::Zeroes(zeroes);
            }
        }
        let block = BLOCK_BYTES as u64;
        let end = range.end.min((range.start / block + 1) * block);
        if self.tells && self.known_to(range.start) < end {
            if self.known.len() < MAX_EXTENTS {
                return Step::Unknown;
            }
            // Cut up so small that no more can be kept: the rest of the block is read.
            self.known.push_back(Extent { end, zero: false });
        }
        let parts = self.parts(range.start..end);
        self.advance(end);
        Step::Block { range: range.start..end, parts }
    }

    /// What of a block is data, as requests.
    fn parts(&self, block: Range<u64>) -> Vec<Range<u64>> {
        let min = u64::from(self.export.min_block);
        let mut parts: Vec<Range<u64>> = Vec::new();
        let mut at = block.start;
        let all = [Extent { end: block.end, zero: false }];
        let (known, all) = match self.tells {
            true => (Some(self.known.iter()), None),
            false => (None, Some(all.iter())),
        };
        for extent in known.into_iter().flatten().chain(all.into_iter().flatten()) {
            let (start, end) = (at, extent.end.min(block.end));
            at = end.max(at);
            if extent.zero || start >= end {
                continue;
            }
            // Blocks begin and end at MiBs, which are multiples of the smallest request.
            let start = (start / min * min).max(block.start);
            let end = end.next_multiple_of(min).min(block.end);
            match parts.last_mut() {
                Some(last) if start <= last.end + SMALL_HOLE => last.end = end.max(last.end),
                Some(_) | None => parts.push(start..end),
            }
        }
        let most = u64::from(self.export.max_block);
        let cut = |part: Range<u64>| {
            let starts =
                (part.start..part.end).step_by(usize::try_from(most).unwrap_or(BLOCK_BYTES));
            starts.map(move |start| start..part.end.min(start + most))
        };
        parts.into_iter().flat_map(cut).collect()
    }

    /// All up to `to` of the first wanted range has been given out.
    fn advance(&mut self, to: u64) {
        while self.known.front().is_some_and(|extent| extent.end <= to) {
            self.known.pop_front();
        }
        if let Some(range) = self.wanted.front_mut() {
            range.start = to;
            if range.is_empty() {
                self.wanted.pop_front();
                // What was told beyond is of the gap to the next one.
                self.known.clear();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MIB: u64 = 1 << 20;

    fn export(size: u64, min_block: u32, max_block: u32, holes: bool) -> Export {
        let holes = holes.then_some(1);
        Export { size, structured: true, holes, min_block, max_block }
    }

    /// Walks a plan to its end with a server whose holes are where `is_zero` says, a unit of
    /// `grain` bytes each, and which tells `most` extents at a time.
    fn walk(
        export: Export,
        wanted: &[Range<u64>],
        grain: u64,
        most: usize,
        is_zero: &dyn Fn(u64) -> bool,
    ) -> Vec<Step> {
        let mut plan = Plan::new(export, wanted.to_vec());
        let mut steps = Vec::new();
        loop {
            if let Some(question) = plan.question() {
                assert!(question.start < question.end && question.end <= export.size);
                let mut at = question.start;
                for _ in 0..most {
                    let zero = is_zero(at / grain);
                    let mut end = (at / grain + 1) * grain;
                    while end < question.end && is_zero(end / grain) == zero {
                        end += grain;
                    }
                    plan.tell(at..end.min(question.end), zero);
                    at = end;
                    if at >= question.end {
                        break;
                    }
                }
                plan.told();
            }
            match plan.next() {
                Step::Unknown => {}
                Step::Done => return steps,
                step @ (Step::Zeroes(_) | Step::Block { .. }) => steps.push(step),
            }
        }
    }

    fn check(
        export: Export,
        wanted: &[Range<u64>],
        grain: u64,
        is_zero: &dyn Fn(u64) -> bool,
        steps: &[Step],
    ) {
        let (min, max) = (u64::from(export.min_block), u64::from(export.max_block));
        let mut left: VecDeque<Range<u64>> = wanted.to_vec().into();
        for step in steps {
            let (range, parts) = match step {
                Step::Zeroes(range) => (range, Vec::new()),
                Step::Block { range, parts } => (range, parts.clone()),
                Step::Unknown | Step::Done => unreachable!(),
            };
            // Each wanted byte once, in order.
            let first = left.front_mut().unwrap();
            assert_eq!(first.start, range.start);
            assert!(range.end <= first.end && range.start < range.end);
            first.start = range.end;
            if first.is_empty() {
                left.pop_front();
            }
            let mut at = range.start;
            for part in &parts {
                assert!(part.start >= at && part.start < part.end && part.end <= range.end);
                assert!(part.end - part.start <= max.max(1));
                assert!(part.start % min == 0 || part.start == range.start);
                assert!(part.end % min == 0 || part.end == export.size || part.end == range.end);
                at = part.end;
            }
            // What no part has is a hole.
            for unit in range.start / grain..range.end.div_ceil(grain) {
                let (a, b) = ((unit * grain).max(range.start), ((unit + 1) * grain).min(range.end));
                if !is_zero(unit) {
                    let covered = |byte: u64| parts.iter().any(|part| part.contains(&byte));
                    assert!(covered(a) && covered(b - 1), "{a}..{b} in {step:?}");
                }
            }
        }
        assert!(left.is_empty());
    }

    #[test]
    fn a_hole_is_one_step_and_data_is_asked_for_a_mib_at_a_time() {
        let export = export(10 * MIB + 5, 1, 32 << 20, true);
        let steps = walk(export, &[0..export.size], MIB, 99, &|unit| unit != 3 && unit != 10);
        assert_eq!(
            steps,
            [
                Step::Zeroes(0..3 * MIB),
                Step::Block { range: 3 * MIB..4 * MIB, parts: vec![3 * MIB..4 * MIB] },
                Step::Zeroes(4 * MIB..10 * MIB),
                Step::Block { range: 10 * MIB..export.size, parts: vec![10 * MIB..export.size] },
            ]
        );
    }

    #[test]
    fn a_server_that_tells_no_holes_is_asked_for_all() {
        let export = export(2 * MIB + 1, 512, 256 * 1024, false);
        let steps = walk(export, &[0..export.size], MIB, 1, &|_| false);
        let parts: usize = steps
            .iter()
            .map(|step| match step {
                Step::Block { parts, .. } => parts.len(),
                Step::Zeroes(_) | Step::Unknown | Step::Done => panic!("{step:?}"),
            })
            .sum();
        assert_eq!((steps.len(), parts), (3, 9));
    }

    #[test]
    fn extents_beyond_the_limit_are_asked_for_again() {
        let size = 80 * MIB;
        let export = export(size, 512, 1 << 20, true);
        let is_zero = |unit: u64| unit.is_multiple_of(2);
        // More than can be kept in one answer.
        let steps = walk(export, &[0..size], 1024, usize::MAX, &is_zero);
        check(export, &[0..size], 1024, &is_zero, &steps);
    }

    proptest! {
        #[test]
        fn every_wanted_byte_is_given_out_once_and_what_is_no_part_is_a_hole(
            bits: u64,
            grain in prop::sample::select(vec![1u64, 300, 4096, 65_536, 200_000, 1 << 20]),
            min in prop::sample::select(vec![1u32, 512, 4096, 65_536]),
            max in prop::sample::select(vec![65_536u32, 1 << 20, 32 << 20]),
            most in 1usize..5,
            len in 1u64..6_000_000,
            gap in 0u64..40,
            holes: bool,
        ) {
            let is_zero = |unit: u64| holes && bits.rotate_left((unit % 64) as u32) & 1 == 1;
            let grain = grain.max(len / 4000 + 1);
            let export = export(len, min, max, holes);
            let unit = UNIT_BYTES;
            let cut = (gap * unit).min(len);
            let wanted = [0..(cut / 2 / unit * unit), cut..len];
            let wanted: Vec<_> = wanted.into_iter().filter(|range| !range.is_empty()).collect();
            let steps = walk(export, &wanted, grain, most, &is_zero);
            check(export, &wanted, grain, &is_zero, &steps);
        }
    }
}
