//! Reads stored bytes back into a hasher.
//!
//! Why: after a restart, or when a file was changed behind our back, digests need bytes that are
//! no longer in memory.
//! How: data is read in 1 MiB steps and dropped from the page cache again; holes are not read at
//! all, their zeroes are hashed from memory.
//! Never: reads past the given end.
//! Start at [`hash_range`].

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;

use rustix::fs::{Advice, SeekFrom};
use rustix::io::Errno;

use super::{DiskError, Hasher};
use crate::units::MIB;

/// Bytes of a hole after which the caller is heard again.
const HOLE_STEP_BYTES: u64 = 16 * MIB;

/// Feeds `range` of `file` to `hasher`. `progress` gets the bytes read so far and ends the work by
/// returning false.
///
/// # Errors
/// [`DiskError::Io`]; of kind `Interrupted` if `progress` ended it.
pub fn hash_range(
    file: &File,
    path: &Path,
    range: Range<u64>,
    hasher: &mut Hasher,
    progress: &mut dyn FnMut(u64) -> bool,
) -> Result<(), DiskError> {
    let mut buffer = vec![0u8; 1 << 20];
    let mut at = range.start;
    while at < range.end {
        let data = next_data(file, at).map_err(|e| DiskError::io("seek in", path, e.into()))?;
        let data = data.unwrap_or(range.end).clamp(at, range.end);
        while at < data {
            let step = (data - at).min(HOLE_STEP_BYTES);
            hasher.update_zeroes(step);
            at += step;
            go_on(at - range.start, progress, path)?;
        }
        let hole = match rustix::fs::seek(file, SeekFrom::Hole(at)) {
            Ok(hole) => hole.clamp(at, range.end),
            Err(_) => range.end,
        };
        while at < hole {
            let step = usize::try_from((hole - at).min(MIB)).unwrap_or(1 << 20);
            let buffer = &mut buffer[..step];
            file.read_exact_at(buffer, at).map_err(|e| DiskError::io("read", path, e))?;
            hasher.update(buffer);
            let len = std::num::NonZeroU64::new(step as u64);
            let _ = rustix::fs::fadvise(file, at, len, Advice::DontNeed);
            at += step as u64;
            go_on(at - range.start, progress, path)?;
        }
    }
    Ok(())
}

fn go_on(done: u64, progress: &mut dyn FnMut(u64) -> bool, path: &Path) -> Result<(), DiskError> {
    if progress(done) {
        return Ok(());
    }
    let stopped = std::io::Error::from(std::io::ErrorKind::Interrupted);
    Err(DiskError::io("go on reading", path, stopped))
}

/// Where the next data begins at or after `at`; `None` if all the rest is a hole.
pub(super) fn next_data(file: &File, at: u64) -> Result<Option<u64>, Errno> {
    match rustix::fs::seek(file, SeekFrom::Data(at)) {
        Ok(data) => Ok(Some(data)),
        Err(Errno::NXIO) => Ok(None),
        // A file system without SEEK_DATA: everything counts as data.
        Err(Errno::INVAL | Errno::OPNOTSUPP) => Ok(Some(at)),
        Err(e) => Err(e),
    }
}

/// [`hash_range`] over a whole file.
///
/// # Errors
/// As [`hash_range`].
pub fn hash_file(
    file: &File,
    path: &Path,
    len_bytes: u64,
    hasher: &mut Hasher,
    progress: &mut dyn FnMut(u64) -> bool,
) -> Result<(), DiskError> {
    hash_range(file, path, 0..len_bytes, hasher, progress)
}
