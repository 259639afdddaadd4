//! Pause, rate, priority, cancel, and uploads.

use super::*;

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

#[test]
fn a_cancelled_copy_stops_also_while_it_is_being_opened() {
    let mut node = Node::new();
    node.command(create("a")).unwrap();
    node.command(stream("a", Some(0), "vm")).unwrap();
    let id = node.only_worker();
    node.report(&id, WorkerEvent::Progress(Progress { bytes_done: 7, ..Progress::default() }));
    assert_eq!(node.publishing.len(), 1);
    node.command(Command::Detach(node.attachments.keys().next().unwrap().clone())).unwrap();
    node.command(Command::Cancel(name("a"))).unwrap();
    assert!(node.stopping.contains(&id), "the source is not asked for nothing");
    node.end(&id);
    assert!(node.removing.is_empty(), "it is being opened");
    node.published(&id, Err((FailureClass::Retry, "it has ended".to_owned())));
    assert!(node.removing.contains(&id));
}
