//! Images from backups: a backup target as Longhorn lays it out, with blocks that gzip and lz4 have made.

#![expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod control_support;

use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};

use control_support::{Daemon, bedplate, stderr, stdout};
use serde_json::{Value, json};

const BLOCK: usize = 2 << 20;

/// A backup target in a directory.
struct Target {
    dir: tempfile::TempDir,
}

fn filter(command: &[&str], input: &[u8]) -> Vec<u8> {
    let mut child = Command::new(command[0])
        .args(&command[1..])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let (mut stdin, input) = (child.stdin.take().unwrap(), input.to_vec());
    let writer = std::thread::spawn(move || stdin.write_all(&input));
    let output = child.wait_with_output().unwrap();
    writer.join().unwrap().unwrap();
    assert!(output.status.success(), "{command:?}");
    output.stdout
}

/// SHA-512 as coreutils make it.
fn sha512(bytes: &[u8]) -> String {
    String::from_utf8(filter(&["sha512sum"], bytes)).unwrap()[..128].to_owned()
}

impl Target {
    fn new() -> Self {
        Self { dir: tempfile::tempdir().unwrap() }
    }

    fn store(&self) -> PathBuf {
        self.dir.path().join("backupstore/backing-images")
    }

    fn block(&self, digest: &str) -> PathBuf {
        let dir = self.store().join("blocks").join(&digest[..2]).join(&digest[2..4]);
        dir.join(format!("{digest}.blk"))
    }

    fn record(&self, name: &str) -> PathBuf {
        self.store().join("backing-images").join(name).join("backing-image.cfg")
    }

    /// Backs `image` up; blocks of zeroes are left out. Gives the digests of the blocks that there are.
    fn back_up(&self, name: &str, image: &[u8], method: &str) -> Vec<String> {
        let mut blocks = Vec::new();
        for (index, bytes) in image.chunks(BLOCK).enumerate() {
            if bytes.iter().all(|byte| *byte == 0) {
                continue;
            }
            let digest = sha512(bytes)[..64].to_owned();
            let stored = match method {
                "lz4" => filter(&["lz4", "-c"], bytes),
                "gzip" | "" => filter(&["gzip", "-c"], bytes),
                _none => bytes.to_vec(),
            };
            let path = self.block(&digest);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, stored).unwrap();
            blocks.push(json!({ "Offset": index * BLOCK, "BlockChecksum": digest }));
        }
        let record = json!({
            "Name": name, "Size": image.len().to_string(), "BlockCount": blocks.len().to_string(),
            "Checksum": sha512(image), "Labels": null, "CompressionMethod": method,
            "CreatedTime": "2026-01-01T00:00:00Z", "CompleteTime": "2026-01-01T00:01:00Z",
            "Secret": "", "SecretNamespace": "", "ProcessingBlocks": { "Blocks": {} },
            "Blocks": blocks,
        });
        self.write_record(name, &record);
        blocks.iter().map(|block| block["BlockChecksum"].as_str().unwrap().to_owned()).collect()
    }

    fn write_record(&self, name: &str, record: &Value) {
        std::fs::create_dir_all(self.record(name).parent().unwrap()).unwrap();
        std::fs::write(self.record(name), record.to_string()).unwrap();
    }

    fn url(&self, name: &str) -> String {
        format!("backup://{}?backingImage={name}", self.dir.path().display())
    }

    fn pull(&self, name: &str, more: &[&str]) -> Output {
        let out = self.dir.path().join("out");
        bedplate(&[&["pull", &self.url(name), "-o", out.to_str().unwrap()], more].concat())
    }

    fn pulled(&self) -> Vec<u8> {
        std::fs::read(self.dir.path().join("out")).unwrap()
    }
}

/// Text, a hole of some blocks, and a rest that is no whole block.
fn image() -> Vec<u8> {
    let text = |len: usize| (0..len / 8).flat_map(|n| format!("{n:07}\n").into_bytes());
    let mut image: Vec<u8> = text(2 * BLOCK).collect();
    image.resize(5 * BLOCK, 0);
    image.extend(text(BLOCK + 12_344).map(|byte| byte ^ 1));
    image
}

#[test]
fn an_image_comes_back_from_its_backup_whichever_way_it_is_compressed() {
    let image = image();
    for method in ["lz4", "gzip", "none", ""] {
        let target = Target::new();
        let digests = target.back_up("golden.v1", &image, method);
        assert_eq!(digests.len(), 4);
        let pulled = target.pull("golden.v1", &["--sha512", &sha512(&image)]);
        assert!(pulled.status.success(), "{method}: {}", stderr(&pulled));
        assert!(target.pulled() == image, "{method}");
        let stored = std::fs::metadata(target.dir.path().join("out")).unwrap().blocks() * 512;
        assert!(stored < 4 * BLOCK as u64, "holes stay holes: {stored}");
    }
}

#[test]
fn a_qcow2_image_is_served_as_what_it_is_and_named_after_its_backup() {
    let target = Target::new();
    let (raw, qcow2) = (target.dir.path().join("d.raw"), target.dir.path().join("d.qcow2"));
    std::fs::write(&raw, image()).unwrap();
    let made = Command::new("qemu-img")
        .args(["convert", "-O", "qcow2"])
        .args([&raw, &qcow2])
        .status()
        .unwrap();
    assert!(made.success());
    target.back_up("debian", &std::fs::read(&qcow2).unwrap(), "lz4");
    let daemon = Daemon::start();
    let run = daemon.cli(&["create", &target.url("debian"), "--wait"]);
    assert!(run.status.success(), "{}", stderr(&run));
    let image = daemon.get("/v1/images/debian");
    assert_eq!(
        (&image["format"], &image["source"]),
        (&json!("qcow2"), &json!(target.url("debian")))
    );
    let uri = image["nbd"]["uri"].as_str().unwrap();
    let same = Command::new("qemu-img")
        .args(["compare", "-f", "raw", "-F", "raw", uri])
        .arg(&raw)
        .output()
        .unwrap();
    assert!(same.status.success(), "{}{}", stdout(&same), stderr(&same));
}

#[test]
fn what_is_damaged_missing_or_not_complete_is_told_and_nothing_else_is_taken_for_it() {
    let image = image();
    let target = Target::new();
    let digests = target.back_up("a", &image, "lz4");
    let refused = |why: &str| {
        let pulled = target.pull("a", &[]);
        assert_eq!(pulled.status.code(), Some(1), "{}", stderr(&pulled));
        let text = stderr(&pulled);
        assert!(text.contains(why), "{why}: {text}");
    };
    // Another block in the place of one.
    let (first, last) = (target.block(&digests[0]), target.block(&digests[3]));
    let good = std::fs::read(&first).unwrap();
    std::fs::copy(&last, &first).unwrap();
    refused("damaged");
    std::fs::write(&first, &good[..good.len() / 2]).unwrap();
    refused("damaged");
    std::fs::remove_file(&first).unwrap();
    refused("is the backup target mounted there?");
    // A pipe is not waited for.
    assert!(Command::new("mkfifo").arg(&first).status().unwrap().success());
    refused("not a regular file");
    std::fs::remove_file(&first).unwrap();
    std::fs::write(&first, &good).unwrap();

    // The blocks are right, and in the wrong places.
    let text = std::fs::read(target.record("a")).unwrap();
    let record: Value = serde_json::from_slice(&text).unwrap();
    let mut swapped = record.clone();
    for (index, other) in [(0, 1), (1, 0)] {
        swapped["Blocks"][index]["BlockChecksum"] = json!(digests[other]);
    }
    target.write_record("a", &swapped);
    refused("SHA-512");
    let mut longer = record.clone();
    longer["Blocks"][1]["Offset"] = json!(65_536);
    target.write_record("a", &longer);
    refused("would fit");
    let mut unfinished = record.clone();
    unfinished["CompleteTime"] = json!("");
    target.write_record("a", &unfinished);
    refused("not complete");
    std::fs::remove_file(target.record("a")).unwrap();
    refused("is the backup target mounted there?");
    target.write_record("a", &record);
    let pulled = target.pull("a", &[]);
    assert!(pulled.status.success(), "{}", stderr(&pulled));
    assert!(target.pulled() == image);
}
