//! Where a transfer may not go.

use std::process::Stdio;

use serde_json::json;

use crate::control_support::{Daemon, collect, curl, stderr};
use crate::fault_server::{FaultServer, Reply};
use crate::{Place, content, program};

/// A daemon with these lines in its configuration; the message of each URL's failure.
fn failures(config: &str, urls: &[String]) -> Vec<String> {
    let temp = tempfile::tempdir().unwrap();
    let (disk, file) = (temp.path().join("disk"), temp.path().join("b.toml"));
    std::fs::create_dir(&disk).unwrap();
    std::fs::write(&file, format!("disks = [{disk:?}]\n{config}\n")).unwrap();
    let mut command = program();
    command.args(["serve", "--config"]).arg(&file);
    let mut child = command.stderr(Stdio::piped()).spawn().unwrap();
    let (log, ready) = collect(child.stderr.take().unwrap(), "NBD socket:");
    ready.recv().unwrap_or_else(|_| panic!("no daemon: {}", log.lock().unwrap()));
    let socket = disk.join("bedplate/control.sock");
    let ask = |args: &[&str]| {
        let output = program().arg("--socket").arg(&socket).args(args).output().unwrap();
        stderr(&output)
    };
    let messages = urls.iter().enumerate().map(|(index, url)| {
        let name = format!("image-{index}");
        let body = json!({ "name": name, "url": url }).to_string();
        let (status, answer) = curl(&socket, "POST", "/v1/images", Some(&body));
        assert_eq!(status, 201, "{answer}");
        let attached = ask(&["attach", &name]);
        let (_, image) = curl(&socket, "GET", &format!("/v1/images/{name}"), None);
        let image: serde_json::Value = serde_json::from_str(&image).unwrap();
        let copy = &image["copies"][0];
        assert_eq!(copy["refused"], true, "{url}: {attached} {copy}");
        copy["message"].as_str().unwrap().to_owned()
    });
    let messages = messages.collect();
    child.kill().unwrap();
    child.wait().unwrap();
    messages
}

#[test]
fn a_daemon_is_not_led_to_loopback_link_local_or_metadata_addresses() {
    let server = FaultServer::start(|_| Reply::status("200 OK"));
    let port = server.url.rsplit(':').next().unwrap();
    let cases = [
        (server.url.clone(), "loopback"),
        (format!("http://localhost:{port}/a"), "loopback"),
        (format!("http://[::ffff:127.0.0.1]:{port}/a"), "loopback"),
        (format!("http://0x7f.1:{port}/a"), "loopback"),
        ("http://169.254.169.254/latest/meta-data/".into(), "metadata"),
        ("http://metadata.google.internal/".into(), "metadata"),
        ("http://169.254.3.4/".into(), "link-local"),
        ("http://0.0.0.0/".into(), "unspecified"),
    ];
    let urls: Vec<_> = cases.iter().map(|(url, _)| url.clone()).collect();
    for ((url, word), message) in cases.iter().zip(failures("", &urls)) {
        assert!(message.contains(word) && message.contains("allow"), "{url}: {message}");
    }
    assert_eq!(server.requests().len(), 0, "not even a request");
}

#[test]
fn a_redirect_leads_a_daemon_nowhere_else() {
    let inner = FaultServer::start(|_| Reply::status("200 OK"));
    let port = inner.url.rsplit(':').next().unwrap().to_owned();
    let server = FaultServer::start(move |request| {
        let mut reply = Reply::status("302 Found");
        let place = match request.path.as_str() {
            "/literal" => format!("http://127.0.0.2:{port}/"),
            "/metadata" => "http://169.254.169.254/".to_owned(),
            _ => format!("http://[::1]:{port}/"),
        };
        reply.headers.push(format!("Location: {place}"));
        reply
    });
    let urls = ["literal", "metadata", "v6"].map(|path| format!("{}/{path}", server.url));
    let messages = failures("allow_addresses = [\"127.0.0.1/32\"]", &urls);
    for (message, word) in messages.iter().zip(["loopback", "metadata", "loopback"]) {
        assert!(message.contains(word), "{message}");
    }
    assert_eq!((inner.requests().len(), server.requests().len()), (0, 3));
}

#[test]
fn a_daemon_does_not_go_through_a_loopback_proxy_that_a_client_names() {
    let proxy = FaultServer::start(|_| Reply::status("200 OK"));
    let temp = tempfile::tempdir().unwrap();
    let (disk, socket) = (temp.path().join("disk"), temp.path().join("c.sock"));
    std::fs::create_dir(&disk).unwrap();
    let mut command = program();
    command.args(["serve", "--disk"]).arg(&disk).arg("--socket").arg(&socket);
    let mut child = command.stderr(Stdio::piped()).spawn().unwrap();
    let (log, ready) = collect(child.stderr.take().unwrap(), "NBD socket:");
    ready.recv().unwrap_or_else(|_| panic!("no daemon: {}", log.lock().unwrap()));
    let body = json!({ "name": "a", "url": "http://h/a", "access": { "proxy": proxy.url } });
    assert_eq!(curl(&socket, "POST", "/v1/images", Some(&body.to_string())).0, 201);
    let attach = program().arg("--socket").arg(&socket).args(["attach", "a"]).output().unwrap();
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(stderr(&attach).contains("loopback"), "{}", stderr(&attach));
    assert_eq!(proxy.requests().len(), 0);
}

#[test]
fn a_person_is_kept_from_metadata_services_only() {
    let (place, bytes) = (Place::empty(), content(50_000));
    let served = bytes.clone();
    let server = FaultServer::start(move |request| match request.path.as_str() {
        "/away" => {
            let mut reply = Reply::status("302 Found");
            reply.headers.push("Location: http://[fd00:ec2::254]/".into());
            reply
        }
        _ => Reply::ranged(request, &served, "\"v\""),
    });
    place.pulled(&[&server.url.replace("127.0.0.1", "localhost")], &[], &bytes);
    place.refused(&[&format!("{}/away", server.url)], &[], &["metadata"]);
    place.refused(&["http://169.254.169.254/latest"], &[], &["metadata", "169.254.169.254"]);
}

#[test]
fn whoever_else_may_use_the_socket_has_no_file_of_the_node_but_where_it_is_allowed() {
    let bytes = content(100_000);
    for (config, is_allowed) in [
        ("control_uids = [4242]", false),
        ("control_gids = [4343]\nsource_dirs = ['DIR/served']", true),
    ] {
        let temp = tempfile::tempdir().unwrap();
        let dir = temp.path().to_owned();
        std::fs::create_dir(dir.join("served")).unwrap();
        std::fs::write(dir.join("served/a.img"), &bytes).unwrap();
        std::fs::write(dir.join("private.img"), &bytes).unwrap();
        std::os::unix::fs::symlink(dir.join("private.img"), dir.join("served/link.img")).unwrap();
        let (store, record) =
            (dir.join("served/backupstore"), "backing-images/a/backing-image.cfg");
        let elsewhere = dir.join("elsewhere/backing-images");
        std::fs::create_dir_all(elsewhere.join("backing-images/a")).unwrap();
        std::fs::write(elsewhere.join(record), "\"secret\"").unwrap();
        std::os::unix::fs::symlink(dir.join("elsewhere"), &store).unwrap();
        let daemon = Daemon::start_in(temp, &config.replace("DIR", dir.to_str().unwrap()));
        let file = |path: &str| format!("file://{}/served/{path}", dir.display());
        for (name, url, sums, is_below) in [
            ("inside", file("a.img"), None, true),
            ("outside", file("../private.img"), None, false),
            ("linked", file("link.img"), None, false),
            ("shadow", "file:///etc/shadow".to_owned(), None, false),
            ("backup", "backup:///etc?backingImage=a".to_owned(), None, false),
            ("store", format!("backup://{}/served?backingImage=a", dir.display()), None, false),
            ("socket", "nbd+unix:///a?socket=/run/some.sock".to_owned(), None, false),
            ("sums", file("a.img"), Some("file:///etc/passwd"), false),
        ] {
            let body = json!({ "name": name, "url": url, "checksum_url": sums }).to_string();
            let (status, image) = daemon.curl("POST", "/v1/images", Some(&body));
            assert_eq!(status, 201, "{image}");
            daemon.curl("POST", &format!("/v1/images/{name}/fetch"), None);
            if is_allowed && is_below {
                daemon.wait_for(name, "ready");
                continue;
            }
            let image = daemon.wait_for(name, "failed-and-cleanup").to_string();
            if name == "store" && is_allowed {
                // The directory may be read; what lies behind a link in it may not.
                assert!(image.contains("symbolic link") && !image.contains("secret"), "{image}");
                continue;
            }
            assert!(image.contains("takes no source from there"), "{config}: {name}: {image}");
            assert_eq!(image.contains("source_dirs"), !is_allowed, "{image}");
        }
    }
}
