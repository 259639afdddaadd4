//! A file that is still arriving, as readers have it.
//!
//! Why: a guest can boot long before the last byte of its image is here; what it needs next is then
//! to come first.
//! How: a bit for each 64 KiB of the file, in shared memory, set when the unit has been written (the
//! presence file says what is durable, which is another matter). Who wants a unit that is not here
//! says so and waits; the transfer takes what is wanted before all else.
//! Never: gives a byte that was not written, or other bytes after those of one version: a file that
//! is started anew is another file, and the readers of this one get errors.
//! Start at [`Arriving::wait`].

use std::collections::{BTreeMap, VecDeque};
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering, fence};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::fs::Advice;
use tokio::sync::Notify;
use tokio::sync::futures::Notified;

use super::foreseen::Foreseen;
use super::presence::UNIT_BYTES;
use crate::map::SharedTable;
use crate::map::format::{Header, Kind};

const UNIT_BITS: u32 = 16;
const BITS: u64 = u64::BITS as u64;
/// Ranges that are wanted and that nobody has begun; a further one takes the oldest one's place. Who
/// waits for that says it again.
const MAX_WANTED: usize = 256;
/// How often who waits says again what it waits for.
const SAY_AGAIN: Duration = Duration::from_secs(1);
/// How often who may give up is asked whether it does.
const ASK_AGAIN: Duration = Duration::from_millis(20);
/// How long who waits does so while nothing at all arrives.
const PATIENCE: Duration = Duration::from_secs(60);

/// Whether who waits still wants to; `None`: to the end.
pub type GoesOn<'a> = Option<&'a dyn Fn() -> bool>;

const _: () = assert!(1 << UNIT_BITS == UNIT_BYTES);

/// A file that is arriving. It stays the same file when it is complete.
#[derive(Debug)]
pub struct Arriving {
    file: File,
    path: PathBuf,
    len_bytes: u64,
    pub(super) inode: u64,
    /// Bit `n % 64` of word `n / 64` is set once unit `n` is here.
    here: SharedTable,
    is_whole: AtomicBool,
    has_failed: AtomicBool,
    /// Bytes that have come, counted for who waits: whether anything moves.
    moved: AtomicU64,
    waiting: AtomicUsize,
    state: Mutex<State>,
    changed: Condvar,
    /// For whoever brings the bytes.
    asked: Notify,
    /// Somebody waits, or waits for less than before.
    waits_changed: Notify,
    /// What somebody thinks that readers will want.
    foreseen: Foreseen,
    /// Reads that found their bytes here, and that had to wait.
    counts: Counts,
}

#[derive(Debug, Default)]
struct State {
    /// What nobody has begun to bring, the latest wish last.
    wanted: VecDeque<Range<u64>>,
    /// What each of those who wait still misses: its first byte that is not here, to its end.
    missed: BTreeMap<u64, Range<u64>>,
    next_waiter: u64,
    failed: Option<String>,
}

#[derive(Debug, Default)]
struct Counts {
    misses: AtomicU64,
    waited_ns: AtomicU64,
    stalls: AtomicU64,
}

/// How often readers had to wait.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Waits {
    /// Reads that found something missing.
    pub misses: u64,
    /// How long they waited, together.
    pub waited: Duration,
    /// Pieces that were asked for again on another connection, as nothing came of them, or too little.
    pub stalls: u64,
    /// Bytes that were brought because a trace foresaw them.
    pub foreseen_bytes: u64,
}

impl Arriving {
    /// For `file`, which is opened for reading at `path` and will have `len_bytes`; nothing of it is
    /// here.
    pub(super) fn new(file: File, path: PathBuf, len_bytes: u64) -> io::Result<Self> {
        let header = Header {
            kind: Kind::Presence,
            unit_bits: UNIT_BITS,
            units: len_bytes.div_ceil(UNIT_BYTES).max(1),
            size_bytes: len_bytes,
            ..Header::EMPTY
        };
        let here = SharedTable::new("bedplate-presence", &header)?;
        let inode = file.metadata()?.ino();
        // What is around a page that is read may not be here: it must not be read ahead.
        rustix::fs::fadvise(&file, 0, None, Advice::Random)?;
        Ok(Self {
            file,
            path,
            len_bytes,
            inode,
            here,
            is_whole: AtomicBool::new(false),
            has_failed: AtomicBool::new(false),
            moved: AtomicU64::new(0),
            waiting: AtomicUsize::new(0),
            state: Mutex::default(),
            changed: Condvar::new(),
            asked: Notify::new(),
            waits_changed: Notify::new(),
            foreseen: Foreseen::default(),
            counts: Counts::default(),
        })
    }

    /// The file; only what [`is_here`](Self::is_here) may be read.
    #[must_use]
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Where it was opened, for messages.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Length of the whole file in bytes.
    #[must_use]
    pub fn len_bytes(&self) -> u64 {
        self.len_bytes
    }

    /// True once all of it is here and checked.
    #[must_use]
    pub fn is_whole(&self) -> bool {
        self.is_whole.load(Ordering::Acquire)
    }

    /// True if it will never be whole.
    #[must_use]
    pub fn has_failed(&self) -> bool {
        self.has_failed.load(Ordering::Acquire)
    }

    /// Which units are here, for readers in other processes.
    #[must_use]
    pub fn table(&self) -> &SharedTable {
        &self.here
    }

    /// How often readers had to wait so far.
    #[must_use]
    pub fn waits(&self) -> Waits {
        let Counts { misses, waited_ns, stalls } = &self.counts;
        Waits {
            misses: misses.load(Ordering::Relaxed),
            waited: Duration::from_nanos(waited_ns.load(Ordering::Relaxed)),
            stalls: stalls.load(Ordering::Relaxed),
            foreseen_bytes: self.foreseen.brought_bytes(),
        }
    }

    /// True if all of `[at, at + len)` is here.
    #[must_use]
    pub fn is_here(&self, at: u64, len_bytes: u64) -> bool {
        self.is_whole() || self.here_up_to(at, at.saturating_add(len_bytes)) >= at + len_bytes
    }

    /// Whether byte `at` is here, and where that changes, at `end` at the latest. `at < end`.
    #[must_use]
    pub fn run_at(&self, at: u64, end: u64) -> (bool, u64) {
        let up_to = self.here_up_to(at, end);
        if up_to > at {
            return (true, up_to);
        }
        let mut unit = at / UNIT_BYTES;
        while unit * UNIT_BYTES < end && !self.bit(unit) {
            unit += 1;
        }
        (false, (unit * UNIT_BYTES).min(end))
    }

    /// The first byte from `at` on that is not here; `end` at the latest.
    fn here_up_to(&self, at: u64, end: u64) -> u64 {
        let (first, last) = (at / UNIT_BYTES, end.div_ceil(UNIT_BYTES));
        let mut unit = first;
        while unit < last {
            let word = self.here.get(unit / BITS).unwrap_or(u64::MAX) >> (unit % BITS);
            let ones = u64::from(word.trailing_ones()).min(BITS - unit % BITS);
            unit += ones;
            if ones == 0 || unit % BITS != 0 {
                break;
            }
        }
        (unit * UNIT_BYTES).clamp(at, end)
    }

    fn bit(&self, unit: u64) -> bool {
        self.here.get(unit / BITS).is_none_or(|word| word >> (unit % BITS) & 1 == 1)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Each change is one push, pop or assignment.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until all of `[at, at + len)` is here, having said that it is wanted.
    ///
    /// # Errors
    /// `UnexpectedEof` past the file's end; `TimedOut` if nothing arrived for a minute; otherwise the
    /// file will never be whole.
    pub fn wait(&self, at: u64, len_bytes: u64) -> io::Result<()> {
        self.wait_while(at, len_bytes, None)
    }

    /// As [`wait`](Self::wait), while `goes_on` says so; it is asked often.
    ///
    /// # Errors
    /// Also `Interrupted` once it does not.
    pub fn wait_while(&self, at: u64, len_bytes: u64, goes_on: GoesOn<'_>) -> io::Result<()> {
        let end = at.checked_add(len_bytes).filter(|&end| end <= self.len_bytes);
        let Some(end) = end else { return Err(io::ErrorKind::UnexpectedEof.into()) };
        if self.is_whole() {
            return Ok(());
        }
        if self.here_up_to(at, end) >= end && !self.has_failed() {
            return Ok(());
        }
        self.wait_for(at, end, goes_on)
    }

    #[cold]
    fn wait_for(&self, at: u64, end: u64, goes_on: GoesOn<'_>) -> io::Result<()> {
        let begun = Instant::now();
        self.counts.misses.fetch_add(1, Ordering::Relaxed);
        self.waiting.fetch_add(1, Ordering::SeqCst);
        let waiter = {
            let mut state = self.state();
            state.next_waiter += 1;
            state.next_waiter
        };
        let result = self.wait_counted(waiter, at, end, goes_on);
        self.state().missed.remove(&waiter);
        self.waiting.fetch_sub(1, Ordering::SeqCst);
        let waited = u64::try_from(begun.elapsed().as_nanos()).unwrap_or(u64::MAX);
        self.counts.waited_ns.fetch_add(waited, Ordering::Relaxed);
        result
    }

    fn wait_counted(&self, waiter: u64, at: u64, end: u64, goes_on: GoesOn<'_>) -> io::Result<()> {
        let step = if goes_on.is_some() { ASK_AGAIN } else { SAY_AGAIN };
        let mut moved = self.moved.load(Ordering::Relaxed);
        let (mut still_since, mut said) = (Instant::now(), None::<Instant>);
        let mut state = self.state();
        loop {
            // Pairs with the fence of whoever brings units: one of both sees what the other did.
            fence(Ordering::SeqCst);
            if let Some(why) = &state.failed {
                return Err(io::Error::other(why.clone()));
            }
            let missing = self.here_up_to(at, end);
            if missing >= end {
                return Ok(());
            }
            if goes_on.is_some_and(|goes_on| !goes_on()) {
                return Err(io::ErrorKind::Interrupted.into());
            }
            if state.missed.insert(waiter, missing..end) != Some(missing..end) {
                self.waits_changed.notify_waiters();
            }
            let now = Instant::now();
            if said.is_none_or(|said| now.duration_since(said) >= SAY_AGAIN) {
                said = Some(now);
                want(&mut state, missing..end);
                self.asked.notify_one();
            }
            let moved_now = self.moved.load(Ordering::Relaxed);
            if moved_now != moved {
                (moved, still_since) = (moved_now, now);
            } else if now.duration_since(still_since) >= PATIENCE {
                let what = "nothing has arrived of the image for a minute; see its progress";
                return Err(io::Error::new(io::ErrorKind::TimedOut, what));
            }
            let waited = self.changed.wait_timeout(state, step);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Says that `[at, at + len)` will be wanted, and does not wait.
    pub fn will_read(&self, at: u64, len_bytes: u64) {
        let end = at.saturating_add(len_bytes).min(self.len_bytes);
        if at >= end || self.is_here(at, end - at) {
            return;
        }
        let missing = self.here_up_to(at, end);
        want(&mut self.state(), missing..end);
        self.asked.notify_one();
    }

    /// What somebody thinks that readers will want, for who brings it and who knows more.
    #[must_use]
    pub fn foreseen(&self) -> &Foreseen {
        &self.foreseen
    }

    /// Says that `[at, at + len)` will probably be wanted some time, and does not wait.
    pub fn foresee(&self, at: u64, len_bytes: u64) {
        let end = at.saturating_add(len_bytes).min(self.len_bytes);
        if at < end && !self.is_here(at, end - at) {
            self.foreseen.push(self.here_up_to(at, end)..end);
        }
    }

    /// Waits up to `patience` for `[at, at + len)`, says nothing and counts nothing: for who is no
    /// reader. False if it is not here then.
    #[must_use]
    pub fn came_within(&self, at: u64, len_bytes: u64, patience: Duration) -> bool {
        let deadline = Instant::now() + patience;
        self.waiting.fetch_add(1, Ordering::SeqCst);
        let mut state = self.state();
        let came = loop {
            fence(Ordering::SeqCst);
            let left = deadline.saturating_duration_since(Instant::now());
            if self.is_here(at, len_bytes) || left.is_zero() || state.failed.is_some() {
                break self.is_here(at, len_bytes);
            }
            let waited = self.changed.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        };
        drop(state);
        self.waiting.fetch_sub(1, Ordering::SeqCst);
        came
    }

    /// True while somebody waits for a part of it.
    #[must_use]
    pub fn is_waited_for(&self) -> bool {
        self.waiting.load(Ordering::Relaxed) > 0
    }

    /// What somebody who waits still misses, of those who miss something of `range`; the lowest.
    #[must_use]
    pub fn missed_in(&self, range: &Range<u64>) -> Option<Range<u64>> {
        if range.is_empty() || !self.is_waited_for() {
            return None;
        }
        let state = self.state();
        let overlaps = state.missed.values().filter(|r| r.start < range.end && range.start < r.end);
        overlaps.min_by_key(|missed| missed.start).cloned()
    }

    /// True if `range` is all that somebody who waits still misses.
    #[must_use]
    pub fn would_suffice(&self, range: &Range<u64>) -> bool {
        let inside = |missed: &Range<u64>| range.start <= missed.start && missed.end <= range.end;
        self.is_waited_for() && self.state().missed.values().any(inside)
    }

    /// For whoever brings it: ends when somebody begins to wait, or waits for less than before.
    pub fn waits_changed(&self) -> Notified<'_> {
        self.waits_changed.notified()
    }

    /// Notes that a piece was asked for again, as nothing came of it, or too little.
    pub fn add_stall(&self) {
        self.counts.stalls.fetch_add(1, Ordering::Relaxed);
    }

    /// Fills `buf` from byte `at` on, once that is here.
    ///
    /// # Errors
    /// Those of [`wait`](Self::wait) and of pread.
    pub fn read_exact_at(&self, buf: &mut [u8], at: u64) -> io::Result<()> {
        self.wait(at, buf.len() as u64)?;
        self.file.read_exact_at(buf, at)
    }

    /// What is wanted next, for whoever brings it; waits until there is something.
    pub async fn wanted(&self) -> Range<u64> {
        loop {
            let asked = self.asked.notified();
            let (next, is_last) = {
                let mut state = self.state();
                (state.wanted.pop_front(), state.wanted.is_empty())
            };
            if let Some(range) = next {
                // Several wishes may have made one call.
                if !is_last {
                    self.asked.notify_one();
                }
                return range;
            }
            asked.await;
        }
    }

    /// These bytes have been written. Only whole units count, and the end of the file.
    pub(super) fn note(&self, range: &Range<u64>) {
        let end = if range.end >= self.len_bytes {
            self.len_bytes.div_ceil(UNIT_BYTES)
        } else {
            range.end / UNIT_BYTES
        };
        let mut unit = range.start.div_ceil(UNIT_BYTES);
        while unit < end {
            let count = (BITS - unit % BITS).min(end - unit);
            let mask = u64::MAX >> (BITS - count) << (unit % BITS);
            let word = usize::try_from(unit / BITS).ok().and_then(|n| self.here.words().get(n));
            if let Some(word) = word {
                word.fetch_or(mask, Ordering::Release);
            }
            unit += count;
        }
        self.moved.fetch_add(range.end.saturating_sub(range.start), Ordering::Relaxed);
        fence(Ordering::SeqCst);
        if self.waiting.load(Ordering::SeqCst) > 0 {
            drop(self.state());
            self.changed.notify_all();
        }
    }

    /// True if all that is here is in `durable`, ranges in ascending order.
    pub(super) fn is_within(&self, missing: &[Range<u64>]) -> bool {
        missing.iter().all(|range| {
            let (is_here, until) = self.run_at(range.start, range.end);
            !is_here && until >= range.end
        })
    }

    /// All of it is here, checked and sealed.
    pub(super) fn complete(&self) {
        self.is_whole.store(true, Ordering::Release);
        drop(self.state());
        self.changed.notify_all();
    }

    /// It will never be whole: all readers get errors from now on, also for what is here. The first
    /// reason counts.
    pub fn fail(&self, why: &str) {
        if self.is_whole() {
            return;
        }
        self.state().failed.get_or_insert_with(|| why.to_owned());
        self.has_failed.store(true, Ordering::Release);
        // Readers in other processes ask us then, and are told.
        self.here.words().iter().for_each(|word| word.store(0, Ordering::Release));
        self.changed.notify_all();
    }
}

/// Notes a wish; what a neighbour of it wants already becomes longer.
fn want(state: &mut State, range: Range<u64>) {
    let near = state.wanted.iter_mut().find(|r| r.start <= range.end && range.start <= r.end);
    if let Some(known) = near {
        *known = known.start.min(range.start)..known.end.max(range.end);
        return;
    }
    if state.wanted.len() >= MAX_WANTED {
        state.wanted.pop_front();
    }
    state.wanted.push_back(range);
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    const MIB: u64 = 1 << 20;

    fn arriving(len: u64) -> Arriving {
        let file = tempfile::tempfile().unwrap();
        file.set_len(len).unwrap();
        Arriving::new(file, "x".into(), len).unwrap()
    }

    #[test]
    fn units_are_here_once_all_of_them_was_written() {
        let file = arriving(10 * MIB + 5);
        file.note(&(MIB + 1..MIB + 3 * UNIT_BYTES - 1));
        assert_eq!(file.run_at(MIB, 10 * MIB), (false, MIB + UNIT_BYTES));
        assert_eq!(file.run_at(MIB + UNIT_BYTES, 10 * MIB), (true, MIB + 2 * UNIT_BYTES));
        file.note(&(10 * MIB..10 * MIB + 5));
        assert!(file.is_here(10 * MIB, 5) && !file.is_here(10 * MIB - 1, 2));
        file.note(&(0..10 * MIB));
        assert!(file.is_here(0, 10 * MIB + 5));
        assert_eq!(file.run_at(7, 10 * MIB + 5), (true, 10 * MIB + 5));
        let past = file.wait(10 * MIB, 6).unwrap_err();
        assert_eq!(past.kind(), io::ErrorKind::UnexpectedEof);
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn who_waits_is_heard_and_woken() {
        let file = Arc::new(arriving(100 * MIB));
        let reader = Arc::clone(&file);
        let waiting = tokio::task::spawn_blocking(move || reader.wait(50 * MIB + 3, 4096));
        let wanted = file.wanted().await;
        assert_eq!(wanted, 50 * MIB + 3..50 * MIB + 3 + 4096);
        file.note(&(50 * MIB..51 * MIB));
        waiting.await.unwrap().unwrap();
        assert_eq!(file.waits().misses, 1);
    }

    #[test]
    fn a_wish_next_to_another_makes_it_longer_and_they_are_bounded() {
        let file = arriving(4096 * MIB);
        for at in 0..4 {
            file.will_read(at * UNIT_BYTES, UNIT_BYTES);
        }
        assert_eq!(file.state().wanted, [0..4 * UNIT_BYTES]);
        for at in 1..2000 {
            file.will_read(at * MIB * 2, 1);
        }
        assert_eq!(file.state().wanted.len(), MAX_WANTED);
    }

    #[test]
    fn after_a_failure_not_even_what_is_here_is_given() {
        let file = arriving(2 * MIB);
        file.note(&(0..MIB));
        file.fail("wrong digest");
        for at in [0, MIB] {
            assert_eq!(file.wait(at, 1).unwrap_err().to_string(), "wrong digest");
        }
    }
}
