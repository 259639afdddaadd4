//! The rules of clones, as tables.

use super::*;

fn delete(image: &str) -> Command {
    Command::Delete { name: name(image), sessions: 0 }
}

fn copy(node: &Node, image: &str) -> CopyId {
    node.running.keys().find(|id| id.image == name(image)).unwrap().clone()
}

/// `a` is complete on the disks, and `b` is a clone of it.
fn cloned_on(disks: &[usize]) -> Node {
    let mut node = Node::new();
    node.command(create("a")).unwrap();
    for n in disks {
        node.command(Command::Fetch(name("a"), Some(disk(*n)))).unwrap();
        node.settle();
    }
    node.command(create_clone("b", "a")).unwrap();
    node
}

#[test]
fn a_clone_is_made_of_a_complete_copy_on_its_disk_and_asks_no_source() {
    let mut node = cloned_on(&[1]);
    assert!(node.running.is_empty(), "nothing moves before somebody asks");
    node.command(attach("b", None, "vm")).unwrap();
    let task = node.tasks.last().unwrap().clone();
    assert_eq!((task.id.image.as_str(), &task.id.disk), ("b", &disk(1)), "where blocks are shared");
    let origin = task.origin.unwrap();
    assert_eq!((origin.image, origin.ready_on), (name("a"), vec![disk(1)]));
    assert_eq!((task.source, task.upload_bytes, task.ready_on), (None, None, vec![]));
    node.settle();
    assert_eq!(node.state("b", 1), Some(CopyState::Ready));
    // The second copy is made of the first, as any.
    node.command(Command::Fetch(name("b"), Some(disk(0)))).unwrap();
    assert_eq!(node.tasks.last().unwrap().ready_on, [disk(1)]);
}

#[test]
fn a_clone_waits_for_its_image_and_brings_it_in() {
    let mut node = Node::new();
    node.command(create("a")).unwrap();
    node.command(create_clone("b", "a")).unwrap();
    node.command(Command::Fetch(name("b"), Some(disk(2)))).unwrap();
    let a = node.only_worker();
    assert_eq!((a.image.as_str(), &a.disk), ("a", &disk(2)));
    let message = |node: &Node| node.world.image(&name("b")).unwrap().copies[0].message.clone();
    let waits = "waits for image a, of which it is a clone: no copy of it is complete";
    assert_eq!(message(&node), waits);
    node.report(&a, failed(FailureClass::Refuse));
    assert_eq!(message(&node), "waits for image a, of which it is a clone: no");
    assert!(node.running.is_empty());
    node.command(Command::Fetch(name("a"), None)).unwrap();
    node.settle();
    assert_eq!(node.state("b", 2), Some(CopyState::Ready));
}

#[test]
fn an_image_and_its_copy_stay_until_their_clone_is_complete() {
    let mut node = cloned_on(&[0, 1]);
    let refused = |node: &mut Node, command| node.command(command).unwrap_err().to_string();
    let why = "image a: clones of it have no complete copy yet: b";
    assert_eq!(refused(&mut node, delete("a")), why);
    node.restart();
    node.settle();
    assert_eq!(refused(&mut node, delete("a")), why);
    // Nothing is made of the copies yet: one of two may go.
    node.command(Command::CleanUp(name("a"), vec![disk(0)])).unwrap();
    node.settle();
    node.command(Command::Fetch(name("b"), None)).unwrap();
    node.command(Command::Fetch(name("a"), Some(disk(2)))).unwrap();
    let a = copy(&node, "a");
    node.report(&a, WorkerEvent::Ready(info(4096)));
    let clean = Command::CleanUp(name("a"), vec![disk(1)]);
    let why = refused(&mut node, clean.clone());
    assert!(why.ends_with("stays: a clone of it is being made"), "{why}");
    node.settle();
    node.command(clean).unwrap();
    node.command(delete("a")).unwrap();
    node.settle();
    assert!(node.world.image(&name("a")).is_none());
    assert_eq!(node.state("b", 1), Some(CopyState::Ready));
}

#[test]
fn nobody_uses_it_for_an_hour_and_a_copy_that_is_cloned_stays() {
    let mut node = cloned_on(&[0, 1]);
    node.command(set(Setting::CleanupWait, 60)).unwrap();
    node.command(Command::Fetch(name("b"), Some(disk(2)))).unwrap();
    node.wait(Duration::from_secs(3 * 3600));
    assert_eq!(node.world.image(&name("a")).unwrap().copies.len(), 2);
    node.settle();
    assert_eq!(node.world.image(&name("a")).unwrap().copies.len(), 1);
}

#[test]
fn a_clone_that_is_deleted_frees_its_image() {
    let mut node = cloned_on(&[0]);
    node.command(delete("b")).unwrap();
    node.command(delete("a")).unwrap();
    node.settle();
    assert!(node.images.is_empty());
}

#[test]
fn a_clone_has_what_gives_its_bytes_their_meaning() {
    let mut node = Node::new();
    node.command(create("base")).unwrap();
    let Command::Create(new) = create_on("a", "base") else { panic!() };
    let qcow2 = NewImage {
        declared_format: Some(Format::Qcow2),
        snapshot: Some("s".to_owned()),
        min_copies: 2,
        ..new.clone()
    };
    node.command(Command::Create(qcow2)).unwrap();
    node.command(create_clone("b", "a")).unwrap();
    let record = node.images[&name("b")].clone();
    assert_eq!((record.base, record.snapshot), (Some(name("base")), Some("s".to_owned())));
    assert_eq!((record.declared_format, record.min_copies), (Some(Format::Qcow2), 2));
    // An expanded copy is the guest's bytes, whatever they look like.
    let raw = NewImage { name: name("c"), base: None, layout: Layout::Raw, ..new };
    node.command(Command::Create(raw)).unwrap();
    node.command(create_clone("d", "c")).unwrap();
    let record = &node.images[&name("d")];
    assert_eq!((record.declared_format, record.layout), (Some(Format::Raw), Layout::AsIs));
    // Its base comes to its disk, too.
    node.command(attach("b", Some(1), "vm")).unwrap();
    node.settle();
    assert_eq!(node.state("base", 1), Some(CopyState::Ready));
    assert_eq!(node.state("b", 1), Some(CopyState::Ready));
}

#[test]
fn the_same_clone_is_the_same_image_and_another_is_refused() {
    let mut node = cloned_on(&[0]);
    assert_eq!(node.command(create_clone("b", "a")).unwrap(), Outcome::Image(name("b"), false));
    node.command(create("x")).unwrap();
    for other in [create_clone("b", "x"), create("b"), create_upload("b", 7)] {
        let error = node.command(other).unwrap_err().to_string();
        assert_eq!(error, "image b: exists with another source, a clone of a");
    }
    let error = node.command(create_clone("c", "nothing")).unwrap_err();
    assert!(matches!(error, ManagerError::NoSuchImage { .. }), "{error}");
    let error = node.command(create_clone("c", "b")).unwrap_err();
    assert!(matches!(error, ManagerError::NothingToClone { .. }), "{error}");
    node.command(Command::Fetch(name("b"), None)).unwrap();
    node.settle();
    node.command(create_clone("c", "b")).unwrap();
}

#[test]
fn an_image_that_was_created_anew_is_not_the_one_that_was_cloned() {
    let mut node = cloned_on(&[0]);
    node.command(Command::Fetch(name("b"), Some(disk(0)))).unwrap();
    node.settle();
    node.command(delete("a")).unwrap();
    node.settle();
    node.command(create("a")).unwrap();
    node.command(Command::Fetch(name("a"), Some(disk(0)))).unwrap();
    node.settle();
    // Its only copy is lost; what has the name now is something else.
    let lost = node.files.keys().find(|id| id.image == name("b")).unwrap().clone();
    node.files.remove(&lost);
    node.restart();
    let task = node.tasks.last().unwrap();
    assert_eq!((&task.id, &task.origin.as_ref().unwrap().ready_on), (&lost, &vec![]));
}
