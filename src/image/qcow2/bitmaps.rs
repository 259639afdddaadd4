//! Bitmaps: whether directory and tables are such that qemu opens the image.
//!
//! Why: bitmaps are nothing to a reader, and writers keep their backups by them: an image that qemu
//! does not open for its bitmaps must not be taken.
//! How: [`Bitmaps`] says which bytes of the file it wants next, and judges them as they come: the
//! directory, then all tables in the order of the file. What qemu does not look at when it opens is a
//! note.
//! Never: reads a file, keeps a name, or looks at the bits that tables name.
//! Start at [`Bitmaps::wanted`]. Format: qemu `docs/interop/qcow2.rst`, "Bitmaps".
//!
//! What qemu 7.2 was seen to do (`qemu-img convert`; `info` and `check` begin in the same way):
//!
//! | in the image | qemu |
//! |---|---|
//! | entries more or fewer than counted, or not ending at the directory's end | refused |
//! | extra data of an entry | refused |
//! | table of no entries, of more than 512 MiB of bits, at 0, not aligned | refused |
//! | reserved flags, type but 1, granularity but 2^9 to 2^31, name of more than 1023 bytes | refused |
//! | name that an earlier bitmap has, up to its first zero byte | refused; not if marked in use |
//! | table that is longer or shorter than its disk needs | refused; not if marked in use |
//! | table entry with reserved bits, or not aligned | refused; not if marked in use |
//! | empty name, name that is no text, padding of any bytes | opened, `check` is silent |
//! | cluster of bits past the file's end | opened, `check` finds an error |
//! | table past the file's end | opened, as zeroes; here refused, as all tables are |
//! | any of this while autoclear bit 0 is clear | opened |

use std::collections::{HashSet, VecDeque};
use std::ffi::CStr;
use std::ops::Range;

use xxhash_rust::xxh3::xxh3_128;
use zerocopy::FromBytes;

use super::header::{ClusterBits, Header};
use super::raw::RawBitmapEntry;
use super::upkeep::Use;
use crate::image::fault::Fault;
use crate::units::MIB;

/// Bytes that are read at once: a multiple of a table entry.
const PART_BYTES: u64 = MIB;
/// A gap between tables that is rather read than asked around: a small one is mostly a cluster.
const BRIDGE_BYTES: u64 = 4096;
/// Most that the bits of a bitmap may take, in whole clusters.
const MAX_BITS_BYTES: u64 = 512 * MIB;
const MAX_NAME_BYTES: u16 = 1023;
const GRANULARITY_BITS: std::ops::RangeInclusive<u8> = 9..=31;
/// Most that all tables may take which are read. Thousands of entries could name one table, and a
/// small file would be read for minutes. The largest disk's bitmap has a table of 2 MiB.
const MAX_TABLES_BYTES: u64 = 16 * MIB;

const TYPE_DIRTY_TRACKING: u8 = 1;
const FLAG_IN_USE: u32 = 1 << 0;
const KNOWN_FLAGS: u32 = FLAG_IN_USE | 1 << 1;

const ENTRY_RESERVED: u64 = 0xff00_0000_0000_01fe;
const ENTRY_OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
const ENTRY_ALL_ONES: u64 = 1 << 0;

const PAST_END: &str = "a bitmap has bits past the file's end; run `qemu-img check`";
const DAMAGED: &str =
    "a bitmap that is marked in use has a damaged table; qemu does not look at it";
const TWICE: &str = "bitmaps have one name; of the one that is marked in use qemu takes no notice";
const NOT_READ: &str =
    "bitmaps that are marked in use have tables of more than 16 MiB; not looked at";

/// Where the directory of the bitmaps is, and how many there are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BitmapDirectory {
    pub(super) at: u64,
    pub(super) len_bytes: u64,
    pub(super) count: u32,
    /// Where the extension is that says so.
    pub(super) extension_at: u64,
    /// Length of the disk as it is now, which bitmaps are of.
    pub(super) size_bytes: u64,
}

impl BitmapDirectory {
    /// Number of bitmaps.
    #[must_use]
    pub fn count(&self) -> u32 {
        self.count
    }

    /// The directory itself, and the field that says where it is.
    pub(super) fn named(&self) -> Named {
        Named { by: Use::Directory, at: self.extension_at + 24, place: self.at..self.end() }
    }

    fn end(&self) -> u64 {
        self.at.saturating_add(self.len_bytes)
    }

    fn wrong_count(&self) -> Fault {
        let need = "the number of entries in the bitmap directory";
        Fault::malformed("bitmaps count", self.extension_at + 8, self.count.into(), need)
    }
}

/// A part of the file that a field of a bitmap names; it is inside the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Named {
    pub(super) by: Use,
    /// Where the field is.
    pub(super) at: u64,
    pub(super) place: Range<u64>,
}

/// What is left to read of a bitmap's table.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Table {
    rest: Range<u64>,
    in_use: bool,
}

/// The check of all bitmaps of an image.
#[derive(Debug)]
pub struct Bitmaps {
    bits: ClusterBits,
    size_bytes: u64,
    file_len_bytes: u64,
    directory: Option<BitmapDirectory>,
    /// The first byte of the directory that was not taken yet.
    next: u64,
    /// The beginning of an entry whose end is still to come.
    begun: Vec<u8>,
    found: u32,
    /// Hashes of names: at their full length all names would be 64 MiB. Whoever makes two of them
    /// alike has made an image that is refused.
    names: HashSet<u128>,
    /// In the order of the file, once the directory was seen.
    tables: VecDeque<Table>,
    /// Bytes of tables that qemu reads, and of those that are marked in use.
    tables_bytes: (u64, u64),
    notes: Vec<&'static str>,
}

impl Bitmaps {
    /// Of the image with this header: bitmaps are of the disk as it is now, no snapshot has any.
    #[must_use]
    pub fn of(header: &Header, file_len_bytes: u64) -> Self {
        Self::new(header.cluster_bits, file_len_bytes, header.bitmaps)
    }

    /// Wants nothing.
    pub(super) fn none(bits: ClusterBits) -> Self {
        Self::new(bits, 0, None)
    }

    fn new(bits: ClusterBits, file_len_bytes: u64, directory: Option<BitmapDirectory>) -> Self {
        Self {
            bits,
            size_bytes: directory.map_or(0, |directory| directory.size_bytes),
            file_len_bytes,
            directory,
            next: directory.map_or(0, |directory| directory.at),
            begun: Vec::new(),
            found: 0,
            names: HashSet::new(),
            tables: VecDeque::new(),
            tables_bytes: (0, 0),
            notes: Vec::new(),
        }
    }

    /// The bytes of the file that are wanted next: at most 1 MiB, inside the file; `None` if all
    /// was seen.
    #[must_use]
    pub fn wanted(&self) -> Option<Range<u64>> {
        let Range { start, end } = match self.directory {
            Some(directory) if self.next < directory.end() => self.next..directory.end(),
            Some(_) | None => self.wanted_tables()?,
        };
        Some(start..end.min(start.saturating_add(PART_BYTES)))
    }

    /// What is left of the first table, and of those that lie close behind it.
    fn wanted_tables(&self) -> Option<Range<u64>> {
        let Range { start, mut end } = self.tables.front()?.rest;
        for Table { rest, .. } in &self.tables {
            if rest.start > end + BRIDGE_BYTES || end - start >= PART_BYTES {
                break;
            }
            end = end.max(rest.end);
        }
        Some(start..end)
    }

    /// Judges the bytes of [`wanted`](Self::wanted).
    ///
    /// # Errors
    /// What qemu does not open, or what would take too long to read.
    pub fn take(&mut self, bytes: &[u8]) -> Result<(), Fault> {
        self.take_named(bytes, &mut |_| {})
    }

    /// As [`take`](Self::take); gives each table, and each cluster of bits, to `each`.
    pub(super) fn take_named(
        &mut self,
        bytes: &[u8],
        each: &mut dyn FnMut(Named),
    ) -> Result<(), Fault> {
        match self.directory {
            Some(directory) if self.next < directory.end() => {
                self.take_directory(&directory, bytes, each)
            }
            Some(_) | None => self.take_tables(bytes, each),
        }
    }

    /// What is odd, in words.
    #[must_use]
    pub fn notes(&self) -> &[&'static str] {
        &self.notes
    }

    fn note(&mut self, text: &'static str) {
        if !self.notes.contains(&text) {
            self.notes.push(text);
        }
    }

    fn take_directory(
        &mut self,
        directory: &BitmapDirectory,
        bytes: &[u8],
        each: &mut dyn FnMut(Named),
    ) -> Result<(), Fault> {
        let mut begun = std::mem::take(&mut self.begun);
        let mut at = self.next - begun.len() as u64;
        begun.extend(bytes);
        self.next += bytes.len() as u64;
        let mut rest = &begun[..];
        while at < directory.end() {
            let left = directory.end() - at;
            if left < size_of::<RawBitmapEntry>() as u64 {
                let (field, found) = ("bitmaps directory size", directory.len_bytes);
                let field_at = directory.extension_at + 16;
                return Err(Fault::malformed(field, field_at, found, "that of its entries"));
            }
            let Ok((raw, behind)) = RawBitmapEntry::read_from_prefix(rest) else { break };
            if self.found == directory.count {
                return Err(directory.wrong_count());
            }
            self.check_entry(&raw, at)?;
            let name_len = usize::from(raw.name_size.get());
            let len = (size_of::<RawBitmapEntry>() + name_len).next_multiple_of(8);
            if len as u64 > left {
                let need = "an entry inside the bitmap directory";
                return Err(Fault::malformed("name_size", at + 18, name_len as u64, need));
            }
            let (Some(name), Some(next)) = (behind.get(..name_len), rest.get(len..)) else { break };
            self.add(&raw, name, at, each)?;
            at += len as u64;
            rest = next;
        }
        self.begun = rest.to_vec();
        if at == directory.end() && self.found != directory.count {
            return Err(directory.wrong_count());
        }
        if self.next == directory.end() {
            let tables = self.tables.make_contiguous();
            tables.sort_unstable_by_key(|table| (table.rest.start, table.rest.end, table.in_use));
            // Bitmaps that share one: what it says is the same for all of them.
            let mut last = None;
            self.tables.retain(|table| last.replace(table.clone()).as_ref() != Some(table));
        }
        Ok(())
    }

    /// Whether the numbers of the entry at `at` can be.
    fn check_entry(&self, raw: &RawBitmapEntry, at: u64) -> Result<(), Fault> {
        let bad =
            |field, offset, found, need| Err(Fault::malformed(field, at + offset, found, need));
        let (place, entries) = (raw.table_offset.get(), u64::from(raw.table_size.get()));
        if place == 0 || place & self.bits.offset_mask() != 0 {
            let need = "a multiple of the cluster size, and not 0";
            return bad("bitmap_table_offset", 0, place, need);
        }
        if entries == 0 || entries > MAX_BITS_BYTES >> self.bits.get() {
            return bad("bitmap_table_size", 8, entries, "1 to 512 MiB of clusters");
        }
        let flags = raw.flags.get();
        if flags & !KNOWN_FLAGS != 0 {
            return bad("bitmap flags", 12, flags.into(), "only bits 0 and 1");
        }
        if raw.kind != TYPE_DIRTY_TRACKING {
            return bad("bitmap type", 16, raw.kind.into(), "1");
        }
        let granularity = raw.granularity_bits;
        if !GRANULARITY_BITS.contains(&granularity) {
            return bad("granularity_bits", 17, granularity.into(), "9 to 31");
        }
        if raw.name_size.get() > MAX_NAME_BYTES {
            return bad("name_size", 18, raw.name_size.get().into(), "at most 1023");
        }
        if raw.extra_data_size.get() != 0 {
            return bad("bitmap extra_data_size", 20, raw.extra_data_size.get().into(), "0");
        }
        if raw.is_in_use() {
            // It may be of an earlier size of the disk.
            return Ok(());
        }
        let bitmap_bytes = self.size_bytes.div_ceil(1 << granularity).div_ceil(8);
        if entries != bitmap_bytes.div_ceil(self.bits.size_bytes()) {
            let need = "as many clusters as the disk has bits at this granularity";
            return bad("bitmap_table_size", 8, entries, need);
        }
        if self.inside(place, 8 * entries).is_none() {
            return bad("bitmap_table_offset", 0, place, "a table inside the file");
        }
        Ok(())
    }

    /// Adds the bitmap of an entry whose numbers can be.
    fn add(
        &mut self,
        raw: &RawBitmapEntry,
        name: &[u8],
        at: u64,
        each: &mut dyn FnMut(Named),
    ) -> Result<(), Fault> {
        self.found += 1;
        let in_use = raw.is_in_use();
        // To qemu a name ends at a zero byte.
        let name = CStr::from_bytes_until_nul(name).map_or(name, CStr::to_bytes);
        if !self.names.insert(xxh3_128(name)) {
            if !in_use {
                let (field, need) = ("bitmap name", "one that no other bitmap has");
                let name_at = at + size_of::<RawBitmapEntry>() as u64;
                return Err(Fault::malformed(field, name_at, first_bytes(name), need));
            }
            self.note(TWICE);
        }
        let (place, entries) = (raw.table_offset.get(), u64::from(raw.table_size.get()));
        let Some(rest) = self.inside(place, 8 * entries) else {
            self.note(DAMAGED);
            return Ok(());
        };
        let total = if in_use { &mut self.tables_bytes.1 } else { &mut self.tables_bytes.0 };
        *total += 8 * entries;
        if *total <= MAX_TABLES_BYTES {
            each(Named { by: Use::BitmapTable, at, place: rest.clone() });
            self.tables.push_back(Table { rest, in_use });
        } else if in_use {
            self.note(NOT_READ);
        } else {
            let need = "bitmap tables of at most 16 MiB together";
            return Err(Fault::malformed("bitmap_table_size", at + 8, entries, need));
        }
        Ok(())
    }

    /// The range of the file, if it is in the file.
    fn inside(&self, at: u64, len_bytes: u64) -> Option<Range<u64>> {
        let end = at.checked_add(len_bytes).filter(|&end| end <= self.file_len_bytes)?;
        Some(at..end)
    }

    fn take_tables(&mut self, bytes: &[u8], each: &mut dyn FnMut(Named)) -> Result<(), Fault> {
        let Some(start) = self.tables.front().map(|table| table.rest.start) else { return Ok(()) };
        let end = start + bytes.len() as u64;
        let mut begun = Vec::new();
        while self.tables.front().is_some_and(|table| table.rest.start < end) {
            let Some(mut table) = self.tables.pop_front() else { break };
            let (from, to) = (table.rest.start, table.rest.end.min(end));
            let within = |at: u64| usize::try_from(at - start).unwrap_or(usize::MAX);
            let entries = bytes.get(within(from)..within(to)).unwrap_or_default();
            self.take_entries(from, entries, table.in_use, each)?;
            table.rest.start = to;
            begun.extend((!table.rest.is_empty()).then_some(table));
        }
        begun.into_iter().rev().for_each(|table| self.tables.push_front(table));
        Ok(())
    }

    /// Judges the entries of a table from the one at byte `at` on.
    fn take_entries(
        &mut self,
        at: u64,
        bytes: &[u8],
        in_use: bool,
        each: &mut dyn FnMut(Named),
    ) -> Result<(), Fault> {
        let (entries, _none) = bytes.as_chunks();
        for (entry_at, &entry) in (at..).step_by(8).zip(entries) {
            let raw = u64::from_be_bytes(entry);
            let cluster = raw & ENTRY_OFFSET;
            let both = cluster != 0 && raw & ENTRY_ALL_ONES != 0;
            let aligned = cluster & self.bits.offset_mask() == 0;
            match raw & ENTRY_RESERVED == 0 && !both && aligned {
                true if cluster == 0 => {}
                true => match self.inside(cluster, self.bits.size_bytes()) {
                    None => self.note(PAST_END),
                    Some(place) => each(Named { by: Use::Bits, at: entry_at, place }),
                },
                false if in_use => self.note(DAMAGED),
                false => {
                    let need = "0, 1, or a multiple of the cluster size below 2^56";
                    return Err(Fault::malformed("bitmap table entry", entry_at, raw, need));
                }
            }
        }
        Ok(())
    }
}

impl RawBitmapEntry {
    fn is_in_use(&self) -> bool {
        self.flags.get() & FLAG_IN_USE != 0
    }
}

/// The first 8 bytes as a number, as a fault can say them.
fn first_bytes(name: &[u8]) -> u64 {
    name.iter().take(8).fold(0, |value, &byte| value << 8 | u64::from(byte))
}

#[cfg(test)]
#[path = "bitmaps_tests.rs"]
mod tests;
