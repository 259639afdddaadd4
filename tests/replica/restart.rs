//! Readers do not notice that the engine is killed and started again, and are told when the image
//! is another one.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use bedplate::replica::{Mode, Options, Replica, ReplicaError};

use crate::control_support::{Daemon, stderr};
use crate::qcow2_common::{Random, compressed, half_random, have_qemu};

fn socket(dir: &Path) -> PathBuf {
    dir.join("disk/bedplate/replica.sock")
}

fn ok(daemon: &Daemon, args: &[&str]) {
    let output = daemon.cli(args);
    assert!(output.status.success(), "{args:?}: {}", stderr(&output));
}

/// A compressed image of bytes that are returned.
fn packed(dir: &Path, name: &str, seed: u64) -> (PathBuf, Vec<u8>) {
    let bytes = half_random(seed, 16 << 20);
    let image = compressed(dir, name, &bytes);
    (image, bytes)
}

/// A gauge of `/metrics`.
fn metric(daemon: &Daemon, name: &str) -> u64 {
    let (_, metrics) = crate::control_support::curl(&daemon.socket, "GET", "/metrics", None);
    let name = format!("bedplate_{name} ");
    let value = metrics.lines().find_map(|line| line.strip_prefix(&name));
    value.unwrap_or_else(|| panic!("no {name}in {metrics}")).parse().unwrap()
}

#[test]
fn readers_survive_an_engine_that_is_killed_again_and_again() {
    if !have_qemu() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (image, bytes) = packed(dir.path(), "image.qcow2", 1);
    // So small that readers have to ask all the time.
    let config = "decoded_cache = 1048576";
    let mut daemon = Daemon::start_in(dir, config);
    ok(&daemon, &["create", image.to_str().unwrap(), "--name", "disk", "--wait"]);
    let place = socket(daemon.dir.path());
    let (is_over, reads) = (AtomicBool::new(false), AtomicU64::new(0));
    // It must outlive the readers, who may have asked it something.
    let _daemon = std::thread::scope(|scope| {
        let mut readers = Vec::new();
        for (seed, mode) in [(1, Mode::Pread), (2, Mode::Mapped), (3, Mode::Mapped)] {
            let (place, bytes, is_over, reads) = (&place, &bytes, &is_over, &reads);
            readers.push(scope.spawn(move || {
                let options = Options { mode, ..Options::default() };
                let replica = Replica::attach(place, "disk", options).unwrap();
                let first = replica.generation();
                let mut random = Random(seed);
                while !is_over.load(Ordering::Relaxed) {
                    let len = random.index(100_000) + 1;
                    let at = random.index(bytes.len() - len);
                    let mut part = vec![0; len];
                    replica.read_at(&mut part, at as u64).unwrap();
                    assert!(part == bytes[at..at + len], "{len} bytes at {at}");
                    reads.fetch_add(1, Ordering::Relaxed);
                }
                assert_ne!(replica.generation(), first, "it has attached anew");
            }));
        }
        let fifty_reads = || {
            let before = reads.load(Ordering::Relaxed);
            while reads.load(Ordering::Relaxed) < before + 50 {
                assert!(!readers.iter().any(|reader| reader.is_finished()), "a reader has failed");
                std::thread::yield_now();
            }
        };
        for _ in 0..20 {
            fifty_reads();
            let (code, dir) = daemon.end("KILL");
            assert_eq!(code, None);
            daemon = Daemon::start_in(dir, config);
        }
        fifty_reads();
        assert_eq!(metric(&daemon, "decoded_capacity_bytes"), 1 << 20, "as it was said");
        is_over.store(true, Ordering::Relaxed);
        daemon
    });
}

#[test]
fn what_was_handed_out_is_read_without_any_engine_and_the_rest_is_an_error() {
    if !have_qemu() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (image, bytes) = packed(dir.path(), "image.qcow2", 2);
    let daemon = Daemon::start_in(dir, "");
    ok(&daemon, &["create", image.to_str().unwrap(), "--name", "disk", "--wait"]);
    let options = Options { patience: std::time::Duration::from_secs(3), ..Options::default() };
    let replica = Replica::attach(socket(daemon.dir.path()), "disk", options).unwrap();
    let mut half = vec![0; 8 << 20];
    replica.read_at(&mut half, 0).unwrap();
    let [held, memory, capacity] =
        ["decoded_bytes", "decoded_memory_bytes", "decoded_capacity_bytes"]
            .map(|name| metric(&daemon, name));
    assert!(held >= 8 << 20 && memory >= 8 << 20, "{held} bytes in {memory}");
    assert!(capacity >= 64 << 20, "the floor at least: {capacity}");
    let (_, dir) = daemon.end("KILL");
    half.fill(0);
    replica.read_at(&mut half, 0).unwrap();
    assert!(half == bytes[..8 << 20]);
    let error = replica.read_at(&mut half[..4096], 15 << 20).unwrap_err();
    assert!(matches!(error, ReplicaError::Engine { .. }), "{error}");
    let daemon = Daemon::start_in(dir, "");
    replica.read_at(&mut half[..4096], 15 << 20).unwrap();
    assert!(half[..4096] == bytes[15 << 20..][..4096]);
    drop(daemon);
}

#[test]
fn another_image_of_the_same_name_is_told_and_never_read() {
    if !have_qemu() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (first, bytes) = packed(dir.path(), "first.qcow2", 3);
    let (second, _) = packed(dir.path(), "second.qcow2", 4);
    let daemon = Daemon::start_in(dir, "");
    ok(&daemon, &["create", first.to_str().unwrap(), "--name", "disk", "--wait"]);
    let replica = Replica::attach(socket(daemon.dir.path()), "disk", Options::default()).unwrap();
    let mut block = [0; 4096];
    replica.read_at(&mut block, 0).unwrap();
    let refused = daemon.cli(&["delete", "disk"]);
    assert!(!refused.status.success(), "it has a reader");
    // The end of the engine is the end of the lease.
    let (_, dir) = daemon.end("TERM");
    let daemon = Daemon::start_in(dir, "");
    ok(&daemon, &["delete", "disk"]);
    ok(&daemon, &["create", second.to_str().unwrap(), "--name", "disk", "--wait"]);
    let error = replica.read_at(&mut block, 12 << 20).unwrap_err();
    assert!(matches!(error, ReplicaError::Changed { .. }), "{error}");
    assert_eq!(error.errno(), 116, "ESTALE");
    // What was decoded is still the first one's, unless its engine has taken it back when it ended.
    match replica.read_at(&mut block, 0) {
        Ok(()) => assert!(block == bytes[..4096]),
        Err(error) => assert_eq!(error.errno(), 116, "{error}"),
    }
}
