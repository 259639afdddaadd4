//! What belongs to a disk on the wire.
//!
//! Why: as `types`, which is long enough.
//! Never: acts.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

/// Answer of `GET /v1/disks`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Disks {
    /// All disks; the first one has the catalog.
    pub disks: Vec<Disk>,
}

/// One disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Disk {
    /// From its `longhorn-disk.cfg`.
    pub uuid: String,
    /// Its directory.
    pub path: String,
    /// Size of its file system.
    pub total_bytes: u64,
    /// Bytes that may still be written.
    pub free_bytes: u64,
    /// Bytes of those that running transfers have reserved.
    pub reserved_bytes: u64,
    /// How bytes are written: `uring` or `threads`; empty while it is not there.
    pub sink: String,
    /// False: it is not there, or not usable.
    pub healthy: bool,
    /// True if new copies may be brought in on it.
    pub schedulable: bool,
    /// True while its copies are to go elsewhere.
    pub evicting: bool,
    /// Words that its user has for it.
    pub tags: BTreeSet<String>,
    /// Copies on it, complete or not.
    pub copies: u64,
    /// Why it is not healthy, or what is worth knowing; may be empty.
    pub message: String,
}

/// Body of `POST /v1/disks`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AddDisk {
    /// An absolute path; a directory that is no disk yet becomes one.
    pub path: String,
}

/// Body of `PATCH /v1/disks/{uuid}`: what is absent stays as it is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ChangeDisk {
    /// Whether new copies may be brought in on it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub schedulable: Option<bool>,
    /// Whether its copies are to go elsewhere.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub evict: Option<bool>,
    /// Its tags, all of them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tags: Option<BTreeSet<String>>,
}
