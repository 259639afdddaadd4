//! On which disks an image may be: tags that a disk, and its node, must have.
//!
//! Why: fast disks are for some images, and large ones for others; who runs the node says which are which.
//! How: a disk has the tags that its user gives it, the node those of the configuration; an image names
//! those that it needs, all of them. Disks that are chosen here have them; one that is named and has not
//! is refused with the reason.
//! Never: moves or removes what is there already: a copy on a disk that has lost its tag stays, and is read.
//! Start at [`World::check_disk_for`].

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

    /// What they want, in words.
    pub(super) fn said(&self) -> String {
        match (self.disk.is_empty(), self.node.is_empty()) {
            (_, true) => list(&self.disk),
            (true, false) => format!("{} of the node", list(&self.node)),
            (false, false) => format!("{} and {} of the node", list(&self.disk), list(&self.node)),
        }
    }
}

/// Tags as text; `none` if there are none.
pub(super) fn list(tags: &BTreeSet<Tag>) -> String {
    if tags.is_empty() {
        return "none".to_owned();
    }
    tags.iter().map(Tag::as_str).collect::<Vec<_>>().join(", ")
}

impl World {
    /// The tags that `disk` or its node lacks, in words; `None` if it has all.
    fn refuses(&self, selectors: &Selectors, disk: &DiskStatus) -> Option<String> {
        let lacks = |who: &str, wanted: &BTreeSet<Tag>, has: &dyn Fn(&Tag) -> bool| {
            let missing = wanted.iter().filter(|tag| !has(tag)).map(Tag::as_str);
            let missing: Vec<&str> = missing.collect();
            (!missing.is_empty()).then(|| format!("{who} lacks the tag {}", missing.join(", ")))
        };
        let record = self.disk_records.get(&disk.uuid);
        let has = |tag: &Tag| record.is_some_and(|record| record.tags.contains(tag));
        let of_node = |tag: &Tag| disk.node_tags.contains(tag);
        let own = lacks("it", &selectors.disk, &has);
        own.or_else(|| lacks("its node", &selectors.node, &of_node))
    }

    /// Whether `disk` has what `selectors` want.
    pub(super) fn selects(&self, selectors: &Selectors, disk: &DiskStatus) -> bool {
        self.refuses(selectors, disk).is_none()
    }

    /// Holds a disk that was named against `selectors`.
    fn check_selectors(
        &self,
        name: &ImageName,
        selectors: &Selectors,
        disk: &DiskStatus,
    ) -> Result<(), ManagerError> {
        match self.refuses(selectors, disk) {
            None => Ok(()),
            Some(why) => {
                let (name, disk) = (name.clone(), disk.uuid.clone());
                Err(ManagerError::NotSelected { name, disk, why })
            }
        }
    }

    /// Holds the disks that a new image, or one that exists, is to be on at once against what it and its
    /// base want.
    ///
    /// # Errors
    /// As [`World::check_disk_for`].
    pub(super) fn check_new_disks(&self, new: &NewImage) -> Result<(), ManagerError> {
        for disk in &new.disks {
            self.check_disk_for(&new.name, Some(new), disk)?;
            for beneath in new.base.iter().chain(&new.data_file) {
                self.check_disk_for(beneath, None, disk)?;
            }
        }
        Ok(())
    }

    /// A copy of `name`, which may be made only now, may be brought in on `disk`, which a user has named:
    /// it is open, and has the tags that the image and all that it stands on want.
    ///
    /// # Errors
    /// [`ManagerError::NoSuchDisk`], [`ManagerError::DiskClosed`], [`ManagerError::NotSelected`].
    pub(super) fn check_disk_for(
        &self,
        name: &ImageName,
        new: Option<&NewImage>,
        disk: &DiskUuid,
    ) -> Result<(), ManagerError> {
        self.check_disk(name, disk)?;
        let Some(status) = self.disk(disk) else { return Ok(()) };
        if let Some(new) = new.filter(|_| !self.images.contains_key(name)) {
            return self.check_selectors(name, &new.selectors, status);
        }
        // A copy that is there may be read whatever the tags say now.
        let has_copy = |name: &ImageName| {
            let copy = self.images.get(name).and_then(|image| image.copies.get(disk));
            copy.is_some_and(|copy| copy.state.is_sealed())
        };
        let mut records = self.parts_of(name).filter(|record| !has_copy(&record.name));
        records.try_for_each(|record| self.check_selectors(&record.name, &record.selectors, status))
    }

    /// Whether an image, and all that it stands on, may be on `disk`.
    pub(super) fn allows(&self, name: &ImageName, disk: &DiskStatus) -> bool {
        self.parts_of(name).all(|record| self.selects(&record.selectors, disk))
    }

    /// Why no disk could be chosen.
    pub(super) fn no_disk_for(&self, name: &ImageName, need_bytes: u64) -> ManagerError {
        let name = name.clone();
        if self.disks.iter().any(|disk| self.allows(&name, disk)) {
            return ManagerError::NoRoom { name, need_bytes };
        }
        let is_unmet =
            |selectors: &Selectors| !self.disks.iter().any(|d| self.selects(selectors, d));
        let unmet = self.parts_of(&name).find(|record| is_unmet(&record.selectors));
        let tags = unmet.map_or_else(String::new, |record| record.selectors.said());
        ManagerError::NoDiskSelected { name, tags }
    }
}
