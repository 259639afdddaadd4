//! The real node behind the manager: its disks, and a worker for each copy.
//!
//! Why: the manager decides; somebody has to hold the disks and run the transfers.
//! How: [`Node`] owns the locked disks and what transfers share; `worker` does the work of one copy.
//! Never: decides which copies there should be.
//! Start at [`Node::open`].

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use super::backend::{
    Backend, BackendError, CopyId, CopyInfo, CopyTask, DiskStatus, FailureClass, FoundCopy,
    FoundState, Link, NodeSettings, Reporter, WorkerHandle,
};
use super::beside::Beside;
use super::helm::Helms;
use super::records::Steering;
use super::slots::{Slot, Slots};
use super::turns::Turns;
use super::uploads::Uploads;
use super::views::Views;
use super::worker::{self, Worker};
use super::{Cancel, ScrubReport, WorkerEvent, mend};
use crate::disk::{self, CopyRecord, Disk, DiskError, Found};
use crate::fetch::{Hosts, Policy, RateLimit, Upload, one_line};
use crate::image::qcow2::Terms;
use crate::image::{self, Format, ImageError, Inspection, Opening, View};
use crate::names::{DiskUuid, Tag};
use crate::ring::{BufPool, Choice};

/// How long an attachment that does not wait waits for the first bytes of its image.
const ARRIVAL_PATIENCE: Duration = Duration::from_secs(30);

/// How a node is set up.
#[derive(Clone, Debug)]
pub struct NodeOptions {
    /// The disks' directories, the first being the default.
    pub disks: Vec<PathBuf>,
    /// Tags of the node.
    pub node_tags: BTreeSet<Tag>,
    /// Disks that were known before, and where: only they are opened there.
    pub known: Vec<(DiskUuid, PathBuf)>,
    /// Make a disk of a directory that is none yet.
    pub create: bool,
    /// Which sink to write with.
    pub sink: Choice,
    /// Bounds on transfers.
    pub policy: Policy,
    /// Buffers of 1 MiB that all transfers share, in equal parts.
    pub buffers: usize,
    /// Those besides, for transfers whose answers have a long way.
    pub more_buffers: usize,
    /// Transfers at the same time; further ones wait.
    pub max_transfers: usize,
    /// Bytes per second at most, of all transfers together.
    pub rate_bytes_per_s: Option<u64>,
}

impl NodeOptions {
    /// The defaults, for `disks`.
    #[must_use]
    pub fn new(disks: Vec<PathBuf>) -> Self {
        Self {
            disks,
            node_tags: BTreeSet::new(),
            known: Vec::new(),
            create: true,
            sink: Choice::Auto,
            policy: Policy::default(),
            buffers: 256,
            more_buffers: 128,
            max_transfers: 8,
            rate_bytes_per_s: None,
        }
    }
}

/// Why a node can't be opened.
#[derive(Debug, thiserror::Error)]
pub enum NodeError {
    /// A disk is locked, missing or damaged.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// The sink that was asked for does not work.
    #[error("{0}; or let `sink` be auto")]
    Sink(String),
    /// Another disk is where a known one was.
    #[error("{}: disk {found} is here, not {known}; mount the right one, or remove the record of it: `bedplate disk remove --force {known}`", path.display())]
    OtherDisk {
        /// The directory.
        path: PathBuf,
        /// The disk that is there.
        found: DiskUuid,
        /// The disk that was there.
        known: DiskUuid,
    },
    /// Two directories say that they are the same disk.
    #[error("{} and {} have the same disk UUID {uuid}; give each disk its own longhorn-disk.cfg", first.display(), second.display())]
    SameUuid {
        /// The UUID.
        uuid: DiskUuid,
        /// One directory.
        first: PathBuf,
        /// The other.
        second: PathBuf,
    },
}

/// The disks of this node and the workers on them.
#[derive(Debug)]
pub struct Node {
    slots: Slots,
    tags: BTreeSet<Tag>,
    pool: BufPool,
    policy: Policy,
    limit: Arc<RateLimit>,
    hosts: Arc<Hosts>,
    turns: Arc<Turns>,
    /// Of copies between disks.
    copy_limit: Arc<RateLimit>,
    copy_turns: Arc<Turns>,
    /// Of the scrub of each disk.
    scrub_limit: Arc<RateLimit>,
    helms: Arc<Helms>,
    uploads: Arc<Uploads>,
    /// Views that are open, for images that stand on them.
    views: Views,
    /// Buffers that one transfer may hold: so many that none can starve the others.
    buffers_each: usize,
}

impl Node {
    /// Opens and locks every disk.
    ///
    /// # Errors
    /// [`NodeError`]; no disk stays locked then.
    pub fn open(options: &NodeOptions) -> Result<Self, NodeError> {
        Ok(Self {
            slots: Slots::open(options)?,
            tags: options.node_tags.clone(),
            pool: BufPool::with_unshared(options.buffers, options.more_buffers),
            policy: options.policy.clone(),
            limit: Arc::new(RateLimit::new(options.rate_bytes_per_s)),
            hosts: Arc::default(),
            turns: Arc::new(Turns::new(options.max_transfers)),
            copy_limit: Arc::default(),
            copy_turns: Arc::new(Turns::new(1)),
            scrub_limit: Arc::default(),
            helms: Arc::default(),
            uploads: Arc::default(),
            views: Views::default(),
            buffers_each: (options.buffers / options.max_transfers.max(1)).max(2),
        })
    }

    /// What becomes the worker of `task`, once it knows where to report.
    fn worker(
        &self,
        task: CopyTask,
    ) -> Result<impl FnOnce(Reporter, Cancel) -> Worker + use<>, BackendError> {
        let slot = self.slot(&task.id.disk)?;
        let slots = |disks: &[DiskUuid]| disks.iter().filter_map(|d| self.slots.find(d)).collect();
        let others = slots(&task.ready_on);
        let origins = task.origin.as_ref().map_or_else(Vec::new, |of| slots(&of.ready_on));
        let shared = worker::Shared {
            pool: self.pool.clone(),
            policy: self.policy.clone(),
            buffers: self.buffers_each,
            limit: Arc::clone(&self.limit),
            hosts: Arc::clone(&self.hosts),
            turns: Arc::clone(&self.turns),
            copy_limit: Arc::clone(&self.copy_limit),
            copy_turns: Arc::clone(&self.copy_turns),
            scrub_limit: Arc::clone(&self.scrub_limit),
            helms: Arc::clone(&self.helms),
            uploads: Arc::clone(&self.uploads),
        };
        Ok(move |events, cancel| Worker { slot, others, origins, shared, task, events, cancel })
    }

    fn slot(&self, disk: &DiskUuid) -> Result<Arc<Slot>, BackendError> {
        self.slots.find(disk).ok_or_else(|| BackendError {
            class: FailureClass::Retry,
            message: format!("disk {disk} is not here; see `bedplate disks`"),
        })
    }

    fn open_on(&self, link: &Link, base: Option<&View>) -> Result<View, BackendError> {
        let record = self.ready_record(&link.copy)?;
        let slot = self.slot(&link.copy.disk)?;
        let (declared, snapshot) = (declared_format(&record), link.snapshot.as_deref());
        let open = |copy| {
            slot.disk.sealed(&store_id(copy)).map_err(|e| backend_error(&OpenError::Disk(e)))
        };
        let data = link.data_file.as_ref().map(open).transpose()?;
        let opening = Opening { declared, snapshot, base, data, ..Opening::default() };
        let sealed = open(&link.copy)?;
        View::open_as(sealed, opening).map_err(|e| backend_error(&OpenError::Image(e)))
    }

    /// The store's record of a complete copy.
    fn ready_record(&self, copy: &CopyId) -> Result<CopyRecord, BackendError> {
        let (slot, id) = (self.slot(&copy.disk)?, store_id(copy));
        let state = slot.disk.copy_state(&id).map_err(|e| backend_error(&OpenError::Disk(e)))?;
        if let Some(disk::CopyState::Ready(record)) = state {
            return Ok(record);
        }
        let message = format!("{}: not ready to be served", slot.disk.data_path(&id).display());
        Err(BackendError { class: FailureClass::Retry, message })
    }
}

/// The store's name of a copy.
pub(super) fn store_id(copy: &CopyId) -> disk::CopyId {
    disk::CopyId { name: copy.image.clone(), uuid: copy.uuid.clone() }
}

/// The format that was declared when the copy was made, in the store's record.
pub(super) fn declared_format(record: &CopyRecord) -> Option<Format> {
    record.declared.as_deref().and_then(|text| text.parse().ok())
}

/// What a ready copy is, by its record and its header. `snapshot` is what readers get of it.
pub(super) fn info_of(
    disk: &Disk,
    id: &disk::CopyId,
    record: &CopyRecord,
    snapshot: Option<&str>,
) -> Result<CopyInfo, OpenError> {
    let sealed = disk.sealed(id)?;
    let size_at = |snapshot| image::snapshot_size_bytes(sealed.file(), sealed.path(), snapshot);
    let info = image::peek(sealed.file(), sealed.path(), declared_format(record))?;
    Ok(CopyInfo {
        path: disk.data_path(id),
        format: info.format,
        virtual_size_bytes: info.virtual_size_bytes,
        snapshot_size_bytes: snapshot.map(size_at).transpose()?,
        size_bytes: info.file_size_bytes,
        stored_bytes: info.allocated_bytes,
        digests: record.digests.whole.clone(),
        etag: None,
    })
}

/// Why a stored file can't be opened as an image.
#[derive(Debug, thiserror::Error)]
pub(super) enum OpenError {
    #[error(transparent)]
    Disk(#[from] DiskError),
    #[error(transparent)]
    Image(#[from] ImageError),
}

fn backend_error(error: &OpenError) -> BackendError {
    let class = match error {
        OpenError::Disk(error) if error.may_retry() => FailureClass::Retry,
        OpenError::Disk(_) => FailureClass::Refuse,
        OpenError::Image(error) => match error.class() {
            crate::image::Class::Retry => FailureClass::Retry,
            crate::image::Class::Refuse | crate::image::Class::Bug => FailureClass::Refuse,
        },
    };
    BackendError { class, message: one_line(error) }
}

impl Backend for Node {
    fn disks(&self) -> Vec<DiskStatus> {
        let mut disks = self.slots.statuses();
        disks.iter_mut().for_each(|disk| disk.node_tags.clone_from(&self.tags));
        disks
    }

    fn reopen(&self, disk: &DiskUuid) {
        self.slots.reopen(disk);
    }

    fn add_disk(&self, path: &Path) -> Result<(DiskUuid, Vec<FoundCopy>), BackendError> {
        let refuse = |message| BackendError { class: FailureClass::Refuse, message };
        if !path.is_absolute() || !path.is_dir() {
            let path = path.display();
            return Err(refuse(format!("{path}: no such directory; give an absolute path")));
        }
        let slot = self.slots.add(path, true).map_err(|error| refuse(one_line(&error)))?;
        Ok((slot.disk.uuid().clone(), scan(&slot.disk)))
    }

    fn forget_disk(&self, disk: &DiskUuid) {
        self.slots.forget(disk);
    }

    fn scan(&self) -> Vec<FoundCopy> {
        // Each disk waits for itself only.
        std::thread::scope(|scope| {
            let slots = self.slots.all();
            let scans: Vec<_> =
                slots.into_iter().map(|slot| scope.spawn(move || scan(&slot.disk))).collect();
            let ended = scans.into_iter().map(std::thread::ScopedJoinHandle::join);
            let panicked = |panic| std::panic::resume_unwind(panic);
            ended.flat_map(|found| found.unwrap_or_else(panicked)).collect()
        })
    }

    fn start(&self, task: CopyTask, events: Reporter) -> WorkerHandle {
        match self.worker(task) {
            Ok(worker) => WorkerHandle::spawn(|cancel| worker::run(worker(events, cancel))),
            Err(BackendError { class, message }) => WorkerHandle::spawn(move |_| async move {
                events.send(WorkerEvent::Failed { class, message, cleaned: true });
            }),
        }
    }

    fn scrub(&self, task: CopyTask, events: Reporter) -> WorkerHandle {
        match self.worker(task) {
            Ok(worker) => WorkerHandle::spawn(|cancel| mend::run(worker(events, cancel))),
            Err(BackendError { message, .. }) => WorkerHandle::spawn(move |_| async move {
                let report = ScrubReport { unchecked: true, message, ..ScrubReport::default() };
                events.send(WorkerEvent::Scrubbed(report));
            }),
        }
    }

    fn forget_view(&self, copy: &CopyId) {
        self.views.forget(copy);
    }

    fn steer(&self, copy: &CopyId, steering: Steering) {
        self.helms.steer(copy, steering);
        self.turns.look_again();
    }

    fn upload(&self, copy: &CopyId) -> Option<Arc<Upload>> {
        self.uploads.find(copy)
    }

    fn set_settings(&self, settings: NodeSettings) {
        self.limit.set(settings.rate_bytes_per_s);
        self.turns.set_most(settings.max_transfers);
        self.copy_limit.set(settings.disk_copy_rate_bytes_per_s);
        self.copy_turns.set_most(settings.max_disk_copies);
        self.scrub_limit.set(settings.scrub_rate_bytes_per_s);
    }

    fn remove(&self, copy: &CopyId) -> Result<(), BackendError> {
        self.views.forget(copy);
        let Ok(slot) = self.slot(&copy.disk) else {
            // The disk is no longer configured: an image must not wait for it to be deleted.
            tracing::warn!(image = %copy.image, disk = %copy.disk, "files stay on a disk that is not here");
            return Ok(());
        };
        slot.disk.remove(&store_id(copy)).map_err(|error| backend_error(&OpenError::Disk(error)))
    }

    fn open_view(&self, chain: &[Link]) -> Result<Arc<View>, BackendError> {
        let mut view: Option<Arc<View>> = None;
        for link in chain.iter().rev() {
            let shared = self.views.find(link);
            let opened = match shared {
                Some(open) => open,
                None => {
                    let opened = self.open_on(link, view.as_deref())?;
                    Arc::new(opened.keeping(view))
                }
            };
            self.views.keep(link, &opened);
            view = Some(opened);
        }
        view.ok_or_else(|| BackendError {
            class: FailureClass::Refuse,
            message: "an empty chain of images".to_owned(),
        })
    }

    fn open_arriving(&self, chain: &[Link]) -> Result<Arc<View>, BackendError> {
        let later = |class, message: &str| BackendError { class, message: message.to_owned() };
        let Some((link, beneath)) = chain.split_first() else {
            return Err(later(FailureClass::Refuse, "an empty chain of images"));
        };
        if link.data_file.is_some() {
            let text = "waits until the image is complete: its data is in another file";
            return Err(later(FailureClass::Refuse, text));
        }
        let base = if beneath.is_empty() { None } else { Some(self.open_view(beneath)?) };
        let slot = self.slot(&link.copy.disk)?;
        let file = match slot.disk.arriving(&store_id(&link.copy), ARRIVAL_PATIENCE) {
            Found::File(file) => file,
            Found::NotYet => {
                let text = "waits until the image is complete: nothing of it has arrived yet";
                return Err(later(FailureClass::Retry, text));
            }
            Found::NoLength => {
                let text = "waits until the image is complete: its source does not tell its length";
                return Err(later(FailureClass::Refuse, text));
            }
        };
        let snapshot = link.snapshot.as_deref();
        let opening = Opening { snapshot, base: base.as_deref(), ..Opening::default() };
        let view = View::open_as(file, opening).map_err(|e| backend_error(&OpenError::Image(e)))?;
        Ok(Arc::new(view.keeping(base)))
    }

    fn dismiss_readers(&self, why: &str) {
        for slot in self.slots.all() {
            slot.disk.dismiss_readers(why);
        }
    }

    fn inspect(&self, copy: &CopyId, beside: Beside) -> Result<Inspection, BackendError> {
        let (slot, id) = (self.slot(&copy.disk)?, store_id(copy));
        let record = self.ready_record(copy)?;
        let found = slot.disk.sealed(&id).map_err(OpenError::from).and_then(|sealed| {
            let declared = declared_format(&record);
            let Beside { base: backing, data_len_bytes } = beside;
            let terms = Terms { backing, data_len_bytes, snapshot: None };
            Ok(Inspection::of_file(sealed.file(), sealed.path(), declared, &terms)?)
        });
        found.map_err(|error| backend_error(&error))
    }
}

/// Every copy that `disk` holds.
fn scan(disk: &Disk) -> Vec<FoundCopy> {
    let copies = disk.scan().unwrap_or_else(|error| {
        tracing::error!(error = %one_line(&error), "cannot list the copies of a disk");
        Vec::new()
    });
    let found = copies.into_iter().map(|(id, state)| FoundCopy {
        id: CopyId { image: id.name.clone(), uuid: id.uuid.clone(), disk: disk.uuid().clone() },
        state: found_state(disk, &id, state),
    });
    found.collect()
}

fn found_state(disk: &Disk, id: &disk::CopyId, state: disk::CopyState) -> FoundState {
    match state {
        disk::CopyState::Ready(record) => match info_of(disk, id, &record, None) {
            Ok(info) => FoundState::Ready(info),
            Err(_) => FoundState::NeedsCheck,
        },
        disk::CopyState::Unchecked => FoundState::NeedsCheck,
        disk::CopyState::Filling { present_bytes, total_bytes } => {
            FoundState::Filling { bytes_present: present_bytes, bytes_total: total_bytes }
        }
    }
}
