//! One process that serves a node: configuration, wiring, listeners, signals, and the end.
//!
//! Why: rooms that know nothing of each other are put together in one place.
//! How: [`Daemon::start`] takes a [`Config`] and a [`Backend`], opens the catalog on the first
//! disk, starts the NBD server, the manager and the control socket, in this order; readers are let in
//! once the images are open; the handle ends all of it in the reverse order, so that what is durable
//! is kept and nobody talks to a closed room.
//! Never: decides what an image needs.
//! Start at [`Daemon::start`].

mod config;
pub mod doctor;
mod error;
mod exports;
pub mod logging;
mod servers;
mod sockets;
mod vms;

use std::collections::HashSet;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::sync::watch;

use crate::catalog::{Catalog, CatalogError, Embedded, Kind, list_as};
use crate::control::server::BindError;
use crate::control::{App, AppParts, HttpCounters, Served, Sockets, server};
use crate::image::DecodedCache;
use crate::manager::{Backend, DiskRecord, Manager, Node};
use crate::names::{DiskUuid, ImageName};
use crate::peer::Allowed;
use crate::serve::activation::Inherited;
use crate::serve::{self, Exports, KEEP_INTERVAL, Recordings, Via};

use servers::{Gates, Place, Places, Servers};

pub use config::{Config, ConfigError};
pub use error::DaemonError;
pub use sockets::{SUN_PATH_MAX, default_socket, private_socket_dir, state_dir};

/// Name of the control socket in a disk's `bedplate` directory.
pub const CONTROL_SOCKET: &str = "control.sock";
/// Name of the NBD socket there.
pub const NBD_SOCKET: &str = "nbd.sock";
/// Name of the socket that readers attach at, there.
pub const REPLICA_SOCKET: &str = "replica.sock";
/// Name of the catalog there.
pub const CATALOG: &str = "catalog.redb";

/// Name of the directory with the traces that are being recorded, there.
pub const TRACES: &str = "traces";

/// How long readers are kept waiting at the start while images are opened.
const SETTLE: Duration = Duration::from_secs(10);
/// When the engine ends, sessions are hung up after their farewell; then those are ended that wait
/// for bytes which are still to come.
const DISMISS_AFTER: Duration = Duration::from_secs(3);

/// Starts daemons.
#[derive(Debug)]
pub struct Daemon;

/// A running daemon. Dropping it ends nothing in order; call [`DaemonHandle::shutdown`].
pub struct DaemonHandle {
    control: server::Server,
    backend: Arc<dyn Backend>,
    manager: Manager,
    exporter: Arc<exports::NodeExports>,
    servers: Servers,
    sockets: Sockets,
    closing: watch::Sender<bool>,
    /// Lets readers in, when it is time.
    opening: tokio::task::JoinHandle<()>,
    keeping: Keeping,
}

impl Daemon {
    /// Opens and locks the disks of `config`: the backend of a real daemon. A directory that isn't
    /// a disk yet becomes one. Blocks.
    ///
    /// # Errors
    /// [`DaemonError`]; no disk stays locked then.
    pub fn open_node(config: &Config) -> Result<Arc<dyn Backend>, DaemonError> {
        let mut options = config.node_options()?;
        options.known = Self::known_disks(config)?;
        Ok(Arc::new(Node::open(&options)?))
    }

    /// The disks that the daemon of `config` had when it last ran, and where. Blocks.
    ///
    /// # Errors
    /// [`DaemonError`] if its catalog is there and can't be read.
    pub fn known_disks(config: &Config) -> Result<Vec<(DiskUuid, PathBuf)>, DaemonError> {
        let path = state_dir(config.disks.first().ok_or(DaemonError::NoDisk)?).join(CATALOG);
        if !path.exists() {
            return Ok(Vec::new());
        }
        let records = Embedded::open(&path).and_then(|catalog| list_as(&catalog, Kind::Disk));
        match records {
            Ok(records) => {
                let records: Vec<(DiskRecord, _)> = records;
                Ok(records.into_iter().map(|(record, _)| (record.uuid, record.path)).collect())
            }
            // Who has it has the disks too, and they say so better.
            Err(CatalogError::Locked { .. }) => Ok(Vec::new()),
            Err(error) => Err(error.into()),
        }
    }

    /// Starts everything; when it returns, the control socket answers, and readers who connect are
    /// answered as soon as the images that are complete are open.
    ///
    /// # Errors
    /// [`DaemonError`]; what was started is stopped again.
    pub async fn start(
        config: &Config,
        backend: Arc<dyn Backend>,
    ) -> Result<DaemonHandle, DaemonError> {
        Self::start_on(config, backend, Inherited::default()).await
    }

    /// As [`start`](Self::start), on the sockets that a service manager passed, as far as it did.
    ///
    /// # Errors
    /// As [`start`](Self::start).
    pub async fn start_on(
        config: &Config,
        backend: Arc<dyn Backend>,
        passed: Inherited,
    ) -> Result<DaemonHandle, DaemonError> {
        let first = config.disks.first().ok_or(DaemonError::NoDisk)?;
        prepare_process(config);
        let settings = config.settings()?;
        let Places { control, readers } = Places::find(config, passed)?;
        let sockets = readers.sockets(config.vm_sockets()?);
        let vms = vms::Vms::new(sockets.clone(), config.vm_gid, config.vm_limits()?);
        let catalog: Arc<dyn Catalog> = Arc::new(open_catalog(first).await?);

        let registry = Arc::new(serve::Exports::new());
        let recordings = open_recordings(first).await?;
        let mut servers = Servers::start(readers, &registry, config)?;
        let exporter = exports::NodeExports::new(
            backend.clone(),
            &registry,
            config,
            vms,
            Arc::clone(&recordings),
        );
        let exporter = Arc::new(exporter);
        let manager =
            match Manager::start(catalog, backend.clone(), exporter.clone(), settings).await {
                Ok(manager) => manager,
                Err(error) => {
                    stop_readers(exporter, servers).await;
                    return Err(error.into());
                }
            };

        clean(&manager, &recordings).await;
        let (closing, watch_closing) = watch::channel(false);
        let (catalog_at, shown) = (first.clone(), Arc::clone(&registry));
        let disks = backend.clone();
        let app = App::new(AppParts {
            manager: manager.clone(),
            backend: backend.clone(),
            sockets: sockets.clone(),
            doctor: Box::new(move || doctor::of_running_daemon(&catalog_at, &disks.disks())),
            readers: Arc::clone(&registry),
            recordings: Arc::clone(&recordings),
            served: Box::new(move |name| served(&shown, name)),
            closing: watch_closing,
            http: HttpCounters::default(),
        });
        let control_socket = control.path.clone();
        let control = match listen(control, app, config).await {
            Ok(control) => control,
            Err(error) => {
                manager.stop().await;
                stop_readers(exporter, servers).await;
                return Err(error.into());
            }
        };
        let opening = tokio::spawn(let_in(manager.clone(), servers.take_gates()));
        tracing::info!(
            control = %control_socket.display(), nbd = %sockets.nbd.display(),
            replica = %sockets.replica.display(), "daemon is ready"
        );
        let keeping = Keeping::start(recordings, registry);
        Ok(DaemonHandle {
            control,
            backend,
            manager,
            exporter,
            servers,
            sockets,
            closing,
            opening,
            keeping,
        })
    }
}

/// Who comes back to an engine that was started anew must find its image there.
async fn let_in(manager: Manager, gates: Gates) {
    manager.settled(SETTLE).await;
    drop(gates);
}

impl DaemonHandle {
    /// Where the control socket is.
    #[must_use]
    pub fn control_socket(&self) -> &Path {
        self.control.path()
    }

    /// Where the NBD socket is.
    #[must_use]
    pub fn nbd_socket(&self) -> &Path {
        &self.sockets.nbd
    }

    /// Where NBD is served over TCP, if it is.
    #[must_use]
    pub fn nbd_address(&self) -> Option<SocketAddr> {
        self.servers.tcp
    }

    /// Where readers attach.
    #[must_use]
    pub fn replica_socket(&self) -> &Path {
        &self.sockets.replica
    }

    /// Ends it in order: no new commands; workers stop and what they have is durable; sessions
    /// are served what they asked for and hung up; the catalog is closed.
    pub async fn shutdown(self) {
        self.opening.abort();
        self.keeping.end().await;
        self.closing.send_replace(true);
        self.control.shutdown().await;
        let (manager, vms) = (&self.manager, leave_vms(self.exporter));
        let stop = async { tokio::join!(manager.stop(), vms, self.servers.stop()) };
        tokio::pin!(stop);
        tokio::select! {
            _all = &mut stop => {}
            // Hung up by now; only who waits for bytes to come has not heard of it.
            () = tokio::time::sleep(DISMISS_AFTER) => {
                self.backend.dismiss_readers("the engine is stopping; read again when it is back");
                let _all = stop.await;
            }
        }
        tracing::info!("daemon has ended");
    }
}

/// What holds for the whole process.
fn prepare_process(config: &Config) {
    if let Some(bytes) = config.decoded_cache
        && !DecodedCache::set_process_capacity(bytes)
    {
        tracing::warn!(bytes, "decoded_cache: in use already; as it was set first");
    }
    raise_descriptor_limit();
}

/// Ends what readers are served by, of a daemon that does not start.
async fn stop_readers(exporter: Arc<exports::NodeExports>, servers: Servers) {
    leave_vms(exporter).await;
    servers.stop().await;
}

async fn leave_vms(exporter: Arc<exports::NodeExports>) {
    let _panicked = tokio::task::spawn_blocking(move || exporter.leave_vms()).await;
}

/// An image that is open takes some descriptors, and each reader one; the usual soft limit is for
/// programs that use select.
fn raise_descriptor_limit() {
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit { current: limit.maximum, maximum: limit.maximum };
    if let Err(error) = setrlimit(Resource::Nofile, raised) {
        tracing::warn!(%error, soft = limit.current, "the limit of descriptors stays as it is");
    }
}

/// Opens the catalog of the daemon whose first disk is `disk`; makes its directory.
async fn open_catalog(disk: &Path) -> Result<Embedded, DaemonError> {
    let dir = state_dir(disk);
    let open = move || {
        std::fs::create_dir_all(&dir)
            .map_err(|source| DaemonError::Directory { path: dir.clone(), source })?;
        Ok(Embedded::open(&dir.join(CATALOG))?)
    };
    match tokio::task::spawn_blocking(open).await {
        Ok(result) => result,
        Err(error) => std::panic::resume_unwind(error.into_panic()),
    }
}

/// Starts to listen for commands.
async fn listen(place: Place, app: App, config: &Config) -> Result<server::Server, BindError> {
    let allowed = Allowed { uids: config.control_uids.clone(), gids: config.control_gids.clone() };
    match place.passed {
        Some(socket) => server::Server::on_passed(socket, &place.path, app, allowed),
        None => server::Server::bind(&place.path, app, allowed).await,
    }
}

/// The recordings of the daemon whose first disk is `disk`.
async fn open_recordings(disk: &Path) -> Result<Arc<Recordings>, DaemonError> {
    let path = state_dir(disk).join(TRACES);
    let open = move || Recordings::open(&path).map(Arc::new).map_err(DaemonError::Recordings);
    let opened = tokio::task::spawn_blocking(open).await;
    opened.unwrap_or_else(|error| std::panic::resume_unwind(error.into_panic()))
}

/// Takes the recordings away of images that have gone while nobody was there.
async fn clean(manager: &Manager, recordings: &Arc<Recordings>) {
    let names = manager.read(|world| {
        let images = world.images().into_iter();
        images.map(|image| image.record.name.to_string()).collect::<HashSet<_>>()
    });
    let Ok(names) = names.await else { return };
    let recordings = Arc::clone(recordings);
    let clean = move || recordings.clean(|name| names.contains(name));
    let _panicked = tokio::task::spawn_blocking(clean).await;
}

/// Keeps the traces that are recorded, every few seconds.
struct Keeping {
    recordings: Arc<Recordings>,
    registry: Arc<Exports>,
    task: tokio::task::JoinHandle<()>,
}

impl Keeping {
    fn start(recordings: Arc<Recordings>, registry: Arc<Exports>) -> Self {
        let (kept, exports) = (Arc::clone(&recordings), Arc::clone(&registry));
        let task = tokio::spawn(async move {
            loop {
                tokio::time::sleep(KEEP_INTERVAL).await;
                keep(&kept, &exports).await;
            }
        });
        Self { recordings, registry, task }
    }

    /// While all that is open still is; what is read from now on is little.
    async fn end(&self) {
        self.task.abort();
        keep(&self.recordings, &self.registry).await;
    }
}

async fn keep(recordings: &Arc<Recordings>, registry: &Arc<Exports>) {
    let (recordings, registry) = (Arc::clone(recordings), Arc::clone(registry));
    let _panicked = tokio::task::spawn_blocking(move || recordings.keep_all(&registry)).await;
}

/// What the readers of an image's export did so far.
fn served(exports: &Exports, name: &ImageName) -> Served {
    let Some(export) = exports.get(name.as_str()) else { return Served::default() };
    let times = Via::ALL.map(|via| (via, export.latency().times(via)));
    Served {
        sessions: exports.in_use(name.as_str()),
        counters: export.counters().values(),
        times: times.into_iter().filter(|(_, times)| times.count() > 0).collect(),
        waits: export.view().waits(),
    }
}
