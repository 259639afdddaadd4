//! Reads of a raw image that is still arriving.

use serde_json::json;

use bedplate::replica::{Mode, Options, Replica};

use crate::control_support::Daemon;
use crate::nbd_support::{Wire, patterned};
use crate::origin::{MIB, Origin, attach, nbd, pause, socket, state, stream};

const LEN: usize = 64 << 20;

#[test]
fn what_is_read_comes_before_all_else_and_the_rest_later() {
    let bytes = patterned(LEN + 12_345);
    let origin = Origin::start(bytes.clone());
    let daemon = Daemon::start();
    attach(&daemon, &origin, &json!({}));
    let mut wire = nbd(&daemon);
    // The first block came with the first answer.
    assert!(wire.read_structured(0, 0, 4096) == bytes[..4096]);
    assert_eq!(origin.small_requests(), []);
    for at in [50 * MIB + 17, 20 * MIB, LEN as u64 + 12_000] {
        let from = usize::try_from(at).unwrap();
        assert!(wire.read_structured(0, at, 300) == bytes[from..from + 300], "{at}");
    }
    assert_eq!(origin.small_requests().len(), 3, "one request for each: nothing else was needed");
    assert_eq!(state(&daemon), "in-progress");
    // A read across what is here and what is not.
    assert!(wire.read_structured(0, 49 * MIB, 3 << 20) == bytes[49 << 20..52 << 20]);
    origin.open(&daemon, "img");
    daemon.wait_for("img", "ready");
    for (at, part) in (0..).step_by(1 << 20).zip(bytes.chunks(1 << 20)) {
        let len = u32::try_from(part.len()).unwrap();
        assert!(wire.read_structured(0, at, len) == part, "{at}: the same session goes on");
    }
    let digest = daemon.get("/v1/images/img")["digests"]["sha256"].as_str().unwrap().to_owned();
    assert_eq!(digest, sha256(&bytes));
}

#[test]
fn requests_for_what_is_here_are_answered_before_those_that_wait() {
    let bytes = patterned(LEN);
    let origin = Origin::start(bytes.clone());
    let daemon = Daemon::start();
    attach(&daemon, &origin, &json!({}));
    let mut wire = nbd(&daemon);
    let (far, near) = (40 * MIB, 4096_u64);
    let both =
        [Wire::request_bytes(0, 0, 1, far, 512), Wire::request_bytes(0, 0, 2, near, 512)].concat();
    wire.send(&both);
    let first = wire.chunks();
    assert_eq!(first[0].cookie, 2, "the one that was asked for last");
    let second = wire.chunks();
    assert_eq!(second[0].cookie, 1);
}

#[test]
fn a_reader_who_goes_forward_needs_few_requests() {
    let bytes = patterned(LEN);
    let origin = Origin::start(bytes.clone());
    let daemon = Daemon::start();
    attach(&daemon, &origin, &json!({}));
    let mut wire = nbd(&daemon);
    let (start, end) = (30 << 20, 50 << 20);
    for at in (start..end).step_by(64 << 10) {
        assert!(wire.read_structured(0, at as u64, 64 << 10) == bytes[at..at + (64 << 10)], "{at}");
    }
    let count = origin.small_requests().len();
    assert!(count < 60, "{count} requests for 320 reads");
}

#[test]
fn presence_tells_what_is_here() {
    let bytes = patterned(LEN);
    let origin = Origin::start(bytes);
    let daemon = Daemon::start();
    attach(&daemon, &origin, &json!({}));
    let mut wire = Wire::connect(&socket(&daemon, "nbd.sock"));
    wire.go_extended("img", &["bedplate:presence"]);
    let status = |wire: &mut Wire| {
        let chunks = wire.extended(0, 7, 0, LEN as u64);
        chunks[0].extended_extents().1
    };
    // The first MiB may be on its way still: of it, what has come is told.
    loop {
        let now = status(&mut wire);
        let come = now[0].0;
        assert_eq!(now, [(come, 1), (LEN as u64 - come, 0)]);
        if come == MIB {
            break;
        }
        assert!(come < MIB, "{now:?}");
    }
    wire.read_extended(0, 32 * MIB, 4096);
    let now = status(&mut wire);
    assert_eq!(now[..2], [(MIB, 1), (31 * MIB, 0)]);
    assert_eq!((now[2].1, now[3].1), (1, 0), "{now:?}");
}

#[test]
fn readers_in_other_processes_read_what_is_here_and_ask_for_the_rest() {
    let bytes = patterned(LEN + 777);
    let origin = Origin::start(bytes.clone());
    let daemon = Daemon::start();
    attach(&daemon, &origin, &json!({}));
    let readers = [Mode::Pread, Mode::Mapped].map(|mode| {
        let options = Options { mode, ..Options::default() };
        Replica::attach(socket(&daemon, "replica.sock"), "img", options).unwrap()
    });
    let mut buf = vec![0; 70_000];
    for (turn, at) in (0..).zip([5_usize, 12 << 20, 33 << 20, LEN + 777 - 70_000]) {
        for reader in &readers {
            reader.read_at(&mut buf, at as u64).unwrap();
            assert!(buf == bytes[at..at + 70_000], "{at} {turn}");
        }
    }
    let before = origin.small_requests().len();
    for reader in &readers {
        reader.read_at(&mut buf[..4096], (33 << 20) + 100).unwrap();
        assert!(buf[..4096] == bytes[(33 << 20) + 100..(33 << 20) + 100 + 4096]);
    }
    assert_eq!(origin.small_requests().len(), before);
    origin.open(&daemon, "img");
    daemon.wait_for("img", "ready");
    let mut all = vec![0; bytes.len()];
    for reader in &readers {
        reader.read_at(&mut all, 0).unwrap();
        assert!(all == bytes);
    }
}

#[test]
fn an_attachment_outlives_a_daemon_that_is_killed_in_the_middle() {
    let bytes = patterned(LEN);
    let origin = Origin::start(bytes.clone());
    let daemon = Daemon::start();
    attach(&daemon, &origin, &json!({}));
    assert!(nbd(&daemon).read_structured(0, 20 * MIB, 4096) == bytes[20 << 20..(20 << 20) + 4096]);
    let (_, dir) = daemon.end("KILL");
    let daemon = Daemon::start_in(dir, "");
    let held = stream(&daemon);
    assert_eq!((&held["wait"], &held["state"]), (&json!("stream"), &json!("ready")));
    let mut wire = nbd(&daemon);
    for at in [0, 20 << 20, 60 << 20] {
        assert!(wire.read_structured(0, at as u64, 8192) == bytes[at..at + 8192], "{at}");
    }
    origin.open(&daemon, "img");
    daemon.wait_for("img", "ready");
    assert!(wire.read_structured(0, 40 * MIB, 1 << 20) == bytes[40 << 20..41 << 20]);
}

#[test]
fn the_command_line_reads_early_and_says_so() {
    let bytes = patterned(LEN);
    let origin = Origin::start(bytes);
    let daemon = Daemon::start();
    let url = format!("{}/disk.img", origin.server.url);
    assert!(daemon.cli(&["create", &url, "--name", "img"]).status.success());
    let attached = daemon.cli(&["attach", "img", "--stream"]);
    assert!(attached.status.success(), "{}", String::from_utf8_lossy(&attached.stderr));
    assert!(String::from_utf8_lossy(&attached.stdout).starts_with("nbd+unix://"));
    assert_eq!(state(&daemon), "in-progress");
}

#[test]
fn an_engine_that_ends_lets_go_of_who_waits() {
    let bytes = patterned(LEN);
    let origin = Origin::start(bytes);
    let daemon = Daemon::start();
    attach(&daemon, &origin, &json!({}));
    let mut wire = nbd(&daemon);
    // From a MiB on, the source keeps everybody waiting.
    pause(&daemon, "img", true);
    wire.request(0, 0, 1, 30 * MIB, 4096);
    let (code, _dir) = daemon.end("TERM");
    assert_eq!(code, Some(0));
}

pub fn sha256(bytes: &[u8]) -> String {
    use sha2::Digest;
    use std::fmt::Write;
    sha2::Sha256::digest(bytes).iter().fold(String::new(), |mut text, byte| {
        write!(text, "{byte:02x}").unwrap();
        text
    })
}

#[test]
fn what_readers_do_and_how_long_they_wait_is_told() {
    let bytes = patterned(LEN);
    let origin = Origin::start(bytes);
    let daemon = Daemon::start();
    attach(&daemon, &origin, &json!({}));
    let mut wire = nbd(&daemon);
    // Opening may have waited for the header.
    let before = &daemon.get("/v1/stats")["images"][0]["demand_misses"];
    let misses = before.as_u64().unwrap() + 3;
    for at in [0, 4096, 30 * MIB, 31 * MIB] {
        wire.read_structured(0, at, 4096);
    }
    let options = Options { mode: Mode::Pread, ..Options::default() };
    let replica = Replica::attach(socket(&daemon, "replica.sock"), "img", options).unwrap();
    replica.read_at(&mut [0; 512], 50 * MIB).unwrap();
    let stats = daemon.get("/v1/stats");
    let image = &stats["images"][0];
    assert_eq!(
        (&image["sessions"], &image["demand_misses"]),
        (&json!(2), &json!(misses)),
        "{stats}"
    );
    assert_eq!((&image["requests"], &image["errors"]), (&json!(5), &json!(0)), "{stats}");
    for (via, count) in [("nbd", 4), ("replica", 1), ("attach", 1)] {
        let times = &image[via];
        assert_eq!(times["count"], json!(count), "{via} {stats}");
        assert!(times["p999_us"].as_u64().unwrap() >= times["p50_us"].as_u64().unwrap());
    }
    assert_eq!(image["nbd"]["buckets"].as_array().unwrap().len(), 27);
    let (status, metrics) = crate::control_support::curl(&daemon.socket, "GET", "/metrics", None);
    assert_eq!(status, 200);
    for line in [
        &format!("bedplate_demand_misses_total{{image=\"img\"}} {misses}"),
        "bedplate_requests_total{image=\"img\"} 5",
        "bedplate_request_seconds_count{image=\"img\",via=\"nbd\"} 4",
        "bedplate_request_seconds_bucket{le=\"+Inf\",image=\"img\",via=\"replica\"} 1",
    ] {
        assert!(metrics.lines().any(|found| found == line), "{line}\n{metrics}");
    }
    let top = daemon.cli(&["top", "--once"]);
    let text = String::from_utf8_lossy(&top.stdout).into_owned();
    assert!(top.status.success(), "{}", String::from_utf8_lossy(&top.stderr));
    assert!(text.starts_with("IMAGE") && text.contains("\nimg  "), "{text}");
}
