//! On which disks an image may be: tags that a disk, and its node, must have.
//!
//! Why: fast disks are for some images, and large ones for others; who runs the node says which are which.
//! How: disks and the node have tags by the configuration; an image names those that it needs, all of
//! them. Disks that are chosen here have them; one that is named and has not is refused with the reason.
//! Never: moves or removes what is there already: a copy on a disk that has lost its tag stays, and is read.
//! Start at [`Selectors::refuses`].

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use super::backend::DiskStatus;
use super::command::NewImage;
use super::error::ManagerError;
use super::world::World;
use crate::names::{DiskUuid, ImageName, Tag};

/// Tags that a disk must have.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Selectors {
    /// Of its own.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub disk: BTreeSet<Tag>,
    /// Of its node's.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub node: BTreeSet<Tag>,
}

impl Selectors {
    /// True if any disk will do.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.disk.is_empty() && self.node.is_empty()
    }

    /// The tags that `disk` or its node lacks, in words; `None` if it has all.
    fn refuses(&self, disk: &DiskStatus) -> Option<String> {
        let lacks = |who: &str, wanted: &BTreeSet<Tag>, has: &BTreeSet<Tag>| {
            let missing: Vec<&str> = wanted.difference(has).map(Tag::as_str).collect();
            (!missing.is_empty()).then(|| format!("{who} lacks the tag {}", missing.join(", ")))
        };
        lacks("it", &self.disk, &disk.tags)
            .or_else(|| lacks("its node", &self.node, &disk.node_tags))
    }

    /// True if an image with these may be on `disk`.
    pub(super) fn allow(&self, disk: &DiskStatus) -> bool {
        self.refuses(disk).is_none()
    }

    /// Holds a disk that was named against them.
    ///
    /// # Errors
    /// [`ManagerError::NotSelected`] with the first tag that it lacks.
    pub(super) fn check(&self, name: &ImageName, disk: &DiskStatus) -> Result<(), ManagerError> {
        match self.refuses(disk) {
            None => Ok(()),
            Some(why) => {
                let (name, disk) = (name.clone(), disk.uuid.clone());
                Err(ManagerError::NotSelected { name, disk, why })
            }
        }
    }

    /// What they want, in words.
    pub(super) fn said(&self) -> String {
        match (self.disk.is_empty(), self.node.is_empty()) {
            (_, true) => list(&self.disk),
            (true, false) => format!("{} of the node", list(&self.node)),
            (false, false) => format!("{} and {} of the node", list(&self.disk), list(&self.node)),
        }
    }
}

/// Tags as text.
pub(super) fn list(tags: &BTreeSet<Tag>) -> String {
    tags.iter().map(Tag::as_str).collect::<Vec<_>>().join(", ")
}

impl World {
    /// Holds the disks that a new image, or one that exists, is to be on at once against what it and its
    /// base want.
    ///
    /// # Errors
    /// As [`World::check_disk`].
    pub(super) fn check_new_disks(&self, new: &NewImage) -> Result<(), ManagerError> {
        for disk in &new.disks {
            self.check_disk_for(&new.name, Some(new), disk)?;
            if let Some(base) = &new.base {
                self.check_disk(base, disk)?;
            }
        }
        Ok(())
    }

    /// As [`World::check_disk`], of an image that may be made only now.
    ///
    /// # Errors
    /// As [`World::check_disk`].
    pub(super) fn check_disk_for(
        &self,
        name: &ImageName,
        new: Option<&NewImage>,
        disk: &DiskUuid,
    ) -> Result<(), ManagerError> {
        match (new, self.disk(disk)) {
            (Some(new), Some(status)) if !self.images.contains_key(name) => {
                new.selectors.check(name, status)
            }
            (_, _) => self.check_disk(name, disk),
        }
    }

    /// Whether an image, and all that it stands on, may be on `disk`.
    pub(super) fn allows(&self, name: &ImageName, disk: &DiskStatus) -> bool {
        self.records_from(name).all(|record| record.selectors.allow(disk))
    }

    /// Holds a disk that was named against what an image, and all that it stands on, wants. A copy that
    /// is there may be read whatever the tags say now.
    ///
    /// # Errors
    /// [`ManagerError::NoSuchDisk`], [`ManagerError::NotSelected`].
    pub(super) fn check_disk(&self, name: &ImageName, disk: &DiskUuid) -> Result<(), ManagerError> {
        let status = self.disk(disk);
        let status = status.ok_or_else(|| ManagerError::NoSuchDisk { disk: disk.clone() })?;
        let has_copy = |name: &ImageName| {
            let copy = self.images.get(name).and_then(|image| image.copies.get(disk));
            copy.is_some_and(|copy| copy.state.is_sealed())
        };
        let mut records = self.records_from(name).filter(|record| !has_copy(&record.name));
        records.try_for_each(|record| record.selectors.check(&record.name, status))
    }

    /// Why no disk could be chosen.
    pub(super) fn no_disk_for(&self, name: &ImageName, need_bytes: u64) -> ManagerError {
        let name = name.clone();
        if self.disks.iter().any(|disk| self.allows(&name, disk)) {
            return ManagerError::NoRoom { name, need_bytes };
        }
        let unmet =
            self.records_from(&name).find(|r| !self.disks.iter().any(|d| r.selectors.allow(d)));
        let tags = unmet.map_or_else(String::new, |record| record.selectors.said());
        ManagerError::NoDiskSelected { name, tags }
    }
}
