//! The socket of one VM and one image.
//!
//! Why: a VMM connects to a path, and what it gets there is one disk; whoever may open the path may
//! read the image.
//! How: one connection at a time, its messages on a thread of its own; while it is open, the image is
//! in use. A second one is closed as soon as it is accepted, so that it fails and does not hang.
//! Never: waits for a frontend while another one is asking, or keeps a thread behind.
//! Start at [`Server::bind`].

use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use rustix::net::SocketType;
use vhost::vhost_user::{BackendReqHandler, Error};

use super::Limits;
use super::backend::Backend;
use crate::serve::acceptor::{Acceptor, Stopper};
use crate::serve::listener::Listener;
use crate::serve::socket::Socket;
use crate::serve::{Exports, ServeError};

/// A listening server that does not run yet.
#[derive(Debug)]
pub struct Server {
    acceptor: Acceptor,
    exports: Arc<Exports>,
    export: String,
    limits: Limits,
}

impl Server {
    /// Listens on a Unix socket at `path`, mode 0660, to serve `export` to one frontend at a time.
    /// The socket of a dead server is replaced.
    ///
    /// # Errors
    /// [`ServeError`]: the path is too long, taken by a live server or by something else, or the
    /// system refuses.
    pub fn bind(
        path: &Path,
        exports: Arc<Exports>,
        export: &str,
        limits: Limits,
    ) -> Result<Self, ServeError> {
        let listener = Listener::bind(path, SocketType::STREAM)?;
        let acceptor = Acceptor::new(listener, "vhost-user", 1, limits.farewell)?;
        Ok(Self { acceptor, exports, export: export.to_owned(), limits })
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
        let Self { acceptor, exports, export, limits } = self;
        acceptor.run(move |id, socket| match converse(&socket, &exports, &export, &limits) {
            Ok(()) => tracing::info!(id, export, "a VM has gone"),
            Err(error) => tracing::warn!(id, export, %error, "a VM was left"),
        })
    }
}

/// Why a frontend is left.
#[derive(Debug, thiserror::Error)]
enum End {
    #[error("there is no such image, or it is not ready")]
    Unknown,
    #[error("it said nothing for {0:?}")]
    Silent(Duration),
    #[error("its socket failed: {0}")]
    Socket(#[from] std::io::Error),
    #[error("{0}")]
    Protocol(Error),
}

/// One frontend, to its end.
fn converse(socket: &Socket, exports: &Exports, export: &str, limits: &Limits) -> Result<(), End> {
    let attachment = exports.attach(export, Some(socket.clone())).ok_or(End::Unknown)?;
    wait_for_message(socket, limits.handshake)?;
    tracing::info!(export, "a VM has come");
    let stream = UnixStream::from(socket.as_fd().try_clone_to_owned()?);
    let backend = Arc::new(Mutex::new(Backend::new(attachment, limits)));
    let mut handler = BackendReqHandler::from_stream(stream, backend);
    loop {
        match handler.handle_request() {
            Ok(()) => {}
            Err(Error::Disconnected) => return Ok(()),
            Err(error) => return Err(End::Protocol(error)),
        }
    }
}

/// A frontend that connects and says nothing would keep out those that do.
fn wait_for_message(socket: &Socket, limit: Duration) -> Result<(), End> {
    let deadline = Instant::now() + limit;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(End::Silent(limit));
        }
        let timeout = Timespec::try_from(left).ok();
        match rustix::event::poll(&mut [PollFd::new(socket, PollFlags::IN)], timeout.as_ref()) {
            Ok(0) | Err(Errno::INTR) => {}
            Ok(_) => return Ok(()),
            Err(errno) => return Err(End::Socket(errno.into())),
        }
    }
}
