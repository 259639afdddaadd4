//! Decoded clusters in memory, shared by all views of a process.
//!
//! Why: decoding 64 KiB costs some hundred times as much as copying 4 KiB of it, and readers of one
//! base image read the same clusters.
//! How: a cache bounded in bytes, keyed by layer and cluster, in huge pages. The first reader of a
//! cluster decodes it; others that want the same one wait for that, and nobody else waits. Clusters
//! that are wanted together are decoded on all cores. How much it may hold, within its bounds, is for
//! the [`governor`](super::governor) to say.
//! Never: grows past its limit, or keeps the clusters of a view that is closed.
//! Start at [`DecodedCache::process_wide`].

use std::cell::Cell;
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, LazyLock, OnceLock, Weak};
use std::time::Duration;

use bytes::Bytes;
use quick_cache::sync::{Cache, DefaultLifecycle, GuardResult};
use quick_cache::{DefaultHashBuilder, OptionsBuilder, Weighter};

use super::crew;
use super::governor::{Bounds, Governor};
use super::memory::Memory;
use crate::map::Slab;
use crate::units::{GuestOffset, MIB};

/// Room for the clusters that several readers have in hand, also of a cache that keeps nothing.
const LEAST_ARENA_BYTES: u64 = 64 * MIB;
/// Set by [`DecodedCache::set_process_capacity`].
static PROCESS_CAPACITY_BYTES: OnceLock<Option<u64>> = OnceLock::new();
/// What a shard must hold at least, so that a cluster of the largest size (2 MiB) is kept.
const MIN_SHARD_BYTES: u64 = 8 * MIB;
/// The part of the cache that clusters may take which were read more than once. The rest is for what is
/// new: less of it, and clusters that were decoded ahead of a reader are gone when it comes to them.
const PART_OF_WHAT_IS_READ_AGAIN: f64 = 0.85;
/// One of so many reads of decoded clusters asks the cache, with its lock.
const READS_PER_TOLD: u32 = 8;
/// Memory that an entry costs beside its cluster, roughly.
const ENTRY_OVERHEAD_BYTES: u64 = 128;

/// A decoded cluster: a cheap handle on shared memory, valid after it has left the cache.
#[derive(Clone, Debug)]
pub struct Decoded {
    /// What a guest reads from `start` on; ends with the cluster or with the disk.
    pub bytes: Bytes,
    /// Guest position of the cluster's first byte.
    pub start: GuestOffset,
}

impl Decoded {
    /// The bytes from guest position `at` to the end of the cluster, without a copy; empty if
    /// `at` is not inside.
    #[must_use]
    pub fn from(&self, at: GuestOffset) -> Bytes {
        let skip = at.0.checked_sub(self.start.0).and_then(|n| usize::try_from(n).ok());
        match skip {
            Some(skip) if skip < self.bytes.len() => self.bytes.slice(skip..),
            Some(_) | None => Bytes::new(),
        }
    }
}

/// Which cluster of which view.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Key {
    pub(super) view: u64,
    pub(super) cluster: u64,
}

#[derive(Clone)]
struct ByBytes;

impl Weighter<Key, Bytes> for ByBytes {
    fn weight(&self, _: &Key, bytes: &Bytes) -> u64 {
        bytes.len() as u64 + ENTRY_OVERHEAD_BYTES
    }
}

/// A bounded cache of decoded clusters; cheap to share, safe for any number of threads.
pub struct DecodedCache {
    clusters: Cache<Key, Bytes, ByBytes>,
    /// None if the system had none to give: all clusters are on the heap then.
    slab: Option<Slab>,
    capacity_bytes: AtomicU64,
    governor: Governor,
    /// For the governor's thread, which does not keep the cache.
    me: Weak<Self>,
    next_view: AtomicU64,
    decodes: AtomicU64,
}

impl fmt::Debug for DecodedCache {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (held, capacity) = (self.held_bytes(), self.capacity_bytes());
        f.debug_struct("DecodedCache")
            .field("held_bytes", &held)
            .field("capacity_bytes", &capacity)
            .finish_non_exhaustive()
    }
}

impl DecodedCache {
    /// A cache that holds up to `capacity_bytes` of clusters, whatever memory there is; with 0 it
    /// keeps nothing.
    #[must_use]
    pub fn new(capacity_bytes: u64) -> Arc<Self> {
        Self::elastic(Bounds::fixed(capacity_bytes), || None)
    }

    /// A cache that grows and shrinks within `bounds`, by what `measure` says: it is asked by whoever
    /// decodes, and may be asked by another thread. Where the system has no memory for it that can be
    /// given back (without CAP_SYS_ADMIN), it holds the lower bound.
    #[must_use]
    pub fn elastic(
        bounds: Bounds,
        measure: impl Fn() -> Option<Memory> + Send + Sync + 'static,
    ) -> Arc<Self> {
        let arena_bytes = |capacity_bytes: u64| (2 * capacity_bytes).max(LEAST_ARENA_BYTES);
        let slab = Slab::new(arena_bytes(bounds.most_bytes));
        let slab = match slab {
            // What is never given back must not become more than this.
            Ok(slab) if !slab.can_give_back() => Slab::keeping(arena_bytes(bounds.floor_bytes)),
            slab => slab,
        };
        Self::with_slab(bounds, measure, slab.ok())
    }

    pub(super) fn with_slab(
        bounds: Bounds,
        measure: impl Fn() -> Option<Memory> + Send + Sync + 'static,
        slab: Option<Slab>,
    ) -> Arc<Self> {
        let capacity_bytes = bounds.floor_bytes;
        let shards = usize::try_from(capacity_bytes / MIN_SHARD_BYTES).unwrap_or(usize::MAX);
        // Typical clusters are 64 KiB; the estimate only sizes the index.
        let items = usize::try_from(capacity_bytes / (64 * 1024)).unwrap_or(usize::MAX).max(1);
        let options = OptionsBuilder::new()
            .shards(shards.clamp(1, crew::cores() * 4))
            .estimated_items_capacity(items)
            .weight_capacity(capacity_bytes)
            .hot_allocation(PART_OF_WHAT_IS_READ_AGAIN)
            // What comes back soon after it has left would go beyond that part, and in the end nothing new
            // would be kept from one read of 4 KiB to the next.
            .ghost_allocation(0.0)
            .build()
            .expect("both capacities are set");
        let clusters = Cache::with_options(
            options,
            ByBytes,
            DefaultHashBuilder::default(),
            DefaultLifecycle::default(),
        );
        Arc::new_cyclic(|me| Self {
            clusters,
            slab,
            capacity_bytes: AtomicU64::new(capacity_bytes),
            governor: Governor::new(bounds, Box::new(measure)),
            me: Weak::clone(me),
            next_view: AtomicU64::new(0),
            decodes: AtomicU64::new(0),
        })
    }

    /// What the cache of the process may hold, from the next first use on. False if it was set, or
    /// is in use, already.
    pub fn set_process_capacity(capacity_bytes: u64) -> bool {
        PROCESS_CAPACITY_BYTES.set(Some(capacity_bytes)).is_ok()
    }

    /// The cache that views use unless they are given another: one for the whole process, within
    /// [`Bounds::of_memory`], or fixed by [`set_process_capacity`](Self::set_process_capacity).
    #[must_use]
    pub fn process_wide() -> Arc<Self> {
        static SHARED: LazyLock<Arc<DecodedCache>> = LazyLock::new(|| {
            // Decided now, if it was not: what is said later has no effect.
            match PROCESS_CAPACITY_BYTES.get_or_init(|| None) {
                Some(capacity_bytes) => DecodedCache::new(*capacity_bytes),
                None => DecodedCache::elastic(Bounds::of_system(), Memory::of_system),
            }
        });
        Arc::clone(&SHARED)
    }

    /// Bytes of clusters held now, with a little for each entry.
    #[must_use]
    pub fn held_bytes(&self) -> u64 {
        self.clusters.weight()
    }

    /// What it may hold just now.
    #[must_use]
    pub fn capacity_bytes(&self) -> u64 {
        self.capacity_bytes.load(Ordering::Relaxed)
    }

    /// Memory of the arena: clusters that are kept or in somebody's hands, and what is free for others.
    #[must_use]
    pub fn memory_bytes(&self) -> u64 {
        self.slab.as_ref().map_or(0, Slab::memory_bytes)
    }

    /// Fits what it holds to the memory that there is, and gives back what has been idle for long: as
    /// a thread of its own does once a second while that may be of use.
    pub fn look(&self) {
        if let Some(slab) = &self.slab {
            self.governor.look(self, slab);
        }
    }

    pub(super) fn governor(&self) -> &Governor {
        &self.governor
    }

    /// May evict. Only for the governor, which is one at a time.
    pub(super) fn set_capacity(&self, capacity_bytes: u64) {
        if self.capacity_bytes.swap(capacity_bytes, Ordering::Relaxed) != capacity_bytes {
            self.clusters.set_capacity(capacity_bytes);
        }
    }

    /// Counts a cluster that is about to be decoded, and sees from time to time what memory there is.
    fn before_decode(&self) {
        self.decodes.fetch_add(1, Ordering::Relaxed);
        if let Some(slab) = self.slab.as_ref().filter(|slab| self.governor.is_due(slab)) {
            self.governor.adapt(self, slab);
            self.governor.watch(&self.me, slab);
        }
    }

    /// How many clusters have been decoded; what was found here already is not counted.
    #[must_use]
    pub fn decodes(&self) -> u64 {
        self.decodes.load(Ordering::Relaxed)
    }

    /// Memory for what is to be decoded, which readers in other processes may map; `None` if the
    /// system had none to give.
    #[must_use]
    pub fn slab(&self) -> Option<&Slab> {
        self.slab.as_ref()
    }

    /// Whether this thread's next read should ask the cache, and not only the memory of what is decoded:
    /// what nobody asks the cache for leaves it first.
    #[inline]
    pub(super) fn wants_to_be_told() -> bool {
        thread_local!(static READS: Cell<u32> = const { Cell::new(0) });
        READS.with(|reads| {
            reads.set(reads.get().wrapping_add(1));
            reads.get() % READS_PER_TOLD == 0
        })
    }

    /// The cluster of `key`, if it is here.
    pub(super) fn get(&self, key: Key) -> Option<Bytes> {
        self.clusters.get(&key)
    }

    /// A number for the keys of one view.
    pub(super) fn register_view(&self) -> u64 {
        self.next_view.fetch_add(1, Ordering::Relaxed)
    }

    /// The cluster of `key`, decoded by `decode` if it is not here. An error is not kept.
    pub(super) fn get_or_decode<E>(
        &self,
        key: Key,
        decode: impl FnOnce() -> Result<Bytes, E>,
    ) -> Result<Bytes, E> {
        self.clusters.get_or_insert_with(&key, || {
            self.before_decode();
            decode()
        })
    }

    /// As [`get_or_decode`](Self::get_or_decode), but not if another thread is at it: no wait then.
    pub(super) fn decode_if_nobody_does<E>(
        &self,
        key: Key,
        decode: impl FnOnce() -> Result<Bytes, E>,
    ) -> Result<(), E> {
        if let GuardResult::Guard(place) =
            self.clusters.get_value_or_guard(&key, Some(Duration::ZERO))
        {
            self.before_decode();
            // It may have left the cache meanwhile.
            let _kept = place.insert(decode()?);
        }
        Ok(())
    }

    /// Forgets the clusters of a view that is closed.
    pub(super) fn forget_view(&self, view: u64) {
        self.clusters.retain(|key, _| key.view != view);
        if let Some(slab) = &self.slab {
            self.governor.watch(&self.me, slab);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::convert::Infallible;
    use std::sync::Barrier;

    const CAPACITY_BYTES: u64 = 64 * MIB;

    fn key(cluster: u64) -> Key {
        Key { view: 1, cluster }
    }

    #[test]
    fn two_readers_of_a_cluster_decode_it_once() {
        let cache = DecodedCache::new(1 << 20);
        let decoded = AtomicU64::new(0);
        let together = Barrier::new(8);
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    together.wait();
                    let bytes = cache.get_or_decode(key(5), || {
                        decoded.fetch_add(1, Ordering::Relaxed);
                        Ok::<_, Infallible>(Bytes::from(vec![9; 1000]))
                    });
                    assert_eq!(bytes.unwrap().len(), 1000);
                });
            }
        });
        assert_eq!(decoded.into_inner(), 1);
    }

    #[test]
    fn a_slow_decode_does_not_hold_up_other_clusters() {
        let cache = DecodedCache::new(1 << 20);
        let value = cache.get_or_decode(key(0), || {
            // Every other key must be free while this one is being decoded.
            for n in 1..200 {
                std::thread::scope(|scope| {
                    let other =
                        || cache.get_or_decode(key(n), || Ok::<_, Infallible>(Bytes::new()));
                    scope.spawn(other).join().unwrap().unwrap();
                });
            }
            Ok::<_, Infallible>(Bytes::from_static(b"slow"))
        });
        assert_eq!(value.unwrap(), "slow");
    }

    #[test]
    fn it_stays_below_its_limit_and_keeps_the_largest_clusters() {
        let cache = DecodedCache::new(CAPACITY_BYTES);
        let cluster = Bytes::from(vec![0; 2 << 20]);
        for n in 0..100 {
            cache.get_or_decode(key(n), || Ok::<_, Infallible>(cluster.clone())).unwrap();
            assert!(cache.held_bytes() <= CAPACITY_BYTES);
        }
        assert!(cache.held_bytes() > CAPACITY_BYTES / 4);
        cache.forget_view(1);
        assert_eq!(cache.held_bytes(), 0);
    }

    #[test]
    fn an_error_is_given_to_the_reader_and_not_kept() {
        let cache = DecodedCache::new(1 << 20);
        assert_eq!(cache.get_or_decode(key(1), || Err("damaged")), Err("damaged"));
        assert_eq!(cache.get_or_decode(key(1), || Ok::<_, &str>(Bytes::new())), Ok(Bytes::new()));
    }

    #[test]
    fn a_part_of_a_decoded_cluster_is_found_by_guest_position() {
        let decoded = Decoded { bytes: Bytes::from_static(b"0123"), start: GuestOffset(100) };
        assert_eq!(decoded.from(GuestOffset(102)), "23");
        assert!(decoded.from(GuestOffset(104)).is_empty());
        assert!(decoded.from(GuestOffset(99)).is_empty());
    }
}
