//! Tags of disks, from the configuration to where an image goes.

mod control_support;

use std::process::{Child, Command, Stdio};

use control_support::{BEDPLATE, bedplate, clean, collect, curl, raw_image, stderr, stdout};
use serde_json::{Value, json};

struct Ended(Child);

impl Drop for Ended {
    fn drop(&mut self) {
        let _ended = self.0.kill();
        let _ended = self.0.wait();
    }
}

#[test]
fn an_image_goes_to_a_disk_that_has_its_tags() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let [plain, fast, file, image] = ["plain", "fast", "b.toml", "i.img"].map(path);
    std::fs::create_dir(&plain).unwrap();
    std::fs::create_dir(&fast).unwrap();
    raw_image(image.as_ref(), 100_000);
    let config = format!("node_tags = ['rack-1']\ndisks = ['{plain}', '{fast}']");
    std::fs::write(&file, config).unwrap();
    let mut command = Command::new(BEDPLATE);
    command.args(["serve", "--config", &file]);
    let mut daemon = Ended(clean(&mut command).stderr(Stdio::piped()).spawn().unwrap());
    let (said, ready) = collect(daemon.0.stderr.take().unwrap(), "NBD socket:");
    ready.recv().unwrap_or_else(|_| panic!("no daemon: {}", said.lock().unwrap()));
    let socket = dir.path().join("plain/bedplate/control.sock");
    let cli = |args: &[&str]| bedplate(&[&["--socket", socket.to_str().unwrap()], args].concat());
    let get = |path: &str| -> Value {
        serde_json::from_str(&curl(&socket, "GET", path, None).1).unwrap()
    };
    let uuid = get("/v1/disks")["disks"][1]["uuid"].as_str().unwrap().to_owned();
    let tagged = cli(&["disk", "set", &uuid, "--tags", "ssd,large"]);
    assert!(tagged.status.success(), "{}", stderr(&tagged));
    let disks = get("/v1/disks")["disks"].clone();
    assert_eq!((&disks[0]["tags"], &disks[1]["tags"]), (&json!([]), &json!(["large", "ssd"])));
    assert!(stdout(&cli(&["disks"])).contains("large,ssd"));

    let tags = ["--disk-tag", "ssd", "--disk-tag", "large", "--node-tag", "rack-1"];
    let made = cli(&[&["create", &image, "--name", "a"], &tags[..], &["--wait"]].concat());
    assert!(made.status.success(), "{}", stderr(&made));
    let found = get("/v1/images/a");
    assert_eq!(found["copies"][0]["disk"], disks[1]["uuid"]);
    assert_eq!(found["disk_selector"], json!(["large", "ssd"]));
    assert_eq!(found["node_selector"], json!(["rack-1"]));
    assert!(stdout(&cli(&["get", "a"])).contains("disk tags     large, ssd"));

    let refused = cli(&["attach", "a", "--disk", disks[0]["uuid"].as_str().unwrap()]);
    let said = stderr(&refused);
    assert!(!refused.status.success() && said.contains("it lacks the tag large, ssd"), "{said}");
    let nowhere = cli(&["create", &image, "--name", "b", "--disk-tag", "tape", "--fetch"]);
    let said = stderr(&nowhere);
    assert!(!nowhere.status.success() && said.contains("no disk has the tags"), "{said}");
    let set = cli(&["set", "a", "--disk-tags", "tape,large", "--node-tags", ""]);
    assert!(set.status.success(), "{}", stderr(&set));
    let found = get("/v1/images/a");
    assert_eq!(found["disk_selector"], json!(["large", "tape"]));
    assert_eq!(
        (&found["node_selector"], &found["copies"][0]["disk"]),
        (&json!([]), &disks[1]["uuid"])
    );
    let bad = cli(&["set", "a", "--disk-tags", "a b"]);
    assert_eq!(bad.status.code(), Some(2), "{}", stderr(&bad));
    let body = r#"{"disk_selector":["-"]}"#;
    assert_eq!(curl(&socket, "PATCH", "/v1/images/a", Some(body)).0, 400);
    let bad = cli(&["create", &image, "--name", "c", "--disk-tag", "a b"]);
    assert_eq!(bad.status.code(), Some(2), "{}", stderr(&bad));
    for body in [
        r#"{"name":"c","url":"file:///x","disk_selector":["-"]}"#,
        r#"{"name":"c","url":"file:///x","node_selector":"ssd"}"#,
    ] {
        assert_eq!(curl(&socket, "POST", "/v1/images", Some(body)).0, 400, "{body}");
    }
}
