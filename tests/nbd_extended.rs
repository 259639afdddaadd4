//! Extended headers and metadata contexts, as the wire has them.
#![expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod nbd_support;

use std::fs::File;
use std::os::unix::fs::FileExt;

use nbd_support::{EINVAL, EOVERFLOW, EPERM, ERR_INVALID, KIB, MIB, TestServer, Wire, patterned};

const ERR_EXT_HEADER_REQD: u32 = 0x8000_000a;
const PAYLOAD: u16 = 1 << 5;
const REQ_ONE: u16 = 1 << 3;
const GIB: u64 = 1 << 30;
const BOTH: [&str; 2] = ["base:allocation", "bedplate:presence"];

/// A server with `disk`, 6 GiB of which only 64 KiB at 5 GiB are data.
fn large() -> TestServer {
    let server = TestServer::start();
    let path = server.dir.path().join("large.raw");
    let file = File::create(&path).unwrap();
    file.set_len(6 * GIB).unwrap();
    file.write_all_at(&[0x77; 64 * KIB], 5 * GIB).unwrap();
    server.add_file("disk", &path);
    server
}

fn filter(len: u64, contexts: &[u32]) -> Vec<u8> {
    let mut payload = len.to_be_bytes().to_vec();
    contexts.iter().for_each(|id| payload.extend_from_slice(&id.to_be_bytes()));
    payload
}

#[test]
fn every_byte_is_the_file_s_with_extended_headers() {
    let server = TestServer::start();
    let bytes = patterned(7 * MIB + 12_345);
    server.add_raw("disk", &bytes);
    let mut wire = server.connect();
    let (size, flags) = wire.go_extended("disk", &[]);
    assert_eq!((size, flags), (bytes.len() as u64, 0b101_1000_0111), "DF, and no filter");
    for (at, len) in [(0, bytes.len()), (0, 1), (64 * KIB - 1, 2), (MIB - 1, 2 * MIB + 2)] {
        let (want, len) = (&bytes[at..at + len], u32::try_from(len).unwrap());
        assert!(wire.read_extended(0, at as u64, len) == want, "{at} {len}");
        assert!(wire.read_extended(4, at as u64, len) == want, "DF {at} {len}");
    }
    let one = wire.extended(4, 0, 0, MIB as u64);
    assert_eq!((one.len(), one[0].kind, one[0].payload.len()), (1, 1, MIB + 8));
    let hole = wire.extended(0, 0, MIB as u64, MIB as u64);
    assert_eq!((hole.len(), hole[0].kind, hole[0].payload.len()), (1, 2, 12));
    // Many requests in one send: each has its reply, with its offset, in order.
    let mut requests = Vec::new();
    for at in 0..100 {
        requests.extend(Wire::extended_bytes(0, 0, at, at * 4096, 4096));
    }
    wire.send(&requests);
    for at in 0..100 {
        assert_eq!(wire.extended_chunks(at * 4096).last().unwrap().cookie, at);
    }
}

#[test]
fn one_status_request_covers_more_than_32_bits_of_length() {
    let server = large();
    let mut wire = server.connect();
    let (size, flags) = wire.go_extended("disk", &BOTH);
    assert_eq!((size, flags & 1 << 12), (6 * GIB, 1 << 12), "with contexts there is a filter");
    let chunks = wire.extended(0, 7, 0, 6 * GIB);
    assert_eq!(chunks.iter().map(|chunk| chunk.flags).collect::<Vec<_>>(), [0, 1]);
    let data = 64 << 10;
    let allocation = vec![(5 * GIB, 3), (data, 0), (GIB - data, 3)];
    assert_eq!(chunks[0].extended_extents(), (1, allocation));
    assert_eq!(chunks[1].extended_extents(), (2, vec![(6 * GIB, 1)]));
    let one = wire.extended(REQ_ONE, 7, GIB, 5 * GIB);
    assert_eq!(one[0].extended_extents(), (1, vec![(4 * GIB, 3)]));
    assert_eq!(one[1].extended_extents(), (2, vec![(5 * GIB, 1)]));
    // A hint may be as long, and a read may not.
    assert_eq!(wire.extended(0, 5, 0, 6 * GIB)[0].kind, 0);
    assert_eq!(wire.extended(0, 0, 0, 6 * GIB)[0].error().0, EOVERFLOW);
    assert_eq!(wire.read_extended(0, 5 * GIB, 4096), [0x77; 4096]);
}

#[test]
fn a_status_payload_chooses_among_the_contexts() {
    let server = large();
    let mut wire = server.connect();
    wire.go_extended("disk", &BOTH);
    for (ids, want) in [(&[1][..], &[1][..]), (&[2], &[2]), (&[2, 1], &[1, 2])] {
        let payload = filter(6 * GIB, ids);
        wire.send(&Wire::extended_bytes(PAYLOAD, 7, 5, 0, payload.len() as u64));
        wire.send(&payload);
        let chunks = wire.extended_chunks(0);
        let got: Vec<u32> = chunks.iter().map(|chunk| chunk.extended_extents().0).collect();
        assert_eq!(got, want);
    }
    let refused = [
        filter(4096, &[]),
        filter(4096, &[1, 1]),
        filter(4096, &[3]),
        filter(4096, &[1, 2, 1]),
        filter(4096, &[1, 2, 1, 2]),
        filter(7 * GIB, &[1]),
        filter(u64::MAX, &[1]),
        filter(0, &[1]),
        vec![0; 7],
        vec![0; 15],
        vec![0; 100_000],
        vec![],
    ];
    for payload in refused {
        wire.send(&Wire::extended_bytes(PAYLOAD, 7, 5, 0, payload.len() as u64));
        wire.send(&payload);
        let error = wire.extended_chunks(0)[0].error();
        assert_eq!(error.0, EINVAL, "{payload:?}");
    }
    let payload = filter(2 * GIB, &[1]);
    wire.send(&Wire::extended_bytes(PAYLOAD | REQ_ONE, 7, 5, GIB, payload.len() as u64));
    // Byte by byte: a payload is waited for.
    payload.iter().for_each(|byte| wire.send(&[*byte]));
    assert_eq!(wire.extended_chunks(GIB)[0].extended_extents(), (1, vec![(2 * GIB, 3)]));
    wire.send(&Wire::extended_bytes(PAYLOAD | 1, 7, 5, GIB, payload.len() as u64));
    wire.send(&payload);
    assert_eq!(wire.extended_chunks(GIB)[0].error().0, EINVAL, "no such flag");
    // A context that was not selected is not reported.
    let mut wire = server.connect();
    wire.go_extended("disk", &BOTH[..1]);
    wire.send(&Wire::extended_bytes(PAYLOAD, 7, 5, 0, 12));
    wire.send(&filter(4096, &[2]));
    assert_eq!(wire.extended_chunks(0)[0].error().0, EINVAL);
}

#[test]
fn payloads_are_drained_by_their_flag_and_refused_by_their_command() {
    let server = TestServer::start();
    let bytes = patterned(4 * MIB);
    server.add_raw("disk", &bytes);
    let mut wire = server.connect();
    wire.go_extended("disk", &["base:allocation"]);
    // A payload of requests, which must not be taken for such.
    let payload: Vec<u8> = Wire::extended_bytes(0, 2, 0, 0, 0).repeat(100_000);
    for (flags, command, want) in [
        (PAYLOAD, 1, EPERM),
        (PAYLOAD | 1, 1, EPERM),
        (PAYLOAD, 0, EINVAL),
        (PAYLOAD, 3, EINVAL),
        (PAYLOAD, 4, EINVAL),
        (PAYLOAD, 5, EINVAL),
        (PAYLOAD, 6, EINVAL),
        (PAYLOAD, 7, EINVAL),
        (PAYLOAD, 99, EINVAL),
    ] {
        wire.send(&Wire::extended_bytes(flags, command, 3, 512, payload.len() as u64));
        wire.send(&payload);
        assert_eq!(wire.extended_chunks(512)[0].error().0, want, "{flags} {command}");
    }
    for (flags, command, at, len, want) in [
        (0, 1, 0, 512, EINVAL),
        (0, 4, 0, 512, EPERM),
        (0, 6, 0, u64::MAX, EPERM),
        (0, 0, u64::MAX, u64::MAX, EINVAL),
        (0, 0, 1, u64::MAX, EINVAL),
        (0, 7, 0, u64::MAX, EINVAL),
        (0, 5, 0, (4 << 20) + 1, EINVAL),
        (0, 7, 0, 0, EINVAL),
        (0x80, 0, 0, 1, EINVAL),
        (0, 0, 0, 4 << 30, EINVAL),
    ] {
        assert_eq!(wire.extended(flags, command, at, len)[0].error().0, want, "{command} {len}");
    }
    assert!(wire.read_extended(0, 0, 4096) == bytes[..4096]);
    wire.send(&Wire::extended_bytes(PAYLOAD, 1, 3, 0, (32 << 20) + 1));
    assert_eq!(wire.closed(), Vec::<u8>::new(), "a payload over the maximum is not drained");
    let mut wire = server.connect();
    wire.go_extended("disk", &[]);
    wire.request(0, 0, 1, 0, 512);
    assert_eq!(wire.closed(), Vec::<u8>::new(), "a compact request has no place here");
    let mut wire = server.connect();
    wire.go("disk", true);
    wire.send(&Wire::extended_bytes(0, 0, 1, 0, 512));
    assert_eq!(wire.closed(), Vec::<u8>::new(), "nor an extended one without the agreement");
}

#[test]
fn extended_headers_take_the_place_of_structured_replies() {
    let server = large();
    let mut wire = server.connect();
    wire.client_flags();
    wire.option(11, b"x");
    assert_eq!(wire.option_reply(11).0, ERR_INVALID);
    wire.option(8, b"");
    assert_eq!(wire.option_reply(8).0, 1);
    for _ in 0..2 {
        wire.option(11, b"");
        assert_eq!(wire.option_reply(11), (1, vec![]));
    }
    wire.option(8, b"");
    assert_eq!(wire.option_reply(8).0, ERR_EXT_HEADER_REQD);
    wire.option(6, &Wire::go_data("disk", &[3]));
    assert_eq!(wire.option_replies(6).len(), 3);
    wire.begin("disk");
    assert_eq!(wire.read_extended(0, 5 * GIB, 10), [0x77; 10]);
    assert_eq!(wire.extended(0, 7, 0, 4096)[0].error().0, EINVAL, "no context was selected");
    let mut wire = server.connect();
    wire.client_flags();
    wire.option(11, b"");
    wire.option_reply(11);
    wire.option(1, b"disk");
    assert_eq!(wire.closed(), Vec::<u8>::new(), "EXPORT_NAME is not allowed any more");
}

#[test]
fn each_context_has_its_chunk_in_one_reply() {
    let server = TestServer::start();
    let bytes = patterned(4 * MIB);
    server.add_raw("disk", &bytes);
    for (queries, ids) in [
        (&["base:allocation"][..], &[1][..]),
        (&["bedplate:presence"], &[2]),
        (&["bedplate:presence", "base:allocation", "bedplate:presence"], &[1, 2]),
    ] {
        let mut wire = server.connect();
        wire.client_flags();
        wire.option(8, b"");
        wire.option_reply(8);
        wire.option(10, &Wire::meta_data("disk", queries));
        let replies = wire.option_replies(10);
        let told: Vec<u32> = replies[..replies.len() - 1]
            .iter()
            .map(|reply| u32::from_be_bytes(reply.1[..4].try_into().unwrap()))
            .collect();
        assert_eq!(told, ids);
        wire.begin("disk");
        wire.request(0, 7, 1, 0, 4 << 20);
        let chunks = wire.chunks();
        assert_eq!(chunks.len(), ids.len());
        for (chunk, id) in chunks.iter().zip(ids) {
            let extents = chunk.extents_of(*id);
            assert_eq!(extents.iter().map(|e| e.0).sum::<u32>(), 4 << 20);
            assert_eq!(extents.len() == 1, *id == 2, "all of a sealed copy is present");
        }
        wire.request(REQ_ONE, 7, 1, 0, 4 << 20);
        assert!(wire.chunks().iter().zip(ids).all(|(c, id)| c.extents_of(*id).len() == 1));
    }
}

#[test]
fn nbdinfo_maps_both_contexts() {
    if !nbd_support::have(&["nbdinfo"]) {
        return;
    }
    let server = large();
    let uri = server.uri("disk");
    let map = nbd_support::run("nbdinfo", &["--map=bedplate:presence", &uri]);
    let words: Vec<Vec<&str>> = map.lines().map(|l| l.split_whitespace().collect()).collect();
    assert!(words.iter().all(|line| line[2] == "1"), "{map}");
    let json = nbd_support::run("nbdinfo", &["--json", &uri]);
    assert!(BOTH.iter().all(|context| json.contains(context)), "{json}");
}
