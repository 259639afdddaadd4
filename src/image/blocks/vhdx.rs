//! VHDX: Hyper-V's format, fixed and dynamic.
//!
//! Why: exports of Hyper-V, and of tools for it.
//! How: the current one of two headers says whether a log is left; the region table leads to the
//! metadata and to the block allocation table, in which an entry for a sector bitmap follows the
//! entries of as many blocks as it would speak for. Fixed and dynamic images read alike.
//! Never: replays a log, looks for a parent, or reads past what it does not know: an unknown
//! region or item that is required is refused.
//! Start at [`parse`]. Format: MS-VHDX.

use std::mem::offset_of;
use std::ops::Range;

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::crc32c;
use super::image::Image;
use super::layout::{Entries, Layout, Spans, count_blocks};
use super::parts::{Parts, Pointer, Want};

/// One of the two headers as it is stored; zeroes follow up to 4 KiB, and count in its checksum.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
struct RawHeader {
    signature: [u8; 4],
    checksum: U32,
    sequence_number: U64,
    file_write_guid: [u8; 16],
    data_write_guid: [u8; 16],
    log_guid: [u8; 16],
    log_version: U16,
    version: U16,
    log_length: U32,
    log_offset: U64,
}

const _: () = assert!(size_of::<RawHeader>() == 80 && align_of::<RawHeader>() == 1);
const _: () = assert!(offset_of!(RawHeader, log_guid) == 48);
const _: () = assert!(offset_of!(RawHeader, log_offset) == 72);

/// What both tables begin with, and the entries that follow: the region table's checksum stands
/// where the metadata table has the second half of its signature.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
struct RawRegion {
    guid: [u8; 16],
    file_offset: U64,
    length: U32,
    required: U32,
}

const _: () = assert!(size_of::<RawRegion>() == 32 && offset_of!(RawRegion, length) == 24);

/// An entry of the metadata table.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
struct RawItem {
    guid: [u8; 16],
    offset: U32,
    length: U32,
    flags: U32,
    reserved: U32,
}

const _: () = assert!(size_of::<RawItem>() == 32 && offset_of!(RawItem, flags) == 24);

const MIB: u64 = 1 << 20;
const HEADERS_AT: [u64; 2] = [0x1_0000, 0x2_0000];
const HEADER_BYTES: u64 = 4096;
const REGIONS_AT: u64 = 0x3_0000;
const TABLE_BYTES: u64 = 0x1_0000;
const CHECKSUM_AT: usize = 4;
const REGION_ENTRIES_AT: u64 = 16;
const ITEM_ENTRIES_AT: u64 = 32;
const MAX_ENTRIES: u64 = 2047;
const ITEM_REQUIRED: u32 = 4;

const BAT: [u8; 16] = guid(0x2dc2_7766, 0xf623, 0x4200, 0x9d64_115e_9bfd_4a08);
const METADATA: [u8; 16] = guid(0x8b7c_a206, 0x4790, 0x4b9a, 0xb8fe_575f_050f_886e);
const FILE_PARAMETERS: [u8; 16] = guid(0xcaa1_6737, 0xfa36, 0x4d43, 0xb3b6_33f0_aa44_e76b);
const DISK_SIZE: [u8; 16] = guid(0x2fa5_4224, 0xcd1b, 0x4876, 0xb211_5dbe_d83b_f4b8);
const DISK_ID: [u8; 16] = guid(0xbeca_12ab, 0xb2e6, 0x4523, 0x93ef_c309_e000_c746);
const LOGICAL_SECTOR: [u8; 16] = guid(0x8141_bf1d, 0xa96f, 0x4709, 0xba47_f233_a8fa_ab5f);
const PHYSICAL_SECTOR: [u8; 16] = guid(0xcda3_48c7, 0x445d, 0x4471, 0x9cc9_e988_5251_c556);
const PARENT: [u8; 16] = guid(0xa8d3_5f2d, 0xb30b, 0x454d, 0xabf7_d3d8_4834_ab0c);

/// A GUID as it is stored: three numbers little-endian, then eight bytes in order.
const fn guid(a: u32, b: u16, c: u16, d: u64) -> [u8; 16] {
    let (a, b, c, d) = (a.to_le_bytes(), b.to_le_bytes(), c.to_le_bytes(), d.to_be_bytes());
    [a[0], a[1], a[2], a[3], b[0], b[1], c[0], c[1], d[0], d[1], d[2], d[3], d[4], d[5], d[6], d[7]]
}

/// The first eight bytes of an ID, to be shown.
fn shown(guid: &[u8; 16]) -> u64 {
    let [a, b, c, d, e, f, g, h, ..] = *guid;
    u64::from_be_bytes([a, b, c, d, e, f, g, h])
}

/// What the metadata says.
struct Items {
    block_bytes: u64,
    sector_bytes: u64,
    size: Pointer,
}

/// Parses headers, region table and metadata.
pub(super) fn parse(parts: &Parts) -> Result<Image, Want> {
    let by = parts.by_length();
    by.must(by.found >= MIB, "at least 1 MiB: the file is cut short")?;
    let signature = parts.get(by, 0, 8)?;
    Pointer { field: "file signature", at: 0, found: 0 }
        .must(signature == b"vhdxfile", "\"vhdxfile\"")?;
    let (header, mut notes) = current_header(parts)?;
    let log = log(&header, parts.file_len_bytes)?;
    let [table, metadata] = regions(parts, &log)?;
    let items = items(parts, &metadata, &mut notes)?;

    let blocks = count_blocks(items.size, items.block_bytes)?;
    let need = "a multiple of the logical sector size";
    items.size.must(items.size.found.is_multiple_of(items.sector_bytes), need)?;
    // A bitmap block of 1 MiB has a bit for each of 2^23 sectors.
    let in_span = (items.sector_bytes << 23) / items.block_bytes;
    let entries = blocks + (blocks - 1) / in_span;
    let (by, table) = table;
    by.must(8 * entries <= table.end - table.start, "a table with an entry for each block")?;
    let layout = Layout {
        size_bytes: items.size.found,
        block_bits: items.block_bytes.trailing_zeros(),
        file_len_bytes: parts.file_len_bytes,
        entries: Entries::Vhdx,
        span_bits: in_span.trailing_zeros(),
        spans: Spans::Every { first: table.start, step: 8 * (in_span + 1) },
        metadata: Layout::join(vec![0..MIB, log, table, metadata.1]),
    };
    Ok(Image { size_bytes: items.size.found, compressed: false, notes, layout: Some(layout) })
}

/// The sound header with the higher sequence number, and its place.
fn current_header(parts: &Parts) -> Result<((RawHeader, u64), Vec<&'static str>), Want> {
    let by = parts.by_length();
    let mut sound: Vec<(RawHeader, u64)> = Vec::new();
    let mut first_fault = None;
    for at in HEADERS_AT {
        let raw: RawHeader = parts.read(by, at)?;
        let bytes = parts.get(by, at, HEADER_BYTES)?;
        let found = raw.checksum.get();
        let checksum =
            Pointer { field: "header checksum", at: at + CHECKSUM_AT as u64, found: found.into() };
        let version = raw.version.get();
        let place = at + offset_of!(RawHeader, version) as u64;
        let judged = checksum
            .must(
                raw.signature == *b"head" && found == crc32c::of_zeroed(bytes, CHECKSUM_AT),
                "the CRC-32C of a header, in one of two places",
            )
            .and_then(|()| {
                let version = Pointer { field: "header version", at: place, found: version.into() };
                version.must(version.found == 1, "1")
            });
        match judged {
            Ok(()) => sound.push((raw, at)),
            Err(fault) => first_fault = first_fault.or(Some(fault)),
        }
    }
    let number = |(raw, _): &(RawHeader, u64)| raw.sequence_number.get();
    if let [one, two] = &sound[..] {
        let (a, b) = (number(one), number(two));
        let place = two.1 + offset_of!(RawHeader, sequence_number) as u64;
        let field = Pointer { field: "sequence number", at: place, found: b };
        field.must(a != b || one.0.as_bytes() == two.0.as_bytes(), "another than in the first")?;
    }
    let notes = match sound.len() {
        1 => vec!["one of the two headers is damaged; the other one is used"],
        _both_or_none => vec![],
    };
    match (sound.into_iter().max_by_key(number), first_fault) {
        (Some(current), _) => Ok((current, notes)),
        (None, Some(fault)) => Err(fault),
        (None, None) => Err(by.malformed("a header")),
    }
}

/// The place of the log, which must be empty.
fn log((header, at): &(RawHeader, u64), file_len_bytes: u64) -> Result<Range<u64>, Want> {
    let pointer = |field, offset, found| Pointer { field, at: at + offset as u64, found };
    let guid = pointer("log GUID", offset_of!(RawHeader, log_guid), shown(&header.log_guid));
    if header.log_guid != [0; 16] {
        let need = "zero: a log is left that must be replayed first, by opening it for writing";
        return Err(guid.unsupported(need));
    }
    let version = header.log_version.get().into();
    pointer("log version", offset_of!(RawHeader, log_version), version).must(version == 0, "0")?;
    let (start, len_bytes) = (header.log_offset.get(), u64::from(header.log_length.get()));
    let by = pointer("log offset", offset_of!(RawHeader, log_offset), start);
    if len_bytes == 0 {
        return Ok(0..0);
    }
    let end = start.checked_add(len_bytes).filter(|&end| end <= file_len_bytes);
    let fits = start >= MIB && start.is_multiple_of(MIB) && len_bytes.is_multiple_of(MIB);
    match end {
        Some(end) if fits => Ok(start..end),
        Some(_) | None => Err(by.malformed("a log of whole MiB, inside the file")),
    }
}

/// A range of the file, and the field that says it.
type Region = (Pointer, Range<u64>);

/// The places of the block allocation table and of the metadata.
fn regions(parts: &Parts, log: &Range<u64>) -> Result<[Region; 2], Want> {
    let bytes = parts.get(parts.by_length(), REGIONS_AT, TABLE_BYTES)?;
    let found: U32 = parts.read(parts.by_length(), REGIONS_AT + CHECKSUM_AT as u64)?;
    let place = REGIONS_AT + CHECKSUM_AT as u64;
    Pointer { field: "region table checksum", at: place, found: found.get().into() }.must(
        bytes.starts_with(b"regi") && found.get() == crc32c::of_zeroed(bytes, CHECKSUM_AT),
        "the CRC-32C of the region table",
    )?;
    let count: U32 = parts.read(parts.by_length(), REGIONS_AT + 8)?;
    let count = Pointer {
        field: "region table entry count",
        at: REGIONS_AT + 8,
        found: count.get().into(),
    };
    count.must(count.found <= MAX_ENTRIES, "at most 2047")?;
    let (mut table, mut metadata, mut taken) = (None, None, vec![log.clone()]);
    for n in 0..count.found {
        let at = REGIONS_AT + REGION_ENTRIES_AT + 32 * n;
        let raw: RawRegion = parts.read(count, at)?;
        let by = Pointer { field: "region", at, found: shown(&raw.guid) };
        let slot = match raw.guid {
            BAT => &mut table,
            METADATA => &mut metadata,
            _another if raw.required.get() & 1 == 1 => {
                return Err(by.unsupported("a region that is known, as it is required"));
            }
            _another => continue,
        };
        let (start, len_bytes) = (raw.file_offset.get(), u64::from(raw.length.get()));
        let by = Pointer { field: "region offset", at: at + 16, found: start };
        let end = start.checked_add(len_bytes).filter(|&end| end <= parts.file_len_bytes);
        let fits = start >= MIB && start.is_multiple_of(MIB) && len_bytes.is_multiple_of(MIB);
        let range = match end {
            Some(end) if fits && len_bytes > 0 => start..end,
            Some(_) | None => return Err(by.malformed("a region of whole MiB, inside the file")),
        };
        let apart = taken.iter().all(|other| range.end <= other.start || other.end <= range.start);
        by.must(apart && slot.is_none(), "one region, apart from log and other regions")?;
        taken.push(range.clone());
        *slot = Some((by, range));
    }
    match (table, metadata) {
        (Some(table), Some(metadata)) => Ok([table, metadata]),
        _one_is_missing => {
            Err(count.malformed("regions for the metadata and the block allocation table"))
        }
    }
}

/// Reads the metadata table and the items that count.
fn items(
    parts: &Parts,
    (by, range): &Region,
    notes: &mut Vec<&'static str>,
) -> Result<Items, Want> {
    let by = *by;
    by.must(range.end - range.start >= TABLE_BYTES, "a region of at least 64 KiB")?;
    let table = parts.get(by, range.start, TABLE_BYTES)?;
    by.must(table.starts_with(b"metadata"), "where \"metadata\" is")?;
    let count: U16 = parts.read(by, range.start + 10)?;
    let count =
        Pointer { field: "metadata entry count", at: range.start + 10, found: count.get().into() };
    count.must(count.found <= MAX_ENTRIES, "at most 2047")?;
    let (mut parameters, mut size, mut sector) = (None, None, None);
    for n in 0..count.found {
        let at = range.start + ITEM_ENTRIES_AT + 32 * n;
        let raw: RawItem = parts.read(count, at)?;
        let found = raw.offset.get().into();
        let by = Pointer { field: "metadata item offset", at: at + 16, found };
        let start = range.start + found;
        let inside = found >= TABLE_BYTES && start + 8 <= range.end;
        match raw.guid {
            FILE_PARAMETERS | DISK_SIZE | LOGICAL_SECTOR if !inside => {
                return Err(by.malformed("an item in the region, past the table"));
            }
            FILE_PARAMETERS => parameters = Some((start, parts.read::<[U32; 2]>(by, start)?)),
            DISK_SIZE => size = Some((start, parts.read::<U64>(by, start)?)),
            LOGICAL_SECTOR => sector = Some((start, parts.read::<U32>(by, start)?)),
            DISK_ID | PHYSICAL_SECTOR => {}
            PARENT => notes.push("a parent locator, which counts for nothing"),
            _another if raw.flags.get() & ITEM_REQUIRED != 0 => {
                let by = Pointer { field: "metadata item", at, found: shown(&raw.guid) };
                return Err(by.unsupported("an item that is known, as it is required"));
            }
            _another => {}
        }
    }
    let (Some((at, [block, flags])), Some((size_at, size)), Some((sector_at, sector))) =
        (parameters, size, sector)
    else {
        return Err(count.malformed("items for block size, disk size and logical sector size"));
    };
    let by = Pointer { field: "file parameters", at: at + 4, found: flags.get().into() };
    if flags.get() & 2 != 0 {
        return Err(by.unsupported("bit 1 clear: the image is the difference to a parent"));
    }
    let block_bytes = u64::from(block.get());
    let fits = block_bytes.is_power_of_two() && (MIB..=256 * MIB).contains(&block_bytes);
    let by = Pointer { field: "block size", at, found: block_bytes };
    by.must(fits, "a power of two of 1 to 256 MiB")?;
    let sector_bytes = u64::from(sector.get());
    let by = Pointer { field: "logical sector size", at: sector_at, found: sector_bytes };
    by.must(matches!(sector_bytes, 512 | 4096), "512 or 4096")?;
    let size = Pointer { field: "virtual disk size", at: size_at, found: size.get() };
    Ok(Items { block_bytes, sector_bytes, size })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guid_is_stored_with_its_numbers_turned() {
        assert_eq!(BAT[..8], [0x66, 0x77, 0xc2, 0x2d, 0x23, 0xf6, 0x00, 0x42]);
        assert_eq!(BAT[8..], [0x9d, 0x64, 0x11, 0x5e, 0x9b, 0xfd, 0x4a, 0x08]);
        assert_eq!(shown(&BAT), 0x6677_c22d_23f6_0042);
    }
}
