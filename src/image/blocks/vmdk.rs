//! VMDK: one file with a sparse extent and the descriptor in it.
//!
//! Why: what VMware, VirtualBox and OVF files have, plain (`monolithicSparse`) or with every grain
//! compressed (`streamOptimized`), whose header may be at the end of the file.
//! How: header, embedded descriptor, grain directory; the grain tables are read as they are needed.
//! The redundant directory is not looked at.
//! Never: opens what the descriptor names: a parent, a further extent, or a flat file is refused.
//! Start at [`parse`]. Format: VMware "Virtual Disk Format 5.0", "Hosted Sparse Extents".

use std::mem::offset_of;
use std::ops::Range;

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::image::Image;
use super::layout::{Entries, Layout, Spans, count_blocks};
use super::parts::{Parts, Pointer, Want};

/// The header as it is stored.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
struct RawHeader {
    magic: [u8; 4],
    version: U32,
    flags: U32,
    capacity: U64,
    grain_size: U64,
    descriptor_offset: U64,
    descriptor_size: U64,
    num_gtes_per_gt: U32,
    rgd_offset: U64,
    gd_offset: U64,
    overhead: U64,
    unclean_shutdown: u8,
    line_ends: [u8; 4],
    compress_algorithm: U16,
    padding: [u8; 433],
}

const _: () = assert!(size_of::<RawHeader>() == 512 && align_of::<RawHeader>() == 1);
const _: () = assert!(offset_of!(RawHeader, capacity) == 12);
const _: () = assert!(offset_of!(RawHeader, num_gtes_per_gt) == 44);
const _: () = assert!(offset_of!(RawHeader, gd_offset) == 56);
const _: () = assert!(offset_of!(RawHeader, compress_algorithm) == 77);

/// A sector that says what follows it.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
struct RawMarker {
    sectors: U64,
    size: U32,
    kind: U32,
    padding: [u8; 496],
}

const _: () = assert!(size_of::<RawMarker>() == 512 && offset_of!(RawMarker, kind) == 12);

const MAGIC: [u8; 4] = *b"KDMV";
const SECTOR: u64 = 512;
const GD_AT_END: u64 = u64::MAX;
const MARKER_END: u32 = 0;
const MARKER_FOOTER: u32 = 3;
const ENTRIES_BITS: u32 = 9;
const TABLE_BYTES: u64 = 4 << ENTRIES_BITS;

const FLAG_LINE_ENDS: u32 = 1;
const FLAG_ZERO_GRAINS: u32 = 1 << 2;
const FLAG_COMPRESSED: u32 = 1 << 16;
const FLAG_MARKERS: u32 = 1 << 17;
/// With bit 1, which says that there is a redundant directory.
const KNOWN_FLAGS: u32 = FLAG_LINE_ENDS | 2 | FLAG_ZERO_GRAINS | FLAG_COMPRESSED | FLAG_MARKERS;

/// What a file may begin with that belongs to VMDK and is not served.
const OTHERS: [(&[u8], &str); 3] = [
    (b"COWD", "KDMV: an ESX sparse extent is only a part of a disk"),
    (b"# Di", "KDMV: a descriptor alone only names files, which are not opened"),
    (&[0xbe, 0xba, 0xfe, 0xca], "KDMV: an SESparse extent is only a part of a disk"),
];

/// A header, and where it was found.
#[derive(Clone, Copy)]
struct Header {
    raw: RawHeader,
    at: u64,
}

impl Header {
    fn pointer(&self, field: &'static str, offset: usize, found: u64) -> Pointer {
        Pointer { field, at: self.at + offset as u64, found }
    }

    fn gd_offset(&self) -> Pointer {
        let found = self.raw.gd_offset.get();
        self.pointer("gdOffset", offset_of!(RawHeader, gd_offset), found)
    }

    /// Judges all numbers that need nothing else of the file; the size of a grain in bytes.
    fn check(&self, file_len_bytes: u64) -> Result<u64, Want> {
        let Self { raw, .. } = self;
        let [a, b, c, d] = raw.magic;
        let magic = u32::from_le_bytes([a, b, c, d]).into();
        let magic = self.pointer("magic", 0, magic);
        if let Some((_, need)) = OTHERS.iter().find(|(other, _)| *other == raw.magic) {
            return Err(magic.unsupported(need));
        }
        magic.must(raw.magic == MAGIC, "KDMV")?;
        let version = raw.version.get();
        let pointer = self.pointer("version", offset_of!(RawHeader, version), version.into());
        pointer.must((1..=3).contains(&version), "1, 2 or 3")?;
        let flags = raw.flags.get();
        let pointer = self.pointer("flags", offset_of!(RawHeader, flags), flags.into());
        if flags & !KNOWN_FLAGS != 0 {
            return Err(pointer.unsupported("bits 0, 1, 2, 16 and 17 at most"));
        }
        let compressed = flags & FLAG_COMPRESSED != 0;
        pointer.must(
            compressed == (flags & FLAG_MARKERS != 0),
            "bit 17 (markers) exactly with bit 16 (compressed)",
        )?;
        let algorithm = raw.compress_algorithm.get().into();
        self.pointer("compressAlgorithm", offset_of!(RawHeader, compress_algorithm), algorithm)
            .must(algorithm == u64::from(compressed), "1 if flag 16 is set, else 0")?;
        let ends = u32::from_le_bytes(raw.line_ends).into();
        self.pointer("singleEndLineChar", offset_of!(RawHeader, line_ends), ends).must(
            flags & FLAG_LINE_ENDS == 0 || raw.line_ends == *b"\n \r\n",
            "0a 20 0d 0a: line ends were changed on the way",
        )?;
        let sectors = raw.capacity.get();
        self.pointer("capacity", offset_of!(RawHeader, capacity), sectors)
            .must(sectors > 0, "at least 1 sector")?;
        let grain = raw.grain_size.get();
        self.pointer("grainSize", offset_of!(RawHeader, grain_size), grain).must(
            grain.is_power_of_two() && (8..=4096).contains(&grain),
            "a power of two of 8 to 4096 sectors",
        )?;
        let entries = raw.num_gtes_per_gt.get().into();
        self.pointer("numGTEsPerGT", offset_of!(RawHeader, num_gtes_per_gt), entries)
            .must(entries == 1 << ENTRIES_BITS, "512")?;
        let overhead = raw.overhead.get();
        self.pointer("overHead", offset_of!(RawHeader, overhead), overhead)
            .must(overhead <= file_len_bytes / SECTOR, "sectors inside the file")?;
        Ok(grain * SECTOR)
    }
}

/// Parses header, descriptor and grain directory.
pub(super) fn parse(parts: &Parts) -> Result<Image, Want> {
    let by = parts.by_length();
    by.must(by.found >= SECTOR, "at least 512 bytes")?;
    let front = Header { raw: parts.read(by, 0)?, at: 0 };
    let mut grain_bytes = front.check(parts.file_len_bytes)?;
    let header = if front.gd_offset().found == GD_AT_END {
        let footer = footer(parts)?;
        grain_bytes = footer.check(parts.file_len_bytes)?;
        footer.gd_offset().must(footer.gd_offset().found != GD_AT_END, "a sector of the file")?;
        footer
    } else {
        front
    };
    let descriptor = descriptor(parts, &front)?;

    let sectors = header.raw.capacity.get();
    let capacity = header.pointer("capacity", offset_of!(RawHeader, capacity), sectors);
    let size_bytes = sectors.checked_mul(SECTOR).ok_or_else(|| capacity.malformed("less"))?;
    let blocks = count_blocks(Pointer { found: size_bytes, ..capacity }, grain_bytes)?;
    let (tables, mut metadata) = directory(parts, &header, blocks, &descriptor)?;
    metadata.push(0..SECTOR);
    metadata.push(descriptor);
    if header.at != 0 {
        metadata.push(header.at - SECTOR..parts.file_len_bytes);
    }

    let flags = header.raw.flags.get();
    let compressed = flags & FLAG_COMPRESSED != 0;
    let unclean = "not closed by its writer; its own recovery may change what is in it";
    let layout = Layout {
        size_bytes,
        block_bits: grain_bytes.trailing_zeros(),
        file_len_bytes: parts.file_len_bytes,
        entries: Entries::Vmdk { compressed, zero_grains: flags & FLAG_ZERO_GRAINS != 0 },
        span_bits: ENTRIES_BITS,
        spans: Spans::Listed(tables),
        metadata: Layout::join(metadata),
    };
    let notes = if header.raw.unclean_shutdown == 0 { vec![] } else { vec![unclean] };
    Ok(Image { size_bytes, compressed, notes, layout: Some(layout) })
}

/// The header at the end of the file, between two markers.
fn footer(parts: &Parts) -> Result<Header, Want> {
    let by = parts.by_length();
    let need = "a footer at the end, as gdOffset says: the file may be cut short";
    by.must(by.found >= 4 * SECTOR && by.found.is_multiple_of(SECTOR), need)?;
    let at = by.found - 2 * SECTOR;
    for (at, kind) in [(at - SECTOR, MARKER_FOOTER), (at + SECTOR, MARKER_END)] {
        let marker: RawMarker = parts.read(by, at)?;
        let found = marker.kind.get();
        let place = at + offset_of!(RawMarker, kind) as u64;
        let pointer = Pointer { field: "marker type", at: place, found: found.into() };
        pointer.must(found == kind, need)?;
        let found = marker.size.get().into();
        let place = at + offset_of!(RawMarker, size) as u64;
        Pointer { field: "marker size", at: place, found }.must(found == 0, "0")?;
        if kind == MARKER_END {
            let found = marker.sectors.get();
            Pointer { field: "marker value", at, found }.must(found == 0, "0")?;
        }
    }
    Ok(Header { raw: parts.read(by, at)?, at })
}

/// The places of the grain tables (0 for none), and those of all tables.
fn directory(
    parts: &Parts,
    header: &Header,
    blocks: u64,
    descriptor: &Range<u64>,
) -> Result<(Vec<u64>, Vec<Range<u64>>), Want> {
    let by = header.gd_offset();
    let len_bytes = 4 * blocks.div_ceil(1 << ENTRIES_BITS);
    let at = by.found.checked_mul(SECTOR).ok_or_else(|| by.malformed("a sector of the file"))?;
    let bytes = parts.get(by, at, len_bytes)?;
    let directory = at..at + len_bytes;
    by.must(at >= SECTOR && !overlap(&directory, descriptor), "past header and descriptor")?;

    let (entries, _) = bytes.as_chunks();
    let pointer = |index: usize| Pointer {
        field: "grain directory entry",
        at: at + 4 * index as u64,
        found: u32::from_le_bytes(entries.get(index).copied().unwrap_or_default()).into(),
    };
    let (mut tables, mut stored) = (Vec::with_capacity(entries.len()), Vec::new());
    for index in 0..entries.len() {
        let by = pointer(index);
        let (start, first) = (by.found * SECTOR, (index as u64) << ENTRIES_BITS);
        tables.push(start);
        if start == 0 {
            continue;
        }
        // Of the last table a writer may leave out what the disk does not need.
        let needed = (4 * (blocks - first)).min(TABLE_BYTES);
        let end = start + TABLE_BYTES;
        by.must(start + needed <= parts.file_len_bytes, "a grain table inside the file")?;
        let clear = !overlap(&(start..end), &directory) && !overlap(&(start..end), descriptor);
        by.must(clear, "a grain table clear of descriptor and directory")?;
        stored.push((start..end, index));
    }
    stored.sort_unstable_by_key(|(range, index)| (range.start, *index));
    // One table for two spans would let a small file fill a map of any size.
    for pair in stored.windows(2) {
        if let [(first, _), (second, index)] = pair {
            pointer(*index).must(first.end <= second.start, "a grain table of its own")?;
        }
    }
    let metadata = stored.into_iter().map(|(range, _)| range).chain([directory]).collect();
    Ok((tables, metadata))
}

fn overlap(a: &Range<u64>, b: &Range<u64>) -> bool {
    a.start < b.end && b.start < a.end
}

/// Judges the embedded descriptor; where it is.
fn descriptor(parts: &Parts, header: &Header) -> Result<Range<u64>, Want> {
    let (offset, size) = (header.raw.descriptor_offset.get(), header.raw.descriptor_size.get());
    let by = header.pointer("descriptorOffset", offset_of!(RawHeader, descriptor_offset), offset);
    if offset == 0 {
        return Err(by.unsupported("a descriptor in the file: a part of a split disk is no disk"));
    }
    header
        .pointer("descriptorSize", offset_of!(RawHeader, descriptor_size), size)
        .must((1..=128).contains(&size), "1 to 128 sectors")?;
    let at = offset.checked_mul(SECTOR).ok_or_else(|| by.malformed("a sector of the file"))?;
    let bytes = parts.get(by, at, size * SECTOR)?;
    by.must(bytes.starts_with(b"# Disk DescriptorFile"), "where a descriptor begins")?;
    let text = bytes.split(|&byte| byte == 0).next().unwrap_or_default();
    judge_text(text, at)?;
    Ok(at..at + size * SECTOR)
}

/// The descriptor may name no file but the one that it is in.
fn judge_text(text: &[u8], text_at: u64) -> Result<(), Want> {
    let (mut at, mut extents) = (text_at, 0);
    for line in text.split(|&byte| byte == b'\n') {
        let pointer = |field, found| Pointer { field, at, found };
        let words = || line.split(u8::is_ascii_whitespace).filter(|word| !word.is_empty());
        let (key, value) = match line.iter().position(|&byte| byte == b'=') {
            Some(middle) => line.split_at(middle),
            None => (line, &[][..]),
        };
        let value = value.get(1..).unwrap_or_default().trim_ascii();
        match key.trim_ascii().to_ascii_lowercase().as_slice() {
            b"parentcid" if !value.eq_ignore_ascii_case(b"ffffffff") => {
                let found = std::str::from_utf8(value).ok();
                let found = found.and_then(|hex| u64::from_str_radix(hex, 16).ok()).unwrap_or(0);
                return Err(pointer("parentCID", found).unsupported("ffffffff: no parent"));
            }
            b"parentfilenamehint" => {
                let field = pointer("parentFileNameHint", value.len() as u64);
                return Err(field.unsupported("nothing: no parent"));
            }
            _another => {}
        }
        if matches!(words().next(), Some(b"RW" | b"RDONLY" | b"NOACCESS")) {
            extents += 1;
            if extents > 1 {
                return Err(pointer("extent", extents).unsupported("one extent, in this file"));
            }
            if words().nth(2) != Some(b"SPARSE") {
                return Err(pointer("extent", extents).unsupported("an extent of type SPARSE"));
            }
        }
        at += line.len() as u64 + 1;
    }
    let field = Pointer { field: "extent", at: text_at, found: extents };
    field.must(extents == 1, "one line that describes the extent in this file")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn judged(text: &str) -> Option<(&'static str, u64)> {
        match judge_text(text.as_bytes(), 512) {
            Ok(()) => None,
            Err(Want::Refused(fault)) => Some((fault.field, fault.at.0)),
            Err(Want::Bytes(_)) => Some(("bytes", 0)),
        }
    }

    #[test]
    fn a_descriptor_of_one_sparse_extent_is_taken_and_every_other_is_not() {
        let good = "# Disk DescriptorFile\nCID=1\nparentCID=ffffffff\nRW 8 SPARSE \"a=b.vmdk\"\n";
        assert_eq!(judged(good), None);
        assert_eq!(judged(&good.replace('\n', "\r\n")), None);
        for (from, to, field, at) in [
            ("ffffffff", "12345678", "parentCID", 22 + 6),
            ("CID=1", "parentFileNameHint=\"x\"", "parentFileNameHint", 22),
            ("SPARSE", "FLAT", "extent", 22 + 6 + 19),
            ("CID=1", "RW 8 SPARSE \"c\"", "extent", 22 + 16 + 19),
            ("RW 8", "8", "extent", 0),
        ] {
            assert_eq!(judged(&good.replacen(from, to, 1)), Some((field, 512 + at)), "{to}");
        }
    }
}
