//! The QCOW2 format, read-only (being furnished: every image is refused as unsupported).

use std::fs::File;
use std::path::Path;

use bytes::Bytes;
use serde::Serialize;

use super::{ImageError, Info, ReadError, Run};
use crate::units::{FileOffset, GuestOffset};

/// How compressed clusters are compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Compression {
    /// Raw deflate streams.
    Zlib,
    /// Zstandard frames.
    Zstd,
}

/// Whether a field is wrong, or right and not for us.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FaultKind {
    /// The bytes contradict the format.
    Malformed,
    /// The bytes are right, and use what we do not serve.
    Unsupported,
}

/// A field with a value that we do not accept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    /// Wrong, or not for us.
    pub kind: FaultKind,
    /// The field's name in the format's specification.
    pub field: &'static str,
    /// Where it is in the file.
    pub at: FileOffset,
    /// Its value.
    pub found: u64,
    /// What would be accepted.
    pub need: &'static str,
}

/// Furnished in the next step.
#[derive(Debug)]
pub struct Image(std::convert::Infallible);
/// Furnished in the next step.
#[derive(Debug)]
pub struct ClusterMap(Image);

#[expect(missing_docs, clippy::missing_errors_doc, reason = "replaced in the next step")]
impl Image {
    pub fn open(_: &File, path: &Path, _: u64) -> Result<Self, ImageError> {
        let need = "a raw image (QCOW2 is not served yet)";
        let (kind, at) = (FaultKind::Unsupported, FileOffset(0));
        Err(ImageError::fault(path, Fault { kind, field: "magic", at, found: 0x5146_49fb, need }))
    }
    pub fn describe(&self, _: &mut Info) {}
    pub fn check(&self, _: &File, _: &Path, _: &mut Info) -> Result<(), ImageError> {
        match self.0 {}
    }
}

#[expect(missing_docs, clippy::missing_errors_doc, reason = "replaced in the next step")]
impl ClusterMap {
    pub fn new(image: Image, _: &Path) -> Result<Self, ImageError> {
        match image.0 {}
    }
    pub fn run_at(&self, _: &File, _: GuestOffset, _: u64) -> Result<Run, ReadError> {
        match self.0.0 {}
    }
    #[must_use]
    pub fn cluster_of(&self, _: GuestOffset) -> (u64, GuestOffset) {
        match self.0.0 {}
    }
    pub fn decode(&self, _: &File, _: GuestOffset) -> Result<Bytes, ReadError> {
        match self.0.0 {}
    }
}
