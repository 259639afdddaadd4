//! How large the cache of decoded clusters may be just now.
//!
//! Why: what is decoded again and again costs as much as the codec each time, and memory that nobody
//! else wants is free; but what somebody else wants is worth more than clusters that can be decoded
//! anew.
//! How: as a page cache. It may always hold its floor; beyond that it grows up to its bound while more
//! than a reserve is available to all, and gives back what is missing of the reserve. In between it
//! stays as it is. Whoever decodes looks before each 16 MiB of new memory, and four times a second
//! without any; a thread looks once a second while there is something that could be given back, and
//! ends then.
//! Never: holds a lock that a read of what is in the cache waits for, but for a step of 64 MiB.
//! Start at [`Bounds::capacity`] and [`Governor::adapt`].

use std::convert::Infallible;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::sync::{Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use super::DecodedCache;
use super::memory::Memory;
use crate::map::Slab;
use crate::units::{GIB, MIB};

/// The floor: this part of the memory, within these bounds.
const FLOOR_PART: u64 = 64;
const LEAST_FLOOR_BYTES: u64 = 64 * MIB;
const MOST_FLOOR_BYTES: u64 = 512 * MIB;
/// It grows up to this part; the arena, twice that, can be no longer than 64 GiB.
const MOST_PART: u64 = 4;
const MOST_MOST_BYTES: u64 = 32 * GIB;
/// What is left to others.
const RESERVE_PART: u64 = 8;
const MOST_RESERVE_BYTES: u64 = 16 * GIB;
/// This part of the reserve on top of it is where nothing changes.
const STILL_PART: u64 = 8;
/// Smaller changes are not worth the locks.
const GRAIN_BYTES: u64 = 16 * MIB;
/// New memory from one look to the next, at most.
const LOOK_EVERY_BYTES: u64 = 16 * MIB;
/// Time from one look of those who decode to the next, where no new memory is asked for.
const LOOK_EVERY_MS: u64 = 250;
/// What is evicted at once while others wait.
const STEP_BYTES: u64 = 64 * MIB;
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// What was free for so many looks is given back,
const IDLE_LOOKS: u32 = 10;
/// but for this.
const SLACK_BYTES: u64 = 8 * MIB;

/// Says what memory there is; `None` if that cannot be known.
pub(super) type Measure = Box<dyn Fn() -> Option<Memory> + Send + Sync>;

/// Between what a cache may grow and shrink, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bounds {
    /// What it may hold whatever others need.
    pub floor_bytes: u64,
    /// What it holds at most. Not less than the floor.
    pub most_bytes: u64,
    /// What must be available to others before it holds more than the floor.
    pub reserve_bytes: u64,
}

impl Bounds {
    /// For a cache that neither grows nor shrinks.
    #[must_use]
    pub fn fixed(capacity_bytes: u64) -> Self {
        Self { floor_bytes: capacity_bytes, most_bytes: capacity_bytes, reserve_bytes: 0 }
    }

    /// For a process that has `total_bytes` of memory: from a 64th (64 to 512 MiB) up to a quarter
    /// (32 GiB at most) while an eighth (16 GiB at most) is available.
    #[must_use]
    pub fn of_memory(total_bytes: u64) -> Self {
        let floor_bytes = (total_bytes / FLOOR_PART).clamp(LEAST_FLOOR_BYTES, MOST_FLOOR_BYTES);
        Self {
            floor_bytes,
            most_bytes: (total_bytes / MOST_PART).clamp(floor_bytes, MOST_MOST_BYTES),
            reserve_bytes: (total_bytes / RESERVE_PART).min(MOST_RESERVE_BYTES),
        }
    }

    /// For this process.
    pub(super) fn of_system() -> Self {
        let by_kernel = || {
            let system = rustix::system::sysinfo();
            system.totalram.saturating_mul(system.mem_unit.into())
        };
        Self::of_memory(Memory::of_system().map_or_else(by_kernel, |memory| memory.total_bytes))
    }

    fn is_fixed(&self) -> bool {
        self.floor_bytes == self.most_bytes
    }

    /// What a cache may hold that may hold `now`, has `memory_bytes` of memory, and leaves
    /// `available_bytes`.
    fn capacity(&self, now: u64, memory_bytes: u64, available_bytes: u64) -> u64 {
        let still = self.reserve_bytes.saturating_add(self.reserve_bytes / STILL_PART);
        let grains = |bytes: u64| bytes / GRAIN_BYTES * GRAIN_BYTES;
        let as_it_is = now.min(grains(memory_bytes.saturating_add(GRAIN_BYTES - 1)));
        let wanted = if let Some(missing) = self.reserve_bytes.checked_sub(available_bytes)
            && missing > 0
        {
            grains(now.min(memory_bytes.saturating_sub(missing)))
        } else {
            let spare = available_bytes.saturating_sub(still);
            let room = if spare > 0 { memory_bytes.saturating_add(spare) } else { 0 };
            as_it_is.max(grains(room))
        };
        wanted.clamp(self.floor_bytes, self.most_bytes)
    }
}

/// Keeps the capacity of one cache.
pub(super) struct Governor {
    bounds: Bounds,
    measure: Measure,
    /// [`Slab::asked_bytes`] at which the next look is due.
    due_at: AtomicU64,
    /// When it is due though nothing was asked for, in milliseconds since `began`.
    due_ms: AtomicU64,
    began: Instant,
    /// Who looks holds this; how many looks ago idle memory was given back.
    looking: Mutex<u32>,
    /// While there is one, a thread looks; it ends when this is dropped.
    thread: Mutex<Option<Sender<Infallible>>>,
}

impl Governor {
    pub(super) fn new(bounds: Bounds, measure: Measure) -> Self {
        Self {
            bounds,
            measure,
            due_at: AtomicU64::new(Self::step_bytes(&bounds)),
            due_ms: AtomicU64::new(0),
            began: Instant::now(),
            looking: Mutex::new(0),
            thread: Mutex::new(None),
        }
    }

    /// New memory from one look to the next; a cache that is full asks for none.
    fn step_bytes(bounds: &Bounds) -> u64 {
        LOOK_EVERY_BYTES.min(bounds.floor_bytes / 2)
    }

    fn now_ms(&self) -> u64 {
        u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    /// True if who decodes should look. No system call.
    pub(super) fn is_due(&self, slab: &Slab) -> bool {
        self.is_elastic(slab)
            && (slab.asked_bytes() >= self.due_at.load(Ordering::Relaxed)
                || self.now_ms() >= self.due_ms.load(Ordering::Relaxed))
    }

    /// A look of who decodes.
    #[cold]
    pub(super) fn adapt(&self, cache: &DecodedCache, slab: &Slab) {
        // One look is enough for all.
        let Ok(_looks) = self.looking.try_lock() else { return };
        self.adapt_alone(cache, slab);
    }

    fn is_elastic(&self, slab: &Slab) -> bool {
        !self.bounds.is_fixed() && slab.can_give_back()
    }

    fn adapt_alone(&self, cache: &DecodedCache, slab: &Slab) {
        if !self.is_elastic(slab) {
            return;
        }
        let due_at = slab.asked_bytes() + Self::step_bytes(&self.bounds);
        self.due_at.store(due_at, Ordering::Relaxed);
        self.due_ms.store(self.now_ms() + LOOK_EVERY_MS, Ordering::Relaxed);
        let available = (self.measure)().map_or(0, |memory| memory.available_bytes);
        let now = cache.capacity_bytes();
        let wanted = self.bounds.capacity(now, slab.memory_bytes(), available);
        // What is not held costs nothing to be forbidden.
        let mut capacity = now.min(cache.held_bytes());
        while capacity > wanted {
            capacity = wanted.max(capacity.saturating_sub(STEP_BYTES));
            cache.set_capacity(capacity);
            slab.give_back(0);
        }
        cache.set_capacity(wanted);
        if available < self.bounds.reserve_bytes {
            slab.give_back(0);
        }
    }

    /// A look of the thread.
    pub(super) fn look(&self, cache: &DecodedCache, slab: &Slab) {
        let mut looks = self.looking.lock().unwrap_or_else(PoisonError::into_inner);
        self.adapt_alone(cache, slab);
        *looks += 1;
        if *looks >= IDLE_LOOKS {
            *looks = 0;
            let idle = slab.take_least_free_bytes().saturating_sub(SLACK_BYTES);
            if idle > 0 {
                slab.give_back(slab.free_bytes().saturating_sub(idle));
            }
        }
    }

    /// Whether looking brings anything.
    fn is_watchful(&self, slab: &Slab) -> bool {
        let has_grown = !self.bounds.is_fixed() && slab.held_bytes() > self.bounds.floor_bytes;
        slab.can_give_back() && (has_grown || slab.free_bytes() > SLACK_BYTES)
    }

    /// Has a thread look, if that brings anything and none does.
    pub(super) fn watch(&self, cache: &Weak<DecodedCache>, slab: &Slab) {
        let mut thread = self.thread();
        if thread.is_some() || !self.is_watchful(slab) {
            return;
        }
        // What was in use before does not count as such.
        let _begins_now = slab.take_least_free_bytes();
        let (alive, ended) = mpsc::channel();
        let cache = Weak::clone(cache);
        let named = std::thread::Builder::new().name("decoded memory".into());
        // Without one, who decodes still looks.
        if named.spawn(move || look_on(&cache, &ended)).is_ok() {
            *thread = Some(alive);
        }
    }

    /// True if the thread should look again; another may be started if not.
    fn goes_on(&self, slab: &Slab) -> bool {
        let mut thread = self.thread();
        let goes_on = self.is_watchful(slab);
        if !goes_on {
            *thread = None;
        }
        goes_on
    }

    #[cfg(test)]
    pub(super) fn is_watching(&self) -> bool {
        self.thread().is_some()
    }

    fn thread(&self) -> MutexGuard<'_, Option<Sender<Infallible>>> {
        self.thread.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn look_on(cache: &Weak<DecodedCache>, ended: &Receiver<Infallible>) {
    while let Err(RecvTimeoutError::Timeout) = ended.recv_timeout(LOOK_EVERY) {
        let Some(cache) = cache.upgrade() else { return };
        let Some(slab) = cache.slab() else { return };
        cache.governor().look(&cache, slab);
        if !cache.governor().goes_on(slab) {
            return;
        }
    }
}

#[cfg(test)]
#[path = "governor_tests.rs"]
mod tests;
