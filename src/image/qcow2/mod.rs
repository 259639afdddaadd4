//! The QCOW2 format, versions 2 and 3, read-only.
//!
//! Why: most images come as QCOW2, from strangers; qemu's own reader is a process away and trusts
//! reads past the end of the file to be zeroes.
//! How: `header` and `entry` turn bytes into types that cannot lie, `codec` decodes one cluster:
//! all three pure (no file, no clock). [`Image`] reads header and L1, [`ClusterMap`] keeps what
//! every guest cluster is, in shared memory, filled from one L2 table at a time.
//! Never: opens a backing or data file (what an image needs beside itself, the caller has and
//! gives), needs refcounts to read, or gives zeroes for bytes that are missing from the file.
//! Start at [`Header::parse`], [`decode_l2`] and `ClusterMap::run_at`.
//! Format: qemu `docs/interop/qcow2.rst`.
//!
//! The rule: the bytes of `qemu-img convert -O raw` on every image that `qemu-img check` calls
//! clean; an error where qemu would take bytes past the end of the file for zeroes, or where a
//! limit of this reader is passed. Odd and harmless (dirty bit, reserved bits) is read and noted.
//!
//! # The parsers alone
//!
//! Nothing here needs a file: bytes come from a disk, from ranges of a URL or from a fuzzer, and what
//! comes out cannot lie. An image is read in four steps, and each says which bytes it wants:
//!
//! 1. [`Header::parse`] wants the first [`Header::wanted_len`] bytes.
//! 2. [`Bitmaps`] wants what qemu reads when it opens an image, if there are any.
//! 3. [`Image::from_l1`] wants [`Header::l1_needed`].
//! 4. [`Image::decode_table`] wants [`L2Table::stored`] of each of [`Image::tables`].
//!
//! What is wrong is a [`Fault`]: the field's name, its place, its value, and what it should be.
//!
//! ```
//! use bedplate::image::qcow2::{Bitmaps, Cluster, Codec, Given, Header, Image, Packed};
//!
//! # fn bytes() -> Vec<u8> {
//! #     let mut file = vec![0; 7 << 9];
//! #     let mut put = |at: usize, bytes: &[u8]| file[at..at + bytes.len()].copy_from_slice(bytes);
//! #     put(0, b"QFI\xfb\0\0\0\x03");
//! #     put(20, &9_u32.to_be_bytes());
//! #     put(24, &(3_u64 << 9).to_be_bytes());
//! #     put(36, &1_u32.to_be_bytes());
//! #     put(40, &0x400_u64.to_be_bytes());
//! #     put(48, &0x200_u64.to_be_bytes());
//! #     put(56, &1_u32.to_be_bytes());
//! #     put(96, &4_u32.to_be_bytes());
//! #     put(100, &104_u32.to_be_bytes());
//! #     put(0x400, &0x600_u64.to_be_bytes());
//! #     put(0x600, &0x800_u64.to_be_bytes());
//! #     put(0x608, &(1_u64 << 62 | 1 << 61 | 0xa00).to_be_bytes());
//! #     put(0x800, &[b'a'; 512]);
//! #     put(0xa00, &[1, 0x00, 0x02, 0xff, 0xfd]);
//! #     put(0xa05, &[b'b'; 512]);
//! #     file
//! # }
//! let file: Vec<u8> = bytes();
//! let len = file.len() as u64;
//! let part = |range: std::ops::Range<u64>| &file[range.start as usize..range.end as usize];
//!
//! let first = &file[..Header::wanted_len(&file)];
//! let header = Header::parse(first, len, Given::default())?;
//! let mut bitmaps = Bitmaps::of(&header, len);
//! while let Some(range) = bitmaps.wanted() {
//!     bitmaps.take(part(range))?;
//! }
//! let image = Image::from_l1(header.clone(), len, part(header.l1_needed()))?;
//!
//! // The whole disk, in whole clusters: what is not stored is zero.
//! let mut disk = vec![0; (header.clusters() << header.cluster_bits.get()) as usize];
//! let mut codec = Codec::new();
//! for table in image.tables() {
//!     let Some(stored) = table.stored.clone() else { continue };
//!     let mut runs = Vec::new();
//!     image.decode_table(&table, part(stored), &mut |units, meaning| runs.push((units, meaning)))?;
//!     for (units, meaning) in runs {
//!         let bytes = units.start << header.unit_bits()..units.end << header.unit_bits();
//!         let to = &mut disk[bytes.start as usize..bytes.end as usize];
//!         match meaning {
//!             Cluster::Data(at) => to.copy_from_slice(part(at.0..at.0 + to.len() as u64)),
//!             Cluster::Compressed(Packed { at, len_bytes }) => {
//!                 codec.decode(header.compression, part(at.0..at.0 + len_bytes), to)?;
//!             }
//!             Cluster::Zero | Cluster::Unallocated => {}
//!         }
//!     }
//! }
//! disk.truncate(header.size_bytes as usize);
//! assert_eq!(disk, [[b'a'; 512], [b'b'; 512], [0; 512]].concat());
//! # Ok::<_, Box<dyn std::error::Error>>(())
//! ```
//!
//! # What is wrong with an image
//!
//! [`Image::tally`] judges every entry and goes on behind a damaged one. Faults are what no reader may
//! believe; oddities change no byte of the disk, as where a bitmap lies on data ([`Upkeep`]).
//!
//! ```
//! use bedplate::image::qcow2::{Given, Header};
//!
//! let mut first = vec![0; 512];
//! first[..8].copy_from_slice(b"QFI\xfb\0\0\0\x09");
//! let fault = Header::parse(&first, 512, Given::default()).unwrap_err();
//! assert_eq!((fault.field, fault.at.0, fault.found, fault.need), ("version", 4, 9, "2 or 3"));
//! assert_eq!(fault.to_string(), "version at byte 0x4 is 0x9, need 2 or 3");
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
mod upkeep;
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
pub use upkeep::{Upkeep, UpkeepPlaces};
