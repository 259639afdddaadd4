//! A complete, immutable file: what is served, but to who does not wait for it.
//!
//! Why: serving bytes that are still being written, or that nobody checked, must not happen unasked.
//! How: a `Sealed` comes from sealing a filling copy, from adopting one, or from a file that a
//! person names on the command line; it has reads and no writes.
//! Never: has a way to change a byte.
//! Start at [`Sealed::open_path`].

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags};

use super::DiskError;

/// A complete file, opened read-only. Nothing writes to it any more.
#[derive(Debug)]
pub struct Sealed {
    file: File,
    path: PathBuf,
    len_bytes: u64,
}

impl Sealed {
    /// Opens a regular file that a person vouches for: it must not change while it is open.
    ///
    /// # Errors
    /// [`DiskError::Io`] if it can't be opened, [`DiskError::NotRegular`] if it is a directory,
    /// device, socket or pipe.
    pub fn open_path(path: &Path) -> Result<Self, DiskError> {
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK;
        let fd = rustix::fs::open(path, flags, Mode::empty())
            .map_err(|errno| DiskError::io("open", path, errno.into()))?;
        Self::from_file(File::from(fd), path.to_owned())
    }

    /// A file that was opened for reads, of which a person vouches the same. `path` is for messages.
    ///
    /// # Errors
    /// As [`open_path`](Self::open_path).
    pub fn of_opened(file: File, path: &Path) -> Result<Self, DiskError> {
        Self::from_file(file, path.to_owned())
    }

    /// Wraps a file that the store has just sealed or checked.
    pub(super) fn from_file(file: File, path: PathBuf) -> Result<Self, DiskError> {
        let meta = file.metadata().map_err(|e| DiskError::io("stat", &path, e))?;
        if !meta.is_file() {
            return Err(DiskError::NotRegular { path });
        }
        Ok(Self { file, path, len_bytes: meta.len() })
    }

    /// The file, for reads only: its descriptor is O_RDONLY.
    #[must_use]
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Where it was opened, for messages.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Length of the file in bytes when it was opened.
    #[must_use]
    pub fn len_bytes(&self) -> u64 {
        self.len_bytes
    }

    /// True for a file of no bytes.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len_bytes == 0
    }

    /// A second handle on the same open file.
    ///
    /// # Errors
    /// The process is out of descriptors.
    pub fn try_clone(&self) -> io::Result<Self> {
        Ok(Self {
            file: self.file.try_clone()?,
            path: self.path.clone(),
            len_bytes: self.len_bytes,
        })
    }
}
