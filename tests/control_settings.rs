//! Settings: changed while the daemon runs, kept over a restart, wrong ones refused, put back.

mod control_support;

use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};

use control_support::{Daemon, stderr, stdout};
use serde_json::{Value, json};

fn ok(daemon: &Daemon, args: &[&str]) -> String {
    let output = daemon.cli(args);
    assert!(output.status.success(), "{args:?}: {}", stderr(&output));
    stdout(&output)
}

fn get(daemon: &Daemon, key: &str) -> String {
    ok(daemon, &["settings", "get", key]).trim().to_owned()
}

const CONFIG: &str = "cleanup_wait_minutes = 90\nrate_limit = 1000\n";

#[test]
fn what_is_set_outlives_the_daemon_wins_over_its_configuration_and_can_be_put_back() {
    let daemon = Daemon::start_in(tempfile::tempdir().unwrap(), CONFIG);
    assert_eq!(get(&daemon, "cleanup_wait_minutes"), "90");
    assert_eq!(get(&daemon, "recovery_wait_seconds"), "300");
    let pairs = ["cleanup_wait_minutes=7", "scrub_rate_bytes_per_s=2M", "max_disk_copies=2"];
    ok(&daemon, &[&["settings", "set"][..], &pairs].concat());
    let (code, dir) = daemon.end("KILL");
    assert_eq!(code, None);
    let daemon = Daemon::start_in(dir, CONFIG);
    assert_eq!(get(&daemon, "cleanup_wait_minutes"), "7");
    assert_eq!(get(&daemon, "scrub_rate_bytes_per_s"), (2 << 20).to_string());
    let all = daemon.get("/v1/settings");
    let set = ["max_disk_copies", "cleanup_wait_minutes", "scrub_rate_bytes_per_s"];
    assert_eq!(all["set"], json!(set));
    assert_eq!(
        (&all["rate_limit_bytes_per_s"], &all["max_disk_copies"]),
        (&json!(1000), &json!(2))
    );
    let table = ok(&daemon, &["settings", "reset", "cleanup_wait_minutes"]);
    let line = table.lines().find(|line| line.starts_with("cleanup_wait_minutes")).unwrap();
    assert_eq!(line.split_whitespace().nth(1), Some("90"), "{line}");
    let (_, dir) = daemon.end("TERM");
    let daemon = Daemon::start_in(dir, "cleanup_wait_minutes = 30\n");
    assert_eq!(get(&daemon, "cleanup_wait_minutes"), "30");
    assert_eq!(get(&daemon, "max_disk_copies"), "2");
}

#[test]
fn a_wrong_setting_is_refused_with_what_is_allowed_and_none_of_the_others_changes() {
    let daemon = Daemon::start();
    let before = daemon.get("/v1/settings");
    for (body, says) in [
        (r#"{"max_transfers":3,"colour":1}"#, "colour: no such setting; there are rate_limit"),
        (
            r#"{"max_transfers":3,"max_disk_copies":0}"#,
            "max_disk_copies: 0 is not usable; give 1 to 1000",
        ),
        (r#"{"max_transfers":3,"recovery_wait_seconds":-2}"#, "give 0 to 2592000, or -1"),
        (r#"{"max_transfers":"hunter2"}"#, "max_transfers: not usable; give 1 to 1000, or null"),
        (r#"{"max_transfers":3.5}"#, "give 1 to 1000"),
        (r#"{"scrub_rate_bytes_per_s":18446744073709551615}"#, "a whole number, 0 or more"),
        ("[1]", "does not read"),
    ] {
        let (status, answer) = daemon.curl("PATCH", "/v1/settings", Some(body));
        let text = answer["error"]["message"].as_str().unwrap();
        assert!(status == 400 && text.contains(says), "{body}: {status} {text}");
        assert!(!text.contains("hunter2"), "{text}");
    }
    assert_eq!(daemon.get("/v1/settings"), before);
    let output = daemon.cli(&["settings", "set", "max_transfers=0"]);
    assert!(stderr(&output).contains("give 1 to 1000"), "{}", stderr(&output));
    let output = daemon.cli(&["settings", "set", "colour=0"]);
    assert!(output.status.code() == Some(2) && stderr(&output).contains("scrub_rate"));
    assert_eq!(daemon.get("/v1/settings"), before);
}

#[test]
fn a_change_is_an_event_and_what_changes_nothing_is_none() {
    let daemon = Daemon::start();
    let mut curl = Command::new("curl")
        .args(["-sN", "--unix-socket", daemon.socket.to_str().unwrap()])
        .arg("http://localhost/v1/events")
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut changes = Vec::new();
    for line in BufReader::new(curl.stdout.take().unwrap()).lines() {
        let line = line.unwrap();
        let Some(data) = line.strip_prefix("data:") else { continue };
        let event: Value = serde_json::from_str(data).unwrap();
        if event["type"] == "snapshot.end" {
            ok(&daemon, &["settings", "set", "max_transfers=3"]);
            ok(&daemon, &["settings", "set", "max_transfers=3"]);
            ok(&daemon, &["settings", "set", "max_transfers=4"]);
        }
        if event["type"] == "settings.updated" {
            changes.push(event["object"]["max_transfers"].as_i64().unwrap());
        }
        if changes.last() == Some(&4) {
            break;
        }
    }
    curl.kill().unwrap();
    curl.wait().unwrap();
    assert_eq!(changes, [3, 4]);
}
