//! What a guest reads first, as a file and as a list that is kept with an image.
//!
//! Why: a node on which an image has booted knows what the next node will be asked for.
//! How: ranges of the guest's disk in the order in which they were first read, in whole units, so that
//! a trace of a QCOW2 file fits the same disk as a raw one. As a file it is JSON ([`TraceFile`]); in
//! a record the ranges are packed.
//! Never: trusts a number in a file: each is bounded, and what is past the end of a disk is passed over
//! by whoever uses it.
//! Start at [`Trace::parse`].

use base64::Engine;
use base64::prelude::BASE64_STANDARD_NO_PAD;
use serde::{Deserialize, Serialize};

use crate::disk::{BadDigest, DigestMap};
use crate::units::GuestOffset;

/// Granularity in bytes.
pub const TRACE_UNIT_BYTES: u64 = 64 << 10;
/// Ranges that a trace may have.
pub const MAX_TRACE_RANGES: usize = 32 << 10;
/// Longest file in bytes.
pub const MAX_TRACE_BYTES: usize = 1 << 20;
/// Longest list of ranges in a record, packed, in bytes.
const MAX_PACKED_BYTES: usize = 192 << 10;
/// The version that is written, and the only one that is read.
const VERSION: u32 = 1;

/// A trace as it is in a file and in answers. Only `version` and `ranges` are needed.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TraceFile {
    /// 1.
    pub version: u32,
    /// Name of the image that was read; says nothing about where the trace may be used.
    #[serde(default)]
    pub image: Option<String>,
    /// True if it was still being recorded.
    #[serde(default)]
    pub recording: bool,
    /// True if more was read than a trace may have ranges.
    #[serde(default)]
    pub truncated: bool,
    /// Size of the disk that the guest saw.
    #[serde(default)]
    pub virtual_size_bytes: Option<u64>,
    /// Digests of the image's source, lower-case hex, by kind; a trace without any is for whatever
    /// image it is given with.
    #[serde(default)]
    pub digests: DigestMap,
    /// First byte and length of each range of the disk, in the order of the first read.
    pub ranges: Vec<[u64; 2]>,
}

/// Why a trace is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[expect(missing_docs, reason = "each field is named in the message above it")]
pub enum TraceError {
    /// Too long a file.
    #[error("a trace of {len_bytes} bytes; at most {MAX_TRACE_BYTES} are read")]
    TooLong { len_bytes: usize },
    /// No JSON, or not of this shape.
    #[error("not a trace: {reason}; `bedplate trace record` writes one")]
    Syntax { reason: String },
    /// Of another version.
    #[error("a trace of version {found}; this bedplate reads version {VERSION}")]
    Version { found: u64 },
    /// Too many ranges.
    #[error("{count} ranges; at most {MAX_TRACE_RANGES} are kept: leave the last ones out")]
    TooMany { count: usize },
    /// A range of no bytes, or past 2^64.
    #[error(
        "range {index} has byte {at} and length {len_bytes}; need a length of 1 or more that ends below 2^64"
    )]
    Range { index: usize, at: u64, len_bytes: u64 },
    /// A digest that is none.
    #[error("digests: {0}")]
    Digest(#[from] BadDigest),
    /// Ranges that jump about so much that they take too much room.
    #[error(
        "its ranges take {len_bytes} bytes, packed; at most {MAX_PACKED_BYTES} are kept: leave the last ones out"
    )]
    TooScattered { len_bytes: usize },
}

/// Units in a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Units {
    first: u64,
    /// At least 1.
    count: u64,
}

impl Units {
    fn end(self) -> u64 {
        self.first + self.count
    }
}

/// What a guest reads first.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Stored", into = "Stored")]
pub struct Trace {
    size_bytes: Option<u64>,
    digests: DigestMap,
    units: Vec<Units>,
}

impl Trace {
    /// Reads a file, which may be anything.
    ///
    /// # Errors
    /// [`TraceError`].
    pub fn parse(bytes: &[u8]) -> Result<Self, TraceError> {
        /// What every version has.
        #[derive(Deserialize)]
        struct AnyVersion {
            version: u64,
        }
        if bytes.len() > MAX_TRACE_BYTES {
            return Err(TraceError::TooLong { len_bytes: bytes.len() });
        }
        let syntax = |error: serde_json::Error| TraceError::Syntax { reason: error.to_string() };
        let AnyVersion { version } = serde_json::from_slice(bytes).map_err(syntax)?;
        if version != u64::from(VERSION) {
            return Err(TraceError::Version { found: version });
        }
        Self::from_file(serde_json::from_slice(bytes).map_err(syntax)?)
    }

    /// Checks what is in a file. Ranges that go on where the one before ends, or overlap it, become
    /// one.
    ///
    /// # Errors
    /// [`TraceError`].
    pub fn from_file(file: TraceFile) -> Result<Self, TraceError> {
        if file.version != VERSION {
            return Err(TraceError::Version { found: file.version.into() });
        }
        if file.ranges.len() > MAX_TRACE_RANGES {
            return Err(TraceError::TooMany { count: file.ranges.len() });
        }
        let digests = file.digests.iter().map(|(kind, hex)| (kind, Some(hex)));
        let digests = DigestMap::parse(digests)?;
        let mut units: Vec<Units> = Vec::new();
        for (index, [at, len_bytes]) in file.ranges.into_iter().enumerate() {
            let end = at.checked_add(len_bytes).filter(|_| len_bytes > 0);
            let end = end.ok_or(TraceError::Range { index, at, len_bytes })?;
            let (first, end) = (at / TRACE_UNIT_BYTES, end.div_ceil(TRACE_UNIT_BYTES));
            match units.last_mut() {
                Some(last) if (last.first..=last.end()).contains(&first) => {
                    last.count = last.count.max(end - last.first);
                }
                Some(_) | None => units.push(Units { first, count: end - first }),
            }
        }
        let trace = Self { size_bytes: file.virtual_size_bytes, digests, units };
        let len_bytes = pack(&trace.units).len();
        if len_bytes > MAX_PACKED_BYTES {
            return Err(TraceError::TooScattered { len_bytes });
        }
        Ok(trace)
    }

    /// As it is in a file.
    #[must_use]
    pub fn to_file(&self) -> TraceFile {
        let end = |units: &Units| units.end().saturating_mul(TRACE_UNIT_BYTES);
        let range = |units: &Units| {
            let at = units.first * TRACE_UNIT_BYTES;
            [at, end(units).min(self.size_bytes.unwrap_or(u64::MAX)).max(at + 1) - at]
        };
        TraceFile {
            version: VERSION,
            virtual_size_bytes: self.size_bytes,
            digests: self.digests.clone(),
            ranges: self.units.iter().map(range).collect(),
            ..TraceFile::default()
        }
    }

    /// Size of the disk that it was recorded on, if it says.
    #[must_use]
    pub fn size_bytes(&self) -> Option<u64> {
        self.size_bytes
    }

    /// Digests of the image that it was recorded on, as far as they were known.
    #[must_use]
    pub fn digests(&self) -> &DigestMap {
        &self.digests
    }

    /// How many ranges it has.
    #[must_use]
    pub fn len(&self) -> usize {
        self.units.len()
    }

    /// True if nothing is in it.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.units.is_empty()
    }

    /// Bytes of all ranges together, of a disk of `size_bytes`.
    #[must_use]
    pub fn bytes(&self, size_bytes: u64) -> u64 {
        self.ranges(size_bytes).map(|(_, len_bytes)| len_bytes).sum()
    }

    /// The ranges of a disk of `size_bytes`, first byte and length, in order; what is past its end is
    /// left out.
    pub fn ranges(&self, size_bytes: u64) -> impl Iterator<Item = (GuestOffset, u64)> {
        self.units.iter().filter_map(move |units| {
            let at = units.first.checked_mul(TRACE_UNIT_BYTES)?;
            let end = units.end().saturating_mul(TRACE_UNIT_BYTES).min(size_bytes);
            Some((GuestOffset(at), end.checked_sub(at).filter(|&len_bytes| len_bytes > 0)?))
        })
    }
}

/// A trace in a record.
#[derive(Serialize, Deserialize)]
struct Stored {
    version: u32,
    #[serde(default)]
    size_bytes: Option<u64>,
    #[serde(default)]
    digests: DigestMap,
    /// Base64 of what [`pack`] gives.
    units: String,
}

impl From<Trace> for Stored {
    fn from(trace: Trace) -> Self {
        let Trace { size_bytes, digests, units } = trace;
        let units = BASE64_STANDARD_NO_PAD.encode(pack(&units));
        Self { version: VERSION, size_bytes, digests, units }
    }
}

impl TryFrom<Stored> for Trace {
    type Error = &'static str;

    /// A list that a later version has packed otherwise is none: it is only a hint.
    fn try_from(stored: Stored) -> Result<Self, Self::Error> {
        let Stored { version, size_bytes, digests, units } = stored;
        if version != VERSION {
            return Ok(Self::default());
        }
        let packed = BASE64_STANDARD_NO_PAD.decode(units).map_err(|_| "ranges are no base64")?;
        let units = unpack(&packed).ok_or("ranges do not unpack")?;
        Ok(Self { size_bytes, digests, units })
    }
}

/// Of each run: how far its first unit is from the end of the one before, and its length, in seven
/// bits a byte.
fn pack(units: &[Units]) -> Vec<u8> {
    let (mut packed, mut before) = (Vec::new(), 0_u64);
    for run in units {
        let step = run.first.cast_signed().wrapping_sub(before.cast_signed());
        // The sign goes into the lowest bit, so that small steps back are short, too.
        push(&mut packed, (step << 1 ^ step >> 63).cast_unsigned());
        push(&mut packed, run.count - 1);
        before = run.end();
    }
    packed
}

fn push(packed: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        packed.push(value.to_le_bytes()[0] | 0x80);
        value >>= 7;
    }
    packed.push(value.to_le_bytes()[0]);
}

fn unpack(packed: &[u8]) -> Option<Vec<Units>> {
    let (mut rest, mut units, mut before) = (packed, Vec::new(), 0_u64);
    while !rest.is_empty() && units.len() < MAX_TRACE_RANGES {
        let (step, count) = (pull(&mut rest)?, pull(&mut rest)?.checked_add(1)?);
        let step = (step >> 1).cast_signed() ^ -(step & 1).cast_signed();
        let first = before.checked_add_signed(step)?;
        // No unit is past the end of a disk of 2^64 bytes.
        first.checked_add(count).filter(|&end| end <= u64::MAX / TRACE_UNIT_BYTES + 1)?;
        units.push(Units { first, count });
        before = first + count;
    }
    rest.is_empty().then_some(units)
}

fn pull(rest: &mut &[u8]) -> Option<u64> {
    let mut value = 0;
    for shift in (0..u64::BITS).step_by(7) {
        let (&byte, after) = rest.split_first()?;
        *rest = after;
        let bits = u64::from(byte & 0x7f);
        value |= bits.checked_shl(shift).filter(|shifted| shifted >> shift == bits)?;
        if byte & 0x80 == 0 {
            return Some(value);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const UNIT: u64 = TRACE_UNIT_BYTES;

    fn of(ranges: &[[u64; 2]]) -> Result<Trace, TraceError> {
        let ranges = ranges.to_vec();
        Trace::from_file(TraceFile { version: VERSION, ranges, ..TraceFile::default() })
    }

    #[test]
    fn ranges_are_widened_to_units_and_joined_in_their_order() {
        let trace = of(&[[5 * UNIT + 7, 1], [6 * UNIT, UNIT], [0, 10], [1, 3 * UNIT]]).unwrap();
        let ranges: Vec<_> = trace.ranges(u64::MAX).collect();
        assert_eq!(ranges, [(GuestOffset(5 * UNIT), 2 * UNIT), (GuestOffset(0), 4 * UNIT)]);
        let short: Vec<_> = trace.ranges(5 * UNIT + 9).collect();
        assert_eq!(short, [(GuestOffset(5 * UNIT), 9), (GuestOffset(0), 4 * UNIT)]);
        assert_eq!(trace.bytes(5 * UNIT), 4 * UNIT);
    }

    #[test]
    fn what_is_no_trace_is_refused_with_the_reason() {
        let cases = [
            (r"{", "EOF"),
            (r"[]", "not a trace"),
            (
                r#"{"version":2,"later":true}"#,
                "a trace of version 2; this bedplate reads version 1",
            ),
            (r#"{"version":1}"#, "missing field `ranges`"),
            (r#"{"version":1,"ranges":[[1]]}"#, "invalid length 1"),
            (r#"{"version":1,"ranges":[[1,-1]]}"#, "invalid value"),
            (r#"{"version":1,"ranges":[[0,1],[5,0]]}"#, "range 1 has byte 5 and length 0"),
            (r#"{"version":1,"ranges":[[18446744073709551615,2]]}"#, "range 0 has byte"),
            (r#"{"version":1,"ranges":[],"digests":{"sha256":"XY"}}"#, "digests: "),
            (r#"{"version":1,"ranges":[],"colour":1}"#, "unknown field `colour`"),
        ];
        for (text, want) in cases {
            let error = Trace::parse(text.as_bytes()).unwrap_err().to_string();
            assert!(error.contains(want), "{text}: {error}");
        }
        let many = vec![[0, 1]; MAX_TRACE_RANGES + 1];
        assert_eq!(of(&many), Err(TraceError::TooMany { count: many.len() }));
        let long = vec![b' '; MAX_TRACE_BYTES + 1];
        assert_eq!(Trace::parse(&long), Err(TraceError::TooLong { len_bytes: long.len() }));
        let far = [[0, 1], [u64::MAX - 1, 1]].repeat(MAX_TRACE_RANGES / 2);
        assert!(matches!(of(&far), Err(TraceError::TooScattered { .. })));
    }

    #[test]
    fn a_record_that_is_damaged_is_an_error_and_one_of_a_later_version_is_empty() {
        let later = r#"{"version":9,"units":"?","size_bytes":5}"#;
        assert!(serde_json::from_str::<Trace>(later).unwrap().is_empty());
        for units in ["?", "gA", "////////////////", "AA"] {
            let text = format!(r#"{{"version":1,"units":"{units}"}}"#);
            assert!(serde_json::from_str::<Trace>(&text).is_err(), "{units}");
        }
    }

    proptest! {
        #[test]
        fn a_trace_is_the_same_from_its_file_and_from_its_record(
            ranges in proptest::collection::vec((any::<u64>(), 1u64..1 << 40), 0..50),
            size in proptest::option::of(any::<u64>()),
        ) {
            let ranges = ranges.into_iter().map(|(at, len)| [at >> 1, len]).collect();
            let file = TraceFile { version: VERSION, virtual_size_bytes: size, ranges, ..TraceFile::default() };
            let trace = Trace::from_file(file).unwrap();
            let stored = serde_json::to_string(&trace).unwrap();
            prop_assert_eq!(&serde_json::from_str::<Trace>(&stored).unwrap(), &trace);
            let bytes = serde_json::to_vec(&trace.to_file()).unwrap();
            let again = Trace::parse(&bytes).unwrap();
            let limit = size.unwrap_or(u64::MAX);
            let (a, b): (Vec<_>, Vec<_>) = (again.ranges(limit).collect(), trace.ranges(limit).collect());
            prop_assert_eq!(a, b);
        }

        #[test]
        fn no_record_unpacks_to_more_than_it_should(packed in proptest::collection::vec(any::<u8>(), 0..200)) {
            if let Some(units) = unpack(&packed) {
                prop_assert_eq!(unpack(&pack(&units)), Some(units));
            }
        }
    }
}
