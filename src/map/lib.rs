//! All `mmap` of the program, behind safe types.
//!
//! Why: a mapped page serves any number of readers from one page cache, but a page that cannot
//! be read (disk error, file cut short) kills the process that touches it with SIGBUS.
//! How: a mapped image is an address for the kernel: [`send_pieces`] and [`FileMap::populate`]
//! report EFAULT where a load instruction would die; or it is copied from by one guarded routine
//! ([`FileMap::copy_to`]), which ends with an error there. Tables of our own live in a memfd that
//! cannot shrink, and are read as atomics. A guest's memory, which its owner can cut short, is
//! reached by the same guarded routines ([`GuestMemory`]).
//! Never: hands out a `&[u8]` into a mapped file, or maps a file for writing that is not a guest's
//! memory.
//! Start at [`FileMap`], [`send_pieces`], [`SharedTable`] and [`GuestMemory`].

pub mod units;

mod arena;
mod chunks;
mod data;
mod file;
pub mod format;
mod guard;
mod guest;
mod guest_error;
mod protect;
mod resident;
mod send;
mod slab;
mod table;

pub use arena::CHUNK_BYTES;
pub use data::MappedData;
pub use file::{FileMap, KernelSlice};
pub use guard::Copied;
pub use guest::{GuestMemory, GuestRegion, GuestSlice, Unreachable};
pub use guest_error::GuestMemoryError;
pub use protect::read_only;
pub use resident::Resident;
pub use send::{MAX_PIECES, Piece, send_pieces};
pub use slab::{Slab, SlabBuf};
pub use table::{ReadTable, SharedTable};
