//! Proxies: of the image, of the environment, and none.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};

use crate::fault_server::{FaultServer, Reply};
use crate::{Place, SECRET, content};

/// A proxy that knows CONNECT and GET with a whole URL, and remembers the heads of requests.
pub struct TinyProxy {
    pub port: u16,
    heads: Arc<Mutex<Vec<String>>>,
}

impl TinyProxy {
    pub fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let heads = Arc::new(Mutex::new(Vec::new()));
        let seen = Arc::clone(&heads);
        std::thread::spawn(move || {
            for client in listener.incoming().flatten() {
                let seen = Arc::clone(&seen);
                std::thread::spawn(move || forward(client, &seen));
            }
        });
        Self { port, heads }
    }

    pub fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    /// The heads of the requests since the last call.
    pub fn take(&self) -> Vec<String> {
        std::mem::take(&mut self.heads.lock().unwrap())
    }
}

/// One connection, one request; `None` when it breaks.
fn forward(mut client: TcpStream, seen: &Mutex<Vec<String>>) -> Option<()> {
    let (mut head, mut byte) = (Vec::new(), [0]);
    while !head.ends_with(b"\r\n\r\n") {
        client.read_exact(&mut byte).ok()?;
        head.push(byte[0]);
    }
    let head = String::from_utf8(head).ok()?;
    seen.lock().unwrap().push(head.clone());
    let mut words = head.split(' ');
    let (method, target) = (words.next()?, words.next()?);
    let connect = method == "CONNECT";
    // Names are the proxy's to resolve: all are here.
    let port = target.trim_start_matches("http://").split('/').next()?.rsplit(':').next()?;
    let mut server = TcpStream::connect(("127.0.0.1", port.parse::<u16>().ok()?)).ok()?;
    if connect {
        client.write_all(b"HTTP/1.1 200 OK\r\n\r\n").ok()?;
    } else {
        let path = target.trim_start_matches("http://").split_once('/')?.1;
        let (_, rest) = head.split_once("\r\n")?;
        let request = format!("GET /{path} HTTP/1.1\r\nConnection: close\r\n{rest}");
        server.write_all(request.as_bytes()).ok()?;
    }
    let (mut from, mut to) = (client.try_clone().ok()?, server.try_clone().ok()?);
    std::thread::spawn(move || {
        let _broken = std::io::copy(&mut from, &mut to);
        let _gone = to.shutdown(std::net::Shutdown::Write);
    });
    std::io::copy(&mut server, &mut client).ok()?;
    client.shutdown(std::net::Shutdown::Both).ok()
}

#[test]
fn an_image_has_its_own_proxy_and_exceptions() {
    let (place, bytes) = (Place::empty(), content(100_000));
    let served = bytes.clone();
    let server = FaultServer::start(move |request| Reply::ranged(request, &served, "\"v\""));
    let proxy = TinyProxy::start();
    let port = server.url.rsplit(':').next().unwrap();
    // A name that only the proxy knows.
    let named = format!("http://images.invalid:{port}/a");
    place.pulled(&[&named, "--proxy", &proxy.url()], &[], &bytes);
    let head = proxy.take().remove(0);
    assert!(head.starts_with(&format!("GET {named} ")), "{head}");
    assert!(!head.contains("roxy-Authorization"), "{head}");

    let file = place.file("p", &format!("http://bob:{SECRET}@127.0.0.1:{}", proxy.port));
    place.pulled(&[&named, "--proxy-file", &file], &[], &bytes);
    let head = proxy.take().remove(0).to_ascii_lowercase();
    assert!(head.contains("proxy-authorization: basic "), "{head}");
    assert!(server.requests().iter().all(|request| request.path == "/a"));

    let url = format!("{}/a", server.url);
    place.pulled(
        &[&url, "--proxy", &proxy.url(), "--no-proxy", "x.example,127.0.0.0/8"],
        &[],
        &bytes,
    );
    assert!(proxy.take().is_empty());
    let metadata = "http://169.254.169.254/";
    place.refused(&[metadata, "--proxy", &proxy.url()], &[], &["metadata"]);
    assert!(proxy.take().is_empty());
}

#[test]
fn the_environment_s_proxy_is_used_unless_the_image_says_otherwise() {
    let (place, bytes) = (Place::empty(), content(100_000));
    let served = bytes.clone();
    let server = FaultServer::start(move |request| Reply::ranged(request, &served, "\"v\""));
    let proxy = TinyProxy::start();
    let (url, of) = (format!("{}/a", server.url), proxy.url());
    place.pulled(&[&url], &[("http_proxy", &of)], &bytes);
    assert_eq!(proxy.take().len(), 1);
    place.pulled(&[&url], &[("http_proxy", &of), ("no_proxy", "127.0.0.1")], &bytes);
    place.pulled(&[&url, "--no-proxy", "*"], &[("http_proxy", &of)], &bytes);
    assert!(proxy.take().is_empty());
}
