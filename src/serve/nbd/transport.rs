//! The byte stream under a session.
//!
//! Why: the same session runs on a socket, and on bytes in memory in a fuzzer.
//! How: one trait with the three things that a session asks of its socket.
//! Never: knows what the bytes mean.
//! Start at [`Transport`].

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::sockopt::{self, Timeout};
use rustix::net::{RecvFlags, Shutdown};

use crate::map::{Piece, send_pieces};

/// A connected byte stream.
pub trait Transport {
    /// Waits for bytes; `Ok(0)` is the end of the stream.
    ///
    /// # Errors
    /// `WouldBlock` when the time left has passed; otherwise the peer or the stream is gone.
    fn receive(&mut self, buffer: &mut [u8]) -> io::Result<usize>;

    /// Sends pieces in order and returns how many bytes went, as [`send_pieces`] does.
    ///
    /// # Errors
    /// EFAULT for a mapped page that cannot be read; `WouldBlock` when the time left has passed;
    /// otherwise the peer or the stream is gone.
    fn send(&mut self, pieces: &[Piece<'_>]) -> io::Result<usize>;

    /// Bounds each later receive and send; `None` waits for ever. A zero is taken as the shortest
    /// time there is.
    ///
    /// # Errors
    /// The stream is gone.
    fn set_time_left(&mut self, left: Option<Duration>) -> io::Result<()>;
}

/// A connected stream socket. Clones share it, so that another thread can hang it up.
#[derive(Clone, Debug)]
pub struct Socket(Arc<OwnedFd>);

impl Socket {
    /// Wraps a connected, blocking stream socket.
    #[must_use]
    pub fn new(fd: OwnedFd) -> Self {
        Self(Arc::new(fd))
    }

    /// The peer's requests end here: the session answers what has arrived, and leaves.
    pub fn stop_receiving(&self) {
        let _gone_already = rustix::net::shutdown(&self.0, Shutdown::Read);
    }

    /// Ends the session now, also one that is blocked on a peer that does not read.
    pub fn hang_up(&self) {
        let _gone_already = rustix::net::shutdown(&self.0, Shutdown::Both);
    }

    /// Asks for a send buffer of `bytes`; without the privilege the kernel gives less.
    pub fn ask_send_buffer(&self, bytes: usize) {
        if sockopt::set_socket_send_buffer_size_force(&*self.0, bytes).is_err() {
            let _smaller_is_slower = sockopt::set_socket_send_buffer_size(&*self.0, bytes);
        }
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Transport for Socket {
    fn receive(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            match rustix::net::recv(&self.0, &mut *buffer, RecvFlags::empty()) {
                Ok((count, _untruncated)) => return Ok(count),
                Err(Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
    }

    fn send(&mut self, pieces: &[Piece<'_>]) -> io::Result<usize> {
        send_pieces(self.0.as_fd(), pieces)
    }

    fn set_time_left(&mut self, left: Option<Duration>) -> io::Result<()> {
        // A timeout of zero would mean "for ever" to the kernel.
        let left = left.map(|time| time.max(Duration::from_millis(1)));
        sockopt::set_socket_timeout(&*self.0, Timeout::Recv, left)?;
        sockopt::set_socket_timeout(&*self.0, Timeout::Send, left)?;
        Ok(())
    }
}
