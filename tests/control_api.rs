//! The control socket, as `curl` sees it, on the real daemon.

#![expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod control_support;

use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::PermissionsExt;
use std::process::{Command, Stdio};

use control_support::{Daemon, HalfServer, curl, raw_image, stderr, stdout};
use serde_json::{Value, json};

fn image_body(daemon: &Daemon, file: &str) -> String {
    let path = daemon.dir.path().join(file);
    raw_image(&path, 1 << 20);
    json!({ "url": format!("file://{}", path.display()) }).to_string()
}

#[test]
fn the_life_of_an_image_from_create_to_delete() {
    let daemon = Daemon::start();
    let body = image_body(&daemon, "one.img");
    let (status, image) = daemon.curl("POST", "/v1/images", Some(&body));
    assert_eq!((status, &image["name"], &image["copies"]), (201, &json!("one"), &json!([])));
    assert_eq!(daemon.curl("POST", "/v1/images", Some(&body)).0, 200, "the same image again");

    let attach = r#"{"image":"one","reader":"test"}"#;
    let (status, held) = daemon.curl("POST", "/v1/attachments", Some(attach));
    assert_eq!(status, 201, "{held}");
    let image = daemon.wait_for("one", "ready");
    assert_eq!(image["virtual_size_bytes"], 1 << 20);
    let again = daemon.curl("POST", "/v1/attachments", Some(attach));
    assert_eq!(
        (again.0, &again.1["id"]),
        (200, &held["id"]),
        "the same label, the same attachment"
    );
    assert_eq!((&again.1["state"], &again.1["nbd"]["export"]), (&json!("ready"), &json!("one")));

    let uri = again.1["nbd"]["uri"].as_str().unwrap();
    let compared = Command::new("qemu-img")
        .args(["compare", "-f", "raw", "-F", "raw", uri])
        .arg(daemon.dir.path().join("one.img"))
        .output()
        .unwrap();
    assert!(compared.status.success(), "{}{}", stdout(&compared), stderr(&compared));

    let (status, refused) = daemon.curl("DELETE", "/v1/images/one", None);
    assert_eq!((status, &refused["error"]["code"]), (409, &json!("in-use")));
    let id = held["id"].as_str().unwrap();
    assert_eq!(daemon.curl("DELETE", &format!("/v1/attachments/{id}"), None).0, 204);
    assert_eq!(daemon.curl("GET", &format!("/v1/attachments/{id}"), None).0, 404);
    let (status, deleting) = daemon.curl("DELETE", "/v1/images/one", None);
    assert_eq!((status, &deleting["deleting"]), (202, &json!(true)));
    assert!(
        daemon.cli(&["delete", "one"]).status.code().is_some_and(|code| [0, 4].contains(&code))
    );
    assert_eq!(daemon.get("/v1/images"), json!({ "images": [] }));
    let left = std::fs::read_dir(daemon.dir.path().join("disk/backing-images")).unwrap().count();
    assert_eq!(left, 0, "no litter");
}

#[test]
fn an_image_with_an_open_nbd_session_is_not_deleted() {
    let daemon = Daemon::start();
    let (_, image) = daemon.curl("POST", "/v1/images", Some(&image_body(&daemon, "a.img")));
    assert_eq!(daemon.curl("POST", "/v1/images/a/fetch", None).0, 202, "{image}");
    let image = daemon.wait_for("a", "ready");
    let uri = image["nbd"]["uri"].as_str().unwrap();
    let mut reader = Command::new("qemu-io")
        .args(["-r", "-f", "raw", uri])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    reader.stdin.as_mut().unwrap().write_all(b"read 0 512\n").unwrap();
    let mut lines = BufReader::new(reader.stdout.take().unwrap()).lines();
    assert!(lines.any(|line| line.unwrap().contains("read 512/512")));
    let (status, answer) = daemon.curl("DELETE", "/v1/images/a", None);
    assert_eq!((status, &answer["error"]["code"]), (409, &json!("in-use")), "{answer}");
    drop(reader.stdin.take());
    assert!(reader.wait().unwrap().success());
}

#[test]
fn events_begin_with_everything_and_follow_a_copy_to_ready() {
    let daemon = Daemon::start();
    let mut body = vec![7u8; 4 << 20];
    body[0] = 1;
    let source = HalfServer::start(body);
    let create = json!({ "name": "half", "url": source.url }).to_string();
    daemon.curl("POST", "/v1/images", Some(&create));
    daemon.curl("POST", "/v1/attachments", Some(r#"{"image":"half"}"#));
    let progress = |event: &Value| {
        event["object"]["copies"][0]["bytes_done"].as_u64().is_some_and(|done| done > 0)
    };
    let events = daemon.events_until("", progress);
    let kinds: Vec<&str> = events.iter().map(|e| e["type"].as_str().unwrap()).collect();
    let snapshot = ["image.snapshot", "attachment.snapshot", "snapshot.end"];
    assert!(kinds.starts_with(&snapshot) || kinds == ["image.snapshot"], "{kinds:?}");
    let held = daemon.get("/v1/attachments")["attachments"][0].clone();
    assert_eq!((&held["state"], &held["nbd"]), (&json!("waiting"), &Value::Null));
    let copy = daemon.get("/v1/images/half")["copies"][0].clone();
    assert_eq!((&copy["state"], &copy["phase"]), (&json!("in-progress"), &json!("fetching")));
    assert_eq!(copy["bytes_total"], 4 << 20);

    // Another image's events stay out of a filtered stream.
    daemon.curl("POST", "/v1/images", Some(&image_body(&daemon, "other.img")));
    source.go();
    let ready = |event: &Value| event["object"]["copies"][0]["state"] == "ready";
    for event in daemon.events_until("?image=half", ready) {
        assert_ne!(event["object"]["name"], "other");
    }
}

#[test]
fn every_refusal_has_a_status_a_code_and_a_message() {
    let daemon = Daemon::start();
    daemon.curl("POST", "/v1/images", Some(r#"{"name":"a","url":"http://h.invalid/a"}"#));
    let digest =
        format!(r#"{{"name":"a","url":"http://h.invalid/a","sha256":"{}"}}"#, "z".repeat(64));
    let huge = daemon.dir.path().join("huge");
    std::fs::write(&huge, vec![b' '; 2 << 20]).unwrap();
    let huge = format!("@{}", huge.display());
    // Method, path, body; status, code and a part of the message.
    type Case<'a> = (&'a str, &'a str, Option<&'a str>, u16, &'a str, &'a str);
    let cases: &[Case] = &[
        ("GET", "/v1/nothing", None, 404, "no-such-route", "no such route"),
        ("PUT", "/v1/images", None, 405, "method-not-allowed", ""),
        ("GET", "/v1/images/nope", None, 404, "not-found", "image nope"),
        ("GET", "/v1/images/..%2Fetc", None, 400, "bad-request", "image name"),
        ("GET", "/v1/attachments/00000000", None, 404, "not-found", "00000000"),
        ("POST", "/v1/images", Some("{"), 400, "bad-request", "line 1"),
        ("POST", "/v1/images", Some(r#"{"url":1}"#), 400, "bad-request", "url: wrong type"),
        ("POST", "/v1/images", Some(r#"{"urll":""}"#), 400, "bad-request", "unknown field `urll`"),
        ("POST", "/v1/images", Some(r#"{"url":"ftp://h/a"}"#), 422, "refused-source", "ftp"),
        (
            "POST",
            "/v1/images",
            Some(r#"{"name":"../a","url":"http://h/a"}"#),
            400,
            "bad-request",
            "image name",
        ),
        ("POST", "/v1/images", Some(&digest), 400, "bad-request", "sha256"),
        ("POST", "/v1/images", Some(&huge), 413, "too-large", "1048576"),
        (
            "POST",
            "/v1/images",
            Some(r#"{"name":"a","url":"http://h.invalid/b"}"#),
            409,
            "name-taken",
            "another source",
        ),
        (
            "POST",
            "/v1/images/a/fetch",
            Some(r#"{"disk":"00000000-none"}"#),
            404,
            "not-found",
            "disk 00000000-none",
        ),
        ("POST", "/v1/attachments", Some(r#"{"image":"nope"}"#), 404, "not-found", "image nope"),
        ("POST", "/v1/attachments", Some("{}"), 400, "bad-request", "missing field `image`"),
        ("DELETE", "/v1/images/nope", None, 404, "not-found", "image nope"),
        ("GET", "/v1/events?imag=a", None, 400, "bad-request", "imag"),
    ];
    for (method, path, body, status, code, words) in cases {
        let (found, answer) = daemon.curl(method, path, *body);
        let error = &answer["error"];
        assert_eq!((found, error["code"].as_str()), (*status, Some(*code)), "{method} {path}");
        assert!(error["message"].as_str().unwrap().contains(words), "{method} {path}: {error}");
        assert!(error["hint"].is_string());
    }
}

#[test]
fn a_credential_is_in_no_answer_event_log_or_error() {
    let daemon = Daemon::start();
    let secret = "hunter2";
    // Nothing listens there, so the worker's errors are seen too.
    let url = format!("http://bob:{secret}@127.0.0.1:9/a.img?sig={secret}&{secret}#{secret}");
    let body = json!({ "name": "a", "url": url }).to_string();
    let mut seen = vec![curl(&daemon.socket, "POST", "/v1/images", Some(&body)).1];
    let other = json!({ "name": "a", "url": format!("http://x:{secret}@h/b") }).to_string();
    seen.push(curl(&daemon.socket, "POST", "/v1/images", Some(&other)).1);
    let bad = json!({ "url": format!("ht!tp://x:{secret}@h/b") }).to_string();
    seen.push(curl(&daemon.socket, "POST", "/v1/images", Some(&bad)).1);
    seen.push(curl(&daemon.socket, "POST", "/v1/attachments", Some(r#"{"image":"a"}"#)).1);
    let events = daemon.events_until("", |event| {
        event["object"]["copies"][0]["state"].as_str().is_some_and(|s| s.starts_with("failed"))
    });
    seen.push(format!("{events:?}"));
    for path in ["/v1/images", "/v1/images/a", "/v1/attachments", "/v1/doctor", "/metrics"] {
        seen.push(curl(&daemon.socket, "GET", path, None).1);
    }
    for args in [&["list"][..], &["get", "a"], &["list", "--json"], &["get", "a", "--json"]] {
        let output = daemon.cli(args);
        seen.push(stdout(&output) + &stderr(&output));
    }
    seen.push(daemon.log());
    for text in &seen {
        assert!(!text.contains(secret), "{text}");
    }
    assert!(seen[0].contains("http://***@127.0.0.1:9/a.img?sig=***&***"), "{}", seen[0]);
}

fn is_root() -> bool {
    let output = Command::new("id").arg("-u").output().unwrap();
    let root = stdout(&output).trim() == "0";
    if !root {
        println!("SKIPPED: needs root to become another user");
        assert!(std::env::var_os("REQUIRE_TOOLS").is_none());
    }
    root
}

/// `curl /healthz` as another user: status and body.
fn as_user(daemon: &Daemon, user: &[&str]) -> (bool, String) {
    let output = Command::new("setpriv")
        .args(user)
        .args(["curl", "-s", "--unix-socket"])
        .arg(&daemon.socket)
        .arg("http://localhost/healthz")
        .output()
        .unwrap();
    (output.status.success(), stdout(&output))
}

/// Lets other users come as far as the socket.
fn open_path(daemon: &Daemon, socket_mode: u32) {
    let chmod = |path: &std::path::Path, mode| {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
    };
    chmod(daemon.dir.path(), 0o755);
    chmod(&daemon.dir.path().join("disk"), 0o755);
    chmod(&daemon.socket, socket_mode);
}

#[test]
fn another_user_is_refused_by_the_mode_and_by_the_peer_check() {
    if !is_root() {
        return;
    }
    let daemon = Daemon::start();
    let mode = std::fs::metadata(&daemon.socket).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o660);
    let nobody = ["--reuid=65534", "--regid=65534", "--clear-groups"];
    open_path(&daemon, 0o660);
    assert!(!as_user(&daemon, &nobody).0, "the mode refuses");
    open_path(&daemon, 0o666);
    let (_, body) = as_user(&daemon, &nobody);
    let answer: Value = serde_json::from_str(&body).unwrap();
    assert_eq!(answer["error"]["code"], "forbidden", "the peer check refuses");
    assert!(daemon.get("/healthz")["status"] == "ok");
}

#[test]
fn a_configured_user_and_members_of_a_configured_group_are_let_in() {
    if !is_root() {
        return;
    }
    let config = "control_uids = [4242]\ncontrol_gids = [4343]\n";
    let daemon = Daemon::start_in(tempfile::tempdir().unwrap(), config);
    open_path(&daemon, 0o666);
    for (user, welcome) in [
        (["--reuid=4242", "--regid=65534", "--clear-groups"], true),
        (["--reuid=65534", "--regid=4343", "--clear-groups"], true),
        (["--reuid=65534", "--regid=65534", "--groups=4343"], true),
        (["--reuid=65534", "--regid=65534", "--groups=4344"], false),
    ] {
        let (_, body) = as_user(&daemon, &user);
        assert_eq!(body.contains("\"ok\""), welcome, "{user:?}: {body}");
    }
    // What lies in a directory would be taken for the node's own.
    let dir = daemon.dir.path().join("mine");
    std::fs::create_dir(&dir).unwrap();
    let disk = json!({ "path": dir }).to_string();
    let mut add = Command::new("setpriv");
    add.args(["--reuid=4242", "--regid=65534", "--clear-groups", "curl", "-s", "--unix-socket"]);
    add.arg(&daemon.socket).args(["-d", &disk, "-H", "content-type: application/json"]);
    let answer = stdout(&add.arg("http://localhost/v1/disks").output().unwrap());
    assert!(answer.contains("only root and the daemon's own user add disks"), "{answer}");
    assert_eq!(daemon.curl("POST", "/v1/disks", Some(&disk)).0, 201);
}

#[test]
fn a_terminated_daemon_ends_its_streams_and_leaves_no_socket() {
    let daemon = Daemon::start();
    let mut watcher = Command::new("curl")
        .args(["-sN", "--unix-socket"])
        .arg(&daemon.socket)
        .arg("http://localhost/v1/events")
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut first = [0u8; 1];
    std::io::Read::read_exact(watcher.stdout.as_mut().unwrap(), &mut first).unwrap();
    let socket = daemon.socket.clone();
    let (code, _dir) = daemon.end("TERM");
    assert_eq!(code, Some(0));
    assert!(watcher.wait().unwrap().success(), "the stream ended as it should");
    assert!(!socket.exists());
}

#[test]
fn after_a_kill_everything_is_as_it_was_and_stale_sockets_are_replaced() {
    let daemon = Daemon::start();
    daemon.curl("POST", "/v1/images", Some(&image_body(&daemon, "a.img")));
    daemon.curl("POST", "/v1/attachments", Some(r#"{"image":"a","reader":"vm"}"#));
    let before = daemon.wait_for("a", "ready");
    let (_, dir) = daemon.end("KILL");
    let daemon = Daemon::start_in(dir, "");
    let after = daemon.wait_for("a", "ready");
    for key in ["uuid", "digests", "created_at", "size_bytes", "attachments"] {
        assert_eq!(before[key], after[key], "{key}");
    }
    let held = &daemon.get("/v1/attachments")["attachments"][0];
    assert_eq!((&held["reader"], &held["state"]), (&json!("vm"), &json!("ready")));
}

#[test]
fn a_second_daemon_on_the_same_disk_is_refused() {
    let daemon = Daemon::start();
    let disk = daemon.dir.path().join("disk");
    let second = control_support::bedplate(&["serve", "--disk", disk.to_str().unwrap()]);
    assert_eq!(second.status.code(), Some(3), "{}", stderr(&second));
    assert!(stderr(&second).contains("disk"), "{}", stderr(&second));
    assert_eq!(daemon.get("/healthz")["status"], "ok");
}

#[test]
fn hundreds_of_silent_connections_do_not_keep_a_client_out() {
    let daemon = Daemon::start();
    let silent: Vec<_> = (0..200)
        .map(|_| std::os::unix::net::UnixStream::connect(&daemon.socket).unwrap())
        .collect();
    assert_eq!(daemon.get("/healthz")["status"], "ok");
    drop(silent);
}
