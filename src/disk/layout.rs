//! The files of one copy: their names, and what is written beside a finished one.
//!
//! Why: who fills, finds, checks and removes a copy must mean the same files.
//! Never: touches one.
//! Start at [`FileNames`].

use super::digests::{DigestRecord, Digests};

/// The names of one image's files in their directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileNames {
    /// The finished file.
    pub data: String,
    /// The file while it is filling.
    pub partial: String,
    /// Its presence bits.
    pub presence: String,
    /// What has come of a compressed source, while the file is filling.
    pub spool: String,
    /// Digests of the finished file; `None` to keep none.
    pub digests: Option<String>,
    /// Longhorn's record of the finished file; `None` to keep none.
    pub cfg: Option<String>,
}

impl FileNames {
    /// A copy in the store, with Longhorn's names.
    #[must_use]
    pub fn copy() -> Self {
        Self {
            data: "backing".into(),
            partial: "backing.tmp".into(),
            presence: "backing.presence".into(),
            spool: "backing.spool".into(),
            digests: Some("backing.digests".into()),
            cfg: Some("backing.cfg".into()),
        }
    }

    /// A file that a person asked for by name, outside any store.
    #[must_use]
    pub fn file(name: &str) -> Self {
        Self {
            data: name.into(),
            partial: format!("{name}.bedplate-part"),
            presence: format!("{name}.bedplate-presence"),
            spool: format!("{name}.bedplate-spool"),
            digests: None,
            cfg: None,
        }
    }
}

/// What the store writes beside a sealed copy.
#[derive(Clone, Debug, Default)]
pub struct SealRecord {
    /// The image's uuid.
    pub uuid: String,
    /// Bytes of the disk that a guest sees.
    pub virtual_size_bytes: u64,
    /// Digests of the file.
    pub digests: Digests,
    /// The SHA-512 that the creator asked for, if any.
    pub expected_sha512: Option<String>,
    /// The format that its owner declared, in the caller's own word.
    pub declared: Option<String>,
}

impl SealRecord {
    /// The part that `backing.digests` keeps.
    pub(super) fn digest_record(&self, size_bytes: u64) -> DigestRecord {
        let (declared, digests) = (self.declared.clone(), self.digests.clone());
        DigestRecord { size_bytes, declared, digests }
    }
}
