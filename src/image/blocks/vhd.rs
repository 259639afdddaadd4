//! VHD: Virtual PC's and Hyper-V's older format, fixed and dynamic.
//!
//! Why: exports of Hyper-V and Azure, and old appliances.
//! How: a fixed image is the disk and a footer after it; a dynamic one begins with a copy of the
//! footer, which leads to a header and its table. Blocks have a bitmap before them; a sector that
//! the bitmap calls unwritten is served as it is stored, as qemu does.
//! Never: looks for a parent: a differencing image is refused.
//! Start at [`parse`]. Format: Microsoft "Virtual Hard Disk Image Format Specification" 1.0.

use std::mem::offset_of;

use zerocopy::big_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::image::Image;
use super::layout::{Entries, Layout, Spans, count_blocks};
use super::parts::{Parts, Pointer, Want};

/// The footer as it is stored, also at the start of a dynamic image.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
struct RawFooter {
    cookie: [u8; 8],
    features: U32,
    file_format_version: U32,
    data_offset: U64,
    time_stamp: U32,
    creator_application: [u8; 4],
    creator_version: U32,
    creator_host_os: U32,
    original_size: U64,
    current_size: U64,
    cylinders: U16,
    heads: u8,
    sectors_per_track: u8,
    disk_type: U32,
    checksum: U32,
    unique_id: [u8; 16],
    saved_state: u8,
    reserved: [u8; 427],
}

const _: () = assert!(size_of::<RawFooter>() == 512 && align_of::<RawFooter>() == 1);
const _: () = assert!(offset_of!(RawFooter, current_size) == 48);
const _: () = assert!(offset_of!(RawFooter, disk_type) == 60);
const _: () = assert!(offset_of!(RawFooter, saved_state) == 84);

/// The header of a dynamic image as it is stored.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
struct RawDynamic {
    cookie: [u8; 8],
    data_offset: U64,
    table_offset: U64,
    header_version: U32,
    max_table_entries: U32,
    block_size: U32,
    checksum: U32,
    /// Of the parent: IDs, name and locators.
    parent: [u8; 728],
    reserved: [u8; 256],
}

const _: () = assert!(size_of::<RawDynamic>() == 1024 && align_of::<RawDynamic>() == 1);
const _: () = assert!(offset_of!(RawDynamic, table_offset) == 16);
const _: () = assert!(offset_of!(RawDynamic, checksum) == 36);

const COOKIE: [u8; 8] = *b"conectix";
const SECTOR: u64 = 512;
const TYPE_FIXED: u32 = 2;
const TYPE_DYNAMIC: u32 = 3;
const TYPE_DIFFERENCING: u32 = 4;
/// The largest geometry that the footer can say; larger disks have it too.
const MAX_GEOMETRY: u64 = 65_535 * 16 * 255;
/// Who means `current_size`, where others (Virtual PC first of all) mean the geometry.
const BY_SIZE: [[u8; 4]; 6] = [*b"win ", *b"d2v ", *b"qem2", *b"tap\0", *b"CTXS", *b"wa\0\0"];

/// True if these are the last 512 bytes of a VHD.
pub(in crate::image) fn has_footer(last_bytes: &[u8]) -> bool {
    last_bytes.len() == size_of::<RawFooter>() && last_bytes.starts_with(&COOKIE)
}

/// The sum that these structures carry, with the four bytes from `skip` on left out.
fn checksum(bytes: &[u8], skip: usize) -> u32 {
    let counted = bytes.iter().enumerate().filter(|(at, _)| !(skip..skip + 4).contains(at));
    !counted.map(|(_, &byte)| u32::from(byte)).sum::<u32>()
}

/// A footer, and where it was found.
struct Footer {
    raw: RawFooter,
    at: u64,
}

impl Footer {
    fn pointer(&self, field: &'static str, offset: usize, found: u64) -> Pointer {
        Pointer { field, at: self.at + offset as u64, found }
    }

    /// Judges it; `need_type` is what it must be where it is.
    fn check(&self, need_type: u32) -> Result<(), Want> {
        let raw = &self.raw;
        let found = raw.checksum.get();
        self.pointer("footer checksum", offset_of!(RawFooter, checksum), found.into()).must(
            found == checksum(raw.as_bytes(), offset_of!(RawFooter, checksum)),
            "the sum of the footer",
        )?;
        let version = raw.file_format_version.get();
        self.pointer(
            "file format version",
            offset_of!(RawFooter, file_format_version),
            version.into(),
        )
        .must(version >> 16 == 1, "0x10000")?;
        let found = raw.disk_type.get();
        let disk_type = self.pointer("disk type", offset_of!(RawFooter, disk_type), found.into());
        if found == TYPE_DIFFERENCING {
            return Err(disk_type.unsupported("2 or 3: the image is the difference to a parent"));
        }
        let need = match need_type {
            TYPE_FIXED => "2 (fixed), as the file does not begin with a footer",
            _dynamic => "3 (dynamic), as the file begins with a footer",
        };
        disk_type.must(found == need_type, need)
    }

    /// Length of the disk: what its creator meant by it.
    fn size(&self) -> Pointer {
        let raw = &self.raw;
        let (heads, sectors) = (u64::from(raw.heads), u64::from(raw.sectors_per_track));
        let geometry = u64::from(raw.cylinders.get()) * heads * sectors;
        if BY_SIZE.contains(&raw.creator_application) || geometry == MAX_GEOMETRY {
            let found = raw.current_size.get() / SECTOR * SECTOR;
            self.pointer("current size", offset_of!(RawFooter, current_size), found)
        } else {
            let found = geometry * SECTOR;
            self.pointer("disk geometry", offset_of!(RawFooter, cylinders), found)
        }
    }

    fn notes(&self) -> Vec<&'static str> {
        let mut notes = Vec::new();
        if self.size().found != self.raw.current_size.get() {
            notes.push("the geometry, which counts for this creator, is not the current size");
        }
        if self.raw.saved_state != 0 {
            notes.push("the state of a machine was saved with it; what it had not written is lost");
        }
        notes
    }
}

/// Parses the footer, and the header of a dynamic image.
pub(super) fn parse(parts: &Parts) -> Result<Image, Want> {
    let by = parts.by_length();
    by.must(by.found >= SECTOR, "at least 512 bytes")?;
    let (front, end_at) = (parts.read::<RawFooter>(by, 0)?, by.found - SECTOR);
    let end: RawFooter = parts.read(by, end_at)?;
    if front.cookie == COOKIE {
        return dynamic(parts, &Footer { raw: front, at: 0 }, &end, end_at);
    }
    let [a, b, c, d, ..] = end.cookie;
    let found = u32::from_be_bytes([a, b, c, d]).into();
    let need = "\"conectix\", also at the end of a fixed image: it may be cut short";
    Pointer { field: "cookie", at: end_at, found }.must(end.cookie == COOKIE, need)?;
    let footer = Footer { raw: end, at: end_at };
    footer.check(TYPE_FIXED)?;
    let size = footer.size();
    count_blocks(size, 1 << 20)?;
    size.must(size.found <= end_at, "a disk inside the file")?;
    let size_bytes = size.found;
    Ok(Image { size_bytes, compressed: false, notes: footer.notes(), layout: None })
}

fn dynamic(parts: &Parts, footer: &Footer, end: &RawFooter, end_at: u64) -> Result<Image, Want> {
    footer.check(TYPE_DYNAMIC)?;
    let found = footer.raw.data_offset.get();
    let by = footer.pointer("data offset", offset_of!(RawFooter, data_offset), found);
    by.must((SECTOR..1 << 60).contains(&found), "a place behind the footer's copy")?;
    let header: RawDynamic = parts.read(by, found)?;
    let header_at = found;
    let pointer = |field, offset, found| Pointer { field, at: header_at + offset as u64, found };
    by.must(header.cookie == *b"cxsparse", "where \"cxsparse\" is")?;
    let found = header.checksum.get();
    pointer("header checksum", offset_of!(RawDynamic, checksum), found.into()).must(
        found == checksum(header.as_bytes(), offset_of!(RawDynamic, checksum)),
        "the sum of the header",
    )?;
    let version = header.header_version.get();
    pointer("header version", offset_of!(RawDynamic, header_version), version.into())
        .must(version >> 16 == 1, "0x10000")?;
    let block_bytes = u64::from(header.block_size.get());
    pointer("block size", offset_of!(RawDynamic, block_size), block_bytes)
        .must(block_bytes.is_power_of_two() && block_bytes >= SECTOR, "a power of two from 512")?;

    let size = footer.size();
    let blocks = count_blocks(size, block_bytes)?;
    let entries = header.max_table_entries.get().into();
    pointer("max table entries", offset_of!(RawDynamic, max_table_entries), entries)
        .must(entries >= blocks, "an entry for each block of the disk")?;
    let table_at = header.table_offset.get();
    let by = pointer("table offset", offset_of!(RawDynamic, table_offset), table_at);
    let table_end = table_at.checked_add(4 * entries).filter(|&end| end <= parts.file_len_bytes);
    let table = table_at..table_end.ok_or_else(|| by.malformed("a table inside the file"))?;
    let header_range = header_at..header_at + size_of::<RawDynamic>() as u64;
    let clear = table.end <= header_range.start || header_range.end <= table.start;
    by.must(table_at >= SECTOR && clear, "a table clear of footer and header")?;

    let mut notes = footer.notes();
    let mut metadata = vec![0..SECTOR, header_range, table];
    if end.cookie == COOKIE {
        metadata.push(end_at..parts.file_len_bytes);
    }
    if end.as_bytes() != footer.raw.as_bytes() {
        notes.push("the footer at the end is not like its copy at the start, which is used");
    }
    // One bit a sector, in whole sectors.
    let bitmap_bytes = (block_bytes / SECTOR / 8).next_multiple_of(SECTOR).max(SECTOR);
    let layout = Layout {
        size_bytes: size.found,
        block_bits: block_bytes.trailing_zeros(),
        file_len_bytes: parts.file_len_bytes,
        entries: Entries::Vhd { bitmap_bytes },
        span_bits: u32::BITS,
        spans: Spans::Every { first: table_at, step: 0 },
        metadata: Layout::join(metadata),
    };
    Ok(Image { size_bytes: size.found, compressed: false, notes, layout: Some(layout) })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn footer(creator: &[u8; 4], current: u64, cylinders: u16) -> Footer {
        let mut raw = RawFooter::read_from_bytes(&[0; 512]).unwrap();
        raw.creator_application = *creator;
        raw.current_size = current.into();
        (raw.cylinders, raw.heads, raw.sectors_per_track) = (cylinders.into(), 16, 255);
        Footer { raw, at: 0 }
    }

    #[test]
    fn virtual_pc_means_the_geometry_and_hyper_v_the_size() {
        let chs = 10 * 16 * 255 * 512;
        for creator in [b"vpc ", b"qemu", b"vbox"] {
            assert_eq!(footer(creator, 1 << 30, 10).size().found, chs);
        }
        for creator in [b"win ", b"d2v ", b"qem2", b"wa\0\0"] {
            assert_eq!(footer(creator, 1 << 30, 10).size().found, 1 << 30);
        }
        assert_eq!(footer(b"vpc ", 1 << 40, 65_535).size().found, 1 << 40);
    }

    #[test]
    fn a_checksum_leaves_itself_out() {
        assert_eq!(checksum(&[1, 2, 9, 9, 9, 9, 3], 2), !6);
    }
}
