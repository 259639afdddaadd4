//! A connection to a server, plain or within TLS.
//!
//! Why: on a fast way the kernel would wake us for each few KiB. Over TLS that takes a third of our
//! processor's time, and, on loopback, an eighth of the server's.
//! How: while much of a body is to come, and has come fast, the kernel wakes us for [`MARK_BYTES`] at
//! once. When these are late, or the end is near, it does so for each byte again.
//! Never: lets bytes lie that somebody waits for: not at the end of a body, not when a server stops or
//! becomes slow.
//! Start at [`Stream::read_of`].

use std::io;
use std::os::fd::AsFd;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::net::{RecvFlags, recv};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;

use super::secured::Secured;
use crate::ring;

/// Bytes that are waited for while they come fast: at least 50 MiB a second, so 5 ms at most.
const MARK_BYTES: u32 = 256 << 10;
/// Bytes of a body that have to be to come: what lies decrypted, or read ahead, is less than half of it.
const FAR_BYTES: u64 = 512 << 10;
/// Bytes that tell how fast they come.
const TELLING_BYTES: u64 = 1 << 20;
/// The longest time in which these have come fast.
const FAST: Duration = Duration::from_millis(20);
/// So long the mark is waited for.
const PATIENCE: Duration = Duration::from_millis(10);
/// Marks that may be late, one soon after the other.
const TOO_OFTEN: u32 = 4;
/// Bytes between two after which one is not soon after the other.
const SELDOM_BYTES: u64 = 64 << 20;

/// A connection to a server.
#[derive(Debug)]
pub(super) struct Stream {
    wire: Wire,
    pace: Pace,
    /// True while the kernel waits for [`MARK_BYTES`].
    is_marked: bool,
    /// False once it has refused to, or was late too often.
    may_mark: bool,
    /// How often the mark was late of late, and the bytes that have come since.
    late: (u32, u64),
}

#[derive(Debug)]
enum Wire {
    Tcp(TcpStream),
    Tls(Box<Secured>),
}

/// How fast bytes have come lately.
#[derive(Debug)]
struct Pace {
    since: Instant,
    bytes: u64,
    is_fast: bool,
}

impl Pace {
    fn new(now: Instant) -> Self {
        Self { since: now, bytes: 0, is_fast: false }
    }

    /// So many have come until now.
    fn came(&mut self, bytes: u64, now: impl FnOnce() -> Instant) {
        self.bytes += bytes;
        if self.bytes >= TELLING_BYTES {
            let now = now();
            let is_fast = now - self.since <= FAST;
            *self = Self { since: now, bytes: 0, is_fast };
        }
    }
}

impl Stream {
    pub(super) fn tcp(stream: TcpStream) -> Self {
        Self::of(Wire::Tcp(stream))
    }

    pub(super) fn tls(stream: Secured) -> Self {
        Self::of(Wire::Tls(Box::new(stream)))
    }

    fn of(wire: Wire) -> Self {
        Self {
            wire,
            pace: Pace::new(Instant::now()),
            is_marked: false,
            may_mark: true,
            late: (0, 0),
        }
    }

    /// The next bytes of a body of which `left` are to come; 0 at the end of the connection.
    ///
    /// # Errors
    /// The connection's.
    pub(super) async fn read_of(&mut self, left: u64, room: &mut [u8]) -> io::Result<usize> {
        let is_far = self.pace.is_fast && left >= FAR_BYTES;
        // Without it, it only costs more.
        if self.mark(is_far && self.may_mark).is_err() {
            self.may_mark = false;
            self.mark(false)?;
        }
        let count = match self.is_marked {
            false => self.read(room).await?,
            true => match tokio::time::timeout(PATIENCE, self.read(room)).await {
                Ok(count) => count?,
                Err(_late) => {
                    self.pace = Pace::new(Instant::now());
                    self.was_late();
                    self.mark(false)?;
                    self.read(room).await?
                }
            },
        };
        self.pace.came(count as u64, Instant::now);
        self.late.1 += count as u64;
        // Who reads what follows this body knows nothing of marks.
        if count as u64 >= left {
            self.mark(false)?;
        }
        Ok(count)
    }

    /// True if nothing that the peer has said is left, and it has not closed the connection. A record of
    /// TLS that only the session would have read counts too: then there is one handshake more.
    pub(super) fn is_quiet(&self) -> bool {
        let (tcp, is_read) = match &self.wire {
            Wire::Tcp(stream) => (stream, true),
            Wire::Tls(stream) => (stream.tcp(), stream.is_read()),
        };
        let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT;
        is_read && recv(tcp, &mut [0; 1][..], flags) == Err(Errno::WOULDBLOCK)
    }

    /// The mark was not reached in time. Where that goes on, a window smaller than it may be why: each
    /// would cost as long again.
    fn was_late(&mut self) {
        let (times, since) = self.late;
        let times = if since < SELDOM_BYTES { times + 1 } else { 1 };
        self.late = (times, 0);
        self.may_mark &= times < TOO_OFTEN;
    }

    fn mark(&mut self, is_marked: bool) -> io::Result<()> {
        if self.is_marked != is_marked {
            let tcp = match &self.wire {
                Wire::Tcp(stream) => stream,
                Wire::Tls(stream) => stream.tcp(),
            };
            ring::wake_at(tcp.as_fd(), if is_marked { MARK_BYTES } else { 1 })?;
            self.is_marked = is_marked;
        }
        Ok(())
    }

    fn as_read(&mut self) -> Pin<&mut (dyn AsyncRead + Send + Unpin)> {
        match &mut self.wire {
            Wire::Tcp(stream) => Pin::new(stream),
            Wire::Tls(stream) => Pin::new(&mut **stream),
        }
    }

    fn as_write(&mut self) -> Pin<&mut (dyn AsyncWrite + Send + Unpin)> {
        match &mut self.wire {
            Wire::Tcp(stream) => Pin::new(stream),
            Wire::Tls(stream) => Pin::new(&mut **stream),
        }
    }
}

impl AsyncRead for Stream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        room: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.as_read().poll_read(cx, room)
    }
}

impl AsyncWrite for Stream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.as_write().poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.as_write().poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.as_write().poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::net::TcpListener;
    use std::sync::mpsc;

    use super::*;

    #[test]
    fn what_comes_slowly_or_is_little_is_not_fast() {
        let start = Instant::now();
        let mut pace = Pace::new(start);
        let at = |ms| move || start + Duration::from_millis(ms);
        pace.came(TELLING_BYTES - 1, at(0));
        assert!(!pace.is_fast);
        pace.came(1, at(20));
        assert!(pace.is_fast);
        pace.came(TELLING_BYTES, at(40));
        assert!(pace.is_fast);
        pace.came(TELLING_BYTES, at(61));
        assert!(!pace.is_fast);
    }

    /// Each piece is sent once the one before was read: whatever is left lying ends the test.
    #[tokio::test(flavor = "multi_thread")]
    async fn bytes_are_told_of_however_few_follow_a_fast_start() {
        const PIECES: [usize; 4] = [1, 4096, 100_000, 2];
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let (next, told) = mpsc::channel();
        let server = std::thread::spawn(move || {
            let mut stream = listener.accept().unwrap().0;
            for bytes in PIECES {
                told.recv().unwrap();
                stream.write_all(&vec![7; bytes]).unwrap();
            }
        });
        let mut stream = Stream::tcp(TcpStream::connect(address).await.unwrap());
        let mut room = vec![0; 512 << 10];
        for bytes in PIECES {
            stream.pace.is_fast = true;
            stream.may_mark = true;
            next.send(()).unwrap();
            let mut read = 0;
            while read < bytes {
                // The body never ends, as far as the reader knows.
                let count = stream.read_of(u64::MAX, &mut room).await.unwrap();
                assert!(count > 0);
                read += count;
            }
            assert_eq!(read, bytes);
        }
        server.join().unwrap();
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_connection_is_quiet_until_something_lies_on_it_or_it_is_closed() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        for says in [&b"x"[..], b""] {
            let stream = Stream::tcp(TcpStream::connect(address).await.unwrap());
            let mut server = listener.accept().unwrap().0;
            assert!(stream.is_quiet());
            server.write_all(says).unwrap();
            drop(server);
            let Wire::Tcp(tcp) = &stream.wire else { panic!("it is plain") };
            tcp.readable().await.unwrap();
            assert!(!stream.is_quiet());
        }
    }

    #[tokio::test]
    async fn a_mark_that_is_late_again_and_again_is_given_up() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let mut stream = Stream::tcp(TcpStream::connect(address).await.unwrap());
        for _ in 0..2 {
            for _ in 0..3 {
                stream.was_late();
            }
            assert!(stream.may_mark);
            stream.late.1 += SELDOM_BYTES;
        }
        for may_mark in [true, true, true, false] {
            stream.was_late();
            assert_eq!(stream.may_mark, may_mark);
        }
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn the_end_of_a_body_comes_at_once_and_leaves_no_mark() {
        const BODY: usize = 32 << 20;
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let (next, told) = mpsc::channel::<()>();
        let server = std::thread::spawn(move || {
            let mut stream = listener.accept().unwrap().0;
            stream.write_all(&vec![7; BODY]).unwrap();
            told.recv().unwrap();
            stream.write_all(b"x").unwrap();
            told.recv().unwrap_err();
        });
        let mut stream = Stream::tcp(TcpStream::connect(address).await.unwrap());
        let (mut left, mut room, mut was_marked) = (BODY as u64, vec![0; 8 << 20], false);
        while left > 0 {
            stream.pace.is_fast = true;
            let most = room.len().min(usize::try_from(left).unwrap());
            left -= stream.read_of(left, &mut room[..most]).await.unwrap() as u64;
            was_marked |= stream.is_marked;
        }
        assert!(was_marked && !stream.is_marked);
        next.send(()).unwrap();
        // As the head of the next answer is read.
        assert_eq!(stream.read(&mut room).await.unwrap(), 1);
        drop(next);
        server.join().unwrap();
    }
}
