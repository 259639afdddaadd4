//! Promise: an upload ends with the right bytes, whatever breaks on the way, and sends little twice.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::Value;

use crate::control_support::{BEDPLATE, Daemon, clean, stderr, stdout};
use crate::daemon::have;
use crate::{content, sha256};

const LEN: usize = (6 << 20) + 1234;
const MIB: usize = 1 << 20;

fn file(daemon: &Daemon, name: &str, bytes: &[u8]) -> PathBuf {
    let path = daemon.dir.path().join(name);
    std::fs::write(&path, bytes).unwrap();
    path
}

fn data_file(daemon: &Daemon) -> Vec<u8> {
    let images = daemon.dir.path().join("disk/backing-images");
    let dir = images.read_dir().unwrap().next().unwrap().unwrap().path();
    std::fs::read(dir.join("backing")).unwrap()
}

/// Makes the image known and wanted, and waits until its worker waits for bytes.
fn create(daemon: &Daemon, len: usize, more: &str) {
    let body = format!(r#"{{"name":"a","upload_bytes":{len}{more}}}"#);
    let (status, answer) = daemon.curl("POST", "/v1/images", Some(&body));
    assert_eq!(status, 201, "{answer}");
    assert_eq!(daemon.curl("POST", "/v1/images/a/fetch", None).0, 202);
    waiting(daemon);
}

fn waiting(daemon: &Daemon) {
    daemon.events_until("?image=a", |event| {
        event["object"]["copies"][0]["message"] == "waiting for its upload"
    });
}

/// One answer: status, headers in lower case, body.
#[derive(Debug)]
struct Answer {
    status: u16,
    head: String,
    body: Value,
}

impl Answer {
    fn header(&self, name: &str) -> Option<u64> {
        let line = self.head.lines().find_map(|l| l.strip_prefix(&format!("{name}: ")))?;
        line.trim().parse().ok()
    }

    fn offset(&self) -> u64 {
        self.header("upload-offset").unwrap_or_else(|| panic!("{self:?}"))
    }

    fn code(&self) -> &str {
        self.body["error"]["code"].as_str().unwrap_or("")
    }
}

fn parse(text: &str) -> Answer {
    // What comes before an interim answer's blank line is not the answer.
    let text = match text.strip_prefix("HTTP/1.1 100 Continue\r\n\r\n") {
        Some(rest) => rest,
        None => text,
    };
    let (head, body) = text.split_once("\r\n\r\n").unwrap_or_else(|| panic!("{text:?}"));
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    let body = serde_json::from_str(body).unwrap_or(Value::Null);
    Answer { status, head: head.to_ascii_lowercase(), body }
}

fn curl(daemon: &Daemon, args: &[&str]) -> Answer {
    let mut command = Command::new("curl");
    command.args(["-s", "-i", "--unix-socket"]).arg(&daemon.socket).args(args);
    let output = command.arg("http://localhost/v1/images/a/upload").output().unwrap();
    parse(&stdout(&output))
}

fn head(daemon: &Daemon) -> Answer {
    curl(daemon, &["-I"])
}

/// `curl -T` of a file that holds `bytes`, with one more header.
fn put(daemon: &Daemon, bytes: &[u8], header: &str) -> Answer {
    let part = file(daemon, "part", bytes);
    curl(daemon, &["-H", header, "-T", part.to_str().unwrap()])
}

/// A request that has begun: its head and `bytes`, and the connection.
fn begin(daemon: &Daemon, at: usize, len: usize, bytes: &[u8]) -> UnixStream {
    let mut stream = UnixStream::connect(&daemon.socket).unwrap();
    let head = format!(
        "PUT /v1/images/a/upload HTTP/1.1\r\nhost: x\r\nupload-offset: {at}\r\ncontent-length: {len}\r\n\r\n"
    );
    stream.write_all(head.as_bytes()).unwrap();
    stream.write_all(bytes).unwrap();
    stream
}

/// Waits until so many bytes have arrived.
fn until_offset(daemon: &Daemon, offset: usize) {
    while head(daemon).offset() < offset as u64 {
        std::thread::yield_now();
    }
}

/// Waits until nobody holds the writer's place.
fn until_free(daemon: &Daemon, offset: usize) {
    while put(daemon, b"", &format!("Upload-Offset: {offset}")).code() == "busy" {
        std::thread::yield_now();
    }
}

fn upload(daemon: &Daemon, path: &Path, more: &[&str]) -> std::process::Output {
    daemon.cli(&[&["upload", path.to_str().unwrap(), "--name", "a"], more].concat())
}

#[test]
fn a_file_is_uploaded_whole_and_the_same_command_again_is_done_at_once() {
    let bytes = content(LEN, 71);
    let daemon = Daemon::start();
    let path = file(&daemon, "a.img", &bytes);
    let digest = sha256(&bytes);
    for _ in 0..2 {
        let output = upload(&daemon, &path, &["--sha256", &digest, "--json"]);
        assert!(output.status.success(), "{}\n{}", stderr(&output), daemon.log());
        let image: Value = serde_json::from_str(&stdout(&output)).unwrap();
        assert_eq!(image["digests"]["sha256"], Value::from(digest.as_str()));
        assert_eq!((&image["upload_bytes"], &image["source"]), (&Value::from(LEN), &Value::Null));
    }
    assert!(data_file(&daemon) == bytes);
    let now = head(&daemon);
    assert_eq!(
        (now.status, now.offset(), now.header("upload-length")),
        (200, LEN as u64, Some(LEN as u64))
    );
    // A file of another length is another upload.
    let other = file(&daemon, "b.img", &bytes[..MIB]);
    let refused = upload(&daemon, &other, &[]);
    assert_eq!(refused.status.code(), Some(1), "{}", stderr(&refused));
}

#[test]
fn curl_brings_it_in_two_halves_and_a_wrong_offset_is_told_the_right_one() {
    let bytes = content(LEN, 72);
    let daemon = Daemon::start();
    create(&daemon, LEN, "");
    let now = head(&daemon);
    assert_eq!((now.status, now.offset()), (200, 0));
    assert!(now.head.contains("cache-control: no-store"), "{}", now.head);
    let half = 2 * MIB + 77;
    let first = put(&daemon, &bytes[..half], "Upload-Offset: 0");
    assert_eq!((first.status, first.offset()), (200, half as u64));
    assert_eq!(first.body, serde_json::json!({"offset": half, "length": LEN}));
    let wrong = put(&daemon, &bytes[..half], "Upload-Offset: 0");
    assert_eq!((wrong.status, wrong.code(), wrong.offset()), (409, "wrong-offset", half as u64));
    let range =
        |first: usize, total: usize| format!("Content-Range: bytes {first}-{}/{total}", LEN - 1);
    for header in [range(half, LEN + 1), range(half + 1, LEN), "X: y".to_owned()] {
        let refused = put(&daemon, &bytes[half..], &header);
        assert_eq!((refused.status, refused.code()), (400, "bad-request"), "{header}");
    }
    let last = put(&daemon, &bytes[half..], &range(half, LEN));
    assert_eq!((last.status, last.offset()), (200, LEN as u64), "{last:?}");
    daemon.wait_for("a", "ready");
    assert!(data_file(&daemon) == bytes);
}

#[test]
fn a_connection_that_is_cut_costs_nothing_that_has_arrived() {
    let bytes = content(LEN, 73);
    let daemon = Daemon::start();
    create(&daemon, LEN, "");
    let sent = 3 * MIB + 5;
    let stream = begin(&daemon, 0, LEN, &bytes[..sent]);
    until_offset(&daemon, sent);
    drop(stream);
    until_free(&daemon, sent);
    let now = head(&daemon);
    assert_eq!(now.offset(), sent as u64);
    let rest = put(&daemon, &bytes[sent..], &format!("Upload-Offset: {sent}"));
    assert_eq!(rest.status, 200, "{rest:?}");
    daemon.wait_for("a", "ready");
    assert!(data_file(&daemon) == bytes);
}

#[test]
fn a_second_writer_is_told_that_it_is_busy() {
    let bytes = content(LEN, 74);
    let daemon = Daemon::start();
    create(&daemon, LEN, "");
    let mut stream = begin(&daemon, 0, LEN, &bytes[..MIB]);
    until_offset(&daemon, MIB);
    let second = put(&daemon, &bytes[MIB..], &format!("Upload-Offset: {MIB}"));
    assert_eq!((second.status, second.code()), (409, "busy"));
    stream.write_all(&bytes[MIB..]).unwrap();
    daemon.wait_for("a", "ready");
    assert!(data_file(&daemon) == bytes);
}

#[test]
fn more_bytes_than_announced_are_refused() {
    let bytes = content(2 * MIB, 75);
    let daemon = Daemon::start();
    create(&daemon, MIB, "");
    let told = put(&daemon, &bytes, "Upload-Offset: 0");
    assert_eq!((told.status, told.code(), told.offset()), (413, "too-large", 0));
    let part = file(&daemon, "part", &bytes);
    let chunked = ["-H", "Upload-Offset: 0", "-H", "Transfer-Encoding: chunked"];
    let chunked = curl(&daemon, &[&chunked, ["-T", part.to_str().unwrap()].as_slice()].concat());
    assert_eq!((chunked.status, chunked.code()), (413, "too-large"));
    for body in [
        r#"{"name":"b","upload_bytes":0}"#,
        r#"{"name":"b"}"#,
        r#"{"name":"b","upload_bytes":1,"url":"http://h/a"}"#,
        r#"{"name":"b","upload_bytes":1,"layout":"raw"}"#,
        r#"{"upload_bytes":1}"#,
    ] {
        assert_eq!(daemon.curl("POST", "/v1/images", Some(body)).0, 400, "{body}");
    }
}

#[test]
fn a_wrong_digest_is_refused_and_nothing_is_kept() {
    let bytes = content(LEN, 76);
    let daemon = Daemon::start();
    let path = file(&daemon, "a.img", &bytes);
    let wrong = sha256(b"else");
    let output = upload(&daemon, &path, &["--sha256", &wrong]);
    assert_eq!(output.status.code(), Some(1), "{}", stderr(&output));
    assert!(stderr(&output).contains(&wrong), "{}", stderr(&output));
    let images = daemon.dir.path().join("disk/backing-images");
    assert_eq!(images.read_dir().unwrap().count(), 0, "its files are gone");
    let now = head(&daemon);
    assert_eq!(now.status, 409);
    assert!(now.head.contains("upload-problem: not-waiting"), "{}", now.head);
}

#[test]
fn an_upload_that_idles_holds_up_no_transfer() {
    let bytes = content(2 * MIB, 80);
    let daemon = Daemon::start_in(tempfile::tempdir().unwrap(), "max_transfers = 1\n");
    create(&daemon, LEN, "");
    assert_eq!(put(&daemon, &bytes[..MIB + 9], "Upload-Offset: 0").offset(), (MIB + 9) as u64);
    let path = file(&daemon, "b.img", &bytes);
    let url = format!("file://{}", path.display());
    let output = daemon.cli(&["create", &url, "--name", "b", "--wait"]);
    assert!(output.status.success(), "{}", stderr(&output));
    assert_eq!(head(&daemon).offset(), (MIB + 9) as u64);
}

#[test]
fn an_upload_that_is_cancelled_or_deleted_leaves_nothing() {
    let bytes = content(2 * MIB, 81);
    for command in ["cancel", "delete"] {
        let daemon = Daemon::start();
        create(&daemon, LEN, "");
        let stream = begin(&daemon, 0, LEN, &bytes);
        until_offset(&daemon, bytes.len());
        let output = daemon.cli(&[command, "a"]);
        assert!(output.status.success(), "{command}: {}", stderr(&output));
        // The writer is told, although it sends nothing.
        let mut text = String::new();
        (&stream).read_to_string(&mut text).unwrap();
        assert_eq!(parse(&text).code(), "stopped", "{command}: {text}");
        let images = daemon.dir.path().join("disk/backing-images");
        while images.read_dir().unwrap().count() > 0 {
            std::thread::yield_now();
        }
        assert_ne!(head(&daemon).status, 200, "{command}");
    }
}

#[test]
fn what_is_no_upload_or_is_wanted_nowhere_says_so() {
    let daemon = Daemon::start();
    assert_eq!(head(&daemon).status, 404);
    let body = r#"{"name":"a","upload_bytes":7}"#;
    assert_eq!(daemon.curl("POST", "/v1/images", Some(body)).0, 201);
    let early = put(&daemon, b"x", "Upload-Offset: 0");
    assert_eq!((early.status, early.code()), (409, "not-waiting"));
    assert!(early.body["error"]["hint"].as_str().unwrap().contains("fetch"), "{early:?}");
    assert_eq!(daemon.curl("DELETE", "/v1/images/a", None).0, 204);
    let body = r#"{"name":"a","url":"http://127.0.0.1:9/a"}"#;
    assert_eq!(daemon.curl("POST", "/v1/images", Some(body)).0, 201);
    let other = put(&daemon, b"x", "Upload-Offset: 0");
    assert_eq!((other.status, other.code()), (409, "not-an-upload"));
}

#[test]
fn a_killed_daemon_goes_on_with_what_is_durable_and_the_program_sends_only_the_rest() {
    let bytes = content(LEN, 77);
    let daemon = Daemon::start();
    create(&daemon, LEN, "");
    let sent = 4 * MIB + 9;
    let part = put(&daemon, &bytes[..sent], "Upload-Offset: 0");
    assert_eq!(part.status, 200);
    // A pause makes whole units durable; the kill then costs only what came after.
    assert!(daemon.cli(&["pause", "a"]).status.success());
    daemon.wait_for("a", "pending");
    assert!(daemon.cli(&["resume", "a"]).status.success());
    waiting(&daemon);
    let durable = head(&daemon).offset();
    assert!(durable >= (4 * MIB) as u64 && durable <= sent as u64, "{durable}");
    let from = usize::try_from(durable).unwrap();
    let stream = begin(&daemon, from, LEN - from, &bytes[from..sent + 100]);
    until_offset(&daemon, sent + 100);
    let (_, dir) = daemon.end("KILL");
    drop(stream);
    let daemon = Daemon::start_in(dir, "");
    waiting(&daemon);
    let now = head(&daemon).offset();
    assert!(now >= durable && now <= (sent + 100) as u64, "{now}, {durable} is durable");
    // What was durable is not sent again: the file that is given has other bytes there.
    let mut other = bytes.clone();
    other[..4 * MIB].fill(7);
    let path = file(&daemon, "a.img", &other);
    let output = upload(&daemon, &path, &["--no-digest"]);
    assert!(output.status.success(), "{}\n{}", stderr(&output), daemon.log());
    assert!(data_file(&daemon) == bytes);
}

#[test]
fn the_program_survives_a_daemon_that_restarts_under_it() {
    let bytes = content(LEN, 78);
    let daemon = Daemon::start();
    let path = file(&daemon, "a.img", &bytes);
    create(&daemon, LEN, "");
    assert!(daemon.cli(&["set", "a", "--rate", "2M"]).status.success());
    let mut command = Command::new(BEDPLATE);
    clean(&mut command).arg("--socket").arg(&daemon.socket);
    command.args(["upload", path.to_str().unwrap(), "--name", "a", "--no-digest"]);
    let child = command.stderr(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    until_offset(&daemon, MIB);
    let (_, dir) = daemon.end("KILL");
    let daemon = Daemon::start_in(dir, "");
    daemon.curl("PATCH", "/v1/images/a", Some(r#"{"rate_limit_bytes_per_s":0}"#));
    daemon.wait_for("a", "ready");
    assert!(data_file(&daemon) == bytes);
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{}", stderr(&output));
}

#[test]
fn a_qcow2_is_uploaded_judged_and_read() {
    if !have(&["qemu-img"]) {
        return;
    }
    let bytes = content(3 * MIB, 79);
    let daemon = Daemon::start();
    let raw = file(&daemon, "raw", &bytes);
    let qcow2 = daemon.dir.path().join("golden.qcow2");
    let made = Command::new("qemu-img")
        .args(["convert", "-f", "raw", "-O", "qcow2"])
        .args([&raw, &qcow2])
        .status()
        .unwrap();
    assert!(made.success());
    let output = daemon.cli(&["--json", "upload", qcow2.to_str().unwrap()]);
    assert!(output.status.success(), "{}", stderr(&output));
    let image: Value = serde_json::from_str(&stdout(&output)).unwrap();
    assert_eq!((&image["name"], &image["format"]), (&Value::from("golden"), &Value::from("qcow2")));
    assert_eq!(image["virtual_size_bytes"], Value::from(bytes.len()));
    let uri = image["nbd"]["uri"].as_str().unwrap();
    let back = daemon.dir.path().join("back");
    let read = Command::new("qemu-img")
        .args(["convert", "-f", "raw", "-O", "raw", uri])
        .arg(&back)
        .status()
        .unwrap();
    assert!(read.success());
    let mut read = Vec::new();
    std::fs::File::open(back).unwrap().read_to_end(&mut read).unwrap();
    assert!(read == bytes);
}

#[test]
fn another_file_of_the_same_length_does_not_end_what_one_began() {
    let daemon = Daemon::start();
    let temp = tempfile::tempdir().unwrap();
    let (first, second) = (temp.path().join("a.img"), temp.path().join("b.img"));
    std::fs::write(&first, content(3 << 20, 97)).unwrap();
    std::fs::write(&second, content(3 << 20, 98)).unwrap();
    let begun = upload(&daemon, &first, &[]);
    assert!(begun.status.success(), "{}", stderr(&begun));
    let other = upload(&daemon, &second, &[]);
    assert!(!other.status.success());
    assert!(stderr(&other).contains("sha256"), "{}", stderr(&other));
}
