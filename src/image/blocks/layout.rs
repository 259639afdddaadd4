//! Where the entry of each block is, and what it may say.
//!
//! Why: every byte a guest reads goes through one of these entries, which come from strangers.
//! How: entries lie in spans of contiguous ones: the grain tables of VMDK, the whole table of VHD,
//! and between two sector bitmaps of VHDX. Each is judged against the file's length and against
//! the places of all metadata.
//! Never: reads a file, or gives a range that is not inside the file and clear of metadata.
//! Start at [`Layout::judge`].

use std::ops::Range;

use super::parts::{Pointer, Want};
use super::{MAX_BLOCKS, MAX_SIZE_BYTES};
use crate::image::fault::EntryFault;
use crate::units::FileOffset;

/// Bytes of a table that are read at once.
const PAGE_BYTES: u64 = 4096;
/// What stands before a compressed grain: its sector on the disk, and its length.
pub(super) const GRAIN_MARKER_BYTES: u64 = 12;

/// What a guest reads from one block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Block {
    /// Stored as is, from this position on.
    Data(FileOffset),
    /// Zeroes: by a mark, or because nothing is stored.
    Zero,
    /// A compressed grain, whose marker is at this position.
    Encoded(FileOffset),
}

/// How an entry says it.
#[derive(Clone, Copy, Debug)]
pub(super) enum Entries {
    /// 32 bits, little-endian: a sector, 0 for none, and 1 for zeroes if the header says so.
    Vmdk { compressed: bool, zero_grains: bool },
    /// 32 bits, big-endian: the sector of a bitmap of this length, before the data.
    Vhd { bitmap_bytes: u64 },
    /// 64 bits, little-endian: a state and a multiple of 1 MiB.
    Vhdx,
}

impl Entries {
    pub(super) fn len_bytes(self) -> u64 {
        match self {
            Self::Vmdk { .. } | Self::Vhd { .. } => 4,
            Self::Vhdx => 8,
        }
    }

    /// The entry in `bytes`, which are one entry's.
    fn raw(self, bytes: &[u8]) -> u64 {
        let little = |bytes: &[u8]| bytes.iter().rev().fold(0, |n, &b| n << 8 | u64::from(b));
        match self {
            Self::Vmdk { .. } | Self::Vhdx => little(bytes),
            Self::Vhd { .. } => bytes.iter().fold(0, |n, &b| n << 8 | u64::from(b)),
        }
    }

    fn field(self) -> &'static str {
        match self {
            Self::Vmdk { .. } => "grain table entry",
            Self::Vhd { .. } | Self::Vhdx => "block allocation table entry",
        }
    }
}

/// Where the spans of entries are.
#[derive(Clone, Debug)]
pub(super) enum Spans {
    /// Each at its own place; 0 for one that is not stored.
    Listed(Vec<u64>),
    /// The first one, and the distance to each next one.
    Every { first: u64, step: u64 },
}

/// Entries that are read at once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Page {
    /// The first block.
    pub first_block: u64,
    /// How many blocks.
    pub blocks: u64,
    /// Where their entries are in the file; `None`: not stored, all of them are zero.
    pub stored: Option<Range<u64>>,
}

/// The table of one image, checked but for its entries.
#[derive(Clone, Debug)]
pub struct Layout {
    pub(super) size_bytes: u64,
    pub(super) block_bits: u32,
    pub(super) file_len_bytes: u64,
    pub(super) entries: Entries,
    /// log2 of the blocks in a span.
    pub(super) span_bits: u32,
    pub(super) spans: Spans,
    /// The places of all metadata, ascending and apart.
    pub(super) metadata: Vec<Range<u64>>,
}

/// Blocks of a disk of `size` bytes. Both numbers are judged: `block_bytes` is a power of two.
pub(super) fn count_blocks(size: Pointer, block_bytes: u64) -> Result<u64, Want> {
    let need = "512 bytes to 16 TiB of disk";
    size.must((512..=MAX_SIZE_BYTES).contains(&size.found), need)?;
    let blocks = size.found.div_ceil(block_bytes);
    if blocks > MAX_BLOCKS {
        return Err(size.unsupported("a disk of at most 2^25 blocks"));
    }
    Ok(blocks)
}

impl Layout {
    /// Sorts and joins the places of metadata, so that one search finds an overlap.
    pub(super) fn join(mut metadata: Vec<Range<u64>>) -> Vec<Range<u64>> {
        metadata.sort_unstable_by_key(|range| range.start);
        let mut joined: Vec<Range<u64>> = Vec::with_capacity(metadata.len());
        for range in metadata {
            match joined.last_mut() {
                Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
                Some(_) | None => joined.push(range),
            }
        }
        joined
    }

    /// Number of blocks of the disk.
    #[must_use]
    pub fn blocks(&self) -> u64 {
        self.size_bytes.div_ceil(1 << self.block_bits)
    }

    /// Bytes of a block.
    #[must_use]
    pub fn block_bytes(&self) -> u64 {
        1 << self.block_bits
    }

    /// How much of a block the disk shows: less than all of it only for the last one.
    #[must_use]
    pub fn visible_bytes(&self, block: u64) -> u64 {
        (self.size_bytes - (block << self.block_bits)).min(self.block_bytes())
    }

    fn span_at(&self, span: u64) -> Option<u64> {
        match &self.spans {
            Spans::Listed(places) => {
                usize::try_from(span).ok().and_then(|n| places.get(n)).copied().filter(|&at| at > 0)
            }
            Spans::Every { first, step } => Some(first + span * step),
        }
    }

    /// The entries around that of `block` which are read together with it; all of a span that is
    /// not stored.
    #[must_use]
    pub fn page_of(&self, block: u64) -> Page {
        let (span, size) = (block >> self.span_bits, self.entries.len_bytes());
        let start = span << self.span_bits;
        let end = (start + (1 << self.span_bits)).min(self.blocks());
        let Some(at) = self.span_at(span) else {
            return Page { first_block: start, blocks: end - start, stored: None };
        };
        let per_page = PAGE_BYTES / size;
        let first_block = start + (block - start) / per_page * per_page;
        let blocks = per_page.min(end - first_block);
        let at = at + (first_block - start) * size;
        Page { first_block, blocks, stored: Some(at..at + blocks * size) }
    }

    /// All pages, in the order of the guest.
    pub fn pages(&self) -> impl Iterator<Item = Page> {
        let mut next = 0;
        std::iter::from_fn(move || {
            (next < self.blocks()).then(|| {
                let page = self.page_of(next);
                next = page.first_block + page.blocks;
                page
            })
        })
    }

    /// Judges the entries of `page`, whose bytes are those of [`Page::stored`]: for each its place,
    /// and its meaning or the rule that is broken. Pure.
    pub fn judge_page(
        &self,
        page: &Page,
        bytes: &[u8],
    ) -> impl Iterator<Item = (FileOffset, Result<Block, EntryFault>)> {
        let size = self.entries.len_bytes();
        let start = page.stored.as_ref().map_or(0, |stored| stored.start);
        let entries = bytes.chunks_exact(if size == 8 { 8 } else { 4 });
        (page.first_block..).zip(entries).map(move |(block, bytes)| {
            let at = FileOffset(start + (block - page.first_block) * size);
            (at, self.judge(self.entries.raw(bytes), block))
        })
    }

    /// What the entry `raw` says of `block`. Pure and total.
    ///
    /// # Errors
    /// The rule that is broken.
    pub fn judge(&self, raw: u64, block: u64) -> Result<Block, EntryFault> {
        let fault = |need| Err(EntryFault::new(self.entries.field(), raw, need));
        match self.entries {
            Entries::Vmdk { zero_grains, .. } if raw == 0 || (raw == 1 && zero_grains) => {
                Ok(Block::Zero)
            }
            Entries::Vmdk { compressed: true, .. } => {
                self.check(raw, raw << 9, GRAIN_MARKER_BYTES + 1)?;
                Ok(Block::Encoded(FileOffset(raw << 9)))
            }
            Entries::Vmdk { compressed: false, .. } => {
                // A writer may leave out what the disk does not show of its last grain.
                self.check(raw, raw << 9, self.visible_bytes(block))?;
                Ok(Block::Data(FileOffset(raw << 9)))
            }
            Entries::Vhd { .. } if raw == u64::from(u32::MAX) => Ok(Block::Zero),
            Entries::Vhd { bitmap_bytes } => {
                self.check(raw, raw << 9, bitmap_bytes + self.block_bytes())?;
                Ok(Block::Data(FileOffset((raw << 9) + bitmap_bytes)))
            }
            Entries::Vhdx => match raw & 7 {
                // Not present, undefined, zero, unmapped; 5 is what drafts of the format had for
                // the last one.
                0..=3 | 5 => Ok(Block::Zero),
                6 => {
                    let at = raw >> 20 << 20;
                    self.check(raw, at, self.block_bytes())?;
                    Ok(Block::Data(FileOffset(at)))
                }
                7 => fault("no block that is partly in a parent"),
                _ => fault("a payload state of 0 to 3, 6 or 7"),
            },
        }
    }

    /// What the entry `raw` leads to is inside the file and clear of metadata.
    fn check(&self, raw: u64, at: u64, len_bytes: u64) -> Result<(), EntryFault> {
        let fault = |need| Err(EntryFault::new(self.entries.field(), raw, need));
        let end = at.checked_add(len_bytes).filter(|&end| end <= self.file_len_bytes);
        let Some(end) = end else { return fault("a block inside the file") };
        let next = self.metadata.partition_point(|range| range.end <= at);
        match self.metadata.get(next) {
            Some(range) if range.start < end => fault("a block clear of header and tables"),
            Some(_) | None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn layout(entries: Entries, spans: Spans, span_bits: u32) -> Layout {
        Layout {
            size_bytes: 3 << 20 | 512,
            block_bits: 20,
            file_len_bytes: 9 << 20,
            entries,
            span_bits,
            spans,
            metadata: Layout::join(vec![4 << 20..5 << 20, 0..1 << 20, 512..1 << 20]),
        }
    }

    const ALL: [Entries; 4] = [
        Entries::Vmdk { compressed: false, zero_grains: true },
        Entries::Vmdk { compressed: true, zero_grains: false },
        Entries::Vhd { bitmap_bytes: 512 },
        Entries::Vhdx,
    ];

    #[test]
    fn metadata_is_sorted_and_joined() {
        let some = layout(Entries::Vhdx, Spans::Every { first: 0, step: 0 }, 32);
        assert_eq!(some.metadata, [0..1 << 20, 4 << 20..5 << 20]);
    }

    #[test]
    fn entries_past_the_end_or_in_metadata_are_refused() {
        let some = layout(ALL[0], Spans::Listed(vec![]), 9);
        let need = |raw: u64, block| some.judge(raw, block).unwrap_err().need;
        assert_eq!(need((8 << 11) + 1, 0), "a block inside the file");
        assert_eq!(need((3 << 11) + 1, 0), "a block clear of header and tables");
        assert_eq!(need((5 << 11) - 1, 0), "a block clear of header and tables");
        assert_eq!(some.judge(8 << 11, 0), Ok(Block::Data(FileOffset(8 << 20))));
        // Of the last grain 512 bytes are enough.
        assert_eq!(some.judge((9 << 11) - 1, 3), Ok(Block::Data(FileOffset((9 << 20) - 512))));
        assert_eq!(some.judge(1, 0), Ok(Block::Zero));
        assert!(layout(ALL[1], Spans::Listed(vec![]), 9).judge(1, 0).is_err());
    }

    #[test]
    fn pages_cover_the_disk_once_and_absent_spans_are_whole() {
        for (spans, span_bits) in
            [(Spans::Every { first: 64, step: 24 }, 1), (Spans::Listed(vec![0, 4096]), 1)]
        {
            let some = layout(Entries::Vhdx, spans, span_bits);
            let pages: Vec<Page> = some.pages().collect();
            let blocks: Vec<_> = pages.iter().map(|p| (p.first_block, p.blocks)).collect();
            assert_eq!(blocks, [(0, 2), (2, 2)]);
        }
        let some = layout(Entries::Vhdx, Spans::Every { first: 64, step: 24 }, 1);
        assert_eq!(some.page_of(3).stored, Some(88..104));
        let some = layout(Entries::Vhdx, Spans::Listed(vec![0, 4096]), 1);
        assert_eq!((some.page_of(1).stored, some.page_of(2).stored), (None, Some(4096..4112)));
    }

    proptest! {
        #[test]
        fn what_is_accepted_is_inside_the_file_and_clear_of_metadata(
            raw: u64, small in 0_u64..1 << 15, block in 0_u64..4,
        ) {
            for entries in ALL {
                let some = layout(entries, Spans::Listed(vec![]), 9);
                let mask = if entries.len_bytes() == 4 { u64::from(u32::MAX) } else { u64::MAX };
                for raw in [raw & mask, small, small << 20 | 6] {
                    if let Ok(Block::Data(at) | Block::Encoded(at)) = some.judge(raw & mask, block) {
                        prop_assert!(at.0 >= 1 << 20 && at.0 < 9 << 20);
                        prop_assert!(!(4 << 20..5 << 20).contains(&at.0));
                    }
                }
            }
        }
    }
}
