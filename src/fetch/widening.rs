//! How much is fetched for somebody who wants a little.
//!
//! Why: a small request costs as much as one of 256 KiB, and who reads forward will want what follows.
//! How: who wants what lies behind the last thing that was fetched gets twice as much as then.
//! Never: gives less than was wanted, or remembers more than a few readers.
//! Start at [`Widening::widen`].

use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use crate::disk::UNIT_BYTES;

/// Least bytes that are asked for: a small request costs as much as this.
const LEAST_BYTES: u64 = 256 << 10;
/// Most bytes for one who reads forward.
const MOST_BYTES: u64 = 4 << 20;
/// Readers that are watched for going forward.
const WATCHED: usize = 8;

/// Where readers are, each with the bytes that it got last; the latest last.
#[derive(Debug, Default)]
pub struct Widening(Mutex<Vec<(u64, u64)>>);

impl Widening {
    /// How much is fetched for a wish: more, the longer it goes forward.
    #[must_use]
    pub fn widen(&self, wanted: &Range<u64>) -> Range<u64> {
        let mut forward = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let known = forward.iter().position(|&(next, _)| next == wanted.start);
        let len = match known.map(|index| forward.remove(index)) {
            Some((_, last)) => (2 * last).min(MOST_BYTES),
            None => LEAST_BYTES,
        };
        let len = len.max(wanted.end - wanted.start);
        if forward.len() >= WATCHED {
            forward.remove(0);
        }
        // Where the reader will find the next thing missing.
        let end = (wanted.start + len).next_multiple_of(UNIT_BYTES);
        forward.push((end, len));
        wanted.start..end
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_goes_forward_gets_more_each_time_and_who_jumps_does_not() {
        let widening = Widening::default();
        let mut at = 0;
        for want in [256 << 10, 512 << 10, 1 << 20, 2 << 20, 4 << 20, 4 << 20] {
            let wide = widening.widen(&(at..at + 4096));
            assert_eq!(wide, at..at + want);
            at = wide.end;
            // Somebody else jumps about.
            let jump = (700 << 20) + at * 3;
            assert_eq!(widening.widen(&(jump..jump + 1)).end - jump, 256 << 10);
        }
        assert_eq!(widening.widen(&(at..at + (9 << 20))).end, at + (9 << 20));
    }
}
