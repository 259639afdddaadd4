//! Every byte of a disk that is being expanded, read before its turn: large clusters, subclusters, and
//! each codec. What it should be is `qemu-img convert`'s word.

use std::path::Path;

use serde_json::json;

use crate::control_support::Daemon;
use crate::formats::stored_of;
use crate::nbd_support::write_sparse;
use crate::origin::{MIB, Origin, attach, nbd, state};
use crate::qcow2_common::{Random, have_qemu, qemu_bytes, run};

const LEN: usize = 26 << 20;
/// Reads of a disk; they begin and end anywhere in a unit.
const READ: usize = 150_000;

/// Half of a disk: text that compresses, noise, and holes.
fn disk(seed: u64) -> Vec<u8> {
    let mut random = Random(seed);
    let mut bytes: Vec<u8> = (0..LEN).map(|_| random.next().to_le_bytes()[0]).collect();
    for byte in &mut bytes[..16 << 20] {
        *byte &= 31;
    }
    bytes[5 << 20..9 << 20].fill(0);
    bytes[LEN - (1 << 20)..].fill(0);
    bytes
}

/// An image of that disk with `options`, in which more was written here and there: parts of clusters
/// that were not there, zeroes over what was, and what is there no more.
pub fn image(dir: &Path, seed: u64, options: &[&str]) -> (Vec<u8>, Vec<u8>) {
    let (raw, image) = (dir.join("raw"), dir.join("image"));
    write_sparse(&raw, &disk(seed));
    let mut args = vec!["convert", "-q", "-f", "raw", "-O", "qcow2"];
    args.extend(options);
    args.extend([raw.to_str().unwrap(), image.to_str().unwrap()]);
    run("qemu-img", &args);
    let mut random = Random(seed + 1);
    let mut commands = Vec::new();
    for turn in 0..40 {
        let at = random.index(LEN - (1 << 20)) / 512 * 512;
        let len = (random.index(60_000) / 512 + 1) * 512;
        commands.push(match turn % 4 {
            0 | 1 => format!("write -P {} {at} {len}", turn + 1),
            2 => format!("write -z {at} {len}"),
            _ => format!("discard {at} {}", len * 8),
        });
    }
    // In what was a hole, every other 4 KiB: every subcluster of some clusters, or parts of them.
    for at in (6 << 20..(6 << 20) + (256 << 10)).step_by(8192) {
        commands.push(format!("write -P 77 {at} 4096"));
    }
    let mut args = vec!["-f", "qcow2", "-d", "unmap"];
    for command in &commands {
        args.extend(["-c", command]);
    }
    args.push(image.to_str().unwrap());
    run("qemu-io", &args);
    let bytes = qemu_bytes(&image).unwrap();
    (std::fs::read(image).unwrap(), bytes)
}

/// All places of a disk, in an order of no meaning.
fn places(seed: u64) -> Vec<usize> {
    let mut random = Random(seed);
    let mut places: Vec<usize> = (0..LEN).step_by(READ).collect();
    for last in (1..places.len()).rev() {
        places.swap(last, random.index(last + 1));
    }
    places
}

const KINDS: [(&str, &[&str], bool); 8] = [
    ("2 MiB", &["-o", "cluster_size=2M"], false),
    ("2 MiB, zlib", &["-c", "-o", "cluster_size=2M"], true),
    ("2 MiB, zstd", &["-c", "-o", "cluster_size=2M,compression_type=zstd"], false),
    ("subclusters", &["-o", "extended_l2=on"], false),
    ("subclusters of 512 bytes", &["-o", "extended_l2=on,cluster_size=16k"], true),
    ("subclusters of 64 KiB", &["-o", "extended_l2=on,cluster_size=2M"], true),
    ("subclusters, zlib", &["-c", "-o", "extended_l2=on,cluster_size=128k"], false),
    (
        "subclusters, zstd",
        &["-c", "-o", "extended_l2=on,cluster_size=2M,compression_type=zstd"],
        false,
    ),
];

#[test]
fn every_byte_of_a_disk_with_large_clusters_or_subclusters_is_read_before_its_turn() {
    if !have_qemu() {
        return;
    }
    for (seed, (kind, options, is_proved)) in (70..).zip(KINDS) {
        let dir = tempfile::tempdir().unwrap();
        let (source, bytes) = image(dir.path(), seed, options);
        assert_eq!(bytes.len(), LEN);
        let digest = is_proved.then(|| crate::reads::sha256(&source));
        // What is read for readers may be two clusters.
        let origin = Origin::start_with(source, 4 * MIB);
        let daemon = Daemon::start();
        attach(&daemon, &origin, &json!({"layout": "raw", "sha256": digest}));
        let mut wire = nbd(&daemon);
        for at in places(seed) {
            let part = &bytes[at..LEN.min(at + READ)];
            let len = u32::try_from(part.len()).unwrap();
            assert!(wire.read_structured(0, at as u64, len) == part, "{kind}: {at}, early");
        }
        assert_eq!(state(&daemon), "in-progress", "{kind}");
        origin.open(&daemon, "img");
        daemon.wait_for("img", "ready");
        for (at, part) in (0..).step_by(1 << 20).zip(bytes.chunks(1 << 20)) {
            assert!(wire.read_structured(0, at, 1 << 20) == part, "{kind}: {at}, late");
        }
        assert!(stored_of(&daemon) == bytes, "{kind}: what is on the disk");
        assert!(!daemon.log().contains("others when they were asked for again"), "{kind}");
    }
}
