//! Attachments that do not wait until the image is complete.
//!
//! Why: a guest can boot from an image whose download began a second ago.
//! How: while such an attachment waits for a copy that is being brought in, its export is opened on
//! the file as it arrives. When the copy is sealed the export stays: it is the same file. If what
//! arrives turns out wrong, or the transfer begins anew, the export is closed and opened again.
//! Never: opens an arriving file for who did not ask for that, or one on an incomplete base.
//! Start at [`World::streams_of`].

use super::backend::{Link, Phase};
use super::world::{Action, Copy, CopyState, Export, Image, Touched, World};
use crate::names::{DiskUuid, ImageName};

impl World {
    /// The copies of `name` that are being brought in and that a reader wants at once, each with what
    /// it stands on, which is complete.
    pub(super) fn streams_of(&self, name: &ImageName) -> Vec<(DiskUuid, Vec<Link>)> {
        let Some(image) = self.images.get(name) else { return Vec::new() };
        let wanted = |disk: &DiskUuid| self.readers_of(name).streams.contains(disk);
        let mut streams = Vec::new();
        for (disk, copy) in &image.copies {
            if !can_stream(copy) || !wanted(disk) || !self.is_fit(disk) {
                continue;
            }
            let Ok(link) = self.link_on(image, disk) else { continue };
            let mut chain = vec![link];
            if let Some(base) = &image.record.base {
                let Ok(beneath) = self.chain_on(base, disk) else { continue };
                chain.extend(beneath);
            }
            streams.push((disk.clone(), chain));
        }
        streams
    }

    /// True while a complete copy is being opened for readers.
    #[must_use]
    pub fn is_opening(&self) -> bool {
        self.images.values().any(|image| match &image.export {
            Export::Opening(disk) => {
                image.copies.get(disk).is_some_and(|copy| copy.state.is_sealed())
            }
            Export::Closed | Export::Streaming(_) | Export::Open(_) => false,
        })
    }

    /// The images whose readers have lost what they read.
    pub fn see_lost(&mut self, lost: Vec<ImageName>) {
        self.lost = lost.into_iter().collect();
    }
}

fn can_stream(copy: &Copy) -> bool {
    // One that is being checked is complete.
    let arrives = copy.state == CopyState::InProgress && copy.progress.phase != Phase::Verifying;
    arrives && !copy.cancelled && copy.no_stream.is_none()
}

/// Closes the export of a copy that has not become complete, and will not soon. `others`: a complete
/// copy could be opened in its place.
pub(super) fn close_step(image: &mut Image, is_lost: bool, others: bool, touched: &mut Touched) {
    let Export::Streaming(disk) = &image.export else { return };
    let is_gone = image.copies.get(disk).is_none_or(|copy| {
        let has_failed = copy.refused || copy.state == CopyState::FailedAndCleanup;
        copy.cancelled || has_failed || others && copy.state != CopyState::InProgress
    });
    if is_gone || is_lost {
        image.export = Export::Closed;
        touched.actions.push(Action::Withdraw(image.record.name.clone()));
        touched.images.insert(image.record.name.clone());
    }
}

/// Opens an export on an arriving copy.
pub(super) fn open_step(
    image: &mut Image,
    streams: Vec<(DiskUuid, Vec<Link>)>,
    touched: &mut Touched,
) {
    if image.export == Export::Closed
        && let Some((disk, chain)) = streams.into_iter().next()
    {
        let prefetch = image.record.prefetch.clone();
        touched.actions.push(Action::Stream(chain, prefetch));
        image.export = Export::Opening(disk);
    }
}
