//! The byte stream under a session.
//!
//! Why: the same session runs on a socket, and on bytes in memory in a fuzzer.
//! How: one trait with the three things that a session asks of its socket.
//! Never: knows what the bytes mean.
//! Start at [`Transport`].

use std::io;
use std::os::fd::AsFd;
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::RecvFlags;
use rustix::net::sockopt::{self, Timeout};

use crate::map::{Piece, send_pieces};
use crate::serve::Socket;

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

impl Transport for Socket {
    fn receive(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            match rustix::net::recv(&*self, &mut *buffer, RecvFlags::empty()) {
                Ok((count, _untruncated)) => return Ok(count),
                Err(Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
    }

    fn send(&mut self, pieces: &[Piece<'_>]) -> io::Result<usize> {
        send_pieces(self.as_fd(), pieces)
    }

    fn set_time_left(&mut self, left: Option<Duration>) -> io::Result<()> {
        // A timeout of zero would mean "for ever" to the kernel.
        let left = left.map(|time| time.max(Duration::from_millis(1)));
        sockopt::set_socket_timeout(&*self, Timeout::Recv, left)?;
        sockopt::set_socket_timeout(&*self, Timeout::Send, left)?;
        Ok(())
    }
}
