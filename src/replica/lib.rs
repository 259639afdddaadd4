//! Reads a node's base images in the reader's own process.
//!
//! Why: a request to any server costs ten times what reading the block costs, and a base image's
//! readers are many, on the same node as its file.
//! How: [`Replica::attach`] names an image on the engine's socket and is handed the files and the
//! maps ([`bedplate_map::format`]); [`Replica::read_at`] finds a guest's position in the maps and
//! reads the file by itself. Holes are zeroes without a read; what is decoded already is copied from
//! memory that all readers share; only what is not known, not decoded or not there yet is asked for,
//! with one message ([`wire`]). An engine that is started anew is attached to again when it is
//! needed; until then nothing is noticed of it.
//! Never: writes, trusts a number that it was handed, or dies of a file cut short.
//! Start at [`Replica::attach`].
//!
//! ```no_run
//! use bedplate_replica::{Options, Replica};
//! let base = Replica::attach("/var/lib/bedplate/bedplate/replica.sock", "debian-12", Options::default())?;
//! let mut block = [0; 4096];
//! base.read_at(&mut block, 0)?;
//! # Ok::<(), bedplate_replica::ReplicaError>(())
//! ```

mod attached;
#[cfg(feature = "capi")]
mod c;
mod connection;
mod error;
mod extents;
mod layer;
mod replica;
pub mod socket;
pub mod wire;

pub use error::ReplicaError;
pub use extents::{Extent, ExtentKind, Extents};
pub use replica::{Mode, Options, Replica};
