//! `bedplate inspect`, `cat` and `export` of files: the verdict and every reason, snapshots, bases.

#![expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod blocks_common;
mod control_support;
mod qcow2_common;

use std::path::Path;
use std::process::Output;

use control_support::{Daemon, bedplate, stderr, stdout};
use qcow2_common::craft::{CLUSTER, Crafted, L2_AT};
use qcow2_common::{have_qemu, qemu_bytes, run, write};
use serde_json::Value;
use tempfile::TempDir;

fn inspect(path: &Path) -> (Option<i32>, Value) {
    let output = bedplate(&["inspect", path.to_str().unwrap(), "--json"]);
    (output.status.code(), serde_json::from_str(&stdout(&output)).unwrap())
}

fn code(output: &Output) -> Option<i32> {
    output.status.code()
}

#[test]
fn a_sound_image_is_ok_an_odd_one_repairable_a_bad_one_refused() {
    let dir = TempDir::new().unwrap();
    let sound = Crafted::new();
    let path = write(dir.path(), "sound.qcow2", &sound.bytes);
    let (code, found) = inspect(&path);
    assert_eq!((code, &found["verdict"]), (Some(0), &"ok".into()));
    assert_eq!(found["findings"], Value::Array(Vec::new()));
    assert_eq!(found["data_clusters"], 2);
    assert_eq!(found["compressed_clusters"], 2);

    let mut odd = sound.clone();
    odd.put64(72, 1);
    let (code, found) = inspect(&write(dir.path(), "odd.qcow2", &odd.bytes));
    assert_eq!((code, &found["verdict"]), (Some(0), &"repairable".into()));
    assert!(found["findings"][0]["text"].as_str().unwrap().contains("dirty bit"), "{found}");

    let mut bad = sound.clone();
    for index in 0..16 {
        bad.l2(index, (5 * CLUSTER + 512 * (index + 1)) as u64);
    }
    let path = write(dir.path(), "bad.qcow2", &bad.bytes);
    let (code, found) = inspect(&path);
    assert_eq!((code, &found["verdict"]), (Some(1), &"refused".into()));
    // Entries 7 and 15 are aligned by chance.
    assert_eq!(found["findings"].as_array().unwrap().len(), 14, "{found}");
    assert_eq!(found["findings"][0]["field"], "data cluster offset");
    assert_eq!(found["findings"][0]["at"], L2_AT);
    let text = stdout(&bedplate(&["inspect", path.to_str().unwrap()]));
    assert!(text.starts_with(&format!("{}: refused\n", path.display())), "{text}");
}

#[test]
fn many_faults_are_counted_and_a_few_are_listed() {
    let dir = TempDir::new().unwrap();
    let mut bad = Crafted::new();
    bad.put64(24, 200 * CLUSTER as u64);
    for index in 0..200 {
        bad.l2(index, 1 << 40);
    }
    let (_, found) = inspect(&write(dir.path(), "bad.qcow2", &bad.bytes));
    let listed = found["findings"].as_array().unwrap().len() as u64;
    assert!(listed < 50 && listed + found["more_faults"].as_u64().unwrap() == 200, "{found}");
}

#[test]
fn what_is_no_image_is_said_so() {
    let dir = TempDir::new().unwrap();
    let cases = [
        ("qed", &b"QED\0\x01\0\0\0"[..], 0, "looks like QED"),
        ("vmdk", b"KDMV\x01\0\0\0", 1, "file length"),
        ("gz", &[0x1f, 0x8b, 8, 0][..], 0, "looks like gzip"),
        ("empty", b"", 1, "empty"),
        ("cut.qcow2", b"QFI\xfb\0\0\0\x03", 1, "file length"),
    ];
    for (name, bytes, want, words) in cases {
        let (code, found) = inspect(&write(dir.path(), name, bytes));
        assert_eq!(code, Some(want), "{found}");
        assert!(found["findings"][0]["text"].as_str().unwrap().contains(words), "{found}");
    }
    let missing = dir.path().join("missing");
    let output = bedplate(&["inspect", missing.to_str().unwrap()]);
    assert_eq!(code(&output), Some(4), "{}", stderr(&output));
}

#[test]
fn images_of_other_hypervisors_are_read() {
    for (name, image, disk) in blocks_common::all() {
        let dir = TempDir::new().unwrap();
        let path = write(dir.path(), "image", &image.bytes);
        let path = path.to_str().unwrap();
        let format = image.format.to_string();
        let output = bedplate(&["cat", path, "--format", &format]);
        assert!(output.stdout == disk, "{name}: {}", stderr(&output));
        let (code, found) = inspect(Path::new(path));
        if name == "vhd_fixed" {
            // Its bytes are the disk's; only its owner can say that the footer is none of it.
            assert_eq!((code, &found["format"]), (Some(0), &"raw".into()));
            assert_eq!(found["verdict"], "repairable", "{found}");
            continue;
        }
        assert_eq!((code, &found["format"]), (Some(0), &format.as_str().into()), "{found}");
        let cat = bedplate(&["cat", path]);
        assert!(cat.stdout == disk, "{name}: {}", stderr(&cat));
    }
}

#[test]
fn an_image_of_the_daemon_is_inspected_by_name() {
    let daemon = Daemon::start();
    let mut image = Crafted::new();
    image.put64(72, 1);
    let path = write(daemon.dir.path(), "crafted.qcow2", &image.bytes);
    let early = daemon.cli(&["inspect", "crafted"]);
    assert_eq!(code(&early), Some(4), "{}", stderr(&early));
    daemon.cli(&["create", path.to_str().unwrap(), "--name", "crafted"]);
    let early = daemon.cli(&["inspect", "crafted"]);
    assert!(stderr(&early).contains("no copy of the image is complete"), "{}", stderr(&early));
    daemon.cli(&["create", path.to_str().unwrap(), "--name", "crafted", "--wait"]);
    let found = daemon.cli(&["inspect", "crafted", "--json"]);
    assert_eq!(serde_json::from_str::<Value>(&stdout(&found)).unwrap(), inspect(&path).1);
}

#[test]
fn snapshots_are_listed_and_one_is_read() {
    if !have_qemu() {
        return;
    }
    let dir = TempDir::new().unwrap();
    let image = dir.path().join("disk.qcow2");
    let path = image.to_str().unwrap();
    run("qemu-img", &["create", "-q", "-f", "qcow2", path, "1M"]);
    run("qemu-io", &["-f", "qcow2", "-c", "write -P 1 0 100k", path]);
    run("qemu-img", &["snapshot", "-c", "before upgrade", path]);
    let then = qemu_bytes(&image).unwrap();
    run("qemu-io", &["-f", "qcow2", "-c", "write -P 2 50k 100k", path]);
    let text = stdout(&bedplate(&["inspect", path]));
    assert!(text.contains("1         before upgrade  1.0 MiB"), "{text}");
    for wanted in ["1", "before upgrade"] {
        let cat = bedplate(&["cat", path, "--snapshot", wanted]);
        assert!(cat.stdout == then, "{}", stderr(&cat));
    }
    let cat = bedplate(&["cat", path, "--snapshot", "2"]);
    assert!(code(&cat) == Some(1) && stderr(&cat).contains("no snapshot"), "{}", stderr(&cat));
}

#[test]
fn backing_files_are_given_from_the_top_down() {
    if !have_qemu() {
        return;
    }
    let dir = TempDir::new().unwrap();
    let [bottom, middle, top] =
        ["bottom.raw", "middle.qcow2", "top.qcow2"].map(|name| dir.path().join(name));
    std::fs::write(&bottom, vec![7; 300_032]).unwrap();
    let text = |path: &Path| path.to_str().unwrap().to_owned();
    let over = |base: &Path, format: &str, image: &Path| {
        let args = ["create", "-q", "-f", "qcow2", "-F", format, "-b"];
        run("qemu-img", &[&args[..], &[&text(base), &text(image), "1M"]].concat());
        run("qemu-io", &["-f", "qcow2", "-c", "write -P 9 64k 64k", &text(image)]);
    };
    over(&bottom, "raw", &middle);
    over(&middle, "qcow2", &top);
    run("qemu-io", &["-f", "qcow2", "-c", "write -P 3 130k 1k", &text(&top)]);
    let (bottom, middle) = (text(&bottom), text(&middle));
    let cat = bedplate(&["cat", &text(&top), "--base", &middle, "--base", &bottom]);
    assert!(cat.stdout == qemu_bytes(&top).unwrap(), "{}", stderr(&cat));
    let alone = bedplate(&["cat", &text(&top)]);
    assert_eq!(code(&alone), Some(1));
    assert!(stderr(&alone).contains("give the backing file with --base"), "{}", stderr(&alone));
    let (code, found) = inspect(&top);
    assert_eq!((code, &found["findings"][0]["field"]), (Some(1), &"backing_file_offset".into()));
    let overlay = bedplate(&["inspect", &text(&top), "--overlay"]);
    assert!(stdout(&overlay).contains(": ok\n"), "{}", stdout(&overlay));
}

#[test]
fn who_waits_for_a_source_is_told_why() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}/d.img?k=hunter2", listener.local_addr().unwrap());
    let server = std::thread::spawn(move || {
        for _ in 0..2 {
            drop(listener.accept().unwrap());
        }
        let (mut stream, _) = listener.accept().unwrap();
        let _head = std::io::Read::read(&mut stream, &mut [0; 4096]).unwrap();
        let gone = b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n";
        std::io::Write::write_all(&mut stream, gone).unwrap();
    });
    let output = bedplate(&["inspect", &url]);
    server.join().unwrap();
    let told = stderr(&output);
    assert_eq!(output.status.code(), Some(1), "{told}");
    assert!(told.contains("try 3: ") && !told.contains("hunter2"), "{told}");
}
