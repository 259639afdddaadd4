//! A connection's socket, shared by whoever reads it and whoever may end it.
//!
//! Why: a session blocks on its peer; only another thread can end it then.
//! How: clones share one descriptor, and shutting it down wakes whoever waits for it.
//! Never: closes the descriptor under another clone.
//! Start at [`Socket`].

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use rustix::net::Shutdown;
use rustix::net::sockopt;

/// A connected socket. Clones share it, so that another thread can hang it up.
#[derive(Clone, Debug)]
pub struct Socket(Arc<OwnedFd>);

impl Socket {
    /// Wraps a connected, blocking socket.
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
