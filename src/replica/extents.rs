//! What a disk is, run by run.
//!
//! Why: who copies or sums up a disk wants its holes without reading them.
//! How: as a read resolves it; the engine is asked only for what nobody has looked at yet, and may
//! answer with a longer run.
//! Never: calls bytes zero that are not known to be.
//! Start at [`Extents`].

use std::sync::Arc;

use crate::attached::Attached;
use crate::layer::Found;
use crate::wire::{KIND_ABSENT, KIND_DATA, KIND_ENCODED, KIND_ZERO};
use crate::{Replica, ReplicaError};

/// What the bytes of an extent are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExtentKind {
    /// Bytes in a file.
    Data,
    /// Zeroes.
    Zero,
    /// In a compressed block.
    Encoded,
    /// Not on this disk yet; a read waits for it.
    Absent,
}

/// A run of bytes of one kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Position of its first byte in the disk.
    pub at: u64,
    /// Its length in bytes, at least 1.
    pub len_bytes: u64,
    /// What its bytes are.
    pub kind: ExtentKind,
}

/// The extents of a range, in order and without gaps.
#[derive(Debug)]
pub struct Extents<'a> {
    replica: &'a Replica,
    attached: Arc<Attached>,
    at: u64,
    end: u64,
}

impl<'a> Extents<'a> {
    pub(crate) fn new(replica: &'a Replica, attached: Arc<Attached>, at: u64, end: u64) -> Self {
        Self { replica, attached, at, end }
    }

    fn extent(&self) -> Result<Extent, ReplicaError> {
        let at = self.at;
        let (found, _, until) = self.attached.run_at(at, self.end);
        let len_bytes = until - at;
        let kind = match found {
            Found::Data(_) => ExtentKind::Data,
            Found::Zero | Found::Beneath => ExtentKind::Zero,
            Found::Encoded => ExtentKind::Encoded,
            Found::Ask => {
                let (kind, len_bytes) = self.replica.ask_extent(at, self.end - at)?;
                let kind = match kind {
                    KIND_ZERO => ExtentKind::Zero,
                    KIND_ENCODED => ExtentKind::Encoded,
                    KIND_ABSENT => ExtentKind::Absent,
                    KIND_DATA => ExtentKind::Data,
                    // A kind of a later version: bytes that have to be read.
                    _ => ExtentKind::Data,
                };
                return Ok(Extent { at, len_bytes, kind });
            }
        };
        Ok(Extent { at, len_bytes, kind })
    }
}

impl Iterator for Extents<'_> {
    type Item = Result<Extent, ReplicaError>;

    /// After an error there are no more.
    fn next(&mut self) -> Option<Self::Item> {
        if self.at >= self.end {
            return None;
        }
        let extent = self.extent();
        self.at = extent.as_ref().map_or(self.end, |extent| extent.at + extent.len_bytes);
        Some(extent)
    }
}
