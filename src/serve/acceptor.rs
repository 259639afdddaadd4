//! Accepting connections, one thread for each, and stopping them all; for any protocol.
//!
//! Why: a blocking thread a connection is the fastest way measured, and isolates for free: a
//! client that stops reading holds up its own thread and nobody else's.
//! How: `run` polls the listener and an eventfd; threads report their end, and are joined at the
//! next accept. A stop ends the clients' requests, waits for the answers, then hangs up.
//! Never: spins on a full descriptor table, or leaves a thread behind.
//! Start at [`Acceptor::new`] and [`Acceptor::run`].

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::os::fd::OwnedFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use rustix::net::SocketFlags;

use super::listener::Listener;
use super::{ServeError, Socket};

/// Enough for a session, whose buffers are all on the heap; only touched pages cost memory.
const STACK_BYTES: usize = 512 << 10;
/// How long accepting rests when the process is out of descriptors or memory.
const REST: Duration = Duration::from_millis(100);

/// A listening server that does not run yet.
#[derive(Debug)]
pub(super) struct Acceptor {
    listener: Listener,
    /// Of the threads, with a number.
    name: &'static str,
    /// Open connections; the next one is closed as soon as it is accepted.
    connections: usize,
    /// As many of them may be of one host of a network.
    per_host: usize,
    /// Time that sessions get to answer what was asked when the server stops.
    farewell: Duration,
    shared: Arc<Shared>,
}

/// Stops a server, from any thread.
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

    fn of_host(&self, wanted: IpAddr) -> usize {
        let peers = self.sockets().filter_map(Socket::peer);
        peers.filter(|peer| host(*peer) == wanted).count()
    }
}

/// Whose address it is: of IPv6 a host has a whole network of 64 bits to choose from.
fn host(peer: SocketAddr) -> IpAddr {
    match peer.ip().to_canonical() {
        IpAddr::V6(address) => {
            let mut segments = address.segments();
            segments[4..].fill(0);
            IpAddr::V6(Ipv6Addr::from(segments))
        }
        v4 @ IpAddr::V4(_) => v4,
    }
}

impl Acceptor {
    /// Will accept on `listener`.
    ///
    /// # Errors
    /// [`ServeError::Resources`]: the process is out of descriptors.
    pub(super) fn new(
        listener: Listener,
        name: &'static str,
        connections: usize,
        farewell: Duration,
    ) -> Result<Self, ServeError> {
        let stop =
            rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).map_err(
                |errno| ServeError::Resources { op: "make an eventfd", source: errno.into() },
            )?;
        let shared = Shared { stop, table: Mutex::default(), one_finished: Condvar::new() };
        let (per_host, shared) = (connections, Arc::new(shared));
        Ok(Self { listener, name, connections, per_host, farewell, shared })
    }

    /// Lets one host of a network have no more than so many of the connections.
    pub(super) fn with_per_host(self, per_host: usize) -> Self {
        Self { per_host, ..self }
    }

    /// Where it listens, if that is a path.
    pub(super) fn path(&self) -> Option<&Path> {
        self.listener.path()
    }

    /// Where it listens, if that is an address of a network.
    pub(super) fn address(&self) -> Option<SocketAddr> {
        self.listener.address()
    }

    /// A handle that stops this server.
    pub(super) fn stopper(&self) -> Stopper {
        Stopper(Arc::clone(&self.shared))
    }

    /// Serves until stopped, each connection by `session` on a thread of its own; then removes its
    /// socket, lets sessions answer what they were asked, hangs up, and returns when the last thread
    /// has ended.
    ///
    /// # Errors
    /// [`ServeError::Resources`] if the listener cannot be waited for; everything is stopped then.
    pub(super) fn run<S>(self, session: S) -> Result<(), ServeError>
    where
        S: Fn(u64, Socket) + Clone + Send + 'static,
    {
        self.run_greeting(|_| (), move |id, socket, ()| session(id, socket))
    }

    /// As [`run`](Self::run); `greet` does what is done at once with each connection, on this thread: it
    /// must not wait for the peer. Making a thread takes as long as answering a question.
    ///
    /// # Errors
    /// As [`run`](Self::run).
    pub(super) fn run_greeting<G, S>(
        self,
        greet: impl Fn(&Socket) -> G,
        session: S,
    ) -> Result<(), ServeError>
    where
        G: Send + 'static,
        S: Fn(u64, Socket, G) + Clone + Send + 'static,
    {
        let result = self.accept_until_stopped(&greet, &session);
        let Self { listener, farewell, shared, .. } = self;
        // From here on, connecting is refused.
        drop(listener);
        shared.end_sessions(farewell);
        result
    }

    fn accept_until_stopped<G, S>(
        &self,
        greet: &impl Fn(&Socket) -> G,
        session: &S,
    ) -> Result<(), ServeError>
    where
        G: Send + 'static,
        S: Fn(u64, Socket, G) + Clone + Send + 'static,
    {
        let mut rest = None;
        loop {
            if self.wait(rest.take())? {
                return Ok(());
            }
            match rustix::net::acceptfrom_with(&self.listener.fd, SocketFlags::CLOEXEC) {
                Ok((fd, peer)) => {
                    // A peer on a Unix socket has no such address.
                    let peer = peer.and_then(|peer| SocketAddr::try_from(peer).ok());
                    self.welcome(Socket::with_peer(fd, peer), greet, session);
                }
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

    fn welcome<G, S>(&self, socket: Socket, greet: &impl Fn(&Socket) -> G, session: &S)
    where
        G: Send + 'static,
        S: Fn(u64, Socket, G) + Clone + Send + 'static,
    {
        if !self.has_room(&socket) {
            return;
        }
        let Ok(greeted) = catch_unwind(AssertUnwindSafe(|| greet(&socket))) else {
            tracing::error!("a greeting panicked; its connection was closed");
            return;
        };
        let mut table = self.shared.table();
        let id = table.next_id;
        table.next_id += 1;
        // The thread's first act is to take the table's lock, so it finds itself entered.
        match self.spawn(id, socket.clone(), greeted, session.clone()) {
            Ok(thread) => {
                table.open.insert(id, Connection { socket: Some(socket), thread });
            }
            Err(error) => tracing::error!(%error, "connection refused: no thread for it"),
        }
    }

    fn has_room(&self, socket: &Socket) -> bool {
        let table = self.shared.table();
        let open = table.open.len() - table.finished.len();
        if open >= self.connections {
            tracing::warn!(
                limit = self.connections,
                server = self.name,
                "connection refused: too many are open"
            );
            return false;
        }
        if let Some(host) = socket.peer().map(host)
            && table.of_host(host) >= self.per_host
        {
            let (limit, server) = (self.per_host, self.name);
            tracing::warn!(limit, server, %host, "connection refused: this host has too many open");
            return false;
        }
        true
    }

    fn spawn<G, S>(
        &self,
        id: u64,
        socket: Socket,
        greeted: G,
        session: S,
    ) -> std::io::Result<JoinHandle<()>>
    where
        G: Send + 'static,
        S: Fn(u64, Socket, G) + Send + 'static,
    {
        let (shared, name) = (Arc::clone(&self.shared), format!("{}-{id}", self.name));
        std::thread::Builder::new().name(name).stack_size(STACK_BYTES).spawn(move || {
            let _reports_the_end = Finish { shared, id };
            session(id, socket, greeted);
        })
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
    /// Makes the server's `run` return soon. Does not wait for it.
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
            tracing::error!("a session panicked; its connection was closed");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_is_an_address_of_ipv4_or_a_network_of_ipv6() {
        let same =
            |one: &str, other: &str| host(one.parse().unwrap()) == host(other.parse().unwrap());
        assert!(same("10.0.0.1:5", "10.0.0.1:6"));
        assert!(!same("10.0.0.1:5", "10.0.0.2:5"));
        assert!(same("[::ffff:10.0.0.1]:5", "10.0.0.1:5"));
        assert!(same("[2001:db8:1:2:3::4]:5", "[2001:db8:1:2:5:6:7:8]:5"));
        assert!(!same("[2001:db8:1:2::4]:5", "[2001:db8:1:3::4]:5"));
    }
}
