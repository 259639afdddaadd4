//! A run whose source is compressed.
//!
//! Why: such a stream can only be read from its beginning, in order, and its file has a length that
//! nobody knows before the end.
//! How: one connection feeds an [`Unpacker`]; when it breaks, the next asks for the rest of the same
//! version and the decoder goes on. A run that ends early leaves the source's bytes in a spool, if
//! it can be continued: the next one decodes these, and fetches what follows meanwhile.
//! Never: takes the digests of the source for those of the file.
//! Start at [`Run::unpack`].

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bytes::Bytes;

use super::crew;
use super::decode::{Codec, Limits};
use super::error::{Class, FetchError};
use super::expect::Expect;
use super::http::{Answer, Client};
use super::local::LocalFile;
use super::progress::Phase;
use super::spool::{Kept, Spooler};
use super::threads::{blocking, in_place};
use super::transfer::{Fetched, Run};
use super::unpack::{Ended, Unpacked, Unpacker};
use super::version::{Agreed, Resume};
use crate::disk::{DigestSet, Version};

/// Bytes of a file that are handed over at once.
const FILE_CHUNK_BYTES: usize = 256 * 1024;

/// A compressed source as it comes.
#[derive(Debug)]
pub(super) struct Stream<'a> {
    client: &'a Client,
    /// Length of the source, if told.
    packed: Option<u64>,
    /// Bytes of the source that have come.
    at: u64,
    agreed: Agreed,
    /// The body that is being read.
    answer: Option<Answer>,
    /// Where they are kept too, if they are.
    pub(super) spooler: Option<Spooler>,
    /// True once bytes were taken on the digest's word alone.
    unproven: bool,
}

impl Stream<'_> {
    /// The next byte is that at `at`.
    pub(super) fn goes_on_at(&mut self, at: u64) {
        if self.at != at {
            self.answer = None;
        }
        self.at = at;
    }

    /// True if nothing more is for the spool alone.
    fn is_enough(&self, to: To<'_>) -> bool {
        match to {
            To::Decoder(_) => false,
            To::Spool(enough) => enough.load(Ordering::SeqCst) || self.spooler.is_none(),
        }
    }
}

/// Where a stream goes, besides its spool.
#[derive(Clone, Copy, Debug)]
pub(super) enum To<'a> {
    Decoder(&'a Unpacker),
    /// Nowhere else, until this is true.
    Spool(&'a AtomicBool),
}

impl Run<'_> {
    /// Decodes the stream that `answer` begins.
    pub(super) async fn unpack(
        &mut self,
        client: &Client,
        answer: Answer,
        codec: Codec,
    ) -> Result<Fetched, FetchError> {
        let has_digest = self.expect.is_some();
        let remote = answer.remote.clone();
        let provable = remote.may_resume(&remote, has_digest) != Resume::No;
        let can_resume = answer.ranged && provable && answer.total.is_some();
        let (packed, agreed) = (answer.total, Agreed { remote, can_resume, has_digest });
        self.begin(&agreed.remote, None)?;
        let unpacker = self.start_unpacker(codec)?;
        let (spooler, answer) = (self.spool(&agreed, packed), Some(answer));
        let mut stream = Stream { client, packed, at: 0, agreed, answer, spooler, unproven: false };
        let streamed = self.stream(&mut stream, To::Decoder(&unpacker)).await;
        self.end_stream(stream, unpacker, streamed).await
    }

    /// Decodes what an earlier run has kept, and then the rest.
    pub(super) async fn unpack_kept(
        &mut self,
        client: &Client,
        kept: Kept,
        agreed: Agreed,
    ) -> Result<Fetched, FetchError> {
        let Kept { spool, codec, room } = kept;
        let version = Version { total_bytes: None, tag: agreed.remote.to_tag() };
        in_place(|| self.filling.begin_beside_spool(&version))?;
        let (packed, unpacker) = (Some(spool.total_bytes()), self.start_unpacker(codec)?);
        let spooler = self.spool_on(spool, room);
        let at = spooler.as_ref().map_or(0, Spooler::len_bytes);
        let (answer, unproven) = (None, false);
        let mut stream = Stream { client, packed, at, agreed, answer, spooler, unproven };
        let streamed = match self.catch_up(&mut stream, &unpacker).await {
            Ok(true) => self.stream(&mut stream, To::Decoder(&unpacker)).await,
            // Its own error is told at the end.
            Ok(false) => Ok(()),
            Err(error) => Err(error),
        };
        self.end_stream(stream, unpacker, streamed).await
    }

    /// Brings in the rest of a stream, over as many connections as it takes; for the spool alone, until
    /// that is enough, or there is none any more.
    pub(super) async fn stream(
        &self,
        stream: &mut Stream<'_>,
        to: To<'_>,
    ) -> Result<(), FetchError> {
        let (mut failures, mut good_at) = (0, stream.at);
        loop {
            if stream.is_enough(to) {
                return Ok(());
            }
            let went = match stream.answer.take() {
                Some(answer) => self.feed(stream, answer, to).await,
                None if stream.packed == Some(stream.at) => return Ok(()),
                None => self.ask_rest(stream).await.map(Some),
            };
            let error = match went {
                Ok(None) => return Ok(()),
                Ok(next) => {
                    stream.answer = next;
                    continue;
                }
                Err(error) => error,
            };
            failures = if stream.at > good_at { 1 } else { failures + 1 };
            good_at = stream.at;
            let can_resume = stream.agreed.can_resume;
            let error = self.may_go_on(error, can_resume, failures, stream.at)?;
            self.progress.failed_once(error.report());
            crew::rest(&error, failures, &self.engine.policy, self.progress).await?;
            self.progress.set_phase(Phase::Fetching);
        }
    }

    /// Asks for what the decoder does not have yet.
    async fn ask_rest(&self, stream: &mut Stream<'_>) -> Result<Answer, FetchError> {
        let Stream { client, agreed, packed, at, unproven, .. } = stream;
        let asked = client.get(*at..u64::MAX, Some(&agreed.remote), &self.engine.policy);
        let next = tokio::select! {
            next = asked => next?,
            () = self.progress.stopped() => return Err(FetchError::Cancelled),
        };
        match agreed.judge(&next.remote, next.ranged, next.total, *packed) {
            Ok(same) => {
                *unproven |= same == Resume::Unproven;
                Ok(next)
            }
            Err(what) => Err(FetchError::Changed { url: client.shown(), what }),
        }
    }

    /// The error if it may pass, else what ends the run.
    fn may_go_on(
        &self,
        error: FetchError,
        can_resume: bool,
        failures: u32,
        at: u64,
    ) -> Result<FetchError, FetchError> {
        if error.class() != Class::Retry || error.ends_run() {
            return Err(error);
        }
        let (url, source) = (self.url.to_string(), Box::new(error));
        if !can_resume {
            return Err(FetchError::CannotResume { url, at, source });
        }
        if failures >= self.engine.policy.max_attempts {
            return Err(FetchError::GaveUp { attempts: failures, source });
        }
        Ok(*source)
    }

    /// Hands the rest of a body over; what is left of it, if that is not for the spool alone.
    async fn feed(
        &self,
        stream: &mut Stream<'_>,
        mut answer: Answer,
        to: To<'_>,
    ) -> Result<Option<Answer>, FetchError> {
        let stall = self.engine.policy.stall_timeout;
        let (client, packed) = (stream.client, stream.packed);
        let limit = packed.unwrap_or(self.engine.policy.max_bytes);
        loop {
            let at = stream.at;
            if packed == Some(at) && answer.has_length() {
                return Ok(None);
            }
            if stream.is_enough(to) {
                return Ok(Some(answer));
            }
            let chunk = tokio::select! {
                chunk = answer.chunk(at, client, stall) => chunk?,
                () = self.progress.stopped() => return Err(FetchError::Cancelled),
            };
            match chunk {
                Some(bytes) if bytes.len() as u64 > limit - at => {
                    return Err(FetchError::TooMuch { url: client.shown(), total: limit });
                }
                Some(bytes) => {
                    let len = bytes.len();
                    self.progress.add_received(len as u64);
                    self.engine.limit.spend(len).await;
                    self.progress.limit().spend(len).await;
                    self.keep(stream, &bytes).await?;
                    let is_taken = match to {
                        To::Decoder(unpacker) => self.hand_over(unpacker, bytes).await?,
                        To::Spool(_) => stream.spooler.is_some(),
                    };
                    if !is_taken {
                        // The decoder's error is told at the end; without a spool these are lost.
                        return Ok(None);
                    }
                    stream.at += len as u64;
                }
                None => match packed.filter(|total| *total != at) {
                    Some(total) => {
                        return Err(FetchError::Short { url: client.shown(), at, total });
                    }
                    None => return Ok(None),
                },
            }
        }
    }

    /// Hands the next bytes to the spool, if there is one. If it fails, there is none any more.
    async fn keep(&self, stream: &mut Stream<'_>, bytes: &Bytes) -> Result<(), FetchError> {
        let Some(spooler) = &stream.spooler else { return Ok(()) };
        let kept = tokio::select! {
            kept = spooler.push(bytes.clone()) => kept,
            () = self.progress.stopped() => return Err(FetchError::Cancelled),
        };
        if !kept
            && let Some(spooler) = stream.spooler.take()
            && let Err(error) = blocking(move || spooler.end(false)).await
        {
            return self.spool_failed(&error);
        }
        Ok(())
    }

    pub(super) async fn hand_over(
        &self,
        unpacker: &Unpacker,
        bytes: Bytes,
    ) -> Result<bool, FetchError> {
        tokio::select! {
            taken = unpacker.push(bytes) => Ok(taken),
            () = self.progress.stopped() => Err(FetchError::Cancelled),
        }
    }

    /// Decodes a file of the node.
    pub(super) async fn unpack_file(
        &mut self,
        source: LocalFile,
        codec: Codec,
    ) -> Result<Fetched, FetchError> {
        let remote = source.remote.clone();
        self.begin(&remote, None)?;
        let unpacker = self.start_unpacker(codec)?;
        let source = Arc::new(source);
        let mut at = 0;
        let streamed = loop {
            let left = source.len_bytes - at;
            let len = usize::try_from(left).unwrap_or(usize::MAX).min(FILE_CHUNK_BYTES);
            if len == 0 {
                break source.unchanged();
            }
            let file = Arc::clone(&source);
            let read = blocking(move || {
                let mut bytes = vec![0; len];
                file.read_into(&mut bytes, at).map(|()| bytes)
            });
            let bytes = match read.await {
                Ok(bytes) => bytes,
                Err(error) => break Err(error),
            };
            self.progress.add_received(len as u64);
            match self.hand_over(&unpacker, bytes.into()).await {
                Ok(true) => at += len as u64,
                Ok(false) => break Ok(()),
                Err(error) => break Err(error),
            }
        };
        self.end_unpacker(unpacker, streamed, remote.etag).await
    }

    fn start_unpacker(&mut self, codec: Codec) -> Result<Unpacker, FetchError> {
        self.progress.set_total(None);
        self.progress.set_phase(Phase::Fetching);
        // The file's own; those that are expected are the source's.
        let own = match self.source.digest {
            true => Expect::default().wanted(),
            false => DigestSet::default(),
        };
        let feed = self.start_pipeline(std::slice::from_ref(&(0..u64::MAX)), own)?;
        let limits = Limits { max_output_bytes: self.engine.policy.max_bytes };
        let proved = match self.expect.is_some() {
            true => self.expect.wanted(),
            false => DigestSet::default(),
        };
        let (share, url) = (self.share.clone(), self.url.to_string());
        Unpacker::start(codec, limits, proved, feed, share, url)
    }

    async fn end_stream(
        &mut self,
        stream: Stream<'_>,
        unpacker: Unpacker,
        streamed: Result<(), FetchError>,
    ) -> Result<Fetched, FetchError> {
        let Stream { agreed, spooler, unproven, .. } = stream;
        self.unproven |= unproven;
        // Meanwhile the spool makes durable what it has, as ever.
        let ended = self.end_unpacker(unpacker, streamed, agreed.remote.etag).await;
        let complete = ended.is_ok();
        if let Some(spooler) = spooler
            && let Err(error) = blocking(move || spooler.end(complete)).await
        {
            tracing::warn!(error = %super::one_line(&error), "not all of the compressed source was kept");
        }
        ended
    }

    async fn end_unpacker(
        &mut self,
        unpacker: Unpacker,
        streamed: Result<(), FetchError>,
        etag: Option<String>,
    ) -> Result<Fetched, FetchError> {
        let ended = blocking(move || unpacker.end()).await;
        let Unpacked { total, source } = match (streamed, ended) {
            (_, Err(Ended::Stopped)) => return Err(self.writer_error().await),
            // A stream that was cut ends early for the decoder too: the cut is the reason.
            (Err(error), _) | (Ok(()), Err(Ended::Failed(error))) => {
                return self.abandon(error).await;
            }
            (Ok(()), Ok(unpacked)) => unpacked,
        };
        if let Some((kind, expected, found)) = self.expect.mismatch(&source) {
            let url = self.url.to_string();
            return self.abandon(FetchError::Digest { url, kind, expected, found }).await;
        }
        let digests = self.finish(total).await?;
        Ok(Fetched { digests, etag })
    }
}
