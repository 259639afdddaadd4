//! What follows when a try of a copy has failed (rule 7).
//!
//! Why: a source that is down must not be asked without rest, and one that brings a little more each
//! time must not be given up.
//! How: the wait doubles with each failure in a row; bytes that came meanwhile begin the row anew.
//! Never: tries again by itself what was refused.
//! Start at [`fail`].

use std::time::Duration;

use super::backend::FailureClass;
use super::world::{Copy, CopyState};

/// Wait after the first failure; doubles with each further one (rule 7).
pub const BACK_OFF_FIRST: Duration = Duration::from_secs(1);
/// Longest wait between two tries.
pub const BACK_OFF_MOST: Duration = Duration::from_secs(300);

/// The wait after `failures` failures in a row.
#[must_use]
pub fn back_off(failures: u32) -> Duration {
    let doublings = failures.saturating_sub(1).min(16);
    (BACK_OFF_FIRST * (1 << doublings)).min(BACK_OFF_MOST)
}

/// One try of a copy has failed.
pub(super) fn fail(
    copy: &mut Copy,
    now: Duration,
    class: FailureClass,
    message: String,
    cleaned: bool,
) {
    copy.state = if cleaned { CopyState::FailedAndCleanup } else { CopyState::Failed };
    copy.message = message;
    copy.progress.rate_bytes_per_s = 0;
    if cleaned {
        copy.progress.bytes_done = 0;
    }
    match class {
        FailureClass::Refuse => {
            copy.refused = true;
            copy.retry_at = None;
        }
        FailureClass::Retry => {
            let moved_on = copy.progress.bytes_done > copy.bytes_at_failure;
            copy.failures = if moved_on { 1 } else { copy.failures.saturating_add(1) };
            copy.bytes_at_failure = copy.progress.bytes_done;
            copy.retry_at = Some(now + back_off(copy.failures));
        }
    }
}
