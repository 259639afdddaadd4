//! Why a manifest is refused.

/// Why a manifest is refused: which document, where it begins or breaks, and what to do. A URL is
/// never repeated.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("document {document} (line {line}): {fault}")]
pub struct ManifestError {
    /// Which document, from 1.
    pub document: u64,
    /// The line where it begins or, if the text itself is wrong, where; from 1.
    pub line: u64,
    /// What is wrong.
    pub fault: Fault,
}

/// What is wrong with one document.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[expect(missing_docs, reason = "each field is named in the message above it")]
pub enum Fault {
    /// The text is no YAML, or more than a manifest may be.
    #[error("{what}")]
    Yaml { what: String },
    /// Nothing that is known.
    #[error(
        "{kind} of {api:?} is not known; give a StorageClass, a ConfigMap with storageclass.yaml, a \
         PersistentVolumeClaim, or Longhorn's BackingImage or Volume"
    )]
    Kind { kind: String, api: String },
    /// A field is missing or wrong.
    #[error("{kind} {name}: {field}: {why}")]
    Field { kind: &'static str, name: String, field: String, why: String },
    /// Too many documents.
    #[error("more than {most} documents; apply them in parts")]
    TooMany { most: usize },
    /// No document at all.
    #[error("the manifest is empty")]
    Empty,
}
