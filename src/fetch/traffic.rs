//! What is on its way that others let pass.
//!
//! Why: on a slow way, what a reader waits for shares it with all that could come later.
//! How: whoever brings something urgent is counted; the others rest a little while anybody is.
//! Never: lets the others rest for ever.
//! Start at [`Traffic`].

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use tokio::sync::Notify;

/// How long others rest at most before each read of their own while something urgent is on its way.
const REST: Duration = Duration::from_millis(100);

/// Pieces of one urgency that are on their way.
#[derive(Debug, Default)]
pub(super) struct Traffic {
    active: AtomicUsize,
    done: Notify,
}

impl Traffic {
    pub(super) fn is_active(&self) -> bool {
        self.active.load(Ordering::Relaxed) > 0
    }

    /// Waits until none is on its way, but not for long.
    pub(super) async fn let_pass(&self) {
        let done = self.done.notified();
        if self.is_active() {
            let _passed_or_not = tokio::time::timeout(REST, done).await;
        }
    }
}

/// A piece on its way.
pub(super) struct OnItsWay<'a>(&'a Traffic);

impl<'a> OnItsWay<'a> {
    pub(super) fn new(traffic: &'a Traffic) -> Self {
        traffic.active.fetch_add(1, Ordering::Relaxed);
        Self(traffic)
    }
}

impl Drop for OnItsWay<'_> {
    fn drop(&mut self) {
        if self.0.active.fetch_sub(1, Ordering::Relaxed) == 1 {
            self.0.done.notify_waiters();
        }
    }
}
