//! What readers of a disk that is being expanded wait for, before its turn.
//!
//! Why: who reads a disk that is still arriving needs this cluster now, and it may be at the end of its
//! source.
//! How: the plan says where the clusters are that somebody wants. They are read by ranges of their own,
//! decoded, and written as all others are. The source is read in its order all the same, as its digest
//! may have to be proved: when the turn of such a cluster comes, its stored bytes are held against a
//! SHA-256 of those that were used.
//! Never: writes a cluster twice, or lets one stand that differs from what came in its turn. What the
//! plan does not have yet, of disks with more than a million clusters, waits for its turn.
//! Start at [`Early::serve`].

use std::collections::HashMap;
use std::ops::Range;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use futures_util::future::join_all;
use sha2::{Digest, Sha256};
use tokio::sync::watch;

use super::clusters::Shared;
use super::plan::Plan;
use crate::disk::{Arriving, UNIT_BYTES};
use crate::fetch::threads::{blocking, in_place};
use crate::fetch::{SourceFile, Widening};

/// Reads at the same time.
const CONNECTIONS: usize = 4;
/// A gap between two clusters that is rather read than asked around.
const BRIDGE_BYTES: u64 = 64 << 10;
/// Bytes of the source that are read at once, but for one cluster at least.
const MOST_BYTES: u64 = 4 << 20;
/// How far ahead of what comes in its turn nothing is read besides.
const SOON_BYTES: u64 = 1 << 20;
/// When what was left to its turn has not come then, it is read all the same.
const OVERDUE: Duration = Duration::from_millis(500);
/// How long nothing is tried after a failure; what is wanted is said again.
const AFTER_FAILURE: Duration = Duration::from_secs(1);

/// Nobody makes it.
const FREE: u8 = 0;
/// It is being read before its turn.
const ASKED: u8 = 1;
/// It was made before its turn, or is being made.
const EARLY: u8 = 2;
/// Its turn has come.
const IN_TURN: u8 = 3;

/// Who makes which entry of a plan.
#[derive(Debug)]
pub(super) struct Marks {
    states: Vec<AtomicU8>,
    /// Of those that were made early, the SHA-256 of what is stored.
    early: Mutex<HashMap<usize, [u8; 32]>>,
}

/// What is to be done with an entry whose turn has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum InTurn {
    Make,
    IsMade,
    Differs,
}

impl Marks {
    /// For so many entries.
    pub(super) fn new(count: usize) -> Self {
        let states = std::iter::repeat_with(|| AtomicU8::new(FREE)).take(count).collect();
        Self { states, early: Mutex::default() }
    }

    fn early(&self) -> MutexGuard<'_, HashMap<usize, [u8; 32]>> {
        // Each change is one insert or one remove.
        self.early.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(&self, index: usize, from: u8, to: u8) -> bool {
        self.states.get(index).is_some_and(|state| {
            state.compare_exchange(from, to, Ordering::AcqRel, Ordering::Acquire).is_ok()
        })
    }

    /// True if nobody has it: who asks for it may then begin it.
    fn ask(&self, index: usize) -> bool {
        self.change(index, FREE, ASKED)
    }

    /// It is not made early after all, if it was not begun.
    fn leave(&self, index: usize) {
        self.change(index, ASKED, FREE);
    }

    /// True if it is to be made of `stored` now, by who asked for it; its turn may have come meanwhile.
    pub(super) fn begin_early(&self, index: usize, stored: &[u8]) -> bool {
        // Whoever sees the mark finds the digest.
        self.early().insert(index, Sha256::digest(stored).into());
        let begins = self.change(index, ASKED, EARLY);
        if !begins {
            self.early().remove(&index);
        }
        begins
    }

    /// Its turn has come, and `stored` is what came.
    pub(super) fn begin_in_turn(&self, index: usize, stored: &[u8]) -> InTurn {
        if self.change(index, FREE, IN_TURN) || self.change(index, ASKED, IN_TURN) {
            return InTurn::Make;
        }
        // Somebody may have left it in between.
        if self.change(index, FREE, IN_TURN) {
            return InTurn::Make;
        }
        match self.early().remove(&index) {
            Some(digest) if digest == <[u8; 32]>::from(Sha256::digest(stored)) => InTurn::IsMade,
            Some(_) | None => InTurn::Differs,
        }
    }
}

/// Entries that were asked for; those that are not begun are left on drop.
struct Asked<'a> {
    marks: &'a Marks,
    entries: Vec<usize>,
}

impl Drop for Asked<'_> {
    fn drop(&mut self) {
        self.entries.iter().for_each(|&index| self.marks.leave(index));
    }
}

/// Brings what is wanted of one plan.
pub(super) struct Early<'a> {
    file: &'a SourceFile<'a>,
    arriving: &'a Arriving,
    shared: &'a Arc<Shared>,
    /// The entries in the order of the guest.
    by_guest: OnceLock<Vec<u32>>,
    widening: Widening,
    /// What was left to its turn, and when.
    left: Mutex<Option<(u64, Instant)>>,
}

impl<'a> Early<'a> {
    /// For the readers of `arriving`.
    pub(super) fn new(
        file: &'a SourceFile<'a>,
        arriving: &'a Arriving,
        shared: &'a Arc<Shared>,
    ) -> Self {
        let (by_guest, widening, left) = (OnceLock::new(), Widening::default(), Mutex::default());
        Self { file, arriving, shared, by_guest, widening, left }
    }

    /// Brings what is wanted until all is `over`, and nothing of it is on its way.
    pub(super) async fn serve(&self, over: watch::Receiver<bool>) {
        join_all((0..CONNECTIONS).map(|_| self.connection(over.clone()))).await;
    }

    async fn connection(&self, mut over: watch::Receiver<bool>) {
        loop {
            let wanted = tokio::select! {
                biased;
                _ = over.wait_for(|over| *over) => return,
                wanted = self.arriving.wanted() => wanted,
            };
            let wide = self.widening.widen(&wanted);
            let mut asked = Asked { marks: &self.shared.marks, entries: Vec::new() };
            if !self.is_soon(&wanted) {
                let entries = self.entries_in(&wide);
                asked.entries = entries.filter(|&index| asked.marks.ask(index)).collect();
            }
            for (range, entries) in groups(&self.shared.plan, &asked.entries) {
                let note = || self.arriving.add_stall();
                let read = tokio::select! {
                    biased;
                    _ = over.wait_for(|over| *over) => return,
                    read = self.file.read_first(range.clone(), &note) => read,
                };
                match read {
                    Ok(bytes) => {
                        // Not given up in the middle: what is begun is made.
                        let shared = Arc::clone(self.shared);
                        blocking(move || shared.make_early(&entries, range.start, &bytes)).await;
                    }
                    Err(error) => {
                        let error = crate::fetch::one_line(&error);
                        tracing::warn!(error, "what a reader waits for could not be fetched");
                        let _rested_or_over =
                            tokio::time::timeout(AFTER_FAILURE, over.wait_for(|over| *over)).await;
                        break;
                    }
                }
            }
        }
    }

    /// The entries of the units that `guest` touches, by their numbers.
    fn entries_in(&self, guest: &Range<u64>) -> impl Iterator<Item = usize> {
        let plan = &self.shared.plan;
        let by_guest = self.by_guest.get_or_init(|| in_place(|| by_guest(plan)));
        let range = guest.start / UNIT_BYTES * UNIT_BYTES..guest.end.next_multiple_of(UNIT_BYTES);
        let of = |&index: &u32| plan.guest(&plan.entries[index as usize]);
        let first = by_guest.partition_point(|index| of(index).end <= range.start);
        let end = by_guest.partition_point(|index| of(index).start < range.end);
        let found = by_guest.get(first..end).unwrap_or_default();
        found.iter().map(|&index| index as usize)
    }

    /// True if what comes in its turn is about to come there, and has not been for long.
    fn is_soon(&self, wanted: &Range<u64>) -> bool {
        let come_to = self.shared.come_to.load(Ordering::Relaxed);
        let soon = come_to..come_to + SOON_BYTES;
        let entry = self.entries_in(wanted).next().map(|index| self.shared.plan.entries[index]);
        if !entry.is_some_and(|entry| come_to > 0 && soon.contains(&entry.at)) {
            return false;
        }
        let mut left = self.left.lock().unwrap_or_else(PoisonError::into_inner);
        match *left {
            Some((at, since)) if at == wanted.start => since.elapsed() < OVERDUE,
            Some(_) | None => {
                *left = Some((wanted.start, Instant::now()));
                true
            }
        }
    }
}

fn by_guest(plan: &Plan) -> Vec<u32> {
    // A plan has some millions of entries at most.
    let count = u32::try_from(plan.entries.len()).unwrap_or(u32::MAX);
    let is_made = |index: &u32| !plan.entries[*index as usize].kept;
    let mut order: Vec<u32> = (0..count).filter(is_made).collect();
    order.sort_unstable_by_key(|&index| plan.entries[index as usize].guest_at);
    order
}

/// What to read of the source at once, and the entries that are in it.
fn groups(plan: &Plan, entries: &[usize]) -> Vec<(Range<u64>, Vec<usize>)> {
    let mut sorted = entries.to_vec();
    // They are numbered in the order of the source.
    sorted.sort_unstable();
    let mut groups: Vec<(Range<u64>, Vec<usize>)> = Vec::new();
    for index in sorted {
        let stored = plan.entries[index].stored();
        match groups.last_mut() {
            Some((range, members))
                if stored.start <= range.end + BRIDGE_BYTES
                    && stored.end <= range.start + MOST_BYTES =>
            {
                range.end = range.end.max(stored.end);
                members.push(index);
            }
            Some(_) | None => groups.push((stored, vec![index])),
        }
    }
    groups
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_entry_is_made_once_and_must_be_the_same_in_its_turn() {
        let marks = Marks::new(4);
        assert!(marks.ask(0) && !marks.ask(0));
        assert!(marks.begin_early(0, b"bytes"));
        assert_eq!(marks.begin_in_turn(0, b"bytes"), InTurn::IsMade);
        assert!(marks.ask(1) && marks.begin_early(1, b"bytes"));
        assert_eq!(marks.begin_in_turn(1, b"other"), InTurn::Differs);
        // Its turn comes while it is on its way, or after it was left.
        assert!(marks.ask(2));
        assert_eq!(marks.begin_in_turn(2, b"bytes"), InTurn::Make);
        assert!(!marks.begin_early(2, b"other") && !marks.ask(2));
        drop(Asked { marks: &marks, entries: vec![0, 2, 3] });
        assert!(marks.ask(3));
        drop(Asked { marks: &marks, entries: vec![3] });
        assert_eq!(marks.begin_in_turn(3, b"bytes"), InTurn::Make);
        assert!(!marks.ask(3) && !marks.ask(4));
    }
}
