//! Which ranges of an image its readers ask for first, noted while somebody wants to know.
//!
//! Why: what a guest reads at its boot on one node is what it will read on the next one.
//! How: a bit for each unit of the disk, in memory that costs nothing until it is touched, tells the
//! first request for a unit from all later ones, without a lock; only the first one is written down.
//! Whoever answers a batch of requests asks once whether somebody wants to know.
//! Never: notes more ranges than a trace may have, or what a reader gets without asking.
//! Start at [`Tracing::recorder`].

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::image::{MAX_TRACE_RANGES, TRACE_UNIT_BYTES, TraceFile};
use crate::map::SharedTable;
use crate::map::format::{Header, Kind};

const UNIT_BITS: u32 = TRACE_UNIT_BYTES.trailing_zeros();
const BITS: u64 = u64::BITS as u64;

/// The recorder of one export, if there is one.
#[derive(Debug, Default)]
pub struct Tracing {
    /// Whether there is something to ask for beneath.
    is_on: AtomicBool,
    recorder: Mutex<Option<Arc<Recorder>>>,
}

impl Tracing {
    /// Who notes what is asked for, while somebody wants that. Costs a look at a flag otherwise.
    #[inline]
    #[must_use]
    pub fn recorder(&self) -> Option<Arc<Recorder>> {
        if self.is_on.load(Ordering::Relaxed) { self.latest() } else { None }
    }

    /// The recorder, also one that is done.
    #[cold]
    #[must_use]
    pub fn latest(&self) -> Option<Arc<Recorder>> {
        lock(&self.recorder).clone()
    }

    /// Begins to note, anew, what is asked for of a disk of `size_bytes`, for as long as `lasts`; `None`:
    /// until it is ended.
    ///
    /// # Errors
    /// The process is out of descriptors or memory.
    pub fn start(&self, size_bytes: u64, lasts: Option<Duration>) -> io::Result<Arc<Recorder>> {
        Ok(self.put(Recorder::new(size_bytes, lasts)?))
    }

    /// As [`start`](Self::start), with what was noted before.
    ///
    /// # Errors
    /// As [`start`](Self::start).
    pub fn resume(
        &self,
        size_bytes: u64,
        lasts: Option<Duration>,
        before: &TraceFile,
    ) -> io::Result<Arc<Recorder>> {
        let mut recorder = Recorder::new(size_bytes, None)?;
        for &[at, len_bytes] in &before.ranges {
            recorder.note(at, len_bytes);
        }
        recorder.until = end_of(lasts);
        lock(&recorder.noted).truncated |= before.truncated;
        Ok(self.put(recorder))
    }

    fn put(&self, recorder: Recorder) -> Arc<Recorder> {
        let recorder = Arc::new(recorder);
        *lock(&self.recorder) = Some(Arc::clone(&recorder));
        self.is_on.store(true, Ordering::Relaxed);
        recorder
    }

    /// Ends and forgets it; gives what it has.
    pub fn end(&self) -> Option<Arc<Recorder>> {
        self.is_on.store(false, Ordering::Relaxed);
        let recorder = lock(&self.recorder).take()?;
        recorder.is_over.store(true, Ordering::Relaxed);
        Some(recorder)
    }
}

/// Notes which units are asked for, each once.
#[derive(Debug)]
pub struct Recorder {
    size_bytes: u64,
    until: Option<Instant>,
    is_over: AtomicBool,
    /// Bit `n % 64` of word `n / 64` is set once unit `n` was asked for.
    seen: SharedTable,
    noted: Mutex<Noted>,
}

#[derive(Debug, Default)]
struct Noted {
    /// First unit and the one after the last of each range.
    ranges: Vec<(u64, u64)>,
    units: u64,
    truncated: bool,
}

fn end_of(lasts: Option<Duration>) -> Option<Instant> {
    lasts.and_then(|lasts| Instant::now().checked_add(lasts))
}

impl Recorder {
    fn new(size_bytes: u64, lasts: Option<Duration>) -> io::Result<Self> {
        let header = Header {
            kind: Kind::Presence,
            unit_bits: UNIT_BITS,
            units: size_bytes.div_ceil(TRACE_UNIT_BYTES).max(1),
            size_bytes,
            ..Header::EMPTY
        };
        Ok(Self {
            size_bytes,
            until: end_of(lasts),
            is_over: AtomicBool::new(false),
            seen: SharedTable::new("bedplate-trace", &header)?,
            noted: Mutex::default(),
        })
    }

    /// Notes that a range was asked for. What is past the end of the disk was not.
    pub fn note(&self, at: u64, len_bytes: u64) {
        let end = at.saturating_add(len_bytes).min(self.size_bytes);
        if at >= end || self.is_over.load(Ordering::Relaxed) {
            return;
        }
        let (mut unit, end) = (at / TRACE_UNIT_BYTES, end.div_ceil(TRACE_UNIT_BYTES));
        while unit < end {
            let until = end.min((unit / BITS + 1) * BITS);
            self.note_in_word(unit, until);
            unit = until;
        }
    }

    /// Notes units of one word.
    fn note_in_word(&self, first: u64, end: u64) {
        let mask = u64::MAX >> (BITS - (end - first)) << (first % BITS);
        let word =
            usize::try_from(first / BITS).ok().and_then(|index| self.seen.words().get(index));
        let Some(word) = word else { return };
        if word.load(Ordering::Relaxed) & mask == mask {
            return;
        }
        let new = mask & !word.fetch_or(mask, Ordering::Relaxed);
        if new == 0 {
            return;
        }
        if self.until.is_some_and(|until| Instant::now() >= until) {
            self.is_over.store(true, Ordering::Relaxed);
            return;
        }
        let mut noted = lock(&self.noted);
        for unit in (first..end).filter(|unit| new >> (unit % BITS) & 1 == 1) {
            noted.add(unit);
        }
    }

    /// True while it notes.
    #[must_use]
    pub fn is_recording(&self) -> bool {
        let has_ended = self.until.is_some_and(|until| Instant::now() >= until);
        !has_ended && !self.is_over.load(Ordering::Relaxed)
    }

    /// How long it will note, if it ends by itself.
    #[must_use]
    pub fn left(&self) -> Option<Duration> {
        self.until.map(|until| until.saturating_duration_since(Instant::now()))
    }

    /// How many units were noted so far, also those that found no room in the trace.
    #[must_use]
    pub fn units(&self) -> u64 {
        lock(&self.noted).units
    }

    /// What was asked for so far.
    #[must_use]
    pub fn trace(&self) -> TraceFile {
        let noted = lock(&self.noted);
        let range = |&(first, end): &(u64, u64)| {
            let at = first * TRACE_UNIT_BYTES;
            [at, end.saturating_mul(TRACE_UNIT_BYTES).min(self.size_bytes) - at]
        };
        TraceFile {
            version: 1,
            recording: self.is_recording(),
            truncated: noted.truncated,
            virtual_size_bytes: Some(self.size_bytes),
            ranges: noted.ranges.iter().map(range).collect(),
            ..TraceFile::default()
        }
    }
}

impl Noted {
    fn add(&mut self, unit: u64) {
        self.units += 1;
        let is_full = self.ranges.len() >= MAX_TRACE_RANGES;
        match self.ranges.last_mut() {
            Some((_, end)) if *end == unit => *end += 1,
            Some(_) | None if is_full => self.truncated = true,
            Some(_) | None => self.ranges.push((unit, unit + 1)),
        }
    }
}

/// Each change is one push or assignment.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    const UNIT: u64 = TRACE_UNIT_BYTES;

    #[test]
    fn each_unit_is_noted_once_in_the_order_of_the_first_request() {
        let tracing = Tracing::default();
        assert!(tracing.recorder().is_none());
        let size = 1000 * UNIT + 9;
        let recorder = tracing.start(size, None).unwrap();
        for (at, len) in
            [(500 * UNIT + 1, 1), (0, 1), (UNIT, 2), (3, 5), (62 * UNIT, 4 * UNIT), (size - 1, 50)]
        {
            tracing.recorder().unwrap().note(at, len);
        }
        recorder.note(size, 1);
        recorder.note(u64::MAX, u64::MAX);
        recorder.note(63 * UNIT, 4 * UNIT);
        let trace = recorder.trace();
        let wanted = [
            [500 * UNIT, UNIT],
            [0, 2 * UNIT],
            [62 * UNIT, 4 * UNIT],
            [1000 * UNIT, 9],
            [66 * UNIT, UNIT],
        ];
        assert_eq!(trace.ranges, wanted);
        assert!(trace.recording && !trace.truncated);
        assert_eq!(tracing.end().unwrap().trace().ranges, wanted);
        recorder.note(7 * UNIT, 1);
        assert!(tracing.recorder().is_none() && tracing.latest().is_none());
        assert_eq!(recorder.trace().ranges, wanted, "nothing more after its end");
    }

    #[test]
    fn a_trace_has_a_bounded_number_of_ranges_and_says_that_more_was_read() {
        let tracing = Tracing::default();
        // A disk of 64 TiB: its bits cost memory only where they are touched.
        let recorder = tracing.start(64 << 40, None).unwrap();
        for n in 0..2 * MAX_TRACE_RANGES as u64 {
            recorder.note(n * 2 * UNIT, 1);
        }
        let trace = recorder.trace();
        assert_eq!((trace.ranges.len(), trace.truncated), (MAX_TRACE_RANGES, true));
        crate::image::Trace::from_file(trace).unwrap();
    }

    #[test]
    fn a_recorder_ends_by_itself() {
        let tracing = Tracing::default();
        let recorder = tracing.start(10 * UNIT, Some(Duration::ZERO)).unwrap();
        recorder.note(0, 1);
        let trace = recorder.trace();
        assert!(trace.ranges.is_empty() && !trace.recording);
    }

    #[test]
    fn a_recorder_goes_on_with_what_another_one_had() {
        let (tracing, size) = (Tracing::default(), 100 * UNIT);
        let before = tracing.start(size, None).unwrap();
        before.note(7 * UNIT, UNIT);
        before.note(3 * UNIT, 2 * UNIT);
        let resumed = Tracing::default();
        let recorder =
            resumed.resume(size, Some(Duration::from_hours(1)), &before.trace()).unwrap();
        assert_eq!(recorder.units(), 3);
        for unit in [4, 9, 7] {
            resumed.recorder().unwrap().note(unit * UNIT, 1);
        }
        let wanted = [[7 * UNIT, UNIT], [3 * UNIT, 2 * UNIT], [9 * UNIT, UNIT]];
        assert_eq!(recorder.trace().ranges, wanted);
        let over = resumed.resume(size, Some(Duration::ZERO), &before.trace()).unwrap().trace();
        assert_eq!((over.ranges.len(), over.recording), (2, false));
    }

    #[test]
    fn many_threads_note_each_unit_once() {
        let tracing = Tracing::default();
        let recorder = tracing.start(4096 * UNIT, None).unwrap();
        std::thread::scope(|scope| {
            for start in 0..4 {
                let recorder = &recorder;
                scope.spawn(move || {
                    for unit in (0..4096).rev() {
                        recorder.note((unit * 7 + start) % 4096 * UNIT, UNIT);
                    }
                });
            }
        });
        let bytes: u64 = recorder.trace().ranges.iter().map(|[_, len]| len).sum();
        assert_eq!(bytes, 4096 * UNIT);
    }
}
