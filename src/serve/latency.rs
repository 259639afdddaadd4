//! How long readers waited for their answers.
//!
//! Why: "it is slow" needs a number, and a mean hides the one read in a thousand that hurts.
//! How: buckets that double, from a microsecond to half a minute, as relaxed atomics; one for each
//! kind of server. What was asked in one batch counts with the time until all of it was sent.
//! Never: a lock, or a clock that is read for each request of a batch.
//! Start at [`Latency::record`].

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// How a reader asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Via {
    /// An NBD request, from its arrival until its reply was sent.
    Nbd,
    /// A question of an attached reader, which reads by itself all else.
    Replica,
    /// The attach of such a reader.
    Attach,
    /// A VM's request, from when it was taken from its queue until it was answered.
    Vm,
}

impl Via {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Nbd, Self::Replica, Self::Attach, Self::Vm];

    /// The word for people and for labels.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Nbd => "nbd",
            Self::Replica => "replica",
            Self::Attach => "attach",
            Self::Vm => "vm",
        }
    }
}

/// Buckets: the first is for less than a microsecond, each next one for up to twice as much, the last
/// for all else.
const BUCKETS: usize = 27;

/// Times of one kind.
#[derive(Debug, Default)]
struct Histogram {
    counts: [AtomicU64; BUCKETS],
    sum_ns: AtomicU64,
}

/// The times of one export's answers.
#[derive(Debug, Default)]
pub struct Latency([Histogram; Via::ALL.len()]);

/// Times at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Times {
    counts: [u64; BUCKETS],
    /// All together.
    pub sum: Duration,
}

impl Latency {
    fn of(&self, via: Via) -> &Histogram {
        let [nbd, replica, attach, vm] = &self.0;
        match via {
            Via::Nbd => nbd,
            Via::Replica => replica,
            Via::Attach => attach,
            Via::Vm => vm,
        }
    }

    /// `count` answers took `time` each.
    pub fn record(&self, via: Via, time: Duration, count: u64) {
        let micros = u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
        let bucket = (u64::BITS - micros.leading_zeros()) as usize;
        let histogram = self.of(via);
        if let Some(bucket) = histogram.counts.get(bucket.min(BUCKETS - 1)) {
            bucket.fetch_add(count, Ordering::Relaxed);
        }
        let ns = u64::try_from(time.as_nanos()).unwrap_or(u64::MAX).saturating_mul(count);
        histogram.sum_ns.fetch_add(ns, Ordering::Relaxed);
    }

    /// The times of one kind so far.
    #[must_use]
    pub fn times(&self, via: Via) -> Times {
        let histogram = self.of(via);
        let counts = std::array::from_fn(|n| {
            histogram.counts.get(n).map_or(0, |count| count.load(Ordering::Relaxed))
        });
        Times { counts, sum: Duration::from_nanos(histogram.sum_ns.load(Ordering::Relaxed)) }
    }
}

impl Times {
    /// How many answers there were.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.counts.iter().sum()
    }

    /// The buckets: the longest time in each (`None`: any), and its number of answers.
    pub fn buckets(&self) -> impl Iterator<Item = (Option<Duration>, u64)> {
        // Bucket n has the times of n bits in microseconds.
        let top = |n: usize| (n + 1 < BUCKETS).then(|| Duration::from_micros(1 << n));
        self.counts.iter().enumerate().map(move |(n, &count)| (top(n), count))
    }

    /// A time that so many thousandths of the answers kept within; `None` without answers. It is the
    /// end of a bucket: up to twice the real one.
    #[must_use]
    pub fn quantile(&self, thousandths: u64) -> Option<Duration> {
        let count = self.count();
        let rank = count.saturating_mul(thousandths).div_ceil(1000).max(1);
        let mut seen = 0;
        for (top, here) in self.buckets() {
            seen += here;
            if seen >= rank {
                return Some(top.unwrap_or(Duration::from_micros(1 << (BUCKETS - 1))));
            }
        }
        None
    }

    /// What has come since `earlier`.
    #[must_use]
    pub fn since(&self, earlier: &Self) -> Self {
        let mut counts = self.counts;
        for (now, then) in counts.iter_mut().zip(earlier.counts) {
            *now = now.saturating_sub(then);
        }
        Self { counts, sum: self.sum.saturating_sub(earlier.sum) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_the_ends_of_buckets() {
        let latency = Latency::default();
        assert_eq!(latency.times(Via::Nbd).quantile(500), None);
        latency.record(Via::Nbd, Duration::from_nanos(300), 90);
        latency.record(Via::Nbd, Duration::from_micros(100), 9);
        latency.record(Via::Nbd, Duration::from_secs(3600), 1);
        let times = latency.times(Via::Nbd);
        let micros = |thousandths| times.quantile(thousandths).map(|time| time.as_micros());
        assert_eq!((micros(500), micros(900)), (Some(1), Some(1)));
        assert_eq!((micros(990), micros(1000)), (Some(128), Some(1 << 26)));
        assert_eq!((times.count(), latency.times(Via::Replica).count()), (100, 0));
        let mean_us = times.sum.as_secs_f64() * 1e4;
        assert!((mean_us - 36_000_000.0).abs() < 20.0, "{mean_us}");
        latency.record(Via::Nbd, Duration::from_micros(2), 5);
        assert_eq!(
            latency.times(Via::Nbd).since(&times).quantile(500),
            Some(Duration::from_micros(4))
        );
    }

    #[test]
    fn each_bucket_ends_where_the_next_begins() {
        let latency = Latency::default();
        for (n, micros) in [(1, 1), (2, 2), (2, 3), (3, 4), (10, 1023), (11, 1024)] {
            latency.record(Via::Attach, Duration::from_micros(micros), 1);
            let before = latency.times(Via::Attach);
            let last = before.buckets().nth(n).unwrap();
            assert!(last.1 > 0 && Duration::from_micros(micros) < last.0.unwrap(), "{micros}");
        }
    }
}
