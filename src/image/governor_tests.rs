use std::sync::Arc;

use bytes::Bytes;

use super::super::decoded::Key;
use super::*;

/// A cache of 4 to 64 MiB that leaves 100 MiB to others, and what is available to all.
struct Machine {
    cache: Arc<DecodedCache>,
    free_bytes: Arc<AtomicU64>,
}

const BOUNDS: Bounds =
    Bounds { floor_bytes: 4 * MIB, most_bytes: 64 * MIB, reserve_bytes: 100 * MIB };
const CLUSTER_BYTES: usize = 65_536;

impl Machine {
    /// None where no memory can be given back.
    fn new(bounds: Bounds) -> Option<Self> {
        let free_bytes = Arc::new(AtomicU64::new(GIB));
        let free = Arc::clone(&free_bytes);
        let cache = DecodedCache::elastic(bounds, move || {
            let available_bytes = free.load(Ordering::Relaxed);
            Some(Memory { total_bytes: GIB, available_bytes })
        });
        if !cache.slab().unwrap().can_give_back() {
            assert!(!rustix::process::geteuid().is_root(), "root can give memory back");
            eprintln!("skipped: needs root");
            return None;
        }
        Some(Self { cache, free_bytes })
    }

    fn read(&self, view: u64, clusters: std::ops::Range<u64>) {
        for cluster in clusters {
            let bytes = self.cache.get_or_decode(Key { view, cluster }, || {
                let mut buf = self.cache.slab().unwrap().take(CLUSTER_BYTES)?;
                buf.bytes_mut().fill(cluster.to_le_bytes()[0]);
                std::io::Result::Ok(Bytes::from_owner(buf))
            });
            assert!(bytes.unwrap().iter().all(|&byte| byte == cluster.to_le_bytes()[0]));
        }
    }

    fn look_with(&self, available_bytes: u64) {
        self.free_bytes.store(available_bytes, Ordering::Relaxed);
        self.cache.look();
    }
}

#[test]
fn capacity_is_what_is_held_and_what_is_spare_between_floor_and_bound() {
    let bounds = Bounds { floor_bytes: 64 * MIB, most_bytes: 1024 * MIB, reserve_bytes: 800 * MIB };
    let capacity = |now: u64, memory: u64, available: u64| {
        bounds.capacity(now * MIB, memory * MIB, available * MIB) / MIB
    };
    assert_eq!(capacity(64, 16, 10_000), 1024, "plenty");
    assert_eq!(capacity(64, 16, 1020), 16 + 120 - 8, "what is above the reserve and a part of it");
    assert_eq!(capacity(512, 511, 901), 512, "what it has does not go for so little");
    assert_eq!(capacity(1024, 511, 899), 512, "no more than it has");
    assert_eq!(capacity(1024, 512, 801), 512);
    assert_eq!(capacity(256, 512, 801), 256, "it does not grow either");
    assert_eq!(capacity(1024, 512, 700), 400, "what is missing of the reserve");
    assert_eq!(capacity(1024, 512, 0), 64, "the floor it may always hold");
    assert_eq!(capacity(64, 0, 0), 64);
    assert_eq!(bounds.capacity(u64::MAX, u64::MAX, u64::MAX), 1024 * MIB);
    assert_eq!(Bounds::fixed(5).capacity(5, 0, u64::MAX), 5);
}

#[test]
fn bounds_follow_the_memory_of_the_machine() {
    let of = |total: u64| {
        let bounds = Bounds::of_memory(total);
        [bounds.floor_bytes, bounds.most_bytes, bounds.reserve_bytes].map(|bytes| bytes / MIB)
    };
    assert_eq!(of(128 * MIB), [64, 64, 16]);
    assert_eq!(of(2 * GIB), [64, 512, 256]);
    assert_eq!(of(16 * GIB), [256, 4096, 2048]);
    assert_eq!(of(1024 * GIB), [512, 32 * 1024, 16 * 1024]);
}

#[test]
fn an_image_that_fits_in_what_is_spare_is_decoded_once() {
    let Some(machine) = Machine::new(BOUNDS) else { return };
    let clusters = 48 * MIB / 65_536;
    machine.read(1, 0..clusters);
    machine.read(1, 0..clusters);
    assert_eq!(machine.cache.decodes(), clusters, "read twice");
    assert_eq!(machine.cache.capacity_bytes(), BOUNDS.most_bytes);
    machine.read(2, 0..clusters);
    assert!(machine.cache.held_bytes() <= BOUNDS.most_bytes);
}

#[test]
fn what_is_missing_to_others_is_given_back_and_comes_again() {
    let Some(machine) = Machine::new(BOUNDS) else { return };
    let (cache, clusters) = (&machine.cache, 48 * MIB / 65_536);
    machine.read(1, 0..clusters);
    assert_eq!(cache.memory_bytes(), 48 * MIB);
    machine.look_with(90 * MIB);
    assert_eq!(cache.capacity_bytes(), 32 * MIB, "10 MiB are missing");
    assert!(cache.memory_bytes() <= 32 * MIB && cache.memory_bytes() > 30 * MIB);
    let memory_bytes = cache.memory_bytes();
    machine.look_with(105 * MIB);
    assert_eq!(cache.memory_bytes(), memory_bytes, "enough, and not too much");
    machine.look_with(0);
    assert_eq!(cache.capacity_bytes(), BOUNDS.floor_bytes);
    assert!(cache.memory_bytes() <= BOUNDS.floor_bytes, "{}", cache.memory_bytes());
    machine.read(1, 0..clusters);
    assert!(cache.held_bytes() <= BOUNDS.floor_bytes, "it does not grow meanwhile");
    machine.look_with(GIB);
    let before = cache.decodes();
    machine.read(1, 0..clusters);
    machine.read(1, 0..clusters);
    assert_eq!(cache.memory_bytes() / MIB, 48);
    assert!(cache.decodes() - before <= clusters);
}

#[test]
fn who_decodes_notices_that_memory_becomes_scarce() {
    let Some(machine) = Machine::new(BOUNDS) else { return };
    machine.read(1, 0..16);
    machine.free_bytes.store(0, Ordering::Relaxed);
    machine.read(1, 0..64 * MIB / 65_536);
    assert_eq!(machine.cache.capacity_bytes(), BOUNDS.floor_bytes);
    assert!(machine.cache.memory_bytes() <= BOUNDS.floor_bytes + LOOK_EVERY_BYTES);
}

#[test]
fn who_decodes_notices_that_there_is_memory_again() {
    let Some(machine) = Machine::new(BOUNDS) else { return };
    machine.look_with(0);
    machine.read(1, 0..128);
    assert_eq!(machine.cache.capacity_bytes(), BOUNDS.floor_bytes);
    machine.free_bytes.store(GIB, Ordering::Relaxed);
    // It is full, and asks for no new memory.
    while machine.cache.capacity_bytes() == BOUNDS.floor_bytes {
        machine.read(1, 0..128);
    }
    let before = machine.cache.decodes();
    machine.read(1, 0..128);
    machine.read(1, 0..128);
    assert!(machine.cache.decodes() - before <= 128);
}

#[test]
fn what_nobody_has_used_for_long_is_given_back_but_for_a_little() {
    let Some(machine) = Machine::new(Bounds::fixed(64 * MIB)) else { return };
    let cache = &machine.cache;
    machine.read(1, 0..32 * MIB / 65_536);
    machine.read(2, 0..4 * MIB / 65_536);
    cache.forget_view(1);
    assert_eq!(cache.memory_bytes(), 36 * MIB, "not at once");
    for _ in 1..IDLE_LOOKS {
        cache.look();
    }
    assert_eq!(cache.memory_bytes(), 36 * MIB, "not before that time has passed");
    cache.look();
    assert_eq!(cache.memory_bytes(), 4 * MIB + SLACK_BYTES);
    for _ in 0..IDLE_LOOKS {
        // It comes and goes: only what was free all the time is idle.
        machine.read(3, 0..30 * MIB / 65_536);
        cache.forget_view(3);
        cache.look();
    }
    assert_eq!(cache.memory_bytes(), 34 * MIB);
    let before = cache.decodes();
    machine.read(2, 0..4 * MIB / 65_536);
    assert_eq!(cache.decodes(), before, "what is kept is whole");
}

#[test]
fn a_thread_looks_while_there_is_something_to_give_back() {
    let Some(machine) = Machine::new(BOUNDS) else { return };
    let cache = &machine.cache;
    machine.read(1, 0..8);
    assert!(!cache.governor().is_watching(), "below the floor");
    machine.read(1, 0..40 * MIB / 65_536);
    assert!(cache.governor().is_watching());
    machine.free_bytes.store(0, Ordering::Relaxed);
    while cache.governor().is_watching() {
        std::thread::yield_now();
    }
    assert!(cache.memory_bytes() <= BOUNDS.floor_bytes);
    // Another look is not needed to end it.
    machine.free_bytes.store(GIB, Ordering::Relaxed);
    machine.read(1, 0..40 * MIB / 65_536);
    let thread_of = Arc::downgrade(cache);
    drop(machine);
    while thread_of.strong_count() > 0 {
        std::thread::yield_now();
    }
}

#[test]
fn without_memory_that_can_be_given_back_it_stays_at_its_floor() {
    let slab = Slab::keeping(64 * MIB).unwrap();
    let plenty = || Some(Memory { total_bytes: GIB, available_bytes: GIB });
    let cache = DecodedCache::with_slab(BOUNDS, plenty, Some(slab));
    let machine = Machine { cache, free_bytes: Arc::default() };
    machine.read(1, 0..32 * MIB / 65_536);
    machine.cache.look();
    assert_eq!(machine.cache.capacity_bytes(), BOUNDS.floor_bytes);
    assert!(machine.cache.held_bytes() <= BOUNDS.floor_bytes);
    assert!(!machine.cache.governor().is_watching());
}

#[test]
fn what_is_said_is_kept_whatever_others_need() {
    let cache = DecodedCache::new(32 * MIB);
    let machine = Machine { cache, free_bytes: Arc::default() };
    machine.read(1, 0..16 * MIB / 65_536);
    machine.look_with(0);
    machine.read(1, 0..16 * MIB / 65_536);
    assert_eq!(machine.cache.decodes(), 16 * MIB / 65_536);
    assert_eq!(machine.cache.capacity_bytes(), 32 * MIB);
}
