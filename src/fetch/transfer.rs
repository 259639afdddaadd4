//! The transfer itself: attempts, resumes, versions, and the verdict on the digests.
//!
//! Why: no fault may cost more than the bytes in flight, and none may yield a wrong byte.
//! How: a run works on one version of the source. An attempt streams from the first byte that is
//! not here; when it breaks, what has arrived in whole units stays and the next attempt goes on
//! behind it. Another version, or bytes that fail the digest after an unproven resume, start a new
//! run from nothing.
//! Never: continues a file with bytes that may be of another version, or retries without a bound.
//! Start at [`transfer`].

use std::sync::Arc;
use std::time::Duration;

use super::access::Access;
use super::error::{Class, FetchError};
use super::expect::Expect;
use super::http::{Answer, Client};
use super::local::LocalFile;
use super::pipeline::Pipeline;
use super::policy::Policy;
use super::progress::{Phase, Progress};
use super::source::SourceUrl;
use super::spec::Source;
use super::version::{Remote, Resume};
use crate::disk::{Digests, Filling, Version};
use crate::ring::{BufPool, BufShare, Probe};

/// How often a source may turn out to be another version before that is the error.
const MAX_RESTARTS: u32 = 3;
/// Longest pause that a server's `Retry-After` can ask for.
const MAX_RETRY_AFTER: Duration = Duration::from_secs(60);

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
    let Source { url, expect, access } = source;
    let mut restarts = 0;
    let mut fresh = false;
    loop {
        let share = engine.pool.share(engine.buffers);
        let (pipeline, unproven) = (None, false);
        let mut run =
            Run { engine, url, access, expect, filling, progress, share, pipeline, unproven };
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
        let mut pipeline = self.start_pipeline()?;
        let (pool, progress) = (self.share.clone(), Arc::clone(self.progress));
        let runtime = tokio::runtime::Handle::current();
        let (pipeline, copied) = blocking(move || {
            let mut copied = Ok(Ok(()));
            for range in missing {
                pipeline.seek(range.start);
                copied = source.copy(range, &mut pipeline, &pool, &runtime, &progress);
                if !matches!(copied, Ok(Ok(()))) {
                    break;
                }
            }
            (pipeline, copied)
        })
        .await;
        self.pipeline = Some(pipeline);
        match copied {
            Ok(_) => self.complete(remote.etag).await,
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

    fn start_pipeline(&self) -> Result<Pipeline, FetchError> {
        let (engine, wanted) = (self.engine, self.expect.wanted());
        Pipeline::start(self.filling, &engine.probe, &self.share, wanted, self.progress)
    }

    async fn http(&mut self, fresh: bool) -> Result<Fetched, FetchError> {
        let client = Client::new(self.url, self.access, &self.engine.policy)?;
        // A version of which nothing is here binds nothing.
        let useless = fresh || self.filling.present_bytes() == 0;
        let known = if useless { None } else { self.known_version() };
        let mut version = None;
        let mut failures = 0;
        loop {
            let before = self.position();
            let error = match self.attempt(&client, &mut version, known.as_ref()).await {
                Ok(etag) => return self.complete(etag).await,
                Err(error) => error,
            };
            // Whole units count: a server that breaks after a few bytes each time is no progress.
            if self.position() > before {
                failures = 0;
            }
            failures += 1;
            let can_resume = version.as_ref().is_none_or(|state| state.ranged);
            let error = match error.class() {
                Class::Refuse | Class::Cancelled => return self.abandon(error).await,
                Class::Retry if ends_run(&error) => return self.abandon(error).await,
                Class::Retry if !can_resume => {
                    let (url, at) = (client.shown(), self.position());
                    let source = Box::new(error);
                    return self.abandon(FetchError::CannotResume { url, at, source }).await;
                }
                Class::Retry if failures >= self.engine.policy.max_attempts => {
                    let source = Box::new(error);
                    return self.abandon(FetchError::GaveUp { attempts: failures, source }).await;
                }
                Class::Retry => error,
            };
            self.progress.failed_once(error.report());
            self.progress.set_phase(Phase::Retrying);
            tokio::select! {
                () = tokio::time::sleep(pause(&error, failures, &self.engine.policy)) => {}
                () = self.progress.stopped() => return self.abandon(FetchError::Cancelled).await,
            }
        }
    }

    fn position(&self) -> u64 {
        self.pipeline.as_ref().map_or(0, Pipeline::at)
    }

    /// The next range to ask for: what is missing behind the current position.
    fn next_missing(&self) -> Option<std::ops::Range<u64>> {
        let at = self.position();
        let mut missing = self.filling.missing().into_iter();
        // Bytes before the position are with the writer, though perhaps not durable yet.
        missing.find(|range| range.end > at).map(|range| range.start.max(at)..range.end)
    }

    /// Asks once and streams until the end of the object, or an error.
    async fn attempt(
        &mut self,
        client: &Client,
        version: &mut Option<Agreed>,
        known: Option<&Remote>,
    ) -> Result<Option<String>, FetchError> {
        loop {
            let resuming = version.as_ref().map(|state| &state.remote).or(known);
            let range = match (resuming, self.next_missing()) {
                (None, _) => 0..u64::MAX,
                (Some(_), Some(range)) if Some(range.end) == self.filling.total_bytes() => {
                    range.start..u64::MAX
                }
                (Some(_), Some(range)) => range,
                // Everything is here; one byte is asked for to learn the version it belongs to.
                (Some(_), None) if version.is_none() => 0..1,
                (Some(remote), None) => return Ok(remote.etag.clone()),
            };
            let nothing_missing = self.next_missing().is_none();
            if version.is_none() {
                self.progress.set_phase(Phase::Connecting);
            }
            let asked = client.get(range.clone(), resuming, &self.engine.policy);
            let answer = tokio::select! {
                answer = asked => answer?,
                () = self.progress.stopped() => return Err(FetchError::Cancelled),
            };
            let resumed = self.agree(client, &answer, version, known)?;
            if self.pipeline.is_none() {
                let pipeline = self.start_pipeline()?;
                self.pipeline = Some(pipeline);
                self.progress.set_done(self.filling.present_bytes());
            }
            if resumed && nothing_missing {
                continue;
            }
            self.progress.set_phase(Phase::Fetching);
            // A server that ignored the range sends everything.
            let asked_end = if answer.ranged { range.end } else { u64::MAX };
            self.stream(client, answer, asked_end).await?;
            if self.filling.total_bytes().is_none() {
                return self.end_of_unknown().await;
            }
        }
    }

    /// Holds an answer against what was agreed before, or begins with it. True if what is here
    /// stays, false if it was thrown away for this answer.
    fn agree(
        &mut self,
        client: &Client,
        answer: &Answer,
        version: &mut Option<Agreed>,
        known: Option<&Remote>,
    ) -> Result<bool, FetchError> {
        let changed =
            |what: &str| FetchError::Changed { url: client.shown(), what: what.to_owned() };
        if let Some(state) = version {
            let same = state.remote.may_resume(&answer.remote, self.expect.is_some());
            self.unproven |= same == Resume::Unproven;
            let same_total = answer.total.is_none() || answer.total == self.filling.total_bytes();
            return match same {
                Resume::No => Err(changed("another ETag or time")),
                Resume::Same | Resume::Unproven if !same_total => Err(changed("another length")),
                Resume::Same | Resume::Unproven if !answer.ranged => Err(changed("no ranges now")),
                Resume::Same | Resume::Unproven => Ok(true),
            };
        }
        let resume = known.map_or(Resume::No, |known| {
            let same = known.may_resume(&answer.remote, self.expect.is_some());
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
                return Err(changed("it is not the version of which a part is here"));
            }
            Resume::No => self.begin(&answer.remote, answer.total)?,
        }
        self.progress.set_total(self.filling.total_bytes());
        let ranged = answer.ranged
            && answer.remote.may_resume(&answer.remote, self.expect.is_some()) != Resume::No;
        // A source that has not told its length cannot be continued: its end would not be known.
        let ranged = ranged && answer.total.is_some();
        *version = Some(Agreed { remote: answer.remote.clone(), ranged });
        Ok(resume != Resume::No)
    }

    async fn stream(
        &mut self,
        client: &Client,
        mut answer: Answer,
        asked_end: u64,
    ) -> Result<(), FetchError> {
        let end = match self.filling.total_bytes() {
            Some(total) => asked_end.min(total),
            None => self.engine.policy.max_bytes,
        };
        let Some(pipeline) = &mut self.pipeline else { return Ok(()) };
        pipeline.seek(answer.start);
        let stall = self.engine.policy.stall_timeout;
        let streamed = loop {
            let at = pipeline.at();
            let chunk = tokio::select! {
                chunk = answer.chunk(at, client, stall) => chunk,
                () = self.progress.stopped() => Err(FetchError::Cancelled),
            };
            match chunk {
                Ok(Some(bytes)) if bytes.len() as u64 > end - at => {
                    break Err(FetchError::TooMuch { url: client.shown(), total: end });
                }
                Ok(Some(bytes)) => {
                    self.progress.add_received(bytes.len() as u64);
                    let pushed = tokio::select! {
                        pushed = pipeline.push(&bytes) => pushed,
                        () = self.progress.stopped() => Err(FetchError::Cancelled),
                    };
                    match pushed {
                        Ok(Ok(())) => {}
                        Ok(Err(_stopped)) => break Err(self.writer_error().await),
                        Err(error) => break Err(error),
                    }
                    // A body without a length of its own may go on: that is a lie to be found.
                    if pipeline.at() == end && answer.has_length() {
                        break Ok(());
                    }
                }
                Ok(None) if at == end || self.filling.total_bytes().is_none() => break Ok(()),
                Ok(None) => {
                    break Err(FetchError::Short { url: client.shown(), at, total: end });
                }
                // All is here; how the connection ends makes no difference.
                Err(error) if at == end && error.class() != Class::Cancelled => break Ok(()),
                Err(error) => break Err(error),
            }
        };
        let Some(pipeline) = &mut self.pipeline else { return streamed };
        if pipeline.flush(streamed.is_ok()).is_err() && streamed.is_ok() {
            return Err(self.writer_error().await);
        }
        streamed
    }

    /// The error that made the writer stop.
    async fn writer_error(&mut self) -> FetchError {
        let Some(pipeline) = self.pipeline.take() else { return FetchError::Cancelled };
        match blocking(move || pipeline.abandon()).await {
            Ok(()) => FetchError::Cancelled,
            Err(error) => error,
        }
    }

    /// A source that never said its length has ended.
    async fn end_of_unknown(&mut self) -> Result<Option<String>, FetchError> {
        let total = self.position();
        if total == 0 {
            return Err(FetchError::Empty { url: self.url.to_string() });
        }
        self.progress.set_total(Some(total));
        Ok(None)
    }

    /// Everything has arrived: waits for disk and digests, and judges.
    async fn complete(&mut self, etag: Option<String>) -> Result<Fetched, FetchError> {
        self.progress.set_phase(Phase::Verifying);
        let total = self.filling.total_bytes().unwrap_or_else(|| self.position());
        let pipeline = match self.pipeline.take() {
            Some(pipeline) => pipeline,
            None => self.start_pipeline()?,
        };
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

/// What the first answer of a run has settled.
struct Agreed {
    remote: Remote,
    /// True if the run can go on after a break.
    ranged: bool,
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    match tokio::task::spawn_blocking(work).await {
        Ok(value) => value,
        Err(error) => std::panic::resume_unwind(error.into_panic()),
    }
}

/// True for an error after which this run cannot go on, though another may.
fn ends_run(error: &FetchError) -> bool {
    matches!(error, FetchError::Changed { .. } | FetchError::Disk(_) | FetchError::ReadBack { .. })
}

/// Runs work that waits for the disk without holding up the other tasks of this thread.
fn in_place<T>(work: impl FnOnce() -> T) -> T {
    use tokio::runtime::{Handle, RuntimeFlavor};
    if Handle::current().runtime_flavor() == RuntimeFlavor::MultiThread {
        tokio::task::block_in_place(work)
    } else {
        // Such a runtime has no other thread to hand its tasks to.
        work()
    }
}

fn pause(error: &FetchError, failures: u32, policy: &Policy) -> Duration {
    if let FetchError::Status { retry_after_s: Some(seconds), .. } = error {
        return Duration::from_secs(*seconds).min(MAX_RETRY_AFTER);
    }
    policy.backoff * 2u32.pow(failures.saturating_sub(1).min(6))
}
