//! Import: from a source to the bytes of a copy, as they are or expanded to a raw disk.
//!
//! Why: a copy that is the guest's disk byte for byte is read by everything at the speed of the
//! page cache; getting one by way of a downloaded file and a converter writes and reads every byte
//! twice.
//! How: `layout: as-is` is a transfer alone. For `layout: raw`, header and tables of a QCOW2 source
//! are fetched first; they say which ranges of it are in use, and only those are brought in (all of
//! it, if a digest of the source has to be proved). Clusters are decoded on all cores as their
//! bytes arrive, in whatever order, straight to their places: one pass, no scratch file.
//! Never: believes a table entry that was not judged, holds more than a bounded part of the tables,
//! or fetches for what is durable.
//! Start at [`import`], [`pull()`] for a plain file, or [`inspect_source`].

mod blocks;
mod clusters;
mod early;
mod error;
mod expand;
mod inspect;
mod plan;
mod pull;
mod tables;

#[cfg(test)]
mod tests;

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

pub use error::ImportError;
pub use inspect::inspect_source;
pub use pull::{PullRequest, Pulled, pull};

use crate::disk::{DigestSet, Filling};
use crate::fetch::{Engine, Fetched, Progress, Source, settle, transfer};

/// What a copy's bytes are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Layout {
    /// Those of the source.
    #[default]
    AsIs,
    /// The guest's disk: a QCOW2 source is expanded.
    Raw,
}

impl fmt::Display for Layout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::AsIs => "as-is",
            Self::Raw => "raw",
        })
    }
}

/// A layout's name that is not one of ours.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("layout {found:?} is not known; use as-is or raw")]
pub struct UnknownLayout {
    /// The text as given, cut to 80 characters.
    pub found: String,
}

impl FromStr for Layout {
    type Err = UnknownLayout;

    fn from_str(text: &str) -> Result<Self, UnknownLayout> {
        match text {
            "as-is" => Ok(Self::AsIs),
            "raw" => Ok(Self::Raw),
            _ => Err(UnknownLayout { found: text.chars().take(80).collect() }),
        }
    }
}

/// Brings what `source` names into `filling`, in this layout. The digests that `source` expects are
/// those of its own bytes; the digests that come out are those of the copy: of an expanded one only
/// those of each MiB.
///
/// # Errors
/// [`ImportError`]. What is durable stays for the next try; what condemns it, the caller discards
/// ([`ImportError::condemns_bytes`]).
pub async fn import(
    engine: &Engine,
    source: &Source,
    layout: Layout,
    filling: &mut Filling,
    progress: &Arc<Progress>,
) -> Result<Fetched, ImportError> {
    match layout {
        Layout::AsIs => Ok(transfer(engine, source, filling, progress).await?),
        Layout::Raw => {
            // Those that are expected are the source's, and proved on the way. One of the raw disk
            // would cost as much as hashing all of its holes: many times the import itself.
            let digests = DigestSet::default();
            let source = &*settle(engine, source, progress).await?;
            expand::expand(engine, source, digests, filling, progress).await
        }
    }
}
