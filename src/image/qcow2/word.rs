//! The two kinds of words in the shared cluster map.
//!
//! Why: a reader in another process gets entries that were judged already, in host byte order.
//! How: as [`crate::map::format`] has it: a span word for each L2 table that the disk needs, then a
//! word for each guest cluster, or for each subcluster where an image has them (the words of a
//! compressed cluster's are all the same). Zero words are what a new map is made of.
//! Never: holds a number that was not judged.
//! Start at [`Span`] and [`Meaning`].
//!
//! | span word | meaning |
//! |---|---|
//! | 0 | no L2 table: nothing of the span is stored, its words are never touched |
//! | L2 table's file offset, bit 0 | nothing of the table was read yet |
//! | L2 table's file offset, bit 1 | some of it was: words that are not 0 are filled in |
//!
//! The word of a compressed cluster has its L2 entry in bits 0 to 61.

use super::entry::{Cluster, Packed};
use super::header::ClusterBits;
pub(super) use crate::map::format::{BENEATH, DAMAGED, ZERO};
use crate::map::format::{DATA, ENCODED, KIND_BITS};
use crate::units::FileOffset;

const DESCRIPTOR: u64 = (1 << 62) - 1;
/// The word of a unit that is not filled in.
pub(super) const UNKNOWN: u64 = 0;
const SPAN_UNREAD: u64 = 1;
const SPAN_BEGUN: u64 = 2;

/// What a span word says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Span {
    /// No L2 table: nothing is stored.
    Empty,
    /// Nothing of the L2 table at this place was read.
    Unread(FileOffset),
    /// Words are filled in from the L2 table at this place, where they are not 0.
    Begun(FileOffset),
}

impl Span {
    pub(super) fn to_word(self) -> u64 {
        match self {
            Self::Empty => 0,
            Self::Unread(at) => at.0 | SPAN_UNREAD,
            Self::Begun(at) => at.0 | SPAN_BEGUN,
        }
    }

    pub(super) fn of_word(word: u64) -> Self {
        let at = FileOffset(word & !KIND_BITS);
        match word & KIND_BITS {
            SPAN_UNREAD => Self::Unread(at),
            SPAN_BEGUN => Self::Begun(at),
            _only_zero_is_left => Self::Empty,
        }
    }
}

/// What a cluster word says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Meaning {
    Data(FileOffset),
    Zero,
    /// What the backing file has.
    Beneath,
    /// Not clamped to the file's length.
    Encoded(Packed),
    Damaged,
    /// Not filled in.
    Unknown,
}

/// The word of the first unit of a judged run, and what is added for each that follows; `raw` is
/// the entry itself, `empty` the word of what is not stored: zero or beneath.
pub(super) fn of_run(meaning: Cluster, raw: u64, unit_bits: u32, empty: u64) -> (u64, u64) {
    match meaning {
        Cluster::Data(at) => (data(at), 1 << unit_bits),
        Cluster::Zero => (ZERO, 0),
        Cluster::Unallocated => (empty, 0),
        Cluster::Compressed(_) => (ENCODED | raw & DESCRIPTOR, 0),
    }
}

/// The word of a data cluster at `at`.
pub(super) fn data(at: FileOffset) -> u64 {
    at.0 | DATA
}

/// What a word says in an image of this cluster size.
pub(super) fn meaning(word: u64, bits: ClusterBits) -> Meaning {
    if word & ENCODED != 0 {
        return Meaning::Encoded(Packed::of_entry(word & DESCRIPTOR, bits));
    }
    match word & KIND_BITS {
        DATA => Meaning::Data(FileOffset(word & !KIND_BITS)),
        ZERO => Meaning::Zero,
        BENEATH => Meaning::Beneath,
        _ if word == 0 => Meaning::Unknown,
        _damaged => Meaning::Damaged,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_say_what_was_put_in() {
        let bits = ClusterBits::new(16).unwrap();
        let at = FileOffset(0x00ff_ffff_ffff_0000);
        assert_eq!(meaning(of_run(Cluster::Data(at), at.0, 16, ZERO).0, bits), Meaning::Data(at));
        assert_eq!(meaning(of_run(Cluster::Zero, 1, 16, ZERO).0, bits), Meaning::Zero);
        assert_eq!(meaning(of_run(Cluster::Unallocated, 0, 16, ZERO).0, bits), Meaning::Zero);
        let beneath = of_run(Cluster::Unallocated, 0, 16, BENEATH).0;
        assert_eq!(meaning(beneath, bits), Meaning::Beneath);
        assert_eq!(meaning(0, bits), Meaning::Unknown);
        assert_eq!(meaning(DAMAGED, bits), Meaning::Damaged);
        let raw = 0xffff_ffff_0123_4567;
        let packed = Packed::of_entry(raw, bits);
        assert_eq!(
            meaning(of_run(Cluster::Compressed(packed), raw, 16, ZERO).0, bits),
            Meaning::Encoded(packed)
        );
    }

    #[test]
    fn span_words_round_trip() {
        for span in [Span::Empty, Span::Unread(FileOffset(512)), Span::Begun(FileOffset(1 << 55))] {
            assert_eq!(Span::of_word(span.to_word()), span);
        }
    }
}
