//! An HTTP server that misbehaves as a test tells it to.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::ops::Range;
use std::sync::{Arc, Mutex};

/// A request as it arrived.
#[derive(Clone, Debug)]
pub struct Request {
    /// How many requests came before this one.
    pub index: usize,
    /// The path with its query.
    pub path: String,
    /// The whole head, for looking at headers.
    pub head: String,
    /// First and end byte of `Range: bytes=A-B`; the end is `u64::MAX` for `A-`.
    pub range: Option<Range<u64>>,
}

impl Request {
    /// The value of a header.
    pub fn header(&self, name: &str) -> Option<String> {
        let prefix = format!("{}:", name.to_ascii_lowercase());
        self.head
            .lines()
            .find(|line| line.to_ascii_lowercase().starts_with(&prefix))
            .map(|line| line[prefix.len()..].trim().to_owned())
    }
}

/// How a body ends before its time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cut {
    /// It does not: all is sent.
    None,
    /// The connection is closed after so many bytes.
    Close(usize),
    /// The connection is reset after so many bytes.
    Reset(usize),
    /// Nothing more is sent after so many bytes, until the client goes.
    Stall(usize),
    /// After so many bytes they come one by one, with a pause after each.
    Trickle(usize, std::time::Duration),
}

/// What to answer.
#[derive(Clone, Debug)]
pub struct Reply {
    /// The status line's number and words.
    pub status: &'static str,
    /// Headers as they are sent.
    pub headers: Vec<String>,
    /// The body.
    pub body: Vec<u8>,
    /// Where it breaks.
    pub cut: Cut,
    /// Pause after each 64 KiB of the body.
    pub pace: std::time::Duration,
    /// Pause after each byte of the head.
    pub head_pace: std::time::Duration,
    /// Whether the body goes in chunks; the headers should have no length then.
    pub chunked: bool,
}

impl Reply {
    /// A reply of a status alone.
    pub fn status(status: &'static str) -> Self {
        let headers = vec!["Content-Length: 0".into()];
        Self::new(status, headers, Vec::new())
    }

    fn new(status: &'static str, headers: Vec<String>, body: Vec<u8>) -> Self {
        let (pace, head_pace) = (NO_PAUSE, NO_PAUSE);
        Self { status, headers, body, cut: Cut::None, pace, head_pace, chunked: false }
    }

    /// As a good server with ranges and an ETag answers.
    pub fn ranged(request: &Request, bytes: &[u8], etag: &str) -> Self {
        let mut reply = match &request.range {
            None => Self::whole(bytes),
            Some(range) => {
                let total = bytes.len() as u64;
                let end = range.end.min(total);
                if range.start >= end {
                    let mut reply = Self::status("416 Range Not Satisfiable");
                    reply.headers.push(format!("Content-Range: bytes */{total}"));
                    return reply;
                }
                let slice = &bytes[range.start as usize..end as usize];
                let headers = vec![
                    format!("Content-Range: bytes {}-{}/{total}", range.start, end - 1),
                    format!("Content-Length: {}", slice.len()),
                ];
                Self::new("206 Partial Content", headers, slice.to_vec())
            }
        };
        reply.headers.push(format!("ETag: {etag}"));
        reply
    }

    /// As a server without ranges answers.
    pub fn whole(bytes: &[u8]) -> Self {
        let headers = vec![format!("Content-Length: {}", bytes.len())];
        Self::new("200 OK", headers, bytes.to_vec())
    }

    /// With the body in chunks instead of a length.
    pub fn in_chunks(mut self) -> Self {
        self.headers.retain(|line| !line.starts_with("Content-Length:"));
        self.headers.push("Transfer-Encoding: chunked".into());
        self.chunked = true;
        self
    }

    /// With the body cut.
    pub fn cut(mut self, cut: Cut) -> Self {
        self.cut = cut;
        self
    }
}

const NO_PAUSE: std::time::Duration = std::time::Duration::ZERO;

type Handler = dyn Fn(&Request) -> Reply + Send + Sync;

/// A running server. It ends with the process; each test has its own.
pub struct FaultServer {
    /// `http://127.0.0.1:PORT`.
    pub url: String,
    requests: Arc<Mutex<Vec<Request>>>,
    sent: Arc<Mutex<u64>>,
}

impl FaultServer {
    /// Starts a server that answers by `handler`.
    pub fn start(handler: impl Fn(&Request) -> Reply + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let url = format!("http://{}", listener.local_addr().expect("bound"));
        let (requests, sent) = (Arc::new(Mutex::new(Vec::new())), Arc::new(Mutex::new(0)));
        let server = Self { url, requests: Arc::clone(&requests), sent: Arc::clone(&sent) };
        let handler: Arc<Handler> = Arc::new(handler);
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (requests, sent) = (Arc::clone(&requests), Arc::clone(&sent));
                let handler = Arc::clone(&handler);
                std::thread::spawn(move || serve(stream, &requests, &sent, &*handler));
            }
        });
        server
    }

    /// Every request so far.
    pub fn requests(&self) -> Vec<Request> {
        self.requests.lock().expect("no panic").clone()
    }

    /// Bytes of bodies sent so far.
    pub fn sent(&self) -> u64 {
        *self.sent.lock().expect("no panic")
    }
}

fn serve(
    mut stream: TcpStream,
    requests: &Mutex<Vec<Request>>,
    sent: &Mutex<u64>,
    handler: &Handler,
) {
    while let Some(head) = read_head(&mut stream) {
        let path = head.split(' ').nth(1).unwrap_or("/").to_owned();
        let request = {
            let mut requests = requests.lock().expect("no panic");
            let mut request = Request { index: requests.len(), path, head, range: None };
            request.range = request.header("range").and_then(|text| {
                let (a, b) = text.strip_prefix("bytes=")?.split_once('-')?;
                let end = if b.is_empty() { u64::MAX } else { b.parse::<u64>().ok()? + 1 };
                Some(a.parse().ok()?..end)
            });
            requests.push(request.clone());
            request
        };
        let reply = handler(&request);
        if answer(&mut stream, &reply, sent).is_none() {
            return;
        }
    }
}

fn read_head(stream: &mut TcpStream) -> Option<String> {
    let (mut head, mut byte) = (Vec::new(), [0]);
    while !head.ends_with(b"\r\n\r\n") {
        if stream.read(&mut byte).ok()? == 0 {
            return None;
        }
        head.push(byte[0]);
    }
    String::from_utf8(head).ok()
}

/// Sends the reply; `None` if the connection is over.
fn answer(stream: &mut TcpStream, reply: &Reply, sent: &Mutex<u64>) -> Option<()> {
    let head = format!("HTTP/1.1 {}\r\n{}\r\n\r\n", reply.status, reply.headers.join("\r\n"));
    if reply.head_pace.is_zero() {
        stream.write_all(head.as_bytes()).ok()?;
    } else {
        for byte in head.as_bytes() {
            stream.write_all(&[*byte]).ok()?;
            std::thread::sleep(reply.head_pace);
        }
    }
    let count = match reply.cut {
        Cut::None => reply.body.len(),
        Cut::Close(n) | Cut::Reset(n) | Cut::Stall(n) | Cut::Trickle(n, _) => {
            n.min(reply.body.len())
        }
    };
    for piece in reply.body[..count].chunks(64 * 1024) {
        if reply.chunked {
            stream.write_all(format!("{:x}\r\n", piece.len()).as_bytes()).ok()?;
        }
        stream.write_all(piece).ok()?;
        if reply.chunked {
            stream.write_all(b"\r\n").ok()?;
        }
        *sent.lock().expect("no panic") += piece.len() as u64;
        if !reply.pace.is_zero() {
            std::thread::sleep(reply.pace);
        }
    }
    match reply.cut {
        Cut::None if reply.chunked => stream.write_all(b"0\r\n\r\n").ok(),
        Cut::None => Some(()),
        Cut::Trickle(_, pause) => {
            for byte in &reply.body[count..] {
                std::thread::sleep(pause);
                stream.write_all(&[*byte]).ok()?;
                *sent.lock().expect("no panic") += 1;
            }
            Some(())
        }
        Cut::Close(_) => None,
        Cut::Reset(_) => {
            // Unread input or a zero linger makes the kernel send RST instead of FIN.
            let linger =
                rustix::net::sockopt::set_socket_linger(&*stream, Some(std::time::Duration::ZERO));
            linger.ok()?;
            None
        }
        Cut::Stall(_) => {
            // Wait for the client to give up: its end of the connection closes.
            let _ = stream.read(&mut [0]);
            None
        }
    }
}
