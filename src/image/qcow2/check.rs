//! The full check of an image before its copy is sealed: every L2 entry.
//!
//! Why: a damaged entry must be found when the image arrives, not when a guest reads it.
//! How: table after table through one buffer of at most a cluster.
//! Never: decodes data, or keeps a table.
//! Start at [`Image::check`].

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;

use super::entry::{Cluster, Limits};
use super::fault::EntryFault;
use super::header::Header;
use super::open::Image;
use super::table::{self, Entry, UnitRuns};
use crate::image::{ClusterCounts, ImageError, Info};
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

/// Counts clusters by what is stored of them.
struct Counter {
    in_cluster_bits: u32,
    data: u64,
    compressed: u64,
    /// The last cluster that counts as data.
    last: Option<u64>,
}

impl Counter {
    fn new(in_cluster_bits: u32) -> Self {
        Self { in_cluster_bits, data: 0, compressed: 0, last: None }
    }

    /// A run of units of one cluster: it counts as data if any of its subclusters is.
    fn add(&mut self, units: &Range<u64>, meaning: Cluster) {
        let cluster = units.start >> self.in_cluster_bits;
        match meaning {
            Cluster::Data(_) if self.last == Some(cluster) => {}
            Cluster::Data(_) => {
                self.data += 1;
                self.last = Some(cluster);
            }
            Cluster::Compressed(_) => self.compressed += 1,
            Cluster::Zero | Cluster::Unallocated => {}
        }
    }
}

impl Image {
    /// Judges every L2 entry that the disk needs; counts clusters into `info`.
    ///
    /// # Errors
    /// [`ImageError`] with the first entry at fault, or the read that failed.
    pub fn check(&self, file: &File, path: &Path, info: &mut Info) -> Result<(), ImageError> {
        let cluster_bytes = self.header.cluster_bits.size_bytes();
        let mut counts = ClusterCounts::default();
        let mut odd_entries = 0_u64;
        let mut buffer = vec![0; usize::try_from(cluster_bytes).expect("at most 2 MiB")];
        for table in self.tables() {
            let Some(stored) = &table.stored else {
                counts.zero += table.clusters;
                continue;
            };
            let len = usize::try_from(stored.end - stored.start).expect("at most 2 MiB");
            let bytes = buffer.get_mut(..len).expect("a table is at most a cluster");
            file.read_exact_at(bytes, stored.start)
                .map_err(|source| ImageError::read(path, stored.start, len, source))?;
            let mut counter = Counter::new(self.header.units_in_cluster_bits());
            odd_entries += self.decode_table(
                table.first_cluster,
                stored.start,
                bytes,
                path,
                &mut |units, cluster| counter.add(&units, cluster),
            )?;
            counts.data += counter.data;
            counts.compressed += counter.compressed;
            counts.zero += table.clusters - counter.data - counter.compressed;
        }
        if odd_entries > 0 {
            info.notes.push(format!("{odd_entries} L2 entries have reserved bits set; ignored"));
        }
        info.clusters = Some(counts);
        Ok(())
    }

    /// The L2 tables that the disk needs, in the order of the guest.
    pub fn tables(&self) -> impl Iterator<Item = L2Table> {
        let (l2_bits, entry_bytes) = (self.header.l2_bits(), self.header.l2_entry_bytes());
        let (total, per_table) = (self.header.clusters(), 1_u64 << l2_bits);
        (0..).step_by(1 << l2_bits).zip(&self.l1).map(move |(first_cluster, &at)| {
            let clusters = per_table.min(total - first_cluster);
            let stored = (at != 0).then(|| at..at + entry_bytes * clusters);
            L2Table { first_cluster, clusters, stored }
        })
    }

    /// Judges the entries of one L2 table and gives the meaning of each run of guest units (see
    /// [`Header::unit_bits`]) to `each`, in order and cluster by cluster; the last run may reach
    /// past the disk's end. `bytes` are those of [`L2Table::stored`], which begins at `table_at`;
    /// `path` is for messages. Pure. Returns how many entries have reserved bits set, which changes
    /// nothing.
    ///
    /// # Errors
    /// [`ImageError`] with the first entry at fault.
    pub fn decode_table(
        &self,
        first_cluster: u64,
        table_at: u64,
        bytes: &[u8],
        path: &Path,
        each: &mut dyn FnMut(Range<u64>, Cluster),
    ) -> Result<u64, ImageError> {
        let (limits, mut odd_entries) = (self.limits(), 0);
        let (in_cluster, entry_bytes) =
            (self.header.units_in_cluster_bits(), self.header.l2_entry_bytes());
        for (index, entry) in (0_u64..).zip(table::entries(&self.header, bytes)) {
            let cluster = first_cluster + index;
            let judged = self.judge(entry, cluster, &limits).map_err(|fault| {
                ImageError::fault(path, fault.at(FileOffset(table_at + entry_bytes * index)))
            })?;
            odd_entries += u64::from(entry.is_odd());
            let first = cluster << in_cluster;
            judged.each(|units, meaning| each(first + units.start..first + units.end, meaning));
        }
        Ok(odd_entries)
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
