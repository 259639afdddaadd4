//! Promise: transfers can be steered while they run, and a watcher sees what comes of it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use serde_json::Value;

use crate::content;
use crate::control_support::{Daemon, stderr, stdout};
use crate::fault_server::{FaultServer, Reply};

const LEN: usize = 12 << 20;
const ETAG: &str = "\"one\"";

/// About 16 MB/s and connection, or as fast as it goes once `fast` is set.
fn server(bytes: &[u8], fast: &Arc<AtomicBool>) -> FaultServer {
    let (served, fast) = (bytes.to_vec(), Arc::clone(fast));
    FaultServer::start(move |request| {
        let mut reply = Reply::ranged(request, &served, ETAG);
        if !fast.load(Ordering::SeqCst) {
            reply.pace = Duration::from_millis(4);
        }
        reply
    })
}

fn slow() -> Arc<AtomicBool> {
    Arc::new(AtomicBool::new(false))
}

fn run(daemon: &Daemon, args: &[&str]) -> String {
    let output = daemon.cli(args);
    assert!(output.status.success(), "{args:?}: {}\n{}", stderr(&output), daemon.log());
    stdout(&output)
}

fn done_of(event: &Value) -> u64 {
    event["object"]["copies"][0]["bytes_done"].as_u64().unwrap_or(0)
}

/// Knows `a` with a rate at which it lasts for seconds, so that there is time to steer it.
fn create_slowly(daemon: &Daemon, server: &FaultServer) {
    run(daemon, &["create", &format!("{}/a.img", server.url), "--name", "a"]);
    run(daemon, &["set", "a", "--rate", "3M"]);
}

/// Brings `a` in, slowly.
fn fetch_slowly(daemon: &Daemon, server: &FaultServer) {
    create_slowly(daemon, server);
    run(daemon, &["create", &format!("{}/a.img", server.url), "--name", "a", "--fetch"]);
}

/// Waits until some of the image has arrived.
fn some_of(daemon: &Daemon, image: &str) {
    daemon.events_until(&format!("?image={image}"), |event| done_of(event) >= 2 << 20);
}

fn data_file(daemon: &Daemon) -> Vec<u8> {
    let images = daemon.dir.path().join("disk/backing-images");
    let dir = images.read_dir().unwrap().next().unwrap().unwrap().path();
    std::fs::read(dir.join("backing")).unwrap()
}

#[test]
fn a_paused_transfer_stops_and_goes_on_with_what_is_missing() {
    let bytes = content(LEN, 61);
    let server = server(&bytes, &slow());
    let daemon = Daemon::start();
    fetch_slowly(&daemon, &server);
    some_of(&daemon, "a");
    assert!(run(&daemon, &["pause", "a"]).contains("paused"));
    daemon.wait_for("a", "pending");
    let asked = server.requests().len();
    let (_, image) = daemon.curl("GET", "/v1/images/a", None);
    assert_eq!(
        (&image["paused"], &image["copies"][0]["phase"]),
        (&Value::Bool(true), &Value::Null)
    );
    assert!(image["copies"][0]["message"].as_str().unwrap().contains("paused"));
    // A restart does not forget it.
    let (code, dir) = daemon.end("TERM");
    assert_eq!(code, Some(0));
    let daemon = Daemon::start_in(dir, "");
    assert_eq!(daemon.get("/v1/images/a")["paused"], Value::Bool(true));
    assert_eq!(server.requests().len(), asked, "nothing is asked for while it is paused");
    run(&daemon, &["resume", "a"]);
    daemon.wait_for("a", "ready");
    assert!(data_file(&daemon) == bytes);
    let first = server.requests()[asked].range.clone().unwrap();
    assert!(first.start >= 1 << 20, "it goes on at byte {}", first.start);
}

#[test]
fn a_rate_holds_and_a_new_one_is_heard_at_once() {
    let bytes = content(LEN, 62);
    let server = server(&bytes, &slow());
    let daemon = Daemon::start();
    run(&daemon, &["create", &format!("{}/a.img", server.url), "--name", "a"]);
    assert!(run(&daemon, &["set", "a", "--rate", "1K"]).contains("at most 1.0 KiB/s"));
    run(&daemon, &["create", &format!("{}/a.img", server.url), "--name", "a", "--fetch"]);
    // At 1 KiB a second the first chunk alone takes minutes: ten reports later it is still here.
    let reports = std::cell::Cell::new(0);
    let events = daemon.events_until("?image=a", |event| {
        reports.set(reports.get() + u32::from(event["type"] == "image.progress"));
        reports.get() >= 10
    });
    assert!(done_of(events.last().unwrap()) < 4 << 20, "{:?}", events.last());
    run(&daemon, &["settings", "--rate", "1K"]);
    run(&daemon, &["set", "a", "--rate", "0"]);
    assert_eq!(daemon.get("/v1/images/a")["copies"][0]["state"], "in-progress");
    assert!(run(&daemon, &["settings", "--rate", "0"]).contains("no limit"));
    daemon.wait_for("a", "ready");
    assert!(data_file(&daemon) == bytes);
}

#[test]
fn a_cancelled_transfer_leaves_nothing_but_is_refused_while_somebody_waits() {
    let bytes = content(LEN, 63);
    let server = server(&bytes, &slow());
    let daemon = Daemon::start();
    create_slowly(&daemon, &server);
    let id = run(&daemon, &["attach", "a", "--no-wait"]);
    some_of(&daemon, "a");
    let refused = daemon.cli(&["cancel", "a"]);
    assert_eq!(refused.status.code(), Some(3), "{}", stderr(&refused));
    run(&daemon, &["detach", id.trim()]);
    run(&daemon, &["cancel", "a"]);
    daemon.events_until("?image=a", |event| {
        event["object"]["copies"].as_array().is_some_and(Vec::is_empty)
    });
    let images = daemon.dir.path().join("disk/backing-images");
    assert_eq!(images.read_dir().unwrap().count(), 0, "its files are gone");
    run(&daemon, &["create", &format!("{}/a.img", server.url), "--name", "a", "--fetch"]);
    daemon.wait_for("a", "ready");
    assert!(data_file(&daemon) == bytes);
}

#[test]
fn the_most_urgent_waits_least() {
    let (first, second, third) = (content(LEN, 64), content(1 << 20, 65), content(1 << 20, 66));
    let [a, b, c] = [&first, &second, &third].map(|bytes| server(bytes, &slow()));
    let daemon = Daemon::start_in(tempfile::tempdir().unwrap(), "max_transfers = 1\n");
    fetch_slowly(&daemon, &a);
    some_of(&daemon, "a");
    for (name, server) in [("b", &b), ("c", &c)] {
        run(&daemon, &["create", &format!("{}/x", server.url), "--name", name, "--fetch"]);
    }
    daemon.events_until("?image=c", |event| {
        event["object"]["copies"][0]["message"].as_str().unwrap_or("").contains("its turn")
    });
    run(&daemon, &["set", "c", "--priority", "7"]);
    run(&daemon, &["set", "a", "--rate", "0"]);
    // b waits behind c, so c has all its bytes before b is asked for.
    daemon.wait_for("b", "ready");
    assert_eq!(daemon.get("/v1/images/c")["copies"][0]["state"], "ready");
    let order = [&a, &c, &b].map(|server| server.requests().len());
    assert!(order.iter().all(|&count| count > 0), "{order:?}");
    run(&daemon, &["settings", "--max-transfers", "3"]);
    assert_eq!(run(&daemon, &["settings", "get", "max_transfers"]).trim(), "3");
    let (status, problem) = daemon.curl("PATCH", "/v1/settings", Some(r#"{"max_transfers":0}"#));
    assert_eq!((status, &problem["error"]["code"]), (400, &Value::from("bad-request")));
}

#[test]
fn a_watcher_off_a_terminal_sees_lines_and_the_end() {
    let bytes = content(LEN, 67);
    let server = server(&bytes, &slow());
    let daemon = Daemon::start();
    fetch_slowly(&daemon, &server);
    let watched = daemon.cli(&["watch"]);
    assert!(watched.status.success());
    let text = stderr(&watched);
    assert!(text.contains("fetching") && text.contains("  ready"), "{text}");
    assert!(text.contains("nothing is under way") && !text.contains('\r'), "{text}");
    // Complete it was; open it is a moment later.
    daemon.wait_for("a", "ready");
    let watched = daemon.cli(&["watch", "a", "--json"]);
    assert!(watched.status.success());
    let line: Value = serde_json::from_str(stdout(&watched).lines().next().unwrap()).unwrap();
    assert_eq!(line["copy"]["state"], "ready");
    assert_eq!(daemon.cli(&["watch", "nobody"]).status.code(), Some(4));
}
