//! Images with tables, read while they arrive: tables come first, by being read.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use serde_json::json;

use bedplate::replica::{Mode, Options, Replica};

use crate::control_support::Daemon;
use crate::fault_server::{FaultServer, Reply};
use crate::nbd_support::write_sparse;
use crate::origin::{MIB, Origin, attach, nbd, socket, state, stream};
use crate::qcow2_common::{Random, have_qemu, run};

const LEN: usize = 64 << 20;

/// A disk with text that compresses, noise, and holes.
fn disk() -> Vec<u8> {
    let mut random = Random(7);
    let mut bytes: Vec<u8> = (0..LEN).map(|_| random.next().to_le_bytes()[0] & 63).collect();
    bytes[8 << 20..20 << 20].fill(0);
    bytes[LEN - (1 << 20)..].fill(0);
    bytes
}

fn convert(bytes: &[u8], format: &str, options: &[&str]) -> Vec<u8> {
    let dir = tempfile::tempdir().unwrap();
    let (raw, image) = (dir.path().join("raw"), dir.path().join("image"));
    write_sparse(&raw, bytes);
    let mut args = vec!["convert", "-q", "-f", "raw", "-O", format];
    args.extend(options);
    args.extend([raw.to_str().unwrap(), image.to_str().unwrap()]);
    run("qemu-img", &args);
    std::fs::read(image).unwrap()
}

#[test]
fn tables_and_compressed_clusters_are_fetched_as_they_are_read() {
    if !have_qemu() {
        return;
    }
    let bytes = disk();
    for (kind, format, options) in [
        ("plain", "qcow2", &[][..]),
        ("zlib", "qcow2", &["-c"]),
        ("zstd", "qcow2", &["-c", "-o", "compression_type=zstd,cluster_size=128k"]),
        ("small", "qcow2", &["-c", "-o", "cluster_size=4k"]),
        ("vmdk", "vmdk", &["-o", "subformat=streamOptimized"]),
        ("vhdx", "vhdx", &[]),
    ] {
        let origin = Origin::start(convert(&bytes, format, options));
        let daemon = Daemon::start();
        attach(&daemon, &origin, &json!({}));
        let mut wire = nbd(&daemon);
        let before = origin.small_requests().len();
        let at = 45 << 20;
        assert!(wire.read_structured(0, at as u64, 4096) == bytes[at..at + 4096], "{kind}");
        let asked = origin.small_requests().len() - before;
        assert!(asked <= 2, "{kind}: {asked} requests: a table, and the cluster");
        for at in [0, (8 << 20) - 5000, (20 << 20) - 3, 63 << 20, 30 << 20] {
            let read = wire.read_structured(0, at as u64, 10_000);
            assert!(read == bytes[at..at + 10_000], "{kind} {at}");
        }
        let replica = reads_by_itself(&daemon, &bytes, kind);
        assert_eq!(state(&daemon), "in-progress", "{kind}");
        origin.open(&daemon, "img");
        daemon.wait_for("img", "ready");
        for (at, part) in (0..).step_by(1 << 20).zip(bytes.chunks(1 << 20)) {
            assert!(wire.read_structured(0, at, 1 << 20) == part, "{kind} {at}");
        }
        let mut all = vec![0; LEN];
        replica.read_at(&mut all, 0).unwrap();
        assert!(all == bytes, "{kind}");
    }
}

/// An attached reader that has read some of `bytes` while the rest is still to come.
fn reads_by_itself(daemon: &Daemon, bytes: &[u8], kind: &str) -> Replica {
    let options = Options { mode: Mode::Mapped, ..Options::default() };
    let replica = Replica::attach(socket(daemon, "replica.sock"), "img", options).unwrap();
    let mut buf = vec![0; 300_000];
    for at in [17 << 20, 25 << 20, 45 << 20] {
        replica.read_at(&mut buf, at as u64).unwrap();
        assert!(buf == bytes[at..at + 300_000], "{kind} {at}");
    }
    replica
}

#[test]
fn clusters_of_a_disk_that_is_being_expanded_are_fetched_before_their_turn() {
    if !have_qemu() {
        return;
    }
    let bytes = disk();
    for (kind, options, is_proved) in [
        ("plain", &[][..], false),
        ("zlib", &["-c"], true),
        ("zstd", &["-c", "-o", "compression_type=zstd,cluster_size=128k"], false),
        ("small", &["-c", "-o", "cluster_size=4k"], true),
        ("large", &["-c", "-o", "cluster_size=1M"], false),
        ("subclusters", &["-o", "extended_l2=on,cluster_size=128k"], true),
    ] {
        let source = convert(&bytes, "qcow2", options);
        let digest = is_proved.then(|| crate::reads::sha256(&source));
        let origin = Origin::start(source);
        let daemon = Daemon::start();
        attach(&daemon, &origin, &json!({"layout": "raw", "sha256": digest}));
        let mut wire = nbd(&daemon);
        let at = 45 << 20;
        let before = origin.small_requests().len();
        assert!(wire.read_structured(0, at as u64, 4096) == bytes[at..at + 4096], "{kind}");
        let asked = origin.small_requests().len() - before;
        assert!((1..=2).contains(&asked), "{kind}: {asked} requests");
        for at in [(20 << 20) - 3, 63 << 20, 30 << 20, (8 << 20) - 5000, 45 << 20] {
            let read = wire.read_structured(0, at as u64, 10_000);
            assert!(read == bytes[at..at + 10_000], "{kind} {at}");
        }
        let replica = reads_by_itself(&daemon, &bytes, kind);
        assert_eq!(state(&daemon), "in-progress", "{kind}");
        origin.open(&daemon, "img");
        daemon.wait_for("img", "ready");
        let mut all = vec![0; LEN];
        replica.read_at(&mut all, 0).unwrap();
        assert!(all == bytes, "{kind}");
        let stored = stored_of(&daemon);
        assert!(stored == bytes, "{kind}: what is on the disk");
    }
}

#[test]
fn what_was_read_before_its_turn_and_is_other_in_its_turn_is_not_kept() {
    if !have_qemu() {
        return;
    }
    let old = disk();
    let mut new = old.clone();
    // No cluster changes its place.
    for byte in &mut new[40 << 20..60 << 20] {
        *byte ^= 0x20;
    }
    let [first, second] = [&old, &new].map(|bytes| convert(bytes, "qcow2", &[]));
    assert_eq!(first.len(), second.len());
    // A server that says that it is the same: what comes in its turn comes late, and is other.
    let is_read = Arc::new(AtomicBool::new(false));
    let go_on = Arc::clone(&is_read);
    let server = FaultServer::start(move |request| {
        let range = request.range.clone().unwrap_or(0..u64::MAX);
        if range.end.min(first.len() as u64) - range.start <= MIB && !go_on.load(Ordering::SeqCst) {
            return Reply::ranged(request, &first, "\"one\"");
        }
        while !go_on.load(Ordering::SeqCst) {
            std::thread::yield_now();
        }
        Reply::ranged(request, &second, "\"one\"")
    });
    let daemon = Daemon::start();
    let url = format!("{}/disk.img", server.url);
    let image = json!({"name": "img", "url": url, "layout": "raw"}).to_string();
    assert_eq!(daemon.curl("POST", "/v1/images", Some(&image)).0, 201);
    stream(&daemon);
    let mut wire = nbd(&daemon);
    assert!(wire.read_structured(0, 45 << 20, 4096) == old[45 << 20..(45 << 20) + 4096]);
    is_read.store(true, Ordering::SeqCst);
    daemon.wait_for("img", "ready");
    assert!(daemon.log().contains("were others when they were asked for again"));
    let stored = stored_of(&daemon);
    assert!(stored == new, "all of it is what came in its turn");
}

#[test]
fn a_source_that_is_decoded_or_expanded_is_read_as_far_as_it_has_come() {
    if !have_qemu() {
        return;
    }
    let bytes = disk();
    // Of what is decoded as a stream, nothing can be asked for: it is waited for.
    let expanded = (convert(&bytes, "qcow2", &["-c"]), json!({"layout": "raw"}));
    let packed = (gzip(&bytes), json!({}));
    for (source, more) in [expanded, packed] {
        let origin = Origin::start(source);
        origin.let_go();
        let daemon = Daemon::start();
        attach(&daemon, &origin, &more);
        let mut wire = nbd(&daemon);
        for at in [45 << 20, 0, 62 << 20, 19 << 20] {
            let read = wire.read_structured(0, at as u64, 2 << 20);
            assert!(read == bytes[at..at + (2 << 20)], "{more} {at}");
        }
        daemon.wait_for("img", "ready");
        let read = wire.read_structured(0, 30 << 20, 1 << 20);
        assert!(read == bytes[30 << 20..31 << 20], "{more}");
    }
}

/// The bytes of the only copy.
pub fn stored_of(daemon: &Daemon) -> Vec<u8> {
    let images = daemon.socket.parent().unwrap().with_file_name("backing-images");
    let mut copies = std::fs::read_dir(images).unwrap();
    std::fs::read(copies.next().unwrap().unwrap().path().join("backing")).unwrap()
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    use std::io::Write;
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

/// Where the compressed cluster of 64 KiB around guest byte `at` begins in the file.
fn stored_at(image: &[u8], at: usize) -> usize {
    let word = |at: usize| u64::from_be_bytes(image[at..at + 8].try_into().unwrap());
    let place = |word: u64, bits: u32| usize::try_from(word & ((1 << bits) - 1)).unwrap();
    let (cluster, in_table) = (at >> 16, (1 << 16) / 8);
    let l1 = place(word(40), 56);
    let l2 = place(word(l1 + cluster / in_table * 8), 56);
    place(word(l2 + cluster % in_table * 8), 54)
}

#[test]
fn a_damaged_cluster_that_is_read_before_its_turn_is_an_error_and_ends_the_copy() {
    if !have_qemu() {
        return;
    }
    let bytes = disk();
    let mut source = convert(&bytes, "qcow2", &["-c"]);
    let (good, bad) = (30 << 20, 45 << 20);
    let at = stored_at(&source, bad);
    source[at + 100..at + 200].fill(0xff);
    let origin = Origin::start(source);
    let daemon = Daemon::start();
    attach(&daemon, &origin, &json!({"layout": "raw"}));
    let options = Options { mode: Mode::Mapped, ..Options::default() };
    let replica = Replica::attach(socket(&daemon, "replica.sock"), "img", options).unwrap();
    let mut buf = vec![0; 4096];
    replica.read_at(&mut buf, good as u64).unwrap();
    assert!(buf == bytes[good..good + 4096]);
    let before = origin.small_requests().len();
    let reader = std::thread::spawn(move || replica.read_at(&mut [0; 4096], bad as u64));
    while origin.small_requests().len() == before {
        std::thread::yield_now();
    }
    // It was asked for by itself; now all of the rest comes too.
    origin.open(&daemon, "img");
    reader.join().unwrap().unwrap_err();
    let failed = |event: &serde_json::Value| event["object"]["copies"][0]["refused"] == true;
    let events = daemon.events_until("?image=img", failed);
    let message = events.last().unwrap()["object"]["copies"][0]["message"].to_string();
    assert!(message.contains("damaged deflate stream"), "{message}");
}
