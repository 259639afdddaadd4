//! Why the store refused or failed: what, where, and what to do.

use std::io;
use std::path::{Path, PathBuf};

use crate::names::NameError;
use crate::units::human_bytes;

/// Why the store on one disk refused or failed. The message prints every field.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "each field is named in the message above it")]
pub enum DiskError {
    /// A system call failed.
    #[error("{}: cannot {op}", path.display())]
    Io {
        op: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    /// A directory, device, socket or pipe where a file must be.
    #[error("{}: not a regular file; give the path of an image file", path.display())]
    NotRegular { path: PathBuf },
    /// Another process has the disk.
    #[error("{}: another bedplate (process {holder}) uses this disk; stop it, or talk to it through its control socket", path.display())]
    Locked { path: PathBuf, holder: String },
    /// The disk's own file says something unusable.
    #[error("{}: not a usable disk file ({why}); it must read {{\"diskUUID\":\"…\"}}", path.display())]
    DiskFile { path: PathBuf, why: String },
    /// Another process, or another transfer of this one, is filling the same file.
    #[error("{}: another bedplate is bringing this file in; wait for it, or choose another name", path.display())]
    Busy { path: PathBuf },
    /// No disk here, and none was to be made.
    #[error("{}: no longhorn-disk.cfg here; give the disk's directory, or let `bedplate serve --disk` create it", path.display())]
    NotADisk { path: PathBuf },
    /// What is at the disk's path now is something else.
    #[error("{}: the disk is not there; mount it again, or let it go with `bedplate disk remove DISK --force`", path.display())]
    Gone { path: PathBuf },
    /// A name found on the disk or given to it breaks the rules.
    #[error(transparent)]
    Name(#[from] NameError),
    /// Less room than the image needs.
    #[error("{}: {} needed, {} free of which {} promised to other transfers; free some space, then try again", path.display(), human_bytes(*need), human_bytes(*free), human_bytes(*reserved))]
    NoSpace { path: PathBuf, need: u64, free: u64, reserved: u64 },
    /// The disk filled up in the middle.
    #[error("{}: disk full at byte {at:#x}; what is durable is kept: free some space, then try again to resume", path.display())]
    Full { path: PathBuf, at: u64 },
    /// A record of ours fails its checksum or contradicts itself.
    #[error("{}: {field} is damaged ({why})", path.display())]
    Damaged { path: PathBuf, field: &'static str, why: String },
    /// A digest of the stored bytes differs from the recorded one.
    #[error("{}: {kind} is {found}, recorded is {expected}; the file was changed or damaged: delete the copy to fetch it again", path.display())]
    DigestMismatch { path: PathBuf, kind: &'static str, expected: String, found: String },
    /// There is nothing to hold a file against.
    #[error("{}: no digests of its MiBs are recorded", path.display())]
    NoDigests { path: PathBuf },
    /// A seal was asked for while bytes are missing.
    #[error("{}: {missing} of {total} bytes are not here yet", path.display())]
    Incomplete { path: PathBuf, missing: u64, total: u64 },
}

impl DiskError {
    /// An I/O error with the operation's verb ("open", "write") and path.
    pub fn io(op: &'static str, path: &Path, source: io::Error) -> Self {
        Self::Io { op, path: path.to_owned(), source }
    }

    /// The same, for a failed write at byte `at`: a full disk is told apart.
    pub fn write(path: &Path, at: u64, source: io::Error) -> Self {
        match source.raw_os_error() {
            Some(libc::ENOSPC | libc::EDQUOT) => Self::Full { path: path.to_owned(), at },
            Some(_) | None => Self::io("write", path, source),
        }
    }

    /// True if the same call may succeed later without anybody changing the request.
    #[must_use]
    pub fn may_retry(&self) -> bool {
        match self {
            Self::Io { .. }
            | Self::Locked { .. }
            | Self::Busy { .. }
            | Self::Gone { .. }
            | Self::NoSpace { .. }
            | Self::Full { .. } => true,
            Self::NotRegular { .. }
            | Self::DiskFile { .. }
            | Self::NotADisk { .. }
            | Self::Name(_)
            | Self::Damaged { .. }
            | Self::DigestMismatch { .. }
            | Self::NoDigests { .. }
            | Self::Incomplete { .. } => false,
        }
    }
}
