//! The bytes that any NBD client reads are the bytes of the image.
#![expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod nbd_support;

use std::path::Path;

use nbd_support::{KIB, MIB, TestServer, Wire, have, output, patterned, run, text};

fn path(path: &Path) -> &str {
    path.to_str().unwrap()
}

#[test]
fn every_byte_is_the_file_s_with_each_kind_of_reply() {
    let server = TestServer::start();
    let bytes = patterned(7 * MIB + 12_345);
    server.add_raw("disk", &bytes);
    let ranges = [
        (0, bytes.len()),
        (0, 1),
        (bytes.len() - 1, 1),
        (64 * KIB - 1, 2),
        (3 * 64 * KIB - 5, 64 * KIB + 10),
        (MIB - 1, 2 * MIB + 2),
        (12_345, 4096),
        (bytes.len() - 5000, 5000),
    ];
    let (mut simple, mut structured) = (server.connect(), server.connect());
    let (size, flags) = simple.go("disk", false);
    assert_eq!(size, bytes.len() as u64);
    assert_eq!(flags, 0b101_0000_0111, "read-only, flush, multi-conn, cache; no DF");
    assert_eq!(structured.go("disk", true).1, 0b101_1000_0111, "DF as well");
    for (at, len) in ranges {
        let want = &bytes[at..at + len];
        let (at, len) = (at as u64, u32::try_from(len).unwrap());
        assert!(simple.read_simple(at, len) == want, "simple {at} {len}");
        assert!(structured.read_structured(0, at, len) == want, "structured {at} {len}");
        assert!(structured.read_structured(4, at, len) == want, "DF {at} {len}");
    }
}

#[test]
fn a_reply_larger_than_a_batch_is_whole() {
    let server = TestServer::start();
    let bytes = patterned(32 * MIB);
    server.add_raw("disk", &bytes);
    for structured in [false, true] {
        let mut wire = server.connect();
        wire.go("disk", structured);
        let got = match structured {
            false => wire.read_simple(0, 32 << 20),
            true => wire.read_structured(0, 0, 32 << 20),
        };
        assert!(got == bytes);
        if structured {
            assert!(wire.read_structured(4, 0, 32 << 20) == bytes, "DF");
        }
    }
}

#[test]
fn a_dont_fragment_read_has_one_content_chunk() {
    let server = TestServer::start();
    server.add_raw("disk", &patterned(4 * MIB));
    let mut wire = server.connect();
    wire.go("disk", true);
    wire.request(4, 0, 1, 0, 1 << 20);
    let chunks = wire.chunks();
    assert_eq!((chunks.len(), chunks[0].kind, chunks[0].payload.len()), (1, 1, MIB + 8));
    wire.request(4, 0, 2, MIB as u64, 1 << 20);
    let chunks = wire.chunks();
    assert_eq!((chunks.len(), chunks[0].kind), (1, 2), "a range of zeroes is one hole");
}

#[test]
fn zeroes_are_holes_and_are_never_sent_as_bytes() {
    let server = TestServer::start();
    let bytes = patterned(4 * MIB);
    server.add_raw("disk", &bytes);
    let mut wire = server.connect();
    wire.go("disk", true);
    wire.request(0, 0, 1, 0, 4 << 20);
    let sent: usize = wire.chunks().iter().map(|chunk| chunk.payload.len()).sum();
    assert!(sent < 2 * MIB, "{sent} bytes were sent for 1.5 MiB of data");
}

#[test]
fn block_status_covers_the_export_and_agrees_with_the_bytes() {
    let server = TestServer::start();
    let bytes = patterned(7 * MIB + 12_345);
    server.add_raw("disk", &bytes);
    let mut wire = server.connect();
    wire.go("disk", true);
    let (mut at, mut holes, mut last) = (0, 0, None);
    while at < bytes.len() {
        let left = u32::try_from(bytes.len() - at).unwrap();
        wire.request(0, 7, 5, at as u64, left);
        for (len, flags) in wire.chunks()[0].extents() {
            let range = &bytes[at..at + len as usize];
            match flags {
                0 => {}
                3 => assert!(range.iter().all(|byte| *byte == 0), "data called a hole at {at}"),
                _ => panic!("state flags {flags}"),
            }
            assert_ne!(last.replace(flags), Some(flags), "neighbours of one kind are merged");
            holes += usize::from(flags == 3);
            at += len as usize;
        }
    }
    assert!(holes > 10, "the image has many holes");
    wire.request(8, 7, 6, 0, 1 << 20);
    let one = wire.chunks()[0].extents();
    assert_eq!(one, [(3 * 64 * 1024, 0)], "REQ_ONE gives one extent");
    wire.request(8, 7, 6, 0, 4096);
    assert_eq!(wire.chunks()[0].extents(), [(4096, 0)], "inside the range");
}

#[test]
fn export_name_gives_size_and_flags_with_and_without_zeroes() {
    let server = TestServer::start();
    let bytes = patterned(MIB);
    server.add_raw("disk", &bytes);
    for (client_flags, zeroes) in [(1u32, 124), (3, 0)] {
        let mut wire = server.connect();
        wire.send(&client_flags.to_be_bytes());
        wire.option(1, b"disk");
        assert_eq!(wire.take_u64(), MIB as u64);
        assert_eq!(wire.take_u16() & 3, 3);
        assert_eq!(wire.take(zeroes), vec![0; zeroes]);
        assert_eq!(wire.read_simple(0, 4096), bytes[..4096]);
    }
}

#[test]
fn several_exports_are_listed_and_each_serves_its_own_bytes() {
    let server = TestServer::start();
    for (name, fill) in [("one", 1), ("two", 2), ("three", 3)] {
        server.add_raw(name, &vec![fill; 64 * KIB]);
    }
    server.exports.set_default(Some("two")).unwrap();
    let mut wire = server.connect();
    wire.client_flags();
    wire.option(3, b"");
    let names: Vec<String> = wire.option_replies(3).iter().map(|reply| text(&reply.1)).collect();
    assert_eq!(
        names,
        [
            "\0\0\0\x03onea test image",
            "\0\0\0\x05threea test image",
            "\0\0\0\x03twoa test image",
            ""
        ]
    );
    for (name, fill) in [("one", 1), ("", 2), ("three", 3)] {
        let mut wire = server.connect();
        wire.go(name, false);
        assert_eq!(wire.read_simple(100, 10), [fill; 10]);
    }
}

#[test]
fn info_tells_what_was_asked_and_does_not_begin_transmission() {
    let server = TestServer::start();
    server.add_raw("disk", &vec![1; 64 * KIB]);
    server.exports.set_default(Some("disk")).unwrap();
    let mut wire = server.connect();
    wire.client_flags();
    wire.option(6, &Wire::go_data("", &[1, 2, 3, 99]));
    let replies = wire.option_replies(6);
    let find = |kind: u8| replies.iter().find(|r| r.0 == 3 && r.1[1] == kind).map(|r| &r.1[2..]);
    assert_eq!(find(1).unwrap(), b"disk");
    assert_eq!(find(2).unwrap(), b"a test image");
    assert_eq!(find(3).unwrap(), [0, 0, 0, 1, 0, 0, 16, 0, 2, 0, 0, 0]);
    assert_eq!(server.exports.in_use("disk"), 0);
    assert_eq!(wire.begin("disk").0, 64 * KIB as u64);
    assert_eq!(server.exports.in_use("disk"), 1);
}

#[test]
fn an_export_in_use_is_not_removed_and_a_closed_one_ends_its_sessions() {
    let server = TestServer::start();
    server.add_raw("disk", &vec![1; 64 * KIB]);
    let mut wire = server.connect();
    wire.go("disk", false);
    let error = server.exports.remove("disk").unwrap_err().to_string();
    assert!(error.contains("1 open connections"), "{error}");
    assert_eq!(wire.read_simple(0, 1), [1]);
    let export = server.exports.close("disk").unwrap();
    assert_eq!(wire.closed(), Vec::<u8>::new());
    assert!(server.exports.get("disk").is_none());
    while export.connections() > 0 {
        std::thread::yield_now();
    }
    assert_eq!(export.counters().values().bytes, 1);
}

#[test]
fn a_session_answers_what_it_was_asked_before_the_server_stops() {
    let mut server = TestServer::start();
    let bytes = patterned(MIB);
    server.add_raw("disk", &bytes);
    let mut wire = server.connect();
    wire.go("disk", false);
    let mut requests = Vec::new();
    for cookie in 0..100 {
        requests.extend(Wire::request_bytes(0, 0, cookie, cookie * 4096, 4096));
    }
    wire.send(&requests);
    let socket = server.socket();
    server.stop().unwrap();
    for cookie in 0..100 {
        assert_eq!(wire.simple(), (0, cookie));
        let at = usize::try_from(cookie).unwrap() * 4096;
        assert_eq!(wire.take(4096), bytes[at..at + 4096]);
    }
    assert_eq!(wire.closed(), Vec::<u8>::new());
    assert!(!socket.exists(), "the socket is removed");
}

#[test]
fn two_hundred_clients_read_at_once() {
    let server = TestServer::start();
    let bytes = patterned(4 * MIB);
    server.add_raw("disk", &bytes);
    let mut wires: Vec<Wire> = (0..200).map(|_| server.connect()).collect();
    for (index, wire) in wires.iter_mut().enumerate() {
        wire.go("disk", index % 2 == 0);
    }
    assert_eq!(server.exports.in_use("disk"), 200);
    for (index, wire) in wires.iter_mut().enumerate() {
        wire.request(0, 0, 1, (index * 4096) as u64, 4096);
    }
    for (index, mut wire) in wires.into_iter().enumerate() {
        if index % 2 == 0 {
            wire.chunks();
        } else {
            assert_eq!(wire.simple(), (0, 1));
            assert_eq!(wire.take(4096), bytes[index * 4096..][..4096]);
        }
    }
}

#[test]
fn nbdinfo_shows_size_map_list_and_features() {
    if !have(&["nbdinfo"]) {
        return;
    }
    let server = TestServer::start();
    server.add_raw("disk", &patterned(8 * MIB));
    server.add_raw("other", &patterned(MIB));
    let uri = server.uri("disk");
    let json = run("nbdinfo", &["--json", &uri]);
    for part in [
        "\"structured\": true",
        "\"export-size\": 8388608",
        "\"is_read_only\": true",
        "\"can_multi_conn\": true",
        "\"can_df\": true",
        "\"can_cache\": true",
        "\"can_flush\": true",
        "\"base:allocation\"",
        "\"block_size_maximum\": 33554432",
        "\"description\": \"a test image\"",
    ] {
        assert!(json.contains(part), "{part} is missing in {json}");
    }
    let map = run("nbdinfo", &["--map", &uri]);
    assert!(map.contains("hole,zero") && map.contains("data"), "{map}");
    let list = run("nbdinfo", &["--list", &uri]);
    assert!(list.contains("export=\"disk\"") && list.contains("export=\"other\""), "{list}");
}

#[test]
fn nbdcopy_and_qemu_img_copy_the_image_as_it_is() {
    if !have(&["nbdcopy", "qemu-img"]) {
        return;
    }
    let server = TestServer::start();
    let bytes = patterned(20 * MIB + 512);
    let file = server.add_raw("disk", &bytes);
    let uri = server.uri("disk");
    let copy = server.dir.path().join("copy");
    run("nbdcopy", &["--connections=4", &uri, path(&copy)]);
    assert!(std::fs::read(&copy).unwrap() == bytes);
    run("qemu-img", &["compare", "-f", "raw", "-F", "raw", path(&file), &uri]);
    let converted = server.dir.path().join("converted");
    run("qemu-img", &["convert", "-f", "raw", "-O", "raw", &uri, path(&converted)]);
    assert!(std::fs::read(&converted).unwrap() == bytes);
    let map = run("qemu-img", &["map", "--output=json", "-f", "raw", &uri]);
    assert!(map.contains("\"zero\": true") && map.contains("\"data\": true"), "{map}");
    let info = run("qemu-img", &["info", "--output=json", "-f", "raw", &uri]);
    assert!(info.contains(&format!("\"virtual-size\": {}", bytes.len())), "{info}");
    // Fails if any of its reads does.
    let bench = ["bench", "-f", "raw", "-c", "2000", "-d", "16", "-s", "4096", "-S", "69632", &uri];
    assert!(run("qemu-img", &bench).contains("Run completed"));
}

#[test]
fn qemu_io_reads_patterns_and_is_refused_writes() {
    if !have(&["qemu-io"]) {
        return;
    }
    let server = TestServer::start();
    let mut bytes = vec![0x5a; 2 * MIB];
    bytes[MIB..].fill(0);
    server.add_raw("disk", &bytes);
    let uri = server.uri("disk");
    let read = run(
        "qemu-io",
        &["-r", "-f", "raw", "-c", "read -P 0x5a 0 1M", "-c", "read -P 0 1M 1M", &uri],
    );
    assert!(!read.contains("verification failed"), "{read}");
    let write = output("qemu-io", &["-f", "raw", "-c", "write 0 4k", &uri]);
    assert!(!write.status.success(), "a write to a read-only export succeeded");
}

#[test]
fn fio_verifies_random_reads_at_depth() {
    if !have(&["fio"]) {
        return;
    }
    let server = TestServer::start();
    server.add_raw("disk", &patterned(16 * MIB));
    let uri = format!("--uri={}", server.uri("disk"));
    let args = [
        "--name=r",
        "--ioengine=nbd",
        &uri,
        "--rw=randread",
        "--bs=4k",
        "--iodepth=16",
        "--io_size=16m",
        "--size=16m",
    ];
    let report = run("fio", &args);
    assert!(report.contains("err= 0"), "{report}");
}

#[test]
fn libnbd_sees_holes_cache_flush_and_errors() {
    if !have(&["nbdsh"]) {
        return;
    }
    let server = TestServer::start();
    let bytes = patterned(4 * MIB);
    server.add_raw("disk", &bytes);
    let file = server.dir.path().join("disk.raw");
    let script = "
import nbd
h.add_meta_context('base:allocation')
h.connect_uri(URI)
want = open(FILE, 'rb').read()
assert h.get_size() == len(want) and h.is_read_only() and h.can_multi_conn()
assert h.pread(len(want), 0) == want
kinds = []
def chunk(buf, offset, status, err):
    kinds.append(status)
    assert bytes(buf) == want[offset:offset + len(buf)]
h.pread_structured(1 << 20, 0, chunk)
assert nbd.READ_HOLE in kinds and nbd.READ_DATA in kinds
kinds = []
h.pread_structured(1 << 20, 0, chunk, nbd.CMD_FLAG_DF)
assert kinds == [nbd.READ_DATA], kinds
h.cache(len(want), 0)
h.flush()
seen = []
h.block_status(len(want), 0, lambda ctx, at, entries, err: seen.extend(entries))
assert sum(seen[0::2]) == len(want), seen
try:
    h.set_strict_mode(0)
    h.pread(512, len(want))
    raise SystemExit('a read past the end succeeded')
except nbd.Error as error:
    assert error.errnum == 22, error
try:
    h.pwrite(b'x' * 512, 0)
    raise SystemExit('a write succeeded')
except nbd.Error as error:
    assert error.errnum == 1, error
assert h.pread(512, 0) == want[:512]
h.shutdown()
";
    let head = format!("URI = {:?}\nFILE = {:?}\n", server.uri("disk"), path(&file));
    run("nbdsh", &["-c", &(head + script)]);
}

#[test]
fn qcow2_images_are_served_as_qemu_reads_them() {
    if !have(&["qemu-img"]) {
        return;
    }
    let server = TestServer::start();
    let bytes = patterned(12 * MIB);
    let raw = server.add_raw("raw", &bytes);
    for (name, extra) in [
        ("plain", &["-o", "cluster_size=64k"][..]),
        ("small", &["-o", "cluster_size=4k"]),
        ("zlib", &["-c", "-o", "compression_type=zlib"]),
        ("zstd", &["-c", "-o", "compression_type=zstd"]),
    ] {
        let image = server.dir.path().join(format!("{name}.qcow2"));
        let (raw, image_path) = (path(&raw), path(&image));
        let mut args = vec!["convert", "-f", "raw", "-O", "qcow2"];
        args.extend_from_slice(extra);
        args.extend_from_slice(&[raw, image_path]);
        run("qemu-img", &args);
        server.add_file(name, &image);
        let uri = server.uri(name);
        run("qemu-img", &["compare", "-f", "raw", "-F", "raw", raw, &uri]);
        for structured in [false, true] {
            let mut wire = server.connect();
            wire.go(name, structured);
            let got = match structured {
                false => wire.read_simple(0, 12 << 20),
                true => wire.read_structured(0, 0, 12 << 20),
            };
            assert!(got == bytes, "{name}");
        }
    }
}
