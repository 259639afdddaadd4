//! What the world looks like to somebody who asks.
//!
//! Why: answers and events show copies of facts, never the world itself.
//! How: plain values, made on request by the driver's task.
//! Never: a wire format; `control` makes one of these, and redacts what must be.
//! Start at [`ImageStatus`].

use super::backend::{CopyId, CopyInfo, Progress};
use super::records::{AttachmentId, AttachmentRecord, ImageRecord};
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
}

/// One image, as it is now. Its `Debug` shows the source redacted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImageStatus {
    /// Its record.
    pub record: ImageRecord,
    /// Its copies, by disk.
    pub copies: Vec<CopyStatus>,
    /// How many readers hold it.
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

    /// A complete copy of an image, and whether it stands on another: `None` if there is no such
    /// image, `Some(None)` if it has none.
    #[must_use]
    pub fn sealed_copy(&self, name: &ImageName) -> Option<Option<(CopyId, bool)>> {
        let image = self.images.get(name)?;
        let sealed = image.copies.iter().find(|(_, copy)| copy.state.is_sealed());
        let has_base = image.record.base.is_some();
        Some(sealed.map(|(disk, _)| (image.copy_id(disk), has_base)))
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
            attachments: self.attachments_of(&image.record.name).count(),
            exported: matches!(image.export, Export::Open(_)),
        }
    }

    fn attachment_status(&self, attachment: &Attachment) -> AttachmentStatus {
        let (state, message) = self.attachment_state(&attachment.record);
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
    }
}
