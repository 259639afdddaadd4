//! From streams of bytes to blocks, and from blocks to the disk and the digests.
//!
//! Why: the network gives pieces of any size, from several connections at once; the disk wants
//! aligned MiBs, and the digests want them in order.
//! How: a [`Cutter`] copies one stream, once, into pooled buffers that end at a MiB boundary of the
//! file; a full buffer is shared by the writer and the digest thread through a [`Feed`].
//! Never: holds more than one unfinished buffer a stream.
//! Start at [`Pipeline::start`], then [`Cutter::push`].

use std::ops::Range;
use std::sync::Arc;

use super::digest::{DigestFeed, DigestThread, Stored};
use super::error::FetchError;
use super::progress::Progress;
use crate::disk::{Block, BlockSender, DigestSet, Digests, DiskError, Filling, UNIT_BYTES, Writer};
use crate::ring::{BLOCK_BYTES, Buf, BufPermits, BufShare, Probe};
use crate::units::FileOffset;

/// The stages behind the streams.
#[derive(Debug)]
pub struct Pipeline {
    writer: Writer,
    digest: DigestThread,
    feed: Feed,
}

/// A way into the stages. The pipeline ends when all of them are gone.
#[derive(Clone, Debug)]
pub struct Feed {
    to: Destination,
    progress: Arc<Progress>,
    /// What is handed over may wait for its digest in memory.
    may_wait: bool,
}

#[derive(Clone, Debug)]
enum Destination {
    /// The bytes are the file's.
    File { writer: BlockSender, digest: DigestFeed },
    /// Somebody makes something else of them.
    Taker { taker: Arc<dyn Taker>, digest: Option<DigestFeed> },
}

/// Takes the bytes of a source that are not those of the file.
pub trait Taker: Send + Sync + std::fmt::Debug {
    /// Takes the bytes of `buf`, which begin at byte `at` of the source. Pieces come in any order,
    /// from several threads, and end at MiB boundaries of the source or where a wanted range ends.
    /// Must not block.
    ///
    /// # Errors
    /// [`Stopped`] if nothing more is of use; the taker knows why.
    fn take(&self, at: u64, buf: Arc<Buf>) -> Result<(), Stopped>;
}

/// Why a stream must end: a stage has stopped, and tells why when it is ended.
#[derive(Debug, thiserror::Error)]
#[error("a stage of the transfer has stopped")]
pub struct Stopped;

impl Pipeline {
    /// Starts the stages. `missing` are the ranges that will be fed; all else is in the file. Of
    /// buffers that come out of order at most `most_held` wait in memory for their digest.
    ///
    /// # Errors
    /// A thread cannot be started, or nothing was begun.
    pub fn start(
        filling: &Filling,
        missing: &[Range<u64>],
        most_held: usize,
        probe: &Probe,
        digests: DigestSet,
        progress: &Arc<Progress>,
    ) -> Result<Self, FetchError> {
        let stored = Stored { file: Arc::clone(filling.file()), path: filling.path() };
        let watched = Arc::clone(progress);
        let digest = DigestThread::start(stored, missing, most_held, digests, watched)?;
        let writer = Writer::start(filling, probe)?;
        let to = Destination::File { writer: writer.sender(), digest: digest.feed() };
        let feed = Feed { to, progress: Arc::clone(progress), may_wait: true };
        Ok(Self { writer, digest, feed })
    }

    /// A way into the stages.
    #[must_use]
    pub fn feed(&self) -> Feed {
        self.feed.clone()
    }

    /// Waits until everything is durable and hashed up to `total_bytes`. Blocks the thread; every
    /// other feed is gone.
    ///
    /// # Errors
    /// The first failure of a write, a sync or a read-back.
    pub fn finish(self, total_bytes: u64) -> Result<Digests, FetchError> {
        let Self { writer, digest, feed } = self;
        drop(feed);
        writer.finish()?;
        digest.finish(total_bytes).map_err(unreadable)
    }

    /// Ends early: makes durable what was handed over. Blocks the thread; every other feed is gone.
    ///
    /// # Errors
    /// As [`Pipeline::finish`].
    pub fn abandon(self) -> Result<(), FetchError> {
        let Self { writer, digest, feed } = self;
        drop(feed);
        let (written, digested) = (writer.finish(), digest.abandon());
        written?;
        digested.map_err(unreadable)
    }
}

impl Feed {
    /// For a taker; `digest` also gets the bytes, of the whole source then.
    pub(super) fn to_taker(
        taker: Arc<dyn Taker>,
        digest: Option<DigestFeed>,
        progress: &Arc<Progress>,
    ) -> Self {
        let to = Destination::Taker { taker, digest };
        Self { to, progress: Arc::clone(progress), may_wait: true }
    }

    /// The same way, for bytes that are taken out of turn: their buffers do not wait for the digest.
    pub(super) fn out_of_turn(&self) -> Self {
        Self { may_wait: false, ..self.clone() }
    }

    /// Hands a buffer over that begins at `start` of the file and ends at a MiB or at the end.
    ///
    /// # Errors
    /// [`Stopped`].
    pub fn send(&self, start: u64, mut buf: Buf) -> Result<(), Stopped> {
        buf.pad();
        let at = FileOffset(start);
        let buf = Arc::new(buf);
        match &self.to {
            Destination::File { .. } => self.send_block(|| Block::Data { at, buf: buf.clone() }),
            Destination::Taker { taker, digest } => {
                let block = Block::Data { at, buf: Arc::clone(&buf) };
                if digest.as_ref().is_some_and(|digest| !digest.send(block, self.may_wait)) {
                    return Err(Stopped);
                }
                taker.take(start, buf)
            }
        }
    }

    /// Hands over a range of zeroes; `at` must be a unit's begin. Not for a taker.
    ///
    /// # Errors
    /// [`Stopped`].
    pub fn send_zeroes(&self, at: u64, len_bytes: u64) -> Result<(), Stopped> {
        self.send_block(|| Block::Zero { at: FileOffset(at), len_bytes })
    }

    /// Notes that the caller has written a range of the file; `at` must be a unit's begin. Not for
    /// a taker.
    ///
    /// # Errors
    /// [`Stopped`].
    pub fn send_written(&self, at: u64, len_bytes: u64) -> Result<(), Stopped> {
        self.send_block(|| Block::Written { at: FileOffset(at), len_bytes })
    }

    fn send_block(&self, block: impl Fn() -> Block) -> Result<(), Stopped> {
        let Destination::File { writer, digest } = &self.to else { return Err(Stopped) };
        let range = block().range();
        if !digest.send(block(), self.may_wait) {
            return Err(Stopped);
        }
        writer.send(block()).map_err(|_| Stopped)?;
        self.progress.add_done(range.end - range.start);
        Ok(())
    }
}

/// Cuts one stream into buffers. When it is dropped, whole units of an open buffer are handed over.
#[derive(Debug)]
pub(super) struct Cutter {
    feed: Feed,
    share: BufShare,
    permits: Option<BufPermits>,
    buf: Option<Buf>,
    at: u64,
}

impl Cutter {
    /// For a stream that goes on at `at`, where the bytes in `buf` end. It uses up `permits` first.
    pub(super) fn resume(
        feed: Feed,
        share: BufShare,
        at: u64,
        permits: Option<BufPermits>,
        buf: Option<Buf>,
    ) -> Self {
        Self { feed, share, permits, buf, at }
    }

    /// Where the next byte of the stream belongs.
    pub(super) fn at(&self) -> u64 {
        self.at
    }

    async fn next_buf(&mut self) -> Result<Buf, FetchError> {
        let taken = match self.permits.as_mut().filter(|permits| !permits.is_empty()) {
            Some(permits) => permits.take().await,
            None => self.share.take().await,
        };
        taken.map_err(|source| FetchError::Memory { source })
    }

    /// Room for the next bytes of the stream, not empty and at most `most` bytes (more than 0); see
    /// [`Cutter::filled`].
    pub(super) async fn room(&mut self, most: u64) -> Result<&mut [u8], FetchError> {
        let buf = match self.buf.take() {
            Some(buf) => buf,
            None => self.next_buf().await?,
        };
        let buf = self.buf.insert(buf);
        // A buffer begins where the last ended; it ends at a MiB boundary of the file.
        let limit = BLOCK_BYTES - in_block(self.at - buf.len() as u64);
        let room = buf.spare(limit);
        let most = room.len().min(usize::try_from(most).unwrap_or(usize::MAX));
        Ok(&mut room[..most])
    }

    /// Takes the first `count` bytes of the room that was given.
    pub(super) fn filled(&mut self, count: usize) -> Result<(), Stopped> {
        let Some(mut buf) = self.buf.take() else { return Ok(()) };
        let start = self.at - buf.len() as u64;
        let limit = BLOCK_BYTES - in_block(start);
        buf.set_len(buf.len() + count);
        self.at += count as u64;
        if buf.is_full(limit) {
            return self.feed.send(start, buf);
        }
        self.buf = Some(buf);
        Ok(())
    }

    /// Takes the next bytes of the stream.
    pub(super) async fn push(
        &mut self,
        mut bytes: &[u8],
    ) -> Result<Result<(), Stopped>, FetchError> {
        while !bytes.is_empty() {
            let room = self.room(bytes.len() as u64).await?;
            let count = room.len();
            room.copy_from_slice(&bytes[..count]);
            bytes = &bytes[count..];
            if self.filled(count).is_err() {
                return Ok(Err(Stopped));
            }
        }
        Ok(Ok(()))
    }

    /// The stream broke or ended here. At the end of the file everything counts; elsewhere only
    /// whole units do, and the position goes back to the end of the last one.
    pub(super) fn flush(&mut self, at_end: bool) -> Result<(), Stopped> {
        let Some(mut buf) = self.buf.take() else { return Ok(()) };
        let start = self.at - buf.len() as u64;
        if !at_end {
            let unit = usize::try_from(UNIT_BYTES).unwrap_or(usize::MAX);
            buf.set_len(buf.len() / unit * unit);
        }
        self.at = start + buf.len() as u64;
        if buf.is_empty() { Ok(()) } else { self.feed.send(start, buf) }
    }

    /// Hands the whole units of the open buffer over, so that an idle stream holds none. What is
    /// left of it, less than a unit, comes back: it is to be pushed again.
    pub(super) fn park(&mut self) -> Result<Vec<u8>, Stopped> {
        let unit = usize::try_from(UNIT_BYTES).unwrap_or(usize::MAX);
        let open = self.buf.as_ref().map_or(&[][..], |buf| buf.bytes());
        let tail = open[open.len() / unit * unit..].to_vec();
        self.flush(false).map(|()| tail)
    }

    /// Bytes in the open buffer.
    pub(super) fn open_bytes(&self) -> usize {
        self.buf.as_ref().map_or(0, Buf::len)
    }

    /// Hands the whole units of the open buffer over before it is full: somebody waits for them. The
    /// stream goes on in another buffer.
    pub(super) async fn hand_over(&mut self) -> Result<Result<(), Stopped>, FetchError> {
        match self.park() {
            Ok(tail) => self.push(&tail).await,
            Err(Stopped) => Ok(Err(Stopped)),
        }
    }

    /// The whole units in the open buffer.
    pub(super) fn open_units(&self) -> Range<u64> {
        let start = self.at - self.open_bytes() as u64;
        start..start + (self.at - start) / UNIT_BYTES * UNIT_BYTES
    }

    /// As [`hand_over`](Self::hand_over), for a stream in its turn: with a further buffer, if one is
    /// free now, as its own must be enough to come to its end. False if none is.
    pub(super) fn try_to_hand_over(&mut self) -> Result<bool, Stopped> {
        let Some(mut next) = self.share.try_take() else { return Ok(false) };
        let tail = self.park()?;
        next.fill(&tail, BLOCK_BYTES);
        self.at += tail.len() as u64;
        self.buf = Some(next);
        Ok(true)
    }

    /// Gives up the right to `count` of the buffers that the stream was to use.
    pub(super) fn without(&mut self, count: usize) -> Option<BufPermits> {
        self.permits.as_mut().map(|permits| permits.split(count))
    }

    /// The open buffer and what is left of the permits, for whoever goes on here.
    pub(super) fn take_apart(mut self) -> (Option<BufPermits>, Option<Buf>) {
        (self.permits.take(), self.buf.take())
    }
}

impl Drop for Cutter {
    fn drop(&mut self) {
        // If the writer has stopped, its own error is the one to tell.
        let _ = self.flush(false);
    }
}

/// The digest thread only reads: what it fails at is reading stored bytes back.
fn unreadable(error: DiskError) -> FetchError {
    FetchError::ReadBack { source: Box::new(error) }
}

/// How far `at` is inside its MiB of the file.
fn in_block(at: u64) -> usize {
    usize::try_from(at % BLOCK_BYTES as u64).unwrap_or(0)
}
