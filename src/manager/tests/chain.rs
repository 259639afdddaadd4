//! The rules of images that stand on others, as tables.

use super::*;

/// `top` on `middle` on `bottom`, none of them fetched.
fn chain_of_three() -> Node {
    let mut node = Node::new();
    node.command(create("bottom")).unwrap();
    node.command(create_on("middle", "bottom")).unwrap();
    node.command(create_on("top", "middle")).unwrap();
    node
}

fn copy(node: &Node, image: &str) -> CopyId {
    node.running.keys().find(|id| id.image == name(image)).unwrap().clone()
}

#[test]
fn a_reader_of_an_overlay_brings_in_all_it_stands_on_to_the_same_disk() {
    let mut node = chain_of_three();
    node.command(attach("top", Some(1), "vm")).unwrap();
    let running: Vec<_> = node.running.keys().map(|id| (id.image.as_str(), &id.disk)).collect();
    assert_eq!(running, [("bottom", &disk(1)), ("middle", &disk(1)), ("top", &disk(1))]);
    assert!(node.tasks.iter().all(|t| t.beside.base == (t.id.image != name("bottom"))));
}

#[test]
fn an_overlay_is_opened_when_everything_beneath_is_complete() {
    let mut node = chain_of_three();
    let Outcome::Attachment(id, _) = node.command(attach("top", Some(1), "vm")).unwrap() else {
        panic!()
    };
    let [top, middle, bottom] = ["top", "middle", "bottom"].map(|image| copy(&node, image));
    node.report(&top, WorkerEvent::Ready(info(9)));
    assert!(node.publishing.is_empty());
    let message = node.world.attachment(&id).unwrap().message;
    assert_eq!(message, "waits for its base middle on the same disk");
    node.report(&bottom, WorkerEvent::Ready(info(9)));
    assert_eq!(node.publishing.iter().collect::<Vec<_>>(), [&bottom]);
    node.report(&middle, WorkerEvent::Ready(info(9)));
    assert_eq!(node.publishing.len(), 3);
    node.published(&top, Ok(()));
    let attachment = node.world.attachment(&id).unwrap();
    assert_eq!((attachment.state, attachment.message.as_str()), (AttachmentState::Ready, ""));
}

#[test]
fn a_base_that_is_refused_is_told_to_whoever_waits_above_and_can_be_tried_again() {
    let mut node = chain_of_three();
    let Outcome::Attachment(id, _) = node.command(attach("top", None, "vm")).unwrap() else {
        panic!()
    };
    let [top, middle, bottom] = ["top", "middle", "bottom"].map(|image| copy(&node, image));
    node.report(&top, WorkerEvent::Ready(info(9)));
    node.report(&middle, WorkerEvent::Ready(info(9)));
    node.report(&bottom, failed(FailureClass::Refuse));
    let told = node.world.attachment(&id).unwrap();
    assert_eq!(told.message, "its base bottom cannot be had: no");
    node.command(attach("top", None, "vm")).unwrap();
    node.settle();
    assert_eq!(node.world.attachment(&id).unwrap().state, AttachmentState::Ready);
}

#[test]
fn a_base_stays_while_something_stands_on_it() {
    let mut node = chain_of_three();
    let delete = |image: &str| Command::Delete { name: name(image), sessions: 0 };
    for base in ["bottom", "middle"] {
        let error = node.command(delete(base)).unwrap_err().to_string();
        assert!(error.contains("other images stand on it"), "{error}");
    }
    node.command(Command::Fetch(name("top"), None)).unwrap();
    let error = node.command(Command::Cancel(name("bottom"))).unwrap_err();
    assert!(matches!(error, ManagerError::IsABase { .. }), "{error}");
    node.settle();
    for image in ["top", "middle", "bottom"] {
        node.command(delete(image)).unwrap();
        node.settle();
    }
    assert!(node.images.is_empty() && node.files.is_empty());
}

#[test]
fn a_base_is_known_before_and_is_never_another() {
    let mut node = chain_of_three();
    let error = node.command(create_on("x", "y")).unwrap_err();
    assert!(matches!(error, ManagerError::NoSuchImage { .. }), "{error}");
    let error = node.command(create_on("x", "x")).unwrap_err();
    assert!(matches!(error, ManagerError::NoSuchImage { .. }), "{error}");
    let same = node.command(create_on("top", "middle")).unwrap();
    assert_eq!(same, Outcome::Image(name("top"), false));
    for other in [create_on("top", "bottom"), create("top"), create_on("bottom", "top")] {
        let error = node.command(other).unwrap_err().to_string();
        assert!(error.contains("exists, and its base is"), "{error}");
    }
}

#[test]
fn a_chain_has_an_end() {
    let mut node = Node::new();
    node.command(create("i1")).unwrap();
    for n in 2..=crate::image::MAX_LAYERS {
        node.command(create_on(&format!("i{n}"), &format!("i{}", n - 1))).unwrap();
    }
    let last = format!("i{}", crate::image::MAX_LAYERS);
    let error = node.command(create_on("x", &last)).unwrap_err();
    assert!(matches!(error, ManagerError::TooManyBases { .. }), "{error}");
}

#[test]
fn after_a_restart_the_chain_is_opened_again() {
    let mut node = chain_of_three();
    node.command(attach("top", Some(2), "vm")).unwrap();
    node.settle();
    node.restart();
    node.settle();
    assert_eq!(node.exported.len(), 3);
    assert_eq!(node.state("top", 2), Some(CopyState::Ready));
}

fn create_with_data(image: &str, data: &str) -> Command {
    let Command::Create(mut new) = create(image) else { panic!() };
    new.data_file = Some(name(data));
    Command::Create(new)
}

#[test]
fn an_image_with_a_data_file_waits_for_its_length_and_is_opened_with_it() {
    let mut node = Node::new();
    node.command(create("data")).unwrap();
    node.command(create_with_data("tables", "data")).unwrap();
    let Outcome::Attachment(id, _) = node.command(attach("tables", Some(1), "vm")).unwrap() else {
        panic!()
    };
    let running: Vec<_> = node.running.keys().map(|id| (id.image.as_str(), &id.disk)).collect();
    assert_eq!(running, [("data", &disk(1))]);
    let told = |node: &Node| node.world.attachment(&id).unwrap().message;
    assert_eq!(told(&node), "waits for a first copy of its data file data");
    let data = copy(&node, "data");
    node.report(&data, failed(FailureClass::Refuse));
    assert_eq!(told(&node), "its data file data cannot be had: no");
    node.command(attach("tables", Some(1), "vm")).unwrap();
    node.report(&copy(&node, "data"), WorkerEvent::Ready(info(9)));
    let tables = copy(&node, "tables");
    let task = node.tasks.iter().rfind(|task| task.id == tables).unwrap();
    assert_eq!(task.beside, Beside { base: false, data_len_bytes: Some(9) });
    node.report(&tables, WorkerEvent::Ready(info(9)));
    node.settle();
    assert_eq!(node.world.attachment(&id).unwrap().state, AttachmentState::Ready);
}

#[test]
fn a_data_file_stays_as_long_as_its_image_and_stands_on_nothing() {
    let mut node = Node::new();
    node.command(create("data")).unwrap();
    node.command(create_with_data("tables", "data")).unwrap();
    let error = node.command(create_with_data("more", "tables")).unwrap_err();
    assert!(matches!(error, ManagerError::NoDataFile { .. }), "{error}");
    let error = node.command(create_with_data("more", "nothing")).unwrap_err();
    assert!(matches!(error, ManagerError::NoSuchImage { .. }), "{error}");
    let error = node.command(create("tables")).unwrap_err();
    assert!(error.to_string().contains("data_file"), "{error}");
    node.command(Command::Fetch(name("tables"), None)).unwrap();
    node.settle();
    let delete = |image: &str| Command::Delete { name: name(image), sessions: 0 };
    let error = node.command(delete("data")).unwrap_err();
    assert!(matches!(error, ManagerError::IsABase { .. }), "{error}");
    node.restart();
    node.settle();
    for image in ["tables", "data"] {
        node.command(delete(image)).unwrap();
        node.settle();
    }
    assert!(node.images.is_empty() && node.files.is_empty());
}
