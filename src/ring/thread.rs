//! The sink without io_uring: `pwrite` on the caller's thread, write-back started as it goes.
//!
//! Why: seccomp profiles of containers refuse io_uring; this path is nearly as fast, and it leaves
//! the page cache warm.
//! How: each push writes at once; every 8 MiB `sync_file_range` starts write-back, so that dirty
//! memory and the closing `fdatasync` stay small.
//! Never: counts started write-back as durable.
//! Start at [`ThreadSink`].

use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use super::{Done, Sink, WriteOp};

/// Bytes after which write-back is started.
const WRITE_BACK_BYTES: u64 = 8 << 20;

/// Writes on the thread that pushes.
#[derive(Debug, Default)]
pub struct ThreadSink {
    ended: Vec<(WriteOp, io::Result<()>)>,
    since_write_back: u64,
}

impl ThreadSink {
    /// A sink with nothing in flight.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }
}

fn start_write_back(file: &std::fs::File) {
    // SAFETY: the call takes a descriptor, which `file` keeps open across it, and plain integers;
    // (0, 0) means the whole file. It touches no memory of ours. A failure is only a lost hint.
    unsafe {
        libc::sync_file_range(file.as_raw_fd(), 0, 0, libc::SYNC_FILE_RANGE_WRITE);
    }
}

impl Sink for ThreadSink {
    fn push(&mut self, op: WriteOp) -> Result<(), WriteOp> {
        let result = op.file.write_all_at(op.bytes(), op.at.0);
        self.since_write_back += op.range.len() as u64;
        if self.since_write_back >= WRITE_BACK_BYTES {
            self.since_write_back = 0;
            start_write_back(&op.file);
        }
        self.ended.push((op, result));
        Ok(())
    }

    fn reap(&mut self, _min: usize, done: &mut Done<'_>) -> io::Result<()> {
        for (op, result) in self.ended.drain(..) {
            done(op, result);
        }
        Ok(())
    }

    fn in_flight(&self) -> usize {
        self.ended.len()
    }

    fn direct(&self) -> bool {
        false
    }
}
