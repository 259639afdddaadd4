//! Listening sockets that a service manager made for us (LISTEN_FDS).
//!
//! Why: systemd starts us on the first connection, and test tools give us a socket they own.
//! How: the variables are checked against our own process number, and each descriptor from 3 on is
//! duplicated through a pidfd, which needs no assumption about who owns it. Which server a socket is
//! for is said by its name (LISTEN_FDNAMES), and each server says what kind it needs.
//! Never: takes a descriptor that is not a listening socket of the kind that is asked for: images
//! would go in plain text to a network, to anybody.
//! Start at [`Inherited::take`]. Protocol: `sd_listen_fds(3)`.

use std::ffi::OsStr;
use std::fmt;
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::net::{AddressFamily, SocketAddrUnix, SocketType, sockopt};
use rustix::process::{PidfdFlags, PidfdGetfdFlags};

use super::ServeError;

/// The first descriptor that is passed (SD_LISTEN_FDS_START).
const FIRST_FD: i32 = 3;
/// Far more than there are servers.
const MAX_FDS: usize = 16;

/// What a server can listen on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A Unix stream socket (`ListenStream=/path`).
    UnixStream,
    /// A Unix socket of packets in sequence (`ListenSequentialPacket=/path`).
    UnixPackets,
    /// TCP, IPv4 or IPv6 (`ListenStream=10809`).
    Tcp,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::UnixStream => "a Unix stream socket (ListenStream=/PATH)",
            Self::UnixPackets => {
                "a Unix socket of sequenced packets (ListenSequentialPacket=/PATH)"
            }
            Self::Tcp => "a TCP socket (ListenStream=PORT)",
        })
    }
}

/// The sockets that were passed to this process and not taken yet.
#[derive(Debug, Default)]
pub struct Inherited {
    sockets: Vec<(String, Kind, Passed)>,
}

/// A listening socket that was passed, non-blocking.
#[derive(Debug)]
pub struct Passed {
    pub(super) fd: OwnedFd,
    /// Of a Unix socket, unless it has none.
    pub(super) path: Option<PathBuf>,
    /// Of a TCP socket.
    pub(super) address: Option<SocketAddr>,
}

impl Passed {
    /// Where it listens, if that is a path.
    #[must_use]
    pub fn path(&self) -> Option<&Path> {
        self.path.as_deref()
    }
}

impl From<Passed> for OwnedFd {
    fn from(passed: Passed) -> Self {
        passed.fd
    }
}

impl Inherited {
    /// All sockets that were passed to this process; none if it was not started with any.
    ///
    /// # Errors
    /// [`ServeError::Activation`] if the variables cannot be read, or something that is passed is not
    /// a listening socket.
    pub fn take() -> Result<Self, ServeError> {
        let variable = |name| std::env::var(name).ok();
        let names = wanted(
            variable("LISTEN_PID"),
            variable("LISTEN_FDS"),
            variable("LISTEN_FDNAMES"),
            std::process::id(),
        );
        let names = names.map_err(|what| ServeError::Activation { what, source: None })?;
        let mut sockets = Vec::new();
        for (fd, name) in (FIRST_FD..).zip(names) {
            let what = || format!("descriptor {fd} ({name})");
            let own = duplicate(fd).map_err(|errno| ServeError::Activation {
                what: format!("{} cannot be taken over", what()),
                source: Some(errno.into()),
            })?;
            let (kind, passed) = listening(own).map_err(|(fault, errno)| {
                let source = errno.map(std::io::Error::from);
                ServeError::Activation { what: format!("{} {fault}", what()), source }
            })?;
            sockets.push((name, kind, passed));
        }
        Ok(Self { sockets })
    }

    /// The socket of this name, which must be of this kind; `None` if none has the name.
    ///
    /// # Errors
    /// [`ServeError::Activation`] if it is of another kind, or several have the name.
    pub fn named(&mut self, name: &str, kind: Kind) -> Result<Option<Passed>, ServeError> {
        let Some(at) = self.sockets.iter().position(|(own, _, _)| own == name) else {
            return Ok(None);
        };
        let (_, found, passed) = self.sockets.swap_remove(at);
        if self.sockets.iter().any(|(own, _, _)| own == name) {
            let what = format!("several sockets are named {name}; pass one");
            return Err(ServeError::Activation { what, source: None });
        }
        if found != kind {
            let what = format!("the socket named {name} is {found}, and has to be {kind}");
            return Err(ServeError::Activation { what, source: None });
        }
        Ok(Some(passed))
    }

    /// The only socket there is, whatever its name, and its kind; `None` if there is none.
    ///
    /// # Errors
    /// [`ServeError::Activation`] if there are several.
    pub fn only(mut self) -> Result<Option<(Kind, Passed)>, ServeError> {
        let one = self.sockets.pop();
        if self.sockets.is_empty() {
            return Ok(one.map(|(_, kind, passed)| (kind, passed)));
        }
        let what = "more than one socket was passed; pass one".to_owned();
        Err(ServeError::Activation { what, source: None })
    }

    /// Makes sure that all were taken.
    ///
    /// # Errors
    /// [`ServeError::Activation`] names one that was not. `known` is the list of names there are.
    pub fn finish(self, known: &str) -> Result<(), ServeError> {
        let Some((name, _, _)) = self.sockets.first() else { return Ok(()) };
        let what =
            format!("no server is named {name:?}; set FileDescriptorName= to one of: {known}");
        Err(ServeError::Activation { what, source: None })
    }
}

/// The names of the sockets that were passed to the process `own_pid`.
fn wanted(
    pid: Option<String>,
    fds: Option<String>,
    names: Option<String>,
    own_pid: u32,
) -> Result<Vec<String>, String> {
    let (Some(pid), Some(fds)) = (pid, fds) else { return Ok(Vec::new()) };
    if pid.parse() != Ok(own_pid) {
        // Meant for a parent that left its variables to us.
        return Ok(Vec::new());
    }
    let count: usize = fds.parse().map_err(|_| "LISTEN_FDS is not a number".to_owned())?;
    if count > MAX_FDS {
        return Err(format!("{count} sockets were passed; at most {MAX_FDS} can be"));
    }
    let Some(names) = names else { return Ok(vec!["unknown".to_owned(); count]) };
    let names: Vec<String> = names.split(':').map(str::to_owned).collect();
    if count > 0 && names.len() != count {
        return Err(format!("LISTEN_FDNAMES has {} names for {count} sockets", names.len()));
    }
    Ok(names.into_iter().take(count).collect())
}

fn duplicate(fd: i32) -> rustix::io::Result<OwnedFd> {
    let own = rustix::process::pidfd_open(rustix::process::getpid(), PidfdFlags::empty())?;
    // A duplicate of this way has close-on-exec set.
    rustix::process::pidfd_getfd(own, fd, PidfdGetfdFlags::empty())
}

type Fault = (&'static str, Option<rustix::io::Errno>);

/// What kind of listening socket it is.
fn listening(fd: OwnedFd) -> Result<(Kind, Passed), Fault> {
    let kind = kind_of(fd.as_fd())?;
    let unknown = |errno| ("cannot be asked where it listens", Some(errno));
    let name = rustix::net::getsockname(&fd).map_err(unknown)?;
    let (path, address) = match kind {
        Kind::Tcp => (None, Some(SocketAddr::try_from(name).map_err(unknown)?)),
        Kind::UnixStream | Kind::UnixPackets => {
            let name = SocketAddrUnix::try_from(name).map_err(unknown)?;
            let path = name.path().map(|path| PathBuf::from(OsStr::from_bytes(path.to_bytes())));
            (path, None)
        }
    };
    rustix::io::ioctl_fionbio(&fd, true)
        .map_err(|errno| ("cannot be made non-blocking", Some(errno)))?;
    Ok((kind, Passed { fd, path, address }))
}

fn kind_of(fd: BorrowedFd<'_>) -> Result<Kind, Fault> {
    let kind = sockopt::socket_type(fd).map_err(|errno| ("is not a socket", Some(errno)))?;
    let unknown = |errno| ("cannot be asked what it is", Some(errno));
    let domain = sockopt::socket_domain(fd).map_err(unknown)?;
    let kind = if domain == AddressFamily::UNIX && kind == SocketType::STREAM {
        Kind::UnixStream
    } else if domain == AddressFamily::UNIX && kind == SocketType::SEQPACKET {
        Kind::UnixPackets
    } else if matches!(domain, AddressFamily::INET | AddressFamily::INET6)
        && kind == SocketType::STREAM
    {
        Kind::Tcp
    } else {
        return Err(("is neither a Unix socket of streams or packets nor a TCP socket", None));
    };
    if !sockopt::socket_acceptconn(fd).map_err(unknown)? {
        return Err(("is a socket that does not listen", None));
    }
    Ok(kind)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ask(pid: &str, fds: &str, names: Option<&str>) -> Result<Vec<String>, String> {
        wanted(Some(pid.to_owned()), Some(fds.to_owned()), names.map(str::to_owned), 42)
    }

    #[test]
    fn sockets_are_taken_only_if_they_were_passed_to_this_process() {
        assert_eq!(wanted(None, Some("1".into()), None, 42), Ok(vec![]));
        assert_eq!(ask("41", "1", None), Ok(vec![]));
        assert_eq!(ask("42", "0", None), Ok(vec![]));
        assert_eq!(ask("42", "0", Some("")), Ok(vec![]));
        assert_eq!(ask("42", "2", None), Ok(vec!["unknown".to_owned(); 2]));
        assert_eq!(ask("42", "2", Some("a:b")), Ok(vec!["a".to_owned(), "b".to_owned()]));
        assert!(ask("42", "2", Some("a")).is_err() && ask("42", "1", Some("a:b")).is_err());
        assert!(ask("42", "x", None).is_err() && ask("42", "4000000000", None).is_err());
    }

    #[test]
    fn a_socket_that_does_not_listen_is_refused_and_others_are_told_apart() {
        let (one, _other) = std::os::unix::net::UnixStream::pair().unwrap();
        assert!(kind_of(one.as_fd()).unwrap_err().0.contains("does not listen"));
        let udp = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        assert!(kind_of(udp.as_fd()).unwrap_err().0.contains("neither"));
        let file = tempfile::tempfile().unwrap();
        assert!(kind_of(file.as_fd()).unwrap_err().0.contains("not a socket"));
        let tcp = std::net::TcpListener::bind("[::1]:0").unwrap();
        let at = tcp.local_addr().unwrap();
        let (kind, passed) = listening(tcp.into()).unwrap();
        assert_eq!((kind, passed.address, passed.path), (Kind::Tcp, Some(at), None));
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let unix = std::os::unix::net::UnixListener::bind(&path).unwrap();
        let (kind, passed) = listening(unix.into()).unwrap();
        assert_eq!((kind, passed.path), (Kind::UnixStream, Some(path)));
    }

    #[test]
    fn a_name_is_of_one_socket_of_the_right_kind() {
        let tcp = || {
            let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
            listening(listener.into()).unwrap()
        };
        let all = |names: &[&str]| {
            let named = names.iter().map(|name| (tcp(), (*name).to_owned()));
            let sockets = named.map(|((kind, passed), name)| (name, kind, passed)).collect();
            Inherited { sockets }
        };
        let mut two = all(&["a", "b"]);
        assert!(two.named("c", Kind::Tcp).unwrap().is_none());
        assert!(two.named("a", Kind::Tcp).unwrap().is_some());
        let error = two.finish("x, y").unwrap_err().to_string();
        assert!(error.contains("\"b\"") && error.contains("x, y"), "{error}");
        let error = all(&["a"]).named("a", Kind::UnixStream).unwrap_err().to_string();
        assert!(error.contains("is a TCP socket") && error.contains("to be a Unix"), "{error}");
        assert!(all(&["a", "a"]).named("a", Kind::Tcp).is_err());
        assert!(all(&["a", "b"]).only().is_err());
        assert!(all(&["a"]).only().unwrap().is_some() && all(&[]).only().unwrap().is_none());
    }
}
