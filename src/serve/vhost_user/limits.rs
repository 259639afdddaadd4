//! What one VM may cost us.
//!
//! Why: a guest is the least trusted reader there is, and one daemon serves the whole node.
//! How: every quantity that a guest or its VMM chooses has a bound here.
//! Never: limits what a VM may read; that is what attachments are for.
//! Start at [`Limits`].

use std::time::Duration;

/// Entries of a queue: the most that QEMU gives one.
pub(super) const MAX_QUEUE_SIZE: u16 = 1024;
/// Descriptors of one request, those of an indirect table included.
pub(super) const MAX_DESCRIPTORS: usize = 1024;
/// Data buffers that a guest may give one request (SEG_MAX): what fits a queue of 128 with the
/// header and the status.
pub(super) const SEG_MAX: u32 = 126;
/// Bytes that it may give one buffer (SIZE_MAX).
pub(super) const SIZE_MAX: u32 = 4 << 20;
/// Longest read in bytes; a longer one is refused.
pub(super) const MAX_READ_BYTES: u64 = 512 << 20;
/// Requests that are looked at before the first of them is answered.
pub(super) const MAX_BATCH: usize = 64;

/// Bounds that a deployment may change.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Queues of one VM, each with a thread once the guest uses it.
    pub queues: u16,
    /// How long a queue's thread looks for the next request before it sleeps, at most; it looks less
    /// or not at all while requests come less often. Zero: never.
    pub poll: Duration,
    /// From accept to the frontend's first message.
    pub handshake: Duration,
    /// Time that queues get to answer what was asked when the server stops.
    pub farewell: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            queues: 16,
            poll: Duration::from_micros(32),
            handshake: Duration::from_secs(10),
            farewell: Duration::from_secs(2),
        }
    }
}
