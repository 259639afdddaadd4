//! The rules of the lifecycle as tables, and as invariants under any order of events.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use proptest::prelude::*;

use super::*;
use crate::names::{DiskUuid, ImageName, ImageUuid};

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
    }
}

fn info(size_bytes: u64) -> CopyInfo {
    CopyInfo {
        format: Format::Raw,
        virtual_size_bytes: size_bytes,
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
        access: Box::default(),
        mirrors: Vec::new(),
        layout: Layout::AsIs,
        base: None,
        snapshot: None,
        min_copies: 0,
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

fn create_upload(image: &str, bytes: u64) -> Command {
    let Command::Create(new) = create(image) else { panic!() };
    Command::Create(NewImage { source: None, upload_bytes: Some(bytes), ..new })
}

fn attach(image: &str, on: Option<usize>, reader: &str) -> Command {
    Command::Attach(NewAttachment {
        id: AttachmentId::random().unwrap(),
        image: name(image),
        disk: on.map(disk),
        reader: reader.to_owned(),
        created_unix_s: 1,
    })
}

/// A node that does what the world asks, and panics when it asks for something forbidden.
#[derive(Default)]
struct Node {
    world: World,
    now: Duration,
    images: BTreeMap<ImageName, ImageRecord>,
    attachments: BTreeMap<AttachmentId, AttachmentRecord>,
    running: BTreeMap<CopyId, u64>,
    /// Everything that was started, in order.
    tasks: Vec<CopyTask>,
    stopping: BTreeSet<CopyId>,
    files: BTreeMap<CopyId, Option<CopyInfo>>,
    removing: BTreeSet<CopyId>,
    publishing: BTreeSet<CopyId>,
    exported: BTreeMap<ImageName, CopyId>,
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
        let (world, actions) = World::restore(
            self.images.values().cloned().collect(),
            self.attachments.values().cloned().collect(),
            (0..DISKS.len()).map(disk_status).collect(),
            found.collect(),
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
        let actions = self.world.step(self.now, event);
        self.perform(actions);
    }

    fn perform(&mut self, actions: Vec<Action>) {
        for action in actions {
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
                }
                Action::SaveAttachment(record) => {
                    self.attachments.insert(record.id.clone(), record);
                }
                Action::ForgetAttachment(id) => assert!(self.attachments.remove(&id).is_some()),
                Action::Start(task, number) => {
                    let record = &self.images[&task.id.image];
                    assert!(!record.steering.paused, "nothing is fetched while paused");
                    assert_eq!(record.steering, task.steering);
                    assert!(record.disks.contains_key(&task.id.disk), "recorded before it starts");
                    assert!(!record.deleting && !self.removing.contains(&task.id));
                    assert!(self.running.insert(task.id.clone(), number).is_none(), "one worker");
                    self.files.entry(task.id.clone()).or_insert(None);
                    self.tasks.push(*task);
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
                    let read =
                        self.attachments.values().any(|a| a.image == id.image && a.disk == id.disk);
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
                Action::Withdraw(name) => assert!(self.exported.remove(&name).is_some()),
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
        let ends = matches!(event, WorkerEvent::Ready(_) | WorkerEvent::Failed { .. });
        let generation = self.running[id];
        self.event(Event::Worker(Report { copy: id.clone(), generation, event: Some(event) }));
        if ends {
            self.end(id);
        }
    }

    fn end(&mut self, id: &CopyId) {
        self.stopping.remove(id);
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
            if let Some(id) = self.running.keys().next().cloned() {
                if self.stopping.contains(&id) {
                    self.end(&id);
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

    fn state(&self, image: &str, on: usize) -> Option<CopyState> {
        let image = self.world.image(&name(image))?;
        image.copies.iter().find(|c| c.disk == disk(on)).map(|c| c.state)
    }

    fn only_worker(&self) -> CopyId {
        assert_eq!(self.running.len(), 1);
        self.running.keys().next().unwrap().clone()
    }
}

fn failed(class: FailureClass) -> WorkerEvent {
    WorkerEvent::Failed { class, message: "no".to_owned(), cleaned: class == FailureClass::Refuse }
}

#[test]
fn rule_1_a_created_image_is_not_fetched() {
    let mut node = Node::new();
    node.command(create("a")).unwrap();
    node.wait(Duration::from_secs(3600));
    assert!(node.running.is_empty() && node.files.is_empty());
}

#[test]
fn rule_2_an_attachment_waits_for_its_copy_and_then_is_ready() {
    let mut node = Node::new();
    node.command(create("a")).unwrap();
    let Outcome::Attachment(id, true) = node.command(attach("a", Some(1), "vm")).unwrap() else {
        panic!("no attachment")
    };
    assert_eq!(node.world.attachment(&id).unwrap().state, AttachmentState::Waiting);
    let copy = node.only_worker();
    assert_eq!((copy.disk.clone(), node.state("a", 1)), (disk(1), Some(CopyState::Starting)));
    node.report(&copy, WorkerEvent::Progress(Progress { bytes_done: 5, ..Progress::default() }));
    assert_eq!(node.state("a", 1), Some(CopyState::InProgress));
    node.report(&copy, WorkerEvent::Ready(info(9)));
    assert_eq!(node.state("a", 1), Some(CopyState::ReadyForTransfer));
    assert_eq!(node.world.attachment(&id).unwrap().state, AttachmentState::Waiting);
    node.published(&copy, Ok(()));
    assert_eq!(node.world.attachment(&id).unwrap().state, AttachmentState::Ready);
}

#[test]
fn rule_7_failures_back_off_and_double_to_five_minutes() {
    let waits: Vec<u64> = (1..12).map(|n| back_off(n).as_secs()).collect();
    assert_eq!(waits, [1, 2, 4, 8, 16, 32, 64, 128, 256, 300, 300]);
    let mut node = Node::new();
    node.command(create("a")).unwrap();
    node.command(attach("a", None, "")).unwrap();
    for wait in [1, 2, 4] {
        let copy = node.only_worker();
        node.report(&copy, failed(FailureClass::Retry));
        node.wait(Duration::from_secs(wait) - Duration::from_millis(1));
        assert!(node.running.is_empty());
        assert_eq!(node.state("a", 0), Some(CopyState::Failed));
        node.wait(Duration::from_millis(1));
    }
    // More bytes than at the last failure: trying helps, so the wait begins anew.
    let copy = node.only_worker();
    node.report(&copy, WorkerEvent::Progress(Progress { bytes_done: 5, ..Progress::default() }));
    node.report(&copy, failed(FailureClass::Retry));
    node.wait(Duration::from_secs(1));
    node.only_worker();
}

#[test]
fn a_refused_copy_is_tried_again_only_by_a_new_attach_or_fetch_even_after_a_restart() {
    for again in [attach("a", Some(0), "vm"), Command::Fetch(name("a"), None)] {
        let mut node = Node::new();
        node.command(create("a")).unwrap();
        node.command(attach("a", Some(0), "vm")).unwrap();
        let copy = node.only_worker();
        node.report(&copy, failed(FailureClass::Refuse));
        node.wait(Duration::from_secs(3600));
        assert!(node.running.is_empty());
        assert_eq!(node.world.attachments()[0].state, AttachmentState::Failed);
        node.restart();
        assert!(node.running.is_empty());
        assert_eq!(node.world.attachments()[0].message, "no");
        node.command(again).unwrap();
        assert_eq!(node.only_worker(), copy);
        assert_eq!(node.world.attachments()[0].state, AttachmentState::Waiting);
        assert_eq!(node.world.attachments().len(), 1, "the same label is the same attachment");
    }
}

#[test]
fn rule_12_delete_is_refused_in_use_and_then_removes_files_before_the_record() {
    let mut node = Node::new();
    node.command(create("a")).unwrap();
    let Outcome::Attachment(id, _) = node.command(attach("a", None, "")).unwrap() else { panic!() };
    node.settle();
    let delete = |sessions| Command::Delete { name: name("a"), sessions };
    assert!(matches!(
        node.command(delete(0)),
        Err(ManagerError::InUse { attachments: 1, sessions: 0, .. })
    ));
    node.command(Command::Detach(id)).unwrap();
    assert!(matches!(node.command(delete(2)), Err(ManagerError::InUse { sessions: 2, .. })));
    node.command(delete(0)).unwrap();
    assert!(matches!(node.command(attach("a", None, "")), Err(ManagerError::BeingDeleted { .. })));
    let copy = node.removing.iter().next().unwrap().clone();
    node.removed(&copy, false);
    assert!(node.world.image(&name("a")).is_some(), "files are left, so the record stays");
    node.restart();
    node.settle();
    assert!(node.world.images().is_empty() && node.images.is_empty() && node.files.is_empty());
}

#[test]
fn rule_13_the_same_name_with_another_source_is_refused_without_its_secrets() {
    let mut node = Node::new();
    node.command(create_from("a", "https://u:pw@h/a?sig=pw")).unwrap();
    let same = node.command(create_from("a", "https://u:pw@h/a?sig=pw")).unwrap();
    assert_eq!(same, Outcome::Image(name("a"), false));
    let error = node.command(create_from("a", "http://h/b")).unwrap_err();
    assert!(matches!(error, ManagerError::OtherSource { .. }));
    assert!(!format!("{error} {error:?}").contains("pw"));
}

#[test]
fn rule_20_a_copy_that_differs_from_the_first_is_refused() {
    let mut node = Node::new();
    node.command(create("a")).unwrap();
    node.command(Command::Fetch(name("a"), Some(disk(0)))).unwrap();
    node.settle();
    node.command(Command::Fetch(name("a"), Some(disk(1)))).unwrap();
    let copy = node.only_worker();
    node.report(&copy, WorkerEvent::Ready(info(5000)));
    assert_eq!(node.state("a", 1), Some(CopyState::Failed));
    assert_eq!(node.state("a", 0), Some(CopyState::Ready));
    let image = node.world.image(&name("a")).unwrap();
    assert!(image.copies[1].message.contains("size in bytes is 5000, an earlier copy had 4096"));
    assert_eq!(image.record.facts.unwrap().size_bytes, 4096);
}

#[test]
fn after_a_restart_ready_copies_are_adopted_and_unfinished_ones_start_again() {
    let mut node = Node::new();
    node.command(create("a")).unwrap();
    node.command(create("b")).unwrap();
    node.command(attach("a", Some(0), "")).unwrap();
    node.settle();
    node.command(attach("b", Some(1), "")).unwrap();
    node.restart();
    assert_eq!(node.only_worker().image, name("b"));
    assert_eq!(node.publishing.iter().next().unwrap().image, name("a"));
    node.settle();
    assert!(node.world.attachments().iter().all(|a| a.state == AttachmentState::Ready));
}

#[test]
fn a_sealed_copy_without_a_record_becomes_an_image_without_a_source() {
    let mut node = Node::new();
    let id = CopyId { image: name("found"), uuid: ImageUuid::parse("0a").unwrap(), disk: disk(0) };
    node.files.insert(id, Some(info(9)));
    node.restart();
    node.settle();
    assert_eq!(node.state("found", 0), Some(CopyState::Ready));
    assert_eq!(node.images[&name("found")].source, None);
}

#[test]
fn a_late_report_of_an_older_worker_changes_nothing() {
    let mut node = Node::new();
    node.command(create("a")).unwrap();
    node.command(attach("a", None, "")).unwrap();
    let copy = node.only_worker();
    let old = node.running[&copy];
    node.report(&copy, failed(FailureClass::Retry));
    node.wait(Duration::from_secs(1));
    assert_ne!(node.running[&copy], old);
    let late = WorkerEvent::Ready(info(9));
    node.event(Event::Worker(Report { copy, generation: old, event: Some(late) }));
    assert_eq!(node.state("a", 0), Some(CopyState::Starting));
}

#[test]
fn two_disks_with_the_same_first_8_have_workers_of_different_names() {
    let mut node = Node::new();
    node.command(create("a")).unwrap();
    node.command(Command::Fetch(name("a"), Some(disk(0)))).unwrap();
    node.command(Command::Fetch(name("a"), Some(disk(2)))).unwrap();
    let image = node.world.image(&name("a")).unwrap();
    let workers: Vec<_> = image.copies.iter().map(|c| c.worker.as_str()).collect();
    assert_eq!(workers, ["a-aaaaaaaa", "a-aaaaaaaa-3333-44"]);
}

#[test]
fn an_unhealthy_disk_gets_no_worker_until_it_is_back() {
    let mut node = Node::new();
    node.command(create("a")).unwrap();
    let mut disks: Vec<_> = (0..3).map(disk_status).collect();
    disks[0].healthy = false;
    node.event(Event::Disks(disks));
    node.command(attach("a", Some(0), "")).unwrap();
    assert_eq!((node.state("a", 0), node.running.len()), (Some(CopyState::Unknown), 0));
    node.event(Event::Disks((0..3).map(disk_status).collect()));
    assert_eq!(node.only_worker().disk, disk(0));
}

fn steer(change: SteeringChange) -> Command {
    Command::Steer(name("a"), change)
}

fn paused(paused: bool) -> Command {
    steer(SteeringChange { paused: Some(paused), ..SteeringChange::default() })
}

#[test]
fn a_paused_image_keeps_what_has_arrived_and_goes_on_when_it_may() {
    let mut node = Node::new();
    node.command(create("a")).unwrap();
    node.command(attach("a", Some(0), "vm")).unwrap();
    let id = node.only_worker();
    node.report(&id, WorkerEvent::Progress(Progress { bytes_done: 7, ..Progress::default() }));
    node.command(paused(true)).unwrap();
    assert!(node.stopping.contains(&id));
    node.end(&id);
    let copy = &node.world.image(&name("a")).unwrap().copies[0];
    assert_eq!((copy.state, copy.progress.bytes_done), (CopyState::Pending, 7));
    assert!(copy.message.contains("paused"), "{}", copy.message);
    node.wait(Duration::from_secs(3600));
    node.restart();
    node.wait(Duration::from_secs(3600));
    assert!(node.running.is_empty(), "a restart does not forget it");
    node.command(paused(false)).unwrap();
    node.settle();
    assert_eq!(node.state("a", 0), Some(CopyState::Ready));
}

#[test]
fn a_rate_and_a_priority_reach_the_worker_and_are_bounded() {
    let mut node = Node::new();
    node.command(create("a")).unwrap();
    node.command(attach("a", Some(0), "vm")).unwrap();
    let change = SteeringChange {
        rate_bytes_per_s: Some(7),
        priority: Some(5),
        ..SteeringChange::default()
    };
    let (_, actions) = node.world.command(node.now, steer(change)).unwrap();
    let told = Steering { rate_bytes_per_s: Some(7), priority: 5, paused: false };
    assert!(actions.contains(&Action::Steer(node.only_worker(), told)), "{actions:?}");
    let none = SteeringChange { rate_bytes_per_s: Some(0), ..SteeringChange::default() };
    node.world.command(node.now, steer(none)).unwrap();
    let steering = node.world.image(&name("a")).unwrap().record.steering;
    assert_eq!((steering.rate_bytes_per_s, steering.priority), (None, 5));
    let wild = SteeringChange { priority: Some(101), ..SteeringChange::default() };
    assert!(matches!(node.command(steer(wild)), Err(ManagerError::BadPriority { .. })));
}

#[test]
fn a_cancelled_copy_goes_with_its_files_but_not_while_somebody_waits() {
    let mut node = Node::new();
    node.command(create("a")).unwrap();
    node.command(attach("a", Some(0), "vm")).unwrap();
    let refused = node.command(Command::Cancel(name("a")));
    assert!(matches!(refused, Err(ManagerError::InUse { attachments: 1, .. })));
    let held = node.attachments.keys().next().unwrap().clone();
    node.command(Command::Detach(held)).unwrap();
    node.command(Command::Cancel(name("a"))).unwrap();
    let id = node.only_worker();
    node.end(&id);
    assert!(node.removing.contains(&id));
    // The daemon dies before the files are gone: they go all the same.
    node.restart();
    assert!(node.removing.contains(&id) && node.running.is_empty());
    node.settle();
    assert!(node.files.is_empty() && node.world.image(&name("a")).unwrap().copies.is_empty());
    node.command(Command::Fetch(name("a"), Some(disk(0)))).unwrap();
    node.settle();
    assert_eq!(node.state("a", 0), Some(CopyState::Ready));
    // What is finished is not touched.
    node.command(Command::Cancel(name("a"))).unwrap();
    node.settle();
    assert_eq!(node.state("a", 0), Some(CopyState::Ready));
}

#[test]
fn an_upload_waits_again_after_a_restart_and_can_be_cancelled_and_deleted() {
    let mut node = Node::new();
    node.command(create_upload("a", 7)).unwrap();
    assert!(node.running.is_empty(), "nobody wants it yet");
    node.command(Command::Fetch(name("a"), Some(disk(0)))).unwrap();
    assert_eq!(node.only_worker().image, name("a"));
    node.restart();
    assert_eq!(node.tasks.len(), 2, "its worker waits again");
    assert!(node.tasks.iter().all(|t| t.source.is_none() && t.upload_bytes == Some(7)));
    // The same again is the same; another length or a source is another image.
    node.command(create_upload("a", 7)).unwrap();
    for other in [create_upload("a", 8), create("a")] {
        let refused = node.command(other);
        assert!(matches!(refused, Err(ManagerError::OtherSource { ref source_text, .. })
            if source_text == "an upload of 7 bytes"));
    }
    node.command(Command::Cancel(name("a"))).unwrap();
    let id = node.stopping.iter().next().unwrap().clone();
    node.end(&id);
    node.removed(&id, true);
    assert!(node.files.is_empty() && node.running.is_empty());
    node.command(Command::Fetch(name("a"), Some(disk(0)))).unwrap();
    node.report(&id, failed(FailureClass::Refuse));
    node.restart();
    assert!(node.running.is_empty(), "a refused upload is not waited for");
    node.command(Command::Fetch(name("a"), Some(disk(0)))).unwrap();
    node.settle();
    assert_eq!(node.state("a", 0), Some(CopyState::Ready));
    node.command(Command::Delete { name: name("a"), sessions: 0 }).unwrap();
    node.settle();
    assert!(node.images.is_empty() && node.files.is_empty());
}

#[test]
fn a_copy_that_is_wanted_again_while_it_is_cancelled_begins_anew() {
    let mut node = Node::new();
    node.command(create("a")).unwrap();
    node.command(Command::Fetch(name("a"), Some(disk(0)))).unwrap();
    node.command(Command::Cancel(name("a"))).unwrap();
    node.command(attach("a", Some(0), "vm")).unwrap();
    node.settle();
    assert_eq!(node.state("a", 0), Some(CopyState::Ready));
}

/// One move of the world around the manager; numbers choose among what is possible.
fn random_move(node: &mut Node, kind: u8, pick: usize) {
    let image = ["a", "b", "top"][pick % 3];
    let running: Vec<CopyId> = node.running.keys().cloned().collect();
    let publishing: Vec<CopyId> = node.publishing.iter().cloned().collect();
    let removing: Vec<CopyId> = node.removing.iter().cloned().collect();
    let attached: Vec<AttachmentId> = node.attachments.keys().cloned().collect();
    let some = |list: &[CopyId]| list.get(pick % list.len().max(1)).cloned();
    match kind {
        0 if image == "top" => drop(node.command(create_on(image, "a"))),
        0 => drop(node.command(create(image))),
        1 => drop(node.command(attach(image, Some(pick % 3), ["", "vm"][pick % 2]))),
        2 => drop(node.command(Command::Fetch(name(image), Some(disk(pick % 3))))),
        3 => drop(node.command(Command::Delete { name: name(image), sessions: pick / 7 % 2 })),
        4 if !attached.is_empty() => {
            node.command(Command::Detach(attached[pick % attached.len()].clone())).unwrap();
        }
        5 | 6 => {
            let Some(id) = some(&running) else { return };
            let events = [
                WorkerEvent::Started,
                WorkerEvent::Progress(Progress { bytes_done: 7, ..Progress::default() }),
                WorkerEvent::Ready(info(4096)),
                WorkerEvent::Ready(info(5000)),
                failed(FailureClass::Retry),
                failed(FailureClass::Refuse),
            ];
            node.report(&id, events[pick % events.len()].clone());
        }
        7 => {
            if let Some(id) = some(&running) {
                node.end(&id);
            }
        }
        8 | 9 => {
            let Some(id) = some(&publishing) else { return };
            let results = [
                Ok(()),
                Err((FailureClass::Retry, "no".to_owned())),
                Err((FailureClass::Refuse, "no".to_owned())),
            ];
            node.published(&id, results[pick % results.len()].clone());
        }
        10 => {
            if let Some(id) = some(&removing) {
                node.removed(&id, pick.is_multiple_of(3));
            }
        }
        11 => node.wait(Duration::from_secs(pick as u64 % 400)),
        12 => node.restart(),
        13 => drop(node.command(Command::Cancel(name(image)))),
        14 | 15 => {
            let change = SteeringChange {
                paused: Some(kind == 14),
                priority: Some(i32::try_from(pick % 5).unwrap()),
                rate_bytes_per_s: Some(pick as u64 % 3),
                ..SteeringChange::default()
            };
            drop(node.command(Command::Steer(name(image), change)));
        }
        17 => {
            let on = [disk(pick % 3), disk(pick / 3 % 3)];
            drop(node.command(Command::CleanUp(name(image), on[..1 + pick % 2].to_vec())));
        }
        18 => {
            let wait = (!pick.is_multiple_of(5)).then(|| Duration::from_secs(pick as u64));
            node.command(Command::SetCleanupWait(wait)).unwrap();
        }
        _ => node.event(Event::Tick),
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn any_order_of_events_keeps_the_rules_and_converges(
        moves in proptest::collection::vec((0u8..20, 0usize..1000), 0..80)
    ) {
        let mut node = Node::new();
        for (kind, pick) in moves {
            random_move(&mut node, kind, pick);
        }
        node.settle();
        for image in node.world.images() {
            prop_assert!(!image.record.deleting);
            for copy in &image.copies {
                let paused = image.record.steering.paused && copy.state == CopyState::Pending;
                let waits = copy.message.contains("its base");
                let settled = copy.state == CopyState::Ready || copy.refused || paused || waits;
                prop_assert!(settled, "{copy:?}");
            }
        }
        let saved: Vec<_> = node.images.values().cloned().collect();
        let world: Vec<_> = node.world.images().into_iter().map(|i| i.record).collect();
        prop_assert_eq!(saved, world, "the catalog is what the world is");
    }
}

#[path = "chain_tests.rs"]
mod chain;

#[path = "cleanup_tests.rs"]
mod cleanup;
