//! One layer, as it was handed out: a file and its maps.
//!
//! Why: an image may stand on others, each a file of its own; a reader resolves all of them.
//! How: words and bits are looked up as [`bedplate_map::format`] has them. All numbers are held
//! against what is there: a place past the file is an error of the read, as from a file cut short.
//! Never: writes, or follows a number without looking at it.
//! Start at [`Layer::run_at`].

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{Ordering, fence};

use bedplate_map::format::{DAMAGED, Header, Kind, Word, place};
use bedplate_map::units::FileOffset;
use bedplate_map::{Copied, FileMap, MappedData, ReadTable};

/// Units that one run is made of at most.
const MAX_RUN_UNITS: u64 = 1 << 16;

/// The memory for decoded blocks.
#[derive(Debug)]
pub(crate) struct Arena {
    pub(crate) file: File,
    pub(crate) map: Option<FileMap>,
    pub(crate) len_bytes: u64,
}

/// One layer.
#[derive(Debug)]
pub(crate) struct Layer {
    pub(crate) file: File,
    /// Only where reads go through a map.
    pub(crate) mapped: Option<MappedData>,
    pub(crate) map: ReadTable,
    pub(crate) decoded: Option<ReadTable>,
    pub(crate) presence: Option<ReadTable>,
}

/// How the bytes of a run are had.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Found {
    Data(FileOffset),
    Zero,
    Beneath,
    Encoded,
    Ask,
}

impl Layer {
    /// Bytes of the disk that this layer speaks for.
    pub(crate) fn size_bytes(&self) -> u64 {
        self.map.header().size_bytes
    }

    /// What begins at `at`, and where it ends: at `end` at the latest. `at < end <=` the size.
    #[inline]
    pub(crate) fn run_at(&self, at: u64, end: u64) -> (Found, u64) {
        let (found, end) = match self.map.header().kind {
            Kind::Bits => self.bits_at(at, end),
            Kind::Words | Kind::Decoded | Kind::Presence => self.words_at(at, end),
        };
        match (found, &self.presence) {
            (Found::Data(from), Some(presence)) => present(presence, from, at, end),
            (found, _) => (found, end),
        }
    }

    #[inline]
    fn words_at(&self, at: u64, end: u64) -> (Found, u64) {
        let header = self.map.header();
        let bits = header.unit_bits;
        let unit = at >> bits;
        let word = self.word(header, unit);
        let unit_end = (unit + 1) << bits;
        let step = match Word::of(word) {
            Word::Data(_) => 1 << bits,
            Word::Zero | Word::Beneath => 0,
            Word::Ask => return (Found::Ask, end.min(unit_end)),
            Word::Encoded => {
                let block = self.decoded.as_ref().map_or(bits, |table| table.header().unit_bits);
                return (Found::Encoded, end.min(((at >> block) + 1) << block));
            }
        };
        let found = match Word::of(word) {
            Word::Data(from) => Found::Data(FileOffset(from.0.wrapping_add(at - (unit << bits)))),
            Word::Beneath => Found::Beneath,
            Word::Zero | Word::Ask | Word::Encoded => Found::Zero,
        };
        if end <= unit_end {
            return (found, end);
        }
        (found, end.min(self.extend(header, unit, word, step, end) << bits))
    }

    /// The first unit after `first` whose word does not go on from `word`.
    fn extend(&self, header: &Header, first: u64, word: u64, step: u64, end: u64) -> u64 {
        let last = end.div_ceil(1 << header.unit_bits).min(first + MAX_RUN_UNITS);
        let (mut unit, mut expected) = (first + 1, word.wrapping_add(step));
        while unit < last {
            if step == 0 && word == header.empty && header.spans > 0 {
                let span = unit >> header.span_bits;
                if self.map.get(span) == Some(0) {
                    unit = (span + 1) << header.span_bits;
                    continue;
                }
            }
            if self.word(header, unit) != expected {
                return unit;
            }
            unit += 1;
            expected = expected.wrapping_add(step);
        }
        unit.min(last)
    }

    /// The word of `unit`; that of a damaged one if there is none.
    #[inline]
    fn word(&self, header: &Header, unit: u64) -> u64 {
        if header.spans > 0 && self.map.get(unit >> header.span_bits) == Some(0) {
            return header.empty;
        }
        self.map.get(header.spans + unit).unwrap_or(DAMAGED)
    }

    #[inline]
    fn bits_at(&self, at: u64, end: u64) -> (Found, u64) {
        let (is_data, end) = bits_run(&self.map, at, end);
        (if is_data { Found::Data(FileOffset(at)) } else { Found::Zero }, end)
    }

    /// Reads the layer's file.
    ///
    /// # Errors
    /// A bad page, or a place past its end.
    #[inline]
    pub(crate) fn read_data(&self, buf: &mut [u8], at: FileOffset) -> io::Result<()> {
        match &self.mapped {
            Some(mapped) => mapped.read(&self.file, buf, at),
            None => self.file.read_exact_at(buf, at.0),
        }
    }

    /// Copies what is decoded of one block; false if it is not there, or has gone meanwhile: `buf`
    /// holds anything then.
    pub(crate) fn read_decoded(&self, arena: &Arena, buf: &mut [u8], at: u64) -> bool {
        let Some(table) = &self.decoded else { return false };
        let bits = table.header().unit_bits;
        let block = at >> bits;
        let Some(word) = table.get(block) else { return false };
        let Some(from) = place(word) else { return false };
        // What the engine wrote before it set the word is seen by the loads after this.
        fence(Ordering::Acquire);
        let from = from + (at - (block << bits));
        if from + buf.len() as u64 > arena.len_bytes {
            return false;
        }
        let copied = match &arena.map {
            Some(map) => map.copy_to(buf, FileOffset(from)) != Copied::Not,
            None => arena.file.read_exact_at(buf, from).is_ok(),
        };
        // Before the slot is used again its word is cleared.
        fence(Ordering::Acquire);
        copied && table.get(block) == Some(word)
    }
}

/// Whether unit bits are set at `at`, and where that changes; `end` at the latest.
#[inline]
fn bits_run(table: &ReadTable, at: u64, end: u64) -> (bool, u64) {
    let bits = table.header().unit_bits;
    let first = at >> bits;
    let word = |unit: u64| table.get(unit / 64).unwrap_or(u64::MAX);
    let is_set = word(first) >> (first % 64) & 1 == 1;
    if end <= (first + 1) << bits {
        return (is_set, end);
    }
    let last = end.div_ceil(1 << bits);
    let mut unit = first;
    while unit < last {
        // A set bit marks a unit of the other kind.
        let others = if is_set { !word(unit) } else { word(unit) } >> (unit % 64);
        if others != 0 {
            unit += u64::from(others.trailing_zeros());
            break;
        }
        unit = (unit / 64 + 1) * 64;
    }
    (is_set, end.min(unit.saturating_mul(1 << bits)))
}

/// A run of data of which a part may not be there yet.
fn present(table: &ReadTable, from: FileOffset, at: u64, end: u64) -> (Found, u64) {
    let (is_there, until) = bits_run(table, from.0, from.0.saturating_add(end - at));
    let end = at + (until - from.0);
    // What the engine wrote before it set the bit is seen by the loads after this.
    fence(Ordering::Acquire);
    (if is_there { Found::Data(from) } else { Found::Ask }, end)
}
