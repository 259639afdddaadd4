//! The ways to one object: its source, and mirrors of the same bytes.
//!
//! Why: a mirror that is slow, broken or gone must not stop a transfer that another can finish.
//! How: a connection takes the way with the fewest connections. Each way has its own version, which
//! its first answer tells; that the ways have the same bytes, only the user's digest proves. A way
//! that is refused, has another length or fails too often is not taken any more; one on which something
//! trickled is the last that is taken for a while.
//! Never: gives up the last way: then its failure is the transfer's.
//! Start at [`Ways::pick`].

use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use super::error::{Class, FetchError};
use super::http::{Answer, Client};
use super::policy::Policy;
use super::transfer::Run;
use super::version::{Agreed, Remote, Resume};

/// Failures after which a way is left, if there is another.
const MAX_STRIKES: u32 = 3;
/// How long a way is the last that is taken after something trickled there.
const SLOW: Duration = Duration::from_secs(60);

/// One way.
#[derive(Debug)]
pub(super) struct Way {
    pub(super) client: Arc<Client>,
    /// What its first answer said.
    version: OnceLock<Remote>,
    strikes: AtomicU32,
    left: AtomicBool,
    connections: AtomicUsize,
    /// When a connection was left last as far too slow.
    trickled: Mutex<Option<Instant>>,
}

impl Way {
    fn new(client: Arc<Client>) -> Self {
        Self {
            client,
            version: OnceLock::new(),
            strikes: AtomicU32::new(0),
            left: AtomicBool::new(false),
            connections: AtomicUsize::new(0),
            trickled: Mutex::default(),
        }
    }

    /// A connection was left, as what came there was far too slow. The next request begins at the
    /// source again: where it redirects to may be another server by now.
    pub(super) fn trickled(&self) {
        *self.trickled.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
        self.client.begin_anew();
    }

    /// Since when it is the last that is taken, if it is.
    fn slow_since(&self) -> Option<Instant> {
        let trickled = *self.trickled.lock().unwrap_or_else(PoisonError::into_inner);
        trickled.filter(|since| since.elapsed() < SLOW)
    }

    /// Asks for `range`, and holds the answer against the version of this way and the object's `total`.
    /// True beside it if only the digest can prove that it is right.
    pub(super) async fn ask(
        &self,
        range: Range<u64>,
        agreed: &Agreed,
        total: Option<u64>,
        policy: &Policy,
    ) -> Result<(Answer, bool), FetchError> {
        let answer = self.client.get(range, self.version.get(), policy).await?;
        let mut is_unproven = false;
        // A mirror's first answer tells its version; the digest proves that it is the same object.
        let remote = self.version.get_or_init(|| {
            is_unproven = true;
            answer.remote.clone()
        });
        let agreed = Agreed { remote: remote.clone(), ..agreed.clone() };
        match agreed.judge(&answer.remote, answer.ranged, answer.total, total) {
            Err(misfit) => Err(misfit.at(self.client.shown())),
            Ok(same) => Ok((answer, is_unproven || same == Resume::Unproven)),
        }
    }

    /// A piece came this way: what failed before is forgotten.
    pub(super) fn worked(&self) {
        self.strikes.store(0, Ordering::Relaxed);
    }
}

/// All ways to one object.
#[derive(Debug)]
pub(super) struct Ways(Vec<Arc<Way>>);

/// A connection's use of a way, until it is dropped.
#[derive(Debug)]
pub(super) struct Taken(pub(super) Arc<Way>);

impl Drop for Taken {
    fn drop(&mut self) {
        self.0.connections.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Ways {
    /// The way over `client`, whose version is known, and `mirrors`, whose is not.
    pub(super) fn new(
        client: Arc<Client>,
        version: Remote,
        mirrors: impl IntoIterator<Item = Arc<Client>>,
    ) -> Self {
        let first = Way::new(client);
        first.version.get_or_init(|| version);
        let mirrors = mirrors.into_iter().map(|client| Arc::new(Way::new(client)));
        Self(std::iter::once(Arc::new(first)).chain(mirrors).collect())
    }

    /// The ways over `clients`, of which the first has told its version.
    pub(super) fn of(mut clients: Vec<Arc<Client>>, version: Remote) -> Self {
        let mirrors = clients.split_off(1);
        Self::new(clients.remove(0), version, mirrors)
    }

    /// True if there are mirrors.
    pub(super) fn several(&self) -> bool {
        self.0.len() > 1
    }

    /// The way for one more connection.
    pub(super) fn pick(&self) -> Taken {
        let usable = |way: &&Arc<Way>| !way.left.load(Ordering::Relaxed);
        let best = self.0.iter().filter(usable).min_by_key(|way| {
            let slow = way.slow_since();
            (slow.is_some(), way.connections.load(Ordering::Relaxed), slow)
        });
        Self::take(best.unwrap_or(&self.0[0]))
    }

    /// The way whose first answer is in hand.
    pub(super) fn first(&self) -> Taken {
        Self::take(&self.0[0])
    }

    fn take(way: &Arc<Way>) -> Taken {
        way.connections.fetch_add(1, Ordering::Relaxed);
        Taken(Arc::clone(way))
    }

    /// A connection on `way` has failed. True if the transfer goes on by another way.
    pub(super) fn failed(&self, way: &Way, error: &FetchError) -> bool {
        let others = |other: &&Arc<Way>| {
            !std::ptr::eq(Arc::as_ptr(other), way) && !other.left.load(Ordering::Relaxed)
        };
        // What is wrong with the disk, or wanted by the user, no mirror can mend.
        let ours = matches!(error, FetchError::Disk(_) | FetchError::ReadBack { .. });
        if ours || error.class() == Class::Cancelled || !self.0.iter().any(|w| others(&w)) {
            return false;
        }
        let strikes = way.strikes.fetch_add(1, Ordering::Relaxed) + 1;
        let hopeless = error.class() == Class::Refuse || error.ends_run();
        if hopeless || strikes >= MAX_STRIKES {
            way.left.store(true, Ordering::Relaxed);
        }
        true
    }
}

impl Run<'_> {
    /// For the source, and for each mirror that may be used: a digest has to prove its bytes.
    pub(super) fn clients(&self) -> Result<Vec<Arc<Client>>, FetchError> {
        let policy = &self.engine.policy;
        let mut clients = vec![Arc::new(Client::new(self.url, self.access, policy)?)];
        if self.mirrors && self.expect.is_some() {
            for url in &self.source.mirrors {
                let access = self.source.access_at(url);
                clients.push(Arc::new(Client::new(url, &access, policy)?));
            }
        }
        Ok(clients)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ways(count: usize) -> Ways {
        let client = |_| {
            let url = crate::fetch::SourceUrl::parse("http://h.example/x").unwrap();
            let (access, policy) = (crate::fetch::Access::default(), Policy::default());
            Arc::new(Client::new(&url, &access, &policy).unwrap())
        };
        Ways::of((0..count).map(client).collect(), Remote::default())
    }

    #[test]
    fn a_way_on_which_something_trickled_is_the_last_that_is_taken_for_a_while() {
        let ways = ways(3);
        let index = |way: &Taken| ways.0.iter().position(|other| Arc::ptr_eq(other, &way.0));
        assert_eq!(index(&ways.pick()), Some(0));
        ways.0[0].trickled();
        let taken: Vec<_> = (0..4).map(|_| ways.pick()).collect();
        let indices: Vec<_> = taken.iter().map(|way| index(way).unwrap()).collect();
        assert_eq!(indices, [1, 2, 1, 2], "with however many connections the others have");
        drop(taken);
        // When all are slow, the one that was left first.
        ways.0[2].trickled();
        ways.0[1].trickled();
        assert_eq!(index(&ways.pick()), Some(0));
        ways.0[0].trickled();
        assert_eq!(index(&ways.pick()), Some(2));
        let long_ago = Instant::now() - SLOW;
        *ways.0[1].trickled.lock().unwrap() = Some(long_ago);
        assert_eq!(index(&ways.pick()), Some(1), "that is forgotten");
    }
}
