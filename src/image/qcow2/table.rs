//! One L2 table: its entries, in either form, as runs of units.
//!
//! Why: with subclusters an entry has 16 bytes and up to 32 meanings, without them 8 and one; who
//! fills a map or plans a transfer should not care.
//! How: [`entries`] cuts the table, [`Entry::judge`] gives runs of units (see
//! [`Header::unit_bits`]), which fill the cluster exactly.
//! Never: reads a file, or gives a run that was not judged.
//! Start at [`Entry::judge`].

use std::ops::Range;

use super::entry::{
    Cluster, Extended, Limits, Subclusters, check_external, decode_extended_l2, decode_l2, named,
    reserved_extended_bits, reserved_l2_bits,
};
use super::header::{ClusterBits, Header};
use crate::image::fault::EntryFault;

/// An entry as it is stored, in host byte order.
#[derive(Clone, Copy, Debug)]
pub(super) struct Entry {
    /// The descriptor: all of an entry without subclusters.
    pub(super) raw: u64,
    bitmap: Option<u64>,
}

/// The entries in `bytes`, which begin with one.
pub(super) fn entries(header: &Header, bytes: &[u8]) -> impl Iterator<Item = Entry> {
    let (words, _) = bytes.as_chunks::<8>();
    let extended = header.extended_l2;
    words.chunks_exact(if extended { 2 } else { 1 }).map(move |words| {
        let word = |index: usize| words.get(index).map(|&word| u64::from_be_bytes(word));
        Entry { raw: word(0).unwrap_or_default(), bitmap: word(1) }
    })
}

impl Entry {
    /// What this entry of the cluster at guest byte `start` says of its units; `visible_bytes` as
    /// in [`decode_l2`].
    ///
    /// # Errors
    /// The rule that is broken.
    pub(super) fn judge(
        self,
        start: u64,
        visible_bytes: u64,
        limits: &Limits<'_>,
    ) -> Result<UnitRuns, EntryFault> {
        if limits.data_len_bytes.is_some() {
            check_external(self.raw, start, self.bitmap.is_some())?;
        }
        let Some(bitmap) = self.bitmap else {
            return decode_l2(self.raw, visible_bytes, limits).map(|one| UnitRuns::One(1, one));
        };
        let judged = decode_extended_l2(self.raw, bitmap, visible_bytes, limits)?;
        Ok(match judged {
            Extended::Compressed(packed) => UnitRuns::One(32, Cluster::Compressed(packed)),
            Extended::Split(parts) => UnitRuns::Split(parts),
        })
    }

    /// The place that is named, and what it is said to be, whether or not it is read.
    pub(super) fn names(self, bits: ClusterBits) -> Option<(&'static str, u64)> {
        let extended = self.bitmap.map(|bitmap| bitmap & u64::from(u32::MAX) == 0);
        named(self.raw, bits, extended.unwrap_or_default())
    }

    /// True if nothing is stored, by the plainest entry there is.
    pub(super) fn is_empty(self) -> bool {
        self.raw == 0 && self.bitmap.unwrap_or_default() == 0
    }

    /// True if bits are set that must not be and change nothing.
    pub(super) fn is_odd(self) -> bool {
        let odd = match self.bitmap {
            Some(bitmap) => reserved_extended_bits(self.raw, bitmap),
            None => reserved_l2_bits(self.raw),
        };
        odd != 0
    }
}

/// The meaning of a cluster, unit by unit.
#[derive(Clone, Copy, Debug)]
pub(super) enum UnitRuns {
    /// One meaning for this many units: all of the cluster's.
    One(u64, Cluster),
    Split(Subclusters),
}

impl UnitRuns {
    /// Gives each run of units (counted from the cluster's first) and its meaning, in order.
    pub(super) fn each(self, mut each: impl FnMut(Range<u64>, Cluster)) {
        match self {
            Self::One(units, meaning) => each(0..units, meaning),
            Self::Split(parts) => {
                for (Range { start, end }, meaning) in parts.runs() {
                    each(start.into()..end.into(), meaning);
                }
            }
        }
    }
}
