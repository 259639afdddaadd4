//! Images that have fewer copies than they are to have (rule 17).
//!
//! Why: who asks for two copies wants the second one also after a disk has died in the night.
//! How: an image that has a complete copy, and too few that are or will be good, gets another on a disk
//! with room, copied from the complete one: one more in each pass, and a bounded number on the node.
//! Copies that may come back by themselves (a try that is repeated, a disk that is being mounted) are
//! waited for as long as all copies of an image may be failed ([`super::Setting::RecoveryWait`]).
//! Never: asks a source for it; takes a disk that its user has closed, or without the image's tags; works
//! on an image that is paused or being deleted.
//! Start at [`World::replenish_step`].

use std::time::Duration;

use super::backend::DiskStatus;
use super::world::{Action, Change, Copy, CopyState, Image, Touched, World};
use crate::names::{DiskUuid, ImageName};

/// What is known of an image's having too few copies, in this run of the daemon.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Short {
    /// Since when some are waited for.
    since: Option<Duration>,
    /// The wait is over.
    waited: bool,
    /// Somebody was told that there is no disk for another.
    warned: bool,
}

/// The copies of an image that has fewer complete ones than it is to have, and one at least.
struct Lack {
    /// Copies that it is to have.
    need: usize,
    /// Copies that are complete, and whose disk is there.
    complete: usize,
    /// Copies that are on their way.
    coming: usize,
    /// Copies that failed, or whose disk is not there, and that may be good again.
    may_come_back: usize,
}

impl Lack {
    fn good(&self) -> usize {
        self.complete + self.coming
    }
}

impl World {
    /// What `image` lacks; `None` if it has enough, or nothing is to be done about it.
    fn lack_of(&self, image: &Image) -> Option<Lack> {
        let need = usize::try_from(image.record.min_copies).unwrap_or(usize::MAX);
        let steering = image.record.steering;
        // With a complete copy an image that is to have one has it.
        if need < 2 || image.record.deleting || steering.paused || self.node_failed {
            return None;
        }
        let mut lack = Lack { need, complete: 0, coming: 0, may_come_back: 0 };
        let stays = |(_, copy): &(&DiskUuid, &Copy)| !copy.cancelled && !copy.evicting;
        for (disk, copy) in image.copies.iter().filter(stays) {
            match copy.state {
                _ if !self.is_fit(disk) => lack.may_come_back += 1,
                CopyState::ReadyForTransfer | CopyState::Ready => lack.complete += 1,
                CopyState::Pending | CopyState::Starting | CopyState::InProgress => {
                    lack.coming += 1;
                }
                CopyState::Failed | CopyState::FailedAndCleanup | CopyState::Unknown => {
                    lack.may_come_back += usize::from(!copy.refused);
                }
            }
        }
        (lack.complete < need && self.has_source_here(image)).then_some(lack)
    }

    /// A copy from which another can be made.
    fn has_source_here(&self, image: &Image) -> bool {
        let whole = |(disk, copy): (&DiskUuid, &Copy)| {
            copy.state.is_sealed() && !copy.cancelled && self.is_fit(disk)
        };
        image.copies.iter().any(whole)
    }

    /// True if one more copy is, or would be, brought in for `image`.
    pub(super) fn would_be_replenished(&self, image: &Image) -> bool {
        self.settings.most_replenished() > 0
            && self.lack_of(image).is_some_and(|lack| lack.good() < lack.need)
    }

    /// True until `image` has the complete copies that it is to have, if it gets them by itself.
    pub(super) fn is_replenished(&self, image: &Image) -> bool {
        self.settings.most_replenished() > 0 && self.lack_of(image).is_some()
    }

    /// One more copy for each image that has too few.
    pub(super) fn replenish_step(&mut self, now: Duration, touched: &mut Touched) {
        let most = self.settings.most_replenished();
        let wait = self.settings.recovery_wait();
        let names: Vec<ImageName> = self
            .images
            .iter()
            .filter(|(_, i)| i.record.min_copies > 1)
            .map(|(n, _)| n.clone())
            .collect();
        let mut under_way = None;
        for name in names {
            let Some(image) = self.images.get(&name) else { continue };
            let lack = self.lack_of(image).filter(|lack| most > 0 && lack.good() < lack.need);
            let Some(lack) = lack else {
                if let Some(image) = self.images.get_mut(&name) {
                    image.short = Short::default();
                }
                continue;
            };
            let mut short = image.short;
            let since = *short.since.get_or_insert(now);
            short.waited = wait.is_some_and(|wait| now >= since.saturating_add(wait));
            let is_due = short.waited || lack.good() + lack.may_come_back < lack.need;
            let running = *under_way.get_or_insert_with(|| self.copied_now());
            let disk = (is_due && running < most).then(|| self.other_disk_for(image));
            if disk == Some(None) && !short.warned {
                short.warned = true;
                let (good, need) = (lack.good(), lack.need);
                let text =
                    format!("has {good} of its {need} copies, and no disk is ready for another");
                touched.actions.push(Action::Announce(Change::Warning(name.clone(), text)));
            }
            if let Some(image) = self.images.get_mut(&name) {
                image.short = short;
            }
            if let Some(disk) = disk.flatten() {
                under_way = Some(running + 1);
                self.want_chain(&name, &disk, touched);
            }
        }
    }

    /// Copies that are being made from others on this node. What waits for a person, a disk or its next
    /// try holds up nobody.
    fn copied_now(&self) -> usize {
        let under_way = |(disk, copy): &(&DiskUuid, &Copy)| {
            let begun = matches!(
                copy.state,
                CopyState::Pending | CopyState::Starting | CopyState::InProgress
            );
            begun && !copy.cancelled && self.is_fit(disk)
        };
        let goes_on = |image: &&Image| !image.record.deleting && !image.record.steering.paused;
        let images = self.images.values().filter(goes_on);
        let from_here = images.filter(|image| self.has_source_here(image));
        from_here.map(|image| image.copies.iter().filter(under_way).count()).sum()
    }

    /// The disk with the most room on which there is no copy of `image` yet, and one may be.
    pub(super) fn other_disk_for(&self, image: &Image) -> Option<DiskUuid> {
        let others = self.disks.iter().filter(|d| !image.copies.contains_key(&d.uuid));
        let fits = others.filter(|disk| self.is_for_another(image, disk));
        // Of equals the first, so that the order of the configuration holds.
        let best = fits.rev().max_by_key(|disk| room_on(disk));
        best.map(|disk| disk.uuid.clone())
    }

    /// True if a copy of `image` that nobody has asked for by name may be made on `disk`.
    pub(super) fn is_for_another(&self, image: &Image, disk: &DiskStatus) -> bool {
        let need_bytes = image.record.facts.as_ref().map_or(0, |facts| facts.size_bytes);
        let is_open = self.is_fit(&disk.uuid) && self.is_open_to_copies(&disk.uuid);
        is_open && room_on(disk) > need_bytes && self.allows(&image.record.name, disk)
    }

    /// When the wait of the next image is over.
    pub(super) fn replenish_wake(&self) -> Option<Duration> {
        let wait = self.settings.recovery_wait()?;
        let waits = self.images.values().filter(|image| !image.short.waited);
        waits.filter_map(|image| Some(image.short.since?.saturating_add(wait))).min()
    }
}

/// Bytes that may still be promised on a disk.
pub(super) fn room_on(disk: &DiskStatus) -> u64 {
    disk.free_bytes.saturating_sub(disk.reserved_bytes)
}
