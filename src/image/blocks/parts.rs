//! The parts of a file that a parser has asked for.
//!
//! Why: the same parsers serve a file, a URL and a fuzzer, none of which reads like another.
//! How: a parser looks its bytes up; what is not here is a [`Want`], and whoever can read adds the
//! part and calls again. Each pass gets further, so a few are enough.
//! Never: reads a file itself, or gives bytes past the file's end.
//! Start at [`Parts::get`].

use std::ops::Range;

use zerocopy::{FromBytes, Immutable, KnownLayout};

use crate::image::fault::Fault;

/// Why a parser has no result (yet).
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Want {
    /// It needs these bytes of the file, which has them: at most [`Parts::MAX_BYTES`].
    Bytes(Range<u64>),
    /// A field is not accepted.
    Refused(Fault),
}

impl From<Fault> for Want {
    fn from(fault: Fault) -> Self {
        Self::Refused(fault)
    }
}

/// A field that says where something is: its name, where it is itself, and its value.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pointer {
    pub(super) field: &'static str,
    pub(super) at: u64,
    pub(super) found: u64,
}

impl Pointer {
    pub(super) fn malformed(self, need: &'static str) -> Want {
        Fault::malformed(self.field, self.at, self.found, need).into()
    }

    pub(super) fn unsupported(self, need: &'static str) -> Want {
        Fault::unsupported(self.field, self.at, self.found, need).into()
    }

    /// The fault of a field that holds something else than it must.
    pub(super) fn must(self, holds: bool, need: &'static str) -> Result<(), Want> {
        if holds { Ok(()) } else { Err(self.malformed(need)) }
    }
}

/// Parts of a file, by their places.
#[derive(Clone, Debug)]
pub struct Parts {
    pub(super) file_len_bytes: u64,
    parts: Vec<(u64, Vec<u8>)>,
}

impl Parts {
    /// What a parser asks for at most at once: a table of 2^25 entries would be read by pages.
    pub const MAX_BYTES: u64 = 1 << 20;

    /// No part yet of a file of this length.
    #[must_use]
    pub fn new(file_len_bytes: u64) -> Self {
        Self { file_len_bytes, parts: Vec::new() }
    }

    /// Adds the bytes at `at`.
    pub fn add(&mut self, at: u64, bytes: Vec<u8>) {
        self.parts.push((at, bytes));
    }

    /// The `len` bytes (at most [`MAX_BYTES`](Self::MAX_BYTES)) at `start`, which `by` led to.
    pub(super) fn get(&self, by: Pointer, start: u64, len: u64) -> Result<&[u8], Want> {
        let end = start.checked_add(len).filter(|&end| end <= self.file_len_bytes);
        let range = start..end.ok_or_else(|| by.malformed("something inside the file"))?;
        if len > Self::MAX_BYTES {
            return Err(by.unsupported("a table of at most 1 MiB"));
        }
        let found = self.parts.iter().find_map(|(at, bytes)| {
            let skip = usize::try_from(range.start.checked_sub(*at)?).ok()?;
            bytes.get(skip..)?.get(..usize::try_from(len).ok()?)
        });
        found.ok_or(Want::Bytes(range))
    }

    /// The structure at `start`, which `by` led to.
    pub(super) fn read<T: FromBytes + KnownLayout + Immutable>(
        &self,
        by: Pointer,
        start: u64,
    ) -> Result<T, Want> {
        let bytes = self.get(by, start, size_of::<T>() as u64)?;
        T::read_from_bytes(bytes).map_err(|_| by.malformed("a whole structure"))
    }

    /// The length of the file as a field, for what lies at a fixed place.
    pub(super) fn by_length(&self) -> Pointer {
        Pointer { field: "file length", at: 0, found: self.file_len_bytes }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_is_asked_for_once_and_never_past_the_end() {
        let mut parts = Parts::new(100);
        let by = parts.by_length();
        assert_eq!(parts.get(by, 90, 10), Err(Want::Bytes(90..100)));
        parts.add(80, (80..100).collect());
        assert_eq!(parts.get(by, 90, 2), Ok(&[90, 91][..]));
        for (start, len) in [(90, 11), (101, 0), (u64::MAX, 2)] {
            assert!(matches!(parts.get(by, start, len), Err(Want::Refused(_))), "{start} {len}");
        }
        let mut long = Parts::new(1 << 40);
        long.add(0, vec![0; 8]);
        assert!(matches!(long.get(by, 0, Parts::MAX_BYTES + 1), Err(Want::Refused(_))));
    }
}
