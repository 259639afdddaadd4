//! A source that is read here and there: a part of its bytes, for somebody who knows which.
//!
//! Why: of an image whose tables say what is in use, only the tables and that have to be fetched.
//! How: every answer belongs to the version of the first; small parts are read whole, many ranges
//! go through the connections of a [`Fleet`] to a [`Taker`].
//! Never: reads from a source whose versions cannot be told apart, unless a digest of the whole
//! will prove it.
//! Start at [`SourceFile::open`].

use std::ops::Range;
use std::sync::{Arc, Mutex};

use super::book::Book;
use super::crew;
use super::digest::{DigestThread, Stored};
use super::error::{Class, FetchError};
use super::fleet::{self, Fleet, Outcome};
use super::hosts::Visit;
use super::http::Client;
use super::local::LocalFile;
use super::pace::{Best, Level};
use super::parts::Parts;
use super::pipeline::{Feed, Taker};
use super::policy::Policy;
use super::progress::{Phase, Progress};
use super::spec::Source;
use super::threads::blocking;
use super::traffic::{OnItsWay, Traffic};
use super::transfer::Engine;
use super::version::Agreed;
use super::ways::Ways;
use crate::disk::{DigestSet, Digests, Filling};
use crate::ring::{BLOCK_BYTES, BufShare};

/// Bytes that are asked for to learn what a source is.
const HEAD_BYTES: u64 = 64 * 1024;
/// Largest part that is read at once.
pub const MAX_PART_BYTES: u64 = 32 << 20;

/// A source of known version and length.
#[derive(Debug)]
pub struct SourceFile<'a> {
    engine: &'a Engine,
    source: &'a Source,
    progress: &'a Arc<Progress>,
    total: u64,
    kind: Kind,
    /// What is read before its turn.
    urgent: Arc<Traffic>,
    /// How long that may take.
    level: Level,
    /// What the fastest connections get.
    best: Arc<Best>,
    /// Who else asks the same server.
    visit: Arc<Visit>,
}

#[derive(Debug)]
enum Kind {
    Http { client: Arc<Client>, agreed: Agreed },
    Local(LocalFile),
}

impl<'a> SourceFile<'a> {
    /// Learns the source's version and length, and reads its first bytes (up to 64 KiB).
    ///
    /// # Errors
    /// [`FetchError`]; [`FetchError::NoParts`] if parts of it cannot be asked for, or not safely.
    pub async fn open(
        engine: &'a Engine,
        source: &'a Source,
        progress: &'a Arc<Progress>,
    ) -> Result<(Self, Vec<u8>), FetchError> {
        progress.set_phase(Phase::Connecting);
        if source.url.nbd().is_some() {
            let url = source.url.to_string();
            return Err(FetchError::NoParts { url, why: "an export is read as a whole" });
        }
        if source.url.backup().is_some() {
            let url = source.url.to_string();
            return Err(FetchError::NoParts { url, why: "a backup is read as a whole" });
        }
        let (best, level) = (Arc::new(Best::default()), Level::default());
        let (kind, total, head) = match source.url.file_path() {
            Some(path) => {
                let file = LocalFile::open(&path, &engine.policy.places)?;
                let (total, kind) = (file.len_bytes, Kind::Local(file));
                (kind, total, None)
            }
            None => {
                let client = Client::new(&source.url, &source.access, &engine.policy)?;
                let attempt = || first_part(engine, source, &client, progress, (&best, &level));
                let opened = retried(&engine.policy, progress, attempt);
                let (agreed, total, head) = opened.await?;
                (Kind::Http { client: Arc::new(client), agreed }, total, Some(head))
            }
        };
        let limit = engine.policy.max_bytes;
        if total > limit {
            return Err(FetchError::TooLarge { url: source.url.to_string(), total, limit });
        }
        let urgent = Arc::default();
        let visit = Arc::new(engine.hosts.visit(&source.url));
        let file = Self { engine, source, progress, total, kind, urgent, level, best, visit };
        let head = match head {
            Some(head) => head,
            None => file.read(0..HEAD_BYTES.min(total)).await?,
        };
        Ok((file, head))
    }

    /// Length of the source in bytes.
    #[must_use]
    pub fn len_bytes(&self) -> u64 {
        self.total
    }

    /// What identifies this version of the source, for [`crate::disk::Version`].
    #[must_use]
    pub fn tag(&self) -> String {
        match &self.kind {
            Kind::Http { agreed, .. } => agreed.remote.to_tag(),
            Kind::Local(file) => file.remote.to_tag(),
        }
    }

    /// The source's strong ETag, if it has one.
    #[must_use]
    pub fn etag(&self) -> Option<String> {
        match &self.kind {
            Kind::Http { agreed, .. } => agreed.remote.etag.clone(),
            Kind::Local(file) => file.remote.etag.clone(),
        }
    }

    /// Reads `range`, at most [`MAX_PART_BYTES`] and inside the source.
    ///
    /// # Errors
    /// [`FetchError`], after as many attempts as the policy allows.
    pub async fn read(&self, range: Range<u64>) -> Result<Vec<u8>, FetchError> {
        let fits = range.end <= self.total && range.end - range.start <= MAX_PART_BYTES;
        debug_assert!(fits, "the caller has checked the range");
        match &self.kind {
            Kind::Local(file) => in_blocks(file, range),
            Kind::Http { client, agreed } => {
                let left = || self.progress.add_overtaken();
                let attempt = || self.read_on(client, agreed, &range, &left);
                retried(&self.engine.policy, self.progress, attempt).await
            }
        }
    }

    /// Reads `range` for somebody who waits: what is fetched in its turn lets it pass, and when nothing
    /// comes, or far less than others get, the rest of it is asked for again, each time with twice the
    /// patience; `left` is told. Tried once, but for that.
    ///
    /// # Errors
    /// [`FetchError`].
    pub async fn read_first(
        &self,
        range: Range<u64>,
        left: &(dyn Fn() + Sync),
    ) -> Result<Vec<u8>, FetchError> {
        let (client, agreed) = match &self.kind {
            Kind::Local(file) => return in_blocks(file, range),
            Kind::Http { client, agreed } => (client, agreed),
        };
        let _on_its_way = OnItsWay::new(&self.urgent);
        let bytes = self.read_on(client, agreed, &range, left).await?;
        self.engine.limit.spend(bytes.len()).await;
        self.progress.limit().spend(bytes.len()).await;
        Ok(bytes)
    }

    /// Reads `range`, on another connection whenever one is too slow; `left` is told.
    async fn read_on(
        &self,
        client: &Client,
        agreed: &Agreed,
        range: &Range<u64>,
        left: &(dyn Fn() + Sync),
    ) -> Result<Vec<u8>, FetchError> {
        let Self { total, best, level, .. } = self;
        let (policy, total) = (&self.engine.policy, *total);
        let came = &|bytes| self.progress.add_received(bytes);
        let parts = Parts { client, agreed, total, policy, best, level, came, left };
        parts.read(range, None).await
    }

    /// Brings `ranges` (ascending) to `taker`, and with `digests` hashes the whole source on the
    /// way: then `ranges` are all of it. `filling` is what the taker makes.
    ///
    /// # Errors
    /// [`FetchError`]; `None` if the taker has stopped.
    pub async fn fetch(
        &self,
        ranges: Vec<Range<u64>>,
        taker: Arc<dyn Taker>,
        digests: Option<DigestSet>,
        share: &BufShare,
        filling: &Filling,
    ) -> Result<Option<Digests>, FetchError> {
        self.progress.set_phase(Phase::Fetching);
        let hashing = match digests {
            Some(set) => {
                let stored = Stored { file: Arc::clone(filling.file()), path: filling.path() };
                let watched = Arc::clone(self.progress);
                Some(DigestThread::start(stored, &ranges, usize::MAX, set, watched)?)
            }
            None => None,
        };
        let feed = Feed::to_taker(taker, hashing.as_ref().map(DigestThread::feed), self.progress);
        let outcome = match &self.kind {
            Kind::Http { client, agreed } => {
                self.fetch_http(client, agreed, ranges, feed, share).await
            }
            Kind::Local(file) => self.fetch_local(file, ranges, feed, share).await,
        };
        let failed = |hashing: Option<DigestThread>| async {
            match hashing {
                Some(thread) => blocking(move || thread.abandon()).await,
                None => Ok(()),
            }
        };
        match outcome {
            Outcome::Complete(_) => match hashing {
                Some(thread) => {
                    let total = self.total;
                    Ok(Some(blocking(move || thread.finish(total)).await?))
                }
                None => Ok(Some(Digests::default())),
            },
            Outcome::Stopped => failed(hashing).await.map(|()| None).map_err(Into::into),
            Outcome::Failed(error) => {
                failed(hashing).await?;
                Err(error)
            }
        }
    }

    async fn fetch_http(
        &self,
        client: &Arc<Client>,
        agreed: &Agreed,
        ranges: Vec<Range<u64>>,
        feed: Feed,
        share: &BufShare,
    ) -> Outcome {
        let fleet = Arc::new(Fleet {
            ways: Ways::new(Arc::clone(client), agreed.remote.clone(), None),
            policy: self.engine.policy.clone(),
            agreed: agreed.clone(),
            total: Some(self.total),
            feed,
            share: share.clone(),
            progress: Arc::clone(self.progress),
            limit: Arc::clone(&self.engine.limit),
            book: Mutex::new(Book::new(ranges)),
            state: fleet::State::new(Arc::clone(&self.best)),
            visit: Arc::clone(&self.visit),
            demand: None,
            urgent: Some(Arc::clone(&self.urgent)),
        });
        fleet.run(None).await
    }

    async fn fetch_local(
        &self,
        file: &LocalFile,
        ranges: Vec<Range<u64>>,
        feed: Feed,
        share: &BufShare,
    ) -> Outcome {
        for range in ranges {
            let mut at = range.start;
            while at < range.end {
                let room = BLOCK_BYTES as u64 - at % BLOCK_BYTES as u64;
                let len = usize::try_from(room.min(range.end - at)).unwrap_or(BLOCK_BYTES);
                let taken = tokio::select! {
                    taken = share.take() => taken.map_err(|source| FetchError::Memory { source }),
                    () = self.progress.stopped() => Err(FetchError::Cancelled),
                };
                let read = taken.and_then(|mut buf| file.read(&mut buf, at, len).map(|()| buf));
                let sent = match read {
                    Ok(buf) => feed.send(at, buf),
                    Err(error) => return Outcome::Failed(error),
                };
                if sent.is_err() {
                    return Outcome::Stopped;
                }
                self.progress.add_received(len as u64);
                at += len as u64;
            }
        }
        match file.unchanged() {
            Ok(()) => Outcome::Complete(self.total),
            Err(error) => Outcome::Failed(error),
        }
    }

    /// The source for messages, and for the digests that it must have.
    #[must_use]
    pub fn source(&self) -> &Source {
        self.source
    }
}

fn in_blocks(file: &LocalFile, range: Range<u64>) -> Result<Vec<u8>, FetchError> {
    let len = usize::try_from(range.end - range.start).unwrap_or(usize::MAX);
    let mut bytes = vec![0; len];
    file.read_into(&mut bytes, range.start)?;
    Ok(bytes)
}

async fn first_part(
    engine: &Engine,
    source: &Source,
    client: &Client,
    progress: &Progress,
    (best, level): (&Best, &Level),
) -> Result<(Agreed, u64, Vec<u8>), FetchError> {
    let policy = &engine.policy;
    let answer = client.get(0..HEAD_BYTES, None, policy).await?;
    let no_parts = |why| FetchError::NoParts { url: client.shown(), why };
    let (true, Some(total)) = (answer.ranged, answer.total) else {
        return Err(no_parts("the server serves no byte ranges"));
    };
    let has_digest = source.expect.is_some();
    if answer.remote.etag.is_none() && !has_digest {
        return Err(no_parts("the server gives no strong ETag, and no digest was given"));
    }
    let agreed = Agreed { remote: answer.remote.clone(), can_resume: true, has_digest };
    let (came, left) = (&|_| {}, &|| progress.add_overtaken());
    let parts = Parts { client, agreed: &agreed, total, policy, best, level, came, left };
    let head = parts.read(&(0..HEAD_BYTES.min(total)), Some(answer)).await?;
    Ok((agreed, total, head))
}

/// Tries until it works, as often and with such pauses as the policy says.
pub(super) async fn retried<T, F>(
    policy: &Policy,
    progress: &Progress,
    attempt: impl Fn() -> F,
) -> Result<T, FetchError>
where
    F: Future<Output = Result<T, FetchError>>,
{
    let mut failures = 0;
    loop {
        let done = tokio::select! {
            done = attempt() => done,
            () = progress.stopped() => Err(FetchError::Cancelled),
        };
        let error = match done {
            Ok(value) => return Ok(value),
            Err(error) => error,
        };
        failures += 1;
        if error.class() != Class::Retry || error.ends_run() {
            return Err(error);
        }
        if failures >= policy.max_attempts {
            let source = Box::new(error);
            return Err(FetchError::GaveUp { attempts: failures, source });
        }
        progress.failed_once(error.report());
        crew::rest(&error, failures, policy, progress).await?;
    }
}
