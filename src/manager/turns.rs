//! Whose transfer may run: so many at a time, the most urgent first.
//!
//! Why: a node that attaches fifty images at once would give each a fiftieth of everything; and what
//! somebody waits for must not stand behind what nobody does.
//! How: whoever wants to run waits for a [`Turn`]; when one is free, the waiting one with the
//! highest priority gets it, of equals the first that came. Number and priorities may change while
//! others wait or run.
//! Never: takes a turn away from a transfer that runs.
//! Start at [`Turns::turn`].

use std::cmp::Reverse;
use std::sync::atomic::{AtomicI32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

#[derive(Debug)]
struct Waiting {
    number: u64,
    priority: Arc<AtomicI32>,
}

#[derive(Debug)]
struct State {
    most: usize,
    running: usize,
    next_number: u64,
    waiting: Vec<Waiting>,
}

/// The turns of a node.
#[derive(Debug)]
pub(super) struct Turns {
    state: Mutex<State>,
    changed: Notify,
}

/// The right to run, until it is dropped.
#[derive(Debug)]
pub(super) struct Turn(Arc<Turns>);

/// A place in the queue, which is left when it is dropped.
struct Place<'a> {
    turns: &'a Turns,
    number: u64,
}

impl Turns {
    /// At most `most` at a time; 0 counts as 1.
    pub(super) fn new(most: usize) -> Self {
        let state = State { most: most.max(1), running: 0, next_number: 0, waiting: Vec::new() };
        Self { state: Mutex::new(state), changed: Notify::new() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Another number from now on; who runs goes on.
    pub(super) fn set_most(&self, most: usize) {
        self.state().most = most.max(1);
        self.changed.notify_waiters();
    }

    /// How many may run at a time.
    #[cfg(test)]
    pub(super) fn most(&self) -> usize {
        self.state().most
    }

    /// How many have a turn or wait for one.
    pub(super) fn wanted(&self) -> usize {
        let state = self.state();
        state.running + state.waiting.len()
    }

    /// A priority has changed: who waits looks again.
    pub(super) fn look_again(&self) {
        self.changed.notify_waiters();
    }

    /// A turn if one is free and nobody waits for it.
    pub(super) fn try_turn(self: &Arc<Self>) -> Option<Turn> {
        let mut state = self.state();
        if state.running >= state.most || !state.waiting.is_empty() {
            return None;
        }
        state.running += 1;
        Some(Turn(Arc::clone(self)))
    }

    /// A turn, as soon as it is this caller's. Higher priorities come first. Cancel-safe.
    pub(super) async fn turn(self: &Arc<Self>, priority: &Arc<AtomicI32>) -> Turn {
        let place = {
            let mut state = self.state();
            let number = state.next_number;
            state.next_number += 1;
            state.waiting.push(Waiting { number, priority: Arc::clone(priority) });
            Place { turns: self, number }
        };
        loop {
            let changed = self.changed.notified();
            tokio::pin!(changed);
            // Registered before the look, so that a change in between is not missed.
            changed.as_mut().enable();
            if self.state().may_run(place.number) {
                return Turn(Arc::clone(self));
            }
            changed.await;
        }
    }
}

impl State {
    /// True if `number` is the next to run and a turn is free; it is taken then.
    fn may_run(&mut self, number: u64) -> bool {
        let rank = |w: &&Waiting| (w.priority.load(Ordering::Relaxed), Reverse(w.number));
        let next = self.waiting.iter().max_by_key(rank).map(|w| w.number);
        let free = self.running < self.most && next == Some(number);
        self.running += usize::from(free);
        free
    }
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        self.turns.state().waiting.retain(|waiting| waiting.number != self.number);
        self.turns.changed.notify_waiters();
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        self.0.state().running -= 1;
        self.0.changed.notify_waiters();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn priority(value: i32) -> Arc<AtomicI32> {
        Arc::new(AtomicI32::new(value))
    }

    /// Lets every other task of this runtime go on until it waits.
    async fn settle() {
        for _ in 0..50 {
            tokio::task::yield_now().await;
        }
    }

    #[tokio::test]
    async fn the_most_urgent_is_next_and_of_equals_the_first() {
        let turns = Arc::new(Turns::new(1));
        let running = turns.try_turn().unwrap();
        let order = Arc::new(Mutex::new(Vec::new()));
        let late = priority(0);
        let mut tasks = Vec::new();
        for (name, priority) in [("a", priority(0)), ("b", priority(5)), ("c", Arc::clone(&late))] {
            let (turns, order) = (Arc::clone(&turns), Arc::clone(&order));
            tasks.push(tokio::spawn(async move {
                let turn = turns.turn(&priority).await;
                order.lock().unwrap().push(name);
                tokio::task::yield_now().await;
                drop(turn);
            }));
            settle().await;
        }
        assert!(turns.try_turn().is_none());
        late.store(9, Ordering::Relaxed);
        turns.look_again();
        drop(running);
        for task in tasks {
            task.await.unwrap();
        }
        assert_eq!(*order.lock().unwrap(), ["c", "b", "a"]);
        assert!(turns.try_turn().is_some());
    }

    #[tokio::test]
    async fn more_turns_let_more_run_and_who_gives_up_holds_up_nobody() {
        let turns = Arc::new(Turns::new(1));
        let _running = turns.try_turn().unwrap();
        let urgent = tokio::spawn({
            let turns = Arc::clone(&turns);
            async move { turns.turn(&priority(9)).await }
        });
        settle().await;
        let other = tokio::spawn({
            let turns = Arc::clone(&turns);
            async move { turns.turn(&priority(0)).await }
        });
        settle().await;
        urgent.abort();
        settle().await;
        assert!(!other.is_finished());
        turns.set_most(2);
        drop(other.await.unwrap());
        assert_eq!(turns.most(), 2);
    }
}
