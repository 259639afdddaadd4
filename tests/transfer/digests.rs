//! Digests of every kind, given or found in a vendor's file of them.

use std::path::Path;

use crate::control_support::{bedplate, stderr, stdout};
use crate::daemon::Daemon;
use crate::fault_server::{FaultServer, Reply, Request};
use crate::{content, sha256};
use serde_json::Value;

const LEN: usize = (3 << 20) + 77;
const ETAG: &str = "\"v1\"";

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn names(dir: &Path) -> Vec<String> {
    let entries = dir.read_dir().unwrap();
    entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

/// A vendor: the image, and beside it what `sums` answers.
fn vendor(
    bytes: &[u8],
    sums: impl Fn(&Request) -> Reply + Send + Sync + 'static,
) -> (FaultServer, String, String) {
    let bytes = bytes.to_vec();
    let server = FaultServer::start(move |request| match request.path.ends_with(".img") {
        true => Reply::ranged(request, &bytes, ETAG),
        false => sums(request),
    });
    let (image, sums) =
        (format!("{}/a/disk.img", server.url), format!("{}/a/SHA256SUMS", server.url));
    (server, image, sums)
}

/// `HEX  name` of the right digest among others.
fn sums_of(bytes: &[u8]) -> Vec<u8> {
    format!("{}  other.img\n{} *disk.img\n", "0".repeat(64), sha256(bytes)).into_bytes()
}

#[test]
fn a_vendor_s_sums_are_fetched_first_and_hold() {
    let bytes = content(LEN, 91);
    let listed = sums_of(&bytes);
    // Busy at first: asked again, as for any request.
    let (server, image, sums) = vendor(&bytes, move |request| match request.index {
        0 => Reply::status("503 Service Unavailable"),
        _ => Reply::whole(&listed),
    });
    let temp = tempfile::tempdir().unwrap();
    let file = temp.path().join("disk.img");
    let args = ["--json", "pull", &image, "-o", text(&file), "--checksum-url", &sums];
    let output = bedplate(&args);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let pulled: Value = serde_json::from_str(&stdout(&output)).unwrap();
    assert_eq!(pulled["sha256"], sha256(&bytes).as_str());
    assert_eq!(pulled["md5"], Value::Null);
    assert!(std::fs::read(&file).unwrap() == bytes);
    let paths: Vec<_> = server.requests().into_iter().map(|r| r.path).collect();
    assert_eq!(paths[..3], ["/a/SHA256SUMS", "/a/SHA256SUMS", "/a/disk.img"]);
}

#[test]
fn wrong_or_useless_sums_refuse_the_file_and_leave_nothing() {
    let bytes = content(LEN, 92);
    let (right, wrong) = (sha256(&bytes), "ab".repeat(32));
    let not_found = || Reply::status("404 Not Found");
    type Sums = Box<dyn Fn() -> Reply + Send + Sync>;
    let listing = |lines: String| -> Sums { Box::new(move || Reply::whole(lines.as_bytes())) };
    let cases: [(Sums, &[&str], &str); 7] = [
        (listing(format!("{wrong}  disk.img\n")), &[], "SHA-256 is"),
        (listing(format!("{right}  other.img\n")), &[], "no digest of \"disk.img\""),
        (listing(format!("{right}  disk.img\n{wrong}  disk.img\n")), &[], "line 2"),
        (listing(format!("{right}  disk.img\n")), &["--sha256", &wrong], "not the one"),
        (listing("x".repeat((1 << 20) + 1)), &[], "more than 1048576 bytes"),
        (listing(String::new()), &[], "empty"),
        (Box::new(not_found), &[], "answered 404"),
    ];
    for (reply, more, word) in cases {
        let (_server, image, sums) = vendor(&bytes, move |_| reply());
        let temp = tempfile::tempdir().unwrap();
        let file = temp.path().join("disk.img");
        let args = ["pull", &image, "-o", text(&file), "--checksum-url", &sums];
        let output = bedplate(&[&args, more].concat());
        assert_eq!(output.status.code(), Some(1), "{word}: {}", stderr(&output));
        assert!(stderr(&output).contains(word), "{word}: {}", stderr(&output));
        assert_eq!(names(temp.path()), [""; 0], "{word}");
    }
}

#[test]
fn sums_in_a_local_file_hold_for_an_expanded_image_too() {
    let bytes = content(LEN, 93);
    let temp = tempfile::tempdir().unwrap();
    let (image, sums) = (temp.path().join("disk.img"), temp.path().join("SHA256SUMS"));
    std::fs::write(&image, &bytes).unwrap();
    let out = temp.path().join("out");
    let pull = |layout: &str| {
        let args = ["pull", text(&image), "-o", text(&out), "--layout", layout];
        bedplate(&[&args[..], &["--checksum-url", text(&sums)]].concat())
    };
    for (listed, code) in [(sums_of(&bytes), 0), (sums_of(b""), 1)] {
        std::fs::write(&sums, listed).unwrap();
        for layout in ["as-is", "raw"] {
            let output = pull(layout);
            assert_eq!(output.status.code(), Some(code), "{layout}: {}", stderr(&output));
        }
    }
}

#[test]
fn sums_of_a_compressed_file_speak_of_it_and_not_of_what_is_in_it() {
    use std::io::Write;
    let bytes = content(LEN, 96);
    let mut packer = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    packer.write_all(&bytes).unwrap();
    let packed = packer.finish().unwrap();
    let temp = tempfile::tempdir().unwrap();
    let out = temp.path().join("out");
    for (listed, code) in [(&packed, 0), (&bytes, 1)] {
        let (served, sums) = (packed.clone(), format!("{} *disk.img.gz\n", sha256(listed)));
        let server = FaultServer::start(move |request| match request.path.as_str() {
            "/SHA256SUMS" => Reply::whole(sums.as_bytes()),
            _ => Reply::ranged(request, &served, ETAG),
        });
        let (image, sums) =
            (format!("{}/disk.img.gz", server.url), format!("{}/SHA256SUMS", server.url));
        let output =
            bedplate(&["pull", "--unpack", &image, "-o", text(&out), "--checksum-url", &sums]);
        assert_eq!(output.status.code(), Some(code), "{}", stderr(&output));
        assert_eq!(std::fs::read(&out).is_ok_and(|got| got == bytes), code == 0);
        let _ = std::fs::remove_file(&out);
    }
}

#[test]
fn all_digests_that_are_given_are_checked() {
    use sha2::Digest;
    let bytes = content(LEN, 94);
    let (_server, image, _) = vendor(&bytes, |_| Reply::status("404 Not Found"));
    let hex = bedplate::names::hex;
    let right = [
        format!("md5:{}", hex(&md5::Md5::digest(&bytes))),
        format!("SHA1:{}", hex(&sha1::Sha1::digest(&bytes)).to_uppercase()),
        format!("blake3:{}", blake3::hash(&bytes).to_hex()),
    ];
    let temp = tempfile::tempdir().unwrap();
    let file = temp.path().join("disk.img");
    let pull = |sums: &[String]| {
        let sums = sums.iter().flat_map(|sum| ["--checksum", sum.as_str()]);
        let args = ["--json", "pull", &image, "-o", text(&file)].into_iter();
        bedplate(&args.chain(sums).collect::<Vec<_>>())
    };
    let output = pull(&right);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let pulled: Value = serde_json::from_str(&stdout(&output)).unwrap();
    for sum in &right {
        let sum = sum.to_lowercase();
        let (kind, digest) = sum.split_once(':').unwrap();
        assert_eq!(pulled[kind], digest);
    }
    // BLAKE3 is a proof: no other is made for it.
    assert_eq!(pulled["sha256"], Value::Null);
    std::fs::remove_file(&file).unwrap();
    for (index, name) in ["MD5", "SHA-1", "BLAKE3"].into_iter().enumerate() {
        let mut sums = right.clone();
        let last = sums[index].pop().unwrap();
        sums[index].push(if last == '0' { '1' } else { '0' });
        let output = pull(&sums);
        assert_eq!(output.status.code(), Some(1), "{}", stderr(&output));
        assert!(stderr(&output).contains(&format!("{name} is")), "{}", stderr(&output));
        assert_eq!(names(temp.path()), [""; 0], "{name}");
    }
    let output = pull(&right[..2]);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let pulled: Value = serde_json::from_str(&stdout(&output)).unwrap();
    assert_eq!(pulled["sha256"], sha256(&bytes).as_str(), "two that prove nothing");
}

#[test]
fn a_daemon_takes_every_kind_and_a_checksum_url() {
    let bytes = content(LEN, 95);
    let listed = sums_of(&bytes);
    let (server, image, sums) = vendor(&bytes, move |_| Reply::whole(&listed));
    let temp = tempfile::tempdir().unwrap();
    let daemon = Daemon::start(temp.path(), |_| ());
    let secret = sums.replace("http://", "http://u:hunter2@") + "?t=hunter2";
    let blake3 = blake3::hash(&bytes).to_hex().to_string();
    let (listed, given) =
        (["--checksum-url", &secret], ["--checksum", &format!("blake3:{blake3}")]);
    let create = ["create", &image, "--name", "disk", "--wait"];
    let made = daemon.json(&[&create[..], &listed, &given].concat());
    assert_eq!(made["digests"]["sha256"], sha256(&bytes).as_str());
    assert_eq!(made["digests"]["blake3"], blake3.as_str());
    assert_eq!(made["expected"]["blake3"], blake3.as_str());
    let shown = made["checksum_url"].as_str().unwrap();
    assert!(shown.ends_with("/a/SHA256SUMS?t=***"), "{shown}");
    let got = daemon.ask(&["get", "disk"]);
    for word in ["sha256  ", "blake3  ", "checksum url ", &blake3] {
        assert!(got.contains(word), "{word}: {got}");
    }
    assert!(!made.to_string().contains("hunter2") && !got.contains("hunter2"));
    assert!(!daemon.log().contains("hunter2"), "{}", daemon.log());
    let authorized = |r: &Request| r.header("authorization").is_some();
    assert!(!server.requests().iter().any(|r| r.path.ends_with(".img") && authorized(r)));

    // The same again is the same image; another file of digests is not.
    daemon.ask(&[&create[..], &listed].concat());
    let other = format!("{sums}.other");
    let refused = daemon.cli(&[&create[..], &["--checksum-url", &other]].concat());
    assert_eq!(refused.status.code(), Some(1), "{}", stderr(&refused));

    // A file that does not know the image, or a digest of the wrong length.
    let elsewhere = format!("{}/b/none.img", server.url);
    let args = ["create", &elsewhere, "--fetch", "--checksum-url", &sums];
    daemon.ask(&args);
    let failed = daemon.until_failed("none");
    assert!(failed["message"].as_str().unwrap().contains("no digest of \"none.img\""), "{failed}");
    for (body, word) in [
        (r#"{"url":"http://h.invalid/a","md5":"12"}"#, "32 hex digits"),
        (r#"{"url":"http://h.invalid/a","checksum_url":"ftp://h/a"}"#, "checksum_url"),
    ] {
        let (status, text) = daemon.curl("POST", "/v1/images", Some(body));
        assert!(status == 400 && text.contains(word), "{status} {text}");
    }
}

#[test]
fn options_that_contradict_each_other_are_refused() {
    let temp = tempfile::tempdir().unwrap();
    let (image, out) = (temp.path().join("disk.img"), temp.path().join("out"));
    std::fs::write(&image, b"x").unwrap();
    let (a, b) = (format!("md5:{}", "a".repeat(32)), format!("md5:{}", "b".repeat(32)));
    for (more, word) in [
        (&["--no-digest", "--checksum", &a][..], "--no-digest"),
        (&["--no-digest", "--checksum-url", "http://h.invalid/s"], "--no-digest"),
        (&["--checksum", &a, "--checksum", &b], "two different digests md5"),
        (&["--checksum", "crc32:00"], "blake3:HEX"),
        (&["--checksum", "md5:00"], "32 hex digits"),
        (&["--checksum-url", "ftp://h.invalid/s"], "ftp"),
    ] {
        let output = bedplate(&[&["pull", text(&image), "-o", text(&out)], more].concat());
        assert_eq!(output.status.code(), Some(2), "{more:?}: {}", stderr(&output));
        assert!(stderr(&output).contains(word), "{more:?}: {}", stderr(&output));
    }
}
