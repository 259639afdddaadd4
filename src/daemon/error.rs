//! Why a daemon doesn't start.

use std::io;
use std::path::PathBuf;

use crate::catalog::CatalogError;
use crate::control::server::BindError;
use crate::disk::DiskError;
use crate::manager::NodeError;
use crate::serve::ServeError;

/// Why a daemon doesn't start. The message prints every field.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "each field is named in the message above it")]
pub enum DaemonError {
    /// Nothing to keep copies on.
    #[error("no disk is given; add `disks = [\"/path\"]` to the configuration, or --disk DIR")]
    NoDisk,
    /// The daemon's directory on the first disk can't be made.
    #[error("{}: cannot make the directory", path.display())]
    Directory {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    /// The directory for sockets is not ours alone.
    #[error("{}: {fault}; remove it, or give the sockets' paths", path.display())]
    SocketDirectory { path: PathBuf, fault: &'static str },
    /// A socket's path that the kernel can't take.
    #[error("{}: a socket's path has at most {} bytes; give a shorter one",
        path.display(), super::SUN_PATH_MAX)]
    SocketPath { path: PathBuf },
    /// The directory for recordings can't be made.
    #[error(transparent)]
    Recordings(DiskError),
    /// A setting that can't be.
    #[error("{key}: {rule}")]
    BadSetting { key: &'static str, rule: String },
    /// A disk can't be opened.
    #[error(transparent)]
    Node(#[from] NodeError),
    /// No thread for the NBD server.
    #[error("cannot start a thread")]
    Thread {
        #[source]
        source: io::Error,
    },
    /// The catalog can't be opened or read.
    #[error(transparent)]
    Catalog(#[from] CatalogError),
    /// The control socket can't be used.
    #[error(transparent)]
    Control(#[from] BindError),
    /// The NBD socket can't be used.
    #[error(transparent)]
    Nbd(#[from] ServeError),
}

impl DaemonError {
    /// True if another daemon holds what this one needs, or the fault may pass: try again.
    #[must_use]
    pub fn may_retry(&self) -> bool {
        match self {
            Self::Node(NodeError::Disk(DiskError::Locked { .. }))
            | Self::Catalog(CatalogError::Locked { .. })
            | Self::Control(BindError::InUse { .. })
            | Self::Nbd(ServeError::Live { .. } | ServeError::Address { .. })
            | Self::Thread { .. } => true,
            Self::NoDisk
            | Self::Directory { .. }
            | Self::Recordings(_)
            | Self::SocketDirectory { .. }
            | Self::SocketPath { .. }
            | Self::BadSetting { .. }
            | Self::Node(_)
            | Self::Catalog(_)
            | Self::Control(_)
            | Self::Nbd(_) => false,
        }
    }
}
