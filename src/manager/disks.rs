//! The disks of the node as its user steers them: added, closed to new copies, emptied, removed.
//!
//! Why: a disk is replaced while the node runs, and nobody should have to know which copies are on it.
//! How: a disk has a record, from which it is known again when it is missing. Of one that is being
//! emptied each copy that nobody uses goes as soon as enough complete ones are elsewhere; if there
//! are too few, one is brought in on another disk first (rule 19).
//! Never: takes a copy in use; removes a disk that holds a copy, unless it is gone and its user says
//! so; touches the files of one that is gone.
//! Start at [`World::evict_step`].

use std::collections::BTreeSet;
use std::path::PathBuf;

use super::backend::{DiskStatus, FoundCopy};
use super::command::Outcome;
use super::error::ManagerError;
use super::records::DiskRecord;
use super::world::{Action, Change, Copy, CopyState, Image, Touched, Worker, World};
use crate::names::{DiskUuid, ImageName, Tag};

/// What is to be different about a disk; `None` stays as it is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DiskChange {
    /// New copies may be brought in on it.
    pub schedulable: Option<bool>,
    /// Its copies are to go elsewhere.
    pub evict: Option<bool>,
    /// Words that its user has for it: all of them.
    pub tags: Option<BTreeSet<Tag>>,
}

/// A disk that the backend has just opened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OpenedDisk {
    /// Its UUID.
    pub uuid: DiskUuid,
    /// Its directory.
    pub path: PathBuf,
    /// All disks as they are now, this one among them.
    pub disks: Vec<DiskStatus>,
    /// What it holds.
    pub found: Vec<FoundCopy>,
    /// Seconds since 1970, UTC.
    pub opened_unix_s: u64,
}

/// One disk, as it is now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskView {
    /// What its file system says.
    pub status: DiskStatus,
    /// New copies may be brought in on it.
    pub schedulable: bool,
    /// Its copies are to go elsewhere.
    pub evicting: bool,
    /// Words that its user has for it.
    pub tags: BTreeSet<Tag>,
    /// Copies on it, complete or not.
    pub copies: usize,
}

impl DiskRecord {
    fn new(status: &DiskStatus) -> Self {
        let (uuid, path) = (status.uuid.clone(), status.path.clone());
        Self { uuid, path, schedulable: true, evict: false, tags: BTreeSet::new() }
    }
}

impl World {
    /// Every disk that is here has a record with its place.
    pub(super) fn know_disks(&mut self) -> Vec<Action> {
        let mut actions = Vec::new();
        for status in &self.disks {
            let known = self.disk_records.entry(status.uuid.clone());
            let is_new = matches!(known, std::collections::btree_map::Entry::Vacant(_));
            let record = known.or_insert_with(|| DiskRecord::new(status));
            if is_new || record.path != status.path {
                record.path.clone_from(&status.path);
                actions.push(Action::SaveDisk(Box::new(record.clone())));
            }
        }
        actions
    }

    /// One disk.
    #[must_use]
    pub fn disk_view_of(&self, uuid: &DiskUuid) -> Option<DiskView> {
        self.disk(uuid).map(|status| self.disk_view(status))
    }

    /// A disk, by what its file system says now.
    #[must_use]
    pub fn disk_view(&self, status: &DiskStatus) -> DiskView {
        let record = self.disk_records.get(&status.uuid);
        let on_it = |image: &&Image| image.copies.contains_key(&status.uuid);
        DiskView {
            status: status.clone(),
            schedulable: record.is_none_or(|record| record.schedulable),
            evicting: record.is_some_and(|record| record.evict),
            tags: record.map(|record| record.tags.clone()).unwrap_or_default(),
            copies: self.images.values().filter(on_it).count(),
        }
    }

    /// Disks that a user has not closed.
    pub(super) fn is_open_to_copies(&self, disk: &DiskUuid) -> bool {
        self.disk_records.get(disk).is_none_or(|record| record.schedulable && !record.evict)
    }

    /// A copy of `name` may be brought in on `disk`, which a user has named.
    pub(super) fn check_disk(&self, name: &ImageName, disk: &DiskUuid) -> Result<(), ManagerError> {
        self.disk(disk).ok_or_else(|| ManagerError::NoSuchDisk { disk: disk.clone() })?;
        let has_copy = self.images.get(name).is_some_and(|i| i.record.disks.contains_key(disk));
        match has_copy || self.is_open_to_copies(disk) {
            true => Ok(()),
            false => Err(ManagerError::DiskClosed { disk: disk.clone() }),
        }
    }

    /// The disks that are not there, or were not when they were looked at.
    pub(super) fn gone_disks(&self) -> Vec<DiskUuid> {
        self.disks.iter().filter(|disk| !disk.healthy).map(|disk| disk.uuid.clone()).collect()
    }

    /// The disks as they are now; watchers are told of those that went or came back.
    pub(super) fn see_disks(&mut self, disks: Vec<DiskStatus>, touched: &mut Touched) {
        for now in &disks {
            let was = self.disk(&now.uuid).map(|disk| disk.healthy);
            if was.is_some_and(|was| was != now.healthy) {
                touched.actions.push(Action::Announce(Change::DiskUpdated(now.uuid.clone())));
            }
        }
        self.disks = disks;
    }

    /// A disk more, with what it holds.
    pub(super) fn add_disk(&mut self, opened: OpenedDisk, touched: &mut Touched) -> Outcome {
        let is_new = !self.disk_records.contains_key(&opened.uuid);
        self.disks = opened.disks;
        touched.actions.extend(self.know_disks());
        for found in opened.found {
            // One that is worked on is known already.
            let image = self.images.get(&found.id.image);
            let known = image.and_then(|image| image.copies.get(&found.id.disk));
            if known.is_some() {
                continue;
            }
            let name = found.id.image.clone();
            touched.actions.extend(self.adopt(found, opened.opened_unix_s));
            if self.images.contains_key(&name) {
                touched.images.insert(name);
            }
        }
        touched.actions.push(Action::Announce(Change::DiskUpdated(opened.uuid.clone())));
        Outcome::Disk(opened.uuid, is_new)
    }

    pub(super) fn change_disk(
        &mut self,
        disk: DiskUuid,
        change: DiskChange,
        touched: &mut Touched,
    ) -> Result<Outcome, ManagerError> {
        let Some(record) = self.disk_records.get_mut(&disk) else {
            return Err(ManagerError::NoSuchDisk { disk });
        };
        let before = record.clone();
        record.schedulable = change.schedulable.unwrap_or(record.schedulable);
        record.evict = change.evict.unwrap_or(record.evict);
        record.tags = change.tags.unwrap_or_else(|| std::mem::take(&mut record.tags));
        if *record != before {
            touched.actions.push(Action::SaveDisk(Box::new(record.clone())));
            touched.actions.push(Action::Announce(Change::DiskUpdated(disk.clone())));
        }
        Ok(Outcome::Disk(disk, false))
    }

    /// A disk that holds nothing is none of the node's any more. With `force` also one that is gone,
    /// with what it held.
    pub(super) fn remove_disk(
        &mut self,
        disk: DiskUuid,
        force: bool,
        touched: &mut Touched,
    ) -> Result<Outcome, ManagerError> {
        let Some(status) = self.disk(&disk) else {
            return Err(ManagerError::NoSuchDisk { disk });
        };
        let is_gone = !status.healthy;
        let refuse = |why: String| ManagerError::DiskInUse { disk: disk.clone(), why };
        if self.disks.first().is_some_and(|first| first.uuid == disk) {
            return Err(refuse("the catalog is on it".to_owned()));
        }
        let on_it = |disks: &[DiskUuid]| disks.contains(&disk);
        if let Some(volume) = self.volumes.values().find(|v| on_it(&v.record.disks)) {
            return Err(refuse(format!("volume {} has a replica there", volume.record.name)));
        }
        if let Some(held) = self.attachments.values().find(|held| held.record.disk == disk) {
            return Err(refuse(format!("attachment {} reads there", held.record.id)));
        }
        let holds: Vec<(ImageName, bool)> = self
            .images
            .values()
            .filter_map(|image| {
                let copy = image.copies.get(&disk)?;
                Some((image.record.name.clone(), copy.worker == Worker::Idle && !copy.removing))
            })
            .collect();
        if let Some((name, _)) = holds.first().filter(|_| !(force && is_gone)) {
            return Err(refuse(format!("it has {} copies, one of image {name}", holds.len())));
        }
        if let Some((name, _)) = holds.iter().find(|(_, is_idle)| !is_idle) {
            return Err(refuse(format!("the worker of image {name} has not ended yet")));
        }
        for (name, _) in holds {
            let Some(image) = self.images.get_mut(&name) else { continue };
            image.close_on(&disk, touched);
            image.copies.remove(&disk);
            image.record.disks.remove(&disk);
            touched.actions.push(Action::SaveImage(Box::new(image.record.clone())));
            touched.images.insert(name);
        }
        self.disk_records.remove(&disk);
        self.disks.retain(|status| status.uuid != disk);
        touched.actions.push(Action::ForgetDisk(disk.clone()));
        touched.actions.push(Action::Announce(Change::DiskRemoved(disk)));
        Ok(Outcome::Done)
    }

    /// Rule 19, for all images with a copy on a disk that is being emptied.
    pub(super) fn evict_step(&mut self, touched: &mut Touched) {
        let leaving: BTreeSet<DiskUuid> = self
            .disk_records
            .values()
            .filter(|record| record.evict)
            .map(|record| record.uuid.clone())
            .collect();
        if leaving.is_empty() && self.evicting.is_empty() {
            return;
        }
        self.evicting.clone_from(&leaving);
        let names: Vec<ImageName> = self.images.keys().cloned().collect();
        for name in &names {
            let Some(image) = self.images.get_mut(name) else { continue };
            for (disk, copy) in &mut image.copies {
                copy.evicting = leaving.contains(disk);
            }
            let leaves = |copy: &Copy| copy.evicting && !copy.cancelled;
            if !self.node_failed && !image.record.deleting && image.copies.values().any(leaves) {
                self.evict(name, touched);
            }
        }
    }

    fn evict(&mut self, name: &ImageName, touched: &mut Touched) {
        let Some(image) = self.images.get(name) else { return };
        let stays = || {
            let staying = image.copies.iter().filter(|(_, copy)| !copy.evicting && !copy.cancelled);
            staying.filter(|(disk, copy)| self.is_fit(disk) && !copy.refused)
        };
        let need = usize::try_from(image.record.min_copies.max(1)).unwrap_or(usize::MAX);
        let complete = stays().filter(|(_, copy)| copy.state.is_sealed()).count();
        // What was refused and removed has nothing to bring to another disk, and is refused there too.
        let is_nothing = |copy: &Copy| copy.refused && copy.state == CopyState::FailedAndCleanup;
        let leaving = || image.copies.iter().filter(|(_, copy)| copy.evicting && !copy.cancelled);
        let go: Vec<DiskUuid> = leaving()
            .filter(|(_, copy)| complete >= need || is_nothing(copy))
            .filter(|(disk, _)| self.user_of(name, disk).is_none())
            .map(|(disk, _)| disk.clone())
            .collect();
        let is_short = stays().count() < need && leaving().any(|(_, copy)| !is_nothing(copy));
        let other = is_short.then(|| self.other_disk_for(image)).flatten();
        if let Some(image) = self.images.get_mut(name).filter(|_| !go.is_empty()) {
            for disk in &go {
                image.give_up(disk);
            }
            touched.actions.push(Action::SaveImage(Box::new(image.record.clone())));
            touched.images.insert(name.clone());
        }
        if let Some(disk) = other {
            self.want_chain(name, &disk, touched);
        }
    }
}
