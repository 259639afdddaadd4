//! What the world looks like to somebody who asks.
//!
//! Why: answers and events show copies of facts, never the world itself.
//! How: plain values, made on request by the driver's task.
//! Never: a wire format; `control` makes one of these, and redacts what must be.
//! Start at [`ImageStatus`].

use std::path::PathBuf;

use super::backend::{CopyId, CopyInfo, Progress};
use super::beside::Beside;
use super::records::{AttachmentId, AttachmentRecord, ImageRecord, ScrubRecord, VolumeRecord};
use super::volume::{ReplicaState, VolumeState};
use super::world::{Attachment, AttachmentState, Copy, CopyState, Export, Image, World};
use crate::names::{DiskUuid, ImageName};

/// One copy, as it is now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CopyStatus {
    /// Its disk.
    pub disk: DiskUuid,
    /// Name of its worker.
    pub worker: String,
    /// Its state.
    pub state: CopyState,
    /// How far its worker is.
    pub progress: Progress,
    /// What it is, once sealed.
    pub info: Option<CopyInfo>,
    /// True if it failed for good: only a person or a new attach starts it again.
    pub refused: bool,
    /// Why it failed, or what is worth knowing; may be empty.
    pub message: String,
    /// Since when nobody uses it, in seconds since 1970; `None` while somebody does.
    pub unused_since_unix_s: Option<u64>,
    /// True while it is read against its digests, or waits to be.
    pub scrubbing: bool,
    /// How many of its bytes that has done; `None` if it waits, or nobody asked.
    pub scrubbed_bytes: Option<u64>,
    /// What came of that the last time.
    pub scrub: Option<ScrubRecord>,
}

/// One image, as it is now. Its `Debug` shows the source redacted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImageStatus {
    /// Its record.
    pub record: ImageRecord,
    /// Its copies, by disk.
    pub copies: Vec<CopyStatus>,
    /// How many readers hold it: attachments, and replicas of attached volumes.
    pub attachments: usize,
    /// True if readers can open its export.
    pub exported: bool,
}

/// One attachment, as it is now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AttachmentStatus {
    /// Its record.
    pub record: AttachmentRecord,
    /// Its state.
    pub state: AttachmentState,
    /// Why it waits or failed; may be empty.
    pub message: String,
}

/// One replica of a volume, as it is now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReplicaStatus {
    /// `<volume>-r-<first 8 of disk UUID>`.
    pub name: String,
    /// Its disk.
    pub disk: DiskUuid,
    /// Its state.
    pub state: ReplicaState,
    /// State of the copy that it reads.
    pub copy_state: CopyState,
    /// Why it waits or failed; may be empty.
    pub message: String,
    /// The file that it reads, while it runs.
    pub path: Option<PathBuf>,
}

/// One volume, as it is now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VolumeStatus {
    /// Its record.
    pub record: VolumeRecord,
    /// Its replicas, in the order of their disks in the record.
    pub replicas: Vec<ReplicaStatus>,
}

impl VolumeStatus {
    fn count(&self, state: ReplicaState) -> usize {
        self.replicas.iter().filter(|replica| replica.state == state).count()
    }

    /// Its state.
    #[must_use]
    pub fn state(&self) -> VolumeState {
        match self.count(ReplicaState::Running) {
            _ if !self.record.attached => VolumeState::Detached,
            0 => VolumeState::Attaching,
            _ => VolumeState::Attached,
        }
    }

    /// How well it is served, in Longhorn's words: `healthy` if all replicas run, `degraded` if
    /// some do, `faulted` if all have failed, else `unknown`.
    #[must_use]
    pub fn robustness(&self) -> &'static str {
        let (running, failed) =
            (self.count(ReplicaState::Running), self.count(ReplicaState::Failed));
        match self.replicas.len() {
            _ if !self.record.attached => "unknown",
            all if running == all => "healthy",
            all if failed == all => "faulted",
            _ if running > 0 => "degraded",
            _ => "unknown",
        }
    }
}

impl World {
    /// Every image, by name.
    #[must_use]
    pub fn images(&self) -> Vec<ImageStatus> {
        self.images.values().map(|image| self.image_status(image)).collect()
    }

    /// One image.
    #[must_use]
    pub fn image(&self, name: &ImageName) -> Option<ImageStatus> {
        self.images.get(name).map(|image| self.image_status(image))
    }

    /// A complete copy of an image, and what it is given beside its file: `None` if there is no such
    /// image, `Some(None)` if it has none.
    #[must_use]
    pub fn sealed_copy(&self, name: &ImageName) -> Option<Option<(CopyId, Beside)>> {
        let image = self.images.get(name)?;
        let sealed = image.copies.iter().find(|(_, copy)| copy.state.is_sealed());
        let beside = self.beside(&image.record).unwrap_or_default();
        Some(sealed.map(|(disk, _)| (image.copy_id(disk), beside)))
    }

    /// Every attachment, by id.
    #[must_use]
    pub fn attachments(&self) -> Vec<AttachmentStatus> {
        self.attachments.values().map(|a| self.attachment_status(a)).collect()
    }

    /// One attachment.
    #[must_use]
    pub fn attachment(&self, id: &AttachmentId) -> Option<AttachmentStatus> {
        self.attachments.get(id).map(|a| self.attachment_status(a))
    }

    fn image_status(&self, image: &Image) -> ImageStatus {
        ImageStatus {
            record: image.record.clone(),
            copies: image
                .copies
                .iter()
                .map(|(disk, copy)| copy_status(image, disk, copy))
                .collect(),
            attachments: self.readers_of(&image.record.name).disks().count(),
            exported: matches!(image.export, Export::Open(_) | Export::Streaming(_)),
        }
    }

    fn attachment_status(&self, attachment: &Attachment) -> AttachmentStatus {
        let record = &attachment.record;
        let (state, message) = self.attachment_state(record);
        AttachmentStatus { record: attachment.record.clone(), state, message }
    }
}

fn copy_status(image: &Image, disk: &DiskUuid, copy: &Copy) -> CopyStatus {
    CopyStatus {
        disk: disk.clone(),
        worker: copy.worker_name.clone(),
        state: copy.state,
        progress: copy.progress.clone(),
        info: copy.info.clone(),
        refused: copy.refused,
        message: copy.message.clone(),
        unused_since_unix_s: image.record.disks.get(disk).and_then(|d| d.unused_since_unix_s),
        scrubbing: copy.scrubbing || copy.scrub_wanted,
        scrubbed_bytes: copy.scrubbing.then_some(copy.scrubbed_bytes),
        scrub: image.record.disks.get(disk).and_then(|d| d.scrub.clone()),
    }
}
