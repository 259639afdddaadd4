//! What will be read of an arriving file, as far as somebody foresees it.
//!
//! Why: what a guest is going to read is worth fetching before the rest, but not before what a reader
//! waits for.
//! How: a short queue beside the wishes of readers, in order; who fills it waits for room, who empties
//! it waits for ranges. Ranges that lie close together are fetched as one.
//! Never: grows with the list that it is filled from.
//! Start at [`Foreseen::push`].

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;

/// Ranges that are kept; a further one is dropped, and comes with the rest of the file.
const MAX_RANGES: usize = 512;
/// As many are enough for all who fetch them: whoever fills the queue waits.
const ENOUGH: usize = 16;
/// What lies so close to a range that is queued is fetched with it: less than a request costs.
const CLOSE_BYTES: u64 = 128 << 10;
/// But not more at once.
const MOST_BYTES: u64 = 1 << 20;

/// Ranges that will be read, the next one first.
#[derive(Debug, Default)]
pub struct Foreseen {
    queue: Mutex<VecDeque<Range<u64>>>,
    /// A range was taken.
    taken: Condvar,
    /// For whoever brings them.
    asked: Notify,
    /// Bytes that were brought.
    brought: AtomicU64,
}

impl Foreseen {
    fn queue(&self) -> MutexGuard<'_, VecDeque<Range<u64>>> {
        // Each change is one push, pop or assignment.
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes a range.
    pub fn push(&self, range: Range<u64>) {
        let mut queue = self.queue();
        let is_full = queue.len() >= MAX_RANGES;
        let close = queue.iter_mut().find_map(|known| {
            let near = known.start <= range.end.saturating_add(CLOSE_BYTES)
                && range.start <= known.end.saturating_add(CLOSE_BYTES);
            let both = known.start.min(range.start)..known.end.max(range.end);
            (near && both.end - both.start <= MOST_BYTES).then_some((known, both))
        });
        match close {
            Some((known, both)) => *known = both,
            None if is_full => return,
            None => queue.push_back(range),
        }
        self.asked.notify_one();
    }

    /// Notes what is to come before all others.
    pub fn push_front(&self, range: Range<u64>) {
        self.queue().push_front(range);
        self.asked.notify_one();
    }

    /// Waits until more ranges are of use; false if that took longer than `patience`.
    #[must_use]
    pub fn has_room(&self, patience: Duration) -> bool {
        let queue = self.queue();
        let full = |queue: &mut VecDeque<_>| queue.len() >= ENOUGH;
        let waited = self.taken.wait_timeout_while(queue, patience, full);
        !waited.unwrap_or_else(PoisonError::into_inner).1.timed_out()
    }

    /// The next range, for whoever brings it; waits until there is one.
    pub async fn next(&self) -> Range<u64> {
        loop {
            let asked = self.asked.notified();
            let (next, is_last) = {
                let mut queue = self.queue();
                (queue.pop_front(), queue.is_empty())
            };
            if let Some(range) = next {
                self.taken.notify_all();
                if !is_last {
                    self.asked.notify_one();
                }
                return range;
            }
            asked.await;
        }
    }

    /// Notes that so many bytes were brought.
    pub fn add_brought(&self, bytes: u64) {
        self.brought.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Bytes that were brought so far.
    #[must_use]
    pub fn brought_bytes(&self) -> u64 {
        self.brought.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KIB: u64 = 1 << 10;

    #[tokio::test]
    async fn ranges_come_in_order_and_close_ones_together() {
        let foreseen = Foreseen::default();
        for at in [5000, 100, 5064, 4900, 9000, 100] {
            foreseen.push(at * KIB..(at + 64) * KIB);
        }
        foreseen.push_front(0..7);
        let wanted = [0..7, 4900 * KIB..5128 * KIB, 100 * KIB..164 * KIB, 9000 * KIB..9064 * KIB];
        for range in wanted {
            assert_eq!(foreseen.next().await, range);
        }
    }

    #[test]
    fn the_queue_is_bounded_and_says_when_it_has_enough() {
        let foreseen = Foreseen::default();
        assert!(foreseen.has_room(Duration::ZERO));
        for at in 0..10_000 {
            foreseen.push(at * (4 << 20)..at * (4 << 20) + 1);
        }
        assert_eq!(foreseen.queue().len(), MAX_RANGES);
        assert!(!foreseen.has_room(Duration::ZERO));
        foreseen.push(0..MOST_BYTES + 1);
        assert_eq!(foreseen.queue()[0], 0..1, "what is too long for one request is not joined");
    }
}
