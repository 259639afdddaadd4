//! What one client may cost us.
//!
//! Why: the socket is open to programs that are slow, broken or hostile, and one daemon serves
//! the whole node.
//! How: every quantity that a client chooses has a bound here, and each bound has one reader.
//! Never: limits what a client may read; that is what exports are for.
//! Start at [`Limits`].

use std::time::Duration;

/// Largest READ in bytes, advertised as the maximum payload ("Size constraints": at least 2^25).
pub const MAX_READ_BYTES: u32 = 32 << 20;
/// Preferred request size in bytes, as advertised.
pub const PREFERRED_BLOCK_BYTES: u32 = 4096;

/// Bounds that a deployment may change.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Open connections of one server; the next one is closed as soon as it is accepted.
    pub connections: usize,
    /// As many of them may be of one host of a network: an address, or 64 bits of IPv6.
    pub connections_per_host: usize,
    /// From accept to the transmission phase, TLS included.
    pub handshake: Duration,
    /// Longest data of one option in bytes; a longer one ends the session.
    pub option_bytes: usize,
    /// Options in one handshake; more end the session.
    pub options: u32,
    /// Replies gathered before they are sent, in bytes: the memory that decoded clusters and the
    /// copies of an error path may take for one connection.
    pub batch_bytes: usize,
    /// Extents in one BLOCK_STATUS reply.
    pub status_extents: usize,
    /// Time that sessions get to answer what was asked when the server stops.
    pub farewell: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: 256,
            connections_per_host: 64,
            handshake: Duration::from_secs(10),
            option_bytes: 64 << 10,
            options: 1024,
            batch_bytes: 4 << 20,
            status_extents: 16 << 10,
            farewell: Duration::from_secs(2),
        }
    }
}
