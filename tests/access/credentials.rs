//! Passwords, tokens and headers: where they arrive, and where they do not.

use std::sync::atomic::{AtomicUsize, Ordering};

use serde_json::json;

use crate::control_support::{Daemon, stderr, stdout};
use crate::fault_server::{Cut, FaultServer, Reply, Request};
use crate::{Place, SECRET, content};

const ETAG: &str = "\"v\"";

/// `bob:hunter2-of-the-test` in base 64.
const BASIC: &str = "Basic Ym9iOmh1bnRlcjItb2YtdGhlLXRlc3Q=";

fn to(place: &str) -> Reply {
    let mut reply = Reply::status("302 Found");
    reply.headers.push(format!("Location: {place}"));
    reply
}

/// A server that wants this header.
fn guarded(name: &'static str, value: String, bytes: &[u8]) -> FaultServer {
    let bytes = bytes.to_vec();
    FaultServer::start(move |request| match request.header(name) {
        Some(found) if found == value => Reply::ranged(request, &bytes, ETAG),
        _ => Reply::status("401 Unauthorized"),
    })
}

#[test]
fn each_kind_of_credential_arrives() {
    let (place, bytes) = (Place::empty(), content(100_000));
    let file = place.file("secret", &format!("{SECRET}\n"));
    let server = guarded("authorization", BASIC.into(), &bytes);
    let (url, host) = (format!("{}/a", server.url), &server.url["http://".len()..]);
    place.pulled(&[&url, "--user", "bob", "--password-file", &file], &[], &bytes);
    let env = [("PW", SECRET)];
    place.pulled(&[&url, "--user", "bob", "--password-file", "env:PW"], &env, &bytes);
    place.pulled(&[&format!("http://bob:{SECRET}@{host}/a")], &[], &bytes);
    place.refused(&[&url], &[], &["401", "credentials"]);
    let wrong = place.file("wrong", "nothing");
    let args = [&url, "--user", "bob", "--password-file", &wrong];
    place.refused(&args, &[], &["401"]);

    let server = guarded("authorization", format!("Bearer {SECRET}"), &bytes);
    let url = format!("{}/a", server.url);
    place.pulled(&[&url, "--bearer-file", &file], &[], &bytes);

    let server = guarded("x-api-key", SECRET.into(), &bytes);
    let url = format!("{}/a", server.url);
    let headers = place.file("headers", &format!("X-Api-Key: {SECRET}\nX-Other: 1\n"));
    place.pulled(&[&url, "--header-file", &headers], &[], &bytes);
    assert_eq!(server.requests()[0].header("x-other").as_deref(), Some("1"));
    let none = place.dir().join("none").display().to_string();
    place.refused(&[&url, "--bearer-file", &none], &[], &["bearer token", "cannot read"]);
}

/// Nothing of what belongs to the source is in the request.
fn assert_bare(request: &Request) {
    for name in ["authorization", "x-api-key", "cookie", "referer"] {
        assert_eq!(request.header(name), None, "{}", request.head);
    }
    assert!(!request.head.contains(SECRET), "{}", request.head);
}

#[test]
fn credentials_do_not_follow_a_redirect_to_another_origin_nor_back() {
    let (place, bytes) = (Place::empty(), content(100_000));
    let served = bytes.clone();
    let other = FaultServer::start(move |request| match request.path.as_str() {
        path if path.starts_with("/back") => to(&path["/back?".len()..]),
        _ => Reply::ranged(request, &served, ETAG),
    });
    let (away, back) = (format!("{}/mirror", other.url), format!("{}/back?", other.url));
    let served = bytes.clone();
    let origin = FaultServer::start(move |request| match request.path.as_str() {
        "/same" => to("/away"),
        "/away" => to(&away),
        "/and-back" => to(&format!("{back}http://{}/image", request.header("host").unwrap())),
        _ => Reply::ranged(request, &served, ETAG),
    });
    let file = place.file("secret", SECRET);
    let headers = place.file("headers", &format!("X-Api-Key: {SECRET}\nCookie: {SECRET}\n"));
    for path in ["/same", "/and-back"] {
        let url = format!("{}{path}", origin.url);
        let (user, more) = (["--user", "bob"], ["--header-file", &headers]);
        let args = [&[url.as_str(), "--password-file", &file], &user[..], &more[..]].concat();
        place.pulled(&args, &[], &bytes);
    }
    for request in origin.requests() {
        if request.path == "/image" {
            assert_bare(&request);
        } else {
            assert_eq!(request.header("authorization").as_deref(), Some(BASIC));
            assert_eq!(request.header("x-api-key").as_deref(), Some(SECRET));
        }
    }
    assert!(origin.requests().iter().any(|request| request.path == "/image"));
    assert_eq!(other.requests().len(), 2);
    other.requests().iter().for_each(assert_bare);
}

#[test]
fn all_ranges_come_from_one_mirror_until_it_refuses() {
    let (place, bytes) = (Place::empty(), content(3_000_000));
    let served = bytes.clone();
    // The mirror breaks twice, and takes each ticket for two requests.
    let mirror = FaultServer::start(move |request| {
        let valid = format!("/image?ticket={}", request.index / 3);
        if request.path != valid {
            return Reply::status("403 Forbidden");
        }
        let cut = if request.index < 4 { Cut::Close(700_000) } else { Cut::None };
        Reply::ranged(request, &served, ETAG).cut(cut)
    });
    let (target, tickets) = (format!("{}/image?ticket=", mirror.url), AtomicUsize::new(0));
    let origin = FaultServer::start(move |_| {
        to(&format!("{target}{}", tickets.fetch_add(1, Ordering::Relaxed)))
    });
    place.pulled(&[&format!("{}/a", origin.url)], &[], &bytes);
    let asked: Vec<_> = mirror.requests().iter().map(|r| r.path.clone()).collect();
    assert!(asked.iter().filter(|path| path.ends_with("=0")).count() >= 3, "{asked:?}");
    assert!(asked.iter().any(|path| path.ends_with("=1")), "{asked:?}");
    assert!(origin.requests().len() < asked.len(), "{asked:?}");
}

#[test]
fn a_daemon_uses_credentials_and_shows_only_their_kinds() {
    let bytes = content(200_000);
    let server = guarded("authorization", BASIC.into(), &bytes);
    let temp = tempfile::tempdir().unwrap();
    let secrets = temp.path().join("secrets");
    std::fs::create_dir(&secrets).unwrap();
    std::fs::write(secrets.join("pw"), SECRET).unwrap();
    std::fs::write(temp.path().join("outside"), SECRET).unwrap();
    let daemon = Daemon::start_in(temp, &format!("secrets_dir = {secrets:?}"));
    let mut said = String::new();
    let outside = daemon.dir.path().join("outside");
    let passwords = [
        ("text", json!(SECRET), "ready"),
        ("file", json!({ "file": secrets.join("pw") }), "ready"),
        ("wrong", json!(format!("{SECRET}-not")), "failed-and-cleanup"),
        ("outside", json!({ "file": outside }), "failed-and-cleanup"),
        ("env", json!({ "env": "PATH" }), "failed-and-cleanup"),
    ];
    for (name, password, state) in passwords {
        let body = json!({
            "name": name,
            "url": format!("{}/{name}?X-Amz-Signature={SECRET}", server.url),
            "access": {
                "basic": { "user": "bob", "password": password },
                "headers": { "X-Key": SECRET },
            },
        });
        let (status, image) = daemon.curl("POST", "/v1/images", Some(&body.to_string()));
        assert_eq!(status, 201, "{image}");
        assert_eq!(image["access"], json!(["basic", "headers"]));
        daemon.curl("POST", &format!("/v1/images/{name}/fetch"), None);
        said += &daemon.wait_for(name, state).to_string();
        said += &daemon.get(&format!("/v1/images/{name}")).to_string();
    }
    assert!(said.contains("secrets_dir") || said.contains("below"), "{said}");
    for bad in [
        json!({ "basic": SECRET }),
        json!({ "bearer": [SECRET] }),
        json!({ "headers": { "X": format!("a\n{SECRET}") } }),
        json!({ "later": SECRET }),
        json!({ "proxy": SECRET }),
    ] {
        let body = json!({ "name": "bad", "url": "http://h/a", "access": bad }).to_string();
        let (status, answer) = daemon.curl("POST", "/v1/images", Some(&body));
        assert_eq!(status, 400, "{answer}");
        said += &answer.to_string();
    }
    said += &format!("{:?}", daemon.events_until("", |event| event["type"] == "snapshot.end"));
    for args in [&["list"][..], &["list", "--json"], &["get", "text"], &["doctor"]] {
        let output = daemon.cli(args);
        said += &(stdout(&output) + &stderr(&output));
    }
    said += &crate::control_support::curl(&daemon.socket, "GET", "/metrics", None).1;
    said += &daemon.log();
    let at = said.find(SECRET);
    assert!(at.is_none(), "{}", &said[at.unwrap_or(0).saturating_sub(300)..]);
}

#[test]
fn an_image_takes_over_new_credentials() {
    let bytes = content(100_000);
    let server = guarded("authorization", format!("Bearer {SECRET}"), &bytes);
    let daemon = Daemon::start();
    let place = Place::empty();
    let (old, new) = (place.file("old", "expired"), place.file("new", SECRET));
    let url = format!("{}/a.img", server.url);
    let create = |token: &str| daemon.cli(&["create", &url, "--bearer-file", token, "--fetch"]);
    assert!(create(&old).status.success());
    daemon.wait_for("a", "failed-and-cleanup");
    let again = create(&new);
    assert!(again.status.success(), "{}", stderr(&again));
    daemon.wait_for("a", "ready");
}
