//! Readers that do not wait until the image is complete.

use super::*;

const PROGRESS: WorkerEvent = WorkerEvent::Progress(Progress {
    bytes_done: 7,
    bytes_total: Some(4096),
    rate_bytes_per_s: 0,
    left_s: None,
    connections: 1,
    phase: Phase::Fetching,
    retries: 0,
    overtaken: 0,
    message: String::new(),
});

/// `a` is created, attached to on disk 0, and bytes arrive.
fn arriving(command: Command) -> (Node, CopyId) {
    let mut node = Node::new();
    node.command(create("a")).unwrap();
    node.command(command).unwrap();
    let id = node.running.keys().next().unwrap().clone();
    node.report(&id, PROGRESS);
    (node, id)
}

fn states(node: &Node) -> Vec<AttachmentState> {
    node.world.attachments().iter().map(|a| a.state).collect()
}

#[test]
fn who_asks_reads_while_it_arrives_and_who_does_not_waits() {
    let (mut node, id) = arriving(attach("a", Some(0), ""));
    assert!(node.publishing.is_empty(), "nobody asked");
    node.command(stream("a", Some(0), "vm")).unwrap();
    assert!(node.publishing.contains(&id));
    node.published(&id, Ok(()));
    let mut found = states(&node);
    found.sort_by_key(|state| state.as_str());
    assert_eq!(found, [AttachmentState::Ready, AttachmentState::Waiting]);
    assert_eq!(node.state("a", 0), Some(CopyState::InProgress));
    // Complete: the same export, and nothing is opened again.
    node.report(&id, WorkerEvent::Ready(info(4096)));
    assert!(node.publishing.is_empty() && node.exported.contains_key(&name("a")));
    assert_eq!(node.state("a", 0), Some(CopyState::Ready));
    assert_eq!(states(&node), [AttachmentState::Ready; 2]);
}

#[test]
fn what_cannot_be_read_early_is_waited_for_and_said() {
    let (mut node, id) = arriving(stream("a", Some(0), "vm"));
    node.published(&id, Err((FailureClass::Refuse, "no length".to_owned())));
    assert!(node.publishing.is_empty(), "not tried again for this worker");
    let attachment = node.world.attachments().remove(0);
    assert_eq!(attachment.state, AttachmentState::Waiting);
    assert_eq!(attachment.message, "no length");
    assert_eq!(node.state("a", 0), Some(CopyState::InProgress), "no failure of the copy");
    node.settle();
    assert_eq!(states(&node), [AttachmentState::Ready]);
}

#[test]
fn readers_that_lost_their_file_get_another_and_a_refused_one_is_closed() {
    let (mut node, id) = arriving(stream("a", Some(0), "vm"));
    node.published(&id, Ok(()));
    node.world.see_lost(vec![name("a")]);
    node.event(Event::Tick);
    assert!(!node.exported.contains_key(&name("a")) && node.publishing.contains(&id));
    node.world.see_lost(Vec::new());
    node.published(&id, Ok(()));
    assert!(node.exported.contains_key(&name("a")));
    node.report(&id, failed(FailureClass::Retry));
    assert!(node.exported.contains_key(&name("a")), "the next worker goes on with it");
    node.wait(Duration::from_secs(2));
    node.report(&id, failed(FailureClass::Refuse));
    assert!(!node.exported.contains_key(&name("a")));
    assert_eq!(states(&node), [AttachmentState::Failed]);
}

#[test]
fn another_complete_copy_is_not_held_up_by_one_that_fails() {
    let (mut node, id) = arriving(stream("a", Some(0), "vm"));
    node.published(&id, Ok(()));
    node.report(&id, failed(FailureClass::Retry));
    node.command(attach("a", Some(1), "")).unwrap();
    let other = node.running.keys().next().unwrap().clone();
    assert_ne!(other.disk, id.disk);
    node.report(&other, WorkerEvent::Ready(info(4096)));
    assert!(node.publishing.contains(&other), "opened in its place");
}
