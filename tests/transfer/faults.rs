//! Promise: whatever a server does, a transfer ends with the right bytes or one clear error, and
//! never fetches again what is durable.

use std::path::Path;
use std::sync::Arc;

use crate::fault_server::{Cut, FaultServer, Reply, Request};
use crate::{content, engine, sha256};
use bedplate::disk::{Dir, FileNames, Filling, Space, Version};
use bedplate::fetch::{Class, DigestKind, Expect, Policy, Progress, Source, SourceUrl};
use bedplate::import::{ImportError, Layout, PullRequest, Pulled, pull};
use bedplate::ring::Choice;

const LEN: usize = 5 * 1024 * 1024 + 4321;
const UNIT: u64 = 64 * 1024;
const ETAG: &str = "\"one\"";

struct Case {
    temp: tempfile::TempDir,
    server: FaultServer,
    policy: Option<Policy>,
}

impl Case {
    fn new(server: FaultServer) -> Self {
        Self { temp: tempfile::tempdir().unwrap(), server, policy: None }
    }

    fn output(&self) -> std::path::PathBuf {
        self.temp.path().join("out.img")
    }

    fn pull(&self, path: &str, expect: &Expect) -> Result<Pulled, ImportError> {
        let mut engine = engine(self.temp.path(), Choice::Auto);
        if let Some(policy) = &self.policy {
            engine.policy = policy.clone();
        }
        let request = PullRequest {
            source: Source::new(SourceUrl::parse(&format!("{}{path}", self.server.url)).unwrap())
                .expecting(expect.clone()),
            layout: Layout::AsIs,
            output: self.output(),
        };
        let runtime = tokio::runtime::Runtime::new().unwrap();
        runtime.block_on(pull(&engine, &request, &Arc::new(Progress::default())))
    }

    fn refused(&self, expect: &Expect) -> String {
        let error = self.pull("/x", expect).unwrap_err();
        assert!(!self.output().exists(), "no file under the final name");
        error.report()
    }
}

fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<_> = dir
        .read_dir()
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

fn expect(bytes: &[u8]) -> Expect {
    Expect::parse(Some(&sha256(bytes)), None).unwrap()
}

#[test]
fn a_good_server_is_asked_once() {
    let bytes = content(LEN, 1);
    let served = bytes.clone();
    let case = Case::new(FaultServer::start(move |r| Reply::ranged(r, &served, ETAG)));
    let pulled = case.pull("/x?token=secret", &expect(&bytes)).unwrap();
    assert!(std::fs::read(case.output()).unwrap() == bytes);
    assert_eq!(pulled.digests.whole.get(DigestKind::Sha256).unwrap(), sha256(&bytes));
    assert_eq!(case.server.requests().len(), 1);
    assert_eq!(case.server.requests()[0].header("range").unwrap(), "bytes=0-");
    assert_eq!(names(case.temp.path()), ["out.img"]);
}

#[test]
fn a_server_without_length_or_ranges_is_enough() {
    let bytes = content(LEN, 2);
    let served = bytes.clone();
    let case = Case::new(FaultServer::start(move |_| {
        let mut reply = Reply::whole(&served).cut(Cut::Close(LEN));
        reply.headers = vec!["Connection: close".into()];
        reply
    }));
    case.pull("/x", &expect(&bytes)).unwrap();
    assert!(std::fs::read(case.output()).unwrap() == bytes);
    assert_eq!(names(case.temp.path()), ["out.img"]);
}

/// A server that breaks the first `breaks` answers each after `step` bytes.
fn breaking(bytes: Vec<u8>, breaks: usize, cut: fn(usize) -> Cut) -> FaultServer {
    FaultServer::start(move |request| {
        let reply = Reply::ranged(request, &bytes, ETAG);
        if request.index < breaks { reply.cut(cut(700_000)) } else { reply }
    })
}

#[test]
fn a_broken_connection_costs_at_most_the_open_unit() {
    for cut in [Cut::Close as fn(usize) -> Cut, Cut::Stall] {
        let bytes = content(LEN, 3);
        let case = Case::new(breaking(bytes.clone(), 4, cut));
        case.pull("/x", &expect(&bytes)).unwrap();
        assert!(std::fs::read(case.output()).unwrap() == bytes);
        let waste = case.server.sent() - LEN as u64;
        assert!(waste < 4 * UNIT, "{waste} bytes were sent twice");
        for request in &case.server.requests()[1..] {
            assert_eq!(request.header("if-match").unwrap(), ETAG, "bound to the version");
        }
    }
}

#[test]
fn a_reset_is_survived() {
    let bytes = content(LEN, 4);
    let case = Case::new(breaking(bytes.clone(), 3, Cut::Reset));
    case.pull("/x", &expect(&bytes)).unwrap();
    assert!(std::fs::read(case.output()).unwrap() == bytes);
}

#[test]
fn a_server_that_never_goes_on_is_given_up_and_what_came_is_kept() {
    let bytes = content(LEN, 5);
    let served = bytes.clone();
    let case = Case::new(FaultServer::start(move |request| {
        let reply = Reply::ranged(request, &served, ETAG);
        let first = request.index == 0;
        if request.index > 6 {
            reply
        } else {
            reply.cut(Cut::Close(if first { 3 << 20 } else { 0 }))
        }
    }));
    let text = case.refused(&Expect::default());
    assert!(text.contains("gave up after 6 attempts"), "{text}");
    let before = case.server.sent();
    case.pull("/x", &expect(&bytes)).unwrap();
    assert!(std::fs::read(case.output()).unwrap() == bytes);
    assert_eq!(case.server.sent() - before, LEN as u64 - (3 << 20), "only the rest was sent");
}

#[test]
fn a_break_without_ranges_is_a_clear_failure() {
    let bytes = content(LEN, 6);
    let case = Case::new(FaultServer::start(move |_| Reply::whole(&bytes).cut(Cut::Close(1000))));
    let error = case.pull("/x", &Expect::default()).unwrap_err();
    assert_eq!(error.class(), Class::Retry);
    let text = error.report();
    assert!(text.contains("cannot resume") && text.contains("at byte"), "{text}");
    assert_eq!(case.server.requests().len(), 1);
}

#[test]
fn an_object_replaced_in_the_middle_is_never_mixed() {
    for (etag, digest) in [("\"two\"", false), ("\"two\"", true), ("", true)] {
        let (old, new) = (content(LEN, 7), content(LEN, 8));
        let expected = if digest { expect(&new) } else { Expect::default() };
        let served = new.clone();
        let case = Case::new(FaultServer::start(move |request| {
            let tag =
                |text: &str| if text.is_empty() { "W/\"weak\"".into() } else { text.to_owned() };
            if request.index == 0 {
                let old_tag = if etag.is_empty() { tag("") } else { tag("\"one\"") };
                return Reply::ranged(request, &old, &old_tag).cut(Cut::Close(2 << 20));
            }
            // A server that knows nothing of If-Range.
            Reply::ranged(request, &served, &tag(etag))
        }));
        case.pull("/x", &expected).unwrap();
        assert!(std::fs::read(case.output()).unwrap() == new, "etag {etag:?} digest {digest}");
    }
}

#[test]
fn a_server_that_sends_all_of_it_once_costs_nothing_that_is_here() {
    let bytes = content(LEN, 41);
    // In one run, and in two; then one that has no ranges any more.
    for (refusals, wholes) in [(0, 1), (1, 1), (0, usize::MAX), (1, usize::MAX)] {
        let served = bytes.clone();
        let case = Case::new(FaultServer::start(move |request| {
            let reply = Reply::ranged(request, &served, ETAG);
            let index = match request.index {
                0 => return reply.cut(Cut::Close(2 << 20)),
                index if index <= refusals => return Reply::status("403 Forbidden"),
                index => index - refusals,
            };
            if index > wholes {
                return reply;
            }
            let mut reply = Reply::whole(&served);
            reply.headers.push(format!("ETag: {ETAG}"));
            reply
        }));
        for _ in 0..refusals {
            assert!(case.refused(&Expect::default()).contains("403"));
        }
        case.pull("/x", &Expect::default()).unwrap();
        assert!(std::fs::read(case.output()).unwrap() == bytes);
        let last = case.server.requests().pop().unwrap().range.unwrap_or(0..0);
        assert!(last.start > 0 || wholes > 1, "{refusals}: {last:?}");
    }
}

#[test]
fn a_length_that_changes_starts_over() {
    let (old, new) = (content(LEN, 9), content(LEN - 1000, 10));
    let served = new.clone();
    let case = Case::new(FaultServer::start(move |request| match request.index {
        0 => Reply::ranged(request, &old, ETAG).cut(Cut::Close(1 << 20)),
        _ => Reply::ranged(request, &served, ETAG),
    }));
    case.pull("/x", &expect(&new)).unwrap();
    assert!(std::fs::read(case.output()).unwrap() == new);
}

#[test]
fn a_server_that_lies_about_its_range_is_refused() {
    let bytes = content(LEN, 11);
    for header in ["Content-Range: bytes 5-9/10", "Content-Range: junk", "X: y"] {
        let served = bytes.clone();
        let case = Case::new(FaultServer::start(move |request| {
            let mut reply = Reply::ranged(request, &served, ETAG);
            reply.headers[0] = header.into();
            reply
        }));
        let text = case.refused(&Expect::default());
        assert!(text.contains("Content-Range"), "{text}");
        assert_eq!(names(case.temp.path()), Vec::<String>::new(), "no litter");
    }
}

#[test]
fn a_wrong_digest_throws_the_bytes_away() {
    let bytes = content(LEN, 12);
    let case = Case::new(FaultServer::start(move |r| Reply::ranged(r, &bytes, ETAG)));
    let wrong = Expect::parse(Some(&"ab".repeat(32)), None).unwrap();
    let text = case.refused(&wrong);
    assert!(text.contains("SHA-256") && text.contains(&"ab".repeat(32)), "{text}");
    assert_eq!(names(case.temp.path()), Vec::<String>::new(), "no litter");
    assert_eq!(case.server.requests().len(), 1, "a wrong digest is not tried again");
}

#[test]
fn redirects_are_followed_but_not_for_ever() {
    let bytes = content(LEN, 13);
    let served = bytes.clone();
    let to = |place: &str| {
        let mut reply = Reply::status("302 Found");
        reply.headers.push(format!("Location: {place}"));
        reply
    };
    let case = Case::new(FaultServer::start(move |request| match request.path.as_str() {
        "/x" => to("/y"),
        "/loop" => to("/loop"),
        "/ftp" => to("ftp://127.0.0.1/x"),
        _ => Reply::ranged(request, &served, ETAG),
    }));
    case.pull("/x", &expect(&bytes)).unwrap();
    let before = case.server.requests().len();
    let error = case.pull("/loop", &Expect::default()).unwrap_err();
    assert_eq!(error.class(), Class::Refuse);
    assert!(error.report().contains("more than 10 redirects"), "{}", error.report());
    assert_eq!(case.server.requests().len() - before, 11);
    let error = case.pull("/ftp", &Expect::default()).unwrap_err();
    assert!(error.report().contains("ftp"), "{}", error.report());
}

#[test]
fn statuses_are_told_apart() {
    for (status, class, attempts) in [
        ("404 Not Found", Class::Refuse, 1),
        ("403 Forbidden", Class::Refuse, 1),
        ("503 Busy", Class::Retry, 6),
    ] {
        let case = Case::new(FaultServer::start(move |_| Reply::status(status)));
        let error = case.pull("/x", &Expect::default()).unwrap_err();
        assert_eq!(error.class(), class, "{status}");
        assert!(error.report().contains(&status[..3]), "{}", error.report());
        assert_eq!(case.server.requests().len(), attempts, "{status}");
        assert_eq!(names(case.temp.path()), Vec::<String>::new(), "no litter");
    }
}

#[test]
fn an_encoded_body_and_an_empty_one_are_refused() {
    let case = Case::new(FaultServer::start(|_| {
        let mut reply = Reply::whole(b"abc");
        reply.headers.push("Content-Encoding: gzip".into());
        reply
    }));
    assert!(case.refused(&Expect::default()).contains("Content-Encoding"));
    let case = Case::new(FaultServer::start(|r| Reply::ranged(r, b"", ETAG)));
    assert!(case.refused(&Expect::default()).contains("empty"));
    let case = Case::new(FaultServer::start(|_| Reply::whole(b"")));
    assert!(case.refused(&Expect::default()).contains("empty"));
}

#[test]
fn a_file_larger_than_the_limit_or_the_disk_is_refused_before_a_byte_is_read() {
    let mut case = Case::new(FaultServer::start(|_| {
        let mut reply = Reply::whole(b"").cut(Cut::Stall(0));
        reply.headers = vec!["Content-Length: 9000000000000".into(), "ETag: \"x\"".into()];
        reply
    }));
    let text = case.refused(&Expect::default());
    assert!(text.contains("needed") && text.contains("free"), "{text}");
    case.policy = Some(Policy { max_bytes: 1 << 40, ..Policy::default() });
    let text = case.refused(&Expect::default());
    assert!(text.contains("more than the limit"), "{text}");
}

#[test]
fn secrets_in_a_url_are_in_no_error() {
    let case = Case::new(FaultServer::start(|_| Reply::status("404 Not Found")));
    let url = case.server.url.replace("http://", "http://user:hunter2@");
    let urls = [format!("{url}/x?sig=hunter2"), "http://user:hunter2@127.0.0.1:1/x?hunter2".into()];
    for url in urls {
        let request = PullRequest {
            source: Source::new(SourceUrl::parse(&url).unwrap()).expecting(Expect::default()),
            layout: Layout::AsIs,
            output: case.output(),
        };
        let engine = engine(case.temp.path(), Choice::Threads);
        let runtime = tokio::runtime::Runtime::new().unwrap();
        let error =
            runtime.block_on(pull(&engine, &request, &Arc::new(Progress::default()))).unwrap_err();
        for text in [error.report(), format!("{error:?}")] {
            assert!(!text.contains("hunter2"), "{text}");
        }
    }
}

#[test]
fn a_local_file_is_copied_as_sparse_as_it_is() {
    use std::os::unix::fs::MetadataExt;
    let case = Case::new(FaultServer::start(|_| Reply::status("404 Not Found")));
    let source = case.temp.path().join("source.img");
    let file = std::fs::File::create(&source).unwrap();
    let bytes = content(LEN, 14);
    std::os::unix::fs::FileExt::write_all_at(&file, &bytes, 40 << 20).unwrap();
    file.set_len(200 << 20).unwrap();
    let request = PullRequest {
        source: Source::new(SourceUrl::from_file_path(&source).unwrap())
            .expecting(Expect::default()),
        layout: Layout::AsIs,
        output: case.output(),
    };
    let engine = engine(case.temp.path(), Choice::Auto);
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let pulled = runtime.block_on(pull(&engine, &request, &Arc::new(Progress::default()))).unwrap();
    let (a, b) = (std::fs::read(&source).unwrap(), std::fs::read(case.output()).unwrap());
    assert!(a == b);
    assert_eq!(pulled.digests.whole.get(DigestKind::Sha256).unwrap(), sha256(&a));
    let stored = std::fs::metadata(case.output()).unwrap().blocks() * 512;
    assert!(stored <= LEN as u64 * 3 / 4 + 64 * 1024, "{stored} bytes stored");
}

/// Leaves the files that a crash leaves after the last byte was durable and before the rename.
fn crashed_before_the_rename(case: &Case, bytes: &[u8], tag: &str) {
    let dir = Dir::open(case.temp.path()).unwrap();
    let space = Space::of(&dir).unwrap();
    let mut filling = Filling::open(dir, FileNames::file("out.img"), space).unwrap();
    let version = Version { total_bytes: None, tag: format!("{{\"etag\":{tag:?}}}") };
    filling.begin(&version).unwrap();
    let partial = case.temp.path().join("out.img.bedplate-part");
    std::fs::write(&partial, bytes).unwrap();
    filling.end_at(bytes.len() as u64).unwrap();
}

#[test]
fn a_crash_right_before_the_rename_loses_nothing_and_makes_nothing_up() {
    type Answer = fn(&Request, &[u8]) -> Reply;
    let without_length: Answer = |_, bytes| {
        let mut reply = Reply::whole(bytes).cut(Cut::Close(usize::MAX));
        reply.headers = vec!["Connection: close".into()];
        reply
    };
    let without_ranges: Answer = |_, bytes| {
        let mut reply = Reply::whole(bytes);
        reply.headers.push(format!("ETag: {ETAG}"));
        reply
    };
    let with_ranges: Answer = |request, bytes| Reply::ranged(request, bytes, ETAG);
    for (answer, sent_again) in
        [(without_length, true), (without_ranges, true), (with_ranges, false)]
    {
        let bytes = content(LEN, 21);
        let served = bytes.clone();
        let case = Case::new(FaultServer::start(move |request| answer(request, &served)));
        crashed_before_the_rename(&case, &bytes, ETAG);
        case.pull("/x", &Expect::default()).unwrap();
        assert!(std::fs::read(case.output()).unwrap() == bytes);
        let again = case.server.sent() > 1;
        assert_eq!(again, sent_again, "{} bytes were sent", case.server.sent());
        assert_eq!(names(case.temp.path()), ["out.img"]);
    }
}

#[test]
fn a_slice_without_a_total_is_never_taken_for_the_whole() {
    let bytes = content(LEN, 22);
    let case = Case::new(FaultServer::start(move |_| {
        let mut reply = Reply::whole(&bytes[..1 << 20]);
        reply.status = "206 Partial Content";
        reply.headers.push(format!("Content-Range: bytes 0-{}/*", (1 << 20) - 1));
        reply
    }));
    let text = case.refused(&Expect::default());
    assert!(text.contains("Content-Range"), "{text}");
}

#[test]
fn a_server_that_breaks_after_a_few_bytes_each_time_is_given_up() {
    let bytes = content(LEN, 23);
    let case = Case::new(FaultServer::start(move |request| {
        Reply::ranged(request, &bytes, ETAG).cut(Cut::Close(10_000))
    }));
    let text = case.refused(&Expect::default());
    assert!(text.contains("gave up after 6 attempts"), "{text}");
    assert_eq!(case.server.requests().len(), 6);
}

#[test]
fn two_pulls_of_one_file_do_not_mix() {
    let bytes = content(LEN, 24);
    let case = Case::new(FaultServer::start(move |r| Reply::ranged(r, &bytes, ETAG)));
    let dir = Dir::open(case.temp.path()).unwrap();
    let space = Space::of(&dir).unwrap();
    let first = Filling::open(dir, FileNames::file("out.img"), space).unwrap();
    let text = case.refused(&Expect::default());
    assert!(text.contains("another bedplate is bringing this file in"), "{text}");
    drop(first);
    case.pull("/x", &Expect::default()).unwrap();
}

#[test]
fn a_partial_file_cut_behind_our_back_is_not_believed() {
    let bytes = content(LEN, 25);
    let served = bytes.clone();
    let case = Case::new(FaultServer::start(move |r| Reply::ranged(r, &served, ETAG)));
    crashed_before_the_rename(&case, &bytes, ETAG);
    // The presence says that the bytes are here; the file is too short to have them.
    let partial = case.temp.path().join("out.img.bedplate-part");
    std::fs::File::options().write(true).open(partial).unwrap().set_len(4096).unwrap();
    case.pull("/x", &expect(&bytes)).unwrap();
    assert!(std::fs::read(case.output()).unwrap() == bytes);
}
