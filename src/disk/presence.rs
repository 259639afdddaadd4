//! Which 64 KiB units of a filling copy are durably there: `backing.presence`.
//!
//! Why: after a crash at any instruction, what is here is known and not fetched again, and what is
//! not known to be here is.
//! How: page 0 names the version of the source that the bytes belong to. Bits follow in pages that
//! each have two places on disk, written in turn with a growing sequence number: a write that is
//! torn leaves the older page, never nothing.
//! Never: sets a bit on disk before its data is durable (the caller syncs the data first), or takes
//! a bit away: bytes of another version get a new file.
//! Start at [`Presence::commit`].
//!
//! ```text
//! page 0            header: magic, version, unit, JSON {"total_bytes":…,"tag":…}
//! page 1            unused
//! page 2 + 2i + s   bits of units [i*32512, (i+1)*32512), place s = sequence number mod 2
//! ```

use std::fs::File;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::{FallocateFlags, OFlags};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use super::page::{CONTENT_BYTES, PAGE_BYTES, Page};
use super::{Dir, DiskError};
use crate::units::KIB;

/// Bytes that one bit speaks for.
pub const UNIT_BYTES: u64 = 64 * KIB;
/// Largest file of an image: 16 TiB, what ext4 can hold.
pub const MAX_FILE_BYTES: u64 = 16 * crate::units::TIB;

const MAGIC: &[u8; 8] = b"BEDPRES1";
const VERSION: u64 = 1;
/// Where the JSON begins in the header page: magic, version, unit, length of the JSON.
const JSON_AT: usize = 32;
/// Where the words of bits begin in a bit page: sequence number, page index.
const BITS_AT: usize = 16;
const WORDS_PER_PAGE: usize = 508;
const UNITS_PER_PAGE: u64 = WORDS_PER_PAGE as u64 * 64;

const _: () = assert!(BITS_AT + WORDS_PER_PAGE * 8 <= CONTENT_BYTES);

/// The version of the source that the bytes of a filling copy belong to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Version {
    /// Length of the file in bytes; `None` while the source has not said.
    pub total_bytes: Option<u64>,
    /// The fetcher's own words for what identifies these bytes. Opaque here.
    pub tag: String,
}

impl Version {
    /// The first page of a file of ours that belongs to bytes of this version; `None` if it is too
    /// long. `unit`: bytes that one entry of the file speaks for.
    pub(super) fn header(&self, magic: &[u8; 8], unit: u64) -> Option<Page> {
        let json = serde_json::to_vec(self).unwrap_or_default();
        let mut page = Page::new();
        page.content_mut()[..8].copy_from_slice(magic);
        page.set_word(8, VERSION);
        page.set_word(16, unit);
        page.set_word(24, json.len() as u64);
        page.content_mut().get_mut(JSON_AT..JSON_AT + json.len())?.copy_from_slice(&json);
        Some(page)
    }

    /// What such a page says; `None` if it is of another kind, or no good.
    pub(super) fn of_header(page: &Page, magic: &[u8; 8], unit: u64) -> Option<Self> {
        let content = page.content();
        let known = &content[..8] == magic && page.word(8) == VERSION && page.word(16) == unit;
        let len = usize::try_from(page.word(24)).ok()?;
        let json = content.get(JSON_AT..)?.get(..len)?;
        let version: Self = known.then(|| serde_json::from_slice(json).ok())??;
        version.total_bytes.is_none_or(|total| total <= MAX_FILE_BYTES).then_some(version)
    }
}

/// The presence file and its bits in memory.
#[derive(Debug)]
pub struct Presence {
    file: Arc<File>,
    path: PathBuf,
    /// Where the file has its name, which may not be durable yet.
    new: Arc<New>,
    version: Version,
    words: Vec<u64>,
    sequence: Vec<u64>,
}

/// The name of a presence file. It has to be durable before there are bits: else they could be found
/// beside an older file of bytes.
#[derive(Debug)]
pub(super) struct New {
    dir: Dir,
    is_durable: AtomicBool,
}

impl New {
    fn file_in(dir: &Dir) -> Result<Arc<Self>, DiskError> {
        Ok(Arc::new(Self { dir: dir.try_clone()?, is_durable: AtomicBool::new(false) }))
    }

    /// Makes it durable if it is not.
    ///
    /// # Errors
    /// [`DiskError::Io`].
    pub(super) fn sync(&self) -> Result<(), DiskError> {
        if !self.is_durable.load(Ordering::SeqCst) {
            self.dir.sync()?;
            self.is_durable.store(true, Ordering::SeqCst);
        }
        Ok(())
    }
}

/// Bits that were written.
#[derive(Debug)]
pub(super) struct Written {
    file: Arc<File>,
    path: PathBuf,
}

impl Written {
    /// Makes them durable.
    ///
    /// # Errors
    /// [`DiskError::Io`].
    pub(super) fn sync(&self) -> Result<(), DiskError> {
        self.file.sync_data().map_err(|e| DiskError::io("sync", &self.path, e))
    }
}

fn page_of(word: usize) -> usize {
    word / WORDS_PER_PAGE
}

impl Presence {
    /// A new presence file with no bit set. It becomes durable with the first bits: until then there is
    /// nothing that it speaks of. An older one of that name is gone for good before.
    ///
    /// # Errors
    /// [`DiskError::Io`], [`DiskError::Full`], or a version too long to be kept.
    pub fn create(dir: &Dir, name: &str, version: Version) -> Result<Self, DiskError> {
        let path = dir.join(name);
        if dir.remove_if_there(name)? {
            dir.sync()?;
        }
        let file = dir.open_file(name, OFlags::RDWR | OFlags::CREATE | OFlags::EXCL)?;
        let Some(mut page) = version.header(MAGIC, UNIT_BYTES) else {
            let why = "the source's version is too long".to_owned();
            return Err(DiskError::Damaged { path, field: "presence header", why });
        };
        page.write(&file, 0).map_err(|e| DiskError::write(&path, 0, e))?;
        allocate(&file, &version).map_err(|e| DiskError::write(&path, 0, e.into()))?;
        let file = Arc::new(file);
        let new = New::file_in(dir)?;
        Ok(Self { file, path, new, version, words: Vec::new(), sequence: Vec::new() })
    }

    /// The presence file of an earlier run; `None` if there is none that can be believed.
    ///
    /// # Errors
    /// [`DiskError::Io`] if it can't be read. Damage is no error: those units are fetched again.
    pub fn load(dir: &Dir, name: &str) -> Result<Option<Self>, DiskError> {
        let path = dir.join(name);
        let Some(file) = dir.try_open_file(name, OFlags::RDWR)? else { return Ok(None) };
        let read_failed = |e| DiskError::io("read", &path, e);
        let Some(header) = Page::read(&file, 0).map_err(read_failed)? else { return Ok(None) };
        let Some(version) = Version::of_header(&header, MAGIC, UNIT_BYTES) else { return Ok(None) };
        let units = version.total_bytes.unwrap_or(0).div_ceil(UNIT_BYTES);
        let file = Arc::new(file);
        // An earlier run may have ended before its name was durable.
        let new = New::file_in(dir)?;
        let (words, sequence) = (Vec::new(), Vec::new());
        let mut presence = Self { file, path, new, version, words, sequence };
        for index in 0..units.div_ceil(UNITS_PER_PAGE) {
            presence.load_page(index)?;
        }
        Ok(Some(presence))
    }

    /// Reads both places of bit page `index` and takes the newer valid one.
    fn load_page(&mut self, index: u64) -> Result<(), DiskError> {
        let newest = Page::read_pair(&self.file, index);
        let newest = newest.map_err(|e| DiskError::io("read", &self.path, e))?;
        let Some(page) = newest else { return Ok(()) };
        let first = usize::try_from(index).unwrap_or(usize::MAX) * WORDS_PER_PAGE;
        for word in 0..WORDS_PER_PAGE {
            let bits = page.word(BITS_AT + word * 8);
            if bits != 0 {
                *self.word_mut(first + word) = bits;
            }
        }
        self.grow(first);
        self.sequence[page_of(first)] = page.word(0);
        self.clear_past_end();
        Ok(())
    }

    /// Bits past the end of the file mean nothing; a damaged or foreign page must not count them.
    fn clear_past_end(&mut self) {
        let units = self.version.total_bytes.unwrap_or(0).div_ceil(UNIT_BYTES);
        for (index, word) in self.words.iter_mut().enumerate() {
            let first = index as u64 * 64;
            if first >= units {
                *word = 0;
            } else if units - first < 64 {
                *word &= (1 << (units - first)) - 1;
            }
        }
    }

    fn grow(&mut self, word: usize) {
        if self.words.len() <= word {
            self.words.resize(word + 1, 0);
        }
        let pages = page_of(self.words.len() - 1) + 1;
        if self.sequence.len() < pages {
            self.sequence.resize(pages, 0);
        }
    }

    fn word_mut(&mut self, word: usize) -> &mut u64 {
        self.grow(word);
        &mut self.words[word]
    }

    /// What the bytes belong to.
    #[must_use]
    pub fn version(&self) -> &Version {
        &self.version
    }

    /// True if the unit with number `unit` is durably here.
    #[must_use]
    pub fn has_unit(&self, unit: u64) -> bool {
        let word = usize::try_from(unit / 64).ok().and_then(|w| self.words.get(w));
        word.is_some_and(|word| word >> (unit % 64) & 1 == 1)
    }

    /// The byte ranges of a file of `total_bytes` that are not here, in order.
    #[must_use]
    pub fn missing(&self, total_bytes: u64) -> Vec<Range<u64>> {
        let mut missing: Vec<Range<u64>> = Vec::new();
        let units = total_bytes.div_ceil(UNIT_BYTES);
        let mut unit = 0;
        while unit < units {
            let whole_word = usize::try_from(unit / 64).ok().and_then(|w| self.words.get(w));
            if unit % 64 == 0 && whole_word == Some(&u64::MAX) {
                unit += 64;
                continue;
            }
            let none_of_word = unit % 64 == 0 && matches!(whole_word, None | Some(0));
            let count = if none_of_word { 64 } else { 1 };
            if !self.has_unit(unit) {
                let range = unit * UNIT_BYTES..((unit + count) * UNIT_BYTES).min(total_bytes);
                match missing.last_mut() {
                    Some(last) if last.end == range.start => last.end = range.end,
                    Some(_) | None => missing.push(range),
                }
            }
            unit += count;
        }
        missing
    }

    /// Records that the bytes of `ranges` are durable, durably.
    ///
    /// The caller has synced the data file after the last write to these ranges. A range counts
    /// only by its whole units, but for the unit that holds the end of the file.
    ///
    /// # Errors
    /// [`DiskError::Io`] or [`DiskError::Full`]: the bits may or may not be on disk, and nothing
    /// that was there is lost.
    pub fn commit(&mut self, ranges: &[Range<u64>]) -> Result<(), DiskError> {
        self.new.sync()?;
        self.write(ranges)?.sync()
    }

    /// The file's name, which has to be durable before [`Presence::write`].
    pub(super) fn name(&self) -> Arc<New> {
        Arc::clone(&self.new)
    }

    /// As [`Presence::commit`], but leaves it to the caller to make durable its name before, and what it
    /// gives after.
    pub(super) fn write(&mut self, ranges: &[Range<u64>]) -> Result<Written, DiskError> {
        let mut dirty = std::collections::BTreeSet::new();
        for range in ranges {
            let at_end = self.version.total_bytes == Some(range.end);
            let first = range.start.div_ceil(UNIT_BYTES);
            let end = if at_end { range.end.div_ceil(UNIT_BYTES) } else { range.end / UNIT_BYTES };
            let mut unit = first;
            while unit < end {
                let word = usize::try_from(unit / 64).unwrap_or(usize::MAX);
                // The bits of this word from `unit` on, below `end`.
                let count = (64 - unit % 64).min(end - unit);
                let bits = u64::MAX >> (64 - count) << (unit % 64);
                *self.word_mut(word) |= bits;
                dirty.insert(page_of(word));
                unit += count;
            }
        }
        for index in dirty {
            self.store_page(index)?;
        }
        Ok(Written { file: Arc::clone(&self.file), path: self.path.clone() })
    }

    fn store_page(&mut self, index: usize) -> Result<(), DiskError> {
        let sequence = self.sequence[index] + 1;
        let mut page = Page::new();
        let words = self.words.iter().skip(index * WORDS_PER_PAGE).take(WORDS_PER_PAGE);
        for (word, bits) in words.enumerate() {
            page.set_word(BITS_AT + word * 8, *bits);
        }
        page.write_pair(&self.file, index as u64, sequence)
            .map_err(|e| DiskError::write(&self.path, index as u64, e))?;
        self.sequence[index] = sequence;
        Ok(())
    }
}

/// Takes the room of every bit page now: on a disk that fills up meanwhile, what is durable can
/// still be recorded.
fn allocate(file: &File, version: &Version) -> Result<(), Errno> {
    let units = version.total_bytes.unwrap_or(0).min(MAX_FILE_BYTES).div_ceil(UNIT_BYTES);
    let pages = 2 + 2 * units.div_ceil(UNITS_PER_PAGE);
    match rustix::fs::fallocate(file, FallocateFlags::empty(), 0, pages * PAGE_BYTES as u64) {
        Err(Errno::OPNOTSUPP | Errno::NOSYS) => Ok(()),
        allocated => allocated,
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use proptest::prelude::*;

    use super::*;

    fn version(total: u64) -> Version {
        Version { total_bytes: Some(total), tag: "etag".into() }
    }

    fn fresh(total: u64) -> (tempfile::TempDir, Dir, Presence) {
        let temp = tempfile::tempdir().unwrap();
        let dir = Dir::open(temp.path()).unwrap();
        let presence = Presence::create(&dir, "p", version(total)).unwrap();
        (temp, dir, presence)
    }

    #[test]
    fn what_was_committed_is_there_after_a_reload() {
        let total = 5000 * UNIT_BYTES * 8 + 17;
        let (_temp, dir, mut presence) = fresh(total);
        let last = total / UNIT_BYTES * UNIT_BYTES;
        presence.commit(&[UNIT_BYTES..3 * UNIT_BYTES, last..total]).unwrap();
        let again = Presence::load(&dir, "p").unwrap().unwrap();
        assert_eq!(again.version(), &version(total));
        assert_eq!(again.missing(total), vec![0..UNIT_BYTES, 3 * UNIT_BYTES..last]);
    }

    #[test]
    fn a_unit_that_is_only_partly_written_is_not_present() {
        let (_temp, _dir, mut presence) = fresh(10 * UNIT_BYTES);
        presence.commit(&[1..2 * UNIT_BYTES + 5]).unwrap();
        assert!(!presence.has_unit(0) && presence.has_unit(1) && !presence.has_unit(2));
    }

    #[test]
    fn a_torn_page_leaves_the_one_before() {
        let total = 100 * UNIT_BYTES;
        let (_temp, dir, mut presence) = fresh(total);
        presence.commit(&[0..10 * UNIT_BYTES]).unwrap();
        presence.commit(&[10 * UNIT_BYTES..20 * UNIT_BYTES]).unwrap();
        // The second commit went to place 0 (sequence 2): tear it in the middle.
        let file = dir.open_file("p", OFlags::RDWR).unwrap();
        file.write_all_at(&[0xEE; 512], 2 * 4096 + 16).unwrap();
        let again = Presence::load(&dir, "p").unwrap().unwrap();
        assert_eq!(again.missing(total), vec![10 * UNIT_BYTES..total]);
    }

    #[test]
    fn a_damaged_header_is_not_believed() {
        let (_temp, dir, _presence) = fresh(UNIT_BYTES);
        dir.open_file("p", OFlags::RDWR).unwrap().write_all_at(b"X", 40).unwrap();
        assert!(Presence::load(&dir, "p").unwrap().is_none());
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]
        #[test]
        fn bits_equal_a_model_set_after_every_reload(
            steps in proptest::collection::vec((0u64..70_000, 1u64..3000), 1..12),
        ) {
            let total = 70_000 * UNIT_BYTES;
            let (_temp, dir, mut presence) = fresh(total);
            let mut model = vec![false; 70_000];
            for (first, count) in steps {
                let end = (first + count).min(70_000);
                presence.commit(&[first * UNIT_BYTES..end * UNIT_BYTES]).unwrap();
                model[usize::try_from(first).unwrap()..usize::try_from(end).unwrap()].fill(true);
                presence = Presence::load(&dir, "p").unwrap().unwrap();
                for (unit, here) in model.iter().enumerate() {
                    prop_assert_eq!(presence.has_unit(unit as u64), *here);
                }
            }
        }
    }
}
