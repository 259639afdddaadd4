//! A source that stands still while it sends what comes in its turn: readers get it elsewhere.

use std::ops::Range;
use std::time::Duration;

use serde_json::{Value, json};

use crate::control_support::Daemon;
use crate::fault_server::{Cut, FaultServer, Reply};
use crate::nbd_support::patterned;
use crate::origin::{MIB, nbd, state, stream};
use crate::reads::sha256;

const KIB: u64 = 1 << 10;
const LEN: usize = 24 << 20;
/// So much comes of the first answer.
const SENT: u64 = 300 * KIB;

fn image(daemon: &Daemon) -> Value {
    daemon.get("/v1/stats")["images"][0].clone()
}

/// Whoever asks for more than a MiB gets the first bytes of the file, and of all else nothing.
fn still(bytes: &[u8]) -> FaultServer {
    let bytes = bytes.to_vec();
    FaultServer::start(move |request| {
        let reply = Reply::ranged(request, &bytes, "\"one\"");
        let range = request.range.clone().unwrap_or(0..u64::MAX);
        if range.end.min(bytes.len() as u64) - range.start <= MIB {
            return reply;
        }
        let sent = if range.start == 0 { SENT } else { 0 };
        reply.cut(Cut::Stall(usize::try_from(sent).unwrap()))
    })
}

fn small_requests(server: &FaultServer) -> usize {
    let ranges = server.requests().into_iter().filter_map(|request| request.range);
    ranges.filter(|range| range.end.min(LEN as u64) - range.start <= MIB).count()
}

#[test]
fn what_stands_still_in_its_turn_is_asked_for_elsewhere_once_a_reader_wants_it() {
    let bytes = patterned(LEN);
    let server = still(&bytes);
    let daemon = Daemon::start();
    let wanted = json!({"name": "img", "url": format!("{}/disk.img", server.url)}).to_string();
    daemon.curl("POST", "/v1/images", Some(&wanted));
    stream(&daemon);
    let mut wire = nbd(&daemon);
    let mut read = |at: u64, len: u32| {
        let from = usize::try_from(at).unwrap();
        assert!(wire.read_structured(0, at, len) == bytes[from..from + len as usize], "{at}");
    };
    // What came of a MiB is read before the MiB is full.
    read(150 * KIB, 4096);
    assert_eq!((small_requests(&server), &image(&daemon)["demand_stalls"]), (0, &json!(0)));
    // The rest of it stands still, and so does the next MiB.
    read(700 * KIB, 4096);
    assert_eq!(image(&daemon)["demand_stalls"], 1);
    assert_eq!(small_requests(&server), 1);
    read(1500 * KIB, 4096);
    assert_eq!(image(&daemon)["demand_stalls"], 2);
    assert_eq!(small_requests(&server), 2);
    // Nothing of that was a failure of the transfer, which waits longer.
    let copy = &daemon.get("/v1/images/img")["copies"][0];
    assert_eq!((&copy["retries"], state(&daemon).as_str()), (&json!(0), "in-progress"));
}

#[test]
fn the_end_of_a_long_piece_that_its_connection_reaches_late_is_fetched_by_another_one() {
    let bytes = patterned(96 << 20);
    let (all, total) = (bytes.clone(), bytes.len() as u64);
    let is_small = move |range: &Range<u64>| range.end.min(total) - range.start <= MIB;
    // So slow for each connection that there are soon several, with some MiBs each.
    let server = FaultServer::start(move |request| {
        let mut reply = Reply::ranged(request, &all, "\"one\"");
        if !request.range.as_ref().is_some_and(is_small) {
            reply.pace = Duration::from_millis(50);
        }
        reply
    });
    let daemon = Daemon::start();
    let wanted = json!({"name": "img", "url": format!("{}/disk.img", server.url)}).to_string();
    daemon.curl("POST", "/v1/images", Some(&wanted));
    stream(&daemon);
    let mut wire = nbd(&daemon);
    let ranges = || server.requests().into_iter().filter_map(|request| request.range);
    let long = loop {
        let is_long = |range: &Range<u64>| range.end <= total && range.end - range.start > 2 * MIB;
        if let Some(range) = ranges().find(is_long) {
            break range;
        }
        std::thread::sleep(Duration::from_millis(1));
    };
    let at = usize::try_from(long.end).unwrap() - 5000;
    assert!(wire.read_structured(0, at as u64, 4096) == bytes[at..at + 4096]);
    let last = long.end - MIB..long.end;
    let out_of_turn = ranges().filter(|range| is_small(range) && last.contains(&range.start));
    assert_eq!(out_of_turn.count(), 1, "{long:?}");
    daemon.wait_for("img", "ready");
    let digest = daemon.get("/v1/images/img")["digests"]["sha256"].as_str().unwrap().to_owned();
    assert_eq!(digest, sha256(&bytes));
}
