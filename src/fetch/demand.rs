//! What readers wait for, before all else.
//!
//! Why: who reads an image that is still arriving needs this block now, not when its turn comes.
//! How: a few connections beside those of the fleet take what is wanted out of the book, a MiB of the
//! file at most, and ask for it. Who reads forward gets more than it asked for, twice as much each
//! time. The fleet's own connections rest while one of these is on its way. A connection on which
//! nothing comes, or a trickle, is left for another one, sooner than one of the fleet would be.
//! Never: asks for what somebody has, or is about to have; or keeps a buffer from the fleet.
//! Start at [`Demand::new`] and [`Fleet::serve_demand`].

use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::task::JoinSet;

use super::book::Claim;
use super::error::FetchError;
use super::fleet::{Broken, Fleet, Held};
use super::foreseen;
use super::pace::{Level, Pace};
use super::traffic::{OnItsWay, Traffic};
use super::widening::Widening;
use crate::disk::{Arriving, UNIT_BYTES};
use crate::ring::{BufPool, BufShare};

/// Connections for what is wanted.
const CONNECTIONS: usize = 4;
/// Buffers for them.
const BUFFERS: usize = 2 * CONNECTIONS;
/// When a lone stream has not come to what was left to it, it is fetched all the same.
const OVERDUE: Duration = Duration::from_millis(500);
/// How long a connection rests that has failed; others may take over what it left.
pub(super) const AFTER_FAILURE: Duration = Duration::from_secs(1);

/// How urgent a piece is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Urgency {
    /// Its turn has come.
    InTurn,
    /// A reader will probably want it.
    Foreseen,
    /// A reader waits for it.
    Wanted,
}

/// What is wanted of one transfer.
#[derive(Debug)]
pub(super) struct Demand {
    pub(super) arriving: Arc<Arriving>,
    pub(super) share: BufShare,
    pub(super) foreseen_share: BufShare,
    wanted: Traffic,
    foreseen: Traffic,
    /// How long something may take that somebody waits for.
    pub(super) level: Level,
    /// What was left to a lone stream that was about to come there, and when.
    left: Mutex<Option<(u64, Instant)>>,
    widening: Widening,
}

impl Demand {
    /// Of the readers of `arriving`.
    pub(super) fn new(arriving: Arc<Arriving>, pool: &BufPool) -> Self {
        let share = pool.share(BUFFERS, BUFFERS);
        let foreseen_share = pool.share(2 * foreseen::CONNECTIONS, 2 * foreseen::CONNECTIONS);
        let (wanted, foreseen) = (Traffic::default(), Traffic::default());
        let (left, widening) = (Mutex::default(), Widening::default());
        let level = Level::default();
        Self { arriving, share, foreseen_share, wanted, foreseen, level, left, widening }
    }

    /// Lets what is more urgent pass, for a while.
    pub(super) async fn yield_to_others(&self, urgency: Urgency) {
        match urgency {
            Urgency::Wanted => {}
            Urgency::Foreseen => self.wanted.let_pass().await,
            Urgency::InTurn if self.wanted.is_active() => self.wanted.let_pass().await,
            Urgency::InTurn => self.foreseen.let_pass().await,
        }
    }

    /// Whether what has come of a piece is worth handing over before all of it has: somebody waits, and
    /// it is twice as much as was handed over before.
    pub(super) fn is_worth_handing_over(&self, open_bytes: usize, handed_bytes: u64) -> bool {
        let open_bytes = open_bytes as u64;
        open_bytes >= UNIT_BYTES && open_bytes >= 2 * handed_bytes && self.arriving.is_waited_for()
    }

    /// How long nothing may come of a piece; `most`: of one in its turn.
    pub(super) fn patience(&self, urgency: Urgency, most: Duration) -> Duration {
        if urgency == Urgency::InTurn {
            return most;
        }
        self.level.patience(most)
    }

    /// Says again what is missed of `range`, which somebody has given back.
    pub(super) fn say_again(&self, range: &Range<u64>) {
        let missed = self.arriving.missed_in(range).unwrap_or_else(|| range.clone());
        let (start, end) = (missed.start.max(range.start), missed.end.min(range.end));
        self.arriving.will_read(start, end - start);
    }

    /// Nothing, or too little, has come of a piece whose next byte is at `at`.
    pub(super) fn note_left(&self, at: u64, pace: &Pace) {
        let silent_ms = pace.moved().elapsed().as_millis();
        tracing::info!(at, silent_ms, "a piece came too slowly; it is asked for once more");
        self.level.left(pace);
        self.arriving.add_stall();
    }

    /// True if what begins here was left to the stream some time ago, and still has not come.
    fn is_overdue(&self, at: u64) -> bool {
        let left = self.left.lock().unwrap_or_else(PoisonError::into_inner);
        left.is_some_and(|(start, since)| start == at && since.elapsed() >= OVERDUE)
    }

    fn leave(&self, at: u64) {
        let mut left = self.left.lock().unwrap_or_else(PoisonError::into_inner);
        if left.is_none_or(|(start, _)| start != at) {
            *left = Some((at, Instant::now()));
        }
    }
}

impl Fleet {
    /// Starts the connections for what is wanted; they end when everybody does.
    pub(super) fn serve_demand(self: &Arc<Self>) -> JoinSet<()> {
        let mut tasks = JoinSet::new();
        if self.demand.is_some() {
            for _ in 0..CONNECTIONS {
                tasks.spawn(Arc::clone(self).demand_connection());
            }
        }
        self.serve_foreseen(&mut tasks);
        tasks
    }

    async fn demand_connection(self: Arc<Self>) {
        let Some(demand) = &self.demand else { return };
        let mut halt = self.halted();
        loop {
            let one = async {
                let wanted = demand.arriving.wanted().await;
                self.fetch_wanted(demand, &wanted).await;
            };
            tokio::select! {
                () = one => {}
                _ = halt.wait_for(|halt| *halt) => return,
            }
        }
    }

    /// Fetches the first piece of a wish that nobody has begun; the rest is left to be taken next.
    async fn fetch_wanted(&self, demand: &Demand, wanted: &Range<u64>) {
        let Ok(permits) = demand.share.reserve(2).await else { return };
        let wide = demand.widening.widen(wanted);
        let urgent = demand.is_overdue(wanted.start);
        let Some(claim) = self.book().take_wanted(&wide, permits, urgent) else {
            return demand.leave(wanted.start);
        };
        let (piece, rest) = (claim.range.clone(), claim.range.end..wide.end);
        if !rest.is_empty() {
            demand.arriving.will_read(rest.start, rest.end - rest.start);
        }
        if !self.bring(demand, claim, Urgency::Wanted).await {
            demand.arriving.will_read(piece.start, piece.end - piece.start);
        }
    }

    /// Brings a piece out of turn; false if it, or a part of it, is to be asked for again.
    pub(super) async fn bring(&self, demand: &Demand, claim: Claim, urgency: Urgency) -> bool {
        let traffic = if urgency == Urgency::Wanted { &demand.wanted } else { &demand.foreseen };
        let brought = {
            let _on_its_way = OnItsWay::new(traffic);
            self.try_to_bring(demand, claim, urgency).await
        };
        match brought {
            Ok(()) => return true,
            Err(Broken::Elsewhere) => {}
            Err(broken) => {
                let error = broken.report();
                tracing::warn!(error, "what a reader waits for, or will, could not be fetched");
                tokio::time::sleep(AFTER_FAILURE).await;
            }
        }
        false
    }

    async fn try_to_bring(
        &self,
        demand: &Demand,
        claim: Claim,
        urgency: Urgency,
    ) -> Result<(), Broken> {
        let way = self.ways.pick();
        // Whatever happens, what was claimed goes back.
        let mut held = Held::new(self, claim);
        let patience = demand.patience(urgency, self.policy.stall_timeout);
        let asked = tokio::time::timeout(patience, self.ask(&way.0, held.claim())).await;
        let brought = match asked {
            Ok(open) => self.stream(&way.0, open?, &mut held, urgency).await,
            Err(_elapsed) => Err(Broken::Elsewhere),
        };
        match brought {
            Ok(()) => {
                demand.level.brought(&held.pace);
                Ok(())
            }
            Err(Broken::Elsewhere | Broken::Error(FetchError::Stalled { .. })) => {
                demand.note_left(held.claim().range.start, &held.pace);
                way.0.trickled();
                Err(Broken::Elsewhere)
            }
            Err(broken) => Err(broken),
        }
    }

    /// True if a piece out of turn comes too slowly: somebody waits for it, or will.
    pub(super) fn comes_too_slowly(&self, urgency: Urgency, held: &Held<'_>, at: u64) -> bool {
        let Some(demand) = self.demand.as_ref().filter(|_| urgency != Urgency::InTurn) else {
            return false;
        };
        let most = self.policy.stall_timeout;
        let (patience, left) = (demand.patience(urgency, most), held.claim().range.end - at);
        patience < most && self.state.best.is_too_slow(&held.pace, left, patience)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn demand() -> (tempfile::TempDir, Demand) {
        let dir = tempfile::tempdir().unwrap();
        let disk = crate::disk::Disk::open(dir.path(), true).unwrap();
        let id = crate::disk::CopyId {
            name: crate::names::ImageName::parse("a").unwrap(),
            uuid: crate::names::ImageUuid::parse("0a").unwrap(),
        };
        let mut filling = disk.filling(&id).unwrap();
        let version = crate::disk::Version { total_bytes: Some(1 << 30), tag: String::new() };
        filling.begin(&version).unwrap();
        let arriving = filling.arriving().cloned().unwrap();
        (dir, Demand::new(arriving, &BufPool::new(8)))
    }

    #[tokio::test]
    async fn what_is_foreseen_waits_for_what_is_wanted() {
        use futures_util::FutureExt;

        let (_dir, demand) = demand();
        let rests = |urgency| demand.yield_to_others(urgency).now_or_never().is_none();
        let all = [Urgency::Wanted, Urgency::Foreseen, Urgency::InTurn];
        let foreseen = OnItsWay::new(&demand.foreseen);
        assert_eq!(all.map(rests), [false, false, true]);
        let wanted = OnItsWay::new(&demand.wanted);
        assert_eq!(all.map(rests), [false, true, true]);
        drop(wanted);
        assert_eq!(all.map(rests), [false, false, true]);
        // But not for ever.
        demand.yield_to_others(Urgency::InTurn).await;
        drop(foreseen);
        assert_eq!(all.map(rests), [false; 3]);
    }

    #[test]
    fn a_slow_source_is_waited_for_longer_each_time() {
        let (_dir, demand) = demand();
        let most = Duration::from_secs(30);
        for seconds in [2, 4, 8, 16, 30, 30] {
            let patience = demand.patience(Urgency::Wanted, most);
            assert_eq!(patience, Duration::from_secs(seconds));
            demand.level.left(&Pace::new());
        }
        assert_eq!(demand.patience(Urgency::InTurn, most), most);
        assert_eq!(demand.patience(Urgency::Foreseen, Duration::from_secs(1)).as_secs(), 1);
    }
}
