//! Disks that are added, closed, emptied, lost and removed (rules 19 and 21).

use super::*;

fn change(on: usize, change: DiskChange) -> Command {
    Command::ChangeDisk(disk(on), change)
}

fn evict(on: usize, evict: bool) -> Command {
    change(on, DiskChange { evict: Some(evict), ..DiskChange::default() })
}

/// An image with a complete copy on these disks.
fn node_with(copies: &[usize]) -> Node {
    let mut node = Node::new();
    node.command(create("a")).unwrap();
    for on in copies {
        node.command(Command::Fetch(name("a"), Some(disk(*on)))).unwrap();
    }
    node.settle_now();
    node
}

fn copies_on(node: &Node) -> Vec<(DiskUuid, CopyState)> {
    let on = |on| node.state("a", on).map(|state| (disk(on), state));
    (0..DISKS.len()).filter_map(on).collect()
}

#[test]
fn rule_19_a_copy_leaves_its_disk_once_another_is_complete() {
    let mut node = node_with(&[0]);
    node.command(evict(0, true)).unwrap();
    let started = node.tasks.last().unwrap();
    assert_eq!((started.id.disk.clone(), &started.ready_on), (disk(1), &vec![disk(0)]));
    assert_eq!(node.state("a", 0), Some(CopyState::Ready), "it stays until then");
    node.settle_now();
    assert_eq!(copies_on(&node), [(disk(1), CopyState::Ready)]);
    // It is remembered.
    node.restart();
    node.settle_now();
    assert!(node.world.disk_view_of(&disk(0)).unwrap().evicting);
    assert_eq!(copies_on(&node), [(disk(1), CopyState::Ready)]);
}

#[test]
fn rule_19_one_of_several_goes_at_once_but_never_below_the_minimum() {
    let mut node = node_with(&[0, 1]);
    node.command(evict(0, true)).unwrap();
    node.settle_now();
    assert_eq!(copies_on(&node), [(disk(1), CopyState::Ready)]);

    let mut node = Node::new();
    let Command::Create(mut new) = create("a") else { unreachable!() };
    new.min_copies = 2;
    node.command(Command::Create(new)).unwrap();
    for on in [0, 1] {
        node.command(Command::Fetch(name("a"), Some(disk(on)))).unwrap();
    }
    node.settle_now();
    // Also when a copy goes as soon as nobody needs it.
    node.command(set(Setting::CleanupWait, 0)).unwrap();
    node.settle_now();
    node.command(evict(0, true)).unwrap();
    node.settle_now();
    assert_eq!(copies_on(&node), [(disk(1), CopyState::Ready), (disk(2), CopyState::Ready)]);
    // There is no place for another: nothing goes.
    node.command(evict(1, true)).unwrap();
    node.settle_now();
    assert_eq!(copies_on(&node), [(disk(1), CopyState::Ready), (disk(2), CopyState::Ready)]);
    node.command(evict(0, false)).unwrap();
    node.settle_now();
    assert_eq!(copies_on(&node), [(disk(0), CopyState::Ready), (disk(2), CopyState::Ready)]);
}

#[test]
fn rule_19_what_is_read_stays_until_nobody_reads_it() {
    let mut node = node_with(&[0]);
    node.command(attach("a", Some(0), "vm")).unwrap();
    node.settle_now();
    node.command(evict(0, true)).unwrap();
    node.settle_now();
    let both = [(disk(0), CopyState::Ready), (disk(1), CopyState::Ready)];
    assert_eq!(copies_on(&node), both, "another is there already");
    let id = node.attachments.keys().next().unwrap().clone();
    node.command(Command::Detach(id)).unwrap();
    node.settle_now();
    assert_eq!(copies_on(&node), [(disk(1), CopyState::Ready)]);
}

#[test]
fn rule_19_what_was_refused_and_removed_goes_and_is_tried_nowhere_else() {
    let mut node = Node::new();
    node.command(create("a")).unwrap();
    node.command(Command::Fetch(name("a"), Some(disk(0)))).unwrap();
    let id = node.running.keys().next().unwrap().clone();
    node.report(&id, failed(FailureClass::Refuse));
    node.settle_now();
    assert_eq!(copies_on(&node), [(disk(0), CopyState::FailedAndCleanup)]);
    let tried = node.tasks.len();
    // After a restart it is known by its record alone.
    node.files.remove(&id);
    node.restart();
    node.settle_now();
    assert_eq!(copies_on(&node), [(disk(0), CopyState::FailedAndCleanup)]);
    node.command(evict(0, true)).unwrap();
    node.settle_now();
    assert_eq!((copies_on(&node), node.tasks.len()), (vec![], tried));
}

#[test]
fn a_disk_that_is_nearly_full_is_not_taken_because_it_is_the_first() {
    let first_choice = |free: [u64; 3], new: Command| {
        let mut node = Node::new();
        let with_room = |n: usize| DiskStatus { free_bytes: free[n], ..disk_status(n) };
        node.event(Event::Disks((0..DISKS.len()).map(with_room).collect()));
        node.command(new).unwrap();
        node.command(Command::Fetch(name("a"), None)).unwrap();
        node.tasks.last().unwrap().id.disk.clone()
    };
    assert_eq!(first_choice([9, 60 << 30, 100 << 30], create("a")), disk(1));
    assert_eq!(first_choice([60 << 30, 9, 100 << 30], create("a")), disk(0));
    assert_eq!(first_choice([2, 1, 0], create("a")), disk(0));
    // Of what is to be uploaded the length is known.
    let Command::Create(mut new) = create("a") else { unreachable!() };
    (new.source, new.upload_bytes) = (None, Some(1 << 20));
    assert_eq!(first_choice([9, 2 << 20, 100 << 30], Command::Create(new)), disk(1));
}

#[test]
fn an_overlay_leaves_with_its_base() {
    let mut node = node_with(&[0]);
    node.command(create_on("top", "a")).unwrap();
    node.command(Command::Fetch(name("top"), Some(disk(0)))).unwrap();
    node.settle_now();
    node.command(evict(0, true)).unwrap();
    node.settle_now();
    assert_eq!(copies_on(&node), [(disk(1), CopyState::Ready)]);
    assert_eq!((node.state("top", 0), node.state("top", 1)), (None, Some(CopyState::Ready)));
}

#[test]
fn a_closed_disk_takes_no_new_copies() {
    let mut node = Node::new();
    node.command(create("a")).unwrap();
    let closed = DiskChange { schedulable: Some(false), ..DiskChange::default() };
    node.command(change(0, closed)).unwrap();
    let refused = node.command(Command::Fetch(name("a"), Some(disk(0))));
    assert!(matches!(refused, Err(ManagerError::DiskClosed { .. })), "{refused:?}");
    node.command(Command::Fetch(name("a"), None)).unwrap();
    assert_eq!(node.only_worker().disk, disk(1));
    node.settle_now();
    // One that is there already is used.
    node.command(change(1, DiskChange { schedulable: Some(false), ..DiskChange::default() }))
        .unwrap();
    node.command(attach("a", Some(1), "vm")).unwrap();
}

#[test]
fn a_disk_is_removed_when_it_is_empty_and_the_first_never() {
    let mut node = node_with(&[1]);
    let remove = |on: usize, force| Command::RemoveDisk(disk(on), force);
    for (on, force) in [(0, false), (0, true), (1, false), (1, true)] {
        let refused = node.command(remove(on, force));
        assert!(matches!(refused, Err(ManagerError::DiskInUse { .. })), "{refused:?}");
    }
    node.command(evict(1, true)).unwrap();
    node.settle_now();
    node.command(remove(1, false)).unwrap();
    assert!(node.world.disk_view_of(&disk(1)).is_none());
    assert!(!node.disks.contains_key(&disk(1)));
    assert_eq!(copies_on(&node), [(disk(0), CopyState::Ready)]);
}

#[test]
fn rule_21_a_disk_that_is_gone_for_good_goes_with_what_it_held() {
    let mut node = node_with(&[0, 1]);
    let gone = |n| DiskStatus { healthy: n != 1, ..disk_status(n) };
    node.event(Event::Disks((0..DISKS.len()).map(gone).collect()));
    assert_eq!(node.state("a", 1), Some(CopyState::Unknown));
    assert!(node.command(Command::RemoveDisk(disk(1), false)).is_err(), "it may be back");
    node.lost = Some(disk(1));
    node.command(Command::RemoveDisk(disk(1), true)).unwrap();
    assert_eq!(copies_on(&node), [(disk(0), CopyState::Ready)]);
    assert!(!node.images[&name("a")].disks.contains_key(&disk(1)));
}

#[test]
fn a_disk_more_brings_what_it_holds() {
    let mut node = Node::new();
    let uuid = DiskUuid::parse("dddddddd-1111").unwrap();
    let status = DiskStatus { uuid: uuid.clone(), path: "/disks/d".into(), ..disk_status(0) };
    let id =
        CopyId { image: name("old"), uuid: ImageUuid::parse("0d").unwrap(), disk: uuid.clone() };
    node.files.insert(id.clone(), Some(info(4096)));
    let opened = OpenedDisk {
        uuid: uuid.clone(),
        path: "/disks/d".into(),
        disks: (0..DISKS.len()).map(disk_status).chain([status]).collect(),
        found: vec![FoundCopy { id, state: FoundState::Ready(info(4096)) }],
        opened_unix_s: 1,
    };
    let outcome = node.command(Command::AddDisk(Box::new(opened.clone()))).unwrap();
    assert_eq!(outcome, Outcome::Disk(uuid.clone(), true));
    node.settle_now();
    let image = node.world.image(&name("old")).unwrap();
    assert_eq!(image.copies[0].state, CopyState::Ready);
    assert_eq!(node.disks[&uuid].path.to_str(), Some("/disks/d"));
    // A second time changes nothing.
    let outcome = node.command(Command::AddDisk(Box::new(opened))).unwrap();
    assert_eq!(outcome, Outcome::Disk(uuid, false));
}
