//! Whole messages with descriptors, over a sequenced-packet Unix socket.
//!
//! Why: a byte stream would have to be cut into messages, and descriptors come with a message.
//! How: one sendmsg or recvmsg for each; a message that was cut short, or more descriptors than fit,
//! is an error, and none is left open.
//! Never: blocks for longer than the socket's own limit.
//! Start at [`connect`].

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::sockopt::{self, Timeout};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags,
    SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags, SocketType,
};

use crate::wire::MAX_DESCRIPTORS;

/// Connects to the engine's socket at `path`; each later send and receive takes `patience` at most.
///
/// # Errors
/// Nobody listens there, or the system's.
pub fn connect(path: &Path, patience: Duration) -> io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC;
    let fd = rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
    // A timeout of zero would mean "for ever" to the kernel.
    let patience = Some(patience.max(Duration::from_millis(1)));
    sockopt::set_socket_timeout(&fd, Timeout::Recv, patience)?;
    sockopt::set_socket_timeout(&fd, Timeout::Send, patience)?;
    rustix::net::connect(&fd, &SocketAddrUnix::new(path)?)?;
    Ok(fd)
}

/// Sends one message of these parts, with these descriptors.
///
/// # Errors
/// The peer has gone, does not read, or the message is longer than the socket takes.
pub fn send(
    socket: impl AsFd,
    parts: &[IoSlice<'_>],
    descriptors: &[BorrowedFd<'_>],
) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(descriptors)) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    loop {
        match rustix::net::sendmsg(&socket, parts, &mut ancillary, SendFlags::NOSIGNAL) {
            Ok(_) => return Ok(()),
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}

/// Receives one message into `parts`, and its descriptors into `descriptors`; `Ok(0)` is the end.
///
/// # Errors
/// `InvalidData` for a message longer than `parts`, or with too many descriptors; `WouldBlock` when
/// the socket's limit of time has passed; otherwise the peer has gone.
pub fn receive(
    socket: impl AsFd,
    parts: &mut [IoSliceMut<'_>],
    descriptors: &mut Vec<OwnedFd>,
) -> io::Result<usize> {
    receive_with(socket, parts, descriptors, RecvFlags::empty())
}

/// As [`receive`]; with DONTWAIT `WouldBlock` if there is none.
///
/// # Errors
/// As [`receive`].
pub fn receive_with(
    socket: impl AsFd,
    parts: &mut [IoSliceMut<'_>],
    descriptors: &mut Vec<OwnedFd>,
    flags: RecvFlags,
) -> io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let received = loop {
        match rustix::net::recvmsg(&socket, parts, &mut ancillary, flags | RecvFlags::CMSG_CLOEXEC)
        {
            Err(Errno::INTR) => {}
            other => break other?,
        }
    };
    for message in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            descriptors.extend(rights);
        }
    }
    if received.flags.intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC) {
        descriptors.clear();
        let what = "a message longer than the protocol has";
        return Err(io::Error::new(io::ErrorKind::InvalidData, what));
    }
    Ok(received.bytes)
}
