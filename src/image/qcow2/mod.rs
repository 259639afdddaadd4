//! The QCOW2 format, versions 2 and 3, read-only.
//!
//! Why: most images come as QCOW2, from strangers; qemu's own reader is a process away and trusts
//! reads past the end of the file to be zeroes.
//! How: `header` and `entry` turn bytes into types that cannot lie, `codec` decodes one cluster:
//! all three pure (no file, no clock). [`Image`] reads header and L1, [`ClusterMap`] keeps what
//! every guest cluster is, in shared memory, filled from one L2 table at a time.
//! Never: opens a backing or data file (what an image needs beside itself, the caller has and
//! gives), reads refcounts, or gives zeroes for bytes that are missing from the file.
//! Start at [`Header::parse`], [`decode_l2`] and `ClusterMap::run_at`.
//! Format: qemu `docs/interop/qcow2.rst`.
//!
//! The rule: the bytes of `qemu-img convert -O raw` on every image that `qemu-img check` calls
//! clean; an error where qemu would take bytes past the end of the file for zeroes, or where a
//! limit of this reader is passed. Odd and harmless (dirty bit, reserved bits) is read and noted.
//!
//! # The parsers alone
//!
//! Nothing here needs a file: bytes from anywhere are judged, and what comes out cannot lie.
//!
//! ```
//! use bedplate::image::qcow2::{Cluster, Given, Header, Image};
//!
//! # fn bytes() -> Vec<u8> {
//! #     let mut file = vec![0; 5 << 16];
//! #     let mut put = |at: usize, bytes: &[u8]| file[at..at + bytes.len()].copy_from_slice(bytes);
//! #     put(0, b"QFI\xfb\0\0\0\x03");
//! #     put(20, &16_u32.to_be_bytes());
//! #     put(24, &(3_u64 << 16).to_be_bytes());
//! #     put(36, &1_u32.to_be_bytes());
//! #     put(40, &0x2_0000_u64.to_be_bytes());
//! #     put(48, &0x1_0000_u64.to_be_bytes());
//! #     put(56, &1_u32.to_be_bytes());
//! #     put(96, &4_u32.to_be_bytes());
//! #     put(100, &104_u32.to_be_bytes());
//! #     put(0x2_0000, &0x3_0000_u64.to_be_bytes());
//! #     put(0x3_0000, &0x4_0000_u64.to_be_bytes());
//! #     file
//! # }
//! let file: Vec<u8> = bytes();
//! let part = |range: std::ops::Range<u64>| &file[range.start as usize..range.end as usize];
//! let header = Header::parse(part(0..65_536), file.len() as u64, Given::default()).unwrap();
//! let l1 = part(header.l1_needed());
//! let image = Image::from_l1(header.clone(), file.len() as u64, l1, "disk.qcow2".as_ref())?;
//! let mut stored = Vec::new();
//! for table in image.tables() {
//!     let Some(range) = table.stored.clone() else { continue };
//!     image.decode_table(&table, part(range), "disk.qcow2".as_ref(), &mut |units, meaning| {
//!         if let Cluster::Data(at) = meaning {
//!             stored.push((units.start << header.unit_bits(), at.0));
//!         }
//!     })?;
//! }
//! assert_eq!(stored, [(0, 0x4_0000)], "guest byte 0 is at byte 0x40000 of the file");
//! # Ok::<_, bedplate::image::ImageError>(())
//! ```

mod bitmaps;
mod check;
mod clusters;
mod codec;
mod entry;
mod extension;
mod header;
mod open;
mod places;
mod raw;
mod snapshot;
mod table;
mod word;

pub use super::fault::{EntryFault, Fault, FaultKind};
pub use super::tally::Tally;
pub use bitmaps::{BitmapDirectory, Bitmaps};
pub use check::L2Table;
pub use clusters::ClusterMap;
pub use codec::{Codec, CodecFault};
pub use entry::{
    Cluster, Extended, Limits, Packed, Subclusters, decode_extended_l2, decode_l1, decode_l2,
};
pub use extension::BackingFormat;
pub use header::{ClusterBits, Compression, Given, Header};
pub use open::{Image, Terms};
pub use places::L2Tables;
pub use snapshot::Snapshot;
