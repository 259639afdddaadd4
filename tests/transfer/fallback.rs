//! Promise: where io_uring is forbidden, or the file system is an odd one, files are written all
//! the same, and the program says how and why.

use std::io;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Output};
use std::sync::Arc;

use bedplate::ring::{BLOCK_BYTES, BufPool, Choice, Sink, SinkKind, UringSink, WriteOp, probe};
use bedplate::units::FileOffset;

use crate::control_support::{BEDPLATE, clean, stderr, stdout};
use crate::daemon::Daemon;
use crate::fault_server::{FaultServer, Reply};
use crate::{content, sha256};

const LEN: usize = 3 * 1024 * 1024 + 777;

/// What a kernel answers that forbids io_uring, or has none; and a word of the reason to show.
const REFUSALS: [(i32, &str); 2] = [(libc::EPERM, "seccomp"), (libc::ENOSYS, "Linux 5.6")];

/// io_uring_setup fails with `errno` in the child: classic BPF, as container runtimes do it.
pub fn forbid_io_uring(command: &mut Command, errno: i32) {
    let op = |code: u32, jt: u8, jf: u8, k: u32| libc::sock_filter {
        code: u16::try_from(code).unwrap(),
        jt,
        jf,
        k,
    };
    let setup = u32::try_from(libc::SYS_io_uring_setup).unwrap();
    let refuse = libc::SECCOMP_RET_ERRNO | errno.unsigned_abs();
    // Load the call's number; if it is io_uring_setup refuse, else allow.
    let mut filter = [
        op(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, 0),
        op(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, 0, 1, setup),
        op(libc::BPF_RET | libc::BPF_K, 0, 0, refuse),
        op(libc::BPF_RET | libc::BPF_K, 0, 0, libc::SECCOMP_RET_ALLOW),
    ];
    let install = move || {
        let len = libc::c_ushort::try_from(filter.len()).unwrap_or(0);
        let program = libc::sock_fprog { len, filter: filter.as_mut_ptr() };
        // SAFETY: PR_SET_NO_NEW_PRIVS takes four plain numbers and changes only this process.
        let alone = unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) };
        // SAFETY: `program` points at `filter`, which this closure owns; the kernel copies both
        // before the call returns.
        let set = unsafe {
            libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const program)
        };
        if alone == 0 && set == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    };
    // SAFETY: between fork and exec only prctl is called and nothing is allocated; the filter was
    // made before.
    unsafe { command.pre_exec(install) };
}

/// True if io_uring works here with nothing in its way. Without it a test says that it is skipped.
fn has_ring(dir: &Path) -> bool {
    let works = probe(dir, Choice::Auto).unwrap().kind == SinkKind::Uring;
    if !works {
        println!("SKIPPED: io_uring does not work here without a filter either");
    }
    works
}

/// The program without io_uring.
fn without(errno: i32, args: &[&str]) -> Output {
    let mut command = Command::new(BEDPLATE);
    forbid_io_uring(clean(&mut command).args(args), errno);
    command.output().unwrap()
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn serve(bytes: &[u8]) -> FaultServer {
    let served = bytes.to_vec();
    FaultServer::start(move |request| Reply::ranged(request, &served, "\"v\""))
}

/// The line about io_uring, and the one after it, which may be a hint.
fn io_uring_lines(doctor: &str) -> String {
    let lines: Vec<&str> = doctor.lines().collect();
    let at = lines.iter().position(|line| line.contains(": io_uring: ")).expect("a check of it");
    lines[at..].iter().take(2).copied().collect::<Vec<_>>().join("\n")
}

#[test]
fn doctor_and_disks_say_that_threads_write_and_why() {
    for (errno, reason) in REFUSALS {
        let temp = tempfile::tempdir().unwrap();
        let nobody = temp.path().join("no.sock");
        let args = ["doctor", "--disk", text(temp.path()), "--socket", text(&nobody)];
        let alone = without(errno, &args);
        assert_eq!(alone.status.code(), Some(0), "threads are no failure: {}", stdout(&alone));
        let daemon = Daemon::start(temp.path(), |command| forbid_io_uring(command, errno));
        for said in [stdout(&alone), daemon.ask(&["doctor"])] {
            let lines = io_uring_lines(&said);
            assert!(lines.starts_with("warn") && lines.contains(reason), "{lines}");
            assert!(lines.contains("threads"), "{lines}");
        }
        let disk = daemon.json(&["disks"]);
        assert_eq!((&disk["sink"], &disk["healthy"]), (&"threads".into(), &true.into()));
        assert!(disk["message"].as_str().unwrap().contains(reason), "{disk}");
        let table = daemon.ask(&["disks"]);
        assert!(table.contains("threads") && table.contains(reason), "{table}");
    }
}

#[test]
fn the_filter_is_what_makes_the_difference() {
    let temp = tempfile::tempdir().unwrap();
    if !has_ring(temp.path()) {
        return;
    }
    let daemon = Daemon::start(temp.path(), |_| {});
    assert_eq!(daemon.json(&["disks"])["sink"], "uring");
    assert!(io_uring_lines(&daemon.ask(&["doctor"])).contains("works"));
}

/// Kernel threads of this process that do its io_uring calls for it.
fn kernel_workers() -> usize {
    let tasks = std::fs::read_dir("/proc/self/task").unwrap().flatten();
    let names = tasks.filter_map(|task| std::fs::read(task.path().join("comm")).ok());
    names.filter(|name| name.starts_with(b"iou-wrk")).count()
}

/// Writes into a file that is one hole, as a careless writer would.
fn write_into_a_hole(dir: &Path) {
    use std::os::unix::fs::OpenOptionsExt;
    let mut options = std::fs::File::options();
    options.write(true).create(true).custom_flags(libc::O_DIRECT);
    let file = Arc::new(options.open(dir.join("hole")).unwrap());
    file.set_len(8 * BLOCK_BYTES as u64).unwrap();
    let (mut sink, pool) = (UringSink::new().unwrap(), BufPool::new(8));
    for tag in 0..8 {
        let mut buf = pool.try_take().unwrap();
        buf.fill(&[7; BLOCK_BYTES], BLOCK_BYTES);
        let (range, at) = (0..BLOCK_BYTES, FileOffset(tag * BLOCK_BYTES as u64));
        let op = WriteOp { file: Arc::clone(&file), buf: Arc::new(buf), range, at, tag };
        sink.push(op).unwrap();
    }
    sink.reap(8, &mut |_, written| written.unwrap()).unwrap();
}

#[test]
fn direct_writes_are_not_handed_to_kernel_workers() {
    let temp = tempfile::tempdir().unwrap();
    if !has_ring(temp.path()) {
        return;
    }
    // Idle workers stay for seconds, so that they can be counted afterwards.
    write_into_a_hole(temp.path());
    if kernel_workers() == 0 {
        println!("the file system of {} hands nothing over even so", temp.path().display());
    }
    let bytes = content(64 << 20, 44);
    let server = serve(&bytes);
    let daemon = Daemon::start(temp.path(), |_| {});
    let url = format!("{}/disk.img", server.url);
    daemon.ask(&["create", &url, "--sha256", &sha256(&bytes), "--wait"]);
    let (status, metrics) = daemon.curl("GET", "/metrics", None);
    assert_eq!(status, 200, "{metrics}");
    let workers = metrics.lines().find(|line| line.starts_with("bedplate_uring_kernel_workers "));
    assert!(workers.is_some_and(|line| line.ends_with(" 0")), "{workers:?}");
}

#[test]
fn a_transfer_without_io_uring_ends_with_the_right_bytes() {
    let bytes = content(LEN, 40);
    let server = serve(&bytes);
    let (url, digest) = (format!("{}/disk.img", server.url), sha256(&bytes));
    for (errno, _) in REFUSALS {
        let temp = tempfile::tempdir().unwrap();
        let file = temp.path().join("out.img");
        let pulled = without(errno, &["pull", &url, "-o", text(&file), "--sha256", &digest]);
        assert_eq!(pulled.status.code(), Some(0), "{}", stderr(&pulled));
        assert!(std::fs::read(&file).unwrap() == bytes, "pull, errno {errno}");

        let daemon = Daemon::start(temp.path(), |command| forbid_io_uring(command, errno));
        let image = daemon.json(&["create", &url, "--sha256", &digest, "--wait"]);
        let stored = std::fs::read(daemon.copy_dir(&image).join("backing")).unwrap();
        assert!(stored == bytes, "daemon, errno {errno}");
        assert_eq!(daemon.end(), Some(0));
    }
}

#[test]
fn a_daemon_that_must_use_io_uring_does_not_start_without_it_and_names_the_fix() {
    for (errno, reason) in REFUSALS {
        let temp = tempfile::tempdir().unwrap();
        let (disk, config) = (temp.path().join("disk"), temp.path().join("b.toml"));
        std::fs::create_dir(&disk).unwrap();
        std::fs::write(&config, format!("disks = [{disk:?}]\nsink = \"uring\"\n")).unwrap();
        let refused = without(errno, &["serve", "--quiet", "--config", text(&config)]);
        assert_eq!(refused.status.code(), Some(1), "trying again cannot help");
        let said = stderr(&refused);
        assert_eq!(said.lines().count(), 1, "{said}");
        for words in [text(&disk), reason, "let `sink` be auto"] {
            assert!(said.contains(words), "{words}: {said}");
        }
        assert!(
            !disk.join("bedplate/control.sock").exists()
                && !disk.join("bedplate/nbd.sock").exists()
        );
    }
}

#[test]
fn a_pull_onto_a_tmpfs_works() {
    let shm = Path::new("/dev/shm");
    let Ok(temp) = tempfile::tempdir_in(shm) else {
        println!("SKIPPED: no writable tmpfs at /dev/shm");
        return;
    };
    let bytes = content(LEN, 41);
    let server = serve(&bytes);
    let (file, url) = (temp.path().join("out.img"), format!("{}/x", server.url));
    let mut command = Command::new(BEDPLATE);
    let output = clean(&mut command).args(["pull", &url, "-o", text(&file)]).output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    assert!(stdout(&output).contains(&sha256(&bytes)), "{}", stdout(&output));
    assert!(std::fs::read(&file).unwrap() == bytes);
    assert_eq!(temp.path().read_dir().unwrap().count(), 1, "only the file");
}
