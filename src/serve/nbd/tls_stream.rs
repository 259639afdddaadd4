//! A session's byte stream under TLS.
//!
//! Why: on a network, images are read by whoever listens, unless they are encrypted.
//! How: rustls without its own I/O: what is to be sent is copied into one buffer, pages of a map by the
//! guarded routine, encrypted, and sent whole before more is taken. While there is a deadline each
//! system call gets what is left of it, so that a client that dribbles buys no time.
//! Never: keeps more than one buffer of bytes that the peer doesn't take, or sends half of a buffer
//! some page of which cannot be read.
//! Start at [`TlsStream::accept`].

use std::io::{self, IoSlice, Read, Write};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::net::{SendAncillaryBuffer, SendFlags};
use rustls::pki_types::CertificateDer;
use rustls::{ServerConfig, ServerConnection};

use super::session::End;
use super::transport::Transport;
use crate::map::Piece;
use crate::serve::Socket;

/// Bytes that are encrypted at once: four records. It stays in the processor's cache.
const PLAIN_BYTES: usize = 64 << 10;
/// A peer that is told why it is not let in gets so long to hear it.
const LAST_WORDS: Duration = Duration::from_secs(1);
/// What of its own last words is read meanwhile.
const LAST_WORDS_BYTES: usize = 64 << 10;

/// An encrypted connection.
pub(super) struct TlsStream {
    tls: ServerConnection,
    raw: Raw,
    plain: Box<[u8]>,
}

impl TlsStream {
    /// Does the handshake of TLS, until `deadline`.
    ///
    /// # Errors
    /// [`End`] if the client is not let in, gives up, or takes too long.
    pub(super) fn accept(
        socket: Socket,
        config: Arc<ServerConfig>,
        deadline: Instant,
    ) -> Result<Self, End> {
        let mut tls = ServerConnection::new(config).map_err(|error| End::Tls(error.to_string()))?;
        tls.set_buffer_limit(Some(2 * PLAIN_BYTES));
        let raw = Raw { socket, deadline: Some(deadline), flags: SendFlags::NOSIGNAL };
        let plain = vec![0; PLAIN_BYTES].into_boxed_slice();
        let mut stream = Self { tls, raw, plain };
        while stream.tls.is_handshaking() {
            let step = stream.flush().and_then(|()| stream.fill());
            match step {
                Ok(0) => return Err(End::HungUp),
                Ok(_) => {}
                Err(error) => {
                    if error.kind() == io::ErrorKind::InvalidData {
                        stream.last_words();
                    }
                    return Err(End::from_io(error));
                }
            }
        }
        stream.flush().map_err(End::from_io)?;
        Ok(stream)
    }

    /// The version and the cipher, for the log.
    pub(super) fn describe(&self) -> String {
        let version = self.tls.protocol_version().and_then(|version| version.as_str());
        let suite = self.tls.negotiated_cipher_suite().and_then(|suite| suite.suite().as_str());
        format!("{} {}", version.unwrap_or("TLS"), suite.unwrap_or_default())
    }

    /// The client's certificate, if it had to have one.
    pub(super) fn client(&self) -> Option<&CertificateDer<'static>> {
        self.tls.peer_certificates()?.first()
    }

    /// Ends TLS as the protocol wants it, if the peer takes that at once.
    pub(super) fn farewell(mut self) {
        self.raw.flags |= SendFlags::DONTWAIT;
        self.tls.send_close_notify();
        let _peer_has_gone = self.flush();
    }

    /// Sends the alert that says what is wrong, and stays until the peer has closed, for a moment: to
    /// close before everything was read would throw away what was sent.
    fn last_words(&mut self) {
        let soonest = |deadline: Instant| deadline.min(Instant::now() + LAST_WORDS);
        self.raw.deadline = self.raw.deadline.map(soonest);
        if self.flush().is_err() {
            return;
        }
        let _gone = rustix::net::shutdown(&self.raw.socket, rustix::net::Shutdown::Write);
        let mut left = LAST_WORDS_BYTES;
        while let Ok(count @ 1..) = self.raw.read(&mut self.plain) {
            left = left.saturating_sub(count);
            if left == 0 {
                return;
            }
        }
    }

    /// Sends all that is encrypted.
    fn flush(&mut self) -> io::Result<()> {
        while self.tls.wants_write() {
            self.tls.write_tls(&mut self.raw)?;
        }
        Ok(())
    }

    /// Waits for bytes of the peer's, and decrypts what is whole; 0 for the end of the stream.
    fn fill(&mut self) -> io::Result<usize> {
        if !self.tls.wants_read() {
            return Ok(1);
        }
        let count = self.tls.read_tls(&mut self.raw)?;
        let processed = self.tls.process_new_packets();
        processed.map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
        Ok(count)
    }

    /// Copies the beginning of `pieces`, as much as there is room for.
    fn gather(&mut self, pieces: &[Piece<'_>]) -> io::Result<usize> {
        let mut filled = 0;
        for piece in pieces {
            let room = self.plain.get_mut(filled..).unwrap_or_default();
            let len = piece.len().min(room.len());
            if !room.get_mut(..len).is_some_and(|room| piece.copy_to(room)) {
                return Err(Errno::FAULT.into());
            }
            filled += len;
            if filled == PLAIN_BYTES {
                break;
            }
        }
        Ok(filled)
    }
}

impl Transport for TlsStream {
    fn receive(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            match self.tls.reader().read(buffer) {
                Ok(count) => return Ok(count),
                // Cut off without a goodbye: an end as any other, since no request is half a one.
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(0),
                Err(error) if error.kind() != io::ErrorKind::WouldBlock => return Err(error),
                Err(_nothing_is_there) => {}
            }
            if let Err(error) = self.fill() {
                if error.kind() == io::ErrorKind::InvalidData {
                    self.raw.flags |= SendFlags::DONTWAIT;
                    let _alert = self.flush();
                }
                return Err(error);
            }
            // An answer to a change of keys.
            self.flush()?;
        }
    }

    fn send(&mut self, pieces: &[Piece<'_>]) -> io::Result<usize> {
        let filled = self.gather(pieces)?;
        let plain = self.plain.get(..filled).unwrap_or_default();
        self.tls.writer().write_all(plain)?;
        self.flush()?;
        Ok(filled)
    }

    fn set_time_left(&mut self, left: Option<Duration>) -> io::Result<()> {
        self.raw.deadline = left.map(|left| Instant::now() + left);
        self.raw.socket.set_time_left(None)
    }
}

/// The socket under it, as rustls wants it.
struct Raw {
    socket: Socket,
    deadline: Option<Instant>,
    flags: SendFlags,
}

impl Raw {
    /// Gives the next system call the time that is left.
    fn arm(&mut self) -> io::Result<()> {
        let Some(deadline) = self.deadline else { return Ok(()) };
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        self.socket.set_time_left(Some(left))
    }
}

impl Read for Raw {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.arm()?;
        self.socket.receive(buffer)
    }
}

impl Write for Raw {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.write_vectored(&[IoSlice::new(bytes)])
    }

    fn write_vectored(&mut self, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        loop {
            self.arm()?;
            let mut none = SendAncillaryBuffer::default();
            match rustix::net::sendmsg(&self.socket, slices, &mut none, self.flags) {
                Ok(0) => return Err(io::ErrorKind::BrokenPipe.into()),
                Ok(count) => return Ok(count),
                Err(Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
