//! Why the store refused or failed: what, where, and what to do.

use std::io;
use std::path::{Path, PathBuf};

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
}

impl DiskError {
    /// An I/O error with the operation's verb ("open", "write 65536 bytes at 0x0") and path.
    pub fn io(op: &'static str, path: &Path, source: io::Error) -> Self {
        Self::Io { op, path: path.to_owned(), source }
    }
}
