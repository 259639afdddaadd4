//! Formats that keep a disk in blocks of one size, found through one table: VMDK, VHD and VHDX.
//!
//! Why: images also come from other hypervisors, and what a reader wants of them is the same.
//! How: one pure parser for each format (`vmdk`, `vhd`, `vhdx`) turns the bytes of [`Parts`] into an
//! [`Image`]: where the entry of each block is, and what it must not overlap. [`BlockMap`] keeps
//! what every block is, filled in from the table page by page as blocks are touched.
//! Never: opens a file that an image names, applies a log, or gives zeroes for bytes that are
//! missing from the file. What needs another file (a parent, a further extent) is refused.
//! Start at [`Image::parse`], [`Layout::judge`] and `BlockMap::run_at`.
//! Formats: VMware "Virtual Disk Format 5.0", Microsoft "Virtual Hard Disk Image Format
//! Specification", and MS-VHDX.
//!
//! The rule: the bytes and the size of `qemu-img convert -O raw`, or a refusal that names the field.

mod crc32c;
mod image;
mod layout;
mod map;
mod parts;
mod vhd;
mod vhdx;
mod vmdk;

pub use image::Image;
pub use layout::{Block, Layout, Page};
pub use map::BlockMap;
pub use parts::{Parts, Want};
pub(in crate::image) use vhd::has_footer as is_vhd_footer;

/// Largest disk that is served: 16 TiB.
const MAX_SIZE_BYTES: u64 = 16 << 40;
/// Blocks of a disk at most: 2 TiB of the 64 KiB that VMDK has, and 256 MiB of memory if all of
/// them are touched.
const MAX_BLOCKS: u64 = 1 << 25;
