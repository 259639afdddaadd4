//! Decoders that are kept between clusters, and memory for what they make.
//!
//! Why: setting a decoder up costs as much as decoding a small cluster, and every format with
//! compressed clusters needs the same two things.
//! How: idle decoders wait in a list, at most one for each core; clusters of a size that fills a
//! slot of the slab go there, others (and all, if the slab gets no memory) to the heap.
//! Never: gives a decoder to two threads, or keeps what was decoded.
//! Start at [`decode`].

use std::sync::{Mutex, MutexGuard, PoisonError};

use bytes::Bytes;

use super::qcow2::Codec;
use super::{ReadError, crew};
use crate::map::Slab;

/// Smaller clusters are decoded to the heap: a slot of the slab would be mostly waste.
const MIN_SLAB_BYTES: usize = 32 * 1024;

/// A [`Codec`] and the buffer for its input.
#[derive(Debug, Default)]
pub(super) struct Decoder {
    pub(super) codec: Codec,
    pub(super) stored: Vec<u8>,
}

/// Decoders that nobody uses just now.
static IDLE: Mutex<Vec<Decoder>> = Mutex::new(Vec::new());

fn idle() -> MutexGuard<'static, Vec<Decoder>> {
    IDLE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A cluster of `size` bytes as `fill` makes it; the first `visible` of them.
///
/// # Errors
/// Those of `fill`.
pub(super) fn decode(
    slab: &Slab,
    size: usize,
    visible: usize,
    fill: impl FnOnce(&mut Decoder, &mut [u8]) -> Result<(), ReadError>,
) -> Result<Bytes, ReadError> {
    let mut decoder = idle().pop().unwrap_or_default();
    let slot = (size >= MIN_SLAB_BYTES).then(|| slab.take(size).ok()).flatten();
    let decoded = match slot {
        Some(mut buf) => fill(&mut decoder, buf.bytes_mut()).map(|()| {
            buf.truncate(visible);
            Bytes::from_owner(buf)
        }),
        None => {
            let mut bytes = vec![0; size];
            fill(&mut decoder, &mut bytes).map(|()| {
                bytes.truncate(visible);
                bytes.into()
            })
        }
    };
    let mut idle = idle();
    if idle.len() < crew::cores() {
        idle.push(decoder);
    }
    decoded
}
