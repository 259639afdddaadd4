//! Who fetches what: the pieces of one run, with the buffers that each needs.
//!
//! Why: digests are made in order from memory. If a piece behind could hold the buffers that the
//! piece before it needs, both would wait for ever.
//! How: a piece is taken together with all its buffers, lowest first; what is not finished comes
//! back with them, and with the bytes of the buffer that was open, and is taken before all else. A
//! lone connection takes MiB after MiB of one body instead.
//! Never: gives a byte to two, or waits.
//! Start at [`Book::turn`].

use std::ops::Range;
use std::time::{Duration, Instant};

use super::pipeline::{Cutter, Feed};
use super::todo::{Todo, blocks_of};
use crate::disk::UNIT_BYTES;
use crate::ring::{BLOCK_BYTES, Buf, BufPermits, BufShare};

/// Largest piece of one of several connections, in MiB.
const MAX_PIECE_BLOCKS: usize = 16;

/// Pieces for which there are buffers besides those of the connections.
const SPARE_PIECES: usize = 2;

/// Buffers with which each of so many connections may have a piece of `piece_bytes`, or the largest.
pub(super) fn buffers_for(connections: usize, piece_bytes: u64) -> usize {
    (connections + SPARE_PIECES) * blocks_of(&(0..piece_bytes)).min(MAX_PIECE_BLOCKS)
}

/// A piece in the hands of one connection.
#[derive(Debug)]
pub(super) struct Claim {
    /// What is still to be fetched of it.
    pub(super) range: Range<u64>,
    /// How far to ask: beyond the piece, if it may go on.
    pub(super) asked_end: u64,
    pub(super) permits: Option<BufPermits>,
    /// The buffer that was open when a connection broke; its bytes end where `range` begins.
    pub(super) buf: Option<Buf>,
    /// Until then it is left to who asks for what readers wait for.
    pub(super) left_until: Option<Instant>,
}

impl Claim {
    /// Cuts it in two at `at`, where a MiB begins: this one ends there.
    fn split_off(&mut self, at: u64) -> Self {
        let range = at..self.range.end;
        let permits = self.permits.as_mut().map(|permits| permits.split(blocks_of(&range)));
        self.range.end = at;
        let (asked_end, left_until) = (range.end, self.left_until);
        Self { range, asked_end, permits, buf: None, left_until }
    }
}

/// How far ahead of a lone stream nothing is taken out of its way: it would have to be begun anew.
const SOON_BYTES: u64 = 1 << 20;

/// How long a piece that a reader waits for is left to who brings such pieces; then it is anybody's.
const LEFT: Duration = Duration::from_secs(1);

/// What a connection is to do next.
#[derive(Debug)]
pub(super) enum Turn {
    /// Go on with a piece that came back.
    Returned(Claim),
    /// Reserve so many buffers, then [`Book::take`].
    Take {
        /// How many.
        blocks: usize,
    },
    /// Nothing now, but a piece may come back.
    Wait,
    /// End.
    Over,
}

/// The pieces of one run.
#[derive(Debug)]
pub(super) struct Book {
    todo: Todo,
    returned: Vec<Claim>,
    active: usize,
    handed: u64,
    highest: u64,
    /// Connections that run.
    pub(super) connections: usize,
    /// Connections that should run.
    pub(super) target: usize,
}

impl Book {
    /// For a run that has to fetch `missing`.
    pub(super) fn new(missing: Vec<Range<u64>>) -> Self {
        Self {
            todo: Todo::new(missing),
            returned: Vec::new(),
            active: 0,
            handed: 0,
            highest: 0,
            connections: 0,
            target: 1,
        }
    }

    /// True if nothing is left to be fetched.
    pub(super) fn is_empty(&self) -> bool {
        self.todo.is_empty() && self.returned.is_empty() && self.active == 0
    }

    /// True if there is something that nobody has begun.
    pub(super) fn has_untaken(&self) -> bool {
        !self.todo.is_empty()
    }

    /// What a connection does next. `first`: it has an answer in hand.
    pub(super) fn turn(&mut self, share: &BufShare, first: bool) -> Turn {
        if !first && self.connections > self.target {
            return Turn::Over;
        }
        let now = Instant::now();
        let is_free = |&i: &usize| self.returned[i].left_until.is_none_or(|until| until <= now);
        let free = (0..self.returned.len()).filter(is_free);
        if let Some(index) = free.min_by_key(|&i| self.returned[i].range.start) {
            self.active += 1;
            return Turn::Returned(self.returned.swap_remove(index));
        }
        if self.todo.is_empty() {
            let is_over = self.active == 0 && self.returned.is_empty();
            return if is_over { Turn::Over } else { Turn::Wait };
        }
        Turn::Take { blocks: self.piece_blocks(share.count()) }
    }

    /// So many that all connections' pieces fit into the buffers with some to spare, and that the
    /// end of the file is shared by all.
    fn piece_blocks(&self, buffers: usize) -> usize {
        if self.target == 1 {
            return 1;
        }
        let left = blocks_of(&(0..self.todo.len_bytes())) / self.target;
        (buffers / (self.target + SPARE_PIECES)).min(left).clamp(1, MAX_PIECE_BLOCKS)
    }

    /// Takes the lowest piece for which `permits` are enough.
    pub(super) fn take(&mut self, mut permits: BufPermits) -> Option<Claim> {
        let whole = self.todo.lowest()?;
        let range = self.todo.take(permits.len())?;
        permits.keep(blocks_of(&range));
        self.active += 1;
        let asked_end = if self.target == 1 { whole.end } else { range.end };
        Some(Claim { range, asked_end, permits: Some(permits), buf: None, left_until: None })
    }

    /// Takes the first part of `wanted`, in whole units and to the end of its MiB at most, that nobody
    /// has; `None` if there is none, or if a lone stream is about to come there. `urgent`: it should
    /// have come there by now. What somebody took before and did not finish comes first, a MiB of it: a
    /// lone stream would not look at it before its own end.
    pub(super) fn take_wanted(
        &mut self,
        wanted: &Range<u64>,
        mut permits: BufPermits,
        urgent: bool,
    ) -> Option<Claim> {
        if let Some(claim) = self.take_returned(wanted) {
            return Some(claim);
        }
        let soon = match (self.target, self.todo.lowest()) {
            (1, Some(lowest)) if self.connections > 0 && !urgent => {
                lowest.start..lowest.start + SOON_BYTES
            }
            _several_or_none => 0..0,
        };
        let range = self.todo.take_within(wanted, &soon)?;
        permits.keep(blocks_of(&range));
        self.active += 1;
        let (asked_end, permits) = (range.end, Some(permits));
        Some(Claim { asked_end, range, permits, buf: None, left_until: None })
    }

    /// Takes the MiB in which `wanted` begins, or goes on, out of a piece that came back.
    fn take_returned(&mut self, wanted: &Range<u64>) -> Option<Claim> {
        const BLOCK: u64 = BLOCK_BYTES as u64;
        let of_it =
            |claim: &Claim| claim.range.start < wanted.end && wanted.start < claim.range.end;
        let index = self.returned.iter().position(of_it)?;
        let mut claim = self.returned.swap_remove(index);
        let block = wanted.start.max(claim.range.start) / BLOCK * BLOCK;
        if block + BLOCK < claim.range.end {
            let behind = claim.split_off(block + BLOCK);
            self.returned.push(behind);
        }
        if claim.range.start < block {
            let taken = claim.split_off(block);
            self.returned.push(claim);
            claim = taken;
        }
        self.active += 1;
        Some(Claim { asked_end: claim.range.end, left_until: None, ..claim })
    }

    /// Lets others have `range`, the end of a piece, with the buffers for it: a reader waits for a part
    /// of it, and its connection would come there late. It begins at a MiB.
    pub(super) fn part_with(&mut self, range: Range<u64>, permits: Option<BufPermits>) {
        let (asked_end, left_until) = (range.end, Some(Instant::now() + LEFT));
        self.returned.push(Claim { range, asked_end, permits, buf: None, left_until });
    }

    /// True if something waits for who brings what readers wait for.
    pub(super) fn has_left(&self) -> bool {
        self.returned.iter().any(|claim| claim.left_until.is_some())
    }

    /// Lets a piece go on with the MiB at `at`, if nobody has it. Its buffer is not reserved: it is
    /// the next of all that are asked for.
    pub(super) fn extend(&mut self, claim: &mut Claim, at: u64) -> bool {
        let next = if claim.range.end == at { self.todo.take_at(at) } else { None };
        if let Some(next) = &next {
            claim.range.end = next.end;
        }
        next.is_some()
    }

    /// Notes that a stream has come from `start` to `at`.
    pub(super) fn advanced(&mut self, start: u64, at: u64) {
        self.handed += at / UNIT_BYTES * UNIT_BYTES - start / UNIT_BYTES * UNIT_BYTES;
        self.highest = self.highest.max(at);
    }

    /// Bytes that have arrived in whole units.
    pub(super) fn handed_bytes(&self) -> u64 {
        self.handed
    }

    /// The position behind the last byte that has arrived.
    pub(super) fn highest(&self) -> u64 {
        self.highest
    }

    /// The source has ended here: nothing more is to be fetched.
    pub(super) fn close(&mut self) {
        self.todo = Todo::default();
    }

    /// What is left of a piece is for a reader, once it comes back.
    pub(super) fn leave(claim: &mut Claim) {
        claim.left_until = Some(Instant::now() + LEFT);
    }

    /// A connection is done with a piece; what is left of it is for others.
    pub(super) fn give_back(&mut self, claim: Claim) {
        self.active -= 1;
        if !claim.range.is_empty() || claim.buf.is_some() {
            self.returned.push(claim);
        }
    }

    /// At the end of a run that failed: hands over the whole units of the open buffers.
    pub(super) fn flush(&mut self, feed: &Feed, share: &BufShare) {
        for claim in self.returned.drain(..) {
            // Dropping a cutter hands over what it has.
            drop(Cutter::resume(feed.clone(), share.clone(), claim.range.start, None, claim.buf));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ring::BufPool;

    const MIB: u64 = BLOCK_BYTES as u64;

    async fn take(book: &mut Book, share: &BufShare) -> Claim {
        match book.turn(share, false) {
            Turn::Take { blocks } => book.take(share.reserve(blocks).await.unwrap()).unwrap(),
            Turn::Returned(claim) => claim,
            other @ (Turn::Wait | Turn::Over) => panic!("{other:?}"),
        }
    }

    #[tokio::test]
    async fn a_lone_connection_asks_for_all_and_takes_mib_after_mib() {
        let share = BufPool::new(8).share(8, 8);
        let mut book = Book::new(std::iter::once(0..10 * MIB).collect());
        book.connections = 1;
        let mut claim = take(&mut book, &share).await;
        assert_eq!((claim.range.clone(), claim.asked_end), (0..MIB, 10 * MIB));
        assert!(book.extend(&mut claim, MIB) && claim.range.end == 2 * MIB);
        book.target = 2;
        book.connections = 2;
        let second = take(&mut book, &share).await;
        assert_eq!((second.range.clone(), second.asked_end), (2 * MIB..4 * MIB, 4 * MIB));
        assert!(!book.extend(&mut claim, 2 * MIB), "what follows has an owner");
    }

    #[tokio::test]
    async fn what_comes_back_is_next_and_has_its_buffers() {
        let share = BufPool::new(8).share(8, 8);
        let mut book = Book::new(std::iter::once(0..20 * MIB).collect());
        (book.target, book.connections) = (2, 2);
        let (mut first, second) = (take(&mut book, &share).await, take(&mut book, &share).await);
        first.range.start += 5;
        book.give_back(first);
        let again = take(&mut book, &share).await;
        assert_eq!(again.range, 5..2 * MIB);
        assert_eq!(again.permits.as_ref().map(BufPermits::len), Some(2));
        drop((again, second));
    }

    #[tokio::test]
    async fn what_is_wanted_is_taken_over_from_who_did_not_finish_it() {
        let share = BufPool::new(8).share(8, 8);
        let mut book = Book::new(std::iter::once(0..20 * MIB).collect());
        (book.target, book.connections) = (2, 2);
        let wanted = 10 * MIB + 7..10 * MIB + 4096;
        let permits = share.reserve(2).await.unwrap();
        let mut first = book.take_wanted(&wanted, permits, false).unwrap();
        assert_eq!(first.range, 10 * MIB..10 * MIB + UNIT_BYTES);
        let permits = share.reserve(2).await.unwrap();
        assert!(book.take_wanted(&wanted, permits, true).is_none(), "somebody has it");
        first.range.start += 500;
        book.give_back(first);
        let permits = share.reserve(2).await.unwrap();
        let again = book.take_wanted(&wanted, permits, false).unwrap();
        assert_eq!(again.range, 10 * MIB + 500..10 * MIB + UNIT_BYTES);
    }

    #[tokio::test]
    async fn of_a_long_piece_that_comes_back_a_mib_is_taken_with_its_buffer() {
        let share = BufPool::new(16).share(16, 16);
        let mut book = Book::new(std::iter::once(0..40 * MIB).collect());
        (book.target, book.connections) = (2, 2);
        let mut long = take(&mut book, &share).await;
        assert_eq!(long.range, 0..4 * MIB);
        long.range.start = MIB + 100;
        long.permits.as_mut().unwrap().keep(3);
        book.give_back(long);
        let permits = share.reserve(2).await.unwrap();
        let wanted = 2 * MIB + 5..3 * MIB + 6;
        let first = book.take_wanted(&wanted, permits, false).unwrap();
        assert_eq!((first.range.clone(), first.asked_end), (2 * MIB..3 * MIB, 3 * MIB));
        let permits = share.reserve(2).await.unwrap();
        let second = book.take_wanted(&wanted, permits, false).unwrap();
        assert_eq!(second.range, 3 * MIB..4 * MIB);
        let rest = take(&mut book, &share).await;
        assert_eq!(rest.range, MIB + 100..2 * MIB);
        for claim in [first, second, rest] {
            assert_eq!(claim.permits.as_ref().map(BufPermits::len), Some(1));
        }
    }

    #[tokio::test]
    async fn what_is_left_to_readers_is_not_taken_in_turn_for_a_while_and_is_not_forgotten() {
        let share = BufPool::new(16).share(16, 16);
        let mut book = Book::new(std::iter::once(0..5 * MIB).collect());
        (book.target, book.connections) = (2, 2);
        let mut long = take(&mut book, &share).await;
        assert_eq!(long.range, 0..2 * MIB);
        let permits = long.permits.as_mut().map(|permits| permits.split(1));
        long.range.end = MIB;
        book.part_with(MIB..2 * MIB, permits);
        let next = take(&mut book, &share).await;
        assert_eq!(next.range, 2 * MIB..3 * MIB, "others go on behind it");
        let last = [take(&mut book, &share).await, take(&mut book, &share).await];
        for mut claim in [long, next].into_iter().chain(last) {
            claim.range.start = claim.range.end;
            book.give_back(claim);
        }
        assert!(matches!(book.turn(&share, false), Turn::Wait) && !book.is_empty());
        book.returned[0].left_until = Some(Instant::now());
        assert_eq!(take(&mut book, &share).await.range, MIB..2 * MIB);
    }

    #[tokio::test]
    async fn an_idle_connection_waits_while_another_may_fail_and_ends_when_none_can() {
        let share = BufPool::new(4).share(4, 4);
        let mut book = Book::new(std::iter::once(0..MIB).collect());
        (book.target, book.connections) = (2, 2);
        let mut only = take(&mut book, &share).await;
        assert!(matches!(book.turn(&share, false), Turn::Wait));
        only.range.start = only.range.end;
        book.give_back(only);
        assert!(matches!(book.turn(&share, false), Turn::Over));
        assert!(book.is_empty());
    }

    #[tokio::test]
    async fn one_connection_too_many_ends() {
        let share = BufPool::new(4).share(4, 4);
        let mut book = Book::new(std::iter::once(0..9 * MIB).collect());
        (book.target, book.connections) = (2, 3);
        assert!(matches!(book.turn(&share, false), Turn::Over));
        assert!(matches!(book.turn(&share, true), Turn::Take { .. }));
    }
}
