//! What the kernel is told about files, threads and sockets that changes no result.
//!
//! Why: when it writes back, whom it lets wait and how often it wakes us decide what bytes cost.
//! How: single calls that neither the standard library nor rustix has.
//! Never: touches memory of ours.
//! Start at [`start_write_back`] or [`wake_at`].

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

/// Asks the kernel to begin to write what is dirty of a file, and does not wait for it.
pub fn start_write_back(file: &File) {
    // SAFETY: the call takes a descriptor, which `file` keeps open across it, and plain integers;
    // (0, 0) means the whole file. It touches no memory of ours. A failure is only a lost hint.
    unsafe {
        libc::sync_file_range(file.as_raw_fd(), 0, 0, libc::SYNC_FILE_RANGE_WRITE);
    }
}

/// Lets this thread read and write only while nobody else does, where the scheduler of the disk
/// knows priorities (bfq, mq-deadline); elsewhere it changes nothing.
pub fn idle_io_priority() {
    /// `IOPRIO_WHO_PROCESS`, and `IOPRIO_CLASS_IDLE` shifted by `IOPRIO_CLASS_SHIFT`, of
    /// `linux/ioprio.h`.
    const PROCESS: libc::c_long = 1;
    const IDLE: libc::c_long = 3 << 13;
    const SELF: libc::c_long = 0;
    // SAFETY: ioprio_set takes three integers and touches no memory of ours; 0 is the calling
    // thread. A failure is only a lost hint.
    unsafe {
        libc::syscall(libc::SYS_ioprio_set, PROCESS, SELF, IDLE);
    }
}

/// Sets how many bytes have to be in a socket before it counts as readable (`SO_RCVLOWAT`, socket(7)).
/// Its end and its errors always count; the kernel takes no more than half of what it may hold. What is
/// there already counts from now on.
///
/// # Errors
/// The kernel refuses it for this kind of socket.
pub fn wake_at(socket: BorrowedFd<'_>, bytes: u32) -> io::Result<()> {
    let bytes = libc::c_int::try_from(bytes).unwrap_or(libc::c_int::MAX);
    let size = libc::socklen_t::try_from(size_of::<libc::c_int>()).expect("it is 4");
    // SAFETY: the descriptor is open while it is borrowed; the pointer is to an integer of `size` bytes
    // that lives across the call, and is only read.
    let result = unsafe {
        let value = (&raw const bytes).cast();
        libc::setsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, libc::SO_RCVLOWAT, value, size)
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::{TcpListener, TcpStream};
    use std::os::fd::AsFd;

    use rustix::event::{PollFd, PollFlags, Timespec, poll};

    use super::*;

    fn is_readable(socket: &TcpStream) -> bool {
        let mut watched = [PollFd::new(socket, PollFlags::IN)];
        poll(&mut watched, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })).unwrap() == 1
    }

    fn arrive(socket: &TcpStream, bytes: usize) {
        let mut room = vec![0; bytes];
        while socket.peek(&mut room).unwrap() < bytes {}
    }

    #[test]
    fn a_socket_is_readable_once_enough_is_there_or_the_mark_is_lowered_or_it_ended() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut ours = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let mut theirs = listener.accept().unwrap().0;
        wake_at(ours.as_fd(), 1000).unwrap();
        theirs.write_all(&[1; 999]).unwrap();
        arrive(&ours, 999);
        assert!(!is_readable(&ours));
        theirs.write_all(&[1]).unwrap();
        arrive(&ours, 1000);
        assert!(is_readable(&ours));
        ours.read_exact(&mut [0; 999]).unwrap();
        assert!(!is_readable(&ours));
        wake_at(ours.as_fd(), 1).unwrap();
        assert!(is_readable(&ours));
        wake_at(ours.as_fd(), 1000).unwrap();
        assert!(!is_readable(&ours));
        drop(theirs);
        let mut all = Vec::new();
        ours.read_to_end(&mut all).unwrap();
        assert_eq!(all.len(), 1);
        assert!(is_readable(&ours));
    }
}
