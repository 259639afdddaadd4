//! When complete copies are read against their digests, and what follows from it.
//!
//! Why: what rots unnoticed is served; and a disk that is read all day serves nobody.
//! How: on each disk one copy at a time is scrubbed, those that somebody asked for first, then the
//! one whose last scrub is longest ago. A scrub is a worker of a sealed copy, so it is cancelled,
//! waited for and numbered as any other. A copy that is bad and could not be repaired is `failed`
//! and closed for its readers: they get an error, or another copy, never the bad bytes.
//! Never: scrubs a copy that is on its way, or on its way out.
//! Start at [`World::scrub_step`].

use std::time::Duration;

use super::back_off::fail;
use super::backend::{CopyId, ScrubReport};
use super::command::Outcome;
use super::error::ManagerError;
use super::records::{ScrubRecord, ScrubResult};
use super::step::{ready_elsewhere, task_of};
use super::world::{Action, Change, Copy, Image, Touched, Worker, World};
use crate::image::Format;
use crate::names::{DiskUuid, ImageName};

impl Copy {
    /// True if a scrub of it can begin.
    fn can_be_scrubbed(&self) -> bool {
        self.state.is_sealed() && self.worker == Worker::Idle && !self.cancelled && !self.removing
    }
}

impl Image {
    /// When the copy on `disk` was last known to be good, in seconds since 1970.
    fn last_scrub_unix_s(&self, disk: &DiskUuid) -> u64 {
        let scrub = self.record.disks.get(disk).and_then(|want| want.scrub.as_ref());
        scrub.map_or(self.record.created_unix_s, |scrub| scrub.at_unix_s)
    }
}

impl World {
    /// Reads copies of an image against their digests: those on one disk, or all complete ones.
    pub(super) fn ask_for_scrub(
        &mut self,
        name: ImageName,
        disk: Option<&DiskUuid>,
        touched: &mut Touched,
    ) -> Result<Outcome, ManagerError> {
        let image = self.usable(&name)?;
        if let Some(disk) = disk.filter(|disk| !image.copies.contains_key(*disk)) {
            return Err(ManagerError::NoSuchCopy { name, disk: disk.clone() });
        }
        let Some(image) = self.images.get_mut(&name) else {
            return Err(ManagerError::NoSuchImage { name });
        };
        let copies = image.copies.iter_mut();
        let asked = copies.filter(|(on, copy)| {
            disk.is_none_or(|disk| disk == *on) && copy.state.is_sealed() && !copy.cancelled
        });
        let mut any = false;
        for (_, copy) in asked {
            (copy.scrub_wanted, any) = (true, true);
        }
        if !any {
            return Err(ManagerError::NoCompleteCopy { name });
        }
        touched.images.insert(name.clone());
        Ok(Outcome::Image(name, false))
    }

    /// When the scrub of a copy is due, in seconds since 1970; `None`: never by itself.
    fn scrub_due_unix_s(&self, image: &Image, disk: &DiskUuid) -> Option<u64> {
        let interval = self.settings.scrub_interval()?;
        Some(image.last_scrub_unix_s(disk).saturating_add(interval.as_secs()))
    }

    /// The copy of `disk` that is to be scrubbed next, and when; `None` if there is none, or one is
    /// being scrubbed.
    fn next_scrub(&self, disk: &DiskUuid) -> Option<(CopyId, u64)> {
        let mut next: Option<(CopyId, u64)> = None;
        for image in self.images.values() {
            let Some(copy) = image.copies.get(disk) else { continue };
            if copy.scrubbing {
                return None;
            }
            if image.record.deleting || !copy.can_be_scrubbed() {
                continue;
            }
            let due = match copy.scrub_wanted {
                true => Some(0),
                false => self.scrub_due_unix_s(image, disk),
            };
            let Some(due) = due else { continue };
            if next.as_ref().is_none_or(|(_, first)| due < *first) {
                next = Some((image.copy_id(disk), due));
            }
        }
        next
    }

    fn fit_disks(&self) -> Vec<DiskUuid> {
        self.disks.iter().filter(|d| self.is_fit(&d.uuid)).map(|d| d.uuid.clone()).collect()
    }

    /// On each disk where none is being scrubbed, the next one that is due.
    pub(super) fn scrub_step(&mut self, now: Duration, touched: &mut Touched) {
        let now_s = self.now_unix_s(now);
        let fit = self.fit_disks();
        for disk in &fit {
            let Some((id, due)) = self.next_scrub(disk).filter(|(_, due)| *due <= now_s) else {
                continue;
            };
            tracing::debug!(image = %id.image, %disk, due, "scrub");
            let Some(image) = self.images.get_mut(&id.image) else { continue };
            let ready = ready_elsewhere(image, disk, &|disk| fit.contains(disk));
            self.generation += 1;
            let Some(copy) = image.copies.get_mut(disk) else { continue };
            copy.worker = Worker::Running(self.generation);
            (copy.scrubbing, copy.scrubbed_bytes, copy.scrub_wanted) = (true, 0, false);
            let task = task_of(&image.record, id, copy.worker_name.clone(), ready);
            touched.actions.push(Action::Scrub(Box::new(task), self.generation));
            touched.images.insert(image.record.name.clone());
        }
    }

    /// When the next scrub is due.
    pub(super) fn scrub_wake(&self) -> Option<Duration> {
        let due = self.fit_disks().into_iter().filter_map(|disk| self.next_scrub(&disk));
        let due = due.map(|(_, due)| due.saturating_sub(self.started_unix_s)).min();
        due.map(Duration::from_secs)
    }

    /// What a scrub has found.
    pub(super) fn scrubbed(
        &mut self,
        now: Duration,
        id: &CopyId,
        report: ScrubReport,
        touched: &mut Touched,
    ) {
        let at_unix_s = self.now_unix_s(now);
        let Some(image) = self.images.get_mut(&id.image) else { return };
        let Some(copy) = image.copies.get_mut(&id.disk) else { return };
        let ScrubReport { repaired_bytes, bad_bytes, class, unchecked, message } = report;
        let result = match class {
            Some(_) => ScrubResult::Bad,
            None if unchecked => ScrubResult::Unchecked,
            None if repaired_bytes > 0 => ScrubResult::Repaired,
            None => ScrubResult::Good,
        };
        if let Some(want) = image.record.disks.get_mut(&id.disk) {
            let message = message.clone();
            want.scrub =
                Some(ScrubRecord { at_unix_s, result, repaired_bytes, bad_bytes, message });
        }
        touched.images.insert(id.image.clone());
        // One that was refused meanwhile stays so.
        if let Some(class) = class.filter(|_| copy.state.is_sealed()) {
            fail(copy, now, class, message.clone(), false);
            if copy.refused
                && let Some(want) = image.record.disks.get_mut(&id.disk)
            {
                want.refused = Some(message.clone());
            }
        }
        let is_raw = copy.info.as_ref().is_some_and(|info| info.format == Format::Raw);
        touched.actions.push(Action::SaveImage(Box::new(image.record.clone())));
        if result == ScrubResult::Bad {
            image.close_on(&id.disk, touched);
        }
        if result == ScrubResult::Bad || result == ScrubResult::Unchecked {
            let warning = Change::Warning(id.image.clone(), format!("disk {}: {message}", id.disk));
            touched.actions.push(Action::Announce(warning));
        }
        if result == ScrubResult::Repaired && !is_raw {
            // Its tables and decoded clusters may have been made of bad bytes.
            self.reopen(id, touched);
        }
    }

    /// Closes what is open on a copy, so that it is opened anew.
    fn reopen(&mut self, id: &CopyId, touched: &mut Touched) {
        let names: Vec<ImageName> = self.images.keys().cloned().collect();
        touched.actions.push(Action::ForgetView(id.clone()));
        for name in names {
            let chain = self.chain_on(&name, &id.disk).unwrap_or_default();
            let Some(image) = self.images.get_mut(&name) else { continue };
            let stands = chain.iter().any(|link| link.copy == *id);
            if stands {
                image.close_on(&id.disk, touched);
            }
        }
    }
}
