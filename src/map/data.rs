//! Reads of a file that is mapped: from the map what is in memory, with pread what is not.
//!
//! Why: a system call costs twice a copy of 4 KiB; but a map reads a cold disk page by page, and a
//! page that cannot be read is a signal.
//! How: what was read with pread is noted in a [`Resident`], and copied from the map by the guarded
//! routine the next time; a copy that was slow, because its pages had gone, takes the note away.
//! Never: returns a byte that is not the file's.
//! Start at [`MappedData::read`].

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use crate::units::FileOffset;
use crate::{Copied, FileMap, GuestSlice, Resident, guest};

/// A longer read gains nothing from the map.
const MAX_COPY_BYTES: usize = 4 << 20;

/// A file's map, and what is known of its pages.
#[derive(Debug)]
pub struct MappedData {
    map: FileMap,
    resident: Resident,
}

impl MappedData {
    /// Maps the first `len_bytes` of `file`.
    ///
    /// # Errors
    /// Those of [`FileMap::new`].
    pub fn new(file: &File, len_bytes: u64) -> io::Result<Self> {
        Ok(Self { map: FileMap::new(file, len_bytes)?, resident: Resident::new(len_bytes) })
    }

    /// The map.
    #[must_use]
    pub fn map(&self) -> &FileMap {
        &self.map
    }

    /// Fills `buf` with the bytes of `file`, which must be the mapped one, from `at` on.
    ///
    /// # Errors
    /// `UnexpectedEof` past the file's end, and those of pread; never a signal.
    #[inline]
    pub fn read(&self, file: &File, buf: &mut [u8], at: FileOffset) -> io::Result<()> {
        let len = buf.len();
        if len <= MAX_COPY_BYTES && self.resident.holds(at, len) {
            match self.map.copy_to(buf, at) {
                Copied::Fast => return Ok(()),
                Copied::Slow => {
                    self.resident.forget_around(at, len);
                    return Ok(());
                }
                Copied::Not => {}
            }
        }
        file.read_exact_at(buf, at.0)?;
        self.resident.note(at, len);
        Ok(())
    }

    /// As [`read`](Self::read), into the memory of a guest: `to` is filled in order.
    ///
    /// # Errors
    /// As [`read`](Self::read); EFAULT also if the guest's memory cannot be written.
    pub fn read_to_guest(
        &self,
        file: &File,
        to: &[GuestSlice<'_>],
        at: FileOffset,
    ) -> io::Result<()> {
        let len = to.iter().map(GuestSlice::len).sum();
        if len <= MAX_COPY_BYTES && self.resident.holds(at, len) && self.copy_all(to, at, len) {
            return Ok(());
        }
        guest::read_file(file, to, at)?;
        self.resident.note(at, len);
        Ok(())
    }

    /// False if a page could not be had, of the file or of the guest.
    fn copy_all(&self, to: &[GuestSlice<'_>], at: FileOffset, len: usize) -> bool {
        let mut next = at;
        for slice in to {
            match self.map.copy_to_guest(*slice, next) {
                Copied::Fast => {}
                Copied::Slow => self.resident.forget_around(at, len),
                Copied::Not => return false,
            }
            next = next.advance(slice.len() as u64);
        }
        true
    }

    /// Whether a range was in memory when it was read last.
    #[must_use]
    pub fn is_resident(&self, at: FileOffset, len: usize) -> bool {
        self.resident.holds(at, len)
    }
}
