//! Decoding ahead of a reader who goes forward.
//!
//! Why: a reader of small pieces would wait for each cluster in turn, on one core.
//! How: whoever decodes the cluster after the last one that had to be decoded, or ahead of that, is going
//! forward; the next few are then decoded on the pool, while this one is decoded here. One thread is at it
//! at a time, and goes on as long as the reader does; a reader who jumps about costs nothing.
//! Never: makes a reader wait for a cluster that is not its own, or decodes what is not compressed.
//! Start at [`decode`].

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use super::layer::{Layer, LayerKind};
use super::{Decoded, ReadError, crew};
use crate::units::GuestOffset;

/// Bytes of the guest that are decoded ahead: 16 clusters of the usual size.
const AHEAD_BYTES: u64 = 1 << 20;
/// Runs after which whoever decodes ahead ends for now.
const MOST_AT_ONCE: usize = 256;
/// Who is further ahead of what is decoded for it has gone elsewhere, or reads so much at a time that
/// its own clusters keep all cores busy.
const MOST_BEHIND_BYTES: u64 = 4 << 20;

/// Where a layer's readers are.
#[derive(Debug, Default)]
pub(super) struct Forward {
    /// The guest byte after the last cluster that was decoded for a reader, or ahead.
    next: AtomicU64,
    /// The guest byte after the last cluster that a reader decodes itself.
    passed: AtomicU64,
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
    layer.forward.passed.store(end, Ordering::Relaxed);
    if layer.forward.next.swap(end, Ordering::Relaxed) == start && start > 0 {
        go_on(layer, end);
    }
    layer.decoded(at)
}

/// A reader wants several clusters, up to `end`, of which the first that is not in the cache is around
/// `at`: if it goes forward, those after `end` are begun. How many threads are at that.
pub(super) fn after(layer: &Arc<Layer>, at: GuestOffset, end: u64) -> usize {
    let start = layer.cluster_around(at).map_or(at.0, |(start, _)| start);
    let reached = layer.forward.next.load(Ordering::Relaxed);
    layer.forward.passed.store(end, Ordering::Relaxed);
    // What was decoded ahead of it before, it has not to decode now.
    if start > 0 && (start..=end.saturating_add(AHEAD_BYTES)).contains(&reached) {
        go_on(layer, end);
    } else {
        layer.forward.next.store(end, Ordering::Relaxed);
    }
    usize::from(layer.forward.busy.load(Ordering::Relaxed))
}

/// Has the clusters after `end` decoded on the pool.
fn go_on(layer: &Arc<Layer>, end: u64) {
    // On a thread of the pool nobody waits for bytes to come.
    if layer.arriving().is_some() {
        return;
    }
    let until = end.saturating_add(AHEAD_BYTES).min(layer.size_bytes());
    layer.forward.next.store(until, Ordering::Release);
    if !layer.forward.busy.swap(true, Ordering::AcqRel) {
        let ahead = Arc::clone(layer);
        crew::later(move || follow(&ahead, end));
    }
}

/// Decodes from `at` as far as the reader's being there, and its going on meanwhile, say.
fn follow(layer: &Layer, mut at: u64) {
    let forward = &layer.forward;
    for _ in 0..MOST_AT_ONCE {
        let until = forward.next.load(Ordering::Acquire);
        // What the reader has overtaken, it does not want any more.
        let passed = forward.passed.load(Ordering::Relaxed);
        if (at..until).contains(&passed) {
            at = passed;
        }
        if (at..at.saturating_add(MOST_BEHIND_BYTES)).contains(&until) && at < until {
            at = decode_one(layer, at, until);
            crew::let_others();
            continue;
        }
        forward.busy.store(false, Ordering::Release);
        // Who went on just now has seen that somebody was at it.
        let more = forward.next.load(Ordering::Acquire);
        let goes_on = more != until && at < more && more - at < MOST_BEHIND_BYTES;
        if !goes_on || forward.busy.swap(true, Ordering::AcqRel) {
            return;
        }
    }
    // The reader's next read begins it again, after what others want of the pool.
    forward.busy.store(false, Ordering::Release);
}

/// Decodes the cluster at `at` if it is compressed and not in the cache; where the next one is. Errors
/// are met again by who reads.
fn decode_one(layer: &Layer, at: u64, until: u64) -> u64 {
    let Ok(run) = layer.run_at(GuestOffset(at), until) else { return until };
    if run.kind == LayerKind::Encoded && layer.cached(GuestOffset(at)).is_none() {
        let _met_again_by_the_reader = layer.decode_unless_others_do(GuestOffset(at));
    }
    at + run.len_bytes
}
