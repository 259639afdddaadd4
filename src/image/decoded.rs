//! Decoded clusters in memory, shared by all views of a process.
//!
//! Why: decoding 64 KiB costs some hundred times as much as copying 4 KiB of it, and readers of one
//! base image read the same clusters.
//! How: a cache bounded in bytes, keyed by layer and cluster, in huge pages. The first reader of a
//! cluster decodes it; others that want the same one wait for that, and nobody else waits. Clusters
//! that are wanted together are decoded on all cores.
//! Never: grows past its limit, or keeps the clusters of a view that is closed.
//! Start at [`DecodedCache::process_wide`].

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, LazyLock, OnceLock};
use std::time::Duration;

use bytes::Bytes;
use quick_cache::sync::{Cache, DefaultLifecycle, GuardResult};
use quick_cache::{DefaultHashBuilder, OptionsBuilder, Weighter};

use super::crew;
use crate::map::Slab;
use crate::units::{GuestOffset, MIB};

/// What the process-wide cache may hold unless it is said: this part of the memory, within these
/// bounds.
const PART_OF_MEMORY: u64 = 64;
const LEAST_CAPACITY_BYTES: u64 = 64 * MIB;
const MOST_CAPACITY_BYTES: u64 = 512 * MIB;
/// Room for the clusters that several readers have in hand, also of a cache that keeps nothing.
const LEAST_ARENA_BYTES: u64 = 64 * MIB;
/// Set by [`DecodedCache::set_process_capacity`].
static PROCESS_CAPACITY_BYTES: OnceLock<u64> = OnceLock::new();
/// What a shard must hold at least, so that a cluster of the largest size (2 MiB) is kept.
const MIN_SHARD_BYTES: u64 = 8 * MIB;
/// The part of the cache that clusters may take which were read more than once. The rest is for what is
/// new: less of it, and clusters that were decoded ahead of a reader are gone when it comes to them.
const PART_OF_WHAT_IS_READ_AGAIN: f64 = 0.85;
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
    next_view: AtomicU64,
    decodes: AtomicU64,
}

impl fmt::Debug for DecodedCache {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (held, capacity) = (self.clusters.weight(), self.clusters.capacity());
        f.debug_struct("DecodedCache")
            .field("held_bytes", &held)
            .field("capacity_bytes", &capacity)
            .finish_non_exhaustive()
    }
}

impl DecodedCache {
    /// A cache that holds up to `capacity_bytes` of clusters; with 0 it keeps nothing.
    #[must_use]
    pub fn new(capacity_bytes: u64) -> Arc<Self> {
        let cores = crew::cores();
        let shards = usize::try_from(capacity_bytes / MIN_SHARD_BYTES).unwrap_or(usize::MAX);
        // Typical clusters are 64 KiB; the estimate only sizes the index.
        let items = usize::try_from(capacity_bytes / (64 * 1024)).unwrap_or(usize::MAX).max(1);
        let options = OptionsBuilder::new()
            .shards(shards.clamp(1, cores * 4))
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
        Arc::new(Self {
            clusters,
            slab: Slab::new((2 * capacity_bytes).max(LEAST_ARENA_BYTES)).ok(),
            next_view: AtomicU64::new(0),
            decodes: AtomicU64::new(0),
        })
    }

    /// What the cache of the process may hold, from the next first use on. False if it was set, or
    /// is in use, already.
    pub fn set_process_capacity(capacity_bytes: u64) -> bool {
        PROCESS_CAPACITY_BYTES.set(capacity_bytes).is_ok()
    }

    /// The cache that views use unless they are given another: one for the whole process, of a 64th
    /// of the memory, but 64 MiB at least and 512 MiB at most.
    #[must_use]
    pub fn process_wide() -> Arc<Self> {
        static SHARED: LazyLock<Arc<DecodedCache>> = LazyLock::new(|| {
            let by_default = || {
                let system = rustix::system::sysinfo();
                let memory = system.totalram.saturating_mul(system.mem_unit.into());
                (memory / PART_OF_MEMORY).clamp(LEAST_CAPACITY_BYTES, MOST_CAPACITY_BYTES)
            };
            DecodedCache::new(*PROCESS_CAPACITY_BYTES.get_or_init(by_default))
        });
        Arc::clone(&SHARED)
    }

    /// Bytes of clusters held now, with a little for each entry.
    #[must_use]
    pub fn held_bytes(&self) -> u64 {
        self.clusters.weight()
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
            self.decodes.fetch_add(1, Ordering::Relaxed);
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
            self.decodes.fetch_add(1, Ordering::Relaxed);
            // It may have left the cache meanwhile.
            let _kept = place.insert(decode()?);
        }
        Ok(())
    }

    /// Forgets the clusters of a view that is closed.
    pub(super) fn forget_view(&self, view: u64) {
        self.clusters.retain(|key, _| key.view != view);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::convert::Infallible;
    use std::sync::Barrier;

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
        let cache = DecodedCache::new(LEAST_CAPACITY_BYTES);
        let cluster = Bytes::from(vec![0; 2 << 20]);
        for n in 0..100 {
            cache.get_or_decode(key(n), || Ok::<_, Infallible>(cluster.clone())).unwrap();
            assert!(cache.held_bytes() <= LEAST_CAPACITY_BYTES);
        }
        assert!(cache.held_bytes() > LEAST_CAPACITY_BYTES / 4);
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
