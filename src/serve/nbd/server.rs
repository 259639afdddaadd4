//! Accepting connections, one thread for each, and stopping them all.
//!
//! Why: a blocking thread a connection is the fastest way measured, and isolates for free: a
//! client that stops reading holds up its own thread and nobody else's.
//! How: `run` polls the listener and an eventfd; threads report their end, and are joined at the
//! next accept. A stop ends the clients' requests, waits for the answers, then hangs up.
//! Never: spins on a full descriptor table, or leaves a thread behind.
//! Start at [`Server::bind`] and [`Server::run`].

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use rustix::net::{SocketFlags, SocketType};

use super::listener::Listener;
use super::session::{End, serve};
use super::{Limits, Socket, activation};
use crate::serve::{Exports, ServeError};

/// Enough for a session, whose buffers are all on the heap; only touched pages cost memory.
const STACK_BYTES: usize = 512 << 10;
/// Wanted send buffer of a connection in bytes. Larger ones fall out of the cache before the peer
/// reads them: 8.9 GB/s of 256 KiB reads by two clients, against 7.9 at 1 MiB.
const SEND_BUFFER_BYTES: usize = 256 << 10;
/// How long accepting rests when the process is out of descriptors or memory.
const REST: Duration = Duration::from_millis(100);

/// A listening NBD server that does not run yet.
#[derive(Debug)]
pub struct Server {
    listener: Listener,
    exports: Arc<Exports>,
    limits: Limits,
    shared: Arc<Shared>,
}

/// Stops a [`Server`], from any thread.
#[derive(Clone, Debug)]
pub struct Stopper(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    /// Readable once the server is to stop.
    stop: OwnedFd,
    table: Mutex<Table>,
    one_finished: Condvar,
}

#[derive(Debug, Default)]
struct Table {
    next_id: u64,
    open: BTreeMap<u64, Connection>,
    /// Ids whose threads have nothing left to do but end.
    finished: Vec<u64>,
}

#[derive(Debug)]
struct Connection {
    /// To end it; gone as soon as the thread has nothing more to say, which closes it.
    socket: Option<Socket>,
    thread: JoinHandle<()>,
}

impl Table {
    fn sockets(&self) -> impl Iterator<Item = &Socket> {
        self.open.values().filter_map(|connection| connection.socket.as_ref())
    }
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
        let stop =
            rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).map_err(
                |errno| ServeError::Resources { op: "make an eventfd", source: errno.into() },
            )?;
        let shared = Shared { stop, table: Mutex::default(), one_finished: Condvar::new() };
        Ok(Self { listener, exports, limits, shared: Arc::new(shared) })
    }

    /// Where it listens; `None` for an inherited socket.
    #[must_use]
    pub fn path(&self) -> Option<&Path> {
        self.listener.path()
    }

    /// A handle that stops this server.
    #[must_use]
    pub fn stopper(&self) -> Stopper {
        Stopper(Arc::clone(&self.shared))
    }

    /// Serves until stopped; then removes its socket, lets sessions answer what they were asked
    /// for [`Limits::farewell`], hangs up, and returns when the last thread has ended.
    ///
    /// # Errors
    /// [`ServeError::Resources`] if the listener cannot be waited for; everything is stopped then.
    pub fn run(self) -> Result<(), ServeError> {
        let result = self.accept_until_stopped();
        let Self { listener, exports: _, limits, shared } = self;
        // From here on, connecting is refused.
        drop(listener);
        shared.end_sessions(limits.farewell);
        result
    }

    fn accept_until_stopped(&self) -> Result<(), ServeError> {
        let mut rest = None;
        loop {
            if self.wait(rest.take())? {
                return Ok(());
            }
            match rustix::net::accept_with(&self.listener.fd, SocketFlags::CLOEXEC) {
                Ok(fd) => self.welcome(fd),
                Err(Errno::AGAIN | Errno::INTR | Errno::CONNABORTED) => {}
                Err(errno) => {
                    tracing::error!(error = %errno, "cannot accept a connection; trying again");
                    rest = Some(REST);
                }
            }
            self.shared.join_finished();
        }
    }

    /// Waits for a client, or only for a stop if `rest` is given; true for a stop.
    fn wait(&self, rest: Option<Duration>) -> Result<bool, ServeError> {
        let stop = PollFd::new(&self.shared.stop, PollFlags::IN);
        let client = PollFd::new(&self.listener.fd, PollFlags::IN);
        let mut both = [stop, client];
        let fds = if rest.is_some() { &mut both[..1] } else { &mut both[..] };
        let timeout = rest.and_then(|rest| Timespec::try_from(rest).ok());
        match rustix::event::poll(fds, timeout.as_ref()) {
            Ok(_) => Ok(both[0].revents().contains(PollFlags::IN)),
            Err(Errno::INTR) => Ok(false),
            Err(errno) => Err(ServeError::Resources { op: "poll", source: errno.into() }),
        }
    }

    fn welcome(&self, fd: OwnedFd) {
        let socket = Socket::new(fd);
        let mut table = self.shared.table();
        let open = table.open.len() - table.finished.len();
        if open >= self.limits.connections {
            tracing::warn!(
                limit = self.limits.connections,
                "connection refused: too many are open"
            );
            return;
        }
        let id = table.next_id;
        table.next_id += 1;
        // The thread's first act is to take the table's lock, so it finds itself entered.
        match self.spawn(id, socket.clone()) {
            Ok(thread) => {
                table.open.insert(id, Connection { socket: Some(socket), thread });
            }
            Err(error) => tracing::error!(%error, "connection refused: no thread for it"),
        }
    }

    fn spawn(&self, id: u64, socket: Socket) -> std::io::Result<JoinHandle<()>> {
        let (shared, exports) = (Arc::clone(&self.shared), Arc::clone(&self.exports));
        let limits = self.limits;
        std::thread::Builder::new().name(format!("nbd-{id}")).stack_size(STACK_BYTES).spawn(
            move || {
                let _reports_the_end = Finish { shared, id };
                let mut transport = socket.clone();
                socket.ask_send_buffer(SEND_BUFFER_BYTES);
                let end = serve(&mut transport, Some(socket), &exports, &limits);
                log_end(id, &end);
            },
        )
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

/// Reports a thread's end, also that of a panic.
struct Finish {
    shared: Arc<Shared>,
    id: u64,
}

impl Drop for Finish {
    fn drop(&mut self) {
        let mut table = self.shared.table();
        if let Some(connection) = table.open.get_mut(&self.id) {
            connection.socket = None;
        }
        table.finished.push(self.id);
        drop(table);
        self.shared.one_finished.notify_all();
    }
}

impl Stopper {
    /// Makes [`Server::run`] return soon. Does not wait for it.
    pub fn stop(&self) {
        if let Err(error) = rustix::io::write(&self.0.stop, &1u64.to_ne_bytes()) {
            tracing::error!(%error, "cannot wake the server up");
        }
    }

    /// How many connections are open, those in the handshake included.
    #[must_use]
    pub fn connections(&self) -> usize {
        let table = self.0.table();
        table.open.len() - table.finished.len()
    }
}

impl Shared {
    fn table(&self) -> MutexGuard<'_, Table> {
        // A panic cannot leave the table half changed: each change is one insert or remove.
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn join_finished(&self) {
        let mut table = self.table();
        let finished = std::mem::take(&mut table.finished);
        let ended: Vec<_> = finished.iter().filter_map(|id| table.open.remove(id)).collect();
        drop(table);
        ended.into_iter().for_each(Connection::join);
    }

    fn end_sessions(&self, farewell: Duration) {
        let deadline = Instant::now() + farewell;
        let mut table = self.table();
        table.sockets().for_each(Socket::stop_receiving);
        while table.finished.len() < table.open.len() {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            let waited = self.one_finished.wait_timeout(table, left);
            table = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        table.sockets().for_each(Socket::hang_up);
        let open = std::mem::take(&mut table.open);
        table.finished.clear();
        drop(table);
        open.into_values().for_each(Connection::join);
        self.table().finished.clear();
    }
}

impl Connection {
    fn join(self) {
        if self.thread.join().is_err() {
            tracing::error!("an NBD session panicked; its connection was closed");
        }
    }
}
