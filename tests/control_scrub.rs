//! Bytes that rot on the disk are found, repaired from where they are right, or never served.

#![expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod control_support;
mod nginx_support;

use std::fs::{File, OpenOptions, Permissions};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use control_support::{Daemon, stderr, stdout};
use nginx_support::{Nginx, have_nginx};
use serde_json::{Value, json};

const MIB: usize = 1 << 20;
/// Five MiB and a bit; the second MiB is a hole.
const LEN: usize = 5 * MIB + 512;

fn ok(daemon: &Daemon, args: &[&str]) -> String {
    let output = daemon.cli(args);
    assert!(output.status.success(), "{args:?}: {}\n{}", stderr(&output), daemon.log());
    stdout(&output)
}

fn content() -> Vec<u8> {
    let byte = |at: usize| u8::try_from((at / 7 + at / MIB) % 251).unwrap() + 1;
    let mut bytes: Vec<u8> = (0..LEN).map(byte).collect();
    bytes[MIB..2 * MIB].fill(0);
    bytes
}

/// The file of the only copy on a disk.
fn file(daemon: &Daemon, disk: &str) -> PathBuf {
    let images = daemon.dir.path().join(disk).join("backing-images");
    let dirs: Vec<_> = images.read_dir().unwrap().map(|entry| entry.unwrap().path()).collect();
    assert_eq!(dirs.len(), 1, "{dirs:?}");
    dirs[0].join("backing")
}

/// Turns the bits of a byte over, as a disk would: the file's time stays as it was.
fn rot(path: &Path, at: usize) {
    let (mode, time) = {
        let meta = path.metadata().unwrap();
        (meta.permissions(), meta.modified().unwrap())
    };
    std::fs::set_permissions(path, Permissions::from_mode(0o644)).unwrap();
    let file = OpenOptions::new().read(true).write(true).open(path).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at as u64).unwrap();
    file.write_all_at(&[!byte[0]], at as u64).unwrap();
    file.set_modified(time).unwrap();
    file.sync_all().unwrap();
    std::fs::set_permissions(path, mode).unwrap();
}

fn uuid(daemon: &Daemon, n: usize) -> String {
    daemon.get("/v1/disks")["disks"][n]["uuid"].as_str().unwrap().to_owned()
}

fn copy(daemon: &Daemon, disk: &str) -> Value {
    let image = daemon.get("/v1/images/a");
    let copies = image["copies"].as_array().unwrap();
    copies.iter().find(|copy| copy["disk"] == disk).unwrap().clone()
}

fn mark(path: &Path) -> PathBuf {
    path.with_file_name("backing.repair")
}

#[test]
fn rot_is_repaired_in_place_from_the_other_disk_while_readers_hold_the_file() {
    if !have_nginx() {
        return;
    }
    let bytes = content();
    let nginx = Nginx::start(&bytes);
    let daemon = Daemon::start_on(tempfile::tempdir().unwrap(), &["one", "two"], "");
    let [one, two] = [uuid(&daemon, 0), uuid(&daemon, 1)];
    for disk in [&one, &two] {
        ok(&daemon, &["create", &nginx.url, "--name", "a", "--disk", disk, "--wait"]);
    }
    drop(nginx);
    let path = file(&daemon, "one");
    for at in [7, 2 * MIB + 5, 3 * MIB, LEN - 1] {
        rot(&path, at);
    }
    // In the hole: a byte that should not be there.
    rot(&path, MIB + 100);
    let held = File::open(&path).unwrap();
    let inode = held.metadata().unwrap().ino();
    let text = ok(&daemon, &["scrub", "a", "--wait"]);
    assert!(text.contains("repaired") && text.contains("0x0-0x3fffff"), "{text}");
    let (mine, other) = (copy(&daemon, &one), copy(&daemon, &two));
    assert_eq!((&mine["state"], &mine["scrub"]["result"]), (&json!("ready"), &json!("repaired")));
    assert_eq!(mine["scrub"]["repaired_bytes"], 4 * MIB + 512);
    assert_eq!(other["scrub"]["result"], "good");
    let meta = path.metadata().unwrap();
    assert_eq!((meta.ino(), meta.mode() & 0o777), (inode, 0o444), "the same file");
    let mut seen = vec![0; LEN];
    held.read_exact_at(&mut seen, 0).unwrap();
    assert!(seen == bytes, "who held it reads the right bytes");
    assert!(!mark(&path).exists());
    // It is vouched for: a restart takes it as it is, and remembers.
    let (_, dir) = daemon.end("KILL");
    let daemon = Daemon::start_on(dir, &["one", "two"], "");
    daemon.wait_for("a", "ready");
    assert_eq!(copy(&daemon, &one)["scrub"], mine["scrub"]);
    assert!(ok(&daemon, &["scrub", "a", "--disk", &one, "--wait"]).contains("good"));
}

#[test]
fn without_another_copy_only_the_bad_bytes_come_from_the_source() {
    if !have_nginx() {
        return;
    }
    let bytes = content();
    let nginx = Nginx::start(&bytes);
    let daemon = Daemon::start();
    ok(&daemon, &["create", &nginx.url, "--name", "a", "--fetch", "--wait"]);
    let path = file(&daemon, "disk");
    let before = nginx.sent_bytes();
    rot(&path, 3 * MIB + 9);
    let text = ok(&daemon, &["scrub", "a", "--wait"]);
    assert!(text.contains("repaired 1048576 bytes: 0x300000-0x3fffff"), "{text}");
    assert!(std::fs::read(&path).unwrap() == bytes);
    let sent = nginx.sent_bytes() - before;
    assert!(sent < 2 * MIB as u64, "{sent} bytes");
    // Somebody touches it, and changes nothing.
    File::open(&path).unwrap().set_modified(std::time::SystemTime::UNIX_EPOCH).unwrap();
    let text = ok(&daemon, &["scrub", "a", "--wait"]);
    assert!(text.contains("good") && text.contains("its bytes were not"), "{text}");
    // Cut off: what is missing is put back, in place.
    std::fs::set_permissions(&path, Permissions::from_mode(0o644)).unwrap();
    OpenOptions::new().write(true).open(&path).unwrap().set_len(4 * MIB as u64 + 3).unwrap();
    assert!(ok(&daemon, &["scrub", "a", "--wait"]).contains("0x400000-0x5001ff"));
    assert!(std::fs::read(&path).unwrap() == bytes);
}

#[test]
fn what_cannot_be_repaired_is_failed_with_its_ranges_and_closed_until_the_source_is_back() {
    if !have_nginx() {
        return;
    }
    let bytes = content();
    let nginx = Nginx::start(&bytes);
    let daemon = Daemon::start();
    ok(&daemon, &["create", &nginx.url, "--name", "a"]);
    ok(&daemon, &["attach", "a", "--reader", "vm"]);
    let path = file(&daemon, "disk");
    let inode = path.metadata().unwrap().ino();
    nginx.hide();
    rot(&path, 2 * MIB + 9);
    let output = daemon.cli(&["scrub", "a", "--wait"]);
    assert_eq!(output.status.code(), Some(1), "{}", stderr(&output));
    let is_bad = |image: &Value| {
        let copy = &image["copies"][0];
        let message = copy["message"].as_str().unwrap();
        assert_eq!((&copy["state"], &copy["refused"]), (&json!("failed"), &json!(true)), "{copy}");
        assert!(message.contains("0x200000-0x2fffff") && message.contains("404"), "{message}");
        assert!(image["nbd"].is_null(), "nobody is handed bad bytes");
    };
    let image = daemon.get("/v1/images/a");
    is_bad(&image);
    let scrub = &image["copies"][0]["scrub"];
    assert_eq!((&scrub["result"], &scrub["bad_bytes"]), (&json!("bad"), &json!(MIB)));
    assert_eq!(daemon.get("/v1/attachments")["attachments"][0]["state"], "failed");
    // Neither does a restart serve it.
    let (_, dir) = daemon.end("KILL");
    let daemon = Daemon::start_in(dir, "");
    is_bad(&daemon.get("/v1/images/a"));
    nginx.show();
    let asked = daemon.curl("POST", "/v1/images/a/fetch", None);
    assert_eq!(asked.0, 202, "{}", asked.1);
    daemon.wait_for("a", "ready");
    assert!(std::fs::read(&path).unwrap() == bytes);
    assert_eq!(path.metadata().unwrap().ino(), inode, "repaired where it is");
}

#[test]
fn another_version_of_the_source_repairs_nothing() {
    if !have_nginx() {
        return;
    }
    let bytes = content();
    let nginx = Nginx::start(&bytes);
    let daemon = Daemon::start();
    ok(&daemon, &["create", &nginx.url, "--name", "a", "--fetch", "--wait"]);
    let path = file(&daemon, "disk");
    rot(&path, 2 * MIB + 9);
    let rotten = std::fs::read(&path).unwrap();
    // As many bytes, and the MiB that is bad here is right there; still it is another file.
    let mut others = bytes;
    others[0] = !others[0];
    nginx.replace(&others);
    let seen = std::cell::Cell::new(false);
    let seen = daemon.events_until("?image=a", |event| {
        if event["type"] == "snapshot.end" && !seen.replace(true) {
            ok(&daemon, &["scrub", "a"]);
        }
        event["type"] == "image.warning"
    });
    let warning = &seen.last().unwrap()["object"];
    let message = warning["message"].as_str().unwrap();
    assert!(warning["name"] == "a" && message.contains("another version"), "{message}");
    assert_eq!(daemon.get("/v1/images/a")["copies"][0]["state"], "failed");
    assert!(std::fs::read(&path).unwrap() == rotten);
}

#[test]
fn a_daemon_that_is_killed_while_it_repairs_ends_with_right_bytes() {
    if !have_nginx() {
        return;
    }
    let bytes = content();
    let nginx = Nginx::start(&bytes);
    let daemon = Daemon::start();
    ok(&daemon, &["create", &nginx.url, "--name", "a", "--fetch", "--wait"]);
    let path = file(&daemon, "disk");
    let inode = path.metadata().unwrap().ino();
    rot(&path, 9);
    rot(&path, 4 * MIB + 9);
    nginx.crawl();
    ok(&daemon, &["scrub", "a"]);
    let deadline = Instant::now() + Duration::from_secs(120);
    while !mark(&path).exists() {
        assert!(Instant::now() < deadline, "{}", daemon.log());
        std::thread::sleep(Duration::from_millis(10));
    }
    let (_, dir) = daemon.end("KILL");
    nginx.run();
    let daemon = Daemon::start_in(dir, "");
    let events = daemon.events_until("?image=a", |event| {
        let copy = &event["object"]["copies"][0];
        if copy["state"] == "ready" {
            assert!(std::fs::read(&path).unwrap() == bytes, "ready means right");
        }
        copy["state"] == "ready"
    });
    assert!(!mark(&path).exists(), "{events:?}");
    assert_eq!(path.metadata().unwrap().ino(), inode, "repaired, not fetched again");
}

#[test]
fn how_far_a_scrub_is_is_seen_while_it_runs() {
    let daemon = Daemon::start();
    let source = daemon.dir.path().join("a.img");
    std::fs::write(&source, content()).unwrap();
    ok(&daemon, &["create", source.to_str().unwrap(), "--name", "a", "--wait"]);
    // Five MiB of it have to be read: some seconds.
    ok(&daemon, &["settings", "set", "scrub_rate_bytes_per_s=2M"]);
    ok(&daemon, &["scrub", "a"]);
    let part = |event: &Value| {
        let done = event["object"]["copies"][0]["scrubbed_bytes"].as_u64();
        done.is_some_and(|done| done > 0 && done < LEN as u64)
    };
    daemon.events_until("?image=a", part);
    assert!(ok(&daemon, &["get", "a"]).contains("now, "));
    ok(&daemon, &["settings", "set", "scrub_rate_bytes_per_s=0"]);
    daemon.events_until("?image=a", |event| event["object"]["copies"][0]["scrubbing"] == false);
    assert!(daemon.get("/v1/images/a")["copies"][0]["scrubbed_bytes"].is_null());
}
