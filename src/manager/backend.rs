//! The seam between the manager and the bytes: what it asks of the store and the transfer.
//!
//! Why: the manager decides and never touches a byte (invariant 10); a test puts a fake here.
//! How: one trait, [`Backend`], with quick calls, and workers that report through a [`Reporter`].
//! A worker handles one copy; it decides itself, from the files that are there, whether to fetch,
//! to resume, or only to check.
//! Never: lets a worker's late report reach a newer worker of the same copy (each has its number).
//! Start at [`Backend`].

use std::collections::BTreeSet;
use std::future::Future;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;

use super::beside::Beside;
use super::records::{Expected, Facts, Steering};
use crate::fetch::{Access, DigestMap, SourceUrl, Upload};
use crate::image::{Format, Inspection, View};
use crate::import::Layout;
use crate::names::{DiskUuid, ImageName, ImageUuid, Tag};

/// Which copy: one image on one disk.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct CopyId {
    /// The image's name.
    pub image: ImageName,
    /// The image's uuid: a deleted and re-created image of the same name is another one.
    pub uuid: ImageUuid,
    /// The disk.
    pub disk: DiskUuid,
}

/// A copy in a chain of images that stand on each other.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Link {
    /// Which.
    pub copy: CopyId,
    /// The internal snapshot of it that is read, by ID or name; `None`: the disk as it is.
    pub snapshot: Option<String>,
    /// The copy whose file is its external data file.
    pub data_file: Option<CopyId>,
}

/// One disk as it is now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskStatus {
    /// From its `longhorn-disk.cfg`.
    pub uuid: DiskUuid,
    /// Its directory.
    pub path: PathBuf,
    /// Size of its file system in bytes.
    pub total_bytes: u64,
    /// Bytes that an unprivileged user may still write.
    pub free_bytes: u64,
    /// Bytes of `free_bytes` that running transfers have reserved.
    pub reserved_bytes: u64,
    /// How bytes are written: `uring` or `threads`.
    pub sink: String,
    /// False: no copy is started here.
    pub healthy: bool,
    /// Why it isn't healthy, or what is worth knowing; may be empty.
    pub message: String,
    /// Tags of its node, by the configuration.
    pub node_tags: BTreeSet<Tag>,
}

/// What the files of a copy say at start.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FoundState {
    /// Sealed, and its size and time are as recorded: may be served at once.
    Ready(CopyInfo),
    /// A partial file.
    Filling {
        /// Bytes durably there.
        bytes_present: u64,
        /// Length of the whole file, if it was known.
        bytes_total: Option<u64>,
    },
    /// Sealed, but changed or without a record: a worker has to hash it first.
    NeedsCheck,
}

/// One copy found on a disk at start.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FoundCopy {
    /// Which copy.
    pub id: CopyId,
    /// What its files say.
    pub state: FoundState,
}

/// What a finished copy is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CopyInfo {
    /// The file.
    pub path: PathBuf,
    /// Format of the file, found or declared.
    pub format: Format,
    /// Size of the disk as it is now, in bytes.
    pub virtual_size_bytes: u64,
    /// Size of the disk at the internal snapshot that readers get, if one is known.
    pub snapshot_size_bytes: Option<u64>,
    /// Length of the file in bytes.
    pub size_bytes: u64,
    /// Bytes that the file occupies on the disk (holes are not stored).
    pub stored_bytes: u64,
    /// Digests of the file that were computed.
    pub digests: DigestMap,
    /// The source's validator, if it gave one.
    pub etag: Option<String>,
}

impl CopyInfo {
    /// What of this belongs to the image, whatever the disk.
    #[must_use]
    pub fn facts(&self) -> Facts {
        Facts {
            format: self.format,
            virtual_size_bytes: self.virtual_size_bytes,
            snapshot_size_bytes: self.snapshot_size_bytes,
            size_bytes: self.size_bytes,
            digests: self.digests.clone(),
            etag: self.etag.clone(),
        }
    }
}

/// The work of one worker: make this copy ready.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CopyTask {
    /// Which copy.
    pub id: CopyId,
    /// The worker's name: `<image name>-<first 8 of disk UUID>`.
    pub worker: String,
    /// Where the bytes come from. `None` for an image found on a disk: check it, or fail.
    pub source: Option<SourceUrl>,
    /// Somebody uploads so many bytes: no source then.
    pub upload_bytes: Option<u64>,
    /// What it takes to reach it.
    pub access: Box<Access>,
    /// Where the same bytes are too.
    pub mirrors: Vec<SourceUrl>,
    /// What the copy's bytes are.
    pub layout: Layout,
    /// What it is given beside its own file, and needs only when it is opened.
    pub beside: Beside,
    /// The internal snapshot that readers get, by ID or name.
    pub snapshot: Option<String>,
    /// How it is steered when it starts; see [`Backend::steer`].
    pub steering: Steering,
    /// Digests to hold the bytes against.
    pub expected: Box<Expected>,
    /// Format that the user declared; `None` = look.
    pub declared_format: Option<Format>,
    /// What an earlier copy told: this one must agree.
    pub facts: Option<Facts>,
    /// Disks of this node with a complete copy: from there, before the source is asked.
    pub ready_on: Vec<DiskUuid>,
    /// The image that it is a clone of: from its copies, if there is no other. No source then.
    pub origin: Option<CopyOf>,
}

/// The copies of another image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CopyOf {
    /// Its name.
    pub image: ImageName,
    /// Its uuid.
    pub uuid: ImageUuid,
    /// Disks of this node with a complete copy of it.
    pub ready_on: Vec<DiskUuid>,
}

/// What a worker is busy with.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Phase {
    /// Waiting for the source's first answer.
    #[default]
    Connecting,
    /// Bytes arrive.
    Fetching,
    /// Bytes that are here are being hashed.
    Verifying,
    /// Flushing, renaming, recording.
    Sealing,
    /// Waiting before it tries the source again.
    Retrying,
}

impl Phase {
    /// The word for people and for the wire.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Connecting => "connecting",
            Self::Fetching => "fetching",
            Self::Verifying => "verifying",
            Self::Sealing => "sealing",
            Self::Retrying => "retrying",
        }
    }
}

/// How far a worker is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// Bytes of the file that are here.
    pub bytes_done: u64,
    /// Length of the file, once known.
    pub bytes_total: Option<u64>,
    /// Bytes per second, over the last seconds.
    pub rate_bytes_per_s: u64,
    /// Seconds until the file is whole, once it can be said.
    pub left_s: Option<u64>,
    /// Connections to the source.
    pub connections: u32,
    /// What it is busy with.
    pub phase: Phase,
    /// How many times the source was tried again.
    pub retries: u32,
    /// Connections to it that were left, as far too little came on them.
    pub overtaken: u32,
    /// What is worth knowing, without credentials; may be empty.
    pub message: String,
}

/// Whether trying again can help.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FailureClass {
    /// Wrong digest, refused image, 404: only a person or a new attach starts it again.
    Refuse,
    /// Network, full disk, busy: tried again with a back-off.
    Retry,
}

/// What a worker reports.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum WorkerEvent {
    /// It runs.
    Started,
    /// It moves on.
    Progress(Progress),
    /// The copy is sealed and durable.
    Ready(CopyInfo),
    /// It gave up.
    Failed {
        /// Whether trying again can help.
        class: FailureClass,
        /// What, where and what to do, without credentials.
        message: String,
        /// True if the partial file was removed; false if it is kept for a resume.
        cleaned: bool,
    },
    /// So many of the copy's bytes were held against their digests; as [`WorkerEvent::Scrubbed`].
    Scrubbing(u64),
    /// The copy was read against its digests; only of a worker that [`Backend::scrub`] started.
    Scrubbed(ScrubReport),
}

/// What came of a scrub. Without a class the copy is as good as before.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ScrubReport {
    /// Bytes that were bad and are right again.
    pub repaired_bytes: u64,
    /// Bytes that are bad; 0 if all of the copy is.
    pub bad_bytes: u64,
    /// The copy is damaged, and whether trying again can help.
    pub class: Option<FailureClass>,
    /// True if it could not be found out.
    pub unchecked: bool,
    /// What was found, where, and what was done; may be empty.
    pub message: String,
}

impl ScrubReport {
    /// True if every byte is right now.
    #[must_use]
    pub fn is_good(&self) -> bool {
        self.class.is_none() && !self.unchecked
    }
}

/// A worker's report with the copy and the number of the worker.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Report {
    /// Which copy.
    pub copy: CopyId,
    /// Which of the workers that this copy has had.
    pub generation: u64,
    /// What it says; `None` once its task has ended (the manager adds that itself).
    pub event: Option<WorkerEvent>,
}

/// A worker's way to report. Cheap to clone; progress is thinned, so the queue stays short.
#[derive(Clone, Debug)]
pub struct Reporter {
    copy: CopyId,
    generation: u64,
    tx: mpsc::UnboundedSender<Report>,
    last: Arc<Mutex<Option<(Instant, Phase, u32)>>>,
}

impl Reporter {
    /// Progress of one worker is passed on at most this often, unless its phase changes.
    pub const MIN_INTERVAL: Duration = Duration::from_millis(100);

    /// A reporter for the worker number `generation` of `copy`.
    #[must_use]
    pub fn new(copy: CopyId, generation: u64, tx: mpsc::UnboundedSender<Report>) -> Self {
        Self { copy, generation, tx, last: Arc::default() }
    }

    /// Passes `event` on. A manager that is gone is no error: the worker is cancelled too.
    pub fn send(&self, event: WorkerEvent) {
        if let WorkerEvent::Progress(progress) = &event {
            let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
            let key = (progress.phase, progress.retries);
            if let Some((at, phase, retries)) = *last
                && (phase, retries) == key
                && at.elapsed() < Self::MIN_INTERVAL
            {
                return;
            }
            *last = Some((Instant::now(), key.0, key.1));
        }
        self.pass(Some(event));
    }

    /// Says that the worker's task has ended.
    pub(super) fn ended(&self) {
        self.pass(None);
    }

    fn pass(&self, event: Option<WorkerEvent>) {
        let report = Report { copy: self.copy.clone(), generation: self.generation, event };
        let _gone = self.tx.send(report);
    }
}

/// Tells a worker that it should stop: keep what is durable, report nothing more, end.
#[derive(Clone, Debug)]
pub struct Cancel(watch::Receiver<bool>);

impl Cancel {
    /// A pair: what the worker watches, and what cancels it (send `true`).
    #[must_use]
    pub fn pair() -> (watch::Sender<bool>, Self) {
        let (tx, rx) = watch::channel(false);
        (tx, Self(rx))
    }

    /// True once the worker should stop, also when its handle is gone.
    #[must_use]
    pub fn is_cancelled(&self) -> bool {
        *self.0.borrow() || self.0.has_changed().is_err()
    }

    /// Resolves once the worker should stop. Cancel-safe.
    pub async fn cancelled(&mut self) {
        let _closed = self.0.wait_for(|stop| *stop).await;
    }
}

/// A running worker.
#[derive(Debug)]
pub struct WorkerHandle {
    cancel: watch::Sender<bool>,
    join: JoinHandle<()>,
}

impl WorkerHandle {
    /// Runs `work` as a task on the current runtime.
    pub fn spawn<F, Fut>(work: F) -> Self
    where
        F: FnOnce(Cancel) -> Fut,
        Fut: Future<Output = ()> + Send + 'static,
    {
        let (cancel, watcher) = Cancel::pair();
        Self { cancel, join: tokio::spawn(work(watcher)) }
    }

    /// Asks the worker to stop; returns at once. The second call changes nothing.
    pub fn cancel(&self) {
        self.cancel.send_replace(true);
    }

    /// The sender that cancels, and the task: for whoever waits and cancels in two places.
    #[must_use]
    pub fn into_parts(self) -> (watch::Sender<bool>, JoinHandle<()>) {
        (self.cancel, self.join)
    }
}

/// Why the backend could not do a thing at once.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct BackendError {
    /// Whether trying again can help.
    pub class: FailureClass,
    /// What, where and what to do, without credentials.
    pub message: String,
}

/// What holds for the workers of a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NodeSettings {
    /// Bytes per second at most, of all transfers together.
    pub rate_bytes_per_s: Option<u64>,
    /// Transfers at the same time; further ones wait.
    pub max_transfers: usize,
    /// Bytes per second at most, of all copies between disks together.
    pub disk_copy_rate_bytes_per_s: Option<u64>,
    /// Copies between disks at the same time; further ones wait.
    pub max_disk_copies: usize,
    /// Bytes per second at most, of the scrub of each disk.
    pub scrub_rate_bytes_per_s: Option<u64>,
}

/// What the manager asks of the store and the transfer on this node.
pub trait Backend: Send + Sync + 'static {
    /// The disks, in the order of the configuration, as they are now. Quick (`statvfs`).
    fn disks(&self) -> Vec<DiskStatus>;

    /// Opens a disk again that was found gone, if it is back. Blocks.
    fn reopen(&self, disk: &DiskUuid);

    /// Opens one disk more, or one that is missing at its old path; a directory that is no disk
    /// becomes one. Gives every copy that it holds. One that is open already is no error. Blocks.
    ///
    /// # Errors
    /// [`BackendError`]: it can't be opened, or another process has it.
    fn add_disk(&self, path: &Path) -> Result<(DiskUuid, Vec<FoundCopy>), BackendError>;

    /// A disk is none of this node's any more. Quick.
    fn forget_disk(&self, disk: &DiskUuid);

    /// At start: every copy that the disks hold. May read directories and records, not data.
    fn scan(&self) -> Vec<FoundCopy>;

    /// Starts a worker that makes the copy ready: fetch, resume, adopt or check, as the files on
    /// the disk allow. Called inside a tokio runtime; returns at once. A cancelled worker makes
    /// durable what it has and ends.
    fn start(&self, task: CopyTask, events: Reporter) -> WorkerHandle;

    /// Starts a worker that reads a complete copy against its digests and repairs it where it is,
    /// from the copies on `ready_on`, else from the source. It says [`WorkerEvent::Scrubbed`] once.
    /// Called inside a tokio runtime; returns at once.
    fn scrub(&self, task: CopyTask, events: Reporter) -> WorkerHandle;

    /// What was made of a copy's bytes is not to be used again: they were repaired. Quick.
    fn forget_view(&self, copy: &CopyId);

    /// Steers the worker of a copy, if it has one. Quick.
    fn steer(&self, copy: &CopyId, steering: Steering);

    /// The upload that the worker of a copy waits for, if it does. Quick.
    fn upload(&self, _copy: &CopyId) -> Option<Arc<Upload>> {
        None
    }

    /// Changes what holds for all transfers from now on, also for those that run. Quick.
    fn set_settings(&self, settings: NodeSettings);

    /// Removes every file of a copy. Files that aren't there are no error: it may be the second
    /// try after a crash. No worker of the copy runs. Blocks.
    ///
    /// # Errors
    /// [`BackendError`] if files are left.
    fn remove(&self, copy: &CopyId) -> Result<(), BackendError>;

    /// Opens the view of a ready copy, the first of `chain`; the others are those that it stands
    /// on, from the top down. Copies that are open already are shared. Blocks.
    ///
    /// # Errors
    /// [`BackendError`]; with [`FailureClass::Refuse`] if the bytes are no usable image.
    fn open_view(&self, chain: &[Link]) -> Result<Arc<View>, BackendError>;

    /// As [`open_view`](Self::open_view), for a copy that is still arriving on complete ones. Blocks
    /// until its header is here.
    ///
    /// # Errors
    /// [`BackendError`]: nothing arrives, its source does not tell how long it is, or it is no usable
    /// image.
    fn open_arriving(&self, chain: &[Link]) -> Result<Arc<View>, BackendError>;

    /// Who waits for bytes that are still to come gets an error, which says `why`. Quick.
    fn dismiss_readers(&self, why: &str);

    /// Inspects a complete copy whole. Blocks.
    ///
    /// # Errors
    /// [`BackendError`] if it cannot be read; a bad image is no error.
    fn inspect(&self, copy: &CopyId, beside: Beside) -> Result<Inspection, BackendError>;
}

#[cfg(test)]
mod tests {
    use super::*;

    fn copy() -> CopyId {
        CopyId {
            image: ImageName::parse("a").unwrap(),
            uuid: ImageUuid::parse("0a").unwrap(),
            disk: DiskUuid::parse("01234567").unwrap(),
        }
    }

    #[test]
    fn a_flood_of_progress_is_thinned_but_a_new_phase_is_told() {
        let (tx, mut rx) = mpsc::unbounded_channel();
        let reporter = Reporter::new(copy(), 1, tx);
        let in_phase = |phase| WorkerEvent::Progress(Progress { phase, ..Progress::default() });
        for _ in 0..10_000 {
            reporter.send(in_phase(Phase::Fetching));
        }
        reporter.send(in_phase(Phase::Verifying));
        reporter.send(WorkerEvent::Started);
        drop(reporter);
        let mut seen = Vec::new();
        while let Ok(report) = rx.try_recv() {
            seen.push(report.event);
        }
        assert!(seen.len() < 1_000, "{} reports", seen.len());
        assert!(seen.contains(&Some(in_phase(Phase::Verifying))));
    }

    #[tokio::test]
    async fn a_worker_whose_handle_is_dropped_is_cancelled() {
        let (cancel, mut watcher) = Cancel::pair();
        assert!(!watcher.is_cancelled());
        drop(cancel);
        watcher.cancelled().await;
        assert!(watcher.is_cancelled());
    }
}
