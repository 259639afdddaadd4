//! The sink without io_uring: writes on the caller's thread, write-back started as it goes.
//!
//! Why: seccomp profiles of containers refuse io_uring; this path is nearly as fast. And where no
//! digest takes the processor's time, uncached writes are the fastest of all: the kernel allocates
//! and writes back what it likes while the next bytes arrive.
//! How: each push writes at once. Plain `pwrite` leaves the page cache warm; every 8 MiB
//! `sync_file_range` starts write-back, so that dirty memory and the closing `fdatasync` stay small.
//! With `RWF_DONTCACHE` (Linux 6.14) each write starts its own write-back, and leaves nothing.
//! Never: counts started write-back as durable.
//! Start at [`ThreadSink`].

use std::io;
use std::os::unix::fs::FileExt;

use rustix::io::{Errno, ReadWriteFlags};

use super::{Done, Sink, WriteOp, start_write_back};

/// Bytes after which write-back is started.
const WRITE_BACK_BYTES: u64 = 8 << 20;

/// `RWF_DONTCACHE` of `linux/fs.h`, which rustix has no name for yet.
const DONTCACHE: ReadWriteFlags = ReadWriteFlags::from_bits_retain(0x80);

/// Writes on the thread that pushes.
#[derive(Debug, Default)]
pub struct ThreadSink {
    ended: Vec<(WriteOp, io::Result<()>)>,
    since_write_back: u64,
    uncached: bool,
}

impl ThreadSink {
    /// A sink with nothing in flight.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// One whose writes leave nothing in the page cache, where the file system can do that.
    #[must_use]
    pub fn uncached() -> Self {
        Self { uncached: true, ..Self::default() }
    }

    fn write(&mut self, op: &WriteOp) -> io::Result<()> {
        let mut done = 0;
        while self.uncached && done < op.bytes().len() {
            let rest = [io::IoSlice::new(&op.bytes()[done..])];
            match rustix::io::pwritev2(&*op.file, &rest, op.at.0 + done as u64, DONTCACHE) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(count) => done += count,
                Err(Errno::INTR) => {}
                Err(Errno::OPNOTSUPP | Errno::INVAL | Errno::NOSYS) => self.uncached = false,
                Err(error) => return Err(error.into()),
            }
        }
        if done == op.bytes().len() {
            return Ok(());
        }
        op.file.write_all_at(&op.bytes()[done..], op.at.0 + done as u64)?;
        self.since_write_back += op.range.len() as u64;
        if self.since_write_back >= WRITE_BACK_BYTES {
            self.since_write_back = 0;
            start_write_back(&op.file);
        }
        Ok(())
    }
}

/// Whether the kernel and the file system of `file` know uncached writes; writes its first byte.
///
/// # Errors
/// They do not, or the write failed.
pub(super) fn try_uncached(file: &std::fs::File) -> io::Result<()> {
    rustix::io::pwritev2(file, &[io::IoSlice::new(&[0xB5])], 0, DONTCACHE)?;
    Ok(())
}

impl Sink for ThreadSink {
    fn push(&mut self, op: WriteOp) -> Result<(), WriteOp> {
        let result = self.write(&op);
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
