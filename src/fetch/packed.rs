//! A run whose source is compressed.
//!
//! Why: such a stream can only be read from its beginning, in order, and its file has a length that
//! nobody knows before the end.
//! How: a [`Stream`] feeds an [`Unpacker`], over as many connections as it takes. A run that ends early leaves the source's bytes in a spool, if
//! it can be continued: the next one decodes these, and fetches what follows meanwhile.
//! Never: takes the digests of the source for those of the file.
//! Start at [`Run::unpack`].

use std::sync::Arc;

use super::decode::{Codec, Limits};
use super::error::FetchError;
use super::expect::Expect;
use super::http::{Answer, Client};
use super::local::LocalFile;
use super::progress::Phase;
use super::spool::Kept;
use super::stream::{Stream, To};
use super::threads::{blocking, in_place};
use super::transfer::{Fetched, Run};
use super::unpack::{Ended, Unpacked, Unpacker};
use super::version::{Agreed, Resume};
use crate::disk::{DigestSet, Version};

/// Bytes of a file that are handed over at once.
const FILE_CHUNK_BYTES: usize = 256 * 1024;

impl Run<'_> {
    /// Decodes the stream that `answer` begins.
    pub(super) async fn unpack(
        &mut self,
        clients: Vec<Arc<Client>>,
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
        let spooler = self.spool(&agreed, packed);
        let mut stream = Stream::new(clients, agreed, packed, Some(answer), spooler);
        let streamed = self.stream(&mut stream, To::Decoder(&unpacker)).await;
        self.end_stream(stream, unpacker, streamed).await
    }

    /// Decodes what an earlier run has kept, and then the rest.
    pub(super) async fn unpack_kept(
        &mut self,
        clients: Vec<Arc<Client>>,
        kept: Kept,
        agreed: Agreed,
    ) -> Result<Fetched, FetchError> {
        let Kept { spool, codec, room } = kept;
        let version = Version { total_bytes: None, tag: agreed.remote.to_tag() };
        in_place(|| self.filling.begin_beside_spool(&version))?;
        let (packed, unpacker) = (Some(spool.total_bytes()), self.start_unpacker(codec)?);
        let spooler = self.spool_on(spool, room);
        let mut stream = Stream::new(clients, agreed, packed, None, spooler);
        let streamed = match self.catch_up(&mut stream, &unpacker).await {
            Ok(true) => self.stream(&mut stream, To::Decoder(&unpacker)).await,
            // Its own error is told at the end.
            Ok(false) => Ok(()),
            Err(error) => Err(error),
        };
        self.end_stream(stream, unpacker, streamed).await
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
        stream: Stream,
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
