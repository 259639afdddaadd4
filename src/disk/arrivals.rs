//! The files of a disk that are arriving, for readers to find them.
//!
//! Why: a transfer makes, keeps or replaces the file of its copy; who wants to read it comes from
//! elsewhere, before or after.
//! How: a map by copy, held weakly: the transfer and the readers keep a file. A transfer that goes on
//! with the same file gives its readers nothing new; one that begins another ends the old one's.
//! Never: lets two files of one copy be read.
//! Start at [`Arrivals::find`].

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use super::arriving::Arriving;
use super::store::CopyId;

/// What readers are told whose file is not the copy's any more.
const ANEW: &str = "the image's transfer has begun anew, as its source has changed or a disk failed; \
                    attach again";

/// The files of a disk that are arriving, for readers to find them.
#[derive(Clone, Debug, Default)]
pub(super) struct Arrivals(Arc<Inner>);

#[derive(Debug, Default)]
struct Inner {
    known: Mutex<HashMap<CopyId, Known>>,
    changed: Condvar,
}

#[derive(Debug)]
enum Known {
    File(Weak<Arriving>),
    /// Its source does not tell how long it is.
    NoLength,
}

/// A copy's place in [`Arrivals`].
#[derive(Clone, Debug)]
pub(super) struct Place {
    arrivals: Arrivals,
    id: CopyId,
}

/// What there is to read of a copy that is not complete.
#[derive(Debug)]
pub enum Found {
    /// This.
    File(Arc<Arriving>),
    /// Nothing yet: its transfer has not begun.
    NotYet,
    /// Nothing before it is complete: its source does not tell how long it is.
    NoLength,
}

impl Arrivals {
    fn known(&self) -> MutexGuard<'_, HashMap<CopyId, Known>> {
        self.0.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn place(&self, id: &CopyId) -> Place {
        Place { arrivals: self.clone(), id: id.clone() }
    }

    /// What there is of a copy; waits up to `patience` while there is nothing.
    pub(super) fn find(&self, id: &CopyId, patience: Duration) -> Found {
        let deadline = Instant::now() + patience;
        let mut known = self.known();
        loop {
            match known.get(id) {
                Some(Known::NoLength) => return Found::NoLength,
                Some(Known::File(file)) => {
                    if let Some(file) = file.upgrade().filter(|file| !file.has_failed()) {
                        return Found::File(file);
                    }
                }
                None => {}
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Found::NotYet;
            }
            let waited = self.0.changed.wait_timeout(known, left);
            known = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// All readers of all files get errors from now on.
    pub(super) fn fail_all(&self, why: &str) {
        for known in self.known().values() {
            if let Known::File(file) = known
                && let Some(file) = file.upgrade()
            {
                file.fail(why);
            }
        }
    }
}

impl Place {
    /// True if readers have something of the file with this inode that would be written again: a
    /// unit that is not durable, of `missing` (ascending).
    pub(super) fn conflicts(&self, inode: u64, missing: &[Range<u64>]) -> bool {
        self.file().is_some_and(|old| old.inode == inode && !old.is_within(missing))
    }

    fn file(&self) -> Option<Arc<Arriving>> {
        match self.arrivals.known().get(&self.id) {
            Some(Known::File(file)) => file.upgrade(),
            Some(Known::NoLength) | None => None,
        }
    }

    /// The file of the copy is `file` now, of which `missing` is not durable, ascending. It may be the
    /// one that readers have already; of another one they lose theirs.
    pub(super) fn begin(
        &self,
        file: File,
        path: PathBuf,
        len_bytes: u64,
        missing: &[Range<u64>],
    ) -> io::Result<Arc<Arriving>> {
        let new = Arriving::new(file, path, len_bytes)?;
        if let Some(old) = self.file() {
            if (old.inode, old.len_bytes()) == (new.inode, len_bytes) && !old.has_failed() {
                return Ok(old);
            }
            old.fail(ANEW);
        }
        let mut at = 0;
        for range in missing {
            new.note(&(at..range.start));
            at = range.end;
        }
        new.note(&(at..len_bytes));
        let new = Arc::new(new);
        let mut known = self.arrivals.known();
        known.retain(|_, known| match known {
            Known::File(file) => file.strong_count() > 0,
            Known::NoLength => true,
        });
        known.insert(self.id.clone(), Known::File(Arc::downgrade(&new)));
        self.arrivals.0.changed.notify_all();
        Ok(new)
    }

    /// Its source does not tell how long it is.
    pub(super) fn no_length(&self) {
        self.lose(ANEW);
        self.arrivals.known().insert(self.id.clone(), Known::NoLength);
        self.arrivals.0.changed.notify_all();
    }

    /// The file goes: its readers get errors.
    pub(super) fn lose(&self, why: &str) {
        if let Some(Known::File(file)) = self.arrivals.known().remove(&self.id)
            && let Some(file) = file.upgrade()
        {
            file.fail(why);
        }
    }
}
