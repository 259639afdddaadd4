//! Images of which every copy has failed (rule 18).
//!
//! Why: a source that was wrong for an hour must not need a person for each image; and of what cannot
//! come back by itself somebody has to hear.
//! How: the time since which all copies of an image are failed is kept; when it is as long as the
//! recovery wait, an image with a URL is started again on a ready disk, as if somebody had asked.
//! Each further time it waits twice as long, up to 64 times: what is refused for good must not be
//! fetched whole every five minutes. Other images are warned of, once.
//! Never: restarts one that is paused, being deleted, or has a copy that may still become good.
//! Start at [`World::recover_step`].

use std::time::Duration;

use super::back_off::BACK_OFF_FIRST;
use super::world::{Action, Change, CopyState, Image, Touched, World};
use crate::names::{DiskUuid, ImageName};

/// What is known of an image's failing, in this run of the daemon.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Failing {
    /// Since when all copies are failed.
    since: Option<Duration>,
    /// How often it was started again since a copy was last complete.
    times: u32,
    /// Somebody was told that nothing can be done.
    warned: bool,
}

impl Failing {
    /// When something is to be done, if anything is.
    fn due(&self, wait: Option<Duration>) -> Option<Duration> {
        let since = self.since.filter(|_| !self.warned)?;
        let wait = match self.times {
            0 => wait?,
            // A wait of nothing must not become a loop without rest.
            times => wait?.max(BACK_OFF_FIRST).saturating_mul(1 << times.min(6)),
        };
        Some(since.saturating_add(wait))
    }
}

impl Image {
    fn is_all_failed(&self) -> bool {
        let mut copies = self.copies.values().filter(|copy| !copy.cancelled).peekable();
        let failed = |state| matches!(state, CopyState::Failed | CopyState::FailedAndCleanup);
        copies.peek().is_some() && copies.all(|copy| failed(copy.state))
    }

    /// Whose copies are all failed, of an image that may be worked on.
    fn is_failing(&self) -> bool {
        !self.record.deleting && !self.record.steering.paused && self.is_all_failed()
    }
}

impl World {
    /// Starts again what has failed for too long, or says that it can't be.
    pub(super) fn recover_step(&mut self, now: Duration, touched: &mut Touched) {
        if self.node_failed {
            return;
        }
        let wait = self.settings.recovery_wait();
        let names: Vec<ImageName> = self.images.keys().cloned().collect();
        for name in names {
            let Some(image) = self.images.get_mut(&name) else { continue };
            if !image.is_failing() {
                (image.failing.since, image.failing.warned) = (None, false);
                if image.copies.values().any(|copy| copy.state.is_sealed()) {
                    image.failing.times = 0;
                }
                continue;
            }
            image.failing.since.get_or_insert(now);
            if image.failing.due(wait).is_none_or(|at| now < at) {
                continue;
            }
            let is_clone = image.record.clone_of.is_some();
            let has_source = image.record.source.is_some() || is_clone;
            let why = image.copies.values().next().map(|copy| copy.message.clone());
            let why = why.unwrap_or_default();
            let disk = self.disk_to_recover_on(&name).filter(|_| has_source);
            let Some(image) = self.images.get_mut(&name) else { continue };
            let message = match &disk {
                Some(disk) => {
                    image.failing.since = Some(now);
                    image.failing.times = image.failing.times.saturating_add(1);
                    format!("all copies have failed ({why}): started again on disk {disk}")
                }
                None if has_source => {
                    image.failing.warned = true;
                    format!("all copies have failed ({why}), and no disk is ready for another")
                }
                None => {
                    image.failing.warned = true;
                    format!("all copies have failed ({why}), and it has no URL to come from again")
                }
            };
            touched.actions.push(Action::Announce(Change::Warning(name.clone(), message)));
            if let Some(disk) = disk {
                self.want_chain(&name, &disk, touched);
            }
        }
    }

    /// A ready disk: one that has a failed copy, else one with room.
    fn disk_to_recover_on(&self, name: &ImageName) -> Option<DiskUuid> {
        let image = self.images.get(name)?;
        let known = image.copies.keys().find(|disk| self.is_fit(disk));
        known.cloned().or_else(|| self.other_disk_for(image))
    }

    /// When the next image is due to be started again.
    pub(super) fn recovery_wake(&self) -> Option<Duration> {
        let wait = self.settings.recovery_wait();
        let failing = self.images.values().filter(|image| image.is_failing());
        let due = failing.filter_map(|image| image.failing.due(wait));
        due.min().filter(|_| !self.node_failed)
    }
}
