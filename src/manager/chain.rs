//! Images that stand on others: overlays and their bases, tables and their data files.
//!
//! Why: an overlay is of use only where its base is, and a base must stay as long as something
//! stands on it.
//! How: a base is named when the overlay is created, so that it exists before, and there are no
//! circles. A copy of an overlay wants a copy of the base on the same disk, and is opened when all
//! copies beneath it are complete. An external data file is the file of an image that was named so.
//! Never: looks at the name of a backing file that an image has in it.
//! Start at [`World::chain_on`].

use super::backend::Link;
use super::error::ManagerError;
use super::records::ImageRecord;
use super::world::{Copy, Image, Touched, World};
use crate::image::MAX_LAYERS;
use crate::names::{DiskUuid, ImageName};

impl World {
    /// A copy of `image` as a part of a chain.
    ///
    /// # Errors
    /// Its data file is not here yet, in words.
    pub(super) fn link_on(&self, image: &Image, disk: &DiskUuid) -> Result<Link, String> {
        let data_file = image.record.data_file.as_ref();
        let data_file = data_file.map(|name| self.whole_on(name, disk, "data file")).transpose()?;
        Ok(Link {
            copy: image.copy_id(disk),
            snapshot: image.record.snapshot.clone(),
            data_file: data_file.map(|image| image.copy_id(disk)),
        })
    }

    /// The image `name`, which has a complete copy on `disk`; `what` it is to who needs it.
    fn whole_on(&self, name: &ImageName, disk: &DiskUuid, what: &str) -> Result<&Image, String> {
        let image = self.images.get(name);
        let copy = image.and_then(|image| image.copies.get(disk));
        let sealed = copy.filter(|copy| copy.state.is_sealed() && !copy.cancelled);
        image.filter(|_| sealed.is_some()).ok_or_else(|| {
            match copy.filter(|copy| copy.refused).map(|copy| copy.message.as_str()) {
                Some(why) => format!("its {what} {name} cannot be had: {why}"),
                None => format!("waits for its {what} {name} on the same disk"),
            }
        })
    }

    /// The record of `name` and those of all images that it stands on, from the top down.
    pub(super) fn records_from<'a>(
        &'a self,
        name: &'a ImageName,
    ) -> impl Iterator<Item = &'a ImageRecord> {
        let next = |record: &&ImageRecord| {
            let base = record.base.as_ref()?;
            self.images.get(base).map(|image| &image.record)
        };
        std::iter::successors(self.images.get(name).map(|image| &image.record), next)
            .take(MAX_LAYERS)
    }

    /// The same, each followed by the record of its data file.
    pub(super) fn parts_of<'a>(
        &'a self,
        name: &'a ImageName,
    ) -> impl Iterator<Item = &'a ImageRecord> {
        self.records_from(name).flat_map(|record| {
            let data = record.data_file.as_ref().and_then(|data| self.images.get(data));
            std::iter::once(record).chain(data.map(|image| &image.record))
        })
    }

    /// The complete copy of `name` on `disk` and all that it stands on, from the top down.
    ///
    /// # Errors
    /// What is not here yet, in words.
    pub(super) fn chain_on(&self, name: &ImageName, disk: &DiskUuid) -> Result<Vec<Link>, String> {
        let mut chain = Vec::new();
        for record in self.records_from(name) {
            let image = self.whole_on(&record.name, disk, "base")?;
            chain.push(self.link_on(image, disk)?);
        }
        Ok(chain)
    }

    /// Rule of creation: the base is there, and the chain is not too long.
    pub(super) fn check_base(
        &self,
        name: &ImageName,
        base: Option<&ImageName>,
    ) -> Result<(), ManagerError> {
        let Some(base) = base else { return Ok(()) };
        self.usable(base)?;
        if self.records_from(base).count() >= MAX_LAYERS {
            return Err(ManagerError::TooManyBases { name: name.clone(), most: MAX_LAYERS });
        }
        Ok(())
    }

    /// Rule of creation: the data file is there, and is a file and nothing more.
    pub(super) fn check_data_file(
        &self,
        name: &ImageName,
        data: Option<&ImageName>,
    ) -> Result<(), ManagerError> {
        let Some(data) = data else { return Ok(()) };
        let record = &self.usable(data)?.record;
        if record.base.is_some() || record.data_file.is_some() {
            return Err(ManagerError::NoDataFile { name: name.clone(), data: data.clone() });
        }
        Ok(())
    }

    /// Whether an overlay of `name` has a copy on `disk`, which needs the one of `name` there.
    pub(super) fn is_needed_on(&self, name: &ImageName, disk: &DiskUuid) -> bool {
        let mut overlays = self.overlays_of(name).iter().filter_map(|name| self.images.get(name));
        overlays.any(|image| image.copies.contains_key(disk))
    }

    /// Copies of `name` and of all that it stands on are wanted on `disk`.
    pub(super) fn want_chain(&mut self, name: &ImageName, disk: &DiskUuid, touched: &mut Touched) {
        let mut tops = vec![name.clone()];
        while let Some(top) = tops.pop() {
            let names: Vec<_> = self.parts_of(&top).map(|record| record.name.clone()).collect();
            for name in names {
                self.want(&name, disk, touched);
                // What is cloned is wanted somewhere from now on, so that this ends.
                tops.extend(self.to_bring_in_for(&name));
            }
        }
    }

    /// The copies of an image that can be opened, with their chains, and why others cannot.
    pub(super) fn chains_of(&self, name: &ImageName) -> Chains {
        let mut chains = Chains::default();
        let Some(image) = self.images.get(name) else { return chains };
        let sealed = |(_, copy): &(_, &Copy)| copy.state.is_sealed() && !copy.cancelled;
        for (disk, _) in image.copies.iter().filter(sealed) {
            match self.chain_on(name, disk) {
                Ok(chain) => chains.whole.push((disk.clone(), chain)),
                Err(why) => chains.waiting.push((disk.clone(), why)),
            }
        }
        chains
    }
}

/// Which complete copies of one image stand on complete ones.
#[derive(Debug, Default)]
pub(super) struct Chains {
    pub(super) whole: Vec<(DiskUuid, Vec<Link>)>,
    pub(super) waiting: Vec<(DiskUuid, String)>,
}

impl Chains {
    pub(super) fn is_whole_on(&self, disk: &DiskUuid) -> bool {
        self.whole.iter().any(|(whole, _)| whole == disk)
    }
}
