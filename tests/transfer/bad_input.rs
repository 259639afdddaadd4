//! Promise: whatever a user, a server or an image's bytes say, there is one clear error that says
//! what, where and what to do; nothing is left behind, and what was ready is served on.
//!
//! One daemon stays up over all cases. Those that take their time (a stall, a port that is closed)
//! are begun first and looked at last.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};

use serde_json::{Value, json};

use crate::control_support::{BEDPLATE, clean, stderr, stdout};
use crate::daemon::{Daemon, have};
use crate::fault_server::{Cut, FaultServer, Reply, Request};
use crate::{content, sha256};

const LEN: usize = 3 << 20;

/// Answers the n-th request for one path.
type Route = Arc<dyn Fn(usize, &Request) -> Reply + Send + Sync>;
type Routes = Arc<Mutex<BTreeMap<String, (usize, Route)>>>;

struct World {
    temp: tempfile::TempDir,
    daemon: Daemon,
    server: FaultServer,
    routes: Routes,
    good: Vec<u8>,
    good_uri: String,
    /// Refused images, and how often their source was asked.
    refused: Mutex<BTreeMap<String, usize>>,
}

impl World {
    fn new() -> Self {
        let temp = tempfile::tempdir().unwrap();
        let routes = Routes::default();
        let known = Arc::clone(&routes);
        let server = FaultServer::start(move |request| {
            let (nth, route) = {
                let mut routes = known.lock().unwrap();
                let Some((asked, route)) = routes.get_mut(&request.path) else {
                    return Reply::status("404 Not Found");
                };
                *asked += 1;
                (*asked - 1, Arc::clone(route))
            };
            route(nth, request)
        });
        let daemon = Daemon::start(temp.path(), |_| {});
        let good = content(LEN, 50);
        let mut world = Self {
            temp,
            daemon,
            server,
            routes,
            good: good.clone(),
            good_uri: String::new(),
            refused: Mutex::default(),
        };
        let url = world.serve("good", good);
        world.daemon.ask(&["create", &url, "--name", "good", "--wait"]);
        world.good_uri = world.daemon.ask(&["attach", "good", "--reader", "test"]);
        world
    }

    /// Adds a source with its behaviour; its URL.
    fn route(
        &self,
        name: &str,
        reply: impl Fn(usize, &Request) -> Reply + Send + Sync + 'static,
    ) -> String {
        let path = format!("/{name}");
        let url = format!("{}{path}", self.server.url);
        self.routes.lock().unwrap().insert(path, (0, Arc::new(reply)));
        url
    }

    /// Adds a source that behaves.
    fn serve(&self, name: &str, bytes: Vec<u8>) -> String {
        self.route(name, move |_, request| Reply::ranged(request, &bytes, "\"v\""))
    }

    fn asked(&self, name: &str) -> usize {
        self.routes.lock().unwrap().get(&format!("/{name}")).map_or(0, |(asked, _)| *asked)
    }

    /// The bytes of an export.
    fn bytes_of(&self, uri: &str) -> Vec<u8> {
        let file = self.temp.path().join("nbdcopy.raw");
        let output = Command::new("nbdcopy").arg(uri).arg(&file).output().unwrap();
        assert!(output.status.success(), "nbdcopy {uri}: {}", stderr(&output));
        let bytes = std::fs::read(&file).unwrap();
        std::fs::remove_file(&file).unwrap();
        bytes
    }

    /// What was ready before is served byte for byte.
    fn assert_good_is_served(&self, after: &str) {
        assert!(self.bytes_of(&self.good_uri) == self.good, "after {after}");
    }

    /// The names of the copies' directories.
    fn stored(&self) -> Vec<String> {
        let entries = self.daemon.disk.join("backing-images").read_dir().unwrap();
        let mut names: Vec<_> =
            entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    /// The source is refused for good: one error with all `words`, and nothing kept.
    fn assert_refused(&self, name: &str, url: &str, more: &[&str], words: &[&str]) {
        let args = [&["create", url, "--name", name, "--wait"], more].concat();
        let output = self.daemon.cli(&args);
        let said = stderr(&output);
        assert_eq!(output.status.code(), Some(1), "{name}: {said}");
        assert!(stdout(&output).is_empty(), "{name}: no result");
        assert_eq!(said.lines().count(), 1, "{name}: one line: {said}");
        assert!(said.starts_with("bedplate: ") && said.contains("; "), "{name}: {said}");
        self.assert_failed_for_good(name, words);
        self.assert_good_is_served(name);
    }

    fn assert_failed_for_good(&self, name: &str, words: &[&str]) {
        let image = self.daemon.json(&["get", name]);
        let copy = &image["copies"][0];
        let message = copy["message"].as_str().unwrap();
        println!("{name}: {message}");
        for word in words {
            assert!(message.contains(word), "{name}: {word:?} is not in {message}");
        }
        assert_eq!(copy["state"], "failed-and-cleanup", "{name}: {image}");
        assert_eq!(copy["refused"], true, "{name}: not to be tried again by itself");
        assert!(image["nbd"].is_null(), "{name}: not served");
        let dir = self.daemon.copy_dir(&image);
        assert!(!dir.exists(), "{name}: {} is left", dir.display());
        self.refused.lock().unwrap().insert(name.to_owned(), self.asked(name));
    }

    /// The source misbehaves, and yet its copy gets ready with `bytes`.
    fn assert_ends_right(&self, name: &str, url: &str, bytes: &[u8]) {
        self.daemon.ask(&["create", url, "--name", name, "--wait"]);
        let uri = self.daemon.ask(&["attach", name, "--reader", "test"]);
        assert!(self.bytes_of(&uri) == bytes, "{name}: other bytes");
        self.assert_good_is_served(name);
        self.daemon.ask(&["detach", name, "--reader", "test"]);
        self.daemon.ask(&["delete", name]);
    }

    /// After all: nothing was tried again by itself, every name can be freed, no litter is left.
    fn assert_clean_end(self) {
        for (name, asked) in &*self.refused.lock().unwrap() {
            assert_eq!(self.asked(name), *asked, "{name} was tried again");
            self.daemon.ask(&["delete", name]);
        }
        let images = self.daemon.json(&["list"]);
        assert_eq!(images["name"], "good", "the only one: {images}");
        let good = self.daemon.copy_dir(&self.daemon.json(&["get", "good"]));
        assert_eq!(self.stored(), [good.file_name().unwrap().to_str().unwrap()]);
        assert_eq!(self.daemon.curl("GET", "/healthz", None).0, 200);
        assert!(!self.daemon.log().contains("panicked"), "{}", self.daemon.log());
        assert_eq!(self.daemon.end(), Some(0));
    }
}

#[test]
fn bad_input_is_refused_clearly_and_costs_nothing_that_was_ready() {
    if !have(&["qemu-img", "nbdcopy", "curl"]) {
        return;
    }
    let world = World::new();
    let slow = Slow::begin(&world);
    refuses_what_servers_do(&world);
    survives_what_servers_do(&world);
    refuses_names(&world);
    refuses_sources(&world);
    refuses_images(&world);
    slow.end(&world);
    world.assert_clean_end();
}

/// Cases in which the daemon waits: they go on beside the others.
struct Slow {
    stalled: Vec<u8>,
    stalled_url: String,
    /// A pull from a closed port.
    pull: Child,
}

impl Slow {
    fn begin(world: &World) -> Self {
        let stalled = content(LEN, 51);
        let served = stalled.clone();
        let stalled_url = world.route("stall", move |nth, request| {
            let reply = Reply::ranged(request, &served, "\"v\"");
            if nth == 0 { reply.cut(Cut::Stall(1_000_000)) } else { reply }
        });
        let bytes = content(LEN, 52);
        let short =
            world.route("short", move |_, _| Reply::whole(&bytes).cut(Cut::Close(1_000_000)));
        let closed = "http://127.0.0.1:1/closed";
        for (name, url) in [("stall", &*stalled_url), ("short", &short), ("closed", closed)] {
            world.daemon.ask(&["create", url, "--name", name, "--fetch"]);
        }
        let mut pull = Command::new(BEDPLATE);
        let pull = clean(&mut pull).args(["pull", "--quiet", closed, "-o"]);
        let pull = pull.arg(world.temp.path().join("pulled")).stderr(Stdio::piped());
        Self { stalled, stalled_url, pull: pull.spawn().unwrap() }
    }

    fn end(self, world: &World) {
        let pulled = self.pull.wait_with_output().unwrap();
        let said = stderr(&pulled);
        assert_eq!(pulled.status.code(), Some(3), "may pass: {said}");
        assert!(said.contains("127.0.0.1:1") && said.contains("check the host"), "{said}");
        assert_eq!(said.lines().count(), 1, "{said}");
        let cases: [(&str, &[&str]); 2] = [
            ("short", &["/short", "broke at byte 0x", "cannot resume", "run it again"]),
            ("closed", &["127.0.0.1:1", "cannot connect", "refused", "check the host"]),
        ];
        for (name, words) in cases {
            let copy = world.daemon.until_failed(name);
            let message = copy["message"].as_str().unwrap();
            println!("{name}: {message}");
            for word in words {
                assert!(message.contains(word), "{name}: {word:?} is not in {message}");
            }
            assert_eq!(copy["refused"], false, "{name}: may pass");
            world.assert_good_is_served(name);
            world.daemon.ask(&["delete", name]);
        }
        world.assert_ends_right("stall", &self.stalled_url, &self.stalled);
        assert_eq!(world.asked("stall"), 2, "resumed once");
    }
}

fn redirect(to: String) -> Reply {
    let mut reply = Reply::status("302 Found");
    reply.headers.push(format!("Location: {to}"));
    reply
}

fn refuses_what_servers_do(world: &World) {
    let refuse = |name: &str, words: &[&str], reply: fn(&Request, &[u8]) -> Reply| {
        let bytes = content(LEN, 53);
        let url = world.route(name, move |_, request| reply(request, &bytes));
        world.assert_refused(name, &url, &[], &[words, &[&format!("/{name}: ")]].concat());
    };
    refuse("missing", &["404", "check the URL"], |_, _| Reply::status("404 Not Found"));
    refuse("forbidden", &["403", "credentials"], |_, _| Reply::status("403 Forbidden"));
    refuse("loop", &["more than 10 redirects", "final URL"], |_, _| redirect("/loop".into()));
    refuse("to-ftp", &["\"ftp\"", "final URL"], |_, _| redirect("ftp://127.0.0.1/x".into()));
    refuse("range", &["Content-Range", "bytes 5-9/10"], |request, bytes| {
        let mut reply = Reply::ranged(request, bytes, "\"v\"");
        reply.headers[0] = "Content-Range: bytes 5-9/10".into();
        reply
    });
    refuse("long-header", &["Content-Length", "as in Content-Range"], |request, bytes| {
        let mut reply = Reply::ranged(request, bytes, "\"v\"");
        reply.headers[0] = format!("Content-Range: bytes 0-{}/{}", LEN - 1001, LEN - 1000);
        reply
    });
    refuse("long-body", &["more than the", "announced"], |request, bytes| {
        // The pause makes a read end just where the announced bytes do.
        let (told, sent) = (64 * 1024, 128 * 1024);
        let mut reply = Reply::ranged(request, &bytes[..sent], "\"v\"").cut(Cut::Close(sent));
        reply.headers[0] = format!("Content-Range: bytes 0-{}/{told}", told - 1);
        reply.headers[1] = "Connection: close".into();
        reply.pace = std::time::Duration::from_millis(100);
        reply
    });
    refuse("empty", &["empty", "check the URL"], |_, _| Reply::whole(b""));
    let url = world.serve("digest", content(LEN, 54));
    let (wrong, right) = ("ab".repeat(32), sha256(&content(LEN, 54)));
    let words = ["SHA-256", &wrong, &right, "thrown away", "check the digest"];
    world.assert_refused("digest", &url, &["--sha256", &wrong], &words);
    let url = world.serve("declared", content(LEN, 55));
    let words = ["/declared: ", "declared qcow2", "content is raw", "declare raw"];
    world.assert_refused("declared", &url, &["--format", "qcow2"], &words);
}

fn survives_what_servers_do(world: &World) {
    let (old, new) = (content(LEN, 56), content(LEN - 40_960, 57));
    let served = new.clone();
    let url = world.route("resized", move |nth, request| match nth {
        0 => Reply::ranged(request, &old, "\"old\"").cut(Cut::Close(1_000_000)),
        _ => Reply::ranged(request, &served, "\"new\""),
    });
    world.assert_ends_right("resized", &url, &new);

    let bytes = content(LEN, 58);
    let served = bytes.clone();
    let url = world.route("reset", move |nth, request| {
        let reply = Reply::ranged(request, &served, "\"v\"");
        if nth < 2 { reply.cut(Cut::Reset(700_000)) } else { reply }
    });
    world.assert_ends_right("reset", &url, &bytes);
    assert_eq!(world.asked("reset"), 3);
}

fn refuses_names(world: &World) {
    let url = world.serve("named", content(4096, 59));
    // That of the source whose port is closed comes and goes meanwhile.
    let stored = || {
        let names = world.stored().into_iter();
        names.filter(|name| !name.starts_with("closed-")).collect::<Vec<_>>()
    };
    let (before, long) = (stored(), "x".repeat(64));
    let names =
        ["../x", "..", "/etc/x", "a/b", "", "A", "-a", "a-", "a b", "a\nb", "ä", "%2e%2e", &long];
    for name in names {
        let output = world.daemon.cli(&["create", &url, "--fetch", &format!("--name={name}")]);
        let said = stderr(&output);
        assert_eq!(output.status.code(), Some(2), "{name:?}: {said}");
        assert!(said.contains("--name"), "{name:?}: {said}");
        assert_bad_request(world, &json!({"url": url, "name": name}), "image name");
    }
    assert_bad_request(world, &json!({"url": url, "name": "a\u{0}b"}), "image name");
    assert_bad_request(world, &json!({"url": url, "name": 7}), "name: wrong type");
    assert_bad_request(world, &json!({"url": url, "disks": ["../../etc"]}), "disk UUID");
    let (status, text) = world.daemon.curl("GET", "/v1/images/..%2f..%2fetc%2fpasswd", None);
    assert_eq!(status, 400, "{text}");
    let (status, text) = world.daemon.curl("DELETE", "/v1/images/..%2fdisk", None);
    assert_eq!(status, 400, "{text}");
    assert_eq!(world.asked("named"), 0, "nothing was fetched");
    assert_eq!(stored(), before);
    world.assert_good_is_served("bad names");
}

fn assert_bad_request(world: &World, body: &Value, words: &str) {
    let (status, text) = world.daemon.curl("POST", "/v1/images", Some(&body.to_string()));
    let answer: Value = serde_json::from_str(&text).unwrap();
    assert_eq!((status, &answer["error"]["code"]), (400, &"bad-request".into()), "{body}: {text}");
    assert!(answer["error"]["message"].as_str().unwrap().contains(words), "{body}: {text}");
}

fn refuses_sources(world: &World) {
    let cases = [
        ("ftp://127.0.0.1/x", 2, "scheme \"ftp\" is not supported"),
        ("javascript:alert(1)", 4, "no such file"),
        ("javascript://alert(1)", 2, "scheme \"javascript\" is not supported"),
        ("http://", 2, "not a URL"),
        ("http://[::1/x", 2, "not a URL"),
        ("://x", 2, "not a URL"),
        ("\u{1b}[31mred", 4, "no such file"),
        ("file:///", 2, "no path of a file"),
        ("/dev/zero", 1, "not a regular file"),
    ];
    for (source, code, words) in cases {
        let output = world.daemon.cli(&["create", source, "--name", "source", "--wait"]);
        let said = stderr(&output);
        assert_eq!(output.status.code(), Some(code), "{source:?}: {said}");
        assert!(said.contains(words) && !said.contains('\u{1b}'), "{source:?}: {said}");
        if source.starts_with('/') {
            continue;
        }
        let body = json!({"url": source, "name": "source"}).to_string();
        let (status, text) = world.daemon.curl("POST", "/v1/images", Some(&body));
        assert_eq!(status, 422, "{source:?}: {text}");
        assert!(text.contains("refused-source"), "{source:?}: {text}");
    }
    // A person's own socket client may name files that no disk is in.
    for (name, source) in [("zeroes", "file:///dev/zero"), ("directory", "file:///usr")] {
        let body = json!({"url": source, "name": name}).to_string();
        assert_eq!(world.daemon.curl("POST", "/v1/images", Some(&body)).0, 201);
        world.daemon.curl("POST", &format!("/v1/images/{name}/fetch"), None);
        world.daemon.until_failed(name);
        world.assert_failed_for_good(name, &[&source[7..], "not a regular file"]);
    }
    world.assert_good_is_served("bad sources");
}

/// Images made by qemu-img, in a directory.
struct Maker<'a> {
    dir: &'a Path,
}

impl Maker<'_> {
    fn qemu_img(&self, args: &[&str]) {
        for _ in 0..50 {
            let output = Command::new("qemu-img").args(args).current_dir(self.dir).output();
            let output = output.unwrap();
            if output.status.success() {
                return;
            }
            // QEMU times its key derivation, and gives up where a process's clock goes back.
            let said = stderr(&output);
            assert!(said.contains("accurate CPU usage"), "qemu-img {args:?}: {said}");
        }
        panic!("qemu-img {args:?}: its clock never worked");
    }

    fn read(&self, name: &str) -> Vec<u8> {
        std::fs::read(self.dir.join(name)).unwrap()
    }

    /// A sound image with data in it.
    fn sound(&self) -> Vec<u8> {
        let raw: PathBuf = self.dir.join("sound.raw");
        std::fs::write(raw, content(LEN, 60)).unwrap();
        self.qemu_img(&["convert", "-f", "raw", "-O", "qcow2", "sound.raw", "sound.qcow2"]);
        self.read("sound.qcow2")
    }

    fn created(&self, name: &str, options: &[&str], size: &[&str]) -> Vec<u8> {
        self.qemu_img(&[&["create", "-q", "-f", "qcow2"], options, &[name], size].concat());
        self.read(name)
    }
}

fn patched(image: &[u8], at: usize, bytes: &[u8]) -> Vec<u8> {
    let mut image = image.to_vec();
    image[at..at + bytes.len()].copy_from_slice(bytes);
    image
}

/// The header's bytes from `first` on in another order (Fisher-Yates with a fixed seed).
fn shuffled(image: &[u8], first: usize, seed: u64) -> Vec<u8> {
    let mut image = image.to_vec();
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    for at in (first + 1..104).rev() {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        image.swap(at, first + (state % (at - first + 1) as u64) as usize);
    }
    image
}

fn refuses_images(world: &World) {
    let dir = tempfile::tempdir().unwrap();
    let make = Maker { dir: dir.path() };
    let sound = make.sound();
    let refuse = |name: &str, bytes: Vec<u8>, words: &[&str]| {
        let url = world.serve(name, bytes);
        let source = format!("/{name}: ");
        let words = [words, &["need", "qemu-img", &source]].concat();
        world.assert_refused(name, &url, &[], &words);
        assert_eq!(world.asked(name), 1, "{name}: a bad image is not fetched again");
    };
    let whole = sound.len();
    refuse(
        "cut-in-data",
        sound[..whole / 2].to_vec(),
        &["data cluster offset at byte", "inside the file"],
    );
    refuse("cut-in-tables", sound[..3 << 16].to_vec(), &["l1_table_offset", "inside the file"]);
    refuse("cut-in-header", sound[..60].to_vec(), &["file length", "0x3c"]);
    for seed in 1..=4 {
        // Behind the magic, and behind the version, so that later fields are reached.
        refuse(&format!("shuffled-{seed}"), shuffled(&sound, 4, seed), &["at byte"]);
        refuse(&format!("mixed-{seed}"), shuffled(&sound, 8, seed), &["at byte"]);
    }
    let size = patched(&sound, 24, &(1_u64 << 63).to_be_bytes());
    refuse("size", size, &["size at byte", "16 TiB"]);
    let l1_size = patched(&sound, 36, &u32::MAX.to_be_bytes());
    refuse("l1-size", l1_size, &["l1_size at byte", "0xffffffff", "32 MiB"]);
    let cluster_bits = patched(&sound, 20, &63_u32.to_be_bytes());
    refuse("cluster-bits", cluster_bits, &["cluster_bits at byte", "0x3f", "9 to 21"]);
    let version = patched(&sound, 4, &9_u32.to_be_bytes());
    refuse("version", version, &["version at byte", "2 or 3"]);
    let unknown = patched(&sound, 72, &(1_u64 << 40).to_be_bytes());
    refuse("unknown-bit", unknown, &["incompatible_features", "0x10000000000"]);

    let backed = make.created("b.qcow2", &["-b", "/etc/passwd", "-F", "raw"], &[]);
    refuse("backing-file", backed, &["backing_file_offset", "no backing file"]);
    let external = make.created("e.qcow2", &["-o", "data_file=e.raw"], &["1M"]);
    refuse("external-data", external, &["incompatible_features", "external data file"]);
    let secret = "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10";
    let options = ["--object", "secret,id=s,data=hunter2", "-o", secret];
    let luks = make.created("l.qcow2", &options, &["1M"]);
    refuse("luks", luks, &["crypt_method", "0x2", "no encryption"]);
}
