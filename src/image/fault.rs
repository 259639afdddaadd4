//! A field with a value that we do not accept.
//!
//! Why: "invalid image" helps nobody; a field, its place, its value and the rule do.
//! How: the pure parsers return these; whoever knows the path adds it.
//! Never: holds text from the image.
//! Start at [`Fault`].

use std::fmt;

use crate::units::FileOffset;

/// Whether a field is wrong, or right and not for us.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FaultKind {
    /// The bytes contradict the format, the file, or a limit.
    Malformed,
    /// The bytes are right, and use what we do not serve.
    Unsupported,
}

/// A field of the file with a value that we do not accept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    /// Wrong, or not for us.
    pub kind: FaultKind,
    /// The field's name in the specification.
    pub field: &'static str,
    /// Position of its first byte in the file.
    pub at: FileOffset,
    /// Its value.
    pub found: u64,
    /// What would be accepted.
    pub need: &'static str,
}

/// A table entry that we do not accept; its place is added by whoever read it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EntryFault {
    /// The part of the entry that is at fault.
    pub field: &'static str,
    /// Its first byte, counted from the entry's.
    pub offset: u64,
    /// Its value.
    pub found: u64,
    /// What would be accepted.
    pub need: &'static str,
}

impl EntryFault {
    pub(in crate::image) const fn new(field: &'static str, found: u64, need: &'static str) -> Self {
        Self { field, offset: 0, found, need }
    }

    /// The same, of a part that begins `offset` bytes behind the entry's first.
    pub(in crate::image) const fn behind(self, offset: u64) -> Self {
        Self { offset, ..self }
    }

    /// The fault of the entry at `at` in the file.
    #[must_use]
    pub fn at(self, at: FileOffset) -> Fault {
        let Self { field, offset, found, need } = self;
        let at = FileOffset(at.0.saturating_add(offset));
        Fault { kind: FaultKind::Malformed, field, at, found, need }
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { kind: _, field, at, found, need } = *self;
        write!(f, "{field} at byte {at} is {found:#x}, need {need}")
    }
}

impl std::error::Error for Fault {}

impl Fault {
    pub(in crate::image) fn malformed(
        field: &'static str,
        at: u64,
        found: u64,
        need: &'static str,
    ) -> Self {
        Self { kind: FaultKind::Malformed, field, at: FileOffset(at), found, need }
    }

    pub(in crate::image) fn unsupported(
        field: &'static str,
        at: u64,
        found: u64,
        need: &'static str,
    ) -> Self {
        Self { kind: FaultKind::Unsupported, field, at: FileOffset(at), found, need }
    }
}
