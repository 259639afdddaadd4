//! Who refers to an image, found by its name.
//!
//! Why: a pass asks of every copy who reads it and what stands on it; to look through all
//! attachments, volumes and images each time would cost their product.
//! How: made anew from the records where a pass begins, and after it if images have gone, in one
//! walk over each; every change ends with a pass, so it is never behind.
//! Never: knows what the records don't.
//! Start at [`World::index_step`].

use std::collections::BTreeMap;

use super::world::World;
use crate::names::{DiskUuid, ImageName};

/// Who refers to which image.
#[derive(Clone, Debug, Default)]
pub(super) struct Index {
    overlays: BTreeMap<ImageName, Vec<ImageName>>,
    clones: BTreeMap<ImageName, Vec<ImageName>>,
    readers: BTreeMap<ImageName, Readers>,
}

/// The readers of one image: of each, the disk whose copy it reads.
#[derive(Clone, Debug, Default)]
pub(super) struct Readers {
    /// Attachments.
    pub(super) attachments: Vec<DiskUuid>,
    /// Those of them that do not wait until the copy is complete.
    pub(super) streams: Vec<DiskUuid>,
    /// Replicas of attached volumes.
    pub(super) replicas: Vec<DiskUuid>,
}

static NOBODY: Readers =
    Readers { attachments: Vec::new(), streams: Vec::new(), replicas: Vec::new() };

impl Readers {
    /// The disks of all of them.
    pub(super) fn disks(&self) -> impl Iterator<Item = &DiskUuid> {
        self.attachments.iter().chain(&self.replicas)
    }
}

impl World {
    /// Takes in what the records say.
    pub(super) fn index_step(&mut self) {
        let mut index = Index::default();
        for (name, image) in &self.images {
            for beneath in image.record.base.iter().chain(&image.record.data_file) {
                index.overlays.entry(beneath.clone()).or_default().push(name.clone());
            }
            if let Some(of) = &image.record.clone_of {
                index.clones.entry(of.image.clone()).or_default().push(name.clone());
            }
        }
        for attachment in self.attachments.values() {
            let record = &attachment.record;
            let readers = index.readers.entry(record.image.clone()).or_default();
            readers.attachments.push(record.disk.clone());
            if record.stream {
                readers.streams.push(record.disk.clone());
            }
        }
        for volume in self.volumes.values().filter(|volume| volume.record.attached) {
            let readers = index.readers.entry(volume.record.image.clone()).or_default();
            readers.replicas.extend(volume.record.disks.iter().cloned());
        }
        self.index = index;
    }

    /// Who reads `name`.
    pub(super) fn readers_of(&self, name: &ImageName) -> &Readers {
        self.index.readers.get(name).unwrap_or(&NOBODY)
    }

    /// The images that stand on `name` itself, or have their data in its file.
    pub(super) fn overlays_of(&self, name: &ImageName) -> &[ImageName] {
        self.index.overlays.get(name).map_or(&[], Vec::as_slice)
    }

    /// The images that are clones of one of the name `name`.
    pub(super) fn clones_of(&self, name: &ImageName) -> &[ImageName] {
        self.index.clones.get(name).map_or(&[], Vec::as_slice)
    }
}
