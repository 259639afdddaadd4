//! The handler of one copy: makes it ready, whatever state its files are in.
//!
//! Why: a copy survives its worker; the next one goes on from what is durable.
//! How: a finished file with a valid record is adopted at once, one without is hashed, an
//! unfinished one is resumed, from a complete copy of the node (`siblings`) or from the source; then
//! it is inspected, and only then sealed.
//! Never: seals a file that was not inspected, or keeps bytes that failed their digest.
//! Start at [`run`].

use std::collections::VecDeque;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::backend::{
    Cancel, CopyInfo, CopyTask, FailureClass, Phase, Progress, Reporter, WorkerEvent,
};
use super::beside::OwnedTerms;
use super::helm::{Held, Helms};
use super::mend::Unrepaired;
use super::node::{OpenError, info_of, store_id};
use super::records::Expected;
use super::slots::Slot;
use super::turns::{Turn, Turns};
use super::uploads::Uploads;
use crate::disk::{self, CopyState, DigestKind, DiskError, Filling, SealRecord};
use crate::fetch::{
    self, Class, Engine, Expect, FetchError, Fetched, Hosts, Policy, RateLimit, SourceUrl, one_line,
};
use crate::image::{self, Format, ImageError};
use crate::import::{ImportError, Layout, import};
use crate::names::ImageName;
use crate::ring::BufPool;

/// How often a transfer's numbers are reported.
pub(super) const TICK: Duration = Duration::from_millis(200);
/// Ticks over which the rate is averaged: three seconds.
const RATE_TICKS: usize = 15;

/// What the workers of a node share.
pub(super) struct Shared {
    pub(super) pool: BufPool,
    pub(super) policy: Policy,
    pub(super) buffers: usize,
    pub(super) limit: Arc<RateLimit>,
    pub(super) hosts: Arc<Hosts>,
    pub(super) turns: Arc<Turns>,
    /// Of copies between disks.
    pub(super) copy_limit: Arc<RateLimit>,
    pub(super) copy_turns: Arc<Turns>,
    /// Of the scrub of each disk.
    pub(super) scrub_limit: Arc<RateLimit>,
    pub(super) helms: Arc<Helms>,
    pub(super) uploads: Arc<Uploads>,
}

/// Why a worker gave up.
#[derive(Debug, thiserror::Error)]
pub(super) enum WorkError {
    #[error(transparent)]
    Disk(#[from] DiskError),
    #[error(transparent)]
    Import(#[from] ImportError),
    #[error(transparent)]
    Image(#[from] ImageError),
    #[error(transparent)]
    Unrepaired(#[from] Unrepaired),
    #[error("no file here and no URL to fetch it from; delete the image, or create it with a URL")]
    NoSource,
    #[error("image {image}, of which this is a clone, has no complete copy that can be read")]
    NoOrigin { image: ImageName },
    #[error(
        "{field} is {found}, but the image's first copy has {expected}; the source has changed: create an image of another name"
    )]
    OtherImage { field: &'static str, expected: String, found: String },
}

impl From<OpenError> for WorkError {
    fn from(error: OpenError) -> Self {
        match error {
            OpenError::Disk(error) => Self::Disk(error),
            OpenError::Image(error) => Self::Image(error),
        }
    }
}

impl WorkError {
    /// True if the bytes that are here are worth nothing: wrong, or no usable image. An expired
    /// signature or a broken proxy says nothing about what has arrived before.
    fn condemns_bytes(&self) -> bool {
        match self {
            Self::Image(error) => error.class() == image::Class::Refuse,
            Self::OtherImage { .. } => true,
            Self::Import(error) => error.condemns_bytes(),
            Self::Disk(_) | Self::Unrepaired(_) | Self::NoOrigin { .. } | Self::NoSource => false,
        }
    }

    /// How the manager should take it; `None` if the worker was cancelled.
    pub(super) fn class(&self) -> Option<FailureClass> {
        let retry = match self {
            Self::Disk(error) => error.may_retry(),
            Self::Import(error) => match error.class() {
                Class::Cancelled => return None,
                Class::Retry => true,
                Class::Refuse => false,
            },
            Self::Image(error) => error.class() == image::Class::Retry,
            Self::Unrepaired(error) => error.may_retry,
            Self::NoOrigin { .. } => true,
            Self::NoSource | Self::OtherImage { .. } => false,
        };
        Some(if retry { FailureClass::Retry } else { FailureClass::Refuse })
    }
}

/// Does the work of one copy and reports how it went.
pub(super) async fn run(worker: Worker) {
    worker.events.send(WorkerEvent::Started);
    match worker.bring_in().await {
        Ok(info) => worker.events.send(WorkerEvent::Ready(info)),
        Err(error) => {
            let message = one_line(&error);
            let Some(class) = error.class() else { return };
            tracing::warn!(worker = %worker.task.worker, error = %message, "copy failed");
            let cleaned = worker.clean_up(error.condemns_bytes()).await;
            worker.events.send(WorkerEvent::Failed { class, message, cleaned });
        }
    }
}

/// The handler of one copy.
pub(super) struct Worker {
    pub(super) slot: Arc<Slot>,
    /// Disks with a complete copy.
    pub(super) others: Vec<Arc<Slot>>,
    /// Disks with a complete copy of the image that this one is a clone of.
    pub(super) origins: Vec<Arc<Slot>>,
    pub(super) shared: Shared,
    pub(super) task: CopyTask,
    pub(super) events: Reporter,
    pub(super) cancel: Cancel,
}

impl Worker {
    pub(super) fn id(&self) -> disk::CopyId {
        store_id(&self.task.id)
    }

    fn declared(&self) -> Option<Format> {
        match self.task.layout {
            Layout::AsIs => self.task.declared_format,
            // Whatever the bytes look like: they are the guest's.
            Layout::Raw => Some(Format::Raw),
        }
    }

    /// Runs `work` with the disk on a thread that may block.
    pub(super) async fn on_disk<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Slot, disk::CopyId) -> T + Send + 'static,
    ) -> T {
        let (slot, id) = (Arc::clone(&self.slot), self.id());
        match tokio::task::spawn_blocking(move || work(&slot, id)).await {
            Ok(value) => value,
            Err(error) => std::panic::resume_unwind(error.into_panic()),
        }
    }

    async fn bring_in(&self) -> Result<CopyInfo, WorkError> {
        let state = self.on_disk(|slot, id| slot.disk.copy_state(&id)).await?;
        match state {
            Some(CopyState::Ready(record)) => self.adopt(record).await,
            Some(CopyState::Unchecked) => match self.check().await {
                Err(error) if self.may_start_over(&error) => {
                    tracing::warn!(worker = %self.task.worker, "stored bytes are damaged: starting over");
                    self.on_disk(|slot, id| slot.disk.remove(&id)).await?;
                    self.fetch().await
                }
                other => other,
            },
            Some(CopyState::Filling { .. }) | None => self.fetch().await,
        }
    }

    /// True if only bytes that come anew can help, and some can.
    fn may_start_over(&self, error: &WorkError) -> bool {
        match error {
            WorkError::Disk(DiskError::DigestMismatch { .. } | DiskError::NoDigests { .. }) => {
                let may_clone = !self.origins.is_empty();
                self.has_origin() || may_clone || self.task.upload_bytes.is_some()
            }
            WorkError::Unrepaired(error) => error.start_over,
            WorkError::Disk(_)
            | WorkError::Import(_)
            | WorkError::Image(_)
            | WorkError::NoOrigin { .. }
            | WorkError::NoSource
            | WorkError::OtherImage { .. } => false,
        }
    }

    pub(super) fn is_cancelled(&self) -> bool {
        self.cancel.is_cancelled()
    }

    async fn adopt(&self, record: disk::CopyRecord) -> Result<CopyInfo, WorkError> {
        let snapshot = self.task.snapshot.clone();
        let open = move |slot: &Slot, id| info_of(&slot.disk, &id, &record, snapshot.as_deref());
        Ok(self.on_disk(open).await?)
    }

    /// What the image is given beside its file, to be taken to another thread.
    fn terms(&self) -> OwnedTerms {
        OwnedTerms { snapshot: self.task.snapshot.clone(), beside: self.task.beside }
    }

    /// A finished file of unknown history: inspected and hashed before it counts.
    pub(super) async fn verify(&self) -> Result<CopyInfo, WorkError> {
        let (events, cancel, declared, terms) =
            (self.events.clone(), self.cancel.clone(), self.declared(), self.terms());
        // What is expected is of the source's own bytes, and was proved when they came; the first
        // copy has told what the copies are.
        let is_source = self.task.layout == Layout::AsIs && self.task.facts.is_none();
        let expect = if is_source { self.settled_expect().await? } else { Expect::default() };
        let want = expect.wanted();
        let record = self
            .on_disk(move |slot, id| -> Result<_, WorkError> {
                let sealed = slot.disk.sealed(&id)?;
                let total = sealed.len_bytes();
                let info = image::inspect(sealed.file(), sealed.path(), declared, &terms.borrow())?;
                let report = &mut |done| {
                    events.send(WorkerEvent::Progress(Progress {
                        bytes_done: done,
                        bytes_total: Some(total),
                        phase: Phase::Verifying,
                        ..Progress::default()
                    }));
                    !cancel.is_cancelled()
                };
                let want = want.with(DigestKind::Sha256);
                Ok(slot.disk.verify(&id, info.virtual_size_bytes, want, report)?)
            })
            .await?;
        if let Some((field, expected, found)) = expect.mismatch(&record.digests) {
            return Err(WorkError::OtherImage { field, expected, found });
        }
        self.judge_facts(&record.digests)?;
        self.adopt(record).await
    }

    /// What the bytes must be, by a file of digests too, which is fetched for that.
    async fn settled_expect(&self) -> Result<Expect, WorkError> {
        let Some(source) = &self.task.source else {
            return Ok(self.task.expected.digests.clone().into());
        };
        let (from, engine, progress) = (self.from(source), self.engine(), Arc::default());
        let settling = fetch::settle(&engine, &from, &progress);
        let settled = self.watch(settling, &progress).await.map_err(ImportError::from)?;
        Ok(settled.into_owned().expect)
    }

    pub(super) fn engine(&self) -> Engine {
        Engine {
            pool: self.shared.pool.clone(),
            probe: self.slot.probe.clone(),
            policy: self.shared.policy.clone(),
            buffers: self.shared.buffers,
            limit: Arc::clone(&self.shared.limit),
            hosts: Arc::clone(&self.shared.hosts),
        }
    }

    /// The source with what is known of it.
    pub(super) fn from(&self, url: &SourceUrl) -> fetch::Source {
        let Expected { digests, checksum_url } = *self.task.expected.clone();
        let source = fetch::Source::new(url.clone()).expecting(digests.into());
        let source = source.listed_in(checksum_url);
        let mut source = source.reached_with((*self.task.access).clone());
        source.unpack = true;
        source.mirrors.clone_from(&self.task.mirrors);
        source
    }

    /// Holds digests against those of an earlier copy; the import has held the others.
    pub(super) fn judge_facts(&self, digests: &disk::Digests) -> Result<(), WorkError> {
        let Some(facts) = &self.task.facts else { return Ok(()) };
        match facts.digests.differs(&digests.whole) {
            None => Ok(()),
            Some((kind, expected, found)) => {
                let (expected, found) = (expected.to_owned(), found.to_owned());
                Err(WorkError::OtherImage { field: kind.name(), expected, found })
            }
        }
    }

    /// From a complete copy on another disk, else from the source.
    async fn fetch(&self) -> Result<CopyInfo, WorkError> {
        if let Some(info) = self.copy_from_others().await? {
            return Ok(info);
        }
        if let Some(total) = self.task.upload_bytes {
            return self.receive(total).await;
        }
        let source = self.task.source.as_ref().ok_or(WorkError::NoSource)?;
        let helm = self.shared.helms.take(&self.task.id, self.task.steering);
        let _turn = self.turn(&self.shared.turns, &helm).await.map_err(ImportError::from)?;
        let mut filling = self.on_disk(|slot, id| slot.disk.filling(&id)).await?;
        let engine = self.engine();
        let progress = Arc::clone(helm.progress());
        let from = self.from(source);
        let importing = import(&engine, &from, self.task.layout, &mut filling, &progress);
        let fetched = self.watch(importing, &progress).await?;
        self.judge_facts(&fetched.digests)?;
        // A refused copy is removed at once: its errors name what a person can look at.
        let name = source.file_path().unwrap_or_else(|| source.to_string().into());
        self.seal(filling, fetched, name).await
    }

    /// Waits for an upload. It takes no turn: one that idles must not hold up a transfer.
    async fn receive(&self, total: u64) -> Result<CopyInfo, WorkError> {
        let helm = self.shared.helms.take(&self.task.id, self.task.steering);
        let mut filling = self.on_disk(|slot, id| slot.disk.filling(&id)).await?;
        let engine = self.engine();
        let expect = self.task.expected.digests.clone().into();
        let progress = Arc::clone(helm.progress());
        let place = self.shared.uploads.place(&self.task.id);
        let register = |upload: &Arc<fetch::Upload>| place.register(upload);
        let receiving = fetch::receive(&engine, total, &expect, &mut filling, &progress, register);
        let fetched = self.watch(receiving, &progress).await.map_err(ImportError::from)?;
        self.judge_facts(&fetched.digests)?;
        self.seal(filling, fetched, format!("upload of {}", self.task.id.image).into()).await
    }

    /// Waits until it is this transfer's turn.
    pub(super) async fn turn(&self, turns: &Arc<Turns>, helm: &Held) -> Result<Turn, FetchError> {
        if let Some(turn) = turns.try_turn() {
            return Ok(turn);
        }
        let waiting = Progress { message: "waiting for its turn".into(), ..Progress::default() };
        self.events.send(WorkerEvent::Progress(waiting));
        let mut cancel = self.cancel.clone();
        tokio::select! {
            turn = turns.turn(helm.priority()) => Ok(turn),
            () = cancel.cancelled() => Err(FetchError::Cancelled),
        }
    }

    /// Drives the transfer, reporting its numbers, and stops it if the worker is cancelled.
    pub(super) async fn watch<T>(
        &self,
        transfer: impl Future<Output = T>,
        progress: &fetch::Progress,
    ) -> T {
        let mut rates = Rates::default();
        let mut cancel = self.cancel.clone();
        let mut tick = tokio::time::interval(TICK);
        tokio::pin!(transfer);
        loop {
            tokio::select! {
                result = &mut transfer => return result,
                _ = tick.tick() => self.report(progress, &mut rates),
                () = cancel.cancelled(), if !progress.is_stopped() => progress.stop(),
            }
        }
    }

    fn report(&self, progress: &fetch::Progress, rates: &mut Rates) {
        let now = progress.snapshot();
        let left_s = rates.left_s(&now);
        self.events.send(WorkerEvent::Progress(Progress {
            bytes_done: now.bytes_done,
            bytes_total: now.bytes_total,
            rate_bytes_per_s: rates.received.add(now.bytes_received),
            left_s,
            connections: now.connections,
            phase: match now.phase {
                fetch::Phase::Connecting => Phase::Connecting,
                fetch::Phase::Fetching => Phase::Fetching,
                fetch::Phase::Verifying => Phase::Verifying,
                fetch::Phase::Retrying => Phase::Retrying,
            },
            retries: now.retries,
            overtaken: now.overtaken,
            message: now.message,
        }));
    }

    pub(super) async fn seal(
        &self,
        filling: Filling,
        fetched: Fetched,
        name: PathBuf,
    ) -> Result<CopyInfo, WorkError> {
        let total = filling.total_bytes();
        self.events.send(WorkerEvent::Progress(Progress {
            bytes_done: total.unwrap_or(0),
            bytes_total: total,
            phase: Phase::Sealing,
            ..Progress::default()
        }));
        let (uuid, declared, terms) =
            (self.task.id.uuid.to_string(), self.declared(), self.terms());
        // Longhorn's record holds the file against it; one of another form of it would not match.
        let [own, given] = [&fetched.digests.whole, &self.task.expected.digests]
            .map(|digests| digests.get(DigestKind::Sha512));
        let expected_sha512 = given.filter(|_| own == given).map(str::to_owned);
        self.on_disk(move |slot, id| -> Result<CopyInfo, WorkError> {
            // The last block may be padded: the file must have its length to be judged by it.
            filling.trim()?;
            let (file, path) = (filling.file(), filling.path());
            let inspected = image::inspect(&**file, &path, declared, &terms.borrow());
            let info = inspected.map_err(|error| error.said_of(&name))?;
            let record = SealRecord {
                uuid,
                virtual_size_bytes: info.virtual_size_bytes,
                digests: fetched.digests,
                expected_sha512,
                declared: declared.map(|format| format.to_string()),
            };
            let sealed = filling.seal(&record).map_err(|refused| refused.error)?;
            drop(sealed);
            let Some(CopyState::Ready(record)) = slot.disk.copy_state(&id)? else {
                let path = slot.disk.data_path(&id);
                let why = "it was changed right after it was sealed".to_owned();
                return Err(DiskError::Damaged { path, field: "sealed copy", why }.into());
            };
            let mut info = info_of(&slot.disk, &id, &record, terms.snapshot.as_deref())?;
            info.etag = fetched.etag;
            Ok(info)
        })
        .await
    }

    /// Removes what a failed copy left, if its bytes are condemned or nothing of it is durable.
    /// A finished file that was there before stays.
    async fn clean_up(&self, condemned: bool) -> bool {
        let removed = self
            .on_disk(move |slot, id| match slot.disk.copy_state(&id)? {
                Some(CopyState::Ready(_) | CopyState::Unchecked) => Ok(false),
                Some(CopyState::Filling { present_bytes, .. })
                    if !condemned && present_bytes > 0 =>
                {
                    Ok(false)
                }
                Some(CopyState::Filling { .. }) | None => slot.disk.remove(&id).map(|()| true),
            })
            .await;
        removed.unwrap_or_else(|error: DiskError| {
            tracing::warn!(worker = %self.task.worker, error = %one_line(&error), "cannot clean up");
            false
        })
    }
}

/// What comes from the source, and what the file grows by: of an expanded or decoded image, holes
/// included, that is more.
#[derive(Debug, Default)]
struct Rates {
    received: Rate,
    done: Rate,
}

impl Rates {
    /// Seconds until the file is whole, at its own rate.
    fn left_s(&mut self, now: &fetch::Snapshot) -> Option<u64> {
        if now.phase != fetch::Phase::Fetching {
            // What is here from an earlier run has not come just now.
            self.done = Rate::default();
            return None;
        }
        let rate = self.done.add(now.bytes_done);
        now.bytes_total?.saturating_sub(now.bytes_done).checked_div(rate)
    }
}

/// Bytes per second over the last ticks.
#[derive(Debug, Default)]
struct Rate(VecDeque<(Instant, u64)>);

impl Rate {
    fn add(&mut self, bytes: u64) -> u64 {
        let now = Instant::now();
        self.0.push_back((now, bytes));
        if self.0.len() > RATE_TICKS {
            self.0.pop_front();
        }
        let Some((first, before)) = self.0.front() else { return 0 };
        let millis = u64::try_from(now.duration_since(*first).as_millis()).unwrap_or(u64::MAX);
        bytes.saturating_sub(*before).saturating_mul(1000).checked_div(millis).unwrap_or(0)
    }
}
