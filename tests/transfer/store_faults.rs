//! Promise: whichever call to the store fails, or is the program's last, the end is right bytes or
//! one clear error; and the next run ends well, without asking for what is durable.
//!
//! The program runs under strace, which lets its n-th call of a kind fail, or kills it there.

use std::path::Path;
use std::process::{Command, Output};
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::control_support::{BEDPLATE, clean, stderr};
use crate::fallback::forbid_io_uring;
use crate::fault_server::{FaultServer, Reply};
use crate::{content, sha256};
use bedplate::disk::{Dir, FileNames, Presence, Spool};

const LEN: usize = 5 * 1024 * 1024 + 4321;
/// Which of the calls is hit.
const TIMES: [usize; 7] = [1, 2, 3, 4, 6, 9, 14];
/// Kinds of calls (a `/` begins a pattern), and how they fail.
const CALLS: [(&str, &[&str]); 8] = [
    ("pwrite64", &["error=EIO", "error=ENOSPC", "signal=KILL"]),
    ("pwritev2", &["error=EIO", "error=ENOSPC", "signal=KILL"]),
    ("fallocate", &["error=ENOSPC", "error=EIO", "signal=KILL"]),
    ("fdatasync", &["error=EIO", "signal=KILL"]),
    ("fsync", &["error=EIO", "signal=KILL"]),
    ("ftruncate", &["error=EIO", "signal=KILL"]),
    ("/^rename", &["error=EIO", "signal=KILL"]),
    ("/^unlink", &["error=EIO", "signal=KILL"]),
];

struct Case {
    call: &'static str,
    fault: &'static str,
    time: usize,
    /// Without one, writes are uncached: `pwritev2`.
    digest: bool,
    /// Whether the source is compressed, and so kept in a spool.
    packed: bool,
    /// Whether io_uring may be used; its writes are no calls that strace could hit.
    ring: bool,
}

impl Case {
    fn all() -> Vec<Self> {
        let mut all = Vec::new();
        for (call, faults) in CALLS {
            for &fault in faults {
                for time in TIMES {
                    let (digest, ring) = (call != "pwritev2", call == "fallocate");
                    all.push(Self { call, fault, time, digest, packed: false, ring });
                    if call != "pwritev2" {
                        all.push(Self { call, fault, time, digest, packed: true, ring: false });
                    }
                }
            }
        }
        all
    }

    fn label(&self) -> String {
        let packed = if self.packed { ", compressed" } else { "" };
        format!("{} number {}: {}{packed}", self.call, self.time, self.fault)
    }

    /// Runs `bedplate pull`; without `strace` if nothing is to fail.
    fn pull(&self, dir: &Path, source: &Served, faulty: bool) -> Option<Output> {
        let mut command = Command::new(if faulty { "strace" } else { BEDPLATE });
        let command = clean(&mut command);
        if faulty {
            let Self { call, fault, time, .. } = self;
            let inject = format!("inject={call}:{fault}:when={time}");
            let trace = format!("trace={call}");
            command.args(["-f", "-qq", "-o", "/dev/null", "-e", &trace, "-e", &inject]);
            command.arg(BEDPLATE);
        }
        let (path, sent) = match self.packed {
            true => ("x.gz", &source.packed),
            false => ("x", &source.bytes),
        };
        let url = format!("{}/{path}", source.server.url);
        command.args(["-q", "pull", &url, "-o"]).arg(dir.join("out.img"));
        if self.packed {
            command.arg("--unpack");
        }
        if self.digest {
            command.args(["--sha256", &sha256(sent)]);
        } else {
            command.arg("--no-digest");
        }
        if !self.ring {
            forbid_io_uring(command, libc::EPERM);
        }
        command.output().ok()
    }

    /// True if the fault was met.
    fn run(&self, source: &Served) -> bool {
        let (server, bytes) = (&source.server, &source.bytes);
        let (temp, label) = (tempfile::tempdir().unwrap(), self.label());
        let output = temp.path().join("out.img");
        let first = self.pull(temp.path(), source, true).expect("strace was there before");
        let text = stderr(&first);
        if output.exists() {
            assert!(std::fs::read(&output).unwrap() == *bytes, "{label}: {text}");
        }
        let met = !first.status.success();
        if met && self.fault.starts_with("error") {
            let code = first.status.code();
            assert!(code.is_some_and(|code| code != 101), "{label}: {code:?} {text}");
            let told = text.lines().filter(|line| line.starts_with("bedplate: ")).count();
            assert!(told == 1 && !text.contains("panicked"), "{label}: {text}");
        }
        if !met {
            assert!(output.exists(), "{label}: {text}");
        }
        let (gap, kept) = (first_gap(temp.path()), kept(temp.path()));
        if self.call == "fdatasync" && self.fault == "error=EIO" && self.time == 1 {
            assert_eq!(gap, 0, "{label}: after a failed sync nothing is recorded");
        }
        let asked = server.requests().len();
        let second = self.pull(temp.path(), source, false).unwrap();
        assert!(second.status.success(), "{label}, then: {}", stderr(&second));
        assert!(std::fs::read(&output).unwrap() == *bytes, "{label}, then other bytes");
        let names: Vec<_> =
            temp.path().read_dir().unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(names, ["out.img"], "{label}");
        if gap > 0 && gap < bytes.len() as u64 {
            let range = server.requests()[asked].range.clone();
            let start = range.map_or(0, |range| range.start);
            assert_eq!(start, gap, "{label}: all before {gap} was durable");
        }
        if self.packed && kept > 0 {
            let start = server.requests()[asked].range.clone().map_or(0, |range| range.start);
            let most = source.packed.len() as u64 - 1;
            assert_eq!(start, kept.min(most), "{label}: all before {kept} was kept");
        }
        met
    }
}

/// What a thread's own server has: the bytes it has sent are of this thread's runs alone.
struct Served {
    server: FaultServer,
    bytes: Vec<u8>,
    packed: Vec<u8>,
}

impl Served {
    fn new(bytes: &[u8], packed: &[u8]) -> Self {
        let (bytes, packed) = (bytes.to_vec(), packed.to_vec());
        let served = [bytes.clone(), packed.clone()];
        let server = FaultServer::start(move |request| {
            Reply::ranged(request, &served[usize::from(request.path == "/x.gz")], "\"v\"")
        });
        Self { server, bytes, packed }
    }
}

/// How many bytes of a compressed source are in the spool.
fn kept(dir: &Path) -> u64 {
    let Ok(dir) = Dir::open(dir) else { return 0 };
    let spool = Spool::load(&dir, &FileNames::file("out.img").spool).ok().flatten();
    spool.map_or(0, |spool| spool.len_bytes())
}

/// Where the first byte of the file is that is not durable; 0 if nothing is.
fn first_gap(dir: &Path) -> u64 {
    let Ok(dir) = Dir::open(dir) else { return 0 };
    let presence = Presence::load(&dir, &FileNames::file("out.img").presence).ok().flatten();
    presence.map_or(0, |presence| {
        presence.missing(LEN as u64).first().map_or(LEN as u64, |range| range.start)
    })
}

#[test]
fn whichever_call_fails_or_is_the_last_the_next_run_ends_well() {
    let bytes = content(LEN, 93);
    let Some(packed) = crate::unpack::packed("gzip", &bytes) else { return };
    let permitted = Command::new("strace").args(["-qq", "-o", "/dev/null", "true"]).status();
    if !permitted.as_ref().is_ok_and(std::process::ExitStatus::success) {
        println!("SKIPPED: strace is not installed, or this host does not permit ptrace");
        assert!(permitted.is_ok() || std::env::var("REQUIRE_TOOLS").as_deref() != Ok("1"));
        return;
    }
    let (cases, next) = (Case::all(), AtomicUsize::new(0));
    let met: Vec<_> = CALLS.iter().map(|_| AtomicUsize::new(0)).collect();
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                let source = Served::new(&bytes, &packed);
                while let Some(case) = cases.get(next.fetch_add(1, Ordering::Relaxed)) {
                    if case.run(&source) {
                        let kind = CALLS.iter().position(|(call, _)| *call == case.call).unwrap();
                        met[kind].fetch_add(1, Ordering::Relaxed);
                    }
                }
            });
        }
    });
    for ((call, _), met) in CALLS.iter().zip(met) {
        let met = met.into_inner();
        println!("{call}: {met} of its faults ended a run");
        assert!(met > 0, "{call}: no fault was met");
    }
}
