//! The daemon dies after each single action of whole lives of images, and starts again: whoever had
//! no answer asks again, and everything ends as if nothing had happened, with nothing left behind.

use super::volumes::{new_volume, volume_name};
use super::*;

/// One thing that a user or the world does. Asked for again if the daemon died meanwhile.
type Step = fn(&mut Node);

fn attached(node: &Node, reader: &str) -> Option<AttachmentId> {
    node.attachments.values().find(|held| held.reader == reader).map(|held| held.id.clone())
}

fn ask(node: &mut Node, command: Command) {
    let outcome = node.command(command);
    // A second time it may be done already.
    assert!(node.has_died || outcome.is_ok(), "{outcome:?}");
}

fn detach(node: &mut Node, reader: &str) {
    if let Some(id) = attached(node, reader) {
        ask(node, Command::Detach(id));
    }
}

fn delete(node: &mut Node, image: &str) {
    ask(node, Command::Delete { name: name(image), sessions: 0 });
}

fn evict(node: &mut Node, on: usize) {
    let change = DiskChange { evict: Some(true), ..DiskChange::default() };
    ask(node, Command::ChangeDisk(disk(on), change));
}

const LIVES: [(&str, &[Step]); 5] = [
    (
        "an image is attached, copied, cleaned up and deleted",
        &[
            |node| ask(node, create("a")),
            |node| ask(node, attach("a", Some(0), "vm")),
            Node::settle_now,
            |node| ask(node, Command::Fetch(name("a"), Some(disk(1)))),
            Node::settle_now,
            |node| detach(node, "vm"),
            |node| ask(node, Command::CleanUp(name("a"), vec![disk(0)])),
            Node::settle_now,
            |node| delete(node, "a"),
            Node::settle_now,
        ],
    ),
    (
        "an overlay and its base leave their disk",
        &[
            |node| ask(node, create("a")),
            |node| ask(node, create_on("top", "a")),
            |node| ask(node, attach("top", Some(0), "vm")),
            Node::settle_now,
            |node| evict(node, 0),
            Node::settle_now,
            |node| detach(node, "vm"),
            Node::settle_now,
            |node| delete(node, "top"),
            Node::settle_now,
            |node| delete(node, "a"),
            Node::settle_now,
        ],
    ),
    (
        "a volume is made, attached and deleted, and its image after it",
        &[
            |node| ask(node, create("a")),
            |node| ask(node, new_volume("v", "a", &[0, 1, 2])),
            |node| ask(node, Command::AttachVolume(volume_name("v"))),
            Node::settle_now,
            |node| ask(node, Command::DetachVolume(volume_name("v"))),
            |node| ask(node, set(Setting::CleanupWait, 0)),
            Node::settle_now,
            |node| ask(node, Command::DeleteVolume(volume_name("v"))),
            |node| delete(node, "a"),
            Node::settle_now,
        ],
    ),
    (
        "transfers fail, are paused and cancelled",
        &[
            |node| ask(node, create("a")),
            |node| ask(node, attach("a", Some(0), "vm")),
            |node| fail_running(node, FailureClass::Retry),
            |node| node.wait(BACK_OFF_MOST),
            |node| fail_running(node, FailureClass::Refuse),
            |node| ask(node, attach("a", Some(0), "vm")),
            |node| ask(node, pause("a", true)),
            Node::settle_now,
            |node| ask(node, pause("a", false)),
            |node| detach(node, "vm"),
            |node| ask(node, Command::Cancel(name("a"))),
            Node::settle_now,
        ],
    ),
    (
        "a copy turns out bad, the node fails, a disk goes for good",
        &[
            |node| ask(node, create("a")),
            |node| ask(node, Command::Fetch(name("a"), Some(disk(0)))),
            |node| ask(node, Command::Fetch(name("a"), Some(disk(1)))),
            Node::settle_now,
            |node| ask(node, Command::Scrub(name("a"), Some(disk(0)))),
            |node| {
                if let Some(id) = node.scrubbing.iter().next().cloned() {
                    let class = Some(FailureClass::Refuse);
                    let report = ScrubReport { class, ..ScrubReport::default() };
                    node.report(&id, WorkerEvent::Scrubbed(report));
                }
            },
            Node::settle_now,
            |node| ask(node, Command::FailNode),
            Node::settle_now,
            |node| ask(node, Command::ReturnNode),
            Node::settle_now,
            |node| {
                let here: Vec<_> = node.disks.keys().cloned().collect();
                let known = (0..DISKS.len()).filter(|n| here.contains(&disk(*n)));
                let gone = |n| DiskStatus { healthy: n != 1, ..disk_status(n) };
                node.event(Event::Disks(known.map(gone).collect()));
                node.lost = Some(disk(1));
                ask(node, Command::RemoveDisk(disk(1), true));
            },
            Node::settle_now,
        ],
    ),
];

fn pause(image: &str, paused: bool) -> Command {
    let change = SteeringChange { paused: Some(paused), ..SteeringChange::default() };
    Command::Steer(name(image), change)
}

fn fail_running(node: &mut Node, class: FailureClass) {
    if let Some(id) = node.running.keys().next().cloned() {
        node.report(&id, failed(class));
    }
}

/// Lives a life in which the daemon dies after so many actions; the actions that there were.
fn live(steps: &[Step], dies_after: Option<usize>) -> (Node, usize) {
    let mut node = Node::new();
    (node.actions, node.dies_after) = (0, dies_after);
    for step in steps {
        step(&mut node);
        if node.is_dead {
            (node.is_dead, node.has_died) = (false, true);
            node.dies_after = None;
            node.restart();
            step(&mut node);
        }
    }
    let actions = node.actions;
    node.settle();
    (node, actions)
}

#[test]
fn whatever_action_the_daemon_dies_after_all_ends_as_if_it_had_not() {
    for (life, steps) in LIVES {
        let (unharmed, actions) = live(steps, None);
        assert!(actions > 10, "{life}: {actions}");
        for after in 0..actions {
            let (node, _) = live(steps, Some(after));
            let at = format!("{life}: after {after} of {actions} actions");
            let of = |node: &Node| -> Vec<_> {
                let kept = node.images.values();
                kept.map(|record| (record.name.clone(), record.deleting)).collect()
            };
            assert_eq!(of(&node), of(&unharmed), "{at}");
            let disks = |node: &Node| node.disks.keys().cloned().collect::<Vec<_>>();
            assert_eq!(disks(&node), disks(&unharmed), "{at}");
            let readers = |node: &Node| (node.attachments.len(), node.volumes.len());
            assert_eq!(readers(&node), readers(&unharmed), "{at}");
            for id in node.files.keys() {
                let wanted =
                    node.images.get(&id.image).is_some_and(|r| r.disks.contains_key(&id.disk));
                let lost = node.lost.as_ref() == Some(&id.disk);
                assert!(wanted || lost, "{at}: {id:?} is left behind");
            }
            for image in node.world.images() {
                for copy in &image.copies {
                    let is_over = copy.state == CopyState::Ready || copy.refused;
                    assert!(is_over, "{at}: {copy:?}");
                }
            }
            let saved: Vec<_> = node.images.values().cloned().collect();
            let world: Vec<_> = node.world.images().into_iter().map(|i| i.record).collect();
            assert_eq!(saved, world, "{at}: the catalog is what the world is");
        }
    }
}
