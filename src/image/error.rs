//! Why an image is refused, and why a read of it fails.
//!
//! Why: whoever sees the message must be able to find the byte and know what to do.
//! How: one enum for opening and one for reading; the fields are coordinates.
//! Never: repeats the source's text in its own.
//! Start at [`ImageError`] and [`ReadError`].

use std::io;
use std::path::{Path, PathBuf};

use super::Format;
use super::fault::{Fault, FaultKind};
use super::qcow2::BackingFormat;
use crate::units::{FileOffset, GuestOffset};

/// What a caller can do about an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// The bytes are at fault: retrying can't help, the file must be replaced.
    Refuse,
    /// The host is at fault: a later try may work.
    Retry,
    /// The caller is at fault.
    Bug,
}

/// Why an image is refused. Fields are coordinates; the message prints all of them.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "each field is named in the message above it")]
pub enum ImageError {
    /// The bytes contradict the format.
    #[error(
        "{}: {field} at byte {at} is {found:#x}, need {need}; run `qemu-img check`",
        path.display()
    )]
    Malformed { path: PathBuf, field: &'static str, at: FileOffset, found: u64, need: &'static str },
    /// The bytes are right, and use what we do not serve.
    #[error(
        "{}: {field} at byte {at} is {found:#x}, need {need}; \
         rewrite the image with `qemu-img convert -O qcow2`",
        path.display()
    )]
    Unsupported {
        path: PathBuf,
        field: &'static str,
        at: FileOffset,
        found: u64,
        need: &'static str,
    },
    /// The declared format and the content differ.
    #[error("{}: declared {declared}, but the content is {found}; declare {found}", path.display())]
    FormatMismatch { path: PathBuf, declared: Format, found: Format },
    /// A snapshot was asked for that the image does not have.
    #[error(
        "{}: no snapshot has the ID or name {wanted:?}; the image has {count}, see \
         `bedplate inspect`",
        path.display()
    )]
    NoSnapshot { path: PathBuf, wanted: String, count: u32 },
    /// Something was given that the image has no use for.
    #[error("{}: {what} was given, and the image has none; leave it out", path.display())]
    NotNeeded { path: PathBuf, what: &'static str },
    /// The image says that its backing file is of another format.
    #[error(
        "{}: made for a backing file of format {said:?}, and the base that was given is {base}; \
         give the right base, or rewrite the name of the format with `qemu-img rebase -u -F`",
        path.display()
    )]
    BaseFormat { path: PathBuf, said: BackingFormat, base: Format },
    /// The chain of backing files is too long.
    #[error(
        "{}: more than {most} images stand on each other; merge some with `qemu-img convert`",
        path.display()
    )]
    TooManyLayers { path: PathBuf, most: usize },
    /// A file of no bytes is no disk.
    #[error("{}: the file is empty; give an image of at least 1 byte", path.display())]
    Empty { path: PathBuf },
    /// The file could not be read.
    #[error("{}: cannot read {len_bytes} bytes at byte {at}", path.display())]
    Read {
        path: PathBuf,
        at: FileOffset,
        len_bytes: usize,
        #[source]
        source: io::Error,
    },
    /// The host refused a map of the file, or of a table.
    #[error("{}: cannot map {len_bytes} bytes of {what}", path.display())]
    Map {
        path: PathBuf,
        what: &'static str,
        len_bytes: u64,
        #[source]
        source: io::Error,
    },
}

impl ImageError {
    /// The field at fault and its first byte, if a field is.
    #[must_use]
    pub fn place(&self) -> Option<(&'static str, FileOffset)> {
        if let Self::Malformed { field, at, .. } | Self::Unsupported { field, at, .. } = self {
            return Some((field, *at));
        }
        None
    }

    /// True if the image would be taken with its backing file.
    #[must_use]
    pub fn is_for_want_of_a_base(&self) -> bool {
        matches!(self, Self::Unsupported { field: "backing_file_offset", .. })
    }

    /// The message without the path that it begins with: for a list of things about one file.
    #[must_use]
    pub fn reason(&self) -> String {
        let text = self.to_string();
        let path = format!("{}: ", self.path().display());
        text.strip_prefix(&path).unwrap_or(&text).to_owned()
    }

    /// The file that it is about.
    #[must_use]
    pub fn path(&self) -> &Path {
        match self {
            Self::Malformed { path, .. }
            | Self::Unsupported { path, .. }
            | Self::FormatMismatch { path, .. }
            | Self::NoSnapshot { path, .. }
            | Self::NotNeeded { path, .. }
            | Self::BaseFormat { path, .. }
            | Self::TooManyLayers { path, .. }
            | Self::Empty { path }
            | Self::Read { path, .. }
            | Self::Map { path, .. } => path,
        }
    }

    /// What a caller can do about it.
    #[must_use]
    pub fn class(&self) -> Class {
        match self {
            Self::Malformed { .. }
            | Self::Unsupported { .. }
            | Self::FormatMismatch { .. }
            | Self::NoSnapshot { .. }
            | Self::NotNeeded { .. }
            | Self::BaseFormat { .. }
            | Self::TooManyLayers { .. }
            | Self::Empty { .. } => Class::Refuse,
            Self::Read { .. } | Self::Map { .. } => Class::Retry,
        }
    }

    /// The same refusal, said of `name`: where the bytes came from, when their file is not kept.
    /// A fault of the host is still said of the file.
    #[must_use]
    pub fn said_of(mut self, name: &Path) -> Self {
        match &mut self {
            Self::Malformed { path, .. }
            | Self::Unsupported { path, .. }
            | Self::FormatMismatch { path, .. }
            | Self::NoSnapshot { path, .. }
            | Self::NotNeeded { path, .. }
            | Self::BaseFormat { path, .. }
            | Self::TooManyLayers { path, .. }
            | Self::Empty { path } => name.clone_into(path),
            Self::Read { .. } | Self::Map { .. } => {}
        }
        self
    }

    /// A field that is not accepted, in the file `path`.
    #[must_use]
    pub fn fault(path: &Path, fault: Fault) -> Self {
        let Fault { kind, field, at, found, need } = fault;
        let path = path.to_owned();
        match kind {
            FaultKind::Malformed => Self::Malformed { path, field, at, found, need },
            FaultKind::Unsupported => Self::Unsupported { path, field, at, found, need },
        }
    }

    pub(super) fn read(path: &Path, at: u64, len_bytes: usize, source: io::Error) -> Self {
        Self::Read { path: path.to_owned(), at: FileOffset(at), len_bytes, source }
    }
}

/// Why a range of a view can't be read. The rest of the view stays readable.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "each field is named in the message above it")]
pub enum ReadError {
    /// The range is not all inside the disk.
    #[error("{len_bytes} bytes at guest byte {at} are past the disk's end at {size_bytes}")]
    PastEnd { at: GuestOffset, len_bytes: u64, size_bytes: u64 },
    /// A table entry contradicts the format.
    #[error(
        "{}: {field} at byte {at} is {found:#x}, need {need}; run `qemu-img check`",
        path.display()
    )]
    Malformed { path: PathBuf, field: &'static str, at: FileOffset, found: u64, need: &'static str },
    /// A compressed cluster's stream is damaged.
    #[error(
        "{}: {what} in the cluster at guest byte {at}, stored at byte {stored_at}; \
         run `qemu-img check` and fetch the image again",
        path.display()
    )]
    Decode { path: PathBuf, what: &'static str, at: GuestOffset, stored_at: FileOffset },
    /// The file could not be read.
    #[error("{}: cannot read {len_bytes} bytes at byte {at}", path.display())]
    Io {
        path: PathBuf,
        at: FileOffset,
        len_bytes: usize,
        #[source]
        source: io::Error,
    },
    /// A cluster was asked for that is not compressed.
    #[error("guest byte {at} is not in a compressed cluster; ask run_at first")]
    NotEncoded { at: GuestOffset },
}

impl ReadError {
    /// What a caller can do about it.
    #[must_use]
    pub fn class(&self) -> Class {
        match self {
            Self::PastEnd { .. } | Self::NotEncoded { .. } => Class::Bug,
            Self::Malformed { .. } | Self::Decode { .. } => Class::Refuse,
            Self::Io { .. } => Class::Retry,
        }
    }

    /// True if it was waited for, and nothing came for a long time.
    #[must_use]
    pub fn has_timed_out(&self) -> bool {
        match self {
            Self::Io { source, .. } => source.kind() == io::ErrorKind::TimedOut,
            Self::PastEnd { .. }
            | Self::Malformed { .. }
            | Self::Decode { .. }
            | Self::NotEncoded { .. } => false,
        }
    }

    pub(super) fn fault(path: &Path, fault: Fault) -> Self {
        let Fault { kind: _, field, at, found, need } = fault;
        Self::Malformed { path: path.to_owned(), field, at, found, need }
    }

    pub(super) fn io(path: &Path, at: u64, len_bytes: usize, source: io::Error) -> Self {
        Self::Io { path: path.to_owned(), at: FileOffset(at), len_bytes, source }
    }
}
