//! What the disk as it is now does not use of an image: refcounts, bitmaps and the tables of snapshots,
//! held against the disk and each other.
//!
//! Why: no byte of the disk follows from them, so nothing is refused for them. But where one lies on
//! a table or on data of the disk, the next writer destroys that: who has the image should know.
//! How: [`Upkeep`] says which bytes of the file it wants next, and keeps the cluster numbers of what
//! they name, and of what the snapshot table does. Sorted, these are [`UpkeepPlaces`], in which each L2
//! entry of the disk is looked up.
//! Never: reads a file, refuses an image, or keeps more than [`MAX_PLACES`] cluster numbers.
//! Start at [`Upkeep::wanted`]. Format: qemu `docs/interop/qcow2.rst`, "Host cluster management"
//! and "Bitmaps".
//!
//! `qemu-img check` counts how often each cluster is used, and finds an error unless the refcounts say
//! the same. With refcounts that fit it calls all of this clean, and every read has the same bytes.

use std::ops::Range;

use super::bitmaps::{Bitmaps, Named};
use super::header::ClusterBits;
use super::open::Image;
use crate::image::fault::Fault;
use crate::image::tally::Tally;
use crate::units::MIB;

/// Bytes that are read at once: a multiple of an entry.
const PART_BYTES: u64 = MIB;
/// Cluster numbers that are kept: 8 MiB. The largest bitmap has twice as many at 512 bytes, and 8192
/// at 64 KiB.
const MAX_PLACES: usize = 1 << 19;
const REFCOUNT_TABLE_FIELD: u64 = 48;
const SNAPSHOTS_FIELD: u64 = 64;
/// Bits of an entry of the refcount table that are not its offset.
const REFCOUNT_RESERVED: u64 = 0x1ff;

/// What a cluster is used for. Of two uses, the field that names the later one is said to be at fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Use {
    RefcountTable,
    RefcountBlock,
    SnapshotTable,
    SnapshotL1,
    Directory,
    BitmapTable,
    Bits,
}

const USES: [Use; 7] = [
    Use::RefcountTable,
    Use::RefcountBlock,
    Use::SnapshotTable,
    Use::SnapshotL1,
    Use::Directory,
    Use::BitmapTable,
    Use::Bits,
];

impl Use {
    /// The field that names such a cluster.
    fn field(self) -> &'static str {
        match self {
            Self::RefcountTable => "refcount_table_offset",
            Self::RefcountBlock => "refcount table entry",
            Self::SnapshotTable => "snapshots_offset",
            Self::SnapshotL1 => "snapshot l1_table_offset",
            Self::Directory => "bitmaps directory offset",
            Self::BitmapTable => "bitmap_table_offset",
            Self::Bits => "bitmap table entry",
        }
    }

    /// What somebody else's cluster should be.
    fn need(self) -> &'static str {
        match self {
            Self::RefcountTable => "not in the refcount table",
            Self::RefcountBlock => "not a refcount block",
            Self::SnapshotTable => "not in the snapshot table",
            Self::SnapshotL1 => "not in the L1 table of a snapshot",
            Self::Directory => "not in the bitmap directory",
            Self::BitmapTable => "not in the table of a bitmap",
            Self::Bits => "not a cluster of a bitmap's bits",
        }
    }
}

/// A cluster and the field that names it, in 16 bytes. In the order of clusters, then of uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Place {
    cluster: u64,
    /// The use in the three highest bits; below it the field's position, which is a multiple of 8.
    field: u64,
}

const AT_BITS: u32 = 61;

impl Place {
    fn new(cluster: u64, by: Use, at: u64) -> Self {
        Self { cluster, field: (by as u64) << AT_BITS | at >> 3 }
    }

    fn by(self) -> Use {
        let index = usize::try_from(self.field >> AT_BITS).unwrap_or(0);
        USES.get(index).copied().unwrap_or(Use::Bits)
    }

    fn at(self) -> u64 {
        self.field << 3
    }
}

/// The parts of the file that the disk as it is now does not use, while they are read.
#[derive(Debug)]
pub struct Upkeep<'a> {
    image: &'a Image,
    /// What is left to read of the refcount table.
    refcounts: Range<u64>,
    bitmaps: Bitmaps,
    places: Vec<Place>,
    /// The fields that name the tables of bitmaps, in order, and the first byte of each table.
    tables: Vec<(u64, u64)>,
    /// True if there are more places than are kept.
    is_full: bool,
    found: Tally,
}

impl<'a> Upkeep<'a> {
    /// Of an image whose own tables are known.
    #[must_use]
    pub fn of(image: &'a Image) -> Self {
        let (header, len) = (image.header(), image.file_len_bytes);
        let bitmaps = Bitmaps::of(header, len);
        let Range { start, end } = header.refcount_table;
        let refcounts = start..end.min(len).max(start);
        let (places, tables) = (Vec::new(), Vec::new());
        let found = Tally::default();
        let mut all = Self { image, refcounts, bitmaps, places, tables, is_full: false, found };
        let place = start..end;
        if end > len {
            all.odd(Use::RefcountTable, REFCOUNT_TABLE_FIELD, start, "a table inside the file");
        } else {
            all.add(Use::RefcountTable, REFCOUNT_TABLE_FIELD, &place);
        }
        let snapshots = &image.snapshot_places;
        if !snapshots.table.is_empty() {
            all.add(Use::SnapshotTable, SNAPSHOTS_FIELD, &snapshots.table);
        }
        for (at, l1) in &snapshots.l1 {
            all.add(Use::SnapshotL1, *at, l1);
        }
        if let Some(Named { by, at, place }) = header.bitmaps.map(|directory| directory.named()) {
            all.add(by, at, &place);
        }
        all
    }

    /// The bytes of the file that are wanted next: at most 1 MiB, inside the file; `None` if all
    /// was seen.
    #[must_use]
    pub fn wanted(&self) -> Option<Range<u64>> {
        let Range { start, end } = self.refcounts;
        if start < end {
            return Some(start..end.min(start.saturating_add(PART_BYTES)));
        }
        self.bitmaps.wanted()
    }

    /// Takes the bytes of [`wanted`](Self::wanted).
    pub fn take(&mut self, bytes: &[u8]) {
        if !self.refcounts.is_empty() {
            let at = self.refcounts.start;
            self.refcounts.start = at.saturating_add(bytes.len().max(1) as u64);
            self.take_refcounts(at, bytes);
            return;
        }
        let mut named = Vec::new();
        // They were judged when the image was opened; if they are others now, this is all of them.
        let judged = self.bitmaps.take_named(bytes, &mut |one| named.push(one));
        for Named { by, at, place } in named {
            self.add(by, at, &place);
        }
        if judged.is_err() {
            let bits = self.image.header().cluster_bits;
            self.bitmaps = Bitmaps::none(bits);
        }
    }

    /// The places, to be searched. What was found goes to `tally`.
    #[must_use]
    pub fn into_places(mut self, tally: &mut Tally) -> UpkeepPlaces {
        self.settle();
        tally.add_odd(&self.found);
        tally.odd.is_partial |= self.is_full;
        let bits = self.image.header().cluster_bits;
        UpkeepPlaces { bits, places: self.places }
    }

    fn take_refcounts(&mut self, at: u64, bytes: &[u8]) {
        let bits = self.image.header().cluster_bits;
        let (entries, _cut_off) = bytes.as_chunks();
        for (at, &entry) in (at..).step_by(8).zip(entries) {
            let raw = u64::from_be_bytes(entry);
            let place = raw & !REFCOUNT_RESERVED;
            let need = if raw != place {
                "bits 0 to 8 clear"
            } else if place & bits.offset_mask() != 0 {
                "a multiple of the cluster size"
            } else if place >= self.image.file_len_bytes {
                "a refcount block inside the file"
            } else {
                ""
            };
            if !need.is_empty() {
                self.odd(Use::RefcountBlock, at, raw, need);
            } else if place != 0 {
                self.add(Use::RefcountBlock, at, &(place..place + bits.size_bytes()));
            }
        }
    }

    /// Adds what the field at `at` names, and holds it against header and tables of the disk.
    fn add(&mut self, by: Use, at: u64, place: &Range<u64>) {
        let header = self.image.header();
        let cluster_bytes = header.cluster_bits.size_bytes();
        let (first, end) = (place.start, place.end.next_multiple_of(cluster_bytes));
        let clusters = || (first..end).step_by(usize::try_from(cluster_bytes).unwrap_or(1 << 21));
        let need = if first < cluster_bytes {
            "past the header's cluster"
        } else if first < header.l1.end && header.l1.start < end {
            "not in the L1 table"
        } else if clusters().any(|at| self.image.l2_tables.contains(at)) {
            "not an L2 table"
        } else {
            ""
        };
        if !need.is_empty() {
            self.odd(by, at, place.start, need);
        }
        if by == Use::BitmapTable {
            self.tables.push((at, place.start));
        }
        for offset in clusters() {
            if self.places.len() == MAX_PLACES {
                self.settle();
                // Else each new place would sort them all.
                self.is_full |= self.places.len() > MAX_PLACES / 2;
            }
            if self.is_full {
                return;
            }
            self.places.push(Place::new(offset >> header.cluster_bits.get(), by, at));
        }
    }

    /// Sorts the places, and keeps one for each cluster.
    fn settle(&mut self) {
        let mut places = std::mem::take(&mut self.places);
        places.sort_unstable();
        let mut last: Option<Place> = None;
        places.retain(|&place| {
            let Some(first) = last.filter(|first| first.cluster == place.cluster) else {
                last = Some(place);
                return true;
            };
            // A table that two bitmaps have was said, and its entries are one field each.
            if first != place {
                self.shared(first, place);
            }
            false
        });
        self.places = places;
    }

    /// Two fields name one cluster.
    fn shared(&mut self, first: Place, second: Place) {
        let header = self.image.header();
        let cluster = second.cluster << header.cluster_bits.get();
        let found = match second.by() {
            Use::RefcountTable => header.refcount_table.start,
            Use::Directory => header.bitmaps.map_or(cluster, |directory| directory.at),
            Use::BitmapTable => {
                let index = self.tables.binary_search_by_key(&second.at(), |(at, _)| *at);
                index.ok().and_then(|index| self.tables.get(index)).map_or(cluster, |(_, at)| *at)
            }
            Use::SnapshotTable => header.snapshots_at,
            Use::RefcountBlock | Use::SnapshotL1 | Use::Bits => cluster,
        };
        self.odd(second.by(), second.at(), found, first.by().need());
    }

    fn odd(&mut self, by: Use, at: u64, found: u64, need: &'static str) {
        self.found.add_oddity(Fault::malformed(by.field(), at, found, need));
    }
}

/// The clusters that the disk as it is now does not use, to be searched.
#[derive(Clone, Debug)]
pub struct UpkeepPlaces {
    bits: ClusterBits,
    places: Vec<Place>,
}

impl UpkeepPlaces {
    /// What a cluster of the disk at `offset` would have to be, if this one is used otherwise.
    #[must_use]
    pub fn need(&self, offset: u64) -> Option<&'static str> {
        let cluster = offset >> self.bits.get();
        let index = self.places.binary_search_by_key(&cluster, |place| place.cluster).ok()?;
        self.places.get(index).map(|place| place.by().need())
    }
}

#[cfg(test)]
#[path = "upkeep_tests.rs"]
mod tests;
