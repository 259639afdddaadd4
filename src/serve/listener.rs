//! A listening socket: at a path, made and removed with care, or at an address of a network.
//!
//! Why: a socket file outlives its server, and two servers at one path would both look alive.
//! How: the mode is set before the file exists; an existing socket is asked whether anybody
//! answers before it is replaced; our own is unlinked only while it is still ours.
//! Never: deletes a file that is not a socket, or a socket that answers.
//! Start at [`Listener::bind`] and [`Listener::bind_tcp`].

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use rustix::fs::Mode;
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

use super::ServeError;
use super::activation::Passed;

/// Room for a path in a socket address, without the final NUL.
const MAX_PATH_BYTES: usize = 107;
/// Connections that wait to be accepted.
const BACKLOG: i32 = 1024;
/// Owner and group may connect.
const MODE: u32 = 0o660;

/// A listening socket. If it was made at a path, dropping it removes the path.
#[derive(Debug)]
pub(super) struct Listener {
    pub(super) fd: OwnedFd,
    path: Option<PathBuf>,
    address: Option<SocketAddr>,
    made: Option<Made>,
}

/// The file that `bind` made, to recognise it again.
#[derive(Debug)]
struct Made {
    path: PathBuf,
    device: u64,
    inode: u64,
}

impl Listener {
    /// A socket that somebody else made, and will remove.
    pub(super) fn inherited(passed: Passed) -> Self {
        let Passed { fd, path, address } = passed;
        Self { fd, path, address, made: None }
    }

    /// Listens at this address of a network; port 0 is any that is free.
    ///
    /// # Errors
    /// [`ServeError::Address`].
    pub(super) fn bind_tcp(address: SocketAddr) -> Result<Self, ServeError> {
        let failed = |source| ServeError::Address { address, source };
        let listener = TcpListener::bind(address).map_err(failed)?;
        listener.set_nonblocking(true).map_err(failed)?;
        let address = Some(listener.local_addr().map_err(failed)?);
        Ok(Self { fd: listener.into(), path: None, address, made: None })
    }

    /// Listens at `path` with mode 0660 (less the process's umask).
    ///
    /// # Errors
    /// [`ServeError::PathTooLong`], [`ServeError::Live`], [`ServeError::NotASocket`], or
    /// [`ServeError::Socket`] for the system's reasons.
    pub(super) fn bind(path: &Path, kind: SocketType) -> Result<Self, ServeError> {
        let address = address(path)?;
        let fd = new_socket(kind).map_err(|errno| socket_error("make a socket", path, errno))?;
        // On Linux the file gets the mode that the socket has when it is bound: no moment at
        // which everybody could connect.
        rustix::fs::fchmod(&fd, Mode::from_raw_mode(MODE))
            .map_err(|errno| socket_error("set the mode of the socket", path, errno))?;
        match rustix::net::bind(&fd, &address) {
            Err(Errno::ADDRINUSE) => {
                remove_if_dead(path, &address, kind)?;
                rustix::net::bind(&fd, &address)
            }
            other => other,
        }
        .map_err(|errno| match errno {
            // Somebody was quicker.
            Errno::ADDRINUSE => ServeError::Live { path: path.to_owned() },
            _ => socket_error("make the socket", path, errno),
        })?;
        let listen = rustix::net::listen(&fd, BACKLOG);
        let meta = std::fs::symlink_metadata(path).map_err(|source| ServeError::Socket {
            op: "stat the socket",
            path: path.into(),
            source,
        })?;
        let made = Made { path: path.to_owned(), device: meta.dev(), inode: meta.ino() };
        listen.map_err(|errno| socket_error("listen", path, errno))?;
        Ok(Self { fd, path: Some(path.to_owned()), address: None, made: Some(made) })
    }

    /// Where it listens, if that is a path.
    pub(super) fn path(&self) -> Option<&Path> {
        self.path.as_deref()
    }

    /// Where it listens, if that is an address of a network.
    pub(super) fn address(&self) -> Option<SocketAddr> {
        self.address
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        let Some(made) = &self.made else { return };
        let still_ours = std::fs::symlink_metadata(&made.path)
            .is_ok_and(|meta| (meta.dev(), meta.ino()) == (made.device, made.inode));
        if still_ours && let Err(error) = std::fs::remove_file(&made.path) {
            tracing::warn!(path = %made.path.display(), %error, "socket not removed");
        }
    }
}

fn address(path: &Path) -> Result<SocketAddrUnix, ServeError> {
    let len_bytes = path.as_os_str().as_bytes().len();
    if len_bytes > MAX_PATH_BYTES {
        let (path, max_bytes) = (path.to_owned(), MAX_PATH_BYTES);
        return Err(ServeError::PathTooLong { path, len_bytes, max_bytes });
    }
    SocketAddrUnix::new(path).map_err(|errno| socket_error("use the path", path, errno))
}

fn new_socket(kind: SocketType) -> rustix::io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    rustix::net::socket_with(AddressFamily::UNIX, kind, flags, None)
}

/// Removes the socket of a server that is gone.
fn remove_if_dead(
    path: &Path,
    address: &SocketAddrUnix,
    kind: SocketType,
) -> Result<(), ServeError> {
    let failed = |op, source: io::Error| ServeError::Socket { op, path: path.to_owned(), source };
    let meta = match std::fs::symlink_metadata(path) {
        Ok(meta) => meta,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(failed("stat what is there", error)),
    };
    if !meta.file_type().is_socket() {
        return Err(ServeError::NotASocket { path: path.to_owned() });
    }
    let probe = new_socket(kind).map_err(|errno| failed("make a socket", errno.into()))?;
    match rustix::net::connect(&probe, address) {
        Err(Errno::CONNREFUSED) => {}
        Err(Errno::NOENT) => return Ok(()),
        // A full backlog (EAGAIN) is a sign of life too.
        Ok(()) | Err(Errno::AGAIN) => return Err(ServeError::Live { path: path.to_owned() }),
        Err(errno) => return Err(failed("ask the socket that is there", errno.into())),
    }
    std::fs::remove_file(path).map_err(|error| failed("remove the socket of a dead server", error))
}

fn socket_error(op: &'static str, path: &Path, errno: Errno) -> ServeError {
    ServeError::Socket { op, path: path.to_owned(), source: errno.into() }
}
