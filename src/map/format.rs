//! The maps that are handed to readers in other processes: what their words mean.
//!
//! Why: a reader resolves a guest's position by itself, with no question to the engine; and it may
//! be written in another language, or be of another version.
//! How: a table of 64-bit words in host byte order (writer and reader are on one machine). The
//! first eight are a header, the rest depends on its kind:
//!
//! - **words**: a word for each span, then one for each unit. A span of `2^span_bits` units whose
//!   span word is 0 has nothing stored: its units are never touched, and are what
//!   [`Header::empty`] says. Without spans all units count.
//! - **bits**: bit `n % 64` of word `n / 64` is set if unit `n` is data, at its own position in the
//!   file; else it is zero.
//! - **decoded**: a word for each encoded block, 0 while it is not in the memory for decoded blocks.
//!   Else bits 0 to 23 are its place there, in pages of 4096 bytes. Whoever has copied a block looks
//!   at the word again: if it has changed, the copy holds anything.
//! - **presence**: bit `n % 64` of word `n / 64` is set once unit `n` of the *file* is there.
//!
//! | word of a unit | meaning |
//! |---|---|
//! | 0 | not worked out yet: ask the engine |
//! | file offset, bit 0 | data at that place of the layer's file |
//! | 2 | zero |
//! | 3 | damaged: ask the engine, which says why |
//! | 4 | what the layer beneath has there; zero where that has ended, or there is none |
//! | bit 63 | encoded: in the memory for decoded blocks, or ask the engine |
//!
//! Words only ever go from 0 to something else, and each stands for itself: no order is needed to
//! read them. Those of kind *decoded* come and go.
//! Never: changes its meaning under one version.
//! Start at [`Header`] and [`Word`].

use std::fmt;

use crate::units::FileOffset;

/// Words of the header.
pub const HEADER_WORDS: usize = 8;
/// The first word: `bedplmap`.
const MAGIC: u64 = u64::from_ne_bytes(*b"bedplmap");
/// The second word's upper half.
pub const VERSION: u32 = 1;
/// Offsets are multiples of 512, which leaves these bits for the kind.
pub const KIND_BITS: u64 = 511;
/// Bit of a data word.
pub const DATA: u64 = 1;
/// The word of a zero unit.
pub const ZERO: u64 = 2;
/// The word of a damaged unit.
pub const DAMAGED: u64 = 3;
/// The word of what the layer beneath has.
pub const BENEATH: u64 = 4;
/// Bit of an encoded unit's word.
pub const ENCODED: u64 = 1 << 63;
/// Bytes of the pages that decoded blocks are placed by.
pub const PLACE_BYTES: u64 = 4096;
/// Bits of a place.
pub const PLACE_BITS: u32 = 24;
/// Sizes of units that a header may have, as powers of two.
const UNIT_BITS: std::ops::RangeInclusive<u32> = 9..=40;

/// What the words of a table are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A word for each span and unit.
    Words,
    /// A bit for each unit.
    Bits,
    /// A word for each encoded block.
    Decoded,
    /// A bit for each unit of the file.
    Presence,
}

impl Kind {
    fn number(self) -> u64 {
        match self {
            Self::Words => 1,
            Self::Bits => 2,
            Self::Decoded => 3,
            Self::Presence => 4,
        }
    }

    fn of_number(number: u64) -> Option<Self> {
        [Self::Words, Self::Bits, Self::Decoded, Self::Presence]
            .into_iter()
            .find(|kind| kind.number() == number)
    }
}

/// What a table begins with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// What its words are.
    pub kind: Kind,
    /// Bytes of a unit, as a power of two.
    pub unit_bits: u32,
    /// Units of a span, as a power of two; of no meaning without spans.
    pub span_bits: u32,
    /// Words of spans before those of the units; 0: there are none.
    pub spans: u64,
    /// Units: the words or bits after those of the spans.
    pub units: u64,
    /// Bytes that the table speaks for: of the layer's disk, or of a file. At most as many as the
    /// units have.
    pub size_bytes: u64,
    /// What the units of an empty span are: [`ZERO`] or [`BENEATH`].
    pub empty: u64,
}

/// A table that is not one, or not of this version.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BadTable {
    /// Which rule it breaks.
    pub what: &'static str,
}

impl fmt::Display for BadTable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "shared table: {}", self.what)
    }
}

impl std::error::Error for BadTable {}

impl Header {
    /// Of a table without units, for those that leave fields out.
    pub const EMPTY: Self = Self {
        kind: Kind::Words,
        unit_bits: 0,
        span_bits: 0,
        spans: 0,
        units: 0,
        size_bytes: 0,
        empty: ZERO,
    };

    /// As the words that a table begins with.
    #[must_use]
    pub fn to_words(&self) -> [u64; HEADER_WORDS] {
        let kind = u64::from(VERSION) << 32 | self.kind.number();
        let bits = u64::from(self.span_bits) << 32 | u64::from(self.unit_bits);
        [MAGIC, kind, bits, self.spans, self.units, self.size_bytes, self.empty, 0]
    }

    /// What the first words of a table of `len` words say.
    ///
    /// # Errors
    /// [`BadTable`]: another kind of file, another version, or numbers that do not fit together.
    pub fn of_words(words: [u64; HEADER_WORDS], len: u64) -> Result<Self, BadTable> {
        let bad = |what| Err(BadTable { what });
        let [magic, kind, bits, spans, units, size_bytes, empty, _later] = words;
        if magic != MAGIC {
            return bad("does not begin with the magic number");
        }
        if kind >> 32 != u64::from(VERSION) {
            return bad("has another version; use a library of the engine's version");
        }
        let Some(kind) = Kind::of_number(kind & u64::from(u32::MAX)) else {
            return bad("has an unknown kind");
        };
        let half = |word: u64| u32::try_from(word & u64::from(u32::MAX)).unwrap_or(u32::MAX);
        let (unit_bits, span_bits) = (half(bits), half(bits >> 32));
        let header = Self { kind, unit_bits, span_bits, spans, units, size_bytes, empty };
        if !UNIT_BITS.contains(&unit_bits) || (spans > 0 && span_bits > 32) {
            return bad("has units or spans of a size out of range");
        }
        if header.body_words().is_none_or(|body| body > len.saturating_sub(HEADER_WORDS as u64)) {
            return bad("is shorter than its header says");
        }
        let fits = |units: u64, bits: u32| u128::from(units) << bits >= u128::from(size_bytes);
        if !fits(units, unit_bits) || (spans > 0 && !fits(spans, unit_bits + span_bits)) {
            return bad("speaks for more bytes than it has units or spans");
        }
        if empty != ZERO && empty != BENEATH {
            return bad("has an unknown word for what is not stored");
        }
        Ok(header)
    }

    /// Words after the header; `None` for more than can be counted.
    #[must_use]
    pub fn body_words(&self) -> Option<u64> {
        match self.kind {
            Kind::Words => self.spans.checked_add(self.units),
            Kind::Decoded => Some(self.units),
            Kind::Bits | Kind::Presence => Some(self.units.div_ceil(64)),
        }
    }
}

/// What the word of a unit says to a reader.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Word {
    /// Data at this place of the layer's file.
    Data(FileOffset),
    /// Zero.
    Zero,
    /// What the layer beneath has.
    Beneath,
    /// In the memory for decoded blocks, or to be asked for.
    Encoded,
    /// Not worked out yet, or damaged: the engine knows.
    Ask,
}

impl Word {
    /// What `word` says.
    #[must_use]
    pub fn of(word: u64) -> Self {
        if word & ENCODED != 0 {
            return Self::Encoded;
        }
        match word & KIND_BITS {
            DATA => Self::Data(FileOffset(word & !KIND_BITS)),
            ZERO => Self::Zero,
            BENEATH => Self::Beneath,
            _unknown_or_damaged => Self::Ask,
        }
    }
}

/// Where a decoded block is, in bytes from the beginning of their memory; `None` if it is not there.
#[must_use]
pub fn place(word: u64) -> Option<u64> {
    (word != 0).then(|| (word & ((1 << PLACE_BITS) - 1)) * PLACE_BYTES)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header() -> Header {
        Header {
            kind: Kind::Words,
            unit_bits: 16,
            span_bits: 13,
            spans: 2,
            units: 10_000,
            size_bytes: 655_359_999,
            empty: ZERO,
        }
    }

    #[test]
    fn a_header_comes_back() {
        for kind in [Kind::Words, Kind::Bits, Kind::Decoded, Kind::Presence] {
            let header = Header { kind, ..header() };
            assert_eq!(Header::of_words(header.to_words(), 20_000), Ok(header));
        }
    }

    #[test]
    fn each_wrong_field_is_refused() {
        let good = header().to_words();
        let wrong: [(usize, u64); 11] = [
            (0, 7),
            (1, 2 << 32 | 1),
            (1, 1 << 32 | 9),
            (2, 13 << 32 | 8),
            (2, 33 << 32 | 16),
            (2, 13 << 32 | 41),
            (3, u64::MAX),
            (4, 11_000),
            (4, 9_999),
            (5, u64::MAX),
            (6, 3),
        ];
        for (index, value) in wrong {
            let mut words = good;
            words[index] = value;
            assert!(Header::of_words(words, 10_010).is_err(), "word {index} = {value:#x}");
        }
        assert!(Header::of_words(good, 10_010).is_ok());
        assert!(Header::of_words(good, 10_009).is_err());
        assert!(Header::of_words(good, 0).is_err());
    }

    #[test]
    fn every_word_has_one_meaning() {
        assert_eq!(Word::of(0x1_0000 | DATA), Word::Data(FileOffset(0x1_0000)));
        assert_eq!(Word::of(ENCODED | 5), Word::Encoded);
        for (word, meaning) in
            [(0, Word::Ask), (DAMAGED, Word::Ask), (ZERO, Word::Zero), (BENEATH, Word::Beneath)]
        {
            assert_eq!(Word::of(word), meaning);
        }
        assert_eq!((place(0), place(7 << PLACE_BITS | 3)), (None, Some(3 * PLACE_BYTES)));
    }
}
