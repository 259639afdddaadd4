//! Reads of what is in memory make no system call: counted by strace, in a process of its own.

use std::fmt::Write as _;
use std::process::Command;

use bedplate::replica::{Mode, Options, Replica};

use crate::nbd_support::{have, write_sparse};
use crate::qcow2_common::{Random, have_qemu, run};
use crate::server::TestServer;

const NAME: &str = "system_calls::a_mapped_read_of_what_is_in_memory_makes_no_system_call";
const BEGIN: &str = "/dev/begin-of-counted-reads";
const END: &str = "/dev/end-of-counted-reads";

/// What a read may ask when it took long: whether that was for a disk. A busy machine makes some so.
const ASKS_WHY_SLOW: &str = "getrusage(RUSAGE_THREAD";

/// In the child: reads everything, until all pages are known, then what is counted. The first time
/// it is read with pread, the second time from the map; that may be slow, and be held to be a disk's
/// fault once for what the thread did before.
fn child(socket: &str) {
    let options = Options { mode: Mode::Mapped, ..Options::default() };
    for name in ["raw", "plain", "packed"] {
        let replica = Replica::attach(socket, name, options.clone()).unwrap();
        let mut all = vec![0; usize::try_from(replica.size_bytes()).unwrap()];
        for _ in 0..4 {
            replica.read_at(&mut all, 0).unwrap();
        }
        let (mut block, mut random) = ([0; 4096], Random(3));
        let _marker = std::fs::metadata(BEGIN);
        for _ in 0..5000 {
            let at = random.below(replica.size_bytes() - 4096);
            replica.read_at(&mut block, at).unwrap();
            let at = usize::try_from(at).unwrap();
            assert!(block == all[at..at + 4096]);
        }
        let _marker = std::fs::metadata(END);
    }
}

#[test]
fn a_mapped_read_of_what_is_in_memory_makes_no_system_call() {
    if let Ok(socket) = std::env::var("BEDPLATE_TEST_REPLICA") {
        return child(&socket);
    }
    if !have_qemu() || !have(&["strace"]) {
        return;
    }
    let server = TestServer::start();
    let dir = server.dir.path();
    let mut random = Random(2);
    let mut bytes: Vec<u8> = (0..4 << 20).map(|_| random.next().to_le_bytes()[0] & 31).collect();
    bytes[1 << 20..2 << 20].fill(0);
    let raw = dir.join("raw");
    write_sparse(&raw, &bytes);
    server.add("raw", &raw);
    for (name, option) in [("plain", "-q"), ("packed", "-c")] {
        let image = dir.join(name);
        let (from, to) = (raw.to_str().unwrap(), image.to_str().unwrap());
        run("qemu-img", &["convert", "-q", option, "-f", "raw", "-O", "qcow2", from, to]);
        server.add(name, &image);
    }
    let trace = dir.join("trace");
    let child = Command::new("strace")
        .args(["-f", "-o", trace.to_str().unwrap()])
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", NAME, "--nocapture"])
        .env("BEDPLATE_TEST_REPLICA", server.socket())
        .output()
        .unwrap();
    assert!(child.status.success(), "{}", String::from_utf8_lossy(&child.stderr));
    let (mut counted, mut slow, mut begun, mut is_counting) = (String::new(), 0, 0, false);
    // All threads of the child are in the trace; only the one that reads counts.
    let text = std::fs::read_to_string(&trace).unwrap();
    let reader = text.lines().find(|line| line.contains(BEGIN)).unwrap();
    let reader = reader.split_whitespace().next().unwrap().to_owned();
    for line in text.lines().filter(|line| line.starts_with(&reader)) {
        if line.contains(BEGIN) {
            (begun, is_counting) = (begun + 1, true);
        } else if line.contains(END) {
            is_counting = false;
        } else if is_counting && line.contains(ASKS_WHY_SLOW) {
            slow += 1;
        } else if is_counting {
            writeln!(counted, "{line}").unwrap();
        }
    }
    assert_eq!((begun, counted.as_str()), (3, ""), "15,000 reads");
    assert!(slow < 1500, "{slow} of 15,000 reads took so long that they asked why");
}
