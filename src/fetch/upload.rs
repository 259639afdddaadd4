//! Bytes that a client brings, instead of bytes that are fetched.
//!
//! Why: an image may be where no URL leads; 75 GiB of it must survive a broken proxy.
//! How: [`receive`] opens the stages and waits; whoever has bytes takes the one place of a writer
//! ([`Upload::writer`]) at the offset where the last one ended. A writer that breaks off leaves
//! what it brought; what outlives the process is the durable prefix.
//! Never: two writers at once, a gap, a byte more than was announced, or a buffer that an idle
//! upload holds.
//! Start at [`receive`], then [`UploadWriter::write`].

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use tokio::sync::{Mutex, OwnedMutexGuard, watch};

use super::error::FetchError;
use super::expect::Expect;
use super::limit::RateLimit;
use super::pipeline::{Cutter, Pipeline, Stopped};
use super::progress::{Phase, Progress};
use super::threads::{blocking, in_place};
use super::transfer::{Engine, FEW_BUFFERS, Fetched};
use crate::disk::{Filling, Version};

/// What an upload is called where a source has its URL.
const NAME: &str = "upload";
/// What is told while nobody writes.
const WAITING: &str = "waiting for its upload";

/// How an upload stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Bytes are missing.
    Open,
    /// All bytes are here.
    Arrived,
    /// A stage has stopped, or the worker was told to stop.
    Ended,
}

/// Why a write was refused.
#[derive(Debug, thiserror::Error)]
pub enum UploadError {
    /// Somebody else writes.
    #[error("another client is writing this upload")]
    Busy,
    /// The next byte is another one.
    #[error("the next byte is {offset}, not {given}")]
    WrongOffset {
        /// Where it goes on.
        offset: u64,
        /// Where the client wanted to go on.
        given: u64,
    },
    /// More bytes than were announced.
    #[error("more than the {total} bytes that were announced")]
    TooMuch {
        /// How many were announced.
        total: u64,
    },
    /// The daemon takes no bytes for now: paused, cancelled, shutting down, or the disk failed.
    #[error("the upload was stopped; what has arrived is kept")]
    Stopped,
    /// No buffer could be had.
    #[error(transparent)]
    Fetch(#[from] FetchError),
}

/// Where the bytes go in.
#[derive(Debug)]
struct Inlet {
    cutter: Cutter,
    /// The last bytes, less than a unit, that wait for more while nobody writes.
    tail: Vec<u8>,
}

impl Inlet {
    fn at(&self) -> u64 {
        self.cutter.at() + self.tail.len() as u64
    }

    async fn push(&mut self, bytes: &[u8]) -> Result<Result<(), Stopped>, FetchError> {
        if !self.tail.is_empty() {
            // It fits into one buffer: it is pushed as a whole, or not at all.
            let pushed = self.cutter.push(&self.tail).await?;
            self.tail.clear();
            if pushed.is_err() {
                return Ok(pushed);
            }
        }
        self.cutter.push(bytes).await
    }
}

/// An upload that waits for bytes.
#[derive(Debug)]
pub struct Upload {
    total: u64,
    offset: AtomicU64,
    state: watch::Sender<State>,
    inlet: Arc<Mutex<Option<Inlet>>>,
    progress: Arc<Progress>,
    limit: Arc<RateLimit>,
}

impl Upload {
    /// How many bytes it will have.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.total
    }

    /// Where it goes on.
    #[must_use]
    pub fn offset(&self) -> u64 {
        self.offset.load(Ordering::SeqCst)
    }

    /// Takes the place of the writer, at `at`.
    ///
    /// # Errors
    /// [`UploadError`].
    pub fn writer(self: &Arc<Self>, at: u64) -> Result<UploadWriter, UploadError> {
        let held = Arc::clone(&self.inlet).try_lock_owned().map_err(|_| UploadError::Busy)?;
        let Some(inlet) = held.as_ref() else { return Err(UploadError::Stopped) };
        let offset = inlet.at();
        if at != offset {
            return Err(UploadError::WrongOffset { offset, given: at });
        }
        self.progress.say("");
        Ok(UploadWriter { upload: Arc::clone(self), held })
    }

    /// Resolves once no more bytes are taken.
    pub async fn over(&self) {
        let mut state = self.state.subscribe();
        let _sender_is_ours = state.wait_for(|state| *state != State::Open).await;
    }

    fn end(&self, state: State) {
        self.state.send_if_modified(|now| {
            let open = *now == State::Open;
            if open {
                *now = state;
            }
            open
        });
    }
}

/// The one who brings bytes, until it is dropped.
#[derive(Debug)]
pub struct UploadWriter {
    upload: Arc<Upload>,
    held: OwnedMutexGuard<Option<Inlet>>,
}

impl UploadWriter {
    /// Takes the next bytes; waits while disk or rate are behind. After an error nothing of
    /// `bytes` counts but what [`Upload::offset`] tells.
    ///
    /// # Errors
    /// [`UploadError::TooMuch`] (nothing of `bytes` is taken), [`UploadError::Stopped`].
    pub async fn write(&mut self, bytes: &[u8]) -> Result<(), UploadError> {
        let Self { upload, held } = self;
        let Some(inlet) = held.as_mut() else { return Err(UploadError::Stopped) };
        if bytes.len() as u64 > upload.total - inlet.at() {
            return Err(UploadError::TooMuch { total: upload.total });
        }
        let before = inlet.at();
        let pushed = tokio::select! {
            pushed = inlet.push(bytes) => pushed?,
            () = upload.over() => return Err(UploadError::Stopped),
        };
        upload.progress.add_received(inlet.at() - before);
        upload.offset.store(inlet.at(), Ordering::SeqCst);
        if pushed.is_err() {
            upload.end(State::Ended);
            return Err(UploadError::Stopped);
        }
        tokio::select! {
            () = async {
                upload.progress.limit().spend(bytes.len()).await;
                upload.limit.spend(bytes.len()).await;
            } => Ok(()),
            () = upload.over() => Err(UploadError::Stopped),
        }
    }
}

impl Drop for UploadWriter {
    fn drop(&mut self) {
        let Some(inlet) = self.held.as_mut() else { return };
        // A write that was dropped half-way has taken what the inlet says.
        self.upload.offset.store(inlet.at(), Ordering::SeqCst);
        if inlet.at() == self.upload.total {
            let flushed = inlet.cutter.flush(true);
            // The stages end when nobody can feed them any more.
            *self.held = None;
            let state = if flushed.is_ok() { State::Arrived } else { State::Ended };
            return self.upload.end(state);
        }
        self.upload.progress.say(WAITING);
        if inlet.tail.is_empty() {
            match inlet.cutter.park() {
                Ok(tail) => inlet.tail = tail,
                Err(Stopped) => self.upload.end(State::Ended),
            }
        }
    }
}

/// Takes `total` bytes into `filling` from whoever finds the upload that `register` is given, and
/// checks them. What is durable of an earlier upload of the same length counts as here.
///
/// # Errors
/// As [`super::transfer()`]. When it is stopped, whole units of what has arrived are durable.
pub async fn receive(
    engine: &Engine,
    total: u64,
    expect: &Expect,
    filling: &mut Filling,
    progress: &Arc<Progress>,
    register: impl FnOnce(&Arc<Upload>),
) -> Result<Fetched, FetchError> {
    let from = prepare(engine, total, filling)?;
    let missing = if from < total { vec![from..total] } else { Vec::new() };
    let wanted = expect.wanted();
    let probe = engine.probe.when(!wanted.is_empty());
    let pipeline = Pipeline::start(filling, &missing, usize::MAX, &probe, wanted, progress)?;
    progress.set_total(Some(total));
    progress.begin_at(from);
    progress.set_phase(Phase::Fetching);
    let share = engine.pool.share(FEW_BUFFERS, engine.buffers);
    let inlet = (from < total).then(|| {
        let cutter = Cutter::resume(pipeline.feed(), share, from, None, None);
        Inlet { cutter, tail: Vec::new() }
    });
    let state = if inlet.is_some() { State::Open } else { State::Arrived };
    let upload = Arc::new(Upload {
        total,
        offset: AtomicU64::new(from),
        state: watch::Sender::new(state),
        inlet: Arc::new(Mutex::new(inlet)),
        progress: Arc::clone(progress),
        limit: Arc::clone(&engine.limit),
    });
    progress.say(WAITING);
    register(&upload);
    tokio::select! {
        () = upload.over() => {}
        () = progress.stopped() => upload.end(State::Ended),
    }
    // A writer lets go when it hears of it; then whole units of an open buffer are handed over.
    drop(upload.inlet.lock().await.take());
    progress.say("");
    if *upload.state.borrow() != State::Arrived {
        return match blocking(move || pipeline.abandon()).await {
            Ok(()) => Err(FetchError::Cancelled),
            Err(error) => Err(error),
        };
    }
    progress.set_phase(Phase::Verifying);
    let finished = blocking(move || pipeline.finish(total)).await;
    let digests = match finished {
        Err(_) if progress.is_stopped() => return Err(FetchError::Cancelled),
        other => other?,
    };
    if let Some((kind, expected, found)) = expect.mismatch(&digests) {
        return Err(FetchError::Digest { url: NAME.to_owned(), kind, expected, found });
    }
    Ok(Fetched { digests, etag: None })
}

/// Begins, or goes on with what is here; the first byte that is missing.
fn prepare(engine: &Engine, total: u64, filling: &mut Filling) -> Result<u64, FetchError> {
    let (url, limit) = (NAME.to_owned(), engine.policy.max_bytes);
    if total == 0 {
        return Err(FetchError::Empty { url });
    }
    if total > limit {
        return Err(FetchError::TooLarge { url, total, limit });
    }
    let tag = format!("upload:{total}");
    let same = filling.version().is_some_and(|known| known.tag == tag);
    if same && filling.total_bytes() == Some(total) {
        in_place(|| filling.resume_prefix())?;
    } else {
        let version = Version { total_bytes: Some(total), tag };
        in_place(|| filling.begin(&version))?;
    }
    Ok(filling.missing().first().map_or(total, |range| range.start))
}
