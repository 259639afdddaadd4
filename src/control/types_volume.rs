//! The wire types of volumes, storage classes and manifests.
//!
//! Why: `types` is long enough; the rules are the same.
//! Never: an answer's type that holds a credential.
//! Start at [`Volume`].

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::types::{Attach, Nbd};

/// One condition of a replica, as Kubernetes writes them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Condition {
    /// `WaitForBackingImage`.
    #[serde(rename = "type")]
    pub kind: String,
    /// `True` while the replica waits for its copy, else `False`.
    pub status: String,
    /// `Waiting`, `Failed`, `Ready` or `Detached`.
    pub reason: String,
    /// Why, in words; may be empty.
    pub message: String,
}

/// One replica of a volume.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Replica {
    /// `<volume>-r-<first 8 of disk UUID>`.
    pub name: String,
    /// UUID of its disk.
    pub disk: String,
    /// `stopped`, `waiting`, `running` or `failed`.
    pub state: String,
    /// State of the copy that it reads.
    pub copy_state: String,
    /// Its conditions.
    pub conditions: Vec<Condition>,
    /// The file that it reads; `null` unless it runs.
    pub path: Option<String>,
    /// Where it can read the image's disk; `null` unless it runs.
    pub nbd: Option<Nbd>,
    /// Where it attaches to read by itself; `null` unless it runs.
    #[serde(default)]
    pub attach: Option<Attach>,
}

/// The backup that a volume is restored from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Backup {
    /// Name of the volume that was backed up; may be empty.
    pub volume: String,
    /// Name of its latest backup; may be empty.
    pub backup: String,
    /// The image that it was made on, if it says.
    pub image: Option<String>,
    /// That image's SHA-512, if it says.
    pub sha512: Option<String>,
    /// True if a user said that another or an unproven image is right.
    pub forced: bool,
}

/// One volume.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Volume {
    /// Its name.
    pub name: String,
    /// The image that it stands on.
    pub image: String,
    /// `detached`, `attaching` (no replica runs yet) or `attached`.
    pub state: String,
    /// `healthy`, `degraded`, `faulted` or `unknown`.
    pub robustness: String,
    /// Size that was asked for; `null`: the image's.
    pub size_bytes: Option<u64>,
    /// How many replicas were asked for.
    pub number_of_replicas: u32,
    /// Its replicas: fewer than asked for, if the node has too few disks.
    pub replicas: Vec<Replica>,
    /// The backup that it is restored from.
    pub backup: Option<Backup>,
    /// The storage class that it was made by.
    pub class: Option<String>,
    /// The claim that it was made for, `namespace/name`.
    pub claim: Option<String>,
    /// What is worth knowing; may be empty.
    pub message: String,
    /// RFC 3339, UTC.
    pub created_at: String,
}

/// Answer of `/v1/volumes`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Volumes {
    /// By name.
    pub volumes: Vec<Volume>,
}

/// Body of `POST /v1/volumes`. Its `Debug` shows no URL.
#[derive(Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CreateVolume {
    /// Its name.
    pub name: String,
    /// The image that it stands on; default: the one that the backup records.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image: Option<String>,
    /// Where the image comes from if it is not known; another one than the known is refused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub url: Option<String>,
    /// SHA-512 that the image's file must have.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sha512: Option<String>,
    /// The disks of its replicas; default: healthy ones with most room.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub disks: Vec<String>,
    /// How many replicas; default: as many as there are `disks`, or 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub replicas: Option<u32>,
    /// Size in bytes; default: the image's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub size_bytes: Option<u64>,
    /// The `volume.cfg` of the backup that it is restored from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub backup: Option<serde_json::Value>,
    /// The image is right, whatever the backup says of its digest.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub force: bool,
}

impl std::fmt::Debug for CreateVolume {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CreateVolume").field("name", &self.name).finish_non_exhaustive()
    }
}

/// One storage class.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Class {
    /// Its name.
    pub name: String,
    /// As it was given; may be empty.
    pub provisioner: String,
    /// Name of the image.
    pub image: Option<String>,
    /// Where a missing image comes from, without userinfo and query values.
    pub source: Option<String>,
    /// The image that a missing image is a clone of.
    pub clone_of: Option<String>,
    /// SHA-512 that its file must have.
    pub sha512: Option<String>,
    /// Copies that it is to have, and that stay although nobody uses them; `null`: not said.
    pub min_copies: Option<u32>,
    /// Replicas of a volume; `null`: not said.
    pub number_of_replicas: Option<u32>,
    /// Parameters that mean nothing on one node, as they were given.
    pub kept: BTreeMap<String, String>,
    /// RFC 3339, UTC.
    pub created_at: String,
}

/// Answer of `/v1/classes`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Classes {
    /// By name.
    pub classes: Vec<Class>,
}

/// What became of one document of a manifest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AppliedDocument {
    /// Which document, from 1.
    pub document: u64,
    /// The line on which it begins, from 1.
    pub line: u64,
    /// `StorageClass`, `PersistentVolumeClaim`, `BackingImage` or `Volume`.
    pub kind: String,
    /// Its name.
    pub name: String,
    /// `created`, `configured` or `unchanged`.
    pub action: String,
    /// What was passed over, or is worth knowing.
    pub notes: Vec<String>,
}

/// Answer of `POST /v1/apply`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Applied {
    /// In the order of the manifest.
    pub documents: Vec<AppliedDocument>,
}
