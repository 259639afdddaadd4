//! Any order of commands, events, failures and restarts: the rules hold, and the world converges.

use proptest::prelude::*;

use super::volumes::{new_volume, volume_name};
use super::*;

/// One move of the world around the manager; numbers choose among what is possible.
#[expect(clippy::too_many_lines, reason = "one table of moves")]
fn random_move(node: &mut Node, kind: u8, pick: usize) {
    let image = ["a", "b", "top"][pick % 3];
    let running: Vec<CopyId> = node.running.keys().cloned().collect();
    let publishing: Vec<CopyId> = node.publishing.iter().cloned().collect();
    let removing: Vec<CopyId> = node.removing.iter().cloned().collect();
    let attached: Vec<AttachmentId> = node.attachments.keys().cloned().collect();
    let some = |list: &[CopyId]| list.get(pick % list.len().max(1)).cloned();
    match kind {
        0 if image == "top" => drop(node.command(create_on(image, "a"))),
        0 => drop(node.command(create(image))),
        1 => drop(node.command(attach(image, Some(pick % 3), ["", "vm"][pick % 2]))),
        2 => drop(node.command(Command::Fetch(name(image), Some(disk(pick % 3))))),
        3 => drop(node.command(Command::Delete { name: name(image), sessions: pick / 7 % 2 })),
        4 if !attached.is_empty() => {
            node.command(Command::Detach(attached[pick % attached.len()].clone())).unwrap();
        }
        5 | 6 => {
            let Some(id) = some(&running) else { return };
            if node.scrubbing.contains(&id) {
                let class = [None, Some(FailureClass::Retry), Some(FailureClass::Refuse)][pick % 3];
                let repaired_bytes = pick as u64 / 3 % 2;
                let report = ScrubReport { class, repaired_bytes, ..ScrubReport::default() };
                return node.report(&id, WorkerEvent::Scrubbed(report));
            }
            let events = [
                WorkerEvent::Started,
                WorkerEvent::Progress(Progress { bytes_done: 7, ..Progress::default() }),
                WorkerEvent::Ready(info(4096)),
                WorkerEvent::Ready(info(5000)),
                failed(FailureClass::Retry),
                failed(FailureClass::Refuse),
            ];
            node.report(&id, events[pick % events.len()].clone());
        }
        7 => {
            if let Some(id) = some(&running) {
                node.end(&id);
            }
        }
        8 | 9 => {
            let Some(id) = some(&publishing) else { return };
            let results = [
                Ok(()),
                Err((FailureClass::Retry, "no".to_owned())),
                Err((FailureClass::Refuse, "no".to_owned())),
            ];
            node.published(&id, results[pick % results.len()].clone());
        }
        10 => {
            if let Some(id) = some(&removing) {
                node.removed(&id, pick.is_multiple_of(3));
            }
        }
        11 => node.wait(Duration::from_secs(pick as u64 % 400)),
        12 => node.restart(),
        13 => drop(node.command(Command::Cancel(name(image)))),
        14 | 15 => {
            let change = SteeringChange {
                paused: Some(kind == 14),
                priority: Some(i32::try_from(pick % 5).unwrap()),
                rate_bytes_per_s: Some(pick as u64 % 3),
                min_copies: pick.is_multiple_of(2).then_some(u32::try_from(pick / 6 % 4).unwrap()),
                ..SteeringChange::default()
            };
            drop(node.command(Command::Steer(name(image), change)));
        }
        17 => {
            let on = [disk(pick % 3), disk(pick / 3 % 3)];
            drop(node.command(Command::CleanUp(name(image), on[..1 + pick % 2].to_vec())));
        }
        18 => {
            let minutes = i64::try_from(pick % 20).unwrap() - 1;
            node.command(set(Setting::CleanupWait, minutes)).unwrap();
        }
        20 => {
            let disks: Vec<usize> = (0..=pick % 3).map(|n| (n + pick / 3) % 3).collect();
            drop(node.command(new_volume(["v", "w"][pick % 2], image, &disks)));
        }
        21 => drop(node.command(Command::AttachVolume(volume_name(["v", "w"][pick % 2])))),
        22 => drop(node.command(Command::DetachVolume(volume_name(["v", "w"][pick % 2])))),
        24 => drop(node.command(stream(image, Some(pick % 3), ["", "vm"][pick % 2]))),
        25 => {
            // Its readers have lost what they read: noticed at the next event.
            node.world.see_lost(vec![name(image)]);
            node.event(Event::Tick);
            node.world.see_lost(Vec::new());
        }
        23 => drop(node.command(Command::DeleteVolume(volume_name(["v", "w"][pick % 2])))),
        26 => {
            let change =
                if pick.is_multiple_of(2) { Command::FailNode } else { Command::ReturnNode };
            node.command(change).unwrap();
        }
        27 => {
            let healthy = |n| DiskStatus { healthy: pick / 2 % 4 != n, ..disk_status(n) };
            node.event(Event::Disks((0..DISKS.len()).map(healthy).collect()));
        }
        28 => {
            let seconds = i64::try_from(pick % 400).unwrap() - 1;
            node.command(set(Setting::RecoveryWait, seconds)).unwrap();
        }
        29 => drop(node.command(Command::Scrub(name(image), None))),
        30 => {
            let minutes = i64::try_from(pick % 3).unwrap();
            node.command(set(Setting::ScrubInterval, minutes)).unwrap();
        }
        31 => {
            // The driver was busy: the next pass is for several events.
            node.held = Some(Vec::new());
            for step in 0..1 + pick % 5 {
                random_move(node, [5, 7, 8, 10][(pick / 5 + step) % 4], pick / 20 + 3 * step);
            }
            let events = node.held.take().unwrap();
            node.events(events);
        }
        32 => {
            let change = DiskChange {
                evict: Some((pick / 3).is_multiple_of(3)),
                schedulable: Some(!(pick / 9).is_multiple_of(4)),
                ..DiskChange::default()
            };
            node.command(Command::ChangeDisk(disk(pick % 3), change)).unwrap();
        }
        33 => {
            let most = i64::try_from(pick % 3).unwrap();
            node.command(set(Setting::MaxReplenished, most)).unwrap();
        }
        _ => node.event(Event::Tick),
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4096))]

    #[test]
    fn any_order_of_events_keeps_the_rules_and_converges(
        moves in proptest::collection::vec((0u8..36, 0usize..1000), 0..80)
    ) {
        let mut node = Node::new();
        for (kind, pick) in moves {
            random_move(&mut node, kind, pick);
        }
        node.command(Command::ReturnNode).unwrap();
        node.event(Event::Disks((0..DISKS.len()).map(disk_status).collect()));
        // Else there is always one that is due, and what is refused is tried again and again.
        node.command(set(Setting::RecoveryWait, -1)).unwrap();
        node.command(set(Setting::ScrubInterval, 0)).unwrap();
        let open = DiskChange { evict: Some(false), schedulable: Some(true), tags: None };
        for on in 0..DISKS.len() {
            node.command(Command::ChangeDisk(disk(on), open.clone())).unwrap();
        }
        node.settle();
        for image in node.world.images() {
            prop_assert!(!image.record.deleting);
            for copy in &image.copies {
                let paused = image.record.steering.paused && copy.state == CopyState::Pending;
                let waits = copy.message.contains("its base");
                let settled = copy.state == CopyState::Ready || copy.refused || paused || waits;
                prop_assert!(settled, "{copy:?}");
            }
        }
        for image in node.world.images() {
            let complete = image.copies.iter().filter(|c| c.state == CopyState::Ready).count();
            let least = usize::try_from(image.record.min_copies).unwrap().min(DISKS.len());
            let may = !image.record.steering.paused && complete > 0;
            if may && node.world.settings().most_replenished() > 0 {
                // Where a disk is left, another was made; a refused one, or one that waits, has its own.
                prop_assert!(image.copies.len() >= least, "{image:?}");
            }
        }
        for volume in node.world.volumes() {
            prop_assert!(node.images.contains_key(&volume.record.image), "its image stays");
            let paused = node.images[&volume.record.image].steering.paused;
            for replica in &volume.replicas {
                let waits = paused || replica.message.contains("its base");
                let settled = match replica.state {
                    ReplicaState::Running => replica.path.is_some(),
                    ReplicaState::Stopped => !volume.record.attached,
                    ReplicaState::Waiting => waits,
                    ReplicaState::Failed => true,
                };
                prop_assert!(settled, "{replica:?}");
            }
        }
        let saved: Vec<_> = node.volumes.values().cloned().collect();
        let world: Vec<_> = node.world.volumes().into_iter().map(|v| v.record).collect();
        prop_assert_eq!(saved, world, "the catalog is what the world is");
        let saved: Vec<_> = node.images.values().cloned().collect();
        let world: Vec<_> = node.world.images().into_iter().map(|i| i.record).collect();
        prop_assert_eq!(saved, world, "the catalog is what the world is");
    }
}
