//! The store on one disk.

mod error;
mod sealed;

pub use error::DiskError;
pub use sealed::Sealed;
