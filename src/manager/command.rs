//! Commands: what users ask for, judged before anything changes.
//!
//! Why: a refused command must leave no trace, and an accepted one must be the same when repeated.
//! How: each command checks, changes facts, and lets the reconciling pass find the actions.
//! Never: starts a transfer for a mere `create` (rule 1).
//! Start at [`World::command`].

use std::sync::Arc;
use std::time::Duration;

use super::backend::DiskStatus;
use super::disks::{DiskChange, OpenedDisk};
use super::error::ManagerError;
use super::records::{
    AttachmentId, AttachmentRecord, ClassRecord, Expected, ImageRecord, Steering, Want,
};
use super::replenish::room_on;
use super::same::same_image;
use super::selectors::Selectors;
use super::settings::SettingsChange;
use super::steer::SteeringChange;
use super::volume::NewVolume;
use super::world::{Action, Attachment, AttachmentState, Change, Image, Touched, Worker, World};
use crate::fetch::{Access, SourceUrl};
use crate::image::{Format, Trace};
use crate::import::Layout;
use crate::names::{ClassName, DiskUuid, ImageName, ImageUuid, VolumeName};

/// Longest label of a reader in bytes.
pub const READER_MAX_LEN: usize = 128;

/// An image as a user asks for it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewImage {
    /// Its name.
    pub name: ImageName,
    /// Used only if the image is new.
    pub uuid: ImageUuid,
    /// Where the bytes come from; `None` if they are uploaded.
    pub source: Option<SourceUrl>,
    /// How many bytes are uploaded; `None` if there is a source.
    pub upload_bytes: Option<u64>,
    /// The image that it is a clone of; no source then.
    pub clone_of: Option<ImageName>,
    /// What it takes to reach it.
    pub access: Box<Access>,
    /// Where the same bytes are too.
    pub mirrors: Vec<SourceUrl>,
    /// What a copy's bytes are to be.
    pub layout: Layout,
    /// The image that it stands on.
    pub base: Option<ImageName>,
    /// The image whose file is its external data file.
    pub data_file: Option<ImageName>,
    /// The internal snapshot that readers get, by ID or name.
    pub snapshot: Option<String>,
    /// Digests that the bytes must have.
    pub expected: Box<Expected>,
    /// Format, if the user says it.
    pub declared_format: Option<Format>,
    /// Copies that it is to have, and that stay although nobody uses them; 0 counts as 1.
    pub min_copies: u32,
    /// On which disks it may be.
    pub selectors: Box<Selectors>,
    /// Disks on which to bring it in at once; usually none (rule 1).
    pub disks: Vec<DiskUuid>,
    /// Seconds since 1970, UTC.
    pub created_unix_s: u64,
}

/// A reader as a user asks for it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewAttachment {
    /// Used only if the attachment is new.
    pub id: AttachmentId,
    /// The image to read.
    pub image: ImageName,
    /// The disk whose copy to read; `None` = one that has it, else one with room.
    pub disk: Option<DiskUuid>,
    /// What the reader calls itself. With a label, the same image, disk and label are the same
    /// attachment; without one, each is new.
    pub reader: String,
    /// True if it does not wait until the copy is complete.
    pub stream: bool,
    /// True for a VM, which gets a socket of its own.
    pub vm: bool,
    /// Seconds since 1970, UTC.
    pub created_unix_s: u64,
}

/// What a user asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Command {
    /// Know an image.
    Create(NewImage),
    /// Bring it in on a disk now; `None` = one that has or wants it, else one with room.
    Fetch(ImageName, Option<DiskUuid>),
    /// Steer its transfers.
    Steer(ImageName, SteeringChange),
    /// Keep with it what its readers will ask for first, or nothing any more.
    SetPrefetch(ImageName, Option<Arc<Trace>>),
    /// Stop its unfinished transfers and remove what has arrived of them.
    Cancel(ImageName),
    /// Remove its copies on these disks, all of them or none.
    CleanUp(ImageName, Vec<DiskUuid>),
    /// A drill: the node counts as gone.
    FailNode,
    /// It is back.
    ReturnNode,
    /// Change what holds on this node: all of it, or nothing.
    ChangeSettings(SettingsChange),
    /// Read its complete copies against their digests: the one on a disk, or all.
    Scrub(ImageName, Option<DiskUuid>),
    /// Remove it and its copies.
    Delete {
        /// Which.
        name: ImageName,
        /// NBD sessions that are open on it now.
        sessions: usize,
    },
    /// Read it.
    Attach(NewAttachment),
    /// Read it no more.
    Detach(AttachmentId),
    /// Know a volume, and its image if it may be made.
    CreateVolume(Box<NewVolume>),
    /// Attach a volume: its replicas run as soon as their copies are ready.
    AttachVolume(VolumeName),
    /// Its replicas stop.
    DetachVolume(VolumeName),
    /// Forget a volume.
    DeleteVolume(VolumeName),
    /// Know a storage class, or know it better.
    PutClass(Box<ClassRecord>),
    /// A disk that was opened is one of the node's.
    AddDisk(Box<OpenedDisk>),
    /// Steer a disk.
    ChangeDisk(DiskUuid, DiskChange),
    /// Let go of a disk; with `true` also of one that is gone, with what it held.
    RemoveDisk(DiskUuid, bool),
    /// Forget a storage class; volumes that were made by it stay.
    DeleteClass(ClassName),
}

/// What an accepted command is about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// An image, and whether it is new.
    Image(ImageName, bool),
    /// An attachment, and whether it is new.
    Attachment(AttachmentId, bool),
    /// A volume, and whether it is new.
    Volume(VolumeName, bool),
    /// A storage class, and what became of it.
    Class(ClassName, Applied),
    /// A disk, and whether it is new.
    Disk(DiskUuid, bool),
    /// Nothing is left to show.
    Done,
}

/// What became of a record that was put.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Applied {
    /// It is new.
    Created,
    /// It was another before.
    Configured,
    /// It was so before.
    Unchanged,
}

impl World {
    /// Judges `command` and, if it is accepted, gives what it is about and what to do.
    ///
    /// # Errors
    /// [`ManagerError`]; the world is then as it was.
    pub fn command(
        &mut self,
        now: Duration,
        command: Command,
    ) -> Result<(Outcome, Vec<Action>), ManagerError> {
        let mut touched = Touched::default();
        let outcome = match command {
            Command::Create(new) => self.create(new, &mut touched)?,
            Command::Fetch(name, disk) => {
                self.usable(&name)?;
                let disk = self.choose_disk(&name, disk)?;
                self.want_chain(&name, &disk, &mut touched);
                Outcome::Image(name, false)
            }
            Command::Steer(name, change) => self.steer(name, change, &mut touched)?,
            Command::SetPrefetch(name, trace) => self.set_prefetch(name, trace, &mut touched)?,
            Command::Cancel(name) => self.cancel(name, &mut touched)?,
            Command::CleanUp(name, disks) => self.clean_up(name, &disks, &mut touched)?,
            Command::Scrub(name, disk) => self.ask_for_scrub(name, disk.as_ref(), &mut touched)?,
            Command::FailNode => self.fail_node(&mut touched),
            Command::ReturnNode => self.return_node(&mut touched),
            Command::ChangeSettings(change) => self.change_settings(&change, &mut touched)?,
            Command::Delete { name, sessions } => self.delete(name, sessions, &mut touched)?,
            Command::Attach(new) => self.attach(new, &mut touched)?,
            Command::Detach(id) => {
                let gone = self.attachments.remove(&id);
                let Some(gone) = gone else { return Err(ManagerError::NoSuchAttachment { id }) };
                touched.actions.push(Action::ForgetAttachment(id.clone()));
                let change = Change::AttachmentDeleted(id, gone.record.image.clone());
                touched.actions.push(Action::Announce(change));
                touched.images.insert(gone.record.image);
                Outcome::Done
            }
            Command::CreateVolume(new) => self.create_volume(*new, &mut touched)?,
            Command::AttachVolume(name) => self.attach_volume(name, &mut touched)?,
            Command::DetachVolume(name) => self.detach_volume(name, &mut touched)?,
            Command::DeleteVolume(name) => self.delete_volume(name, &mut touched)?,
            Command::PutClass(record) => self.put_class(*record, &mut touched),
            Command::AddDisk(opened) => self.add_disk(*opened, &mut touched),
            Command::ChangeDisk(disk, change) => self.change_disk(disk, change, &mut touched)?,
            Command::RemoveDisk(disk, force) => self.remove_disk(disk, force, &mut touched)?,
            Command::DeleteClass(name) => self.delete_class(name, &mut touched)?,
        };
        Ok((outcome, self.finish(now, touched)))
    }

    pub(super) fn usable(&self, name: &ImageName) -> Result<&Image, ManagerError> {
        match self.images.get(name) {
            None => Err(ManagerError::NoSuchImage { name: name.clone() }),
            Some(image) if image.record.deleting => {
                Err(ManagerError::BeingDeleted { name: name.clone() })
            }
            Some(image) => Ok(image),
        }
    }

    /// Rules 1 and 13.
    pub(super) fn create(
        &mut self,
        mut new: NewImage,
        touched: &mut Touched,
    ) -> Result<Outcome, ManagerError> {
        let name = new.name.clone();
        self.check_new_disks(&new)?;
        let is_new = !self.images.contains_key(&name);
        if is_new {
            let clone_of = self.inherit(&mut new)?;
            self.check_base(&name, new.base.as_ref())?;
            self.check_data_file(&name, new.data_file.as_ref())?;
            let record = ImageRecord {
                clone_of,
                name: new.name,
                uuid: new.uuid,
                source: new.source,
                upload_bytes: new.upload_bytes,
                access: new.access,
                mirrors: new.mirrors,
                layout: new.layout,
                base: new.base,
                data_file: new.data_file,
                snapshot: new.snapshot,
                steering: Steering::default(),
                expected: new.expected,
                declared_format: new.declared_format,
                prefetch: None,
                facts: None,
                disks: std::collections::BTreeMap::new(),
                min_copies: new.min_copies,
                selectors: *new.selectors,
                deleting: false,
                created_unix_s: new.created_unix_s,
            };
            touched.actions.push(Action::SaveImage(Box::new(record.clone())));
            touched.actions.push(Action::Announce(Change::ImageCreated(name.clone())));
            self.images.insert(name.clone(), Image::new(record));
        } else {
            same_image(&self.usable(&name)?.record, &new)?;
            self.expect_more(&name, *new.expected, new.declared_format, touched);
            self.renew_access(&name, new.access, touched);
        }
        for disk in &new.disks {
            self.want_chain(&name, disk, touched);
        }
        Ok(Outcome::Image(name, is_new))
    }

    /// Takes over expectations that the record lacks; only before the first copy is wanted.
    fn expect_more(
        &mut self,
        name: &ImageName,
        expected: Expected,
        declared: Option<Format>,
        touched: &mut Touched,
    ) {
        let Some(image) = self.images.get_mut(name) else { return };
        let is_new = image.record.disks.is_empty();
        let record = &mut image.record;
        let before = record.clone();
        // Of a place that is known only the credentials can be others.
        if is_new || record.expected.checksum_url.is_some() {
            let known = record.expected.checksum_url.take();
            record.expected.checksum_url = expected.checksum_url.or(known);
        }
        if is_new {
            record.expected.digests.fill_from(&expected.digests);
            record.declared_format = record.declared_format.or(declared);
        }
        if *record != before {
            touched.actions.push(Action::SaveImage(Box::new(record.clone())));
            touched.images.insert(name.clone());
        }
    }

    /// Takes over credentials: those of an image change while its bytes stay the same. None given
    /// means that nothing is said of them.
    fn renew_access(&mut self, name: &ImageName, access: Box<Access>, touched: &mut Touched) {
        let Some(image) = self.images.get_mut(name) else { return };
        if access.is_empty() || image.record.access == access {
            return;
        }
        image.record.access = access;
        touched.actions.push(Action::SaveImage(Box::new(image.record.clone())));
        touched.images.insert(name.clone());
    }

    /// Rule 12.
    fn delete(
        &mut self,
        name: ImageName,
        sessions: usize,
        touched: &mut Touched,
    ) -> Result<Outcome, ManagerError> {
        let attachments = self.readers_of(&name).attachments.len();
        let overlays = self.overlays_of(&name).to_vec();
        let clones = self.pending_clones_of(&name);
        let volumes: Vec<_> = self.volumes_of(&name).map(|v| v.record.name.clone()).collect();
        let Some(image) = self.images.get_mut(&name) else {
            return Err(ManagerError::NoSuchImage { name });
        };
        if image.record.deleting {
            return Ok(Outcome::Image(name, false));
        }
        if !volumes.is_empty() {
            return Err(ManagerError::HasVolumes { name, volumes });
        }
        if attachments > 0 || sessions > 0 {
            return Err(ManagerError::InUse { name, attachments, sessions });
        }
        if !overlays.is_empty() {
            return Err(ManagerError::IsABase { name, overlays });
        }
        if !clones.is_empty() {
            return Err(ManagerError::HasClones { name, clones });
        }
        image.record.deleting = true;
        for copy in image.copies.values_mut() {
            copy.retry_at = None;
        }
        touched.actions.push(Action::SaveImage(Box::new(image.record.clone())));
        touched.images.insert(name.clone());
        Ok(Outcome::Image(name, false))
    }

    /// Rule 2.
    fn attach(
        &mut self,
        new: NewAttachment,
        touched: &mut Touched,
    ) -> Result<Outcome, ManagerError> {
        let len_bytes = new.reader.len();
        if len_bytes > READER_MAX_LEN || new.reader.chars().any(char::is_control) {
            return Err(ManagerError::BadReader { len_bytes });
        }
        self.usable(&new.image)?;
        let disk = self.choose_disk(&new.image, new.disk)?;
        let known = self.attachments_of(&new.image).find(|a| {
            let labels = (&a.record.reader, &a.record.disk, a.record.stream, a.record.vm);
            !new.reader.is_empty() && labels == (&new.reader, &disk, new.stream, new.vm)
        });
        let known = known.map(|a| a.record.id.clone());
        self.want_chain(&new.image, &disk, touched);
        if let Some(id) = known {
            return Ok(Outcome::Attachment(id, false));
        }
        let record = AttachmentRecord {
            id: new.id.clone(),
            image: new.image.clone(),
            disk,
            reader: new.reader,
            stream: new.stream,
            vm: new.vm,
            created_unix_s: new.created_unix_s,
        };
        touched.actions.push(Action::SaveAttachment(record.clone()));
        touched.actions.push(Action::Announce(Change::AttachmentCreated(new.id.clone())));
        touched.images.insert(new.image);
        let attachment = Attachment { record, announced: AttachmentState::Waiting };
        self.attachments.insert(new.id.clone(), attachment);
        Ok(Outcome::Attachment(new.id, true))
    }

    /// A copy is wanted on `disk`; a refused or waiting one is tried again now.
    pub(super) fn want(&mut self, name: &ImageName, disk: &DiskUuid, touched: &mut Touched) {
        let Some(image) = self.images.get_mut(name) else { return };
        let before = image.record.disks.get(disk).cloned();
        let copy = image.copy_on(disk);
        (copy.refused, copy.retry_at) = (false, None);
        copy.cancelled &= copy.worker != Worker::Idle || copy.removing;
        if copy.worker == Worker::Idle && !copy.state.is_sealed() {
            copy.failures = 0;
        }
        let scrub = before.as_ref().and_then(|want| want.scrub.clone());
        let want = Want { scrub, ..Want::default() };
        image.record.disks.insert(disk.clone(), want.clone());
        if before != Some(want) {
            touched.actions.push(Action::SaveImage(Box::new(image.record.clone())));
            touched.images.insert(name.clone());
        }
    }

    /// The named disk, else one with a sealed copy, else a wanted one, else the first with room: of an
    /// image whose length nobody knows, with at least half as much as the roomiest has.
    fn choose_disk(
        &self,
        name: &ImageName,
        disk: Option<DiskUuid>,
    ) -> Result<DiskUuid, ManagerError> {
        if let Some(disk) = disk {
            self.check_disk_for(name, None, &disk)?;
            return Ok(disk);
        }
        let image = self.usable(name)?;
        let here = |uuid: &DiskUuid| self.disk(uuid).is_some_and(|d| d.healthy);
        let copies = image.copies.iter().filter(|(uuid, _)| here(uuid));
        // A disk that is being emptied is the last choice: who reads there keeps its copy there.
        let best = copies.min_by_key(|(_, copy)| (copy.evicting, !copy.state.is_sealed()));
        if let Some((uuid, _)) = best {
            return Ok(uuid.clone());
        }
        let is_open =
            |d: &&DiskStatus| d.healthy && self.is_open_to_copies(&d.uuid) && self.allows(name, d);
        let known = self.facts_of(image).map(|facts| facts.size_bytes);
        let need_bytes = known.or(image.record.upload_bytes).unwrap_or_else(|| {
            self.disks.iter().filter(is_open).map(room_on).max().unwrap_or(0) / 2
        });
        let room = |d: &&DiskStatus| is_open(d) && room_on(d) > need_bytes;
        if let Some(disk) = self.disk_of_origin(image, room) {
            return Ok(disk);
        }
        match self.disks.iter().find(room) {
            Some(disk) => Ok(disk.uuid.clone()),
            None => Err(self.no_disk_for(name, need_bytes)),
        }
    }
}
