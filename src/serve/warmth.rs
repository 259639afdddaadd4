//! Which parts of a mapped file are known to be in memory, and bringing in the others.
//!
//! Why: a page fault in the middle of a send blocks the whole connection for one disk read, so a
//! cold map serves at queue depth 1 whatever the client asks for.
//! How: each file of a view is cut into windows of 2 MiB. Large and sequential reads, and windows that are
//! read often, are populated whole, once; the kernel is asked for the window first, since in a
//! map with MADV_RANDOM populating reads page by page (measured: 1 s for a cold window). For
//! other reads the kernel is told of all of a batch before the first is touched, so that the
//! disk sees them at once.
//! Never: fails: a page that cannot be read is found by the send.
//! Start at [`Warmth::warm`]. Numbers: a map with MADV_RANDOM 12, with reads in advance 44 kIOPS.

use std::sync::atomic::{AtomicU16, AtomicU64, Ordering};

use crate::image::{Stored, View};
use crate::map::FileMap;
use crate::units::{FileOffset, MIB};

/// Size of a window in bytes: that of a huge page, and a good disk read.
const WINDOW_BYTES: u64 = 2 * MIB;
/// A read of this many bytes or more is worth a whole window.
const LARGE_BYTES: u32 = 128 << 10;
/// Small reads into one window are counted in units of this many bytes, at least one each.
const TOUCH_BYTES: u32 = 4096;
/// At so many touches the kernel is asked for the whole window.
const ASK_TOUCHES: u16 = 96;
/// At so many, by when it has most likely come, the window is populated: a quarter of it has been
/// read, so that a disk reads at most four times what clients asked for.
const POPULATE_TOUCHES: u16 = 128;
/// How far ahead of a sequential reader the kernel is asked for pages, in windows.
const AHEAD_WINDOWS: u64 = 2;

/// What is known about the pages of a view's files. Shared by all connections of an export.
#[derive(Debug)]
pub struct Warmth {
    /// By layer.
    files: Vec<FileWarmth>,
}

/// What is known about the pages of one file.
#[derive(Debug)]
struct FileWarmth {
    file_bytes: u64,
    /// One bit a window: it has been populated.
    resident: Vec<AtomicU64>,
    /// One bit a window: the kernel has been told of all of it.
    asked: Vec<AtomicU64>,
    /// How much has been read of each window that is not resident, in small reads.
    touches: Vec<AtomicU16>,
}

/// A range of the file that a batch of replies is about to send.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// First byte.
    pub stored: Stored,
    /// Length in bytes.
    pub len_bytes: usize,
    /// Length of the request that it is a part of, in bytes: this says whether it is a large one.
    pub whole_request_bytes: u32,
    /// The client reads forward from where its last read ended.
    pub sequential: bool,
}

impl Wanted {
    fn is_whole(&self) -> bool {
        self.sequential || self.whole_request_bytes >= LARGE_BYTES
    }
}

impl Warmth {
    /// For the files of `view`, of which nothing is known yet.
    #[must_use]
    pub fn new(view: &View) -> Self {
        Self { files: view.maps().map(|map| FileWarmth::new(map.len_bytes())).collect() }
    }

    /// True if all windows of the range have been populated: the one test on a hot path.
    #[must_use]
    pub fn is_resident(&self, stored: Stored, len_bytes: usize) -> bool {
        let file = self.files.get(usize::from(stored.layer));
        file.is_none_or(|file| file.is_resident(stored.at, len_bytes))
    }

    /// Brings in what a batch wants before the batch is sent. `wanted` holds what was not
    /// resident when it was gathered. Waits for the disk only for whole windows.
    pub fn warm(&self, view: &View, wanted: &[Wanted]) {
        // A lone small read gains nothing from a hint: the send itself is the read.
        let hint = wanted.len() > 1;
        for want in wanted {
            if let Some((file, map)) = self.file(view, want.stored) {
                file.hint(map, want, hint);
            }
        }
        for want in wanted {
            if let Some((file, map)) = self.file(view, want.stored) {
                file.warm(map, want);
            }
        }
    }

    /// Tells the kernel of all windows of a range that it has not been told of, without waiting.
    pub fn ask(&self, view: &View, stored: Stored, len_bytes: u64) {
        if let Some((file, map)) = self.file(view, stored) {
            file.ask(map, stored.at, len_bytes);
        }
    }

    fn file<'a>(&self, view: &'a View, stored: Stored) -> Option<(&FileWarmth, &'a FileMap)> {
        self.files.get(usize::from(stored.layer)).zip(view.map(stored.layer))
    }
}

impl FileWarmth {
    /// For a file of `file_bytes`, of which nothing is known yet.
    fn new(file_bytes: u64) -> Self {
        let windows = usize::try_from(file_bytes.div_ceil(WINDOW_BYTES)).unwrap_or(usize::MAX);
        let words = windows.div_ceil(64);
        Self {
            file_bytes,
            resident: (0..words).map(|_| AtomicU64::new(0)).collect(),
            asked: (0..words).map(|_| AtomicU64::new(0)).collect(),
            touches: (0..windows).map(|_| AtomicU16::new(0)).collect(),
        }
    }

    fn is_resident(&self, at: FileOffset, len_bytes: usize) -> bool {
        self.windows(at, len_bytes as u64).all(|window| has(&self.resident, window))
    }

    /// Tells the kernel of what is wanted, without waiting; of a small read only with `hint`.
    fn hint(&self, map: &FileMap, want: &Wanted, hint: bool) {
        let at = want.stored.at;
        if want.is_whole() {
            let ahead = if want.sequential { AHEAD_WINDOWS * WINDOW_BYTES } else { 0 };
            self.ask(map, at, want.len_bytes as u64 + ahead);
        } else if hint {
            map.will_need(at, want.len_bytes);
        }
    }

    fn warm(&self, map: &FileMap, want: &Wanted) {
        for window in self.windows(want.stored.at, want.len_bytes as u64) {
            if want.is_whole() || self.is_popular(map, window, want) {
                self.populate(map, window);
            }
        }
    }

    fn ask(&self, map: &FileMap, at: FileOffset, len_bytes: u64) {
        for window in self.windows(at, len_bytes) {
            if !has(&self.resident, window) && !set(&self.asked, window) {
                let (at, len_bytes) = self.range(window);
                map.will_need(at, len_bytes);
            }
        }
    }

    fn populate(&self, map: &FileMap, window: u64) {
        if has(&self.resident, window) {
            return;
        }
        let (at, len_bytes) = self.range(window);
        match map.populate(at, len_bytes) {
            Ok(()) => {
                set(&self.resident, window);
            }
            // An unreadable page in the window; the others of it are served one by one.
            Err(error) => tracing::debug!(%at, len_bytes, %error, "window not populated"),
        }
    }

    /// Counts a small read; true once, when it is time to populate the window.
    fn is_popular(&self, map: &FileMap, window: u64, want: &Wanted) -> bool {
        let touches = usize::try_from(window).ok().and_then(|index| self.touches.get(index));
        let Some(touches) = touches else { return false };
        let weight = u16::try_from(want.whole_request_bytes / TOUCH_BYTES).unwrap_or(1).max(1);
        // After a wrap it is tried again, should populating have failed.
        let before = touches.fetch_add(weight, Ordering::Relaxed);
        let passes = |mark| before < mark && before.saturating_add(weight) >= mark;
        if passes(ASK_TOUCHES) {
            let (at, len_bytes) = self.range(window);
            self.ask(map, at, len_bytes as u64);
        }
        passes(POPULATE_TOUCHES)
    }

    /// The windows that a range lies in, cut at the end of the file.
    fn windows(&self, at: FileOffset, len_bytes: u64) -> std::ops::Range<u64> {
        let end = at.0.saturating_add(len_bytes).min(self.file_bytes);
        at.0 / WINDOW_BYTES..end.div_ceil(WINDOW_BYTES)
    }

    fn range(&self, window: u64) -> (FileOffset, usize) {
        let start = window * WINDOW_BYTES;
        let len_bytes = self.file_bytes.saturating_sub(start).min(WINDOW_BYTES);
        (FileOffset(start), usize::try_from(len_bytes).unwrap_or(0))
    }
}

fn place(bits: &[AtomicU64], window: u64) -> Option<(&AtomicU64, u64)> {
    let word = bits.get(usize::try_from(window / 64).ok()?)?;
    Some((word, 1 << (window % 64)))
}

fn has(bits: &[AtomicU64], window: u64) -> bool {
    place(bits, window).is_none_or(|(word, bit)| word.load(Ordering::Relaxed) & bit != 0)
}

/// Sets a bit, and tells whether it was set before. A window outside the file counts as set.
fn set(bits: &[AtomicU64], window: u64) -> bool {
    place(bits, window).is_none_or(|(word, bit)| word.fetch_or(bit, Ordering::Relaxed) & bit != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map_of(len_bytes: u64) -> FileMap {
        let file = tempfile::tempfile().unwrap();
        file.set_len(len_bytes).unwrap();
        FileMap::new(&file, len_bytes).unwrap()
    }

    fn want(at: u64, len_bytes: u32, sequential: bool) -> Wanted {
        let whole_request_bytes = len_bytes;
        let len_bytes = len_bytes as usize;
        let stored = Stored { layer: 0, at: FileOffset(at) };
        Wanted { stored, len_bytes, whole_request_bytes, sequential }
    }

    fn small(at: u64) -> Wanted {
        want(at, 4096, false)
    }

    #[test]
    fn a_large_read_makes_its_windows_resident_and_no_others() {
        let map = map_of(9 * MIB);
        let warmth = FileWarmth::new(9 * MIB);
        warmth.warm(&map, &want(MIB, 2 << 20, false));
        assert!(warmth.is_resident(FileOffset(0), 4 << 20));
        assert!(!warmth.is_resident(FileOffset(4 * MIB), 1));
        assert!(!warmth.is_resident(FileOffset(8 * MIB), 1));
    }

    #[test]
    fn a_window_of_many_small_reads_becomes_resident() {
        let map = map_of(5 * MIB);
        let warmth = FileWarmth::new(5 * MIB);
        for read in 0..u64::from(POPULATE_TOUCHES) {
            assert!(!warmth.is_resident(FileOffset(4 * MIB), 4096), "after {read} reads");
            warmth.warm(&map, &small(4 * MIB + read * 8192));
        }
        assert!(warmth.is_resident(FileOffset(4 * MIB), 4096), "a window cut by the file's end");
    }

    #[test]
    fn a_window_that_cannot_be_read_does_not_count_as_resident() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(4 * MIB).unwrap();
        let map = FileMap::new(&file, 4 * MIB).unwrap();
        file.set_len(MIB).unwrap();
        let warmth = FileWarmth::new(4 * MIB);
        warmth.warm(&map, &want(0, 4 << 20, true));
        assert!(!warmth.is_resident(FileOffset(0), 1));
    }

    #[test]
    fn an_empty_range_is_resident() {
        assert!(FileWarmth::new(0).is_resident(FileOffset(0), 0));
        assert!(FileWarmth::new(2 * MIB).is_resident(FileOffset(2 * MIB), 0));
    }
}
