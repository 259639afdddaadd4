//! An inspection on the wire: what the daemon sends of a copy, and what the CLI prints of any file.
//!
//! Why: a person sees the same report of a file, of a URL and of an image of the store.
//! How: plain serde, made of [`crate::image::Inspection`]; flat, every property always there.
//! Never: holds a path of the daemon's store.
//! Start at [`Inspection`].

use serde::{Deserialize, Serialize};

use super::rfc3339;
use crate::image;

/// What a file is, what is wrong with it, and whether it is served.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Inspection {
    /// `ok`, `repairable` (served, but something is odd) or `refused`.
    pub verdict: String,
    /// What is odd or wrong, the worst first.
    pub findings: Vec<Finding>,
    /// Further damaged table entries, like those in `findings`.
    pub more_faults: u64,
    /// `raw`, `qcow2`, `vmdk`, `vhd` or `vhdx`.
    pub format: Option<String>,
    /// Length of the disk that a guest sees.
    pub virtual_size_bytes: Option<u64>,
    /// Length of the file.
    pub file_size_bytes: Option<u64>,
    /// QCOW2: 2 or 3.
    pub qcow2_version: Option<u32>,
    /// QCOW2: bytes of a cluster.
    pub cluster_size_bytes: Option<u64>,
    /// QCOW2: true if clusters have subclusters.
    pub extended_l2: Option<bool>,
    /// QCOW2: `zlib` or `zstd`, which compressed clusters would use.
    pub compression: Option<String>,
    /// QCOW2: clusters that are stored as they are.
    pub data_clusters: Option<u64>,
    /// QCOW2: clusters that are stored compressed.
    pub compressed_clusters: Option<u64>,
    /// QCOW2: clusters that are zero, or not stored.
    pub zero_clusters: Option<u64>,
    /// QCOW2: number of bitmaps that are up to date.
    pub bitmaps: Option<u32>,
    /// QCOW2: the internal snapshots, the oldest first.
    pub snapshots: Vec<Snapshot>,
}

/// One thing that is odd or wrong.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finding {
    /// What the image would be if this were all.
    pub verdict: String,
    /// What is found and what is needed, in words.
    pub text: String,
    /// The field's name in the format's specification.
    pub field: Option<String>,
    /// Its first byte in the file.
    pub at: Option<u64>,
}

/// An internal snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Snapshot {
    /// Its ID.
    pub id: String,
    /// Its name.
    pub name: String,
    /// Length of the disk then; `null`: as now.
    pub virtual_size_bytes: Option<u64>,
    /// When it was taken, RFC 3339.
    pub taken_at: String,
    /// Bytes of a running machine's memory that are kept with it.
    pub vm_state_bytes: u64,
}

impl From<&image::Inspection> for Inspection {
    fn from(inspection: &image::Inspection) -> Self {
        let info = inspection.info.as_ref();
        let clusters = info.and_then(|info| info.clusters);
        Self {
            verdict: inspection.verdict.to_string(),
            findings: inspection.findings.iter().map(Finding::from).collect(),
            more_faults: inspection.more_faults,
            format: info.map(|info| info.format.to_string()),
            virtual_size_bytes: info.map(|info| info.virtual_size_bytes),
            file_size_bytes: info.map(|info| info.file_size_bytes),
            qcow2_version: info.and_then(|info| info.qcow2_version),
            cluster_size_bytes: info.and_then(|info| info.cluster_size_bytes),
            extended_l2: info.and_then(|info| info.extended_l2),
            compression: info.and_then(|info| info.compression).map(|c| c.to_string()),
            data_clusters: clusters.map(|counts| counts.data),
            compressed_clusters: clusters.map(|counts| counts.compressed),
            zero_clusters: clusters.map(|counts| counts.zero),
            bitmaps: info.and_then(|info| info.bitmaps),
            snapshots: inspection.snapshots.iter().map(Snapshot::from).collect(),
        }
    }
}

impl From<&image::Finding> for Finding {
    fn from(finding: &image::Finding) -> Self {
        Self {
            verdict: finding.verdict.to_string(),
            text: finding.text.clone(),
            field: finding.field.map(str::to_owned),
            at: finding.at,
        }
    }
}

impl From<&image::qcow2::Snapshot> for Snapshot {
    fn from(snapshot: &image::qcow2::Snapshot) -> Self {
        Self {
            id: snapshot.id.clone(),
            name: snapshot.name.clone(),
            virtual_size_bytes: snapshot.disk_size_bytes,
            taken_at: rfc3339(snapshot.taken_at_s.into()),
            vm_state_bytes: snapshot.vm_state_bytes.into(),
        }
    }
}
