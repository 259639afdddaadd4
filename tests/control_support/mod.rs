//! What the tests of the control socket and of the CLI share: a real daemon in a directory of its
//! own, `curl`, and an HTTP source that stops in the middle until it is told to go on.

#![allow(dead_code, reason = "each test file uses a part")]
#![expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};

use serde_json::Value;

pub const BEDPLATE: &str = env!("CARGO_BIN_EXE_bedplate");

/// A running `bedplate` that is ended with the test.
pub struct Daemon {
    child: Child,
    pub dir: tempfile::TempDir,
    pub socket: PathBuf,
    pub stderr: Arc<Mutex<String>>,
}

impl Daemon {
    /// `bedplate serve` on one disk in a new directory.
    pub fn start() -> Self {
        Self::start_in(tempfile::tempdir().unwrap(), "")
    }

    /// `bedplate serve` in `dir`, with more lines in its configuration.
    pub fn start_in(dir: tempfile::TempDir, config: &str) -> Self {
        Self::start_on(dir, &["disk"], config)
    }

    /// `bedplate serve` on these disks in `dir`, with more lines in its configuration.
    pub fn start_on(dir: tempfile::TempDir, disks: &[&str], config: &str) -> Self {
        let disks: Vec<PathBuf> = disks.iter().map(|disk| dir.path().join(disk)).collect();
        disks.iter().for_each(|disk| std::fs::create_dir_all(disk).unwrap());
        let disk = disks[0].clone();
        let file = dir.path().join("bedplate.toml");
        // The sources of the tests are on this host.
        let config = format!("disks = {disks:?}\nallow_loopback = true\n{config}");
        std::fs::write(&file, config).unwrap();
        let mut command = Command::new(BEDPLATE);
        command.args(["serve", "-vv", "--config"]).arg(&file);
        let mut child = clean(&mut command).stderr(Stdio::piped()).spawn().unwrap();
        let (stderr, ready) = collect(child.stderr.take().unwrap(), "NBD socket:");
        let socket = disk.join("bedplate/control.sock");
        let text = stderr.clone();
        ready.recv().unwrap_or_else(|_| panic!("no daemon: {}", text.lock().unwrap()));
        Self { child, dir, socket, stderr }
    }

    /// `curl` with a method, a path and a body: status and JSON (null for none).
    pub fn curl(&self, method: &str, path: &str, body: Option<&str>) -> (u16, Value) {
        let (status, text) = curl(&self.socket, method, path, body);
        let json = if text.is_empty() { Value::Null } else { serde_json::from_str(&text).unwrap() };
        (status, json)
    }

    pub fn get(&self, path: &str) -> Value {
        let (status, json) = self.curl("GET", path, None);
        assert_eq!(status, 200, "{path}: {json}");
        json
    }

    /// `bedplate` as a client of this daemon.
    pub fn cli(&self, args: &[&str]) -> Output {
        bedplate(&[&["--socket", self.socket.to_str().unwrap()], args].concat())
    }

    /// Reads events until one is as wanted; the lines of all that were read.
    pub fn events_until(&self, query: &str, wanted: impl Fn(&Value) -> bool) -> Vec<Value> {
        let mut curl = Command::new("curl")
            .args(["-sN", "--unix-socket"])
            .arg(&self.socket)
            .arg(format!("http://localhost/v1/events{query}"))
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut seen = Vec::new();
        for line in BufReader::new(curl.stdout.take().unwrap()).lines() {
            let line = line.unwrap();
            let Some(data) = line.strip_prefix("data:") else { continue };
            seen.push(serde_json::from_str(data).unwrap());
            if wanted(seen.last().unwrap()) {
                break;
            }
        }
        curl.kill().unwrap();
        curl.wait().unwrap();
        assert!(seen.last().is_some_and(&wanted), "the stream ended before: {seen:?}");
        seen
    }

    /// Waits until the image's first copy is in this state.
    pub fn wait_for(&self, image: &str, state: &str) -> Value {
        let is = |event: &Value| event["object"]["copies"][0]["state"] == state;
        let events = self.events_until(&format!("?image={image}"), is);
        events.last().unwrap()["object"].clone()
    }

    pub fn signal(&self, name: &str) {
        let pid = self.child.id().to_string();
        assert!(Command::new("kill").args(["-s", name, &pid]).status().unwrap().success());
    }

    /// Ends it with this signal; the exit code, and the directory for another one.
    pub fn end(mut self, signal: &str) -> (Option<i32>, tempfile::TempDir) {
        self.signal(signal);
        let status = self.child.wait().unwrap();
        let dir = std::mem::replace(&mut self.dir, tempfile::tempdir().unwrap());
        (status.code(), dir)
    }

    pub fn log(&self) -> String {
        self.stderr.lock().unwrap().clone()
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ended = self.child.kill();
        let _ended = self.child.wait();
        if std::thread::panicking() {
            println!("the daemon's log:\n{}", self.log());
        }
    }
}

/// Gathers what `from` says, and tells once a line begins with `mark`.
pub fn collect(
    from: impl Read + Send + 'static,
    mark: &'static str,
) -> (Arc<Mutex<String>>, Receiver<()>) {
    let text = Arc::new(Mutex::new(String::new()));
    let (tx, rx) = channel();
    let sink = text.clone();
    std::thread::spawn(move || {
        for line in BufReader::new(from).lines() {
            let Ok(line) = line else { return };
            let ready = line.starts_with(mark);
            let mut sink = sink.lock().unwrap();
            sink.push_str(&line);
            sink.push('\n');
            drop(sink);
            if ready {
                let _gone = tx.send(());
            }
        }
    });
    (text, rx)
}

/// A command without the caller's environment that matters here.
pub fn clean(command: &mut Command) -> &mut Command {
    for name in ["BEDPLATE_SOCKET", "RUST_LOG", "NO_COLOR", "XDG_DATA_HOME", "XDG_RUNTIME_DIR"] {
        command.env_remove(name);
    }
    command
}

pub fn bedplate(args: &[&str]) -> Output {
    clean(Command::new(BEDPLATE).args(args)).output().unwrap()
}

pub fn stdout(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

pub fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

/// One request with curl: status and body.
pub fn curl(socket: &Path, method: &str, path: &str, body: Option<&str>) -> (u16, String) {
    let mut command = Command::new("curl");
    command.args(["-s", "-X", method, "-w", "\n%{http_code}", "--unix-socket"]).arg(socket);
    if let Some(body) = body {
        command.args(["-d", body]);
    }
    let output = command.arg(format!("http://localhost{path}")).output().unwrap();
    assert!(output.status.success(), "curl {method} {path}: {}", stderr(&output));
    let text = stdout(&output);
    let (body, status) = text.rsplit_once('\n').unwrap();
    (status.parse().unwrap(), body.to_owned())
}

/// A raw image of `len` bytes with a pattern in it.
pub fn raw_image(path: &Path, len: usize) {
    let bytes: Vec<u8> = (0..len).map(|at| u8::try_from(at / 7 % 251).unwrap() + 1).collect();
    std::fs::write(path, bytes).unwrap();
}

/// An HTTP server of one file that sends its first half, and the rest when it is told to.
pub struct HalfServer {
    pub url: String,
    go: Sender<()>,
}

impl HalfServer {
    pub fn start(body: Vec<u8>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}/half.img", listener.local_addr().unwrap());
        let (go, told) = channel();
        std::thread::spawn(move || {
            while let Ok((stream, _)) = listener.accept() {
                if answer(stream, &body, &told).is_err() {
                    continue;
                }
            }
        });
        Self { url, go }
    }

    pub fn go(&self) {
        self.go.send(()).unwrap();
    }
}

fn answer(mut stream: TcpStream, body: &[u8], told: &Receiver<()>) -> std::io::Result<()> {
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut line = String::new();
    while reader.read_line(&mut line)? > 2 {
        line.clear();
    }
    let (first, second) = body.split_at(body.len() / 2);
    let head = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n", body.len());
    stream.write_all(head.as_bytes())?;
    stream.write_all(first)?;
    let _never = told.recv();
    stream.write_all(second)
}
