//! The socket that readers attach at.
//!
//! Why: attaching is for programs of this node that may read images, and each has a lease.
//! How: sequenced packets, a thread for each reader, the peer's user from the kernel. A reader that
//! does not take its answers is hung up; one that asks nothing costs an idle thread.
//! Never: lets a peer in by what it says, or one reader wait for another.
//! Start at [`Server::bind`].

use std::io::{IoSlice, IoSliceMut};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use rustix::net::SocketType;
use rustix::net::sockopt::{self, Timeout};

use super::session::{Session, head_bytes};
use crate::peer::{Allowed, Peer};
use crate::replica::socket;
use crate::replica::wire::{MAX_NAME_BYTES, Request};
use crate::serve::acceptor::{Acceptor, Stopper};
use crate::serve::activation::Passed;
use crate::serve::listener::Listener;
use crate::serve::{Exports, ServeError, Socket};

/// Longest request, and one byte more, which none has.
const REQUEST_BYTES: usize = size_of::<Request>() + MAX_NAME_BYTES + 1;

/// What readers may cost.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Connections at a time; a reader has one, and a few more while its threads ask at once.
    pub connections: usize,
    /// From accept to the attach.
    pub handshake: Duration,
    /// For a reader to take an answer.
    pub send: Duration,
    /// For questions that were asked when the server stops.
    pub farewell: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: 4096,
            handshake: Duration::from_secs(10),
            send: Duration::from_secs(30),
            farewell: Duration::from_secs(2),
        }
    }
}

/// A listening server that does not run yet.
#[derive(Debug)]
pub struct Server {
    acceptor: Acceptor,
    exports: Arc<Exports>,
    allowed: Arc<Allowed>,
    limits: Limits,
}

impl Server {
    /// Listens on a Unix socket at `path`, mode 0660. The socket of a dead server is replaced.
    ///
    /// # Errors
    /// [`ServeError`]: the path is too long, taken by a live server or by something else, or the
    /// system refuses.
    pub fn bind(
        path: &Path,
        exports: Arc<Exports>,
        allowed: Allowed,
        limits: Limits,
    ) -> Result<Self, ServeError> {
        Self::new(Listener::bind(path, SocketType::SEQPACKET)?, exports, allowed, limits)
    }

    /// Listens on a socket that a service manager passed.
    ///
    /// # Errors
    /// [`ServeError::Resources`].
    pub fn on_passed(
        socket: Passed,
        exports: Arc<Exports>,
        allowed: Allowed,
        limits: Limits,
    ) -> Result<Self, ServeError> {
        Self::new(Listener::inherited(socket), exports, allowed, limits)
    }

    fn new(
        listener: Listener,
        exports: Arc<Exports>,
        allowed: Allowed,
        limits: Limits,
    ) -> Result<Self, ServeError> {
        let acceptor = Acceptor::new(listener, "replica", limits.connections, limits.farewell)?;
        Ok(Self { acceptor, exports, allowed: Arc::new(allowed), limits })
    }

    /// A handle that stops this server.
    #[must_use]
    pub fn stopper(&self) -> Stopper {
        self.acceptor.stopper()
    }

    /// Where it listens.
    #[must_use]
    pub fn path(&self) -> Option<&Path> {
        self.acceptor.path()
    }

    /// Serves until stopped.
    ///
    /// # Errors
    /// [`ServeError::Resources`] if the listener cannot be waited for; everything is stopped then.
    pub fn run(self) -> Result<(), ServeError> {
        let Self { acceptor, exports, allowed, limits } = self;
        acceptor.run(move |id, socket| {
            let ended = converse(&socket, &exports, &allowed, &limits);
            match ended {
                Ok(()) => tracing::debug!(id, "reader has gone"),
                Err(error) => tracing::info!(id, %error, "reader was left"),
            }
        })
    }
}

/// One session, to its end.
fn converse(
    socket: &Socket,
    exports: &Arc<Exports>,
    allowed: &Allowed,
    limits: &Limits,
) -> std::io::Result<()> {
    let peer = sockopt::socket_peercred(socket)?;
    let pid = Some(peer.pid.as_raw_nonzero().get());
    let peer = Peer { uid: peer.uid.as_raw(), gid: peer.gid.as_raw(), pid };
    sockopt::set_socket_timeout(socket, Timeout::Send, Some(limits.send))?;
    sockopt::set_socket_timeout(socket, Timeout::Recv, Some(limits.handshake))?;
    let mut session = Session::new(Arc::clone(exports), Some(socket.clone()), allowed.admits(peer));
    let mut message = [0; REQUEST_BYTES];
    let mut is_new = true;
    loop {
        let mut parts = [IoSliceMut::new(&mut message)];
        let mut unwanted = Vec::new();
        let count = socket::receive(socket, &mut parts, &mut unwanted)?;
        if count == 0 {
            return Ok(());
        }
        let answer = session.answer(message.get(..count).unwrap_or_default());
        let parts = [IoSlice::new(head_bytes(&answer.head)), IoSlice::new(answer.body)];
        socket::send(socket, &parts, &answer.descriptors)?;
        if answer.is_last {
            return Ok(());
        }
        if is_new && session.is_attached() {
            sockopt::set_socket_timeout(socket, Timeout::Recv, None)?;
            is_new = false;
        }
    }
}
