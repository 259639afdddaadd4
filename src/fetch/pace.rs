//! How fast a connection is, and when it is too slow to be waited for.
//!
//! Why: a connection that gives a byte now and then has not stalled, and yet what somebody waits for
//! would never come, though another connection would bring it at once.
//! How: [`Pace`] is what one connection has given lately, for the time in which it was waited for, so
//! that limits and full buffers do not count. [`Best`] is what others of the same transfer get. What is
//! far slower than they are, and would take longer than it may, is left; what has come of it stays, and
//! the rest is asked for on another connection. [`Level`] doubles that time whenever it was of no use.
//! Never: gives up a source that is as slow on every connection: it is asked again a few times, and then
//! waited for.
//! Start at [`Best::is_outpaced`].

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// When nothing has come for so long, or too little, it is asked for on another connection; twice as
/// long each time until that was of use, so that a source that is only slow is waited for.
pub(super) const STALLED: Duration = Duration::from_secs(2);
/// How often it is looked whether a connection is outpaced on which nothing comes.
pub(super) const LOOK: Duration = Duration::from_millis(500);
/// Doublings of the time, at most.
const MAX_DOUBLINGS: u32 = 6;
/// After so long one doubling is forgiven: what is slow may have become fast, and the other way round.
const FORGIVEN: Duration = Duration::from_secs(60);
/// How many times as fast others must be.
const FAR: f64 = 8.0;
/// How many times as fast as before it must go elsewhere for that to have been of use.
const BETTER: f64 = 4.0;
/// Bytes a second that say nothing of a source: who gets no more may be the only one who is slow.
const TRICKLE: f64 = 16.0 * 1024.0;
/// Time in which what others get is worth half as much.
const HALF_LIFE: Duration = Duration::from_secs(10);
/// Least time between two marks.
const MARK: Duration = Duration::from_millis(250);
/// Marks that are kept: of more than the longest time that a connection may take.
const MARKS: usize = 256;
/// Bytes of a piece that tell how fast its connection is, however short it took.
const TELLING_BYTES: u64 = 64 << 10;
/// Least time that a piece counts for: its first bytes may have come with the answer's head.
const LEAST: Duration = Duration::from_millis(50);
const SECOND: Duration = Duration::from_secs(1);

/// What a connection had given at a moment, and how long it had been waited for.
#[derive(Clone, Copy, Debug)]
struct Mark {
    at: Instant,
    bytes: u64,
    waited: Duration,
}

/// What one connection gives of one piece.
#[derive(Debug)]
pub(super) struct Pace {
    begun: Instant,
    marks: VecDeque<Mark>,
    now: Mark,
    moved: Instant,
    /// Since when it is waited for just now.
    waiting: Option<Instant>,
}

impl Pace {
    /// Of a piece that is asked for now.
    pub(super) fn new() -> Self {
        let begun = Instant::now();
        let now = Mark { at: begun, bytes: 0, waited: Duration::ZERO };
        Self { begun, marks: VecDeque::from([now]), now, moved: begun, waiting: Some(begun) }
    }

    /// Its answer has come: how long that took says nothing of how fast its bytes come.
    pub(super) fn answered(&mut self) {
        *self = Self { begun: self.begun, waiting: None, ..Self::new() };
    }

    /// The next bytes are waited for.
    pub(super) fn wait(&mut self) {
        self.waiting.get_or_insert_with(Instant::now);
    }

    /// So many have come.
    pub(super) fn came(&mut self, bytes: u64) {
        let at = Instant::now();
        let waited = self.waiting.take().map_or(Duration::ZERO, |since| at - since);
        self.now = Mark { at, bytes: self.now.bytes + bytes, waited: self.now.waited + waited };
        self.moved = at;
        if self.marks.back().is_none_or(|last| at - last.at >= MARK) {
            if self.marks.len() == MARKS {
                self.marks.pop_front();
            }
            self.marks.push_back(self.now);
        }
    }

    /// How much has come.
    pub(super) fn bytes(&self) -> u64 {
        self.now.bytes
    }

    /// When something came last.
    pub(super) fn moved(&self) -> Instant {
        self.moved
    }

    /// Bytes for a second of waiting, in the last `window`; `None` if it is not as old as that.
    fn rate_over(&self, window: Duration) -> Option<f64> {
        let now = Instant::now();
        let since = self.marks.iter().rev().find(|mark| now - mark.at >= window)?;
        let waiting = self.waiting.map_or(Duration::ZERO, |since| now - since);
        let waited = (self.now.waited + waiting).saturating_sub(since.waited);
        let bytes = self.now.bytes - since.bytes;
        Some(bytes as f64 / waited.as_secs_f64().max(f64::MIN_POSITIVE))
    }

    /// Bytes a second of about the last second, with every pause: it may be faster than that.
    fn lately(&self) -> Option<f64> {
        let now = self.now;
        let since = self.marks.iter().rev().find(|mark| now.at - mark.at >= SECOND)?;
        Some((now.bytes - since.bytes) as f64 / (now.at - since.at).as_secs_f64())
    }

    /// The same of all that it has given, and of the wait for its answer.
    fn overall(&self) -> f64 {
        self.now.bytes as f64 / self.begun.elapsed().max(LEAST).as_secs_f64()
    }
}

/// The rate at which a connection of a transfer gets its bytes, of those that get most.
#[derive(Debug, Default)]
pub(super) struct Best(Mutex<Option<(f64, Instant)>>);

impl Best {
    fn get(&self) -> f64 {
        let best = *self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let Some((rate, since)) = best else { return 0.0 };
        rate * 0.5_f64.powf(since.elapsed().as_secs_f64() / HALF_LIFE.as_secs_f64())
    }

    fn put(&self, rate: f64) {
        if rate > self.get() {
            let mut best = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            *best = Some((rate, Instant::now()));
        }
    }

    /// Takes note of a connection that goes on.
    pub(super) fn note(&self, pace: &Pace) {
        if let Some(rate) = pace.lately() {
            self.put(rate);
        }
    }

    /// Takes note of one that is done with its piece, or leaves it.
    pub(super) fn note_end(&self, pace: &Pace) {
        if pace.now.bytes >= TELLING_BYTES || pace.begun.elapsed() >= STALLED {
            self.put(pace.overall());
        }
    }

    /// True if what is `left` of a piece that somebody waits for should be asked for elsewhere: it would
    /// take longer than `patience`, for so long it has gone as slowly, and others are far faster. Where
    /// nothing is known of others, or they get no more than a trickle, it is worth a try.
    pub(super) fn is_too_slow(&self, pace: &Pace, left: u64, patience: Duration) -> bool {
        let Some(rate) = pace.rate_over(patience) else { return false };
        let best = self.get();
        takes_longer(rate, left, patience) && (rate * FAR < best || best < TRICKLE)
    }

    /// The same of one that nobody waits for but the transfer: others must be known to be far faster.
    pub(super) fn is_outpaced(&self, pace: &Pace, left: u64, patience: Duration) -> bool {
        let Some(rate) = pace.rate_over(patience) else { return false };
        takes_longer(rate, left, patience) && rate * FAR < self.get()
    }
}

fn takes_longer(rate: f64, left: u64, patience: Duration) -> bool {
    left as f64 > rate * patience.as_secs_f64()
}

/// How patient somebody is.
#[derive(Debug, Default)]
pub(super) struct Level(Mutex<Left>);

#[derive(Debug, Default)]
struct Left {
    doublings: u32,
    /// When it was doubled last, or one was forgiven.
    since: Option<Instant>,
    /// The best rate of those that were left.
    rate: f64,
}

impl Level {
    fn state(&self) -> MutexGuard<'_, Left> {
        let mut left = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        while let Some(since) = left.since.filter(|since| since.elapsed() >= FORGIVEN) {
            left.doublings = left.doublings.saturating_sub(1);
            left.since = (left.doublings > 0).then_some(since + FORGIVEN);
        }
        left
    }

    /// How long it may take; `most` at most.
    pub(super) fn patience(&self, most: Duration) -> Duration {
        let doublings = self.state().doublings.min(MAX_DOUBLINGS);
        STALLED.saturating_mul(1 << doublings).min(most)
    }

    /// A connection was left. Several at a time are one reason to be more patient, and not several.
    pub(super) fn left(&self, pace: &Pace) {
        let mut left = self.state();
        left.rate = left.rate.max(pace.overall());
        if left.since.is_none_or(|since| pace.begun >= since) {
            left.doublings = (left.doublings + 1).min(MAX_DOUBLINGS);
            left.since = Some(Instant::now());
        }
    }

    /// A piece has come. To leave others was of use if it came much faster than theirs, and was not
    /// waited for as long.
    pub(super) fn brought(&self, pace: &Pace) {
        let mut left = self.state();
        let was_of_use = if left.rate > 0.0 {
            pace.overall() > left.rate * BETTER
        } else {
            pace.begun.elapsed() < STALLED
        };
        if was_of_use {
            *left = Left::default();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TWO: Duration = Duration::from_secs(2);
    const MIB: f64 = 1048576.0;

    /// One that was begun `ago`, and has given `bytes` evenly, waited for all the time.
    fn pace(ago: Duration, bytes: u64) -> Pace {
        let (begun, now) = (Instant::now() - ago, Instant::now());
        let mut pace = Pace::new();
        pace.marks.clear();
        let steps = u32::try_from(ago.as_millis() / MARK.as_millis()).unwrap();
        for step in 0..=steps {
            let waited = MARK * step;
            let bytes = bytes * u64::from(step) / u64::from(steps.max(1));
            pace.marks.push_back(Mark { at: begun + waited, bytes, waited });
        }
        pace.now = Mark { at: now, bytes, waited: ago };
        (pace.begun, pace.waiting) = (begun, None);
        pace
    }

    #[test]
    fn what_is_far_slower_than_others_and_takes_long_is_left() {
        let three = Duration::from_secs(3);
        let judge = |bytes, best: f64, left| {
            let (known, pace) = (Best::default(), pace(three, bytes));
            known.put(best);
            (known.is_too_slow(&pace, left, TWO), known.is_outpaced(&pace, left, TWO))
        };
        let (fast, mib) = (10.0 * MIB, 1 << 20);
        assert_eq!(judge(3, fast, 1), (false, false), "one byte is soon here");
        assert_eq!(judge(3, fast, 9), (true, true), "a byte a second");
        assert_eq!(judge(0, fast, 1), (true, true), "nothing");
        assert_eq!(judge(3000, fast, mib), (true, true), "a KiB a second");
        assert_eq!(judge(3 * mib, fast, mib), (false, false), "soon here");
        assert_eq!(judge(6 * mib, fast, 64 * mib), (false, false), "a bit slower than others");
        assert_eq!(judge(150_000, 60_000.0, mib), (false, false), "a slow source");
        assert_eq!(
            judge(150_000, 0.0, mib),
            (true, false),
            "nobody knows whether it is the source"
        );
        assert_eq!(judge(3, 1.0, mib), (true, false), "two that trickle");
    }

    #[test]
    fn a_connection_is_judged_by_what_it_gave_lately_and_not_before_its_time() {
        let best = Best::default();
        best.put(10.0 * MIB);
        assert!(!best.is_outpaced(&pace(SECOND, 10), 1 << 20, TWO));
        let mut pace = pace(Duration::from_secs(3), 3000);
        assert!(best.is_outpaced(&pace, 1 << 20, TWO));
        // It was fast once, which is no merit now.
        pace.now.bytes += 1 << 30;
        pace.marks.iter_mut().for_each(|mark| mark.bytes += 1 << 30);
        assert!(best.is_outpaced(&pace, 1 << 20, TWO));
        // Nobody waited for it: a limit, or a full disk.
        pace.now.waited = Duration::from_millis(1);
        pace.marks.iter_mut().for_each(|mark| mark.waited = Duration::ZERO);
        assert!(!best.is_outpaced(&pace, 1 << 20, TWO));
        // How long its answer took is forgotten.
        pace.now.waited = Duration::from_secs(3);
        assert!(best.is_outpaced(&pace, 1 << 20, TWO));
        pace.answered();
        assert!(!best.is_outpaced(&pace, 1 << 20, TWO));
    }

    #[test]
    fn what_others_got_long_ago_counts_less_each_time() {
        let best = Best::default();
        best.put(8.0 * MIB);
        best.put(MIB);
        assert!(best.get() > 7.0 * MIB);
        let mut state = best.0.lock().unwrap();
        *state = state.map(|(rate, since)| (rate, since - 3 * HALF_LIFE));
        drop(state);
        assert!((0.9 * MIB..1.1 * MIB).contains(&best.get()));
    }

    #[test]
    fn patience_doubles_and_comes_back_when_it_was_of_use_or_with_time() {
        let (level, most) = (Level::default(), Duration::from_secs(30));
        for seconds in [2, 4, 8, 16, 30, 30] {
            assert_eq!(level.patience(most), Duration::from_secs(seconds));
            level.left(&pace(Duration::ZERO, 50));
        }
        level.brought(&pace(TWO, 4000));
        assert_eq!(level.patience(most), most, "no better elsewhere");
        level.state().since = Some(Instant::now() - 3 * FORGIVEN);
        assert_eq!(level.patience(most), Duration::from_secs(16));
        level.brought(&pace(TWO, 12_000));
        assert_eq!(level.patience(most), TWO);
        // Several that were begun before the first was left.
        let (first, second) = (pace(SECOND, 0), pace(SECOND, 0));
        level.left(&first);
        level.left(&second);
        assert_eq!(level.patience(most), 2 * TWO);
        level.brought(&pace(3 * SECOND, 1 << 20));
        assert_eq!(level.patience(most), 2 * TWO, "nothing came for as long elsewhere");
        level.brought(&pace(SECOND, 1));
        assert_eq!(level.patience(most), TWO);
    }
}
