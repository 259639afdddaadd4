//! The manager's records: what the catalog keeps across restarts, as JSON.
//!
//! Why: a restart must find every image, every wanted disk and every reader as they were.
//! How: plain data with serde. Unknown fields are ignored, so an older daemon reads what a newer
//! one wrote. The state of a copy isn't here: the files on the disk are its only witness.
//! Never: holds what can be read from the disk, or a credential outside [`SourceUrl`] and [`Access`].
//! Start at [`ImageRecord`].

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use super::selectors::Selectors;
use crate::fetch::source::{self, SourceUrl};
use crate::fetch::{Access, DigestMap};
use crate::image::{Format, Trace};
use crate::import::Layout;
use crate::names::{ClassName, DiskUuid, ImageName, ImageUuid, NameError, Tag, VolumeName};

/// What a user says of the digests of an image's file; checked on arrival.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Expected {
    /// The digests that it must have, a property each.
    #[serde(flatten)]
    pub digests: DigestMap,
    /// Where a file of digests is that has the image's; whole, as [`ImageRecord::source`] is.
    #[serde(default, with = "source::whole", skip_serializing_if = "Option::is_none")]
    pub checksum_url: Option<SourceUrl>,
}

/// What the first good copy told about the image: write-once; a copy that differs is refused.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Facts {
    /// Format of the file.
    pub format: Format,
    /// Size of the disk as it is now, in bytes.
    pub virtual_size_bytes: u64,
    /// Size of the disk at the internal snapshot that readers get, if they get one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub snapshot_size_bytes: Option<u64>,
    /// Length of the file in bytes.
    pub size_bytes: u64,
    /// Digests of the file that were computed, a property each.
    #[serde(flatten)]
    pub digests: DigestMap,
    /// The strong ETag of the source when it came: a repair asks for no other version.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub etag: Option<String>,
}

impl Facts {
    /// Size of the disk that a guest sees, in bytes.
    #[must_use]
    pub fn guest_size_bytes(&self) -> u64 {
        self.snapshot_size_bytes.unwrap_or(self.virtual_size_bytes)
    }
}

/// How a user steers the transfers of an image.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Steering {
    /// Nothing is fetched; what has arrived is kept.
    #[serde(default)]
    pub paused: bool,
    /// Of images that wait for their turn, higher ones come first; -100 to 100.
    #[serde(default)]
    pub priority: i32,
    /// Bytes per second at most, of each copy.
    #[serde(default)]
    pub rate_bytes_per_s: Option<u64>,
}

/// The image that another one is a clone of.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CloneOf {
    /// Its name.
    pub image: ImageName,
    /// Its uuid: an image that is created anew under the name is another one.
    pub uuid: ImageUuid,
}

/// One disk on which a copy is wanted.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Want {
    /// Why the last try was refused for good; it isn't tried again until somebody asks.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub refused: Option<String>,
    /// Nobody has used the copy since then, in seconds since 1970, UTC.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unused_since_unix_s: Option<u64>,
    /// When the copy was last read against its digests, and what was found.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scrub: Option<ScrubRecord>,
}

/// What came of the last scrub of a copy.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ScrubRecord {
    /// When it ended, in seconds since 1970, UTC.
    pub at_unix_s: u64,
    /// What was found.
    pub result: ScrubResult,
    /// Bytes that were bad and are right again.
    #[serde(default)]
    pub repaired_bytes: u64,
    /// Bytes that are bad; 0 if all of it is.
    #[serde(default)]
    pub bad_bytes: u64,
    /// What is worth knowing; may be empty.
    #[serde(default)]
    pub message: String,
}

/// What a scrub has found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ScrubResult {
    /// Every byte is right.
    Good,
    /// Some were not, and are right again.
    Repaired,
    /// Some are not.
    Bad,
    /// It could not be found out.
    Unchecked,
}

impl ScrubResult {
    /// The word for people and for the wire.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Good => "good",
            Self::Repaired => "repaired",
            Self::Bad => "bad",
            Self::Unchecked => "unchecked",
        }
    }
}

/// One image: where it comes from, what is expected of it, where it is wanted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageRecord {
    /// The name, unique on this node.
    pub name: ImageName,
    /// Given once, never changed (rule 1); part of every copy's directory name.
    pub uuid: ImageUuid,
    /// Where the bytes come from. `None` for an image that was found on a disk.
    #[serde(default, with = "source::whole")]
    pub source: Option<SourceUrl>,
    /// Its bytes are uploaded, so many; no source then.
    #[serde(default)]
    pub upload_bytes: Option<u64>,
    /// Its bytes are those of another image's copy; no source then.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub clone_of: Option<CloneOf>,
    /// What it takes to reach the source; whole, as [`SourceUrl`] is.
    #[serde(default, skip_serializing_if = "Access::is_empty")]
    pub access: Box<Access>,
    /// Where the same bytes are too.
    #[serde(default, with = "source::whole_list", skip_serializing_if = "Vec::is_empty")]
    pub mirrors: Vec<SourceUrl>,
    /// What a copy's bytes are.
    #[serde(default)]
    pub layout: Layout,
    /// How its transfers are steered.
    #[serde(default)]
    pub steering: Steering,
    /// The image that it stands on: its backing file.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base: Option<ImageName>,
    /// The image whose file is its external data file.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub data_file: Option<ImageName>,
    /// Readers get the disk as it was at this internal snapshot, by ID or name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub snapshot: Option<String>,
    /// What the user says of its digests.
    #[serde(default)]
    pub expected: Box<Expected>,
    /// What the user says of its format; `None` = look.
    #[serde(default)]
    pub declared_format: Option<Format>,
    /// What its readers will ask for first: asked for ahead while a copy is read as it arrives.
    #[serde(default, skip_serializing_if = "Option::is_none", with = "shared")]
    pub prefetch: Option<Arc<Trace>>,
    /// What the first good copy told.
    #[serde(default)]
    pub facts: Option<Facts>,
    /// The disks on which a copy is wanted.
    #[serde(default)]
    pub disks: BTreeMap<DiskUuid, Want>,
    /// Copies that it is to have, and that stay although nobody uses them; 0 counts as 1.
    #[serde(default)]
    pub min_copies: u32,
    /// On which disks it may be.
    #[serde(default, skip_serializing_if = "Selectors::is_empty")]
    pub selectors: Selectors,
    /// Being deleted: copies go first, then this record.
    #[serde(default)]
    pub deleting: bool,
    /// Seconds since 1970, UTC.
    pub created_unix_s: u64,
}

/// A trace that records share.
mod shared {
    use super::{Arc, Trace};
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    pub(super) fn serialize<S: Serializer>(
        trace: &Option<Arc<Trace>>,
        out: S,
    ) -> Result<S::Ok, S::Error> {
        trace.as_deref().serialize(out)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(
        from: D,
    ) -> Result<Option<Arc<Trace>>, D::Error> {
        Option::<Trace>::deserialize(from).map(|trace| trace.map(Arc::new))
    }
}

/// A disk of the node, as it is known while it is missing.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskRecord {
    /// From its `longhorn-disk.cfg`.
    pub uuid: DiskUuid,
    /// Its directory.
    pub path: std::path::PathBuf,
    /// New copies may be brought in on it.
    #[serde(default = "yes")]
    pub schedulable: bool,
    /// Its copies are to go elsewhere.
    #[serde(default)]
    pub evict: bool,
    /// Words that its user has for it.
    #[serde(default)]
    pub tags: std::collections::BTreeSet<Tag>,
}

fn yes() -> bool {
    true
}

/// An attachment's name: 8 hex digits, given by the manager.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct AttachmentId(String);

impl AttachmentId {
    /// Checks `text`: 8 lower-case hex digits.
    ///
    /// # Errors
    /// [`NameError`] with the rule.
    pub fn parse(text: &str) -> Result<Self, NameError> {
        let ok = text.len() == 8 && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
        if !ok {
            let found = text.chars().take(80).collect();
            let rule = "an attachment's id is 8 of 0-9, a-f";
            return Err(NameError { what: "attachment id", found, rule });
        }
        Ok(Self(text.to_owned()))
    }

    /// A new random id.
    ///
    /// # Errors
    /// The system has no random numbers to give.
    pub fn random() -> std::io::Result<Self> {
        Ok(Self(ImageUuid::random()?.as_str().to_owned()))
    }

    /// The id as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for AttachmentId {
    type Error = NameError;
    fn try_from(text: String) -> Result<Self, NameError> {
        Self::parse(&text)
    }
}

impl From<AttachmentId> for String {
    fn from(id: AttachmentId) -> Self {
        id.0
    }
}

impl fmt::Display for AttachmentId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// One reader of an image on a disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AttachmentRecord {
    /// Its name.
    pub id: AttachmentId,
    /// The image it reads.
    pub image: ImageName,
    /// The disk whose copy it reads.
    pub disk: DiskUuid,
    /// What the reader calls itself; may be empty.
    #[serde(default)]
    pub reader: String,
    /// True if it does not wait until the copy is complete.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub stream: bool,
    /// True if it is a VM, which gets a socket of its own.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub vm: bool,
    /// Seconds since 1970, UTC.
    pub created_unix_s: u64,
}

/// A backup of a volume that a volume is restored from: what its `volume.cfg` says of its image.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BackupRecord {
    /// Name of the volume that was backed up; may be empty.
    #[serde(default)]
    pub volume: String,
    /// Name of its latest backup; may be empty.
    #[serde(default)]
    pub backup: String,
    /// The image that it stood on, if it says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image: Option<ImageName>,
    /// That image's SHA-512, lower-case hex, if it says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sha512: Option<String>,
    /// True if the user said that another or an unproven image is right.
    #[serde(default)]
    pub forced: bool,
}

/// One volume: an image, and the disks that its replicas are on. What a guest writes is not here.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeRecord {
    /// The name, unique on this node.
    pub name: VolumeName,
    /// The image that it stands on.
    pub image: ImageName,
    /// The disks of its replicas, one for each.
    pub disks: Vec<DiskUuid>,
    /// How many replicas were asked for; the node may have fewer disks.
    pub replicas: u32,
    /// Size that was asked for, in bytes; `None`: the image's.
    #[serde(default)]
    pub size_bytes: Option<u64>,
    /// The backup that it is restored from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub backup: Option<BackupRecord>,
    /// The storage class that it was made by.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub class: Option<ClassName>,
    /// The claim that it was made for, `namespace/name`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub claim: Option<String>,
    /// True while it is attached: its replicas run, or wait for their copies.
    #[serde(default)]
    pub attached: bool,
    /// Seconds since 1970, UTC.
    pub created_unix_s: u64,
}

/// One storage class: how volumes and their images are made.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClassRecord {
    /// The name, unique on this node.
    pub name: ClassName,
    /// Who makes its volumes elsewhere; kept as it was given.
    #[serde(default)]
    pub provisioner: String,
    /// Name of the image; `None`: volumes of this class have none, and are not for this node.
    #[serde(default)]
    pub image: Option<ImageName>,
    /// Where a missing image comes from; whole, as [`ImageRecord::source`] is.
    #[serde(default, with = "source::whole")]
    pub url: Option<SourceUrl>,
    /// The image that a missing image is a clone of; no `url` then.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub clone_of: Option<ImageName>,
    /// The SHA-512 that its file must have, lower-case hex.
    #[serde(default)]
    pub sha512: Option<String>,
    /// Copies that it is to have, and that stay although nobody uses them; `None`: not said.
    #[serde(default)]
    pub min_copies: Option<u32>,
    /// Replicas of a volume; `None`: not said.
    #[serde(default)]
    pub replicas: Option<u32>,
    /// On which disks its image may be.
    #[serde(default, skip_serializing_if = "Selectors::is_empty")]
    pub selectors: Selectors,
    /// Parameters that are known and mean nothing on one node, as they were given.
    #[serde(default)]
    pub kept: BTreeMap<String, String>,
    /// Seconds since 1970, UTC.
    pub created_unix_s: u64,
}

/// Seconds since 1970, UTC; 0 if the clock is before.
#[must_use]
pub(crate) fn unix_now_s() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_of_a_newer_daemon_is_read() {
        let json = r#"{"name":"a","uuid":"0a1b","created_unix_s":7,"colour":"blue",
                       "source":"https://u:pw@h/a?t=1","disks":{"0123456789":{"later":1}}}"#;
        let record: ImageRecord = serde_json::from_str(json).unwrap();
        assert_eq!(record.source.as_ref().unwrap().expose().as_str(), "https://u:pw@h/a?t=1");
        let again: ImageRecord =
            serde_json::from_str(&serde_json::to_string(&record).unwrap()).unwrap();
        assert_eq!(again, record);
        assert!(!format!("{record:?}").contains("pw"));
        assert!(record.access.is_empty());
    }

    #[test]
    fn a_record_keeps_its_access_and_does_not_print_it() {
        let json = r#"{"name":"a","uuid":"0a1b","created_unix_s":7,"source":"https://h/a",
                       "access":{"bearer":"hunter2","basic2":{"later":"hunter2"}}}"#;
        let record: ImageRecord = serde_json::from_str(json).unwrap();
        let stored = serde_json::to_string(&record).unwrap();
        assert_eq!(serde_json::from_str::<ImageRecord>(&stored).unwrap(), record);
        assert!(stored.contains("basic2") && !format!("{record:?}").contains("hunter2"));
    }

    #[test]
    fn a_record_with_a_field_for_each_digest_is_read() {
        let json = format!(
            r#"{{"name":"a","uuid":"0a1b","created_unix_s":7,"source":"https://h/a",
                 "expected":{{"sha512":"{}"}},"facts":{{"format":"raw","virtual_size_bytes":1,
                 "size_bytes":1,"sha256":"{}","sha512":null}}}}"#,
            "a".repeat(128),
            "b".repeat(64)
        );
        let record: ImageRecord = serde_json::from_str(&json).unwrap();
        let (expected, facts) = (&record.expected, record.facts.as_ref().unwrap());
        assert_eq!(expected.digests.to_string(), format!("sha512:{}", "a".repeat(128)));
        assert_eq!(facts.digests.to_string(), format!("sha256:{}", "b".repeat(64)));
        assert_eq!(expected.checksum_url, None);
    }

    #[test]
    fn a_record_keeps_its_checksum_url_whole_and_does_not_print_it() {
        let json = r#"{"name":"a","uuid":"0a1b","created_unix_s":7,"source":"https://h/a",
                       "expected":{"checksum_url":"https://u:hunter2@h/SHA256SUMS"}}"#;
        let record: ImageRecord = serde_json::from_str(json).unwrap();
        let stored = serde_json::to_string(&record).unwrap();
        assert_eq!(serde_json::from_str::<ImageRecord>(&stored).unwrap(), record);
        assert!(stored.contains("hunter2") && !format!("{record:?}").contains("hunter2"));
    }
}
