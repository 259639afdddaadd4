//! Rules 15, 16, 18 and 20, as tables: what a node, a disk or a source that fails means, and what
//! follows when it is back.

use super::volumes::{new_volume, volume_name};
use super::*;

const WAIT: Duration = Duration::from_secs(300);

fn wanted_on(disks: &[usize]) -> Node {
    let mut node = Node::new();
    node.command(create("a")).unwrap();
    for on in disks {
        node.command(Command::Fetch(name("a"), Some(disk(*on)))).unwrap();
    }
    node
}

fn moved_on(bytes: u64) -> WorkerEvent {
    WorkerEvent::Progress(Progress { bytes_done: bytes, ..Progress::default() })
}

/// The disks as they are; those in `gone` are not healthy.
fn disks(gone: &[usize]) -> Event {
    let status = |n| DiskStatus { healthy: !gone.contains(&n), ..disk_status(n) };
    Event::Disks((0..DISKS.len()).map(status).collect())
}

fn all_fail(node: &mut Node, class: FailureClass) {
    while let Some(id) = node.running.keys().next().cloned() {
        node.report(&id, failed(class));
    }
}

#[test]
fn rule_15_on_a_failed_node_unfinished_copies_are_failed_finished_ones_unknown_and_nothing_runs() {
    let mut node = wanted_on(&[0]);
    node.command(new_volume("v", "a", &[0])).unwrap();
    node.command(Command::AttachVolume(volume_name("v"))).unwrap();
    node.settle();
    node.command(create("b")).unwrap();
    node.command(Command::Fetch(name("b"), Some(disk(0)))).unwrap();
    let worker = node.only_worker();
    node.report(&worker, moved_on(7));
    node.command(Command::FailNode).unwrap();
    assert!(node.stopping.contains(&worker), "its worker ends as on a kill");
    node.end(&worker);
    assert_eq!(node.state("a", 0), Some(CopyState::Unknown));
    assert_eq!(node.state("b", 0), Some(CopyState::Failed));
    assert!(node.exported.is_empty(), "nobody reads on a node that is gone");
    let volume = node.world.volume(&volume_name("v")).unwrap();
    assert_eq!(volume.replicas[0].state, ReplicaState::Waiting);
    assert!(volume.replicas[0].message.contains("drill"), "{volume:?}");
    // What is asked for meanwhile waits, and time does nothing.
    node.command(Command::Fetch(name("b"), Some(disk(1)))).unwrap();
    node.command(attach("a", Some(1), "vm")).unwrap();
    node.wait(1000 * WAIT);
    assert!(node.running.is_empty() && node.removing.is_empty() && node.publishing.is_empty());
    assert_eq!(node.world.next_wake(), None);
    node.command(Command::FailNode).unwrap();
}

#[test]
fn rule_16_a_node_that_is_back_resumes_checks_and_runs_what_waited() {
    let mut node = wanted_on(&[0]);
    node.command(new_volume("v", "a", &[0])).unwrap();
    node.command(Command::AttachVolume(volume_name("v"))).unwrap();
    node.settle();
    node.command(create("b")).unwrap();
    node.command(Command::Fetch(name("b"), Some(disk(1)))).unwrap();
    let worker = node.only_worker();
    node.report(&worker, moved_on(7));
    node.command(Command::FailNode).unwrap();
    node.command(Command::ReturnNode).unwrap();
    // The stale worker ends first; only then there is a new one.
    let before = node.tasks.len();
    assert!(node.stopping.contains(&worker));
    assert_eq!(node.tasks.iter().filter(|task| task.id == worker).count(), 1);
    node.end(&worker);
    assert_eq!(node.tasks.iter().filter(|task| task.id == worker).count(), 2);
    assert_eq!(node.tasks.len(), before + 1);
    assert_eq!(node.state("a", 0), Some(CopyState::Starting), "checked by a worker of its own");
    node.settle_now();
    assert_eq!(node.state("a", 0), Some(CopyState::Ready));
    assert_eq!(node.state("b", 1), Some(CopyState::Ready));
    let volume = node.world.volume(&volume_name("v")).unwrap();
    assert_eq!(volume.replicas[0].state, ReplicaState::Running);
    let scrub = node.images[&name("a")].disks[&disk(0)].scrub.clone();
    assert!(scrub.is_some(), "then it was read whole");
    assert!(node.images[&name("b")].disks[&disk(1)].scrub.is_none());
    node.command(Command::ReturnNode).unwrap();
    assert!(node.running.is_empty(), "a second time changes nothing");
}

#[test]
fn rule_16_readers_of_a_paused_image_go_on_too_and_nothing_is_fetched() {
    let mut node = wanted_on(&[0]);
    node.settle();
    let change = SteeringChange { paused: Some(true), ..SteeringChange::default() };
    node.command(Command::Steer(name("a"), change)).unwrap();
    let before = node.tasks.len();
    node.command(Command::FailNode).unwrap();
    assert_eq!(node.state("a", 0), Some(CopyState::Unknown));
    node.command(Command::ReturnNode).unwrap();
    node.settle_now();
    assert_eq!((node.state("a", 0), node.tasks.len()), (Some(CopyState::Ready), before));
    assert!(node.images[&name("a")].disks[&disk(0)].scrub.is_some());
}

#[test]
fn rule_16_a_refused_copy_stays_refused_when_the_node_is_back() {
    let mut node = wanted_on(&[0]);
    let worker = node.only_worker();
    node.report(&worker, failed(FailureClass::Refuse));
    node.command(Command::FailNode).unwrap();
    node.command(Command::ReturnNode).unwrap();
    assert!(node.running.is_empty());
    assert_eq!(node.state("a", 0), Some(CopyState::FailedAndCleanup));
}

#[test]
fn rule_15_a_disk_that_is_gone_has_unknown_copies_and_readers_get_another() {
    let mut node = wanted_on(&[0, 1]);
    node.settle();
    assert_eq!(node.exported[&name("a")].disk, disk(0));
    node.event(disks(&[0]));
    assert_eq!(node.state("a", 0), Some(CopyState::Unknown));
    assert_eq!(node.state("a", 1), Some(CopyState::ReadyForTransfer));
    node.settle_now();
    assert_eq!(node.exported[&name("a")].disk, disk(1));
    assert_eq!(node.state("a", 1), Some(CopyState::Ready));
    node.event(disks(&[]));
    assert_eq!(node.tasks.last().unwrap().id.disk, disk(0), "a worker checks it");
    node.settle_now();
    assert_eq!(node.state("a", 0), Some(CopyState::Ready));
    assert_eq!(node.exported[&name("a")].disk, disk(1), "nobody is cut off for it");
}

#[test]
fn rule_18_when_all_copies_have_failed_for_the_wait_one_starts_again_by_itself() {
    let mut node = wanted_on(&[0, 1]);
    all_fail(&mut node, FailureClass::Refuse);
    node.command(set(Setting::RecoveryWait, 300)).unwrap();
    assert_eq!(node.world.next_wake(), Some(WAIT));
    node.wait(WAIT - Duration::from_secs(1));
    assert!(node.running.is_empty() && node.warnings.is_empty());
    node.wait(Duration::from_secs(1));
    assert_eq!(node.only_worker().disk, disk(0));
    assert!(node.warnings[0].contains("started again on disk"), "{:?}", node.warnings);
    // Each further time it waits twice as long.
    all_fail(&mut node, FailureClass::Refuse);
    assert_eq!(node.world.next_wake(), Some(WAIT + 2 * WAIT));
    node.wait(2 * WAIT);
    let id = node.only_worker();
    node.report(&id, WorkerEvent::Ready(info(4096)));
    node.settle_now();
    assert_eq!(node.state("a", 0), Some(CopyState::Ready));
    assert_eq!(node.world.next_wake(), None, "one good copy is enough");
    assert_eq!(node.state("a", 1), Some(CopyState::FailedAndCleanup));
}

#[test]
fn rule_18_a_copy_that_may_become_good_or_is_paused_is_not_started_again() {
    let mut node = wanted_on(&[0, 1]);
    let ids: Vec<CopyId> = node.running.keys().cloned().collect();
    node.report(&ids[0], failed(FailureClass::Refuse));
    node.command(set(Setting::RecoveryWait, 0)).unwrap();
    assert!(node.warnings.is_empty(), "the other one is on its way");
    node.command(Command::Steer(
        name("a"),
        SteeringChange { paused: Some(true), ..SteeringChange::default() },
    ))
    .unwrap();
    node.settle_now();
    node.wait(WAIT);
    assert!(node.warnings.is_empty() && node.running.is_empty());
}

#[test]
fn rule_18_it_starts_on_a_ready_disk_and_waits_if_there_is_none() {
    let mut node = wanted_on(&[0]);
    all_fail(&mut node, FailureClass::Refuse);
    node.event(disks(&[0, 1, 2]));
    node.command(set(Setting::RecoveryWait, 0)).unwrap();
    assert!(node.running.is_empty());
    assert_eq!(node.warnings.len(), 1, "{:?}", node.warnings);
    assert!(node.warnings[0].contains("no disk is ready"), "{:?}", node.warnings);
    node.wait(WAIT);
    assert_eq!(node.warnings.len(), 1, "said once");
    let mut node = wanted_on(&[0]);
    all_fail(&mut node, FailureClass::Refuse);
    node.event(disks(&[0]));
    node.command(set(Setting::RecoveryWait, 0)).unwrap();
    assert_eq!(node.only_worker().disk, disk(1));
}

#[test]
fn rule_18_what_cannot_be_fetched_again_stays_failed_with_one_warning() {
    let mut node = Node::new();
    node.command(set(Setting::RecoveryWait, 300)).unwrap();
    node.command(create_upload("a", 7)).unwrap();
    node.command(Command::Fetch(name("a"), Some(disk(0)))).unwrap();
    all_fail(&mut node, FailureClass::Refuse);
    node.wait(WAIT);
    node.wait(100 * WAIT);
    assert!(node.running.is_empty());
    assert_eq!(node.warnings.len(), 1, "{:?}", node.warnings);
    assert!(node.warnings[0].contains("no URL"), "{:?}", node.warnings);
    assert_eq!(node.state("a", 0), Some(CopyState::FailedAndCleanup));
}

#[test]
fn rule_20_a_copy_that_comes_back_as_another_is_failed_and_not_opened() {
    let mut node = wanted_on(&[0, 1]);
    node.settle();
    node.command(Command::FailNode).unwrap();
    node.command(Command::ReturnNode).unwrap();
    let id = CopyId { disk: disk(0), ..node.files.keys().next().unwrap().clone() };
    node.report(&id, WorkerEvent::Ready(info(5000)));
    assert_eq!(node.state("a", 0), Some(CopyState::Failed));
    node.settle_now();
    assert_eq!(node.exported[&name("a")].disk, disk(1));
    let image = node.world.image(&name("a")).unwrap();
    assert!(image.copies[0].message.contains("size in bytes is 5000"), "{image:?}");
}

#[test]
fn rule_15_readers_of_an_arriving_copy_are_cut_off_too_and_come_back() {
    for opened in [true, false] {
        let mut node = Node::new();
        node.command(create("a")).unwrap();
        node.command(stream("a", Some(0), "vm")).unwrap();
        let worker = node.only_worker();
        node.report(&worker, moved_on(7));
        if opened {
            node.published(&worker, Ok(()));
        }
        node.command(Command::FailNode).unwrap();
        if !opened {
            node.published(&worker, Ok(()));
        }
        assert!(node.exported.is_empty(), "closed, also if it was being opened");
        assert_eq!(node.world.attachments()[0].state, AttachmentState::Waiting);
        node.end(&worker);
        assert!(node.publishing.is_empty());
        node.command(Command::ReturnNode).unwrap();
        node.report(&worker, moved_on(9));
        node.published(&worker, Ok(()));
        assert_eq!(node.world.attachments()[0].state, AttachmentState::Ready);
        node.report(&worker, WorkerEvent::Ready(info(4096)));
        assert!(node.publishing.is_empty() && node.exported.len() == 1);
    }
}
