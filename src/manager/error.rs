//! Why the manager refuses a command.

use crate::catalog::CatalogError;
use crate::names::{DiskUuid, ImageName};

use super::records::AttachmentId;

/// Why the manager refuses a command: nothing was changed. The message prints every field.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "each field is named in the message above it")]
pub enum ManagerError {
    /// No such image.
    #[error("image {name}: not found")]
    NoSuchImage { name: ImageName },
    /// No such disk.
    #[error("disk {disk}: not found")]
    NoSuchDisk { disk: DiskUuid },
    /// No such attachment.
    #[error("attachment {id}: not found")]
    NoSuchAttachment { id: AttachmentId },
    /// The name is taken by an image of another source.
    #[error("image {name}: exists with another source, {source_text}")]
    OtherSource { name: ImageName, source_text: String },
    /// The image exists and differs in what is expected of it.
    #[error("image {name}: exists, and its {what} is {found}, not {given}")]
    OtherExpectation { name: ImageName, what: &'static str, found: String, given: String },
    /// The image is in use.
    #[error("image {name}: in use (attachments: {attachments}, open NBD sessions: {sessions})")]
    InUse { name: ImageName, attachments: usize, sessions: usize },
    /// Other images stand on it.
    #[error("image {name}: other images stand on it: {}", list(overlays))]
    IsABase { name: ImageName, overlays: Vec<ImageName> },
    /// Too many images would stand on each other.
    #[error("image {name}: at most {most} images may stand on each other")]
    TooManyBases { name: ImageName, most: usize },
    /// No such copy.
    #[error("image {name}: has no copy on disk {disk}")]
    NoSuchCopy { name: ImageName, disk: DiskUuid },
    /// A copy is in use.
    #[error("image {name}: the copy on disk {disk} stays: {why}")]
    CopyInUse { name: ImageName, disk: DiskUuid, why: &'static str },
    /// Too few copies would be left.
    #[error("image {name}: the copy on disk {disk} stays: at least {least} must be left")]
    TooFewCopies { name: ImageName, disk: DiskUuid, least: u32 },
    /// The image is being deleted.
    #[error("image {name}: being deleted")]
    BeingDeleted { name: ImageName },
    /// No disk can take a copy.
    #[error("image {name}: no healthy disk has room for {need_bytes} bytes")]
    NoRoom { name: ImageName, need_bytes: u64 },
    /// The reader's label is too long or has control characters.
    #[error("reader label has {len_bytes} bytes; give at most 128, without control characters")]
    BadReader { len_bytes: usize },
    /// The priority is out of its range.
    #[error("priority {priority} is not usable; give -100 to 100")]
    BadPriority { priority: i32 },
    /// The catalog could not store the change.
    #[error("cannot store the change; nothing was done")]
    Catalog(#[from] CatalogError),
    /// The daemon is shutting down.
    #[error("the daemon is shutting down")]
    Stopping,
}

fn list(names: &[ImageName]) -> String {
    let names: Vec<&str> = names.iter().map(ImageName::as_str).collect();
    names.join(", ")
}
