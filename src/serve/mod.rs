//! Views to readers.
//!
//! Why: one view has many readers, of several kinds, and all must see the same bytes.
//! How: [`Exports`] says which view has which name and who reads it now; each server is a folder
//! that looks names up there. [`Warmth`] keeps what is known about pages in memory, for all.
//! Never: changes a byte of an image, or opens one.
//! Start at [`Exports`], [`nbd::Server`], [`replica::Server`] and [`vhost_user::Server`].

pub mod activation;
pub mod nbd;
pub mod replica;
pub mod vhost_user;

mod acceptor;
mod error;
mod exports;
mod latency;
mod listener;
mod recorder;
mod recordings;
mod socket;
mod stats;
mod warmth;

pub use acceptor::Stopper;
pub use error::ServeError;
pub use exports::{Attachment, Export, Exports};
pub use latency::{Latency, Times, Via};
pub use recorder::{Recorder, Tracing};
pub use recordings::{KEEP_INTERVAL, Recordings};
pub use socket::Socket;
pub use stats::{CounterValues, Counters};

pub use warmth::{Wanted, Warmth};
