//! The QCOW2 format, versions 2 and 3, read-only.
//!
//! Why: most images come as QCOW2, from strangers; qemu's own reader is a process away and trusts
//! reads past the end of the file to be zeroes.
//! How: `header` and `entry` turn bytes into types that cannot lie, `codec` decodes one cluster:
//! all three pure (no file, no clock). [`Image`] reads header and L1, [`ClusterMap`] keeps what
//! every guest cluster is, in shared memory, filled from one L2 table at a time.
//! Never: opens a backing or data file (what an image needs beside itself, the caller has and
//! gives), reads refcounts, or gives zeroes for bytes that are missing from the file.
//! Start at [`Header::parse`], [`decode_l2`] and [`ClusterMap::run_at`].
//! Format: qemu `docs/interop/qcow2.rst`.
//!
//! The rule: the bytes of `qemu-img convert -O raw` on every image that `qemu-img check` calls
//! clean; an error where qemu would take bytes past the end of the file for zeroes, or where a
//! limit of this reader is passed. Odd and harmless (dirty bit, reserved bits) is read and noted.

mod check;
mod clusters;
mod codec;
mod entry;
mod extension;
mod fault;
mod header;
mod open;
mod raw;
mod snapshot;
mod table;
mod word;

pub use check::{L2Table, Tally};
pub use clusters::ClusterMap;
pub use codec::{Codec, CodecFault};
pub use entry::{
    Cluster, Extended, Limits, Packed, Subclusters, decode_extended_l2, decode_l1, decode_l2,
};
pub use extension::BackingFormat;
pub use fault::{EntryFault, Fault, FaultKind};
pub use header::{ClusterBits, Compression, Given, Header};
pub use open::{Image, Terms};
pub use snapshot::Snapshot;
