//! Volumes: an image, and the disks on which replicas of the volume stand on copies of it.
//!
//! Why: whoever runs replicas thinks of a volume, not of copies: its first attach brings the image
//! in on the disks of its replicas (rules 1 and 2), and while it is attached, these copies stay.
//! How: a volume is one record. That it is attached is in it, and each of its replicas is then a
//! reader of its image on its disk (`World::readers_of`), as an attachment is; so all rules that
//! ask for readers know of both, and there is no second record that a crash could leave behind.
//! Never: fetches for a volume that is not attached, or keeps what a guest writes.
//! Start at [`World::create_volume`].

use super::backend::DiskStatus;
use super::command::{NewImage, Outcome};
use super::error::ManagerError;
use super::records::{BackupRecord, ImageRecord, VolumeRecord};
use super::status::{ReplicaStatus, VolumeStatus};
use super::world::{Action, AttachmentState, Change, CopyState, Touched, World};
use crate::disk::DigestKind;
use crate::names::{ClassName, DiskUuid, ImageName, VolumeName};

/// Most replicas of a volume.
pub const MAX_REPLICAS: u32 = 64;

/// A volume as a user asks for it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewVolume {
    /// Its name.
    pub name: VolumeName,
    /// The image that it stands on.
    pub image: ImageName,
    /// That image, if it may be made: with its name, and a source (rule 13).
    pub new_image: Option<Box<NewImage>>,
    /// The SHA-512 that the image's file has to have, lower-case hex.
    pub sha512: Option<String>,
    /// The disks of its replicas; empty: healthy ones with most room.
    pub disks: Vec<DiskUuid>,
    /// How many replicas; `None`: as many as there are `disks`, or one.
    pub replicas: Option<u32>,
    /// Size in bytes; `None`: the image's.
    pub size_bytes: Option<u64>,
    /// The backup that it is restored from.
    pub backup: Option<BackupRecord>,
    /// The storage class that it is made by.
    pub class: Option<ClassName>,
    /// The claim that it is made for, `namespace/name`.
    pub claim: Option<String>,
    /// Seconds since 1970, UTC.
    pub created_unix_s: u64,
}

/// State of a volume, in Longhorn's words.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VolumeState {
    /// Nobody uses it.
    Detached,
    /// It is wanted, and no replica runs yet.
    Attaching,
    /// A replica runs.
    Attached,
}

impl VolumeState {
    /// The word for people and for the wire.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Detached => "detached",
            Self::Attaching => "attaching",
            Self::Attached => "attached",
        }
    }
}

/// State of a replica.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReplicaState {
    /// Its volume is not attached.
    Stopped,
    /// It waits for the copy on its disk.
    Waiting,
    /// The copy on its disk can be read.
    Running,
    /// The copy on its disk was refused for good.
    Failed,
}

impl ReplicaState {
    /// The word for people and for the wire.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Stopped => "stopped",
            Self::Waiting => "waiting",
            Self::Running => "running",
            Self::Failed => "failed",
        }
    }
}

#[derive(Clone, Debug)]
pub(super) struct Volume {
    pub(super) record: VolumeRecord,
    /// What watchers were told last of its replicas.
    pub(super) announced: Vec<ReplicaState>,
}

impl World {
    /// The volumes that stand on `name`, attached or not.
    pub(super) fn volumes_of<'a>(
        &'a self,
        name: &'a ImageName,
    ) -> impl Iterator<Item = &'a Volume> {
        self.volumes.values().filter(move |volume| &volume.record.image == name)
    }

    /// Rules 13 and 14. Everything is judged before anything changes.
    pub(super) fn create_volume(
        &mut self,
        mut new: NewVolume,
        touched: &mut Touched,
    ) -> Result<Outcome, ManagerError> {
        if let Some(known) = self.volumes.get(&new.name) {
            same_volume(&known.record, &new)?;
            return Ok(Outcome::Volume(new.name, false));
        }
        let image = match self.images.get(&new.image) {
            Some(_) => Some(&self.usable(&new.image)?.record),
            None if new.new_image.is_none() => {
                return Err(ManagerError::NoImageForVolume { image: new.image });
            }
            None => None,
        };
        let virtual_bytes =
            image.and_then(|record| Some(record.facts.as_ref()?.guest_size_bytes()));
        if let (Some(size_bytes), Some(need_bytes)) = (new.size_bytes, virtual_bytes)
            && size_bytes < need_bytes
        {
            let (name, image) = (new.name, new.image);
            return Err(ManagerError::VolumeTooSmall { name, image, size_bytes, need_bytes });
        }
        let disks = self.replica_disks(&new)?;
        let sha512 = match (&mut new.backup, &new.sha512) {
            (Some(backup), _) => judge_backup(&new.image, image, new.new_image.as_deref(), backup)?,
            (None, Some(sha512)) => judge_class(image, sha512)?,
            (None, None) => None,
        };
        if let Some(mut wanted) = new.new_image.take() {
            wanted.name.clone_from(&new.image);
            if let (Some(sha512), None) = (&sha512, wanted.expected.digests.get(DigestKind::Sha512))
            {
                wanted.expected.digests.set(DigestKind::Sha512, sha512.clone());
            }
            self.create(*wanted, touched)?;
        } else if let Some(sha512) = sha512 {
            self.expect_sha512(&new.image, sha512, touched);
        }
        let count = u32::try_from(disks.len()).unwrap_or(MAX_REPLICAS);
        let record = VolumeRecord {
            name: new.name.clone(),
            image: new.image,
            disks,
            replicas: new.replicas.unwrap_or(count),
            size_bytes: new.size_bytes,
            backup: new.backup,
            class: new.class,
            claim: new.claim,
            attached: false,
            created_unix_s: new.created_unix_s,
        };
        touched.actions.push(Action::SaveVolume(Box::new(record.clone())));
        touched.actions.push(Action::Announce(Change::VolumeCreated(new.name.clone())));
        let announced = vec![ReplicaState::Stopped; record.disks.len()];
        self.volumes.insert(new.name.clone(), Volume { record, announced });
        Ok(Outcome::Volume(new.name, true))
    }

    /// The disks that were named, else healthy ones with most room: as many as replicas were asked
    /// for, or as there are.
    fn replica_disks(&self, new: &NewVolume) -> Result<Vec<DiskUuid>, ManagerError> {
        let count = new.replicas.or(u32::try_from(new.disks.len()).ok()).unwrap_or(1).max(1);
        let named = u32::try_from(new.disks.len()).unwrap_or(u32::MAX);
        if count > MAX_REPLICAS || (named > 0 && named != count) {
            return Err(ManagerError::BadReplicas { replicas: count, disks: named });
        }
        if named > 0 {
            for (index, disk) in new.disks.iter().enumerate() {
                self.check_disk_for(&new.image, new.new_image.as_deref(), disk)?;
                if new.disks.iter().take(index).any(|other| other == disk) {
                    return Err(ManagerError::DiskTwice { disk: disk.clone() });
                }
            }
            return Ok(new.disks.clone());
        }
        let facts = self.images.get(&new.image).and_then(|image| image.record.facts.as_ref());
        let need_bytes = facts.map_or(0, |facts| facts.size_bytes);
        let here = |disk: &DiskUuid| {
            let image = self.images.get(&new.image);
            image.and_then(|i| i.copies.get(disk)).is_some_and(|copy| copy.state.is_sealed())
        };
        let wanted = new.new_image.as_ref().filter(|_| !self.images.contains_key(&new.image));
        let may_be_on = |disk: &DiskStatus| match wanted {
            _ if !self.is_open_to_copies(&disk.uuid) => false,
            Some(image) => self.selects(&image.selectors, disk),
            None => self.allows(&new.image, disk),
        };
        let mut fit: Vec<(u64, &DiskUuid)> = self
            .disks
            .iter()
            .filter(|disk| disk.healthy && (may_be_on(disk) || here(&disk.uuid)))
            .map(|disk| (disk.free_bytes.saturating_sub(disk.reserved_bytes), &disk.uuid))
            .filter(|(free, uuid)| *free > need_bytes || here(uuid))
            .collect();
        fit.sort_by_key(|(free, _)| std::cmp::Reverse(*free));
        if fit.is_empty() {
            let selects = |i: &&NewImage| self.disks.iter().any(|d| self.selects(&i.selectors, d));
            let unmet = wanted.map(|image| &**image).filter(|image| !selects(image));
            return Err(match unmet {
                Some(image) => ManagerError::NoDiskSelected {
                    name: new.image.clone(),
                    tags: image.selectors.said(),
                },
                None => self.no_disk_for(&new.image, need_bytes),
            });
        }
        let count = usize::try_from(count).unwrap_or(usize::MAX);
        Ok(fit.into_iter().take(count).map(|(_, uuid)| uuid.clone()).collect())
    }

    /// Every copy that comes has to have this digest; only before the first is wanted.
    fn expect_sha512(&mut self, name: &ImageName, sha512: String, touched: &mut Touched) {
        let Some(image) = self.images.get_mut(name) else { return };
        image.record.expected.digests.set(DigestKind::Sha512, sha512);
        touched.actions.push(Action::SaveImage(Box::new(image.record.clone())));
        touched.images.insert(name.clone());
    }

    /// Rule 2: copies are wanted on the disks of its replicas; refused ones are tried again.
    pub(super) fn attach_volume(
        &mut self,
        name: VolumeName,
        touched: &mut Touched,
    ) -> Result<Outcome, ManagerError> {
        let record = self.volume_record(&name)?.clone();
        self.usable(&record.image)?;
        for disk in &record.disks {
            self.want_chain(&record.image, disk, touched);
        }
        self.set_attached(&name, true, touched);
        Ok(Outcome::Volume(name, false))
    }

    /// Its copies are kept by nobody from now on; they stay until they are cleaned up.
    pub(super) fn detach_volume(
        &mut self,
        name: VolumeName,
        touched: &mut Touched,
    ) -> Result<Outcome, ManagerError> {
        self.volume_record(&name)?;
        self.set_attached(&name, false, touched);
        Ok(Outcome::Volume(name, false))
    }

    pub(super) fn delete_volume(
        &mut self,
        name: VolumeName,
        touched: &mut Touched,
    ) -> Result<Outcome, ManagerError> {
        if self.volume_record(&name)?.attached {
            return Err(ManagerError::VolumeAttached { name });
        }
        if let Some(gone) = self.volumes.remove(&name) {
            let image = gone.record.image;
            touched.actions.push(Action::ForgetVolume(name.clone()));
            touched.actions.push(Action::Announce(Change::VolumeDeleted(name, image)));
        }
        Ok(Outcome::Done)
    }

    fn volume_record(&self, name: &VolumeName) -> Result<&VolumeRecord, ManagerError> {
        let volume = self.volumes.get(name).map(|volume| &volume.record);
        volume.ok_or_else(|| ManagerError::NoSuchVolume { name: name.clone() })
    }

    fn set_attached(&mut self, name: &VolumeName, attached: bool, touched: &mut Touched) {
        let Some(volume) = self.volumes.get_mut(name) else { return };
        if volume.record.attached != attached {
            volume.record.attached = attached;
            touched.actions.push(Action::SaveVolume(Box::new(volume.record.clone())));
            touched.images.insert(volume.record.image.clone());
        }
    }

    /// Copies that replicas of attached volumes read are wanted, whatever a crash between two
    /// records has left.
    pub(super) fn want_for_replicas(&mut self, touched: &mut Touched) {
        let attached = self.volumes.values().filter(|volume| volume.record.attached);
        let unwanted: Vec<(ImageName, DiskUuid)> = attached
            .flat_map(|volume| volume.record.disks.iter().map(|disk| (&volume.record.image, disk)))
            .filter(|(image, disk)| {
                let record = self.images.get(image).map(|image| &image.record);
                record.is_some_and(|r| !r.deleting && !r.disks.contains_key(disk))
            })
            .map(|(image, disk)| (image.clone(), disk.clone()))
            .collect();
        for (image, disk) in unwanted {
            self.want_chain(&image, &disk, touched);
        }
    }

    /// Tells watchers of the volumes whose replicas have changed.
    pub(super) fn announce_volumes(&mut self, actions: &mut Vec<Action>) {
        let now: Vec<(VolumeName, Vec<ReplicaState>)> = self
            .volumes
            .iter()
            .map(|(name, volume)| {
                let replicas = self.replicas_of(&volume.record);
                (name.clone(), replicas.iter().map(|replica| replica.state).collect())
            })
            .collect();
        for (name, states) in now {
            if let Some(volume) = self.volumes.get_mut(&name)
                && volume.announced != states
            {
                volume.announced = states;
                actions.push(Action::Announce(Change::VolumeUpdated(name)));
            }
        }
    }

    /// Every volume, by name.
    #[must_use]
    pub fn volumes(&self) -> Vec<VolumeStatus> {
        self.volumes.values().map(|volume| self.volume_status(&volume.record)).collect()
    }

    /// One volume.
    #[must_use]
    pub fn volume(&self, name: &VolumeName) -> Option<VolumeStatus> {
        self.volumes.get(name).map(|volume| self.volume_status(&volume.record))
    }

    fn volume_status(&self, record: &VolumeRecord) -> VolumeStatus {
        VolumeStatus { replicas: self.replicas_of(record), record: record.clone() }
    }

    fn replicas_of(&self, record: &VolumeRecord) -> Vec<ReplicaStatus> {
        record.disks.iter().map(|disk| self.replica_status(record, disk)).collect()
    }

    fn replica_status(&self, record: &VolumeRecord, disk: &DiskUuid) -> ReplicaStatus {
        let copy = self.images.get(&record.image).and_then(|image| image.copies.get(disk));
        let (state, message) = match self.reader_state(&record.image, disk) {
            _ if !record.attached => (ReplicaState::Stopped, String::new()),
            (AttachmentState::Ready, _) => (ReplicaState::Running, String::new()),
            (AttachmentState::Failed, why) => (ReplicaState::Failed, why),
            (AttachmentState::Waiting, why) => (ReplicaState::Waiting, why),
        };
        let info = copy.filter(|copy| copy.state == CopyState::Ready);
        let info = info.filter(|_| state == ReplicaState::Running).and_then(|c| c.info.as_ref());
        let copy_state = copy.map_or(CopyState::Pending, |copy| copy.state);
        ReplicaStatus {
            name: format!("{}-r-{}", record.name, disk.first8()),
            disk: disk.clone(),
            state,
            copy_state,
            message,
            path: info.map(|info| info.path.clone()),
        }
    }
}

/// The SHA-512 that is known of an image's file: expected, or computed.
fn known_sha512(record: &ImageRecord) -> Option<&str> {
    let computed = record.facts.as_ref().and_then(|f| f.digests.get(DigestKind::Sha512));
    record.expected.digests.get(DigestKind::Sha512).or(computed)
}

/// Rule 14: the image is the one that the backup was made on, or the user says that it is right.
/// Gives the digest that the image's copies have to have from now on, if it can be demanded.
fn judge_backup(
    image: &ImageName,
    known: Option<&ImageRecord>,
    wanted: Option<&NewImage>,
    backup: &mut BackupRecord,
) -> Result<Option<String>, ManagerError> {
    let Some(recorded) = backup.sha512.clone() else { return Ok(None) };
    let (found, is_fetched) = match known {
        Some(record) => (known_sha512(record), !record.disks.is_empty()),
        None => (wanted.and_then(|new| new.expected.digests.get(DigestKind::Sha512)), false),
    };
    match found {
        Some(found) if *found == *recorded => Ok(None),
        _ if backup.forced => Ok(None),
        Some(found) => Err(ManagerError::OtherBackupImage {
            image: image.clone(),
            found: found.to_owned(),
            recorded,
        }),
        None if is_fetched => {
            Err(ManagerError::UnprovenBackupImage { image: image.clone(), recorded })
        }
        None => Ok(Some(recorded)),
    }
}

/// A class that names a digest and no source, of an image that exists.
fn judge_class(known: Option<&ImageRecord>, sha512: &str) -> Result<Option<String>, ManagerError> {
    let Some(record) = known else { return Ok(Some(sha512.to_owned())) };
    let found = known_sha512(record);
    match found {
        Some(found) if found == sha512 => Ok(None),
        None if record.disks.is_empty() => Ok(Some(sha512.to_owned())),
        Some(_) | None => Err(ManagerError::OtherExpectation {
            name: record.name.clone(),
            what: "sha512",
            found: found.unwrap_or("not known").to_owned(),
            given: sha512.to_owned(),
        }),
    }
}

/// The existing volume is the one that is asked for, as far as the request says.
fn same_volume(record: &VolumeRecord, new: &NewVolume) -> Result<(), ManagerError> {
    let text = |text: Option<String>| text.unwrap_or_else(|| "none".to_owned());
    let backup = |backup: &Option<BackupRecord>| {
        text(backup.as_ref().map(|b| format!("{} of {}", b.backup, b.volume)))
    };
    let list =
        |disks: &[DiskUuid]| disks.iter().map(DiskUuid::as_str).collect::<Vec<_>>().join(" ");
    let named = (!new.disks.is_empty()).then(|| list(&new.disks));
    let bytes = |bytes: u64| format!("{bytes} bytes");
    let pairs = [
        ("image", record.image.to_string(), Some(new.image.to_string())),
        ("number of replicas", record.replicas.to_string(), new.replicas.map(|n| n.to_string())),
        ("disks", list(&record.disks), named),
        ("size", text(record.size_bytes.map(bytes)), new.size_bytes.map(bytes)),
        ("backup", backup(&record.backup), Some(backup(&new.backup))),
        (
            "storage class",
            text(record.class.as_ref().map(ToString::to_string)),
            Some(text(new.class.as_ref().map(ToString::to_string))),
        ),
        ("claim", text(record.claim.clone()), Some(text(new.claim.clone()))),
    ];
    for (what, found, given) in pairs {
        if let Some(given) = given.filter(|given| *given != found) {
            return Err(ManagerError::OtherVolume {
                name: record.name.clone(),
                what,
                found,
                given,
            });
        }
    }
    Ok(())
}
