//! The wire types of scrubs and drills.
//!
//! Why: one file for what belongs together; `types` is long enough.
//! Never: an answer's type that holds a credential; see [`super::types`].

use serde::{Deserialize, Serialize};

/// The last scrub of a copy.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Scrub {
    /// When it ended, RFC 3339.
    pub at: String,
    /// `good`, `repaired`, `bad`, or `unchecked` if it could not be found out.
    pub result: String,
    /// Bytes that were bad and are right again.
    pub repaired_bytes: u64,
    /// Bytes that are bad; 0 if all of the copy is.
    pub bad_bytes: u64,
    /// What is worth knowing; may be empty.
    pub message: String,
}

/// Answer of `/v1/node`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Node {
    /// `ready`, or `failed` while a drill says so.
    pub state: String,
}

impl Node {
    /// A node that counts as gone, or does not.
    #[must_use]
    pub fn new(failed: bool) -> Self {
        Self { state: if failed { "failed" } else { "ready" }.to_owned() }
    }
}

/// Body of `POST /v1/images/{name}/scrub`; may be absent.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ScrubImage {
    /// On which disk; default: every complete copy.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk: Option<String>,
}
