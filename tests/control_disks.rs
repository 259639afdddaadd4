//! Disks come and go while the daemon runs: added, emptied, removed, missing, back.

#![expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod control_support;

use std::path::{Path, PathBuf};
use std::process::Command;

use control_support::{Daemon, raw_image, stderr, stdout};
use serde_json::{Value, json};

fn ok(daemon: &Daemon, args: &[&str]) -> String {
    let output = daemon.cli(args);
    assert!(output.status.success(), "{args:?}: {}", stderr(&output));
    stdout(&output)
}

fn disks(daemon: &Daemon) -> Vec<Value> {
    daemon.get("/v1/disks")["disks"].as_array().unwrap().clone()
}

fn uuid(disk: &Value) -> String {
    disk["uuid"].as_str().unwrap().to_owned()
}

/// The bytes of the image, as a client gets them.
fn read(daemon: &Daemon, to: &Path) -> Vec<u8> {
    let uri = daemon.get("/v1/images/golden")["nbd"]["uri"].as_str().unwrap().to_owned();
    let _none = std::fs::remove_file(to);
    let copied = Command::new("nbdcopy").arg(&uri).arg(to).output().unwrap();
    assert!(copied.status.success(), "{}", stderr(&copied));
    std::fs::read(to).unwrap()
}

/// Waits until the image has a copy on just these disks, all of them ready.
fn until_ready_on(daemon: &Daemon, wanted: &[&str]) {
    let is_so = |event: &Value| {
        let Some(copies) = event["object"]["copies"].as_array() else { return false };
        let ready = |copy: &&Value| copy["state"] == "ready";
        let mut on: Vec<_> = copies.iter().filter(ready).map(|copy| &copy["disk"]).collect();
        on.sort_by_key(|disk| disk.to_string());
        let mut wanted = wanted.to_vec();
        wanted.sort_unstable();
        copies.len() == on.len() && on == wanted
    };
    daemon.events_until("?image=golden", is_so);
}

/// Waits until the daemon has seen that the disk is there, or gone.
fn until_healthy(daemon: &Daemon, uuid: &str, healthy: bool) {
    while daemon.get(&format!("/v1/disks/{uuid}"))["healthy"] != healthy {
        std::thread::sleep(std::time::Duration::from_millis(50));
    }
}

fn copies_in(disk: &Path) -> usize {
    std::fs::read_dir(disk.join("backing-images")).map_or(0, Iterator::count)
}

#[test]
fn a_disk_is_added_emptied_and_removed_while_its_image_is_read() {
    let daemon = Daemon::start_on(tempfile::tempdir().unwrap(), &["one"], "");
    let dir = daemon.dir.path().to_owned();
    let (two, three, out) = (dir.join("two"), dir.join("three"), dir.join("out"));
    let golden = dir.join("golden.img");
    raw_image(&golden, 3 << 20);
    let bytes = std::fs::read(&golden).unwrap();

    let missing = daemon.cli(&["disk", "add", two.to_str().unwrap()]);
    assert!(stderr(&missing).contains("no such directory"), "{}", stderr(&missing));
    assert!(!two.exists(), "a typing error makes no directory");
    for disk in [&two, &three] {
        std::fs::create_dir(disk).unwrap();
        ok(&daemon, &["disk", "add", disk.to_str().unwrap(), "--tag", "ssd"]);
    }
    // A second time changes nothing.
    let (status, again) =
        daemon.curl("POST", "/v1/disks", Some(&json!({ "path": two }).to_string()));
    assert_eq!((status, &again["tags"]), (200, &json!(["ssd"])));
    let all = disks(&daemon);
    assert_eq!(all.len(), 3);
    let [first, second, third] = [&all[0], &all[1], &all[2]].map(uuid);

    ok(&daemon, &["create", golden.to_str().unwrap(), "--disk", &second, "--wait"]);
    assert_eq!(read(&daemon, &out), bytes);
    let refused = daemon.cli(&["disk", "remove", &second[..8]]);
    assert!(stderr(&refused).contains("one of image golden"), "{}", stderr(&refused));
    ok(&daemon, &["disk", "set", &first, "--schedulable", "no"]);

    ok(&daemon, &["disk", "set", two.to_str().unwrap(), "--evict", "yes", "--wait"]);
    until_ready_on(&daemon, &[&third]);
    assert_eq!((copies_in(&two), copies_in(&three)), (0, 1));
    assert_eq!(read(&daemon, &out), bytes);
    ok(&daemon, &["disk", "remove", &second]);
    assert_eq!(disks(&daemon).len(), 2);
    let lock = Command::new("flock").arg("-n").arg(two.join("bedplate.lock")).arg("true").status();
    assert!(lock.unwrap().success(), "it is let go");
    let refused = daemon.cli(&["disk", "remove", &first]);
    assert!(stderr(&refused).contains("the catalog is on it"), "{}", stderr(&refused));

    // The daemon knows what its configuration does not.
    let (_, dir) = daemon.end("KILL");
    let daemon = Daemon::start_on(dir, &["one"], "");
    let all = disks(&daemon);
    assert_eq!(all.iter().map(uuid).collect::<Vec<_>>(), [first, third.clone()]);
    assert_eq!((&all[0]["schedulable"], &all[1]["tags"]), (&json!(false), &json!(["ssd"])));
    until_ready_on(&daemon, &[&third]);
    assert_eq!(read(&daemon, &out), bytes);
}

#[test]
fn where_a_known_disk_is_missing_no_other_is_made_and_it_goes_on_when_it_is_back() {
    let daemon = Daemon::start_on(tempfile::tempdir().unwrap(), &["one", "two"], "");
    let dir = daemon.dir.path().to_owned();
    let (two, away, out) = (dir.join("two"), dir.join("away"), dir.join("out"));
    let golden = dir.join("golden.img");
    raw_image(&golden, 3 << 20);
    let bytes = std::fs::read(&golden).unwrap();
    let second = uuid(&disks(&daemon)[1]);
    ok(&daemon, &["create", golden.to_str().unwrap(), "--disk", &second, "--wait"]);
    let (_, temp) = daemon.end("TERM");

    // A mount point without its file system looks like this.
    std::fs::rename(&two, &away).unwrap();
    let daemon = Daemon::start_on(temp, &["one", "two"], "");
    let missing = &disks(&daemon)[1];
    assert_eq!((uuid(missing), &missing["healthy"]), (second.clone(), &json!(false)));
    assert_eq!(std::fs::read_dir(&two).unwrap().count(), 0, "nothing is made there");
    let state = daemon.get("/v1/images/golden")["copies"][0]["state"].clone();
    assert_eq!(state, "unknown");
    std::fs::remove_dir(&two).unwrap();
    std::fs::rename(&away, &two).unwrap();
    until_ready_on(&daemon, &[&second]);
    assert_eq!(read(&daemon, &out), bytes);

    // Gone, and back on another file system, as after a repair: another inode at the same path.
    std::fs::rename(&two, &away).unwrap();
    until_healthy(&daemon, &second, false);
    let copied = Command::new("cp").arg("-a").arg(&away).arg(&two).status().unwrap();
    assert!(copied.success());
    until_healthy(&daemon, &second, true);
    until_ready_on(&daemon, &[&second]);
    std::fs::remove_dir_all(&away).unwrap();
    assert_eq!(read(&daemon, &out), bytes, "from what is there now");

    // Another disk at its place is not it.
    std::fs::rename(&two, &away).unwrap();
    until_healthy(&daemon, &second, false);
    std::fs::create_dir(&two).unwrap();
    let cfg: PathBuf = two.join("longhorn-disk.cfg");
    std::fs::write(&cfg, r#"{"diskUUID":"00000000-1111-4222-8333-444444444444"}"#).unwrap();
    let (_, temp) = daemon.end("TERM");
    let daemon = Daemon::start_on(temp, &["one", "two"], "");
    let found = &disks(&daemon)[1];
    let message = found["message"].as_str().unwrap();
    assert!(message.contains("is here, not"), "{message}");
    // It is gone for good: it goes with what it held.
    let refused = daemon.cli(&["disk", "remove", &second]);
    assert_eq!(refused.status.code(), Some(3), "{}", stderr(&refused));
    ok(&daemon, &["disk", "remove", "--force", &second]);
    assert_eq!(daemon.get("/v1/images/golden")["copies"], json!([]));
}
