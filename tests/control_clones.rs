//! Clones through the daemon: the bytes are those of the image, and it stays until they are there.

#![expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod control_support;

use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use control_support::{Daemon, raw_image, stderr, stdout};
use serde_json::{Value, json};

const LEN: usize = 3_500_000;

fn ok(daemon: &Daemon, args: &[&str]) -> String {
    let output = daemon.cli(args);
    assert!(output.status.success(), "{args:?}: {}", stderr(&output));
    stdout(&output)
}

/// A raw image with a hole in its middle that is ready as `golden`.
fn golden(daemon: &Daemon) -> (PathBuf, Vec<u8>) {
    let path = daemon.dir.path().join("golden.img");
    raw_image(&path, LEN);
    let file = std::fs::File::options().write(true).open(&path).unwrap();
    file.set_len(40 << 20).unwrap();
    file.write_all_at(b"the end", (40 << 20) - 7).unwrap();
    ok(daemon, &["create", path.to_str().unwrap(), "--name", "golden", "--wait"]);
    let bytes = std::fs::read(&path).unwrap();
    (path, bytes)
}

fn backing(daemon: &Daemon, image: &str) -> PathBuf {
    let dir = daemon.dir.path().join("disk/backing-images");
    let is = |path: &Path| path.file_name().unwrap().to_str().unwrap().starts_with(image);
    let mut all = dir.read_dir().unwrap().map(|entry| entry.unwrap().path());
    all.find(|path| is(path)).unwrap().join("backing")
}

#[test]
fn a_clone_has_the_bytes_digests_and_holes_of_its_image_and_outlives_it() {
    let daemon = Daemon::start();
    let (source, bytes) = golden(&daemon);
    // Whatever it is made of, it is not this.
    std::fs::remove_file(source).unwrap();
    let shown = ok(&daemon, &["create", "copy", "--clone", "golden"]);
    assert!(shown.starts_with("copy"), "{shown}");
    let refused = daemon.cli(&["delete", "golden"]);
    assert_eq!(refused.status.code(), Some(3));
    assert!(stderr(&refused).contains("no complete copy yet: copy"), "{}", stderr(&refused));
    let uri = ok(&daemon, &["attach", "copy", "--reader", "vm"]);
    let [a, b] = ["golden", "copy"].map(|image| daemon.get(&format!("/v1/images/{image}")));
    for fact in ["format", "virtual_size_bytes", "size_bytes", "digests"] {
        assert_eq!(a[fact], b[fact], "{fact}");
    }
    assert_eq!((&b["clone_of"], &b["source"]), (&json!("golden"), &Value::Null));
    assert_ne!(a["uuid"], b["uuid"]);
    let stored = b["copies"][0]["stored_bytes"].as_u64().unwrap();
    assert!(stored < 5 << 20, "{stored} bytes of a hole");
    assert!(ok(&daemon, &["get", "copy"]).contains("source        clone of golden"));
    ok(&daemon, &["delete", "golden"]);
    let read = daemon.dir.path().join("read.img");
    let done = Command::new("nbdcopy").args([uri.trim(), read.to_str().unwrap()]).output().unwrap();
    assert!(done.status.success(), "{}", stderr(&done));
    assert!(std::fs::read(&read).unwrap() == bytes);
    // It is as it was after a crash, without its image.
    let (_, dir) = daemon.end("KILL");
    let daemon = Daemon::start_in(dir, "");
    daemon.wait_for("copy", "ready");
    assert!(std::fs::read(backing(&daemon, "copy")).unwrap() == bytes);
}

#[test]
fn a_digest_that_is_given_for_a_clone_is_made_and_held() {
    let daemon = Daemon::start();
    golden(&daemon);
    let sum = |tool: &str| {
        let output = Command::new(tool).arg(backing(&daemon, "golden")).output().unwrap();
        stdout(&output).split(' ').next().unwrap().to_owned()
    };
    let sha512 = sum("sha512sum");
    ok(&daemon, &["create", "right", "--clone", "golden", "--sha512", &sha512, "--wait"]);
    let made = daemon.get("/v1/images/right")["digests"].clone();
    assert_eq!((&made["sha512"], &made["sha256"]), (&json!(sha512), &json!(sum("sha256sum"))));
    for (name, kind, digest) in
        [("w1", "--sha512", "0".repeat(128)), ("w2", "--sha256", "0".repeat(64))]
    {
        let refused = daemon.cli(&["create", name, "--clone", "golden", kind, &digest, "--wait"]);
        assert_eq!(refused.status.code(), Some(1), "{}", stderr(&refused));
        assert!(stderr(&refused).contains(&digest), "{}", stderr(&refused));
        assert!(daemon.get("/v1/images/golden")["copies"][0]["state"] == "ready");
    }
}

#[test]
fn a_damaged_copy_is_not_cloned_and_the_reason_is_told() {
    let daemon = Daemon::start();
    golden(&daemon);
    let path = backing(&daemon, "golden");
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
    let file = std::fs::File::options().write(true).open(&path).unwrap();
    let time = file.metadata().unwrap().modified().unwrap();
    file.write_all_at(b"wrong", 2_000_000).unwrap();
    // As a disk does it: nobody has touched the file.
    file.set_modified(time).unwrap();
    ok(&daemon, &["create", "copy", "--clone", "golden", "--fetch"]);
    let is = |event: &Value| {
        let copy = &event["object"]["copies"][0];
        copy["state"].as_str().is_some_and(|state| state.starts_with("failed"))
    };
    let events = daemon.events_until("?image=copy", is);
    let message = events.last().unwrap()["object"]["copies"][0]["message"].to_string();
    assert!(message.contains("golden") && message.contains("0x100000"), "{message}");
    // A scrub mends the image from its source, and the clone becomes what it should be.
    ok(&daemon, &["scrub", "golden", "--wait"]);
    ok(&daemon, &["attach", "copy"]);
    let [a, b] = ["golden", "copy"].map(|image| std::fs::read(backing(&daemon, image)).unwrap());
    assert!(a == b);
}

#[test]
fn what_does_not_go_with_a_clone_is_refused_with_the_reason() {
    let daemon = Daemon::start();
    golden(&daemon);
    for (more, word) in [
        (r#""layout":"raw""#, "layout"),
        (r#""format":"raw""#, "format"),
        (r#""base":"golden""#, "base"),
        (r#""mirrors":["http://h/a"]"#, "mirrors"),
        (r#""checksum_url":"http://h/a""#, "checksum_url"),
        (r#""access":{"bearer":"t"}"#, "access"),
        (r#""url":"http://h/a""#, "only one"),
        (r#""upload_bytes":7"#, "only one"),
    ] {
        let body = format!(r#"{{"name":"c","clone_of":"golden",{more}}}"#);
        let (status, answer) = daemon.curl("POST", "/v1/images", Some(&body));
        let message = answer["error"]["message"].as_str().unwrap();
        assert!(status == 400 && message.contains(word), "{more}: {status} {answer}");
    }
    for (body, wanted) in [
        (r#"{"name":"c","clone_of":"nothing"}"#, 404),
        (r#"{"name":"c","clone_of":"../golden"}"#, 400),
        (r#"{"clone_of":"golden"}"#, 400),
        (r#"{"name":"golden","clone_of":"golden"}"#, 409),
    ] {
        let (status, answer) = daemon.curl("POST", "/v1/images", Some(body));
        assert_eq!(status, wanted, "{body}: {answer}");
    }
    let unnamed = daemon.cli(&["create", "./golden.img", "--clone", "golden"]);
    assert_eq!(unnamed.status.code(), Some(2), "{}", stderr(&unnamed));
}

#[test]
fn a_claim_of_a_class_that_clones_makes_the_clone_and_runs_on_it() {
    let daemon = Daemon::start();
    let (_, bytes) = golden(&daemon);
    let manifest = daemon.dir.path().join("m.yaml");
    let text = "apiVersion: storage.k8s.io/v1\nkind: StorageClass\nmetadata: {name: copies}\nparameters:\n  \
                backingImage: copy\n  backingImageDataSourceType: clone\n  backingImageDataSourceParameters: \
                '{\"backing-image\": \"golden\"}'\n---\napiVersion: v1\nkind: PersistentVolumeClaim\n\
                metadata: {name: data}\nspec:\n  storageClassName: copies\n  \
                resources: {requests: {storage: 1Gi}}\n";
    std::fs::write(&manifest, text).unwrap();
    let manifest = manifest.to_str().unwrap();
    ok(&daemon, &["apply", "-f", manifest]);
    assert_eq!(daemon.get("/v1/classes/copies")["clone_of"], "golden");
    assert!(ok(&daemon, &["class", "list"]).contains("clone of golden"));
    // Like any image of a volume: made, and brought in by the first attach.
    assert_eq!(daemon.get("/v1/images/copy")["copies"], json!([]));
    ok(&daemon, &["volume", "attach", "data"]);
    daemon.wait_for("copy", "ready");
    assert!(std::fs::read(backing(&daemon, "copy")).unwrap() == bytes);
    let again = ok(&daemon, &["apply", "-f", manifest]);
    assert_eq!(again, "StorageClass copies unchanged\nPersistentVolumeClaim data unchanged\n");
}
