//! A connection's socket, shared by whoever reads it and whoever may end it.
//!
//! Why: a session blocks on its peer; only another thread can end it then.
//! How: clones share one descriptor, and shutting it down wakes whoever waits for it.
//! Never: closes the descriptor under another clone.
//! Start at [`Socket`].

use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use rustix::net::Shutdown;
use rustix::net::sockopt;

/// A connected socket. Clones share it, so that another thread can hang it up.
#[derive(Clone, Debug)]
pub struct Socket {
    fd: Arc<OwnedFd>,
    peer: Option<SocketAddr>,
}

impl Socket {
    /// Wraps a connected, blocking socket.
    #[must_use]
    pub fn new(fd: OwnedFd) -> Self {
        Self::with_peer(fd, None)
    }

    /// As [`new`](Self::new), connected to this address of a network.
    pub(super) fn with_peer(fd: OwnedFd, peer: Option<SocketAddr>) -> Self {
        Self { fd: Arc::new(fd), peer }
    }

    /// Who is at the other end, if that is across a network.
    #[must_use]
    pub fn peer(&self) -> Option<SocketAddr> {
        self.peer
    }

    /// The peer's requests end here: the session answers what has arrived, and leaves.
    pub fn stop_receiving(&self) {
        let _gone_already = rustix::net::shutdown(&self.fd, Shutdown::Read);
    }

    /// Ends the session now, also one that is blocked on a peer that does not read.
    pub fn hang_up(&self) {
        let _gone_already = rustix::net::shutdown(&self.fd, Shutdown::Both);
    }

    /// Asks for a send buffer of `bytes`; without the privilege the kernel gives less.
    pub fn ask_send_buffer(&self, bytes: usize) {
        if sockopt::set_socket_send_buffer_size_force(&*self.fd, bytes).is_err() {
            let _smaller_is_slower = sockopt::set_socket_send_buffer_size(&*self.fd, bytes);
        }
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}
