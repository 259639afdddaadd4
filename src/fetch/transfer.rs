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

use super::access::Access;
use super::book::Book;
use super::error::{Class, FetchError};
use super::expect::Expect;
use super::fleet::{self, First, Fleet, Outcome};
use super::http::{Answer, Client};
use super::limit::RateLimit;
use super::local::LocalFile;
use super::pipeline::{Feed, Pipeline};
use super::policy::Policy;
use super::progress::{Phase, Progress};
use super::source::SourceUrl;
use super::spec::Source;
use super::version::{Agreed, Remote, Resume};
use crate::disk::{Digests, Filling, Version};
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
}

impl Engine {
    /// An engine for one transfer at a time, with `buffers` buffers of 1 MiB and no limit.
    #[must_use]
    pub fn alone(probe: Probe, policy: Policy, buffers: usize) -> Self {
        let pool = BufPool::new(buffers);
        Self { pool, probe, policy, buffers, limit: Arc::default() }
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
    let Source { url, expect, access, .. } = source;
    let mut restarts = 0;
    let mut fresh = false;
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
        };
        let result = match url.file_path() {
            Some(path) => run.local(&path).await,
            None => run.http(fresh).await,
        };
        let unproven = run.unproven;
        let again = match &result {
            Err(FetchError::Changed { .. } | FetchError::ReadBack { .. }) => true,
            Err(FetchError::Digest { .. }) => unproven,
            Ok(_) | Err(_) => false,
        };
        restarts += 1;
        if !again || restarts > MAX_RESTARTS {
            return result;
        }
        if let Err(error) = &result {
            tracing::warn!(error = %error.report(), "starting over");
            progress.failed_once(error.report());
        }
        fresh = true;
    }
}

/// One run on one version of the source.
struct Run<'a> {
    engine: &'a Engine,
    source: &'a Source,
    url: &'a SourceUrl,
    access: &'a Access,
    expect: &'a Expect,
    filling: &'a mut Filling,
    progress: &'a Arc<Progress>,
    share: BufShare,
    pipeline: Option<Pipeline>,
    /// True once bytes of an earlier run were kept on the digest's word alone.
    unproven: bool,
}

impl Run<'_> {
    async fn local(&mut self, path: &std::path::Path) -> Result<Fetched, FetchError> {
        let source = LocalFile::open(path)?;
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
        let feed = self.start_pipeline(&missing)?;
        let (pool, progress) = (self.share.clone(), Arc::clone(self.progress));
        let runtime = tokio::runtime::Handle::current();
        let copied = blocking(move || {
            for range in missing {
                let copied = source.copy(range, &feed, &pool, &runtime, &progress);
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

    fn known_version(&self) -> Option<Remote> {
        self.filling.version().map(|version| Remote::from_tag(&version.tag))
    }

    fn begin(&mut self, remote: &Remote, total: Option<u64>) -> Result<(), FetchError> {
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
    fn start_pipeline(&mut self, missing: &[Range<u64>]) -> Result<Feed, FetchError> {
        let (engine, wanted) = (self.engine, self.source.wanted());
        let pipeline = Pipeline::start(
            self.filling,
            missing,
            usize::MAX,
            &engine.probe,
            wanted,
            self.progress,
        )?;
        let feed = pipeline.feed();
        self.pipeline = Some(pipeline);
        self.progress.set_done(self.filling.present_bytes());
        Ok(feed)
    }

    async fn http(&mut self, fresh: bool) -> Result<Fetched, FetchError> {
        let client = Client::new(self.url, self.access, &self.engine.policy)?;
        // A version of which nothing is here binds nothing.
        let useless = fresh || self.filling.present_bytes() == 0;
        let known = if useless { None } else { self.known_version() };
        let (first, agreed) = self.open(&client, known.as_ref()).await?;
        let (total, etag) = (self.filling.total_bytes(), agreed.remote.etag.clone());
        let Some(first) = first else { return self.complete(etag, total.unwrap_or(0)).await };
        let missing = match total {
            Some(_) => self.filling.missing(),
            None => std::iter::once(0..u64::MAX).collect(),
        };
        let fleet = Arc::new(Fleet {
            client: Arc::new(client),
            policy: self.engine.policy.clone(),
            agreed,
            total,
            feed: self.start_pipeline(&missing)?,
            share: self.share.clone(),
            progress: Arc::clone(self.progress),
            limit: Arc::clone(&self.engine.limit),
            book: Mutex::new(Book::new(missing)),
            state: fleet::State::default(),
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

    /// Gets the first answer and settles the version. `None` instead of an answer: all is here.
    async fn open(
        &mut self,
        client: &Client,
        known: Option<&Remote>,
    ) -> Result<(Option<First>, Agreed), FetchError> {
        let mut failures = 0;
        loop {
            self.progress.set_phase(Phase::Connecting);
            let error = match self.ask_first(client, known).await {
                Ok(opened) => return Ok(opened),
                Err(error) => error,
            };
            failures += 1;
            match error.class() {
                Class::Refuse | Class::Cancelled => return Err(error),
                Class::Retry if error.ends_run() => return Err(error),
                Class::Retry if failures >= self.engine.policy.max_attempts => {
                    let source = Box::new(error);
                    return Err(FetchError::GaveUp { attempts: failures, source });
                }
                Class::Retry => {}
            }
            self.progress.failed_once(error.report());
            fleet::rest(&error, failures, &self.engine.policy, self.progress).await?;
        }
    }

    async fn ask_first(
        &mut self,
        client: &Client,
        known: Option<&Remote>,
    ) -> Result<(Option<First>, Agreed), FetchError> {
        let missing = self.filling.missing().into_iter().next();
        let range = match (known, &missing) {
            (None, _) => 0..u64::MAX,
            (Some(_), Some(range)) if Some(range.end) == self.filling.total_bytes() => {
                range.start..u64::MAX
            }
            (Some(_), Some(range)) => range.clone(),
            // Everything is here; one byte is asked for to learn the version it belongs to.
            (Some(_), None) => 0..1,
        };
        let asked = client.get(range.clone(), known, &self.engine.policy);
        let answer = tokio::select! {
            answer = asked => answer?,
            () = self.progress.stopped() => return Err(FetchError::Cancelled),
        };
        let (resumed, agreed) = self.agree(client, &answer, known)?;
        if resumed && missing.is_none() {
            return Ok((None, agreed));
        }
        // A server that ignored the range sends everything.
        let asked_end = if answer.ranged { range.end } else { u64::MAX };
        Ok((Some(First { answer, asked_end }), agreed))
    }

    /// Begins with the first answer, or goes on with what is here if it is of the same version.
    /// True if what is here stays.
    fn agree(
        &mut self,
        client: &Client,
        answer: &Answer,
        known: Option<&Remote>,
    ) -> Result<(bool, Agreed), FetchError> {
        let has_digest = self.expect.is_some();
        let resume = known.map_or(Resume::No, |known| {
            let same = known.may_resume(&answer.remote, has_digest);
            let same_total = answer.total.is_some() && answer.total == self.filling.total_bytes();
            if same_total && answer.ranged { same } else { Resume::No }
        });
        match resume {
            Resume::Same | Resume::Unproven => {
                self.unproven = resume == Resume::Unproven;
                in_place(|| self.filling.resume())?;
            }
            // What is here is of another version: ask again, from the beginning.
            Resume::No if answer.start > 0 || known.is_some() && answer.ranged => {
                let what = "it is not the version of which a part is here".to_owned();
                return Err(FetchError::Changed { url: client.shown(), what });
            }
            Resume::No => self.begin(&answer.remote, answer.total)?,
        }
        self.progress.set_total(self.filling.total_bytes());
        let provable = answer.remote.may_resume(&answer.remote, has_digest) != Resume::No;
        // A source that has not told its length cannot be continued: its end would not be known.
        let can_resume = answer.ranged && provable && answer.total.is_some();
        let agreed = Agreed { remote: answer.remote.clone(), can_resume, has_digest };
        Ok((resume != Resume::No, agreed))
    }

    /// The error that made the writer stop.
    async fn writer_error(&mut self) -> FetchError {
        let Some(pipeline) = self.pipeline.take() else { return FetchError::Cancelled };
        match blocking(move || pipeline.abandon()).await {
            Ok(()) => FetchError::Cancelled,
            Err(error) => error,
        }
    }

    /// Everything up to `total` is here: waits for disk and digests, and judges.
    async fn complete(&mut self, etag: Option<String>, total: u64) -> Result<Fetched, FetchError> {
        self.progress.set_phase(Phase::Verifying);
        self.progress.set_total(Some(total));
        if self.pipeline.is_none() {
            drop(self.start_pipeline(&[])?);
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
        if let Some((kind, expected, found)) = self.expect.mismatch(&digests) {
            return Err(FetchError::Digest { url: self.url.to_string(), kind, expected, found });
        }
        Ok(Fetched { digests, etag })
    }

    /// Ends with `error`, but first makes durable what has arrived.
    async fn abandon(&mut self, error: FetchError) -> Result<Fetched, FetchError> {
        if let Some(pipeline) = self.pipeline.take() {
            // A disk that fails now is worth less than the reason why it all ended.
            if let Err(second) = blocking(move || pipeline.abandon()).await {
                tracing::warn!(error = %second.report(), "not everything could be made durable");
            }
        }
        Err(error)
    }
}

pub(super) async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    match tokio::task::spawn_blocking(work).await {
        Ok(value) => value,
        Err(error) => std::panic::resume_unwind(error.into_panic()),
    }
}

/// Runs work that waits for the disk without holding up the other tasks of this thread.
pub(super) fn in_place<T>(work: impl FnOnce() -> T) -> T {
    use tokio::runtime::{Handle, RuntimeFlavor};
    if Handle::current().runtime_flavor() == RuntimeFlavor::MultiThread {
        tokio::task::block_in_place(work)
    } else {
        // Such a runtime has no other thread to hand its tasks to.
        work()
    }
}
