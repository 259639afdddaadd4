//! Wire types of traces. A trace itself is [`crate::image::TraceFile`], as in a file.
//!
//! Why: see `types`.
//! Never: holds a URL.

use serde::{Deserialize, Serialize};

/// Body of `POST /v1/images/{name}/trace`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RecordTrace {
    /// End by itself after so many seconds; default: when it is ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub for_s: Option<u64>,
}

/// What is kept with an image of what its readers will ask for first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Prefetch {
    /// Ranges of the disk.
    pub ranges: u64,
    /// Bytes of all of them.
    pub bytes: u64,
}
