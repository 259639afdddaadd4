//! Why the catalog refused or failed.

use std::path::PathBuf;

/// Why the catalog refused or failed. The message prints every field, and never a record's bytes.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "each field is named in the message above it")]
pub enum CatalogError {
    /// Somebody else changed the record since it was read.
    #[error("{kind} {key:?} is at revision {found:?}, expected {expected}; read it again")]
    Conflict { kind: &'static str, key: String, found: Option<u64>, expected: String },
    /// The key is none.
    #[error("{kind} key {found:?} is not usable: {rule}")]
    BadKey { kind: &'static str, found: String, rule: &'static str },
    /// The record is longer than [`super::MAX_RECORD_LEN`].
    #[error(
        "{kind} {key:?} has {len_bytes} bytes, at most {} are kept; give it fewer mirrors or headers",
        super::MAX_RECORD_LEN
    )]
    TooLong { kind: &'static str, key: String, len_bytes: usize },
    /// A finalizer is to be added to a record that is being deleted.
    #[error("{kind} {key:?} is being deleted; nothing more can hold that up")]
    BeingDeleted { kind: &'static str, key: String },
    /// More than [`super::MAX_FINALIZERS`].
    #[error("{kind} {key:?}: {count} finalizers, there are at most {}", super::MAX_FINALIZERS)]
    TooManyFinalizers { kind: &'static str, key: String, count: usize },
    /// The changes after a revision are not, or not all, kept.
    #[error(
        "changes after revision {since} are not kept, those after {oldest} up to {newest} are: list, and watch from there"
    )]
    Expired { since: u64, oldest: u64, newest: u64 },
    /// Another process has the file open.
    #[error("{}: in use by another daemon; stop it, or give another disk", path.display())]
    Locked { path: PathBuf },
    /// The file can't be opened or created.
    #[error("{}: cannot open the catalog", path.display())]
    Open {
        path: PathBuf,
        #[source]
        source: Box<redb::Error>,
    },
    /// The file can't be created with its mode, or its directory can't be made durable.
    #[error("{}: cannot {op}", path.display())]
    File {
        op: &'static str,
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    /// A transaction failed: nothing of it was kept.
    #[error("{}: cannot {op}", path.display())]
    Store {
        op: &'static str,
        path: PathBuf,
        #[source]
        source: Box<redb::Error>,
    },
    /// A record is shorter than its own revision.
    #[error("{}: {kind} {key:?} is damaged ({len_bytes} bytes)", path.display())]
    Damaged { path: PathBuf, kind: &'static str, key: String, len_bytes: usize },
    /// A record that isn't the JSON it should be. Line and column only: the text may be a secret.
    #[error("{kind} {key:?} does not read: {category} at line {line} column {column}")]
    Decode { kind: &'static str, key: String, category: &'static str, line: usize, column: usize },
    /// A record that can't be written as JSON.
    #[error("{kind} {key:?} cannot be written as JSON")]
    Encode {
        kind: &'static str,
        key: String,
        #[source]
        source: serde_json::Error,
    },
}

impl CatalogError {
    pub(super) fn decode(kind: &'static str, key: &str, error: &serde_json::Error) -> Self {
        let category = match error.classify() {
            serde_json::error::Category::Io => "input error",
            serde_json::error::Category::Syntax => "no JSON",
            serde_json::error::Category::Data => "a field is missing or of the wrong type",
            serde_json::error::Category::Eof => "it ends too early",
        };
        let (line, column) = (error.line(), error.column());
        Self::Decode { kind, key: key.to_owned(), category, line, column }
    }
}
