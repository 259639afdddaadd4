//! The listener of the control socket.
//!
//! Why: a stuck, slow or hostile peer must not hold up the daemon, nor its end.
//! How: hyper per connection with a time limit for headers, a cap on connections, peers checked by
//! [`Allowed`]; a refused one gets one JSON answer and is closed. At the end no new connection is
//! taken, running answers finish, streams end, and after a grace period the rest is dropped.
//! Never: removes a socket that another daemon listens on.
//! Start at [`Server::bind`].

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::http::StatusCode;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Semaphore, watch};
use tokio::task::{JoinHandle, JoinSet};

use super::App;
use super::error::ApiError;
use super::routes::{Caller, router};
use crate::peer::{Allowed, Peer};
use crate::serve::activation::Passed;

/// Connections at a time; more wait in the kernel's backlog.
pub const MAX_CONNECTIONS: usize = 256;
/// Time for a request's headers to arrive.
const HEADERS: Duration = Duration::from_secs(10);
/// Time for a refused peer to read why.
const REFUSAL: Duration = Duration::from_secs(5);
/// Time for running answers to finish at the end.
const GRACE: Duration = Duration::from_secs(5);

/// Why the socket can't be used.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "each field is named in the message above it")]
pub enum BindError {
    /// A daemon answers there.
    #[error("{}: another daemon listens here; stop it, or give another socket", path.display())]
    InUse { path: PathBuf },
    /// Something that isn't a socket is there.
    #[error("{}: not a socket; move it away, or give another path", path.display())]
    NotASocket { path: PathBuf },
    /// A system call failed.
    #[error("{}: cannot {op}", path.display())]
    Io {
        op: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
}

/// A running control socket.
#[derive(Debug)]
pub struct Server {
    path: PathBuf,
    /// Whether the path is ours to remove.
    made: bool,
    stop: watch::Sender<bool>,
    task: JoinHandle<()>,
}

impl Server {
    /// Listens on `path` with mode 0660 and serves `app`. A stale socket is replaced.
    ///
    /// # Errors
    /// [`BindError`].
    pub async fn bind(path: &Path, app: App, allowed: Allowed) -> Result<Self, BindError> {
        remove_stale(path).await?;
        let io = |op| move |source| BindError::Io { op, path: path.to_owned(), source };
        let listener = UnixListener::bind(path).map_err(io("listen on"))?;
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o660))
            .map_err(io("set the mode of"))?;
        if let Some(gid) = allowed.gids.first() {
            std::os::unix::fs::chown(path, None, Some(*gid)).map_err(io("set the group of"))?;
        }
        Ok(Self::start(listener, path, true, app, allowed))
    }

    /// Serves `app` on a socket that a service manager passed, which listens at `path`. The path stays
    /// when the server ends.
    ///
    /// # Errors
    /// [`BindError::Io`] if it cannot be waited for.
    pub fn on_passed(
        socket: Passed,
        path: &Path,
        app: App,
        allowed: Allowed,
    ) -> Result<Self, BindError> {
        let listener = std::os::unix::net::UnixListener::from(OwnedFd::from(socket));
        let listener = UnixListener::from_std(listener).map_err(|source| {
            let op = "wait for connections at";
            BindError::Io { op, path: path.to_owned(), source }
        })?;
        Ok(Self::start(listener, path, false, app, allowed))
    }

    fn start(listener: UnixListener, path: &Path, made: bool, app: App, allowed: Allowed) -> Self {
        let (stop, stopping) = watch::channel(false);
        let routers = Routers {
            owner: router(app.clone(), Caller::Owner),
            others: router(app, Caller::Other),
        };
        let task = tokio::spawn(accept(listener, routers, allowed, stopping));
        Self { path: path.to_owned(), made, stop, task }
    }

    /// Where it listens.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Takes no new connection, lets running answers finish, and removes the socket that it made.
    pub async fn shutdown(self) {
        self.stop.send_replace(true);
        let _died = self.task.await;
        if self.made {
            let _gone = std::fs::remove_file(&self.path);
        }
    }
}

/// Removes a socket that nobody listens on.
async fn remove_stale(path: &Path) -> Result<(), BindError> {
    let io = |op| move |source| BindError::Io { op, path: path.to_owned(), source };
    let meta = match std::fs::symlink_metadata(path) {
        Ok(meta) => meta,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(io("look at")(error)),
    };
    if !meta.file_type().is_socket() {
        return Err(BindError::NotASocket { path: path.to_owned() });
    }
    match UnixStream::connect(path).await {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            std::fs::remove_file(path).map_err(io("remove the stale socket"))
        }
        Ok(_) | Err(_) => Err(BindError::InUse { path: path.to_owned() }),
    }
}

/// What is answered to whom.
struct Routers {
    owner: Router,
    others: Router,
}

async fn accept(
    listener: UnixListener,
    routers: Routers,
    allowed: Allowed,
    mut stopping: watch::Receiver<bool>,
) {
    let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let mut connections = JoinSet::new();
    loop {
        let next = async {
            let place = places.clone().acquire_owned().await;
            (listener.accept().await, place)
        };
        let (accepted, place) = tokio::select! {
            next = next => next,
            Some(_ended) = connections.join_next() => continue,
            () = stopped(&mut stopping) => break,
        };
        let Ok((stream, _)) = accepted else {
            // Out of descriptors, or the peer has gone: neither is helped by spinning.
            tokio::time::sleep(Duration::from_millis(50)).await;
            continue;
        };
        let peer = stream.peer_cred().ok().map(|peer| {
            let (uid, gid, pid) = (peer.uid(), peer.gid(), peer.pid());
            Peer { uid, gid, pid }
        });
        let router = peer.filter(|peer| allowed.admits(*peer)).map(|peer| match peer.is_owner() {
            true => routers.owner.clone(),
            false => routers.others.clone(),
        });
        let stopping = stopping.clone();
        connections.spawn(async move {
            let _place = place;
            if let Some(router) = router {
                serve(stream, router, stopping).await;
            } else {
                let _slow = tokio::time::timeout(REFUSAL, serve(stream, refusal(), stopping)).await;
            }
        });
    }
    drop(listener);
    let all = async { while connections.join_next().await.is_some() {} };
    let _rest_is_dropped = tokio::time::timeout(GRACE, all).await;
}

async fn serve(stream: UnixStream, router: Router, mut stopping: watch::Receiver<bool>) {
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new()).header_read_timeout(HEADERS);
    let service = TowerToHyperService::new(router);
    let connection = http.serve_connection(TokioIo::new(stream), service);
    tokio::pin!(connection);
    let result = tokio::select! {
        result = connection.as_mut() => result,
        () = stopped(&mut stopping) => {
            connection.as_mut().graceful_shutdown();
            connection.as_mut().await
        }
    };
    if let Err(error) = result {
        tracing::debug!(%error, "control connection ended");
    }
}

async fn stopped(stopping: &mut watch::Receiver<bool>) {
    let _sender_gone = stopping.wait_for(|stop| *stop).await;
}

/// What a peer that may not come in is told, whatever it asks.
fn refusal() -> Router {
    Router::new().fallback(|| async {
        let message = "this user may not use the control socket";
        let hint = "use root or the daemon's user, or name the uid or gid in its configuration";
        let answer = ApiError::new(StatusCode::FORBIDDEN, "forbidden", message, hint);
        ([("connection", "close")], answer)
    })
}
