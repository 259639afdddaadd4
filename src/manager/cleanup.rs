//! Copies that nobody uses: when they go, and when they must not.
//!
//! Why: a disk fills up with images that were needed once; and a copy that is in use, or the last
//! of an image, must stay whatever the clock says.
//! How: a copy that nobody refers to is stamped, in its image's record (rule 9); once the stamp is
//! older than the wait interval, the copy is wanted no more (rule 10), unless too few would be left.
//! By hand, on chosen disks, the same rules hold without the wait, for all of them or none (rule 11).
//! Never: takes a copy that is read, waited for, stood on or exported to a session.
//! Start at [`World::clean_up_step`].

use std::collections::BTreeMap;
use std::time::Duration;

use super::command::Outcome;
use super::error::ManagerError;
use super::records::Want;
use super::world::{Action, Copy, CopyState, Export, Image, Touched, World};
use crate::names::{DiskUuid, ImageName};

/// What a copy counts as, when it is asked whether enough are left without it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Worth {
    /// It failed, or its disk is not there.
    Failed,
    /// It is on its way.
    Handled,
    /// It is complete.
    Ready,
}

fn worth(copy: &Copy) -> Worth {
    match copy.state {
        CopyState::ReadyForTransfer | CopyState::Ready => Worth::Ready,
        CopyState::Pending | CopyState::Starting | CopyState::InProgress => Worth::Handled,
        CopyState::Failed | CopyState::FailedAndCleanup | CopyState::Unknown => Worth::Failed,
    }
}

impl Image {
    /// True if `disk`'s copy can go and enough copies of its worth, or better ones, are left.
    fn can_spare(&self, disk: &DiskUuid) -> bool {
        let Some(copy) = self.copies.get(disk).filter(|copy| !copy.cancelled) else { return false };
        let own = worth(copy);
        // One that is leaving its disk counts for nothing: another is to stand in its place.
        let others = self.copies.values().filter(|copy| !copy.cancelled && !copy.evicting);
        let as_good = others.filter(|other| worth(other) >= own).count();
        as_good > usize::try_from(self.record.min_copies.max(1)).unwrap_or(usize::MAX)
    }

    /// A copy is wanted no more: its worker stops, and its files go.
    pub(super) fn give_up(&mut self, disk: &DiskUuid) {
        self.record.disks.remove(disk);
        if let Some(copy) = self.copies.get_mut(disk) {
            (copy.cancelled, copy.retry_at) = (true, None);
        }
    }
}

impl World {
    /// How many sessions are open on each exported image, as of now.
    pub fn see_sessions(&mut self, sessions: BTreeMap<ImageName, usize>) {
        self.sessions = sessions;
    }

    /// The images that are exported.
    pub fn exported(&self) -> impl Iterator<Item = &ImageName> {
        let open = |(_, image): &(_, &Image)| image.export != Export::Closed;
        self.images.iter().filter(open).map(|(name, _)| name)
    }

    pub(super) fn now_unix_s(&self, now: Duration) -> u64 {
        self.started_unix_s.saturating_add(now.as_secs())
    }

    /// Who uses the copy of `name` on `disk`, in words; `None` if nobody does.
    pub(super) fn user_of(&self, name: &ImageName, disk: &DiskUuid) -> Option<&'static str> {
        let image = self.images.get(name)?;
        let readers = self.readers_of(name);
        if readers.attachments.contains(disk) {
            return Some("it has attachments");
        }
        if readers.replicas.contains(disk) {
            return Some("a replica of an attached volume reads it");
        }
        if self.is_needed_on(name, disk) {
            return Some("another image stands on it");
        }
        if self.is_being_cloned(name, disk) {
            return Some("a clone of it is being made");
        }
        let exported = match &image.export {
            Export::Closed => false,
            Export::Opening(on) | Export::Open(on) | Export::Streaming(on) => on == disk,
        };
        // All readers of an image read by its one export, whichever copies they are attached to.
        let read = readers.disks().next().is_some()
            || self.sessions.get(name).is_some_and(|sessions| *sessions > 0);
        (exported && read).then_some("readers are connected to it")
    }

    /// True if `disk`'s copy can go by itself. A failed one stays until it is made up for: else it
    /// would be tried there anew, without end.
    fn spares(&self, image: &Image, disk: &DiskUuid) -> bool {
        let failed = image.copies.get(disk).is_some_and(|copy| worth(copy) == Worth::Failed);
        image.can_spare(disk) && !(failed && self.is_replenished(image))
    }

    /// Rules 9 and 10, for all copies of one image.
    pub(super) fn clean_up_step(&mut self, now: Duration, name: &ImageName, touched: &mut Touched) {
        let now_s = self.now_unix_s(now);
        let wait_s = self.settings.cleanup_wait().map(|wait| wait.as_secs());
        let Some(image) = self.images.get(name) else { return };
        let stamp = |(disk, want): (&DiskUuid, &Want)| {
            let since = match self.user_of(name, disk) {
                Some(_) => None,
                // A clock that was set back begins the wait anew.
                None => want.unused_since_unix_s.filter(|at| *at <= now_s).or(Some(now_s)),
            };
            let due = since.zip(wait_s).is_some_and(|(since, wait)| now_s >= since + wait)
                && self.spares(image, disk);
            let is_news = since != want.unused_since_unix_s || due;
            is_news.then(|| (disk.clone(), since, due))
        };
        let stamps: Vec<_> = image.record.disks.iter().filter_map(stamp).collect();
        let Some(image) = self.images.get_mut(name) else { return };
        let mut changed = false;
        for (disk, since, due) in stamps {
            let Some(want) = image.record.disks.get_mut(&disk) else { continue };
            changed |= std::mem::replace(&mut want.unused_since_unix_s, since) != since;
            // Of several that are due, one may have to stay now that another goes.
            if due && image.can_spare(&disk) {
                image.give_up(&disk);
                changed = true;
            }
        }
        if changed {
            touched.actions.push(Action::SaveImage(Box::new(image.record.clone())));
            touched.images.insert(name.clone());
        }
    }

    /// When the next copy is due to go; `None` if none is.
    pub(super) fn clean_up_due(&self) -> Option<Duration> {
        let wait_s = self.settings.cleanup_wait()?.as_secs();
        let copies = self.images.values().flat_map(|image| {
            image.record.disks.iter().map(move |(disk, want)| (image, disk, want))
        });
        let due = copies.filter_map(|(image, disk, want)| {
            let since = want.unused_since_unix_s?;
            let free = self.user_of(&image.record.name, disk).is_none() && self.spares(image, disk);
            free.then(|| (since + wait_s).saturating_sub(self.started_unix_s))
        });
        due.min().map(Duration::from_secs)
    }

    /// Rule 11.
    pub(super) fn clean_up(
        &mut self,
        name: ImageName,
        disks: &[DiskUuid],
        touched: &mut Touched,
    ) -> Result<Outcome, ManagerError> {
        let image = self.usable(&name)?;
        let mut left = image.clone();
        for disk in disks {
            if !image.copies.contains_key(disk) {
                return Err(ManagerError::NoSuchCopy { name, disk: disk.clone() });
            }
            if let Some(why) = self.user_of(&name, disk) {
                return Err(ManagerError::CopyInUse { name, disk: disk.clone(), why });
            }
            // What is being given up already is no reason to refuse the others.
            let is_going = left.copies.get(disk).is_some_and(|copy| copy.cancelled);
            if !is_going && !left.can_spare(disk) {
                let least = image.record.min_copies.max(1);
                return Err(ManagerError::TooFewCopies { name, disk: disk.clone(), least });
            }
            left.give_up(disk);
        }
        if left.record != image.record {
            touched.actions.push(Action::SaveImage(Box::new(left.record.clone())));
            touched.images.insert(name.clone());
            self.images.insert(name.clone(), left);
        }
        Ok(Outcome::Image(name, false))
    }
}
