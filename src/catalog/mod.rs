//! The manager's records, durable, behind one small trait.
//!
//! Why: what a user asked for must survive any crash, and the same manager must later run on
//! Kubernetes objects: so it sees a few calls, not a database.
//! How: a record is JSON under a kind and a key, with a revision that compare-and-set is based on.
//! [`Embedded`] keeps all of them in one redb file; a change is on the disk when the call returns.
//! The suite in `tests.rs` is what every implementation passes.
//! Never: knows why a record changes, or what is in it. Never prints a record: it may hold a
//! credential.
//! Start at [`Catalog`].

mod embedded;
mod error;
#[cfg(test)]
mod tests;

use serde::Serialize;
use serde::de::DeserializeOwned;

pub use embedded::Embedded;
pub use error::CatalogError;

/// What sort of record.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// An image.
    Image,
    /// An attachment.
    Attachment,
    /// A setting of this node.
    Setting,
    /// A volume.
    Volume,
    /// A storage class.
    Class,
    /// A disk of this node.
    Disk,
}

impl Kind {
    /// Every kind.
    pub const ALL: [Self; 6] =
        [Self::Image, Self::Attachment, Self::Setting, Self::Volume, Self::Class, Self::Disk];

    /// The word for messages, and the table's name.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Image => "image",
            Self::Attachment => "attachment",
            Self::Setting => "setting",
            Self::Volume => "volume",
            Self::Class => "class",
            Self::Disk => "disk",
        }
    }
}

/// Which version of a record. Grows with every change in a catalog; never used twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Revision(pub u64);

/// What a change expects to find.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Expect {
    /// No record yet.
    Absent,
    /// Exactly this version.
    At(Revision),
    /// Anything, also nothing.
    Any,
}

/// A record as stored. Its `Debug` shows the length, not the bytes.
#[derive(Clone, PartialEq, Eq)]
pub struct Stored {
    /// Its version.
    pub revision: Revision,
    /// Its JSON text.
    pub json: Vec<u8>,
}

impl std::fmt::Debug for Stored {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Stored {{ revision: {}, {} bytes }}", self.revision.0, self.json.len())
    }
}

/// Durable records. Every call may block on the disk.
pub trait Catalog: Send + Sync + 'static {
    /// The record under `key`, or `None`.
    ///
    /// # Errors
    /// [`CatalogError`] if the store can't be read.
    fn get(&self, kind: Kind, key: &str) -> Result<Option<Stored>, CatalogError>;

    /// All records of a kind, by key in byte order.
    ///
    /// # Errors
    /// [`CatalogError`] if the store can't be read.
    fn list(&self, kind: Kind) -> Result<Vec<(String, Stored)>, CatalogError>;

    /// Stores a record if what is there is what `expect` says. Durable when it returns.
    ///
    /// # Errors
    /// [`CatalogError::Conflict`] if it isn't; others if the store can't be written, and then the
    /// old record stands.
    fn put(
        &self,
        kind: Kind,
        key: &str,
        json: &[u8],
        expect: Expect,
    ) -> Result<Revision, CatalogError>;

    /// Removes a record if what is there is what `expect` says. Durable when it returns. Removing
    /// nothing with [`Expect::Any`] is no error.
    ///
    /// # Errors
    /// As [`Catalog::put`].
    fn delete(&self, kind: Kind, key: &str, expect: Expect) -> Result<(), CatalogError>;
}

/// Stores `record` as JSON.
///
/// # Errors
/// As [`Catalog::put`].
pub fn put_as<T: Serialize>(
    catalog: &dyn Catalog,
    kind: Kind,
    key: &str,
    record: &T,
    expect: Expect,
) -> Result<Revision, CatalogError> {
    let json = serde_json::to_vec(record).map_err(|source| CatalogError::Encode {
        kind: kind.as_str(),
        key: key.into(),
        source,
    })?;
    catalog.put(kind, key, &json, expect)
}

/// All records of a kind, decoded.
///
/// # Errors
/// [`CatalogError::Decode`] for a record that doesn't read: starting without it could remove its
/// files, so the caller refuses to start.
pub fn list_as<T: DeserializeOwned>(
    catalog: &dyn Catalog,
    kind: Kind,
) -> Result<Vec<(T, Revision)>, CatalogError> {
    let decode = |(key, stored): (String, Stored)| match serde_json::from_slice(&stored.json) {
        Ok(record) => Ok((record, stored.revision)),
        Err(e) => Err(CatalogError::decode(kind.as_str(), &key, &e)),
    };
    catalog.list(kind)?.into_iter().map(decode).collect()
}
