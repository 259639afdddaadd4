//! A compressed source, decoded as it arrives.
//!
//! Why: an image that comes as `.gz`, `.xz`, `.zst` or `.bz2` should be a disk when its last byte is
//! here, without a second file and a second pass.
//! How: one thread takes the stream's chunks in order, hashes them for the digests that the user
//! gave (which are of the source's own bytes), and decodes straight into the buffers of the writer.
//! A connection that breaks costs nothing: the next one goes on in the middle of the stream.
//! Never: makes more than the allowed bytes, or goes on with another version of the source.
//! Start at [`Unpacker::start`].

use std::thread::JoinHandle;

use bytes::Bytes;
use tokio::sync::mpsc;

use super::decode::{Codec, DecodeError, Decoder, Limits, State};
use super::error::FetchError;
use super::pipeline::Feed;
use crate::disk::{DigestSet, Digests, DiskError, Hasher};
use crate::ring::{BLOCK_BYTES, Buf, BufShare};

/// Chunks of the network that wait for the decoder: about 1 MiB.
const CHUNKS: usize = 8;

/// A stream that is complete.
#[derive(Debug)]
pub(super) struct Unpacked {
    /// Bytes of the file.
    pub(super) total: u64,
    /// Digests of the source's own bytes.
    pub(super) source: Digests,
}

/// Why a thread has ended before its stream.
#[derive(Debug)]
pub(super) enum Ended {
    Failed(FetchError),
    /// The writer has stopped.
    Stopped,
}

impl From<FetchError> for Ended {
    fn from(error: FetchError) -> Self {
        Self::Failed(error)
    }
}

/// A running decoder.
#[derive(Debug)]
pub(super) struct Unpacker {
    chunks: mpsc::Sender<Bytes>,
    thread: JoinHandle<Result<Unpacked, Ended>>,
}

struct Work {
    decoder: Decoder,
    hasher: Hasher,
    feed: Feed,
    share: BufShare,
    runtime: tokio::runtime::Handle,
    buf: Option<Buf>,
    total: u64,
    url: String,
}

impl Unpacker {
    /// Starts to decode what [`Unpacker::push`] brings, and to hash it into `digests`. `url` is for
    /// messages. Called inside a tokio runtime.
    pub(super) fn start(
        codec: Codec,
        limits: Limits,
        digests: DigestSet,
        feed: Feed,
        share: BufShare,
        url: String,
    ) -> Result<Self, FetchError> {
        let decoder = Decoder::new(codec, limits)
            .map_err(|source| FetchError::Decode { url: url.clone(), source })?;
        let (chunks, queue) = mpsc::channel(CHUNKS);
        let work = Work {
            decoder,
            hasher: Hasher::new(digests),
            feed,
            share,
            runtime: tokio::runtime::Handle::current(),
            buf: None,
            total: 0,
            url,
        };
        let thread = std::thread::Builder::new()
            .name("unpack".into())
            .spawn(move || work.run(queue))
            .map_err(|e| DiskError::io("start a thread to decode", "a source".as_ref(), e))?;
        Ok(Self { chunks, thread })
    }

    /// Hands over the next bytes of the stream. False if the thread has ended: its
    /// [`Unpacker::end`] tells why.
    pub(super) async fn push(&self, chunk: Bytes) -> bool {
        self.chunks.send(chunk).await.is_ok()
    }

    /// The stream has ended, or (if it is not complete) has to. Blocks the thread.
    pub(super) fn end(self) -> Result<Unpacked, Ended> {
        drop(self.chunks);
        self.thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }
}

impl Work {
    fn run(mut self, mut chunks: mpsc::Receiver<Bytes>) -> Result<Unpacked, Ended> {
        while let Some(chunk) = chunks.blocking_recv() {
            self.hasher.update(&chunk);
            self.decode(&chunk)?;
        }
        self.decoder.finish().map_err(|source| self.refused(source))?;
        self.flush()?;
        Ok(Unpacked { total: self.total, source: self.hasher.finish() })
    }

    fn refused(&self, source: DecodeError) -> FetchError {
        FetchError::Decode { url: self.url.clone(), source }
    }

    fn decode(&mut self, mut input: &[u8]) -> Result<(), Ended> {
        loop {
            let mut buf = match self.buf.take() {
                Some(buf) => buf,
                None => {
                    let taken = self.runtime.block_on(self.share.take());
                    taken.map_err(|source| FetchError::Memory { source })?
                }
            };
            let filled = buf.len();
            let step = self.decoder.decode(input, buf.spare(BLOCK_BYTES));
            let step = step.map_err(|source| self.refused(source))?;
            buf.set_len(filled + step.written);
            input = &input[step.read..];
            self.buf = Some(buf);
            match step.state {
                State::OutputFull => self.flush()?,
                State::NeedsInput | State::MemberEnd if input.is_empty() => return Ok(()),
                State::NeedsInput | State::MemberEnd => {}
            }
        }
    }

    /// Hands on what was decoded. Buffers follow each other, so each begins at a MiB.
    fn flush(&mut self) -> Result<(), Ended> {
        let Some(buf) = self.buf.take().filter(|buf| !buf.is_empty()) else { return Ok(()) };
        let start = self.total;
        self.total += buf.len() as u64;
        self.feed.send(start, buf).map_err(|_stopped| Ended::Stopped)
    }
}
