//! Promise: one connection that gives a byte now and then holds up no transfer, whatever it brings, and a
//! source that is slow on all of them is not asked for anything twice.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use crate::control_support::{self, Daemon};
use crate::fault_server::{Cut, FaultServer, Reply, Request};
use crate::unpack::packed;
use crate::{content, sha256};
use bedplate::fetch::{Engine, Expect, Policy, Progress, Snapshot, Source, SourceUrl};
use bedplate::import::{Layout, PullRequest, pull};
use bedplate::ring::{Choice, probe};

const MIB: usize = 1 << 20;
const ETAG: &str = "\"one\"";
/// What comes of a piece before it trickles.
const SENT: usize = 100_000;
/// A MiB takes six hours at this rate.
const DRIP: Duration = Duration::from_millis(20);

fn url_of(server: &FaultServer) -> SourceUrl {
    SourceUrl::parse(&format!("{}/x", server.url)).unwrap()
}

/// What is served, with its digest.
fn source_of(server: &FaultServer, served: &[u8]) -> Source {
    Source::new(url_of(server)).expecting(Expect::parse(Some(&sha256(served)), None).unwrap())
}

/// Brings the file in, with these buffers and connections; how it went.
fn bring_in(server: &FaultServer, bytes: &[u8], buffers: usize, connections: usize) -> Snapshot {
    pulled(source_of(server, bytes), Layout::AsIs, bytes, buffers, connections)
}

/// The same from any source, in any layout; `bytes` is what comes out.
fn pulled(
    source: Source,
    layout: Layout,
    bytes: &[u8],
    buffers: usize,
    connections: usize,
) -> Snapshot {
    let temp = tempfile::tempdir().unwrap();
    let policy = Policy { max_connections: connections, ..Policy::default() };
    let engine = Engine::alone(probe(temp.path(), Choice::Auto).unwrap(), policy, buffers);
    let output = temp.path().join("out.img");
    let request = PullRequest { source, layout, output: output.clone() };
    let progress = Arc::new(Progress::default());
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(pull(&engine, &request, &progress)).unwrap();
    assert!(std::fs::read(output).unwrap() == bytes);
    progress.snapshot()
}

/// So slow for each connection that there are soon several.
fn paced(request: &Request, bytes: &[u8]) -> Reply {
    let mut reply = Reply::ranged(request, bytes, ETAG);
    reply.pace = Duration::from_millis(4);
    reply
}

/// A piece for one of several connections.
fn is_piece(request: &Request) -> bool {
    request.range.as_ref().is_some_and(|range| range.start > 0)
}

/// A server of `bytes`; the first piece that is as `chosen` says trickles.
fn trickling(
    bytes: &[u8],
    chosen: impl Fn(&Request, usize) -> bool + Send + Sync + 'static,
) -> FaultServer {
    let (bytes, met, count) = (bytes.to_vec(), AtomicBool::new(false), AtomicUsize::new(0));
    FaultServer::start(move |request| {
        let reply = paced(request, &bytes);
        let turn = if is_piece(request) { count.fetch_add(1, Ordering::SeqCst) } else { 0 };
        let trickles = is_piece(request)
            && reply.body.len() > 2 * SENT
            && chosen(request, turn)
            && !met.swap(true, Ordering::SeqCst);
        if trickles { reply.cut(Cut::Trickle(SENT, DRIP)) } else { reply }
    })
}

/// Bytes that came twice. Where one connection hands over to several, the end of its last read is dropped.
fn assert_none_twice(went: &Snapshot, bytes: &[u8]) {
    let twice = went.bytes_received - bytes.len() as u64;
    assert!(twice <= MIB as u64, "{twice} bytes came twice");
}

#[test]
fn the_last_piece_of_a_transfer_is_taken_over_from_a_connection_that_trickles() {
    let bytes = content(48 * MIB, 61);
    // What ends where the file does is asked for without an end.
    let server = trickling(&bytes, |request, _| {
        request.range.as_ref().is_some_and(|range| range.end == u64::MAX)
    });
    let went = bring_in(&server, &bytes, 32, 16);
    assert_eq!((went.overtaken, went.retries), (1, 0));
    assert_none_twice(&went, &bytes);
}

#[test]
fn a_piece_that_trickles_in_the_middle_does_not_hold_up_those_behind_it() {
    let bytes = content(96 * MIB, 62);
    // Digests are made in order, from memory: soon all buffers hold what comes behind it.
    let server = trickling(&bytes, |_, turn| turn == 3);
    let went = bring_in(&server, &bytes, 24, 16);
    assert_eq!((went.overtaken, went.retries), (1, 0));
    assert_none_twice(&went, &bytes);
}

#[test]
fn a_lone_connection_that_becomes_a_trickle_is_made_anew() {
    let bytes = content(24 * MIB, 63);
    let served = bytes.clone();
    let server = FaultServer::start(move |request| {
        let reply = Reply::ranged(request, &served, ETAG);
        if request.index == 0 { reply.cut(Cut::Trickle(20 * MIB + 5, DRIP)) } else { reply }
    });
    let went = bring_in(&server, &bytes, 16, 1);
    assert_eq!((went.overtaken, went.retries), (1, 0));
    let ranges: Vec<_> = server.requests().into_iter().filter_map(|r| r.range).collect();
    assert_eq!(ranges.len(), 2, "{ranges:?}");
    assert!(ranges[1].start > 20 * MIB as u64, "what came is not asked for again: {ranges:?}");
}

#[test]
fn a_source_that_is_slow_on_all_connections_is_not_asked_for_anything_twice() {
    let bytes = content(12 * MIB, 64);
    let served = bytes.clone();
    let server = FaultServer::start(move |request| {
        let mut reply = Reply::ranged(request, &served, ETAG);
        // 128 KiB a second and connection: a piece takes several seconds.
        reply.pace = Duration::from_millis(500);
        reply
    });
    let went = bring_in(&server, &bytes, 32, 16);
    assert_eq!((went.overtaken, went.retries), (0, 0));
    assert_none_twice(&went, &bytes);
}

#[test]
fn a_source_that_may_have_one_connection_only_is_asked_anew_when_that_trickles() {
    let bytes = content(2 * MIB, 75);
    let served = bytes.clone();
    let server = FaultServer::start(move |request| {
        // No ETag: only the digest tells in the end, and more than one connection is not tried.
        let reply = Reply::ranged(request, &served, "W/\"one\"");
        if request.index == 0 { reply.cut(Cut::Trickle(1000, DRIP)) } else { reply }
    });
    let went = bring_in(&server, &bytes, 16, 16);
    assert_eq!((went.overtaken, went.retries), (1, 0));
    let starts = starts(&server);
    assert!(starts.len() == 2 && starts[1] >= 1000, "{starts:?}");
}

fn starts(server: &FaultServer) -> Vec<u64> {
    server.requests().into_iter().map(|r| r.range.map_or(0, |range| range.start)).collect()
}

#[test]
fn of_several_mirrors_the_one_that_trickled_is_the_last_that_is_asked() {
    let bytes = content(24 * MIB, 65);
    let [slow, good] = [true, false].map(|trickles| {
        let served = bytes.clone();
        FaultServer::start(move |request| {
            let reply = Reply::ranged(request, &served, ETAG);
            let is_it = trickles && request.index == 0;
            if is_it { reply.cut(Cut::Trickle(9 * MIB, DRIP)) } else { reply }
        })
    });
    let mut source = source_of(&slow, &bytes);
    source.mirrors = vec![url_of(&good)];
    let went = pulled(source, Layout::AsIs, &bytes, 16, 1);
    assert_eq!((went.overtaken, went.retries), (1, 0));
    assert_eq!((slow.requests().len(), good.requests().len()), (1, 1));
}

#[test]
fn the_first_bytes_of_a_source_are_taken_over_from_a_connection_that_trickles() {
    let bytes = content(2 * MIB, 66);
    let served = bytes.clone();
    let server = FaultServer::start(move |request| {
        let reply = Reply::ranged(request, &served, ETAG);
        let sent = [1000, 20_000].get(request.index);
        sent.map_or(reply.clone(), |&sent| reply.cut(Cut::Trickle(sent, DRIP)))
    });
    let went = pulled(source_of(&server, &bytes), Layout::Raw, &bytes, 16, 1);
    assert_eq!((went.overtaken, went.retries), (2, 0));
    let starts = starts(&server);
    assert_eq!((starts.len(), starts[0], starts[3]), (4, 0, 0), "{starts:?}");
    assert!(starts[1] >= 1000 && starts[2] >= starts[1] + 20_000, "it came twice: {starts:?}");
}

#[test]
fn a_file_of_digests_is_taken_over_from_a_connection_that_trickles() {
    let bytes = content(MIB, 67);
    let sums = format!("{}{}  x\n", "# nothing\n".repeat(2000), sha256(&bytes));
    let served = bytes.clone();
    let server = FaultServer::start(move |request| {
        let of = if request.path == "/SUMS" { sums.as_bytes() } else { &served };
        let reply = Reply::ranged(request, of, ETAG);
        if request.index == 0 { reply.cut(Cut::Trickle(1000, DRIP)) } else { reply }
    });
    let mut source = Source::new(url_of(&server));
    source.checksum_url = Some(SourceUrl::parse(&format!("{}/SUMS", server.url)).unwrap());
    let went = pulled(source, Layout::AsIs, &bytes, 16, 1);
    assert_eq!((went.overtaken, went.retries), (1, 0));
    assert!(starts(&server)[1] >= 1000, "{:?}", starts(&server));
}

/// A compressed source with its digest.
fn packed_source(server: &FaultServer, stream: &[u8]) -> Source {
    let mut source = source_of(server, stream);
    source.unpack = true;
    source
}

#[test]
fn a_compressed_source_is_taken_over_from_connections_that_trickle() {
    let bytes = content(4 * MIB, 68);
    let Some(stream) = packed("gzip", &bytes) else { return };
    let served = stream.clone();
    let server = FaultServer::start(move |request| {
        let reply = Reply::ranged(request, &served, ETAG);
        // One from its beginning, when nobody knows how fast the source is; one in the middle.
        let sent = [10, 2 * MIB].get(request.index);
        sent.map_or(reply.clone(), |&sent| reply.cut(Cut::Trickle(sent, DRIP)))
    });
    let went = pulled(packed_source(&server, &stream), Layout::AsIs, &bytes, 16, 16);
    assert_eq!((went.overtaken, went.retries), (2, 0));
    let starts = starts(&server);
    assert_eq!(starts.len(), 3, "{starts:?}");
    assert!(starts[1] >= 10 && starts[2] >= starts[1] + 2 * MIB as u64, "{starts:?}");
    assert_eq!(server.requests()[1].header("if-match").unwrap(), ETAG);
    assert_eq!(went.bytes_received, stream.len() as u64, "nothing came twice");
}

#[test]
fn a_compressed_source_that_trickles_goes_on_from_a_mirror_and_stays_there() {
    let bytes = content(4 * MIB, 69);
    let Some(stream) = packed("gzip", &bytes) else { return };
    // The other's connection breaks once, which does not lead back to the first.
    let first = [(ETAG, Cut::Trickle(SENT, DRIP)), ("\"two\"", Cut::Close(MIB))];
    let [slow, good] = first.map(|(etag, cut)| {
        let served = stream.clone();
        FaultServer::start(move |request| {
            let reply = Reply::ranged(request, &served, etag);
            if request.index == 0 { reply.cut(cut) } else { reply }
        })
    });
    let mut source = packed_source(&slow, &stream);
    source.mirrors = vec![url_of(&good)];
    let went = pulled(source, Layout::AsIs, &bytes, 16, 16);
    assert_eq!((went.overtaken, went.retries), (1, 1));
    assert_eq!(slow.requests().len(), 1, "the one that trickled is the last that is asked");
    let starts = starts(&good);
    assert!(starts[0] >= SENT as u64 && starts[1] == starts[0] + MIB as u64, "{starts:?}");
    assert_eq!(good.requests()[0].header("if-match"), None, "its version is not that of the other");
    assert_eq!(good.requests()[1].header("if-match").unwrap(), "\"two\"");
}

#[test]
fn a_mirror_with_other_bytes_of_a_compressed_source_is_found_out_and_done_without() {
    let (bytes, other) = (content(4 * MIB, 70), content(4 * MIB, 71));
    let Some(stream) = packed("gzip", &bytes) else { return };
    let (served, wrong) = (stream.clone(), packed("gzip", &other).unwrap());
    let good = FaultServer::start(move |request| {
        let reply = Reply::ranged(request, &served, ETAG);
        if request.index == 0 { reply.cut(Cut::Trickle(SENT, DRIP)) } else { reply }
    });
    let bad = FaultServer::start(move |request| {
        // As long as the other.
        let mut bytes = wrong.clone();
        bytes.resize(stream_len(request), 0);
        Reply::ranged(request, &bytes, "\"two\"")
    });
    let mut source = packed_source(&good, &stream);
    source.mirrors = vec![SourceUrl::parse(&format!("{}/{}", bad.url, stream.len())).unwrap()];
    pulled(source, Layout::AsIs, &bytes, 16, 16);
    assert_eq!(bad.requests().len(), 1, "it was asked once");
}

/// The length that the path names.
fn stream_len(request: &Request) -> usize {
    request.path.trim_start_matches('/').parse().unwrap()
}

#[test]
fn a_compressed_source_that_cannot_be_continued_is_waited_for_and_that_is_said() {
    let bytes = content(MIB, 72);
    let Some(stream) = packed("gzip", &bytes) else { return };
    let served = stream.clone();
    // Its end takes eight seconds.
    let server = FaultServer::start(move |_| {
        Reply::whole(&served).cut(Cut::Trickle(served.len() - 400, DRIP))
    });
    let went = pulled(packed_source(&server, &stream), Layout::AsIs, &bytes, 16, 16);
    assert_eq!((went.overtaken, went.retries, server.requests().len()), (0, 0, 1));
    assert!(went.message.contains("cannot be continued"), "{}", went.message);
}

#[test]
fn a_compressed_source_that_is_slow_on_all_connections_is_not_asked_again() {
    let bytes = content(2 * MIB, 73);
    let Some(stream) = packed("gzip", &bytes) else { return };
    let served = stream.clone();
    let server = FaultServer::start(move |request| {
        let mut reply = Reply::ranged(request, &served, ETAG);
        // 128 KiB a second.
        reply.pace = Duration::from_millis(500);
        reply
    });
    let went = pulled(packed_source(&server, &stream), Layout::AsIs, &bytes, 16, 16);
    assert_eq!((went.overtaken, went.retries, server.requests().len()), (0, 0, 1));
}

#[test]
fn connections_that_were_left_are_shown_and_counted() {
    let bytes = content(4 * MIB, 74);
    let Some(stream) = packed("gzip", &bytes) else { return };
    let (served, is_seen) = (stream.clone(), Arc::new(AtomicBool::new(false)));
    let may_end = Arc::clone(&is_seen);
    let server = FaultServer::start(move |request| {
        let reply = Reply::ranged(request, &served, ETAG);
        if request.index == 0 {
            return reply.cut(Cut::Trickle(SENT, DRIP));
        }
        while !may_end.load(Ordering::SeqCst) {
            std::thread::sleep(Duration::from_millis(10));
        }
        reply
    });
    let daemon = Daemon::start();
    let url = format!("{}/x.gz", server.url);
    let created = daemon.cli(&["create", "--name", "img", "--fetch", &url]);
    assert!(created.status.success(), "{}", control_support::stderr(&created));
    while daemon.get("/v1/images/img")["copies"][0]["overtaken"] != 1 {
        std::thread::sleep(Duration::from_millis(10));
    }
    is_seen.store(true, Ordering::SeqCst);
    daemon.wait_for("img", "ready");
    let metrics = control_support::curl(&daemon.socket, "GET", "/metrics", None).1;
    assert!(metrics.contains("\nbedplate_overtaken_connections_total 1\n"), "{metrics}");
}
