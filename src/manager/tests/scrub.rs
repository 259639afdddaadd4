//! The rules of the scrub, as tables: which copy is read when, and what a bad one means.

use super::*;

const DAY: Duration = Duration::from_secs(24 * 60 * 60);

/// Complete copies of `a` on `disks`, scrubbed every day.
fn with_copies(disks: &[usize]) -> Node {
    let mut node = Node::new();
    node.command(create("a")).unwrap();
    for on in disks {
        node.command(Command::Fetch(name("a"), Some(disk(*on)))).unwrap();
    }
    node.settle();
    node.command(set(Setting::ScrubInterval, 24 * 60)).unwrap();
    node
}

fn scrub(image: &str, on: Option<usize>) -> Command {
    Command::Scrub(name(image), on.map(disk))
}

fn on(node: &Node) -> Vec<DiskUuid> {
    node.scrubbing.iter().map(|id| id.disk.clone()).collect()
}

fn good() -> WorkerEvent {
    WorkerEvent::Scrubbed(ScrubReport::default())
}

fn bad(class: FailureClass) -> WorkerEvent {
    WorkerEvent::Scrubbed(ScrubReport {
        bad_bytes: 1 << 20,
        class: Some(class),
        message: "0x0-0xfffff".to_owned(),
        ..ScrubReport::default()
    })
}

fn record(node: &Node, on: usize) -> Option<ScrubRecord> {
    node.images[&name("a")].disks[&disk(on)].scrub.clone()
}

#[test]
fn a_copy_is_scrubbed_when_its_interval_is_over_and_not_before() {
    let mut node = with_copies(&[0, 1]);
    assert_eq!(node.world.next_wake(), Some(DAY));
    node.wait(DAY - Duration::from_secs(1));
    assert!(node.scrubbing.is_empty());
    node.wait(Duration::from_secs(1));
    assert_eq!(on(&node).len(), 2, "each disk has a scrub of its own");
    assert_eq!(node.state("a", 0), Some(CopyState::Ready), "it is read meanwhile");
    for id in node.scrubbing.clone() {
        node.report(&id, good());
    }
    let expected = ScrubRecord {
        at_unix_s: 1 + DAY.as_secs(),
        result: ScrubResult::Good,
        repaired_bytes: 0,
        bad_bytes: 0,
        message: String::new(),
    };
    assert_eq!(record(&node, 0), Some(expected));
    assert_eq!(node.world.next_wake(), Some(2 * DAY));
    node.restart();
    node.settle_now();
    assert_eq!(node.world.next_wake(), Some(2 * DAY), "a restart asks for none");
    node.command(set(Setting::ScrubInterval, 0)).unwrap();
    assert_eq!(node.world.next_wake(), None);
}

#[test]
fn on_a_disk_one_at_a_time_those_asked_for_first_then_the_oldest() {
    let mut node = with_copies(&[0]);
    node.command(create("b")).unwrap();
    node.command(Command::Fetch(name("b"), Some(disk(0)))).unwrap();
    node.settle_now();
    node.command(scrub("b", None)).unwrap();
    let first = node.scrubbing.first().unwrap().clone();
    assert_eq!(first.image, name("b"));
    node.wait(DAY / 2);
    node.report(&first, good());
    node.wait(DAY / 2);
    let second = node.scrubbing.first().unwrap().clone();
    assert_eq!((second.image.clone(), node.scrubbing.len()), (name("a"), 1));
    node.report(&second, good());
    node.wait(DAY / 2);
    assert_eq!(node.scrubbing.first().unwrap().image, name("b"));
}

#[test]
fn only_what_is_complete_is_scrubbed() {
    let mut node = Node::new();
    assert!(matches!(node.command(scrub("a", None)), Err(ManagerError::NoSuchImage { .. })));
    node.command(create("a")).unwrap();
    node.command(Command::Fetch(name("a"), Some(disk(0)))).unwrap();
    assert!(matches!(node.command(scrub("a", None)), Err(ManagerError::NoCompleteCopy { .. })));
    node.settle();
    assert!(matches!(node.command(scrub("a", Some(1))), Err(ManagerError::NoSuchCopy { .. })));
    node.command(scrub("a", Some(0))).unwrap();
    assert_eq!(on(&node), [disk(0)]);
    node.command(scrub("a", Some(0))).unwrap();
    assert_eq!(node.scrubbing.len(), 1);
    assert!(node.world.image(&name("a")).unwrap().copies[0].scrubbing);
}

#[test]
fn a_bad_copy_is_failed_closed_and_warned_of_and_another_is_opened() {
    let mut node = with_copies(&[0, 1]);
    node.command(attach("a", Some(0), "vm")).unwrap();
    assert_eq!(node.exported[&name("a")].disk, disk(0));
    node.command(scrub("a", Some(0))).unwrap();
    let id = node.only_worker();
    node.report(&id, bad(FailureClass::Refuse));
    assert_eq!(node.state("a", 0), Some(CopyState::Failed));
    assert!(node.exported.is_empty(), "nobody reads bad bytes");
    assert_eq!(node.publishing.first().unwrap().disk, disk(1), "the good one is next");
    assert!(node.warnings[0].contains("0x0-0xfffff"), "{:?}", node.warnings);
    assert_eq!(record(&node, 0).unwrap().result, ScrubResult::Bad);
    assert_eq!(node.world.attachments()[0].state, AttachmentState::Failed);
    node.settle_now();
    assert_eq!(node.exported[&name("a")].disk, disk(1));
    // It stays so over a restart, until somebody asks.
    node.restart();
    node.settle_now();
    assert_eq!(node.state("a", 0), Some(CopyState::Failed));
    node.command(Command::Fetch(name("a"), Some(disk(0)))).unwrap();
    assert_eq!(node.only_worker().disk, disk(0));
    assert_eq!(node.tasks.last().unwrap().ready_on, [disk(1)]);
    assert!(record(&node, 0).is_some(), "what was found is not forgotten");
}

#[test]
fn a_bad_copy_that_may_get_better_is_tried_again_by_itself() {
    let mut node = with_copies(&[0]);
    node.command(scrub("a", None)).unwrap();
    let id = node.only_worker();
    node.report(&id, bad(FailureClass::Retry));
    assert_eq!(node.state("a", 0), Some(CopyState::Failed));
    node.settle_now();
    node.wait(back_off(1));
    node.settle_now();
    assert_eq!(node.state("a", 0), Some(CopyState::Ready));
}

#[test]
fn what_stands_on_a_bad_copy_is_closed_with_it() {
    let mut node = with_copies(&[0]);
    node.command(create_on("top", "a")).unwrap();
    node.command(Command::Fetch(name("top"), Some(disk(0)))).unwrap();
    node.settle_now();
    assert_eq!(node.exported.len(), 2);
    node.command(scrub("a", None)).unwrap();
    let id = node.only_worker();
    node.report(&id, bad(FailureClass::Refuse));
    assert_eq!(node.state("top", 0), Some(CopyState::ReadyForTransfer));
    assert!(node.exported.is_empty());
    node.command(Command::Fetch(name("a"), Some(disk(0)))).unwrap();
    node.settle_now();
    assert_eq!(node.exported.len(), 2);
}

#[test]
fn a_repaired_copy_stays_open_unless_its_tables_may_have_been_bad() {
    let repaired =
        || WorkerEvent::Scrubbed(ScrubReport { repaired_bytes: 1 << 20, ..ScrubReport::default() });
    let mut node = with_copies(&[0]);
    node.command(scrub("a", None)).unwrap();
    let id = node.only_worker();
    node.report(&id, repaired());
    assert_eq!(node.exported.len(), 1, "of a raw one every byte is read from the file");
    assert_eq!(record(&node, 0).unwrap().result, ScrubResult::Repaired);
    let mut node = Node::new();
    node.command(create("a")).unwrap();
    node.command(Command::Fetch(name("a"), Some(disk(0)))).unwrap();
    let id = node.only_worker();
    node.report(&id, WorkerEvent::Ready(CopyInfo { format: Format::Qcow2, ..info(4096) }));
    // Also while it is being opened.
    for open_first in [true, false] {
        if open_first {
            node.settle_now();
        }
        node.command(scrub("a", None)).unwrap();
        let id = node.only_worker();
        node.report(&id, repaired());
        if !open_first {
            node.published(&id, Ok(()));
        }
        assert!(node.exported.is_empty() && node.publishing.len() == 1, "it is opened anew");
    }
}

#[test]
fn a_copy_that_goes_is_not_waited_for() {
    let mut node = with_copies(&[0, 1]);
    node.command(scrub("a", Some(1))).unwrap();
    let id = node.only_worker();
    node.command(Command::CleanUp(name("a"), vec![disk(1)])).unwrap();
    assert!(node.stopping.contains(&id) && node.removing.is_empty(), "first it stops");
    node.report(&id, bad(FailureClass::Refuse));
    assert!(node.removing.contains(&id));
    node.settle_now();
    assert_eq!(node.state("a", 1), None);
    assert!(node.warnings.is_empty());
}

#[test]
fn how_far_a_scrub_is_is_told_and_only_while_it_runs() {
    let mut node = with_copies(&[0, 1]);
    let told = |node: &Node| {
        let image = node.world.image(&name("a")).unwrap();
        image.copies.iter().map(|copy| (copy.scrubbing, copy.scrubbed_bytes)).collect::<Vec<_>>()
    };
    assert_eq!(told(&node), [(false, None), (false, None)]);
    node.command(scrub("a", Some(0))).unwrap();
    let id = node.scrubbing.first().unwrap().clone();
    node.report(&id, WorkerEvent::Started);
    node.report(&id, WorkerEvent::Scrubbing(1024));
    assert_eq!(told(&node), [(true, Some(1024)), (false, None)]);
    node.report(&id, good());
    assert_eq!(told(&node), [(false, None), (false, None)]);
    node.command(scrub("a", Some(0))).unwrap();
    assert_eq!(told(&node)[0], (true, Some(0)), "it begins anew");
}
