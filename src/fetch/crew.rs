//! The crew of a fleet: how many connections there are, and what is done when one fails.
//!
//! Why: one connection that breaks must not stop the others, and none may try for ever.
//! How: the others take over what a failed one leaves; the last one is tried again after a pause,
//! until nothing has come for too many attempts. Where there are mirrors, another way comes first.
//! Never: goes on after an error of the disk, or with another version of the source.
//! Start at [`Crew::work`].

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use tokio::task::JoinSet;

use super::book::buffers_for;
use super::error::{Class, FetchError};
use super::fleet::{End, First, Fleet, Outcome};
use super::policy::Policy;
use super::progress::{Phase, Progress};
use super::scale::{Sample, Scale};
use super::version::no_ranges;
use super::ways::Way;

/// How often it is looked at how many connections there should be.
const TICK: Duration = Duration::from_millis(100);
/// Longest pause that a server's `Retry-After` can ask for.
const MAX_RETRY_AFTER: Duration = Duration::from_secs(60);

/// The tasks of a fleet, and what is done about their ends.
pub(super) struct Crew<'a> {
    fleet: &'a Arc<Fleet>,
    tasks: JoinSet<End>,
    scale: Scale,
    /// Connections that it may have if it is alone with its server.
    most: usize,
    begin: Instant,
    /// Failed attempts in a row without a new byte.
    failures: u32,
    /// Bytes that had been handed over at the last failure.
    handed: u64,
}

impl<'a> Crew<'a> {
    /// A crew of nobody, later of at most `most`.
    pub(super) fn new(fleet: &'a Arc<Fleet>, most: usize) -> Self {
        let (tasks, scale, begin) = (JoinSet::new(), Scale::new(most), Instant::now());
        Self { fleet, tasks, scale, most, begin, failures: 0, handed: 0 }
    }

    /// Waits until everybody has ended, who were told to.
    pub(super) async fn dismiss(&mut self) {
        while self.tasks.join_next().await.is_some() {}
    }

    /// One more connection.
    pub(super) fn join(&mut self, first: Option<First>) {
        self.fleet.book().connections += 1;
        self.tasks.spawn(Arc::clone(self.fleet).connection(first));
        self.fleet.progress.set_connections(self.tasks.len());
    }

    /// Until everything is fetched, or it cannot be.
    pub(super) async fn work(&mut self) -> Result<(), Outcome> {
        let progress = Arc::clone(&self.fleet.progress);
        let mut tick = tokio::time::interval(TICK);
        loop {
            tokio::select! {
                ended = self.tasks.join_next() => {
                    self.fleet.progress.set_connections(self.tasks.len());
                    let end = match ended {
                        Some(Ok(end)) => end,
                        Some(Err(died)) => std::panic::resume_unwind(died.into_panic()),
                        None => End::Done,
                    };
                    match end {
                        End::Done => {}
                        End::Stopped => return Err(Outcome::Stopped),
                        End::Failed(error, way) => self.failed(error, &way).await?,
                    }
                    if self.tasks.is_empty() {
                        if self.fleet.book().is_empty() {
                            return Ok(());
                        }
                        self.join(None);
                    }
                }
                _ = tick.tick() => self.scale(),
                () = progress.stopped() => return Err(Outcome::Failed(FetchError::Cancelled)),
            }
        }
    }

    /// Looks at how it goes, and adds connections if more would help.
    fn scale(&mut self) {
        let state = &self.fleet.state;
        // What was left to readers becomes anybody's with time alone.
        if self.fleet.book().has_left() {
            state.freed.notify_waiters();
        }
        self.scale.limit(self.fleet.visit.part_of(self.most));
        let latency = Duration::from_nanos(state.latency.load(Ordering::Relaxed));
        let target = self.scale.sample(Sample {
            now: self.begin.elapsed(),
            received: self.fleet.progress.received(),
            starved: Duration::from_nanos(state.starved.load(Ordering::Relaxed)),
            latency,
        });
        if target > 1 {
            self.fleet.share.grow();
            self.fleet.share.borrow(buffers_for(target, self.scale.piece_bytes(latency)));
        }
        self.fleet.book().target = target;
        while self.tasks.len() < target && self.fleet.book().has_untaken() {
            self.join(None);
        }
    }

    /// Decides whether a failure ends the run; if not, waits as long as it takes to try again.
    async fn failed(&mut self, error: FetchError, way: &Way) -> Result<(), Outcome> {
        let fleet = self.fleet;
        if fleet.ways.failed(way, &error) {
            fleet.progress.failed_once(error.report());
            return Ok(());
        }
        if error.class() == Class::Cancelled || error.ends_run() {
            return Err(Outcome::Failed(error));
        }
        let others = self.tasks.len();
        if others > 0 {
            // The others take over what this one leaves.
            self.scale.lost(self.begin.elapsed(), others);
            fleet.book().target = others;
            fleet.progress.failed_once(error.report());
            return Ok(());
        }
        let handed = fleet.book().handed_bytes();
        // Whole units count: a server that breaks after a few bytes each time is no progress.
        if handed > self.handed {
            self.failures = 0;
        }
        self.handed = handed;
        self.failures += 1;
        if error.class() == Class::Refuse {
            return Err(Outcome::Failed(error));
        }
        let source = Box::new(error);
        if !fleet.agreed.can_resume {
            let (url, at) = (way.client.shown(), fleet.book().highest());
            return Err(Outcome::Failed(FetchError::CannotResume { url, at, source }));
        }
        let attempts = self.failures;
        if attempts >= fleet.policy.max_attempts {
            if let FetchError::WholeAnswer { url } = *source {
                // All of it comes anew, in one piece.
                return Err(Outcome::Failed(no_ranges(url)));
            }
            return Err(Outcome::Failed(FetchError::GaveUp { attempts, source }));
        }
        self.scale.lost(self.begin.elapsed(), 1);
        fleet.book().target = 1;
        fleet.progress.failed_once(source.report());
        rest(&source, attempts, &fleet.policy, &fleet.progress).await.map_err(Outcome::Failed)
    }
}

/// Waits before the next attempt, after `failures` of them.
///
/// # Errors
/// [`FetchError::Cancelled`] meanwhile.
pub(super) async fn rest(
    error: &FetchError,
    failures: u32,
    policy: &Policy,
    progress: &Progress,
) -> Result<(), FetchError> {
    let mut pause = policy.backoff * 2u32.pow(failures.saturating_sub(1).min(6));
    if let FetchError::Status { retry_after_s: Some(seconds), .. } = error {
        pause = Duration::from_secs(*seconds).min(MAX_RETRY_AFTER);
    }
    progress.set_phase(Phase::Retrying);
    tokio::select! {
        () = tokio::time::sleep(pause) => Ok(()),
        () = progress.stopped() => Err(FetchError::Cancelled),
    }
}
