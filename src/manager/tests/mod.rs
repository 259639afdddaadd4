//! The rules of the lifecycle as tables, and as invariants under any order of events.
//!
//! Here is what all of them share: commands, and a node that panics when it is asked for something
//! forbidden.

mod any_order;
mod chain;
mod cleanup;
mod clone;
mod crash;
mod disks;
mod health;
mod replenish;
mod rules;
mod scrub;
mod selectors;
mod steering;
mod streaming;
mod volumes;

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use super::*;
use crate::names::{ClassName, DiskUuid, ImageName, ImageUuid, VolumeName};

const DISKS: [&str; 3] = ["aaaaaaaa-1111-2222", "bbbbbbbb-1111-2222", "aaaaaaaa-3333-4444"];

fn disk(n: usize) -> DiskUuid {
    DiskUuid::parse(DISKS[n]).unwrap()
}

fn name(text: &str) -> ImageName {
    ImageName::parse(text).unwrap()
}

fn disk_status(n: usize) -> DiskStatus {
    DiskStatus {
        uuid: disk(n),
        path: format!("/disks/{n}").into(),
        total_bytes: 1 << 40,
        free_bytes: 1 << 39,
        reserved_bytes: 0,
        sink: "threads".to_owned(),
        healthy: true,
        message: String::new(),
        node_tags: BTreeSet::new(),
    }
}

fn info(size_bytes: u64) -> CopyInfo {
    CopyInfo {
        path: "/backing".into(),
        format: Format::Raw,
        virtual_size_bytes: size_bytes,
        snapshot_size_bytes: None,
        size_bytes,
        stored_bytes: size_bytes,
        digests: format!("sha256:{}", "a".repeat(64)).parse().unwrap(),
        etag: None,
    }
}

fn create(image: &str) -> Command {
    create_from(image, &format!("http://h/{image}"))
}

fn create_from(image: &str, url: &str) -> Command {
    Command::Create(NewImage {
        name: name(image),
        uuid: ImageUuid::random().unwrap(),
        source: Some(SourceUrl::parse(url).unwrap()),
        upload_bytes: None,
        clone_of: None,
        access: Box::default(),
        mirrors: Vec::new(),
        layout: Layout::AsIs,
        base: None,
        data_file: None,
        snapshot: None,
        min_copies: 0,
        selectors: Box::default(),
        expected: Box::default(),
        declared_format: None,
        disks: Vec::new(),
        created_unix_s: 1,
    })
}

fn create_on(image: &str, base: &str) -> Command {
    let Command::Create(new) = create(image) else { panic!() };
    Command::Create(NewImage { base: Some(name(base)), ..new })
}

fn create_clone(image: &str, of: &str) -> Command {
    let Command::Create(new) = create(image) else { panic!() };
    Command::Create(NewImage { source: None, clone_of: Some(name(of)), ..new })
}

fn create_upload(image: &str, bytes: u64) -> Command {
    let Command::Create(new) = create(image) else { panic!() };
    Command::Create(NewImage { source: None, upload_bytes: Some(bytes), ..new })
}

/// A reader that does not wait until the image is complete.
fn stream(image: &str, on: Option<usize>, reader: &str) -> Command {
    let Command::Attach(new) = attach(image, on, reader) else { panic!() };
    Command::Attach(NewAttachment { stream: true, ..new })
}

fn attach(image: &str, on: Option<usize>, reader: &str) -> Command {
    Command::Attach(NewAttachment {
        stream: false,
        vm: false,
        id: AttachmentId::random().unwrap(),
        image: name(image),
        disk: on.map(disk),
        reader: reader.to_owned(),
        created_unix_s: 1,
    })
}

fn set(setting: Setting, value: i64) -> Command {
    Command::ChangeSettings([(setting, Some(value))].into())
}

/// A node that does nothing by itself as time goes by.
fn quiet() -> Settings {
    Settings::configured([
        (Setting::CleanupWait, -1),
        (Setting::RecoveryWait, -1),
        (Setting::ScrubInterval, 0),
    ])
}

/// A node that does what the world asks, and panics when it asks for something forbidden.
#[derive(Default)]
struct Node {
    world: World,
    now: Duration,
    images: BTreeMap<ImageName, ImageRecord>,
    attachments: BTreeMap<AttachmentId, AttachmentRecord>,
    volumes: BTreeMap<VolumeName, VolumeRecord>,
    classes: BTreeMap<ClassName, ClassRecord>,
    disks: BTreeMap<DiskUuid, DiskRecord>,
    /// A disk that may go with what it holds.
    lost: Option<DiskUuid>,
    settings: SettingsRecord,
    applied: Option<NodeSettings>,
    running: BTreeMap<CopyId, u64>,
    /// Everything that was started, in order.
    tasks: Vec<CopyTask>,
    stopping: BTreeSet<CopyId>,
    /// Of those that run, the scrubs.
    scrubbing: BTreeSet<CopyId>,
    /// What watchers were warned of.
    warnings: Vec<String>,
    files: BTreeMap<CopyId, Option<CopyInfo>>,
    removing: BTreeSet<CopyId>,
    publishing: BTreeSet<CopyId>,
    exported: BTreeMap<ImageName, CopyId>,
    /// Actions so far, and after how many the daemon dies.
    actions: usize,
    dies_after: Option<usize>,
    is_dead: bool,
    has_died: bool,
    /// What has happened and is to be heard of at once, later.
    held: Option<Vec<Event>>,
}

impl Node {
    fn new() -> Self {
        let mut node = Self::default();
        node.restart();
        node
    }

    /// The daemon dies and starts again: only records and files are left.
    fn restart(&mut self) {
        self.running.clear();
        self.stopping.clear();
        self.scrubbing.clear();
        self.removing.clear();
        self.publishing.clear();
        self.exported.clear();
        let found = self.files.iter().map(|(id, info)| FoundCopy {
            id: id.clone(),
            state: match info {
                Some(info) => FoundState::Ready(info.clone()),
                None => FoundState::Filling { bytes_present: 0, bytes_total: None },
            },
        });
        let is_here =
            |disk: &DiskUuid| self.lost.as_ref() != Some(disk) || self.disks.contains_key(disk);
        let (world, actions) = World::restore(
            Records {
                images: self.images.values().cloned().collect(),
                attachments: self.attachments.values().cloned().collect(),
                volumes: self.volumes.values().cloned().collect(),
                classes: self.classes.values().cloned().collect(),
                disks: self.disks.values().cloned().collect(),
                settings: quiet().with(self.settings.clone()),
            },
            (0..DISKS.len()).filter(|n| is_here(&disk(*n))).map(disk_status).collect(),
            found.filter(|found| is_here(&found.id.disk)).collect(),
            1,
        );
        self.world = world;
        self.perform(actions);
        self.event(Event::Tick);
    }

    fn command(&mut self, command: Command) -> Result<Outcome, ManagerError> {
        let (outcome, actions) = self.world.command(self.now, command)?;
        self.perform(actions);
        Ok(outcome)
    }

    fn event(&mut self, event: Event) {
        match &mut self.held {
            Some(held) => held.push(event),
            None => self.events(vec![event]),
        }
    }

    fn events(&mut self, events: Vec<Event>) {
        let actions = self.world.step(self.now, events);
        self.perform(actions);
    }

    #[expect(clippy::too_many_lines, reason = "one table of actions and what each may not do")]
    fn perform(&mut self, actions: Vec<Action>) {
        for action in in_driver_order(actions) {
            self.is_dead |= self.dies_after == Some(self.actions);
            if self.is_dead {
                return;
            }
            self.actions += 1;
            match action {
                Action::SaveImage(record) => {
                    if let Some(old) = self.images.insert(record.name.clone(), (*record).clone()) {
                        assert_eq!(old.uuid, record.uuid, "a uuid never changes");
                    }
                }
                Action::ForgetImage(name) => {
                    assert!(self.images.remove(&name).is_some_and(|r| r.deleting));
                    assert!(!self.files.keys().any(|id| id.image == name), "files go first");
                    assert!(
                        !self.attachments.values().any(|a| a.image == name),
                        "not while in use"
                    );
                    assert!(!self.volumes.values().any(|v| v.image == name), "nor named");
                    let waits = |r: &ImageRecord| {
                        let of = r.clone_of.as_ref().is_some_and(|of| of.image == name);
                        of && r.facts.is_none() && !r.deleting
                    };
                    assert!(!self.images.values().any(waits), "nor still to be cloned");
                }
                Action::SaveAttachment(record) => {
                    self.attachments.insert(record.id.clone(), record);
                }
                Action::ForgetAttachment(id) => assert!(self.attachments.remove(&id).is_some()),
                Action::SaveVolume(record) => {
                    self.volumes.insert(record.name.clone(), *record);
                }
                Action::ForgetVolume(name) => {
                    assert!(self.volumes.remove(&name).is_some_and(|v| !v.attached));
                }
                Action::SaveClass(record) => {
                    self.classes.insert(record.name.clone(), *record);
                }
                Action::SaveSettings(record) => self.settings = record,
                Action::SaveDisk(record) => {
                    self.disks.insert(record.uuid.clone(), *record);
                }
                Action::ForgetDisk(disk) => {
                    assert!(
                        !self.files.keys().any(|id| id.disk == disk)
                            || self.lost == Some(disk.clone())
                    );
                    assert!(self.disks.remove(&disk).is_some());
                }
                Action::ApplySettings(settings) => self.applied = Some(settings),
                Action::ForgetClass(name) => assert!(self.classes.remove(&name).is_some()),
                Action::Start(task, number) => {
                    let record = &self.images[&task.id.image];
                    assert!(!self.world.node_failed(), "nothing starts on a node that is gone");
                    assert!(!record.steering.paused, "nothing is fetched while paused");
                    assert_eq!(record.steering, task.steering);
                    assert!(record.disks.contains_key(&task.id.disk), "recorded before it starts");
                    assert!(!record.deleting && !self.removing.contains(&task.id));
                    assert!(self.running.insert(task.id.clone(), number).is_none(), "one worker");
                    for other in &task.ready_on {
                        let whole = CopyId { disk: other.clone(), ..task.id.clone() };
                        assert!(self.files[&whole].is_some(), "only complete ones are copied");
                    }
                    for (of, disk) in
                        task.origin.iter().flat_map(|o| o.ready_on.iter().map(move |d| (o, d)))
                    {
                        assert!(
                            self.files[&of.on(disk)].is_some(),
                            "only complete ones are cloned"
                        );
                    }
                    let same = |id: &&CopyId| id.image == task.id.image && **id != task.id;
                    let asks = |id: &&CopyId| !self.stopping.contains(*id);
                    assert!(
                        !task.ready_on.is_empty()
                            || !self
                                .running
                                .keys()
                                .filter(same)
                                .any(|id| { asks(&id) && self.files[id].is_none() }),
                        "a source is asked once"
                    );
                    self.files.entry(task.id.clone()).or_insert(None);
                    self.tasks.push(*task);
                }
                Action::Scrub(task, number) => {
                    let record = &self.images[&task.id.image];
                    assert!(!record.deleting && !self.removing.contains(&task.id));
                    assert!(self.files[&task.id].is_some(), "only a complete copy is scrubbed");
                    let on_disk = |id: &&CopyId| id.disk == task.id.disk;
                    assert!(!self.scrubbing.iter().any(|id| on_disk(&id)), "one on a disk");
                    assert!(self.running.insert(task.id.clone(), number).is_none(), "one worker");
                    self.scrubbing.insert(task.id.clone());
                }
                Action::ForgetView(id) => assert!(self.files[&id].is_some()),
                Action::DismissReaders => assert!(self.world.node_failed()),
                Action::Kill(id) => {
                    assert!(self.world.node_failed() && self.running.contains_key(&id));
                    self.stopping.insert(id);
                }
                Action::Cancel(id) => {
                    assert!(self.running.contains_key(&id) && self.stopping.insert(id));
                }
                Action::Steer(id, steering) => {
                    assert!(self.running.contains_key(&id));
                    assert_eq!(self.images[&id.image].steering, steering, "recorded first");
                }
                Action::Remove(id) => {
                    let record = &self.images[&id.image];
                    let unwanted = record.deleting || !record.disks.contains_key(&id.disk);
                    assert!(unwanted || self.wanted_again(&id), "only what nobody wants");
                    assert!(!self.running.contains_key(&id));
                    let held =
                        |image: &ImageName, disk: &DiskUuid| *image == id.image && *disk == id.disk;
                    let read = self.attachments.values().any(|a| held(&a.image, &a.disk))
                        || self.volumes.values().any(|volume| {
                            volume.attached && volume.disks.iter().any(|d| held(&volume.image, d))
                        });
                    assert!(!read || self.wanted_again(&id), "not while somebody waits for it");
                    assert!(!self.exported.values().any(|open| *open == id), "not while exported");
                    assert!(!self.publishing.contains(&id) && self.removing.insert(id));
                }
                Action::Publish(chain) => {
                    let id = chain[0].copy.clone();
                    let whole = |link: &Link| self.files[&link.copy].is_some();
                    assert!(chain.iter().all(whole), "only on sealed copies");
                    assert!(self.files[&id].is_some(), "only a sealed copy is published");
                    assert!(!self.exported.contains_key(&id.image));
                    assert!(self.publishing.insert(id), "once");
                }
                Action::Stream(chain, _) => {
                    let (top, beneath) = chain.split_first().unwrap();
                    let state = self.world.images[&top.copy.image].copies[&top.copy.disk].state;
                    assert!(!state.is_sealed(), "a complete one is published");
                    assert!(!self.world.node_failed());
                    assert!(beneath.iter().all(|link| self.files[&link.copy].is_some()));
                    let wants = |a: &AttachmentRecord| a.stream && a.image == top.copy.image;
                    assert!(self.attachments.values().any(wants), "only for who asked");
                    assert!(!self.exported.contains_key(&top.copy.image));
                    assert!(self.publishing.insert(top.copy.clone()), "once");
                }
                Action::Withdraw(name) => assert!(self.exported.remove(&name).is_some()),
                Action::Announce(Change::Warning(name, message)) => {
                    self.warnings.push(format!("{name}: {message}"));
                }
                Action::Announce(_) => {}
            }
        }
    }

    /// A cancelled copy that is asked for again before its files are gone: they go first.
    fn wanted_again(&self, id: &CopyId) -> bool {
        let copy = self.world.images.get(&id.image).and_then(|i| i.copies.get(&id.disk));
        copy.is_some_and(|copy| copy.cancelled)
    }

    fn report(&mut self, id: &CopyId, event: WorkerEvent) {
        if let WorkerEvent::Ready(info) = &event {
            self.files.insert(id.clone(), Some(info.clone()));
        }
        let ends = matches!(
            event,
            WorkerEvent::Ready(_) | WorkerEvent::Failed { .. } | WorkerEvent::Scrubbed(_)
        );
        let generation = self.running[id];
        self.event(Event::Worker(Report { copy: id.clone(), generation, event: Some(event) }));
        if ends {
            self.end(id);
        }
    }

    fn end(&mut self, id: &CopyId) {
        self.stopping.remove(id);
        self.scrubbing.remove(id);
        let generation = self.running.remove(id).unwrap();
        self.event(Event::Worker(Report { copy: id.clone(), generation, event: None }));
    }

    fn published(&mut self, id: &CopyId, result: Result<(), (FailureClass, String)>) {
        self.publishing.remove(id);
        if result.is_ok() {
            self.exported.insert(id.image.clone(), id.clone());
        }
        self.event(Event::Published(id.clone(), result));
    }

    fn removed(&mut self, id: &CopyId, ok: bool) {
        self.removing.remove(id);
        if ok {
            self.files.remove(id);
        }
        let result = if ok { Ok(()) } else { Err("busy".to_owned()) };
        self.event(Event::Removed(id.clone(), result));
    }

    fn wait(&mut self, wait: Duration) {
        self.now += wait;
        self.event(Event::Tick);
    }

    /// Everything goes well from now on, until nothing is left to do.
    fn settle(&mut self) {
        for _ in 0..1000 {
            if self.is_dead {
                return;
            }
            if let Some(id) = self.running.keys().next().cloned() {
                if self.stopping.contains(&id) {
                    self.end(&id);
                } else if self.scrubbing.contains(&id) {
                    self.report(&id, WorkerEvent::Scrubbed(ScrubReport::default()));
                } else {
                    self.report(&id, WorkerEvent::Ready(info(4096)));
                }
            } else if let Some(id) = self.publishing.iter().next().cloned() {
                self.published(&id, Ok(()));
            } else if let Some(id) = self.removing.iter().next().cloned() {
                self.removed(&id, true);
            } else if let Some(at) = self.world.next_wake() {
                self.wait(at.saturating_sub(self.now));
            } else {
                return;
            }
        }
        panic!("does not converge");
    }

    /// Everything that is asked for now goes well, and no time passes.
    fn settle_now(&mut self) {
        while !self.is_dead {
            if let Some(id) = self.running.keys().next().cloned() {
                match (self.stopping.contains(&id), self.scrubbing.contains(&id)) {
                    (true, _) => self.end(&id),
                    (_, true) => self.report(&id, WorkerEvent::Scrubbed(ScrubReport::default())),
                    (..) => self.report(&id, WorkerEvent::Ready(info(4096))),
                }
            } else if let Some(id) = self.publishing.iter().next().cloned() {
                self.published(&id, Ok(()));
            } else if let Some(id) = self.removing.iter().next().cloned() {
                self.removed(&id, true);
            } else {
                return;
            }
        }
    }

    fn state(&self, image: &str, on: usize) -> Option<CopyState> {
        let image = self.world.image(&name(image))?;
        image.copies.iter().find(|c| c.disk == disk(on)).map(|c| c.state)
    }

    fn only_worker(&self) -> CopyId {
        assert_eq!(self.running.len(), 1);
        self.running.keys().next().unwrap().clone()
    }
}

/// Records first, as the driver stores them; then what is done, in its order.
fn in_driver_order(actions: Vec<Action>) -> impl Iterator<Item = Action> {
    let is_record = |action: &Action| {
        matches!(
            action,
            Action::SaveImage(_)
                | Action::ForgetImage(_)
                | Action::SaveAttachment(_)
                | Action::ForgetAttachment(_)
                | Action::SaveVolume(_)
                | Action::ForgetVolume(_)
                | Action::SaveClass(_)
                | Action::ForgetClass(_)
                | Action::SaveSettings(_)
                | Action::SaveDisk(_)
                | Action::ForgetDisk(_)
        )
    };
    let (records, others): (Vec<_>, Vec<_>) = actions.into_iter().partition(is_record);
    records.into_iter().chain(others)
}

fn failed(class: FailureClass) -> WorkerEvent {
    WorkerEvent::Failed { class, message: "no".to_owned(), cleaned: class == FailureClass::Refuse }
}
