//! From a stream of bytes to blocks, and from blocks to the disk and the digests.
//!
//! Why: the network gives pieces of any size, the disk wants aligned MiBs.
//! How: bytes are copied once, into a pooled buffer that ends at a MiB boundary of the file; a
//! full buffer is shared by the writer and the digest thread.
//! Never: holds more than one unfinished buffer.
//! Start at [`Pipeline::push`].

use std::sync::Arc;

use crate::disk::{Block, Digests, DiskError, Filling, UNIT_BYTES, Writer};
use crate::ring::{BLOCK_BYTES, Buf, BufShare, Probe};
use crate::units::FileOffset;

use super::digest::{DigestThread, Stored};
use super::error::FetchError;
use super::progress::Progress;
use crate::disk::DigestSet;

/// The stages behind a stream.
#[derive(Debug)]
pub(super) struct Pipeline {
    writer: Writer,
    digest: DigestThread,
    pool: BufShare,
    progress: Arc<Progress>,
    buf: Option<Buf>,
    /// Where the next byte of the stream belongs.
    at: u64,
}

/// Why a stream must end: the writer has stopped; [`Pipeline::finish`] tells why.
#[derive(Debug)]
pub(super) struct Stopped;

impl Pipeline {
    pub(super) fn start(
        filling: &Filling,
        probe: &Probe,
        pool: &BufShare,
        digests: DigestSet,
        progress: &Arc<Progress>,
    ) -> Result<Self, FetchError> {
        let stored = Stored { file: Arc::clone(filling.file()), path: filling.path() };
        Ok(Self {
            digest: DigestThread::start(stored, digests, Arc::clone(progress))?,
            writer: Writer::start(filling, probe)?,
            pool: pool.clone(),
            progress: Arc::clone(progress),
            buf: None,
            at: 0,
        })
    }

    /// Where the next byte belongs.
    pub(super) fn at(&self) -> u64 {
        self.at
    }

    /// Goes on at `at`, a unit's begin: what lies between is here already.
    pub(super) fn seek(&mut self, at: u64) {
        debug_assert!(self.buf.is_none() && at.is_multiple_of(UNIT_BYTES));
        self.at = at;
    }

    /// Takes the next bytes of the stream.
    pub(super) async fn push(
        &mut self,
        mut bytes: &[u8],
    ) -> Result<Result<(), Stopped>, FetchError> {
        while !bytes.is_empty() {
            let mut buf = match self.buf.take() {
                Some(buf) => buf,
                None => self.pool.take().await.map_err(|source| FetchError::Memory { source })?,
            };
            // A buffer begins where the last ended; it ends at a MiB boundary of the file.
            let start = self.at - buf.len() as u64;
            let limit = BLOCK_BYTES - in_block(start);
            let taken = buf.fill(bytes, limit);
            self.at += taken as u64;
            bytes = &bytes[taken..];
            if !buf.is_full(limit) {
                self.buf = Some(buf);
            } else if self.send(start, buf).is_err() {
                return Ok(Err(Stopped));
            }
        }
        Ok(Ok(()))
    }

    fn send(&self, start: u64, mut buf: Buf) -> Result<(), Stopped> {
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

    /// Takes a range of zeroes; `at` must be a unit's begin.
    pub(super) fn push_zeroes(&mut self, len_bytes: u64) -> Result<(), Stopped> {
        let at = FileOffset(self.at);
        if !self.digest.send(Block::Zero { at, len_bytes }) {
            return Err(Stopped);
        }
        self.writer.send(Block::Zero { at, len_bytes }).map_err(|_| Stopped)?;
        self.progress.add_done(len_bytes);
        self.at += len_bytes;
        Ok(())
    }

    /// Takes a whole buffer that begins at the current position.
    pub(super) fn push_buf(&mut self, buf: Buf) -> Result<(), Stopped> {
        let start = self.at;
        self.at += buf.len() as u64;
        self.send(start, buf)
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
        if buf.is_empty() { Ok(()) } else { self.send(start, buf) }
    }

    /// Waits until everything is durable and hashed up to `total_bytes`. Blocks the thread.
    pub(super) fn finish(self, total_bytes: u64) -> Result<Digests, FetchError> {
        let Self { writer, digest, buf, .. } = self;
        drop(buf);
        writer.finish()?;
        digest.finish(total_bytes).map_err(unreadable)
    }

    /// Ends early: makes durable what was handed over. Blocks the thread.
    pub(super) fn abandon(self) -> Result<(), FetchError> {
        let Self { writer, digest, buf, .. } = self;
        drop(buf);
        let (written, digested) = (writer.finish(), digest.abandon());
        written?;
        digested.map_err(unreadable)
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
