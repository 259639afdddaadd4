//! The wire types of `/v1`: what the daemon sends and what the CLI and scripts read.
//!
//! Why: the contract is in one file, apart from the manager's own types, which may change.
//! How: plain serde. Every property of an answer is always there (`null` when not known); readers
//! ignore properties that they don't know, the daemon refuses them in requests.
//! Never: an answer's type that holds a credential: a source is text that was redacted already.
//! Start at [`Image`].

use serde::{Deserialize, Serialize};

pub use super::types_attachment::{Attach, Vm, Wait};
pub use super::types_create::CreateImage;
use super::types_health::Scrub;
use super::types_trace::Prefetch;
use crate::fetch::{DigestKind, DigestMap};

/// Digests of an image's file, lower-case hex.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Digests {
    /// 64 hex digits.
    pub sha256: Option<String>,
    /// 128 hex digits.
    pub sha512: Option<String>,
    /// 40 hex digits.
    pub sha1: Option<String>,
    /// 32 hex digits.
    pub md5: Option<String>,
    /// 64 hex digits.
    pub blake3: Option<String>,
}

impl Digests {
    /// The digests by their names.
    #[must_use]
    pub fn by_name(&self) -> [(&'static str, Option<&str>); 5] {
        [
            ("sha256", self.sha256.as_deref()),
            ("sha512", self.sha512.as_deref()),
            ("sha1", self.sha1.as_deref()),
            ("md5", self.md5.as_deref()),
            ("blake3", self.blake3.as_deref()),
        ]
    }
}

impl From<&DigestMap> for Digests {
    fn from(map: &DigestMap) -> Self {
        let of = |kind| map.get(kind).map(str::to_owned);
        Self {
            sha256: of(DigestKind::Sha256),
            sha512: of(DigestKind::Sha512),
            sha1: of(DigestKind::Sha1),
            md5: of(DigestKind::Md5),
            blake3: of(DigestKind::Blake3),
        }
    }
}

/// Where readers find an image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Nbd {
    /// Path of the NBD server's Unix socket.
    pub socket: String,
    /// Name of the export: the image's name.
    pub export: String,
    /// Both, as an NBD URI.
    pub uri: String,
}

/// One copy of an image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Copy {
    /// UUID of its disk.
    pub disk: String,
    /// Name of its worker.
    pub worker: String,
    /// `pending`, `starting`, `in-progress`, `ready-for-transfer`, `ready`, `failed`,
    /// `failed-and-cleanup` or `unknown`.
    pub state: String,
    /// `connecting`, `fetching`, `verifying`, `sealing` or `retrying`; `null` unless it is worked
    /// on.
    pub phase: Option<String>,
    /// Bytes of the file that are here.
    pub bytes_done: u64,
    /// Length of the file.
    pub bytes_total: Option<u64>,
    /// Bytes per second, over the last seconds.
    pub rate_bytes_per_s: u64,
    /// Time left until the file is whole.
    pub eta_s: Option<u64>,
    /// Bytes that the file occupies on its disk.
    pub stored_bytes: Option<u64>,
    /// Connections to the source.
    #[serde(default)]
    pub connections: u32,
    /// How many times the source was tried again.
    pub retries: u32,
    /// Connections to the source that were left, as far too little came on them.
    #[serde(default)]
    pub overtaken: u32,
    /// True if it failed for good: only a new attach or fetch tries again.
    pub refused: bool,
    /// Why it failed, or what is worth knowing; may be empty.
    pub message: String,
    /// Since when nobody uses it, RFC 3339; `null` while somebody does.
    #[serde(default)]
    pub unused_since: Option<String>,
    /// True while it is read against its digests, or waits to be.
    #[serde(default)]
    pub scrubbing: bool,
    /// How many of its bytes that has done; `null` while it waits, or nobody asked.
    #[serde(default)]
    pub scrubbed_bytes: Option<u64>,
    /// What came of that the last time; `null` if it never was.
    #[serde(default)]
    pub scrub: Option<Scrub>,
}

/// One image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Image {
    /// Its name.
    pub name: String,
    /// Given once, never changed.
    pub uuid: String,
    /// Its URL, without userinfo and query values; `null` for an image found on a disk.
    pub source: Option<String>,
    /// Its mirrors, redacted as the source.
    #[serde(default)]
    pub mirrors: Vec<String>,
    /// How many bytes are uploaded; `null` for an image that has a source or was found.
    #[serde(default)]
    pub upload_bytes: Option<u64>,
    /// The image that it is a clone of.
    #[serde(default)]
    pub clone_of: Option<String>,
    /// What is set of its access: `basic`, `bearer`, `headers`, `ca`, `cert`, `proxy`, `no_proxy`,
    /// `direct`, `s3`. Never a value.
    #[serde(default)]
    pub access: Vec<String>,
    /// `as-is` or `raw`: what a copy's bytes are.
    #[serde(default)]
    pub layout: String,
    /// The image that it stands on: its backing file.
    #[serde(default)]
    pub base: Option<String>,
    /// The image whose file is its external data file.
    #[serde(default)]
    pub data_file: Option<String>,
    /// The internal snapshot that readers get, by ID or name.
    #[serde(default)]
    pub snapshot: Option<String>,
    /// Copies that it is to have, and that stay although nobody uses them.
    #[serde(default)]
    pub min_copies: u32,
    /// Tags that a disk must have for it.
    #[serde(default)]
    pub disk_selector: Vec<String>,
    /// Tags that the node must have.
    #[serde(default)]
    pub node_selector: Vec<String>,
    /// True if nothing is fetched for now.
    #[serde(default)]
    pub paused: bool,
    /// Of images that wait for their turn, higher ones come first.
    #[serde(default)]
    pub priority: i32,
    /// Bytes per second at most, of each copy; 0 is no limit.
    #[serde(default)]
    pub rate_limit_bytes_per_s: u64,
    /// Digests that the user expects.
    pub expected: Digests,
    /// URL of the file of digests that has the image's, without userinfo and query values.
    #[serde(default)]
    pub checksum_url: Option<String>,
    /// `raw`, `qcow2`, `vmdk`, `vhd` or `vhdx`: found, or else declared.
    pub format: Option<String>,
    /// Size of the disk that a guest sees.
    pub virtual_size_bytes: Option<u64>,
    /// Length of the file.
    pub size_bytes: Option<u64>,
    /// Bytes that all copies occupy.
    pub stored_bytes: Option<u64>,
    /// Digests that were computed.
    pub digests: Digests,
    /// What is kept of what its readers will ask for first; `null` for nothing.
    #[serde(default)]
    pub prefetch: Option<Prefetch>,
    /// Its copies, by disk.
    pub copies: Vec<Copy>,
    /// How many attachments hold it.
    pub attachments: u64,
    /// True while it is being deleted.
    pub deleting: bool,
    /// Where to read it; `null` until a copy is ready.
    pub nbd: Option<Nbd>,
    /// RFC 3339, UTC.
    pub created_at: String,
}

/// One reader of an image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attachment {
    /// Its id.
    pub id: String,
    /// The image that it reads.
    pub image: String,
    /// UUID of the disk whose copy it reads.
    pub disk: String,
    /// What the reader calls itself; may be empty.
    pub reader: String,
    /// What it waits for.
    #[serde(default)]
    pub wait: Wait,
    /// `waiting`, `ready` or `failed`.
    pub state: String,
    /// Why it waits or failed; may be empty.
    pub message: String,
    /// Where to read; `null` until it is ready.
    pub nbd: Option<Nbd>,
    /// Where it attaches to read by itself; `null` until it is ready.
    #[serde(default)]
    pub attach: Option<Attach>,
    /// Where its VM reads; `null` until it is ready, and for readers that are no VM.
    #[serde(default)]
    pub vm: Option<Vm>,
    /// RFC 3339, UTC.
    pub created_at: String,
}

/// One event of `/v1/events`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Event {
    /// Grows with each change; the events of the snapshot have the id of the last change in it.
    pub id: u64,
    /// `image.snapshot`, `attachment.snapshot`, `snapshot.end`, `image.created`, `image.updated`,
    /// `image.progress`, `image.deleted`, `attachment.created`, `attachment.updated`,
    /// `attachment.deleted`, `volume.snapshot`, `volume.created`, `volume.updated`,
    /// `volume.deleted`, `image.warning`, `settings.updated`, `node.updated`, `disk.updated`,
    /// `disk.removed`, or `lagged` (events were lost; the stream ends; connect again).
    #[serde(rename = "type")]
    pub kind: String,
    /// When it happened, RFC 3339; `null` of what is as it is.
    #[serde(default)]
    pub at: Option<String>,
    /// The image, attachment or volume; what is deleted has only its name or id (and image).
    pub object: serde_json::Value,
}

/// How good one checked thing is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Level {
    /// As it should be.
    Ok,
    /// Works, but slower or less safely.
    Warn,
    /// Does not work.
    Fail,
}

/// One line of `/v1/doctor`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Check {
    /// What was looked at.
    pub name: String,
    /// How it is.
    pub level: Level,
    /// What was found.
    pub message: String,
    /// What to do; empty if nothing.
    pub hint: String,
}

/// Answer of `/v1/images`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Images {
    /// By name.
    pub images: Vec<Image>,
}

/// Answer of `/v1/attachments`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attachments {
    /// By id.
    pub attachments: Vec<Attachment>,
}

/// Answer of `/v1/doctor`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Doctor {
    /// Every check.
    pub checks: Vec<Check>,
}

/// Answer of `/healthz`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Health {
    /// `ok`.
    pub status: String,
    /// Version of the daemon.
    pub version: String,
}

/// Answer of `PUT /v1/images/{name}/upload`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Uploaded {
    /// Where the upload goes on.
    pub offset: u64,
    /// How many bytes it will have.
    pub length: u64,
}

/// Body of `PATCH /v1/images/{name}`: what is absent stays as it is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SteerImage {
    /// Fetch nothing for now (what has arrived is kept), or go on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub paused: Option<bool>,
    /// -100 to 100; of images that wait for their turn, higher ones come first.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub priority: Option<i32>,
    /// Bytes per second at most, of each copy; 0 is no limit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rate_limit_bytes_per_s: Option<u64>,
    /// Copies that it is to have, and that stay although nobody uses them; 0 counts as 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub min_copies: Option<u32>,
    /// Tags that a disk must have for a further copy: all of them. What is there stays.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk_selector: Option<Vec<String>>,
    /// Tags that the node must have for a further copy: all of them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node_selector: Option<Vec<String>>,
}

/// Body of `POST /v1/images/{name}/cleanup`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CleanUp {
    /// The disks whose copies go: all of them or none.
    pub disks: Vec<String>,
}

/// Body of `POST /v1/images/{name}/fetch`; may be absent.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FetchImage {
    /// On which disk; default: one that has or wants it, else one with room.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk: Option<String>,
}

/// Body of `POST /v1/attachments`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CreateAttachment {
    /// The image to read.
    pub image: String,
    /// On which disk; default as for a fetch.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk: Option<String>,
    /// What the reader calls itself. With a label, repeating the request gives the same one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reader: Option<String>,
    /// `ready` (default): it can be read when the image is complete and checked. `stream`: as soon
    /// as its first bytes are here; what is not here yet is fetched first, and waited for.
    #[serde(default)]
    pub wait: Wait,
    /// True for a VM: it gets a socket of its own, for vhost-user.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub vm: bool,
}

/// Why a request was refused.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Problem {
    /// A fixed word for programs.
    pub code: String,
    /// What and where.
    pub message: String,
    /// What to do; may be empty.
    pub hint: String,
}

/// Body of every answer whose status is 400 or more.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ErrorBody {
    /// The problem.
    pub error: Problem,
}
