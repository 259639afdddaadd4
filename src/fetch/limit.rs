//! A limit on bytes per second, which may change while it is in use.
//!
//! Why: an image that is brought in must not take the way from everybody else.
//! How: each chunk that has arrived is paid for with time; whoever is ahead of the limit waits, does
//! not read, and the sender's window closes.
//! Never: lets more than a twentieth of a second's bytes through at once.
//! Start at [`RateLimit::spend`].

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::Notify;

/// How far a user may be ahead of the limit.
const BURST: Duration = Duration::from_millis(50);

/// Bytes below which a read costs more than it brings.
const MIN_PORTION_BYTES: u64 = 4096;

#[derive(Debug)]
struct Account {
    bytes_per_s: Option<u64>,
    paid_until: Instant,
}

/// A limit that any number of streams share.
#[derive(Debug)]
pub struct RateLimit {
    account: Mutex<Account>,
    changed: Notify,
}

impl Default for RateLimit {
    fn default() -> Self {
        Self::new(None)
    }
}

impl RateLimit {
    /// At most so many bytes a second; `None` or 0: no limit.
    #[must_use]
    pub fn new(bytes_per_s: Option<u64>) -> Self {
        let bytes_per_s = bytes_per_s.filter(|rate| *rate > 0);
        let account = Account { bytes_per_s, paid_until: Instant::now() };
        Self { account: Mutex::new(account), changed: Notify::new() }
    }

    /// Another limit from now on, also for those who wait.
    pub fn set(&self, bytes_per_s: Option<u64>) {
        {
            let mut account = self.account.lock().unwrap_or_else(PoisonError::into_inner);
            account.bytes_per_s = bytes_per_s.filter(|rate| *rate > 0);
            account.paid_until = Instant::now();
        }
        self.changed.notify_waiters();
    }

    /// The limit in bytes per second, if there is one.
    #[must_use]
    pub fn get(&self) -> Option<u64> {
        self.account.lock().unwrap_or_else(PoisonError::into_inner).bytes_per_s
    }

    /// Bytes to take at once: what may be ahead of the limit, but enough to be worth a read.
    #[must_use]
    pub fn portion(&self) -> u64 {
        let ahead = |rate: u64| u128::from(rate) * BURST.as_nanos() / 1_000_000_000;
        let portion = self.get().map(|rate| u64::try_from(ahead(rate)).unwrap_or(u64::MAX));
        portion.map_or(u64::MAX, |bytes| bytes.max(MIN_PORTION_BYTES))
    }

    /// Pays for `bytes` that have arrived: waits as long as the limit asks for.
    pub async fn spend(&self, bytes: usize) {
        let changed = self.changed.notified();
        let Some(pause) = self.pay(bytes, Instant::now()) else { return };
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            () = changed => {}
        }
    }

    /// How long to wait for `bytes`; `None` if not at all.
    fn pay(&self, bytes: usize, now: Instant) -> Option<Duration> {
        let mut account = self.account.lock().unwrap_or_else(PoisonError::into_inner);
        let rate = account.bytes_per_s?;
        let nanos = u128::from(bytes as u64) * 1_000_000_000 / u128::from(rate);
        let cost = Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX));
        account.paid_until = account.paid_until.max(now).checked_add(cost)?;
        let ahead = account.paid_until.saturating_duration_since(now);
        (ahead > BURST).then(|| ahead - BURST)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_of_bytes_costs_a_second_for_all_together() {
        let limit = RateLimit::new(Some(1_000_000));
        let now = Instant::now();
        let (mut clock, mut paid) = (now, Duration::ZERO);
        for _ in 0..100 {
            let pause = limit.pay(10_000, clock).unwrap_or_default();
            clock += pause;
            paid += pause;
        }
        assert!(paid + BURST >= Duration::from_secs(1), "{paid:?}");
        assert!(paid <= Duration::from_secs(1), "{paid:?}");
    }

    #[tokio::test]
    async fn whoever_waits_hears_of_a_new_limit() {
        let limit = std::sync::Arc::new(RateLimit::new(Some(1)));
        let waiting = tokio::spawn({
            let limit = std::sync::Arc::clone(&limit);
            async move { limit.spend(1 << 30).await }
        });
        while !waiting.is_finished() {
            limit.set(None);
            tokio::task::yield_now().await;
        }
        assert_eq!(limit.get(), None);
        limit.spend(1 << 30).await;
    }
}
