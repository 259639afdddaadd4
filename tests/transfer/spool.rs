//! Promise: what has come of a compressed source and is durable is not asked for again, however the
//! transfer ended; and what is kept for that is never a wrong byte, nor litter.

use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use crate::control_support::{self, stderr};
use crate::fault_server::{Cut, FaultServer, Reply, Request};
use crate::kill::{Daemon, copy_dir};
use crate::loop_disk::LoopDisk;
use crate::nginx_support::{Nginx, have_nginx};
use crate::unpack::{TOOLS, bring_in, bring_in_from, expect, packed, url_of};
use crate::{content, engine, sha256};
use bedplate::disk::{Dir, Spool};
use bedplate::fetch::{Class, Expect, Progress, Source, SourceUrl};
use bedplate::import::{ImportError, Layout, PullRequest, Pulled, pull};
use bedplate::ring::Choice;

const MIB: usize = 1 << 20;
const ETAG: &str = "\"one\"";
const KILLS: usize = 4;

/// What is durable of the source; 0 if there is no spool.
fn durable(dir: &Path, name: &str) -> u64 {
    let spool = Spool::load(&Dir::open(dir).unwrap(), name).unwrap();
    spool.map_or(0, |spool| spool.len_bytes())
}

fn names(dir: &Path) -> Vec<String> {
    let entries = dir.read_dir().unwrap().map(|entry| entry.unwrap().file_name());
    let mut names: Vec<_> = entries.map(|name| name.into_string().unwrap()).collect();
    names.sort();
    names
}

fn start_of(request: &Request) -> u64 {
    request.range.as_ref().map_or(0, |range| range.start)
}

#[test]
fn kills_cost_a_compressed_source_only_what_was_not_durable() {
    if !have_nginx() {
        return;
    }
    let seed = std::env::var("SEED").ok().and_then(|text| text.parse().ok()).unwrap_or(1u64);
    println!("SEED={seed}");
    std::thread::scope(|scope| {
        for (index, tool) in TOOLS.into_iter().enumerate() {
            scope.spawn(move || survive(tool, seed * 4 + index as u64));
        }
    });
}

fn survive(tool: &str, seed: u64) {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let bytes = content(24 * MIB + 4321, seed);
    let Some(stream) = packed(tool, &bytes) else { return };
    let nginx = Nginx::start(&stream);
    nginx.pace(3);
    let temp = tempfile::tempdir().unwrap();
    let (disk, socket) = (temp.path().join("disk"), temp.path().join("c.sock"));
    std::fs::create_dir(&disk).unwrap();
    let mut daemon = Daemon::start(&disk, &socket);
    daemon.ask(&["create", "--name", "a", "--sha256", &sha256(&stream), "--fetch", &nginx.url]);
    let here = || copy_dir(&disk, "a").map_or(0, |dir| durable(&dir, "backing.spool"));
    let mut kept = vec![0];
    for _ in 0..KILLS {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        // Once a random number of bytes more is durable, and a moment later.
        let until = kept.last().unwrap() + 1 + state % (MIB as u64);
        let sealed = || copy_dir(&disk, "a").is_some_and(|dir| dir.join("backing").exists());
        while here() < until && !sealed() {
            std::thread::sleep(Duration::from_millis(1));
        }
        if sealed() {
            break;
        }
        std::thread::sleep(Duration::from_millis(state % 300));
        daemon.kill();
        if !sealed() {
            kept.push(here());
        }
        daemon = Daemon::start(&disk, &socket);
    }
    assert!(kept.len() > 2 && kept[1] > 0, "{tool}: too few kills hit the middle: {kept:?}");
    daemon.ask(&["attach", "a"]);
    let dir = copy_dir(&disk, "a").unwrap();
    assert!(std::fs::read(dir.join("backing")).unwrap() == bytes, "{tool}: other bytes");
    assert_eq!(names(&dir), ["backing", "backing.cfg", "backing.digests"], "{tool}: litter");
    daemon.kill();
    // The log has a request when it has ended: the last body was read, so all others have too.
    let starts = nginx.starts();
    // On a machine under load one may also break by itself, and go on from what was in memory.
    let told = format!("{tool}: {starts:?}, had {kept:?}");
    assert!(kept.iter().all(|start| starts.contains(start)), "{told}");
    // Each life asks for one byte, for the version, and then for the rest.
    assert!(starts.len() <= 2 * kept.len() + 1, "{told}");
    assert_eq!(starts.iter().filter(|&&start| start == 0).count(), 1, "{tool}: {starts:?}");
    println!("{tool}: {} bytes, {} sent over {KILLS} kills", stream.len(), nginx.sent_bytes());
}

/// A source whose first body breaks after `first` bytes and which is then gone; later it is what
/// `then` says, or itself again.
struct Breaking {
    server: FaultServer,
    stream: Vec<u8>,
    dir: tempfile::TempDir,
    expect: Expect,
    back: Arc<AtomicBool>,
}

impl Breaking {
    fn new(
        stream: &[u8],
        first: usize,
        etag: &'static str,
        expect: Expect,
        then: impl Fn(&Request) -> Option<Reply> + Send + Sync + 'static,
    ) -> Self {
        let (served, back) = (stream.to_vec(), Arc::new(AtomicBool::new(false)));
        let is_back = Arc::clone(&back);
        let server = FaultServer::start(move |request| {
            if is_back.load(Ordering::SeqCst) {
                return then(request).unwrap_or_else(|| Reply::ranged(request, &served, etag));
            }
            match request.index {
                0 => Reply::ranged(request, &served, etag).cut(Cut::Close(first)),
                _ => Reply::status("404 Not Found"),
            }
        });
        let dir = tempfile::tempdir().unwrap();
        let it = Self { server, stream: stream.to_vec(), dir, expect, back };
        let error = it.pull().unwrap_err();
        let told = ["404", "cannot resume it"].iter().any(|word| error.report().contains(word));
        assert!(told, "{}", error.report());
        it.back.store(true, Ordering::SeqCst);
        it
    }

    fn pull(&self) -> Result<Pulled, ImportError> {
        let dir = self.dir.path();
        bring_in(&url_of(&self.server), dir, &self.expect, Layout::AsIs, None)
    }

    fn kept(&self) -> u64 {
        durable(self.dir.path(), "out.img.bedplate-spool")
    }

    fn spool(&self) -> PathBuf {
        self.dir.path().join("out.img.bedplate-spool")
    }

    /// Pulls again, which must bring `bytes` and leave nothing else; first bytes of what was asked for.
    fn ends_with(&self, bytes: &[u8], label: &str) -> Vec<u64> {
        let asked = self.server.requests().len();
        self.pull().unwrap_or_else(|error| panic!("{label}: {}", error.report()));
        assert!(std::fs::read(self.dir.path().join("out.img")).unwrap() == bytes, "{label}");
        assert_eq!(names(self.dir.path()), ["out.img"], "{label}: litter");
        self.server.requests()[asked..].iter().map(start_of).collect()
    }
}

#[test]
fn a_run_that_ended_is_gone_on_with_at_the_very_byte() {
    let bytes = content(5 * MIB + 77, 121);
    for tool in TOOLS {
        let Some(stream) = packed(tool, &bytes) else { continue };
        let len = stream.len();
        for first in [7, MIB, 2 * MIB + 12_345, len - 1] {
            let label = format!("{tool}, {first} bytes");
            let source = Breaking::new(&stream, first, ETAG, expect(&stream), |_| None);
            assert_eq!(source.kept(), first as u64, "{label}");
            let starts = source.ends_with(&bytes, &label);
            // One byte to learn the version, and the rest.
            assert_eq!(starts, [first as u64; 2], "{label}");
            assert_eq!(source.server.sent(), len as u64 + 1, "{label}");
        }
    }
}

#[test]
fn what_follows_is_fetched_and_kept_while_what_was_kept_is_decoded() {
    let bytes = content(32 * MIB, 132);
    // The slowest of the decoders.
    let Some(stream) = packed("bzip2", &bytes) else { return };
    let (len, first) = (stream.len(), stream.len() / 4 * 3);
    let source = Breaking::new(&stream, first, ETAG, expect(&stream), |_| None);
    assert_eq!(source.kept(), first as u64);
    let mut from = Source::new(url_of(&source.server)).expecting(expect(&stream));
    from.unpack = true;
    let (engine, output) =
        (engine(source.dir.path(), Choice::Auto), source.dir.path().join("out.img"));
    let request = PullRequest { source: from, layout: Layout::AsIs, output };
    let progress = Arc::new(Progress::default());
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let watched = Arc::clone(&progress);
    let done = runtime.spawn(async move {
        // One byte to learn the version, and the rest.
        while watched.snapshot().bytes_received < (len - first + 1) as u64 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        let done = watched.snapshot().bytes_done;
        watched.stop();
        done
    });
    let error = runtime.block_on(pull(&engine, &request, &progress)).unwrap_err();
    assert_eq!(error.class(), Class::Cancelled, "{}", error.report());
    let done = runtime.block_on(done).unwrap();
    // Three quarters, had it waited for what was kept.
    let most = bytes.len() as u64 / 10 * 7;
    assert!(done < most, "the network has waited until {done} were decoded");
    // What came meanwhile is durable.
    assert_eq!(source.kept(), len as u64);
    assert_eq!(source.ends_with(&bytes, "all is kept"), [len as u64 - 1]);
}

#[test]
fn a_source_that_has_changed_is_begun_anew() {
    let (old, new) = (content(3 * MIB, 122), content(4 * MIB, 123));
    let Some(stream) = packed("zstd", &old) else { return };
    let other = packed("zstd", &new).unwrap();
    let served = other.clone();
    let source = Breaking::new(&stream, MIB, ETAG, Expect::default(), move |request| {
        let is_bound = request.header("if-match").is_some_and(|tag| tag != "\"two\"");
        Some(match is_bound {
            true => Reply::status("412 Precondition Failed"),
            false => Reply::ranged(request, &served, "\"two\""),
        })
    });
    assert_eq!(source.kept(), MIB as u64);
    assert_eq!(source.ends_with(&new, "another ETag"), [MIB as u64, 0]);
    // Without a strong ETag only the digest tells, in the end: a mix of two is thrown away.
    let mut other = stream.clone();
    other[2 * MIB..].fill(0x5a);
    let weak = "W/\"x\"";
    let good = stream.clone();
    let source = Breaking::new(&other, 2 * MIB + 9, weak, expect(&stream), move |request| {
        Some(Reply::ranged(request, &good, weak))
    });
    let at = source.kept();
    assert!(at > 0);
    let starts = source.ends_with(&old, "other bytes under the same weak ETag");
    assert_eq!(starts.last(), Some(&0), "{starts:?}");
    // The same source, proved by its digest.
    let source = Breaking::new(&stream, MIB, weak, expect(&stream), |_| None);
    assert_eq!(source.ends_with(&old, "a digest"), [MIB as u64; 2]);
}

#[test]
fn a_mirror_goes_on_where_a_source_that_is_gone_has_ended() {
    let bytes = content(3 * MIB, 131);
    let Some(stream) = packed("bzip2", &bytes) else { return };
    let source =
        Breaking::new(&stream, MIB, ETAG, expect(&stream), |_| Some(Reply::status("410 Gone")));
    let served = stream.clone();
    let mirror = FaultServer::start(move |request| Reply::ranged(request, &served, "\"its\""));
    let mut from = Source::new(url_of(&source.server)).expecting(expect(&stream));
    (from.unpack, from.mirrors) = (true, vec![url_of(&mirror)]);
    bring_in_from(from, source.dir.path(), Layout::AsIs, None).unwrap();
    assert!(std::fs::read(source.dir.path().join("out.img")).unwrap() == bytes);
    let starts: Vec<_> = mirror.requests().iter().map(start_of).collect();
    assert_eq!(starts, [MIB as u64; 2]);
}

#[test]
fn what_cannot_be_continued_is_not_kept() {
    let bytes = content(2 * MIB, 124);
    let Some(stream) = packed("gzip", &bytes) else { return };
    // No version that proves anything.
    let source = Breaking::new(&stream, MIB, "W/\"x\"", Expect::default(), |_| None);
    assert_eq!(names(source.dir.path()), Vec::<String>::new());
    assert_eq!(source.ends_with(&bytes, "a weak ETag"), [0]);
    // No ranges any more: what is kept is of no use.
    let whole = stream.clone();
    let source =
        Breaking::new(&stream, MIB, ETAG, expect(&stream), move |_| Some(Reply::whole(&whole)));
    assert_eq!(source.kept(), MIB as u64);
    assert_eq!(source.ends_with(&bytes, "no ranges").last(), Some(&0));
}

#[test]
fn a_spool_that_was_damaged_costs_the_damaged_part_and_no_wrong_byte() {
    let bytes = content(6 * MIB, 125);
    let Some(stream) = packed("xz", &bytes) else { return };
    let first = 3 * MIB + 999;
    let (mib, first_byte) = (MIB as u64, first as u64);
    let file =
        |source: &Breaking| std::fs::OpenOptions::new().write(true).open(source.spool()).unwrap();
    // The bytes begin after the header, an unused page and the two places of one page.
    let data_at = 4 * 4096;
    type Damage<'a> = &'a dyn Fn(&Breaking);
    let cases: [(&str, Damage, u64); 8] = [
        ("nothing", &|_| {}, first_byte),
        ("a byte", &|s| drop(file(s).write_all_at(b"!!!", data_at + mib + 5)), mib),
        ("its first byte", &|s| drop(file(s).write_all_at(b"!!!", data_at)), 0),
        ("its end is gone", &|s| file(s).set_len(data_at + 2 * mib + 8).unwrap(), 2 * mib),
        ("nothing but a header", &|s| file(s).set_len(data_at).unwrap(), 0),
        ("noise", &|s| std::fs::write(s.spool(), content(4 * MIB, 1)).unwrap(), 0),
        ("empty", &|s| std::fs::write(s.spool(), b"").unwrap(), 0),
        ("gone", &|s| std::fs::remove_file(s.spool()).unwrap(), 0),
    ];
    for (label, damage, at) in cases {
        let source = Breaking::new(&stream, first, ETAG, expect(&stream), |_| None);
        damage(&source);
        let starts = source.ends_with(&bytes, label);
        assert_eq!(starts.last(), Some(&at), "{label}: {starts:?}");
    }
    // Of a copy that another version of the source has left in its place.
    let other = packed("xz", &content(6 * MIB, 126)).unwrap();
    let stale = Breaking::new(&other, first, "\"other\"", expect(&other), |_| None);
    let source = Breaking::new(&stream, first, ETAG, expect(&stream), |_| None);
    std::fs::copy(stale.spool(), source.spool()).unwrap();
    assert_eq!(source.ends_with(&bytes, "stale").last(), Some(&0));
}

#[test]
fn a_refused_stream_leaves_no_spool() {
    let bytes = content(3 * MIB, 127);
    let Some(stream) = packed("bzip2", &bytes) else { return };
    let source = Breaking::new(&stream, MIB, ETAG, expect(&bytes), |_| None);
    assert_eq!(source.kept(), MIB as u64);
    assert!(source.pull().unwrap_err().report().contains("SHA-256"));
    assert_eq!(names(source.dir.path()), Vec::<String>::new());
    assert_eq!(source.stream, stream);
}

/// About 4 MiB a second, or as fast as it goes once `fast` is set.
fn slow_server(stream: &[u8], fast: &Arc<AtomicBool>) -> FaultServer {
    let (served, fast) = (stream.to_vec(), Arc::clone(fast));
    FaultServer::start(move |request| {
        let mut reply = Reply::ranged(request, &served, ETAG);
        if !fast.load(Ordering::SeqCst) {
            reply.pace = Duration::from_millis(16);
        }
        reply
    })
}

#[test]
fn a_paused_compressed_transfer_goes_on_where_it_was_and_a_removed_one_leaves_nothing() {
    let bytes = content(12 * MIB, 128);
    let Some(stream) = packed("gzip", &bytes) else { return };
    let fast = Arc::new(AtomicBool::new(false));
    let server = slow_server(&stream, &fast);
    let daemon = control_support::Daemon::start();
    let url = format!("{}/a.img.gz", server.url);
    let run = |daemon: &control_support::Daemon, args: &[&str]| {
        let output = daemon.cli(args);
        assert!(output.status.success(), "{args:?}: {}\n{}", stderr(&output), daemon.log());
    };
    let create = |daemon: &control_support::Daemon, name: &str| {
        run(daemon, &["create", &url, "--name", name, "--fetch"]);
        daemon.events_until(&format!("?image={name}"), |event| {
            event["object"]["copies"][0]["bytes_done"].as_u64().unwrap_or(0) >= 2 << 20
        });
    };
    create(&daemon, "a");
    run(&daemon, &["pause", "a"]);
    daemon.wait_for("a", "pending");
    let disk = daemon.dir.path().join("disk");
    let kept = durable(&copy_dir(&disk, "a").unwrap(), "backing.spool");
    assert!(kept >= MIB as u64, "{kept}");
    let (_, dir) = daemon.end("TERM");
    let daemon = control_support::Daemon::start_in(dir, "");
    let asked = server.requests().len();
    fast.store(true, Ordering::SeqCst);
    run(&daemon, &["resume", "a"]);
    daemon.wait_for("a", "ready");
    let copy = copy_dir(&disk, "a").unwrap();
    assert!(std::fs::read(copy.join("backing")).unwrap() == bytes);
    assert_eq!(names(&copy), ["backing", "backing.cfg", "backing.digests"]);
    let requests = server.requests();
    assert!(requests[asked..].iter().all(|request| start_of(request) == kept), "from {kept} on");
    // Removed in the middle.
    fast.store(false, Ordering::SeqCst);
    create(&daemon, "b");
    run(&daemon, &["pause", "b"]);
    daemon.wait_for("b", "pending");
    assert!(durable(&copy_dir(&disk, "b").unwrap(), "backing.spool") > 0);
    run(&daemon, &["delete", "b"]);
    while copy_dir(&disk, "b").is_some() {
        std::thread::yield_now();
    }
}

/// Takes room on a disk until only so much is left.
fn leave_free(mount: &Path, free: u64) {
    let stat = rustix::fs::statvfs(mount).unwrap();
    let take = (stat.f_bavail * stat.f_frsize).saturating_sub(free);
    let filler = std::fs::File::create(mount.join("filler")).unwrap();
    rustix::fs::fallocate(&filler, rustix::fs::FallocateFlags::empty(), 0, take).unwrap();
    filler.sync_all().unwrap();
}

fn pull_to(mount: &Path, server: &FaultServer, stream: &[u8]) -> Result<Pulled, ImportError> {
    let url = SourceUrl::parse(&format!("{}/x", server.url)).unwrap();
    bring_in(&url, mount, &expect(stream), Layout::AsIs, None)
}

#[test]
fn a_full_disk_keeps_what_has_come_and_an_image_that_fits_without_a_spool_fits() {
    let Some(disk) = LoopDisk::new(&["mkfs.ext4", "-q", "-m", "0"], 256 << 20) else { return };
    let mount = &disk.mount;
    // A quarter of it is zeroes: 48 MiB are stored, and 48 come.
    let bytes = content(64 * MIB, 129);
    let Some(stream) = packed("gzip", &bytes) else { return };
    let index = Arc::new(AtomicUsize::new(0));
    let (served, count, place) = (stream.clone(), Arc::clone(&index), mount.clone());
    let server = FaultServer::start(move |request| {
        let mut reply = Reply::ranged(request, &served, ETAG);
        match count.fetch_add(1, Ordering::SeqCst) {
            0 => reply = reply.cut(Cut::Close(4 * MIB)),
            // In the middle somebody else fills the disk.
            1 => {
                let made = place.join("out.img.bedplate-part");
                while std::fs::metadata(&made).unwrap().blocks() * 512 < 3 << 20 {
                    std::thread::yield_now();
                }
                leave_free(&place, 2 << 20);
            }
            _ => {}
        }
        reply
    });
    let error = pull_to(mount, &server, &stream).unwrap_err();
    // Either of the two files is the one that finds it full.
    let full = ["disk full", "needed, "].iter().any(|words| error.report().contains(words));
    assert!(full && error.class() == Class::Retry, "{}", error.report());
    let kept = durable(mount, "out.img.bedplate-spool");
    assert!(kept >= 4 << 20, "{kept}");
    std::fs::remove_file(mount.join("filler")).unwrap();
    let asked = server.requests().len();
    pull_to(mount, &server, &stream).unwrap();
    assert!(std::fs::read(mount.join("out.img")).unwrap() == bytes);
    let requests = server.requests();
    assert!(requests[asked..].iter().all(|request| start_of(request) == kept), "from {kept} on");
    assert!(!mount.join("out.img.bedplate-spool").exists());
    // Room for the image, and not for its source beside it.
    std::fs::remove_file(mount.join("out.img")).unwrap();
    leave_free(mount, 60 << 20);
    pull_to(mount, &server, &stream).unwrap();
    assert!(std::fs::read(mount.join("out.img")).unwrap() == bytes);
    // The same, but the room has gone after a part was kept.
    std::fs::remove_file(mount.join("out.img")).unwrap();
    std::fs::remove_file(mount.join("filler")).unwrap();
    index.store(0, Ordering::SeqCst);
    let (served, count, place) = (stream.clone(), Arc::clone(&index), mount.clone());
    let server = FaultServer::start(move |request| match count.fetch_add(1, Ordering::SeqCst) {
        0 => Reply::ranged(request, &served, ETAG).cut(Cut::Close(24 * MIB)),
        1 => {
            leave_free(&place, 26 << 20);
            Reply::status("404 Not Found")
        }
        _ => Reply::ranged(request, &served, ETAG),
    });
    pull_to(mount, &server, &stream).unwrap_err();
    assert_eq!(durable(mount, "out.img.bedplate-spool"), 24 << 20);
    pull_to(mount, &server, &stream).unwrap();
    assert!(std::fs::read(mount.join("out.img")).unwrap() == bytes);
}

#[test]
fn where_only_the_image_itself_has_room_it_is_brought_in_at_once() {
    let Some(disk) = LoopDisk::new(&["mkfs.ext4", "-q", "-m", "0"], 64 << 20) else { return };
    let mount = &disk.mount;
    // The spool is complete when most of the image is still to be made.
    let mut bytes = content(5 * MIB, 130);
    bytes.resize(29 * MIB, 0x11);
    let Some(stream) = packed("gzip", &bytes) else { return };
    let served = stream.clone();
    let server = FaultServer::start(move |request| Reply::ranged(request, &served, ETAG));
    leave_free(mount, (28 << 20) + stream.len() as u64 / 2);
    pull_to(mount, &server, &stream).unwrap();
    assert!(std::fs::read(mount.join("out.img")).unwrap() == bytes);
    let starts: Vec<_> = server.requests().iter().map(start_of).collect();
    assert_eq!(starts, [0, 0], "{} bytes come: the disk was full once", stream.len());
}
