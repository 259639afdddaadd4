//! The header as it is stored.
//!
//! Why: offsets written by hand drift; these are checked when compiling.
//! How: big-endian, unaligned fields. Any byte pattern is a valid value of these types.
//! Never: judges a value.
//! Start at [`RawHeader`]. Format: qemu `docs/interop/qcow2.rst`, "Header".

use std::mem::offset_of;

use zerocopy::big_endian::{U16, U32, U64};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout};

/// The first 72 bytes of any QCOW2 file.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
pub(super) struct RawHeader {
    pub(super) magic: U32,
    pub(super) version: U32,
    pub(super) backing_file_offset: U64,
    pub(super) backing_file_size: U32,
    pub(super) cluster_bits: U32,
    pub(super) size: U64,
    pub(super) crypt_method: U32,
    pub(super) l1_size: U32,
    pub(super) l1_table_offset: U64,
    pub(super) refcount_table_offset: U64,
    pub(super) refcount_table_clusters: U32,
    pub(super) nb_snapshots: U32,
    pub(super) snapshots_offset: U64,
}

/// Bytes 72 to 111 of version 3. The last 8 count only if `header_length` reaches past them.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
pub(super) struct RawHeaderV3 {
    pub(super) incompatible_features: U64,
    pub(super) compatible_features: U64,
    pub(super) autoclear_features: U64,
    pub(super) refcount_order: U32,
    pub(super) header_length: U32,
    pub(super) compression_type: u8,
    pub(super) padding: [u8; 7],
}

/// What stands before the data of a header extension.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
pub(super) struct RawExtension {
    pub(super) magic: U32,
    pub(super) len_bytes: U32,
}

/// The data of the bitmaps extension.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
pub(super) struct RawBitmaps {
    pub(super) nb_bitmaps: U32,
    pub(super) reserved: U32,
    pub(super) directory_size: U64,
    pub(super) directory_offset: U64,
}

/// The fixed part of an entry of the bitmap directory; extra data and name follow.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
pub(super) struct RawBitmapEntry {
    pub(super) table_offset: U64,
    pub(super) table_size: U32,
    pub(super) flags: U32,
    pub(super) kind: u8,
    pub(super) granularity_bits: u8,
    pub(super) name_size: U16,
    pub(super) extra_data_size: U32,
}

/// The fixed part of an entry of the snapshot table; extra data, ID and name follow.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
pub(super) struct RawSnapshot {
    pub(super) l1_table_offset: U64,
    pub(super) l1_size: U32,
    pub(super) id_len: U16,
    pub(super) name_len: U16,
    pub(super) date_sec: U32,
    pub(super) date_nsec: U32,
    pub(super) vm_clock_nsec: U64,
    pub(super) vm_state_size: U32,
    pub(super) extra_data_size: U32,
}

/// Length of the version 2 header, after which version 3 goes on.
pub(super) const V2_LEN: usize = size_of::<RawHeader>();
/// Length of the version 3 header without `compression_type`.
pub(super) const V3_MIN_LEN: usize = V2_LEN + offset_of!(RawHeaderV3, compression_type);

const _: () = assert!(V2_LEN == 72 && align_of::<RawHeader>() == 1);
const _: () = assert!(offset_of!(RawHeader, backing_file_offset) == 8);
const _: () = assert!(offset_of!(RawHeader, cluster_bits) == 20);
const _: () = assert!(offset_of!(RawHeader, size) == 24);
const _: () = assert!(offset_of!(RawHeader, l1_table_offset) == 40);
const _: () = assert!(offset_of!(RawHeader, snapshots_offset) == 64);
const _: () = assert!(size_of::<RawHeaderV3>() == 40 && align_of::<RawHeaderV3>() == 1);
const _: () = assert!(V3_MIN_LEN == 104);
const _: () = assert!(V2_LEN + offset_of!(RawHeaderV3, refcount_order) == 96);
const _: () = assert!(size_of::<RawExtension>() == 8 && size_of::<RawBitmaps>() == 24);
const _: () = assert!(size_of::<RawBitmapEntry>() == 24 && align_of::<RawBitmapEntry>() == 1);
const _: () = assert!(offset_of!(RawBitmapEntry, name_size) == 18);
const _: () = assert!(size_of::<RawSnapshot>() == 40 && align_of::<RawSnapshot>() == 1);
const _: () = assert!(offset_of!(RawSnapshot, extra_data_size) == 36);

impl RawHeader {
    /// The header at the start of `bytes`; what is missing reads as zero.
    pub(super) fn read(bytes: &[u8]) -> Self {
        zero_extended(bytes)
    }
}

impl RawHeaderV3 {
    /// The rest of a version 3 header in `bytes`, which begin at the file's byte 0.
    pub(super) fn read(bytes: &[u8]) -> Self {
        zero_extended(bytes.get(V2_LEN..).unwrap_or_default())
    }
}

fn zero_extended<T: FromZeros + IntoBytes + FromBytes + Immutable>(bytes: &[u8]) -> T {
    let mut value = T::new_zeroed();
    for (to, from) in value.as_mut_bytes().iter_mut().zip(bytes) {
        *to = *from;
    }
    value
}
