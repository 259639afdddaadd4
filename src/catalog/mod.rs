//! The manager's records, durable, behind one small trait.
//!
//! Why: what a user asked for must survive any crash, and the same manager must later run on
//! Kubernetes objects: so it sees a few calls, not a database.
//! How: a record is JSON under a kind and a key, with a revision that compare-and-set is based on. Beside
//! what is wanted (its spec) it may have a status, which is written apart, and finalizers, which hold its
//! removal up until what they stand for is done.
//! [`Embedded`] keeps all of them in one redb file; a change is on the disk when the call returns.
//! Who wants to follow lists, and watches from the list's revision ([`Watch`]). The suite in `tests/`
//! is what every implementation passes.
//! Never: knows why a record changes, or what is in it. Never prints a record: it may hold a
//! credential.
//! Start at [`Catalog`].

mod change;
mod embedded;
mod error;
mod log;
#[cfg(test)]
mod tests;
mod watch;

use std::collections::BTreeSet;

use serde::Serialize;
use serde::de::DeserializeOwned;

pub use embedded::Embedded;
pub use error::CatalogError;
pub use watch::Watch;

/// Longest key in bytes: that of a DNS subdomain.
pub const MAX_KEY_LEN: usize = 253;
/// Longest record in bytes: what Kubernetes' own store takes.
pub const MAX_RECORD_LEN: usize = 1 << 20;
/// Changes that are kept for watchers; who is further behind has to list again.
pub const KEPT_CHANGES: u64 = 4096;

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

    fn parse(text: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.as_str() == text)
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

/// Finalizers that a record may have.
pub const MAX_FINALIZERS: usize = 16;

/// A record as stored. Its `Debug` shows lengths, not the bytes.
#[derive(Clone, PartialEq, Eq)]
pub struct Stored {
    /// Its version: of spec, status and finalizers together.
    pub revision: Revision,
    /// Its spec, a JSON text: what is wanted.
    pub json: Vec<u8>,
    /// Its status, a JSON text: what was found out.
    pub status: Option<Vec<u8>>,
    /// What has to be done before it can go, by names like keys.
    pub finalizers: BTreeSet<String>,
    /// It goes with its last finalizer.
    pub deleting: bool,
}

impl Stored {
    /// A record of a spec alone.
    #[must_use]
    pub fn new(revision: Revision, json: Vec<u8>) -> Self {
        Self { revision, json, status: None, finalizers: BTreeSet::new(), deleting: false }
    }
}

impl std::fmt::Debug for Stored {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { revision, json, status, finalizers, deleting } = self;
        f.debug_struct("Stored")
            .field("revision", &revision.0)
            .field("json_bytes", &json.len())
            .field("status_bytes", &status.as_ref().map(Vec::len))
            .field("finalizers", finalizers)
            .field("deleting", deleting)
            .finish()
    }
}

/// All records of a kind at one moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listing {
    /// The catalog's last change, of whatever kind, at that moment: a watch from here on sees all that
    /// comes after it. `Revision(0)` before the first.
    pub revision: Revision,
    /// By key in byte order.
    pub records: Vec<(String, Stored)>,
}

/// One change of one record: which, not what. Whoever wants the record gets it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Change {
    /// The revision that the change was given.
    pub revision: Revision,
    /// Kind of the record.
    pub kind: Kind,
    /// Key of the record.
    pub key: String,
    /// True if the record was removed.
    pub deleted: bool,
}

/// What is to become of a record. Its `Debug` shows lengths, not the bytes.
#[derive(Clone, PartialEq, Eq)]
pub enum What {
    /// It has this spec, a JSON text; its status and its finalizers stay. Makes the record.
    Spec(Vec<u8>),
    /// It has this status, a JSON text; its spec stays.
    Status(Vec<u8>),
    /// It has these finalizers. Of one that is being deleted none can be added, and it goes with the last.
    Finalizers(BTreeSet<String>),
    /// It goes: at once, or, while it has finalizers, with the last of them.
    Delete,
}

impl std::fmt::Debug for What {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Spec(json) => write!(f, "Spec({} bytes)", json.len()),
            Self::Status(json) => write!(f, "Status({} bytes)", json.len()),
            Self::Finalizers(names) => write!(f, "Finalizers({names:?})"),
            Self::Delete => f.write_str("Delete"),
        }
    }
}

/// One of several changes that are made together.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Write {
    /// Kind of the record.
    pub kind: Kind,
    /// Its key.
    pub key: String,
    /// What is to become of it.
    pub what: What,
    /// What has to be there before.
    pub expect: Expect,
}

/// Durable records. Every call may block on the disk.
pub trait Catalog: Send + Sync + 'static {
    /// The record under `key`, or `None`.
    ///
    /// # Errors
    /// [`CatalogError::BadKey`]; others if the store can't be read.
    fn get(&self, kind: Kind, key: &str) -> Result<Option<Stored>, CatalogError>;

    /// All records of a kind, as they are at one moment.
    ///
    /// # Errors
    /// [`CatalogError`] if the store can't be read.
    fn list(&self, kind: Kind) -> Result<Listing, CatalogError>;

    /// Makes these changes in their order, all of them or none, each if what is there is what it
    /// expects; what the ones before it have made is there. Durable when it returns. Gives the revision
    /// of each: of one that removes nothing, which is no change, the catalog's last.
    ///
    /// # Errors
    /// [`CatalogError::Conflict`] if something else is there, or nothing for a status or finalizers;
    /// [`CatalogError::BeingDeleted`] for a finalizer more; [`CatalogError::BadKey`],
    /// [`CatalogError::TooLong`], [`CatalogError::TooManyFinalizers`]; others if the store can't be
    /// written. Then all is as before.
    fn write(&self, changes: &[Write]) -> Result<Vec<Revision>, CatalogError>;

    /// Stores a record's spec if what is there is what `expect` says. Durable when it returns.
    ///
    /// # Errors
    /// As [`Catalog::write`].
    fn put(
        &self,
        kind: Kind,
        key: &str,
        json: &[u8],
        expect: Expect,
    ) -> Result<Revision, CatalogError> {
        let (key, what) = (key.to_owned(), What::Spec(json.to_vec()));
        let made = self.write(&[Write { kind, key, what, expect }])?;
        Ok(made.into_iter().next().unwrap_or(Revision(0)))
    }

    /// Removes a record if what is there is what `expect` says, as soon as it has no finalizers. Durable
    /// when it returns. Removing nothing with [`Expect::Any`] is no error, and no change.
    ///
    /// # Errors
    /// As [`Catalog::write`].
    fn delete(&self, kind: Kind, key: &str, expect: Expect) -> Result<(), CatalogError> {
        let (key, what) = (key.to_owned(), What::Delete);
        self.write(&[Write { kind, key, what, expect }]).map(|_| ())
    }

    /// The changes of all kinds after `since`, each once, in the order of their revisions: the first
    /// `most` of them. None if there are none yet.
    ///
    /// # Errors
    /// [`CatalogError::Expired`] if they are not kept any more (list, and go on from there), or if
    /// `since` is not of this catalog's past; others if the store can't be read.
    fn changes(&self, since: Revision, most: usize) -> Result<Vec<Change>, CatalogError>;

    /// Tells the last revision, and each new one, to whoever waits: see [`Watch`].
    fn head(&self) -> tokio::sync::watch::Receiver<Revision>;
}

/// What every implementation asks of a key: `a-z A-Z 0-9 . _ -`, a letter or digit first and last, no
/// two dots in a row. So it can be a name of Kubernetes', a file's or a URL's.
fn check_key(kind: Kind, key: &str) -> Result<(), CatalogError> {
    let bad = |rule| {
        let found = key.chars().take(80).collect();
        Err(CatalogError::BadKey { kind: kind.as_str(), found, rule })
    };
    let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-');
    let ends = |b: Option<&u8>| b.is_some_and(u8::is_ascii_alphanumeric);
    if key.is_empty() || key.len() > MAX_KEY_LEN {
        return bad("a key has 1 to 253 bytes");
    }
    if !key.bytes().all(plain) {
        return bad("a key has only a-z, A-Z, 0-9, '.', '_' and '-'");
    }
    if !ends(key.as_bytes().first()) || !ends(key.as_bytes().last()) || key.contains("..") {
        return bad("a key begins and ends with a letter or digit and has no '..'");
    }
    Ok(())
}

fn check_write(write: &Write) -> Result<(), CatalogError> {
    check_key(write.kind, &write.key)?;
    let kind = write.kind.as_str();
    match &write.what {
        What::Spec(json) | What::Status(json) if json.len() > MAX_RECORD_LEN => {
            Err(CatalogError::TooLong { kind, key: write.key.clone(), len_bytes: json.len() })
        }
        What::Finalizers(names) if names.len() > MAX_FINALIZERS => {
            let (key, count) = (write.key.clone(), names.len());
            Err(CatalogError::TooManyFinalizers { kind, key, count })
        }
        What::Finalizers(names) => names.iter().try_for_each(|name| check_key(write.kind, name)),
        What::Spec(_) | What::Status(_) | What::Delete => Ok(()),
    }
}

/// Compare-and-set: an error unless what is there is what was expected.
fn check_expected(
    kind: Kind,
    key: &str,
    found: Option<Revision>,
    expect: Expect,
) -> Result<(), CatalogError> {
    let ok = match expect {
        Expect::Any => true,
        Expect::Absent => found.is_none(),
        Expect::At(revision) => found == Some(revision),
    };
    if ok {
        return Ok(());
    }
    let expected = match expect {
        Expect::Any => "anything".to_owned(),
        Expect::Absent => "none".to_owned(),
        Expect::At(revision) => format!("revision {}", revision.0),
    };
    Err(conflict(kind, key, found, expected))
}

fn conflict(kind: Kind, key: &str, found: Option<Revision>, expected: String) -> CatalogError {
    let found = found.map(|revision| revision.0);
    CatalogError::Conflict { kind: kind.as_str(), key: key.to_owned(), found, expected }
}

/// `record` as JSON.
///
/// # Errors
/// [`CatalogError::Encode`].
pub fn encode<T: Serialize>(kind: Kind, key: &str, record: &T) -> Result<Vec<u8>, CatalogError> {
    serde_json::to_vec(record).map_err(|source| CatalogError::Encode {
        kind: kind.as_str(),
        key: key.into(),
        source,
    })
}

/// `json`, decoded.
///
/// # Errors
/// [`CatalogError::Decode`] for a record that doesn't read: starting without it could remove its
/// files, so the caller refuses to start.
pub fn decode<T: DeserializeOwned>(kind: Kind, key: &str, json: &[u8]) -> Result<T, CatalogError> {
    serde_json::from_slice(json).map_err(|error| CatalogError::decode(kind.as_str(), key, &error))
}

/// The specs of all records of a kind, decoded.
///
/// # Errors
/// As [`decode`].
pub fn list_as<T: DeserializeOwned>(
    catalog: &dyn Catalog,
    kind: Kind,
) -> Result<Vec<(T, Stored)>, CatalogError> {
    let one = |(key, stored): (String, Stored)| Ok((decode(kind, &key, &stored.json)?, stored));
    catalog.list(kind)?.records.into_iter().map(one).collect()
}
