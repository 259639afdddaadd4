//! Images from NBD exports: qemu-nbd and nbdkit give the bytes that `qemu-img convert` gives, and a server
//! that lies, breaks or is none gives a clear error.

#![expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod control_support;

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use control_support::{Daemon, bedplate, stderr, stdout};
use serde_json::json;

/// A server that ends with the test.
struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        let _ended = self.0.kill();
        let _ended = self.0.wait();
    }
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn run(command: &str, args: &[&str]) -> String {
    let output = Command::new(command).args(args).output().unwrap();
    assert!(output.status.success(), "{command} {args:?}: {}", stderr(&output));
    stdout(&output)
}

/// Starts a server, and waits until its socket is there and answers.
fn start(command: &str, args: &[&str], socket: &Path) -> Server {
    let server = Server(Command::new(command).args(args).spawn().unwrap());
    while UnixStream::connect(socket).is_err() {
        std::thread::yield_now();
    }
    server
}

fn uri(socket: &Path, export: &str) -> String {
    format!("nbd+unix:///{export}?socket={}", socket.display())
}

fn nbdkit(socket: &Path, args: &[&str]) -> Server {
    start("nbdkit", &[&["-f", "-r", "-U", text(socket)], args].concat(), socket)
}

fn pull(uri: &str, to: &Path, more: &[&str]) -> Output {
    bedplate(&[&["pull", uri, "-o", text(to)], more].concat())
}

/// A qcow2 image with data here and there, and its bytes.
fn qcow2(dir: &Path) -> (PathBuf, Vec<u8>) {
    let (image, raw) = (dir.join("disk.qcow2"), dir.join("disk.raw"));
    run("qemu-img", &["create", "-q", "-f", "qcow2", text(&image), "70M"]);
    for write in [
        "write -P 7 0 5k",
        "write -P 9 1M 1M",
        "write -P 3 2500k 70k",
        "write -z 2520k 9k",
        "write -P 5 33000k 3M",
        "write -P 1 71679k 1k",
    ] {
        run("qemu-io", &["-f", "qcow2", "-c", write, text(&image)]);
    }
    run("qemu-img", &["convert", "-O", "raw", text(&image), text(&raw)]);
    let bytes = std::fs::read(raw).unwrap();
    (image, bytes)
}

fn sha256(bytes: &[u8], dir: &Path) -> String {
    let path = dir.join("to-sum");
    std::fs::write(&path, bytes).unwrap();
    run("sha256sum", &[text(&path)])[..64].to_owned()
}

#[test]
fn an_export_has_the_bytes_that_qemu_img_has_and_stays_as_sparse() {
    let dir = tempfile::tempdir().unwrap();
    let (image, bytes) = qcow2(dir.path());
    let sum = sha256(&bytes, dir.path());
    let raw = dir.path().join("disk.raw");
    let socket = |name: &str| dir.path().join(name);
    let [qemu, plain, simple, blocks, frugal] =
        ["q.sock", "p.sock", "s.sock", "b.sock", "f.sock"].map(socket);
    let stats = dir.path().join("stats");
    let stats_file = format!("statsfile={}", stats.display());
    let mut servers = vec![
        (
            start(
                "qemu-nbd",
                &["-r", "-t", "-x", "a disk", "-k", text(&qemu), text(&image)],
                &qemu,
            ),
            &qemu,
            "a%20disk",
        ),
        (nbdkit(&plain, &["file", text(&raw)]), &plain, ""),
        // Simple replies: no holes are told.
        (nbdkit(&simple, &["--no-sr", "file", text(&raw)]), &simple, ""),
        (
            nbdkit(
                &blocks,
                &[
                    "--filter=blocksize-policy",
                    "file",
                    text(&raw),
                    "blocksize-minimum=4096",
                    "blocksize-preferred=4096",
                    "blocksize-maximum=64K",
                    "blocksize-error-policy=error",
                ],
            ),
            &blocks,
            "",
        ),
        (nbdkit(&frugal, &["--filter=stats", "file", text(&raw), &stats_file]), &frugal, ""),
    ];
    for (_server, socket, export) in &servers {
        let to = dir.path().join("pulled");
        let pulled = pull(&uri(socket, export), &to, &["--sha256", &sum, "--json"]);
        assert!(pulled.status.success(), "{}: {}", socket.display(), stderr(&pulled));
        assert!(std::fs::read(&to).unwrap() == bytes, "{}", socket.display());
        let stored = std::fs::metadata(&to).unwrap().blocks() * 512;
        assert!(stored < 8 << 20, "{}: {stored} bytes stored", socket.display());
        std::fs::remove_file(to).unwrap();
    }
    // SIGTERM: it writes what it has counted.
    let (mut server, ..) = servers.pop().unwrap();
    run("kill", &[&server.0.id().to_string()]);
    server.0.wait().unwrap();
    let stats = std::fs::read_to_string(stats).unwrap();
    let read = stats.lines().find(|line| line.starts_with("read:")).unwrap();
    let mib: f64 =
        read.split(',').nth(2).unwrap().trim().split(' ').next().unwrap().parse().unwrap();
    assert!(read.contains("MiB") && mib < 5.5, "holes were read: {read}");
}

#[test]
fn a_daemon_brings_an_export_in_as_a_disk_whatever_a_guest_has_written_to_it() {
    let daemon = Daemon::start();
    let dir = tempfile::tempdir().unwrap();
    let (image, _) = qcow2(dir.path());
    // The export is the file itself: a guest's disk that begins as a qcow2 image does.
    let socket = dir.path().join("n.sock");
    let _server = nbdkit(&socket, &["file", text(&image)]);
    let uri = uri(&socket, "");
    let shown = daemon.cli(&["create", "vm-7", "--from-nbd", &uri, "--wait"]);
    assert!(shown.status.success(), "{}", stderr(&shown));
    let found = daemon.get("/v1/images/vm-7");
    assert_eq!((&found["format"], &found["source"]), (&json!("raw"), &json!(uri)));
    let stored = daemon.dir.path().join("disk/backing-images");
    let copy = stored.read_dir().unwrap().next().unwrap().unwrap().path().join("backing");
    let bytes = std::fs::read(&image).unwrap();
    assert!(std::fs::read(copy).unwrap() == bytes);
    assert_eq!(found["size_bytes"], bytes.len());
    // Or it is said what it is.
    let said = ["create", "vm-8", "--from-nbd", &uri, "--format", "qcow2", "--wait"];
    let shown = daemon.cli(&said);
    assert!(shown.status.success(), "{}", stderr(&shown));
    assert_eq!(daemon.get("/v1/images/vm-8")["virtual_size_bytes"], 70 << 20);
}

#[test]
fn a_daemon_goes_over_tcp_only_where_its_policy_allows() {
    let daemon = Daemon::start();
    let hosts = ["169.254.169.254", "metadata.google.internal", "[fd00:ec2::254]", "169.254.1.1"];
    for (number, host) in hosts.into_iter().enumerate() {
        let name = format!("i-{number}");
        let uri = format!("nbd://{host}/x");
        let refused = daemon.cli(&["create", &name, "--from-nbd", &uri, "--wait"]);
        assert_eq!(refused.status.code(), Some(1), "{host}: {}", stderr(&refused));
        assert!(stderr(&refused).contains("refused"), "{host}: {}", stderr(&refused));
    }
    let dir = tempfile::tempdir().unwrap();
    let raw = dir.path().join("r.raw");
    std::fs::write(&raw, vec![7; 70_000]).unwrap();
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let (port, uri) = (port.to_string(), format!("nbd://localhost:{port}"));
    let server = ["-f", "-r", "-i", "127.0.0.1", "-p", &port, "file", text(&raw)];
    let _server = Server(Command::new("nbdkit").args(server).spawn().unwrap());
    while std::net::TcpStream::connect(format!("127.0.0.1:{port}")).is_err() {
        std::thread::yield_now();
    }
    // Not a whole number of sectors, and not of units.
    let made = daemon.cli(&["create", "near", "--from-nbd", &uri, "--wait"]);
    assert!(made.status.success(), "{}", stderr(&made));
    assert_eq!(daemon.get("/v1/images/near")["size_bytes"], 70_000);
}

#[test]
fn what_is_no_uri_of_an_export_is_refused_before_anything_happens() {
    let daemon = Daemon::start();
    for (uri, word) in [
        ("nbds://h/a", "TLS"),
        ("nbd://u:hunter2@h/a", "user"),
        ("nbd+unix:///a", "socket"),
        ("http://h/a", "no URI of NBD"),
    ] {
        let refused = daemon.cli(&["create", "i", "--from-nbd", uri]);
        let said = stderr(&refused);
        assert_eq!(refused.status.code(), Some(2), "{uri}: {said}");
        assert!(said.contains(word) && !said.contains("hunter2"), "{uri}: {said}");
    }
    for (more, word) in [
        (r#""layout":"raw""#, "layout"),
        (r#""access":{"bearer":"t"}"#, "access"),
        (r#""mirrors":["http://h/a"],"sha256":"00""#, "mirror"),
        (r#""checksum_url":"nbd://h/a""#, "checksum_url"),
    ] {
        let body = format!(r#"{{"name":"i","url":"nbd://h/a",{more}}}"#);
        let (status, answer) = daemon.curl("POST", "/v1/images", Some(&body));
        let message = answer["error"]["message"].as_str().unwrap();
        assert!(status == 400 && message.contains(word), "{more}: {status} {answer}");
    }
}

/// Passes connections on to a server, and cuts each after so many bytes of it.
fn cut(to: PathBuf, at: PathBuf, after: u64) -> Arc<AtomicU64> {
    let listener = UnixListener::bind(at).unwrap();
    let passed = Arc::new(AtomicU64::new(0));
    let count = Arc::clone(&passed);
    std::thread::spawn(move || {
        for client in listener.incoming() {
            let (mut client, mut server) = (client.unwrap(), UnixStream::connect(&to).unwrap());
            let (mut from, mut back) = (client.try_clone().unwrap(), server.try_clone().unwrap());
            let asking = std::thread::spawn(move || std::io::copy(&mut from, &mut back));
            let mut left = after;
            let mut bytes = vec![0; 16_384];
            while left > 0 {
                let most = bytes.len().min(usize::try_from(left).unwrap());
                let Ok(got @ 1..) = server.read(&mut bytes[..most]) else { break };
                if client.write_all(&bytes[..got]).is_err() {
                    break;
                }
                left -= got as u64;
                count.fetch_add(got as u64, Ordering::SeqCst);
            }
            let _gone = client.shutdown(Shutdown::Both);
            let _gone = server.shutdown(Shutdown::Both);
            let _gone = asking.join();
        }
    });
    passed
}

#[test]
fn with_a_digest_a_connection_that_breaks_costs_what_was_under_way_and_without_one_all() {
    let dir = tempfile::tempdir().unwrap();
    let (raw, len) = (dir.path().join("r.raw"), 64usize << 20);
    let bytes: Vec<u8> =
        (0..len / 8).flat_map(|n| (n as u64 * 0x9e37_79b9).to_le_bytes()).collect();
    std::fs::write(&raw, &bytes).unwrap();
    let [socket, thin] = ["n.sock", "t.sock"].map(|name| dir.path().join(name));
    // Not nbdkit: it may abort when a client is gone in the middle of a reply.
    let server = ["-r", "-t", "-e", "8", "-f", "raw", "-k", text(&socket), text(&raw)];
    let _server = start("qemu-nbd", &server, &socket);
    let passed = cut(socket, thin.clone(), 25 << 20);
    let to = dir.path().join("out");
    let failed = pull(&uri(&thin, ""), &to, &[]);
    assert_eq!(failed.status.code(), Some(3), "{}", stderr(&failed));
    assert!(stderr(&failed).contains("give a digest"), "{}", stderr(&failed));
    assert!(!to.exists());
    let before = passed.load(Ordering::SeqCst);
    assert!(before <= 25 << 20);
    let done = pull(&uri(&thin, ""), &to, &["--sha256", &sha256(&bytes, dir.path())]);
    assert!(done.status.success(), "{}", stderr(&done));
    assert!(std::fs::read(&to).unwrap() == bytes);
    // At most what was under way at each of two or three breaks came twice.
    let total = passed.load(Ordering::SeqCst) - before;
    assert!(total < (len as u64) + (30 << 20), "{total} bytes");
}

#[test]
fn an_error_of_the_server_is_told_and_one_that_passes_is_outlived() {
    static FAILED: AtomicU64 = AtomicU64::new(0);
    let dir = tempfile::tempdir().unwrap();
    let raw = dir.path().join("r.raw");
    let bytes = vec![7; usize::try_from(SIZE).unwrap()];
    std::fs::write(&raw, &bytes).unwrap();
    let [bad, weak] = ["b.sock", "w.sock"].map(|name| dir.path().join(name));
    let to = dir.path().join("out");
    let error = ["--filter=error", "file", text(&raw), "error-pread=EIO", "error-pread-rate=100%"];
    let _bad = nbdkit(&bad, &error);
    let failed = pull(&uri(&bad, ""), &to, &[]);
    assert_eq!(failed.status.code(), Some(3), "{}", stderr(&failed));
    assert!(stderr(&failed).contains("error 5"), "{}", stderr(&failed));
    liar(&weak, SIZE, |kind, cookie, at, len| match kind {
        0 if FAILED.fetch_add(1, Ordering::SeqCst) < 3 => {
            Some(chunk(1, 0x8001, cookie, &[0, 0, 0, 5, 0, 0]))
        }
        _ => good(kind, cookie, at, len),
    });
    let done = pull(&uri(&weak, ""), &to, &["--sha256", &sha256(&bytes, dir.path())]);
    assert!(done.status.success(), "{}", stderr(&done));
    assert!(std::fs::read(&to).unwrap() == bytes);
    assert!(FAILED.load(Ordering::SeqCst) > 3);
}

/// What a hostile server says to a request: kind, cookie, offset, length. `None`: it hangs up.
type Says = fn(u16, u64, u64, u32) -> Option<Vec<u8>>;

const SIZE: u64 = 3 << 20;

fn chunk(flags: u16, kind: u16, cookie: u64, payload: &[u8]) -> Vec<u8> {
    let head =
        [&0x668e_33efu32.to_be_bytes()[..], &flags.to_be_bytes(), &kind.to_be_bytes()].concat();
    let len = u32::try_from(payload.len()).unwrap().to_be_bytes();
    [&head[..], &cookie.to_be_bytes(), &len, payload].concat()
}

fn data(flags: u16, cookie: u64, at: u64, len: u32) -> Vec<u8> {
    let payload = [&at.to_be_bytes()[..], &vec![7; len as usize]].concat();
    chunk(flags, 1, cookie, &payload)
}

fn hole(flags: u16, cookie: u64, at: u64, len: u32) -> Vec<u8> {
    chunk(flags, 2, cookie, &[&at.to_be_bytes()[..], &len.to_be_bytes()].concat())
}

fn status(cookie: u64, id: u32, extents: &[(u32, u32)]) -> Vec<u8> {
    let mut payload = id.to_be_bytes().to_vec();
    for (len, flags) in extents {
        payload.extend_from_slice(&len.to_be_bytes());
        payload.extend_from_slice(&flags.to_be_bytes());
    }
    chunk(1, 5, cookie, &payload)
}

/// Well-behaved, but for what `says` answers.
fn answer_options(stream: &mut UnixStream, size: u64) -> std::io::Result<()> {
    stream.write_all(b"NBDMAGICIHAVEOPT\x00\x03")?;
    stream.read_exact(&mut [0; 4])?;
    loop {
        let mut head = [0; 16];
        stream.read_exact(&mut head)?;
        let number = u32::from_be_bytes(head[8..12].try_into().unwrap());
        let len = u32::from_be_bytes(head[12..].try_into().unwrap());
        stream.read_exact(&mut vec![0; len as usize])?;
        let mut reply = |kind: u32, data: &[u8]| {
            let len = u32::try_from(data.len()).unwrap().to_be_bytes();
            let magic = 0x0003_e889_0455_65a9u64.to_be_bytes();
            let head = [&magic[..], &number.to_be_bytes(), &kind.to_be_bytes(), &len].concat();
            stream.write_all(&[&head[..], data].concat())
        };
        match number {
            10 => reply(4, &[&7u32.to_be_bytes()[..], b"base:allocation"].concat())?,
            7 => reply(3, &[&[0, 0][..], &size.to_be_bytes(), &[0, 3]].concat())?,
            _ => {}
        }
        reply(1, &[])?;
        if number == 7 {
            return Ok(());
        }
    }
}

fn lie(mut stream: UnixStream, size: u64, says: Says) -> std::io::Result<()> {
    answer_options(&mut stream, size)?;
    loop {
        let mut head = [0; 28];
        stream.read_exact(&mut head)?;
        let kind = u16::from_be_bytes(head[6..8].try_into().unwrap());
        let number = |at: usize| u64::from_be_bytes(head[at..at + 8].try_into().unwrap());
        let len = u32::from_be_bytes(head[24..].try_into().unwrap());
        match says(kind, number(8), number(16), len) {
            Some(reply) => stream.write_all(&reply)?,
            None => return Ok(()),
        }
    }
}

fn liar(socket: &Path, size: u64, says: Says) {
    let listener = UnixListener::bind(socket).unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let stream = stream.unwrap();
            std::thread::spawn(move || lie(stream, size, says));
        }
    });
}

/// All is data, and all of it is sevens.
fn good(kind: u16, cookie: u64, at: u64, len: u32) -> Option<Vec<u8>> {
    match kind {
        0 => Some(data(1, cookie, at, len)),
        7 => Some(status(cookie, 7, &[(len, 0)])),
        _ => None,
    }
}

/// What is odd and allowed.
const RIGHT: &[(&str, Says)] = &[
    ("all-data", good),
    ("pieces-in-any-order", |kind, cookie, at, len| match kind {
        0 => {
            let half = len / 2;
            let late = data(0, cookie, at + u64::from(half), len - half);
            Some([late, data(0, cookie, at, half), chunk(1, 0, cookie, &[])].concat())
        }
        _ => good(kind, cookie, at, len),
    }),
    ("tells-too-much", |kind, cookie, at, len| match kind {
        7 => Some(status(cookie, 7, &[(len, 0), (u32::MAX, 0), (u32::MAX, 3)])),
        _ => good(kind, cookie, at, len),
    }),
    ("tells-a-byte-at-a-time", |kind, cookie, at, len| match kind {
        7 => Some(status(cookie, 7, &[(1, 0)])),
        _ => good(kind, cookie, at, len),
    }),
    ("tells-no-holes-after-all", |kind, cookie, at, len| match kind {
        7 => Some(chunk(1, 0x8001, cookie, &[0, 0, 0, 22, 0, 0])),
        _ => good(kind, cookie, at, len),
    }),
    ("tells-nothing", |kind, cookie, at, len| match kind {
        7 => Some(chunk(1, 0, cookie, &[])),
        _ => good(kind, cookie, at, len),
    }),
];

/// What is not allowed, and a word of the error.
const WRONG: &[(&str, &str, Says)] = &[
    ("another-cookie", "nothing that was asked", |_, cookie, at, len| {
        Some(data(1, cookie ^ 0x100, at, len))
    }),
    ("bytes-beyond", "not asked for", |kind, cookie, at, len| match kind {
        0 => Some(data(1, cookie, at + 1, len)),
        _ => good(kind, cookie, at, len),
    }),
    ("bytes-before", "breaks the protocol", |kind, cookie, at, len| match kind {
        0 => Some(data(1, cookie, at.wrapping_sub(1), len)),
        _ => good(kind, cookie, at, len),
    }),
    ("twice", "have come already", |kind, cookie, at, len| match kind {
        0 => Some([data(0, cookie, at, len), data(1, cookie, at, len)].concat()),
        _ => good(kind, cookie, at, len),
    }),
    ("a-hole-over-data", "have come already", |kind, cookie, at, len| match kind {
        0 => Some([data(0, cookie, at, len), hole(1, cookie, at, 512)].concat()),
        _ => good(kind, cookie, at, len),
    }),
    ("too-short", "before all bytes", |kind, cookie, at, len| match kind {
        0 => Some(data(1, cookie, at, len - 1)),
        _ => good(kind, cookie, at, len),
    }),
    ("no-bytes", "before all bytes", |kind, cookie, at, len| match kind {
        0 => Some(chunk(1, 0, cookie, &[])),
        _ => good(kind, cookie, at, len),
    }),
    ("a-hole-too-long", "not asked for", |kind, cookie, at, len| match kind {
        0 => Some(hole(1, cookie, at, len + 1)),
        _ => good(kind, cookie, at, len),
    }),
    ("a-head-of-nothing", "length of a chunk of data", |kind, cookie, at, len| match kind {
        0 => Some(chunk(1, 1, cookie, &[0; 7])),
        _ => good(kind, cookie, at, len),
    }),
    ("no-magic", "no magic", |_, _, _, _| Some(vec![0; 64])),
    ("a-simple-reply", "structured one was agreed", |kind, cookie, at, len| match kind {
        0 => Some([&0x6744_6698u32.to_be_bytes()[..], &[0; 4], &cookie.to_be_bytes()].concat()),
        _ => good(kind, cookie, at, len),
    }),
    ("an-unknown-chunk", "does not have", |kind, cookie, at, len| match kind {
        0 => Some(chunk(1, 77, cookie, &[])),
        _ => good(kind, cookie, at, len),
    }),
    ("extents-for-a-read", "does not have", |kind, cookie, at, len| match kind {
        0 => Some(status(cookie, 7, &[(len, 0)])),
        _ => good(kind, cookie, at, len),
    }),
    ("an-extent-of-nothing", "extent of no bytes", |kind, cookie, at, len| match kind {
        7 => Some(status(cookie, 7, &[(0, 0)])),
        _ => good(kind, cookie, at, len),
    }),
    ("another-context", "not asked for", |kind, cookie, at, len| match kind {
        7 => Some(status(cookie, 8, &[(len, 0)])),
        _ => good(kind, cookie, at, len),
    }),
    ("half-an-extent", "chunk of extents", |kind, cookie, at, len| match kind {
        7 => Some(chunk(1, 5, cookie, &[0, 0, 0, 7, 1, 2, 3])),
        _ => good(kind, cookie, at, len),
    }),
    ("a-long-error", "chunk of an error", |_, cookie, _, _| {
        Some(chunk(1, 0x8001, cookie, &vec![1; 100_000]))
    }),
];

/// What may answer at a path, and a word of the error.
const GREETINGS: &[(&str, &str, &[u8])] = &[
    ("http", "no NBD server", b"HTTP/1.1 400 Bad Request\r\n\r\n"),
    ("old", "old style", b"NBDMAGIC\x00\x00\x42\x02\x81\x86\x12\x53\x00\x00"),
    ("unfixed", "not the fixed one", b"NBDMAGICIHAVEOPT\x00\x00"),
    (
        "tls",
        "wants TLS",
        b"NBDMAGICIHAVEOPT\x00\x03\x00\x03\xe8\x89\x04\x55\x65\xa9\x00\x00\x00\x08\x80\x00\x00\x05\x00\x00\x00\x00",
    ),
    (
        "another-option",
        "another option",
        b"NBDMAGICIHAVEOPT\x00\x03\x00\x03\xe8\x89\x04\x55\x65\xa9\x00\x00\x00\x09\x00\x00\x00\x01\x00\x00\x00\x00",
    ),
    (
        "a-long-reply",
        "too long",
        b"NBDMAGICIHAVEOPT\x00\x03\x00\x03\xe8\x89\x04\x55\x65\xa9\x00\x00\x00\x08\x00\x00\x00\x01\xff\xff\xff\xff",
    ),
];

#[test]
fn whatever_a_server_says_the_bytes_are_right_or_the_error_is_clear() {
    let dir = tempfile::tempdir().unwrap();
    let to = dir.path().join("out");
    for (name, says) in RIGHT {
        let socket = dir.path().join(name);
        liar(&socket, SIZE, *says);
        let done = pull(&uri(&socket, ""), &to, &[]);
        assert!(done.status.success(), "{name}: {}", stderr(&done));
        let bytes = std::fs::read(&to).unwrap();
        assert!(bytes.len() as u64 == SIZE && bytes.iter().all(|byte| *byte == 7), "{name}");
        std::fs::remove_file(&to).unwrap();
    }
    for (name, word, says) in WRONG {
        let socket = dir.path().join(name);
        liar(&socket, SIZE, *says);
        let failed = pull(&uri(&socket, ""), &to, &[]);
        assert_eq!(failed.status.code(), Some(1), "{name}: {}", stderr(&failed));
        assert!(stderr(&failed).contains(word), "{name}: {}", stderr(&failed));
        assert!(!to.exists(), "{name}");
    }
    // More than there is: what is beyond cannot be read, and that is told.
    let socket = dir.path().join("a-lying-size");
    liar(&socket, 16 << 20, |kind, cookie, at, len| match kind {
        0 if at >= 1 << 20 => {
            Some(chunk(1, 0x8001, cookie, &[&[0, 0, 0, 5, 0, 5][..], b"sorry"].concat()))
        }
        _ => good(kind, cookie, at, len.min(3 << 20)),
    });
    let failed = pull(&uri(&socket, ""), &to, &[]);
    let said = stderr(&failed);
    assert!(failed.status.code() == Some(3) && said.contains("error 5: sorry"), "{said}");
}

#[test]
fn what_answers_and_is_no_server_or_another_one_is_told_apart() {
    let dir = tempfile::tempdir().unwrap();
    let to = dir.path().join("out");
    for (name, word, bytes) in GREETINGS {
        let socket = dir.path().join(name);
        let listener = UnixListener::bind(&socket).unwrap();
        let bytes = bytes.to_vec();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let mut stream = stream.unwrap();
                let _gone = stream.write_all(&bytes);
                let _until_it_hangs_up = stream.read_to_end(&mut Vec::new());
            }
        });
        let failed = pull(&uri(&socket, ""), &to, &[]);
        assert_eq!(failed.status.code(), Some(1), "{name}: {}", stderr(&failed));
        assert!(stderr(&failed).contains(word), "{name}: {}", stderr(&failed));
    }
    let [file, qemu, empty, huge] =
        ["file", "q.sock", "e.sock", "h.sock"].map(|n| dir.path().join(n));
    std::fs::write(&file, "x".repeat(4096)).unwrap();
    let _server = start(
        "qemu-nbd",
        &["-r", "-t", "-f", "raw", "-x", "one", "-k", text(&qemu), text(&file)],
        &qemu,
    );
    liar(&empty, 0, good);
    liar(&huge, u64::MAX, good);
    for (socket, export, word) in [
        (&file, "", "not a socket"),
        (&qemu, "two", "no such export"),
        (&empty, "", "empty"),
        (&huge, "", "size of the export"),
    ] {
        let failed = pull(&uri(socket, export), &to, &[]);
        assert_eq!(failed.status.code(), Some(1), "{word}: {}", stderr(&failed));
        assert!(stderr(&failed).contains(word), "{word}: {}", stderr(&failed));
    }
    let inspected = bedplate(&["inspect", &uri(&qemu, "one")]);
    assert!(stderr(&inspected).contains("read as a whole"), "{}", stderr(&inspected));
}
