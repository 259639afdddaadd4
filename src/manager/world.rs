//! The world as the manager sees it: images, their copies, their readers, the disks.
//!
//! Why: all that decides what happens next is in one value, without clocks, tasks or files.
//! How: commands ([`World::command`]) and events ([`World::step`]) change facts; then one
//! reconciling pass derives the actions from the facts, so the order of events doesn't matter.
//! Time is given from outside, as the duration since the daemon started.
//! Never: performs anything; an [`Action`] is a request to the driver.
//! Start at [`World`].

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::backend::{
    CopyId, CopyTask, DiskStatus, FailureClass, FoundCopy, FoundState, Link, NodeSettings,
};
pub(super) use super::copies::{Copy, Export, Image, Worker};
use super::facts::differs;
use super::index::Index;
use super::records::{
    AttachmentId, AttachmentRecord, ClassRecord, DiskRecord, ImageRecord, Steering, VolumeRecord,
    Want,
};
use super::selectors::Selectors;
use super::settings::{Settings, SettingsRecord};
use super::volume::Volume;
use crate::image::Trace;
use crate::import::Layout;
use crate::names::{ClassName, DiskUuid, ImageName, VolumeName};

/// State of a copy, in Longhorn's words.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum CopyState {
    /// Wanted; no worker yet.
    Pending,
    /// Its worker was started and has no bytes yet.
    Starting,
    /// Bytes arrive or are checked.
    InProgress,
    /// Complete and sealed; not yet open for readers.
    ReadyForTransfer,
    /// Complete, sealed, open for readers.
    Ready,
    /// The last try failed; what was durable is kept.
    Failed,
    /// The last try failed, and its partial file was removed.
    FailedAndCleanup,
    /// Its disk isn't there, or isn't healthy.
    Unknown,
}

impl CopyState {
    /// The word for people and for the wire.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Pending => "pending",
            Self::Starting => "starting",
            Self::InProgress => "in-progress",
            Self::ReadyForTransfer => "ready-for-transfer",
            Self::Ready => "ready",
            Self::Failed => "failed",
            Self::FailedAndCleanup => "failed-and-cleanup",
            Self::Unknown => "unknown",
        }
    }

    /// True once the bytes are complete and sealed.
    #[must_use]
    pub fn is_sealed(self) -> bool {
        matches!(self, Self::ReadyForTransfer | Self::Ready)
    }
}

impl fmt::Display for CopyState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// State of an attachment.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum AttachmentState {
    /// Its copy isn't ready yet; work goes on.
    Waiting,
    /// Its copy can be read.
    Ready,
    /// Its copy was refused for good; the message says why.
    Failed,
}

impl AttachmentState {
    /// The word for people and for the wire.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Waiting => "waiting",
            Self::Ready => "ready",
            Self::Failed => "failed",
        }
    }
}

/// What the driver is asked to do, in this order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Store the record; everything after it in the list waits until it is durable.
    SaveImage(Box<ImageRecord>),
    /// Remove the record.
    ForgetImage(ImageName),
    /// Store the record.
    SaveAttachment(AttachmentRecord),
    /// Remove the record.
    ForgetAttachment(AttachmentId),
    /// Store the record.
    SaveVolume(Box<VolumeRecord>),
    /// Remove the record.
    ForgetVolume(VolumeName),
    /// Store the record.
    SaveClass(Box<ClassRecord>),
    /// Remove the record.
    ForgetClass(ClassName),
    /// Store the record.
    SaveSettings(SettingsRecord),
    /// Store the record.
    SaveDisk(Box<DiskRecord>),
    /// Remove the record, and let go of the disk.
    ForgetDisk(DiskUuid),
    /// What holds for all workers from now on.
    ApplySettings(NodeSettings),
    /// Start the worker with this number.
    Start(Box<CopyTask>, u64),
    /// Start a worker with this number that reads a complete copy against its digests.
    Scrub(Box<CopyTask>, u64),
    /// What was made of the copy's bytes is not to be used again.
    ForgetView(CopyId),
    /// End the copy's worker where it stands, as when its process is killed.
    Kill(CopyId),
    /// Who waits for bytes that are still to come gets an error.
    DismissReaders,
    /// Ask the copy's worker to stop.
    Cancel(CopyId),
    /// Tell the copy's worker how it is steered.
    Steer(CopyId, Steering),
    /// Remove the copy's files; answer with [`Event::Removed`].
    Remove(CopyId),
    /// Open the first copy for readers, on the others, which it stands on; answer with
    /// [`Event::Published`].
    Publish(Vec<Link>),
    /// As [`Action::Publish`], for a copy that is still arriving, of which this will be read first.
    Stream(Vec<Link>, Option<Arc<Trace>>),
    /// Close the image's export.
    Withdraw(ImageName),
    /// Tell the watchers.
    Announce(Change),
}

/// What changed, for watchers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// A new image.
    ImageCreated(ImageName),
    /// Something of an image other than a worker's progress.
    ImageUpdated(ImageName),
    /// Only the progress of a worker.
    ImageProgress(ImageName),
    /// The image and its files are gone.
    ImageDeleted(ImageName),
    /// A new attachment.
    AttachmentCreated(AttachmentId),
    /// Its state changed.
    AttachmentUpdated(AttachmentId),
    /// It is gone; it read this image.
    AttachmentDeleted(AttachmentId, ImageName),
    /// A new volume.
    VolumeCreated(VolumeName),
    /// It was attached or detached, or a replica's state changed.
    VolumeUpdated(VolumeName),
    /// It is gone; it stood on this image.
    VolumeDeleted(VolumeName, ImageName),
    /// Something about an image that somebody should look at, in words.
    Warning(ImageName, String),
    /// What holds on this node was changed.
    SettingsUpdated,
    /// The node counts as gone, or is back.
    NodeUpdated,
    /// A disk was added, steered, lost, or is back.
    DiskUpdated(DiskUuid),
    /// A disk is none of the node's any more.
    DiskRemoved(DiskUuid),
}

/// What happened, apart from commands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// A worker's report; `event` is `None` once its task has ended.
    Worker(super::backend::Report),
    /// The answer to [`Action::Publish`] or [`Action::Stream`].
    Published(CopyId, Result<(), (FailureClass, String)>),
    /// The answer to [`Action::Remove`].
    Removed(CopyId, Result<(), String>),
    /// The disks as they are now.
    Disks(Vec<DiskStatus>),
    /// Time has passed, or the daemon has just started.
    Tick,
}

#[derive(Clone, Debug)]
pub(super) struct Attachment {
    pub(super) record: AttachmentRecord,
    /// What watchers were told last.
    pub(super) announced: AttachmentState,
}

/// What the catalog holds.
#[derive(Clone, Debug, Default)]
pub struct Records {
    /// The images.
    pub images: Vec<ImageRecord>,
    /// The attachments.
    pub attachments: Vec<AttachmentRecord>,
    /// The volumes.
    pub volumes: Vec<VolumeRecord>,
    /// The storage classes.
    pub classes: Vec<ClassRecord>,
    /// The disks.
    pub disks: Vec<DiskRecord>,
    /// What is configured, and what was set.
    pub settings: Settings,
}

/// Everything that the manager knows.
#[derive(Clone, Debug, Default)]
pub struct World {
    pub(super) images: BTreeMap<ImageName, Image>,
    pub(super) attachments: BTreeMap<AttachmentId, Attachment>,
    pub(super) volumes: BTreeMap<VolumeName, Volume>,
    pub(super) classes: BTreeMap<ClassName, ClassRecord>,
    pub(super) disks: Vec<DiskStatus>,
    pub(super) disk_records: BTreeMap<DiskUuid, DiskRecord>,
    /// The disks that are being emptied, as of the last pass.
    pub(super) evicting: BTreeSet<DiskUuid>,
    pub(super) generation: u64,
    /// When the daemon started, in seconds since 1970.
    pub(super) started_unix_s: u64,
    pub(super) settings: Settings,
    /// It counts as gone, in a drill.
    pub(super) node_failed: bool,
    /// Sessions that are open on exported images.
    pub(super) sessions: BTreeMap<ImageName, usize>,
    /// Who refers to which image.
    pub(super) index: Index,
    /// Exported images whose readers have lost what they read.
    pub(super) lost: BTreeSet<ImageName>,
}

/// What a change has touched, until it is told at the end.
#[derive(Debug, Default)]
pub(super) struct Touched {
    pub(super) actions: Vec<Action>,
    pub(super) images: BTreeSet<ImageName>,
    pub(super) progress: BTreeSet<ImageName>,
}

impl World {
    /// The world at start, from the records, the disks and what was found on them. Unfinished
    /// copies of wanted disks are `failed`, due at once; whole ones wait for their export.
    /// Records that must be stored first are in the actions; then send [`Event::Tick`].
    #[must_use]
    pub fn restore(
        records: Records,
        disks: Vec<DiskStatus>,
        found: Vec<FoundCopy>,
        now_unix_s: u64,
    ) -> (Self, Vec<Action>) {
        let Records { images, attachments, volumes, classes, disks: known, settings } = records;
        let mut world = Self { disks, settings, started_unix_s: now_unix_s, ..Self::default() };
        world.images = images.into_iter().map(|r| (r.name.clone(), Image::new(r))).collect();
        world.classes = classes.into_iter().map(|c| (c.name.clone(), c)).collect();
        for record in volumes {
            let volume = Volume { announced: Vec::new(), record };
            world.volumes.insert(volume.record.name.clone(), volume);
        }
        for record in attachments {
            let attachment = Attachment { announced: AttachmentState::Waiting, record };
            world.attachments.insert(attachment.record.id.clone(), attachment);
        }
        world.disk_records = known.into_iter().map(|d| (d.uuid.clone(), d)).collect();
        let mut actions = world.know_disks();
        let here: BTreeSet<_> =
            found.iter().map(|f| (f.id.image.clone(), f.id.disk.clone())).collect();
        actions.extend(found.into_iter().filter_map(|f| world.adopt(f, now_unix_s)));
        world.note_removed(&here);
        world.index_step();
        (world, actions)
    }

    /// Of copies that were refused, those of which nothing is on their disks were removed.
    fn note_removed(&mut self, here: &BTreeSet<(ImageName, DiskUuid)>) {
        let fit = self.disks.iter().filter(|disk| disk.healthy);
        let fit: BTreeSet<DiskUuid> = fit.map(|disk| disk.uuid.clone()).collect();
        for (name, image) in &mut self.images {
            for (disk, copy) in image.copies.iter_mut().filter(|(_, copy)| copy.refused) {
                let is_here = here.contains(&(name.clone(), disk.clone()));
                if !is_here && fit.contains(disk) {
                    copy.state = CopyState::FailedAndCleanup;
                }
            }
        }
    }

    /// Takes in one found copy. Gives the record if it is new or wants one disk more.
    pub(super) fn adopt(&mut self, found: FoundCopy, now_unix_s: u64) -> Option<Action> {
        let CopyId { image: name, uuid, disk } = found.id;
        let is_new = !self.images.contains_key(&name);
        if is_new {
            if matches!(found.state, FoundState::Filling { .. }) {
                return None;
            }
            let record = ImageRecord {
                name: name.clone(),
                uuid: uuid.clone(),
                source: None,
                mirrors: Vec::new(),
                upload_bytes: None,
                clone_of: None,
                layout: Layout::default(),
                base: None,
                data_file: None,
                snapshot: None,
                steering: Steering::default(),
                access: Box::default(),
                expected: Box::default(),
                declared_format: None,
                prefetch: None,
                facts: None,
                disks: BTreeMap::new(),
                min_copies: 0,
                selectors: Selectors::default(),
                deleting: false,
                created_unix_s: now_unix_s,
            };
            self.images.insert(name.clone(), Image::new(record));
        }
        let image = self.images.get_mut(&name)?;
        if image.record.uuid != uuid {
            return None;
        }
        let unwanted = !image.record.disks.contains_key(&disk);
        if unwanted && matches!(found.state, FoundState::Filling { .. }) {
            // It was cancelled, and the daemon died before its files were gone.
            image.copy_entry(&disk).cancelled = true;
            return None;
        }
        let before = (!is_new).then(|| image.record.clone());
        image.copy_on(&disk);
        let copy = image.copies.get_mut(&disk)?;
        // A refused copy stays refused, whole or not, until somebody asks for it.
        match found.state {
            FoundState::Ready(info) if !copy.refused => {
                let known = image.record.facts.get_or_insert_with(|| info.facts());
                if let Some(fault) = differs(known, &info.facts()) {
                    (copy.state, copy.refused) = (CopyState::Failed, true);
                    copy.message.clone_from(&fault);
                    image
                        .record
                        .disks
                        .insert(disk, Want { refused: Some(fault), ..Want::default() });
                } else {
                    copy.state = CopyState::ReadyForTransfer;
                    copy.progress.bytes_done = info.size_bytes;
                    copy.progress.bytes_total = Some(info.size_bytes);
                    copy.info = Some(info);
                }
            }
            FoundState::Filling { bytes_present, bytes_total } if !copy.refused => {
                copy.progress.bytes_done = bytes_present;
                copy.progress.bytes_total = bytes_total;
                copy.state = CopyState::Failed;
                copy.message = "the daemon restarted; resumes from what is durable".to_owned();
            }
            FoundState::Ready(_) | FoundState::Filling { .. } | FoundState::NeedsCheck => {}
        }
        (before.as_ref() != Some(&image.record))
            .then(|| Action::SaveImage(Box::new(image.record.clone())))
    }

    /// When something is due that no event will bring; `None` if nothing is.
    #[must_use]
    pub fn next_wake(&self) -> Option<Duration> {
        if self.node_failed {
            return None;
        }
        let copies = self.images.values().flat_map(|i| i.copies.values());
        let idle = copies.filter(|c| c.worker == Worker::Idle && !c.removing);
        idle.filter_map(|c| c.retry_at)
            .chain(self.clean_up_due())
            .chain(self.scrub_wake())
            .chain(self.recovery_wake())
            .chain(self.replenish_wake())
            .min()
    }

    /// True if copies can be worked on and read there.
    pub(super) fn is_fit(&self, disk: &DiskUuid) -> bool {
        !self.node_failed && self.disk(disk).is_some_and(|disk| disk.healthy)
    }

    pub(super) fn disk(&self, uuid: &DiskUuid) -> Option<&DiskStatus> {
        self.disks.iter().find(|d| &d.uuid == uuid)
    }

    pub(super) fn attachments_of<'a>(
        &'a self,
        name: &'a ImageName,
    ) -> impl Iterator<Item = &'a Attachment> {
        self.attachments.values().filter(move |a| &a.record.image == name)
    }

    /// What an attachment can expect now.
    pub(super) fn attachment_state(&self, record: &AttachmentRecord) -> (AttachmentState, String) {
        let image = self.images.get(&record.image);
        let copy = image.and_then(|image| image.copies.get(&record.disk));
        match (image, copy) {
            (Some(image), Some(copy)) if record.stream && !copy.state.is_sealed() => {
                if image.export == Export::Streaming(record.disk.clone()) {
                    let text = "still arriving; what is not here yet is waited for";
                    return (AttachmentState::Ready, text.to_owned());
                }
                let (state, text) = self.reader_state(&record.image, &record.disk);
                let why = copy.no_stream.clone().filter(|_| state == AttachmentState::Waiting);
                (state, why.unwrap_or(text))
            }
            _of_a_complete_copy => self.reader_state(&record.image, &record.disk),
        }
    }

    /// What a reader of the copy of `image` on `disk` can expect now.
    pub(super) fn reader_state(
        &self,
        image: &ImageName,
        disk: &DiskUuid,
    ) -> (AttachmentState, String) {
        let copy = self.images.get(image).and_then(|i| i.copies.get(disk));
        match copy {
            Some(c) if c.state == CopyState::Ready => (AttachmentState::Ready, String::new()),
            Some(c) if c.refused => (AttachmentState::Failed, c.message.clone()),
            Some(c) => (AttachmentState::Waiting, c.message.clone()),
            None => (AttachmentState::Failed, "the image is gone; detach".to_owned()),
        }
    }
}
