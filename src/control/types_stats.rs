//! What `/v1/stats` answers.
//!
//! Why: see `types`.
//! Never: holds a URL.

use serde::{Deserialize, Serialize};

/// Answer of `/v1/stats`. Counts grow from the daemon's start, or from when the image was exported.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stats {
    /// Seconds since 1970, UTC.
    pub unix_s: u64,
    /// Compressed clusters that were decoded.
    pub decoded_clusters: u64,
    /// Bytes of them that are kept for readers.
    pub decoded_bytes: u64,
    /// Each image.
    pub images: Vec<ImageStats>,
}

/// What the readers of one image did.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageStats {
    /// The image.
    pub name: String,
    /// True if a copy of it is complete.
    pub ready: bool,
    /// Bytes that are here of one that is still arriving.
    pub bytes_done: Option<u64>,
    /// Length of that in bytes, if it is known.
    pub bytes_total: Option<u64>,
    /// Sessions that are open now.
    pub sessions: u64,
    /// Requests answered.
    pub requests: u64,
    /// Bytes sent, holes included.
    pub bytes: u64,
    /// Requests answered with an error.
    pub errors: u64,
    /// Compressed clusters, or parts of one, that were sent.
    pub decoded: u64,
    /// Reads that had to wait for what was still to come.
    pub demand_misses: u64,
    /// How long they waited, together, in microseconds.
    pub demand_waited_us: u64,
    /// Pieces that were asked for again on another connection, as nothing came of them, or too little.
    #[serde(default)]
    pub demand_stalls: u64,
    /// Bytes that were fetched ahead because a trace named them.
    #[serde(default)]
    pub prefetched_bytes: u64,
    /// Times of NBD requests.
    pub nbd: Option<Latencies>,
    /// Times of questions of attached readers.
    pub replica: Option<Latencies>,
    /// Times of their attaching.
    pub attach: Option<Latencies>,
    /// Times of VMs' requests.
    pub vm: Option<Latencies>,
}

/// How long something took. A quantile is the end of its bucket: up to twice the real one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Latencies {
    /// How many there were.
    pub count: u64,
    /// All together, in microseconds.
    pub sum_us: u64,
    /// Half of them took less, in microseconds.
    pub p50_us: u64,
    /// 99 of 100 took less.
    pub p99_us: u64,
    /// 999 of 1000 took less.
    pub p999_us: u64,
    /// How many took less than a microsecond, then less than 2, 4, 8 and so on; the last: longer.
    pub buckets: Vec<u64>,
}
