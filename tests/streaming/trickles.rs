//! A source that trickles: a byte now and then is no stall, and yet readers get what they want elsewhere.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use serde_json::{Value, json};

use crate::control_support::Daemon;
use crate::expanded::image;
use crate::fault_server::{Cut, FaultServer, Reply, Request};
use crate::nbd_support::{Wire, patterned};
use crate::origin::{MIB, nbd, state, stream};
use crate::qcow2_common::have_qemu;
use crate::reads::sha256;

const KIB: u64 = 1 << 10;
const LEN: usize = 24 << 20;
/// So much comes of what trickles before it does: less than a unit, which would be handed over.
const SENT: usize = 50_000;
/// A MiB takes six hours at this rate.
const DRIP: Duration = Duration::from_millis(20);

fn stalls(daemon: &Daemon) -> u64 {
    daemon.get("/v1/stats")["images"][0]["demand_stalls"].as_u64().unwrap()
}

fn is_small(request: &Request, total: usize) -> bool {
    let range = request.range.clone().unwrap_or(0..u64::MAX);
    range.end.min(total as u64) - range.start <= MIB
}

fn small_ranges(server: &FaultServer, total: usize) -> Vec<Range<u64>> {
    let small = server.requests().into_iter().filter(|request| is_small(request, total));
    small.filter_map(|request| request.range).collect()
}

fn attach(server: &FaultServer) -> (Daemon, Wire) {
    let daemon = Daemon::start();
    let wanted = json!({"name": "img", "url": format!("{}/disk.img", server.url)}).to_string();
    daemon.curl("POST", "/v1/images", Some(&wanted));
    stream(&daemon);
    let wire = nbd(&daemon);
    (daemon, wire)
}

fn check(wire: &mut Wire, bytes: &[u8], at: u64, len: u32) {
    let from = usize::try_from(at).unwrap();
    assert!(wire.read_structured(0, at, len) == bytes[from..from + len as usize], "{at}");
}

#[test]
fn what_trickles_out_of_turn_is_asked_for_elsewhere_and_what_came_of_it_is_not() {
    let bytes = patterned(LEN);
    let (served, met) = (bytes.clone(), AtomicBool::new(false));
    let server = FaultServer::start(move |request| {
        let reply = Reply::ranged(request, &served, "\"one\"");
        if is_small(request, LEN) {
            let is_first = !met.swap(true, Ordering::SeqCst);
            return if is_first { reply.cut(Cut::Trickle(SENT, DRIP)) } else { reply };
        }
        reply.cut(Cut::Stall(if request.range == Some(0..u64::MAX) { 1 << 20 } else { 0 }))
    });
    let (daemon, mut wire) = attach(&server);
    let at = 10 * MIB;
    check(&mut wire, &bytes, at + 200 * KIB, 4096);
    let ranges = small_ranges(&server, LEN);
    assert_eq!((stalls(&daemon), ranges.len()), (1, 2), "{ranges:?}");
    let had = ranges[1].start - ranges[0].start;
    assert!(had >= SENT as u64 && ranges[1].end == ranges[0].end, "{ranges:?}");
    // The others did not have to wait.
    check(&mut wire, &bytes, at + 5 * MIB, 4096);
    let copy = &daemon.get("/v1/images/img")["copies"][0];
    assert_eq!((stalls(&daemon), &copy["retries"]), (1, &json!(0)));
}

#[test]
fn what_trickles_in_its_turn_is_asked_for_elsewhere_once_a_reader_wants_it() {
    let bytes = patterned(LEN);
    let served = bytes.clone();
    let server = FaultServer::start(move |request| {
        let reply = Reply::ranged(request, &served, "\"one\"");
        let sent = if request.range == Some(0..u64::MAX) { 300 << 10 } else { 0 };
        if is_small(request, LEN) { reply } else { reply.cut(Cut::Trickle(sent, DRIP)) }
    });
    let (daemon, mut wire) = attach(&server);
    check(&mut wire, &bytes, 150 * KIB, 4096);
    assert_eq!((stalls(&daemon), small_ranges(&server, LEN).len()), (0, 0));
    check(&mut wire, &bytes, 700 * KIB, 4096);
    check(&mut wire, &bytes, 1500 * KIB, 4096);
    let ranges = small_ranges(&server, LEN);
    assert_eq!((stalls(&daemon), ranges.len()), (2, 2), "{ranges:?}");
    assert!(ranges[0].start >= 300 * KIB, "what came of it is kept: {ranges:?}");
    let copy = &daemon.get("/v1/images/img")["copies"][0];
    assert_eq!((&copy["retries"], state(&daemon).as_str()), (&json!(0), "in-progress"));
}

#[test]
fn one_connection_of_several_that_trickles_holds_up_neither_readers_nor_the_end() {
    let bytes = patterned(64 << 20);
    let (served, met) = (bytes.clone(), AtomicBool::new(false));
    let server = FaultServer::start(move |request| {
        let mut reply = Reply::ranged(request, &served, "\"one\"");
        reply.pace = Duration::from_millis(4);
        let is_long =
            reply.body.len() > 2 << 20 && request.range.as_ref().is_some_and(|r| r.start > 0);
        if is_long && !met.swap(true, Ordering::SeqCst) {
            return reply.cut(Cut::Trickle(SENT, DRIP));
        }
        reply
    });
    let (daemon, mut wire) = attach(&server);
    let long = loop {
        let long = server
            .requests()
            .into_iter()
            .filter_map(|request| request.range)
            .find(|range| range.start > 0 && range.end.min(64 << 20) - range.start > 2 * MIB);
        match long {
            Some(range) => break range,
            None => std::thread::sleep(Duration::from_millis(1)),
        }
    };
    // Where it stands, and at its end.
    check(&mut wire, &bytes, long.start + 200 * KIB, 4096);
    check(&mut wire, &bytes, long.end.min(64 << 20) - 5000, 4096);
    daemon.wait_for("img", "ready");
    let digest = daemon.get("/v1/images/img")["digests"]["sha256"].as_str().unwrap().to_owned();
    assert_eq!(digest, sha256(&bytes));
}

#[test]
fn a_source_that_is_slow_as_a_whole_is_waited_for_and_hardly_asked_in_double() {
    let bytes = patterned(8 << 20);
    let served = bytes.clone();
    let server = FaultServer::start(move |request| {
        let mut reply = Reply::ranged(request, &served, "\"one\"");
        // 64 KiB a second: what is wanted takes four.
        reply.pace = Duration::from_secs(1);
        reply
    });
    let (daemon, mut wire) = attach(&server);
    for at in [5 * MIB, 3 * MIB + 17, 7 * MIB] {
        check(&mut wire, &bytes, at, 4096);
    }
    daemon.wait_for("img", "ready");
    let digest = daemon.get("/v1/images/img")["digests"]["sha256"].as_str().unwrap().to_owned();
    assert_eq!(digest, sha256(&bytes));
    let again = server.sent() - bytes.len() as u64;
    let copy: Value = daemon.get("/v1/images/img")["copies"][0].clone();
    assert!(stalls(&daemon) <= 8, "{}", daemon.log());
    assert!(again <= 2 * MIB, "{again} bytes were sent for nothing");
    assert_eq!(copy["retries"], 0);
}

#[test]
fn a_cluster_that_trickles_before_its_turn_is_asked_for_elsewhere() {
    if !have_qemu() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (source, bytes) = image(dir.path(), 90, &["-o", "cluster_size=2M"]);
    let (trickles, total) = (Arc::new(AtomicBool::new(false)), source.len() as u64);
    let is_armed = Arc::clone(&trickles);
    let len_of = move |range: &Range<u64>| range.end.min(total) - range.start;
    let server = FaultServer::start(move |request| {
        let reply = Reply::ranged(request, &source, "\"one\"");
        let range = request.range.clone().unwrap_or(0..u64::MAX);
        if len_of(&range) > 4 * MIB {
            return reply.cut(Cut::Stall(0));
        }
        if is_armed.swap(false, Ordering::SeqCst) {
            return reply.cut(Cut::Trickle(500_000, Duration::from_millis(20)));
        }
        reply
    });
    let daemon = Daemon::start();
    let url = format!("{}/disk.img", server.url);
    let wanted = json!({"name": "img", "url": url, "layout": "raw"}).to_string();
    assert_eq!(daemon.curl("POST", "/v1/images", Some(&wanted)).0, 201);
    stream(&daemon);
    let mut wire = nbd(&daemon);
    let ranges = || server.requests().into_iter().filter_map(|request| request.range);
    // Once the tables are here, and all of the rest is asked for.
    while !ranges().any(|range| len_of(&range) > 4 * MIB) {
        std::thread::sleep(Duration::from_millis(1));
    }
    trickles.store(true, Ordering::SeqCst);
    let (at, before) = (19 << 20, ranges().count());
    assert!(wire.read_structured(0, at as u64, 4096) == bytes[at..at + 4096]);
    let stats = daemon.get("/v1/stats");
    assert_eq!(stats["images"][0]["demand_stalls"], 1, "{stats}");
    let ranges: Vec<_> = ranges().skip(before).collect();
    let [first, second] = &ranges[..] else { panic!("{ranges:?}") };
    assert!(second.start >= first.start + 500_000 && second.end == first.end, "{ranges:?}");
}
