//! Tags of disks and of the node: where images may be.

use super::*;
use crate::names::Tag;

fn tags(texts: &[&str]) -> BTreeSet<Tag> {
    Tag::parse_all(texts.iter().copied()).unwrap()
}

fn tag(node: &mut Node, n: usize, own: &[&str]) {
    let change = DiskChange { tags: Some(tags(own)), ..DiskChange::default() };
    node.command(Command::ChangeDisk(disk(n), change)).unwrap();
}

/// The second and third disk have tags, and the node.
fn tagged() -> Node {
    let mut node = Node::new();
    let status = |n: usize| DiskStatus { node_tags: tags(&["rack-1"]), ..disk_status(n) };
    node.event(Event::Disks((0..3).map(status).collect()));
    tag(&mut node, 1, &["ssd"]);
    tag(&mut node, 2, &["ssd", "large"]);
    node
}

fn create_for(image: &str, disk: &[&str], of_node: &[&str]) -> NewImage {
    let Command::Create(new) = create(image) else { panic!() };
    let selectors = Box::new(Selectors { disk: tags(disk), node: tags(of_node) });
    NewImage { selectors, ..new }
}

#[test]
fn a_disk_that_is_chosen_has_every_tag_and_one_that_is_named_and_has_not_is_refused() {
    let mut node = tagged();
    for (image, wanted, chosen) in [
        ("a", &[][..], 0),
        ("b", &["ssd"][..], 1),
        ("c", &["large"][..], 2),
        ("d", &["large", "ssd"][..], 2),
    ] {
        node.command(Command::Create(create_for(image, wanted, &["rack-1"]))).unwrap();
        node.command(attach(image, None, "vm")).unwrap();
        assert_eq!(node.tasks.last().unwrap().id.disk, disk(chosen), "{image}");
    }
    let why = |node: &mut Node, command| node.command(command).unwrap_err().to_string();
    let lacks = |n| format!("image c: may not be on disk {}: it lacks the tag large", disk(n));
    assert_eq!(why(&mut node, attach("c", Some(1), "x")), lacks(1));
    assert_eq!(why(&mut node, Command::Fetch(name("c"), Some(disk(0)))), lacks(0));
    let at_once = NewImage { disks: vec![disk(1)], ..create_for("e", &["large"], &[]) };
    let said = why(&mut node, Command::Create(at_once));
    assert!(said.ends_with("it lacks the tag large"), "{said}");
    assert!(!node.images.contains_key(&name("e")), "a refused command leaves no trace");
}

#[test]
fn tags_that_no_disk_and_no_node_has_are_told() {
    let mut node = tagged();
    node.command(Command::Create(create_for("a", &["tape"], &[]))).unwrap();
    node.command(Command::Create(create_for("b", &["ssd"], &["rack-2"]))).unwrap();
    let why = |node: &mut Node, command| node.command(command).unwrap_err().to_string();
    let none = "image a: no disk has the tags that it wants: tape";
    assert_eq!(why(&mut node, attach("a", None, "vm")), none);
    let none = "image b: no disk has the tags that it wants: ssd and rack-2 of the node";
    assert_eq!(why(&mut node, attach("b", None, "vm")), none);
    let named = why(&mut node, attach("b", Some(1), "vm"));
    assert!(named.ends_with("its node lacks the tag rack-2"), "{named}");
}

#[test]
fn a_copy_on_a_disk_that_has_lost_its_tag_stays_and_is_read() {
    let mut node = tagged();
    node.command(Command::Create(create_for("a", &["ssd"], &[]))).unwrap();
    node.command(attach("a", Some(1), "vm")).unwrap();
    node.settle();
    tag(&mut node, 1, &[]);
    node.command(attach("a", None, "other")).unwrap();
    node.command(attach("a", Some(1), "third")).unwrap();
    node.settle();
    assert_eq!(node.state("a", 1), Some(CopyState::Ready));
    assert!(node.command(attach("a", Some(0), "vm")).is_err());
}

#[test]
fn an_overlay_goes_where_its_base_may_be() {
    let mut node = tagged();
    node.command(Command::Create(create_for("base", &["large"], &[]))).unwrap();
    node.command(create_on("top", "base")).unwrap();
    let refused = node.command(attach("top", Some(0), "vm")).unwrap_err().to_string();
    assert!(refused.starts_with("image base: may not be on disk"), "{refused}");
    node.command(attach("top", None, "vm")).unwrap();
    node.settle();
    assert_eq!(node.state("top", 2), Some(CopyState::Ready));
}

#[test]
fn replicas_are_on_disks_that_their_image_may_be_on() {
    let mut node = tagged();
    let volume = |name: &str, replicas, disks, image| {
        Command::CreateVolume(Box::new(NewVolume {
            name: VolumeName::parse(name).unwrap(),
            image: self::name("a"),
            new_image: image,
            sha512: None,
            disks,
            replicas: Some(replicas),
            size_bytes: None,
            backup: None,
            class: None,
            claim: None,
            created_unix_s: 1,
        }))
    };
    let image = |wanted: &[&str]| Some(Box::new(create_for("a", wanted, &[])));
    let none = node.command(volume("v", 1, vec![], image(&["tape"]))).unwrap_err().to_string();
    assert_eq!(none, "image a: no disk has the tags that it wants: tape");
    let named = node.command(volume("v", 1, vec![disk(0)], image(&["ssd"]))).unwrap_err();
    assert!(matches!(named, ManagerError::NotSelected { .. }), "{named}");
    node.command(volume("v", 3, vec![], image(&["ssd"]))).unwrap();
    let placed = node.volumes[&VolumeName::parse("v").unwrap()].disks.clone();
    assert_eq!(placed.into_iter().collect::<BTreeSet<_>>(), [disk(1), disk(2)].into());
    let named = node.command(volume("w", 1, vec![disk(0)], None)).unwrap_err();
    assert!(matches!(named, ManagerError::NotSelected { .. }), "{named}");
}

#[test]
fn the_same_image_has_the_same_tags_or_says_none() {
    let mut node = tagged();
    node.command(Command::Create(create_for("a", &["ssd"], &[]))).unwrap();
    node.command(Command::Create(create_for("a", &[], &[]))).unwrap();
    node.command(Command::Create(create_for("a", &["ssd"], &[]))).unwrap();
    let other = node.command(Command::Create(create_for("a", &["large"], &[]))).unwrap_err();
    assert_eq!(other.to_string(), "image a: exists, and its disk_selector is ssd, not large");
}

#[test]
fn other_tags_hold_for_further_copies_and_what_is_there_stays() {
    let mut node = tagged();
    node.command(Command::Create(create_for("a", &["ssd"], &[]))).unwrap();
    node.command(Command::Fetch(name("a"), None)).unwrap();
    let first = node.only_worker().disk;
    assert_ne!(first, disk(0));
    node.settle_now();
    let tags = |tags: &[&str]| Tag::parse_all(tags.iter().copied()).unwrap();
    let change = SteeringChange { disk_tags: Some(tags(&["tape"])), ..SteeringChange::default() };
    node.command(Command::Steer(name("a"), change)).unwrap();
    assert_eq!(node.images[&name("a")].selectors.disk, tags(&["tape"]));
    let refused = node.command(Command::Fetch(name("a"), Some(disk(0)))).unwrap_err();
    assert!(matches!(refused, ManagerError::NotSelected { .. }), "{refused}");
    node.settle_now();
    assert_eq!(node.world.image(&name("a")).unwrap().copies.len(), 1, "it stays");
    let any = SteeringChange { disk_tags: Some(tags(&[])), ..SteeringChange::default() };
    node.command(Command::Steer(name("a"), any)).unwrap();
    node.command(Command::Fetch(name("a"), Some(disk(0)))).unwrap();
}
