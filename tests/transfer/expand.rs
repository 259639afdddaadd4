//! Promise: a QCOW2 source becomes the raw disk that qemu reads, in one pass, and only what is in
//! use of it is fetched.

use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::blocks_common;
use crate::control_support::Daemon;
use crate::fault_server::{Cut, FaultServer, Reply, Request};
use crate::{content, engine, sha256};
use bedplate::fetch::{Class, Engine, Expect, Progress, Source, SourceUrl};
use bedplate::import::{ImportError, Layout, PullRequest, Pulled, pull};
use bedplate::ring::Choice;

const MIB: usize = 1 << 20;
const ETAG: &str = "\"one\"";

fn have_qemu() -> bool {
    let runs = |tool: &str| Command::new(tool).arg("--version").output().is_ok();
    if runs("qemu-img") && runs("qemu-io") {
        return true;
    }
    println!("SKIPPED: qemu-img or qemu-io is not installed");
    assert!(std::env::var("REQUIRE_TOOLS").as_deref() != Ok("1"), "REQUIRE_TOOLS=1");
    false
}

fn tool(name: &str, args: &[&str]) {
    let output = Command::new(name).args(args).output().unwrap();
    assert!(
        output.status.success(),
        "{name} {args:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
}

/// Random bytes, zeroes and bytes that compress, of an odd length in sectors.
fn disk(len: usize, seed: u64) -> Vec<u8> {
    let mut bytes = content(len / 512 * 512, seed);
    for (index, part) in bytes.chunks_mut(MIB / 2).enumerate() {
        match (index as u64 + seed) % 5 {
            1 => part.fill(0),
            2 | 3 => part
                .iter_mut()
                .enumerate()
                .for_each(|(at, byte)| *byte = b'a' + (at / 97 % 7) as u8),
            _ => {}
        }
    }
    bytes
}

/// A QCOW2 file of `bytes` made by qemu, and what qemu reads of it after further writes.
fn qcow2(
    dir: &Path,
    bytes: &[u8],
    options: &str,
    packed: bool,
    writes: &[&str],
) -> (Vec<u8>, Vec<u8>) {
    let (raw, image, back) = (dir.join("s.raw"), dir.join("s.qcow2"), dir.join("back.raw"));
    std::fs::write(&raw, bytes).unwrap();
    let (raw, image) = (raw.to_str().unwrap(), image.to_str().unwrap());
    let mut args = vec!["convert", "-f", "raw", "-O", "qcow2", "-o", options];
    if packed {
        args.push("-c");
    }
    args.extend([raw, image]);
    tool("qemu-img", &args);
    for write in writes {
        tool("qemu-io", &["-f", "qcow2", "-c", write, image]);
    }
    tool("qemu-img", &["convert", "-f", "qcow2", "-O", "raw", image, back.to_str().unwrap()]);
    (std::fs::read(image).unwrap(), std::fs::read(back).unwrap())
}

fn expand(
    engine: &Engine,
    server: &FaultServer,
    dir: &Path,
    expect: Expect,
) -> Result<Pulled, ImportError> {
    let url = SourceUrl::parse(&format!("{}/s.qcow2", server.url)).unwrap();
    let source = Source::new(url).expecting(expect);
    let request = PullRequest { source, layout: Layout::Raw, output: dir.join("out.raw") };
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(pull(engine, &request, &Arc::new(Progress::default())))
}

fn output(dir: &Path) -> Vec<u8> {
    std::fs::read(dir.join("out.raw")).unwrap_or_default()
}

#[test]
fn every_kind_of_image_becomes_the_disk_that_qemu_reads() {
    if !have_qemu() {
        return;
    }
    let writes =
        ["write -P 7 300k 5k", "write -z 1M 700k", "discard 3M 1M", "write -P 9 2500k 70k"];
    for (index, (options, packed)) in [
        ("cluster_size=64k", true),
        ("cluster_size=64k", false),
        ("cluster_size=64k,compression_type=zstd", true),
        ("cluster_size=2M", true),
        ("cluster_size=2M", false),
        ("cluster_size=4k", true),
        ("cluster_size=512", true),
        ("cluster_size=512", false),
        ("cluster_size=128k,compat=0.10", true),
        ("cluster_size=16k,extended_l2=on", true),
        ("cluster_size=64k,extended_l2=on", false),
        ("cluster_size=128k,extended_l2=on", true),
        ("cluster_size=2M,extended_l2=on", false),
    ]
    .into_iter()
    .enumerate()
    {
        let temp = tempfile::tempdir().unwrap();
        let bytes = disk(9 * MIB + 512 * (7 + index), 40 + index as u64);
        let (image, raw) = qcow2(temp.path(), &bytes, options, packed, &writes);
        // Half of the runs meet a server that breaks.
        let served = image.clone();
        let server = FaultServer::start(move |request| {
            let reply = Reply::ranged(request, &served, ETAG);
            let breaks = index % 2 == 1 && request.index % 3 == 2;
            if breaks { reply.cut(Cut::Close(100_003)) } else { reply }
        });
        let sink = if index % 3 == 0 { Choice::Threads } else { Choice::Auto };
        let pulled = expand(&engine(temp.path(), sink), &server, temp.path(), Expect::default());
        pulled.unwrap_or_else(|error| panic!("{options}: {}", error.report()));
        assert!(output(temp.path()) == raw, "{options}, compressed {packed}");
    }
}

#[test]
fn a_digest_of_the_source_is_proved_on_the_way() {
    if !have_qemu() {
        return;
    }
    let temp = tempfile::tempdir().unwrap();
    let (image, raw) = qcow2(temp.path(), &disk(8 * MIB, 50), "cluster_size=64k", true, &[]);
    let served = image.clone();
    let server = FaultServer::start(move |r| Reply::ranged(r, &served, "W/\"weak\""));
    let expect = |bytes: &[u8]| Expect::parse(Some(&sha256(bytes)), None).unwrap();
    let engine = engine(temp.path(), Choice::Auto);
    expand(&engine, &server, temp.path(), expect(&image)).unwrap();
    assert!(output(temp.path()) == raw);
    std::fs::remove_file(temp.path().join("out.raw")).unwrap();
    let error = expand(&engine, &server, temp.path(), expect(&raw)).unwrap_err();
    assert_eq!(error.class(), Class::Refuse);
    assert!(error.report().contains("SHA-256"), "{}", error.report());
    let left: Vec<_> =
        std::fs::read_dir(temp.path()).unwrap().flatten().map(|e| e.file_name()).collect();
    assert!(left.iter().all(|name| !name.to_string_lossy().contains("out")), "{left:?}");
}

#[test]
fn a_file_of_digests_speaks_of_the_source_and_not_of_the_disk_made_of_it() {
    if !have_qemu() {
        return;
    }
    let temp = tempfile::tempdir().unwrap();
    let (image, raw) = qcow2(temp.path(), &disk(8 * MIB, 52), "cluster_size=64k", true, &[]);
    let (of_image, of_raw) = (sha256(&image), sha256(&raw));
    // Without a digest, versions of such a server cannot be told apart.
    let server = FaultServer::start(move |request| match request.path.as_str() {
        "/good" => Reply::whole(format!("SHA256 (s.qcow2) = {of_image}\n").as_bytes()),
        "/bad" => Reply::whole(format!("{of_raw}  s.qcow2\n").as_bytes()),
        _ => Reply::ranged(request, &image, "W/\"weak\""),
    });
    let engine = engine(temp.path(), Choice::Auto);
    let pulled = |sums: &str| {
        let url = |path: &str| SourceUrl::parse(&format!("{}/{path}", server.url)).unwrap();
        let source = Source::new(url("s.qcow2")).listed_in(Some(url(sums)));
        let output = temp.path().join("out.raw");
        let request = PullRequest { source, layout: Layout::Raw, output };
        let runtime = tokio::runtime::Runtime::new().unwrap();
        runtime.block_on(pull(&engine, &request, &Arc::new(Progress::default())))
    };
    pulled("good").unwrap();
    assert!(output(temp.path()) == raw);
    std::fs::remove_file(temp.path().join("out.raw")).unwrap();
    let error = pulled("bad").unwrap_err();
    assert!(error.report().contains("SHA-256 is"), "{}", error.report());
    assert!(output(temp.path()).is_empty());
}

#[test]
fn what_is_not_in_use_is_not_fetched() {
    if !have_qemu() {
        return;
    }
    let temp = tempfile::tempdir().unwrap();
    // The discarded clusters stay in the file, where nothing refers to them.
    let discard = ["discard 1M 20M"];
    let bytes = content(24 * MIB, 51);
    let (image, raw) = qcow2(temp.path(), &bytes, "cluster_size=64k", false, &discard);
    let served = image.clone();
    let server = FaultServer::start(move |r| Reply::ranged(r, &served, ETAG));
    let engine = engine(temp.path(), Choice::Auto);
    let pulled = expand(&engine, &server, temp.path(), Expect::default()).unwrap();
    assert!(output(temp.path()) == raw);
    assert!(pulled.received_bytes < 6 << 20, "{} bytes of {}", pulled.received_bytes, image.len());
    // A virtual disk far larger than the room: only what is in use has to fit.
    let huge = temp.path().join("huge.qcow2");
    tool("qemu-img", &["create", "-q", "-f", "qcow2", huge.to_str().unwrap(), "1T"]);
    tool("qemu-io", &["-f", "qcow2", "-c", "write -P 5 900G 64k", huge.to_str().unwrap()]);
    let image = std::fs::read(&huge).unwrap();
    let server = FaultServer::start(move |r| Reply::ranged(r, &image, ETAG));
    let url = SourceUrl::parse(&format!("{}/h", server.url)).unwrap();
    let request = PullRequest {
        source: Source::new(url),
        layout: Layout::Raw,
        output: temp.path().join("huge.raw"),
    };
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let progress = Arc::new(Progress::default());
    let pulled = runtime.block_on(pull(&engine, &request, &progress)).unwrap();
    assert_eq!(pulled.sealed.len_bytes(), 1 << 40);
    let mut found = vec![0; 64 << 10];
    std::os::unix::fs::FileExt::read_exact_at(pulled.sealed.file(), &mut found, 900 << 30).unwrap();
    assert!(found.iter().all(|&byte| byte == 5));
}

#[test]
fn an_interrupted_expansion_goes_on_with_what_is_missing() {
    if !have_qemu() {
        return;
    }
    let temp = tempfile::tempdir().unwrap();
    let (image, raw) = qcow2(temp.path(), &content(32 * MIB, 52), "cluster_size=64k", true, &[]);
    let served = image.clone();
    // The first run gets about half, then a refusal.
    let server = FaultServer::start(move |request: &Request| {
        let reply = Reply::ranged(request, &served, ETAG);
        match request.index {
            0..=2 => reply,
            3 => reply.cut(Cut::Close(served.len() / 2)),
            4 => Reply::status("403 Forbidden"),
            _ => reply,
        }
    });
    let engine = engine(temp.path(), Choice::Auto);
    let error = expand(&engine, &server, temp.path(), Expect::default()).unwrap_err();
    assert!(error.report().contains("403"), "{}", error.report());
    let pulled = expand(&engine, &server, temp.path(), Expect::default()).unwrap();
    assert!(output(temp.path()) == raw);
    assert!(pulled.received_bytes < image.len() as u64 * 3 / 4, "{} bytes", pulled.received_bytes);
}

#[test]
fn a_digest_of_the_source_does_not_speak_for_what_an_earlier_run_has_made() {
    if !have_qemu() {
        return;
    }
    for (options, packed) in [
        ("cluster_size=64k", false),
        ("cluster_size=64k", true),
        ("cluster_size=4k", false),
        ("cluster_size=2M", true),
    ] {
        let temp = tempfile::tempdir().unwrap();
        let (image, raw) = qcow2(temp.path(), &disk(32 * MIB, 57), options, packed, &[]);
        let (others, _) = qcow2(temp.path(), &content(32 * MIB, 58), options, packed, &[]);
        // Other bytes in the same tables, other tables, and the same.
        let mut cases = vec![("W/\"weak\"", others, false), (ETAG, image.clone(), true)];
        if !packed {
            let first = image.windows(64).position(|bytes| bytes == &raw[..64]).unwrap();
            let mut damaged = image.clone();
            damaged[first..first + MIB / 4].iter_mut().for_each(|byte| *byte ^= 1);
            cases.push((ETAG, damaged, false));
        }
        for (etag, before, is_same) in cases {
            let (is_good, is_cut) = (Arc::new(AtomicBool::new(false)), AtomicBool::new(false));
            let (good, becomes_good) = (image.clone(), Arc::clone(&is_good));
            let server = FaultServer::start(move |request: &Request| {
                if becomes_good.load(Ordering::SeqCst) {
                    return Reply::ranged(request, &good, etag);
                }
                let reply = Reply::ranged(request, &before, etag);
                match reply.body.len() > before.len() / 2 {
                    true if is_cut.swap(true, Ordering::SeqCst) => Reply::status("403 Forbidden"),
                    true => reply.cut(Cut::Close(before.len() * 2 / 3)),
                    false => Reply::status("403 Forbidden"),
                }
            });
            let expect = || Expect::parse(Some(&sha256(&image)), None).unwrap();
            let engine = engine(temp.path(), Choice::Auto);
            let error = expand(&engine, &server, temp.path(), expect()).unwrap_err();
            assert!(error.report().contains("403"), "{}", error.report());
            is_good.store(true, Ordering::SeqCst);
            let received = expand(&engine, &server, temp.path(), expect()).unwrap().received_bytes;
            let label = format!("{options} {packed} {etag} {is_same}");
            assert!(output(temp.path()) == raw, "{label}: it has bytes that no digest has proved");
            let once = received < image.len() as u64 * 3 / 2;
            assert!(once || !is_same, "{label}: what is the same was made again, {received} bytes");
            std::fs::remove_file(temp.path().join("out.raw")).unwrap();
        }
    }
}

#[test]
fn a_server_that_cannot_give_parts_safely_is_refused_with_the_reason() {
    if !have_qemu() {
        return;
    }
    let temp = tempfile::tempdir().unwrap();
    let (image, _) = qcow2(temp.path(), &disk(2 * MIB, 53), "cluster_size=64k", true, &[]);
    let engine = engine(temp.path(), Choice::Auto);
    for (etag, ranged, words) in
        [(ETAG, false, "no byte ranges"), ("W/\"x\"", true, "no strong ETag")]
    {
        let served = image.clone();
        let server = FaultServer::start(move |request| match ranged {
            true => Reply::ranged(request, &served, etag),
            false => Reply::whole(&served),
        });
        let error = expand(&engine, &server, temp.path(), Expect::default()).unwrap_err();
        assert_eq!(error.class(), Class::Refuse);
        assert!(error.report().contains(words), "{}", error.report());
    }
}

#[test]
fn a_damaged_image_is_refused_and_nothing_of_it_is_kept() {
    if !have_qemu() {
        return;
    }
    let temp = tempfile::tempdir().unwrap();
    let bytes = vec![b'x'; 16 * MIB];
    let (image, _) = qcow2(temp.path(), &bytes, "cluster_size=64k", true, &[]);
    let engine = engine(temp.path(), Choice::Auto);
    let last = image.iter().rposition(|&byte| byte != 0).unwrap();
    let mut cluster = image.clone();
    cluster[last - 100..last - 20].fill(0xff);
    let mut entry = image.clone();
    let l1 = u64::from_be_bytes(image[40..48].try_into().unwrap()) as usize;
    entry[l1] = 0x80;
    entry[l1 + 1] = 0xff;
    for (damaged, words) in [(cluster, "deflate"), (entry, "L2 table offset")] {
        let server = FaultServer::start(move |r| Reply::ranged(r, &damaged, ETAG));
        let error = expand(&engine, &server, temp.path(), Expect::default()).unwrap_err();
        assert_eq!(error.class(), Class::Refuse, "{}", error.report());
        assert!(error.report().contains(words), "{}", error.report());
        assert!(error.condemns_bytes());
        let left = std::fs::read_dir(temp.path()).unwrap().flatten();
        assert!(left.into_iter().all(|e| !e.file_name().to_string_lossy().starts_with("out")));
    }
}

#[test]
fn a_source_that_is_a_raw_disk_already_is_brought_in_as_it_is() {
    let bytes = content(5 * MIB, 54);
    let served = bytes.clone();
    let server = FaultServer::start(move |r| Reply::ranged(r, &served, ETAG));
    let temp = tempfile::tempdir().unwrap();
    let engine = engine(temp.path(), Choice::Auto);
    expand(&engine, &server, temp.path(), Expect::default()).unwrap();
    assert!(output(temp.path()) == bytes);
}

#[test]
fn a_daemon_that_dies_goes_on_expanding_and_serves_the_raw_disk() {
    if !have_qemu() {
        return;
    }
    let temp = tempfile::tempdir().unwrap();
    let (image, raw) = qcow2(temp.path(), &content(24 * MIB, 55), "cluster_size=64k", true, &[]);
    let digest = sha256(&image);
    let served = image.clone();
    let server = FaultServer::start(move |request| {
        let mut reply = Reply::ranged(request, &served, ETAG);
        reply.pace = std::time::Duration::from_millis(4);
        reply
    });
    let url = format!("{}/s.qcow2", server.url);
    let daemon = Daemon::start();
    // Slowly, so that some of it is durable when the daemon dies.
    let args = ["create", &url, "--name", "a", "--layout", "raw"];
    assert!(daemon.cli(&args).status.success());
    assert!(daemon.cli(&["set", "a", "--rate", "6M"]).status.success());
    let args = ["create", &url, "--name", "a", "--layout", "raw", "--fetch"];
    assert!(daemon.cli(&args).status.success());
    let (_, dir) = {
        daemon.events_until("?image=a", |event| {
            event["object"]["copies"][0]["bytes_done"].as_u64().unwrap_or(0) > 8 << 20
        });
        daemon.end("KILL")
    };
    let sent_before = server.sent();
    let daemon = Daemon::start_in(dir, "");
    let copy = daemon.wait_for("a", "ready");
    assert_eq!((&copy["layout"], &copy["format"]), (&"raw".into(), &"raw".into()));
    assert_eq!(copy["virtual_size_bytes"], raw.len());
    let found = daemon.dir.path().join("disk/backing-images").read_dir().unwrap().next().unwrap();
    assert!(std::fs::read(found.unwrap().path().join("backing")).unwrap() == raw);
    let again = server.sent() - sent_before;
    assert!(again < image.len() as u64, "{again} of {} bytes were sent again", image.len());
    // The same image with the digest of its source, on another name: proved on the way.
    let args = ["create", &url, "--name", "b", "--layout", "raw", "--wait", "--sha256", &digest];
    let made = daemon.cli(&args);
    assert!(made.status.success(), "{}", crate::control_support::stderr(&made));
    let other = daemon.cli(&["create", &url, "--name", "b"]);
    assert!(!other.status.success(), "a layout is part of what an image is");
}

#[test]
fn a_source_is_inspected_by_its_tables_alone() {
    if !have_qemu() {
        return;
    }
    let temp = tempfile::tempdir().unwrap();
    let (image, _) =
        qcow2(temp.path(), &disk(20 * MIB, 90), "cluster_size=64k,extended_l2=on", true, &[]);
    let served = image.clone();
    let server = FaultServer::start(move |request| Reply::ranged(request, &served, ETAG));
    let url = format!("{}/s.qcow2", server.url);
    let inspect = |args: &[&str]| {
        let output = Command::new(env!("CARGO_BIN_EXE_bedplate"))
            .arg("inspect")
            .args(args)
            .args([&url, "--json"])
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        (output.status.code(), serde_json::from_str::<serde_json::Value>(&text).unwrap())
    };
    let (code, found) = inspect(&[]);
    assert_eq!((code, &found["verdict"]), (Some(0), &"ok".into()), "{found}");
    assert_eq!(found["extended_l2"], true);
    assert_eq!(found["virtual_size_bytes"], 20 * MIB as u64);
    let local = temp.path().join("s.qcow2");
    let of_file = Command::new(env!("CARGO_BIN_EXE_bedplate"))
        .args(["inspect", local.to_str().unwrap(), "--json"])
        .output()
        .unwrap();
    let of_file: serde_json::Value = serde_json::from_slice(&of_file.stdout).unwrap();
    assert_eq!(of_file, found, "the same of the file as of the URL");
    let fetched = server.sent();
    assert!(fetched < image.len() as u64 / 4, "{fetched} of {} bytes fetched", image.len());
}

#[test]
fn bitmaps_of_a_source_are_judged_before_it_is_expanded() {
    let seed =
        Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/seeds/qcow2_inspect/v3_512_bitmaps");
    let sound = std::fs::read(seed).unwrap();
    // The directory is the last thing that qemu wrote; its first entry's type is behind the flags.
    let type_at = sound.len() - 96 + 16;
    let mut damaged = sound.clone();
    assert_eq!(std::mem::replace(&mut damaged[type_at], 2), 1);
    for (bytes, refused) in [(sound, false), (damaged, true)] {
        let temp = tempfile::tempdir().unwrap();
        let local = temp.path().join("local.qcow2");
        std::fs::write(&local, &bytes).unwrap();
        let server = FaultServer::start(move |request| Reply::ranged(request, &bytes, ETAG));
        let engine = engine(temp.path(), Choice::Auto);
        let said = expand(&engine, &server, temp.path(), Expect::default()).map_err(|e| e.report());
        let place = format!("bitmap type at byte {type_at:#x} is 0x2");
        match said {
            Ok(_) => assert!(!refused && output(temp.path())[..1024] == [5; 1024]),
            Err(text) => assert!(refused && text.contains(&place), "{text}"),
        }
        let url = format!("{}/s.qcow2", server.url);
        let found = [&url, local.to_str().unwrap()].map(|target| {
            let mut command = Command::new(env!("CARGO_BIN_EXE_bedplate"));
            let found = command.args(["inspect", target, "--json"]).output().unwrap();
            serde_json::from_slice::<serde_json::Value>(&found.stdout).unwrap()
        });
        let [of_url, of_file] = &found;
        assert_eq!(of_url["verdict"], if refused { "refused" } else { "ok" }, "{of_url}");
        assert_eq!(of_url["findings"].to_string().contains(&place), refused, "{of_url}");
        assert_eq!(of_url["bitmaps"].as_u64(), (!refused).then_some(3));
        assert_eq!(of_url["findings"], of_file["findings"], "the same of the file as of the URL");
    }
}

#[test]
fn another_format_is_inspected_by_its_table_and_not_expanded() {
    for (name, image, _) in blocks_common::all() {
        let temp = tempfile::tempdir().unwrap();
        let local = temp.path().join("image");
        std::fs::write(&local, &image.bytes).unwrap();
        let served = image.bytes.clone();
        let server = FaultServer::start(move |request| Reply::ranged(request, &served, ETAG));
        let inspect = |target: &str| {
            let format = image.format.to_string();
            let output = Command::new(env!("CARGO_BIN_EXE_bedplate"))
                .args(["inspect", target, "--format", &format, "--json"])
                .output()
                .unwrap();
            serde_json::from_slice::<serde_json::Value>(&output.stdout).unwrap()
        };
        let found = inspect(&format!("{}/image", server.url));
        assert_eq!(
            (&found["verdict"], &found["format"]),
            (&"ok".into(), &image.format.to_string().into())
        );
        assert_eq!(found, inspect(local.to_str().unwrap()), "{name}: as the file");
        if name == "vhd_fixed" {
            continue;
        }
        let engine = engine(temp.path(), Choice::Auto);
        let error = expand(&engine, &server, temp.path(), Expect::default()).unwrap_err();
        assert_eq!(error.class(), Class::Refuse, "{name}: {error}");
        assert!(error.to_string().contains("cannot be expanded"), "{name}: {error}");
        assert!(output(temp.path()).is_empty(), "{name}");
    }
}
