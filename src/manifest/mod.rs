//! Manifests: what users of Kubernetes and Longhorn write, read into plain values.
//!
//! Why: who moves from Longhorn has StorageClasses, claims and backups, and wants to use them as
//! they are.
//! How: pure: text in, values or an error that names document and line out.
//! Never: acts, or repeats a credential in an error.
//! Start at [`read`], or [`Backup::parse`].

mod backup;
mod class;
mod document;
mod error;
mod quantity;
#[cfg(test)]
mod tests;

pub use backup::{Backup, BadBackup};
pub use class::Class;
pub use document::{
    Claim, Document, Image, ImageSource, MAX_DOCUMENTS, Object, Selectors, Volume, read,
};
pub use error::{Fault, ManifestError};
pub use quantity::{BadQuantity, parse_quantity};
