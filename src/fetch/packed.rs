//! A run whose source is compressed.
//!
//! Why: such a stream can only be read from its beginning, in order, and its file has a length that
//! nobody knows before the end.
//! How: one connection feeds an [`Unpacker`]; when it breaks, the next asks for the rest of the same
//! version and the decoder goes on. A run that ends early starts over the next time.
//! Never: takes the digests of the source for those of the file.
//! Start at [`Run::unpack`].

use std::sync::Arc;

use bytes::Bytes;

use super::crew;
use super::decode::{Codec, Limits};
use super::error::{Class, FetchError};
use super::expect::Expect;
use super::http::{Answer, Client};
use super::local::LocalFile;
use super::progress::Phase;
use super::threads::blocking;
use super::transfer::{Fetched, Run};
use super::unpack::{Ended, Unpacked, Unpacker};
use super::version::Agreed;
use super::version::{Remote, Resume};
use crate::disk::DigestSet;

/// Bytes of a file that are handed over at once.
const FILE_CHUNK_BYTES: usize = 256 * 1024;

impl Run<'_> {
    /// Decodes the stream that `answer` begins.
    pub(super) async fn unpack(
        &mut self,
        client: &Client,
        mut answer: Answer,
        codec: Codec,
    ) -> Result<Fetched, FetchError> {
        let has_digest = self.expect.is_some();
        let remote = answer.remote.clone();
        let provable = remote.may_resume(&remote, has_digest) != Resume::No;
        let can_resume = answer.ranged && provable && answer.total.is_some();
        let (packed, agreed) = (answer.total, Agreed { remote, can_resume, has_digest });
        let unpacker = self.start_unpacker(codec, &agreed.remote)?;
        let (mut at, mut failures, mut good_at) = (0, 0, 0);
        let streamed = loop {
            let Err(error) = self.feed(client, &mut answer, packed, &mut at, &unpacker).await
            else {
                break Ok(());
            };
            failures = if at > good_at { 1 } else { failures + 1 };
            good_at = at;
            let error = match self.may_go_on(error, can_resume, failures, at) {
                Ok(error) => error,
                Err(last) => break Err(last),
            };
            self.progress.failed_once(error.report());
            let policy = &self.engine.policy;
            if let Err(stopped) = crew::rest(&error, failures, policy, self.progress).await {
                break Err(stopped);
            }
            self.progress.set_phase(Phase::Fetching);
            let asked = client.get(at..u64::MAX, Some(&agreed.remote), policy).await;
            match asked {
                Ok(next) => match agreed.judge(&next.remote, next.ranged, next.total, packed) {
                    Ok(same) => {
                        self.unproven |= same == Resume::Unproven;
                        answer = next;
                    }
                    Err(what) => break Err(FetchError::Changed { url: client.shown(), what }),
                },
                // It counts as another failure at the same place.
                Err(error) => match self.may_go_on(error, can_resume, failures + 1, at) {
                    Ok(error) => self.progress.failed_once(error.report()),
                    Err(last) => break Err(last),
                },
            }
        };
        self.end_unpacker(unpacker, streamed, agreed.remote.etag).await
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

    /// Hands the rest of a body over. `at` counts the bytes of the source.
    async fn feed(
        &self,
        client: &Client,
        answer: &mut Answer,
        packed: Option<u64>,
        at: &mut u64,
        unpacker: &Unpacker,
    ) -> Result<(), FetchError> {
        let stall = self.engine.policy.stall_timeout;
        let limit = packed.unwrap_or(self.engine.policy.max_bytes);
        loop {
            if packed == Some(*at) && answer.has_length() {
                return Ok(());
            }
            let chunk = tokio::select! {
                chunk = answer.chunk(*at, client, stall) => chunk?,
                () = self.progress.stopped() => return Err(FetchError::Cancelled),
            };
            match chunk {
                Some(bytes) if bytes.len() as u64 > limit - *at => {
                    return Err(FetchError::TooMuch { url: client.shown(), total: limit });
                }
                Some(bytes) => {
                    let len = bytes.len();
                    self.progress.add_received(len as u64);
                    self.engine.limit.spend(len).await;
                    self.progress.limit().spend(len).await;
                    if !self.hand_over(unpacker, bytes).await? {
                        // Its own error is told at the end.
                        return Ok(());
                    }
                    *at += len as u64;
                }
                None => match packed.filter(|total| total != at) {
                    Some(total) => {
                        return Err(FetchError::Short { url: client.shown(), at: *at, total });
                    }
                    None => return Ok(()),
                },
            }
        }
    }

    async fn hand_over(&self, unpacker: &Unpacker, bytes: Bytes) -> Result<bool, FetchError> {
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
        let unpacker = self.start_unpacker(codec, &remote)?;
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

    fn start_unpacker(&mut self, codec: Codec, remote: &Remote) -> Result<Unpacker, FetchError> {
        self.begin(remote, None)?;
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
