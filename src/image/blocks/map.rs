//! What every block is, decided when it is first touched.
//!
//! Why: a lookup is on the way of every read, from many threads; foreign entries must have been
//! judged by then.
//! How: one word for each block. The first touch of one reads a page of the table and fills in all
//! of its words; two threads that fill one page write the same words, so nobody waits. What a span
//! that is not stored would have is never written, so memory is at most twice the table's.
//! Never: takes a lock to look up, or reads compressed bytes from the map.
//! Start at [`BlockMap::run_at`].
//!
//! The words are those of [`mod@format`]; that of a compressed grain has its file offset.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;

use super::layout::{Block, GRAIN_MARKER_BYTES, Layout, Page};
use crate::image::decoder::{self, Decoder, Room};
use crate::image::fault::EntryFault;
use crate::image::layer::{LayerKind, LayerRun};
use crate::image::{ImageError, ReadError, Source};
use crate::map::SharedTable;
use crate::map::format::{self, DAMAGED, DATA, ENCODED, KIND_BITS, ZERO};
use crate::units::{FileOffset, GuestOffset};

const UNKNOWN: u64 = 0;
/// Blocks that one run is made of at most: whoever asks for all of a disk should not fill in all.
const MAX_RUN_BLOCKS: u64 = 1 << 15;

/// A checked layout, and what is known of its blocks.
#[derive(Debug)]
pub struct BlockMap {
    layout: Layout,
    table: SharedTable,
    path: PathBuf,
}

impl BlockMap {
    /// A map with nothing filled in. `path` is for messages.
    ///
    /// # Errors
    /// [`ImageError::Map`] if the host refuses the memory.
    pub fn new(layout: Layout, path: &Path) -> Result<Self, ImageError> {
        let header = format::Header {
            kind: format::Kind::Words,
            unit_bits: layout.block_bits,
            units: layout.blocks(),
            size_bytes: layout.size_bytes,
            ..format::Header::EMPTY
        };
        let table = SharedTable::new("bedplate-blocks", &header).map_err(|source| {
            let (path, len_bytes) = (path.to_owned(), header.units * 8);
            ImageError::Map { path, what: "the block map", len_bytes, source }
        })?;
        Ok(Self { layout, table, path: path.to_owned() })
    }

    /// The map itself, for readers in other processes.
    #[must_use]
    pub fn table(&self) -> &SharedTable {
        &self.table
    }

    /// Where the entries are.
    #[must_use]
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// The block around `at`: its number and its first byte.
    #[must_use]
    pub fn block_of(&self, at: GuestOffset) -> (u64, GuestOffset) {
        let block = at.0 >> self.layout.block_bits;
        (block, GuestOffset(block << self.layout.block_bits))
    }

    /// The run that begins at `at` and ends at guest byte `end` at the latest; `at < end <=` the
    /// disk's size.
    ///
    /// # Errors
    /// The entry of `at` is damaged, or could not be read.
    pub(in crate::image) fn run_at(
        &self,
        file: &dyn Source,
        at: GuestOffset,
        end: u64,
    ) -> Result<LayerRun, ReadError> {
        let bits = self.layout.block_bits;
        let (block, start) = self.block_of(at);
        let word = self.word(file, block)?;
        let (kind, next) = match word & KIND_BITS {
            _ if word & ENCODED != 0 => (LayerKind::Encoded, block + 1),
            DATA => {
                let expected = |n| word + (n << bits);
                let stored = FileOffset((word & !KIND_BITS) + (at.0 - start.0));
                (LayerKind::Data(stored), self.extend(file, block, end, expected))
            }
            ZERO => (LayerKind::Zero, self.extend(file, block, end, |_| ZERO)),
            _damaged => return Err(self.damage(file, block)),
        };
        let end = end.min(next << bits);
        Ok(LayerRun { kind, len_bytes: end - at.0 })
    }

    /// The first block after `first` whose word is not as `expected`, which is given the distance
    /// from `first`. Does not look further than guest byte `end`, nor very far.
    fn extend(
        &self,
        file: &dyn Source,
        first: u64,
        end: u64,
        expected: impl Fn(u64) -> u64,
    ) -> u64 {
        let last = end.div_ceil(self.layout.block_bytes()).min(first + MAX_RUN_BLOCKS);
        let same =
            |&block: &u64| self.word(file, block).is_ok_and(|word| word == expected(block - first));
        (first + 1..last).find(|block| !same(block)).unwrap_or(last)
    }

    /// The word of `block`, filled in.
    fn word(&self, file: &dyn Source, block: u64) -> Result<u64, ReadError> {
        let word = self.slot(block);
        match word.load(Ordering::Relaxed) {
            UNKNOWN => {}
            known => return Ok(known),
        }
        let page = self.layout.page_of(block);
        if page.stored.is_none() {
            return Ok(ZERO);
        }
        self.fill(file, &page)?;
        Ok(word.load(Ordering::Relaxed))
    }

    fn slot(&self, block: u64) -> &AtomicU64 {
        let words = self.table.words();
        usize::try_from(block)
            .ok()
            .and_then(|index| words.get(index))
            .expect("every block has a word")
    }

    #[cold]
    fn fill(&self, file: &dyn Source, page: &Page) -> Result<(), ReadError> {
        let bytes = self.read_page(file, page)?;
        for (block, (_, judged)) in (page.first_block..).zip(self.layout.judge_page(page, &bytes)) {
            let word = match judged {
                Ok(Block::Data(at)) => at.0 | DATA,
                Ok(Block::Zero) => ZERO,
                Ok(Block::Encoded(at)) => at.0 | ENCODED,
                // The reason is found again when the block is read.
                Err(_) => DAMAGED,
            };
            self.slot(block).store(word, Ordering::Relaxed);
        }
        Ok(())
    }

    fn read_page(&self, file: &dyn Source, page: &Page) -> Result<Vec<u8>, ReadError> {
        let stored = page.stored.clone().unwrap_or_default();
        let len = usize::try_from(stored.end - stored.start).unwrap_or(usize::MAX);
        let mut bytes = vec![0; len];
        file.read_exact(&mut bytes, stored.start)
            .map_err(|source| ReadError::io(&self.path, stored.start, len, source))?;
        Ok(bytes)
    }

    /// Why the entry of `block` is damaged: reads and judges it once more.
    #[cold]
    fn damage(&self, file: &dyn Source, block: u64) -> ReadError {
        let page = self.layout.page_of(block);
        let bytes = match self.read_page(file, &page) {
            Ok(bytes) => bytes,
            Err(error) => return error,
        };
        let index = usize::try_from(block - page.first_block).unwrap_or(usize::MAX);
        let fault = match self.layout.judge_page(&page, &bytes).nth(index) {
            Some((at, Err(fault))) => fault.at(at),
            Some((_, Ok(_))) | None => {
                let start = page.stored.as_ref().map_or(0, |stored| stored.start);
                EntryFault::new("table entry", 0, "a file that nobody changes while it is open")
                    .at(FileOffset(start))
            }
        };
        ReadError::fault(&self.path, fault)
    }

    /// Where the compressed grain around `at` is in the file, and how many bytes it has at most, its
    /// marker among them; `None` for another kind of block, or one that is not known yet.
    pub(in crate::image) fn encoded_range(&self, at: GuestOffset) -> Option<(u64, u64)> {
        let (block, _) = self.block_of(at);
        let word = self.slot(block).load(Ordering::Relaxed);
        let stored_at = word & !(ENCODED | KIND_BITS);
        let left = self.layout.file_len_bytes.saturating_sub(stored_at);
        let most = GRAIN_MARKER_BYTES + self.layout.block_bytes();
        (word & ENCODED != 0).then(|| (stored_at, most.min(left)))
    }

    /// Decodes the compressed grain around `at`; ends with the block or with the disk.
    ///
    /// # Errors
    /// [`ReadError::NotEncoded`], [`ReadError::Decode`], or those of `run_at`.
    pub fn decode(
        &self,
        file: &dyn Source,
        at: GuestOffset,
        room: Room<'_>,
    ) -> Result<Bytes, ReadError> {
        let (block, start) = self.block_of(at);
        let word = self.word(file, block)?;
        let stored_at = match word & KIND_BITS {
            _ if word & ENCODED != 0 => FileOffset(word & !(ENCODED | KIND_BITS)),
            DAMAGED => return Err(self.damage(file, block)),
            _another_kind => return Err(ReadError::NotEncoded { at }),
        };
        let grain = Grain { at: stored_at, start, visible_bytes: self.layout.visible_bytes(block) };
        let size = usize::try_from(self.layout.block_bytes()).expect("a grain is at most 2 MiB");
        let visible = usize::try_from(grain.visible_bytes).unwrap_or(size);
        decoder::decode(room, size, visible, |decoder, cluster| {
            self.decode_with(decoder, file, &grain, cluster)
        })
    }

    fn decode_with(
        &self,
        decoder: &mut Decoder,
        file: &dyn Source,
        grain: &Grain,
        block: &mut [u8],
    ) -> Result<(), ReadError> {
        let Grain { at: stored_at, start: at, visible_bytes } = *grain;
        let damaged = |what| ReadError::Decode { path: self.path.clone(), what, at, stored_at };
        let read = |bytes: &mut [u8], at| {
            let len = bytes.len();
            file.read_exact(bytes, at).map_err(|source| ReadError::io(&self.path, at, len, source))
        };
        let mut marker = [0; 12];
        read(&mut marker, stored_at.0)?;
        let [.., a, b, c, d] = marker;
        let len_bytes = u64::from(u32::from_le_bytes([a, b, c, d]));
        if len_bytes == 0 || len_bytes > 2 * self.layout.block_bytes() {
            return Err(damaged("grain marker with a length of 0, or of more than two grains"));
        }
        let from = stored_at.0 + GRAIN_MARKER_BYTES;
        if from + len_bytes > self.layout.file_len_bytes {
            return Err(damaged("compressed data that ends past the file"));
        }
        let Decoder { codec, stored } = decoder;
        stored.resize(usize::try_from(len_bytes).expect("at most 4 MiB"), 0);
        read(stored, from)?;
        let least = usize::try_from(visible_bytes).unwrap_or(usize::MAX);
        codec.unzlib(stored, block, least).map_err(|fault| damaged(fault.text()))
    }
}

/// A compressed block: where it is, on the disk and in the file, and how much of it is needed.
struct Grain {
    at: FileOffset,
    start: GuestOffset,
    visible_bytes: u64,
}
