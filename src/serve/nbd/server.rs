//! The NBD server: a session for each connection that is accepted.
//!
//! Why: the protocol's sessions need only a stream; where connections come from is the same for all
//! servers.
//! How: a listener at a path or at an address, or one that a service manager passed, and the
//! [`Acceptor`], which gives each connection a thread.
//! Never: listens on a network without being told how that is secured.
//! Start at [`Server::bind`] and [`Server::run`].

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;

use rustix::net::SocketType;

use super::Limits;
use super::network::{self, Security};
use super::session::{End, serve};
use crate::serve::acceptor::{Acceptor, Stopper};
use crate::serve::activation::Passed;
use crate::serve::listener::Listener;
use crate::serve::{Exports, ServeError, Socket};

/// Wanted send buffer of a connection in bytes. Larger ones fall out of the cache before the peer
/// reads them: 8.9 GB/s of 256 KiB reads by two clients, against 7.9 at 1 MiB.
const SEND_BUFFER_BYTES: usize = 256 << 10;

/// A listening NBD server that does not run yet.
#[derive(Debug)]
pub struct Server {
    acceptor: Acceptor,
    exports: Arc<Exports>,
    limits: Limits,
    /// Of a server on a network.
    security: Option<Arc<Security>>,
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

    /// Listens at an address of a network. Port 0 is any that is free.
    ///
    /// # Errors
    /// [`ServeError::Address`]: it is not one of this host, or in use.
    pub fn bind_tcp(
        address: SocketAddr,
        security: Security,
        exports: Arc<Exports>,
        limits: Limits,
    ) -> Result<Self, ServeError> {
        Self::on_network(Listener::bind_tcp(address)?, security, exports, limits)
    }

    /// Listens on a Unix socket that a service manager passed.
    ///
    /// # Errors
    /// [`ServeError::Resources`].
    pub fn on_passed(
        socket: Passed,
        exports: Arc<Exports>,
        limits: Limits,
    ) -> Result<Self, ServeError> {
        Self::new(Listener::inherited(socket), exports, limits)
    }

    /// Listens on a TCP socket that a service manager passed.
    ///
    /// # Errors
    /// [`ServeError::Resources`].
    pub fn on_passed_tcp(
        socket: Passed,
        security: Security,
        exports: Arc<Exports>,
        limits: Limits,
    ) -> Result<Self, ServeError> {
        Self::on_network(Listener::inherited(socket), security, exports, limits)
    }

    fn on_network(
        listener: Listener,
        security: Security,
        exports: Arc<Exports>,
        limits: Limits,
    ) -> Result<Self, ServeError> {
        let address = listener.address().map(|address| address.to_string()).unwrap_or_default();
        match &security {
            Security::Plain => tracing::warn!(
                address,
                "anybody who can connect reads all images here, in plain text"
            ),
            Security::Tls(credentials) if !credentials.knows_clients() => tracing::warn!(
                address,
                "anybody who can connect reads all images here: clients need no certificate"
            ),
            Security::Tls(_) => {}
        }
        let acceptor = Acceptor::new(listener, "nbd-tcp", limits.connections, limits.farewell)?
            .with_per_host(limits.connections_per_host);
        Ok(Self { acceptor, exports, limits, security: Some(Arc::new(security)) })
    }

    fn new(listener: Listener, exports: Arc<Exports>, limits: Limits) -> Result<Self, ServeError> {
        let acceptor = Acceptor::new(listener, "nbd", limits.connections, limits.farewell)?;
        Ok(Self { acceptor, exports, limits, security: None })
    }

    /// Where it listens, if that is a path.
    #[must_use]
    pub fn path(&self) -> Option<&Path> {
        self.acceptor.path()
    }

    /// Where it listens, if that is an address of a network.
    #[must_use]
    pub fn address(&self) -> Option<SocketAddr> {
        self.acceptor.address()
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
        let Self { acceptor, exports, limits, security } = self;
        acceptor.run(move |id, socket| {
            let peer = socket.peer();
            let end = match &security {
                Some(security) => network::serve(id, &socket, security, &exports, &limits),
                None => serve_local(socket, &exports, &limits),
            };
            log_end(id, peer, &end);
        })
    }
}

fn serve_local(socket: Socket, exports: &Exports, limits: &Limits) -> End {
    let mut transport = socket.clone();
    socket.ask_send_buffer(SEND_BUFFER_BYTES);
    serve(&mut transport, Some(socket), exports, limits)
}

fn log_end(id: u64, peer: Option<SocketAddr>, end: &End) {
    let peer = peer.map_or_else(|| "local".to_owned(), |peer| peer.to_string());
    match end {
        End::Goodbye | End::HungUp => tracing::debug!(id, peer, %end, "session ended"),
        End::TooSlow | End::Protocol(_) | End::Tls(_) => {
            tracing::info!(id, peer, %end, "session ended");
        }
        End::Unreadable | End::Socket(_) => {
            tracing::warn!(id, peer, error = end as &dyn std::error::Error, "session ended");
        }
    }
}
