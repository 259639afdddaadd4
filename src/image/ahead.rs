//! Decoding ahead of a reader who goes forward.
//!
//! Why: a reader of small pieces would wait for each cluster in turn, on one core.
//! How: whoever decodes the cluster after the last one that had to be decoded is going forward; the
//! next few are then decoded on the pool, while this one is decoded here. One batch at a time, so
//! that a reader who jumps about costs nothing.
//! Never: makes a reader wait for a cluster that is not its own, or decodes what is not compressed.
//! Start at [`decode`].

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use super::layer::{Layer, LayerKind};
use super::{Decoded, ReadError, crew};
use crate::units::GuestOffset;

/// Bytes of the guest that are decoded ahead: 8 clusters of the usual size.
const AHEAD_BYTES: u64 = 512 << 10;

/// Where a layer's readers are.
#[derive(Debug, Default)]
pub(super) struct Forward {
    /// The guest byte after the last cluster that was decoded for a reader, or ahead.
    next: AtomicU64,
    /// A batch is on its way.
    busy: AtomicBool,
    /// What a reader said that it will want is being decoded.
    hinted: AtomicBool,
}

impl Forward {
    /// True if no hint is being followed; then [`decode_hinted`] has to be called.
    pub(super) fn begin_hint(&self) -> bool {
        !self.hinted.swap(true, Ordering::Acquire)
    }
}

/// Decodes these clusters some time, when `top` has begun a hint.
pub(super) fn decode_hinted(top: Arc<Layer>, jobs: Vec<(Arc<Layer>, GuestOffset)>) {
    let done = Hinted(top);
    if jobs.is_empty() {
        return;
    }
    crew::beside(move || {
        let _until_here = done;
        for (layer, at) in jobs {
            if layer.cached(at).is_none() {
                let _met_again_by_the_reader = layer.decoded(at);
            }
        }
    });
}

/// Ends a hint, also where its work was never begun.
struct Hinted(Arc<Layer>);

impl Drop for Hinted {
    fn drop(&mut self) {
        self.0.forward.hinted.store(false, Ordering::Release);
    }
}

/// Decodes the cluster around `at`, which is not in the cache, and perhaps some after it.
pub(super) fn decode(layer: &Arc<Layer>, at: GuestOffset) -> Result<Decoded, ReadError> {
    let Some((start, end)) = layer.cluster_around(at) else { return layer.decoded(at) };
    let goes_forward = layer.forward.next.swap(end, Ordering::Relaxed) == start && start > 0;
    // On a thread of the pool nobody waits for bytes to come.
    let is_here = layer.arriving().is_none();
    if goes_forward && is_here && !layer.forward.busy.swap(true, Ordering::Acquire) {
        let until = end.saturating_add(AHEAD_BYTES).min(layer.size_bytes());
        layer.forward.next.store(until, Ordering::Relaxed);
        let ahead = Arc::clone(layer);
        crew::later(move || {
            decode_range(&ahead, end, until);
            ahead.forward.busy.store(false, Ordering::Release);
        });
    }
    layer.decoded(at)
}

/// Decodes what is compressed and not in the cache. Errors are met again by who reads.
fn decode_range(layer: &Layer, from: u64, until: u64) {
    let mut at = GuestOffset(from);
    while at.0 < until {
        let Ok(run) = layer.run_at(at, until) else { return };
        if run.kind == LayerKind::Encoded && layer.cached(at).is_none() {
            let _met_again_by_the_reader = layer.decoded(at);
        }
        at = at.advance(run.len_bytes);
    }
}
