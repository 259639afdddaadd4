//! The rules of the lifecycle, one test each.

use super::*;

#[test]
fn rule_1_a_created_image_is_not_fetched() {
    let mut node = Node::new();
    node.command(create("a")).unwrap();
    node.wait(Duration::from_secs(3600));
    assert!(node.running.is_empty() && node.files.is_empty());
}

#[test]
fn rule_2_an_attachment_waits_for_its_copy_and_then_is_ready() {
    let mut node = Node::new();
    node.command(create("a")).unwrap();
    let Outcome::Attachment(id, true) = node.command(attach("a", Some(1), "vm")).unwrap() else {
        panic!("no attachment")
    };
    assert_eq!(node.world.attachment(&id).unwrap().state, AttachmentState::Waiting);
    let copy = node.only_worker();
    assert_eq!((copy.disk.clone(), node.state("a", 1)), (disk(1), Some(CopyState::Starting)));
    node.report(&copy, WorkerEvent::Progress(Progress { bytes_done: 5, ..Progress::default() }));
    assert_eq!(node.state("a", 1), Some(CopyState::InProgress));
    node.report(&copy, WorkerEvent::Ready(info(9)));
    assert_eq!(node.state("a", 1), Some(CopyState::ReadyForTransfer));
    assert_eq!(node.world.attachment(&id).unwrap().state, AttachmentState::Waiting);
    node.published(&copy, Ok(()));
    assert_eq!(node.world.attachment(&id).unwrap().state, AttachmentState::Ready);
}

#[test]
fn rule_3_a_wanted_copy_gets_one_worker_of_its_name_and_only_on_a_disk_that_is_here() {
    let mut node = Node::new();
    node.command(create("a")).unwrap();
    let gone = DiskStatus { healthy: false, ..disk_status(1) };
    node.event(Event::Disks(vec![disk_status(0), gone]));
    node.command(Command::Fetch(name("a"), Some(disk(1)))).unwrap();
    assert_eq!((node.running.len(), node.state("a", 1)), (0, Some(CopyState::Unknown)));
    node.event(Event::Disks(vec![disk_status(0), disk_status(1)]));
    let copy = node.only_worker();
    assert_eq!((&copy.disk, node.tasks[0].worker.as_str()), (&disk(1), "a-bbbbbbbb"));
    for _ in 0..3 {
        node.event(Event::Tick);
        node.command(Command::Fetch(name("a"), Some(disk(1)))).unwrap();
    }
    assert_eq!(node.only_worker(), copy);
}

/// Where a copy is when its worker speaks, what it says, and where the copy is then.
#[test]
fn rules_4_to_6_what_a_worker_says_moves_its_copy() {
    use CopyState::{Failed, FailedAndCleanup, InProgress, Ready, ReadyForTransfer, Starting};
    let progress = || WorkerEvent::Progress(Progress { bytes_done: 5, ..Progress::default() });
    let ready = || WorkerEvent::Ready(info(4096));
    let (retry, refuse) = (failed(FailureClass::Retry), failed(FailureClass::Refuse));
    // `None`: the worker is gone without a word more.
    let table = [
        (Starting, Some(WorkerEvent::Started), Starting),
        (Starting, Some(progress()), InProgress),
        (Starting, Some(ready()), ReadyForTransfer),
        (Starting, Some(retry.clone()), Failed),
        (Starting, Some(refuse.clone()), FailedAndCleanup),
        (Starting, None, Failed),
        (InProgress, Some(WorkerEvent::Started), InProgress),
        (InProgress, Some(progress()), InProgress),
        (InProgress, Some(ready()), ReadyForTransfer),
        (InProgress, Some(retry.clone()), Failed),
        (InProgress, Some(refuse.clone()), FailedAndCleanup),
        (InProgress, None, Failed),
        // A copy that is complete is judged by who opens or scrubs it, and by nobody who fetched it.
        (ReadyForTransfer, Some(progress()), ReadyForTransfer),
        (ReadyForTransfer, Some(retry.clone()), ReadyForTransfer),
        (ReadyForTransfer, Some(refuse), ReadyForTransfer),
        (ReadyForTransfer, None, ReadyForTransfer),
        (Ready, Some(retry), Ready),
        (Ready, None, Ready),
    ];
    for (from, event, to) in table {
        let mut node = Node::new();
        node.command(create("a")).unwrap();
        node.command(Command::Fetch(name("a"), Some(disk(0)))).unwrap();
        let copy = node.only_worker();
        let generation = node.running[&copy];
        let hear = |node: &mut Node, event| {
            if let Some(WorkerEvent::Ready(info)) = &event {
                node.files.insert(copy.clone(), Some(info.clone()));
            }
            node.event(Event::Worker(Report { copy: copy.clone(), generation, event }));
        };
        if from == InProgress {
            hear(&mut node, Some(progress()));
        } else if from.is_sealed() {
            hear(&mut node, Some(ready()));
        }
        if from == Ready {
            node.published(&copy, Ok(()));
        }
        assert_eq!(node.state("a", 0), Some(from));
        let said = format!("{from}: {event:?}");
        hear(&mut node, event);
        assert_eq!(node.state("a", 0), Some(to), "{said}");
    }
}

#[test]
fn rule_8_what_is_wanted_no_more_stops_goes_with_its_files_and_is_forgotten() {
    let mut node = Node::new();
    node.command(create("a")).unwrap();
    node.command(Command::Fetch(name("a"), Some(disk(0)))).unwrap();
    let copy = node.only_worker();
    node.command(Command::Cancel(name("a"))).unwrap();
    assert!(!node.images[&name("a")].disks.contains_key(&disk(0)), "recorded first");
    assert!(node.stopping.contains(&copy) && node.removing.is_empty(), "it stops first");
    node.end(&copy);
    assert!(node.removing.contains(&copy) && node.state("a", 0).is_some());
    node.removed(&copy, true);
    assert_eq!((node.state("a", 0), node.files.len()), (None, 0));
}

#[test]
fn rule_7_failures_back_off_and_double_to_five_minutes() {
    let waits: Vec<u64> = (1..12).map(|n| back_off(n).as_secs()).collect();
    assert_eq!(waits, [1, 2, 4, 8, 16, 32, 64, 128, 256, 300, 300]);
    let mut node = Node::new();
    node.command(create("a")).unwrap();
    node.command(attach("a", None, "")).unwrap();
    for wait in [1, 2, 4] {
        let copy = node.only_worker();
        node.report(&copy, failed(FailureClass::Retry));
        node.wait(Duration::from_secs(wait) - Duration::from_millis(1));
        assert!(node.running.is_empty());
        assert_eq!(node.state("a", 0), Some(CopyState::Failed));
        node.wait(Duration::from_millis(1));
    }
    // More bytes than at the last failure: trying helps, so the wait begins anew.
    let copy = node.only_worker();
    node.report(&copy, WorkerEvent::Progress(Progress { bytes_done: 5, ..Progress::default() }));
    node.report(&copy, failed(FailureClass::Retry));
    node.wait(Duration::from_secs(1));
    node.only_worker();
}

#[test]
fn a_refused_copy_is_tried_again_only_by_a_new_attach_or_fetch_even_after_a_restart() {
    for again in [attach("a", Some(0), "vm"), Command::Fetch(name("a"), None)] {
        let mut node = Node::new();
        node.command(create("a")).unwrap();
        node.command(attach("a", Some(0), "vm")).unwrap();
        let copy = node.only_worker();
        node.report(&copy, failed(FailureClass::Refuse));
        node.wait(Duration::from_secs(3600));
        assert!(node.running.is_empty());
        assert_eq!(node.world.attachments()[0].state, AttachmentState::Failed);
        node.restart();
        assert!(node.running.is_empty());
        assert_eq!(node.world.attachments()[0].message, "no");
        node.command(again).unwrap();
        assert_eq!(node.only_worker(), copy);
        assert_eq!(node.world.attachments()[0].state, AttachmentState::Waiting);
        assert_eq!(node.world.attachments().len(), 1, "the same label is the same attachment");
    }
}

#[test]
fn rule_12_delete_is_refused_in_use_and_then_removes_files_before_the_record() {
    let mut node = Node::new();
    node.command(create("a")).unwrap();
    let Outcome::Attachment(id, _) = node.command(attach("a", None, "")).unwrap() else { panic!() };
    node.settle();
    let delete = |sessions| Command::Delete { name: name("a"), sessions };
    assert!(matches!(
        node.command(delete(0)),
        Err(ManagerError::InUse { attachments: 1, sessions: 0, .. })
    ));
    node.command(Command::Detach(id)).unwrap();
    assert!(matches!(node.command(delete(2)), Err(ManagerError::InUse { sessions: 2, .. })));
    node.command(delete(0)).unwrap();
    assert!(matches!(node.command(attach("a", None, "")), Err(ManagerError::BeingDeleted { .. })));
    let copy = node.removing.iter().next().unwrap().clone();
    node.removed(&copy, false);
    assert!(node.world.image(&name("a")).is_some(), "files are left, so the record stays");
    node.restart();
    node.settle();
    assert!(node.world.images().is_empty() && node.images.is_empty() && node.files.is_empty());
}

#[test]
fn rule_13_the_same_name_with_another_source_is_refused_without_its_secrets() {
    let mut node = Node::new();
    node.command(create_from("a", "https://u:pw@h/a?sig=pw")).unwrap();
    let same = node.command(create_from("a", "https://u:pw@h/a?sig=pw")).unwrap();
    assert_eq!(same, Outcome::Image(name("a"), false));
    let error = node.command(create_from("a", "http://h/b")).unwrap_err();
    assert!(matches!(error, ManagerError::OtherSource { .. }));
    assert!(!format!("{error} {error:?}").contains("pw"));
}

#[test]
fn credentials_of_mirrors_go_no_other_way_unless_they_are_known() {
    let mut node = Node::new();
    let with = |mirror: Option<&str>, sums: Option<&str>, access: &str| {
        let Command::Create(mut new) = create_from("a", "https://h/a") else { panic!() };
        new.mirrors = mirror.map(|url| SourceUrl::parse(url).unwrap()).into_iter().collect();
        new.expected.checksum_url = sums.map(|url| SourceUrl::parse(url).unwrap());
        new.access = serde_json::from_str(access).unwrap();
        Command::Create(new)
    };
    let (mirror, sums) = (Some("https://u:pw@m/a"), Some("https://s/sums?sig=pw"));
    let evil = r#"{"proxy":"http://evil:3128"}"#;
    node.command(with(mirror, sums, r#"{"bearer":"one"}"#)).unwrap();
    for new in [
        with(None, None, evil),
        with(mirror, None, evil),
        with(None, sums, r#"{"ca":"another"}"#),
        with(Some("https://u:other@m/a"), sums, r#"{"direct":true}"#),
        with(mirror, Some("https://s/sums?sig=other"), r#"{"no_proxy":["m"]}"#),
    ] {
        let error = node.command(new).unwrap_err();
        assert!(matches!(error, ManagerError::OtherWay { .. }), "{error}");
    }
    // Another token goes where the one before it went.
    node.command(with(None, None, r#"{"bearer":"two"}"#)).unwrap();
    node.command(with(mirror, sums, evil)).unwrap();
    node.command(with(None, None, evil)).unwrap();
}

#[test]
fn rule_20_a_copy_that_differs_from_the_first_is_refused() {
    let mut node = Node::new();
    node.command(create("a")).unwrap();
    node.command(Command::Fetch(name("a"), Some(disk(0)))).unwrap();
    node.settle();
    node.command(Command::Fetch(name("a"), Some(disk(1)))).unwrap();
    let copy = node.only_worker();
    node.report(&copy, WorkerEvent::Ready(info(5000)));
    assert_eq!(node.state("a", 1), Some(CopyState::Failed));
    assert_eq!(node.state("a", 0), Some(CopyState::Ready));
    let image = node.world.image(&name("a")).unwrap();
    assert!(image.copies[1].message.contains("size in bytes is 5000, an earlier copy had 4096"));
    assert_eq!(image.record.facts.unwrap().size_bytes, 4096);
}

#[test]
fn after_a_restart_ready_copies_are_adopted_and_unfinished_ones_start_again() {
    let mut node = Node::new();
    node.command(create("a")).unwrap();
    node.command(create("b")).unwrap();
    node.command(attach("a", Some(0), "")).unwrap();
    node.settle();
    node.command(attach("b", Some(1), "")).unwrap();
    node.restart();
    assert_eq!(node.only_worker().image, name("b"));
    assert_eq!(node.publishing.iter().next().unwrap().image, name("a"));
    node.settle();
    assert!(node.world.attachments().iter().all(|a| a.state == AttachmentState::Ready));
}

#[test]
fn a_sealed_copy_without_a_record_becomes_an_image_without_a_source() {
    let mut node = Node::new();
    let id = CopyId { image: name("found"), uuid: ImageUuid::parse("0a").unwrap(), disk: disk(0) };
    node.files.insert(id, Some(info(9)));
    node.restart();
    node.settle();
    assert_eq!(node.state("found", 0), Some(CopyState::Ready));
    assert_eq!(node.images[&name("found")].source, None);
}

#[test]
fn a_late_report_of_an_older_worker_changes_nothing() {
    let mut node = Node::new();
    node.command(create("a")).unwrap();
    node.command(attach("a", None, "")).unwrap();
    let copy = node.only_worker();
    let old = node.running[&copy];
    node.report(&copy, failed(FailureClass::Retry));
    node.wait(Duration::from_secs(1));
    assert_ne!(node.running[&copy], old);
    let late = WorkerEvent::Ready(info(9));
    node.event(Event::Worker(Report { copy, generation: old, event: Some(late) }));
    assert_eq!(node.state("a", 0), Some(CopyState::Starting));
}

#[test]
fn two_disks_with_the_same_first_8_have_workers_of_different_names() {
    let mut node = Node::new();
    node.command(create("a")).unwrap();
    node.command(Command::Fetch(name("a"), Some(disk(0)))).unwrap();
    node.command(Command::Fetch(name("a"), Some(disk(2)))).unwrap();
    let image = node.world.image(&name("a")).unwrap();
    let workers: Vec<_> = image.copies.iter().map(|c| c.worker.as_str()).collect();
    assert_eq!(workers, ["a-aaaaaaaa", "a-aaaaaaaa-3333-44"]);
}

#[test]
fn an_unhealthy_disk_gets_no_worker_until_it_is_back() {
    let mut node = Node::new();
    node.command(create("a")).unwrap();
    let mut disks: Vec<_> = (0..3).map(disk_status).collect();
    disks[0].healthy = false;
    node.event(Event::Disks(disks));
    node.command(attach("a", Some(0), "")).unwrap();
    assert_eq!((node.state("a", 0), node.running.len()), (Some(CopyState::Unknown), 0));
    node.event(Event::Disks((0..3).map(disk_status).collect()));
    assert_eq!(node.only_worker().disk, disk(0));
}
