//! The protocol as somebody without the library speaks it, rightly and wrongly.

use std::io::{IoSlice, IoSliceMut};
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use bedplate::replica::wire::{
    ATTACH, Attached, EXTENT, LayerPart, MAGIC, MAX_READ_BYTES, PREPARE, PREPARES, PROTECTED, READ,
    Reply, Request, Status,
};
use bedplate::replica::{Mode, Options, Replica, ReplicaError, socket};
use bedplate::serve::replica::{Limits, Session};
use zerocopy::{FromBytes, IntoBytes};

use crate::nbd_support::patterned;
use crate::qcow2_common::{Random, compressed, have_qemu};
use crate::server::TestServer;

fn server() -> (TestServer, Vec<u8>) {
    let server = TestServer::start();
    let bytes = patterned(1 << 20);
    let path = server.dir.path().join("disk.raw");
    std::fs::write(&path, &bytes).unwrap();
    server.add("disk", &path);
    (server, bytes)
}

fn attach(name: &str) -> Vec<u8> {
    let len_bytes = u32::try_from(name.len()).unwrap();
    let request = Request { len_bytes, ..Request::of_range(ATTACH, 1, 0, 0) };
    [request.as_bytes(), name.as_bytes()].concat()
}

struct Wire(OwnedFd);

impl Wire {
    fn connect(server: &TestServer) -> Self {
        Self(socket::connect(&server.socket(), Duration::from_secs(60)).unwrap())
    }

    fn send(&self, message: &[u8]) {
        socket::send(&self.0, &[IoSlice::new(message)], &[]).unwrap();
    }

    /// The answer's head, body and descriptors; `None` at the end.
    fn take(&self) -> Option<(Reply, Vec<u8>, Vec<OwnedFd>)> {
        let (mut bytes, mut descriptors) = (vec![0; 200_000], Vec::new());
        let mut parts = [IoSliceMut::new(&mut bytes)];
        let count = socket::receive(&self.0, &mut parts, &mut descriptors).unwrap_or(0);
        bytes.truncate(count);
        let (head, body) = Reply::read_from_prefix(&bytes).ok()?;
        assert_eq!((head.magic, head.len_bytes as usize), (MAGIC, body.len()));
        Some((head, body.to_vec(), descriptors))
    }

    fn ask(&self, message: &[u8]) -> (Reply, Vec<u8>, Vec<OwnedFd>) {
        self.send(message);
        self.take().unwrap()
    }
}

#[test]
fn another_language_can_do_without_the_library() {
    let (server, bytes) = server();
    let wire = Wire::connect(&server);
    let (head, body, descriptors) = wire.ask(&attach("disk"));
    assert_eq!((head.status, head.kind, head.cookie), (0, ATTACH, 1));
    let (attached, rest) = Attached::read_from_prefix(&body).unwrap();
    assert_eq!((attached.size_bytes, attached.layers), (1 << 20, 1));
    let (layer, identity) = LayerPart::read_from_prefix(rest).unwrap();
    assert_eq!((layer.file_bytes, identity), (1 << 20, &b"disk"[..]));
    assert_eq!(descriptors.len(), 2, "a file and its map");

    let (head, body, _) = wire.ask(Request::of_range(READ, 7, 1000, 3000).as_bytes());
    assert_eq!((head.status, head.cookie), (0, 7));
    assert!(body == bytes[1000..4000]);
    let (head, body, _) = wire.ask(Request::of_range(EXTENT, 8, 0, 1 << 20).as_bytes());
    assert!(body.is_empty() && head.a > 0 && head.b == 1, "{head:?}");
    let too_long = Request::of_range(READ, 9, 0, u64::from(MAX_READ_BYTES) + 1);
    for request in [too_long, Request::of_range(READ, 9, 1 << 20, 1)] {
        let (head, text, _) = wire.ask(request.as_bytes());
        assert_eq!(Status::of(head.status), Some(Status::PastEnd));
        assert!(!text.is_empty());
    }
    assert_ne!(attached.flags & PREPARES, 0);
    let (head, body, _) = wire.ask(Request::of_range(PREPARE, 9, 4096, 1 << 19).as_bytes());
    assert!(head.status == 0 && body.is_empty() && head.a == 1 << 19, "{head:?}");
    for (at, limit) in [(0, 0), (1, 1 << 20), (1 << 20, 1), (u64::MAX, u64::MAX)] {
        let (head, ..) = wire.ask(Request::of_range(PREPARE, 9, at, limit).as_bytes());
        assert_eq!(Status::of(head.status), Some(Status::PastEnd), "{at} {limit}");
    }
    let (head, body, _) = wire.ask(Request::of_range(READ, 10, 0, 16).as_bytes());
    assert!(head.status == 0 && body == bytes[..16], "the session goes on");
    assert_eq!(server.exports.in_use("disk"), 1);
    drop(wire);
}

#[test]
fn root_can_not_write_through_what_it_is_handed() {
    let (server, bytes) = server();
    let wire = Wire::connect(&server);
    let (_, body, descriptors) = wire.ask(&attach("disk"));
    let (attached, _) = Attached::read_from_prefix(&body).unwrap();
    if attached.flags & PROTECTED == 0 {
        assert!(!is_root(), "root has read-only mounts");
        return eprintln!("skipped: read-only mounts need root");
    }
    for fd in &descriptors {
        let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
        let again = std::fs::File::options().read(true).write(true).open(&path);
        if let Ok(file) = again {
            // A memfd may be opened, but not written to or changed.
            use std::os::unix::fs::FileExt;
            assert!(file.write_at(b"x", 0).is_err(), "{path} was written to");
            assert!(file.set_len(0).is_err() && file.set_len(1 << 30).is_err());
        }
    }
    assert!(bytes == std::fs::read(server.dir.path().join("disk.raw")).unwrap());
}

#[test]
fn root_can_not_write_to_what_is_decoded() {
    if !have_qemu() {
        return;
    }
    let server = TestServer::start();
    let image = compressed(server.dir.path(), "image", &[7; 1 << 20]);
    let view = server.add("disk", &image);
    let wire = Wire::connect(&server);
    let (_, body, descriptors) = wire.ask(&attach("disk"));
    let (attached, _) = Attached::read_from_prefix(&body).unwrap();
    let arena = &descriptors[usize::try_from(attached.arena).unwrap()];
    if !view.cache().slab().unwrap().can_give_back() {
        assert!(!is_root(), "root has mounts of its own");
        return eprintln!("skipped: a mount of one's own needs root");
    }
    let path = format!("/proc/self/fd/{}", arena.as_raw_fd());
    let error = std::fs::File::options().write(true).open(&path).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(30), "a read-only file system: {error}");
    assert_eq!(std::fs::File::open(&path).unwrap().metadata().unwrap().len(), attached.arena_bytes);
}

pub fn is_root() -> bool {
    std::fs::metadata("/proc/self").map(|meta| std::os::unix::fs::MetadataExt::uid(&meta)).unwrap()
        == 0
}

#[test]
fn what_is_no_request_ends_the_session_with_a_reason() {
    let (server, _) = server();
    let request = |request: Request| request.as_bytes().to_vec();
    let bad: [Vec<u8>; 11] = [
        vec![0],
        vec![7; 32],
        b"GET / HTTP/1.1\r\n\r\n".to_vec(),
        request(Request { magic: 1, ..Request::of_range(ATTACH, 0, 0, 0) }),
        request(Request { len_bytes: 9, ..Request::of_range(ATTACH, 0, 0, 0) }),
        request(Request { later: 1, ..Request::of_range(ATTACH, 0, 0, 0) }),
        request(Request::of_range(READ, 0, 0, 1)),
        request(Request::of_range(EXTENT, 0, 0, 1)),
        request(Request::of_range(PREPARE, 0, 0, 1)),
        request(Request::of_range(99, 0, 0, 1)),
        attach(&"x".repeat(256)),
    ];
    for message in bad {
        let wire = Wire::connect(&server);
        let (head, text, descriptors) = wire.ask(&message);
        assert_eq!(Status::of(head.status), Some(Status::Malformed), "{message:?}");
        assert!(!text.is_empty() && descriptors.is_empty());
        assert!(wire.take().is_none(), "it was left after {message:?}");
    }
    let wire = Wire::connect(&server);
    wire.ask(&attach("disk"));
    assert_eq!(Status::of(wire.ask(&attach("disk")).0.status), Some(Status::Malformed));
    assert_eq!(server.attach("disk", Mode::Pread).size_bytes(), 1 << 20, "others go on");
}

#[test]
fn an_unknown_image_is_told_and_one_that_goes_ends_its_leases() {
    let (server, bytes) = server();
    let error = Replica::attach(server.socket(), "no-such", Options::default()).unwrap_err();
    let ReplicaError::Refused { status: Status::Unknown, message, .. } = &error else {
        panic!("{error}");
    };
    assert!(message.contains("no-such") && error.errno() == 2);

    let replica = server.attach("disk", Mode::Mapped);
    assert!(server.exports.remove("disk").is_err(), "it is in use");
    server.exports.close("disk").unwrap();
    std::fs::remove_file(server.dir.path().join("disk.raw")).unwrap();
    let mut found = vec![0; 1 << 20];
    replica.read_at(&mut found, 0).unwrap();
    assert!(found == bytes, "what was handed out stays");
    drop(replica);
}

#[test]
fn a_lease_ends_with_its_connection() {
    let (server, _) = server();
    let replicas: Vec<Replica> = (0..20).map(|_| server.attach("disk", Mode::Pread)).collect();
    assert_eq!(server.exports.in_use("disk"), 20);
    drop(replicas);
    while server.exports.in_use("disk") > 0 {
        std::thread::yield_now();
    }
    server.exports.remove("disk").unwrap();
}

#[test]
fn a_silent_client_is_left_and_too_many_are_closed() {
    let limits =
        Limits { handshake: Duration::from_millis(50), connections: 3, ..Limits::default() };
    let server = TestServer::with_limits(limits);
    let silent = Wire::connect(&server);
    assert!(silent.take().is_none(), "it was left");
    let open: Vec<Wire> = (0..3).map(|_| Wire::connect(&server)).collect();
    // Whoever comes after three that are open is closed at once or, if one was left, later.
    assert!(Wire::connect(&server).take().is_none());
    drop(open);
}

#[test]
fn noise_never_stops_a_session() {
    let (server, _) = server();
    let mut random = Random(11);
    for round in 0..300 {
        let mut session = Session::new(Arc::clone(&server.exports), None, round % 5 > 0);
        for _ in 0..20 {
            let kind = u16::try_from(random.below(5)).unwrap();
            let mut message = match random.below(3) {
                0 => attach("disk"),
                1 => {
                    let (at, limit) = (random.below(2 << 20), random.below(200_000));
                    Request::of_range(kind, 0, at, limit).as_bytes().to_vec()
                }
                _ => (0..random.index(100)).map(|_| random.next().to_le_bytes()[0]).collect(),
            };
            if random.below(4) == 0 && !message.is_empty() {
                let at = random.index(message.len());
                message[at] ^= 1 << random.below(8);
            }
            let answer = session.answer(&message);
            assert_eq!(answer.head.len_bytes as usize, answer.body.len());
            assert!(answer.body.len() <= MAX_READ_BYTES as usize);
            let _fds: Vec<BorrowedFd<'_>> = answer.descriptors;
        }
    }
}
