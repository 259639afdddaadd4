//! A compressed source is kept as it comes, so that a crash costs only what was not durable.
//!
//! Why: a decoder's state is not on the disk; its input can be.
//! How: what is received goes to a [`Spooler`]'s thread too, which appends it to the copy's spool.
//! The next run asks whether the source is still of that version, and decodes what is in the spool. What
//! follows is fetched meanwhile, into the spool alone, until the decoder has come to its end.
//! Never: fails a transfer: a spool that cannot be written, or read, is done without.
//! Start at [`Run::kept`] and [`Run::catch_up`].

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread::JoinHandle;
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};

use super::decode::Codec;
use super::error::FetchError;
use super::http::Client;
use super::stream::{Stream, To};
use super::threads::{blocking, in_place};
use super::transfer::Run;
use super::unpack::Unpacker;
use super::version::{Agreed, Remote, Resume};
use crate::disk::{DiskError, Reservation, Spool, SpoolEnd, SpoolReader, Version};
use crate::units::MIB;

/// Chunks of the network that wait to be written: about 2 MiB.
const CHUNKS: u32 = 16;
/// How often is looked whether something is to be made durable, if nothing comes.
const LOOK: Duration = Duration::from_millis(250);

/// What an earlier run has kept of a source, from its first byte on.
#[derive(Debug)]
pub(super) struct Kept {
    pub(super) spool: Spool,
    pub(super) codec: Codec,
    /// For the rest.
    pub(super) room: Reservation,
}

/// Why a spool is not decoded to its end.
enum Cause {
    Failed(FetchError),
    Damaged,
    /// The decoder has ended; its own error is told at the end.
    Over,
}

/// Writes a spool, on a thread of its own.
#[derive(Debug)]
pub(super) struct Spooler {
    chunks: mpsc::Sender<(Bytes, OwnedSemaphorePermit)>,
    room: Arc<Semaphore>,
    reader: SpoolReader,
    /// The source is complete: what is not durable by now is not worth a sync.
    complete: Arc<AtomicBool>,
    thread: JoinHandle<Result<(), DiskError>>,
}

impl Spooler {
    fn start(mut end: SpoolEnd) -> Result<Self, DiskError> {
        let (chunks, queue) = mpsc::channel::<(Bytes, OwnedSemaphorePermit)>();
        let (complete, reader) = (Arc::new(AtomicBool::new(false)), end.reader());
        let is_complete = Arc::clone(&complete);
        let thread = std::thread::Builder::new()
            .name("spool".into())
            .spawn(move || {
                loop {
                    match queue.recv_timeout(LOOK) {
                        Ok((bytes, _permit)) => {
                            if let Err(error) = end.append(&bytes) {
                                // What was there before it may be of use.
                                return end.finish().and(Err(error));
                            }
                        }
                        Err(RecvTimeoutError::Timeout) => end.look()?,
                        Err(RecvTimeoutError::Disconnected) => {
                            let is_complete = is_complete.load(Ordering::SeqCst);
                            return if is_complete { end.close() } else { end.finish() };
                        }
                    }
                }
            })
            .map_err(|e| DiskError::io("start a thread to write", "a spool".as_ref(), e))?;
        let room = Arc::new(Semaphore::new(CHUNKS as usize));
        Ok(Self { chunks, room, reader, complete, thread })
    }

    /// Hands over the next bytes of the source. False if the thread has ended: [`Spooler::end`]
    /// tells why.
    pub(super) async fn push(&self, bytes: Bytes) -> bool {
        let permit = Arc::clone(&self.room).acquire_owned().await;
        permit.is_ok_and(|permit| self.chunks.send((bytes, permit)).is_ok())
    }

    /// Waits until all that was handed over can be read, or the thread has ended.
    async fn written(&self) {
        let _all_or_ended = self.room.acquire_many(CHUNKS).await;
    }

    /// How much of the source is in the spool.
    pub(super) fn len_bytes(&self) -> u64 {
        self.reader.len_bytes()
    }

    /// Makes durable what was handed over, if the source is not `complete`: then its copy is about
    /// to be so, and a crash before that costs what came last. Blocks the thread.
    pub(super) fn end(self, complete: bool) -> Result<(), DiskError> {
        self.complete.store(complete, Ordering::SeqCst);
        drop(self.chunks);
        self.thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }
}

impl Run<'_> {
    /// What an earlier run has kept of the source, if it can be of use.
    ///
    /// # Errors
    /// [`DiskError::NoSpace`]: there is no use in going on before somebody has made room.
    pub(super) fn kept(&mut self) -> Result<Option<Kept>, FetchError> {
        if !self.source.unpack {
            return Ok(None);
        }
        let spool = match in_place(|| self.filling.spooled()) {
            Ok(Some(spool)) if spool.total_bytes() <= self.engine.policy.max_bytes => spool,
            Ok(_) => return Ok(None),
            Err(error) => {
                self.without_spool(&error);
                return Ok(None);
            }
        };
        let head = in_place(|| spool.read(0));
        let Some(codec) = head.and_then(|head| Codec::sniff(&head)) else {
            tracing::warn!(url = %self.url, "what was kept of the compressed source is damaged");
            return Ok(None);
        };
        let room = in_place(|| self.filling.room_for_spool(&spool))?;
        if room.is_none() {
            self.gives_way();
        }
        Ok(room.map(|room| Kept { spool, codec, room }))
    }

    /// Asks for one byte, to learn whether the source is still of the version that `kept` is of.
    pub(super) async fn ask_kept(
        &mut self,
        client: &Client,
        kept: &Kept,
    ) -> Result<Agreed, FetchError> {
        let (here, total) = (kept.spool.len_bytes(), kept.spool.total_bytes());
        let at = here.min(total.saturating_sub(1));
        let known = Remote::from_tag(&kept.spool.version().tag);
        // A mirror has an ETag of its own: the condition would only be refused there.
        let bound = Some(&known).filter(|_| !self.mirrors);
        let policy = &self.engine.policy;
        let mut answer = tokio::select! {
            answer = client.get(at..at + 1, bound, policy) => answer?,
            () = self.progress.stopped() => return Err(FetchError::Cancelled),
        };
        let has_digest = self.expect.is_some();
        let agreed = Agreed { remote: known, can_resume: true, has_digest };
        let judged = agreed.judge(&answer.remote, answer.ranged, answer.total, Some(total));
        // Of mirrors, each has a version of its own; the digest tells in the end.
        let by_digest = self.mirrors && has_digest && answer.ranged && answer.total == Some(total);
        let same = match judged {
            Ok(same) => same,
            Err(_) if by_digest => Resume::Unproven,
            Err(misfit) => return Err(misfit.at(client.shown())),
        };
        // A part of it may have come from a mirror.
        self.unproven |= same == Resume::Unproven || self.mirrors && has_digest;
        // A cache may give more than was asked for; it is the answer that tells.
        let bytes = answer.chunk(at, client, policy.stall_timeout).await?;
        self.progress.add_received(bytes.map_or(0, |bytes| bytes.len() as u64));
        Ok(Agreed { remote: answer.remote, ..agreed })
    }

    /// Decodes what is in the spool, while what follows is fetched into it, until the decoder has all that
    /// has come. False if the decoder has ended.
    pub(super) async fn catch_up(
        &self,
        stream: &mut Stream,
        unpacker: &Unpacker,
    ) -> Result<bool, FetchError> {
        let mut decoded = 0;
        while let Some(spooler) = &stream.spooler {
            let (reader, caught_up) = (spooler.reader.clone(), AtomicBool::new(false));
            let over = watch::Sender::new(false);
            let fetched = async {
                let fetched = self.stream(stream, To::Spool(&caught_up)).await;
                if let Some(spooler) = &stream.spooler {
                    spooler.written().await;
                }
                over.send_replace(true);
                fetched.map_err(Cause::Failed)
            };
            let replayed =
                self.replay(unpacker, reader, &mut decoded, &caught_up, over.subscribe());
            match tokio::try_join!(fetched, replayed) {
                Ok(_) => break,
                Err(Cause::Over) => return Ok(false),
                Err(Cause::Failed(error)) => return Err(error),
                Err(Cause::Damaged) => self.cut_spool(stream, decoded).await?,
            }
        }
        stream.goes_on_at(decoded);
        tracing::info!(url = %self.url, at = decoded, "going on with a compressed source");
        Ok(true)
    }

    /// Decodes what is in a spool from `at` on. Says so when less than a MiB is left, and then waits until
    /// nothing more comes there.
    async fn replay(
        &self,
        unpacker: &Unpacker,
        reader: SpoolReader,
        at: &mut u64,
        caught_up: &AtomicBool,
        mut over: watch::Receiver<bool>,
    ) -> Result<(), Cause> {
        loop {
            let is_over = *over.borrow_and_update();
            let left = reader.len_bytes() - *at;
            if is_over && left == 0 {
                return Ok(());
            }
            if !is_over && left < MIB {
                caught_up.store(true, Ordering::SeqCst);
                let _over = over.changed().await;
                continue;
            }
            let (from, here) = (*at, reader.clone());
            let Some(bytes) = blocking(move || here.read(from)).await else {
                let url = &self.url;
                tracing::warn!(%url, at, "what was kept of the compressed source is damaged from here on");
                return Err(Cause::Damaged);
            };
            let len = bytes.len() as u64;
            if !self.hand_over(unpacker, bytes.into()).await.map_err(Cause::Failed)? {
                return Err(Cause::Over);
            }
            *at += len;
        }
    }

    /// Gives up what is in the spool from `at` on, which is damaged: it is fetched anew.
    async fn cut_spool(&self, stream: &mut Stream, at: u64) -> Result<(), FetchError> {
        if let Some(spooler) = stream.spooler.take()
            && let Err(error) = blocking(move || spooler.end(false)).await
        {
            self.spool_failed(&error)?;
        }
        if let Ok(Some(mut spool)) = in_place(|| self.filling.spooled()) {
            spool.cut(at);
            if let Some(room) = in_place(|| self.filling.room_for_spool(&spool))? {
                stream.spooler = self.spool_on(spool, room);
            }
        }
        stream.goes_on_at(at);
        Ok(())
    }

    /// Keeps what comes of a source from its first byte on, if it could be continued.
    pub(super) fn spool(&self, agreed: &Agreed, total: Option<u64>) -> Option<Spooler> {
        let may = self.spools && agreed.can_resume;
        let total = total.filter(|total| may && *total <= self.engine.policy.max_bytes)?;
        let version = Version { total_bytes: Some(total), tag: agreed.remote.to_tag() };
        self.started(in_place(|| self.filling.spool(version)))
    }

    /// Keeps what comes after what is in `spool`.
    pub(super) fn spool_on(&self, spool: Spool, room: Reservation) -> Option<Spooler> {
        self.started(in_place(|| self.filling.spool_on(spool, room)))
    }

    fn started(&self, end: Result<SpoolEnd, DiskError>) -> Option<Spooler> {
        match end.and_then(Spooler::start) {
            Ok(spooler) => Some(spooler),
            Err(error) => {
                self.without_spool(&error);
                None
            }
        }
    }

    /// The spool has failed, which may be no reason to end the transfer.
    ///
    /// # Errors
    /// [`DiskError::NoSpace`]: the disk is full, and would hardly have room for the image alone.
    pub(super) fn spool_failed(&self, error: &DiskError) -> Result<(), FetchError> {
        if let (DiskError::Full { .. }, Ok(Some(spool))) =
            (error, in_place(|| self.filling.spooled()))
        {
            drop(in_place(|| self.filling.room_for_spool(&spool))?);
        }
        self.without_spool(error);
        Ok(())
    }

    /// The disk is full, and the image may fit without the spool: true if there was one.
    pub(super) fn makes_room(&mut self) -> bool {
        let spool = in_place(|| self.filling.spooled()).ok().flatten();
        let in_the_way = spool.is_some_and(|spool| {
            matches!(in_place(|| self.filling.room_for_spool(&spool)), Ok(None))
        });
        if in_the_way {
            self.gives_way();
        }
        in_the_way
    }

    /// No more spool in this transfer: all that came is fetched anew.
    fn gives_way(&mut self) {
        self.spools = false;
        let path = self.filling.path();
        tracing::warn!(path = %path.display(), "no room to keep the compressed source: it is fetched anew");
    }

    /// Says that it goes on without a spool, and makes room.
    pub(super) fn without_spool(&self, error: &DiskError) {
        let error = super::one_line(error);
        tracing::warn!(url = %self.url, %error, "the compressed source is not kept: a crash would cost all of it");
        if let Err(error) = in_place(|| self.filling.drop_spool()) {
            tracing::warn!(error = %super::one_line(&error), "a spool stays");
        }
    }
}
