//! The header: the numbers that everything else is checked against.
//!
//! Why: cluster size, disk size and the L1 table's place come from a stranger.
//! How: [`Header::parse`] applies every rule in qemu's order, then the limits of this reader.
//! Never: reads a file, or keeps a number that was not checked.
//! Start at [`Header::parse`]. Format: qemu `docs/interop/qcow2.rst`, "Header".

use std::fmt;
use std::ops::Range;

use super::bitmaps::BitmapDirectory;
use super::extension::{self, BackingFormat};
use super::raw::{RawHeader, RawHeaderV3, V2_LEN, V3_MIN_LEN};
use crate::image::fault::Fault;
use crate::units::{MIB, TIB};

const MAGIC: u32 = 0x5146_49fb;
const DIRTY: u64 = 1 << 0;
const CORRUPT: u64 = 1 << 1;
const EXTERNAL_DATA: u64 = 1 << 2;
const COMPRESSION_TYPE: u64 = 1 << 3;
const EXTENDED_L2: u64 = 1 << 4;
const KNOWN_INCOMPATIBLE: u64 = DIRTY | CORRUPT | EXTERNAL_DATA | COMPRESSION_TYPE | EXTENDED_L2;
const AUTOCLEAR_BITMAPS: u64 = 1 << 0;
const AUTOCLEAR_RAW_EXTERNAL: u64 = 1 << 1;
/// The longest name of a backing file.
const MAX_BACKING_NAME_BYTES: u64 = 1023;

/// Largest virtual size: what one L1 table of 32 MiB can map with 64 KiB clusters is far more.
const MAX_SIZE_BYTES: u64 = 16 * TIB;
const MAX_L1_BYTES: u64 = 32 * MIB;
const MAX_REFCOUNT_TABLE_BYTES: u64 = 8 * MIB;
const MAX_REFCOUNT_ORDER: u32 = 6;
const MAX_SNAPSHOTS: u32 = 65_536;
/// Bytes of a snapshot table's entry without its variable parts.
const SNAPSHOT_ENTRY_BYTES: u64 = 40;

/// How compressed clusters are compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Compression {
    /// A raw deflate stream.
    Zlib,
    /// Zstandard frames.
    Zstd,
}

impl fmt::Display for Compression {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Zlib => "zlib",
            Self::Zstd => "zstd",
        })
    }
}

/// log2 of the cluster size in bytes; 9..=21 by construction, so a shift by it cannot overflow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ClusterBits(u32);

impl ClusterBits {
    /// `bits` if it is one of the cluster sizes from 512 bytes to 2 MiB.
    #[must_use]
    pub fn new(bits: u32) -> Option<Self> {
        (9..=21).contains(&bits).then_some(Self(bits))
    }

    /// The logarithm itself.
    #[must_use]
    pub fn get(self) -> u32 {
        self.0
    }

    /// Bytes of a cluster.
    #[must_use]
    pub fn size_bytes(self) -> u64 {
        1 << self.0
    }

    /// Mask of the position inside a cluster.
    #[must_use]
    pub fn offset_mask(self) -> u64 {
        self.size_bytes() - 1
    }

    fn is_aligned(self, offset: u64) -> bool {
        offset & self.offset_mask() == 0
    }
}

/// log2 of the number of subclusters in a cluster, where an image has them.
pub(super) const SUBCLUSTER_COUNT_BITS: u32 = 5;
/// Subclusters are at least a sector.
const MIN_EXTENDED_CLUSTER_BITS: u32 = 14;

/// What an image may use beside its own file, because the caller has it and gives it. Nothing is
/// ever opened by a name from inside the image.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Given {
    /// A backing file.
    pub backing: bool,
    /// An external data file.
    pub data: bool,
}

/// A header whose every number was checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// 2 or 3.
    pub version: u32,
    /// Cluster size.
    pub cluster_bits: ClusterBits,
    /// Length of the disk: a multiple of 512, 512 bytes to 16 TiB.
    pub size_bytes: u64,
    /// The L1 table in the file, as declared; all of it is inside the file.
    pub l1: Range<u64>,
    /// Number of L1 entries that the disk needs; the table has at least as many.
    pub l1_entries: u64,
    /// How compressed clusters are compressed.
    pub compression: Compression,
    /// True if L2 entries are of 16 bytes, and each cluster has 32 subclusters.
    pub extended_l2: bool,
    /// Where the refcount table is said to be, which may be past the file's end: only writers use it.
    pub refcount_table: Range<u64>,
    /// True if unallocated clusters are those of a backing file, which was given.
    pub backing: bool,
    /// The format of the backing file, if the image says it.
    pub backing_format: Option<BackingFormat>,
    /// True if data clusters are in an external data file, which was given.
    pub external_data: bool,
    /// Where the snapshot table begins, if there are snapshots.
    pub snapshots_at: u64,
    /// Number of internal snapshots.
    pub snapshots: u32,
    /// The directory of the bitmaps, if there are any that are up to date.
    pub bitmaps: Option<BitmapDirectory>,
    /// Harmless oddities, in words.
    pub notes: Vec<&'static str>,
}

/// How many bytes [`Header::parse`] wants to see of a file that starts with `first_bytes`.
pub(super) fn wanted_len(first_bytes: &[u8]) -> usize {
    let bits = ClusterBits::new(RawHeader::read(first_bytes).cluster_bits.get());
    bits.map_or(0, |bits| usize::try_from(bits.size_bytes()).unwrap_or(0))
}

/// What only version 3 has; for version 2 what it implies.
struct Features {
    incompatible: u64,
    autoclear: u64,
    refcount_order: u32,
    header_len: u64,
    compression_type: u8,
}

impl Header {
    /// Checks the header and its extensions.
    ///
    /// `first_cluster` is the start of the file: one cluster, or less of a shorter file. What is
    /// not `given` is refused where the image needs it.
    ///
    /// # Errors
    /// The first field at fault.
    pub fn parse(first_cluster: &[u8], file_len_bytes: u64, given: Given) -> Result<Self, Fault> {
        let raw = RawHeader::read(first_cluster);
        let bits = check_identity(&raw, first_cluster.len())?;
        let features = Features::read(&raw, first_cluster, bits)?;
        let compression = features.check(bits, given)?;
        let extended_l2 = features.incompatible & EXTENDED_L2 != 0;
        let backing = check_other_files(&raw, bits, given)?;
        let size_bytes = check_size("size", 24, raw.size.get())?;
        let refcount_table = check_refcount_table(&raw, bits)?;
        check_snapshots(&raw, bits)?;
        let l2_bits = l2_bits(bits, extended_l2);
        let table = (raw.l1_table_offset.get(), raw.l1_size.get());
        // As qemu: the table must reach the size as it is stored, not rounded.
        let sizes = (size_bytes, raw.size.get());
        let (l1, l1_entries) = check_l1(table, (40, 36), bits, l2_bits, sizes, file_len_bytes)?;
        let within = |n: u64| usize::try_from(n).unwrap_or(usize::MAX).min(first_cluster.len());
        // Extensions end where the name of a backing file begins, also an empty name.
        let end = match raw.backing_file_offset.get() {
            0 => bits.size_bytes(),
            at => at,
        };
        let area = first_cluster.get(within(features.header_len)..within(end)).unwrap_or_default();
        let bitmaps = features.autoclear & AUTOCLEAR_BITMAPS != 0;
        let rules = extension::Rules { bits, given, bitmaps, file_len_bytes, size_bytes };
        let extensions = extension::read(area, features.header_len, rules)?;
        let mut notes = features.notes();
        if raw.size.get() != size_bytes {
            notes.push("the size is no multiple of 512; rounded down, as qemu does");
        }
        Ok(Self {
            version: raw.version.get(),
            cluster_bits: bits,
            size_bytes,
            l1,
            l1_entries,
            compression,
            extended_l2,
            refcount_table,
            backing,
            backing_format: extensions.backing_format,
            external_data: features.incompatible & EXTERNAL_DATA != 0,
            snapshots_at: raw.snapshots_offset.get(),
            snapshots: raw.nb_snapshots.get(),
            bitmaps: extensions.bitmaps,
            notes,
        })
    }

    /// How many bytes [`Header::parse`] wants to see of a file that starts with `first_bytes`: one
    /// cluster; 0 if the cluster size is none.
    #[must_use]
    pub fn wanted_len(first_bytes: &[u8]) -> usize {
        wanted_len(first_bytes)
    }

    /// The part of the L1 table that the disk needs.
    #[must_use]
    pub fn l1_needed(&self) -> Range<u64> {
        self.l1.start..self.l1.start + 8 * self.l1_entries
    }

    /// Number of guest clusters; the last one may reach past the disk's end.
    #[must_use]
    pub fn clusters(&self) -> u64 {
        self.size_bytes.div_ceil(self.cluster_bits.size_bytes())
    }

    /// log2 of the number of entries in an L2 table, which fills one cluster.
    #[must_use]
    pub fn l2_bits(&self) -> u32 {
        l2_bits(self.cluster_bits, self.extended_l2)
    }

    /// Bytes of an L2 entry: 8, or 16 with subclusters.
    #[must_use]
    pub fn l2_entry_bytes(&self) -> u64 {
        if self.extended_l2 { 16 } else { 8 }
    }

    /// log2 of the number of units in a cluster: 0, or 5 with subclusters.
    #[must_use]
    pub fn units_in_cluster_bits(&self) -> u32 {
        if self.extended_l2 { SUBCLUSTER_COUNT_BITS } else { 0 }
    }

    /// log2 of the bytes of a unit, the least that the tables tell apart: a cluster, or a
    /// subcluster where there are any. At least 9.
    #[must_use]
    pub fn unit_bits(&self) -> u32 {
        self.cluster_bits.get() - self.units_in_cluster_bits()
    }

    /// Number of guest units; the last one may reach past the disk's end.
    #[must_use]
    pub fn units(&self) -> u64 {
        self.size_bytes.div_ceil(1 << self.unit_bits())
    }
}

/// A table fills one cluster, with entries of 8 or 16 bytes.
fn l2_bits(bits: ClusterBits, extended: bool) -> u32 {
    bits.get() - 3 - u32::from(extended)
}

fn check_identity(raw: &RawHeader, len: usize) -> Result<ClusterBits, Fault> {
    let magic = raw.magic.get();
    if magic != MAGIC {
        return Err(Fault::malformed("magic", 0, magic.into(), "0x514649fb"));
    }
    let version = raw.version.get();
    let header_len = match version {
        2 => V2_LEN,
        3 => V3_MIN_LEN,
        _ => return Err(Fault::unsupported("version", 4, version.into(), "2 or 3")),
    };
    if len < header_len {
        return Err(Fault::malformed("file length", 0, len as u64, "at least the header"));
    }
    let found = raw.cluster_bits.get();
    ClusterBits::new(found)
        .ok_or_else(|| Fault::malformed("cluster_bits", 20, found.into(), "9 to 21"))
}

impl Features {
    fn read(raw: &RawHeader, first_cluster: &[u8], bits: ClusterBits) -> Result<Self, Fault> {
        if raw.version.get() == 2 {
            return Ok(Self {
                incompatible: 0,
                autoclear: 0,
                refcount_order: 4,
                header_len: V2_LEN as u64,
                compression_type: 0,
            });
        }
        let v3 = RawHeaderV3::read(first_cluster);
        let header_len = u64::from(v3.header_length.get());
        let min = V3_MIN_LEN as u64;
        if header_len < min || header_len > bits.size_bytes() || header_len % 8 != 0 {
            let need = "a multiple of 8 from 104 to the cluster size";
            return Err(Fault::malformed("header_length", 100, header_len, need));
        }
        Ok(Self {
            incompatible: v3.incompatible_features.get(),
            autoclear: v3.autoclear_features.get(),
            refcount_order: v3.refcount_order.get(),
            header_len,
            compression_type: if header_len > min { v3.compression_type } else { 0 },
        })
    }

    fn check(&self, bits: ClusterBits, given: Given) -> Result<Compression, Fault> {
        let refuse_bit = |bit: u64, need| {
            let found = self.incompatible & bit;
            Err(Fault::unsupported("incompatible_features", 72, found, need))
        };
        if self.incompatible & EXTERNAL_DATA != 0 && !given.data {
            return refuse_bit(
                EXTERNAL_DATA,
                "bit 2 clear, as no external data file was given (--data-file gives one)",
            );
        }
        if self.incompatible & !KNOWN_INCOMPATIBLE != 0 {
            return refuse_bit(!KNOWN_INCOMPATIBLE, "only bits 0 to 4");
        }
        if self.incompatible & EXTENDED_L2 != 0 && bits.get() < MIN_EXTENDED_CLUSTER_BITS {
            let need = "at least 14 with extended L2 entries";
            return Err(Fault::malformed("cluster_bits", 20, bits.get().into(), need));
        }
        if self.autoclear & AUTOCLEAR_RAW_EXTERNAL != 0 && !given.data {
            let need = "bit 1 clear (no raw external data file)";
            return Err(Fault::unsupported("autoclear_features", 88, self.autoclear, need));
        }
        if self.refcount_order > MAX_REFCOUNT_ORDER {
            let found = self.refcount_order.into();
            return Err(Fault::malformed("refcount_order", 96, found, "at most 6"));
        }
        let has_bit = self.incompatible & COMPRESSION_TYPE != 0;
        let found = self.compression_type.into();
        match (has_bit, self.compression_type) {
            (false, 0) => Ok(Compression::Zlib),
            (true, 1) => Ok(Compression::Zstd),
            (false, _) => Err(Fault::malformed(
                "compression_type",
                104,
                found,
                "0 while incompatible feature bit 3 is clear",
            )),
            (true, 0) => Err(Fault::malformed(
                "compression_type",
                104,
                found,
                "not 0 while incompatible feature bit 3 is set",
            )),
            (true, _) => Err(Fault::unsupported("compression_type", 104, found, "0 or 1")),
        }
    }

    fn notes(&self) -> Vec<&'static str> {
        let mut notes = Vec::new();
        if self.incompatible & DIRTY != 0 {
            notes.push("dirty bit set: refcounts may be wrong, data is not affected");
        }
        if self.incompatible & CORRUPT != 0 {
            notes.push("corrupt bit set: a writer found damaged metadata; run `qemu-img check`");
        }
        notes
    }
}

/// Whether there is a backing file. A name of no bytes is none, and its length says nothing while
/// its offset is 0.
fn check_other_files(raw: &RawHeader, bits: ClusterBits, given: Given) -> Result<bool, Fault> {
    let at = raw.backing_file_offset.get();
    let len_bytes = u64::from(raw.backing_file_size.get());
    let backing = at != 0 && len_bytes != 0;
    if backing && !given.backing {
        let need = "0, as no backing file was given (--base gives one)";
        return Err(Fault::unsupported("backing_file_offset", 8, at, need));
    }
    if at > bits.size_bytes() {
        return Err(Fault::malformed("backing_file_offset", 8, at, "in the header's cluster"));
    }
    if at != 0 && len_bytes > MAX_BACKING_NAME_BYTES.min(bits.size_bytes() - at) {
        let need = "at most 1023, inside the header's cluster";
        return Err(Fault::malformed("backing_file_size", 16, len_bytes, need));
    }
    if raw.crypt_method.get() != 0 {
        let found = raw.crypt_method.get().into();
        return Err(Fault::unsupported("crypt_method", 32, found, "0 (no encryption)"));
    }
    Ok(backing)
}

/// The disk's size in bytes, which is the field `field` at byte `at` of the file.
pub(super) fn check_size(field: &'static str, at: u64, found: u64) -> Result<u64, Fault> {
    let sectors = found & !511;
    if sectors == 0 {
        return Err(Fault::malformed(field, at, found, "at least 512"));
    }
    if sectors > MAX_SIZE_BYTES {
        return Err(Fault::malformed(field, at, found, "at most 16 TiB"));
    }
    Ok(sectors)
}

/// No read needs the refcounts; a table that no writer makes is refused all the same, as by qemu.
fn check_refcount_table(raw: &RawHeader, bits: ClusterBits) -> Result<Range<u64>, Fault> {
    let offset = raw.refcount_table_offset.get();
    let clusters = u64::from(raw.refcount_table_clusters.get());
    if clusters == 0 {
        return Err(Fault::malformed("refcount_table_clusters", 56, 0, "at least 1"));
    }
    if clusters > MAX_REFCOUNT_TABLE_BYTES >> bits.get() {
        let need = "a table of at most 8 MiB";
        return Err(Fault::malformed("refcount_table_clusters", 56, clusters, need));
    }
    check_offset("refcount_table_offset", 48, offset, MAX_REFCOUNT_TABLE_BYTES, bits)?;
    Ok(offset..offset + (clusters << bits.get()))
}

fn check_snapshots(raw: &RawHeader, bits: ClusterBits) -> Result<(), Fault> {
    let count = raw.nb_snapshots.get();
    if count > MAX_SNAPSHOTS {
        return Err(Fault::malformed("nb_snapshots", 60, count.into(), "at most 65536"));
    }
    let len_bytes = u64::from(count) * SNAPSHOT_ENTRY_BYTES;
    let offset = raw.snapshots_offset.get();
    check_offset("snapshots_offset", 64, offset, len_bytes, bits)?;
    if count > 0 && offset < bits.size_bytes() {
        let need = "past the header's cluster";
        return Err(Fault::malformed("snapshots_offset", 64, offset, need));
    }
    Ok(())
}

/// An L1 table and what the disk needs of it. `table` is its offset and its number of entries,
/// `places` where those two are in the file; `sizes` are the disk's size that is shown, and the one
/// that is stored.
pub(super) fn check_l1(
    table: (u64, u32),
    places: (u64, u64),
    bits: ClusterBits,
    l2_bits: u32,
    sizes: (u64, u64),
    file_len_bytes: u64,
) -> Result<(Range<u64>, u64), Fault> {
    let (offset, entries) = (table.0, u64::from(table.1));
    let len_bytes = entries * 8;
    let refuse_size = |need| Err(Fault::malformed("l1_size", places.1, entries, need));
    if len_bytes > MAX_L1_BYTES {
        return refuse_size("a table of at most 32 MiB");
    }
    let span_bytes = bits.size_bytes() << l2_bits;
    let (needed, wanted) = (sizes.0.div_ceil(span_bytes), sizes.1.div_ceil(span_bytes));
    if entries < wanted {
        return refuse_size("enough entries for the disk's size");
    }
    let refuse_place = |need| Err(Fault::malformed("l1_table_offset", places.0, offset, need));
    check_offset("l1_table_offset", places.0, offset, len_bytes, bits)?;
    if offset < bits.size_bytes() {
        return refuse_place("past the header's cluster");
    }
    if offset + len_bytes > file_len_bytes {
        return refuse_place("a table inside the file");
    }
    Ok((offset..offset + len_bytes, needed))
}

/// A table's offset is aligned, and its end is below 2^63.
fn check_offset(
    field: &'static str,
    at: u64,
    offset: u64,
    len_bytes: u64,
    bits: ClusterBits,
) -> Result<(), Fault> {
    if !bits.is_aligned(offset) {
        return Err(Fault::malformed(field, at, offset, "a multiple of the cluster size"));
    }
    if offset > (1 << 63) - 1 - len_bytes {
        return Err(Fault::malformed(field, at, offset, "an end below 2^63"));
    }
    Ok(())
}

#[cfg(test)]
#[path = "header_tests.rs"]
mod tests;
