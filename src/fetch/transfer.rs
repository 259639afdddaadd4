//! The transfer itself: attempts, resumes, versions, and the verdict on the digests.
//!
//! Why: no fault may cost more than the bytes in flight, and none may yield a wrong byte.
//! How: a run works on one version of the source, settled by its first answer; the connections of
//! a [`Fleet`] bring in what is missing. Another version, or bytes that fail the digest after an
//! unproven resume, start a new run from nothing.
//! Never: continues a file with bytes that may be of another version.
//! Start at [`transfer`].

use std::ops::Range;
use std::sync::{Arc, Mutex};

use super::book::Book;
use super::demand::Demand;
use super::error::FetchError;
use super::expect::Expect;
use super::fleet::{self, Fleet, Outcome};
use super::hosts::Hosts;
use super::http::Access;
use super::limit::RateLimit;
use super::local::LocalFile;
use super::opening::Opened;
use super::pipeline::{Feed, Pipeline};
use super::policy::Policy;
use super::progress::{Phase, Progress};
use super::source::SourceUrl;
use super::spec::Source;
use super::sums::settle;
use super::threads::{blocking, in_place};
use super::version::{Remote, Resume};
use super::ways::Ways;
use crate::disk::{DigestSet, Digests, DiskError, Filling, Version};
use crate::ring::{BufPool, BufShare, Probe};

/// How often a source may turn out to be another version before that is the error.
const MAX_RESTARTS: u32 = 3;
/// Buffers of a transfer while one connection is enough: they stay in the processor's cache.
pub(super) const FEW_BUFFERS: usize = 12;

/// What transfers of a process share.
#[derive(Clone, Debug)]
pub struct Engine {
    /// The buffers; their number bounds memory.
    pub pool: BufPool,
    /// The sink for the disk at hand.
    pub probe: Probe,
    /// Bounds.
    pub policy: Policy,
    /// Buffers of the pool that one transfer may hold.
    pub buffers: usize,
    /// The limit on the bytes per second of all transfers together.
    pub limit: Arc<RateLimit>,
    /// The servers that they ask.
    pub hosts: Arc<Hosts>,
}

impl Engine {
    /// An engine for one transfer at a time, with `buffers` buffers of 1 MiB, as many again for a long
    /// way, and no limit.
    #[must_use]
    pub fn alone(probe: Probe, policy: Policy, buffers: usize) -> Self {
        let pool = BufPool::with_unshared(buffers, buffers);
        Self { pool, probe, policy, buffers, limit: Arc::default(), hosts: Arc::default() }
    }
}

/// A transfer that is complete and checked, not yet sealed.
#[derive(Clone, Debug)]
pub struct Fetched {
    /// Digests of the file.
    pub digests: Digests,
    /// The source's strong ETag, if it has one.
    pub etag: Option<String>,
}

/// Brings what `source` names into `filling` and checks it against its digests.
///
/// What is durable of the same version is not fetched again. On success every byte is durable and
/// hashed; the caller inspects and seals. On an error what has arrived stays, but for bytes with a
/// wrong digest: those the caller discards.
///
/// # Errors
/// [`FetchError`]; its class tells whether trying again can help.
pub async fn transfer(
    engine: &Engine,
    source: &Source,
    filling: &mut Filling,
    progress: &Arc<Progress>,
) -> Result<Fetched, FetchError> {
    let settled = settle(engine, source, progress).await?;
    let source = settled.as_ref();
    let Source { url, expect, access, .. } = source;
    let mut restarts = 0;
    let (mut fresh, mut mirrors, mut spools) = (false, true, true);
    loop {
        let share = engine.pool.share(FEW_BUFFERS, engine.buffers);
        let (pipeline, unproven) = (None, false);
        let mut run = Run {
            engine,
            source,
            url,
            access,
            expect,
            filling,
            progress,
            share,
            pipeline,
            unproven,
            mirrors: mirrors && !source.mirrors.is_empty(),
            spools,
        };
        let result = match (url.file_path(), url.nbd(), url.backup()) {
            (Some(path), ..) => run.local(&path).await,
            (None, Some(place), _) => run.nbd(&place, fresh).await,
            (None, None, Some(place)) => run.backup(&place).await,
            (None, None, None) => run.http(fresh).await,
        };
        let unproven = run.unproven;
        let again = match &result {
            Err(FetchError::Changed { .. } | FetchError::ReadBack { .. }) => true,
            Err(FetchError::Disk(DiskError::Full { .. })) => run.makes_room(),
            Err(FetchError::Digest { .. } | FetchError::Decode { .. }) => unproven,
            Ok(_) | Err(_) => false,
        };
        spools = run.spools;
        restarts += 1;
        if !again || restarts > MAX_RESTARTS {
            return result;
        }
        if let Err(error) = &result {
            tracing::warn!(error = %error.report(), "starting over");
            progress.failed_once(error.report());
        }
        fresh = true;
        // One of them may have other bytes; which one, nobody can say.
        mirrors &= !matches!(result, Err(FetchError::Digest { .. } | FetchError::Decode { .. }));
    }
}

/// One run on one version of the source.
pub(super) struct Run<'a> {
    pub(super) engine: &'a Engine,
    pub(super) source: &'a Source,
    pub(super) url: &'a SourceUrl,
    pub(super) access: &'a Access,
    pub(super) expect: &'a Expect,
    pub(super) filling: &'a mut Filling,
    pub(super) progress: &'a Arc<Progress>,
    pub(super) share: BufShare,
    pub(super) pipeline: Option<Pipeline>,
    /// True once bytes of an earlier run were kept on the digest's word alone.
    pub(super) unproven: bool,
    /// Whether the source's mirrors may be used, if it has any.
    pub(super) mirrors: bool,
    /// Whether a compressed source is kept as it comes.
    pub(super) spools: bool,
}

impl Run<'_> {
    async fn local(&mut self, path: &std::path::Path) -> Result<Fetched, FetchError> {
        let source = LocalFile::open(path, &self.engine.policy.places)?;
        if self.source.unpack
            && let Some(codec) = source.codec()?
        {
            return self.unpack_file(source, codec).await;
        }
        self.local_file(source).await
    }

    /// From a file that is open, as it is.
    pub(super) async fn local_file(&mut self, source: LocalFile) -> Result<Fetched, FetchError> {
        let (total, remote) = (Some(source.len_bytes), source.remote.clone());
        let known = self.known_version();
        if known.is_some_and(|known| known.may_resume(&remote, false) == Resume::Same)
            && self.filling.total_bytes() == total
        {
            in_place(|| self.filling.resume())?;
        } else {
            self.begin(&remote, total)?;
        }
        self.progress.set_total(total);
        self.progress.set_done(self.filling.present_bytes());
        self.progress.set_phase(Phase::Fetching);
        let missing = self.filling.missing();
        let feed = self.start_pipeline(&missing, self.source.wanted())?;
        if let Some(total) = total.filter(|_| self.filling.present_bytes() == 0)
            && in_place(|| source.share_blocks(self.filling.file()))
        {
            // The file's blocks are the source's now; they become durable with the next sync.
            let sent = feed.send_written(0, total);
            drop(feed);
            return match sent.map(|()| source.unchanged()) {
                Ok(Ok(())) => self.complete(remote.etag, total).await,
                Ok(Err(error)) => self.abandon(error).await,
                Err(_stopped) => Err(self.writer_error().await),
            };
        }
        let (pool, progress) = (self.share.clone(), Arc::clone(self.progress));
        let limit = Arc::clone(&self.engine.limit);
        let runtime = tokio::runtime::Handle::current();
        let copied = blocking(move || {
            for range in missing {
                let copied = source.copy(range, &feed, &pool, &runtime, &progress, &limit);
                if !matches!(copied, Ok(Ok(()))) {
                    return copied;
                }
            }
            Ok(Ok(()))
        })
        .await;
        match copied {
            Ok(_) => self.complete(remote.etag, total.unwrap_or(0)).await,
            Err(error) => self.abandon(error).await,
        }
    }

    pub(super) fn known_version(&self) -> Option<Remote> {
        self.filling.version().map(|version| Remote::from_tag(&version.tag))
    }

    pub(super) fn begin(&mut self, remote: &Remote, total: Option<u64>) -> Result<(), FetchError> {
        let limit = self.engine.policy.max_bytes;
        if total == Some(0) {
            return Err(FetchError::Empty { url: self.url.to_string() });
        }
        if let Some(total) = total.filter(|total| *total > limit) {
            return Err(FetchError::TooLarge { url: self.url.to_string(), total, limit });
        }
        let version = Version { total_bytes: total, tag: remote.to_tag() };
        Ok(in_place(|| self.filling.begin(&version))?)
    }

    /// Starts what takes the bytes of `missing`; all else is here.
    pub(super) fn start_pipeline(
        &mut self,
        missing: &[Range<u64>],
        wanted: DigestSet,
    ) -> Result<Feed, FetchError> {
        // Hashing and decrypting both leave the processor no time for uncached writes.
        let probe = self.engine.probe.when(!wanted.is_empty() || self.url.is_encrypted());
        let (filling, progress) = (&*self.filling, self.progress);
        let pipeline = Pipeline::start(filling, missing, usize::MAX, &probe, wanted, progress)?;
        let feed = pipeline.feed();
        self.pipeline = Some(pipeline);
        self.progress.set_done(self.filling.present_bytes());
        Ok(feed)
    }

    async fn http(&mut self, fresh: bool) -> Result<Fetched, FetchError> {
        let mut clients = self.clients()?;
        let kept = if fresh { None } else { self.kept()? };
        // A version of which nothing is here binds nothing.
        let useless = fresh || self.filling.present_bytes() == 0;
        let known = if useless { None } else { self.known_version() };
        let (first, agreed) = match self.open(&mut clients, known.as_ref(), kept.as_ref()).await? {
            Opened::Stream(first, agreed) => (first, agreed),
            Opened::Here(etag) => {
                let total = self.filling.total_bytes().unwrap_or(0);
                return self.complete(etag, total).await;
            }
            Opened::Packed(answer, codec) => {
                return self.unpack(clients, answer, codec).await;
            }
            Opened::Kept(agreed) => {
                let kept = kept.expect("the source was asked about it");
                return self.unpack_kept(clients, kept, agreed).await;
            }
        };
        let (total, etag) = (self.filling.total_bytes(), agreed.remote.etag.clone());
        let missing = match total {
            Some(_) => self.filling.missing(),
            None => std::iter::once(0..u64::MAX).collect(),
        };
        let remote = agreed.remote.clone();
        let arriving = self.filling.arriving().filter(|_| agreed.proves_parts() && total.is_some());
        let demand = arriving.map(|file| Demand::new(Arc::clone(file), &self.engine.pool));
        let fleet = Arc::new(Fleet {
            ways: Ways::of(clients, remote),
            policy: self.engine.policy.clone(),
            agreed,
            total,
            feed: self.start_pipeline(&missing, self.source.wanted())?,
            share: self.share.clone(),
            progress: Arc::clone(self.progress),
            limit: Arc::clone(&self.engine.limit),
            book: Mutex::new(Book::new(missing)),
            state: fleet::State::new(Arc::default()),
            visit: Arc::new(self.engine.hosts.visit(self.url)),
            demand,
            urgent: None,
        });
        let outcome = fleet.run(Some(first)).await;
        self.unproven |= fleet.is_unproven();
        // The stages end when nobody can feed them any more.
        drop(fleet);
        match outcome {
            Outcome::Complete(end) => self.complete(etag, total.unwrap_or(end)).await,
            Outcome::Stopped => Err(self.writer_error().await),
            Outcome::Failed(error) => self.abandon(error).await,
        }
    }

    /// The error that made the writer stop.
    pub(super) async fn writer_error(&mut self) -> FetchError {
        let Some(pipeline) = self.pipeline.take() else { return FetchError::Cancelled };
        match blocking(move || pipeline.abandon()).await {
            Ok(()) => FetchError::Cancelled,
            Err(error) => error,
        }
    }

    /// Everything up to `total` is here: waits for disk and digests, and judges.
    pub(super) async fn complete(
        &mut self,
        etag: Option<String>,
        total: u64,
    ) -> Result<Fetched, FetchError> {
        let digests = self.finish(total).await?;
        if let Some((kind, expected, found)) = self.expect.mismatch(&digests) {
            return Err(FetchError::Digest { url: self.url.to_string(), kind, expected, found });
        }
        Ok(Fetched { digests, etag })
    }

    /// Waits until everything up to `total` is durable and hashed.
    pub(super) async fn finish(&mut self, total: u64) -> Result<Digests, FetchError> {
        self.progress.set_phase(Phase::Verifying);
        self.progress.set_total(Some(total));
        if self.pipeline.is_none() {
            let wanted = self.source.wanted();
            drop(self.start_pipeline(&[], wanted)?);
        }
        let Some(pipeline) = self.pipeline.take() else { return Err(FetchError::Cancelled) };
        let finished = blocking(move || pipeline.finish(total)).await;
        let digests = match finished {
            Err(_) if self.progress.is_stopped() => return Err(FetchError::Cancelled),
            other => other?,
        };
        if total == 0 {
            return Err(FetchError::Empty { url: self.url.to_string() });
        }
        if self.filling.total_bytes().is_none() {
            in_place(|| self.filling.end_at(total))?;
        }
        Ok(digests)
    }

    /// Ends with `error`, but first makes durable what has arrived.
    pub(super) async fn abandon(&mut self, error: FetchError) -> Result<Fetched, FetchError> {
        if let Some(pipeline) = self.pipeline.take() {
            // A disk that fails now is worth less than the reason why it all ended.
            if let Err(second) = blocking(move || pipeline.abandon()).await {
                tracing::warn!(error = %second.report(), "not everything could be made durable");
            }
        }
        Err(error)
    }
}
