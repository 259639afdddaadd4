//! What a client has sent and nobody has looked at yet.
//!
//! Why: messages come in parts, and many at once.
//! How: one buffer of the longest message that a session waits for as a whole; what is left over is
//! moved to its front before more is received.
//! Never: grows.
//! Start at [`Inbox::fill`].

use super::limits::Limits;
use super::session::End;
use super::style::Style;
use super::transport::Transport;
use super::wire;

/// Bytes that are received at once in the transmission phase, at least: a thousand requests.
const INBOX_BYTES: usize = 32 << 10;

/// Received bytes that are not used yet, in a buffer that never grows.
#[derive(Debug)]
pub(super) struct Inbox {
    buffer: Vec<u8>,
    start: usize,
    end: usize,
}

impl Inbox {
    pub(super) fn new(limits: &Limits) -> Self {
        // The longest option has to fit whole.
        let len = INBOX_BYTES.max(limits.option_bytes + size_of::<wire::OptionHead>());
        Self { buffer: vec![0; len], start: 0, end: 0 }
    }

    pub(super) fn bytes(&self) -> &[u8] {
        &self.buffer[self.start..self.end]
    }

    pub(super) fn consume(&mut self, count: usize) {
        assert!(count <= self.end - self.start, "only bytes that were looked at are consumed");
        self.start += count;
    }

    /// A first word that can never become a request ends the session without waiting for more.
    pub(super) fn check_magic(&self, style: Style) -> Result<(), End> {
        match self.bytes().first_chunk() {
            Some(first) if u32::from_be_bytes(*first) != style.request_magic() => {
                Err(End::Protocol("a request without its magic number"))
            }
            _right_or_not_here_yet => Ok(()),
        }
    }

    /// Waits for more bytes.
    pub(super) fn fill<T: Transport>(&mut self, transport: &mut T) -> Result<(), End> {
        if self.start > 0 {
            self.buffer.copy_within(self.start..self.end, 0);
            self.end -= self.start;
            self.start = 0;
        }
        let space = &mut self.buffer[self.end..];
        assert!(!space.is_empty(), "the longest message fits");
        match transport.receive(space).map_err(End::from_io)? {
            0 => Err(End::HungUp),
            count => {
                self.end += count;
                Ok(())
            }
        }
    }
}
