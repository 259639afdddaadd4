//! A node that fails and returns, and a source that was wrong for a while: what a user sees.

#![expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod control_support;
mod nginx_support;

use std::process::Command;

use control_support::{Daemon, raw_image, stderr, stdout};
use nginx_support::{Nginx, have_nginx};
use serde_json::{Value, json};

const LEN: usize = 24 << 20;

fn ok(daemon: &Daemon, args: &[&str]) -> String {
    let output = daemon.cli(args);
    assert!(output.status.success(), "{args:?}: {}\n{}", stderr(&output), daemon.log());
    stdout(&output)
}

fn content() -> Vec<u8> {
    (0..LEN).map(|at| u8::try_from((at / 7 + (at >> 20)) % 251).unwrap() + 1).collect()
}

fn done(image: &Value) -> u64 {
    image["copies"][0]["bytes_done"].as_u64().unwrap_or(0)
}

fn can_be_read(uri: &str) -> bool {
    Command::new("nbdinfo").args(["--size", uri]).output().unwrap().status.success()
}

/// The data file of the image on the only disk.
fn file(daemon: &Daemon, image: &str) -> std::path::PathBuf {
    let images = daemon.dir.path().join("disk/backing-images");
    let mut dirs = images.read_dir().unwrap().map(|entry| entry.unwrap().path());
    let begins = format!("{image}-");
    dirs.find(|dir| dir.file_name().unwrap().to_str().unwrap().starts_with(&begins)).unwrap()
}

#[test]
fn a_node_that_fails_cuts_its_readers_off_and_returns_from_what_is_durable() {
    if !have_nginx() {
        return;
    }
    let bytes = content();
    let (nginx, daemon) = (Nginx::start(&bytes), Daemon::start());
    let golden = daemon.dir.path().join("golden.img");
    raw_image(&golden, 3 << 20);
    ok(&daemon, &["create", golden.to_str().unwrap(), "--name", "golden"]);
    ok(&daemon, &["volume", "create", "v", "--image", "golden"]);
    ok(&daemon, &["volume", "attach", "v"]);
    let uri = daemon.get("/v1/images/golden")["nbd"]["uri"].as_str().unwrap().to_owned();
    assert!(can_be_read(&uri));
    ok(&daemon, &["create", &nginx.url, "--name", "a"]);
    ok(&daemon, &["set", "a", "--rate", "2M"]);
    ok(&daemon, &["create", &nginx.url, "--name", "a", "--fetch"]);
    daemon.events_until("?image=a", |event| done(&event["object"]) >= 12 << 20);

    assert_eq!(ok(&daemon, &["node", "fail"]).trim(), "failed");
    let gone = daemon.get("/v1/images/a");
    let copy = &gone["copies"][0];
    assert_eq!(copy["state"], "failed");
    assert!(copy["message"].as_str().unwrap().contains("a drill"), "{copy}");
    let golden = daemon.get("/v1/images/golden");
    assert_eq!((&golden["copies"][0]["state"], &golden["nbd"]), (&json!("unknown"), &Value::Null));
    assert!(!can_be_read(&uri), "nobody reads on a node that is gone");
    let volume = daemon.get("/v1/volumes/v");
    let replica = &volume["replicas"][0];
    assert_eq!((&replica["state"], &replica["path"]), (&json!("waiting"), &Value::Null));
    assert_eq!(daemon.get("/v1/node")["state"], "failed");
    // What is asked for meanwhile is kept for later.
    assert_eq!(daemon.curl("POST", "/v1/images/a/fetch", None).0, 202);

    ok(&daemon, &["set", "a", "--rate", "0"]);
    assert_eq!(ok(&daemon, &["node", "return"]).trim(), "ready");
    let events =
        daemon.events_until("?image=a", |event| event["object"]["copies"][0]["state"] == "ready");
    let data = file(&daemon, "a").join("backing");
    assert!(std::fs::read(data).unwrap() == bytes, "{events:?}");
    let running = |event: &Value| {
        event["object"]["name"] == "v" && event["object"]["replicas"][0]["state"] == "running"
    };
    daemon.events_until("", running);
    assert!(can_be_read(&uri), "readers come back to the same place");
    // Then what was finished was read whole.
    daemon.events_until("?image=golden", |event| {
        event["object"]["copies"][0]["scrub"]["result"] == "good"
    });
    assert!(!daemon.log().contains("panicked"), "{}", daemon.log());
    let (_, _dir) = daemon.end("TERM");
    let sent = nginx.sent_bytes();
    assert!(sent < (LEN + LEN / 2) as u64, "what was durable came again: {sent} bytes");
}

#[test]
fn a_drill_ends_with_the_daemon() {
    let daemon = Daemon::start();
    let golden = daemon.dir.path().join("golden.img");
    raw_image(&golden, 1 << 20);
    ok(&daemon, &["create", golden.to_str().unwrap(), "--name", "a", "--fetch", "--wait"]);
    ok(&daemon, &["node", "fail"]);
    let (_, dir) = daemon.end("KILL");
    let daemon = Daemon::start_in(dir, "");
    assert_eq!(ok(&daemon, &["node", "get"]).trim(), "ready");
    daemon.wait_for("a", "ready");
}

#[test]
fn an_image_whose_source_was_gone_comes_by_itself_once_it_is_back() {
    if !have_nginx() {
        return;
    }
    let bytes = content();
    let (nginx, daemon) = (Nginx::start(&bytes), Daemon::start());
    nginx.hide();
    ok(&daemon, &["create", &nginx.url, "--name", "a", "--fetch"]);
    let refused = |event: &Value| event["object"]["copies"][0]["refused"] == true;
    daemon.events_until("?image=a", refused);
    nginx.show();
    let begun = std::cell::Cell::new(false);
    let events = daemon.events_until("?image=a", |event| {
        if event["type"] == "snapshot.end" && !begun.replace(true) {
            ok(&daemon, &["settings", "set", "recovery_wait_seconds=1"]);
        }
        event["object"]["copies"][0]["state"] == "ready"
    });
    let warning = events.iter().find(|event| event["type"] == "image.warning").unwrap();
    let message = warning["object"]["message"].as_str().unwrap();
    assert!(message.contains("404") && message.contains("started again on disk"), "{message}");
    assert!(std::fs::read(file(&daemon, "a").join("backing")).unwrap() == bytes);
}
