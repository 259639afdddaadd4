//! Promise: `kill -9` of the daemon at any moment of a download costs at most what was not durable
//! yet; after the restart the copy gets ready by itself, with the right bytes.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use bedplate::disk::{Dir, Presence};

use crate::fault_server::{FaultServer, Reply, Request};
use crate::{content, sha256};

const LEN: usize = 96 << 20;
const KILLS: usize = 50;
/// At the server's pace of 2.5 MiB/s for each of up to 16 connections this is over a second, and
/// bytes become durable twice a second.
const MOST_BETWEEN_KILLS: u64 = 40 << 20;

pub struct Daemon {
    child: Child,
    socket: PathBuf,
}

impl Daemon {
    pub fn start(disk: &Path, socket: &Path) -> Self {
        let child = Command::new(env!("CARGO_BIN_EXE_bedplate"))
            .args(["serve", "--allow-loopback", "--disk"])
            .arg(disk)
            .arg("--socket")
            .arg(socket)
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        Self { child, socket: socket.to_owned() }
    }

    pub fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Runs a command until the daemon answers it; its standard output.
    pub fn ask(&mut self, args: &[&str]) -> String {
        loop {
            let ended = self.child.try_wait().unwrap();
            assert!(ended.is_none(), "the daemon has ended by itself: {ended:?}");
            let output = Command::new(env!("CARGO_BIN_EXE_bedplate"))
                .arg("--socket")
                .arg(&self.socket)
                .args(args)
                .output()
                .unwrap();
            if output.status.success() {
                return String::from_utf8(output.stdout).unwrap();
            }
            // Exit code 3: not there yet, try again. Anything else is a failure.
            let text = String::from_utf8_lossy(&output.stderr).into_owned();
            assert_eq!(output.status.code(), Some(3), "{args:?}: {text}");
        }
    }
}

pub fn copy_dir(disk: &Path, name: &str) -> Option<PathBuf> {
    let entries = disk.join("backing-images").read_dir().ok()?;
    let dirs = entries.map(|entry| entry.unwrap().path());
    dirs.into_iter()
        .find(|dir| dir.file_name().unwrap().to_string_lossy().starts_with(&format!("{name}-")))
}

/// What the files say is missing; `None` if there is nothing to go on with.
fn missing(disk: &Path, name: &str) -> Option<Vec<Range<u64>>> {
    let dir = Dir::open(&copy_dir(disk, name)?).unwrap();
    let presence = Presence::load(&dir, "backing.presence").unwrap()?;
    let missing = presence.missing(LEN as u64);
    let nothing_here = missing == [0..LEN as u64];
    (!nothing_here).then_some(missing)
}

fn assert_only_missing(requests: &[Request], missing: &[Range<u64>]) {
    for asked in requests.iter().filter_map(|request| request.range.as_ref()) {
        let asked = asked.start..asked.end.min(LEN as u64);
        let inside = missing.iter().any(|gap| gap.start <= asked.start && asked.end <= gap.end);
        // One byte is asked for to learn the version, if all the rest is here.
        let probe = asked == (0..1) && missing.is_empty();
        assert!(inside || probe, "asked for {asked:?}, missing were {missing:?}");
    }
}

#[test]
fn a_copy_survives_fifty_kills_and_fetches_nothing_durable_again() {
    let seed = std::env::var("SEED").ok().and_then(|text| text.parse().ok()).unwrap_or(1u64);
    println!("SEED={seed}");
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let bytes = content(LEN, seed);
    let served = bytes.clone();
    let server = FaultServer::start(move |request| {
        let mut reply = Reply::ranged(request, &served, "\"v\"");
        reply.pace = Duration::from_millis(25);
        reply
    });
    let temp = tempfile::tempdir().unwrap();
    let (disk, socket) = (temp.path().join("disk"), temp.path().join("c.sock"));
    std::fs::create_dir(&disk).unwrap();
    let (mut kills, mut resumed, mut image) = (0, 0, 0);
    while kills < KILLS {
        image += 1;
        let name = format!("image-{image}");
        let mut daemon = Daemon::start(&disk, &socket);
        let url = format!("{}/{name}", server.url);
        daemon.ask(&["create", "--name", &name, "--sha256", &sha256(&bytes), "--fetch", &url]);
        // What was missing at the last kill, and how many requests there were by then.
        let mut last: Option<(Option<Vec<Range<u64>>>, usize)> = None;
        let sealed = || copy_dir(&disk, &name).is_some_and(|dir| dir.join("backing").exists());
        loop {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            // The kill comes after a random number of bytes, none included; or right after the
            // seal, if the image ends before.
            let until = server.sent() + state % MOST_BETWEEN_KILLS;
            while server.sent() < until && !sealed() {
                std::thread::yield_now();
            }
            daemon.kill();
            kills += 1;
            let requests = server.requests();
            if let Some((Some(missing), asked)) = &last {
                assert_only_missing(&requests[*asked..], missing);
                resumed += usize::from(requests.len() > *asked);
            }
            last = Some((missing(&disk, &name), requests.len()));
            let done = sealed();
            daemon = Daemon::start(&disk, &socket);
            if done || kills == KILLS {
                daemon.ask(&["attach", &name]);
                let more = server.requests().len() - requests.len();
                assert!(!done || more == 0, "a finished copy is not fetched again");
                break;
            }
        }
        let data = copy_dir(&disk, &name).unwrap().join("backing");
        assert!(std::fs::read(data).unwrap() == bytes, "{name} has other bytes");
        daemon.kill();
    }
    println!("{kills} kills over {image} images, {resumed} restarts went on in the middle");
    assert!(resumed >= 20, "too few kills hit the middle of a download: {resumed}");
}
