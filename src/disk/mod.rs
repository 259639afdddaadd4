//! The store on one disk: layout, sparse writes, presence, seal, adoption.
//!
//! Why: what the engine says it has must be there after `kill -9` and power loss at any moment,
//! and Longhorn must be able to take the files over as they are.
//! How: bytes arrive in a [`Filling`] through a [`Writer`]; the presence file says what of it is
//! durable; sealing turns it into a [`Sealed`], which is served. Who does not wait for that reads it as
//! [`Arriving`]: what has been written, and waits for the rest.
//! Never: talks to a network, or knows what an image's bytes mean.
//! Start at [`Disk::open`], then [`Filling`].

mod arrivals;
mod arriving;
mod cfg;
mod digests;
mod dir;
mod error;
mod filling;
mod foreseen;
mod kinds;
mod layout;
mod page;
mod presence;
mod readback;
mod scrub;
mod sealed;
mod space;
mod spool;
mod spooling;
mod store;
mod writer;

#[cfg(test)]
mod tests;

pub use arrivals::Found;
pub use arriving::{Arriving, GoesOn, Waits};
pub use cfg::{CopyCfg, go_time};
pub use digests::{DigestRecord, Digests, Hasher, xxh3_of, xxh3_of_zero_mib};
pub use dir::Dir;
pub use error::DiskError;
pub use filling::{Filling, SealError};
pub use foreseen::Foreseen;
pub use kinds::{BadDigest, DigestKind, DigestMap, DigestSet};
pub use layout::{FileNames, SealRecord};
pub use page::page_crc;
pub use presence::{MAX_FILE_BYTES, Presence, UNIT_BYTES, Version};
pub use readback::{hash_file, hash_range};
pub use scrub::{Mending, Scrubbed, bytes_of};
pub use sealed::Sealed;
pub use space::{Reservation, Space, Usage};
pub use spool::Spool;
pub use spooling::{SpoolEnd, SpoolReader};
pub use store::{CopyId, CopyRecord, CopyState, Disk};
pub use writer::{Block, BlockSender, Writer, WriterStats, WriterStopped};
