//! What every guest cluster is, in shared memory.
//!
//! Why: a lookup is on the way of every read, from many threads and (through the memfd) from
//! other processes; foreign entries must have been judged by then.
//! How: words as in `word`, one for each unit (a cluster, or a subcluster where an image has them);
//! the first touch of one reads a page of its L2 table with pread and fills in those words. Two
//! threads that fill one page write the same words, so nobody waits. Memory is at most the size of
//! the L2 tables in the file, with subclusters 16 times that: 8 bytes for each.
//! Never: takes a lock to look up, or reads compressed bytes from the map.
//! Start at [`ClusterMap::run_at`].

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;

use super::entry::{Limits, Packed};
use super::header::Header;
use super::open::Image;
use super::snapshot::SnapshotPlaces;
use super::table::{self, Entry};
use super::word::{self, Meaning, Span};
use crate::image::decoder::{self, Decoder, Room};
use crate::image::fault::EntryFault;
use crate::image::layer::{LayerKind, LayerRun};
use crate::image::{ImageError, ReadError, Source};
use crate::map::{SharedTable, format};
use crate::units::{FileOffset, GuestOffset};

/// Bytes of an L2 table that are read at once: a page, so that opening stays instant.
const L2_READ_BYTES: usize = 4096;

/// A checked image and its cluster map.
#[derive(Debug)]
pub struct ClusterMap {
    image: Image,
    table: SharedTable,
    /// Number of span words, which come before those of the units.
    spans: usize,
    /// The word of a unit that is not stored: zero, or beneath if there is a backing file.
    empty: u64,
    path: PathBuf,
}

/// The known words from some unit to the end of its span.
enum Known<'a> {
    /// Nothing is stored up to this unit.
    EmptyUpTo(u64),
    Words(&'a [AtomicU64]),
    /// The L2 table was not read yet.
    Unread,
}

impl ClusterMap {
    /// A map with nothing filled in. `path` is for messages.
    ///
    /// # Errors
    /// [`ImageError::Map`] if the host refuses the shared memory.
    pub fn new(mut image: Image, path: &Path) -> Result<Self, ImageError> {
        // Taken apart here: the place of an L2 table is in its span word from now on.
        let l1 = std::mem::take(&mut image.l1);
        // Only a check needs them.
        image.snapshot_places = SnapshotPlaces::default();
        let spans = l1.len();
        let empty = if image.header.backing { word::BENEATH } else { word::ZERO };
        let header = Self::table_header(&image.header, spans, empty);
        let table = SharedTable::new("bedplate-clusters", &header).map_err(|source| {
            let (path, len_bytes) = (path.to_owned(), header.body_words().unwrap_or(0) * 8);
            ImageError::Map { path, what: "the cluster map", len_bytes, source }
        })?;
        let mut words = table.words().iter();
        l1.take(|at| {
            if let Some(word) = words.next().filter(|_| at != 0) {
                word.store(Span::Unread(FileOffset(at)).to_word(), Ordering::Release);
            }
        });
        Ok(Self { image, table, spans, empty, path: path.to_owned() })
    }

    fn table_header(header: &Header, spans: usize, empty: u64) -> format::Header {
        format::Header {
            kind: format::Kind::Words,
            unit_bits: header.unit_bits(),
            span_bits: header.l2_bits() + header.units_in_cluster_bits(),
            spans: spans as u64,
            units: header.units(),
            size_bytes: header.size_bytes,
            empty,
        }
    }

    /// The map itself, to be handed to a reader in another process; see [`mod@format`].
    #[must_use]
    pub fn table(&self) -> &SharedTable {
        &self.table
    }

    /// The checked header.
    #[must_use]
    pub fn header(&self) -> &Header {
        &self.image.header
    }

    /// The cluster around `at`: its number and its first byte.
    #[must_use]
    pub fn cluster_of(&self, at: GuestOffset) -> (u64, GuestOffset) {
        let bits = self.image.header.cluster_bits;
        (at.0 >> bits.get(), GuestOffset(at.0 & !bits.offset_mask()))
    }

    /// The run that begins at `at` and ends at guest byte `end` at the latest.
    ///
    /// `at < end <=` the disk's size. The run may end early where an L2 table was not read yet.
    ///
    /// # Errors
    /// The entry of `at` is damaged, or its L2 table could not be read.
    pub(in crate::image) fn run_at(
        &self,
        file: &dyn Source,
        at: GuestOffset,
        end: u64,
    ) -> Result<LayerRun, ReadError> {
        let bits = self.image.header.unit_bits();
        let unit = at.0 >> bits;
        let mut next = unit + 1;
        let kind = match self.meaning(file, unit)? {
            Meaning::Encoded(_) => {
                let cluster_bits = self.image.header.cluster_bits.get();
                next = ((at.0 >> cluster_bits) + 1) << (cluster_bits - bits);
                LayerKind::Encoded
            }
            Meaning::Data(stored_at) => {
                let expected = word::data(stored_at) + (1 << bits);
                next = self.extend(file, next, end, |n| expected + (n << bits));
                LayerKind::Data(stored_at.advance(at.0 - (unit << bits)))
            }
            Meaning::Zero => {
                next = self.extend(file, next, end, |_| word::ZERO);
                LayerKind::Zero
            }
            Meaning::Beneath => {
                next = self.extend(file, next, end, |_| word::BENEATH);
                LayerKind::Beneath
            }
            Meaning::Damaged | Meaning::Unknown => return Err(self.damage(file, unit)),
        };
        let end = end.min(next << bits);
        Ok(LayerRun { kind, len_bytes: end - at.0 })
    }

    /// Where `len` bytes from `at` on are, if they lie within one unit, are stored as they are, and that is
    /// known already. `at` is inside the disk.
    #[inline]
    pub(in crate::image) fn known_data(&self, at: GuestOffset, len: usize) -> Option<FileOffset> {
        let header = &self.image.header;
        let unit = at.0 >> header.unit_bits();
        let skip = at.0 - (unit << header.unit_bits());
        if skip.saturating_add(len as u64) > 1 << header.unit_bits() {
            return None;
        }
        let meaning = word::meaning(self.word(unit), header.cluster_bits);
        if let Meaning::Data(at) = meaning { Some(at.advance(skip)) } else { None }
    }

    /// The first unit from `next` on whose word is not as `expected`, which is given the distance
    /// from `next`. Does not look further than guest byte `end`.
    fn extend(&self, file: &dyn Source, next: u64, end: u64, expected: impl Fn(u64) -> u64) -> u64 {
        let last = end.div_ceil(1 << self.image.header.unit_bits());
        let mut unit = next;
        while unit < last {
            match self.known(unit) {
                Known::Unread => break,
                Known::EmptyUpTo(end) if expected(unit - next) == self.empty => unit = end,
                Known::EmptyUpTo(_) => break,
                Known::Words(words) => {
                    let limit = usize::try_from(last - unit).unwrap_or(usize::MAX);
                    for word in words.iter().take(limit) {
                        let mut found = word.load(Ordering::Relaxed);
                        if found == word::UNKNOWN && self.fill(file, unit).is_ok() {
                            found = word.load(Ordering::Relaxed);
                        }
                        if found != expected(unit - next) {
                            return unit;
                        }
                        unit += 1;
                    }
                }
            }
        }
        unit.min(last)
    }

    /// The span of `unit`: its number, and its units.
    fn span_of(&self, unit: u64) -> (usize, Range<u64>) {
        let header = &self.image.header;
        let span_bits = header.l2_bits() + header.units_in_cluster_bits();
        let span = unit >> span_bits;
        let end = ((span + 1) << span_bits).min(header.units());
        (usize::try_from(span).unwrap_or(usize::MAX), span << span_bits..end)
    }

    fn span(&self, index: usize) -> Span {
        Span::of_word(self.span_word(index).load(Ordering::Acquire))
    }

    fn span_word(&self, index: usize) -> &AtomicU64 {
        let spans = self.table.words().get(..self.spans);
        spans.and_then(|spans| spans.get(index)).expect("every unit has a span")
    }

    /// The words of `units`.
    fn words(&self, units: Range<u64>) -> &[AtomicU64] {
        let index = |unit| usize::try_from(unit).unwrap_or(usize::MAX);
        let words = self.table.words().get(self.spans..);
        words
            .and_then(|words| words.get(index(units.start)..index(units.end)))
            .expect("every unit has a word")
    }

    fn known(&self, unit: u64) -> Known<'_> {
        let (index, units) = self.span_of(unit);
        match self.span(index) {
            Span::Empty => Known::EmptyUpTo(units.end),
            Span::Unread(_) => Known::Unread,
            Span::Begun(_) => Known::Words(self.words(unit..units.end)),
        }
    }

    fn meaning(&self, file: &dyn Source, unit: u64) -> Result<Meaning, ReadError> {
        let bits = self.image.header.cluster_bits;
        let (index, _) = self.span_of(unit);
        if self.span(index) == Span::Empty {
            return Ok(word::meaning(self.empty, bits));
        }
        let mut found = self.word(unit);
        if found == word::UNKNOWN {
            self.fill(file, unit)?;
            found = self.word(unit);
        }
        Ok(word::meaning(found, bits))
    }

    fn word(&self, unit: u64) -> u64 {
        self.words(unit..unit + 1).first().map_or(0, |word| word.load(Ordering::Relaxed))
    }

    /// Reads the part of an L2 table around `unit`, and fills in its words. The kernel is asked for
    /// all of the table when the first part of it is read.
    #[cold]
    fn fill(&self, file: &dyn Source, unit: u64) -> Result<(), ReadError> {
        let (limits, header) = (self.image.limits(), &self.image.header);
        let (index, span) = self.span_of(unit);
        let (Span::Unread(table) | Span::Begun(table)) = self.span(index) else { return Ok(()) };
        let (in_cluster_bits, entry_bytes) =
            (header.units_in_cluster_bits(), header.l2_entry_bytes());
        let first = span.start >> in_cluster_bits;
        let clusters = (span.end - span.start).div_ceil(1 << in_cluster_bits);
        let per_read = L2_READ_BYTES as u64 / entry_bytes;
        let start = ((unit >> in_cluster_bits) - first) / per_read * per_read;
        let count = per_read.min(clusters - start);
        if self.span(index) == Span::Unread(table) {
            file.will_read(table.0, clusters * entry_bytes);
            self.span_word(index).store(Span::Begun(table).to_word(), Ordering::Release);
        }
        let mut buffer = [0; L2_READ_BYTES];
        let len = usize::try_from(count * entry_bytes).unwrap_or(0);
        let (bytes, _) = buffer.split_at_mut(len.min(L2_READ_BYTES));
        let at = table.0 + start * entry_bytes;
        file.read_exact(bytes, at).map_err(|source| ReadError::io(&self.path, at, len, source))?;
        let units = (first + start) << in_cluster_bits;
        let words = self.words(units..span.end.min(units + (count << in_cluster_bits)));
        let clusters = words.chunks(1 << in_cluster_bits).zip(table::entries(header, bytes));
        for (cluster, (words, entry)) in (first + start..).zip(clusters) {
            self.fill_cluster(words, entry, cluster, &limits);
        }
        Ok(())
    }

    /// Sets the words of one cluster; the disk's last one may have fewer than its units.
    fn fill_cluster(&self, words: &[AtomicU64], entry: Entry, cluster: u64, limits: &Limits<'_>) {
        if entry.is_empty() {
            words.iter().for_each(|word| word.store(self.empty, Ordering::Relaxed));
            return;
        }
        let unit_bits = self.image.header.unit_bits();
        let Ok(runs) = self.image.judge(entry, cluster, limits) else {
            // The reason is found again when the cluster is read.
            words.iter().for_each(|word| word.store(word::DAMAGED, Ordering::Relaxed));
            return;
        };
        let mut words = words.iter();
        runs.each(|units, meaning| {
            let (first, step) = word::of_run(meaning, entry.raw, unit_bits, self.empty);
            for (n, word) in (0..units.end - units.start).zip(&mut words) {
                word.store(first + n * step, Ordering::Relaxed);
            }
        });
    }

    /// Why the entry of `unit` is damaged: reads and judges it once more.
    #[cold]
    fn damage(&self, file: &dyn Source, unit: u64) -> ReadError {
        let header = &self.image.header;
        let (index, units) = self.span_of(unit);
        let (Span::Begun(table) | Span::Unread(table)) = self.span(index) else {
            return self.changed(FileOffset(0), 0);
        };
        let in_span = (unit - units.start) >> header.units_in_cluster_bits();
        let at = FileOffset(table.0 + in_span * header.l2_entry_bytes());
        let mut bytes = [0; 16];
        let (bytes, _) = bytes.split_at_mut(if header.extended_l2 { 16 } else { 8 });
        if let Err(source) = file.read_exact(bytes, at.0) {
            return ReadError::io(&self.path, at.0, bytes.len(), source);
        }
        let Some(entry) = table::entries(header, bytes).next() else { return self.changed(at, 0) };
        let cluster = unit >> header.units_in_cluster_bits();
        match self.image.judge(entry, cluster, &self.image.limits()) {
            Err(fault) => ReadError::fault(&self.path, fault.at(at)),
            Ok(_) => self.changed(at, entry.raw),
        }
    }

    fn changed(&self, at: FileOffset, raw: u64) -> ReadError {
        let fault = EntryFault::new("L2 entry", raw, "a file that nobody changes while it is open");
        ReadError::fault(&self.path, fault.at(at))
    }

    /// Where the compressed cluster around `at` is in the file, and its length in bytes; `None` for
    /// another kind of cluster, or one that is not known yet.
    pub(in crate::image) fn encoded_range(&self, at: GuestOffset) -> Option<(u64, u64)> {
        let unit = at.0 >> self.image.header.unit_bits();
        let (index, _) = self.span_of(unit);
        if self.span(index) == Span::Empty {
            return None;
        }
        match word::meaning(self.word(unit), self.image.header.cluster_bits) {
            Meaning::Encoded(packed) => {
                let packed = packed.clamp(self.image.file_len_bytes);
                Some((packed.at.0, packed.len_bytes))
            }
            Meaning::Data(_)
            | Meaning::Zero
            | Meaning::Beneath
            | Meaning::Damaged
            | Meaning::Unknown => None,
        }
    }

    /// Decodes the compressed cluster around `at`; ends with the cluster or with the disk.
    ///
    /// Reads the stored bytes with pread, and puts the result where `room` says. Decoders are shared
    /// and kept, results are not.
    ///
    /// # Errors
    /// [`ReadError::NotEncoded`], [`ReadError::Decode`], or those of `run_at`.
    pub fn decode(
        &self,
        file: &dyn Source,
        at: GuestOffset,
        room: Room<'_>,
    ) -> Result<Bytes, ReadError> {
        let (cluster, start) = self.cluster_of(at);
        let unit = at.0 >> self.image.header.unit_bits();
        let packed = match self.meaning(file, unit)? {
            Meaning::Encoded(packed) => packed.clamp(self.image.file_len_bytes),
            Meaning::Damaged | Meaning::Unknown => return Err(self.damage(file, unit)),
            Meaning::Data(_) | Meaning::Zero | Meaning::Beneath => {
                return Err(ReadError::NotEncoded { at });
            }
        };
        let visible = usize::try_from(self.image.visible_bytes(cluster)).unwrap_or(usize::MAX);
        let size_bytes = self.image.header.cluster_bits.size_bytes();
        let size = usize::try_from(size_bytes).expect("at most 2 MiB");
        decoder::decode(room, size, visible, |decoder, cluster| {
            self.decode_with(decoder, file, packed, start, cluster)
        })
    }

    fn decode_with(
        &self,
        decoder: &mut Decoder,
        file: &dyn Source,
        packed: Packed,
        start: GuestOffset,
        cluster: &mut [u8],
    ) -> Result<(), ReadError> {
        let Decoder { codec, stored } = decoder;
        let len = usize::try_from(packed.len_bytes).expect("at most 4 MiB");
        stored.resize(len, 0);
        file.read_exact(stored, packed.at.0)
            .map_err(|source| ReadError::io(&self.path, packed.at.0, len, source))?;
        codec.decode(self.image.header.compression, stored, cluster).map_err(|fault| {
            let (path, what) = (self.path.clone(), fault.text());
            ReadError::Decode { path, what, at: start, stored_at: packed.at }
        })
    }
}
