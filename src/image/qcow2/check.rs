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

use super::entry::{Cluster, decode_l2, reserved_l2_bits};
use super::header::Header;
use super::open::Image;
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

impl Image {
    /// Judges every L2 entry that the disk needs; counts clusters into `info`.
    ///
    /// # Errors
    /// [`ImageError`] with the first entry at fault, or the read that failed.
    pub fn check(&self, file: &File, path: &Path, info: &mut Info) -> Result<(), ImageError> {
        let bits = self.header.cluster_bits;
        let (total, per_table) = (self.header.clusters(), 1_u64 << bits.l2_bits());
        let mut counts = ClusterCounts::default();
        let mut odd_entries = 0_u64;
        let mut buffer = vec![0; usize::try_from(bits.size_bytes()).expect("at most 2 MiB")];
        for (first, &table) in (0..).step_by(1 << bits.l2_bits()).zip(&self.l1) {
            let entries = per_table.min(total - first);
            if table == 0 {
                counts.zero += entries;
                continue;
            }
            let len = usize::try_from(entries * 8).expect("at most 2 MiB");
            let bytes = buffer.get_mut(..len).expect("a table is at most a cluster");
            file.read_exact_at(bytes, table)
                .map_err(|source| ImageError::read(path, table, len, source))?;
            odd_entries +=
                self.decode_table(first, table, bytes, path, &mut |_, cluster| match cluster {
                    Cluster::Data(_) => counts.data += 1,
                    Cluster::Zero | Cluster::Unallocated => counts.zero += 1,
                    Cluster::Compressed(_) => counts.compressed += 1,
                })?;
        }
        if odd_entries > 0 {
            info.notes.push(format!("{odd_entries} L2 entries have reserved bits set; ignored"));
        }
        info.clusters = Some(counts);
        Ok(())
    }

    /// The L2 tables that the disk needs, in the order of the guest.
    pub fn tables(&self) -> impl Iterator<Item = L2Table> {
        let bits = self.header.cluster_bits;
        let (total, per_table) = (self.header.clusters(), 1_u64 << bits.l2_bits());
        (0..).step_by(1 << bits.l2_bits()).zip(&self.l1).map(move |(first_cluster, &at)| {
            let clusters = per_table.min(total - first_cluster);
            let stored = (at != 0).then(|| at..at + 8 * clusters);
            L2Table { first_cluster, clusters, stored }
        })
    }

    /// Judges the entries of one L2 table and gives each cluster's meaning to `each`. `bytes` are
    /// those of [`L2Table::stored`], which begins at `table_at`; `path` is for messages. Pure.
    /// Returns how many entries have reserved bits set, which changes nothing.
    ///
    /// # Errors
    /// [`ImageError`] with the first entry at fault.
    pub fn decode_table(
        &self,
        first_cluster: u64,
        table_at: u64,
        bytes: &[u8],
        path: &Path,
        each: &mut dyn FnMut(u64, Cluster),
    ) -> Result<u64, ImageError> {
        let (limits, mut odd_entries) = (self.limits(), 0);
        for (index, &entry) in bytes.as_chunks().0.iter().enumerate() {
            let (raw, cluster) = (u64::from_be_bytes(entry), first_cluster + index as u64);
            let decoded = decode_l2(raw, self.visible_bytes(cluster), &limits);
            let decoded = decoded.map_err(|fault| {
                ImageError::fault(path, fault.at(FileOffset(table_at + 8 * index as u64)))
            })?;
            odd_entries += u64::from(reserved_l2_bits(raw) != 0);
            each(cluster, decoded);
        }
        Ok(odd_entries)
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
