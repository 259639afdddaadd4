//! The NBD server: a session for each connection that is accepted.
//!
//! Why: the protocol's sessions need only a stream; where connections come from is the same for all
//! servers.
//! How: a listener at a path, or one that a service manager passed, and the [`Acceptor`], which
//! gives each connection a thread.
//! Never: listens on a network.
//! Start at [`Server::bind`] and [`Server::run`].

use std::path::Path;
use std::sync::Arc;

use rustix::net::SocketType;

use super::session::{End, serve};
use super::{Limits, activation};
use crate::serve::acceptor::{Acceptor, Stopper};
use crate::serve::listener::Listener;
use crate::serve::{Exports, ServeError};

/// Wanted send buffer of a connection in bytes. Larger ones fall out of the cache before the peer
/// reads them: 8.9 GB/s of 256 KiB reads by two clients, against 7.9 at 1 MiB.
const SEND_BUFFER_BYTES: usize = 256 << 10;

/// A listening NBD server that does not run yet.
#[derive(Debug)]
pub struct Server {
    acceptor: Acceptor,
    exports: Arc<Exports>,
    limits: Limits,
}

impl Server {
    /// Listens on a Unix socket at `path`, mode 0660. The socket of a dead server is replaced.
    ///
    /// # Errors
    /// [`ServeError`]: the path is too long, taken by a live server or by something else, or the
    /// system refuses.
    pub fn bind(path: &Path, exports: Arc<Exports>, limits: Limits) -> Result<Self, ServeError> {
        Self::new(Listener::bind(path, SocketType::STREAM)?, exports, limits)
    }

    /// Listens on the socket that a service manager passed (LISTEN_FDS); `None` if none was.
    ///
    /// # Errors
    /// [`ServeError::Activation`] if it is not one listening Unix stream socket.
    pub fn from_activation(
        exports: Arc<Exports>,
        limits: Limits,
    ) -> Result<Option<Self>, ServeError> {
        let Some(fd) = activation::inherited()? else { return Ok(None) };
        Self::new(Listener::inherited(fd), exports, limits).map(Some)
    }

    fn new(listener: Listener, exports: Arc<Exports>, limits: Limits) -> Result<Self, ServeError> {
        let acceptor = Acceptor::new(listener, "nbd", limits.connections, limits.farewell)?;
        Ok(Self { acceptor, exports, limits })
    }

    /// Where it listens; `None` for an inherited socket.
    #[must_use]
    pub fn path(&self) -> Option<&Path> {
        self.acceptor.path()
    }

    /// A handle that stops this server.
    #[must_use]
    pub fn stopper(&self) -> Stopper {
        self.acceptor.stopper()
    }

    /// Serves until stopped; then removes its socket, lets sessions answer what they were asked
    /// for [`Limits::farewell`], hangs up, and returns when the last thread has ended.
    ///
    /// # Errors
    /// [`ServeError::Resources`] if the listener cannot be waited for; everything is stopped then.
    pub fn run(self) -> Result<(), ServeError> {
        let Self { acceptor, exports, limits } = self;
        acceptor.run(move |id, socket| {
            let mut transport = socket.clone();
            socket.ask_send_buffer(SEND_BUFFER_BYTES);
            let end = serve(&mut transport, Some(socket), &exports, &limits);
            log_end(id, &end);
        })
    }
}

fn log_end(id: u64, end: &End) {
    match end {
        End::Goodbye | End::HungUp => tracing::debug!(id, %end, "session ended"),
        End::TooSlow | End::Protocol(_) => tracing::info!(id, %end, "session ended"),
        End::Unreadable | End::Socket(_) => {
            tracing::warn!(id, error = end as &dyn std::error::Error, "session ended");
        }
    }
}
