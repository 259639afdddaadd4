//! Images that are clones of others.
//!
//! Why: a second image of bytes that are on the node must cost neither a download nor, where the file
//! system can share blocks, room.
//! How: a clone names an image when it is created and takes over what gives the bytes their meaning:
//! format, base, snapshot. Its first copy is made of a complete copy of that image, as a copy for a
//! further disk is made of one on the node; until then that image and that copy stay. After it the two
//! have nothing to do with each other.
//! Never: takes an image that was deleted and created anew for the one that was cloned.
//! Start at [`World::origin_of`].

use super::backend::{CopyId, CopyOf, DiskStatus};
use super::beside::Beside;
use super::command::NewImage;
use super::error::ManagerError;
use super::records::{CloneOf, Facts};
use super::world::{Image, World};
use crate::image::Format;
use crate::import::Layout;
use crate::names::{DiskUuid, ImageName};

/// What it takes to bring a copy in: of a clone, where the bytes of its first copy come from.
#[derive(Clone, Debug, Default)]
pub(super) struct Origin {
    /// The image that it is a clone of; `None` if it is none.
    pub(super) from: Option<CopyOf>,
    /// What it waits for, in words.
    pub(super) waits: Option<String>,
    /// What the image is given beside its own file.
    pub(super) beside: Beside,
}

impl Image {
    /// A clone that has never had a complete copy: its image has to stay.
    fn is_pending_clone(&self) -> bool {
        let record = &self.record;
        record.clone_of.is_some() && record.facts.is_none() && !record.deleting
    }

    fn is_clone_of(&self, other: &Self) -> bool {
        let of = self.record.clone_of.as_ref();
        of.is_some_and(|of| of.image == other.record.name && of.uuid == other.record.uuid)
    }
}

impl World {
    /// The image that `image` is a clone of, unless it is gone.
    fn cloned_image(&self, image: &Image) -> Option<&Image> {
        let of = image.record.clone_of.as_ref()?;
        self.images.get(&of.image).filter(|cloned| image.is_clone_of(cloned))
    }

    /// Rule of creation: what is cloned is there, and will be something. A clone is as what it is a
    /// clone of, as far as its bytes go.
    ///
    /// # Errors
    /// [`ManagerError`].
    pub(super) fn inherit(&self, new: &mut NewImage) -> Result<Option<CloneOf>, ManagerError> {
        let Some(name) = &new.clone_of else { return Ok(None) };
        let cloned = self.usable(name)?;
        if cloned.is_pending_clone() {
            return Err(ManagerError::NothingToClone { image: name.clone() });
        }
        let record = &cloned.record;
        new.base.clone_from(&record.base);
        new.data_file.clone_from(&record.data_file);
        new.snapshot = new.snapshot.take().or_else(|| record.snapshot.clone());
        new.declared_format = match record.layout {
            // Whatever the bytes look like: they are the guest's.
            Layout::Raw => Some(Format::Raw),
            Layout::AsIs => record.declared_format,
        };
        new.layout = Layout::AsIs;
        if new.min_copies == 0 {
            new.min_copies = record.min_copies;
        }
        Ok(Some(CloneOf { image: name.clone(), uuid: record.uuid.clone() }))
    }

    /// Where the bytes of `name` come from if it is a clone, and what is needed to bring it in.
    pub(super) fn origin_of(&self, name: &ImageName) -> Origin {
        let Some(image) = self.images.get(name) else { return Origin::default() };
        let beside = match self.beside(&image.record) {
            Ok(beside) => beside,
            Err(why) => return Origin { waits: Some(why), ..Origin::default() },
        };
        let Some(of) = &image.record.clone_of else {
            return Origin { beside, ..Origin::default() };
        };
        let cloned = self.cloned_image(image);
        let sealed = |image: &Image| -> Vec<DiskUuid> {
            let copies = image.copies.iter();
            let whole = copies.filter(|(_, copy)| copy.state.is_sealed() && !copy.cancelled);
            whole.map(|(disk, _)| disk).filter(|disk| self.is_fit(disk)).cloned().collect()
        };
        let ready_on = cloned.map(sealed).unwrap_or_default();
        // One that was complete once may have its files still: they are looked at first.
        let waits = ready_on.is_empty() && image.record.facts.is_none();
        let waits = waits.then(|| match cloned {
            None => format!("image {}, of which it is a clone, is gone: delete it", of.image),
            Some(cloned) => {
                let failed = cloned.copies.values().find(|copy| copy.refused);
                let why = failed.map_or("no copy of it is complete", |copy| copy.message.as_str());
                format!("waits for image {}, of which it is a clone: {why}", of.image)
            }
        });
        let (image, uuid) = (of.image.clone(), of.uuid.clone());
        Origin { from: Some(CopyOf { image, uuid, ready_on }), waits, beside }
    }

    /// The clones of `name` that have never been complete.
    pub(super) fn pending_clones_of(&self, name: &ImageName) -> Vec<ImageName> {
        let Some(cloned) = self.images.get(name) else { return Vec::new() };
        let pending = |clone: &&ImageName| {
            let clone = self.images.get(*clone);
            clone.is_some_and(|clone| clone.is_pending_clone() && clone.is_clone_of(cloned))
        };
        self.clones_of(name).iter().filter(pending).cloned().collect()
    }

    /// Whether a clone of `name` is being made, or waits to be, of the copy on `disk`.
    pub(super) fn is_being_cloned(&self, name: &ImageName, disk: &DiskUuid) -> bool {
        let copy = self.images.get(name).and_then(|image| image.copies.get(disk));
        copy.is_some_and(|copy| copy.state.is_sealed())
            && self.pending_clones_of(name).iter().any(|clone| {
                self.images.get(clone).is_some_and(|image| !image.record.disks.is_empty())
            })
    }

    /// What has to be wanted so that a clone on `disk` can be made: its image, if that is wanted
    /// nowhere.
    pub(super) fn to_bring_in_for(&self, name: &ImageName) -> Option<ImageName> {
        let image = self.images.get(name).filter(|image| image.is_pending_clone())?;
        let cloned = self.cloned_image(image)?;
        cloned.record.disks.is_empty().then(|| cloned.record.name.clone())
    }

    /// What is known of the bytes of an image, be it from the one that it is a clone of.
    pub(super) fn facts_of(&self, image: &Image) -> Option<&Facts> {
        let cloned = || self.cloned_image(image).and_then(|cloned| cloned.record.facts.as_ref());
        self.images.get(&image.record.name)?.record.facts.as_ref().or_else(cloned)
    }

    /// The disk for the first copy of a clone: one with what it is a clone of, where blocks may be
    /// shared.
    pub(super) fn disk_of_origin(
        &self,
        image: &Image,
        has_room: impl Fn(&&DiskStatus) -> bool,
    ) -> Option<DiskUuid> {
        let ready_on = self.origin_of(&image.record.name).from?.ready_on;
        let near = |disk: &&DiskStatus| ready_on.contains(&disk.uuid) && has_room(disk);
        self.disks.iter().find(near).map(|disk| disk.uuid.clone())
    }
}

impl CopyOf {
    /// The copy on `disk`.
    pub(super) fn on(&self, disk: &DiskUuid) -> CopyId {
        CopyId { image: self.image.clone(), uuid: self.uuid.clone(), disk: disk.clone() }
    }
}
