//! Which files, directories and sockets of this node may be a source.
//!
//! Why: a daemon reads with its own rights; whoever may use its socket could else have any file of the
//! node brought in, and read it as a disk.
//! How: a place is held against a list of directories as it really is, links resolved; what is opened
//! then is that real path, in which there is no link.
//! Never: says whether a place that is refused exists.
//! Start at [`Places::real`].

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, Mode, OFlags, ResolveFlags};

use super::error::FetchError;
use crate::disk::{DiskError, Sealed};

/// Where on this node a source may be.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Places {
    /// Wherever this process may read.
    #[default]
    Any,
    /// Below one of these directories; with none of them nowhere.
    Below(Vec<PathBuf>),
}

impl Places {
    /// The path to open for `path`.
    ///
    /// # Errors
    /// [`FetchError::Place`]: it is not below one of the directories, or not there.
    pub(super) fn real(&self, path: &Path) -> Result<PathBuf, FetchError> {
        let Self::Below(dirs) = self else { return Ok(path.to_owned()) };
        let real = path.canonicalize().ok().filter(|_| path.is_absolute());
        let is_below = |real: &PathBuf| {
            dirs.iter().any(|dir| dir.canonicalize().is_ok_and(|dir| real.starts_with(dir)))
        };
        real.filter(is_below).ok_or_else(|| {
            let dirs: Vec<_> = dirs.iter().map(|dir| dir.display().to_string()).collect();
            let rule = match dirs.is_empty() {
                true => {
                    "upload the file, or have source_dirs of its configuration name a directory \
                         above it"
                        .to_owned()
                }
                false => format!("name one below {}, or upload the file", dirs.join(", ")),
            };
            FetchError::Place { path: path.to_owned(), rule }
        })
    }

    /// Opens what is below a directory that [`real`](Self::real) has given. Where places are bound, there
    /// is no link on the way: it could lead out of them.
    ///
    /// # Errors
    /// The kernel's.
    pub(super) fn open_below(&self, path: &Path) -> io::Result<File> {
        // A pipe in its place would be waited for.
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK;
        let opened = match self {
            Self::Any => rustix::fs::open(path, flags, Mode::empty()),
            Self::Below(_) => {
                rustix::fs::openat2(CWD, path, flags, Mode::empty(), ResolveFlags::NO_SYMLINKS)
            }
        };
        Ok(opened?.into())
    }

    /// Opens a file of this node as a source.
    ///
    /// # Errors
    /// As [`real`](Self::real); [`FetchError::Local`] and [`FetchError::Disk`] if it can't be opened, or
    /// is no regular file.
    pub(super) fn open(&self, path: &Path) -> Result<Sealed, FetchError> {
        let failed = |source| FetchError::Local { op: "open", path: path.to_owned(), source };
        let opened = match self {
            Self::Any => Sealed::open_path(path),
            Self::Below(_) => {
                // A directory that became a link meanwhile leads nowhere.
                let file = self.open_below(&self.real(path)?).map_err(failed)?;
                Sealed::of_opened(file, path)
            }
        };
        opened.map_err(|error| {
            // A path that cannot be opened is the request's fault, not the store's.
            if let DiskError::Io { source, .. } = error { failed(source) } else { error.into() }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_is_below_one_of_the_directories_as_it_really_is() {
        let temp = tempfile::tempdir().unwrap();
        let (inside, outside) = (temp.path().join("in"), temp.path().join("in-not"));
        for dir in [&inside, &outside] {
            std::fs::create_dir(dir).unwrap();
            std::fs::write(dir.join("disk"), dir.to_str().unwrap()).unwrap();
        }
        std::os::unix::fs::symlink(outside.join("disk"), inside.join("out")).unwrap();
        std::os::unix::fs::symlink(inside.join("disk"), outside.join("back")).unwrap();
        let places = Places::Below(vec![temp.path().join("nowhere"), inside.clone()]);
        for good in [inside.join("disk"), outside.join("back"), inside.join("../in/disk")] {
            let sealed = places.open(&good).unwrap();
            assert_eq!(sealed.len_bytes(), inside.as_os_str().len() as u64);
            assert_eq!(sealed.path(), good);
        }
        let not_there = inside.join("absent");
        for bad in
            [outside.join("disk"), inside.join("out"), inside.join("../in-not/disk"), not_there]
        {
            let error = places.open(&bad).unwrap_err();
            assert!(matches!(error, FetchError::Place { .. }), "{bad:?}: {error}");
            assert!(error.to_string().contains(inside.to_str().unwrap()), "{error}");
            // With no directory at all, and of what is there and what is not, the same is said.
            let error = Places::Below(Vec::new()).open(&bad).unwrap_err().to_string();
            assert!(error.contains("source_dirs"), "{error}");
        }
        assert!(Places::Any.open(&inside.join("out")).is_ok());
        // What is below a directory that was judged is not judged again.
        let real = places.real(&inside).unwrap();
        assert!(places.open_below(&real.join("disk")).is_ok());
        assert!(places.open_below(&real.join("out")).is_err());
        assert!(Places::Any.open_below(&real.join("out")).is_ok());
        assert!(matches!(places.open(&inside).unwrap_err(), FetchError::Disk(_)));
    }
}
