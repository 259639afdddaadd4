//! The rules of volumes, of copies from copies, and of restores, as tables.

use super::*;
use crate::fetch::DigestKind;

pub(super) fn volume_name(text: &str) -> VolumeName {
    VolumeName::parse(text).unwrap()
}

fn asked(volume: &str, image: &str, disks: &[usize]) -> NewVolume {
    NewVolume {
        name: volume_name(volume),
        image: name(image),
        new_image: None,
        sha512: None,
        disks: disks.iter().map(|n| disk(*n)).collect(),
        replicas: None,
        size_bytes: None,
        backup: None,
        class: None,
        claim: None,
        created_unix_s: 1,
    }
}

pub(super) fn new_volume(volume: &str, image: &str, disks: &[usize]) -> Command {
    Command::CreateVolume(Box::new(asked(volume, image, disks)))
}

fn create_volume(node: &mut Node, new: NewVolume) -> Result<Outcome, ManagerError> {
    node.command(Command::CreateVolume(Box::new(new)))
}

fn attach_volume(volume: &str) -> Command {
    Command::AttachVolume(volume_name(volume))
}

fn detach_volume(volume: &str) -> Command {
    Command::DetachVolume(volume_name(volume))
}

fn with_volume(disks: &[usize]) -> Node {
    let mut node = Node::new();
    node.command(create("a")).unwrap();
    node.command(new_volume("v", "a", disks)).unwrap();
    node
}

fn status(node: &Node) -> VolumeStatus {
    node.world.volume(&volume_name("v")).unwrap()
}

fn replicas(node: &Node) -> Vec<ReplicaState> {
    status(node).replicas.iter().map(|replica| replica.state).collect()
}

fn image_from(image: &str, url: &str) -> Box<NewImage> {
    let Command::Create(new) = create_from(image, url) else { panic!() };
    Box::new(new)
}

#[test]
fn rule_1_a_volume_fetches_nothing_until_it_is_attached() {
    let mut node = with_volume(&[0, 1]);
    node.wait(Duration::from_secs(3600));
    assert!(node.running.is_empty() && node.files.is_empty());
    assert_eq!(replicas(&node), [ReplicaState::Stopped; 2]);
    assert_eq!(
        (status(&node).state(), status(&node).robustness()),
        (VolumeState::Detached, "unknown")
    );
}

#[test]
fn rule_2_replicas_wait_with_a_reason_and_run_when_their_copies_are_ready() {
    let mut node = with_volume(&[1, 0]);
    node.command(attach_volume("v")).unwrap();
    assert_eq!(replicas(&node), [ReplicaState::Waiting; 2]);
    assert_eq!(status(&node).state(), VolumeState::Attaching);
    // One brings the image in; the other waits for it, and then copies it.
    let first = node.only_worker();
    let waiting = status(&node).replicas.into_iter().find(|r| r.disk != first.disk).unwrap();
    assert!(waiting.message.contains(&format!("waits for the copy on disk {}", first.disk)));
    node.report(&first, WorkerEvent::Ready(info(9)));
    node.published(&first, Ok(()));
    assert_eq!(
        (status(&node).state(), status(&node).robustness()),
        (VolumeState::Attached, "degraded")
    );
    let second = node.only_worker();
    assert_eq!(node.tasks.last().unwrap().ready_on, std::slice::from_ref(&first.disk));
    node.report(&second, WorkerEvent::Ready(info(9)));
    assert_eq!(replicas(&node), [ReplicaState::Running; 2]);
    assert_eq!(status(&node).robustness(), "healthy");
    assert_eq!(status(&node).replicas[0].path.as_deref(), Some("/backing".as_ref()));
    node.command(detach_volume("v")).unwrap();
    assert_eq!(replicas(&node), [ReplicaState::Stopped; 2]);
    assert_eq!(node.state("a", 0), Some(CopyState::Ready), "a copy outlives its reader");
}

#[test]
fn after_a_restart_replicas_wait_and_then_run_by_themselves() {
    let mut node = with_volume(&[0, 2]);
    node.command(attach_volume("v")).unwrap();
    node.restart();
    assert_eq!(replicas(&node), [ReplicaState::Waiting; 2]);
    node.settle();
    assert_eq!(replicas(&node), [ReplicaState::Running; 2]);
    node.restart();
    node.settle();
    assert_eq!(replicas(&node), [ReplicaState::Running; 2]);
}

#[test]
fn a_crash_between_two_records_is_made_good() {
    let mut node = with_volume(&[0, 1]);
    // The volume was stored as attached, and its image's record was not.
    node.volumes.get_mut(&volume_name("v")).unwrap().attached = true;
    node.restart();
    node.settle();
    assert_eq!(replicas(&node), [ReplicaState::Running; 2]);
}

#[test]
fn a_first_copy_that_fails_does_not_hold_up_the_others() {
    let mut node = with_volume(&[0, 1, 2]);
    node.command(attach_volume("v")).unwrap();
    for _ in 0..3 {
        let copy = node.only_worker();
        node.report(&copy, failed(FailureClass::Refuse));
    }
    assert_eq!(replicas(&node), [ReplicaState::Failed; 3]);
    assert_eq!(status(&node).robustness(), "faulted");
    node.command(attach_volume("v")).unwrap();
    assert_eq!(replicas(&node), [ReplicaState::Waiting; 3]);
    node.settle();
    assert_eq!(replicas(&node), [ReplicaState::Running; 3]);
}

#[test]
fn rules_9_to_12_what_an_attached_volume_reads_stays() {
    let mut node = with_volume(&[0, 1]);
    node.command(set(Setting::CleanupWait, 0)).unwrap();
    node.command(attach_volume("v")).unwrap();
    let cancel = node.command(Command::Cancel(name("a"))).unwrap_err();
    assert!(matches!(cancel, ManagerError::InUse { attachments: 2, .. }), "{cancel}");
    node.settle();
    node.wait(Duration::from_secs(3600));
    assert!(node.removing.is_empty());
    for on in [0, 1] {
        let error = node.command(Command::CleanUp(name("a"), vec![disk(on)])).unwrap_err();
        assert!(error.to_string().contains("a replica of an attached volume reads it"), "{error}");
    }
    let delete = || Command::Delete { name: name("a"), sessions: 0 };
    let error = node.command(delete()).unwrap_err().to_string();
    assert_eq!(error, "image a: volumes stand on it: v");
    let error = node.command(Command::DeleteVolume(volume_name("v"))).unwrap_err();
    assert!(matches!(error, ManagerError::VolumeAttached { .. }), "{error}");
    node.command(detach_volume("v")).unwrap();
    node.settle();
    let left = node.world.image(&name("a")).unwrap().copies.len();
    assert_eq!(left, 1, "unused now, but for the last");
    assert!(node.command(delete()).is_err(), "a detached volume still stands on it");
    node.command(Command::DeleteVolume(volume_name("v"))).unwrap();
    node.command(delete()).unwrap();
    node.settle();
    assert!(node.images.is_empty() && node.volumes.is_empty() && node.files.is_empty());
}

#[test]
fn rule_17_a_further_copy_names_the_complete_ones_that_are_there() {
    let mut node = Node::new();
    node.command(create("a")).unwrap();
    node.command(Command::Fetch(name("a"), Some(disk(0)))).unwrap();
    node.settle();
    assert_eq!(node.tasks[0].ready_on, []);
    let mut disks: Vec<_> = (0..3).map(disk_status).collect();
    disks[0].healthy = false;
    node.event(Event::Disks(disks));
    node.command(Command::Fetch(name("a"), Some(disk(1)))).unwrap();
    assert_eq!(node.tasks[1].ready_on, [], "nothing is read from a disk that is not healthy");
    node.settle();
    node.event(Event::Disks((0..3).map(disk_status).collect()));
    // The one on the disk that was gone is checked first.
    node.settle();
    node.command(Command::Fetch(name("a"), Some(disk(2)))).unwrap();
    assert_eq!(node.tasks.last().unwrap().ready_on, [disk(0), disk(1)]);
}

#[test]
fn replicas_get_healthy_disks_with_most_room_as_many_as_there_are() {
    let mut node = Node::new();
    node.command(create("a")).unwrap();
    let mut disks: Vec<_> = (0..3).map(disk_status).collect();
    disks[0].healthy = false;
    disks[1].reserved_bytes = 1 << 38;
    node.event(Event::Disks(disks));
    create_volume(&mut node, NewVolume { replicas: Some(3), ..asked("v", "a", &[]) }).unwrap();
    let record = status(&node).record;
    assert_eq!((record.disks, record.replicas), (vec![disk(2), disk(1)], 3));
    let bad = |replicas, disks: &[usize]| NewVolume { replicas, ..asked("w", "a", disks) };
    for (new, words) in [
        (bad(Some(2), &[0]), "2 replicas on 1 named disks"),
        (bad(Some(65), &[]), "65 replicas"),
        (bad(None, &[1, 1]), "named twice"),
        (NewVolume { image: name("b"), ..asked("w", "b", &[]) }, "image b: not found, and no URL"),
    ] {
        let error = create_volume(&mut node, new).unwrap_err().to_string();
        assert!(error.contains(words), "{error}");
    }
    assert_eq!(node.world.volumes().len(), 1);
}

#[test]
fn the_same_volume_is_one_and_another_of_its_name_is_refused() {
    let mut node = with_volume(&[0]);
    node.command(create("b")).unwrap();
    let same = node.command(new_volume("v", "a", &[0])).unwrap();
    assert_eq!(same, Outcome::Volume(volume_name("v"), false));
    let class = Some(ClassName::parse("c").unwrap());
    for (new, words) in [
        (asked("v", "b", &[0]), "its image is a, not b"),
        (NewVolume { replicas: Some(2), ..asked("v", "a", &[]) }, "its number of replicas is 1"),
        (asked("v", "a", &[1]), "its disks is aaaaaaaa-1111-2222, not bbbbbbbb-1111-2222"),
        (NewVolume { size_bytes: Some(7), ..asked("v", "a", &[0]) }, "its size is none, not 7"),
        (NewVolume { class, ..asked("v", "a", &[0]) }, "its storage class is none, not c"),
    ] {
        let error = create_volume(&mut node, new).unwrap_err().to_string();
        assert!(error.contains(words), "{error}");
    }
}

#[test]
fn rule_13_the_image_of_a_volume_is_made_used_or_refused() {
    let mut node = Node::new();
    let with = |url: Option<&str>| NewVolume {
        new_image: url.map(|url| image_from("a", url)),
        ..asked("v", "a", &[])
    };
    // Missing, and no URL.
    let error = create_volume(&mut node, with(None)).unwrap_err();
    assert!(matches!(error, ManagerError::NoImageForVolume { .. }), "{error}");
    // Missing, and a URL.
    create_volume(&mut node, with(Some("http://h/a"))).unwrap();
    assert!(node.images.contains_key(&name("a")) && node.running.is_empty());
    let again = |url| NewVolume { name: volume_name("w"), ..with(url) };
    // There, and another URL: nothing is made.
    let error = create_volume(&mut node, again(Some("http://h/b"))).unwrap_err();
    assert!(matches!(error, ManagerError::OtherSource { .. }), "{error}");
    assert_eq!(node.volumes.len(), 1);
    // There, and the same URL, or none.
    create_volume(&mut node, again(Some("http://h/a"))).unwrap();
    create_volume(&mut node, NewVolume { name: volume_name("x"), ..with(None) }).unwrap();
    assert_eq!((node.volumes.len(), node.images.len()), (3, 1));
}

#[test]
fn rule_14_a_backup_wants_the_image_that_it_was_made_on() {
    let (right, wrong) = ("a".repeat(128), "b".repeat(128));
    let backup = |sha512: &str, forced| {
        let sha512 = Some(sha512.to_owned());
        Some(BackupRecord { sha512, forced, ..BackupRecord::default() })
    };
    let restore = |sha512: &str, forced| NewVolume {
        backup: backup(sha512, forced),
        ..asked("v", "a", &[0])
    };
    // Not fetched: what the backup records is what has to arrive.
    let mut node = Node::new();
    node.command(create("a")).unwrap();
    create_volume(&mut node, restore(&right, false)).unwrap();
    let expected = node.images[&name("a")].expected.digests.clone();
    assert_eq!(expected.get(DigestKind::Sha512), Some(right.as_str()));
    // Expected, and another: refused, unless the user insists; that changes no expectation.
    let other = |forced| NewVolume { name: volume_name("w"), ..restore(&wrong, forced) };
    let error = create_volume(&mut node, other(false)).unwrap_err();
    assert!(matches!(error, ManagerError::OtherBackupImage { .. }), "{error}");
    create_volume(&mut node, other(true)).unwrap();
    assert_eq!(node.images[&name("a")].expected.digests, expected);
    // Fetched, and its SHA-512 was never made: nobody knows.
    let mut node = Node::new();
    node.command(create("a")).unwrap();
    node.command(Command::Fetch(name("a"), None)).unwrap();
    node.settle();
    let error = create_volume(&mut node, restore(&right, false)).unwrap_err();
    assert!(matches!(error, ManagerError::UnprovenBackupImage { .. }), "{error}");
    create_volume(&mut node, restore(&right, true)).unwrap();
    assert!(status(&node).record.backup.unwrap().forced);
    // A missing image, with a URL: it is made, and has to have the digest.
    let new_image = Some(image_from("b", "http://h/b"));
    let new =
        NewVolume { new_image, name: volume_name("x"), image: name("b"), ..restore(&right, false) };
    create_volume(&mut node, new).unwrap();
    let expected = &node.images[&name("b")].expected.digests;
    assert_eq!(expected.get(DigestKind::Sha512), Some(right.as_str()));
}

#[test]
fn a_volume_is_not_smaller_than_its_image() {
    let mut node = Node::new();
    node.command(create("a")).unwrap();
    node.command(Command::Fetch(name("a"), None)).unwrap();
    node.settle();
    let of = |size_bytes| NewVolume { size_bytes: Some(size_bytes), ..asked("v", "a", &[0]) };
    let error = create_volume(&mut node, of(4095)).unwrap_err().to_string();
    assert_eq!(error, "volume v: 4095 bytes, and its image a has 4096");
    create_volume(&mut node, of(4096)).unwrap();
}

#[test]
fn a_class_is_put_once_changed_and_kept() {
    let class = |replicas| ClassRecord {
        name: ClassName::parse("longhorn").unwrap(),
        provisioner: String::new(),
        image: Some(name("a")),
        url: None,
        clone_of: None,
        sha512: None,
        min_copies: None,
        replicas: Some(replicas),
        selectors: Selectors::default(),
        kept: BTreeMap::new(),
        created_unix_s: u64::from(replicas),
    };
    let mut node = Node::new();
    let mut put = |replicas| node.command(Command::PutClass(Box::new(class(replicas)))).unwrap();
    let became = |applied| Outcome::Class(ClassName::parse("longhorn").unwrap(), applied);
    assert_eq!(put(3), became(Applied::Created));
    assert_eq!(put(3), became(Applied::Unchanged));
    assert_eq!(put(2), became(Applied::Configured));
    node.restart();
    assert_eq!(node.world.classes()[0].replicas, Some(2));
    let gone = Command::DeleteClass(ClassName::parse("longhorn").unwrap());
    node.command(gone.clone()).unwrap();
    assert!(matches!(node.command(gone), Err(ManagerError::NoSuchClass { .. })));
}
