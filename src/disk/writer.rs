//! Sparse writes: blocks in, a file with holes and durable presence bits out.
//!
//! Why: the network must not wait for the disk's syncs, nor the disk for the network.
//! How: one thread owns the sink. It drops zero pages, allocates runs of data just before they are
//! written directly (such writes into bare holes fall to kernel workers), and hands what has
//! completed, in batches, to a second thread that syncs the file first and then sets the bits.
//! Never: sets a bit for bytes that a finished `fdatasync` does not cover, or tries a failed sync
//! again: after one, what the page cache holds means nothing.
//! Start at [`Writer::start`].

use std::collections::HashMap;
use std::fs::File;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, SyncSender, TryRecvError, TrySendError};
use std::sync::{Arc, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::fs::FallocateFlags;
use rustix::io::Errno;

use super::DiskError;
use super::filling::{Filling, WriteSide};
use crate::ring::{Buf, PAGE_BYTES, Probe, Sink, ThreadSink, WriteOp, data_runs};
use crate::units::{FileOffset, MIB};

/// Bytes written after which they are made durable.
pub(super) const COMMIT_BYTES: u64 = 64 * MIB;
/// Blocks that get their space and are written together, if so many wait.
const BATCH: usize = 4;
/// Time after which written bytes are made durable, however few: what a crash costs at most.
pub(super) const COMMIT_INTERVAL: Duration = Duration::from_millis(500);

/// A piece of the file, ready to be written.
#[derive(Debug)]
pub enum Block {
    /// Bytes. `at` is a multiple of 64 KiB; the length too, but at the end of the file.
    Data {
        /// Where they belong.
        at: FileOffset,
        /// The bytes, padded ([`Buf::pad`]).
        buf: Arc<Buf>,
    },
    /// A range that somebody else has written to the file already.
    Written {
        /// Where it begins, a multiple of 64 KiB.
        at: FileOffset,
        /// How long it is.
        len_bytes: u64,
    },
    /// A range that the source knows to be zero.
    Zero {
        /// Where it begins, a multiple of 64 KiB.
        at: FileOffset,
        /// How long it is.
        len_bytes: u64,
    },
}

impl Block {
    /// The bytes of the file that this piece fills.
    #[must_use]
    pub fn range(&self) -> Range<u64> {
        match self {
            Self::Data { at, buf } => at.0..at.0 + buf.len() as u64,
            Self::Written { at, len_bytes } | Self::Zero { at, len_bytes } => {
                at.0..at.0 + len_bytes
            }
        }
    }
}

/// What a writer has done so far, readable at any time.
#[derive(Debug, Default)]
pub struct WriterStats {
    /// Bytes of the file (holes included) that are durable through this writer.
    pub durable_bytes: AtomicU64,
    /// Bytes that were handed to the disk.
    pub written_bytes: AtomicU64,
}

/// Writes blocks to a filling file, on threads of its own.
#[derive(Debug)]
pub struct Writer {
    blocks: mpsc::Sender<Block>,
    thread: JoinHandle<Result<(), DiskError>>,
    stats: Arc<WriterStats>,
}

/// Hands blocks to a [`Writer`], in any order.
#[derive(Clone, Debug)]
pub struct BlockSender(mpsc::Sender<Block>);

impl BlockSender {
    /// Hands a block over. Never blocks: the pool of buffers bounds what is under way.
    ///
    /// # Errors
    /// [`WriterStopped`]: an earlier write failed.
    pub fn send(&self, block: Block) -> Result<(), WriterStopped> {
        self.0.send(block).map_err(|_gone| WriterStopped)
    }
}

/// The writer has ended with an error; [`Writer::finish`] tells it.
#[derive(Debug, thiserror::Error)]
#[error("the disk writer has stopped")]
pub struct WriterStopped;

impl Writer {
    /// Starts to write to `filling` with the sink that `probe` chose.
    ///
    /// # Errors
    /// Nothing was begun, or no thread can be started.
    pub fn start(filling: &Filling, probe: &Probe) -> Result<Self, DiskError> {
        let side = filling.write_side()?;
        let stats = Arc::new(WriterStats::default());
        let (blocks, queue) = mpsc::channel();
        let (probe, thread_stats) = (probe.clone(), Arc::clone(&stats));
        let path = side.path.clone();
        let thread = std::thread::Builder::new()
            .name("disk-writer".into())
            .spawn(move || {
                let sink = if side.direct.is_some() {
                    probe.open()
                } else {
                    Box::new(ThreadSink::new()) as Box<dyn Sink>
                };
                Work::new(side, sink, thread_stats)?.run(&queue)
            })
            .map_err(|e| DiskError::io("start a writer thread for", &path, e))?;
        Ok(Self { blocks, thread, stats })
    }

    /// A way to hand blocks over, for one of several streams.
    #[must_use]
    pub fn sender(&self) -> BlockSender {
        BlockSender(self.blocks.clone())
    }

    /// What was done so far.
    #[must_use]
    pub fn stats(&self) -> Arc<WriterStats> {
        Arc::clone(&self.stats)
    }

    /// Waits until everything is written and durable. Blocks the thread until every
    /// [`BlockSender`] is gone.
    ///
    /// # Errors
    /// The first failure of a write or a sync. What was durable before stays so.
    pub fn finish(self) -> Result<(), DiskError> {
        drop(self.blocks);
        self.thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }
}

/// A block that is partly on its way.
#[derive(Debug)]
struct Pending {
    range: Range<u64>,
    writes_left: usize,
}

struct Work {
    side: WriteSide,
    sink: Box<dyn Sink>,
    target: Arc<File>,
    stats: Arc<WriterStats>,
    pending: HashMap<u64, Pending>,
    next_tag: u64,
    done: Vec<Range<u64>>,
    done_bytes: u64,
    last_commit: Instant,
    committer: Committer,
    may_allocate: bool,
    failed: Option<DiskError>,
}

impl Work {
    fn new(
        side: WriteSide,
        sink: Box<dyn Sink>,
        stats: Arc<WriterStats>,
    ) -> Result<Self, DiskError> {
        let target = match (&side.direct, sink.direct()) {
            (Some(direct), true) => Arc::clone(direct),
            (Some(_) | None, _) => Arc::clone(&side.plain),
        };
        let committer = Committer::start(&side, Arc::clone(&stats))?;
        // A buffered write reserves its space itself, and the kernel allocates better later.
        let may_allocate = sink.direct();
        Ok(Self {
            side,
            sink,
            target,
            stats,
            pending: HashMap::new(),
            next_tag: 0,
            done: Vec::new(),
            done_bytes: 0,
            last_commit: Instant::now(),
            committer,
            may_allocate,
            failed: None,
        })
    }

    fn run(mut self, queue: &Receiver<Block>) -> Result<(), DiskError> {
        let worked = self.work(queue);
        // Whatever happened: what is written becomes durable and recorded if it still can.
        let reaped = self.reap(usize::MAX);
        let done = std::mem::take(&mut self.done);
        let committed = self.committer.finish(done);
        if let Some(arriving) = &self.side.arriving
            && (self.committer.failed || committed.is_err())
        {
            arriving.fail("what has arrived of the image could not be made durable; attach again");
        }
        worked.and(reaped).and(committed)
    }

    fn work(&mut self, queue: &Receiver<Block>) -> Result<(), DiskError> {
        loop {
            let next = if self.sink.in_flight() == 0 {
                match queue.recv_timeout(COMMIT_INTERVAL) {
                    Ok(block) => Some(block),
                    Err(RecvTimeoutError::Timeout) => None,
                    Err(RecvTimeoutError::Disconnected) => return Ok(()),
                }
            } else {
                match queue.try_recv() {
                    Ok(block) => Some(block),
                    Err(TryRecvError::Empty) => None,
                    Err(TryRecvError::Disconnected) => return Ok(()),
                }
            };
            match next {
                Some(block) => {
                    let more = queue.try_iter().take(BATCH - 1);
                    let batch: Vec<Block> = std::iter::once(block).chain(more).collect();
                    self.place(&batch)?;
                    self.reap(0)?;
                }
                None => self.reap(1)?,
            }
            self.maybe_commit()?;
        }
    }

    /// Starts the writes of some blocks.
    fn place(&mut self, batch: &[Block]) -> Result<(), DiskError> {
        // All runs get their space before the first is written: an allocation waits for every
        // direct write of the file that is in flight.
        let mut allocated = Ok(());
        let mut runs_of = Vec::with_capacity(batch.len());
        for block in batch {
            let runs = self.runs(block);
            allocated = runs.iter().try_for_each(|run| self.allocate(block, run));
            if allocated.is_err() {
                break;
            }
            runs_of.push(runs);
        }
        for (block, runs) in batch.iter().zip(runs_of) {
            self.place_block(block, runs)?;
        }
        allocated
    }

    /// Starts the writes of one block, or none if it is all zero.
    fn place_block(&mut self, block: &Block, runs: Vec<Range<usize>>) -> Result<(), DiskError> {
        let tag = self.next_tag;
        self.next_tag += 1;
        let range = block.range();
        if let Some(reservation) = &self.side.reservation {
            reservation.consume(range.end - range.start, matches!(block, Block::Zero { .. }));
        }
        // One more than there are writes, so that the block is not over while it is being placed.
        self.pending.insert(tag, Pending { range, writes_left: 1 });
        if let Block::Data { at, buf } = block {
            for run in runs {
                self.write_run(*at, buf, run, tag)?;
            }
        }
        self.write_ended(tag);
        Ok(())
    }

    /// The data of a block, in ranges that the sink takes.
    fn runs(&self, block: &Block) -> Vec<Range<usize>> {
        let Block::Data { buf, .. } = block else { return Vec::new() };
        let page = if self.sink.direct() { PAGE_BYTES } else { 1 };
        data_runs(buf.bytes()).map(|run| run.start..run.end.next_multiple_of(page)).collect()
    }

    fn write_run(
        &mut self,
        at: FileOffset,
        buf: &Arc<Buf>,
        run: Range<usize>,
        tag: u64,
    ) -> Result<(), DiskError> {
        let at = at.advance(run.start as u64);
        self.stats.written_bytes.fetch_add(run.len() as u64, Ordering::Relaxed);
        let file = Arc::clone(&self.target);
        let mut op = WriteOp { file, buf: Arc::clone(buf), range: run, at, tag };
        if let Some(pending) = self.pending.get_mut(&tag) {
            pending.writes_left += 1;
        }
        while let Err(back) = self.sink.push(op) {
            op = back;
            self.reap(1)?;
        }
        Ok(())
    }

    /// Allocates space for a run, so that the write need not (and finds a full disk early).
    fn allocate(&mut self, block: &Block, run: &Range<usize>) -> Result<(), DiskError> {
        if !self.may_allocate {
            return Ok(());
        }
        let (start, len_bytes) = (block.range().start + run.start as u64, run.len() as u64);
        let flags = FallocateFlags::empty();
        match rustix::fs::fallocate(&*self.side.plain, flags, start, len_bytes) {
            Ok(()) => Ok(()),
            Err(Errno::OPNOTSUPP | Errno::NOSYS) => {
                self.may_allocate = false;
                Ok(())
            }
            Err(e) => Err(DiskError::write(&self.side.path, start, e.into())),
        }
    }

    fn reap(&mut self, min: usize) -> Result<(), DiskError> {
        let mut ended = Vec::new();
        let path = &self.side.path;
        let failed = &mut self.failed;
        self.sink
            .reap(min, &mut |op, result| match result {
                Ok(()) => ended.push(op.tag),
                Err(e) => {
                    failed.get_or_insert_with(|| DiskError::write(path, op.at.0, e));
                }
            })
            .map_err(|e| DiskError::io("wait for writes to", path, e))?;
        for tag in ended {
            self.write_ended(tag);
        }
        self.failed.take().map_or(Ok(()), Err)
    }

    fn write_ended(&mut self, tag: u64) {
        let Some(pending) = self.pending.get_mut(&tag) else { return };
        pending.writes_left -= 1;
        if pending.writes_left > 0 {
            return;
        }
        let Some(Pending { range, .. }) = self.pending.remove(&tag) else { return };
        self.done_bytes += range.end - range.start;
        if let Some(arriving) = &self.side.arriving {
            arriving.note(&range);
        }
        match self.done.last_mut() {
            Some(last) if last.end == range.start => last.end = range.end,
            Some(_) | None => self.done.push(range),
        }
    }

    fn maybe_commit(&mut self) -> Result<(), DiskError> {
        let due = self.done_bytes >= COMMIT_BYTES || self.last_commit.elapsed() >= COMMIT_INTERVAL;
        if self.done.is_empty() || !due || !self.side.total_known {
            return Ok(());
        }
        let ready = std::mem::take(&mut self.done);
        if let Some(back) = self.committer.offer(ready)? {
            self.done = back;
        } else {
            self.done_bytes = 0;
            self.last_commit = Instant::now();
        }
        Ok(())
    }
}

/// Syncs data, then records it.
struct Committer {
    /// True once a commit has failed: what the page cache holds means nothing after that.
    failed: bool,
    batches: Option<SyncSender<Vec<Range<u64>>>>,
    thread: Option<JoinHandle<Result<(), DiskError>>>,
    commit: Commit,
}

#[derive(Clone)]
struct Commit {
    file: Arc<File>,
    path: std::path::PathBuf,
    presence: Arc<std::sync::Mutex<super::presence::Presence>>,
    stats: Arc<WriterStats>,
}

impl Commit {
    fn run(&self, ranges: &[Range<u64>]) -> Result<(), DiskError> {
        self.file.sync_data().map_err(|e| DiskError::io("sync", &self.path, e))?;
        let name = self.presence.lock().unwrap_or_else(PoisonError::into_inner).name();
        name.sync()?;
        let bits = {
            let mut presence = self.presence.lock().unwrap_or_else(PoisonError::into_inner);
            presence.write(ranges)?
        };
        // Outside the lock: whoever asks what is here must not wait for the disk.
        bits.sync()?;
        let bytes = ranges.iter().map(|range| range.end - range.start).sum();
        self.stats.durable_bytes.fetch_add(bytes, Ordering::Relaxed);
        Ok(())
    }
}

impl Committer {
    fn start(side: &WriteSide, stats: Arc<WriterStats>) -> Result<Self, DiskError> {
        let commit = Commit {
            file: Arc::clone(&side.plain),
            path: side.path.clone(),
            presence: Arc::clone(&side.presence),
            stats,
        };
        // Room for one batch: while a sync runs, further writes gather in the next.
        let (batches, queue) = mpsc::sync_channel::<Vec<Range<u64>>>(1);
        let worker = commit.clone();
        let thread = std::thread::Builder::new()
            .name("disk-commit".into())
            .spawn(move || queue.into_iter().try_for_each(|ranges| worker.run(&ranges)))
            .map_err(|e| DiskError::io("start a commit thread for", &side.path, e))?;
        Ok(Self { failed: false, batches: Some(batches), thread: Some(thread), commit })
    }

    /// Gives a batch to the thread, or back if it is busy.
    fn offer(&mut self, ranges: Vec<Range<u64>>) -> Result<Option<Vec<Range<u64>>>, DiskError> {
        let Some(batches) = &self.batches else { return Ok(Some(ranges)) };
        match batches.try_send(ranges) {
            Ok(()) => Ok(None),
            Err(TrySendError::Full(ranges)) => Ok(Some(ranges)),
            // The thread ends early only with an error.
            Err(TrySendError::Disconnected(ranges)) => self.join().map(|()| Some(ranges)),
        }
    }

    fn join(&mut self) -> Result<(), DiskError> {
        self.batches = None;
        let Some(thread) = self.thread.take() else { return Ok(()) };
        let result = thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        self.failed = result.is_err();
        result
    }

    /// Waits for the thread, then makes the rest durable. After a failed sync nothing is recorded.
    fn finish(&mut self, rest: Vec<Range<u64>>) -> Result<(), DiskError> {
        self.join()?;
        if rest.is_empty() || self.failed { Ok(()) } else { self.commit.run(&rest) }
    }
}
