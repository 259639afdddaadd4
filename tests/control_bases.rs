//! Overlays and snapshots through the daemon: the bytes are qemu's, and a base stays.

#![expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod control_support;
mod qcow2_common;

use std::path::{Path, PathBuf};
use std::process::Command;

use control_support::{Daemon, stderr, stdout};
use qcow2_common::{Random, have_qemu, qemu_bytes, run};

fn text(path: &Path) -> String {
    path.to_str().unwrap().to_owned()
}

fn ok(daemon: &Daemon, args: &[&str]) -> String {
    let output = daemon.cli(args);
    assert!(output.status.success(), "{args:?}: {}", stderr(&output));
    stdout(&output)
}

/// What an NBD client reads.
fn read(uri: &str, dir: &Path) -> Vec<u8> {
    let copy = dir.join("copy.raw");
    let done = Command::new("nbdcopy").args([uri.trim(), &text(&copy)]).output().unwrap();
    assert!(done.status.success(), "{}", stderr(&done));
    std::fs::read(copy).unwrap()
}

/// A raw bottom, a compressed middle and a top with subclusters.
fn chain(dir: &Path) -> [PathBuf; 3] {
    let [bottom, middle, top] =
        ["bottom.raw", "middle.qcow2", "top.qcow2"].map(|name| dir.join(name));
    let mut random = Random(3);
    let bytes: Vec<u8> = (0..3 << 20).map(|_| random.next().to_le_bytes()[0] & 7).collect();
    std::fs::write(&bottom, bytes).unwrap();
    let over = |base: &Path, format: &str, image: &Path, options: &str, writes: &[&str]| {
        let args = ["create", "-q", "-f", "qcow2", "-o", options, "-F", format, "-b"];
        run("qemu-img", &[&args[..], &[&text(base), &text(image), "4M"]].concat());
        for write in writes {
            run("qemu-io", &["-f", "qcow2", "-c", write, &text(image)]);
        }
    };
    over(&bottom, "raw", &middle, "compat=1.1", &["write -c -P 5 1M 64k", "write -z 2M 70k"]);
    over(&middle, "qcow2", &top, "extended_l2=on", &["write -P 9 1030k 3k", "write -P 8 3500k 9k"]);
    [bottom, middle, top]
}

#[test]
fn an_overlay_on_images_of_the_store_is_read_as_with_qemu_also_after_a_restart() {
    if !have_qemu() {
        return;
    }
    let daemon = Daemon::start();
    let files = tempfile::tempdir().unwrap();
    let [bottom, middle, top] = chain(files.path());
    let want = qemu_bytes(&top).unwrap();
    ok(&daemon, &["create", &text(&bottom), "--name", "bottom"]);
    ok(&daemon, &["create", &text(&middle), "--name", "middle", "--base", "bottom"]);
    ok(&daemon, &["create", &text(&top), "--name", "top", "--base", "middle"]);
    let uri = ok(&daemon, &["attach", "top", "--reader", "vm"]);
    assert!(read(&uri, files.path()) == want);
    for image in ["bottom", "middle"] {
        daemon.wait_for(image, "ready");
        let refused = daemon.cli(&["delete", image]);
        assert_eq!(refused.status.code(), Some(3), "{}", stderr(&refused));
        assert!(stderr(&refused).contains("other images stand on it"), "{}", stderr(&refused));
    }
    assert!(ok(&daemon, &["get", "top"]).contains("base          middle"));
    assert!(ok(&daemon, &["inspect", "top"]).contains("ok"));
    let (_, dir) = daemon.end("KILL");
    let daemon = Daemon::start_in(dir, "");
    daemon.wait_for("top", "ready");
    let uri = ok(&daemon, &["attach", "top", "--reader", "vm"]);
    assert!(read(&uri, files.path()) == want);
}

#[test]
fn a_base_that_does_not_fit_is_refused_with_the_reason() {
    if !have_qemu() {
        return;
    }
    let daemon = Daemon::start();
    let files = tempfile::tempdir().unwrap();
    let [bottom, middle, top] = chain(files.path());
    ok(&daemon, &["create", &text(&bottom), "--name", "bottom"]);
    // Made for a QCOW2 base, given a raw one.
    ok(&daemon, &["create", &text(&top), "--name", "top", "--base", "bottom"]);
    let refused = daemon.cli(&["attach", "top"]);
    assert!(
        stderr(&refused).contains("made for a backing file of format Qcow2"),
        "{}",
        stderr(&refused)
    );
    // A base for an image that has none, and none for one that needs it.
    ok(&daemon, &["create", &text(&bottom), "--name", "raw", "--base", "bottom"]);
    let refused = daemon.cli(&["attach", "raw"]);
    assert!(
        stderr(&refused).contains("a base was given, and the image has none"),
        "{}",
        stderr(&refused)
    );
    ok(&daemon, &["create", &text(&middle), "--name", "middle"]);
    let refused = daemon.cli(&["attach", "middle"]);
    assert!(stderr(&refused).contains("backing_file_offset"), "{}", stderr(&refused));
    let missing = daemon.cli(&["create", &text(&middle), "--name", "x", "--base", "nothing"]);
    assert_eq!(missing.status.code(), Some(4), "{}", stderr(&missing));
}

#[test]
fn an_image_can_be_served_as_it_was_at_a_snapshot() {
    if !have_qemu() {
        return;
    }
    let daemon = Daemon::start();
    let files = tempfile::tempdir().unwrap();
    let image = files.path().join("disk.qcow2");
    let path = text(&image);
    run("qemu-img", &["create", "-q", "-f", "qcow2", &path, "2M"]);
    run("qemu-io", &["-f", "qcow2", "-c", "write -P 1 0 300k", &path]);
    run("qemu-img", &["snapshot", "-c", "before", &path]);
    let then = qemu_bytes(&image).unwrap();
    run("qemu-io", &["-f", "qcow2", "-c", "write -P 2 200k 300k", &path]);
    run("qemu-img", &["resize", "-q", "-f", "qcow2", &path, "3M"]);
    ok(&daemon, &["create", &path, "--name", "then", "--snapshot", "before"]);
    ok(&daemon, &["create", &path, "--name", "now"]);
    let [before, after] = ["then", "now"].map(|name| ok(&daemon, &["attach", name]));
    assert!(read(&before, files.path()) == then);
    assert!(read(&after, files.path()) == qemu_bytes(&image).unwrap());
    // Each has the size that its readers see, also once the file is found on the disk again.
    let sizes = |daemon: &Daemon| {
        ["then", "now"]
            .map(|name| daemon.get(&format!("/v1/images/{name}"))["virtual_size_bytes"].clone())
    };
    assert_eq!(sizes(&daemon), [2 << 20, 3 << 20]);
    let (_, dir) = daemon.end("TERM");
    let daemon = Daemon::start_in(dir, "");
    assert_eq!(sizes(&daemon), [2 << 20, 3 << 20]);
    let volume = ["volume", "create", "small", "--image", "then", "--size", "2M"];
    ok(&daemon, &volume);
    ok(&daemon, &["create", &path, "--name", "never", "--snapshot", "after"]);
    let refused = daemon.cli(&["attach", "never"]);
    assert!(stderr(&refused).contains("no snapshot has the ID or name"), "{}", stderr(&refused));
}

#[test]
fn an_external_data_file_is_an_image_that_was_named_and_nothing_else() {
    if !have_qemu() {
        return;
    }
    let daemon = Daemon::start();
    let files = tempfile::tempdir().unwrap();
    let [image, raw] = ["disk.qcow2", "disk.data"].map(|name| files.path().join(name));
    let [path, data] = [&image, &raw].map(|path| text(path));
    let options = format!("data_file={data}");
    run("qemu-img", &["create", "-q", "-f", "qcow2", "-o", &options, &path, "3M"]);
    run("qemu-io", &["-f", "qcow2", "-c", "write -P 1 200k 300k", "-c", "write -P 2 2M 1M", &path]);
    run("qemu-io", &["-f", "qcow2", "-c", "write -z 2200k 100k", &path]);
    let want = qemu_bytes(&image).unwrap();
    // Refused without it, whatever the file says; a data file that is not needed is refused, too.
    ok(&daemon, &["create", &path, "--name", "alone"]);
    let refused = daemon.cli(&["attach", "alone"]);
    assert!(stderr(&refused).contains("external data file"), "{}", stderr(&refused));
    ok(&daemon, &["create", &data, "--name", "data", "--format", "raw"]);
    ok(&daemon, &["create", &data, "--name", "other", "--data-file", "data", "--format", "raw"]);
    let refused = daemon.cli(&["attach", "other"]);
    assert!(stderr(&refused).contains("external data file was given"), "{}", stderr(&refused));
    ok(&daemon, &["create", &path, "--name", "disk", "--data-file", "data"]);
    let uri = ok(&daemon, &["attach", "disk"]);
    assert!(read(&uri, files.path()) == want);
    assert!(ok(&daemon, &["get", "disk"]).contains("data file     data"));
    assert!(ok(&daemon, &["inspect", "disk"]).contains("ok"));
    let refused = daemon.cli(&["delete", "data"]);
    assert_eq!(refused.status.code(), Some(3), "{}", stderr(&refused));
    // Also from what was found on the disk.
    let (_, dir) = daemon.end("KILL");
    let daemon = Daemon::start_in(dir, "");
    daemon.wait_for("disk", "ready");
    let uri = daemon.get("/v1/images/disk")["nbd"]["uri"].as_str().unwrap().to_owned();
    assert!(read(&uri, files.path()) == want);
}
