//! The manager's front: a handle that commands, questions and watchers go through.
//!
//! Why: one task owns the world, so there are no locks, and one order for all that happens.
//! How: each call is a message with a place for the answer; the task is in `perform.rs`.
//! Never: waits for a transfer.
//! Start at [`Manager::start`].

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{broadcast, mpsc, oneshot};

use super::backend::{Backend, BackendError, Link};
use super::command::{Applied, Command, NewAttachment, NewImage};
use super::disks::{DiskChange, DiskView};
use super::error::ManagerError;
use super::perform::Driver;
use super::records::{AttachmentId, ClassRecord};
use super::settings::{Settings, SettingsChange};
use super::status::{AttachmentStatus, ImageStatus, VolumeStatus};
use super::steer::SteeringChange;
use super::volume::NewVolume;
use super::world::{Change, World};
use crate::catalog::{Catalog, CatalogError};
use crate::image::Trace;
use crate::names::{ClassName, DiskUuid, ImageName, VolumeName};

/// Commands that may wait; more senders wait in line.
const COMMANDS: usize = 64;

/// Opens ready copies for readers, under the image's name.
pub trait Exporter: Send + Sync + 'static {
    /// Opens the first copy of `chain` as its image's export; the others are those that it stands
    /// on, from the top down. Blocks.
    ///
    /// # Errors
    /// [`BackendError`] if its view can't be opened.
    fn publish(&self, chain: &[Link]) -> Result<(), BackendError>;

    /// As [`publish`](Self::publish), for a copy that is still arriving; what is in `prefetch` is
    /// asked for ahead. Blocks until its first bytes are here.
    ///
    /// # Errors
    /// [`BackendError`] if it can't be read before it is complete.
    fn stream(&self, chain: &[Link], prefetch: Option<Arc<Trace>>) -> Result<(), BackendError>;

    /// True if the readers of the image's export have lost what they read. Quick.
    fn is_lost(&self, image: &ImageName) -> bool;

    /// Closes the image's export and its sessions. Quick.
    fn withdraw(&self, image: &ImageName);

    /// The image is no more: what was kept of its readers goes. Quick.
    fn forget(&self, _image: &ImageName) {}

    /// Sessions that are open on the image's export now.
    fn sessions(&self, image: &ImageName) -> usize;

    /// Makes the socket of an attachment that is a VM, if it is not there already. Quick.
    fn serve_vm(&self, id: &AttachmentId, image: &ImageName);

    /// Takes the socket of an attachment away, and its session, if there are any. Quick.
    fn leave_vm(&self, id: &AttachmentId);
}

/// What a change is about, as it is after the change.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Object {
    /// An image.
    Image(Box<ImageStatus>),
    /// An image that is no more.
    ImageGone(ImageName),
    /// An attachment.
    Attachment(AttachmentStatus),
    /// An attachment that is no more, and the image that it read.
    AttachmentGone(AttachmentId, ImageName),
    /// A volume.
    Volume(Box<VolumeStatus>),
    /// A volume that is no more, and the image that it stood on.
    VolumeGone(VolumeName, ImageName),
    /// Something about an image that somebody should look at.
    Warning(ImageName, String),
    /// The node: whether it counts as gone.
    Node(bool),
    /// What holds on this node.
    Settings(Box<Settings>),
    /// A disk.
    Disk(Box<DiskView>),
    /// A disk that is none of the node's any more.
    DiskGone(DiskUuid),
}

/// One change, as watchers are told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Told {
    /// Grows by one with each change since the daemon's start.
    pub id: u64,
    /// When, in seconds since 1970, UTC.
    pub at_unix_s: u64,
    /// What changed.
    pub change: Change,
    /// The thing itself.
    pub object: Object,
}

/// Everything as it is, and every change after that: nothing falls between.
#[derive(Debug)]
pub struct Subscription {
    /// Id of the last change that is in the snapshot.
    pub last_id: u64,
    /// All images.
    pub images: Vec<ImageStatus>,
    /// All attachments.
    pub attachments: Vec<AttachmentStatus>,
    /// All volumes.
    pub volumes: Vec<VolumeStatus>,
    /// The last changes that led there, but for progress: since the daemon's start, and not all.
    pub past: Vec<Arc<Told>>,
    /// What follows. A watcher that is too slow gets `Lagged`.
    pub changes: broadcast::Receiver<Arc<Told>>,
}

pub(super) enum Message {
    Command(Box<Command>, oneshot::Sender<Result<Answer, ManagerError>>),
    AddDisk(PathBuf, oneshot::Sender<Result<Answer, ManagerError>>),
    Read(Box<dyn FnOnce(&World) + Send>),
    Subscribe(oneshot::Sender<Subscription>),
    Stop(oneshot::Sender<()>),
}

pub(super) enum Answer {
    Image(Box<ImageStatus>, bool),
    Attachment(Box<AttachmentStatus>, bool),
    Volume(Box<VolumeStatus>, bool),
    Disk(Box<DiskView>, bool),
    Class(Applied),
    Done,
}

impl Answer {
    /// The answer of a command on an image. `Stopping` cannot be: each command has one kind of it.
    fn image(self) -> Result<(ImageStatus, bool), ManagerError> {
        match self {
            Self::Image(image, is_new) => Ok((*image, is_new)),
            Self::Attachment(..)
            | Self::Volume(..)
            | Self::Disk(..)
            | Self::Class(_)
            | Self::Done => Err(ManagerError::Stopping),
        }
    }

    fn volume(self) -> Result<(VolumeStatus, bool), ManagerError> {
        match self {
            Self::Volume(volume, is_new) => Ok((*volume, is_new)),
            Self::Attachment(..)
            | Self::Image(..)
            | Self::Disk(..)
            | Self::Class(_)
            | Self::Done => Err(ManagerError::Stopping),
        }
    }

    fn disk(self) -> Result<(DiskView, bool), ManagerError> {
        match self {
            Self::Disk(disk, is_new) => Ok((*disk, is_new)),
            Self::Attachment(..)
            | Self::Image(..)
            | Self::Volume(..)
            | Self::Class(_)
            | Self::Done => Err(ManagerError::Stopping),
        }
    }
}

/// A handle on the manager's task. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Manager {
    tx: mpsc::Sender<Message>,
}

impl Manager {
    /// Reads the records, scans the disks, and starts the task; due copies start at once. `settings`
    /// are those that the daemon is configured with; what was set before wins over them.
    ///
    /// # Errors
    /// [`CatalogError`] if the records can't be read or a found copy's record can't be stored.
    pub async fn start(
        catalog: Arc<dyn Catalog>,
        backend: Arc<dyn Backend>,
        exporter: Arc<dyn Exporter>,
        settings: Settings,
    ) -> Result<Self, CatalogError> {
        let (tx, commands) = mpsc::channel(COMMANDS);
        let (reports_tx, reports) = mpsc::unbounded_channel();
        let mut driver = Driver::new(catalog, backend, exporter, reports_tx);
        driver.restore(settings).await?;
        tokio::spawn(driver.run(commands, reports));
        Ok(Self { tx })
    }

    /// Knows an image; true if it is new.
    ///
    /// # Errors
    /// [`ManagerError`]; nothing was changed.
    pub async fn create(&self, new: NewImage) -> Result<(ImageStatus, bool), ManagerError> {
        self.command(Command::Create(new)).await?.image()
    }

    /// Brings an image in on a disk now.
    ///
    /// # Errors
    /// [`ManagerError`]; nothing was changed.
    pub async fn fetch(
        &self,
        name: ImageName,
        disk: Option<DiskUuid>,
    ) -> Result<ImageStatus, ManagerError> {
        self.command(Command::Fetch(name, disk)).await?.image().map(|(image, _)| image)
    }

    /// Steers the transfers of an image.
    ///
    /// # Errors
    /// [`ManagerError`]; nothing was changed.
    pub async fn steer(
        &self,
        name: ImageName,
        change: SteeringChange,
    ) -> Result<ImageStatus, ManagerError> {
        self.command(Command::Steer(name, change)).await?.image().map(|(image, _)| image)
    }

    /// Keeps with an image what its readers will ask for first, or nothing any more.
    ///
    /// # Errors
    /// [`ManagerError::OtherTrace`] if it is another image's; nothing was changed.
    pub async fn set_prefetch(
        &self,
        name: ImageName,
        trace: Option<Arc<Trace>>,
    ) -> Result<ImageStatus, ManagerError> {
        let command = Command::SetPrefetch(name, trace);
        self.command(command).await?.image().map(|(image, _)| image)
    }

    /// Stops the unfinished transfers of an image and removes what has arrived of them.
    ///
    /// # Errors
    /// [`ManagerError::InUse`] while somebody waits for one of them; others if it can't be found.
    pub async fn cancel(&self, name: ImageName) -> Result<ImageStatus, ManagerError> {
        self.command(Command::Cancel(name)).await?.image().map(|(image, _)| image)
    }

    /// Removes an image's copies on these disks, all of them or none.
    ///
    /// # Errors
    /// [`ManagerError`] with the first disk whose copy has to stay, and why; nothing was changed.
    pub async fn clean_up(
        &self,
        name: ImageName,
        disks: Vec<DiskUuid>,
    ) -> Result<ImageStatus, ManagerError> {
        self.command(Command::CleanUp(name, disks)).await?.image().map(|(image, _)| image)
    }

    /// Reads complete copies of an image against their digests: the one on `disk`, or all.
    ///
    /// # Errors
    /// [`ManagerError`]; nothing was changed.
    pub async fn scrub(
        &self,
        name: ImageName,
        disk: Option<DiskUuid>,
    ) -> Result<ImageStatus, ManagerError> {
        self.command(Command::Scrub(name, disk)).await?.image().map(|(image, _)| image)
    }

    /// A drill: the node counts as gone, or is back.
    ///
    /// # Errors
    /// [`ManagerError::Stopping`].
    pub async fn set_node_failed(&self, failed: bool) -> Result<(), ManagerError> {
        let command = if failed { Command::FailNode } else { Command::ReturnNode };
        self.command(command).await.map(|_| ())
    }

    /// Changes what holds on this node: all of it, or nothing. Gives what holds then.
    ///
    /// # Errors
    /// [`ManagerError::BadSetting`]; others if it can't be stored. Nothing was changed.
    pub async fn change_settings(&self, change: SettingsChange) -> Result<Settings, ManagerError> {
        self.command(Command::ChangeSettings(change)).await?;
        self.read(|world| world.settings().clone()).await
    }

    /// Begins to delete an image. `None` if it is gone already.
    ///
    /// # Errors
    /// [`ManagerError::InUse`] while anybody reads it; others if it can't be found or stored.
    pub async fn delete(&self, name: ImageName) -> Result<Option<ImageStatus>, ManagerError> {
        match self.command(Command::Delete { name, sessions: 0 }).await? {
            Answer::Done => Ok(None),
            answer @ (Answer::Image(..)
            | Answer::Attachment(..)
            | Answer::Volume(..)
            | Answer::Disk(..)
            | Answer::Class(_)) => answer.image().map(|(image, _)| Some(image)),
        }
    }

    /// Reads an image; true if the attachment is new.
    ///
    /// # Errors
    /// [`ManagerError`]; nothing was changed.
    pub async fn attach(
        &self,
        new: NewAttachment,
    ) -> Result<(AttachmentStatus, bool), ManagerError> {
        match self.command(Command::Attach(new)).await? {
            Answer::Attachment(attachment, is_new) => Ok((*attachment, is_new)),
            Answer::Image(..)
            | Answer::Volume(..)
            | Answer::Disk(..)
            | Answer::Class(_)
            | Answer::Done => Err(ManagerError::Stopping),
        }
    }

    /// Reads an image no more.
    ///
    /// # Errors
    /// [`ManagerError`]; nothing was changed.
    pub async fn detach(&self, id: AttachmentId) -> Result<(), ManagerError> {
        self.command(Command::Detach(id)).await.map(|_| ())
    }

    /// Knows a volume, and its image if it may be made; true if the volume is new.
    ///
    /// # Errors
    /// [`ManagerError`]; nothing was changed.
    pub async fn create_volume(
        &self,
        new: NewVolume,
    ) -> Result<(VolumeStatus, bool), ManagerError> {
        self.command(Command::CreateVolume(Box::new(new))).await?.volume()
    }

    /// Attaches a volume, or detaches it.
    ///
    /// # Errors
    /// [`ManagerError`]; nothing was changed.
    pub async fn set_attached(
        &self,
        name: VolumeName,
        attached: bool,
    ) -> Result<VolumeStatus, ManagerError> {
        let command =
            if attached { Command::AttachVolume(name) } else { Command::DetachVolume(name) };
        self.command(command).await?.volume().map(|(volume, _)| volume)
    }

    /// Forgets a volume.
    ///
    /// # Errors
    /// [`ManagerError::VolumeAttached`] while it is; others if it can't be found or stored.
    pub async fn delete_volume(&self, name: VolumeName) -> Result<(), ManagerError> {
        self.command(Command::DeleteVolume(name)).await.map(|_| ())
    }

    /// Knows a storage class, or knows it better.
    ///
    /// # Errors
    /// [`ManagerError`] if it can't be stored.
    pub async fn put_class(&self, record: ClassRecord) -> Result<Applied, ManagerError> {
        match self.command(Command::PutClass(Box::new(record))).await? {
            Answer::Class(applied) => Ok(applied),
            Answer::Image(..)
            | Answer::Attachment(..)
            | Answer::Volume(..)
            | Answer::Disk(..)
            | Answer::Done => Err(ManagerError::Stopping),
        }
    }

    /// Makes the directory at `path` one of the node's disks; true if it was none before.
    ///
    /// # Errors
    /// [`ManagerError::DiskRefused`]; others if it can't be stored. Nothing was changed.
    pub async fn add_disk(&self, path: PathBuf) -> Result<(DiskView, bool), ManagerError> {
        let (tx, rx) = oneshot::channel();
        self.send(Message::AddDisk(path, tx)).await?;
        rx.await.map_err(|_| ManagerError::Stopping)??.disk()
    }

    /// Steers a disk.
    ///
    /// # Errors
    /// [`ManagerError`]; nothing was changed.
    pub async fn change_disk(
        &self,
        disk: DiskUuid,
        change: DiskChange,
    ) -> Result<DiskView, ManagerError> {
        self.command(Command::ChangeDisk(disk, change)).await?.disk().map(|(disk, _)| disk)
    }

    /// Lets go of a disk that holds nothing; with `force` also of one that is gone.
    ///
    /// # Errors
    /// [`ManagerError::DiskInUse`] with what is there; others if it can't be found or stored.
    pub async fn remove_disk(&self, disk: DiskUuid, force: bool) -> Result<(), ManagerError> {
        self.command(Command::RemoveDisk(disk, force)).await.map(|_| ())
    }

    /// Forgets a storage class.
    ///
    /// # Errors
    /// [`ManagerError`] if it can't be found or stored.
    pub async fn delete_class(&self, name: ClassName) -> Result<(), ManagerError> {
        self.command(Command::DeleteClass(name)).await.map(|_| ())
    }

    /// What `look` makes of the world, as it is between two changes.
    ///
    /// # Errors
    /// [`ManagerError::Stopping`].
    pub async fn read<T, F>(&self, look: F) -> Result<T, ManagerError>
    where
        T: Send + 'static,
        F: FnOnce(&World) -> T + Send + 'static,
    {
        let (tx, rx) = oneshot::channel();
        let look = Box::new(move |world: &World| drop(tx.send(look(world))));
        self.send(Message::Read(look)).await?;
        rx.await.map_err(|_| ManagerError::Stopping)
    }

    /// Returns once no complete copy is being opened for readers any more, or after `patience`.
    pub async fn settled(&self, patience: Duration) {
        let is_opening = async {
            while self.read(World::is_opening).await.unwrap_or(false) {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        if tokio::time::timeout(patience, is_opening).await.is_err() {
            tracing::warn!("not all images are open yet; readers are let in");
        }
    }

    /// Everything as it is, and every change after that.
    ///
    /// # Errors
    /// [`ManagerError::Stopping`].
    pub async fn subscribe(&self) -> Result<Subscription, ManagerError> {
        let (tx, rx) = oneshot::channel();
        self.send(Message::Subscribe(tx)).await?;
        rx.await.map_err(|_| ManagerError::Stopping)
    }

    /// Stops every worker, so that what is durable is kept, and ends the task. Later calls give
    /// [`ManagerError::Stopping`].
    pub async fn stop(&self) {
        let (tx, rx) = oneshot::channel();
        if self.send(Message::Stop(tx)).await.is_ok() {
            let _ended = rx.await;
        }
    }

    async fn command(&self, command: Command) -> Result<Answer, ManagerError> {
        let (tx, rx) = oneshot::channel();
        self.send(Message::Command(Box::new(command), tx)).await?;
        rx.await.map_err(|_| ManagerError::Stopping)?
    }

    async fn send(&self, message: Message) -> Result<(), ManagerError> {
        self.tx.send(message).await.map_err(|_| ManagerError::Stopping)
    }
}
