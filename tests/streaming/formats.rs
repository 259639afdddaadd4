//! Images with tables, read while they arrive: tables come first, by being read.

use serde_json::json;

use bedplate::replica::{Mode, Options, Replica};

use crate::control_support::Daemon;
use crate::nbd_support::write_sparse;
use crate::origin::{Origin, attach, nbd, socket, state};
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
        let options = Options { mode: Mode::Mapped, ..Options::default() };
        let replica = Replica::attach(socket(&daemon, "replica.sock"), "img", options).unwrap();
        let mut buf = vec![0; 300_000];
        for at in [17 << 20, 25 << 20, 45 << 20] {
            replica.read_at(&mut buf, at as u64).unwrap();
            assert!(buf == bytes[at..at + 300_000], "{kind} {at}");
        }
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

#[test]
fn a_source_that_is_decoded_or_expanded_is_read_as_far_as_it_has_come() {
    if !have_qemu() {
        return;
    }
    let bytes = disk();
    // What is asked for cannot be told the source: it is waited for.
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

fn gzip(bytes: &[u8]) -> Vec<u8> {
    use std::io::Write;
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}
