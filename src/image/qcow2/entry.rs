//! L1 and L2 table entries.
//!
//! Why: every guest byte goes through one; a bad one must not become wrong bytes.
//! How: total functions from 64 bits to a meaning, judged against the file's [`Limits`].
//! Never: reads a file, or gives a range that is not inside the file and behind the metadata.
//! Start at [`decode_l2`]; entries with subclusters: [`decode_extended_l2`]. Format: qemu
//! `docs/interop/qcow2.rst`, "Cluster mapping" and "Extended L2 Entries".

use std::ops::Range;

use super::header::{ClusterBits, SUBCLUSTER_COUNT_BITS};
use super::places::L2Tables;
use crate::image::fault::EntryFault;
use crate::units::FileOffset;

const COPIED: u64 = 1 << 63;
const COMPRESSED: u64 = 1 << 62;
const READS_AS_ZERO: u64 = 1 << 0;
/// Bits 9 to 55: the offset in L1 entries and in entries of standard clusters.
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
const SECTOR_BYTES: u64 = 512;
/// Where the bitmap of an extended entry begins in it.
const BITMAP_AT: u64 = 8;
/// Subclusters of a cluster.
const SUBCLUSTERS: u32 = 1 << SUBCLUSTER_COUNT_BITS;

/// What the entries of one image are judged against.
#[derive(Clone, Copy, Debug)]
pub struct Limits<'a> {
    /// 2 or 3; only version 3 has the zero flag.
    pub version: u32,
    /// Cluster size.
    pub bits: ClusterBits,
    /// Length of the file.
    pub file_len_bytes: u64,
    /// The L1 table's place.
    pub l1: &'a Range<u64>,
    /// The places of all L2 tables.
    pub l2_tables: &'a L2Tables,
    /// Length of the external data file; `None`: data is in the file itself.
    pub data_len_bytes: Option<u64>,
}

/// What a guest reads from one cluster, or from a run of its subclusters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cluster {
    /// Stored as is, from this position on.
    Data(FileOffset),
    /// Zeroes, whatever is stored.
    Zero,
    /// Nothing is stored: what a backing file has there, zeroes if there is none.
    Unallocated,
    /// A deflate or zstd stream.
    Compressed(Packed),
}

/// Where a compressed cluster is stored. Its stream may end before the range does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Packed {
    /// Position of the stream's first byte; not aligned.
    pub at: FileOffset,
    /// Bytes to read: 1 to twice the cluster size.
    pub len_bytes: u64,
}

impl Packed {
    /// The range that the compressed entry `raw` names, not judged.
    ///
    /// With `x = 62 - (cluster_bits - 8)`, bits 0 to x-1 are the offset, bits x to 61 the number
    /// of sectors beyond the first.
    #[must_use]
    pub(super) fn of_entry(raw: u64, bits: ClusterBits) -> Self {
        let shift = 62 - (bits.get() - 8);
        let at = raw & ((1 << shift) - 1);
        let sectors = ((raw & (COMPRESSED - 1)) >> shift) + 1;
        let len_bytes = sectors * SECTOR_BYTES - at % SECTOR_BYTES;
        Self { at: FileOffset(at), len_bytes }
    }

    /// The part that is in a file of this length: the sector count may reach past the end.
    #[must_use]
    pub(super) fn clamp(self, file_len_bytes: u64) -> Self {
        let len_bytes = self.len_bytes.min(file_len_bytes.saturating_sub(self.at.0));
        Self { len_bytes, ..self }
    }
}

/// Decodes an L1 entry: the place of its L2 table, or `None` if there is none.
///
/// `raw` is in host byte order. Pure and total. Of `limits`, `l2_tables` is not looked at.
///
/// # Errors
/// The rule that is broken.
pub fn decode_l1(raw: u64, limits: &Limits<'_>) -> Result<Option<FileOffset>, EntryFault> {
    let offset = raw & OFFSET;
    if offset == 0 {
        return Ok(None);
    }
    check_cluster("L2 table offset", offset, limits.bits.size_bytes(), limits)?;
    Ok(Some(FileOffset(offset)))
}

/// Decodes an L2 entry without subclusters.
///
/// `raw` is in host byte order. `visible_bytes` is how much of the cluster the disk shows: less
/// than a cluster for the disk's last one, whose rest a writer may have left out of the file.
/// Pure and total: no I/O, no allocation, no panic for any `raw`.
///
/// # Errors
/// The rule that is broken.
pub fn decode_l2(raw: u64, visible_bytes: u64, limits: &Limits<'_>) -> Result<Cluster, EntryFault> {
    if raw & COMPRESSED != 0 {
        return decode_packed(raw, limits).map(Cluster::Compressed);
    }
    let offset = raw & OFFSET;
    if raw & READS_AS_ZERO != 0 {
        if limits.version < 3 {
            return Err(EntryFault::new("L2 entry", raw, "bit 0 clear in version 2"));
        }
        check_aligned("preallocated cluster offset", offset, limits.bits)?;
        return Ok(Cluster::Zero);
    }
    if !is_allocated(raw, limits) {
        return Ok(Cluster::Unallocated);
    }
    check_data("data cluster offset", offset, visible_bytes, limits)?;
    Ok(Cluster::Data(FileOffset(offset)))
}

/// True if a standard entry names a cluster. With an external data file, where the first cluster
/// is at offset 0, the copied flag says it.
fn is_allocated(raw: u64, limits: &Limits<'_>) -> bool {
    raw & OFFSET != 0 || (limits.data_len_bytes.is_some() && raw & COPIED != 0)
}

/// With an external data file each cluster has the place there that it has on the disk.
///
/// # Errors
/// `raw` is an entry of the cluster at guest byte `start` that names another place, or a stream.
pub(super) fn check_external(raw: u64, start: u64, extended: bool) -> Result<(), EntryFault> {
    let offset = raw & OFFSET;
    // The zero flag is none with subclusters.
    let flags = if extended { COPIED } else { COPIED | READS_AS_ZERO };
    if raw & COMPRESSED != 0 {
        let need = "no compressed cluster with an external data file";
        return Err(EntryFault::new("L2 entry", raw, need));
    }
    let is_named = offset != 0 || raw & flags == COPIED;
    if is_named && offset != start {
        let need = "the guest's own offset, as the data file is external";
        return Err(EntryFault::new("data cluster offset", offset, need));
    }
    Ok(())
}

/// A cluster of data, which is no L2 table either.
fn check_data(
    field: &'static str,
    offset: u64,
    len_bytes: u64,
    limits: &Limits<'_>,
) -> Result<(), EntryFault> {
    if let Some(data_len_bytes) = limits.data_len_bytes {
        check_aligned(field, offset, limits.bits)?;
        if offset > data_len_bytes || data_len_bytes - offset < len_bytes {
            return Err(EntryFault::new(field, offset, "a cluster inside the external data file"));
        }
        return Ok(());
    }
    check_cluster(field, offset, len_bytes, limits)?;
    if limits.l2_tables.contains(offset) {
        return Err(EntryFault::new(field, offset, "not an L2 table"));
    }
    Ok(())
}

/// What an extended L2 entry says of its cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Extended {
    /// All of the cluster is one stream.
    Compressed(Packed),
    /// Each of the 32 subclusters has its own state.
    Split(Subclusters),
}

/// The states of 32 subclusters: stored, zero, or neither.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Subclusters {
    /// Where the first subcluster is, if any is stored; the others follow, stored or not.
    at: FileOffset,
    /// Bit `n`: subcluster `n` is stored.
    stored: u32,
    /// Bit `n`: subcluster `n` is zero. Never together with `stored`.
    zero: u32,
    unit_bits: u32,
}

impl Subclusters {
    /// The runs of subclusters of one kind, in order: together 0 to 32.
    pub fn runs(self) -> impl Iterator<Item = (Range<u32>, Cluster)> {
        let mut next = 0;
        std::iter::from_fn(move || {
            (next < SUBCLUSTERS).then(|| {
                let start = next;
                let mask = self.mask_of(start);
                // A set bit of `mask` is a subcluster of the same kind; the run is at least 1 long.
                next += (mask >> start).trailing_ones().max(1);
                let at = FileOffset(self.at.0 + (u64::from(start) << self.unit_bits));
                let kind = match (self.stored >> start & 1, self.zero >> start & 1) {
                    (1, _) => Cluster::Data(at),
                    (_, 1) => Cluster::Zero,
                    _neither => Cluster::Unallocated,
                };
                (start..next, kind)
            })
        })
    }

    fn mask_of(self, index: u32) -> u32 {
        match (self.stored >> index & 1, self.zero >> index & 1) {
            (1, _) => self.stored,
            (_, 1) => self.zero,
            _neither => !(self.stored | self.zero),
        }
    }
}

/// Decodes an extended L2 entry: `raw` as without subclusters, and the bitmap of the subclusters.
///
/// Both are in host byte order; the bitmap's low half says what is stored, its high half what is
/// zero. Pure and total. A compressed entry has no subclusters: its bitmap is ignored, as by qemu.
///
/// # Errors
/// The rule that is broken, by any subcluster.
pub fn decode_extended_l2(
    raw: u64,
    bitmap: u64,
    visible_bytes: u64,
    limits: &Limits<'_>,
) -> Result<Extended, EntryFault> {
    if raw & COMPRESSED != 0 {
        return decode_packed(raw, limits).map(Extended::Compressed);
    }
    let half = |bits: u64| u32::try_from(bits & u64::from(u32::MAX)).unwrap_or(u32::MAX);
    let (stored, zero) = (half(bitmap), half(bitmap >> SUBCLUSTERS));
    let offset = raw & OFFSET;
    let unit_bits = limits.bits.get().saturating_sub(SUBCLUSTER_COUNT_BITS);
    if stored != 0 && !is_allocated(raw, limits) {
        let need = "no subcluster stored where no cluster is";
        return Err(EntryFault::new("subcluster bitmap", bitmap, need).behind(BITMAP_AT));
    }
    if stored & zero != 0 {
        let need = "no subcluster both stored and zero";
        return Err(EntryFault::new("subcluster bitmap", bitmap, need).behind(BITMAP_AT));
    }
    if stored == 0 {
        check_aligned("preallocated cluster offset", offset, limits.bits)?;
    } else {
        let end = u64::from(SUBCLUSTERS - stored.leading_zeros()) << unit_bits;
        check_data("data cluster offset", offset, end.min(visible_bytes), limits)?;
    }
    Ok(Extended::Split(Subclusters { at: FileOffset(offset), stored, zero, unit_bits }))
}

fn decode_packed(raw: u64, limits: &Limits<'_>) -> Result<Packed, EntryFault> {
    let field = "compressed cluster offset";
    let packed = Packed::of_entry(raw, limits.bits);
    let at = packed.at.0;
    if at < limits.bits.size_bytes() {
        return Err(EntryFault::new(field, at, "past the header's cluster"));
    }
    if at >= limits.file_len_bytes {
        return Err(EntryFault::new(field, at, "inside the file"));
    }
    // Only the first byte: the sector count is known to be too high in sound images.
    if limits.l1.contains(&at) || limits.l2_tables.contains(at) {
        return Err(EntryFault::new(field, at, "not in an L1 or L2 table"));
    }
    Ok(packed.clamp(limits.file_len_bytes))
}

fn check_aligned(field: &'static str, offset: u64, bits: ClusterBits) -> Result<(), EntryFault> {
    if offset & bits.offset_mask() != 0 {
        return Err(EntryFault::new(field, offset, "a multiple of the cluster size"));
    }
    Ok(())
}

/// A cluster of which the first `len_bytes` count: aligned, inside the file, behind the metadata.
fn check_cluster(
    field: &'static str,
    offset: u64,
    len_bytes: u64,
    limits: &Limits<'_>,
) -> Result<(), EntryFault> {
    check_aligned(field, offset, limits.bits)?;
    let cluster_bytes = limits.bits.size_bytes();
    if offset < cluster_bytes {
        return Err(EntryFault::new(field, offset, "past the header's cluster"));
    }
    if offset > limits.file_len_bytes || limits.file_len_bytes - offset < len_bytes {
        return Err(EntryFault::new(field, offset, "a cluster inside the file"));
    }
    if offset < limits.l1.end && limits.l1.start < offset + cluster_bytes {
        return Err(EntryFault::new(field, offset, "not in the L1 table"));
    }
    Ok(())
}

/// Bits of an L1 entry that must be 0 and change nothing; the copied flag is one where no table is.
#[must_use]
pub(super) fn reserved_l1_bits(raw: u64) -> u64 {
    match raw & OFFSET {
        0 => raw,
        _table => raw & !(OFFSET | COPIED),
    }
}

/// True if an entry that was judged and is zero, or compressed, names a place past the file's end:
/// nothing is read there, and no writer makes it.
#[must_use]
pub(super) fn names_what_is_missing(raw: u64, limits: &Limits<'_>) -> bool {
    let len_bytes = limits.file_len_bytes;
    if raw & COMPRESSED != 0 {
        let packed = Packed::of_entry(raw, limits.bits);
        return packed.at.0 + packed.len_bytes >= len_bytes + limits.bits.size_bytes();
    }
    // A stored one was judged, and external data has rules of its own.
    limits.data_len_bytes.is_none() && raw & OFFSET >= len_bytes
}

/// The place that an entry names, as a field, whatever is there. `is_empty`: a bitmap says that
/// nothing of it is stored.
#[must_use]
pub(super) fn named(raw: u64, bits: ClusterBits, is_empty: bool) -> Option<(&'static str, u64)> {
    if raw & COMPRESSED != 0 {
        return Some(("compressed cluster offset", Packed::of_entry(raw, bits).at.0));
    }
    let field = if is_empty || raw & READS_AS_ZERO != 0 {
        "preallocated cluster offset"
    } else {
        "data cluster offset"
    };
    Some((field, raw & OFFSET)).filter(|(_, offset)| *offset != 0)
}

/// Bits of an extended L2 entry that must be 0 and change nothing: the zero flag is one of them,
/// and so is all of a compressed entry's bitmap.
#[must_use]
pub(super) fn reserved_extended_bits(raw: u64, bitmap: u64) -> u64 {
    match raw & COMPRESSED {
        0 => raw & !(OFFSET | COPIED),
        _compressed => raw & COPIED | bitmap,
    }
}

/// Bits of an L2 entry that must be 0 and change nothing.
#[must_use]
pub(super) fn reserved_l2_bits(raw: u64) -> u64 {
    if raw & COMPRESSED != 0 { raw & COPIED } else { raw & !(OFFSET | COPIED | READS_AS_ZERO) }
}

#[cfg(test)]
#[path = "entry_tests.rs"]
mod tests;
