//! An image as a guest sees it: a flat range of read-only bytes.
//!
//! Why: servers answer requests for guest ranges and must not care about formats.
//! How: [`View::run_at`] resolves a position into a run; the server sends it from the map, as
//! zeroes, or from a decoded cluster. [`View::read_at`] does all of it into a buffer.
//! Never: changes a byte, takes a lock to resolve, or touches a mapped page in user space.
//! Start at [`View::open`].

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use super::decoded::Key;
use super::raw::HoleMap;
use super::{Decoded, DecodedCache, Format, ImageError, Info, ReadError, info, qcow2};
use crate::disk::Sealed;
use crate::map::{FileMap, KernelSlice};
use crate::units::{FileOffset, GuestOffset};

/// How the bytes of a run are had.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RunKind {
    /// In the file from this position on, contiguous: see [`View::mapped`].
    Data(FileOffset),
    /// Zeroes; reading the file for them would be waste.
    Zero,
    /// In one compressed cluster: see [`View::decoded`].
    Encoded,
}

/// A guest range of one kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// How its bytes are had.
    pub kind: RunKind,
    /// Its length in bytes, at least 1.
    pub len_bytes: u64,
}

#[derive(Debug)]
enum Layout {
    Raw(HoleMap),
    Qcow2(qcow2::ClusterMap),
}

/// A flat range of read-only bytes, for any number of threads.
#[derive(Debug)]
pub struct View {
    sealed: Sealed,
    map: FileMap,
    info: Info,
    layout: Layout,
    cache: Arc<DecodedCache>,
    id: u64,
}

impl View {
    /// Opens a sealed file as `declared`, or as what its content says. Reads the header only;
    /// table entries are checked when first touched. Decoded clusters go to the cache that the
    /// process shares.
    ///
    /// # Errors
    /// [`ImageError`]: not an image that can be served, or the host failed to read or map it.
    pub fn open(sealed: Sealed, declared: Option<Format>) -> Result<Self, ImageError> {
        Self::open_with_cache(sealed, declared, DecodedCache::process_wide())
    }

    /// As [`open`](Self::open), with a cache of the caller's choice.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn open_with_cache(
        sealed: Sealed,
        declared: Option<Format>,
        cache: Arc<DecodedCache>,
    ) -> Result<Self, ImageError> {
        let (file, path) = (sealed.file(), sealed.path());
        let mut info = info::identify(file, path, declared)?;
        // The length at which the file was sealed counts, should it differ by now.
        let len_bytes = sealed.len_bytes().min(info.file_size_bytes);
        let layout = match info.format {
            Format::Raw => Layout::Raw(HoleMap::of_file(file, len_bytes)),
            Format::Qcow2 => {
                let image = qcow2::Image::open(file, path, len_bytes)?;
                image.describe(&mut info);
                Layout::Qcow2(qcow2::ClusterMap::new(image, path)?)
            }
        };
        let map = FileMap::new(file, len_bytes).map_err(|source| ImageError::Map {
            path: path.to_owned(),
            what: "the file",
            len_bytes,
            source,
        })?;
        let id = cache.register_view();
        Ok(Self { sealed, map, info, layout, cache, id })
    }

    /// Length of the disk in bytes.
    #[must_use]
    pub fn size_bytes(&self) -> u64 {
        self.info.virtual_size_bytes
    }

    /// The format of the stored file.
    #[must_use]
    pub fn format(&self) -> Format {
        self.info.format
    }

    /// What the header says; see [`super::inspect`] for a full check.
    #[must_use]
    pub fn info(&self) -> &Info {
        &self.info
    }

    /// Where the file was opened, for messages.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.sealed.path()
    }

    /// The stored file, read-only.
    #[must_use]
    pub fn file(&self) -> &File {
        self.sealed.file()
    }

    /// The whole stored file, mapped.
    #[must_use]
    pub fn map(&self) -> &FileMap {
        &self.map
    }

    /// QCOW2 only: what every guest cluster is, in shared memory that a reader may map.
    #[must_use]
    pub fn cluster_map(&self) -> Option<&qcow2::ClusterMap> {
        match &self.layout {
            Layout::Raw(_) => None,
            Layout::Qcow2(clusters) => Some(clusters),
        }
    }

    /// The bytes `[at, at + len)` of the stored file as an address for the kernel; `None` if they
    /// are not all in the file.
    #[must_use]
    pub fn mapped(&self, at: FileOffset, len: usize) -> Option<KernelSlice<'_>> {
        self.map.slice(at, len)
    }

    /// The run of one kind that begins at `at`, at most `limit_bytes` long. Neighbouring clusters
    /// that are contiguous in the file, or zero, are merged, though not always as far as possible;
    /// an encoded run never crosses its cluster.
    ///
    /// No lock and no allocation; no system call either once the L2 table of `at` has been read.
    ///
    /// # Errors
    /// [`ReadError::PastEnd`] for a position outside the disk or a limit of 0;
    /// [`ReadError::Malformed`] if the table entry for `at` is damaged; [`ReadError::Io`].
    pub fn run_at(&self, at: GuestOffset, limit_bytes: u64) -> Result<Run, ReadError> {
        let size_bytes = self.size_bytes();
        if at.0 >= size_bytes || limit_bytes == 0 {
            return Err(ReadError::PastEnd { at, len_bytes: limit_bytes, size_bytes });
        }
        let end = at.0.saturating_add(limit_bytes).min(size_bytes);
        match &self.layout {
            Layout::Raw(holes) => {
                let (hole, end) = holes.run_at(at.0, end);
                let kind = if hole { RunKind::Zero } else { RunKind::Data(FileOffset(at.0)) };
                Ok(Run { kind, len_bytes: end - at.0 })
            }
            Layout::Qcow2(clusters) => clusters.run_at(self.sealed.file(), at, end),
        }
    }

    /// The decoded cluster around `at`, from the cache if it is there.
    ///
    /// # Errors
    /// [`ReadError::NotEncoded`] if `at` is not in a compressed cluster, [`ReadError::Decode`] if
    /// its stream is damaged, and those of [`run_at`](Self::run_at).
    pub fn decoded(&self, at: GuestOffset) -> Result<Decoded, ReadError> {
        if at.0 >= self.size_bytes() {
            return Err(ReadError::PastEnd { at, len_bytes: 1, size_bytes: self.size_bytes() });
        }
        match &self.layout {
            Layout::Raw(_) => Err(ReadError::NotEncoded { at }),
            Layout::Qcow2(clusters) => {
                let (cluster, start) = clusters.cluster_of(at);
                let key = Key { view: self.id, cluster };
                let decode = || clusters.decode(self.sealed.file(), at);
                Ok(Decoded { bytes: self.cache.get_or_decode(key, decode)?, start })
            }
        }
    }

    /// Fills `buf` with the disk's bytes from `at` on. Data is read with pread, so that a page that
    /// cannot be read is an error and not a signal.
    ///
    /// # Errors
    /// [`ReadError::PastEnd`] if the range is not all inside the disk (nothing is read then), and
    /// those of [`run_at`](Self::run_at) and [`decoded`](Self::decoded).
    pub fn read_at(&self, buf: &mut [u8], at: GuestOffset) -> Result<(), ReadError> {
        let (len_bytes, size_bytes) = (buf.len() as u64, self.size_bytes());
        if at.checked_add(len_bytes).is_none_or(|end| end.0 > size_bytes) {
            return Err(ReadError::PastEnd { at, len_bytes, size_bytes });
        }
        let (mut rest, mut at) = (buf, at);
        while !rest.is_empty() {
            let run = self.run_at(at, rest.len() as u64)?;
            let len = usize::try_from(run.len_bytes).unwrap_or(rest.len()).min(rest.len());
            let (part, after) = rest.split_at_mut(len);
            match run.kind {
                RunKind::Zero => part.fill(0),
                RunKind::Data(stored_at) => self
                    .file()
                    .read_exact_at(part, stored_at.0)
                    .map_err(|source| ReadError::io(self.path(), stored_at.0, len, source))?,
                RunKind::Encoded => {
                    let decoded = self.decoded(at)?.from(at);
                    let from = decoded.get(..len).ok_or(ReadError::NotEncoded { at })?;
                    part.copy_from_slice(from);
                }
            }
            (rest, at) = (after, at.advance(run.len_bytes));
        }
        Ok(())
    }
}

impl Drop for View {
    fn drop(&mut self) {
        if self.info.format == Format::Qcow2 {
            self.cache.forget_view(self.id);
        }
    }
}
