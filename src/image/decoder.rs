//! Decoders that are kept between clusters, and memory for what they make.
//!
//! Why: setting a decoder up costs as much as decoding a small cluster, and every format with
//! compressed clusters needs the same two things.
//! How: idle decoders wait in a list, at most one for each core; clusters of a size that fills a
//! slot of the slab go there, others (and all, if the slab gets no memory) to the heap.
//! Never: gives a decoder to two threads, or keeps what was decoded.
//! Start at [`decode`].

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;

use super::qcow2::Codec;
use super::{ReadError, crew};
use crate::map::{SharedTable, Slab};

/// Smaller clusters are decoded to the heap: a slot of the slab would be mostly waste.
const MIN_SLAB_BYTES: usize = 4096;

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

/// Where a decoded cluster is put.
#[derive(Clone, Copy, Debug)]
pub struct Room<'a> {
    /// Memory that other processes can read.
    pub slab: Option<&'a Slab>,
    /// The table that tells them of what is there, and the cluster's word in it.
    pub index: Option<(&'a Arc<SharedTable>, u64)>,
}

/// A cluster of `size` bytes as `fill` makes it; the first `visible` of them.
///
/// # Errors
/// Those of `fill`.
pub(super) fn decode(
    room: Room<'_>,
    size: usize,
    visible: usize,
    fill: impl FnOnce(&mut Decoder, &mut [u8]) -> Result<(), ReadError>,
) -> Result<Bytes, ReadError> {
    let mut decoder = idle().pop().unwrap_or_default();
    let slot = room.slab.filter(|_| size >= MIN_SLAB_BYTES).and_then(|slab| slab.take(size).ok());
    let decoded = match slot {
        Some(mut buf) => fill(&mut decoder, buf.bytes_mut()).map(|()| {
            buf.truncate(visible);
            if let Some((table, index)) = room.index {
                buf.publish(table, index);
            }
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
