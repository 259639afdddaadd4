//! Pause, priority, rate and cancel: how users steer transfers.
//!
//! Why: an image that is brought in must not hold up what is more urgent, nor be stopped only by
//! deleting it.
//! How: the record keeps what was asked for, so that a restart knows it; a paused copy's worker is
//! stopped as at a shutdown, so that what is durable stays, and started again when it may run.
//! Never: takes a copy away that somebody waits for or reads.
//! Start at [`World::command`].

use std::collections::BTreeSet;
use std::time::Duration;

use super::command::Outcome;
use super::error::ManagerError;
use super::world::{Action, Copy, CopyState, Export, Image, Touched, Worker, World};
use crate::names::{DiskUuid, ImageName, Tag};

/// Lowest and highest priority of an image.
pub const PRIORITIES: std::ops::RangeInclusive<i32> = -100..=100;

/// What is to change in how an image is steered; what is `None` stays.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SteeringChange {
    /// Fetch nothing for now, or go on.
    pub paused: Option<bool>,
    /// See [`super::Steering::priority`].
    pub priority: Option<i32>,
    /// Bytes per second at most; 0 is no limit.
    pub rate_bytes_per_s: Option<u64>,
    /// Copies that it is to have, and that stay although nobody uses them.
    pub min_copies: Option<u32>,
    /// Tags that a disk must have for a further copy: all of them.
    pub disk_tags: Option<BTreeSet<Tag>>,
    /// Tags that the node must have: all of them.
    pub node_tags: Option<BTreeSet<Tag>>,
}

impl World {
    pub(super) fn steer(
        &mut self,
        name: ImageName,
        change: SteeringChange,
        touched: &mut Touched,
    ) -> Result<Outcome, ManagerError> {
        self.usable(&name)?;
        if let Some(priority) = change.priority.filter(|p| !PRIORITIES.contains(p)) {
            return Err(ManagerError::BadPriority { priority });
        }
        let Some(image) = self.images.get_mut(&name) else {
            return Err(ManagerError::NoSuchImage { name });
        };
        let (old, before) = (image.record.clone(), image.record.steering);
        let steering = &mut image.record.steering;
        steering.paused = change.paused.unwrap_or(before.paused);
        steering.priority = change.priority.unwrap_or(before.priority);
        if let Some(rate) = change.rate_bytes_per_s {
            steering.rate_bytes_per_s = (rate > 0).then_some(rate);
        }
        let now = *steering;
        let record = &mut image.record;
        record.min_copies = change.min_copies.unwrap_or(record.min_copies);
        let selectors = &mut record.selectors;
        selectors.disk = change.disk_tags.unwrap_or_else(|| std::mem::take(&mut selectors.disk));
        selectors.node = change.node_tags.unwrap_or_else(|| std::mem::take(&mut selectors.node));
        if *record == old {
            return Ok(Outcome::Image(name, false));
        }
        touched.actions.push(Action::SaveImage(Box::new(image.record.clone())));
        touched.images.insert(name.clone());
        for (disk, copy) in &image.copies {
            if matches!(copy.worker, Worker::Running(_)) {
                touched.actions.push(Action::Steer(image.copy_id(disk), now));
            }
        }
        if before.paused && !now.paused {
            for copy in image.copies.values_mut().filter(|copy| !copy.state.is_sealed()) {
                (copy.retry_at, copy.failures) = (None, 0);
            }
        }
        Ok(Outcome::Image(name, false))
    }

    pub(super) fn cancel(
        &mut self,
        name: ImageName,
        touched: &mut Touched,
    ) -> Result<Outcome, ManagerError> {
        let image = self.usable(&name)?;
        let unfinished: Vec<DiskUuid> = image
            .copies
            .iter()
            .filter(|(_, copy)| !copy.state.is_sealed())
            .map(|(disk, _)| disk.clone())
            .collect();
        let readers = self.readers_of(&name);
        let attachments = readers.disks().filter(|disk| unfinished.contains(disk)).count();
        if attachments > 0 {
            return Err(ManagerError::InUse { name, attachments, sessions: 0 });
        }
        if unfinished.iter().any(|disk| self.is_needed_on(&name, disk)) {
            let overlays = self.overlays_of(&name).to_vec();
            return Err(ManagerError::IsABase { name, overlays });
        }
        let Some(first) = unfinished.first() else { return Ok(Outcome::Image(name, false)) };
        let mut left = image.clone();
        for disk in &unfinished {
            left.give_up(disk);
        }
        if self.would_be_replenished(&left) {
            let least = left.record.min_copies;
            return Err(ManagerError::TooFewCopies { name, disk: first.clone(), least });
        }
        touched.actions.push(Action::SaveImage(Box::new(left.record.clone())));
        touched.images.insert(name.clone());
        self.images.insert(name.clone(), left);
        Ok(Outcome::Image(name, false))
    }
}

/// Stops the worker of a copy that is paused or cancelled, and removes what is cancelled.
pub(super) fn step(now: Duration, image: &mut Image, disk: &DiskUuid, touched: &mut Touched) {
    let paused = image.record.steering.paused;
    let is_free = |copy: &Copy| !copy.cancelled && (copy.state.is_sealed() || !paused);
    if image.copies.get(disk).is_none_or(is_free) {
        return;
    }
    let id = image.copy_id(disk);
    let Some(copy) = image.copies.get_mut(disk) else { return };
    // A copy that goes is closed first, also one that turned out bad meanwhile; nobody reads it, or
    // who does was told.
    let mut is_opening = false;
    if copy.cancelled {
        match &image.export {
            Export::Opening(on) if on == disk => is_opening = true,
            Export::Open(on) | Export::Streaming(on) if on == disk => {
                image.export = Export::Closed;
                touched.actions.push(Action::Withdraw(image.record.name.clone()));
            }
            Export::Opening(_) | Export::Open(_) | Export::Streaming(_) | Export::Closed => {}
        }
    }
    match copy.worker {
        Worker::Running(number) => {
            copy.worker = Worker::Stopping(number);
            touched.actions.push(Action::Cancel(id));
        }
        Worker::Idle if copy.cancelled => {
            if !is_opening && !copy.removing && copy.retry_at.is_none_or(|at| now >= at) {
                (copy.removing, copy.retry_at) = (true, None);
                touched.actions.push(Action::Remove(id));
            }
        }
        // Also one that waits for its next try: it is not due while it is paused.
        Worker::Idle if copy.state != CopyState::Unknown && !copy.refused => {
            if copy.state != CopyState::Pending || copy.retry_at.is_some() {
                stopped(copy);
                touched.images.insert(id.image);
            }
        }
        Worker::Idle | Worker::Stopping(_) => {}
    }
}

/// A worker has stopped because it was asked to: that is no failure.
pub(super) fn stopped(copy: &mut Copy) {
    copy.state = CopyState::Pending;
    copy.retry_at = None;
    (copy.progress.rate_bytes_per_s, copy.progress.connections) = (0, 0);
    copy.message = match copy.cancelled {
        true => "cancelled".to_owned(),
        false => "paused; what has arrived is kept".to_owned(),
    };
}
