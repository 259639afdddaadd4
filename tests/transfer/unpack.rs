//! Promise: a compressed source becomes the disk inside it, in one pass, whatever breaks on the way.

use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;

use crate::control_support::Daemon;
use crate::fault_server::{Cut, FaultServer, Reply};
use crate::{content, engine, sha256};
use bedplate::fetch::{Class, DigestKind, Expect, Policy, Progress, Source, SourceUrl};
use bedplate::import::{ImportError, Layout, PullRequest, Pulled, pull};
use bedplate::ring::Choice;

const MIB: usize = 1 << 20;
const ETAG: &str = "\"one\"";
pub const TOOLS: [&str; 4] = ["gzip", "xz", "zstd", "bzip2"];

/// What the tool makes of the bytes; `None` (a printed skip) without the tool.
pub fn packed(tool: &str, bytes: &[u8]) -> Option<Vec<u8>> {
    let spawned = Command::new(tool).arg("-c").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn();
    let Ok(mut child) = spawned else {
        println!("SKIPPED: {tool} is not installed");
        assert!(std::env::var("REQUIRE_TOOLS").as_deref() != Ok("1"), "REQUIRE_TOOLS=1");
        return None;
    };
    let (mut input, bytes) = (child.stdin.take().unwrap(), bytes.to_vec());
    let writer = std::thread::spawn(move || input.write_all(&bytes).unwrap());
    let output = child.wait_with_output().unwrap();
    writer.join().unwrap();
    assert!(output.status.success());
    Some(output.stdout)
}

pub fn bring_in(
    url: &SourceUrl,
    dir: &Path,
    expect: &Expect,
    layout: Layout,
    policy: Option<Policy>,
) -> Result<Pulled, ImportError> {
    let mut source = Source::new(url.clone()).expecting(expect.clone());
    source.unpack = true;
    bring_in_from(source, dir, layout, policy)
}

pub fn bring_in_from(
    source: Source,
    dir: &Path,
    layout: Layout,
    policy: Option<Policy>,
) -> Result<Pulled, ImportError> {
    let mut engine = engine(dir, Choice::Auto);
    engine.policy = policy.unwrap_or(engine.policy);
    let request = PullRequest { source, layout, output: dir.join("out.img") };
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(pull(&engine, &request, &Arc::new(Progress::default())))
}

pub fn url_of(server: &FaultServer) -> SourceUrl {
    SourceUrl::parse(&format!("{}/x.img.gz", server.url)).unwrap()
}

pub fn expect(bytes: &[u8]) -> Expect {
    Expect::parse(Some(&sha256(bytes)), None).unwrap()
}

#[test]
fn each_kind_of_stream_becomes_a_sparse_disk_also_when_connections_break() {
    let bytes = content(9 * MIB + 4321, 81);
    for tool in TOOLS {
        let Some(stream) = packed(tool, &bytes) else { continue };
        let served = stream.clone();
        let server = FaultServer::start(move |request| {
            let reply = Reply::ranged(request, &served, ETAG);
            if request.index < 3 { reply.cut(Cut::Close(1_234_567)) } else { reply }
        });
        let temp = tempfile::tempdir().unwrap();
        let pulled = bring_in(&url_of(&server), temp.path(), &expect(&stream), Layout::AsIs, None);
        let pulled = pulled.unwrap_or_else(|error| panic!("{tool}: {}", error.report()));
        let output = temp.path().join("out.img");
        assert!(std::fs::read(&output).unwrap() == bytes, "{tool}");
        assert_eq!(
            pulled.digests.whole.get(DigestKind::Sha256).unwrap(),
            sha256(&bytes),
            "{tool}: the disk's own digest"
        );
        assert_eq!(server.sent(), stream.len() as u64, "{tool}: no byte was sent twice");
        let stored = std::os::unix::fs::MetadataExt::blocks(&std::fs::metadata(output).unwrap());
        assert!(stored * 512 < bytes.len() as u64 * 9 / 10, "{tool}: zeroes are holes");
    }
}

#[test]
fn a_file_of_the_node_and_a_server_without_length_are_unpacked_too() {
    let bytes = content(3 * MIB, 82);
    let Some(stream) = packed("zstd", &bytes) else { return };
    let temp = tempfile::tempdir().unwrap();
    let file = temp.path().join("x.zst");
    std::fs::write(&file, &stream).unwrap();
    let url = SourceUrl::from_file_path(&file).unwrap();
    bring_in(&url, temp.path(), &expect(&stream), Layout::AsIs, None).unwrap();
    assert!(std::fs::read(temp.path().join("out.img")).unwrap() == bytes);
    let len = stream.len();
    let server = FaultServer::start(move |_| {
        let mut reply = Reply::whole(&stream).cut(Cut::Close(len));
        reply.headers = vec!["Connection: close".into()];
        reply
    });
    std::fs::remove_file(temp.path().join("out.img")).unwrap();
    bring_in(&url_of(&server), temp.path(), &Expect::default(), Layout::AsIs, None).unwrap();
    assert!(std::fs::read(temp.path().join("out.img")).unwrap() == bytes);
}

#[test]
fn a_damaged_cut_or_exploding_stream_is_refused_and_leaves_nothing() {
    let bytes = content(2 * MIB, 83);
    let Some(stream) = packed("gzip", &bytes) else { return };
    let mut damaged = stream.clone();
    let middle = stream.len() / 2;
    damaged[middle..middle + 64].fill(0x5a);
    let cut = stream[..stream.len() - 9].to_vec();
    let small = Policy { max_bytes: 4 << 20, ..Policy::default() };
    let bomb = packed("gzip", &vec![0; 8 * MIB]).unwrap();
    let [none, tight] = [None, Some(small)];
    for (served, policy, words) in [
        (damaged, none.clone(), "damaged gzip stream"),
        (cut, none, "gzip stream ends early"),
        (bomb, tight, "more than the allowed 4194304 bytes"),
    ] {
        let server = FaultServer::start(move |r| Reply::ranged(r, &served, ETAG));
        let temp = tempfile::tempdir().unwrap();
        let pulled =
            bring_in(&url_of(&server), temp.path(), &Expect::default(), Layout::AsIs, policy);
        let error = pulled.unwrap_err();
        assert_eq!(error.class(), Class::Refuse, "{}", error.report());
        assert!(error.report().contains(words), "{}", error.report());
        assert_eq!(temp.path().read_dir().unwrap().count(), 0, "{words}");
    }
}

#[test]
fn a_wrong_digest_of_the_stream_and_a_packed_qcow2_for_a_raw_layout_are_refused() {
    let bytes = content(MIB, 84);
    let Some(stream) = packed("xz", &bytes) else { return };
    let server = FaultServer::start(move |r| Reply::ranged(r, &stream, ETAG));
    let temp = tempfile::tempdir().unwrap();
    let pulled = bring_in(&url_of(&server), temp.path(), &expect(&bytes), Layout::AsIs, None);
    assert!(pulled.unwrap_err().report().contains("SHA-256"));
    let mut qcow2 = b"QFI\xfb\0\0\0\x03".to_vec();
    qcow2.extend_from_slice(&bytes);
    let stream = packed("gzip", &qcow2).unwrap();
    let server = FaultServer::start(move |r| Reply::ranged(r, &stream, ETAG));
    let pulled = bring_in(&url_of(&server), temp.path(), &Expect::default(), Layout::Raw, None);
    assert!(pulled.unwrap_err().report().contains("inside a compressed stream"));
    assert_eq!(temp.path().read_dir().unwrap().count(), 0);
}

#[test]
fn a_packed_qcow2_for_a_raw_layout_is_refused_before_it_is_fetched_and_is_the_same_disk_as_it_is() {
    let temp = tempfile::tempdir().unwrap();
    let [raw, image, back] = ["raw", "image", "back"].map(|name| temp.path().join(name));
    let bytes = content(6 * MIB, 86);
    std::fs::write(&raw, &bytes).unwrap();
    let text = |path: &Path| path.to_str().unwrap().to_owned();
    let qemu_img = |args: &[&str]| Command::new("qemu-img").args(args).status();
    let made = qemu_img(&["convert", "-f", "raw", "-O", "qcow2", &text(&raw), &text(&image)]);
    let Ok(made) = made else {
        println!("SKIPPED: qemu-img is not installed");
        assert!(std::env::var("REQUIRE_TOOLS").as_deref() != Ok("1"), "REQUIRE_TOOLS=1");
        return;
    };
    assert!(made.success());
    let qcow2 = std::fs::read(&image).unwrap();
    for tool in TOOLS {
        let Some(stream) = packed(tool, &qcow2) else { continue };
        let served = stream.clone();
        let server = FaultServer::start(move |r| Reply::ranged(r, &served, ETAG));
        let daemon = Daemon::start();
        let url = format!("{}/disk.qcow2.{tool}", server.url);
        let refused = daemon.cli(&["create", &url, "--name", "a", "--layout", "raw", "--wait"]);
        let said = crate::control_support::stderr(&refused);
        assert!(!refused.status.success() && said.contains("layout as-is"), "{tool}: {said}");
        // A block of bzip2 is longer than what is looked at.
        let is_told_early = tool != "bzip2";
        assert_eq!(server.sent() < 1 << 17, is_told_early, "{tool}: {}", server.sent());
        let made = daemon.cli(&["create", &url, "--name", "b", "--wait"]);
        assert!(made.status.success(), "{}", crate::control_support::stderr(&made));
        assert_eq!(daemon.get("/v1/images/b")["format"], "qcow2", "{tool}");
        let socket = daemon.socket.with_file_name("nbd.sock");
        let export = format!("nbd+unix:///b?socket={}", socket.display());
        let read = qemu_img(&["convert", "-f", "raw", "-O", "raw", &export, &text(&back)]);
        assert!(read.unwrap().success());
        assert!(std::fs::read(&back).unwrap() == bytes, "{tool}: what its readers get");
    }
}

#[test]
fn a_daemon_unpacks_by_itself_and_a_restart_finds_the_copy() {
    let bytes = content(6 * MIB, 85);
    let Some(stream) = packed("zstd", &bytes) else { return };
    let digest = sha256(&stream);
    let server = FaultServer::start(move |r| Reply::ranged(r, &stream, ETAG));
    let daemon = Daemon::start();
    let url = format!("{}/disk.raw.zst", server.url);
    let args = ["create", &url, "--name", "a", "--sha256", &digest, "--wait"];
    let made = daemon.cli(&args);
    assert!(made.status.success(), "{}", crate::control_support::stderr(&made));
    let image = daemon.get("/v1/images/a");
    assert_eq!(image["digests"]["sha256"], sha256(&bytes));
    assert_eq!(image["virtual_size_bytes"], bytes.len());
    let (_, dir) = daemon.end("KILL");
    let daemon = Daemon::start_in(dir, "");
    daemon.wait_for("a", "ready");
    let asked = server.requests().len();
    // Touched behind our back: checked again, against the disk's own digest.
    let images = daemon.dir.path().join("disk/backing-images");
    let file = images.read_dir().unwrap().next().unwrap().unwrap().path().join("backing");
    let (_, dir) = daemon.end("TERM");
    assert!(Command::new("touch").arg(&file).status().unwrap().success());
    let daemon = Daemon::start_in(dir, "");
    daemon.wait_for("a", "ready");
    assert_eq!(server.requests().len(), asked, "nothing is fetched again");
}
