//! Why the manager refuses a command.

use crate::catalog::CatalogError;
use crate::names::{ClassName, DiskUuid, ImageName, VolumeName};

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
    /// Credentials of the image would go another way.
    #[error(
        "image {name}: exists, and its mirrors or checksum_url hold credentials that another proxy or CA \
         would see; give them too, as they are"
    )]
    OtherWay { name: ImageName },
    /// The trace was recorded on another image.
    #[error(
        "image {name}: its {kind} is {found}, and the trace was recorded on an image with {given}"
    )]
    OtherTrace { name: ImageName, kind: &'static str, found: String, given: String },
    /// The image is in use.
    #[error("image {name}: in use (attachments: {attachments}, open sessions: {sessions})")]
    InUse { name: ImageName, attachments: usize, sessions: usize },
    /// Other images stand on it.
    #[error("image {name}: other images stand on it: {}", list(overlays))]
    IsABase { name: ImageName, overlays: Vec<ImageName> },
    /// Clones of it have not been made yet.
    #[error("image {name}: clones of it have no complete copy yet: {}", list(clones))]
    HasClones { name: ImageName, clones: Vec<ImageName> },
    /// What is to be cloned is a clone that has never been complete.
    #[error("image {image}: cannot be cloned before it is complete, as it is a clone itself")]
    NothingToClone { image: ImageName },
    /// Too many images would stand on each other.
    #[error("image {name}: at most {most} images may stand on each other")]
    TooManyBases { name: ImageName, most: usize },
    /// What is to be a data file stands on something itself.
    #[error("image {name}: {data} cannot be its data file: it has a base or a data file itself")]
    NoDataFile { name: ImageName, data: ImageName },
    /// No such copy.
    #[error("image {name}: has no copy on disk {disk}")]
    NoSuchCopy { name: ImageName, disk: DiskUuid },
    /// No copy is complete.
    #[error("image {name}: no copy is complete")]
    NoCompleteCopy { name: ImageName },
    /// A copy is in use.
    #[error("image {name}: the copy on disk {disk} stays: {why}")]
    CopyInUse { name: ImageName, disk: DiskUuid, why: &'static str },
    /// Too few copies would be left.
    #[error("image {name}: the copy on disk {disk} stays: at least {least} must be left")]
    TooFewCopies { name: ImageName, disk: DiskUuid, least: u32 },
    /// Volumes stand on the image.
    #[error("image {name}: volumes stand on it: {}", list(volumes))]
    HasVolumes { name: ImageName, volumes: Vec<VolumeName> },
    /// No such volume.
    #[error("volume {name}: not found")]
    NoSuchVolume { name: VolumeName },
    /// The name is taken by another volume.
    #[error("volume {name}: exists, and its {what} is {found}, not {given}")]
    OtherVolume { name: VolumeName, what: &'static str, found: String, given: String },
    /// The volume would be smaller than its image.
    #[error("volume {name}: {size_bytes} bytes, and its image {image} has {need_bytes}")]
    VolumeTooSmall { name: VolumeName, image: ImageName, size_bytes: u64, need_bytes: u64 },
    /// The volume is in use.
    #[error("volume {name}: attached")]
    VolumeAttached { name: VolumeName },
    /// The image of a volume is not known, and no source is given (rule 13).
    #[error("image {image}: not found, and no URL is given to make it from")]
    NoImageForVolume { image: ImageName },
    /// The number of replicas does not fit.
    #[error(
        "{replicas} replicas on {disks} named disks; give 1 to 64 replicas, and as many disks or none"
    )]
    BadReplicas { replicas: u32, disks: u32 },
    /// A disk is named twice.
    #[error("disk {disk}: named twice; each replica has a disk of its own")]
    DiskTwice { disk: DiskUuid },
    /// The image has other bytes than the one that the backup was made on (rule 14).
    #[error(
        "image {image}: its SHA-512 is {found}, the backup was made on an image with {recorded}"
    )]
    OtherBackupImage { image: ImageName, found: String, recorded: String },
    /// Nobody knows whether the image is the one that the backup was made on (rule 14).
    #[error(
        "image {image}: its SHA-512 was never made; the backup was made on an image with {recorded}"
    )]
    UnprovenBackupImage { image: ImageName, recorded: String },
    /// No such storage class.
    #[error("storage class {name}: not found")]
    NoSuchClass { name: ClassName },
    /// The image is being deleted.
    #[error("image {name}: being deleted")]
    BeingDeleted { name: ImageName },
    /// The disk lacks a tag that the image wants.
    #[error("image {name}: may not be on disk {disk}: {why}")]
    NotSelected { name: ImageName, disk: DiskUuid, why: String },
    /// No disk has the tags that the image wants.
    #[error("image {name}: no disk has the tags that it wants: {tags}")]
    NoDiskSelected { name: ImageName, tags: String },
    /// No disk can take a copy.
    #[error("image {name}: no healthy disk has room for {need_bytes} bytes")]
    NoRoom { name: ImageName, need_bytes: u64 },
    /// The reader's label is too long or has control characters.
    #[error("reader label has {len_bytes} bytes; give at most 128, without control characters")]
    BadReader { len_bytes: usize },
    /// The priority is out of its range.
    #[error("priority {priority} is not usable; give -100 to 100")]
    BadPriority { priority: i32 },
    /// A setting has no such value.
    #[error("{key}: {value} is not usable; {rule}")]
    BadSetting { key: &'static str, value: i64, rule: String },
    /// A user has closed the disk to new copies.
    #[error("disk {disk}: takes no new copies (it is closed, or being emptied)")]
    DiskClosed { disk: DiskUuid },
    /// The disk can't be let go.
    #[error("disk {disk}: stays: {why}")]
    DiskInUse { disk: DiskUuid, why: String },
    /// The disk could not be opened.
    #[error("{message}")]
    DiskRefused { message: String },
    /// The catalog could not store the change.
    #[error("cannot store the change; nothing was done")]
    Catalog(#[from] CatalogError),
    /// The daemon is shutting down.
    #[error("the daemon is shutting down")]
    Stopping,
}

fn list<T: ToString>(names: &[T]) -> String {
    names.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}
