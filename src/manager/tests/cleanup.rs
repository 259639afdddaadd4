//! The rules of cleanup, as tables: what goes when, and what never does.

use super::*;

const MINUTE: Duration = Duration::from_secs(60);

/// A node on which `a` has complete copies on `disks`, and the wait is an hour.
fn with_copies(disks: &[usize]) -> Node {
    let mut node = Node::new();
    node.command(set(Setting::CleanupWait, 60)).unwrap();
    node.command(create("a")).unwrap();
    for on in disks {
        node.command(Command::Fetch(name("a"), Some(disk(*on)))).unwrap();
    }
    // Not `settle`: it would let the time pass until the copies go.
    bring_in(&mut node);
    node
}

/// Everything that is asked for now is done, and no time passes.
fn bring_in(node: &mut Node) {
    loop {
        if let Some(id) = node.running.keys().next().cloned() {
            match node.stopping.contains(&id) {
                true => node.end(&id),
                false => node.report(&id, WorkerEvent::Ready(info(4096))),
            }
        } else if let Some(id) = node.publishing.iter().next().cloned() {
            node.published(&id, Ok(()));
        } else if let Some(id) = node.removing.iter().next().cloned() {
            node.removed(&id, true);
        } else {
            return;
        }
    }
}

fn copies(node: &Node) -> Vec<usize> {
    (0..DISKS.len()).filter(|on| node.state("a", *on).is_some()).collect()
}

fn pass(node: &mut Node, time: Duration) {
    node.wait(time);
    bring_in(node);
}

fn clean_up(on: &[usize]) -> Command {
    Command::CleanUp(name("a"), on.iter().map(|n| disk(*n)).collect())
}

#[test]
fn a_copy_goes_when_nobody_has_used_it_for_the_wait_and_one_stays() {
    let mut node = with_copies(&[0, 1, 2]);
    pass(&mut node, 60 * MINUTE - Duration::from_secs(1));
    assert_eq!(copies(&node), [0, 1, 2]);
    assert_eq!(node.world.next_wake(), Some(60 * MINUTE));
    pass(&mut node, Duration::from_secs(1));
    assert_eq!(copies(&node).len(), 1, "never the last one");
    assert_eq!(node.files.len(), 1);
    assert_eq!(node.exported.len(), 1, "the one that stays is open");
    assert_eq!(node.world.next_wake(), None);
}

#[test]
fn a_copy_that_is_attached_stays_and_the_wait_begins_when_it_is_let_go() {
    let mut node = with_copies(&[0, 1]);
    let Outcome::Attachment(id, _) = node.command(attach("a", Some(1), "vm")).unwrap() else {
        panic!()
    };
    pass(&mut node, 30 * MINUTE);
    let unused =
        |node: &Node, on: usize| node.images[&name("a")].disks[&disk(on)].unused_since_unix_s;
    assert_eq!(unused(&node, 1), None);
    node.command(Command::Detach(id)).unwrap();
    assert_eq!(unused(&node, 1), Some(1 + 30 * 60));
    // The other one was exported, so that it was read as long as there was an attachment.
    assert_eq!(unused(&node, 0), Some(1 + 30 * 60));
    pass(&mut node, 59 * MINUTE);
    assert_eq!(copies(&node), [0, 1]);
    pass(&mut node, MINUTE);
    assert_eq!(copies(&node).len(), 1);
}

#[test]
fn a_copy_whose_export_is_read_stays_also_without_an_attachment() {
    let mut node = with_copies(&[0, 1]);
    assert_eq!(node.exported[&name("a")].disk, disk(0));
    node.world.see_sessions([(name("a"), 1)].into());
    pass(&mut node, 61 * MINUTE);
    assert_eq!(copies(&node), [0]);
    let error = node.command(clean_up(&[0])).unwrap_err().to_string();
    assert!(error.contains("readers are connected to it"), "{error}");
}

#[test]
fn the_least_number_of_copies_is_the_image_s_own_and_failed_ones_do_not_count_as_good() {
    let mut node = with_copies(&[0, 1]);
    let change = SteeringChange { min_copies: Some(2), ..SteeringChange::default() };
    node.command(Command::Steer(name("a"), change)).unwrap();
    node.command(Command::Fetch(name("a"), Some(disk(2)))).unwrap();
    let third = node.only_worker();
    node.report(&third, failed(FailureClass::Refuse));
    pass(&mut node, 61 * MINUTE);
    assert_eq!(copies(&node), [0, 1], "the failed one goes, two good ones stay");
    let change = SteeringChange { min_copies: Some(0), ..SteeringChange::default() };
    node.command(Command::Steer(name("a"), change)).unwrap();
    bring_in(&mut node);
    assert_eq!(copies(&node).len(), 1);
}

#[test]
fn a_wait_of_nothing_is_at_once_and_without_one_nothing_goes() {
    let mut node = with_copies(&[0, 1]);
    node.command(set(Setting::CleanupWait, -1)).unwrap();
    pass(&mut node, 100_000 * MINUTE);
    assert_eq!((copies(&node).len(), node.world.next_wake()), (2, None));
    node.command(set(Setting::CleanupWait, 0)).unwrap();
    bring_in(&mut node);
    assert_eq!(copies(&node).len(), 1);
}

#[test]
fn the_stamp_survives_a_restart() {
    let mut node = with_copies(&[0, 1]);
    pass(&mut node, 59 * MINUTE);
    node.restart();
    bring_in(&mut node);
    assert_eq!(copies(&node), [0, 1]);
    pass(&mut node, MINUTE);
    assert_eq!(copies(&node).len(), 1);
}

#[test]
fn by_hand_all_go_or_none() {
    let mut node = with_copies(&[0, 1, 2]);
    node.command(attach("a", Some(2), "vm")).unwrap();
    for (on, words) in [
        (&[0, 2][..], "readers are connected to it"),
        (&[1, 2], "has attachments"),
        (&[0, 0], "readers are connected to it"),
    ] {
        let error = node.command(clean_up(on)).unwrap_err().to_string();
        assert!(error.contains(words), "{on:?}: {error}");
        assert_eq!(copies(&node), [0, 1, 2]);
    }
    node.command(clean_up(&[1, 1])).unwrap();
    bring_in(&mut node);
    assert_eq!(copies(&node), [0, 2]);
    let error = node.command(clean_up(&[1])).unwrap_err();
    assert!(matches!(error, ManagerError::NoSuchCopy { .. }), "{error}");
}

#[test]
fn by_hand_too_the_last_one_stays() {
    let mut node = with_copies(&[0, 1]);
    let error = node.command(clean_up(&[0, 1])).unwrap_err();
    assert!(matches!(error, ManagerError::TooFewCopies { .. }), "{error}");
    assert_eq!(copies(&node), [0, 1]);
    node.command(clean_up(&[0])).unwrap();
    bring_in(&mut node);
    assert_eq!((copies(&node), node.exported[&name("a")].disk.clone()), (vec![1], disk(1)));
}

#[test]
fn a_copy_that_goes_and_is_wanted_again_is_brought_in_anew() {
    let mut node = with_copies(&[0, 1]);
    node.command(clean_up(&[1])).unwrap();
    let going = node.removing.iter().next().unwrap().clone();
    node.command(attach("a", Some(1), "vm")).unwrap();
    node.removed(&going, true);
    bring_in(&mut node);
    assert_eq!(node.state("a", 1), Some(CopyState::Ready));
}

#[test]
fn a_base_stays_on_a_disk_as_long_as_its_overlay_does() {
    let mut node = with_copies(&[0, 1]);
    node.command(create_on("top", "a")).unwrap();
    node.command(Command::Fetch(name("top"), Some(disk(1)))).unwrap();
    bring_in(&mut node);
    let error = node.command(clean_up(&[1])).unwrap_err().to_string();
    assert!(error.contains("another image stands on it"), "{error}");
    pass(&mut node, 61 * MINUTE);
    assert_eq!(copies(&node), [1], "of two the one that is needed stays");
}
