//! Whatever a client says, or leaves unsaid, the server goes on serving the others.
#![expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod nbd_support;

use std::fs::OpenOptions;
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use bedplate::serve::nbd::Limits;
use nbd_support::{EINVAL, EOVERFLOW, EPERM, ERR_INVALID, MIB, TestServer, Wire, patterned};

const EIO: u32 = 5;
const ERR_UNSUP: u32 = 0x8000_0001;
const ERR_UNKNOWN: u32 = 0x8000_0006;

/// A server with one export of 4 MiB, and its bytes.
fn served(limits: Limits) -> (TestServer, Vec<u8>) {
    let server = TestServer::with_limits(limits);
    let bytes = patterned(4 * MIB);
    server.add_raw("disk", &bytes);
    (server, bytes)
}

/// Another client is served, and the server is no poorer for the last one.
fn still_serves(server: &TestServer, bytes: &[u8]) {
    let mut wire = server.connect();
    wire.go("disk", true);
    assert!(wire.read_structured(0, 1000, 100_000) == bytes[1000..101_000]);
}

#[test]
fn garbage_in_place_of_a_handshake_ends_that_session_only() {
    let (server, bytes) = served(Limits::default());
    let beginnings: [&[u8]; 8] = [
        b"\0\0\0\x04",
        b"\xff\xff\xff\xff",
        b"GET / HTTP/1.1\r\n\r\n",
        b"\0\0\0\x03IHAVEOPX\0\0\0\x03\0\0\0\0",
        b"\0\0\0\x03NBDMAGIC\0\0\0\x03\0\0\0\0",
        b"\0\0\0\x03IHAVEOPT\0\0\0\x03\xff\xff\xff\xff",
        b"\0\0\0\x03IHAVEOPT\0\0\0\x07\0\x01\0\x01",
        b"\0\0\0\x03IHAVEOPT\0\0\0\x01\0\0\0\x02\xff\xfe",
    ];
    for beginning in beginnings {
        let mut wire = server.connect();
        wire.send(beginning);
        assert_eq!(wire.closed(), Vec::<u8>::new(), "{beginning:?}");
        still_serves(&server, &bytes);
    }
}

#[test]
fn a_client_that_vanishes_at_any_byte_leaves_nothing_behind() {
    let (server, bytes) = served(Limits::default());
    let mut all = 3u32.to_be_bytes().to_vec();
    all.extend_from_slice(b"IHAVEOPT\0\0\0\x08\0\0\0\0");
    let go = Wire::go_data("disk", &[3]);
    all.extend_from_slice(b"IHAVEOPT\0\0\0\x07");
    all.extend_from_slice(&u32::try_from(go.len()).unwrap().to_be_bytes());
    all.extend_from_slice(&go);
    all.extend(Wire::request_bytes(0, 0, 1, 0, 1 << 20));
    all.extend(Wire::request_bytes(0, 1, 2, 0, 4096));
    all.extend_from_slice(&[7; 100]);
    for cut in 0..all.len() {
        server.connect().send(&all[..cut]);
    }
    still_serves(&server, &bytes);
    while server.exports.in_use("disk") > 0 || server.stopper.connections() > 0 {
        std::thread::yield_now();
    }
}

#[test]
fn malformed_options_get_an_error_and_the_session_goes_on() {
    let (server, bytes) = served(Limits::default());
    let mut wire = server.connect();
    wire.client_flags();
    let mut too_long = Wire::go_data("disk", &[3]);
    too_long.push(0);
    let mut long_name = u32::MAX.to_be_bytes().to_vec();
    long_name.extend_from_slice(b"disk\0\0");
    let mut many = Wire::meta_data("disk", &[]);
    many[8..12].fill(0xff);
    let cases: [(u32, &[u8], u32); 17] = [
        (6, b"", ERR_INVALID),
        (7, b"\0", ERR_INVALID),
        (7, &too_long, ERR_INVALID),
        (7, &long_name, ERR_INVALID),
        (7, b"\0\0\0\x02\xff\xfe\0\0", ERR_INVALID),
        (7, b"\0\0\0\x02a\0\0\0", ERR_INVALID),
        (7, &Wire::go_data("nothing", &[]), ERR_UNKNOWN),
        (7, &Wire::go_data("", &[]), ERR_UNKNOWN),
        (6, &Wire::go_data("../disk", &[]), ERR_UNKNOWN),
        (3, b"x", ERR_INVALID),
        (5, b"", ERR_UNSUP),
        (5, b"x", ERR_INVALID),
        (8, b"x", ERR_INVALID),
        (10, &Wire::meta_data("disk", &["base:allocation"]), ERR_INVALID),
        (9, &Wire::meta_data("disk", &[]), ERR_INVALID),
        (12, b"", ERR_UNSUP),
        (0xffff_ffff, &[9; 60_000], ERR_UNSUP),
    ];
    for (option, data, want) in cases {
        wire.option(option, data);
        let replies = wire.option_replies(option);
        assert_eq!(replies.len(), 1, "option {option} {data:?}");
        assert_eq!(replies[0].0, want, "option {option}");
        assert!(!replies[0].1.is_empty(), "an error has a text");
    }
    wire.option(8, b"");
    assert_eq!(wire.option_reply(8).0, 1);
    wire.option(10, &many);
    assert_eq!(wire.option_reply(10).0, ERR_INVALID);
    wire.begin("disk");
    assert!(wire.read_structured(0, 0, 4096) == bytes[..4096]);
}

#[test]
fn metadata_contexts_follow_their_queries() {
    let (server, _) = served(Limits::default());
    server.add_raw("other", &[1; 4096]);
    let mut wire = server.connect();
    wire.client_flags();
    wire.option(8, b"");
    wire.option_reply(8);
    for (option, queries, contexts) in [
        (9, &[][..], 2),
        (9, &["base:"][..], 1),
        (9, &["bedplate:"][..], 1),
        (9, &["bedplate:", "base:", "base:allocation"][..], 2),
        (9, &["base:allocation", "qemu:dirty-bitmap:x"][..], 1),
        (9, &["base:nothing", "noscolon"][..], 0),
        (10, &[][..], 0),
        (10, &["base:", "bedplate:"][..], 0),
        (10, &["base:allocation"][..], 1),
    ] {
        wire.option(option, &Wire::meta_data("disk", queries));
        let replies = wire.option_replies(option);
        assert_eq!(replies.len(), contexts + 1, "option {option} {queries:?}");
        assert_eq!(replies[contexts].0, 1);
    }
    // The selection was for another export than the one that is served.
    wire.begin("other");
    wire.request(0, 7, 1, 0, 4096);
    assert_eq!(wire.error(true), EINVAL);
}

#[test]
fn a_silent_and_a_dribbling_client_are_closed_when_their_time_is_over() {
    let limits = Limits { handshake: Duration::from_millis(300), ..Limits::default() };
    let (server, bytes) = served(limits);
    let silent = server.connect();
    let mut dribbling = server.connect();
    dribbling.client_flags();
    // Options that are answered do not buy time.
    let mut sent = 0;
    loop {
        let bytes = b"IHAVEOPT\0\0\0\x63\0\0\0\0";
        if dribbling.0.write_all(&bytes[sent % 16..=sent % 16]).is_err() {
            break;
        }
        sent += 1;
        std::thread::yield_now();
    }
    assert_eq!(silent.closed(), Vec::<u8>::new());
    still_serves(&server, &bytes);
}

#[test]
fn a_client_that_sends_byte_by_byte_is_served() {
    let (server, bytes) = served(Limits::default());
    let mut wire = server.connect();
    let mut all = 3u32.to_be_bytes().to_vec();
    all.extend_from_slice(b"IHAVEOPT\0\0\0\x01\0\0\0\x04disk");
    all.extend(Wire::request_bytes(0, 0, 1, 5, 1000));
    for byte in all {
        wire.send(&[byte]);
    }
    wire.take(10);
    assert_eq!(wire.simple(), (0, 1));
    assert!(wire.take(1000) == bytes[5..1005]);
}

#[test]
fn more_options_than_the_limit_end_the_session() {
    let (server, bytes) = served(Limits { options: 10, ..Limits::default() });
    let mut wire = server.connect();
    wire.client_flags();
    for _ in 0..10 {
        wire.option(99, b"");
        assert_eq!(wire.option_reply(99).0, ERR_UNSUP);
    }
    wire.option(99, b"");
    assert_eq!(wire.closed(), Vec::<u8>::new());
    still_serves(&server, &bytes);
}

#[test]
fn bad_requests_get_their_errors_and_the_session_lives() {
    let (server, bytes) = served(Limits::default());
    let size = bytes.len() as u64;
    for structured in [false, true] {
        let mut wire = server.connect();
        wire.go("disk", structured);
        let cases: [(u16, u16, u64, u32, u32); 19] = [
            (0, 0, size, 1, EINVAL),
            (0, 0, size - 1, 2, EINVAL),
            (0, 0, u64::MAX, 1, EINVAL),
            (0, 0, u64::MAX, u32::MAX, EINVAL),
            (0, 0, u64::MAX - 10, 4096, EINVAL),
            (0, 0, 0, u32::MAX, EINVAL),
            (1, 0, 0, 512, EINVAL),
            (0xffff, 0, 0, 512, EINVAL),
            (8, 0, 0, 512, EINVAL),
            (0, 4, 0, 512, EPERM),
            (0, 6, 0, 512, EPERM),
            (0, 6, u64::MAX, u32::MAX, EPERM),
            (0, 5, u64::MAX, u32::MAX, EINVAL),
            (1, 5, 0, 512, EINVAL),
            (1, 3, 0, 0, EINVAL),
            (0, 7, u64::MAX, u32::MAX, EINVAL),
            (0, 7, 0, 0, EINVAL),
            (0, 8, 0, 512, EINVAL),
            (0, 0xffff, 0, 512, EINVAL),
        ];
        for (flags, command, at, len, want) in cases {
            wire.request(flags, command, 3, at, len);
            assert_eq!(wire.error(structured), want, "{flags} {command} {at} {len}");
        }
        let got = match structured {
            true => wire.read_structured(0, 0, 4096),
            false => wire.read_simple(0, 4096),
        };
        assert!(got == bytes[..4096]);
    }
    assert_eq!(server.exports.get("disk").unwrap().counters().values().errors, 38);
}

#[test]
fn a_read_longer_than_the_maximum_payload_is_refused() {
    let server = TestServer::start();
    server.add_raw("disk", &vec![0; 40 * MIB]);
    for (structured, want) in [(false, EINVAL), (true, EOVERFLOW)] {
        let mut wire = server.connect();
        wire.go("disk", structured);
        wire.request(0, 0, 1, 0, (32 << 20) + 1);
        assert_eq!(wire.error(structured), want);
        // What needs no payload may be as long as the export.
        wire.request(0, 5, 2, 0, 40 << 20);
        match structured {
            true => assert_eq!(wire.chunk().kind, 0),
            false => assert_eq!(wire.simple(), (0, 2)),
        }
    }
}

#[test]
fn reads_of_no_bytes_flushes_and_hints_succeed() {
    let (server, bytes) = served(Limits::default());
    let mut wire = server.connect();
    wire.go("disk", true);
    for (command, at, len) in
        [(0, 0, 0), (0, bytes.len() as u64, 0), (3, 0, 0), (5, 0, 4 << 20), (5, 9, 0)]
    {
        wire.request(0, command, 4, at, len);
        let chunk = wire.chunk();
        assert_eq!((chunk.flags, chunk.kind, chunk.payload.len()), (1, 0, 0), "command {command}");
    }
}

#[test]
fn writes_are_refused_and_their_payload_is_not_taken_for_requests() {
    let (server, bytes) = served(Limits::default());
    for structured in [false, true] {
        let mut wire = server.connect();
        wire.go("disk", structured);
        // A payload of requests, longer than any buffer of the server.
        let payload: Vec<u8> = Wire::request_bytes(0, 2, 0, 0, 0).repeat(100_000);
        wire.request(0, 1, 8, 0, u32::try_from(payload.len()).unwrap());
        wire.send(&payload);
        assert_eq!(wire.error(structured), EPERM);
        wire.request(0, 1, 8, u64::MAX, 0);
        assert_eq!(wire.error(structured), EPERM);
        wire.request(0, 3, 8, 0, 0);
        match structured {
            true => assert_eq!(wire.chunk().kind, 0),
            false => assert_eq!(wire.simple(), (0, 8)),
        }
        wire.request(0, 1, 8, 0, u32::MAX);
        assert_eq!(wire.closed(), Vec::<u8>::new(), "a payload over the limit is not drained");
    }
    still_serves(&server, &bytes);
}

#[test]
fn what_was_asked_before_garbage_or_goodbye_is_answered_first() {
    let (server, bytes) = served(Limits::default());
    let goodbye = Wire::request_bytes(0, 2, 0, 0, 0);
    for last in [&goodbye[..], b"garbage in place of a request", b"garb"] {
        let mut wire = server.connect();
        wire.go("disk", false);
        let mut all = Wire::request_bytes(0, 0, 1, 0, 70_000);
        all.extend(Wire::request_bytes(0, 0, 2, 100, 100));
        all.extend_from_slice(last);
        wire.send(&all);
        assert_eq!(wire.simple(), (0, 1));
        assert!(wire.take(70_000) == bytes[..70_000]);
        assert_eq!(wire.simple(), (0, 2));
        assert!(wire.take(100) == bytes[100..200]);
        assert_eq!(wire.closed(), Vec::<u8>::new());
    }
}

#[test]
fn clients_that_stop_reading_hold_up_nobody_and_not_the_end() {
    let (mut server, bytes) = served(Limits { farewell: Duration::ZERO, ..Limits::default() });
    let mut stuck: Vec<Wire> = (0..8).map(|_| server.connect()).collect();
    for (index, wire) in stuck.iter_mut().enumerate() {
        wire.go("disk", index % 2 == 0);
        for cookie in 0..64 {
            wire.request(0, 0, cookie, 0, 1 << 20);
        }
    }
    still_serves(&server, &bytes);
    stuck.truncate(4);
    still_serves(&server, &bytes);
    server.stop().unwrap();
}

#[test]
fn one_connection_more_than_the_limit_is_closed_at_once() {
    let (server, bytes) = served(Limits { connections: 3, ..Limits::default() });
    let mut three: Vec<Wire> = (0..3).map(|_| server.connect()).collect();
    let fourth = Wire(UnixStream::connect(server.socket()).unwrap());
    assert_eq!(fourth.closed(), Vec::<u8>::new());
    three[1].go("disk", false);
    three[1].request(0, 2, 0, 0, 0);
    three.remove(1).closed();
    while server.stopper.connections() > 2 {
        std::thread::yield_now();
    }
    still_serves(&server, &bytes);
}

#[test]
fn a_page_that_cannot_be_read_is_an_error_and_the_others_are_served() {
    let (server, bytes) = served(Limits::default());
    let path = server.dir.path().join("disk.raw");
    // The last MiB of the file goes away under the map.
    OpenOptions::new().write(true).open(&path).unwrap().set_len(3 << 20).unwrap();
    for structured in [false, true] {
        let mut wire = server.connect();
        wire.go("disk", structured);
        let (good, gone) = (0, (3 << 20) + 64 * 1024);
        let mut all = Vec::new();
        for (cookie, at) in [(1, good), (2, gone), (3, good + 4096), (4, gone), (5, good)] {
            all.extend(Wire::request_bytes(0, 0, cookie, at, 8192));
        }
        wire.send(&all);
        for (cookie, at) in [(1, Some(0)), (2, None), (3, Some(4096)), (4, None), (5, Some(0))] {
            let error = match (structured, at) {
                (true, Some(at)) => {
                    let chunk = wire.chunk();
                    assert!(chunk.payload[8..] == bytes[at..at + 8192]);
                    assert_eq!((chunk.kind, chunk.cookie), (1, cookie));
                    continue;
                }
                (true, None) => wire.chunk().error().0,
                (false, _) => wire.simple().0,
            };
            assert_eq!(error, if at.is_some() { 0 } else { EIO }, "cookie {cookie}");
            if let (false, Some(at)) = (structured, at) {
                assert!(wire.take(8192) == bytes[at..at + 8192]);
            }
        }
    }
    still_serves(&server, &bytes);
    assert_eq!(server.exports.get("disk").unwrap().counters().values().errors, 4);
}

#[test]
fn a_reply_of_many_batches_ends_in_an_error_when_its_last_part_is_unreadable() {
    let server = TestServer::start();
    let mut bytes = vec![0x11; 24 * MIB];
    bytes[20 * MIB..].fill(0x22);
    let path = server.add_raw("disk", &bytes);
    OpenOptions::new().write(true).open(&path).unwrap().set_len(20 << 20).unwrap();
    let mut wire = server.connect();
    wire.go("disk", true);
    wire.request(0, 0, 1, 0, 24 << 20);
    let chunks = wire.chunks();
    assert_eq!(chunks.last().unwrap().error().0, EIO);
    assert!(
        chunks[..chunks.len() - 1]
            .iter()
            .all(|chunk| chunk.payload[8..].iter().all(|b| *b == 0x11))
    );
    assert_eq!(wire.read_structured(0, 0, 10), [0x11; 10], "the session lives");
    let mut wire = server.connect();
    wire.go("disk", false);
    wire.request(0, 0, 1, 0, 24 << 20);
    assert_eq!(wire.simple(), (0, 1));
    let got = wire.closed();
    assert!(got.len() < 24 * MIB && got.iter().all(|byte| *byte == 0x11), "a simple reply is cut");
}

#[test]
fn seeded_noise_never_stops_the_server() {
    let (server, bytes) = served(Limits::default());
    let mut state = 0x1234_5678_9abc_def1_u64;
    let mut next = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    for round in 0..200u64 {
        let mut wire = server.connect();
        wire.go("disk", round % 2 == 0);
        for _ in 0..next() % 8 {
            let mut request = Wire::request_bytes(
                u16::try_from(next() % 16).unwrap(),
                u16::try_from(next() % 10).unwrap(),
                next(),
                next() % (5 << 20),
                u32::try_from(next() % (1 << 20)).unwrap(),
            );
            if next().is_multiple_of(4) {
                let at = usize::try_from(next() % 28).unwrap();
                request[at] ^= 0x5a;
            }
            // The server may have closed by now, which is its right.
            let _closed = wire.0.write_all(&request);
        }
    }
    still_serves(&server, &bytes);
}
