//! How many connections a transfer uses: more while that adds throughput, no more than that.
//!
//! Why: a server that limits each connection, or a long way with loss, wants several; on a fast way
//! a second one only costs.
//! How: while the connections mostly wait for the network, there are four times as many, and the
//! rate before and after is compared. A step that brings too little is taken back and not tried
//! again for a while.
//! Never: has a clock of its own; a sample brings the time.
//! Start at [`Scale::sample`].

use std::time::Duration;

/// Shortest time over which a rate is measured.
const MEASURE: Duration = Duration::from_millis(200);
/// Time after a change in which nothing is measured: slow start has to pass.
const SETTLE: Duration = Duration::from_millis(100);
/// How many times as many connections are tried.
const STEP: usize = 4;
/// A step that was worth it adds at least this share.
const GAIN: f64 = 1.15;
/// Share of their time that connections wait for the network if it is the network that limits.
const STARVED: f64 = 0.6;
/// How many times as long as the way to its answer a piece is to take: else connections mostly wait for
/// answers.
const WORTH: u128 = 4;
/// How long a step is not tried again after it brought too little; doubles each time.
const HOLD: Duration = Duration::from_secs(2);
const HOLD_MOST: Duration = Duration::from_secs(160);
/// How long a connection that was refused or broke is not replaced.
const HOLD_LOST: Duration = Duration::from_secs(10);

/// Nanoseconds of a second.
const NANOS: u128 = 1_000_000_000;

fn saturating(value: u128) -> u64 {
    u64::try_from(value).unwrap_or(u64::MAX)
}

/// What is known at one moment. All but `latency` only grow.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Sample {
    /// Time since the transfer began.
    pub(super) now: Duration,
    /// Bytes received so far.
    pub(super) received: u64,
    /// Time that all connections together have waited for bytes.
    pub(super) starved: Duration,
    /// Time from a request to its answer, as last seen.
    pub(super) latency: Duration,
}

/// Decides the number of connections.
#[derive(Debug)]
pub(super) struct Scale {
    most: usize,
    target: usize,
    /// Bytes a second of one connection, as last measured.
    rate_each: u64,
    base: Sample,
    settled_at: Duration,
    /// Number and rate before the last step, while that is on trial.
    before: Option<(usize, f64)>,
    hold: Duration,
    hold_until: Duration,
}

impl Scale {
    /// One connection, later at most `most`.
    pub(super) fn new(most: usize) -> Self {
        let zero = Duration::ZERO;
        Self {
            most: most.max(1),
            target: 1,
            rate_each: 0,
            base: Sample::default(),
            settled_at: zero,
            before: None,
            hold: HOLD,
            hold_until: zero,
        }
    }

    /// Takes note of how it goes, and gives the number from now on.
    pub(super) fn sample(&mut self, at: Sample) -> usize {
        if at.now < self.settled_at {
            self.base = at;
            return self.target;
        }
        let elapsed = at.now.saturating_sub(self.base.now);
        if elapsed < MEASURE.max(at.latency * 4) {
            return self.target;
        }
        let seconds = elapsed.as_secs_f64();
        let rate = (at.received - self.base.received) as f64 / seconds;
        let waited = at.starved.saturating_sub(self.base.starved).as_secs_f64();
        let starved = waited / (seconds * self.target as f64);
        let each = u128::from(at.received - self.base.received) / self.target as u128;
        self.rate_each = saturating(each * NANOS / elapsed.as_nanos());
        self.base = at;
        if let Some((count, before)) = self.before.take()
            && rate < before * GAIN
        {
            self.target = count;
            self.wait(at.now);
        } else if starved > STARVED && at.now >= self.hold_until && self.target < self.most {
            self.before = Some((self.target, rate));
            self.target = (self.target * STEP).min(self.most);
            self.settled_at = at.now + SETTLE.max(at.latency * 2);
        }
        self.target
    }

    /// From now on at most `most` connections.
    pub(super) fn limit(&mut self, most: usize) {
        self.most = most.max(1);
        if self.target > self.most {
            self.target = self.most;
            self.before = None;
        }
    }

    /// Bytes that a piece has to have to be worth its request, which is answered after `latency`.
    pub(super) fn piece_bytes(&self, latency: Duration) -> u64 {
        saturating(u128::from(self.rate_each) * latency.as_nanos() * WORTH / NANOS)
    }

    /// A connection was refused or broke while `left` others go on.
    pub(super) fn lost(&mut self, now: Duration, left: usize) {
        self.target = left.clamp(1, self.most);
        self.before = None;
        self.hold_until = now + HOLD_LOST;
    }

    fn wait(&mut self, now: Duration) {
        self.hold_until = now + self.hold;
        self.hold = (self.hold * 2).min(HOLD_MOST);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Plays `seconds` with a link that gives `rate(connections)` bytes a second, the connections
    /// waiting for the network for `starved` of their time. Gives the numbers that were used.
    fn play(most: usize, seconds: u64, starved: f64, rate: impl Fn(u64) -> u64) -> Vec<usize> {
        let (mut scale, mut at, mut used) = (Scale::new(most), Sample::default(), Vec::new());
        let step = Duration::from_millis(100);
        for _ in 0..seconds * 10 {
            let count = scale.target;
            at.now += step;
            at.received += rate(count as u64) / 10;
            at.starved += step.mul_f64(starved * count as f64);
            scale.sample(at);
            used.push(count);
        }
        used
    }

    #[test]
    fn a_limit_per_connection_brings_all_connections_within_seconds() {
        let used = play(16, 4, 0.95, |count| 40_000_000 * count);
        assert_eq!(used.last(), Some(&16));
        assert!(used.iter().position(|&n| n == 16).is_some_and(|tenths| tenths <= 10), "{used:?}");
    }

    #[test]
    fn a_limit_of_the_whole_way_leads_back_to_one() {
        let used = play(16, 9, 0.95, |_| 50_000_000);
        assert_eq!(used.last(), Some(&1));
        let probing = used.iter().filter(|&&n| n > 1).count();
        assert!(probing <= 10, "one short trial: {used:?}");
    }

    #[test]
    fn the_number_settles_where_the_way_is_full() {
        let used = play(16, 9, 0.9, |count| (30_000_000 * count).min(120_000_000));
        assert_eq!(used.last(), Some(&4));
    }

    #[test]
    fn a_disk_or_a_digest_that_limits_brings_no_second_connection() {
        let used = play(16, 30, 0.3, |_| 900_000_000);
        assert!(used.iter().all(|&n| n == 1));
    }

    #[test]
    fn a_limit_that_falls_holds_at_once_and_one_that_rises_is_used() {
        let mut scale = Scale::new(16);
        (scale.target, scale.before) = (16, Some((4, 1.0)));
        scale.limit(2);
        let at = |ms| Sample {
            now: Duration::from_millis(ms),
            received: ms * 1000,
            starved: Duration::from_millis(ms * 2),
            latency: Duration::ZERO,
        };
        assert_eq!((scale.sample(at(1000)), scale.sample(at(2000))), (2, 2));
        scale.limit(16);
        assert_eq!(scale.sample(at(3000)), 8);
    }

    #[test]
    fn a_piece_is_longer_where_answers_are_late() {
        let mut scale = Scale::new(4);
        let latency = Duration::from_millis(50);
        assert_eq!(scale.piece_bytes(latency), 0);
        let (now, starved) = (Duration::from_secs(1), Duration::ZERO);
        scale.sample(Sample { now, received: 40_000_000, starved, latency });
        assert_eq!(scale.piece_bytes(latency), 8_000_000);
        assert_eq!(scale.piece_bytes(latency / 10), 800_000);
    }

    #[test]
    fn a_lost_connection_is_not_replaced_at_once() {
        let mut scale = Scale::new(8);
        scale.target = 8;
        scale.lost(Duration::from_secs(1), 5);
        let at = |ms, received| Sample {
            now: Duration::from_millis(ms),
            received,
            starved: Duration::from_millis(ms * 5),
            latency: Duration::ZERO,
        };
        assert_eq!(scale.sample(at(2000, 1_000_000)), 5);
        assert_eq!(scale.sample(at(4000, 2_000_000)), 5);
        assert_eq!(scale.sample(at(12_000, 9_000_000)), 8);
    }
}
