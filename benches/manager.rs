//! What the manager's core costs on a node with 1,000 images, a copy of each on four disks, and 200
//! attachments: a pass over all of it, the look for what is due next, and a command.

#![expect(clippy::unwrap_used, reason = "a failed unwrap is a failed benchmark")]

use std::collections::BTreeSet;
use std::hint::black_box;
use std::time::Duration;

use bedplate::image::Format;
use bedplate::manager::{
    Action, AttachmentId, Command, CopyId, CopyInfo, DiskStatus, Event, FoundCopy, FoundState,
    NewAttachment, Records, World,
};
use bedplate::names::{DiskUuid, ImageName, ImageUuid};
use criterion::{Criterion, criterion_group, criterion_main};

const IMAGES: usize = 1000;
const DISKS: usize = 4;
const ATTACHMENTS: usize = 200;

fn disk(number: usize) -> DiskStatus {
    DiskStatus {
        uuid: DiskUuid::parse(&format!("{number:08x}-0000-4000-8000-000000000000")).unwrap(),
        path: format!("/disks/{number}").into(),
        total_bytes: 1 << 40,
        free_bytes: 1 << 39,
        reserved_bytes: 0,
        sink: "threads".to_owned(),
        healthy: true,
        message: String::new(),
        node_tags: BTreeSet::new(),
    }
}

fn copy(image: usize, disk: &DiskStatus) -> FoundCopy {
    let name = format!("image-{image}");
    let id = CopyId {
        image: ImageName::parse(&name).unwrap(),
        uuid: ImageUuid::parse(&format!("{image:08x}")).unwrap(),
        disk: disk.uuid.clone(),
    };
    let info = CopyInfo {
        path: disk.path.join("backing-images").join(name).join("backing"),
        format: Format::Raw,
        virtual_size_bytes: 1 << 30,
        snapshot_size_bytes: None,
        size_bytes: 1 << 30,
        stored_bytes: 1 << 29,
        digests: format!("sha256:{image:064x}").parse().unwrap(),
        etag: None,
    };
    FoundCopy { id, state: FoundState::Ready(info) }
}

fn attach(number: usize) -> Command {
    Command::Attach(NewAttachment {
        id: AttachmentId::parse(&format!("{number:08x}")).unwrap(),
        image: ImageName::parse(&format!("image-{}", number % IMAGES)).unwrap(),
        disk: None,
        reader: format!("vm-{number}"),
        stream: false,
        vm: false,
        created_unix_s: 1,
    })
}

/// All that is asked for at the start has been done.
fn settled() -> World {
    let disks: Vec<_> = (0..DISKS).map(disk).collect();
    let found = (0..IMAGES).flat_map(|image| disks.iter().map(move |disk| copy(image, disk)));
    let found = found.collect();
    let (mut world, _) = World::restore(Records::default(), disks, found, 1);
    let mut events = vec![Event::Tick];
    while !events.is_empty() {
        let actions = world.step(Duration::ZERO, events);
        events = actions.into_iter().filter_map(answer).collect();
    }
    for number in 0..ATTACHMENTS {
        world.command(Duration::ZERO, attach(number)).unwrap();
    }
    world
}

fn answer(action: Action) -> Option<Event> {
    let Action::Publish(chain) = action else { return None };
    Some(Event::Published(chain[0].copy.clone(), Ok(())))
}

fn manager(c: &mut Criterion) {
    let mut world = settled();
    let mut group = c.benchmark_group("manager: 1,000 images on 4 disks, 200 attachments");
    group.bench_function("pass", |b| b.iter(|| world.step(Duration::ZERO, [Event::Tick])));
    group.bench_function("next wake", |b| b.iter(|| black_box(&world).next_wake()));
    group.bench_function("copy of the world", |b| b.iter(|| black_box(&world).clone()));
    group
        .bench_function("all images, as they are shown", |b| b.iter(|| black_box(&world).images()));
    let mut number = ATTACHMENTS;
    group.bench_function("attach and detach", |b| {
        b.iter(|| {
            number += 1;
            world.command(Duration::ZERO, attach(number)).unwrap();
            let id = AttachmentId::parse(&format!("{number:08x}")).unwrap();
            world.command(Duration::ZERO, Command::Detach(id)).unwrap()
        });
    });
    group.finish();
}

criterion_group!(benches, manager);
criterion_main!(benches);
