//! A source that is slow on purpose, and an image that is read from it.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use serde_json::{Value, json};

use crate::control_support::Daemon;
use crate::fault_server::{Cut, FaultServer, Reply};
use crate::nbd_support::Wire;

pub const MIB: u64 = 1 << 20;

/// What the source has now.
pub struct Source {
    pub bytes: Vec<u8>,
    pub etag: String,
}

/// Answers requests of a MiB at most; sends of all others only the first MiB, until it is opened.
pub struct Origin {
    pub server: FaultServer,
    pub source: Arc<Mutex<Source>>,
    open: Arc<AtomicBool>,
}

impl Origin {
    pub fn start(bytes: Vec<u8>) -> Self {
        Self::start_with(bytes, MIB)
    }

    /// As [`start`](Self::start), but answers requests of so many bytes.
    pub fn start_with(bytes: Vec<u8>, most: u64) -> Self {
        let source = Arc::new(Mutex::new(Source { bytes, etag: "\"one\"".to_owned() }));
        let open = Arc::new(AtomicBool::new(false));
        let (now, is_open) = (Arc::clone(&source), Arc::clone(&open));
        let server = FaultServer::start(move |request| {
            let now = now.lock().unwrap();
            let reply = Reply::ranged(request, &now.bytes, &now.etag);
            let range = request.range.clone().unwrap_or(0..u64::MAX);
            let is_small = range.end.min(now.bytes.len() as u64) - range.start <= most;
            if is_small || is_open.load(Ordering::SeqCst) {
                return reply;
            }
            let first = if range.start == 0 { MIB } else { 0 };
            reply.cut(Cut::Stall(usize::try_from(first).unwrap()))
        });
        Self { server, source, open }
    }

    /// Everything is sent from now on. Who is being kept waiting asks anew when `image` is resumed.
    pub fn open(&self, daemon: &Daemon, image: &str) {
        self.let_go();
        for paused in [true, false] {
            pause(daemon, image, paused);
        }
    }

    /// Everything is sent from now on, to who asks from now on.
    pub fn let_go(&self) {
        self.open.store(true, Ordering::SeqCst);
    }

    /// Requests for a part, which none is of the transfer itself.
    pub fn small_requests(&self) -> Vec<std::ops::Range<u64>> {
        let ranges = self.server.requests().into_iter().filter_map(|request| request.range);
        let len = self.source.lock().unwrap().bytes.len() as u64;
        ranges.filter(|range| range.end.min(len) - range.start <= MIB).collect()
    }
}

pub fn pause(daemon: &Daemon, image: &str, paused: bool) {
    let change = json!({"paused": paused}).to_string();
    let (status, body) = daemon.curl("PATCH", &format!("/v1/images/{image}"), Some(&change));
    assert_eq!(status, 200, "{body}");
}

/// Creates `img` and attaches to it at once; the attachment when it can be read.
pub fn attach(daemon: &Daemon, origin: &Origin, more: &Value) -> Value {
    let mut image = json!({"name": "img", "url": format!("{}/disk.img", origin.server.url)});
    image.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    let (status, body) = daemon.curl("POST", "/v1/images", Some(&image.to_string()));
    assert_eq!(status, 201, "{body}");
    stream(daemon)
}

/// Attaches to `img` without waiting until it is complete.
pub fn stream(daemon: &Daemon) -> Value {
    let wanted = json!({"image": "img", "reader": "vm", "wait": "stream"}).to_string();
    let (status, body) = daemon.curl("POST", "/v1/attachments", Some(&wanted));
    assert!(matches!(status, 200 | 201), "{body}");
    wait_attachment(daemon, body["id"].as_str().unwrap(), "ready")
}

pub fn wait_attachment(daemon: &Daemon, id: &str, state: &str) -> Value {
    let is = |event: &Value| event["object"]["id"] == id && event["object"]["state"] == state;
    let events = daemon.events_until("?image=img", is);
    events.last().unwrap()["object"].clone()
}

pub fn socket(daemon: &Daemon, name: &str) -> PathBuf {
    daemon.socket.with_file_name(name)
}

/// An NBD session on `img`.
pub fn nbd(daemon: &Daemon) -> Wire {
    let mut wire = Wire::connect(&socket(daemon, "nbd.sock"));
    wire.go("img", true);
    wire
}

pub fn state(daemon: &Daemon) -> String {
    daemon.get("/v1/images/img")["copies"][0]["state"].as_str().unwrap().to_owned()
}
