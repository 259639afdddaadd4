//! `run`, `export`, `cat` and `pull`: each half of the engine without a daemon of one's own.

#![expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod control_support;

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::Receiver;
use std::sync::{Arc, Mutex};

use control_support::{BEDPLATE, HalfServer, bedplate, clean, collect, raw_image, stderr, stdout};
use serde_json::Value;

/// A `bedplate` that serves until it is told to end.
struct Serving {
    child: Child,
    out: Arc<Mutex<String>>,
    err: Arc<Mutex<String>>,
    lines: Receiver<()>,
}

impl Serving {
    /// Starts it and waits until it says that it serves.
    fn start(args: &[&str]) -> Self {
        let mut command = Command::new(BEDPLATE);
        let command = clean(command.args(args)).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let (out, lines) = collect(child.stdout.take().unwrap(), "");
        let (err, ready) = collect(child.stderr.take().unwrap(), "serving until Ctrl-C");
        ready.recv().unwrap_or_else(|_| panic!("{args:?}: {}", err.lock().unwrap()));
        Self { child, out, err, lines }
    }

    /// What it has printed, once a line of that begins with `mark`.
    fn out_until(&self, mark: &str) -> String {
        loop {
            self.lines.recv().unwrap();
            let out = self.out.lock().unwrap().clone();
            if out.lines().any(|line| line.starts_with(mark)) {
                return out;
            }
        }
    }

    fn end(mut self, signal: &str) -> (Option<i32>, String, String) {
        let pid = self.child.id().to_string();
        assert!(Command::new("kill").args(["-s", signal, &pid]).status().unwrap().success());
        let code = self.child.wait().unwrap().code();
        (code, self.out.lock().unwrap().clone(), self.err.lock().unwrap().clone())
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        let _ended = self.child.kill();
        let _ended = self.child.wait();
    }
}

fn qcow2(dir: &Path) -> PathBuf {
    let (raw, file) = (dir.join("r.raw"), dir.join("Disk_1.qcow2"));
    raw_image(&raw, 5 << 20);
    let made = Command::new("qemu-img")
        .args(["convert", "-c", "-f", "raw", "-O", "qcow2"])
        .args([&raw, &file])
        .status();
    assert!(made.unwrap().success());
    file
}

fn same_bytes(uri: &str, file: &Path) {
    let compared =
        Command::new("qemu-img").args(["compare", "-f", "raw", uri]).arg(file).output().unwrap();
    assert!(compared.status.success(), "{}{}", stdout(&compared), stderr(&compared));
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

#[test]
fn run_brings_an_image_in_serves_it_and_a_second_run_serves_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let file = qcow2(dir.path());
    let (data, nbd) = (dir.path().join("data"), dir.path().join("n.sock"));
    let args = ["run", text(&file), "--data", text(&data), "--nbd", text(&nbd)];
    let first = Serving::start(&args);
    same_bytes(&format!("nbd+unix:///?socket={}", nbd.display()), &file);
    let uri = format!("nbd+unix:///disk-1?socket={}", nbd.display());
    same_bytes(&uri, &file);
    let (code, out, err) = first.end("INT");
    assert_eq!(code, Some(0), "{err}");
    for words in
        ["disk-1  qcow2  5.0 MiB virtual", "sha256:", &uri, "nbdinfo '", "qemu-img convert"]
    {
        assert!(out.contains(words), "{words}: {out}");
    }
    // What so small an image goes through may be over before the first look at it.
    assert!(err.contains("serving until Ctrl-C"), "{err}");
    assert!(!nbd.exists() && !data.join("bedplate/control.sock").exists());

    // The source is gone: the copy is all that the second run has.
    let kept = dir.path().join("kept.qcow2");
    std::fs::copy(&file, &kept).unwrap();
    std::fs::write(&file, b"something else").unwrap();
    let second = Serving::start(&args);
    same_bytes(&uri, &kept);
    let socket = data.join("bedplate/control.sock");
    let listed = bedplate(&["list", "--json", "--socket", text(&socket)]);
    let image: Value = serde_json::from_str(&stdout(&listed)).unwrap();
    assert_eq!(image["attachments"], 1);
    let (code, _, err) = second.end("TERM");
    assert_eq!(code, Some(0));
    assert!(!err.contains("fetching"), "{err}");
}

#[test]
fn the_printed_commands_work_as_they_stand() {
    let dir = tempfile::tempdir().unwrap();
    let file = qcow2(dir.path());
    let data = dir.path().join("da,ta");
    let serving = Serving::start(&["run", text(&file), "--data", text(&data)]);
    let out = serving.out_until("boot");
    let commands = out
        .lines()
        .filter_map(|line| line.get(9..))
        .filter(|command| ["nbdinfo", "qemu-img"].iter().any(|tool| command.starts_with(tool)));
    let mut ran = 0;
    for command in commands {
        let result =
            Command::new("sh").args(["-c", command]).current_dir(dir.path()).output().unwrap();
        assert!(result.status.success(), "{command}: {}", stderr(&result));
        ran += 1;
    }
    assert_eq!(ran, 3);
    let compared = Command::new("qemu-img")
        .args(["compare", "-f", "qcow2", "-F", "qcow2", text(&dir.path().join("copy.qcow2"))])
        .arg(&file)
        .output()
        .unwrap();
    assert!(compared.status.success(), "{}", stdout(&compared));
}

#[test]
fn an_interrupted_run_says_so_and_the_next_one_finishes() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("data");
    let source = HalfServer::start(vec![3; 2 << 20]);
    let args = ["run", &source.url, "--data", text(&data)];
    let mut command = Command::new(BEDPLATE);
    let mut child = clean(command.args(args)).stderr(Stdio::piped()).spawn().unwrap();
    let (err, fetching) = collect(child.stderr.take().unwrap(), "half  fetching");
    fetching.recv().unwrap();
    let pid = child.id().to_string();
    assert!(Command::new("kill").args(["-s", "INT", &pid]).status().unwrap().success());
    assert_eq!(child.wait().unwrap().code(), Some(130), "{}", err.lock().unwrap());
    source.go();
    source.go();
    let serving = Serving::start(&args);
    let (code, out, _) = serving.end("INT");
    assert_eq!(code, Some(0));
    assert!(out.contains("half  raw  2.0 MiB virtual"), "{out}");
}

#[test]
fn run_of_what_cannot_be_run_fails_at_once_and_starts_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("data");
    let broken = dir.path().join("broken.qcow2");
    std::fs::write(&broken, b"QFI\xfb\0\0\0\x09 not a header").unwrap();
    for (source, code, words) in [
        ("/no/such.img", 4, "no such file"),
        ("ftp://h/a.img", 2, "ftp"),
        (text(dir.path()), 1, "not a regular file"),
    ] {
        let output = bedplate(&["run", source, "--data", text(&data)]);
        assert_eq!(output.status.code(), Some(code), "{}", stderr(&output));
        assert!(stderr(&output).contains(words), "{}", stderr(&output));
        assert!(!data.exists());
    }
    let output = bedplate(&["run", text(&broken), "--data", text(&data)]);
    assert_eq!(output.status.code(), Some(1), "{}", stderr(&output));
    let left = std::fs::read_dir(data.join("backing-images")).unwrap().count();
    assert_eq!(left, 0, "a refused image leaves nothing");

    // Not even its name: the right file is taken under it.
    let good = dir.path().join("good.img");
    raw_image(&good, 4096);
    let args = ["run", text(&good), "--name", "broken", "--data", text(&data)];
    assert_eq!(Serving::start(&args).end("INT").0, Some(0));
    // And a name that is taken keeps what it names.
    let other = bedplate(&["run", "http://h.invalid/b", "--name", "broken", "--data", text(&data)]);
    assert_eq!(other.status.code(), Some(1), "{}", stderr(&other));
    assert!(stderr(&other).contains("another source"), "{}", stderr(&other));
    let images = std::fs::read_dir(data.join("backing-images")).unwrap().count();
    assert_eq!(images, 1);
}

#[test]
fn export_serves_a_file_under_its_name_and_as_the_default() {
    let dir = tempfile::tempdir().unwrap();
    let file = qcow2(dir.path());
    let nbd = dir.path().join("n.sock");
    let serving = Serving::start(&["export", text(&file), "--nbd", text(&nbd), "--json"]);
    same_bytes(&format!("nbd+unix:///?socket={}", nbd.display()), &file);
    let (code, out, _) = serving.end("TERM");
    assert_eq!(code, Some(0));
    let shown: Value = serde_json::from_str(out.trim()).unwrap();
    assert_eq!((&shown["name"], &shown["format"]), (&"disk-1".into(), &"qcow2".into()));
    assert!(!nbd.exists());
}

#[test]
fn cat_writes_the_bytes_that_a_guest_sees() {
    let dir = tempfile::tempdir().unwrap();
    let file = qcow2(dir.path());
    let raw = std::fs::read(dir.path().join("r.raw")).unwrap();
    assert!(bedplate(&["cat", text(&file)]).stdout == raw);
    let part = bedplate(&["cat", text(&file), "--offset", "1M", "--length", "3K"]);
    assert!(part.stdout == raw[1 << 20..(1 << 20) + 3072]);
    let tail = bedplate(&["cat", text(&file), "--offset", "5242879", "--length", "1G"]);
    assert!(tail.stdout == raw[raw.len() - 1..]);
    let as_is = bedplate(&["cat", text(&file), "--format", "raw"]);
    assert!(as_is.stdout == std::fs::read(&file).unwrap());
}

#[test]
fn pull_makes_a_plain_file_and_refuses_a_wrong_digest() {
    let dir = tempfile::tempdir().unwrap();
    let (source, file) = (dir.path().join("s.img"), dir.path().join("out.img"));
    raw_image(&source, 3_000_001);
    let output = bedplate(&["pull", text(&source), "-o", text(&file), "--json"]);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let pulled: Value = serde_json::from_str(&stdout(&output)).unwrap();
    assert_eq!(pulled["size_bytes"], 3_000_001);
    assert!(std::fs::read(&file).unwrap() == std::fs::read(&source).unwrap());

    let wrong = "1".repeat(64);
    let bad = dir.path().join("bad.img");
    let output = bedplate(&["pull", text(&source), "-o", text(&bad), "--sha256", &wrong]);
    assert_eq!(output.status.code(), Some(1), "{}", stderr(&output));
    let names: Vec<_> =
        std::fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(names.len(), 2, "only the source and the first output: {names:?}");
}

#[test]
fn pull_takes_the_place_of_no_device_pipe_or_directory_and_writes_none_called_dash() {
    let dir = tempfile::tempdir().unwrap();
    let place = |name: &str| dir.path().join(name);
    let (source, pipe, link) = (place("s.img"), place("pipe"), place("link"));
    raw_image(&source, 70_000);
    assert!(Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    std::os::unix::fs::symlink(&pipe, &link).unwrap();
    let before = std::fs::read_dir(dir.path()).unwrap().count();
    let nowhere = place("none/out.img");
    let cases = [
        (text(&pipe), 1, "not a regular file"),
        (text(&link), 1, "not a regular file"),
        (text(dir.path()), 1, "not a regular file"),
        ("-", 2, "-o ./-"),
        (text(&nowhere), 4, "none: no such directory"),
    ];
    for (output, code, words) in cases {
        let mut command = Command::new(BEDPLATE);
        command.args(["pull", text(&source), "-o", output]).current_dir(dir.path());
        let ended = clean(&mut command).output().unwrap();
        assert_eq!(ended.status.code(), Some(code), "{output}: {}", stderr(&ended));
        assert!(stderr(&ended).contains(words), "{output}: {}", stderr(&ended));
    }
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), before);
    let kind = std::fs::symlink_metadata(&pipe).unwrap().file_type();
    assert!(std::os::unix::fs::FileTypeExt::is_fifo(&kind));
}

#[test]
fn an_export_on_a_socket_in_use_may_be_tried_again() {
    let dir = tempfile::tempdir().unwrap();
    let (file, socket) = (dir.path().join("a.img"), dir.path().join("n.sock"));
    raw_image(&file, 4096);
    let serving = Serving::start(&["export", text(&file), "--nbd", text(&socket)]);
    let second = bedplate(&["export", text(&file), "--nbd", text(&socket)]);
    assert_eq!(second.status.code(), Some(3), "{}", stderr(&second));
    assert_eq!(serving.end("INT").0, Some(0));
    let no_socket = bedplate(&["export", text(&file), "--nbd", text(&file)]);
    assert_eq!(no_socket.status.code(), Some(1), "{}", stderr(&no_socket));
}

#[test]
fn a_data_directory_with_a_very_long_path_works() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("x".repeat(120));
    let file = dir.path().join("a.img");
    raw_image(&file, 4096);
    let serving = Serving::start(&["run", text(&file), "--data", text(&data)]);
    let out = serving.out_until("uri");
    let uri = out.lines().find_map(|line| line.strip_prefix("uri")).map(str::trim);
    same_bytes(uri.unwrap(), &file);
    assert_eq!(serving.end("INT").0, Some(0));
}
