//! Promise: several connections are used where they help, and whatever happens to them the bytes
//! are right and none is asked for twice.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use crate::fault_server::{Cut, FaultServer, Reply, Request};
use crate::{content, engine, sha256};
use bedplate::fetch::{DigestKind, Expect, Policy, Progress, Source, SourceUrl};
use bedplate::import::{ImportError, Layout, PullRequest, Pulled, pull};
use bedplate::ring::{Choice, probe};

const MIB: usize = 1 << 20;
const ETAG: &str = "\"one\"";
/// 64 KiB each 4 ms: about 16 MB/s and connection.
const PACE: Duration = Duration::from_millis(4);

fn paced(request: &Request, bytes: &[u8], etag: &str) -> Reply {
    let mut reply = Reply::ranged(request, bytes, etag);
    reply.pace = PACE;
    reply
}

fn bring_in(server: &FaultServer, expect: &Expect) -> (Result<Pulled, ImportError>, Vec<u8>, u32) {
    let temp = tempfile::tempdir().unwrap();
    let policy = Policy {
        stall_timeout: Duration::from_millis(500),
        backoff: Duration::from_millis(1),
        ..Policy::default()
    };
    let engine =
        bedplate::fetch::Engine::alone(probe(temp.path(), Choice::Auto).unwrap(), policy, 32);
    let url = SourceUrl::parse(&format!("{}/x", server.url)).unwrap();
    let output = temp.path().join("out.img");
    let source = Source::new(url).expecting(expect.clone());
    let request = PullRequest { source, layout: Layout::AsIs, output: output.clone() };
    let progress = Arc::new(Progress::default());
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let (watched, most) = (Arc::clone(&progress), Arc::new(AtomicUsize::new(0)));
    let seen = Arc::clone(&most);
    runtime.spawn(async move {
        loop {
            seen.fetch_max(watched.snapshot().connections as usize, Ordering::Relaxed);
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    });
    let pulled = runtime.block_on(pull(&engine, &request, &progress));
    let bytes = std::fs::read(output).unwrap_or_default();
    (pulled, bytes, most.load(Ordering::Relaxed) as u32)
}

fn expect(bytes: &[u8]) -> Expect {
    Expect::parse(Some(&sha256(bytes)), None).unwrap()
}

/// The bytes that were asked for in bounded ranges, and how often a byte was in two of them.
fn overlaps(requests: &[Request]) -> u64 {
    let mut bounded: Vec<_> =
        requests.iter().filter_map(|r| r.range.clone()).filter(|r| r.end != u64::MAX).collect();
    bounded.sort_by_key(|range| range.start);
    bounded.windows(2).map(|pair| pair[0].end.saturating_sub(pair[1].start)).sum()
}

#[test]
fn a_server_that_limits_each_connection_is_asked_on_several() {
    let bytes = content(64 * MIB + 12_345, 31);
    let served = bytes.clone();
    let server = FaultServer::start(move |r| paced(r, &served, ETAG));
    let (pulled, got, connections) = bring_in(&server, &expect(&bytes));
    assert_eq!(pulled.unwrap().digests.whole.get(DigestKind::Sha256).unwrap(), sha256(&bytes));
    assert!(got == bytes);
    assert!(connections >= 4, "{connections} connections");
    assert_eq!(overlaps(&server.requests()), 0, "pieces do not overlap");
    for request in &server.requests()[1..] {
        assert_eq!(request.header("if-match").unwrap(), ETAG, "each piece is bound to the version");
    }
}

#[test]
fn transfers_from_one_server_share_its_connections() {
    const TRANSFERS: usize = 4;
    const MOST: usize = 8;
    let bytes = content(32 * MIB, 34);
    let (served, arrived) = (bytes.clone(), Arc::new(AtomicUsize::new(0)));
    let server = FaultServer::start(move |request| {
        // They begin together.
        arrived.fetch_add(1, Ordering::SeqCst);
        while arrived.load(Ordering::SeqCst) < TRANSFERS {
            std::thread::sleep(Duration::from_millis(1));
        }
        paced(request, &served, ETAG)
    });
    let temp = tempfile::tempdir().unwrap();
    let policy = Policy { max_connections: MOST, ..Policy::default() };
    let engine = bedplate::fetch::Engine::alone(
        probe(temp.path(), Choice::Auto).unwrap(),
        policy,
        32 * TRANSFERS,
    );
    let engine = bedplate::fetch::Engine { buffers: 32, ..engine };
    let progress: Vec<Arc<Progress>> = (0..TRANSFERS).map(|_| Arc::default()).collect();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let (watched, most) = (progress.clone(), Arc::new(AtomicUsize::new(0)));
    let seen = Arc::clone(&most);
    runtime.spawn(async move {
        loop {
            let all = watched.iter().map(|one| one.snapshot().connections as usize).sum();
            seen.fetch_max(all, Ordering::Relaxed);
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    });
    let url = SourceUrl::parse(&format!("{}/x", server.url)).unwrap();
    let pulls: Vec<_> = progress
        .into_iter()
        .enumerate()
        .map(|(index, progress)| {
            let (engine, output) = (engine.clone(), temp.path().join(format!("{index}.img")));
            let source = Source::new(url.clone()).expecting(expect(&bytes));
            let request = PullRequest { source, layout: Layout::AsIs, output };
            runtime.spawn(async move { pull(&engine, &request, &progress).await })
        })
        .collect();
    for pulled in pulls {
        runtime.block_on(pulled).unwrap().unwrap();
    }
    for index in 0..TRANSFERS {
        assert!(std::fs::read(temp.path().join(format!("{index}.img"))).unwrap() == bytes);
    }
    let most = most.load(Ordering::Relaxed);
    assert!((TRANSFERS + 1..=MOST).contains(&most), "{most} connections");
}

#[test]
fn without_a_strong_etag_there_is_one_connection() {
    let bytes = content(20 * MIB, 32);
    let served = bytes.clone();
    let server = FaultServer::start(move |r| paced(r, &served, "W/\"weak\""));
    let (pulled, got, connections) = bring_in(&server, &expect(&bytes));
    pulled.unwrap();
    assert!(got == bytes);
    assert_eq!((connections, server.requests().len()), (1, 1), "no answer could prove its version");
}

#[test]
fn a_server_that_allows_two_connections_is_used_with_two() {
    let bytes = content(48 * MIB, 33);
    let (served, open) = (bytes.clone(), Arc::new(AtomicUsize::new(0)));
    let refused = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&refused);
    // A body is counted as open until the next request on its connection, so bounded pieces are
    // told apart from the first answer by their range.
    let server = FaultServer::start(move |request| {
        let bounded = request.range.as_ref().is_some_and(|range| range.end != u64::MAX);
        if bounded && open.fetch_add(1, Ordering::SeqCst) % 3 == 2 {
            count.fetch_add(1, Ordering::SeqCst);
            return Reply::status("503 Too many connections");
        }
        paced(request, &served, ETAG)
    });
    let (pulled, got, _) = bring_in(&server, &expect(&bytes));
    pulled.unwrap();
    assert!(got == bytes);
    assert!(refused.load(Ordering::SeqCst) > 0, "the server refused some");
}

#[test]
fn pieces_that_break_at_any_byte_go_on_where_they_broke() {
    for (cut, seed) in [(Cut::Close as fn(usize) -> Cut, 34), (Cut::Reset, 35), (Cut::Stall, 36)] {
        let bytes = content(40 * MIB + 77, seed);
        let served = bytes.clone();
        let server = FaultServer::start(move |request| {
            let reply = paced(request, &served, ETAG);
            // Every other piece breaks, each at another byte.
            let odd = request.index % 2 == 1;
            if odd { reply.cut(cut(300_001 + 7919 * request.index)) } else { reply }
        });
        let (pulled, got, _) = bring_in(&server, &expect(&bytes));
        pulled.unwrap();
        assert!(got == bytes);
    }
}

#[test]
fn an_object_replaced_while_several_connections_read_it_is_never_mixed() {
    for knows_if_match in [true, false] {
        let (old, new) = (content(48 * MIB, 37), content(48 * MIB, 38));
        let (before, after) = (old.clone(), new.clone());
        let server = FaultServer::start(move |request| {
            // The object is replaced once several connections are at work.
            if request.index < 6 {
                return paced(request, &before, "\"old\"");
            }
            let asked = request.header("if-match");
            if knows_if_match && asked.is_some_and(|tag| tag != "\"new\"") {
                return Reply::status("412 Precondition Failed");
            }
            Reply::ranged(request, &after, "\"new\"")
        });
        let (pulled, got, connections) = bring_in(&server, &Expect::default());
        pulled.unwrap();
        assert!(connections > 1, "the replacement met several connections");
        assert!(got == new, "if-match known: {knows_if_match}");
    }
}

#[test]
fn a_run_that_ends_in_the_middle_goes_on_without_asking_for_what_is_durable() {
    let bytes = content(48 * MIB, 39);
    let (served, broken) = (bytes.clone(), Arc::new(AtomicBool::new(true)));
    let down = Arc::clone(&broken);
    let server = FaultServer::start(move |request| {
        if down.load(Ordering::SeqCst) && request.index > 8 {
            return Reply::status("404 Not Found");
        }
        paced(request, &served, ETAG)
    });
    let temp = tempfile::tempdir().unwrap();
    let mut engine = engine(temp.path(), Choice::Auto);
    engine = bedplate::fetch::Engine::alone(engine.probe, engine.policy, 32);
    let url = SourceUrl::parse(&format!("{}/x", server.url)).unwrap();
    let output = temp.path().join("out.img");
    let request = PullRequest {
        source: Source::new(url).expecting(expect(&bytes)),
        layout: Layout::AsIs,
        output: output.clone(),
    };
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let run = || {
        let progress = Arc::new(Progress::default());
        runtime.block_on(pull(&engine, &request, &progress)).map(|p| p.received_bytes)
    };
    assert!(run().unwrap_err().report().contains("404"));
    broken.store(false, Ordering::SeqCst);
    let sent_before = server.sent();
    let received = run().unwrap();
    assert!(std::fs::read(&output).unwrap() == bytes);
    assert!(received < bytes.len() as u64, "a part was here");
    // A lone connection's body may be dropped when others join: that costs what is in flight.
    let sent = server.sent() - sent_before;
    assert!(sent <= received + (8 << 20), "{sent} bytes were sent, {received} taken");
}

/// Pulls from the first server with the others as its mirrors.
fn with_mirrors(
    servers: &[&FaultServer],
    expect: &Expect,
) -> (Result<Pulled, ImportError>, Vec<u8>) {
    let temp = tempfile::tempdir().unwrap();
    let policy = Policy {
        stall_timeout: Duration::from_millis(500),
        backoff: Duration::from_millis(1),
        ..Policy::default()
    };
    let engine =
        bedplate::fetch::Engine::alone(probe(temp.path(), Choice::Auto).unwrap(), policy, 32);
    let mut urls =
        servers.iter().map(|s| SourceUrl::parse(&format!("{}/x?key=hunter2", s.url)).unwrap());
    let mut source = Source::new(urls.next().unwrap()).expecting(expect.clone());
    source.mirrors = urls.collect();
    let output = temp.path().join("out.img");
    let request = PullRequest { source, layout: Layout::AsIs, output: output.clone() };
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let pulled = runtime.block_on(pull(&engine, &request, &Arc::new(Progress::default())));
    (pulled, std::fs::read(output).unwrap_or_default())
}

#[test]
fn mirrors_share_the_work_and_each_is_bound_to_its_own_version() {
    let bytes = content(48 * MIB, 71);
    let served = bytes.clone();
    let [a, b] = ["\"a\"", "\"b\""].map(|etag| {
        let served = served.clone();
        FaultServer::start(move |request| paced(request, &served, etag))
    });
    let (pulled, got) = with_mirrors(&[&a, &b], &expect(&bytes));
    pulled.unwrap();
    assert!(got == bytes);
    for (server, etag) in [(&a, "\"a\""), (&b, "\"b\"")] {
        assert!(server.sent() > 4 << 20, "{} bytes came from one of them", server.sent());
        // Of a mirror, two connections may have asked before its version was known.
        let bound: Vec<_> =
            server.requests().iter().filter_map(|request| request.header("if-match")).collect();
        assert!(!bound.is_empty() && bound.iter().all(|tag| tag == etag), "{bound:?}");
    }
    // Without a digest nothing could prove that they have the same bytes: one source, no mirror.
    let before = b.requests().len();
    with_mirrors(&[&a, &b], &Expect::default()).0.unwrap();
    assert_eq!(b.requests().len(), before);
}

#[test]
fn a_mirror_takes_over_when_the_source_dies_and_a_bad_one_is_left() {
    let bytes = content(24 * MIB, 72);
    let served = bytes.clone();
    let good = FaultServer::start(move |request| Reply::ranged(request, &served, "\"good\""));
    let gone = FaultServer::start(|_| Reply::status("404 Not Found"));
    let served = bytes.clone();
    let dying = FaultServer::start(move |request| match request.index {
        0 => paced(request, &served, ETAG).cut(Cut::Reset(9 << 20)),
        _ => Reply::status("503 Gone"),
    });
    let short = FaultServer::start(|request| Reply::ranged(request, &[1; 1000], "\"short\""));
    for servers in [[&gone, &good], [&dying, &good], [&good, &short]] {
        let (pulled, got) = with_mirrors(&servers, &expect(&bytes));
        pulled.unwrap_or_else(|error| panic!("{}", error.report()));
        assert!(got == bytes);
    }
    let (pulled, _) = with_mirrors(&[&gone, &short], &expect(&bytes));
    let text = pulled.unwrap_err().report();
    assert!(!text.contains("hunter2"), "{text}");
}

#[test]
fn a_mirror_with_other_bytes_is_found_out_and_done_without() {
    let (bytes, other) = (content(48 * MIB, 73), content(48 * MIB, 74));
    let served = bytes.clone();
    let good = FaultServer::start(move |request| paced(request, &served, ETAG));
    let bad = FaultServer::start(move |request| paced(request, &other, "\"bad\""));
    let (pulled, got) = with_mirrors(&[&good, &bad], &expect(&bytes));
    pulled.unwrap_or_else(|error| panic!("{}", error.report()));
    assert!(bad.sent() > 0, "the bad one was asked");
    assert!(got == bytes);
}
