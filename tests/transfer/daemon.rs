//! A real daemon on one disk, and the program as its client.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::{Arc, Mutex};

use serde_json::Value;

use crate::control_support::{BEDPLATE, clean, collect, curl, stderr, stdout};

/// A running `bedplate serve`, ended with the test.
pub struct Daemon {
    child: Child,
    pub disk: PathBuf,
    socket: PathBuf,
    log: Arc<Mutex<String>>,
}

impl Daemon {
    /// `bedplate serve --disk DIR/disk --socket DIR/c.sock`, once it answers; `prepare` may change
    /// how the process is started.
    pub fn start(dir: &Path, prepare: impl FnOnce(&mut Command)) -> Self {
        let (disk, socket) = (dir.join("disk"), dir.join("c.sock"));
        std::fs::create_dir_all(&disk).unwrap();
        let mut command = Command::new(BEDPLATE);
        command
            .args(["serve", "--allow-loopback", "--disk"])
            .arg(&disk)
            .arg("--socket")
            .arg(&socket);
        prepare(clean(&mut command));
        let mut child = command.stderr(Stdio::piped()).spawn().unwrap();
        let (log, ready) = collect(child.stderr.take().unwrap(), "NBD socket:");
        ready.recv().unwrap_or_else(|_| panic!("no daemon: {}", log.lock().unwrap()));
        Self { child, disk, socket, log }
    }

    /// The program as a client: nothing on stderr but errors.
    pub fn cli(&self, args: &[&str]) -> Output {
        let mut command = Command::new(BEDPLATE);
        clean(&mut command).args(["--quiet", "--socket"]).arg(&self.socket);
        command.args(args).output().unwrap()
    }

    /// Its standard output; the command must succeed.
    pub fn ask(&self, args: &[&str]) -> String {
        let output = self.cli(args);
        assert!(output.status.success(), "{args:?}: {}\n{}", stderr(&output), self.log());
        stdout(&output).trim().to_owned()
    }

    /// Its standard output as JSON.
    pub fn json(&self, args: &[&str]) -> Value {
        serde_json::from_str(&self.ask(&[&["--json"], args].concat())).unwrap()
    }

    /// A request with curl: status and text.
    pub fn curl(&self, method: &str, path: &str, body: Option<&str>) -> (u16, String) {
        curl(&self.socket, method, path, body)
    }

    /// Follows the image's events until its copy has failed; the copy.
    pub fn until_failed(&self, image: &str) -> Value {
        let mut command = Command::new(BEDPLATE);
        clean(&mut command).arg("--socket").arg(&self.socket);
        let mut child = command
            .args(["events", "-w", "--json", "--image", image])
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let lines = std::io::BufRead::lines(std::io::BufReader::new(child.stdout.take().unwrap()));
        let copies = lines.map(|line| {
            let event: Value = serde_json::from_str(&line.unwrap()).unwrap();
            event["object"]["copies"][0].clone()
        });
        let failed = |copy: &Value| copy["state"].as_str().is_some_and(|s| s.starts_with("failed"));
        let copy = copies.into_iter().find(failed);
        child.kill().unwrap();
        child.wait().unwrap();
        copy.unwrap_or_else(|| panic!("{image}: no failure\n{}", self.log()))
    }

    /// The directory of an image's copy, whether it is there or not.
    pub fn copy_dir(&self, image: &Value) -> PathBuf {
        let word = |key: &str| image[key].as_str().unwrap().to_owned();
        self.disk.join("backing-images").join(format!("{}-{}", word("name"), word("uuid")))
    }

    /// What has been logged.
    pub fn log(&self) -> String {
        self.log.lock().unwrap().clone()
    }

    /// Ends it as a supervisor does; its exit code.
    pub fn end(mut self) -> Option<i32> {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
        self.child.wait().unwrap().code()
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ended = self.child.kill();
        let _ended = self.child.wait();
    }
}

/// True if these tools are here. Without them a test says that it is skipped, or fails if
/// `REQUIRE_TOOLS` is set.
pub fn have(tools: &[&str]) -> bool {
    for tool in tools {
        if Command::new(tool).arg("--version").output().is_err() {
            println!("SKIPPED: {tool} is not installed");
            assert!(std::env::var_os("REQUIRE_TOOLS").is_none(), "{tool} is required");
            return false;
        }
    }
    true
}
