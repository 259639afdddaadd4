//! Backups in a bucket: Longhorn's own URL of one, each block signed for, proved, and read once.

use std::collections::BTreeMap;
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use bedplate::disk::{Dir, FileNames, Presence};
use bedplate::names::hex;
use serde_json::json;
use sha2::{Digest, Sha512};

use crate::control_support::stderr;
use crate::fault_server::{Cut, FaultServer, Reply, Request};
use crate::s3::{KEY_ID, verify};
use crate::{Place, SECRET, content, program};

const BLOCK: usize = 2 << 20;
const STORE: &str = "/images/longhorn/backupstore/backing-images/";
const URL: &str = "s3://images@eu-test-1/longhorn/?backingImage=golden";

type Objects = BTreeMap<String, Vec<u8>>;

fn sha512(bytes: &[u8]) -> String {
    hex(&Sha512::digest(bytes))
}

fn path_of(digest: &str) -> String {
    format!("{STORE}blocks/{}/{}/{digest}.blk", &digest[..2], &digest[2..4])
}

/// The objects of a backup of `image`, and the paths of its blocks in the order of the image.
fn backup_of(image: &[u8]) -> (Objects, Vec<String>) {
    let (mut objects, mut paths, mut blocks) = (Objects::new(), Vec::new(), Vec::new());
    for (index, bytes) in image.chunks(BLOCK).enumerate() {
        let digest = sha512(bytes)[..64].to_owned();
        blocks.push(json!({ "Offset": index * BLOCK, "BlockChecksum": digest }));
        objects.insert(path_of(&digest), bytes.to_vec());
        paths.push(path_of(&digest));
    }
    let record = json!({
        "Name": "golden", "Size": image.len().to_string(), "BlockCount": blocks.len().to_string(),
        "Checksum": sha512(image), "CompressionMethod": "none",
        "CreatedTime": "2026-01-01T00:00:00Z", "CompleteTime": "2026-01-01T00:01:00Z",
        "Blocks": blocks,
    });
    let path = format!("{STORE}backing-images/golden/backing-image.cfg");
    objects.insert(path, record.to_string().into_bytes());
    (objects, paths)
}

fn path(request: &Request) -> &str {
    request.path.split('?').next().unwrap()
}

fn answer(request: &Request, objects: &Objects) -> Reply {
    if let Err(fault) = verify(request, "eu-test-1", None) {
        println!("{fault}");
        return Reply::status("403 Forbidden");
    }
    match objects.get(path(request)) {
        Some(bytes) => Reply::ranged(request, bytes, "\"v\""),
        None => Reply::status("404 Not Found"),
    }
}

/// Arguments with the keys to the bucket.
fn keys(place: &Place, server: &FaultServer) -> Vec<String> {
    let (id, secret) = (place.file("id", KEY_ID), place.file("key", SECRET));
    ["--s3-endpoint", &server.url, "--s3-access-key-file", &id, "--s3-secret-key-file", &secret]
        .map(str::to_owned)
        .to_vec()
}

fn with<'a>(url: &'a str, more: &'a [String]) -> Vec<&'a str> {
    std::iter::once(url).chain(more.iter().map(String::as_str)).collect()
}

#[test]
fn an_image_comes_back_from_a_bucket_although_connections_break() {
    let (place, image) = (Place::empty(), content(9 * BLOCK + 12_345));
    let (objects, _) = backup_of(&image);
    let server = FaultServer::start(move |request| {
        let cut = if request.index % 4 == 1 { Cut::Close(100_000) } else { Cut::None };
        answer(request, &objects).cut(cut)
    });
    let keys = keys(&place, &server);
    place.pulled(&with(URL, &keys), &[], &image);
    let none = "s3://images@eu-test-1/longhorn?backingImage=other";
    place.refused(&with(none, &keys), &[], &["other/backing-image.cfg", "404"]);
}

#[test]
fn a_block_that_is_another_or_too_long_is_not_taken() {
    let (place, image) = (Place::empty(), content(3 * BLOCK));
    let (objects, paths) = backup_of(&image);
    for (bytes, why) in [(image[..BLOCK].to_vec(), "damaged"), (vec![7; 18 << 20], "longer than")] {
        let mut bad = objects.clone();
        bad.insert(paths[1].clone(), bytes);
        let server = FaultServer::start(move |request| answer(request, &bad));
        place.refused(&with(URL, &keys(&place, &server)), &[], &[why]);
    }
    for bad in [
        "s3://images:hunter2@eu/p?backingImage=a",
        "s3://images/p?backingImage=a&backup=b",
        "s3://images/p?backingImage=../a",
        "s3://?backingImage=a",
    ] {
        let output = place.pull(&[bad], &[]);
        assert!(stderr(&output).contains("s3://BUCKET@REGION/PATH"), "{}", stderr(&output));
        assert!(!stderr(&output).contains("hunter2"));
    }
}

#[test]
fn after_a_kill_only_blocks_that_are_not_durable_are_asked_for_again() {
    let (place, image) = (Place::empty(), content(40 * BLOCK + 4096));
    let (objects, paths) = backup_of(&image);
    // Some blocks come, and then nothing, until the second run.
    let (given, open) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicBool::new(false)));
    let is_open = Arc::clone(&open);
    let server = FaultServer::start(move |request| {
        let is_block = path(request).ends_with(".blk");
        let stalls = is_block && given.fetch_add(1, Ordering::Relaxed) >= 36;
        let reply = answer(request, &objects);
        if stalls && !is_open.load(Ordering::Relaxed) { reply.cut(Cut::Stall(9)) } else { reply }
    });
    let keys = keys(&place, &server);
    let mut command = program();
    command.args(["pull", "-o"]).arg(place.output()).args(with(URL, &keys));
    let mut child = command.stderr(Stdio::null()).spawn().unwrap();
    let len = image.len() as u64;
    let missing = || {
        let dir = Dir::open(place.dir()).unwrap();
        let name = FileNames::file("out.img").presence;
        let presence = Presence::load(&dir, &name).ok().flatten();
        presence.map_or_else(|| vec![0..len], |presence| presence.missing(len))
    };
    while missing() == [0..len] {
        assert!(child.try_wait().unwrap().is_none(), "it has ended");
        std::thread::yield_now();
    }
    child.kill().unwrap();
    child.wait().unwrap();
    let (missing, asked) = (missing(), server.requests().len());
    open.store(true, Ordering::Relaxed);
    place.pulled(&with(URL, &keys), &[], &image);
    let requests = server.requests();
    let again: Vec<&str> =
        requests[asked..].iter().map(path).filter(|path| path.ends_with(".blk")).collect();
    assert!(!again.is_empty() && again.len() < paths.len(), "{} of {}", again.len(), paths.len());
    for path in again {
        let at = (paths.iter().position(|known| known == path).unwrap() * BLOCK) as u64;
        let is_missing = missing.iter().any(|gap| gap.start < at + BLOCK as u64 && at < gap.end);
        assert!(is_missing, "the block at {at} was durable; missing were {missing:?}");
    }
}
