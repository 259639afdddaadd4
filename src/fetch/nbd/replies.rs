//! Requests under way, and what may come for each.
//!
//! Why: whatever a server says is held against what was asked, before a byte of it is believed.
//! How: a read keeps which of its bytes have come; a second one for the same byte, one outside of it, or
//! an end before all are here is a fault.
//! Never: keeps more than a bounded number of pieces for a read.
//! Start at [`Read`].

use std::ops::Range;

use super::fault::NbdFault;

/// Pieces with gaps between that one read may come in.
const MAX_PIECES: usize = 256;

/// A read under way.
#[derive(Debug)]
pub(super) struct Read {
    /// Of the export.
    pub(super) range: Range<u64>,
    /// Which of the open blocks it belongs to.
    pub(super) block: u64,
    /// What has come: ascending, with gaps between.
    pieces: Vec<Range<u64>>,
}

impl Read {
    pub(super) fn new(range: Range<u64>, block: u64) -> Self {
        Self { range, block, pieces: Vec::new() }
    }

    /// Notes that `len` bytes from `at` on come.
    ///
    /// # Errors
    /// [`NbdFault::Protocol`]: they were not asked for, or have come already.
    pub(super) fn take(&mut self, at: u64, len: u64) -> Result<Range<u64>, NbdFault> {
        let wrong = |what, found| Err(NbdFault::Protocol { what, found });
        let Some(end) = at.checked_add(len).filter(|_| len > 0) else {
            return wrong("a piece of no bytes, or without an end", at);
        };
        if at < self.range.start || end > self.range.end {
            return wrong("bytes that were not asked for", at);
        }
        let next = self.pieces.partition_point(|piece| piece.end < at);
        match self.pieces.get(next).cloned() {
            Some(piece) if piece.start < end && at < piece.end => {
                return wrong("bytes that have come already", at);
            }
            Some(piece) if piece.end == at => {
                let meets = self.pieces.get(next + 1).cloned().filter(|later| later.start <= end);
                if meets.as_ref().is_some_and(|later| later.start < end) {
                    return wrong("bytes that have come already", at);
                }
                if meets.is_some() {
                    self.pieces.remove(next + 1);
                }
                let end = meets.map_or(end, |later| later.end);
                if let Some(piece) = self.pieces.get_mut(next) {
                    piece.end = end;
                }
            }
            Some(piece) if piece.start == end => {
                if let Some(piece) = self.pieces.get_mut(next) {
                    piece.start = at;
                }
            }
            Some(_) | None if self.pieces.len() >= MAX_PIECES => {
                return wrong("a reply in too many pieces", self.pieces.len() as u64);
            }
            Some(_) | None => self.pieces.insert(next, at..end),
        }
        Ok(at..end)
    }

    /// True once every byte has come.
    pub(super) fn is_complete(&self) -> bool {
        self.pieces.first() == Some(&self.range)
    }
}

/// What was asked for under one cookie.
#[derive(Debug)]
pub(super) enum Asked {
    /// Bytes.
    Read(Read),
    /// Holes, up to where they are told, and the end of the question.
    Status { told: u64, end: u64 },
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn pieces_come_in_any_order_each_byte_once() {
        let mut read = Read::new(100..110, 0);
        for (at, len) in [(104, 2), (108, 2), (100, 4), (106, 2)] {
            assert!(!read.is_complete());
            read.take(at, len).unwrap();
        }
        assert!(read.is_complete());
        for (at, len) in [(100, 1), (109, 1), (104, 6)] {
            assert!(read.take(at, len).is_err());
        }
        let mut read = Read::new(100..110, 0);
        for (at, len) in
            [(99, 1), (99, 3), (109, 2), (110, 1), (100, 11), (100, 0), (105, u64::MAX)]
        {
            assert!(read.take(at, len).is_err(), "{at} {len}");
        }
    }

    #[test]
    fn a_reply_in_too_many_pieces_is_refused() {
        let mut read = Read::new(0..10_000, 0);
        let taken = (0..5000).map(|n| read.take(n * 2, 1)).take_while(Result::is_ok).count();
        assert_eq!(taken, MAX_PIECES);
    }

    proptest! {
        #[test]
        fn what_is_taken_is_what_a_set_of_bytes_would_take(
            takes in prop::collection::vec((0u64..40, 0u64..12), 0..60),
        ) {
            let mut read = Read::new(5..35, 0);
            let mut here = std::collections::BTreeSet::new();
            for (at, len) in takes {
                let bytes: Vec<u64> = (at..at + len).collect();
                let fits = len > 0 && bytes.iter().all(|b| (5..35).contains(b) && !here.contains(b));
                prop_assert_eq!(read.take(at, len).is_ok(), fits);
                if fits {
                    here.extend(bytes);
                }
                prop_assert_eq!(read.is_complete(), here.len() == 30);
            }
        }
    }
}
