//! What others need of a piece that is fetched in its turn: readers, and the rest of the fleet.
//!
//! Why: who brings the file in its order has what a reader waits for in an open buffer, or would come
//! to it late, or stands still just there. And at the end of a file, or when all buffers hold what comes
//! behind it, one connection that trickles is all that the transfer waits for.
//! How: before each read of its own, and whenever somebody begins to wait, a connection looks at what
//! is missed. It hands its open buffer over if that is enough for somebody, parts with the end of its
//! piece if a reader waits for something there, and leaves the piece if nothing comes of it, or too
//! little. It also leaves it if it is far slower than others which have nothing to do meanwhile.
//! Never: takes a buffer that the piece before it may need, or leaves a source for good that is slow.
//! Start at [`Fleet::heed`] and [`Fleet::needed`].

use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use super::book::Book;
use super::demand::{Demand, Urgency};
use super::fleet::{Broken, First, Fleet, Held};
use super::pace::{Best, LOOK, Pace};
use super::pipeline::{Cutter, Stopped};
use super::todo::blocks_of;
use super::ways::Way;
use crate::ring::BLOCK_BYTES;

const BLOCK: u64 = BLOCK_BYTES as u64;

/// What others need that a connection in its turn can give.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Need {
    /// Something that is here, or a part of the piece that others can bring sooner.
    Heed,
    /// The piece, of which nothing has come for too long, or too little.
    Elsewhere,
    /// The same, for the transfer: others are faster.
    Overtaken,
}

/// How far a piece is.
#[derive(Debug)]
pub(super) struct Piece {
    /// Whole units that are here and can be handed over.
    open: Range<u64>,
    /// What is still to come.
    rest: Range<u64>,
    /// The MiBs of that which have not been begun, and which others may have.
    behind: Range<u64>,
}

impl Piece {
    /// Of which nothing has come yet; it stays whole.
    fn asked_for(rest: Range<u64>) -> Self {
        Self { open: 0..0, rest, behind: 0..0 }
    }
}

/// What a read gives, or what others need of the piece first. A read that is given up has taken nothing.
pub(super) async fn unless_needed<T>(
    reading: impl Future<Output = T>,
    need: impl Future<Output = Need>,
) -> Result<T, Need> {
    tokio::select! {
        biased;
        read = reading => Ok(read),
        need = need => Err(need),
    }
}

/// A connection that has nothing to do, until it is dropped.
#[derive(Debug)]
pub(super) struct Idle<'a>(&'a AtomicUsize);

impl<'a> Idle<'a> {
    pub(super) fn new(count: &'a AtomicUsize) -> Self {
        count.fetch_add(1, Ordering::Relaxed);
        Self(count)
    }
}

impl Drop for Idle<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Demand {
    /// Waits until a reader needs something of this piece, for which it can wait shorter than `most`.
    async fn need(&self, piece: &Piece, pace: &Pace, best: &Best, most: Duration) -> Need {
        loop {
            let changed = self.arriving.waits_changed();
            let parts = self.arriving.missed_in(&piece.behind).is_some();
            if parts || self.arriving.would_suffice(&piece.open) {
                return Need::Heed;
            }
            let patience = self.patience(Urgency::Wanted, most);
            // One who waits as long as the transfer does leaves it to the transfer.
            let missed = self.arriving.missed_in(&piece.rest).filter(|_| patience < most);
            let Some(missed) = missed else {
                changed.await;
                continue;
            };
            let left = missed.end.min(piece.rest.end) - piece.rest.start;
            let silent = pace.moved().elapsed();
            if silent >= patience || best.is_too_slow(pace, left, patience) {
                self.note_left(piece.rest.start, pace);
                return Need::Elsewhere;
            }
            let look = LOOK.min(patience - silent);
            let _looked_at_again = tokio::time::timeout(look, changed).await;
        }
    }
}

impl Fleet {
    /// Gives readers what they wait for of a piece in its turn, as far as that can be; what they may
    /// need next of it.
    pub(super) fn heed(
        &self,
        demand: &Demand,
        cutter: &mut Cutter,
        held: &mut Held<'_>,
    ) -> Result<Piece, Broken> {
        let mut can_hand_over = true;
        if demand.arriving.would_suffice(&cutter.open_units()) {
            can_hand_over = cutter.try_to_hand_over().map_err(|Stopped| Broken::Stopped)?;
        }
        let claim = held.claim_mut();
        let rest = cutter.at().min(claim.range.end)..claim.range.end;
        let open = if can_hand_over { cutter.open_units() } else { 0..0 };
        let behind = (rest.start / BLOCK + 1) * BLOCK..rest.end;
        let mut piece = Piece { open, rest, behind };
        if let Some(missed) = demand.arriving.missed_in(&piece.behind) {
            let cut = missed.start.max(piece.behind.start) / BLOCK * BLOCK;
            let others = cut..claim.range.end;
            let permits = cutter.without(blocks_of(&others));
            (claim.range.end, piece.rest.end, piece.behind.end) = (cut, cut, cut);
            self.book().part_with(others.clone(), permits);
            demand.say_again(&others);
        }
        Ok(piece)
    }

    /// Hands over what has come of a piece out of turn, if that is all that somebody waits for; bytes. Who
    /// has asked may begin to wait only when they are here, and maybe no more come.
    pub(super) async fn give_open(&self, cutter: &mut Cutter) -> Result<u64, Broken> {
        let open = cutter.open_units();
        let Some(demand) = self.demand.as_ref().filter(|_| !open.is_empty()) else { return Ok(0) };
        if !demand.arriving.would_suffice(&open) {
            return Ok(0);
        }
        cutter.hand_over().await?.map_err(|Stopped| Broken::Stopped)?;
        Ok(open.end - open.start)
    }

    /// Hands over what is whole of a piece that broke, if there may be readers: who goes on with it may be
    /// long in coming.
    pub(super) async fn give_broken(
        &self,
        cutter: &mut Cutter,
        urgency: Urgency,
    ) -> Result<(), Broken> {
        if self.demand.is_none() || cutter.open_units().is_empty() {
            return Ok(());
        }
        let handed = match urgency {
            Urgency::InTurn => cutter.try_to_hand_over().map(drop),
            Urgency::Wanted | Urgency::Foreseen => cutter.hand_over().await?,
        };
        handed.map_err(|Stopped| Broken::Stopped)
    }

    /// Waits until `open`, which has come of a piece out of turn, is all that somebody waits for.
    pub(super) async fn waited_for(&self, open: &Range<u64>) -> Need {
        let Some(demand) = self.demand.as_ref().filter(|_| !open.is_empty()) else {
            return std::future::pending().await;
        };
        loop {
            let changed = demand.arriving.waits_changed();
            if demand.arriving.would_suffice(open) {
                return Need::Heed;
            }
            changed.await;
        }
    }

    /// Waits until others need something of a piece in its turn; of `piece`, if there may be readers.
    pub(super) async fn needed(
        &self,
        piece: Option<&(&Demand, Piece)>,
        held: &Held<'_>,
        at: u64,
    ) -> Need {
        let most = self.policy.stall_timeout;
        let Some((demand, piece)) = piece else { return self.overtaken(held, at).await };
        tokio::select! {
            need = demand.need(piece, &held.pace, &self.state.best, most) => need,
            need = self.overtaken(held, at) => need,
        }
    }

    /// Waits until others should have this piece, whose next byte is at `at`: they are far faster, and
    /// have nothing to do. One that is alone is held against what there was before it: it is better asked
    /// for anew, unless nothing at all comes, as then there is another limit. Where there can be only one,
    /// and nothing is known, that is worth a try.
    async fn overtaken(&self, held: &Held<'_>, at: u64) -> Need {
        let (state, most) = (&self.state, self.policy.stall_timeout);
        loop {
            let (left, patience) = (held.claim().range.end - at, state.level.patience(most));
            let is_alone =
                || held.pace.moved().elapsed() < patience && self.book().connections == 1;
            let is_slow = match self.is_proved() {
                true => {
                    state.best.is_outpaced(&held.pace, left, patience)
                        && (state.idle.load(Ordering::Relaxed) > 0 || is_alone())
                }
                false => {
                    self.agreed.can_resume
                        && state.best.is_too_slow(&held.pace, left, patience)
                        && is_alone()
                }
            };
            if patience < most && is_slow {
                tracing::info!(at, "a piece came far too slowly; it is asked for once more");
                state.level.left(&held.pace);
                self.progress.add_overtaken();
                return Need::Overtaken;
            }
            tokio::time::sleep(LOOK).await;
        }
    }

    /// Asks for a piece in its turn, until a reader needs it and nothing has come for too long.
    pub(super) async fn ask_in_turn(
        &self,
        way: &Way,
        held: &mut Held<'_>,
    ) -> Result<First, Broken> {
        let Some(demand) = &self.demand else { return Ok(self.ask(way, held.claim()).await?) };
        let (piece, most) =
            (Piece::asked_for(held.claim().range.clone()), self.policy.stall_timeout);
        let asked = self.ask(way, held.claim());
        match unless_needed(asked, demand.need(&piece, &held.pace, &self.state.best, most)).await {
            Ok(open) => Ok(open?),
            Err(_need) => {
                Book::leave(held.claim_mut());
                Err(Broken::Elsewhere)
            }
        }
    }
}
