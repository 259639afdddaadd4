//! The holes of a raw file.
//!
//! Why: reading a hole of a sparse file fills the page cache with zeroes, once for every file.
//! How: one bit per 64 KiB, found with SEEK_DATA and SEEK_HOLE when the file is opened: 1 MiB of
//! memory for 500 GiB, in a table that readers in other processes may map. A unit counts as a hole
//! only if all of it is one.
//! Never: calls a unit a hole that holds data; without SEEK_HOLE everything is data.
//! Start at [`HoleMap::of_file`].

use std::fs::File;
use std::io;
use std::sync::atomic::Ordering;

use rustix::fs::SeekFrom;
use rustix::io::Errno;

use crate::map::SharedTable;
use crate::map::format::{Header, Kind};
use crate::units::KIB;

/// Bytes that one bit speaks for.
const UNIT_BYTES: u64 = 64 * KIB;
const UNIT_BITS: u32 = 16;
const BITS: u64 = u64::BITS as u64;

/// Which 64 KiB units of a file hold data; fixed once built.
#[derive(Debug)]
pub(super) struct HoleMap {
    /// Bit `n % 64` of word `n / 64` is set if unit `n` holds data.
    data: SharedTable,
}

impl HoleMap {
    /// Asks the file system where the first `len_bytes` of `file` are holes.
    ///
    /// At most two system calls per unit of data, and far fewer for files of long extents.
    ///
    /// # Errors
    /// The system refuses the shared memory.
    pub(super) fn of_file(file: &File, len_bytes: u64) -> io::Result<Self> {
        let map = Self::new(len_bytes)?;
        let mut at = 0;
        while at < len_bytes {
            let (start, end) = match next_data(file, at) {
                Ok(Some(extent)) => extent,
                Ok(None) => break,
                Err(_no_seek_hole_here) => (at, len_bytes),
            };
            let last = end.min(len_bytes).saturating_sub(1) / UNIT_BYTES;
            for unit in start / UNIT_BYTES..=last {
                map.set(unit);
            }
            at = (last + 1) * UNIT_BYTES;
        }
        Ok(map)
    }

    /// Of a file that nobody can ask yet: everything is data.
    ///
    /// # Errors
    /// As [`of_file`](Self::of_file).
    pub(super) fn all_data(len_bytes: u64) -> io::Result<Self> {
        let map = Self::new(len_bytes)?;
        map.data.words().iter().for_each(|word| word.store(u64::MAX, Ordering::Relaxed));
        Ok(map)
    }

    fn new(len_bytes: u64) -> io::Result<Self> {
        let units = len_bytes.div_ceil(UNIT_BYTES).max(1);
        let (kind, unit_bits, size_bytes) = (Kind::Bits, UNIT_BITS, len_bytes);
        let header = Header { kind, unit_bits, units, size_bytes, ..Header::EMPTY };
        Ok(Self { data: SharedTable::new("bedplate-holes", &header)? })
    }

    /// The bits, for readers in other processes.
    pub(super) fn table(&self) -> &SharedTable {
        &self.data
    }

    fn set(&self, unit: u64) {
        if let Some(word) = self.data.words().get(index(unit)) {
            word.fetch_or(1 << (unit % BITS), Ordering::Relaxed);
        }
    }

    fn word(&self, unit: u64) -> Option<u64> {
        self.data.words().get(index(unit)).map(|word| word.load(Ordering::Relaxed))
    }

    /// Whether byte `at` is in a hole, and the first byte after it, at most `end`, where that
    /// changes. `at < end <= ` the file's length.
    pub(super) fn run_at(&self, at: u64, end: u64) -> (bool, u64) {
        let first = at / UNIT_BYTES;
        let is_data = self.word(first).is_none_or(|word| word >> (first % BITS) & 1 == 1);
        let mut unit = first;
        while unit * UNIT_BYTES < end {
            // A set bit marks a unit of the other kind.
            let word = self.word(unit).unwrap_or(u64::MAX);
            let others = if is_data { !word } else { word } >> (unit % BITS);
            if others != 0 {
                unit += u64::from(others.trailing_zeros());
                break;
            }
            unit = (unit / BITS + 1) * BITS;
        }
        (!is_data, (unit.saturating_mul(UNIT_BYTES)).min(end))
    }
}

fn index(unit: u64) -> usize {
    usize::try_from(unit / BITS).unwrap_or(usize::MAX)
}

/// The next extent of data at or after `at`, or `None` if only a hole is left.
fn next_data(file: &File, at: u64) -> Result<Option<(u64, u64)>, Errno> {
    let start = match rustix::fs::seek(file, SeekFrom::Data(at)) {
        Ok(start) => start,
        Err(Errno::NXIO) => return Ok(None),
        Err(errno) => return Err(errno),
    };
    let end = rustix::fs::seek(file, SeekFrom::Hole(start))?;
    if start < at || end <= start {
        return Err(Errno::INVAL);
    }
    Ok(Some((start, end)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt;

    fn runs(file: &File, len: u64) -> Vec<(bool, u64)> {
        let map = HoleMap::of_file(file, len).unwrap();
        let mut runs = Vec::new();
        let mut at = 0;
        while at < len {
            let (hole, end) = map.run_at(at, len);
            assert!(end > at);
            runs.push((hole, end - at));
            at = end;
        }
        runs
    }

    #[test]
    fn a_unit_is_a_hole_only_if_all_of_it_is_one() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(10 << 20).unwrap();
        file.write_all_at(b"x", (5 << 20) + 70_000).unwrap();
        let unit = UNIT_BYTES;
        assert_eq!(
            runs(&file, 10 << 20),
            [(true, (5 << 20) + unit), (false, unit), (true, (5 << 20) - 2 * unit)]
        );
    }

    #[test]
    fn a_file_of_one_hole_and_a_file_of_data_are_one_run_each() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(100_001).unwrap();
        assert_eq!(runs(&file, 100_001), [(true, 100_001)]);
        file.write_all_at(&[1; 100_001], 0).unwrap();
        assert_eq!(runs(&file, 100_001), [(false, 100_001)]);
    }

    #[test]
    fn a_run_stops_at_the_limit_and_may_begin_inside_a_unit() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(1 << 30).unwrap();
        let map = HoleMap::of_file(&file, 1 << 30).unwrap();
        assert_eq!(map.run_at(1, 1 << 30), (true, 1 << 30));
        assert_eq!(map.run_at(70_000, 70_001), (true, 70_001));
    }

    #[test]
    fn a_file_without_holes_to_ask_for_is_all_data() {
        let file = File::open("/proc/self/status").unwrap();
        assert_eq!(HoleMap::of_file(&file, 200_000).unwrap().run_at(5, 200_000), (false, 200_000));
    }
}
