//! Bounds on transfers.
//!
//! Why: a server may be slow, broken or hostile; each way of wasting our time or room has a limit.
//! Never: decides; the transfer asks.

use std::time::Duration;

use super::http::AddressPolicy;
use super::http::Trust;
use super::places::Places;
use crate::disk::MAX_FILE_BYTES;

/// Bounds on what a transfer accepts and how long it insists.
#[derive(Clone, Debug)]
pub struct Policy {
    /// Longest time to set up a connection.
    pub connect_timeout: Duration,
    /// Longest time without a byte.
    pub stall_timeout: Duration,
    /// Attempts in a row without a new byte before it gives up.
    pub max_attempts: u32,
    /// Pause after the first failed attempt; doubles up to 64 times.
    pub backoff: Duration,
    /// Redirects that are followed.
    pub max_redirects: usize,
    /// Connections of one transfer at most; fewer where more add nothing.
    pub max_connections: usize,
    /// Largest file in bytes.
    pub max_bytes: u64,
    /// Where a transfer may connect to.
    pub addresses: AddressPolicy,
    /// Which files and variables may be read for credentials.
    pub trust: Trust,
    /// Which files, directories and sockets of this node may be a source.
    pub places: Places,
}

/// For a person's own process; a daemon narrows `addresses`, `trust` and `places`.
impl Default for Policy {
    fn default() -> Self {
        Self {
            connect_timeout: Duration::from_secs(15),
            stall_timeout: Duration::from_secs(30),
            max_attempts: 6,
            backoff: Duration::from_millis(250),
            max_redirects: 10,
            max_connections: 16,
            max_bytes: MAX_FILE_BYTES,
            addresses: AddressPolicy::person(),
            trust: Trust::Person,
            places: Places::Any,
        }
    }
}
