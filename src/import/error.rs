//! Why a source cannot be imported.

use crate::disk::DiskError;
use crate::fetch::decode::DecodeError;
use crate::fetch::{Class, FetchError, one_line};
use crate::image::{self, Format, ImageError, ReadError};

/// Why a source cannot be imported.
#[derive(Debug, thiserror::Error)]
pub enum ImportError {
    /// The source could not be read.
    #[error(transparent)]
    Fetch(#[from] FetchError),
    /// Its header or a table is at fault.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// A compressed cluster is at fault.
    #[error(transparent)]
    Decode(#[from] ReadError),
    /// The disk is at fault.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// Too much to be held at once.
    #[error(
        "the image has more than {most} clusters in use, too many to expand it while its digest \
         is proved; bring it in as it is, or without a digest"
    )]
    TooManyClusters {
        /// The limit.
        most: usize,
    },
    /// A compressed stream, in which nothing can be looked up.
    #[error(
        "{url}: a QCOW2 image inside a compressed stream cannot be expanded as it arrives; bring \
         it in with layout as-is: it is unpacked on the way and kept as QCOW2, and its readers get the \
         same disk; or publish the QCOW2 itself, whose clusters may be compressed"
    )]
    PackedQcow2 {
        /// The source, redacted.
        url: String,
    },
    /// An image of a format that is served, and not expanded.
    #[error(
        "{url}: a {format} image cannot be expanded as it arrives; bring it in with layout as-is: its \
         readers get the same disk"
    )]
    NotExpanded {
        /// The source, redacted.
        url: String,
        /// By its first bytes.
        format: Format,
    },
    /// What was made of it before, out of its turn or in an earlier run, is not what it is now.
    #[error(
        "{url}: its bytes at {at:#x} were others when they were asked for again; what is here is discarded"
    )]
    Unsteady {
        /// The source, redacted.
        url: String,
        /// Where in the source.
        at: u64,
    },
    /// A stage behind has stopped; never seen outside.
    #[error("the writer has stopped")]
    Stopped,
}

impl ImportError {
    /// Whether trying again can help.
    #[must_use]
    pub fn class(&self) -> Class {
        let of_image = |class| match class {
            image::Class::Retry => Class::Retry,
            image::Class::Refuse | image::Class::Bug => Class::Refuse,
        };
        match self {
            Self::Fetch(error) => error.class(),
            Self::Image(error) => of_image(error.class()),
            Self::Decode(error) => of_image(error.class()),
            Self::Disk(error) if error.may_retry() => Class::Retry,
            Self::Disk(_)
            | Self::TooManyClusters { .. }
            | Self::PackedQcow2 { .. }
            | Self::NotExpanded { .. } => Class::Refuse,
            Self::Unsteady { .. } | Self::Stopped => Class::Retry,
        }
    }

    /// True if what has arrived is worth nothing: wrong bytes, or no usable image. An expired
    /// signature or a broken proxy says nothing about what has arrived before.
    #[must_use]
    pub fn condemns_bytes(&self) -> bool {
        match self {
            Self::Fetch(FetchError::Decode { source, .. }) => {
                !matches!(source, DecodeError::NoMemory { .. })
            }
            Self::Fetch(error) => {
                // What cannot be read back is on bad blocks: it has to be written anew.
                matches!(
                    error,
                    FetchError::Digest { .. }
                        | FetchError::TooMuch { .. }
                        | FetchError::ReadBack { .. }
                )
            }
            Self::Image(_) | Self::Decode(_) => self.class() == Class::Refuse,
            Self::PackedQcow2 { .. } | Self::NotExpanded { .. } | Self::Unsteady { .. } => true,
            Self::Disk(_) | Self::TooManyClusters { .. } | Self::Stopped => false,
        }
    }

    /// The message with its causes on one line.
    #[must_use]
    pub fn report(&self) -> String {
        one_line(self)
    }
}
