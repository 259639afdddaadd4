//! Volumes through the daemon: one download, copies from copies, restarts, restores, manifests.

#![expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod control_support;

use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use control_support::{Daemon, HalfServer, raw_image, stderr, stdout};
use serde_json::{Value, json};

const DISKS: [&str; 2] = ["one", "two"];

fn ok(daemon: &Daemon, args: &[&str]) -> String {
    let output = daemon.cli(args);
    assert!(output.status.success(), "{args:?}: {}", stderr(&output));
    stdout(&output)
}

/// The exit code and what was said of a command that is refused.
fn refused(daemon: &Daemon, args: &[&str]) -> (i32, String) {
    let output = daemon.cli(args);
    assert!(!output.status.success(), "{args:?}: {}", stdout(&output));
    (output.status.code().unwrap(), stderr(&output))
}

fn two_disks() -> Daemon {
    Daemon::start_on(tempfile::tempdir().unwrap(), &DISKS, "")
}

fn uuids(daemon: &Daemon) -> [String; 2] {
    let disks = daemon.get("/v1/disks");
    [0, 1].map(|n| disks["disks"][n]["uuid"].as_str().unwrap().to_owned())
}

/// An origin that counts how often it was asked.
struct Counting {
    url: String,
    requests: Arc<AtomicUsize>,
}

impl Counting {
    fn start(body: Vec<u8>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}/a.img", listener.local_addr().unwrap());
        let requests = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&requests);
        std::thread::spawn(move || {
            while let Ok((stream, _)) = listener.accept() {
                count.fetch_add(1, Ordering::SeqCst);
                let _gone = whole(stream, &body);
            }
        });
        Self { url, requests }
    }

    fn requests(&self) -> usize {
        self.requests.load(Ordering::SeqCst)
    }
}

fn whole(mut stream: TcpStream, body: &[u8]) -> std::io::Result<()> {
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut line = String::new();
    while reader.read_line(&mut line)? > 2 {
        line.clear();
    }
    let head = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n", body.len());
    stream.write_all(head.as_bytes())?;
    stream.write_all(body)
}

/// An image of 5 MiB and a bit, the second of them zeroes, of a pattern.
fn pattern() -> Vec<u8> {
    let mut bytes: Vec<u8> =
        (0..(5 << 20) + 512).map(|at: usize| u8::try_from(at / 7 % 251).unwrap() + 1).collect();
    bytes[1 << 20..2 << 20].fill(0);
    bytes
}

/// Directory of the only image's copy on a disk.
fn copy_dir(dir: &Path, disk: &str) -> PathBuf {
    let images = dir.join(disk).join("backing-images");
    let found: Vec<_> = images.read_dir().unwrap().map(|entry| entry.unwrap().path()).collect();
    assert_eq!(found.len(), 1, "{found:?}");
    found[0].clone()
}

fn replicas(volume: &Value) -> Vec<(String, String)> {
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    let all = volume["replicas"].as_array().unwrap();
    all.iter().map(|r| (text(&r["state"]), text(&r["conditions"][0]["status"]))).collect()
}

/// Waits until every replica of the volume is in this state.
fn until(daemon: &Daemon, volume: &str, state: &str) -> Value {
    let done = |event: &Value| {
        let object = &event["object"];
        object["name"] == volume
            && object["replicas"].as_array().is_some_and(|r| r.iter().all(|r| r["state"] == state))
    };
    daemon.events_until("", done).pop().unwrap()["object"].clone()
}

#[test]
fn two_replicas_cost_one_request_and_the_second_copy_is_as_sparse_and_checked() {
    let (bytes, daemon) = (pattern(), two_disks());
    let origin = Counting::start(bytes.clone());
    ok(&daemon, &["create", &origin.url, "--name", "a"]);
    ok(&daemon, &["volume", "create", "v", "--image", "a", "--replicas", "2"]);
    assert_eq!(origin.requests(), 0);
    let volume = daemon.get("/v1/volumes/v");
    assert_eq!(replicas(&volume), vec![("stopped".to_owned(), "False".to_owned()); 2]);
    let shown = ok(&daemon, &["volume", "attach", "v"]);
    assert_eq!(origin.requests(), 1, "{}", daemon.log());
    let volume = daemon.get("/v1/volumes/v");
    assert_eq!((&volume["state"], &volume["robustness"]), (&json!("attached"), &json!("healthy")));
    for replica in volume["replicas"].as_array().unwrap() {
        let path = replica["path"].as_str().unwrap();
        assert!(shown.contains(path), "{shown}");
        assert_eq!(std::fs::read(path).unwrap(), bytes);
        let meta = std::fs::metadata(path).unwrap();
        assert!(std::os::unix::fs::MetadataExt::blocks(&meta) * 512 < bytes.len() as u64, "sparse");
        assert_eq!(replica["nbd"]["export"], "a");
    }
    let image = daemon.get("/v1/images/a");
    assert_eq!(image["attachments"], 2);
    let digests = |disk| std::fs::read(copy_dir(daemon.dir.path(), disk).join("backing.digests"));
    assert_eq!(digests("one").unwrap(), digests("two").unwrap());
    // In use: nothing of it goes.
    let [one, _] = uuids(&daemon);
    let (code, said) = refused(&daemon, &["cleanup", "a", "--disk", &one]);
    assert!(code == 3 && said.contains("a replica of an attached volume reads it"), "{said}");
    let (code, said) = refused(&daemon, &["delete", "a"]);
    assert!(code == 3 && said.contains("volumes stand on it: v"), "{said}");
    let (code, said) = refused(&daemon, &["volume", "delete", "v"]);
    assert!(code == 3 && said.contains("detach it first"), "{said}");
    assert!(ok(&daemon, &["volume", "list"]).contains("2/2"));
    ok(&daemon, &["volume", "detach", "v"]);
    ok(&daemon, &["cleanup", "a", "--disk", &one]);
    ok(&daemon, &["volume", "delete", "v"]);
    ok(&daemon, &["delete", "a"]);
    assert!(daemon.get("/v1/volumes")["volumes"].as_array().unwrap().is_empty());
}

#[test]
fn replicas_that_wait_say_why_and_run_by_themselves_after_a_kill() {
    let daemon = two_disks();
    let bytes = pattern();
    let server = HalfServer::start(bytes.clone());
    ok(
        &daemon,
        &["volume", "create", "v", "--image", "a", "--url", &server.url, "--replicas", "2"],
    );
    ok(&daemon, &["volume", "attach", "v", "--no-wait"]);
    let waiting = until(&daemon, "v", "waiting");
    let conditions: Vec<&Value> = [0, 1].map(|n| &waiting["replicas"][n]["conditions"][0]).into();
    for condition in &conditions {
        assert_eq!(
            (&condition["type"], &condition["reason"]),
            (&json!("WaitForBackingImage"), &json!("Waiting"))
        );
        assert!(condition["message"].as_str().unwrap().starts_with("the copy of a is "));
    }
    assert!(
        conditions
            .iter()
            .any(|c| c["message"].as_str().unwrap().contains("to be copied from there"))
    );
    let (_, dir) = daemon.end("KILL");
    let daemon = Daemon::start_on(dir, &DISKS, "");
    until(&daemon, "v", "waiting");
    // One for the first daemon's connection, one for the second's.
    server.go();
    server.go();
    let running = until(&daemon, "v", "running");
    let path = running["replicas"][1]["path"].as_str().unwrap().to_owned();
    assert_eq!(std::fs::read(path).unwrap(), bytes);
    let (_, dir) = daemon.end("KILL");
    let daemon = Daemon::start_on(dir, &DISKS, "");
    until(&daemon, "v", "running");
}

#[test]
fn a_damaged_copy_is_not_copied_and_the_source_is_asked_again() {
    let (bytes, daemon) = (pattern(), two_disks());
    let origin = Counting::start(bytes.clone());
    let [one, two] = uuids(&daemon);
    ok(&daemon, &["create", &origin.url, "--name", "a", "--disk", &one, "--wait"]);
    // A byte rots without a change of size or time.
    let rotten = copy_dir(daemon.dir.path(), "one").join("backing");
    let time = std::fs::metadata(&rotten).unwrap().modified().unwrap();
    let file = {
        let mut mode = std::fs::metadata(&rotten).unwrap().permissions();
        std::os::unix::fs::PermissionsExt::set_mode(&mut mode, 0o644);
        std::fs::set_permissions(&rotten, mode).unwrap();
        std::fs::OpenOptions::new().write(true).open(&rotten).unwrap()
    };
    std::os::unix::fs::FileExt::write_all_at(&file, b"\0", (3 << 20) + 5).unwrap();
    file.set_modified(time).unwrap();
    ok(&daemon, &["create", &origin.url, "--name", "a", "--disk", &two, "--wait"]);
    assert_eq!(origin.requests(), 2);
    let good = copy_dir(daemon.dir.path(), "two").join("backing");
    assert_eq!(std::fs::read(good).unwrap(), bytes);
    assert!(daemon.log().contains("in the MiB from byte 0x300000 on"), "{}", daemon.log());
}

#[test]
fn a_backup_is_restored_on_its_image_or_on_another_that_the_user_vouches_for() {
    let daemon = two_disks();
    let file = daemon.dir.path().join("parrot.img");
    raw_image(&file, 1 << 20);
    let sum = std::process::Command::new("sha512sum").arg(&file).output().unwrap();
    let sha512 = stdout(&sum).split_whitespace().next().unwrap().to_owned();
    let cfg = |sha512: &str| {
        json!({ "Name": "vm", "Size": "1048576", "LastBackupName": "backup-1",
                "BackingImageName": "\"parrot\"", "BackingImageChecksum": format!("\"{sha512}\"") })
        .to_string()
    };
    let path = daemon.dir.path().join("volume.cfg");
    std::fs::write(&path, cfg(&sha512)).unwrap();
    let right = path.to_str().unwrap();
    // The image is not known: it has to be, or a URL.
    let (code, said) = refused(&daemon, &["volume", "restore", "v", "--backup", right]);
    assert!(
        code == 4 && said.contains("image parrot: not found") && said.contains("hint:"),
        "{said}"
    );
    let url = file.to_str().unwrap();
    ok(&daemon, &["volume", "restore", "v", "--backup", right, "--url", url]);
    let image = daemon.get("/v1/images/parrot");
    assert_eq!(image["expected"]["sha512"], sha512.as_str());
    ok(&daemon, &["volume", "attach", "v"]);
    let volume = daemon.get("/v1/volumes/v");
    assert_eq!(
        (&volume["backup"]["image"], &volume["backup"]["backup"]),
        (&json!("parrot"), &json!("backup-1"))
    );
    // Another digest than the image's, and one that was never made.
    let wrong = cfg(&"a".repeat(128));
    let (code, said) = refused(&daemon, &["volume", "restore", "w", "--backup", &wrong]);
    assert!(code == 1 && said.contains(&sha512) && said.contains("--force"), "{said}");
    ok(&daemon, &["volume", "restore", "w", "--backup", &wrong, "--force"]);
    ok(&daemon, &["create", url, "--name", "copy", "--wait"]);
    let args = ["volume", "restore", "x", "--backup", right, "--image", "copy"];
    let (code, said) = refused(&daemon, &args);
    assert!(code == 1 && said.contains("its SHA-512 was never made"), "{said}");
    let volume = ok(&daemon, &[&args[..], &["--force", "--json"]].concat());
    let volume: Value = serde_json::from_str(&volume).unwrap();
    assert_eq!((&volume["image"], &volume["backup"]["forced"]), (&json!("copy"), &json!(true)));
    // What is no volume.cfg.
    for bad in ["{}", r#"{"BackingImageName":"A"}"#, r#"{"Name":"vm"}"#, "{"] {
        assert_eq!(refused(&daemon, &["volume", "restore", "y", "--backup", bad]).0, 2, "{bad}");
    }
    assert_eq!(refused(&daemon, &["volume", "restore", "y", "--backup", "no-such"]).0, 4);
}

/// The page's class with a URL of the test's, and a claim of it.
fn manifest(url: &str, checksum: &str) -> String {
    format!(
        r#"apiVersion: v1
kind: ConfigMap
metadata:
  name: longhorn-storageclass
  namespace: longhorn-system
data:
  storageclass.yaml: |
    kind: StorageClass
    apiVersion: storage.k8s.io/v1
    metadata:
      name: longhorn
    provisioner: driver.longhorn.io
    allowVolumeExpansion: true
    reclaimPolicy: Delete
    volumeBindingMode: Immediate
    parameters:
      numberOfReplicas: "3"
      staleReplicaTimeout: "2880"
      fromBackup: ""
      backingImage: "bi-test"
      backingImageURL: "{url}"
      backingImageChecksum: "{checksum}"
      colour: "blue"
---
apiVersion: v1
kind: PersistentVolumeClaim
metadata:
  name: claim
spec:
  storageClassName: longhorn
  resources:
    requests:
      storage: 1Gi
"#
    )
}

#[test]
fn a_class_and_a_claim_make_image_and_volume_once_and_survive_a_kill() {
    let (bytes, daemon) = (pattern(), two_disks());
    let origin = Counting::start(bytes);
    let path = daemon.dir.path().join("m.yaml");
    let apply = |daemon: &Daemon, text: &str| {
        std::fs::write(&path, text).unwrap();
        daemon.cli(&["apply", "-f", path.to_str().unwrap()])
    };
    let text = manifest(&origin.url, "");
    let first = apply(&daemon, &text);
    assert!(first.status.success(), "{}", stderr(&first));
    assert_eq!(
        stdout(&first),
        "StorageClass longhorn created\nPersistentVolumeClaim claim created\n"
    );
    let said = stderr(&first);
    assert!(said.contains("colour is not known, and passed over"), "{said}");
    assert!(said.contains("3 replicas were asked for, and 2 made"), "{said}");
    let again = stdout(&apply(&daemon, &text));
    assert_eq!(again, "StorageClass longhorn unchanged\nPersistentVolumeClaim claim unchanged\n");
    assert_eq!(origin.requests(), 0);
    let (_, dir) = daemon.end("KILL");
    let daemon = Daemon::start_on(dir, &DISKS, "");
    let class = daemon.get("/v1/classes/longhorn");
    assert_eq!((&class["image"], &class["number_of_replicas"]), (&json!("bi-test"), &json!(3)));
    assert!(ok(&daemon, &["class", "list"]).contains("bi-test"));
    ok(&daemon, &["volume", "attach", "claim"]);
    assert_eq!(origin.requests(), 1);
    let volume = daemon.get("/v1/volumes/claim");
    assert_eq!(
        (&volume["size_bytes"], &volume["claim"]),
        (&json!(1_u64 << 30), &json!("default/claim"))
    );
    // Another URL for the image that is there (rule 13): not in silence.
    let other = manifest("http://127.0.0.1:1/other.img", "").replace("name: claim", "name: other");
    let refused = apply(&daemon, &other);
    let said = stderr(&refused);
    assert_eq!(refused.status.code(), Some(1), "{said}");
    assert!(said.contains("document 2 (line 25): PersistentVolumeClaim other: image bi-test: exists with another source"), "{said}");
    assert!(daemon.get("/v1/volumes")["volumes"].as_array().unwrap().len() == 1);
    ok(&daemon, &["class", "delete", "longhorn"]);
    let orphan =
        apply(&daemon, &text.replace("name: claim", "name: orphan")[text.find("---").unwrap()..]);
    assert_eq!(orphan.status.code(), Some(4), "{}", stderr(&orphan));
    assert!(stderr(&orphan).contains("storage class longhorn: not found"));
}

#[test]
fn a_manifest_that_does_not_read_changes_nothing_and_longhorns_own_kinds_do() {
    let daemon = two_disks();
    let bad = manifest("https://u:hunter2@h/a", "SHA512 checksum of the backing image");
    let (status, answer) = daemon.curl("POST", "/v1/apply", Some(&bad));
    assert_eq!(status, 400);
    let said = answer["error"]["message"].as_str().unwrap();
    assert!(
        said.contains("document 1 (line 8)") && said.contains("backingImageChecksum"),
        "{said}"
    );
    assert!(!answer.to_string().contains("hunter2"));
    let (status, answer) = daemon.curl("POST", "/v1/apply", Some("kind: Pod\napiVersion: v1\n"));
    assert!(status == 400 && answer.to_string().contains("Pod of"), "{answer}");
    assert!(daemon.get("/v1/classes")["classes"].as_array().unwrap().is_empty());
    let file = daemon.dir.path().join("i.img");
    raw_image(&file, 1 << 20);
    let own = json!({ "apiVersion": "longhorn.io/v1beta2", "kind": "BackingImage",
        "metadata": { "name": "i" }, "spec": { "sourceType": "download",
        "sourceParameters": { "url": format!("file://{}", file.display()) } } });
    let volume = json!({ "apiVersion": "longhorn.io/v1beta2", "kind": "Volume",
        "metadata": { "name": "v" },
        "spec": { "size": "1048576", "numberOfReplicas": 1, "backingImage": "i" } });
    let (status, answer) = daemon.curl("POST", "/v1/apply", Some(&format!("{own}\n---\n{volume}")));
    assert_eq!(status, 200, "{answer}");
    assert_eq!(answer["documents"][1]["action"], "created");
    ok(&daemon, &["volume", "attach", "v"]);
    let secret = manifest("https://u:hunter2@h/a?sig=hunter2", "");
    let (status, answer) = daemon.curl("POST", "/v1/apply", Some(&secret));
    assert_eq!(status, 200, "{answer}");
    for path in ["/v1/classes", "/v1/images", "/v1/volumes"] {
        assert!(!daemon.get(path).to_string().contains("hunter2"), "{path}");
    }
    assert!(!daemon.log().contains("hunter2"));
}
