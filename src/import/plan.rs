//! What of a source is needed for a part of the disk, and where it goes.
//!
//! Why: the source's order is not the guest's, and much of a source may not be in use at all.
//! How: one entry for each cluster that is stored and missing, sorted by its place in the source;
//! units without any are zero.
//! Never: holds an entry that was not judged.
//! Start at [`Plan::add`], then [`Plan::close`].

use std::collections::HashMap;
use std::ops::Range;

use crate::disk::UNIT_BYTES;
use crate::image::qcow2::{Cluster, ClusterBits, Compression, Image};

/// A gap between two ranges of the source that is rather read than asked around.
const BRIDGE_BYTES: u64 = 256 * 1024;

/// One stored cluster, or a run of its subclusters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Entry {
    /// Where its bytes begin in the source.
    pub(super) at: u64,
    /// How many of them there are, at most twice a cluster.
    pub(super) len: u32,
    /// True if they are compressed: a whole cluster then.
    pub(super) packed: bool,
    /// Where in the guest they belong; at a unit of the tables.
    pub(super) guest_at: u64,
    /// True if it is here already: it is only held against what comes.
    pub(super) kept: bool,
}

impl Entry {
    /// Its bytes in the source.
    pub(super) fn stored(&self) -> Range<u64> {
        self.at..self.at + u64::from(self.len)
    }
}

/// A part of the disk: what is stored of it, and what is zero.
#[derive(Debug)]
pub(super) struct Plan {
    pub(super) bits: ClusterBits,
    /// log2 of the least bytes of an entry: a cluster, or a subcluster.
    unit_bits: u32,
    pub(super) compression: Compression,
    pub(super) virtual_bytes: u64,
    /// By place in the source, once closed.
    pub(super) entries: Vec<Entry>,
    /// Units that are made of more than one entry: how many of theirs are still to come.
    pub(super) units: HashMap<u64, u32>,
    /// Longest entry, for finding those that reach into a range.
    pub(super) longest: u64,
    missing: Vec<Range<u64>>,
    /// Whether what is here is to be held against what comes.
    checks_kept: bool,
    span: Range<u64>,
}

impl Plan {
    /// A plan for the guest's clusters from `first_cluster` on, of which `missing` is not here.
    pub(super) fn new(image: &Image, missing: &[Range<u64>], first_cluster: u64) -> Self {
        let header = image.header();
        let start = first_cluster << header.cluster_bits.get();
        Self {
            bits: header.cluster_bits,
            unit_bits: header.unit_bits(),
            compression: header.compression,
            virtual_bytes: header.size_bytes,
            entries: Vec::new(),
            units: HashMap::new(),
            longest: 0,
            missing: missing.to_vec(),
            checks_kept: false,
            span: start..start,
        }
    }

    /// With entries for what is here too, to be held against what comes.
    pub(super) fn checking_kept(self, checks_kept: bool) -> Self {
        Self { checks_kept, ..self }
    }

    /// The guest's bytes of an entry; fewer than a cluster at the disk's end.
    pub(super) fn guest(&self, entry: &Entry) -> Range<u64> {
        let len = if entry.packed { self.bits.size_bytes() } else { entry.len.into() };
        entry.guest_at..self.virtual_bytes.min(entry.guest_at + len)
    }

    /// True if an entry may be less than a unit of the disk, so that units are counted.
    pub(super) fn is_fine(&self) -> bool {
        1 << self.unit_bits < UNIT_BYTES
    }

    /// The next run of units of the guest, which are those of the tables.
    pub(super) fn add(&mut self, units: Range<u64>, meaning: Cluster) {
        let in_guest = |unit: u64| self.virtual_bytes.min(unit << self.unit_bits);
        let guest = in_guest(units.start)..in_guest(units.end);
        if guest.is_empty() {
            return;
        }
        self.span.end = guest.end;
        let (at, len, packed) = match meaning {
            Cluster::Zero | Cluster::Unallocated => return,
            Cluster::Data(at) => (at.0, guest.end - guest.start, false),
            Cluster::Compressed(packed) => (packed.at.0, packed.len_bytes, true),
        };
        let kept = !self.is_missing(&guest);
        if kept && !self.checks_kept {
            return;
        }
        let len = u32::try_from(len).expect("an entry has at most 4 MiB");
        self.longest = self.longest.max(len.into());
        self.entries.push(Entry { at, len, packed, guest_at: guest.start, kept });
    }

    /// The next `count` clusters, none of which is stored.
    pub(super) fn add_zeroes(&mut self, first_cluster: u64, count: u64) {
        self.span.end = self.virtual_bytes.min((first_cluster + count) << self.bits.get());
    }

    /// True if a unit that `guest` touches is missing.
    fn is_missing(&self, guest: &Range<u64>) -> bool {
        let start = guest.start / UNIT_BYTES * UNIT_BYTES;
        let index = self.missing.partition_point(|range| range.end <= start);
        self.missing.get(index).is_some_and(|range| range.start < guest.end)
    }

    /// Everything was added.
    pub(super) fn close(&mut self) {
        if self.is_fine() {
            let mut units = HashMap::new();
            for guest in self.made() {
                for unit in units_of(&guest) {
                    *units.entry(unit).or_default() += 1;
                }
            }
            self.units = units;
        }
        self.entries.sort_unstable_by_key(|entry| entry.at);
    }

    /// The guest's bytes of the entries that are to be made.
    fn made(&self) -> impl Iterator<Item = Range<u64>> {
        self.entries.iter().filter(|entry| !entry.kept).map(|entry| self.guest(entry))
    }

    /// The ranges of the guest that are here, and of which nothing is stored; none if what is here is not
    /// held against what comes.
    pub(super) fn kept_zeroes(&self) -> Vec<Range<u64>> {
        let mut zeroes = Vec::new();
        if !self.checks_kept {
            return zeroes;
        }
        let kept = self.entries.iter().filter(|entry| entry.kept).map(|entry| self.guest(entry));
        let mut others: Vec<Range<u64>> = self.missing.iter().cloned().chain(kept).collect();
        others.sort_unstable_by_key(|range| range.start);
        let mut at = self.span.start;
        for other in others {
            let end = other.start.min(self.span.end);
            if end > at {
                zeroes.push(at..end);
            }
            at = at.max(other.end);
        }
        if at < self.span.end {
            zeroes.push(at..self.span.end);
        }
        zeroes
    }

    /// Bytes of the guest's units that will be written.
    pub(super) fn data_bytes(&self) -> u64 {
        match self.units.len() as u64 {
            0 => self.made().map(|guest| guest.end - guest.start).sum(),
            units => units * UNIT_BYTES,
        }
    }

    /// The missing ranges of the guest of which nothing is stored, in whole units.
    pub(super) fn zeroes(&self) -> Vec<Range<u64>> {
        let unit_end = |at: u64| at.next_multiple_of(UNIT_BYTES);
        let mut stored: Vec<Range<u64>> = match self.units.is_empty() {
            true => self.made().collect(),
            false => self.units.keys().map(|u| u * UNIT_BYTES..(u + 1) * UNIT_BYTES).collect(),
        };
        stored.sort_unstable_by_key(|range| range.start);
        let (mut zeroes, mut stored) = (Vec::new(), stored.into_iter().peekable());
        for missing in &self.missing {
            let (mut at, end) =
                (missing.start.max(self.span.start), missing.end.min(self.span.end));
            while at < end {
                while stored.next_if(|range| unit_end(range.end) <= at).is_some() {}
                let next = stored.peek().map_or(end, |range| range.start.clamp(at, end));
                if next > at {
                    zeroes.push(at..next);
                }
                at = stored.peek().map_or(end, |range| unit_end(range.end)).max(next);
            }
        }
        zeroes
    }

    /// The ranges of the source that are needed, ascending, with small gaps bridged.
    pub(super) fn ranges(&self) -> Vec<Range<u64>> {
        let mut ranges: Vec<Range<u64>> = Vec::new();
        for entry in &self.entries {
            let stored = entry.stored();
            match ranges.last_mut() {
                Some(last) if stored.start <= last.end + BRIDGE_BYTES => {
                    last.end = last.end.max(stored.end);
                }
                Some(_) | None => ranges.push(stored),
            }
        }
        ranges
    }

    /// The entries that have bytes in `range` of the source, by their numbers.
    pub(super) fn reaching(&self, range: &Range<u64>) -> impl Iterator<Item = usize> {
        let from = range.start.saturating_sub(self.longest);
        let first = self.entries.partition_point(|entry| entry.at < from);
        let end = self.entries.partition_point(|entry| entry.at < range.end);
        let start = range.start;
        (first..end).filter(move |&index| self.entries[index].stored().end > start)
    }
}

/// The units of the disk that a range of the guest touches.
pub(super) fn units_of(guest: &Range<u64>) -> Range<u64> {
    guest.start / UNIT_BYTES..guest.end.div_ceil(UNIT_BYTES)
}
