//! The wire type of an image that is to be made known.
//!
//! Why: it is the longest request, and the only one that may hold credentials.
//! Never: shows them: its `Debug` has the name alone.

use serde::{Deserialize, Serialize};

use crate::fetch::Access;

/// Body of `POST /v1/images`. Its `Debug` shows no URL.
#[derive(Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CreateImage {
    /// Its name; default: made of the URL's last part.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// http, https, s3, file or NBD URL; may hold credentials. One of this, `upload_bytes` and `clone_of`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub url: Option<String>,
    /// The file is uploaded, and has so many bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub upload_bytes: Option<u64>,
    /// Name of the image that it is a clone of, which must be known: its bytes are those of a complete
    /// copy of it on this node, and format and base are its too.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub clone_of: Option<String>,
    /// Where the same bytes are too; used if a digest is given, at the same time as the URL and in
    /// its place.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub mirrors: Vec<String>,
    /// What it takes to reach it: credentials, certificates, a proxy.
    #[serde(default, skip_serializing_if = "Access::is_empty")]
    pub access: Access,
    /// Digest that the file must have.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sha256: Option<String>,
    /// Digest that the file must have.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sha512: Option<String>,
    /// Digest that the file must have.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sha1: Option<String>,
    /// Digest that the file must have.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub md5: Option<String>,
    /// Digest that the file must have.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub blake3: Option<String>,
    /// URL of a file of digests that has the file's, as a vendor's SHA256SUMS.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub checksum_url: Option<String>,
    /// `raw`, `qcow2`, `vmdk`, `vhd` or `vhdx`; default: look, of an NBD export
    /// `raw`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub format: Option<String>,
    /// `as-is` (default), or `raw`: a QCOW2 source is expanded as it arrives.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub layout: Option<String>,
    /// Name of the image that it stands on, which must be known: its backing file. The name that
    /// the file itself has for it is not looked at.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base: Option<String>,
    /// Name of the image whose file is its external data file, which must be known. The name that the
    /// file itself has for it is not looked at.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub data_file: Option<String>,
    /// Readers get the disk as it was at this internal snapshot, by ID or name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub snapshot: Option<String>,
    /// Copies that it is to have, and that stay although nobody uses them; default 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub min_copies: Option<u32>,
    /// Tags that a disk must have for it; default: any disk will do.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub disk_selector: Vec<String>,
    /// Tags that the node must have.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub node_selector: Vec<String>,
    /// Disks on which to bring it in at once; default none.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub disks: Vec<String>,
}

impl CreateImage {
    /// A clone of `image`, with nothing else said.
    #[must_use]
    pub fn clone_of(image: &str) -> Self {
        Self { clone_of: Some(image.to_owned()), ..Self::default() }
    }

    /// An image at `url`, with nothing else said.
    #[must_use]
    pub fn of_url(url: &str) -> Self {
        Self { url: Some(url.to_owned()), ..Self::default() }
    }

    /// An image of which so many bytes are to be uploaded, with nothing else said.
    #[must_use]
    pub fn of_upload(upload_bytes: u64) -> Self {
        Self { upload_bytes: Some(upload_bytes), ..Self::default() }
    }
}

impl std::fmt::Debug for CreateImage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CreateImage").field("name", &self.name).finish_non_exhaustive()
    }
}
