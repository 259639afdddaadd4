//! Where readers are served, and the servers on threads of their own.
//!
//! Why: sockets come from the configuration or from a service manager, and are there before the images
//! are open; whoever has connected waits until they are.
//! How: all listen before any thread runs, so that one that cannot leaves none behind. A socket that
//! was passed is known by its name: `nbd`, `nbd-tcp`, `replica`, `control`.
//! Never: listens on a network without TLS or somebody's explicit choice.
//! Start at [`Places::find`] and [`Servers::start`].

use std::convert::Infallible;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;

use super::config::NbdSecurity;
use super::{Config, DaemonError};
use crate::control::Sockets;
use crate::peer::Allowed;
use crate::serve::activation::{Inherited, Kind, Passed};
use crate::serve::{Exports, ServeError, Stopper, nbd, replica};

/// Names of the sockets that a service manager may pass.
const NAMES: &str = "nbd, nbd-tcp, replica, control";

/// A path to listen at, or somebody's socket that listens there.
#[derive(Debug)]
pub(super) struct Place {
    pub(super) path: PathBuf,
    pub(super) passed: Option<Passed>,
}

/// Where everything listens.
#[derive(Debug)]
pub(super) struct Places {
    pub(super) control: Place,
    pub(super) readers: Readers,
}

/// Where readers come.
#[derive(Debug)]
pub(super) struct Readers {
    pub(super) nbd: Place,
    pub(super) replica: Place,
    tcp: Option<Tcp>,
}

impl Readers {
    /// Their paths, with those of VMs in `vms`.
    pub(super) fn sockets(&self, vms: PathBuf) -> Sockets {
        Sockets { nbd: self.nbd.path.clone(), replica: self.replica.path.clone(), vms }
    }
}

/// The server on a network.
#[derive(Debug)]
struct Tcp {
    at: At,
    security: nbd::Security,
}

#[derive(Debug)]
enum At {
    Address(SocketAddr),
    Passed(Passed),
}

impl Places {
    /// What the configuration says and what was passed, put together.
    ///
    /// # Errors
    /// [`DaemonError`] if they contradict each other, or TLS can't be had.
    pub(super) fn find(config: &Config, mut passed: Inherited) -> Result<Self, DaemonError> {
        let mut place = |name, key, kind, given: &Option<PathBuf>| {
            let Some(passed) = passed.named(name, kind)? else { return Ok(None) };
            Place::of(passed, key, given.as_deref()).map(Some)
        };
        let (stream, packets) = (Kind::UnixStream, Kind::UnixPackets);
        let control = place("control", "control_socket", stream, &config.control_socket)?;
        let nbd = place("nbd", "nbd_socket", stream, &config.nbd_socket)?;
        let replica = place("replica", "replica_socket", packets, &config.replica_socket)?;
        let tcp = passed.named("nbd-tcp", Kind::Tcp)?;
        passed.finish(NAMES)?;
        let or_made = |place: Option<Place>, path: &dyn Fn() -> Result<PathBuf, DaemonError>| {
            place.map_or_else(|| path().map(|path| Place { path, passed: None }), Ok)
        };
        let control = or_made(control, &|| config.control_socket())?;
        let readers = Readers {
            nbd: or_made(nbd, &|| config.nbd_socket())?,
            replica: or_made(replica, &|| config.replica_socket())?,
            tcp: Tcp::find(config, tcp)?,
        };
        Ok(Self { control, readers })
    }
}

impl Place {
    fn of(passed: Passed, key: &'static str, given: Option<&Path>) -> Result<Self, DaemonError> {
        let refuse = |rule| Err(DaemonError::BadSetting { key, rule });
        let Some(path) = passed.path().map(Path::to_owned) else {
            return refuse("the socket that was passed has no path to tell clients".to_owned());
        };
        if given.is_some_and(|given| given != path) {
            let passed = path.display();
            return refuse(format!("another socket was passed: {passed}; leave this out"));
        }
        Ok(Self { path, passed: Some(passed) })
    }
}

impl Tcp {
    fn find(config: &Config, passed: Option<Passed>) -> Result<Option<Self>, DaemonError> {
        let refuse = |key, rule: &str| Err(DaemonError::BadSetting { key, rule: rule.to_owned() });
        let at = match (config.nbd_tcp, passed) {
            (Some(_), Some(_)) => {
                return refuse("nbd_tcp", "a socket named nbd-tcp was passed; leave this out");
            }
            (Some(address), None) => At::Address(address),
            (None, Some(passed)) => At::Passed(passed),
            (None, None) => {
                return match config.nbd_security()? {
                    NbdSecurity::Unsaid => Ok(None),
                    NbdSecurity::Plain | NbdSecurity::Tls(_) => {
                        refuse("nbd_tcp", "give it: the other nbd_tcp and nbd_tls keys are for it")
                    }
                };
            }
        };
        let security = match config.nbd_security()? {
            NbdSecurity::Tls(files) => nbd::Security::Tls(nbd::Credentials::load(files)?),
            NbdSecurity::Plain => nbd::Security::Plain,
            NbdSecurity::Unsaid => {
                let rule = "needs nbd_tls_cert and nbd_tls_key (--tls-cert, --tls-key); or, to let \
                            anybody on the network read all images in plain text, \
                            nbd_tcp_plain = true (--plain)";
                return refuse("nbd_tcp", rule);
            }
        };
        Ok(Some(Self { at, security }))
    }

    fn listen(self, registry: Arc<Exports>) -> Result<nbd::Server, ServeError> {
        let (security, limits) = (self.security, nbd::Limits::default());
        match self.at {
            At::Address(address) => nbd::Server::bind_tcp(address, security, registry, limits),
            At::Passed(passed) => nbd::Server::on_passed_tcp(passed, security, registry, limits),
        }
    }
}

/// One for each server, held while it may not answer yet. Nothing is ever sent: its end is the sign.
pub(super) type Gates = Vec<mpsc::Sender<Infallible>>;

/// The servers of readers, each on a thread of its own.
pub(super) struct Servers {
    threads: Vec<ServerThread>,
    gates: Gates,
    /// Where the one over TCP listens.
    pub(super) tcp: Option<SocketAddr>,
}

/// A server on a thread of its own.
struct ServerThread {
    stopper: Stopper,
    thread: JoinHandle<()>,
}

impl Servers {
    /// Listens on all sockets. Nobody is answered before the gates
    /// are dropped.
    ///
    /// # Errors
    /// [`DaemonError`]; nothing listens then.
    pub(super) fn start(
        places: Readers,
        registry: &Arc<Exports>,
        config: &Config,
    ) -> Result<Self, DaemonError> {
        let Readers { nbd, replica, tcp } = places;
        let limits = nbd::Limits::default();
        let nbd = match nbd.passed {
            Some(passed) => nbd::Server::on_passed(passed, registry.clone(), limits),
            None => nbd::Server::bind(&nbd.path, registry.clone(), limits),
        }?;
        let allowed =
            Allowed { uids: config.replica_uids.clone(), gids: config.replica_gids.clone() };
        let limits = replica::Limits::default();
        let replica = match replica.passed {
            Some(passed) => replica::Server::on_passed(passed, registry.clone(), allowed, limits),
            None => replica::Server::bind(&replica.path, registry.clone(), allowed, limits),
        }?;
        let tcp = tcp.map(|tcp| tcp.listen(registry.clone())).transpose()?;
        let address = tcp.as_ref().and_then(nbd::Server::address);
        let mut servers = Self { threads: Vec::new(), gates: Vec::new(), tcp: address };
        servers.run("nbd", nbd.stopper(), move || nbd.run())?;
        servers.run("replica", replica.stopper(), move || replica.run())?;
        if let Some(tcp) = tcp {
            servers.run("nbd-tcp", tcp.stopper(), move || tcp.run())?;
        }
        Ok(servers)
    }

    fn run(
        &mut self,
        name: &'static str,
        stopper: Stopper,
        run: impl FnOnce() -> Result<(), ServeError> + Send + 'static,
    ) -> Result<(), DaemonError> {
        let (gate, opened) = mpsc::channel();
        let run = move || {
            let _opened = opened.recv();
            if let Err(error) = run() {
                let error = crate::fetch::one_line(&error);
                tracing::error!(%error, "the {name} server has ended");
            }
        };
        match std::thread::Builder::new().name(format!("{name}-accept")).spawn(run) {
            Ok(thread) => self.threads.push(ServerThread { stopper, thread }),
            Err(source) => {
                // They serve nobody yet, and end by themselves when their gates go.
                self.threads.iter().for_each(|thread| thread.stopper.stop());
                return Err(DaemonError::Thread { source });
            }
        }
        self.gates.push(gate);
        Ok(())
    }

    /// What holds the servers back: they answer who has connected when it is dropped.
    pub(super) fn take_gates(&mut self) -> Gates {
        std::mem::take(&mut self.gates)
    }

    /// Stops them all, and waits until their sessions have ended.
    pub(super) async fn stop(self) {
        drop(self.gates);
        self.threads.iter().for_each(|thread| thread.stopper.stop());
        for ServerThread { thread, .. } in self.threads {
            let _panicked = tokio::task::spawn_blocking(move || thread.join()).await;
        }
    }
}
