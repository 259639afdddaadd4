//! Which pages of a file were in memory when they were last read.
//!
//! Why: data in memory is best copied from a map; data on a disk is best read with pread, which
//! reads ahead, while a map reads page by page.
//! How: one bit for each 4 KiB, set when a range was read with pread, cleared around a copy that
//! was slow. The bits are a hint: a wrong one costs time and changes no byte.
//! Never: costs memory for what was not read: untouched words of a large table are no pages.
//! Start at [`Resident::holds`].

use std::sync::atomic::{AtomicU64, Ordering};

use crate::units::FileOffset;

const PAGE_BITS: u32 = 12;
const BITS: u64 = u64::BITS as u64;
/// Pages that are forgotten around a slow copy: 512 KiB on each side.
const FORGET_PAGES: u64 = 128;

const _: () = assert!(align_of::<AtomicU64>() == align_of::<u64>());

/// One bit for each 4 KiB of a file.
#[derive(Debug)]
pub struct Resident {
    words: Box<[AtomicU64]>,
}

impl Resident {
    /// For a file of `len_bytes`, of which nothing is known.
    #[must_use]
    pub fn new(len_bytes: u64) -> Self {
        let words = len_bytes.div_ceil(BITS << PAGE_BITS);
        let words = usize::try_from(words).expect("a file's length / 256 KiB is usize");
        // All zeroes comes from the system as untouched memory, which a loop would touch.
        let zeroes = Box::into_raw(vec![0_u64; words].into_boxed_slice());
        // SAFETY: AtomicU64 has the size, alignment and bit patterns of u64 where pointers have 64
        // bits, and the box that it came from is not used any more.
        Self { words: unsafe { Box::from_raw(zeroes as *mut [AtomicU64]) } }
    }

    /// True if all pages of the range were in memory.
    #[must_use]
    pub fn holds(&self, at: FileOffset, len_bytes: usize) -> bool {
        self.masks(at.0, len_bytes as u64).all(|(word, mask)| {
            word.is_some_and(|word| word.load(Ordering::Relaxed) & mask == mask)
        })
    }

    /// The range has just been read.
    pub fn note(&self, at: FileOffset, len_bytes: usize) {
        for (word, mask) in self.masks(at.0, len_bytes as u64) {
            if let Some(word) = word {
                // Most often set already; a shared line is then not written.
                if word.load(Ordering::Relaxed) & mask != mask {
                    word.fetch_or(mask, Ordering::Relaxed);
                }
            }
        }
    }

    /// The range had to be read from the disk, and most likely so what is around it.
    pub fn forget_around(&self, at: FileOffset, len_bytes: usize) {
        let around = FORGET_PAGES << PAGE_BITS;
        let start = at.0.saturating_sub(around);
        let end = at.0.saturating_add((len_bytes as u64).saturating_add(around));
        for (word, mask) in self.masks(start, end - start) {
            if let Some(word) = word {
                word.fetch_and(!mask, Ordering::Relaxed);
            }
        }
    }

    /// The words of a range's pages, and the bits in each.
    fn masks(&self, at: u64, len: u64) -> impl Iterator<Item = (Option<&AtomicU64>, u64)> {
        let (mut page, end) = (at >> PAGE_BITS, at.saturating_add(len).div_ceil(1 << PAGE_BITS));
        std::iter::from_fn(move || {
            (page < end).then(|| {
                let (index, first) = (page / BITS, page % BITS);
                let count = (BITS - first).min(end - page);
                page += count;
                let word = usize::try_from(index).ok().and_then(|index| self.words.get(index));
                (word, u64::MAX >> (BITS - count) << first)
            })
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_read_is_held_to_the_page() {
        let pages = Resident::new(10 << 20);
        assert!(!pages.holds(FileOffset(0), 1));
        pages.note(FileOffset(5000), 4096);
        assert!(pages.holds(FileOffset(4096), 8192));
        assert!(!pages.holds(FileOffset(4095), 2));
        assert!(!pages.holds(FileOffset(4096), 8193));
        pages.note(FileOffset(0), 10 << 20);
        assert!(pages.holds(FileOffset(0), 10 << 20));
        assert!(pages.holds(FileOffset(77), 0));
    }

    #[test]
    fn around_a_slow_copy_nothing_is_held_and_further_away_all_is() {
        let pages = Resident::new(10 << 20);
        pages.note(FileOffset(0), 10 << 20);
        pages.forget_around(FileOffset(5 << 20), 4096);
        for (at, held) in [(5 << 20, false), ((4 << 20) + (512 << 10), false), (4 << 20, true)] {
            assert_eq!(pages.holds(FileOffset(at), 1), held, "{at}");
        }
        pages.forget_around(FileOffset(0), 1);
        pages.forget_around(FileOffset((10 << 20) - 1), 1);
        assert!(!pages.holds(FileOffset(0), 1));
    }

    #[test]
    fn past_the_end_nothing_is_held_and_nothing_breaks() {
        let pages = Resident::new(4096);
        pages.note(FileOffset(u64::MAX - 5), 100);
        pages.forget_around(FileOffset(u64::MAX), usize::MAX);
        assert!(!pages.holds(FileOffset(1 << 40), 1));
    }
}
