//! Copies that nobody uses go, by hand and by themselves; those in use stay.

#![expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod control_support;

use std::path::PathBuf;
use std::process::{Command, Stdio};

use control_support::{Daemon, raw_image, stderr, stdout};
use serde_json::{Value, json};

fn ok(daemon: &Daemon, args: &[&str]) -> String {
    let output = daemon.cli(args);
    assert!(output.status.success(), "{args:?}: {}", stderr(&output));
    stdout(&output)
}

/// A daemon with an image on both of its disks, whose UUIDs come with it.
fn two_disks(config: &str) -> (Daemon, [String; 2]) {
    let daemon = Daemon::start_on(tempfile::tempdir().unwrap(), &["one", "two"], config);
    let file = daemon.dir.path().join("golden.img");
    raw_image(&file, 1 << 20);
    let disks = daemon.get("/v1/disks");
    let uuid = |n: usize| disks["disks"][n]["uuid"].as_str().unwrap().to_owned();
    let uuids = [uuid(0), uuid(1)];
    for disk in &uuids {
        ok(&daemon, &["create", file.to_str().unwrap(), "--disk", disk, "--wait"]);
    }
    (daemon, uuids)
}

fn copies(image: &Value) -> Vec<String> {
    let copies = image["copies"].as_array().unwrap();
    copies.iter().map(|copy| copy["disk"].as_str().unwrap().to_owned()).collect()
}

fn files(daemon: &Daemon) -> Vec<PathBuf> {
    let folders = ["one", "two"].map(|disk| daemon.dir.path().join(disk).join("backing-images"));
    folders
        .iter()
        .flat_map(|dir| std::fs::read_dir(dir).unwrap())
        .map(|e| e.unwrap().path())
        .collect()
}

/// Waits for the event after which the image has so many copies.
fn until_copies(daemon: &Daemon, count: usize) -> Value {
    let done = |event: &Value| {
        event["object"]["name"] == "golden" && copies(&event["object"]).len() == count
    };
    daemon.events_until("", done).pop().unwrap()["object"].clone()
}

#[test]
fn by_hand_a_copy_goes_with_its_files_and_the_other_is_served() {
    let (daemon, [one, two]) = two_disks("");
    assert_eq!(files(&daemon).len(), 2);
    let both = daemon.cli(&["cleanup", "golden", "--disk", &one, "--disk", &two]);
    assert_eq!(both.status.code(), Some(3), "{}", stderr(&both));
    assert!(stderr(&both).contains("at least 1 must be left"), "{}", stderr(&both));
    ok(&daemon, &["cleanup", "golden", "--disk", &one]);
    let image = until_copies(&daemon, 1);
    assert_eq!(copies(&image), std::slice::from_ref(&two));
    assert_eq!(files(&daemon).len(), 1);
    let uri = ok(&daemon, &["attach", "golden"]);
    let size = Command::new("nbdinfo").args(["--size", uri.trim()]).output().unwrap();
    assert_eq!(stdout(&size).trim(), (1 << 20).to_string());
    let last = daemon.cli(&["cleanup", "golden", "--disk", &two]);
    assert!(stderr(&last).contains("has attachments"), "{}", stderr(&last));
}

#[test]
fn a_copy_goes_by_itself_but_not_while_a_client_is_connected() {
    let (daemon, _) = two_disks("");
    // A client without an attachment, connected until its input ends.
    let uri = daemon.get("/v1/images/golden")["nbd"]["uri"].as_str().unwrap().to_owned();
    let served = daemon.get("/v1/images/golden");
    let mut client = Command::new("nbdkit")
        .args(["-f", "-U", "-", "nbd", &format!("uri={uri}"), "--run"])
        .arg("nbdinfo --size $uri; cat")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    let mut output = std::io::BufReader::new(client.stdout.take().unwrap());
    std::io::BufRead::read_line(&mut output, &mut line).unwrap();
    assert_eq!(line.trim(), (1 << 20).to_string());
    let changed = ok(&daemon, &["settings", "--cleanup-wait", "0", "--json"]);
    assert!(changed.contains(r#""cleanup_wait_minutes":0"#), "{changed}");
    let left = until_copies(&daemon, 1);
    // Of the two the one that is being read is left.
    drop(client.stdin.take());
    client.wait().unwrap();
    assert_eq!(copies(&left).len(), 1);
    assert_eq!(left["nbd"], served["nbd"]);
    assert_eq!(files(&daemon).len(), 1);
}

#[test]
fn the_wait_is_configured_shown_and_changed_and_nonsense_is_refused() {
    let (daemon, _) = two_disks("cleanup_wait_minutes = 90\n");
    let settings = |daemon: &Daemon| daemon.get("/v1/settings")["cleanup_wait_minutes"].clone();
    assert_eq!(settings(&daemon), 90);
    assert_eq!(ok(&daemon, &["settings", "get", "cleanup_wait_minutes"]).trim(), "90");
    let shown = ok(&daemon, &["settings", "--cleanup-wait", "-1"]);
    let line = shown.lines().find(|line| line.starts_with("cleanup_wait_minutes")).unwrap();
    assert!(line.contains("never") && line.contains("90"), "{line}");
    assert_eq!(settings(&daemon), -1);
    for bad in [-2, 5_256_001] {
        let body = json!({ "cleanup_wait_minutes": bad }).to_string();
        assert_eq!(daemon.curl("PATCH", "/v1/settings", Some(&body)).0, 400, "{bad}");
    }
    let image = daemon.get("/v1/images/golden");
    assert!(image["copies"][0]["unused_since"].is_string(), "{image}");
    let workers = ok(&daemon, &["ps"]);
    for copy in image["copies"].as_array().unwrap() {
        let name = format!("golden-{}", &copy["disk"].as_str().unwrap()[..8]);
        assert!(workers.lines().any(|line| line.starts_with(&name) && line.contains("ready")));
    }
    ok(&daemon, &["attach", "golden", "--reader", "vm"]);
    let image = daemon.get("/v1/images/golden");
    let unused = |n: usize| image["copies"][n]["unused_since"].is_null();
    assert!(unused(0) || unused(1), "{image}");
}

#[test]
fn an_image_gets_its_minimum_of_copies_by_itself() {
    let disks = ["one", "two", "three"];
    let daemon = Daemon::start_on(tempfile::tempdir().unwrap(), &disks, "max_replenished = 0\n");
    let file = daemon.dir.path().join("golden.img");
    raw_image(&file, 1 << 20);
    let file = file.to_str().unwrap();
    ok(&daemon, &["create", file, "--min-copies", "2", "--wait"]);
    assert_eq!(copies(&daemon.get("/v1/images/golden")).len(), 1);
    // The file goes: what comes now comes from the copy.
    std::fs::remove_file(file).unwrap();
    ok(&daemon, &["settings", "set", "max_replenished=2"]);
    let ready = |count: usize| {
        move |event: &Value| {
            let copies = event["object"]["copies"].as_array();
            let is_ready = |copy: &&Value| copy["state"] == "ready";
            copies.is_some_and(|copies| copies.iter().filter(is_ready).count() == count)
        }
    };
    daemon.events_until("", ready(2));
    ok(&daemon, &["set", "golden", "--min-copies", "3"]);
    daemon.events_until("", ready(3));
    // There are no four disks: somebody hears of it.
    let asked = std::cell::Cell::new(false);
    let events = daemon.events_until("", |event| {
        if event["type"] == "snapshot.end" && !asked.replace(true) {
            ok(&daemon, &["set", "golden", "--min-copies", "4"]);
        }
        event["type"] == "image.warning"
    });
    let warning = events.last().unwrap().to_string();
    assert!(warning.contains("has 3 of its 4 copies, and no disk is ready"), "{warning}");
}

#[test]
fn three_copies_at_a_time_are_made_from_one_disk() {
    let config = "max_disk_copies = 1000\ndisk_copy_rate = 1\n";
    let daemon = Daemon::start_on(tempfile::tempdir().unwrap(), &["one", "two"], config);
    let disks = daemon.get("/v1/disks");
    let names: Vec<String> = (0..5).map(|n| format!("image-{n}")).collect();
    let file = |name: &str| daemon.dir.path().join(format!("{name}.img"));
    let want = |name: &str, disk: usize| {
        let uuid = disks["disks"][disk]["uuid"].as_str().unwrap();
        ok(&daemon, &["create", file(name).to_str().unwrap(), "--disk", uuid]);
    };
    for name in &names {
        raw_image(&file(name), 4 << 20);
        want(name, 0);
        daemon.wait_for(name, "ready");
    }
    // Told of all five at once, so that none of them can be done before the last is asked for.
    names.iter().for_each(|name| want(name, 1));
    let second = |name: &str| {
        let image = daemon.get(&format!("/v1/images/{name}"));
        let mut copies = image["copies"].as_array().unwrap().iter();
        copies.find(|copy| copy["disk"] == disks["disks"][1]["uuid"]).unwrap().clone()
    };
    let (mut copying, mut waiting) = (0, 0);
    while copying + waiting < names.len() {
        let copies: Vec<Value> = names.iter().map(|name| second(name)).collect();
        let begun = |copy: &&Value| copy["state"] == "in-progress";
        let waits = |copy: &&Value| copy["message"] == "waiting for its turn";
        waiting = copies.iter().filter(begun).filter(waits).count();
        copying = copies.iter().filter(begun).filter(|copy| !waits(copy)).count();
        assert!(copying <= 3, "{copies:?}");
    }
    assert_eq!((copying, waiting), (3, 2));
    ok(&daemon, &["settings", "set", "disk_copy_rate_bytes_per_s=0"]);
    let all_ready = |_: &Value| names.iter().all(|name| second(name)["state"] == "ready");
    daemon.events_until("", all_ready);
}
