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
pub(super) struct Pipeline {
    writer: Writer,
    digest: DigestThread,
    feed: Feed,
}

/// A way into the stages. The pipeline ends when all of them are gone.
#[derive(Clone, Debug)]
pub(super) struct Feed {
    writer: BlockSender,
    digest: DigestFeed,
    progress: Arc<Progress>,
}

/// Why a stream must end: the writer has stopped; [`Pipeline::abandon`] tells why.
#[derive(Debug)]
pub(super) struct Stopped;

impl Pipeline {
    /// Starts the stages. `missing` are the ranges that will be fed; all else is in the file.
    pub(super) fn start(
        filling: &Filling,
        missing: &[Range<u64>],
        probe: &Probe,
        digests: DigestSet,
        progress: &Arc<Progress>,
    ) -> Result<Self, FetchError> {
        let stored = Stored { file: Arc::clone(filling.file()), path: filling.path() };
        let digest = DigestThread::start(stored, missing, digests, Arc::clone(progress))?;
        let writer = Writer::start(filling, probe)?;
        let feed =
            Feed { writer: writer.sender(), digest: digest.feed(), progress: Arc::clone(progress) };
        Ok(Self { writer, digest, feed })
    }

    /// A way into the stages.
    pub(super) fn feed(&self) -> Feed {
        self.feed.clone()
    }

    /// Waits until everything is durable and hashed up to `total_bytes`. Blocks the thread; every
    /// other feed is gone.
    pub(super) fn finish(self, total_bytes: u64) -> Result<Digests, FetchError> {
        let Self { writer, digest, feed } = self;
        drop(feed);
        writer.finish()?;
        digest.finish(total_bytes).map_err(unreadable)
    }

    /// Ends early: makes durable what was handed over. Blocks the thread; every other feed is gone.
    pub(super) fn abandon(self) -> Result<(), FetchError> {
        let Self { writer, digest, feed } = self;
        drop(feed);
        let (written, digested) = (writer.finish(), digest.abandon());
        written?;
        digested.map_err(unreadable)
    }
}

impl Feed {
    /// Hands a buffer over that begins at `start` of the file and ends at a MiB or at the end.
    pub(super) fn send(&self, start: u64, mut buf: Buf) -> Result<(), Stopped> {
        buf.pad();
        let len = buf.len() as u64;
        let (at, buf) = (FileOffset(start), Arc::new(buf));
        if !self.digest.send(Block::Data { at, buf: Arc::clone(&buf) }) {
            return Err(Stopped);
        }
        self.writer.send(Block::Data { at, buf }).map_err(|_| Stopped)?;
        self.progress.add_done(len);
        Ok(())
    }

    /// Hands over a range of zeroes; `at` must be a unit's begin.
    pub(super) fn send_zeroes(&self, at: u64, len_bytes: u64) -> Result<(), Stopped> {
        let at = FileOffset(at);
        if !self.digest.send(Block::Zero { at, len_bytes }) {
            return Err(Stopped);
        }
        self.writer.send(Block::Zero { at, len_bytes }).map_err(|_| Stopped)?;
        self.progress.add_done(len_bytes);
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

    /// Takes the next bytes of the stream.
    pub(super) async fn push(
        &mut self,
        mut bytes: &[u8],
    ) -> Result<Result<(), Stopped>, FetchError> {
        while !bytes.is_empty() {
            let mut buf = match self.buf.take() {
                Some(buf) => buf,
                None => self.next_buf().await?,
            };
            // A buffer begins where the last ended; it ends at a MiB boundary of the file.
            let start = self.at - buf.len() as u64;
            let limit = BLOCK_BYTES - in_block(start);
            let taken = buf.fill(bytes, limit);
            self.at += taken as u64;
            bytes = &bytes[taken..];
            if !buf.is_full(limit) {
                self.buf = Some(buf);
            } else if self.feed.send(start, buf).is_err() {
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
