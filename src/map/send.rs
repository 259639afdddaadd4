//! One sendmsg of headers from memory and image bytes from a map.
//!
//! Why: a reply goes from the page cache to the socket without a copy through user space.
//! How: an iovec per piece; the kernel follows the addresses, so an unreadable page is EFAULT.
//! Never: raises SIGPIPE or SIGBUS.
//! Start at [`send_pieces`].

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use super::{Copied, KernelSlice};

/// Most pieces that one sendmsg takes (the kernel's UIO_MAXIOV); [`send_pieces`] sends no more.
pub const MAX_PIECES: usize = 1024;

/// One part of a message.
#[derive(Clone, Copy, Debug)]
pub enum Piece<'a> {
    /// Bytes in our own memory.
    Bytes(&'a [u8]),
    /// Bytes of a mapped file.
    Mapped(KernelSlice<'a>),
}

impl Piece<'_> {
    /// Length in bytes.
    #[must_use]
    pub fn len(&self) -> usize {
        match self {
            Self::Bytes(bytes) => bytes.len(),
            Self::Mapped(slice) => slice.len(),
        }
    }

    /// True for a piece of no bytes.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The part after the first `count` bytes: what a short send has left over.
    #[must_use]
    pub fn skip(self, count: usize) -> Self {
        match self {
            Self::Bytes(bytes) => Self::Bytes(bytes.get(count..).unwrap_or_default()),
            Self::Mapped(slice) => Self::Mapped(slice.skip(count)),
        }
    }

    /// Copies its first bytes into `buf`, for whoever changes them on their way (encryption). False,
    /// with anything in `buf`, if the piece is shorter or a page of it cannot be read.
    #[must_use]
    pub fn copy_to(&self, buf: &mut [u8]) -> bool {
        match self {
            Self::Bytes(bytes) => {
                let first = bytes.get(..buf.len());
                first.map(|first| buf.copy_from_slice(first)).is_some()
            }
            Self::Mapped(slice) => slice.copy_to(buf) != Copied::Not,
        }
    }

    fn iovec(&self) -> libc::iovec {
        match self {
            Self::Bytes(bytes) => {
                libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() }
            }
            Self::Mapped(slice) => slice.iovec(),
        }
    }
}

/// Sends the first [`MAX_PIECES`] of `pieces` with one sendmsg; returns the bytes sent, which may
/// end in the middle of a piece.
///
/// # Errors
/// EFAULT if a page of a mapped piece cannot be read. Nothing of this call was then sent if it was
/// the first page; otherwise the call was short and the next one reports it. `WouldBlock` on a
/// full non-blocking socket; EPIPE (never the signal) if the peer is gone.
pub fn send_pieces(socket: BorrowedFd<'_>, pieces: &[Piece<'_>]) -> io::Result<usize> {
    let mut iovecs: Vec<libc::iovec> = pieces.iter().take(MAX_PIECES).map(Piece::iovec).collect();
    // SAFETY: msghdr is plain old data, for which all zeroes means "no name, no control data".
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = iovecs.as_mut_ptr();
    message.msg_iovlen = iovecs.len();
    loop {
        // SAFETY: `message` and `iovecs` live until the call returns; each iovec is a live borrow
        // (`Bytes`) or an address range that the borrow of its map keeps mapped (`Mapped`).
        // sendmsg only reads through them, and reports an unreadable page as EFAULT.
        let sent =
            unsafe { libc::sendmsg(socket.as_raw_fd(), &raw const message, libc::MSG_NOSIGNAL) };
        if let Ok(sent) = usize::try_from(sent) {
            return Ok(sent);
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::FileMap;
    use crate::units::FileOffset;
    use std::io::{Read, Write};
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;

    #[test]
    fn pieces_arrive_in_order() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"0123456789").unwrap();
        let map = FileMap::new(&file, 10).unwrap();
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let mapped = Piece::Mapped(map.slice(FileOffset(3), 4).unwrap());
        let pieces = [Piece::Bytes(b"<"), mapped, Piece::Bytes(b""), Piece::Bytes(b">")];
        assert_eq!(send_pieces(ours.as_fd(), &pieces).unwrap(), 6);
        drop(ours);
        let mut got = String::new();
        theirs.read_to_string(&mut got).unwrap();
        assert_eq!(got, "<3456>");
    }

    #[test]
    fn an_unreadable_page_is_efault_and_sends_nothing() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&[9; 8192]).unwrap();
        let map = FileMap::new(&file, 8192).unwrap();
        file.set_len(4096).unwrap();
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let gone = Piece::Mapped(map.slice(FileOffset(4096), 4096).unwrap());
        let error = send_pieces(ours.as_fd(), &[Piece::Bytes(b"head"), gone]).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EFAULT));
        drop(ours);
        assert_eq!(theirs.read(&mut [0; 16]).unwrap(), 0);
    }

    #[test]
    fn a_gone_peer_is_an_error_and_no_signal() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        drop(theirs);
        let error = send_pieces(ours.as_fd(), &[Piece::Bytes(b"x")]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::BrokenPipe);
    }

    #[test]
    fn more_pieces_than_one_call_takes_are_left_to_the_next() {
        let (ours, _theirs) = UnixStream::pair().unwrap();
        let pieces = vec![Piece::Bytes(b"x"); MAX_PIECES + 5];
        assert_eq!(send_pieces(ours.as_fd(), &pieces).unwrap(), MAX_PIECES);
    }
}
