//! Writes to disk: aligned buffers, and the sinks that carry them to a file.
//!
//! Why: bytes that arrive must reach the disk at its own speed, with a core to spare, and also
//! where io_uring is forbidden (containers, hardened kernels).
//! How: a [`Sink`] takes writes and reports each once. [`UringSink`] keeps a few O_DIRECT writes in
//! flight on a private ring; [`ThreadSink`] is plain `pwrite` with rolling write-back. A smoke test
//! on the data directory ([`probe()`]) chooses, and says why.
//! Never: knows what the bytes are. All `unsafe` for io_uring is in `uring.rs`.
//! Start at [`Sink`], then [`probe()`].

mod buf;
mod hints;
mod probe;
mod thread;
#[cfg(feature = "tokio-uring")]
mod tokio_uring;
mod uring;
mod zero;

#[cfg(test)]
mod tests;

use std::fs::File;
use std::io;
use std::ops::Range;
use std::sync::Arc;

pub use buf::{BLOCK_BYTES, Buf, BufPermits, BufPool, BufShare, PAGE_BYTES};
pub use hints::{idle_io_priority, start_write_back, wake_at};
pub use probe::{Choice, Probe, SinkKind, probe};
pub use thread::ThreadSink;
#[cfg(feature = "tokio-uring")]
pub use tokio_uring::TokioUringSink;
pub use uring::UringSink;
pub use zero::{DataRuns, data_runs, is_zero};

use crate::units::FileOffset;

/// One write: `buf[range]` to `file` at `at`. Owns everything that the kernel touches.
#[derive(Debug)]
pub struct WriteOp {
    /// The target. For [`UringSink`] opened with O_DIRECT.
    pub file: Arc<File>,
    /// Where the bytes are. Shared with other readers (a digest), written by nobody.
    pub buf: Arc<Buf>,
    /// Which bytes of `buf`; both ends multiples of [`PAGE_BYTES`] for a direct sink.
    pub range: Range<usize>,
    /// Where they go in the file.
    pub at: FileOffset,
    /// The caller's own word, handed back with the completion.
    pub tag: u64,
}

impl WriteOp {
    /// The bytes that are still to be written.
    fn bytes(&self) -> &[u8] {
        &self.buf.padded()[self.range.clone()]
    }

    /// Takes note that `written` bytes are done; true if nothing is left.
    fn advance(&mut self, written: usize) -> bool {
        let written = written.min(self.range.len());
        self.range.start += written;
        self.at = self.at.advance(written as u64);
        self.range.is_empty()
    }
}

/// Called once for each write that ended.
pub type Done<'a> = dyn FnMut(WriteOp, io::Result<()>) + 'a;

/// Carries writes to files. One thread owns a sink.
///
/// A write is accepted by [`Sink::push`] and reported exactly once by [`Sink::reap`]; short writes
/// are continued inside. Nothing is durable before a `fdatasync` of the file.
pub trait Sink: Send {
    /// Takes `op`, or hands it back when as many are in flight as the sink carries. It may begin
    /// only with the next [`Sink::reap`], together with others.
    ///
    /// # Errors
    /// The write itself, when the sink is full: call [`Sink::reap`] and push it again.
    fn push(&mut self, op: WriteOp) -> Result<(), WriteOp>;

    /// Waits until at least `min` writes have ended (fewer if fewer are in flight), reports each.
    ///
    /// # Errors
    /// The sink itself is broken; single failed writes are reported through `done`.
    fn reap(&mut self, min: usize, done: &mut Done<'_>) -> io::Result<()>;

    /// How many accepted writes have not been reported yet.
    fn in_flight(&self) -> usize;

    /// True if targets must be opened with O_DIRECT and writes be page-aligned.
    fn direct(&self) -> bool;
}
