//! Servers that are asked directly, not through a proxy: bodies go from the socket straight into the
//! buffers of the pool.
//!
//! Why: an HTTP library reads a body into memory of its own, from where it is copied again. On a
//! fast way that copy is the largest part of a transfer's work.
//! How: hyper sends the request and reads the head. If it says that the body's length is fixed, the
//! connection is taken back from it, and what it had read ahead of the body comes first. Any other
//! body is read through hyper. A connection whose body was read to its end is used again.
//! Never: reads framing by itself, or resolves a name without the policy.
//! Start at [`Direct::get`].

use std::future::poll_fn;
use std::io;
use std::pin::{Pin, pin};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::{Buf, Bytes, BytesMut};
use http_body_util::Empty;
use hyper::body::{Body, Incoming};
use hyper::client::conn::http1::{self, Connection, SendRequest};
use hyper::header::{CONNECTION, HeaderMap, HeaderValue};
use hyper::{Request, Response, StatusCode, Uri, Version};
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::client::legacy::connect::dns::Name;
use hyper_util::rt::TokioIo;
use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use tower_service::Service;

use super::address::Guarded;
use super::secured::Secured;
use super::socket::Stream;
use crate::fetch::error::HttpError;

/// Longest head of an answer in bytes.
const MAX_HEAD_BYTES: usize = 256 * 1024;
/// Idle connections that are kept.
const MAX_IDLE: usize = 16;
/// Bytes of a chunk, for who does not bring a buffer.
const CHUNK_BYTES: usize = 128 * 1024;

/// Whose a connection is: scheme and authority, and whether our certificate was shown.
type Peer = (String, bool);
/// Connections that are not in use.
type Idle = Arc<Mutex<Vec<(Peer, Stream)>>>;
type Wire = Connection<TokioIo<Stream>, Empty<Bytes>>;

/// Makes requests to servers that are reached without a proxy.
#[derive(Clone, Debug)]
pub(super) struct Direct {
    connector: HttpConnector<Guarded>,
    timeout: Duration,
    idle: Idle,
}

impl Service<Name> for Guarded {
    type Response = std::vec::IntoIter<std::net::SocketAddr>;
    type Error = HttpError;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, HttpError>> + Send>>;

    fn poll_ready(&mut self, _cx: &mut Context<'_>) -> Poll<Result<(), HttpError>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, name: Name) -> Self::Future {
        let guarded = self.clone();
        Box::pin(async move { Ok(guarded.lookup(name.as_str()).await?.into_iter()) })
    }
}

impl Direct {
    /// Connects only to what `guarded` lets through, within `timeout`.
    pub(super) fn new(guarded: Guarded, timeout: Duration) -> Self {
        let mut connector = HttpConnector::new_with_resolver(guarded);
        connector.set_connect_timeout(Some(timeout));
        connector.set_nodelay(true);
        connector.enforce_http(false);
        Self { connector, timeout, idle: Arc::default() }
    }

    /// Sends a GET and reads the head of its answer. `tls` is for https; `own`: it shows our
    /// certificate.
    pub(super) async fn get(
        &self,
        uri: &Uri,
        mut headers: HeaderMap,
        tls: Option<Arc<ClientConfig>>,
        own: bool,
    ) -> Result<Response<DirectBody>, HttpError> {
        let host = uri.authority().ok_or("a URL without a host")?.as_str().to_owned();
        headers.insert(hyper::header::HOST, HeaderValue::from_str(&host)?);
        let path = uri.path_and_query().map_or("/", |path| path.as_str());
        let mut request = Request::get(path).body(Empty::new())?;
        *request.headers_mut() = headers;
        let peer = (format!("{}//{host}", uri.scheme_str().unwrap_or("http")), own);
        while let Some(stream) = self.idle_to(&peer) {
            // The server may have closed it meanwhile: then the request is sent again.
            if let Ok(answer) = self.exchange(stream, request.clone(), &peer).await {
                return Ok(answer);
            }
        }
        let stream = self.connect(uri, tls).await?;
        self.exchange(stream, request, &peer).await
    }

    async fn connect(
        &self,
        uri: &Uri,
        tls: Option<Arc<ClientConfig>>,
    ) -> Result<Stream, HttpError> {
        let stream = self.connector.clone().call(uri.clone()).await?.into_inner();
        let Some(tls) = tls else { return Ok(Stream::tcp(stream)) };
        let host = uri.host().unwrap_or_default().trim_matches(['[', ']']).to_owned();
        let name = ServerName::try_from(host)?;
        let shaken = tokio::time::timeout(self.timeout, Secured::connect(stream, tls, name)).await;
        let shaken = shaken.map_err(|_elapsed| io::Error::from(io::ErrorKind::TimedOut))?;
        Ok(Stream::tls(shaken?))
    }

    /// A connection to `peer` that is kept. One on which something lies is none: it would be taken for
    /// the answer to what is asked next.
    fn idle_to(&self, peer: &Peer) -> Option<Stream> {
        let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            let index = idle.iter().rposition(|(other, _)| other == peer)?;
            let stream = idle.swap_remove(index).1;
            if stream.is_quiet() {
                return Some(stream);
            }
        }
    }

    async fn exchange(
        &self,
        stream: Stream,
        request: Request<Empty<Bytes>>,
        peer: &Peer,
    ) -> Result<Response<DirectBody>, HttpError> {
        let mut builder = http1::Builder::new();
        builder.max_buf_size(MAX_HEAD_BYTES);
        let (mut sender, mut wire) = builder.handshake(TokioIo::new(stream)).await?;
        let mut over = false;
        let answer = {
            let mut answer = pin!(sender.send_request(request));
            poll_fn(|cx| {
                if let Poll::Ready(answer) = answer.as_mut().poll(cx) {
                    return Poll::Ready(answer);
                }
                let ended = wire.poll_without_shutdown(cx);
                over |= ended.is_ready();
                match (answer.as_mut().poll(cx), ended) {
                    (Poll::Pending, Poll::Ready(Err(error))) => Poll::Ready(Err(error)),
                    // However the wire ended: what follows an answer does not concern it.
                    (answer, _) => answer,
                }
            })
            .await?
        };
        let (head, body) = answer.into_parts();
        let fixed = body.size_hint().exact();
        let body = match fixed.filter(|_| has_body(head.status)) {
            Some(len_bytes) => {
                let lasts = head.version == Version::HTTP_11 && !says_close(&head.headers);
                let home = lasts.then(|| (Arc::clone(&self.idle), peer.clone()));
                DirectBody::Fixed(Fixed::take_over(wire, body, len_bytes, home).await)
            }
            None => DirectBody::Framed {
                wire: Box::new((!over).then_some(wire)),
                _sender: sender,
                body,
            },
        };
        Ok(Response::from_parts(head, body))
    }
}

fn has_body(status: StatusCode) -> bool {
    matches!(status, StatusCode::OK | StatusCode::PARTIAL_CONTENT)
}

fn says_close(headers: &HeaderMap) -> bool {
    let values = headers.get_all(CONNECTION).into_iter().filter_map(|value| value.to_str().ok());
    values.flat_map(|value| value.split(',')).any(|word| word.trim().eq_ignore_ascii_case("close"))
}

/// The body of an answer.
#[derive(Debug)]
pub(super) enum DirectBody {
    /// Its length is fixed: it comes from the socket.
    Fixed(Fixed),
    /// It comes through hyper.
    Framed {
        /// Has to be polled for the body to come.
        wire: Box<Option<Wire>>,
        /// Without it, hyper would close the connection.
        _sender: SendRequest<Empty<Bytes>>,
        body: Incoming,
    },
}

/// A body of fixed length.
#[derive(Debug)]
pub(super) struct Fixed {
    /// What hyper had read of it.
    ahead: Bytes,
    stream: Option<Stream>,
    left: u64,
    /// Where the connection goes at the end, and whose it is.
    home: Option<(Idle, Peer)>,
}

impl Fixed {
    async fn take_over(
        wire: Wire,
        mut body: Incoming,
        len_bytes: u64,
        mut home: Option<(Idle, Peer)>,
    ) -> Self {
        let parts = wire.into_parts();
        let mut ahead = BytesMut::new();
        // What hyper has passed on already; with the wire gone, the body ends there.
        while let Some(Ok(frame)) = poll_fn(|cx| Pin::new(&mut body).poll_frame(cx)).await {
            if let Ok(data) = frame.into_data() {
                ahead.extend_from_slice(&data);
            }
        }
        ahead.extend_from_slice(&parts.read_buf);
        if ahead.len() as u64 > len_bytes {
            // Whatever follows the body is no answer to anything.
            ahead.truncate(usize::try_from(len_bytes).unwrap_or(usize::MAX));
            home = None;
        }
        let left = len_bytes - ahead.len() as u64;
        let stream = Some(parts.io.into_inner());
        let mut fixed = Self { ahead: ahead.freeze(), stream, left, home };
        if left == 0 {
            fixed.go_home();
        }
        fixed
    }

    /// Puts the next bytes into `room`, which is not empty; 0 at the end of the body.
    ///
    /// # Errors
    /// The socket's, or its end before the body's (`UnexpectedEof`).
    pub(super) async fn fill(&mut self, room: &mut [u8]) -> io::Result<usize> {
        if !self.ahead.is_empty() {
            let count = self.ahead.len().min(room.len());
            room[..count].copy_from_slice(&self.ahead[..count]);
            self.ahead.advance(count);
            return Ok(count);
        }
        let most = room.len().min(usize::try_from(self.left).unwrap_or(usize::MAX));
        let Some(stream) = self.stream.as_mut().filter(|_| most > 0) else { return Ok(0) };
        let count = stream.read_of(self.left, &mut room[..most]).await?;
        if count == 0 {
            let missing = format!("{} bytes of the body are missing", self.left);
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, missing));
        }
        self.left -= count as u64;
        if self.left == 0 {
            self.go_home();
        }
        Ok(count)
    }

    /// The body is read: the connection may serve the next request.
    fn go_home(&mut self) {
        let (Some(stream), Some((idle, peer))) = (self.stream.take(), self.home.take()) else {
            return;
        };
        let mut idle = idle.lock().unwrap_or_else(PoisonError::into_inner);
        if idle.len() < MAX_IDLE {
            idle.push((peer, stream));
        }
    }
}

impl DirectBody {
    /// True if HTTP itself fixes the length.
    pub(super) fn has_length(&self) -> bool {
        match self {
            Self::Fixed(_) => true,
            Self::Framed { body, .. } => body.size_hint().exact().is_some(),
        }
    }

    /// The body, if it comes from the socket.
    pub(super) fn fixed(&mut self) -> Option<&mut Fixed> {
        match self {
            Self::Fixed(fixed) => Some(fixed),
            Self::Framed { .. } => None,
        }
    }

    /// The next bytes; `None` at the end of the body.
    pub(super) async fn chunk(&mut self) -> Result<Option<Bytes>, HttpError> {
        match self {
            Self::Fixed(fixed) => {
                let mut room = BytesMut::zeroed(CHUNK_BYTES);
                let count = fixed.fill(&mut room).await?;
                room.truncate(count);
                Ok((count > 0).then(|| room.freeze()))
            }
            Self::Framed { wire, body, .. } => loop {
                let frame = poll_fn(|cx| poll_framed(wire, body, cx)).await;
                let Some(frame) = frame.transpose()? else { return Ok(None) };
                match frame.into_data() {
                    Ok(data) if !data.is_empty() => return Ok(Some(data)),
                    // Trailers say nothing about the bytes.
                    Ok(_) | Err(_) => {}
                }
            },
        }
    }
}

type Framed = Option<Result<hyper::body::Frame<Bytes>, hyper::Error>>;

fn poll_framed(wire: &mut Option<Wire>, body: &mut Incoming, cx: &mut Context<'_>) -> Poll<Framed> {
    let mut body = Pin::new(body);
    if let Poll::Ready(frame) = body.as_mut().poll_frame(cx) {
        return Poll::Ready(frame);
    }
    let Some(running) = wire else { return Poll::Pending };
    let Poll::Ready(ended) = running.poll_without_shutdown(cx) else {
        return body.poll_frame(cx);
    };
    *wire = None;
    match (body.poll_frame(cx), ended) {
        (Poll::Pending, Err(error)) => Poll::Ready(Some(Err(error))),
        (frame, _) => frame,
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::{TcpListener, TcpStream};

    use super::*;
    use crate::fetch::AddressPolicy;

    /// Answers each request of each connection in turn: a list of connections, of answers.
    fn server(script: Vec<Vec<&'static str>>) -> (String, std::thread::JoinHandle<()>) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}/x?y=1", listener.local_addr().unwrap());
        let serve = move || {
            for answers in script {
                let (mut stream, _) = listener.accept().unwrap();
                for answer in answers {
                    let mut head = Vec::new();
                    let mut byte = [0];
                    while !head.ends_with(b"\r\n\r\n") {
                        if stream.read(&mut byte).unwrap() == 0 {
                            return;
                        }
                        head.push(byte[0]);
                    }
                    let head = String::from_utf8(head).unwrap();
                    assert!(head.starts_with("GET /x?y=1 HTTP/1.1\r\n"), "{head}");
                    assert!(head.to_ascii_lowercase().contains("host: 127.0.0.1:"), "{head}");
                    stream.write_all(answer.as_bytes()).unwrap();
                }
            }
        };
        (url, std::thread::spawn(serve))
    }

    fn direct(policy: AddressPolicy) -> Direct {
        Direct::new(Guarded(Arc::new(policy)), Duration::from_secs(5))
    }

    async fn read(client: &Direct, url: &str) -> Result<(Vec<u8>, bool), HttpError> {
        let answer = client.get(&url.parse().unwrap(), HeaderMap::new(), None, true).await?;
        let mut body = super::super::reply::Reply::from(answer);
        let (mut bytes, mut room) = (Vec::new(), [0; 3]);
        loop {
            match body.fill(&mut room).await? {
                0 => return Ok((bytes, body.has_length())),
                count => bytes.extend_from_slice(&room[..count]),
            }
        }
    }

    #[tokio::test]
    async fn a_connection_is_used_again_and_replaced_when_it_was_closed() {
        let answer = "HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n0123456789";
        // The first connection is closed by the server after two answers that promised more.
        let (url, server) = server(vec![vec![answer; 2], vec![answer]]);
        let client = direct(AddressPolicy::person());
        for _ in 0..3 {
            assert_eq!(read(&client, &url).await.unwrap(), (b"0123456789".to_vec(), true));
        }
        server.join().unwrap();
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn what_was_sent_before_it_was_asked_for_is_no_answer() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}/", listener.local_addr().unwrap());
        let (go_on, next) = std::sync::mpsc::channel();
        let (said, is_said) = std::sync::mpsc::channel();
        let server = std::thread::spawn(move || {
            let asked = |stream: &mut TcpStream| {
                let (mut head, mut byte) = (Vec::new(), [0]);
                while !head.ends_with(b"\r\n\r\n") {
                    stream.read_exact(&mut byte).unwrap();
                    head.push(byte[0]);
                }
            };
            let answer = |stream: &mut TcpStream, body: &str| {
                let head = "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n";
                stream.write_all(format!("{head}{body}").as_bytes()).unwrap();
            };
            let mut first = listener.accept().unwrap().0;
            asked(&mut first);
            answer(&mut first, "first");
            next.recv().unwrap();
            answer(&mut first, "wrong");
            said.send(()).unwrap();
            let mut second = listener.accept().unwrap().0;
            asked(&mut second);
            answer(&mut second, "right");
        });
        let client = direct(AddressPolicy::person());
        assert_eq!(read(&client, &url).await.unwrap().0, b"first");
        go_on.send(()).unwrap();
        is_said.recv().unwrap();
        assert_eq!(read(&client, &url).await.unwrap().0, b"right");
        server.join().unwrap();
    }

    #[tokio::test]
    async fn each_framing_gives_the_same_bytes() {
        let (url, server) = server(vec![
            vec![
                "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\ncontent-length: 5\r\nConnection: \
                  x, Close\r\n\r\nhello",
            ],
            vec![
                "HTTP/1.1 206 P\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhe\r\n3;a=b\r\nllo\r\n0\r\n\r\n",
            ],
            vec!["HTTP/1.0 200 OK\r\n\r\nhello"],
            vec![
                "HTTP/1.1 200 OK\r\nContent-Length: 99\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
            ],
            vec!["HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello and more"],
        ]);
        let client = direct(AddressPolicy::person());
        for fixed in [true, false, false, false, true] {
            assert_eq!(read(&client, &url).await.unwrap(), (b"hello".to_vec(), fixed));
        }
        server.join().unwrap();
    }

    #[tokio::test]
    async fn a_body_that_ends_early_and_a_broken_head_are_errors() {
        let (url, server) = server(vec![
            vec!["HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhello"],
            vec!["HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n9\r\nhello"],
            vec!["HTTP/1.1 200 OK\r\nContent-Length: 9\r\nContent-Length: 8\r\n\r\nhello"],
            vec!["hello\r\n\r\n"],
            vec![""],
        ]);
        let client = direct(AddressPolicy::person());
        let missing = read(&client, &url).await.unwrap_err().to_string();
        assert!(missing.contains("4 bytes of the body are missing"), "{missing}");
        for _ in 0..4 {
            assert!(read(&client, &url).await.is_err());
        }
        server.join().unwrap();
    }

    #[tokio::test]
    async fn a_name_is_resolved_under_the_policy() {
        let error =
            read(&direct(AddressPolicy::daemon()), "http://localhost:1/").await.unwrap_err();
        let text = crate::fetch::one_line(&*error);
        assert!(text.contains("loopback"), "{text}");
    }
}
