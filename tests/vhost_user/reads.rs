//! Every byte of an image, as each kind of image and each kind of request has it.

use std::path::Path;

use bedplate::disk::Sealed;
use bedplate::image::{Opening, View};

use crate::client::{
    ALL, Desc, INDIRECT, KIB, MIB, PROTOCOL, QUEUE_SIZE, TestServer, VERSION_1, Vm, WRITE,
};
use crate::nbd_support::{have, patterned, run};

/// Reads all of the disk in requests of different sizes, and compares.
fn compare(vm: &mut Vm, expected: &[u8]) {
    let sizes = [4 * KIB, 512, 64 * KIB, MIB, 12 * KIB, 256 * KIB, 3 * MIB];
    let (mut at, mut turn) = (0, 0);
    while at < expected.len() {
        let left = (expected.len() - at).next_multiple_of(512);
        let len = usize::try_from(sizes[turn % sizes.len()]).unwrap().min(left);
        let queue = turn % vm.queues.len();
        let data = vm.read(queue, at as u64 / 512, u32::try_from(len).unwrap());
        let mut wanted = expected[at..expected.len().min(at + len)].to_vec();
        wanted.resize(len, 0);
        assert!(data == wanted, "bytes {at} to {}", at + len);
        (at, turn) = (at + len, turn + 1);
    }
}

fn compare_file(path: &Path, expected: &[u8]) {
    let server = TestServer::of(path);
    // Twice: what was read with pread comes from the map the second time.
    let mut vm = Vm::start(&server.socket(), ALL, 2);
    compare(&mut vm, expected);
    compare(&mut vm, expected);
}

#[test]
fn every_byte_of_each_kind_of_image_is_qemus() {
    if !have(&["qemu-img"]) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let expected = patterned(9 * 1024 * 1024 + 512);
    let raw = dir.path().join("d.raw");
    crate::nbd_support::write_sparse(&raw, &expected);
    compare_file(&raw, &expected);
    let raw = raw.to_str().unwrap();
    for (name, options) in [
        ("plain", &["-o", "cluster_size=64k"][..]),
        ("small", &["-o", "cluster_size=4k"][..]),
        ("zlib", &["-c"][..]),
        ("zstd", &["-c", "-o", "compression_type=zstd"][..]),
    ] {
        let image = dir.path().join(format!("{name}.qcow2"));
        let to = image.to_str().unwrap();
        let args = [&["convert", "-f", "raw", "-O", "qcow2"], options, &[raw, to]].concat();
        run("qemu-img", &args);
        compare_file(&image, &expected);
    }
}

#[test]
fn every_byte_of_an_overlay_on_its_base_is_qemus() {
    if !have(&["qemu-img", "qemu-io"]) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let (base, top, flat) = (path("base.qcow2"), path("top.qcow2"), path("flat.raw"));
    let raw = path("d.raw");
    crate::nbd_support::write_sparse(Path::new(&raw), &patterned(8 * 1024 * 1024));
    run("qemu-img", &["convert", "-c", "-f", "raw", "-O", "qcow2", &raw, &base]);
    run("qemu-img", &["create", "-q", "-f", "qcow2", "-b", &base, "-F", "qcow2", &top, "10M"]);
    let writes = ["write -P 7 100k 300k", "write -z 2M 64k", "write -P 9 9M 4k"];
    let commands: Vec<&str> = writes.iter().flat_map(|write| ["-c", write]).collect();
    run("qemu-io", &[&["-f", "qcow2"], &commands[..], &[&top]].concat());
    run("qemu-img", &["convert", "-O", "raw", &top, &flat]);
    let open = |path: &str, base: Option<&View>| {
        let opening = Opening { base, ..Opening::default() };
        View::open_as(Sealed::open_path(Path::new(path)).unwrap(), opening).unwrap()
    };
    let base = open(&base, None);
    let server = TestServer::of_view(open(&top, Some(&base)));
    let mut vm = Vm::start(&server.socket(), ALL, 1);
    compare(&mut vm, &std::fs::read(flat).unwrap());
}

#[test]
fn a_driver_of_fewer_features_reads_the_same_bytes() {
    let expected = patterned(3 * 1024 * 1024);
    let (server, _dir) = TestServer::of_bytes(&expected);
    for features in [VERSION_1, VERSION_1 | PROTOCOL] {
        let mut vm = Vm::start(&server.socket(), features, 1);
        compare(&mut vm, &expected);
        drop(vm);
        server.until_free();
    }
}

#[test]
fn the_end_of_a_disk_of_no_whole_sectors_is_there_and_zeroes_follow() {
    let expected = [vec![7; 5000], vec![9; 123]].concat();
    let (server, _dir) = TestServer::of_bytes(&expected);
    let mut vm = Vm::start(&server.socket(), ALL, 1);
    assert_eq!(vm.config()[..8], 11_u64.to_le_bytes());
    compare(&mut vm, &expected);
}

#[test]
fn what_the_disk_says_of_itself() {
    let (server, _dir) = TestServer::of_bytes(&patterned(1024 * 1024));
    let mut vm = Vm::start(&server.socket(), ALL, 1);
    let config = vm.config();
    let word = |at: usize| u32::from_le_bytes(config[at..at + 4].try_into().unwrap());
    assert_eq!(config[..8], 2048_u64.to_le_bytes(), "sectors");
    assert_eq!((word(12), word(20)), (126, 512), "segments and block size");
    assert_eq!(config[34..36], 16_u16.to_le_bytes(), "queues");
    let (status, serial) = vm.request(0, 8, 0, 20);
    assert_eq!((status, &serial[..]), (0, &b"disk-0011aabb\0\0\0\0\0\0\0"[..]));
    assert_eq!(vm.request(0, 8, 0, 4), (0, b"disk".to_vec()), "in less room");
}

#[test]
fn nothing_can_be_written_and_a_flush_is_done_at_once() {
    let expected = patterned(1024 * 1024);
    let (server, dir) = TestServer::of_bytes(&expected);
    let mut vm = Vm::start(&server.socket(), ALL, 1);
    let (head, status) = (MIB, MIB + 64);
    let data = (MIB + 4096, 4096, 0);
    for (kind, said) in [(1, 1), (11, 2), (13, 2), (14, 2), (99, 2), (4, 0)] {
        vm.head(head, kind, 0);
        vm.poke(data.0, &[0x55; 4096]);
        let parts = [(head, 16, 0), data, (status, 1, WRITE)];
        assert_eq!(vm.ask(0, &parts, status), (said, 1), "type {kind}");
    }
    let bare = [(head, 16, 0), (status, 1, WRITE)];
    assert_eq!(vm.ask(0, &bare, status), (0, 1), "a flush without data");
    assert_eq!(std::fs::read(dir.path().join("d.raw")).unwrap(), expected);
    compare(&mut vm, &expected);
}

#[test]
fn a_read_into_many_small_buffers_and_an_indirect_table_has_the_same_bytes() {
    let expected = patterned(1024 * 1024);
    let (server, _dir) = TestServer::of_bytes(&expected);
    let mut vm = Vm::start(&server.socket(), ALL, 1);
    let (head, status, table) = (MIB, MIB + 64, MIB + 8 * KIB);
    vm.head(head, 0, 3);
    // Head and data in odd parts: 16 = 5 + 11, and 64 KiB in buffers of 1031 bytes with gaps.
    let mut parts = vec![(head, 5, 0), (head + 5, 11, 0)];
    let mut left = 64 * 1024_u32;
    let mut at = 2 * MIB + 1;
    while left > 0 {
        let len = left.min(1031);
        parts.push((at, len, WRITE));
        (left, at) = (left - len, at + 2000);
    }
    // The status ends the last buffer.
    let last = parts.last_mut().unwrap();
    last.1 += 1;
    let status_at = last.0 + u64::from(last.1) - 1;
    assert_ne!(status_at, status);
    let count = u32::try_from(parts.len()).unwrap();
    for (index, &(at, len, flags)) in (0_u16..).zip(&parts) {
        let flags = if u32::from(index) + 1 < count { flags | 1 } else { flags };
        let bytes = Desc { at, len, flags, next: index + 1 }.bytes();
        vm.poke(table + 16 * u64::from(index), &bytes);
    }
    let (said, written) = vm.ask(0, &[(table, 16 * count, INDIRECT)], status_at);
    assert_eq!((said, written), (0, 64 * 1024 + 1));
    let mut got = Vec::new();
    for &(at, len, flags) in &parts {
        if flags & WRITE != 0 {
            got.extend(vm.peek(at, len as usize));
            assert_eq!(vm.peek(at + u64::from(len), 1), [0], "nothing beside a buffer");
        }
    }
    assert!(got[..64 * 1024] == expected[3 * 512..3 * 512 + 64 * 1024]);
}

#[test]
fn requests_in_flight_together_are_answered_in_their_order() {
    let expected = patterned(4 * 1024 * 1024);
    let (server, _dir) = TestServer::of_bytes(&expected);
    let mut vm = Vm::start(&server.socket(), ALL, 1);
    let place = |n: u64| MIB + n * 64 * KIB;
    let count = QUEUE_SIZE / 3;
    for round in 0..20_u64 {
        for n in 0..count {
            let at = place(n.into());
            let sector = (u64::from(n) * 37 + round * 11) % 8000;
            vm.head(at, 0, sector);
            vm.poke(at + 64, &[0xee]);
            let parts = [(at, 16, 0), (at + 4096, 4096, WRITE), (at + 64, 1, WRITE)];
            vm.chain(0, n * 3, &parts);
            vm.make(0, n * 3);
        }
        vm.kick(0);
        for n in 0..count {
            assert_eq!(vm.answer(0), (u32::from(n * 3), 4097));
            let at = place(n.into());
            let sector = usize::try_from((u64::from(n) * 37 + round * 11) % 8000).unwrap();
            assert_eq!(vm.peek(at + 64, 1), [0]);
            assert!(vm.peek(at + 4096, 4096) == expected[sector * 512..sector * 512 + 4096]);
        }
    }
}

#[test]
fn the_guest_is_told_of_an_answer_when_it_wants_to_be() {
    let (server, _dir) = TestServer::of_bytes(&patterned(1024 * 1024));
    for features in [ALL, VERSION_1 | PROTOCOL] {
        let mut vm = Vm::start(&server.socket(), features, 1);
        for sector in 0..50 {
            let _none_left = vm.queues[0].call.read();
            vm.read(0, sector, 512);
            // It was waited for without the call; that comes too.
            crate::client::until("a call", || vm.queues[0].call.read().is_ok());
        }
        drop(vm);
        server.until_free();
    }
}

#[test]
fn what_was_read_is_counted() {
    let (server, _dir) = TestServer::of_bytes(&patterned(1024 * 1024));
    let mut vm = Vm::start(&server.socket(), ALL, 1);
    vm.read(0, 0, 8192);
    vm.request(0, 1, 0, 512);
    crate::client::until("the counters", || {
        let values = server.exports.get("disk").unwrap().counters().values();
        (values.requests, values.bytes, values.errors) == (2, 8192, 1)
    });
    assert_eq!(server.exports.in_use("disk"), 1);
    drop(vm);
    server.until_free();
    assert_eq!(server.exports.in_use("disk"), 0);
}
