//! The socket that readers attach at.
//!
//! Why: attaching is for programs of this node that may read images, and each has a lease.
//! How: sequenced packets, a thread for each reader, the peer's user from the kernel. An attach that is
//! here when its connection is accepted is answered before that thread is made. A reader that does not
//! take its answers is hung up; one that asks nothing costs an idle thread.
//! Never: lets a peer in by what it says, or one reader wait for another.
//! Start at [`Server::bind`].

use std::io::{ErrorKind, IoSlice, IoSliceMut};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use rustix::net::sockopt::{self, Timeout};
use rustix::net::{RecvFlags, SocketType};

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
        let greet = move |socket: &Socket| greet(socket, &exports, &allowed, &limits);
        acceptor.run_greeting(greet, |id, socket, greeted| {
            let ended = greeted.and_then(|mut reader| converse(&socket, &mut reader));
            match ended {
                Ok(()) => tracing::debug!(id, "reader has gone"),
                Err(error) => tracing::info!(id, %error, "reader was left"),
            }
        })
    }
}

/// A reader and how far it is.
struct Reader {
    session: Session,
    /// Not attached yet: the limit of the handshake is on its socket.
    is_new: bool,
    is_over: bool,
}

impl Reader {
    /// Takes a message, if there is one, and answers it; false at the end.
    fn exchange(&mut self, socket: &Socket, wait: bool) -> std::io::Result<bool> {
        let mut message = [0; REQUEST_BYTES];
        let mut parts = [IoSliceMut::new(&mut message)];
        let mut unwanted = Vec::new();
        let flags = if wait { RecvFlags::empty() } else { RecvFlags::DONTWAIT };
        let count = match socket::receive_with(socket, &mut parts, &mut unwanted, flags) {
            Err(error) if !wait && error.kind() == ErrorKind::WouldBlock => return Ok(true),
            received => received?,
        };
        if count == 0 {
            return Ok(false);
        }
        let answer = self.session.answer(message.get(..count).unwrap_or_default());
        let parts = [IoSlice::new(head_bytes(&answer.head)), IoSlice::new(answer.body)];
        // The first answer has room: nothing else is on its way.
        socket::send(socket, &parts, &answer.descriptors)?;
        Ok(!answer.is_last)
    }
}

/// What is done with a connection before it has a thread.
fn greet(
    socket: &Socket,
    exports: &Arc<Exports>,
    allowed: &Allowed,
    limits: &Limits,
) -> std::io::Result<Reader> {
    let peer = sockopt::socket_peercred(socket)?;
    let pid = Some(peer.pid.as_raw_nonzero().get());
    let peer = Peer { uid: peer.uid.as_raw(), gid: peer.gid.as_raw(), pid };
    let session = Session::new(Arc::clone(exports), Some(socket.clone()), allowed.admits(peer));
    let mut reader = Reader { session, is_new: true, is_over: false };
    reader.is_over = !reader.exchange(socket, false)?;
    sockopt::set_socket_timeout(socket, Timeout::Send, Some(limits.send))?;
    if reader.session.is_attached() {
        reader.is_new = false;
    } else {
        sockopt::set_socket_timeout(socket, Timeout::Recv, Some(limits.handshake))?;
    }
    Ok(reader)
}

/// One session, to its end.
fn converse(socket: &Socket, reader: &mut Reader) -> std::io::Result<()> {
    while !reader.is_over {
        reader.is_over = !reader.exchange(socket, true)?;
        if reader.is_new && reader.session.is_attached() {
            sockopt::set_socket_timeout(socket, Timeout::Recv, None)?;
            reader.is_new = false;
        }
    }
    Ok(())
}
