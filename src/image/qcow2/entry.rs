//! L1 and L2 table entries.
//!
//! Why: every guest byte goes through one; a bad one must not become wrong bytes.
//! How: total functions from 64 bits to a meaning, judged against the file's [`Limits`].
//! Never: reads a file, or gives a range that is not inside the file and behind the metadata.
//! Start at [`decode_l2`]. Format: qemu `docs/interop/qcow2.rst`, "Cluster mapping".

use std::ops::Range;

use super::fault::EntryFault;
use super::header::ClusterBits;
use crate::units::FileOffset;

const COPIED: u64 = 1 << 63;
const COMPRESSED: u64 = 1 << 62;
const READS_AS_ZERO: u64 = 1 << 0;
/// Bits 9 to 55: the offset in L1 entries and in entries of standard clusters.
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
const SECTOR_BYTES: u64 = 512;

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
    /// The places of all L2 tables, ascending.
    pub l2_tables: &'a [u64],
}

/// What a guest reads from one cluster, without a backing file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cluster {
    /// Stored as is, at a cluster-aligned position.
    Data(FileOffset),
    /// Zeroes, whatever is stored.
    Zero,
    /// Nothing is stored: zeroes too, as there is no backing file.
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
    if offset == 0 {
        return Ok(Cluster::Unallocated);
    }
    check_cluster("data cluster offset", offset, visible_bytes, limits)?;
    if limits.l2_tables.binary_search(&offset).is_ok() {
        return Err(EntryFault::new("data cluster offset", offset, "not an L2 table"));
    }
    Ok(Cluster::Data(FileOffset(offset)))
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
    let cluster = at & !limits.bits.offset_mask();
    if limits.l1.contains(&at) || limits.l2_tables.binary_search(&cluster).is_ok() {
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

/// Bits of an L1 entry that must be 0 and change nothing.
#[must_use]
pub(super) fn reserved_l1_bits(raw: u64) -> u64 {
    raw & !(OFFSET | COPIED)
}

/// Bits of an L2 entry that must be 0 and change nothing.
#[must_use]
pub(super) fn reserved_l2_bits(raw: u64) -> u64 {
    if raw & COMPRESSED != 0 { raw & COPIED } else { raw & !(OFFSET | COPIED | READS_AS_ZERO) }
}

#[cfg(test)]
#[path = "entry_tests.rs"]
mod tests;
