//! The digest thread: hashes the file's bytes in order while they are in memory.
//!
//! Why: a second pass over the file costs as much as the transfer.
//! How: takes the same buffers as the disk writer. Connections bring them out of order; what comes
//! early waits here, in memory that its connection had reserved. Bytes that were here before this
//! run are read back from the file when the order reaches them; what arrives meanwhile is let go
//! once it is written, and read back in its turn, so that a long file that is resumed does not hold
//! up the network. Where no digest of the whole is made, there is no order to keep: who hands a MiB
//! over hashes it while it is in his processor's cache, and [`Loose`] does the rest.
//! Never: takes bytes out of order, or reads back what the writer has not written.
//! Start at [`DigestThread::start`].

use std::collections::{BTreeMap, VecDeque};
use std::fs::File;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Weak};
use std::thread::JoinHandle;

use super::loose::Loose;
use super::progress::Progress;
use crate::disk::{Block, DigestSet, Digests, DiskError, Hasher, hash_range, xxh3_of};
use crate::ring::Buf;
use crate::units::MIB;

/// A running digest thread.
#[derive(Debug)]
pub(super) struct DigestThread {
    feed: DigestFeed,
    end: Sender<u64>,
    quit: Arc<AtomicBool>,
    thread: JoinHandle<Result<Digests, DiskError>>,
}

/// A block on its way to the thread.
#[derive(Debug)]
pub(super) struct Handed {
    pub(super) block: Block,
    /// It may wait in memory for its turn. What was taken out of turn is read back in its own.
    pub(super) may_wait: bool,
    /// The xxh3 of a whole MiB, if it was made already.
    pub(super) xxh3: Option<u64>,
}

impl Handed {
    /// `hash`: makes the digest of a whole MiB now.
    pub(super) fn new(block: Block, may_wait: bool, hash: bool) -> Self {
        let xxh3 = match &block {
            Block::Data { at, buf } if hash => {
                let is_whole = at.0.is_multiple_of(MIB) && buf.len() as u64 == MIB;
                is_whole.then(|| xxh3_of(buf.bytes()))
            }
            Block::Data { .. } | Block::Written { .. } | Block::Zero { .. } => None,
        };
        Self { block, may_wait, xxh3 }
    }
}

/// A way to hand blocks over.
#[derive(Clone, Debug)]
pub(super) struct DigestFeed {
    blocks: Sender<Handed>,
    /// MiBs are hashed by who hands them over. Another core would have to fetch them from memory.
    hash: bool,
}

impl DigestFeed {
    /// Hands bytes over; false if the thread has ended, with an error that
    /// [`DigestThread::finish`] tells.
    pub(super) fn send(&self, block: Block, may_wait: bool) -> bool {
        self.blocks.send(Handed::new(block, may_wait, self.hash)).is_ok()
    }
}

/// What the thread reads back from.
#[derive(Debug)]
pub(super) struct Stored {
    pub(super) file: Arc<File>,
    pub(super) path: PathBuf,
}

impl DigestThread {
    /// Starts to hash from byte 0. `missing` are the ranges that will be handed over, ascending;
    /// everything else is in the file already. At most `most_held` buffers wait here for their
    /// turn; further ones are read back.
    pub(super) fn start(
        stored: Stored,
        missing: &[Range<u64>],
        most_held: usize,
        set: DigestSet,
        progress: Arc<Progress>,
    ) -> Result<Self, DiskError> {
        let (blocks, queue) = mpsc::channel();
        let feed = DigestFeed { blocks, hash: set.is_empty() };
        let (end, end_queue) = mpsc::channel();
        let path = stored.path.clone();
        let quit = Arc::new(AtomicBool::new(false));
        let watched = Arc::clone(&quit);
        let missing: VecDeque<_> = missing.iter().cloned().collect();
        let thread = std::thread::Builder::new()
            .name("digest".into())
            .spawn(move || {
                let go_on = || !watched.load(Ordering::Relaxed) && !progress.is_stopped();
                if set.is_empty() {
                    return Loose::new(stored, missing).run(&queue, &end_queue, &go_on);
                }
                let mut work = Work {
                    hasher: Hasher::new(set),
                    stored,
                    missing,
                    queue,
                    early: BTreeMap::new(),
                    held: 0,
                    most_held,
                };
                work.run(&end_queue, &go_on)?;
                Ok(work.hasher.finish())
            })
            .map_err(|e| DiskError::io("start a digest thread for", &path, e))?;
        Ok(Self { feed, end, quit, thread })
    }

    /// A way to hand blocks over; the thread ends when all are gone.
    pub(super) fn feed(&self) -> DigestFeed {
        self.feed.clone()
    }

    /// Ends without a result. Blocks the thread until the other has let go of the file.
    ///
    /// # Errors
    /// The error that had ended it before.
    pub(super) fn abandon(self) -> Result<(), DiskError> {
        self.quit.store(true, Ordering::Relaxed);
        drop((self.end, self.feed));
        let ended = self.thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        match ended {
            Err(DiskError::Io { source, .. })
                if source.kind() == std::io::ErrorKind::Interrupted =>
            {
                Ok(())
            }
            other => other.map(drop),
        }
    }

    /// Hashes what is left up to `total_bytes`, and gives the digests. Blocks the thread. All that
    /// was handed over is written.
    pub(super) fn finish(self, total_bytes: u64) -> Result<Digests, DiskError> {
        let _ended = self.end.send(total_bytes);
        drop(self.end);
        drop(self.feed);
        self.thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }
}

/// Bytes that came before their turn.
#[derive(Debug)]
enum Early {
    /// Still in memory.
    Held(Arc<Buf>),
    Zero {
        len_bytes: u64,
    },
    /// In memory only while the writer needs them; then in the file.
    Stored {
        end: u64,
        buf: Weak<Buf>,
    },
}

impl Early {
    fn of(block: Block, hold: bool) -> Self {
        let end = block.range().end;
        match block {
            Block::Data { buf, .. } if hold => Self::Held(buf),
            Block::Data { buf, .. } => Self::Stored { end, buf: Arc::downgrade(&buf) },
            Block::Written { .. } => Self::Stored { end, buf: Weak::new() },
            Block::Zero { len_bytes, .. } => Self::Zero { len_bytes },
        }
    }
}

struct Work {
    hasher: Hasher,
    stored: Stored,
    /// What will be handed over, or was and waits in `early`, from the current position on.
    missing: VecDeque<Range<u64>>,
    queue: Receiver<Handed>,
    early: BTreeMap<u64, Early>,
    /// How many of `early` are held, and may be.
    held: usize,
    most_held: usize,
}

impl Work {
    fn run(&mut self, end: &Receiver<u64>, go_on: &dyn Fn() -> bool) -> Result<(), DiskError> {
        self.advance(go_on)?;
        while let Ok(Handed { block, may_wait, .. }) = self.queue.recv() {
            let start = block.range().start;
            let early = Early::of(block, may_wait && self.held < self.most_held);
            self.held += usize::from(matches!(early, Early::Held(_)));
            self.early.insert(start, early);
            self.advance(go_on)?;
        }
        // No end means that the transfer failed: then the digests are wanted by nobody.
        if let Ok(total) = end.recv() {
            self.advance(go_on)?;
            self.read_back(total, go_on)?;
        }
        Ok(())
    }

    /// Hashes as far as the bytes are known.
    fn advance(&mut self, go_on: &dyn Fn() -> bool) -> Result<(), DiskError> {
        loop {
            let at = self.hasher.len_bytes();
            match self.missing.front() {
                Some(range) if range.end <= at => {
                    self.missing.pop_front();
                }
                Some(range) if at < range.start => {
                    let start = range.start;
                    self.read_back(start, go_on)?;
                }
                Some(_) => match self.early.remove(&at) {
                    Some(early) => self.take(early, go_on)?,
                    None => return Ok(()),
                },
                // The rest is here; it is read at the end, when it is known where that is.
                None => return Ok(()),
            }
        }
    }

    fn take(&mut self, early: Early, go_on: &dyn Fn() -> bool) -> Result<(), DiskError> {
        match early {
            Early::Held(buf) => {
                self.held -= 1;
                self.hasher.update(buf.bytes());
            }
            Early::Zero { len_bytes } => {
                for at in (0..len_bytes).step_by(1 << 26) {
                    self.hasher.update_zeroes((len_bytes - at).min(1 << 26));
                    self.go_on(go_on)?;
                }
            }
            Early::Stored { end, buf } => match buf.upgrade() {
                Some(buf) => self.hasher.update(buf.bytes()),
                None => self.read_back(end, go_on)?,
            },
        }
        Ok(())
    }

    fn go_on(&self, go_on: &dyn Fn() -> bool) -> Result<(), DiskError> {
        if go_on() {
            return Ok(());
        }
        let stopped = std::io::Error::from(std::io::ErrorKind::Interrupted);
        Err(DiskError::io("go on hashing", &self.stored.path, stopped))
    }

    /// Hashes from the file up to `to`. What arrives meanwhile does not wait in memory.
    fn read_back(&mut self, to: u64, go_on: &dyn Fn() -> bool) -> Result<(), DiskError> {
        let from = self.hasher.len_bytes();
        if from >= to {
            return Ok(());
        }
        let (queue, early) = (&self.queue, &mut self.early);
        hash_range(&self.stored.file, &self.stored.path, from..to, &mut self.hasher, &mut |_| {
            while let Ok(Handed { block, .. }) = queue.try_recv() {
                early.insert(block.range().start, Early::of(block, false));
            }
            go_on()
        })
    }
}
