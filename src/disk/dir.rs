//! A directory opened once; everything in it is reached through its descriptor.
//!
//! Why: names come from requests and from other people's disks; a path that is joined and opened
//! again can be led out of the store by a symbolic link.
//! How: `openat2` with `RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS`, and names of one component only.
//! Where `openat2` is refused, `openat` with `O_NOFOLLOW` is as strict for one component.
//! Never: follows a symbolic link, or takes a name with a slash.
//! Start at [`Dir::open`].

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;

use super::DiskError;

/// Largest small file (`.cfg`) that is read whole, in bytes.
const SMALL_FILE_BYTES: u64 = 64 * 1024;

/// An open directory and its path for messages.
#[derive(Debug)]
pub struct Dir {
    fd: OwnedFd,
    path: PathBuf,
}

impl Dir {
    /// Opens a directory that the operator named; links in that path are the operator's own.
    ///
    /// # Errors
    /// [`DiskError::Io`] if it is missing or no directory.
    pub fn open(path: &Path) -> Result<Self, DiskError> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let fd = rustix::fs::open(path, flags, Mode::empty())
            .map_err(|e| DiskError::io("open directory", path, e.into()))?;
        Ok(Self { fd, path: path.to_owned() })
    }

    /// The path, for messages.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The path of `name` in here, for messages.
    #[must_use]
    pub fn join(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// The descriptor.
    #[must_use]
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// The same directory once more.
    ///
    /// # Errors
    /// [`DiskError::Io`] if the process has no descriptor left.
    pub fn try_clone(&self) -> Result<Self, DiskError> {
        let fd = self.fd.try_clone().map_err(|e| DiskError::io("open", &self.path, e))?;
        Ok(Self { fd, path: self.path.clone() })
    }

    fn open_raw(&self, name: &str, flags: OFlags, mode: Mode) -> Result<OwnedFd, Errno> {
        let one_component = !name.is_empty() && !name.contains('/') && name != "." && name != "..";
        if !one_component {
            return Err(Errno::INVAL);
        }
        let flags = flags | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        let beneath = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
        match rustix::fs::openat2(&self.fd, name, flags, mode, beneath) {
            Err(Errno::NOSYS | Errno::PERM) => rustix::fs::openat(&self.fd, name, flags, mode),
            other => other,
        }
    }

    /// Opens the directory `name` in here.
    ///
    /// # Errors
    /// [`DiskError::Io`]; `NotFound` inside if there is none.
    pub fn open_dir(&self, name: &str) -> Result<Self, DiskError> {
        let path = self.join(name);
        let fd = self
            .open_raw(name, OFlags::RDONLY | OFlags::DIRECTORY, Mode::empty())
            .map_err(|e| DiskError::io("open directory", &path, e.into()))?;
        Ok(Self { fd, path })
    }

    /// Opens the directory `name` in here, made for this user alone if it is missing: what is in it may be
    /// somebody's machine. A new one is durable when this returns.
    ///
    /// # Errors
    /// [`DiskError::Io`].
    pub fn make_dir(&self, name: &str) -> Result<Self, DiskError> {
        match rustix::fs::mkdirat(&self.fd, name, Mode::from_raw_mode(0o700)) {
            Ok(()) => self.sync()?,
            Err(Errno::EXIST) => {}
            Err(e) => return Err(DiskError::io("make directory", &self.join(name), e.into())),
        }
        self.open_dir(name)
    }

    /// Opens the regular file `name` in here.
    ///
    /// # Errors
    /// [`DiskError::Io`], or [`DiskError::NotRegular`].
    pub fn open_file(&self, name: &str, flags: OFlags) -> Result<File, DiskError> {
        let path = self.join(name);
        // openat2 refuses a mode where nothing is made.
        let new = flags.contains(OFlags::CREATE);
        let mode = if new { Mode::from_raw_mode(0o644) } else { Mode::empty() };
        // NONBLOCK: opening a planted FIFO must not hang. It has no effect on a regular file.
        let fd = self
            .open_raw(name, flags | OFlags::NONBLOCK, mode)
            .map_err(|e| DiskError::io("open", &path, e.into()))?;
        let file = File::from(fd);
        let meta = file.metadata().map_err(|e| DiskError::io("stat", &path, e))?;
        if !meta.is_file() {
            return Err(DiskError::NotRegular { path });
        }
        Ok(file)
    }

    /// As [`Dir::open_file`], `None` if there is none.
    ///
    /// # Errors
    /// As [`Dir::open_file`], but for a missing file.
    pub fn try_open_file(&self, name: &str, flags: OFlags) -> Result<Option<File>, DiskError> {
        match self.open_file(name, flags) {
            Ok(file) => Ok(Some(file)),
            Err(DiskError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
                Ok(None)
            }
            Err(e) => Err(e),
        }
    }

    /// The bytes of a small file, `None` if there is none.
    ///
    /// # Errors
    /// As [`Dir::open_file`], or it is larger than 64 KiB.
    pub fn read_small(&self, name: &str) -> Result<Option<Vec<u8>>, DiskError> {
        use std::io::Read;
        let Some(file) = self.try_open_file(name, OFlags::RDONLY)? else { return Ok(None) };
        let mut bytes = Vec::new();
        file.take(SMALL_FILE_BYTES + 1)
            .read_to_end(&mut bytes)
            .map_err(|e| DiskError::io("read", &self.join(name), e))?;
        if bytes.len() as u64 > SMALL_FILE_BYTES {
            let why = format!("larger than {SMALL_FILE_BYTES} bytes");
            return Err(DiskError::Damaged { path: self.join(name), field: "file", why });
        }
        Ok(Some(bytes))
    }

    /// Replaces `name` by `bytes` so that a crash leaves the old or the new, whole and durable.
    ///
    /// # Errors
    /// [`DiskError::Io`] or [`DiskError::Full`]; the old file is untouched then.
    pub fn replace(&self, name: &str, bytes: &[u8]) -> Result<(), DiskError> {
        let fresh = format!("{name}.new");
        self.remove_file(&fresh)?;
        let path = self.join(&fresh);
        let mut file = self.open_file(&fresh, OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL)?;
        file.write_all(bytes).map_err(|e| DiskError::write(&path, 0, e))?;
        file.sync_all().map_err(|e| DiskError::write(&path, 0, e))?;
        self.rename(&fresh, name)
    }

    /// Renames within the directory; durable when this returns.
    ///
    /// # Errors
    /// [`DiskError::Io`].
    pub fn rename(&self, from: &str, to: &str) -> Result<(), DiskError> {
        rustix::fs::renameat(&self.fd, from, &self.fd, to)
            .map_err(|e| DiskError::io("rename", &self.join(from), e.into()))?;
        self.sync()
    }

    /// Removes a file; a missing one is fine.
    ///
    /// # Errors
    /// [`DiskError::Io`].
    pub fn remove_file(&self, name: &str) -> Result<(), DiskError> {
        self.remove_if_there(name).map(drop)
    }

    /// As [`Dir::remove_file`]; true if there was one.
    ///
    /// # Errors
    /// [`DiskError::Io`].
    pub fn remove_if_there(&self, name: &str) -> Result<bool, DiskError> {
        match rustix::fs::unlinkat(&self.fd, name, AtFlags::empty()) {
            Ok(()) => Ok(true),
            Err(Errno::NOENT) => Ok(false),
            Err(e) => Err(DiskError::io("remove", &self.join(name), e.into())),
        }
    }

    /// Removes an empty directory; a missing one is fine.
    ///
    /// # Errors
    /// [`DiskError::Io`].
    pub fn remove_dir(&self, name: &str) -> Result<(), DiskError> {
        match rustix::fs::unlinkat(&self.fd, name, AtFlags::REMOVEDIR) {
            Ok(()) | Err(Errno::NOENT) => Ok(()),
            Err(e) => Err(DiskError::io("remove directory", &self.join(name), e.into())),
        }
    }

    /// The names in here, in order, without `.` and `..`; what is not UTF-8 is left out.
    ///
    /// # Errors
    /// [`DiskError::Io`].
    pub fn names(&self) -> Result<Vec<String>, DiskError> {
        let failed = |e: Errno| DiskError::io("list", &self.path, e.into());
        let mut names = Vec::new();
        for entry in rustix::fs::Dir::read_from(&self.fd).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            match entry.file_name().to_str() {
                Ok("." | "..") | Err(_) => {}
                Ok(name) => names.push(name.to_owned()),
            }
        }
        names.sort_unstable();
        Ok(names)
    }

    /// Makes renames, creations and removals in here durable.
    ///
    /// # Errors
    /// [`DiskError::Io`].
    pub fn sync(&self) -> Result<(), DiskError> {
        rustix::fs::fsync(&self.fd).map_err(|e| DiskError::io("sync", &self.path, e.into()))
    }
}
