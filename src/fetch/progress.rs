//! How far a transfer is, readable at any time, and the way to stop it.
//!
//! Why: a progress bar, an event stream and a metric want the same numbers, and none may slow the
//! transfer down.
//! How: atomics that the transfer stores to and anybody loads.
//! Never: blocks.
//! Start at [`Progress::snapshot`].

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use tokio::sync::Notify;

use super::limit::RateLimit;

/// What a transfer is busy with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Phase {
    /// Waiting for the source's first answer.
    Connecting,
    /// Bytes arrive.
    Fetching,
    /// Bytes that are here are being read back and hashed.
    Verifying,
    /// Waiting before it tries again.
    Retrying,
}

/// The numbers at one moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// Bytes of the file that have arrived, those of earlier runs included.
    pub bytes_done: u64,
    /// Bytes of the whole file, if the source has said.
    pub bytes_total: Option<u64>,
    /// Bytes that came from the source in this run.
    pub bytes_received: u64,
    /// What it is busy with.
    pub phase: Phase,
    /// Connections to the source now.
    pub connections: u32,
    /// Failed attempts so far.
    pub retries: u32,
    /// Connections that were left, as far too little came on them; the rest was asked for on others.
    pub overtaken: u32,
    /// Why the last attempt failed; empty if none did.
    pub message: String,
}

/// Shared between a transfer and whoever watches it.
#[derive(Debug)]
pub struct Progress {
    done: AtomicU64,
    total: AtomicU64,
    received: AtomicU64,
    phase: AtomicU8,
    connections: AtomicU32,
    retries: AtomicU32,
    overtaken: AtomicU32,
    message: Mutex<String>,
    limit: RateLimit,
    stopped: AtomicBool,
    stop: Notify,
}

const UNKNOWN: u64 = u64::MAX;

/// Of all transfers of this process.
static OVERTAKEN: AtomicU64 = AtomicU64::new(0);

/// Connections that transfers of this process have left, as far too little came on them. Those that only
/// brought what readers wait for are not among them: [`crate::disk::Waits`] counts them.
#[must_use]
pub fn overtaken() -> u64 {
    OVERTAKEN.load(Ordering::Relaxed)
}

impl Default for Progress {
    fn default() -> Self {
        Self {
            done: AtomicU64::new(0),
            total: AtomicU64::new(UNKNOWN),
            received: AtomicU64::new(0),
            phase: AtomicU8::new(Phase::Connecting as u8),
            connections: AtomicU32::new(0),
            retries: AtomicU32::new(0),
            overtaken: AtomicU32::new(0),
            message: Mutex::default(),
            limit: RateLimit::default(),
            stopped: AtomicBool::new(false),
            stop: Notify::new(),
        }
    }
}

impl Progress {
    /// The numbers now.
    #[must_use]
    pub fn snapshot(&self) -> Snapshot {
        let total = self.total.load(Ordering::Relaxed);
        Snapshot {
            bytes_done: self.done.load(Ordering::Relaxed),
            bytes_total: (total != UNKNOWN).then_some(total),
            bytes_received: self.received.load(Ordering::Relaxed),
            phase: match self.phase.load(Ordering::Relaxed) {
                1 => Phase::Fetching,
                2 => Phase::Verifying,
                3 => Phase::Retrying,
                _ => Phase::Connecting,
            },
            connections: self.connections.load(Ordering::Relaxed),
            retries: self.retries.load(Ordering::Relaxed),
            overtaken: self.overtaken.load(Ordering::Relaxed),
            message: self.message.lock().unwrap_or_else(PoisonError::into_inner).clone(),
        }
    }

    /// The limit on this transfer's bytes per second.
    #[must_use]
    pub fn limit(&self) -> &RateLimit {
        &self.limit
    }

    /// Ends the transfer: what has arrived is made durable, then it returns
    /// [`super::FetchError::Cancelled`].
    pub fn stop(&self) {
        self.stopped.store(true, Ordering::SeqCst);
        self.stop.notify_waiters();
    }

    /// True once [`Progress::stop`] was called.
    #[must_use]
    pub fn is_stopped(&self) -> bool {
        self.stopped.load(Ordering::SeqCst)
    }

    /// Resolves once [`Progress::stop`] was called.
    pub async fn stopped(&self) {
        let notified = self.stop.notified();
        tokio::pin!(notified);
        // Registered before the flag is read, so that a stop in between is not missed.
        notified.as_mut().enable();
        if !self.is_stopped() {
            notified.await;
        }
    }

    /// For whoever makes something else of the bytes: so many are here already.
    pub(crate) fn begin_at(&self, bytes: u64) {
        self.set_done(bytes);
    }

    /// For whoever makes something else of the bytes: all have arrived.
    pub(crate) fn verifying(&self) {
        self.set_phase(Phase::Verifying);
    }

    pub(super) fn set_phase(&self, phase: Phase) {
        self.phase.store(phase as u8, Ordering::Relaxed);
    }

    pub(crate) fn set_total(&self, total: Option<u64>) {
        self.total.store(total.unwrap_or(UNKNOWN), Ordering::Relaxed);
    }

    pub(super) fn set_done(&self, bytes: u64) {
        self.done.store(bytes, Ordering::Relaxed);
    }

    pub(super) fn add_done(&self, bytes: u64) {
        self.done.fetch_add(bytes, Ordering::Relaxed);
    }

    pub(super) fn set_connections(&self, count: usize) {
        self.connections.store(u32::try_from(count).unwrap_or(u32::MAX), Ordering::Relaxed);
    }

    pub(super) fn received(&self) -> u64 {
        self.received.load(Ordering::Relaxed)
    }

    pub(super) fn add_received(&self, bytes: u64) {
        self.received.fetch_add(bytes, Ordering::Relaxed);
    }

    pub(super) fn add_overtaken(&self) {
        self.overtaken.fetch_add(1, Ordering::Relaxed);
        OVERTAKEN.fetch_add(1, Ordering::Relaxed);
    }

    /// What is worth knowing now.
    pub(super) fn say(&self, message: &str) {
        message.clone_into(&mut self.message.lock().unwrap_or_else(PoisonError::into_inner));
    }

    pub(crate) fn failed_once(&self, message: String) {
        self.retries.fetch_add(1, Ordering::Relaxed);
        *self.message.lock().unwrap_or_else(PoisonError::into_inner) = message;
    }
}
