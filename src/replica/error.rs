//! What can go wrong for a reader.

use std::io;
use std::path::PathBuf;

use crate::wire::Status;

/// Why an attach or a read has failed.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "each field is named in the message above it")]
pub enum ReplicaError {
    /// The engine can't be reached, or has stopped answering.
    #[error("{}: the engine does not answer; is its daemon running?", socket.display())]
    Engine {
        socket: PathBuf,
        #[source]
        source: io::Error,
    },
    /// The engine refuses.
    #[error("image {image}: {message}")]
    Refused { image: String, status: Status, message: String },
    /// What came is no answer, or tables that can't be used.
    #[error(
        "image {image}: the engine's answer is wrong: {what}; are engine and library of one version?"
    )]
    Protocol {
        image: String,
        what: &'static str,
        #[source]
        source: Option<io::Error>,
    },
    /// Another image has the name now.
    #[error(
        "image {image} is another one now ({now}) than the one attached to ({was}); attach anew"
    )]
    Changed { image: String, was: String, now: String },
    /// The range is not inside the disk.
    #[error("bytes {at} to {at}+{len_bytes} are not inside the disk of {size_bytes} bytes")]
    PastEnd { at: u64, len_bytes: u64, size_bytes: u64 },
    /// Bytes of a file can't be read.
    #[error("image {image}: cannot read {len_bytes} bytes at guest position {at}")]
    Io {
        image: String,
        at: u64,
        len_bytes: usize,
        #[source]
        source: io::Error,
    },
}

impl ReplicaError {
    /// The number that a block device would give for it.
    #[must_use]
    pub fn errno(&self) -> i32 {
        use rustix::io::Errno;
        let errno = match self {
            Self::Engine { .. } => Errno::NOTCONN,
            Self::Refused { status, .. } => match status {
                Status::Unknown => Errno::NOENT,
                Status::Denied => Errno::ACCESS,
                Status::PastEnd | Status::Malformed => Errno::INVAL,
                Status::TooMany => Errno::USERS,
                Status::Ok | Status::Unreadable => Errno::IO,
            },
            Self::Protocol { .. } => Errno::PROTO,
            Self::Changed { .. } => Errno::STALE,
            Self::PastEnd { .. } => Errno::INVAL,
            Self::Io { .. } => Errno::IO,
        };
        errno.raw_os_error()
    }
}
