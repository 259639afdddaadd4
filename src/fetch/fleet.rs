//! The connections of one run: they share what is to be asked for, and each other's failures.
//!
//! Why: one connection seldom fills the way, and one that breaks must not stop the others.
//! How: each connection is a task that takes the lowest piece nobody has, with the buffers for it,
//! asks for it and cuts its body into blocks. A single connection asks for all that follows and
//! takes it MiB by MiB, so that on a fast way there is one request; `scale` says when more would
//! help, and `demand` what readers wait for. What a connection did not finish goes back, buffers
//! included, to be taken first.
//! Never: lets bytes of two versions in (each answer is held against the first), or retries
//! without a bound.
//! Start at [`Fleet::run`].

use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::{Notify, watch};

use super::book::{Book, Claim, Turn};
use super::crew::Crew;
use super::demand::{Demand, Urgency};
use super::error::FetchError;
use super::hosts::Visit;
use super::http::Answer;
use super::limit::RateLimit;
use super::needs::{Idle, Need, unless_needed};
use super::pace::{Best, Level, Pace};
use super::pipeline::{Cutter, Feed, Stopped};
use super::policy::Policy;
use super::progress::{Phase, Progress};
use super::traffic::Traffic;
use super::version::Agreed;
use super::ways::{Way, Ways};
use crate::ring::BufShare;

/// What the connections of one run share.
pub(super) struct Fleet {
    pub(super) ways: Ways,
    pub(super) policy: Policy,
    pub(super) agreed: Agreed,
    /// Length of the object; `None` if the server does not tell.
    pub(super) total: Option<u64>,
    pub(super) feed: Feed,
    pub(super) share: BufShare,
    pub(super) progress: Arc<Progress>,
    /// What all transfers of the process share.
    pub(super) limit: Arc<RateLimit>,
    pub(super) book: Mutex<Book>,
    pub(super) state: State,
    /// Who else asks the same server.
    pub(super) visit: Arc<Visit>,
    /// What readers wait for, if they can be served out of turn.
    pub(super) demand: Option<Demand>,
    /// What somebody else brings, and this lets pass.
    pub(super) urgent: Option<Arc<Traffic>>,
}

/// How the connections hear of each other.
pub(super) struct State {
    /// Something came back, or nothing is left to wait for.
    pub(super) freed: Notify,
    /// True once everybody has to end.
    halt: watch::Sender<bool>,
    /// True once an answer was taken on the digest's word alone.
    unproven: AtomicBool,
    /// Nanoseconds that connections have waited for bytes.
    pub(super) starved: AtomicU64,
    /// Nanoseconds from the last request to its answer.
    pub(super) latency: AtomicU64,
    /// Connections in their turn that have nothing to do.
    pub(super) idle: AtomicUsize,
    /// What the fastest get.
    pub(super) best: Arc<Best>,
    /// How long a piece may take that others could bring sooner.
    pub(super) level: Level,
}

impl State {
    /// For a fleet that is not the first on its way: `best` is known.
    pub(super) fn new(best: Arc<Best>) -> Self {
        let halt = watch::Sender::new(false);
        Self {
            freed: Notify::new(),
            halt,
            unproven: AtomicBool::new(false),
            starved: AtomicU64::new(0),
            latency: AtomicU64::new(0),
            idle: AtomicUsize::new(0),
            best,
            level: Level::default(),
        }
    }
}

/// An answer that is there already, and the end of what was asked for (`u64::MAX`: all).
pub(super) struct First {
    pub(super) answer: Answer,
    pub(super) asked_end: u64,
}

/// How a connection ended.
pub(super) enum End {
    /// Nothing is left for it.
    Done,
    /// The writer has stopped.
    Stopped,
    Failed(FetchError, Arc<Way>),
}

/// How a run of the fleet ended.
pub(super) enum Outcome {
    /// Everything was handed over; the position behind the last byte.
    Complete(u64),
    /// The writer has stopped, for a reason of its own.
    Stopped,
    /// It cannot go on.
    Failed(FetchError),
}

fn nanos(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

impl State {
    /// A read has taken so long. How long one waits that breaks says nothing of what more connections
    /// would bring.
    fn note_read(&self, took: Duration, went_well: bool) {
        if went_well {
            self.starved.fetch_add(nanos(took), Ordering::Relaxed);
        }
    }
}

impl Fleet {
    pub(super) fn book(&self) -> MutexGuard<'_, Book> {
        self.book.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Fetches everything in the book, beginning with `first` if there is one. Returns when all
    /// connections have ended, so that nothing is handed over any more.
    pub(super) async fn run(self: &Arc<Self>, first: Option<First>) -> Outcome {
        let mut crew = Crew::new(self, self.most_connections());
        crew.join(first);
        let mut demanded = self.serve_demand();
        let outcome = crew.work().await;
        // Also for those that have not begun to listen.
        self.state.halt.send_replace(true);
        crew.dismiss().await;
        while demanded.join_next().await.is_some() {}
        self.progress.set_connections(0);
        self.book().flush(&self.feed, &self.share);
        match outcome {
            Ok(()) => Outcome::Complete(self.book().highest()),
            Err(outcome) => outcome,
        }
    }

    /// True if bytes were taken that only the user's digest can prove.
    pub(super) fn is_unproven(&self) -> bool {
        self.state.unproven.load(Ordering::Relaxed)
    }

    /// Several connections need a version that proves each answer, and buffers for each.
    fn most_connections(&self) -> usize {
        if !self.is_proved() {
            return 1;
        }
        self.policy.max_connections.min(self.share.most() / 2).max(1)
    }

    /// True if a part of it may be asked for on any connection.
    pub(super) fn is_proved(&self) -> bool {
        // Where ways are several, the digest of the whole is the proof anyhow.
        self.agreed.proves_parts() || self.agreed.can_resume && self.ways.several()
    }

    /// For who has to end when all others do.
    pub(super) fn halted(&self) -> watch::Receiver<bool> {
        self.state.halt.subscribe()
    }

    /// One connection, until nothing is left for it or it fails.
    pub(super) async fn connection(self: Arc<Self>, first: Option<First>) -> End {
        let mut halt = self.state.halt.subscribe();
        let way = if first.is_some() { self.ways.first() } else { self.ways.pick() };
        let ended = tokio::select! {
            ended = self.pieces(&way.0, first) => ended,
            _ = halt.wait_for(|halt| *halt) => Ok(()),
        };
        self.book().connections -= 1;
        self.state.freed.notify_waiters();
        match ended {
            Ok(()) => End::Done,
            // Another one asks for it, and for what follows.
            Err(Broken::Elsewhere) => {
                way.0.trickled();
                End::Done
            }
            Err(Broken::Stopped) => End::Stopped,
            Err(Broken::Error(error)) => End::Failed(error, Arc::clone(&way.0)),
        }
    }

    async fn pieces(&self, way: &Way, mut first: Option<First>) -> Result<(), Broken> {
        while let Some(claim) = self.claim(first.is_some()).await? {
            // Whatever happens to this future, what was claimed goes back.
            let mut held = Held::new(self, claim);
            let open = match first.take() {
                Some(first) => first,
                None => self.ask_in_turn(way, &mut held).await?,
            };
            self.stream(way, open, &mut held, Urgency::InTurn).await?;
            self.state.level.brought(&held.pace);
            way.worked();
        }
        Ok(())
    }

    /// The next piece for this connection; `None` if there is none and none can come back.
    async fn claim(&self, first: bool) -> Result<Option<Claim>, FetchError> {
        loop {
            let freed = self.state.freed.notified();
            tokio::pin!(freed);
            freed.as_mut().enable();
            let turn = self.book().turn(&self.share, first);
            let blocks = match turn {
                Turn::Returned(claim) => return Ok(Some(claim)),
                Turn::Over => return Ok(None),
                Turn::Wait => {
                    let _idle = Idle::new(&self.state.idle);
                    freed.await;
                    continue;
                }
                Turn::Take { blocks } => blocks,
            };
            let _idle = Idle::new(&self.state.idle);
            let reserve = self.share.reserve(blocks);
            tokio::select! {
                permits = reserve => {
                    let permits = permits.map_err(|source| FetchError::Memory { source })?;
                    if let Some(claim) = self.book().take(permits) {
                        return Ok(Some(claim));
                    }
                }
                () = freed => {}
            }
        }
    }

    pub(super) async fn ask(&self, way: &Way, claim: &Claim) -> Result<First, FetchError> {
        let begin = Instant::now();
        let whole = Some(claim.asked_end) == self.total;
        let asked_end = if whole { u64::MAX } else { claim.asked_end };
        let range = claim.range.start..asked_end;
        let asked = way.ask(range, &self.agreed, self.total, &self.policy);
        let (answer, is_unproven) = asked.await?;
        self.state.latency.store(nanos(begin.elapsed()), Ordering::Relaxed);
        self.state.unproven.fetch_or(is_unproven, Ordering::Relaxed);
        Ok(First { answer, asked_end })
    }

    /// Reads the body of an answer into the claim and, if it goes on, into what follows.
    pub(super) async fn stream(
        &self,
        way: &Way,
        open: First,
        held: &mut Held<'_>,
        urgency: Urgency,
    ) -> Result<(), Broken> {
        let First { mut answer, asked_end } = open;
        let end = match self.total {
            Some(total) => asked_end.min(total),
            None => self.policy.max_bytes,
        };
        let Claim { range, permits, buf, .. } = held.claim_mut();
        let (start, permits, buf) = (range.start, permits.take(), buf.take());
        let in_turn = urgency == Urgency::InTurn;
        let feed = if in_turn { self.feed.clone() } else { self.feed.out_of_turn() };
        let share = match (&self.demand, urgency) {
            (Some(demand), Urgency::Wanted) => demand.share.clone(),
            (Some(demand), Urgency::Foreseen) => demand.foreseen_share.clone(),
            (Some(_) | None, _) => self.share.clone(),
        };
        let mut cutter = Cutter::resume(feed, share, start, permits, buf);
        self.progress.set_phase(Phase::Fetching);
        held.pace.answered();
        let read = self.read(way, &mut answer, end, &mut cutter, held, urgency).await;
        let at = cutter.at();
        self.state.best.note_end(&held.pace);
        // A body that ended well ends where a range does; one that broke goes on in its buffer.
        let flushed = match read.is_ok() {
            true => cutter.flush(true).map_err(|Stopped| Broken::Stopped),
            false => self.give_broken(&mut cutter, urgency).await,
        };
        self.book().advanced(start, at);
        let claim = held.claim_mut();
        claim.range.start = at.min(claim.range.end);
        (claim.permits, claim.buf) = cutter.take_apart();
        if read.is_ok() && self.total.is_none() {
            claim.range.start = claim.range.end;
            self.book().close();
        }
        read?;
        flushed
    }

    async fn read(
        &self,
        way: &Way,
        answer: &mut Answer,
        end: u64,
        cutter: &mut Cutter,
        held: &mut Held<'_>,
        urgency: Urgency,
    ) -> Result<(), Broken> {
        // For what a body that is over may not have.
        let mut beyond = [0];
        // Of a piece out of turn: before its buffer was full.
        let mut handed_bytes = 0;
        let in_turn = urgency == Urgency::InTurn;
        loop {
            let piece = match self.demand.as_ref().filter(|_| in_turn) {
                Some(demand) => Some((demand, self.heed(demand, cutter, held)?)),
                None => {
                    handed_bytes += self.give_open(cutter).await?;
                    None
                }
            };
            let at = cutter.at();
            // A body without a length of its own may go on: that is a lie to be found.
            if at == end && answer.has_length() {
                return Ok(());
            }
            if at >= held.claim().range.end && at < end && !held.extend(at) {
                // Somebody else has what follows: this body is of no more use.
                return Ok(());
            }
            let mut patience = self.policy.stall_timeout;
            if let Some(demand) = &self.demand {
                demand.yield_to_others(urgency).await;
                patience = demand.patience(urgency, patience);
            }
            if let Some(urgent) = &self.urgent {
                urgent.let_pass().await;
            }
            let portion = self.limit.portion().min(self.progress.limit().portion());
            let most = portion.min(held.claim().range.end.min(end) - at);
            let open = cutter.open_units();
            let room = if at < end { cutter.room(most).await? } else { &mut beyond[..] };
            let begin = Instant::now();
            held.pace.wait();
            let filling = answer.fill(at, room, &way.client, patience);
            let filled = match in_turn {
                false => unless_needed(filling, self.waited_for(&open)).await,
                true => unless_needed(filling, self.needed(piece.as_ref(), held, at)).await,
            };
            let filled = match filled {
                Ok(filled) => filled,
                Err(Need::Heed) => continue,
                Err(Need::Overtaken) => return Err(Broken::Elsewhere),
                Err(Need::Elsewhere) => {
                    Book::leave(held.claim_mut());
                    return Err(Broken::Elsewhere);
                }
            };
            self.state.note_read(begin.elapsed(), filled.is_ok());
            match filled {
                Ok(0) if at == end || self.total.is_none() => return Ok(()),
                Ok(0) => {
                    let url = way.client.shown();
                    return Err(FetchError::Short { url, at, total: end }.into());
                }
                // More than was asked for, and no more than there is.
                Ok(_) if at == end && self.total.is_some_and(|total| at < total) => return Ok(()),
                Ok(_) if at == end => {
                    let url = way.client.shown();
                    return Err(FetchError::TooMuch { url, total: end }.into());
                }
                Ok(count) => {
                    self.took(count, cutter, held, urgency, &mut handed_bytes).await?;
                }
                // All is here; how the connection ends makes no difference.
                Err(_) if at == end => return Ok(()),
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Takes what a read has given: how fast that was, whether a reader may have it at once, and limits.
    async fn took(
        &self,
        count: usize,
        cutter: &mut Cutter,
        held: &mut Held<'_>,
        urgency: Urgency,
        handed_bytes: &mut u64,
    ) -> Result<(), Broken> {
        self.progress.add_received(count as u64);
        held.pace.came(count as u64);
        self.state.best.note(&held.pace);
        cutter.filled(count).map_err(|Stopped| Broken::Stopped)?;
        if self.comes_too_slowly(urgency, held, cutter.at()) {
            return Err(Broken::Elsewhere);
        }
        if let Some(demand) = self.demand.as_ref().filter(|_| urgency != Urgency::InTurn)
            && demand.is_worth_handing_over(cutter.open_bytes(), *handed_bytes)
        {
            *handed_bytes += cutter.open_bytes() as u64;
            cutter.hand_over().await?.map_err(|Stopped| Broken::Stopped)?;
        }
        self.limit.spend(count).await;
        self.progress.limit().spend(count).await;
        Ok(())
    }
}

/// Why a connection has to end.
pub(super) enum Broken {
    Stopped,
    /// Nothing comes, or too little, and somebody waits: others ask for what it had.
    Elsewhere,
    Error(FetchError),
}

impl Broken {
    /// For people.
    pub(super) fn report(&self) -> String {
        match self {
            Self::Stopped => Stopped.to_string(),
            Self::Elsewhere => "it is asked for elsewhere".to_owned(),
            Self::Error(error) => error.report(),
        }
    }
}

impl From<FetchError> for Broken {
    fn from(error: FetchError) -> Self {
        Self::Error(error)
    }
}

/// A claim in work: what is left of it goes back to the book on drop.
pub(super) struct Held<'a> {
    fleet: &'a Fleet,
    claim: Option<Claim>,
    /// How fast it comes.
    pub(super) pace: Pace,
}

impl<'a> Held<'a> {
    pub(super) fn new(fleet: &'a Fleet, claim: Claim) -> Self {
        Self { fleet, claim: Some(claim), pace: Pace::new() }
    }
}

impl Held<'_> {
    pub(super) fn claim(&self) -> &Claim {
        self.claim.as_ref().expect("a claim leaves only in drop")
    }

    pub(super) fn claim_mut(&mut self) -> &mut Claim {
        self.claim.as_mut().expect("a claim leaves only in drop")
    }

    /// Takes the MiB at `at` too, if it is free.
    fn extend(&mut self, at: u64) -> bool {
        let Some(claim) = self.claim.as_mut() else { return false };
        self.fleet.book().extend(claim, at)
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        if let Some(claim) = self.claim.take() {
            let left = claim.left_until.map(|_| claim.range.clone());
            self.fleet.book().give_back(claim);
            if let (Some(range), Some(demand)) = (left, &self.fleet.demand) {
                demand.say_again(&range);
            }
            self.fleet.state.freed.notify_waiters();
        }
    }
}
