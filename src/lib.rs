//! bedplate: brings VM disk images in from URLs, keeps one copy per disk, serves it read-only.
//!
//! A tour, along the way of one byte (ARCHITECTURE.md tells it with every name):
//!
//! 1. [`fetch::transfer()`] brings a source's bytes into pooled buffers, bound to one version of it.
//! 2. [`disk::Writer`] puts them into a [`disk::Filling`] through a [`ring::Sink`], sparse and
//!    durable; [`disk::Filling::seal`] makes a [`disk::Sealed`] of it.
//! 3. [`image::View::open`] gives the sealed file its meaning: [`image::View::run_at`] says what a
//!    guest reads where.
//! 4. [`serve::nbd::Server`] answers readers from [`map::FileMap`].
//!
//! What there should be is decided by [`manager::World`], kept in [`catalog`], asked for through
//! [`control`] (by users of Kubernetes in [`manifest`]s), wired by [`daemon`]; [`cli`] is a client like any other.
//!
//! The parts that others may want by themselves: [`image::qcow2`] (a pure parser and a lock-free
//! cluster map), [`ring`] (sinks), [`serve::nbd`] (a server for any view).

mod ciphers;
pub mod names;
pub mod peer;

#[doc(inline)]
pub use bedplate_map as map;
#[doc(inline)]
pub use bedplate_map::units;
#[doc(inline)]
pub use bedplate_replica as replica;

pub mod catalog;
pub mod cli;
pub mod control;
pub mod daemon;
pub mod disk;
pub mod fetch;
pub mod image;
pub mod import;
pub mod manager;
pub mod manifest;
pub mod ring;
pub mod serve;
