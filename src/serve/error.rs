//! Why serving was refused or failed: what, where, and what to do.

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;

/// Why an export or a server is refused, or failed. The message prints every field.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "each field is named in the message above it")]
pub enum ServeError {
    /// The name breaks the rules of the protocol for strings.
    #[error("export {name:?}: {rule}")]
    BadName { name: String, rule: &'static str },
    /// Two exports cannot have one name.
    #[error("export {name:?} is there already; remove it first")]
    Exists { name: String },
    /// There is no such export.
    #[error("no export is named {name:?}")]
    Unknown { name: String },
    /// Sessions still read it.
    #[error("export {name:?} has {connections} open connections; close them, or wait")]
    InUse { name: String, connections: usize },
    /// The address of a Unix socket has room for 107 bytes.
    #[error("{}: a socket path has at most {max_bytes} bytes, this one {len_bytes}; choose a shorter one", path.display())]
    PathTooLong { path: PathBuf, len_bytes: usize, max_bytes: usize },
    /// Another server answers there.
    #[error("{}: another server is listening here; stop it, or choose another path", path.display())]
    Live { path: PathBuf },
    /// Something other than a socket is there, and is not ours to delete.
    #[error("{}: exists and is not a socket; move it away, or choose another path", path.display())]
    NotASocket { path: PathBuf },
    /// A socket of a dead server cannot be replaced, or a new one not made.
    #[error("{}: cannot {op}", path.display())]
    Socket {
        op: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    /// An address of a network cannot be listened at.
    #[error("{address}: cannot listen here; give an address of this host, and a port that is free")]
    Address {
        address: SocketAddr,
        #[source]
        source: io::Error,
    },
    /// A certificate or key of TLS cannot be used.
    #[error("{}: the {what} {fault}", path.display())]
    Credential {
        what: &'static str,
        path: PathBuf,
        fault: String,
        #[source]
        source: Option<io::Error>,
    },
    /// LISTEN_PID and LISTEN_FDS speak of this process, but not of sockets that can be served.
    #[error("socket activation: {what}")]
    Activation {
        what: String,
        #[source]
        source: Option<io::Error>,
    },
    /// The system has no event descriptor or thread to give.
    #[error("cannot {op}; the process is out of descriptors or threads")]
    Resources {
        op: &'static str,
        #[source]
        source: io::Error,
    },
}
