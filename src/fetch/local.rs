//! A file on this node as a source.
//!
//! Why: an image may be here already; it is copied as sparse as it is.
//! How: where the file system can share blocks (XFS, Btrfs), nothing is copied at all; elsewhere
//! holes are asked for (SEEK_DATA) and passed on as zero ranges without being read; size and
//! time of the file are its version, checked again at the end.
//! Never: opens anything but a regular file.
//! Start at [`LocalFile::open`].

use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::fs::SeekFrom;
use rustix::io::Errno;

use super::decode::Codec;
use super::error::FetchError;
use super::limit::RateLimit;
use super::pipeline::{Feed, Stopped};
use super::places::Places;
use super::progress::Progress;
use super::version::Remote;
use crate::disk::{Sealed, UNIT_BYTES};
use crate::ring::{BLOCK_BYTES, Buf, BufShare};

/// An open source file.
#[derive(Debug)]
pub(super) struct LocalFile {
    file: File,
    path: PathBuf,
    /// Length in bytes.
    pub(super) len_bytes: u64,
    /// Its version: inode, size, and the times of its content and of its last change, in the form of a strong validator.
    pub(super) remote: Remote,
}

fn version_of(file: &File, path: &Path) -> Result<(u64, Remote), FetchError> {
    let meta = file.metadata().map_err(|source| FetchError::Local {
        op: "stat",
        path: path.to_owned(),
        source,
    })?;
    let (inode, len) = (meta.ino(), meta.len());
    // Whoever copies with `-p` sets the time of the content; nobody sets that of the change.
    let (time, nanos) = (meta.mtime(), meta.mtime_nsec());
    let (changed, changed_nanos) = (meta.ctime(), meta.ctime_nsec());
    let tag = format!("\"file-{inode}-{len}-{time}.{nanos}-{changed}.{changed_nanos}\"");
    Ok((len, Remote::new(Some(&tag), None)))
}

impl LocalFile {
    /// Opens a file where `places` lets a source be.
    pub(super) fn open(path: &Path, places: &Places) -> Result<Self, FetchError> {
        Self::of(&places.open(path)?)
    }

    /// A file that is open already.
    pub(super) fn of(sealed: &Sealed) -> Result<Self, FetchError> {
        let path = sealed.path().to_owned();
        let failed = |source| FetchError::Local { op: "open", path: path.clone(), source };
        let file = sealed.file().try_clone().map_err(failed)?;
        let (len_bytes, remote) = version_of(&file, &path)?;
        if len_bytes == 0 {
            return Err(FetchError::Empty { url: path.display().to_string() });
        }
        Ok(Self { file, path, len_bytes, remote })
    }

    fn failed(&self, op: &'static str, source: io::Error) -> FetchError {
        FetchError::Local { op, path: self.path.clone(), source }
    }

    /// The whole units from `at` on, up to `end`, that are a hole.
    fn hole_len(&self, at: u64, end: u64) -> Result<u64, FetchError> {
        let data = match rustix::fs::seek(&self.file, SeekFrom::Data(at)) {
            Ok(data) => data.min(end),
            Err(Errno::NXIO) => end,
            Err(Errno::INVAL | Errno::OPNOTSUPP) => at,
            Err(e) => return Err(self.failed("seek in", e.into())),
        };
        Ok(if data == end { end - at } else { (data - at) / UNIT_BYTES * UNIT_BYTES })
    }

    /// Puts `len` bytes from `at` on into an empty buffer.
    pub(super) fn read(&self, buf: &mut Buf, at: u64, len: usize) -> Result<(), FetchError> {
        self.read_into(&mut buf.spare(len)[..len], at)?;
        buf.set_len(len);
        Ok(())
    }

    /// Fills `bytes` from `at` on.
    pub(super) fn read_into(&self, bytes: &mut [u8], at: u64) -> Result<(), FetchError> {
        use std::os::unix::fs::FileExt;
        self.file.read_exact_at(bytes, at).map_err(|e| self.failed("read", e))
    }

    /// How the file is compressed, if it is.
    pub(super) fn codec(&self) -> Result<Option<Codec>, FetchError> {
        let len = self.len_bytes.min(Codec::SNIFF_BYTES as u64);
        let mut head = vec![0; usize::try_from(len).unwrap_or(0)];
        self.read_into(&mut head, 0)?;
        Ok(Codec::sniff(&head))
    }

    /// Makes `file` share this file's blocks, if both are on one file system that can (XFS, Btrfs).
    pub(super) fn share_blocks(&self, file: &File) -> bool {
        rustix::fs::ioctl_ficlone(file, &self.file).is_ok()
    }

    /// An error if the file is no longer as it was opened.
    pub(super) fn unchanged(&self) -> Result<(), FetchError> {
        let (_, now) = version_of(&self.file, &self.path)?;
        if now != self.remote {
            let what = "its size or time is another".to_owned();
            return Err(FetchError::Changed { url: self.path.display().to_string(), what });
        }
        Ok(())
    }

    /// Copies `range` into `feed`. Blocks the thread; `pool` and `limit` wait on
    /// `runtime`.
    pub(super) fn copy(
        &self,
        range: std::ops::Range<u64>,
        feed: &Feed,
        pool: &BufShare,
        runtime: &tokio::runtime::Handle,
        progress: &Progress,
        limit: &RateLimit,
    ) -> Result<Result<(), Stopped>, FetchError> {
        let mut at = range.start;
        while at < range.end {
            if progress.is_stopped() {
                return Err(FetchError::Cancelled);
            }
            let hole = self.hole_len(at, range.end)?;
            let pushed = if hole > 0 {
                at += hole;
                feed.send_zeroes(at - hole, hole)
            } else {
                let room = BLOCK_BYTES as u64 - at % BLOCK_BYTES as u64;
                let len = usize::try_from(room.min(range.end - at)).unwrap_or(BLOCK_BYTES);
                let buf = runtime.block_on(async {
                    tokio::select! {
                        buf = pool.take() => buf.map_err(|source| FetchError::Memory { source }),
                        () = progress.stopped() => Err(FetchError::Cancelled),
                    }
                });
                let mut buf = buf?;
                self.read(&mut buf, at, len)?;
                progress.add_received(len as u64);
                runtime.block_on(async {
                    tokio::select! {
                        () = limit.spend(len) => {}
                        () = progress.stopped() => {}
                    }
                });
                at += len as u64;
                feed.send(at - len as u64, buf)
            };
            if pushed.is_err() {
                return Ok(pushed);
            }
        }
        self.unchanged()?;
        Ok(Ok(()))
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn other_bytes_are_another_version_whatever_time_they_are_given() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        std::fs::write(&path, "one").unwrap();
        let open = || LocalFile::open(&path, &Places::Any).unwrap();
        let before = open();
        assert!(before.unchanged().is_ok() && before.remote == open().remote);
        let mut file = File::options().write(true).open(&path).unwrap();
        let time = file.metadata().unwrap().modified().unwrap();
        let changed = |file: &File| file.metadata().map(|meta| (meta.ctime(), meta.ctime_nsec()));
        let changed_before = changed(&file).unwrap();
        file.write_all(b"two").unwrap();
        file.set_modified(time).unwrap();
        // The clock that files are stamped with goes in steps.
        while changed(&file).unwrap() == changed_before {
            file.set_modified(time).unwrap();
        }
        assert_eq!(file.metadata().unwrap().modified().unwrap(), time);
        assert!(open().remote != before.remote);
        assert!(matches!(before.unchanged(), Err(FetchError::Changed { .. })));
    }
}
