//! The digest thread: hashes the file's bytes in order while they are in memory.
//!
//! Why: a second pass over the file costs as much as the transfer.
//! How: takes the same buffers as the disk writer, in file order. Bytes that were here before this
//! run are read back from the file when the order reaches them.
//! Never: takes bytes out of order: a gap is durable bytes, or the work is wrong.
//! Start at [`DigestThread::start`].

use std::fs::File;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread::JoinHandle;

use crate::disk::{Block, DigestSet, Digests, DiskError, Hasher, hash_range};

use super::progress::Progress;

/// A running digest thread.
#[derive(Debug)]
pub(super) struct DigestThread {
    blocks: Sender<Block>,
    end: Sender<u64>,
    quit: Arc<AtomicBool>,
    thread: JoinHandle<Result<Digests, DiskError>>,
}

/// What the thread reads gaps from.
#[derive(Debug)]
pub(super) struct Stored {
    pub(super) file: Arc<File>,
    pub(super) path: PathBuf,
}

impl DigestThread {
    /// Starts to hash from byte 0.
    pub(super) fn start(
        stored: Stored,
        set: DigestSet,
        progress: Arc<Progress>,
    ) -> Result<Self, DiskError> {
        let (blocks, queue) = mpsc::channel();
        let (end, end_queue) = mpsc::channel();
        let path = stored.path.clone();
        let quit = Arc::new(AtomicBool::new(false));
        let watched = Arc::clone(&quit);
        let thread = std::thread::Builder::new()
            .name("digest".into())
            .spawn(move || {
                let go_on = || !watched.load(Ordering::Relaxed) && !progress.is_stopped();
                run(&stored, set, &queue, &end_queue, &go_on)
            })
            .map_err(|e| DiskError::io("start a digest thread for", &path, e))?;
        Ok(Self { blocks, end, quit, thread })
    }

    /// Hands the next bytes over; false if the thread has ended, with an error that
    /// [`DigestThread::finish`] tells.
    pub(super) fn send(&self, block: Block) -> bool {
        self.blocks.send(block).is_ok()
    }

    /// Ends without a result. Blocks the thread until the other has let go of the file.
    ///
    /// # Errors
    /// The error that had ended it before.
    pub(super) fn abandon(self) -> Result<(), DiskError> {
        self.quit.store(true, Ordering::Relaxed);
        drop((self.end, self.blocks));
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

    /// Hashes what is left up to `total_bytes`, and gives the digests. Blocks the thread.
    pub(super) fn finish(self, total_bytes: u64) -> Result<Digests, DiskError> {
        let _ended = self.end.send(total_bytes);
        drop(self.end);
        drop(self.blocks);
        self.thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }
}

fn run(
    stored: &Stored,
    set: DigestSet,
    queue: &Receiver<Block>,
    end: &Receiver<u64>,
    go_on: &dyn Fn() -> bool,
) -> Result<Digests, DiskError> {
    let mut hasher = Hasher::new(set);
    let catch_up = |hasher: &mut Hasher, to: u64| {
        let gap = hasher.len_bytes()..to;
        if gap.is_empty() {
            return Ok(());
        }
        hash_range(&stored.file, &stored.path, gap, hasher, &mut |_| go_on())
    };
    for block in queue {
        let range = block.range();
        catch_up(&mut hasher, range.start)?;
        match block {
            Block::Data { buf, .. } => hasher.update(buf.bytes()),
            Block::Zero { len_bytes, .. } => hasher.update_zeroes(len_bytes),
        }
    }
    // No end means that the transfer failed: then the digests are wanted by nobody.
    if let Ok(total) = end.recv() {
        catch_up(&mut hasher, total)?;
    }
    Ok(hasher.finish())
}
