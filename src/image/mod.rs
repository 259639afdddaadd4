//! What a guest reads: the meaning of a stored file's bytes.
//!
//! Why: a reader wants "the disk from byte 0 on", whatever format the file has, and the bytes of
//! the file come from strangers.
//! How: [`detect`] looks at content, [`inspect`] checks every table before a copy is sealed, and a
//! [`View`] resolves guest ranges to runs (data in a file, zeroes, a compressed cluster) without
//! locks, through an image and the backing files that it was given. Foreign numbers are judged once, where they are decoded, and nowhere after.
//! Never: opens a path that it found inside an image, writes, uses the network, or trusts a length.
//! Start at [`View::open`] and [`inspect`]; the QCOW2 format is in [`qcow2`],
//! VMDK, VHD and VHDX are in [`blocks`].

mod ahead;
mod arrival;
pub mod blocks;
mod crew;
mod decoded;
mod decoder;
mod error;
mod fault;
mod format;
mod governor;
mod info;
mod inspection;
mod layer;
mod memory;
mod prefetch;
pub mod qcow2;
mod raw;
mod source;
mod tally;
mod trace;
mod view;

pub use crate::disk::Waits;
pub use decoded::{Decoded, DecodedCache};
pub use decoder::Room;
pub use error::{Class, ImageError, ReadError};
pub use format::{Format, UnknownFormat, detect};
pub use governor::Bounds;
pub use info::{ClusterCounts, Info, inspect, peek, snapshot_size_bytes};
pub use inspection::{Finding, Inspection, Verdict};
pub use memory::Memory;
pub use source::{LayerFile, Source};
pub use trace::{
    MAX_TRACE_BYTES, MAX_TRACE_RANGES, TRACE_UNIT_BYTES, Trace, TraceError, TraceFile,
};
pub use view::{Handout, MAX_LAYERS, Opening, Run, RunKind, Stored, View};
