//! Events, and the reconciling pass that turns facts into actions.
//!
//! Why: the rules of the lifecycle in one place each, testable as tables.
//! How: [`World::step`] takes in what happened; then, for each image, what is missing is asked for:
//! workers for wanted copies, the export for the first sealed one, removal for deleted ones.
//! Never: asks for the same thing twice: the fact that it was asked for is part of the world.
//! Start at [`World::step`].

use std::time::Duration;

use super::back_off::fail;
use super::backend::{CopyId, CopyInfo, CopyTask, FailureClass, Report, WorkerEvent};
use super::beside::Beside;
use super::chain::Chains;
use super::clone::Origin;
use super::facts::{differs, merge};
use super::records::ImageRecord;
use super::world::{
    Action, AttachmentState, Change, Copy, CopyState, Event, Export, Image, Touched, Worker, World,
};
use super::{steer, stream};
use crate::names::{DiskUuid, ImageName};

impl World {
    /// Takes in what happened, in this order, up to `now` (since the daemon's start) and says what
    /// to do: one pass for all of it.
    pub fn step(&mut self, now: Duration, events: impl IntoIterator<Item = Event>) -> Vec<Action> {
        let mut touched = Touched::default();
        for event in events {
            match event {
                Event::Worker(report) => self.hear(now, report, &mut touched),
                Event::Published(copy, result) => self.published(now, &copy, result, &mut touched),
                Event::Removed(copy, result) => self.removed(now, &copy, result, &mut touched),
                Event::Disks(disks) => self.see_disks(disks, &mut touched),
                Event::Tick => {}
            }
        }
        self.finish(now, touched)
    }

    /// Reconciles every image and tells the watchers what was touched.
    pub(super) fn finish(&mut self, now: Duration, mut touched: Touched) -> Vec<Action> {
        self.index_step();
        self.want_for_replicas(&mut touched);
        self.lose_step(&mut touched);
        self.evict_step(&mut touched);
        self.recover_step(now, &mut touched);
        self.replenish_step(now, &mut touched);
        let names: Vec<ImageName> = self.images.keys().cloned().collect();
        for name in &names {
            self.reconcile(now, name, &mut touched);
        }
        if self.images.len() < names.len() {
            // What is gone stands on nothing any more.
            self.index_step();
        }
        self.scrub_step(now, &mut touched);
        let mut actions = touched.actions;
        for name in &touched.images {
            actions.push(Action::Announce(Change::ImageUpdated(name.clone())));
        }
        for name in touched.progress.difference(&touched.images) {
            actions.push(Action::Announce(Change::ImageProgress(name.clone())));
        }
        let states: Vec<(_, AttachmentState)> = self
            .attachments
            .iter()
            .map(|(id, a)| (id.clone(), self.attachment_state(&a.record).0))
            .collect();
        for (id, state) in states {
            if let Some(attachment) = self.attachments.get_mut(&id)
                && attachment.announced != state
            {
                attachment.announced = state;
                actions.push(Action::Announce(Change::AttachmentUpdated(id)));
            }
        }
        self.announce_volumes(&mut actions);
        actions
    }

    fn copy_mut(&mut self, id: &CopyId) -> Option<&mut Copy> {
        let image = self.images.get_mut(&id.image)?;
        if image.record.uuid != id.uuid {
            return None;
        }
        image.copies.get_mut(&id.disk)
    }

    /// A worker's report (rules 4 to 7). One of an older worker changes nothing.
    fn hear(&mut self, now: Duration, report: Report, touched: &mut Touched) {
        let Report { copy: id, generation, event } = report;
        let Some(copy) = self.copy_mut(&id) else { return };
        let current = match copy.worker {
            Worker::Idle => return,
            Worker::Running(number) | Worker::Stopping(number) => number,
        };
        if current != generation {
            return;
        }
        let stopping = matches!(copy.worker, Worker::Stopping(_));
        let unwanted = copy.cancelled;
        match event {
            None => {
                copy.worker = Worker::Idle;
                copy.scrubbing = false;
                let unfinished = matches!(
                    copy.state,
                    CopyState::Pending | CopyState::Starting | CopyState::InProgress
                );
                if stopping && unfinished {
                    steer::stopped(copy);
                } else if matches!(copy.state, CopyState::Starting | CopyState::InProgress) {
                    let message = "its worker ended without a result".to_owned();
                    fail(copy, now, FailureClass::Retry, message, false);
                }
                touched.images.insert(id.image);
            }
            Some(WorkerEvent::Scrubbed(report)) if !unwanted && copy.scrubbing => {
                self.scrubbed(now, &id, report, touched);
            }
            Some(WorkerEvent::Scrubbing(bytes)) if !unwanted && copy.scrubbing => {
                copy.scrubbed_bytes = bytes;
                touched.progress.insert(id.image);
            }
            Some(_) if stopping || unwanted || copy.scrubbing || copy.state.is_sealed() => {}
            Some(WorkerEvent::Started | WorkerEvent::Scrubbing(_) | WorkerEvent::Scrubbed(_)) => {
                touched.progress.insert(id.image);
            }
            Some(WorkerEvent::Progress(progress)) => {
                let first = copy.state != CopyState::InProgress;
                copy.state = CopyState::InProgress;
                copy.message.clone_from(&progress.message);
                copy.progress = progress;
                let told = if first { &mut touched.images } else { &mut touched.progress };
                told.insert(id.image);
            }
            Some(WorkerEvent::Ready(info)) => self.sealed(now, &id, info, touched),
            Some(WorkerEvent::Failed { class, message, cleaned }) => {
                fail(copy, now, class, message, cleaned);
                self.note_refusal(&id, touched);
                touched.images.insert(id.image);
            }
        }
    }

    /// A copy is complete: what it tells is recorded once, and held against the next (rule 20).
    fn sealed(&mut self, now: Duration, id: &CopyId, info: CopyInfo, touched: &mut Touched) {
        touched.images.insert(id.image.clone());
        let Some(image) = self.images.get_mut(&id.image) else { return };
        let Some(copy) = image.copies.get_mut(&id.disk) else { return };
        let facts = info.facts();
        if let Some(fault) = image.record.facts.as_ref().and_then(|known| differs(known, &facts)) {
            fail(copy, now, FailureClass::Refuse, fault, false);
            return self.note_refusal(id, touched);
        }
        copy.state = CopyState::ReadyForTransfer;
        copy.progress.bytes_done = info.size_bytes;
        copy.progress.bytes_total = Some(info.size_bytes);
        copy.progress.rate_bytes_per_s = 0;
        copy.message.clear();
        (copy.failures, copy.retry_at, copy.bytes_at_failure) = (0, None, 0);
        copy.info = Some(info);
        let merged = merge(image.record.facts.take(), facts);
        image.record.facts = Some(merged);
        touched.actions.push(Action::SaveImage(Box::new(image.record.clone())));
    }

    /// Keeps a refusal in the record, so that a restart doesn't try again by itself.
    fn note_refusal(&mut self, id: &CopyId, touched: &mut Touched) {
        let Some(image) = self.images.get_mut(&id.image) else { return };
        let Some(copy) = image.copies.get(&id.disk) else { return };
        let Some(want) = image.record.disks.get_mut(&id.disk) else { return };
        if copy.refused && !image.record.deleting {
            want.refused = Some(copy.message.clone());
            touched.actions.push(Action::SaveImage(Box::new(image.record.clone())));
        }
    }

    fn published(
        &mut self,
        now: Duration,
        id: &CopyId,
        result: Result<(), (FailureClass, String)>,
        touched: &mut Touched,
    ) {
        let image = self.images.get_mut(&id.image).filter(|image| image.record.uuid == id.uuid);
        let Some(image) = image.filter(|i| i.export == Export::Opening(id.disk.clone())) else {
            return;
        };
        let Some(copy) = image.copies.get_mut(&id.disk) else { return };
        touched.images.insert(id.image.clone());
        // What it says is of bytes that are bad, gone or others now.
        let is_stale = std::mem::take(&mut image.stale);
        match result {
            Ok(()) if is_stale => {
                image.export = Export::Open(id.disk.clone());
                image.close(touched);
            }
            Err(_) if is_stale => image.export = Export::Closed,
            Ok(()) if !copy.state.is_sealed() => {
                image.export = Export::Streaming(id.disk.clone());
            }
            Err((_, message)) if !copy.state.is_sealed() => {
                image.export = Export::Closed;
                copy.no_stream = Some(message);
            }
            Ok(()) => {
                image.export = Export::Open(id.disk.clone());
                copy.state = CopyState::Ready;
                copy.message.clear();
            }
            Err((class, message)) => {
                image.export = Export::Closed;
                fail(copy, now, class, message, false);
                self.note_refusal(id, touched);
            }
        }
    }

    fn removed(
        &mut self,
        now: Duration,
        id: &CopyId,
        result: Result<(), String>,
        touched: &mut Touched,
    ) {
        let Some(copy) = self.copy_mut(id) else { return };
        if !copy.removing {
            return;
        }
        copy.removing = false;
        touched.images.insert(id.image.clone());
        if let Err(message) = result {
            fail(copy, now, FailureClass::Retry, message, false);
        } else if let Some(image) = self.images.get_mut(&id.image) {
            image.copies.remove(&id.disk);
            // Wanted again meanwhile: it begins anew.
            if !image.record.deleting && image.record.disks.contains_key(&id.disk) {
                image.copy_on(&id.disk);
            }
        }
    }

    fn reconcile(&mut self, now: Duration, name: &ImageName, touched: &mut Touched) {
        if self.node_failed {
            // Nothing is done on a node that is gone, but nobody reads there either.
            let chains = self.chains_of(name);
            if let Some(image) = self.images.get_mut(name).filter(|image| !image.record.deleting) {
                publish_step(image, chains, touched);
            }
            return;
        }
        if self.images.get(name).is_some_and(|image| !image.record.deleting) {
            self.clean_up_step(now, name, touched);
        }
        let (chains, streams) = (self.chains_of(name), self.streams_of(name));
        let (is_lost, origin) = (self.lost.contains(name), self.origin_of(name));
        let Some(image) = self.images.get_mut(name) else { return };
        if image.record.deleting {
            if delete_step(now, image, touched) {
                self.images.remove(name);
                touched.images.remove(name);
                touched.progress.remove(name);
            }
            return;
        }
        let disks = &self.disks;
        let fit = |uuid: &DiskUuid| disks.iter().any(|d| &d.uuid == uuid && d.healthy);
        let wanted: Vec<DiskUuid> = image.copies.keys().cloned().collect();
        for disk in &wanted {
            steer::step(now, image, disk, touched);
        }
        // What stops is told so before anything takes its place.
        for disk in &wanted {
            start_step(now, image, disk, &fit, origin.clone(), &mut self.generation, touched);
        }
        let streamed = matches!(&image.export, Export::Streaming(disk) if chains.is_whole_on(disk));
        if !streamed {
            stream::close_step(image, is_lost, !chains.whole.is_empty(), touched);
        }
        publish_step(image, chains, touched);
        stream::open_step(image, streams, touched);
    }
}

/// Rule 3 and 7: a wanted copy without a worker gets one, after its back-off.
fn start_step(
    now: Duration,
    image: &mut Image,
    disk: &DiskUuid,
    is_fit: &dyn Fn(&DiskUuid) -> bool,
    origin: Origin,
    generation: &mut u64,
    touched: &mut Touched,
) {
    let is_complete = |copy: &Copy| copy.state.is_sealed();
    if image.copies.get(disk).is_none_or(is_complete) {
        return;
    }
    let id = image.copy_id(disk);
    let record = &image.record;
    let ready = ready_elsewhere(image, disk, is_fit);
    let first = being_brought_in(image, disk);
    let Some(copy) = image.copies.get_mut(disk) else { return };
    let busy = copy.worker != Worker::Idle || copy.removing || copy.cancelled;
    let is_back = copy.state == CopyState::Unknown && !copy.refused && is_fit(disk);
    if !busy && is_back && record.steering.paused {
        // A worker might fetch. Whoever opens it looks at its record, and a scrub at all of it.
        match copy.info.is_some() {
            true => (copy.state, copy.scrub_wanted) = (CopyState::ReadyForTransfer, true),
            false => steer::stopped(copy),
        }
        touched.images.insert(id.image);
        return;
    }
    if busy || copy.refused || record.steering.paused {
        return;
    }
    if !is_fit(disk) {
        if copy.state != CopyState::Unknown {
            copy.state = CopyState::Unknown;
            copy.retry_at = None;
            copy.message = format!("disk {disk} is not there or not healthy; see `bedplate disks`");
            touched.images.insert(id.image);
        }
        return;
    }
    if copy.retry_at.is_some_and(|at| now < at) {
        return;
    }
    let first = first.map(|d| format!("waits for the copy on disk {d}, to be copied from there"));
    if let (true, Some(message)) = (ready.is_empty(), first.or(origin.waits)) {
        if copy.state != CopyState::Pending || copy.message != message {
            (copy.state, copy.retry_at, copy.message) = (CopyState::Pending, None, message);
            touched.images.insert(id.image);
        }
        return;
    }
    *generation += 1;
    copy.worker = Worker::Running(*generation);
    if copy.state == CopyState::Pending {
        // It waited; of a failed one, why it failed stays until there is news.
        copy.message.clear();
    }
    copy.state = CopyState::Starting;
    (copy.retry_at, copy.no_stream) = (None, None);
    let mut task = task_of(record, id, copy.worker_name.clone(), ready);
    (task.origin, task.beside) = (origin.from, origin.beside);
    touched.images.insert(record.name.clone());
    touched.actions.push(Action::Start(Box::new(task), *generation));
}

/// What a worker is told.
pub(super) fn task_of(
    record: &ImageRecord,
    id: CopyId,
    worker: String,
    ready_on: Vec<DiskUuid>,
) -> CopyTask {
    CopyTask {
        worker,
        source: record.source.clone(),
        mirrors: record.mirrors.clone(),
        upload_bytes: record.upload_bytes,
        layout: record.layout,
        beside: Beside { base: record.base.is_some(), ..Beside::default() },
        snapshot: record.snapshot.clone(),
        steering: record.steering,
        access: record.access.clone(),
        expected: record.expected.clone(),
        declared_format: record.declared_format,
        facts: record.facts.clone(),
        ready_on,
        origin: None,
        id,
    }
}

/// Rule 17: the disks from which a copy for `disk` can be copied.
pub(super) fn ready_elsewhere(
    image: &Image,
    disk: &DiskUuid,
    is_fit: &dyn Fn(&DiskUuid) -> bool,
) -> Vec<DiskUuid> {
    let sealed = |copy: &Copy| copy.state.is_sealed() && !copy.cancelled && !copy.removing;
    let others = image.copies.iter().filter(|(other, copy)| *other != disk && sealed(copy));
    others.map(|(other, _)| other).filter(|other| is_fit(other)).cloned().collect()
}

/// The other disk on which the image's first copy is being brought in, if one is: a source is
/// asked once.
fn being_brought_in(image: &Image, disk: &DiskUuid) -> Option<DiskUuid> {
    let busy = |copy: &Copy| {
        matches!(copy.worker, Worker::Running(_)) && !copy.state.is_sealed() && !copy.cancelled
    };
    let mut others = image.copies.iter().filter(|(other, _)| *other != disk);
    others.find(|(_, copy)| busy(copy)).map(|(other, _)| other.clone())
}

/// The first sealed copy that stands on sealed ones is opened for readers; the others are ready as
/// soon as it is.
fn publish_step(image: &mut Image, chains: Chains, touched: &mut Touched) {
    let mut became_ready = false;
    for (disk, why) in &chains.waiting {
        if let Some(copy) = image.copies.get_mut(disk).filter(|copy| copy.message != *why) {
            copy.message.clone_from(why);
            touched.images.insert(image.record.name.clone());
        }
    }
    // A copy that is no longer good is closed, and so is what stands on it: readers get an error, or
    // another copy, and never its bytes.
    if let Export::Open(disk) = &image.export
        && !chains.is_whole_on(disk)
    {
        image.close(touched);
    }
    if let Export::Streaming(disk) = &image.export
        && chains.is_whole_on(disk)
    {
        // It is the same file, complete now.
        image.export = Export::Open(disk.clone());
    }
    match &image.export {
        Export::Opening(_) | Export::Streaming(_) => {}
        Export::Open(_) => {
            for (disk, copy) in &mut image.copies {
                if copy.state == CopyState::ReadyForTransfer && chains.is_whole_on(disk) {
                    copy.state = CopyState::Ready;
                    copy.message.clear();
                    became_ready = true;
                }
            }
        }
        Export::Closed => {
            if let Some((disk, chain)) = chains.whole.into_iter().next() {
                touched.actions.push(Action::Publish(chain));
                image.export = Export::Opening(disk);
            }
        }
    }
    if became_ready {
        touched.images.insert(image.record.name.clone());
    }
}

/// Rule 12: the export closes, workers stop, files go, then the record. True once all is gone.
fn delete_step(now: Duration, image: &mut Image, touched: &mut Touched) -> bool {
    match image.export {
        Export::Opening(_) => return false,
        Export::Open(_) | Export::Streaming(_) => {
            image.export = Export::Closed;
            touched.actions.push(Action::Withdraw(image.record.name.clone()));
        }
        Export::Closed => {}
    }
    let disks: Vec<DiskUuid> = image.copies.keys().cloned().collect();
    for disk in disks {
        let id = image.copy_id(&disk);
        let Some(copy) = image.copies.get_mut(&disk) else { continue };
        match copy.worker {
            Worker::Running(number) => {
                copy.worker = Worker::Stopping(number);
                touched.actions.push(Action::Cancel(id));
            }
            Worker::Idle if !copy.removing && copy.retry_at.is_none_or(|at| now >= at) => {
                copy.removing = true;
                copy.retry_at = None;
                touched.actions.push(Action::Remove(id));
            }
            Worker::Idle | Worker::Stopping(_) => {}
        }
    }
    if image.copies.is_empty() {
        touched.actions.push(Action::ForgetImage(image.record.name.clone()));
        touched.actions.push(Action::Announce(Change::ImageDeleted(image.record.name.clone())));
        return true;
    }
    false
}
