//! Counters of one export.
//!
//! Why: an operator asks who reads what, and whether anybody got errors.
//! How: relaxed atomics, added to once per batch of replies, read at any time.
//! Never: a lock, or a name that has to be looked up on the way of a byte.
//! Start at [`Counters`].

use std::sync::atomic::{AtomicU64, Ordering};

/// Counters that only grow.
#[derive(Debug, Default)]
pub struct Counters {
    connections: AtomicU64,
    requests: AtomicU64,
    bytes: AtomicU64,
    errors: AtomicU64,
    decoded: AtomicU64,
}

/// The counters at one moment. Each is exact; together they may be a batch apart.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CounterValues {
    /// Sessions that reached the transmission phase, ever.
    pub connections: u64,
    /// Requests that were answered.
    pub requests: u64,
    /// Bytes of the image that were sent, holes included.
    pub bytes: u64,
    /// Requests that were answered with an error.
    pub errors: u64,
    /// Compressed clusters, or parts of one, that were sent; most of them were decoded before.
    pub decoded: u64,
}

impl Counters {
    /// Counts a session.
    pub fn add_connection(&self) {
        self.connections.fetch_add(1, Ordering::Relaxed);
    }

    /// Adds what one batch of replies came to; its `connections` is ignored.
    pub fn add_batch(&self, batch: CounterValues) {
        self.requests.fetch_add(batch.requests, Ordering::Relaxed);
        self.bytes.fetch_add(batch.bytes, Ordering::Relaxed);
        if batch.decoded > 0 {
            self.decoded.fetch_add(batch.decoded, Ordering::Relaxed);
        }
        if batch.errors > 0 {
            self.errors.fetch_add(batch.errors, Ordering::Relaxed);
        }
    }

    /// All counters now.
    #[must_use]
    pub fn values(&self) -> CounterValues {
        CounterValues {
            connections: self.connections.load(Ordering::Relaxed),
            requests: self.requests.load(Ordering::Relaxed),
            bytes: self.bytes.load(Ordering::Relaxed),
            errors: self.errors.load(Ordering::Relaxed),
            decoded: self.decoded.load(Ordering::Relaxed),
        }
    }
}
