//! Images that have fewer copies than they are to have (rule 17).

use super::*;

const WAIT: Duration = Duration::from_secs(300);

/// A node on which `a` is to have `least` copies, and has a complete one on disk 0.
fn node_with(least: u32) -> Node {
    let mut node = Node::new();
    node.command(set(Setting::RecoveryWait, 300)).unwrap();
    node.command(create("a")).unwrap();
    node.command(Command::Fetch(name("a"), Some(disk(0)))).unwrap();
    node.settle_now();
    demand(&mut node, least);
    node
}

fn demand(node: &mut Node, least: u32) {
    let change = SteeringChange { min_copies: Some(least), ..SteeringChange::default() };
    node.command(Command::Steer(name("a"), change)).unwrap();
}

fn states(node: &Node) -> Vec<Option<CopyState>> {
    (0..DISKS.len()).map(|on| node.state("a", on)).collect()
}

fn healthy(node: &mut Node, on: &[usize]) {
    let status = |n| DiskStatus { healthy: on.contains(&n), ..disk_status(n) };
    node.event(Event::Disks((0..DISKS.len()).map(status).collect()));
}

const READY: Option<CopyState> = Some(CopyState::Ready);

#[test]
fn rule_17_an_image_is_brought_to_its_minimum_from_what_is_here() {
    let mut node = node_with(3);
    let of: Vec<_> =
        node.tasks[1..].iter().map(|t| (t.id.disk.clone(), t.ready_on.clone())).collect();
    assert_eq!(of, [(disk(1), vec![disk(0)])], "one more in each pass, and no source is asked");
    node.settle_now();
    assert_eq!(states(&node), [READY; 3]);
    assert!(node.tasks.iter().skip(1).all(|task| !task.ready_on.is_empty()));
    // It is remembered, and nothing is made twice.
    node.restart();
    node.settle_now();
    assert_eq!((states(&node), node.tasks.len()), (vec![READY; 3], 3));
}

#[test]
fn rule_17_nothing_is_fetched_for_an_image_that_nobody_has_used() {
    let mut node = Node::new();
    let Command::Create(mut new) = create("a") else { unreachable!() };
    new.min_copies = 3;
    node.command(Command::Create(new)).unwrap();
    node.wait(WAIT);
    assert_eq!((node.tasks.len(), states(&node)), (0, vec![None; 3]));
    node.command(Command::Fetch(name("a"), Some(disk(2)))).unwrap();
    assert_eq!(node.tasks.len(), 1, "the first comes alone");
    node.settle_now();
    assert_eq!(states(&node), [READY; 3]);
}

#[test]
fn rule_17_a_disk_that_is_gone_is_waited_for_and_then_made_up_for() {
    let mut node = node_with(2);
    node.settle_now();
    assert_eq!(states(&node), [READY, READY, None]);
    healthy(&mut node, &[0, 2]);
    node.settle_now();
    assert_eq!(node.tasks.len(), 2);
    // It came back in time.
    node.wait(WAIT - Duration::from_secs(1));
    healthy(&mut node, &[0, 1, 2]);
    node.settle_now();
    node.wait(WAIT);
    node.settle_now();
    assert_eq!(states(&node), [READY, READY, None]);
    // It does not.
    let before = node.tasks.len();
    healthy(&mut node, &[0, 2]);
    assert_eq!(node.world.next_wake(), Some(node.now + WAIT));
    node.wait(WAIT);
    assert_eq!(node.tasks.len(), before + 1);
    node.settle_now();
    assert_eq!(node.state("a", 2), READY);
    // Back, it is one too many; which goes when nobody has used it for long enough.
    healthy(&mut node, &[0, 1, 2]);
    node.settle_now();
    assert_eq!(states(&node), [READY; 3]);
    node.command(set(Setting::CleanupWait, 0)).unwrap();
    node.settle_now();
    assert_eq!(states(&node).iter().flatten().count(), 2);
}

#[test]
fn rule_17_a_copy_that_is_refused_is_made_up_for_at_once_and_stays_until_it_is() {
    let mut node = node_with(2);
    node.command(set(Setting::CleanupWait, 0)).unwrap();
    let second = node.only_worker();
    assert_eq!(second.disk, disk(1));
    node.report(&second, failed(FailureClass::Refuse));
    let third = node.only_worker();
    assert_eq!(third.disk, disk(2));
    assert!(node.state("a", 1).is_some());
    node.report(&third, failed(FailureClass::Refuse));
    assert_eq!(node.running.len(), 0, "no disk is left: it is not tried without end");
    assert_eq!(node.warnings, ["a: has 1 of its 2 copies, and no disk is ready for another"]);
    // By hand one of them is let go, and so tried anew.
    node.command(Command::CleanUp(name("a"), vec![disk(1)])).unwrap();
    node.settle_now();
    assert_eq!((node.state("a", 0), node.state("a", 1)), (READY, READY));
}

#[test]
fn rule_17_a_number_of_them_at_a_time_and_none_if_that_is_0() {
    let mut node = Node::new();
    node.command(set(Setting::MaxReplenished, 0)).unwrap();
    for image in ["a", "b"] {
        node.command(create(image)).unwrap();
        node.command(Command::Fetch(name(image), Some(disk(0)))).unwrap();
        node.settle_now();
        let change = SteeringChange { min_copies: Some(2), ..SteeringChange::default() };
        node.command(Command::Steer(name(image), change)).unwrap();
    }
    assert_eq!(node.running.len(), 0);
    node.command(set(Setting::MaxReplenished, 1)).unwrap();
    assert_eq!(node.running.len(), 1);
    node.event(Event::Tick);
    assert_eq!(node.running.len(), 1);
    node.settle_now();
    assert_eq!((node.state("a", 1), node.state("b", 1)), (READY, READY));
}

#[test]
fn rule_17_closed_and_emptied_disks_paused_images_and_cancels() {
    let mut node = node_with(1);
    let closed = DiskChange { schedulable: Some(false), ..DiskChange::default() };
    node.command(Command::ChangeDisk(disk(1), closed)).unwrap();
    let steer = |paused| {
        let change = SteeringChange { paused: Some(paused), ..SteeringChange::default() };
        Command::Steer(name("a"), change)
    };
    node.command(steer(true)).unwrap();
    demand(&mut node, 2);
    assert_eq!(node.running.len(), 0, "paused");
    node.command(steer(false)).unwrap();
    assert_eq!(node.only_worker().disk, disk(2), "the other one is closed");
    // It would come back at once, so that it is said instead.
    let refused = node.command(Command::Cancel(name("a")));
    assert!(matches!(refused, Err(ManagerError::TooFewCopies { .. })), "{refused:?}");
    demand(&mut node, 1);
    node.command(Command::Cancel(name("a"))).unwrap();
    node.settle_now();
    assert_eq!(states(&node), [READY, None, None]);
}

#[test]
fn rule_17_the_disk_with_the_most_room_is_taken() {
    let mut node = node_with(1);
    let roomy = |n| DiskStatus { free_bytes: [9, 1 << 30, 1 << 40][n], ..disk_status(n) };
    node.event(Event::Disks((0..DISKS.len()).map(roomy).collect()));
    demand(&mut node, 2);
    assert_eq!(node.only_worker().disk, disk(2));
}

#[test]
fn rule_17_an_image_that_is_paused_holds_up_no_other() {
    let mut node = Node::new();
    node.command(set(Setting::MaxReplenished, 1)).unwrap();
    let least = |image, paused| {
        let change = SteeringChange {
            min_copies: Some(2),
            paused: Some(paused),
            ..SteeringChange::default()
        };
        Command::Steer(name(image), change)
    };
    for image in ["a", "b"] {
        node.command(create(image)).unwrap();
        node.command(Command::Fetch(name(image), Some(disk(0)))).unwrap();
        node.settle_now();
    }
    node.command(least("a", false)).unwrap();
    assert_eq!(node.only_worker().image, name("a"));
    node.command(least("a", true)).unwrap();
    node.command(least("b", false)).unwrap();
    node.settle_now();
    assert_eq!((node.state("b", 1), node.state("a", 1)), (READY, Some(CopyState::Pending)));
    node.command(least("a", false)).unwrap();
    node.settle_now();
    assert_eq!(node.state("a", 1), READY);
}
