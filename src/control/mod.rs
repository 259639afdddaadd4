//! The control socket: HTTP/1.1 and JSON on a Unix socket; the only way in for commands.
//!
//! Why: one door, versioned (`/v1`), that `curl --unix-socket` opens as well as our own CLI does.
//! How: one table of routes ([`routes`]), thin handlers that ask the manager, wire types of their
//! own ([`types`]) in which no credential fits, and an event stream that begins with everything as
//! it is. Who may come in is decided by the kernel's word on the peer ([`crate::peer`]).
//! Never: does I/O on images; prints or sends a credential; lets a slow peer hold up another.
//! Start at [`routes::table`], then [`server::Server`]; `openapi.json` describes all of it.

mod apply;
mod body;
pub mod client;
mod disks;
mod error;
mod events;
mod handlers;
pub mod inspection;
mod metrics;
mod origin;
pub mod routes;
pub mod server;
pub mod settings;
mod stats;
mod traces;
pub mod types;
pub mod types_attachment;
mod types_create;
pub mod types_disk;
pub mod types_health;
pub mod types_stats;
pub mod types_trace;
pub mod types_volume;
mod upload;
pub mod upload_client;
mod volumes;
mod wire;
mod wire_volume;

use std::sync::Arc;

use tokio::sync::watch;

use crate::image::Waits;
use crate::manager::{AttachmentId, Backend, Manager};
use crate::serve::{CounterValues, Exports, Recordings, Times, Via};
pub use metrics::HttpCounters;
pub use wire::{nbd_tcp_uri, nbd_uri, rfc3339};

/// What the handlers work with. Cheap to clone.
#[derive(Clone)]
pub struct App(Arc<AppParts>);

/// The parts of an [`App`].
pub struct AppParts {
    /// Decides and knows.
    pub manager: Manager,
    /// For the disks, as they are now.
    pub backend: Arc<dyn Backend>,
    /// Where readers are served.
    pub sockets: Sockets,
    /// Looks at the host and the daemon; may block.
    pub doctor: Box<dyn Fn() -> Vec<types::Check> + Send + Sync>,
    /// What is served, to trace its readers.
    pub readers: Arc<Exports>,
    /// The traces that are recorded.
    pub recordings: Arc<Recordings>,
    /// What an image's export has served; zeroes if it is not exported.
    pub served: Box<dyn Fn(&crate::names::ImageName) -> Served + Send + Sync>,
    /// True once the daemon shuts down: streams end.
    pub closing: watch::Receiver<bool>,
    /// Counts of answers.
    pub http: HttpCounters,
}

/// Where readers are served.
#[derive(Clone, Debug)]
pub struct Sockets {
    /// The socket of the NBD server.
    pub nbd: std::path::PathBuf,
    /// The socket at which programs attach that read by themselves.
    pub replica: std::path::PathBuf,
    /// The directory with a socket for each VM.
    pub vms: std::path::PathBuf,
}

impl Sockets {
    /// The socket of the VM with this attachment.
    #[must_use]
    pub fn vm(&self, id: &AttachmentId) -> std::path::PathBuf {
        self.vms.join(format!("vm-{id}.sock"))
    }
}

/// What readers did with one export, for `/metrics`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Served {
    /// Sessions that are open now.
    pub sessions: usize,
    /// What they were sent so far.
    pub counters: CounterValues,
    /// How long they waited, by how they asked; those who never did are left out.
    pub times: Vec<(Via, Times)>,
    /// How often they waited for what was still to come.
    pub waits: Waits,
}

impl App {
    /// Wraps the parts.
    #[must_use]
    pub fn new(parts: AppParts) -> Self {
        Self(Arc::new(parts))
    }
}

impl std::ops::Deref for App {
    type Target = AppParts;
    fn deref(&self) -> &AppParts {
        &self.0
    }
}
