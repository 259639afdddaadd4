//! What readers need of a piece that is fetched in its turn.
//!
//! Why: who brings the file in its order has what a reader waits for in an open buffer, or would come
//! to it late, or stands still just there.
//! How: before each read of its own, and whenever somebody begins to wait, a connection looks at what
//! is missed. It hands its open buffer over if that is enough for somebody, parts with the end of its
//! piece if a reader waits for something there, and leaves the piece if nothing comes of it.
//! Never: takes a buffer that the piece before it may need, or leaves a source for good that is slow.
//! Start at [`Fleet::heed`] and [`Demand::need`].

use std::ops::Range;
use std::time::{Duration, Instant};

use super::book::Book;
use super::demand::{Demand, Urgency};
use super::fleet::{Broken, First, Fleet, Held};
use super::pipeline::{Cutter, Stopped};
use super::todo::blocks_of;
use super::ways::Way;
use crate::ring::BLOCK_BYTES;

const BLOCK: u64 = BLOCK_BYTES as u64;

/// What a reader needs that a connection in its turn can give.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Need {
    /// Something that is here, or a part of the piece that others can bring sooner.
    Heed,
    /// The piece, of which nothing has come for too long.
    Elsewhere,
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

/// What a read gives; `None` if a reader needs something of the piece first. A read that is given up has
/// taken nothing.
pub(super) async fn unless_needed<T>(
    reading: impl Future<Output = T>,
    need: impl Future<Output = Need>,
    held: &mut Held<'_>,
) -> Result<Option<T>, Broken> {
    tokio::select! {
        biased;
        read = reading => Ok(Some(read)),
        need = need => match need {
            Need::Heed => Ok(None),
            Need::Elsewhere => {
                Book::leave(held.claim_mut());
                Err(Broken::Elsewhere)
            }
        }
    }
}

impl Demand {
    /// Waits until a reader needs something of this piece, of which something came at `moved`, and of
    /// which nothing may come for `most`.
    pub(super) async fn need(&self, piece: &Piece, moved: Instant, most: Duration) -> Need {
        loop {
            let changed = self.arriving.waits_changed();
            let parts = self.arriving.missed_in(&piece.behind).is_some();
            if parts || self.arriving.would_suffice(&piece.open) {
                return Need::Heed;
            }
            let patience = self.patience(Urgency::Wanted, most);
            // One who waits as long as the transfer does leaves it to the transfer.
            if patience >= most || self.arriving.missed_in(&piece.rest).is_none() {
                changed.await;
                continue;
            }
            let left = patience.saturating_sub(moved.elapsed());
            if left.is_zero() {
                self.note_stall(piece.rest.start, patience);
                return Need::Elsewhere;
            }
            let _looked_at_again = tokio::time::timeout(left, changed).await;
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

    /// Asks for a piece in its turn, until a reader needs it and nothing has come for too long.
    pub(super) async fn ask_in_turn(
        &self,
        way: &Way,
        held: &mut Held<'_>,
    ) -> Result<First, Broken> {
        let Some(demand) = &self.demand else { return Ok(self.ask(way, held.claim()).await?) };
        let piece = Piece::asked_for(held.claim().range.clone());
        tokio::select! {
            biased;
            open = self.ask(way, held.claim()) => return Ok(open?),
            _ = demand.need(&piece, Instant::now(), self.policy.stall_timeout) => {}
        }
        Book::leave(held.claim_mut());
        Err(Broken::Elsewhere)
    }
}
