//! The commands on a daemon, as a person or a script uses them.

#![expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod control_support;

use std::io::Read;
use std::process::{Command, Stdio};

use control_support::{BEDPLATE, Daemon, HalfServer, bedplate, clean, raw_image, stderr, stdout};
use serde_json::Value;

fn code(output: &std::process::Output) -> Option<i32> {
    output.status.code()
}

/// A daemon, and the path of an image file beside it.
fn daemon_and_file() -> (Daemon, String) {
    let daemon = Daemon::start();
    let file = daemon.dir.path().join("golden.img");
    raw_image(&file, 3 << 20);
    let file = file.to_str().unwrap().to_owned();
    (daemon, file)
}

#[test]
fn create_is_lazy_and_attach_brings_the_image_in() {
    let (daemon, file) = daemon_and_file();
    let created = daemon.cli(&["create", &file]);
    assert_eq!((code(&created), stdout(&created).trim()), (Some(0), "golden  not fetched"));
    let listed = stdout(&daemon.cli(&["list"]));
    assert!(listed.contains("NAME") && listed.contains("not fetched"), "{listed}");

    let attached = daemon.cli(&["attach", "golden", "--reader", "vm"]);
    assert_eq!(code(&attached), Some(0), "{}", stderr(&attached));
    let uri = stdout(&attached).trim().to_owned();
    let size = Command::new("nbdinfo").args(["--size", &uri]).output().unwrap();
    assert_eq!(stdout(&size).trim(), (3 << 20).to_string(), "{uri}");

    let got = stdout(&daemon.cli(&["get", "golden"]));
    assert!(got.contains("state         ready") && got.contains("3.0 MiB"), "{got}");
    let refused = daemon.cli(&["delete", "golden"]);
    assert_eq!(code(&refused), Some(3));
    assert!(stderr(&refused).contains("in use (attachments: 1"), "{}", stderr(&refused));
    assert_eq!(code(&daemon.cli(&["detach", "golden", "--reader", "vm"])), Some(0));
    assert_eq!(code(&daemon.cli(&["delete", "golden"])), Some(0));
    assert_eq!(code(&daemon.cli(&["get", "golden"])), Some(4));
}

#[test]
fn create_wait_returns_when_the_image_is_ready() {
    let (daemon, file) = daemon_and_file();
    let created = daemon.cli(&["create", &file, "--name", "x", "--wait", "--json"]);
    let image: Value = serde_json::from_str(&stdout(&created)).unwrap();
    assert_eq!((&image["name"], &image["copies"][0]["state"]), (&"x".into(), &"ready".into()));
    let sum = Command::new("sha256sum").arg(&file).output().unwrap();
    let digest = image["digests"]["sha256"].as_str().unwrap();
    assert!(stdout(&sum).starts_with(digest));
}

#[test]
fn a_wrong_digest_ends_the_wait_with_one_clear_error_and_no_litter() {
    let (daemon, file) = daemon_and_file();
    let wrong = "0".repeat(64);
    let created = daemon.cli(&["create", &file, "--sha256", &wrong, "--wait"]);
    assert_eq!(code(&created), Some(1));
    assert!(stderr(&created).contains(&wrong), "{}", stderr(&created));
    assert_eq!(daemon.get("/v1/images/golden")["copies"][0]["state"], "failed-and-cleanup");
    let images = daemon.dir.path().join("disk/backing-images");
    assert_eq!(std::fs::read_dir(images).unwrap().count(), 0);
}

#[test]
fn json_is_one_object_a_line() {
    let (daemon, file) = daemon_and_file();
    for name in ["b", "a"] {
        daemon.cli(&["create", &file, "--name", name]);
    }
    let names: Vec<String> = stdout(&daemon.cli(&["list", "--json"]))
        .lines()
        .map(|line| serde_json::from_str::<Value>(line).unwrap()["name"].to_string())
        .collect();
    assert_eq!(names, ["\"a\"", "\"b\""]);
    let disks = stdout(&daemon.cli(&["disks", "--json"]));
    let disk: Value = serde_json::from_str(disks.trim()).unwrap();
    assert_eq!(disk["healthy"], true);
}

#[test]
fn a_source_on_stdin_keeps_a_secret_off_the_command_line() {
    let daemon = Daemon::start();
    let mut command = Command::new(BEDPLATE);
    command.arg("--socket").arg(&daemon.socket).args(["create", "-", "--json"]);
    let mut child =
        clean(&mut command).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let url = b"https://u:hunter2@h.invalid/a.img?k=hunter2\n";
    std::io::Write::write_all(&mut child.stdin.take().unwrap(), url).unwrap();
    let out = stdout(&child.wait_with_output().unwrap());
    assert!(out.contains("https://***@h.invalid/a.img?k=***"), "{out}");
}

#[test]
fn events_are_printed_as_they_happen_and_end_with_the_daemon() {
    let daemon = Daemon::start();
    let source = HalfServer::start(vec![9; 1 << 20]);
    daemon.cli(&["create", &source.url, "--fetch"]);
    let mut command = Command::new(BEDPLATE);
    command.arg("--socket").arg(&daemon.socket).args(["events", "-w", "--json"]);
    let mut child = clean(&mut command).stdout(Stdio::piped()).spawn().unwrap();
    // It follows before anything happens.
    let (text, ready) = control_support::collect(child.stdout.take().unwrap(), "{\"id\":");
    ready.recv().unwrap();
    source.go();
    daemon.wait_for("half", "ready");
    daemon.end("TERM");
    assert_eq!(child.wait().unwrap().code(), Some(3));
    let text = text.lock().unwrap().clone();
    assert!(text.lines().all(|line| serde_json::from_str::<Value>(line).is_ok()), "{text}");
    assert!(text.contains("snapshot.end"), "{text}");
}

#[test]
fn what_has_happened_is_told_later_with_its_reasons() {
    let (daemon, file) = daemon_and_file();
    let digest = "a".repeat(64);
    let made = daemon.cli(&["create", &file, "--name", "lost", "--fetch", "--sha256", &digest]);
    assert_eq!(code(&made), Some(0), "{}", stderr(&made));
    daemon.events_until("?image=lost", |event| {
        let state = event["object"]["copies"][0]["state"].as_str();
        state.is_some_and(|state| state.starts_with("failed"))
    });
    daemon.cli(&["create", &file, "--name", "good", "--wait"]);
    let told = |args: &[&str]| {
        let output = daemon.cli(args);
        assert_eq!(code(&output), Some(0), "{args:?}: {}", stderr(&output));
        stdout(&output)
    };
    let all = told(&["events"]);
    let reason =
        |line: &str| line.contains("lost") && line.contains("SHA-256") && line.contains(&digest);
    assert!(all.lines().any(reason) && all.contains("image.created"), "{all}");
    assert!(all.lines().all(|line| line.starts_with("20") && !line.contains("snapshot")), "{all}");
    let one = told(&["events", "--image", "good", "--json"]);
    let states: Vec<String> = one
        .lines()
        .map(|line| {
            let event: Value = serde_json::from_str(line).unwrap();
            assert!(event["object"]["name"] == "good" && event["at"].is_string(), "{line}");
            event["object"]["copies"][0]["state"].to_string()
        })
        .collect();
    assert_eq!(states.last().unwrap(), "\"ready\"", "{one}");
    // It ends at what is kept, however much has happened.
    for number in 0..300 {
        daemon.cli(&["set", "good", "--priority", &(number % 7).to_string()]);
    }
    assert_eq!(told(&["events"]).lines().count(), 256);
}

#[test]
fn a_closed_pipe_is_success() {
    let (daemon, file) = daemon_and_file();
    daemon.cli(&["create", &file]);
    for args in [&["events", "-w"][..], &["cat", &file]] {
        let mut command = Command::new(BEDPLATE);
        command.arg("--socket").arg(&daemon.socket).args(args);
        let mut child =
            clean(&mut command).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let mut out = child.stdout.take().unwrap();
        out.read_exact(&mut [0; 8]).unwrap();
        drop(out);
        // So that `events` has something to print.
        daemon.cli(&["create", &file, "--name", "more"]);
        let output = child.wait_with_output().unwrap();
        assert_eq!(code(&output), Some(0), "{args:?}: {}", stderr(&output));
        assert_eq!(stderr(&output), "", "{args:?}");
    }
}

#[test]
fn without_a_daemon_commands_say_so_and_doctor_works() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("none.sock");
    let socket = socket.to_str().unwrap();
    let listed = bedplate(&["list", "--socket", socket]);
    assert_eq!(code(&listed), Some(3));
    assert!(stderr(&listed).contains("no daemon listens here"), "{}", stderr(&listed));
    let disk = dir.path().to_str().unwrap();
    let healthy = bedplate(&["doctor", "--socket", socket, "--disk", disk]);
    assert_eq!(code(&healthy), Some(0), "{}", stdout(&healthy));
    assert!(stdout(&healthy).contains("warn  daemon: "), "{}", stdout(&healthy));
    let missing = format!("{disk}/missing");
    let sick = bedplate(&["doctor", "--socket", socket, "--disk", &missing]);
    assert_eq!(code(&sick), Some(1));
    assert!(stdout(&sick).contains("is not a directory"), "{}", stdout(&sick));
}

#[test]
fn exit_codes_tell_usage_from_refusal_from_not_found() {
    let (daemon, file) = daemon_and_file();
    let text = daemon.dir.path().join("bad.toml");
    std::fs::write(&text, "disks = []\nbogus = 1\n").unwrap();
    let text = text.to_str().unwrap();
    let cases: &[(&[&str], i32, &str)] = &[
        (&["nonsense"], 2, "nonsense"),
        (&["get", "Not_A_Name"], 2, "a-z, 0-9"),
        (&["create", "ftp://h/x"], 2, "ftp"),
        (&["create", "/no/such/file"], 4, "no such file"),
        (&["create", "/dev"], 1, "not a regular file"),
        (&["create", &file, "--sha256", "abc"], 2, "64 hex digits"),
        (&["create", "http://h/a.img", "--mirror", "http://i/a.img"], 2, "--checksum-url"),
        (&["pull", "http://h/a.img", "-o", "a", "--mirror", "http://i/a.img"], 2, "--sha256"),
        (&["create", ""], 2, "the source is empty"),
        (&["set", "golden"], 2, "--min-copies"),
        (&["disk", "set", "x"], 2, "--evict"),
        (&["disk", "add", "/no/such/dir", "--tag", "a b"], 2, "a tag has"),
        (&["attach", "nope"], 4, "image nope"),
        (&["detach", "00000000"], 4, "00000000"),
        (&["detach", "zz"], 2, "attachment"),
        (&["cat", &file, "--offset", "1T"], 1, "past the end"),
        (&["cat", "/no/such"], 4, "no such file"),
        (&["cat", &file, "--format", "qcow2"], 1, "qcow2"),
        (&["serve", "--config", text], 2, "bogus"),
        (&["serve", "--disk", "/no/such/dir"], 1, "not a directory"),
    ];
    for (args, want, words) in cases {
        let output = daemon.cli(args);
        assert_eq!(code(&output), Some(*want), "{args:?}: {}", stderr(&output));
        assert!(stderr(&output).contains(words), "{args:?}: {}", stderr(&output));
        assert_eq!(stdout(&output), "", "{args:?}");
    }
}

#[test]
fn a_disk_is_named_by_uuid_its_beginning_or_its_path_wherever_one_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("golden.img");
    raw_image(&file, 1 << 20);
    let file = file.to_str().unwrap().to_owned();
    let daemon = Daemon::start_on(dir, &["a", "b"], "");
    let disks = daemon.get("/v1/disks")["disks"].as_array().unwrap().clone();
    let uuid = |n: usize| disks[n]["uuid"].as_str().unwrap();
    let path = disks[1]["path"].as_str().unwrap();
    let ok = |args: &[&str]| {
        let output = daemon.cli(args);
        assert_eq!(code(&output), Some(0), "{args:?}: {}", stderr(&output));
        stdout(&output)
    };
    ok(&["create", &file, "--disk", &uuid(0)[..13], "--wait"]);
    ok(&["attach", "golden", "--disk", path, "--reader", "vm"]);
    ok(&["scrub", "golden", "--disk", path, "--wait"]);
    ok(&["upload", &file, "--name", "up", "--disk", path, "-q"]);
    ok(&["detach", "golden", "--reader", "vm"]);
    ok(&["cleanup", "golden", "--disk", &uuid(0)[..13]]);
    ok(&["volume", "create", "v", "--image", "golden", "--disk", path]);
    let copies = |name: &str| daemon.get(&format!("/v1/images/{name}"))["copies"].clone();
    assert_eq!((&copies("up")[0]["disk"], copies("up")[1].is_null()), (&uuid(1).into(), true));
    // A disk that is none leaves no image behind; an empty name is not the only disk.
    let lost = daemon.cli(&["create", &file, "--name", "lost", "--disk", "/no/disk"]);
    assert_eq!(code(&lost), Some(4), "{}", stderr(&lost));
    assert_eq!(code(&daemon.cli(&["get", "lost"])), Some(4));
    drop(daemon);
    let daemon = Daemon::start();
    for args in [&["disk", "set", "", "--evict", "yes"][..], &["disk", "remove", ""]] {
        let refused = daemon.cli(args);
        assert_eq!(code(&refused), Some(2), "{args:?}: {}", stderr(&refused));
    }
    let disk = daemon.get("/v1/disks")["disks"][0].clone();
    assert_eq!((&disk["evicting"], &disk["healthy"]), (&false.into(), &true.into()));
}

#[test]
fn get_shows_who_reads_and_what_was_set() {
    let (daemon, file) = daemon_and_file();
    daemon.cli(&["create", &file]);
    daemon.cli(&["set", "golden", "--rate", "20M", "--priority", "7"]);
    daemon.cli(&["attach", "golden", "--reader", "vm-7"]);
    let nameless = daemon.cli(&["attach", "golden", "--no-wait"]);
    let refused = daemon.cli(&["delete", "golden"]);
    assert!(stderr(&refused).contains("`bedplate get"), "{}", stderr(&refused));
    let got = stdout(&daemon.cli(&["get", "golden"]));
    let line = |words: &str| got.lines().any(|line| line.contains(words));
    assert!(line("priority      7") && line("rate          at most 20.0 MiB/s"), "{got}");
    assert!(line("  vm-7  ") && line(stdout(&nameless).trim()), "{got}");
    // The replicas of a volume are readers, too.
    daemon.cli(&["volume", "create", "vol", "--image", "golden"]);
    daemon.cli(&["volume", "attach", "vol", "-q"]);
    let got = stdout(&daemon.cli(&["get", "golden"]));
    assert!(
        got.lines().any(|line| line.contains("vol-r-") && line.contains("volume vol")),
        "{got}"
    );
    let usage = daemon.cli(&["set", "golden", "--priority", "101"]);
    assert!(!stderr(&usage).contains("/v1/"), "{}", stderr(&usage));
}

#[test]
fn a_daemon_is_told_apart_from_one_whose_disk_is_missing() {
    let dir = tempfile::tempdir().unwrap();
    let daemon = Daemon::start_on(dir, &["a", "b"], "");
    let well = daemon.cli(&["doctor"]);
    assert_eq!(code(&well), Some(0), "{}", stdout(&well));
    let (_, dir) = daemon.end("TERM");
    let (b, away) = (dir.path().join("b"), dir.path().join("away"));
    std::fs::rename(&b, &away).unwrap();
    let daemon = Daemon::start_on(dir, &["a", "b"], "");
    let sick = daemon.cli(&["doctor"]);
    let text = stdout(&sick);
    assert_eq!(code(&sick), Some(1), "{text}");
    let fails = text.lines().find(|line| line.starts_with("fail")).unwrap();
    assert!(fails.contains("/b: the disk is not there; mount it again"), "{text}");
    // One that was added while it runs is looked at, too.
    let more = daemon.dir.path().join("more");
    std::fs::create_dir(&more).unwrap();
    daemon.cli(&["disk", "add", more.to_str().unwrap()]);
    let text = stdout(&daemon.cli(&["doctor"]));
    assert!(text.contains("more: writable: yes"), "{text}");
}

#[test]
fn a_complete_copy_is_complete_in_numbers_after_a_restart() {
    let (daemon, file) = daemon_and_file();
    daemon.cli(&["create", &file, "--wait"]);
    let (_, dir) = daemon.end("TERM");
    let daemon = Daemon::start_in(dir, "");
    let copy = daemon.wait_for("golden", "ready")["copies"][0].clone();
    let len = Value::from(3 << 20);
    assert_eq!((&copy["bytes_done"], &copy["bytes_total"]), (&len, &len), "{copy}");
}

#[test]
fn sockets_are_told_by_their_whole_path_wherever_the_daemon_was_started() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::create_dir(dir.path().join("disk")).unwrap();
    let mut command = Command::new(BEDPLATE);
    command
        .current_dir(dir.path())
        .args(["serve", "--disk", "disk", "--socket", "c", "--nbd", "n"]);
    let mut child = clean(&mut command).stderr(Stdio::piped()).spawn().unwrap();
    let (said, ready) = control_support::collect(child.stderr.take().unwrap(), "NBD socket:");
    ready.recv().unwrap();
    let said = said.lock().unwrap().clone();
    let _ended = child.kill();
    child.wait().unwrap();
    for (what, name) in [("control socket: ", "c"), ("NBD socket:     ", "n")] {
        let whole = format!("{what}{}", dir.path().join(name).display());
        assert!(said.lines().any(|line| line == whole), "{whole}: {said}");
    }
    let nothing = bedplate(&["serve"]);
    assert_eq!(code(&nothing), Some(2));
    assert!(stderr(&nothing).contains("--disk <DIR>"), "{}", stderr(&nothing));
}

#[test]
fn an_attachment_that_waits_in_vain_is_told_and_can_be_let_go() {
    let (daemon, file) = daemon_and_file();
    daemon.cli(&["create", &file, "--sha256", &"0".repeat(64)]);
    let refused = daemon.cli(&["attach", "golden"]);
    assert_eq!(code(&refused), Some(1), "{}", stderr(&refused));
    let told = stderr(&refused);
    let id = told.lines().find_map(|line| line.strip_prefix("attached as ")?.get(..8));
    assert_eq!(code(&daemon.cli(&["detach", id.unwrap()])), Some(0), "{told}");
}

#[test]
fn watching_ends_as_what_is_watched_did() {
    let (daemon, file) = daemon_and_file();
    let wrong = "0".repeat(64);
    daemon.cli(&["create", &file, "--name", "bad", "--sha256", &wrong, "--fetch"]);
    let watched = daemon.cli(&["watch", "bad"]);
    assert_eq!(code(&watched), Some(1), "{}", stderr(&watched));
    assert!(stderr(&watched).contains(&wrong), "{}", stderr(&watched));
    // Of all images the answer is that nothing is under way.
    assert_eq!(code(&daemon.cli(&["watch"])), Some(0));
    let source = HalfServer::start(vec![9; 1 << 20]);
    daemon.cli(&["create", &source.url, "--fetch"]);
    let mut command = Command::new(BEDPLATE);
    command.arg("--socket").arg(&daemon.socket).args(["watch", "--json"]);
    let mut child = clean(&mut command).stdout(Stdio::piped()).spawn().unwrap();
    let (_, ready) = control_support::collect(child.stdout.take().unwrap(), "{");
    ready.recv().unwrap();
    let pid = child.id().to_string();
    assert!(Command::new("kill").args(["-s", "INT", &pid]).status().unwrap().success());
    assert_eq!(child.wait().unwrap().code(), Some(130));
    source.go();
}
