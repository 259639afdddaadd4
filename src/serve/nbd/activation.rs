//! A listening socket that a service manager made for us (LISTEN_FDS).
//!
//! Why: systemd starts us on the first connection, and test tools give us a socket they own.
//! How: the variables are checked against our own process number, and descriptor 3 is duplicated
//! through a pidfd, which needs no assumption about who owns it.
//! Never: takes a descriptor that is not a listening Unix stream socket: on a network every byte of
//! an image would go in plain text, to anybody.
//! Start at [`inherited`]. Protocol: `sd_listen_fds(3)`.

use std::os::fd::{AsFd, OwnedFd};

use rustix::net::{AddressFamily, SocketType, sockopt};
use rustix::process::{PidfdFlags, PidfdGetfdFlags};

use crate::serve::ServeError;

/// The first descriptor that is passed (SD_LISTEN_FDS_START).
const FIRST_FD: i32 = 3;

/// The socket that was passed to this process; `None` if none was.
///
/// # Errors
/// [`ServeError::Activation`] if something else was passed, or more than one.
pub(super) fn inherited() -> Result<Option<OwnedFd>, ServeError> {
    let variable = |name| std::env::var(name).ok();
    match wanted(variable("LISTEN_PID"), variable("LISTEN_FDS"), std::process::id()) {
        Ok(false) => return Ok(None),
        Ok(true) => {}
        Err(what) => return Err(ServeError::Activation { what, source: None }),
    }
    let fd = duplicate(FIRST_FD).map_err(|errno| ServeError::Activation {
        what: "descriptor 3 cannot be taken over",
        source: Some(errno.into()),
    })?;
    check_listening(fd.as_fd())?;
    Ok(Some(fd))
}

/// Whether exactly one socket was passed to the process `own_pid`.
fn wanted(pid: Option<String>, fds: Option<String>, own_pid: u32) -> Result<bool, &'static str> {
    let (Some(pid), Some(fds)) = (pid, fds) else { return Ok(false) };
    if pid.parse() != Ok(own_pid) {
        // Meant for a parent that left its variables to us.
        return Ok(false);
    }
    match fds.parse::<u32>() {
        Ok(0) => Ok(false),
        Ok(1) => Ok(true),
        Ok(_) => Err("more than one descriptor was passed"),
        Err(_) => Err("LISTEN_FDS is not a number"),
    }
}

fn duplicate(fd: i32) -> rustix::io::Result<OwnedFd> {
    let own = rustix::process::pidfd_open(rustix::process::getpid(), PidfdFlags::empty())?;
    // A duplicate of this way has close-on-exec set.
    rustix::process::pidfd_getfd(own, fd, PidfdGetfdFlags::empty())
}

fn check_listening(fd: std::os::fd::BorrowedFd<'_>) -> Result<(), ServeError> {
    let failed = |what, source| ServeError::Activation { what, source };
    let kind = sockopt::socket_type(fd)
        .map_err(|errno| failed("descriptor 3 is not a socket", Some(errno.into())))?;
    let listens = sockopt::socket_acceptconn(fd)
        .map_err(|errno| failed("descriptor 3 cannot be asked", Some(errno.into())))?;
    if kind != SocketType::STREAM || !listens {
        return Err(failed("descriptor 3 is not a listening stream socket", None));
    }
    let domain = sockopt::socket_domain(fd)
        .map_err(|errno| failed("descriptor 3 cannot be asked", Some(errno.into())))?;
    if domain != AddressFamily::UNIX {
        return Err(failed("descriptor 3 is not a Unix socket, and no other is encrypted", None));
    }
    rustix::io::ioctl_fionbio(fd, true)
        .map_err(|errno| failed("descriptor 3 cannot be made non-blocking", Some(errno.into())))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ask(pid: &str, fds: &str) -> Result<bool, &'static str> {
        wanted(Some(pid.to_owned()), Some(fds.to_owned()), 42)
    }

    #[test]
    fn a_socket_is_taken_only_if_it_was_passed_to_this_process() {
        assert_eq!(wanted(None, Some("1".into()), 42), Ok(false));
        assert_eq!(ask("41", "1"), Ok(false));
        assert_eq!(ask("42", "0"), Ok(false));
        assert_eq!(ask("42", "1"), Ok(true));
        assert!(ask("42", "2").is_err() && ask("42", "x").is_err());
    }

    #[test]
    fn a_socket_that_does_not_listen_is_refused() {
        let (one, _other) = std::os::unix::net::UnixStream::pair().unwrap();
        assert!(check_listening(one.as_fd()).is_err());
        let tcp = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let error = check_listening(tcp.as_fd()).unwrap_err().to_string();
        assert!(error.contains("not a Unix socket"), "{error}");
        let file = tempfile::tempfile().unwrap();
        assert!(check_listening(file.as_fd()).is_err());
    }
}
