//! The full check of an image before its copy is sealed: every L2 entry.
//!
//! Why: a damaged entry must be found when the image arrives, not when a guest reads it.
//! How: table after table through one buffer of at most a cluster.
//! Never: decodes data, or keeps a table.
//! Start at [`Image::tally`].

use std::ops::Range;
use std::path::Path;

use super::entry::{self, Cluster, Limits};
use super::header::Header;
use super::open::Image;
use super::table::{self, Entry, UnitRuns};
use super::upkeep::{Upkeep, UpkeepPlaces};
use crate::image::fault::{EntryFault, Fault};
use crate::image::tally::{Odd, Tally};
use crate::image::{ImageError, Info, Source};
use crate::units::FileOffset;

/// An L2 table of an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct L2Table {
    /// The first guest cluster that it maps.
    pub first_cluster: u64,
    /// How many clusters the disk needs of it.
    pub clusters: u64,
    /// Where these entries are in the file; `None`: there is no table, all of it is zero.
    pub stored: Option<Range<u64>>,
}

/// A run of units and its meaning, or why an entry has none.
type Judged = Result<(Range<u64>, Cluster), Fault>;

impl Image {
    /// Judges every L2 entry that the disk needs; counts clusters into `info`.
    ///
    /// # Errors
    /// [`ImageError`] with the first entry at fault, or the read that failed.
    pub fn check(&self, file: &dyn Source, path: &Path, info: &mut Info) -> Result<(), ImageError> {
        let tally = self.tally(|range, bytes| {
            let len = bytes.len();
            file.read_exact(bytes, range.start)
                .map_err(|source| ImageError::read(path, range.start, len, source))
        })?;
        if let Some(&fault) = tally.faults().first() {
            return Err(ImageError::fault(path, fault));
        }
        tally.describe(info);
        if let Some(first) = tally.oddities().first() {
            let more = tally.oddities_total() - 1;
            let more = if more > 0 { format!("; {more} more like it") } else { String::new() };
            info.notes.push(format!("{first}{more}; run `qemu-img check`"));
        }
        Ok(())
    }

    /// Judges every L2 entry that the disk needs, also behind a damaged one, and holds it against
    /// refcounts and bitmaps. `read` fills a buffer with a range of the file, of at most 2 MiB.
    ///
    /// # Errors
    /// Those of `read`.
    pub fn tally<E>(
        &self,
        mut read: impl FnMut(Range<u64>, &mut [u8]) -> Result<(), E>,
    ) -> Result<Tally, E> {
        let cluster_bytes = self.header.cluster_bits.size_bytes();
        let mut tally = Tally::default();
        let mut upkeep = Upkeep::of(self);
        let mut buffer = Vec::new();
        while let Some(wanted) = upkeep.wanted() {
            buffer.resize(usize::try_from(wanted.end - wanted.start).expect("at most 1 MiB"), 0);
            read(wanted, &mut buffer)?;
            upkeep.take(&buffer);
        }
        let upkeep = upkeep.into_places(&mut tally);
        buffer.resize(usize::try_from(cluster_bytes).expect("at most 2 MiB"), 0);
        for table in self.tables() {
            let stored = table.stored.clone().unwrap_or_default();
            let len = usize::try_from(stored.end - stored.start).expect("at most 2 MiB");
            let bytes = buffer.get_mut(..len).expect("a table is at most a cluster");
            if len > 0 {
                read(stored, bytes)?;
            }
            self.tally_table(&table, bytes, &upkeep, &mut tally);
        }
        Ok(tally)
    }

    /// Adds one L2 table, whose bytes are those of [`L2Table::stored`] (none if it is not stored),
    /// to `tally`. Its entries are held against `upkeep`.
    pub fn tally_table(
        &self,
        table: &L2Table,
        bytes: &[u8],
        upkeep: &UpkeepPlaces,
        tally: &mut Tally,
    ) {
        let in_cluster = self.header.units_in_cluster_bits();
        if table.stored.is_none() {
            tally.counts.zero += table.clusters;
            return;
        }
        let (mut data, mut compressed, mut last) = (0, 0, None);
        let found = self.judge_table(table, bytes, &mut |judged| match judged {
            Ok((units, Cluster::Data(_))) => {
                // A cluster counts as data if any of its subclusters is.
                let cluster = units.start >> in_cluster;
                data += u64::from(last != Some(cluster));
                last = Some(cluster);
            }
            Ok((_, Cluster::Compressed(_))) => compressed += 1,
            Ok((_, Cluster::Zero | Cluster::Unallocated)) => {}
            Err(fault) => tally.add_fault(fault),
        });
        tally.odd.bits += found.bits;
        tally.odd.places += found.places;
        let counts = &mut tally.counts;
        counts.data += data;
        counts.compressed += compressed;
        counts.zero += table.clusters - data - compressed;
        if self.limits().data_len_bytes.is_none() {
            self.hold_against(upkeep, table, bytes, tally);
        }
    }

    /// Notes each entry that names a cluster which only writers use.
    fn hold_against(
        &self,
        upkeep: &UpkeepPlaces,
        table: &L2Table,
        bytes: &[u8],
        tally: &mut Tally,
    ) {
        let table_at = table.stored.as_ref().map_or(0, |stored| stored.start);
        let entries = table::entries(&self.header, bytes);
        for (at, entry) in (table_at..).step_by(self.entry_step()).zip(entries) {
            let Some((field, offset)) = entry.names(self.header.cluster_bits) else { continue };
            if let Some(need) = upkeep.need(offset) {
                tally.add_oddity(Fault::malformed(field, at, offset, need));
            }
        }
    }

    fn entry_step(&self) -> usize {
        if self.header.extended_l2 { 16 } else { 8 }
    }

    /// The L2 tables that the disk needs, in the order of the guest.
    pub fn tables(&self) -> impl Iterator<Item = L2Table> {
        let (l2_bits, entry_bytes) = (self.header.l2_bits(), self.header.l2_entry_bytes());
        let (total, per_table) = (self.header.clusters(), 1_u64 << l2_bits);
        (0..).step_by(1 << l2_bits).zip(self.l1.iter()).map(move |(first_cluster, at)| {
            let clusters = per_table.min(total - first_cluster);
            let stored = (at != 0).then(|| at..at + entry_bytes * clusters);
            L2Table { first_cluster, clusters, stored }
        })
    }

    /// Judges the entries of one L2 table and gives the meaning of each run of guest units (see
    /// [`Header::unit_bits`]) to `each`, in order and cluster by cluster; the last run may reach
    /// past the disk's end. `bytes` are those of [`L2Table::stored`]. Pure.
    ///
    /// # Errors
    /// The first entry at fault; runs behind it were given all the same.
    pub fn decode_table(
        &self,
        table: &L2Table,
        bytes: &[u8],
        each: &mut dyn FnMut(Range<u64>, Cluster),
    ) -> Result<(), Fault> {
        let mut first = None;
        self.judge_table(table, bytes, &mut |judged| match judged {
            Ok((units, meaning)) => each(units, meaning),
            Err(fault) => first = first.or(Some(fault)),
        });
        first.map_or(Ok(()), Err)
    }

    /// Judges all entries of one L2 table; returns how many are odd, which changes nothing.
    fn judge_table(&self, table: &L2Table, bytes: &[u8], each: &mut dyn FnMut(Judged)) -> Odd {
        let (limits, mut odd) = (self.limits(), Odd::default());
        let (in_cluster, entry_bytes) =
            (self.header.units_in_cluster_bits(), self.header.l2_entry_bytes());
        let table_at = table.stored.as_ref().map_or(0, |stored| stored.start);
        for (index, entry) in (0_u64..).zip(table::entries(&self.header, bytes)) {
            let cluster = table.first_cluster + index;
            let at = FileOffset(table_at + entry_bytes * index);
            odd.bits += u64::from(entry.is_odd());
            let first = cluster << in_cluster;
            match self.judge(entry, cluster, &limits) {
                Ok(judged) => {
                    odd.places += u64::from(entry::names_what_is_missing(entry.raw, &limits));
                    judged.each(|units, meaning| {
                        each(Ok((first + units.start..first + units.end, meaning)));
                    });
                }
                Err(fault) => each(Err(fault.at(at))),
            }
        }
        odd
    }

    /// What `entry` says of the units of `cluster`.
    pub(super) fn judge(
        &self,
        entry: Entry,
        cluster: u64,
        limits: &Limits<'_>,
    ) -> Result<UnitRuns, EntryFault> {
        let start = cluster << self.header.cluster_bits.get();
        entry.judge(start, self.visible_bytes(cluster), limits)
    }

    /// The checked header.
    #[must_use]
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// How much of a cluster the disk shows: less than all of it only for the last one.
    #[must_use]
    pub fn visible_bytes(&self, cluster: u64) -> u64 {
        let bits = self.header.cluster_bits;
        (self.header.size_bytes - (cluster << bits.get())).min(bits.size_bytes())
    }
}
