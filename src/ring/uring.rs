//! The sink on io_uring: a few O_DIRECT writes in flight on a private ring.
//!
//! Why: O_DIRECT writes, several deep, into allocated blocks are the fastest durable path
//! measured, at a fifth of the CPU of buffered writes.
//! How: `in_flight` owns each write (buffer and file) under the key that its SQE carries, until the
//! CQE is reaped; `Drop` waits for the rest, or leaks them, which is sound.
//! Never: writes buffered (each such write is punted to a kernel worker), or frees what the kernel
//! may still read.
//! Start at [`UringSink::new`].

use std::io;
use std::os::fd::AsRawFd;

use io_uring::{IoUring, opcode, squeue, types};

use super::{Done, Sink, WriteOp};

/// Writes in flight at most: those of a few blocks that are cut by holes. The disk's own rate stops
/// growing at eight whole blocks.
const DEPTH: u32 = 32;
/// How often one write may be told EAGAIN before it is reported as failed.
const MAX_AGAIN: u32 = 1000;

#[derive(Debug)]
struct InFlight {
    op: WriteOp,
    again: u32,
}

/// O_DIRECT writes on a ring of its own.
pub struct UringSink {
    ring: IoUring,
    slots: Vec<Option<InFlight>>,
    count: usize,
}

impl std::fmt::Debug for UringSink {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("UringSink").field("in_flight", &self.count).finish_non_exhaustive()
    }
}

impl UringSink {
    /// A ring. `SINGLE_ISSUER` is not asked for: the sink may move to the thread
    /// that will own it after it was made.
    ///
    /// # Errors
    /// io_uring is refused (EPERM by seccomp or sysctl, ENOSYS, ENOMEM under RLIMIT_MEMLOCK).
    pub fn new() -> io::Result<Self> {
        let ring = IoUring::builder().setup_clamp().build(DEPTH)?;
        Ok(Self { ring, slots: (0..DEPTH).map(|_| None).collect(), count: 0 })
    }

    fn sqe(op: &WriteOp, slot: usize) -> squeue::Entry {
        let bytes = op.bytes();
        let len = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
        opcode::Write::new(types::Fd(op.file.as_raw_fd()), bytes.as_ptr(), len)
            .offset(op.at.0)
            .build()
            .user_data(slot as u64)
    }

    /// Puts the write in `slot` on the submission queue.
    fn submit_slot(&mut self, slot: usize) {
        let Some(entry) = self.slots.get(slot).and_then(Option::as_ref) else { return };
        let sqe = Self::sqe(&entry.op, slot);
        // SAFETY: the SQE points into the buffer of the write in `slots[slot]`, a mapping that does
        // not move when the write does. The slot keeps the buffer's Arc and the file open until the
        // CQE with this key is reaped, or `Drop` has drained or leaked the ring.
        let pushed = unsafe { self.ring.submission().push(&sqe) };
        // Each slot has at most one SQE queued, and the queue has as many entries as there are slots.
        pushed.expect("queued SQEs <= slots == SQ entries");
    }

    /// Takes one completion; gives the write back if it is over.
    fn complete(&mut self, slot: usize, result: i32) -> Option<(WriteOp, io::Result<()>)> {
        let entry = self.slots.get_mut(slot)?.as_mut()?;
        let ended = match usize::try_from(result) {
            Ok(0) => Some(Err(io::Error::from(io::ErrorKind::WriteZero))),
            Ok(written) => entry.op.advance(written).then_some(Ok(())),
            Err(_negative) => {
                let error = io::Error::from_raw_os_error(-result);
                entry.again += 1;
                let transient =
                    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted);
                if transient && entry.again <= MAX_AGAIN { None } else { Some(Err(error)) }
            }
        };
        let Some(result) = ended else {
            self.submit_slot(slot);
            return None;
        };
        let entry = self.slots.get_mut(slot)?.take()?;
        self.count -= 1;
        Some((entry.op, result))
    }

    /// Waits for `min` completions and takes all that are there.
    fn drain_queue(&mut self, min: usize, done: &mut Done<'_>) -> io::Result<usize> {
        match self.ring.submit_and_wait(min) {
            Ok(_) => {}
            Err(e) if e.kind() == io::ErrorKind::Interrupted => return Ok(0),
            Err(e) => return Err(e),
        }
        let mut ended = 0;
        loop {
            let Some(cqe) = self.ring.completion().next() else { return Ok(ended) };
            let slot = usize::try_from(cqe.user_data()).unwrap_or(usize::MAX);
            if let Some((op, result)) = self.complete(slot, cqe.result()) {
                ended += 1;
                done(op, result);
            }
        }
    }
}

impl Sink for UringSink {
    fn push(&mut self, op: WriteOp) -> Result<(), WriteOp> {
        let Some(slot) = self.slots.iter().position(Option::is_none) else { return Err(op) };
        self.slots[slot] = Some(InFlight { op, again: 0 });
        self.count += 1;
        self.submit_slot(slot);
        Ok(())
    }

    fn reap(&mut self, min: usize, done: &mut Done<'_>) -> io::Result<()> {
        let target = min.min(self.count);
        let mut ended = 0;
        loop {
            ended += self.drain_queue(usize::from(ended < target), done)?;
            if ended >= target {
                return Ok(());
            }
        }
    }

    fn in_flight(&self) -> usize {
        self.count
    }

    fn direct(&self) -> bool {
        true
    }
}

impl Drop for UringSink {
    fn drop(&mut self) {
        while self.count > 0 {
            if self.drain_queue(1, &mut |_, _| {}).is_err() {
                // The kernel may still read these buffers: a leak is sound, freeing them is not.
                self.slots.drain(..).for_each(std::mem::forget);
                return;
            }
        }
    }
}
