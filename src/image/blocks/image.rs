//! A checked image: its size, and the layout of its table.
//!
//! Why: opening, inspecting a file and inspecting a URL judge the same things.
//! How: [`Image::parse`] is pure; [`Image::open`] reads what it asks for. The full check reads the
//! table page by page.
//! Never: reads data, or more of the table than a page at a time.
//! Start at [`Image::parse`].

use std::ops::Range;
use std::path::Path;

use super::layout::{Block, Layout, Page};
use super::parts::{Parts, Want};
use super::{vhd, vhdx, vmdk};
use crate::image::qcow2::Compression;
use crate::image::tally::Tally;
use crate::image::{Format, ImageError, Info, Source};

/// What a file of one of these formats is.
#[derive(Clone, Debug)]
pub struct Image {
    pub(super) size_bytes: u64,
    /// True if blocks are compressed.
    pub(super) compressed: bool,
    /// Oddities that change no byte.
    pub(super) notes: Vec<&'static str>,
    /// `None`: the file begins with the disk, as it is.
    pub(super) layout: Option<Layout>,
}

impl Image {
    /// Parses what there is of a file; `None` if `format` is none of these formats. Pure.
    ///
    /// # Errors
    /// [`Want`]: bytes that are needed first, or the first field at fault.
    #[must_use]
    pub fn parse(format: Format, parts: &Parts) -> Option<Result<Self, Want>> {
        match format {
            Format::Vmdk => Some(vmdk::parse(parts)),
            Format::Vhd => Some(vhd::parse(parts)),
            Format::Vhdx => Some(vhdx::parse(parts)),
            Format::Raw | Format::Qcow2 => None,
        }
    }

    /// Reads and checks all but the entries of the table; `None` as for [`parse`](Self::parse).
    /// `path` is for messages.
    ///
    /// # Errors
    /// [`ImageError`] with the first field at fault, or the read that failed.
    pub fn open(
        file: &dyn Source,
        path: &Path,
        format: Format,
        file_len_bytes: u64,
    ) -> Result<Option<Self>, ImageError> {
        let mut parts = Parts::new(file_len_bytes);
        loop {
            match Self::parse(format, &parts) {
                None => return Ok(None),
                Some(Ok(image)) => return Ok(Some(image)),
                Some(Err(Want::Refused(fault))) => return Err(ImageError::fault(path, fault)),
                Some(Err(Want::Bytes(range))) => {
                    let at = range.start;
                    parts.add(at, read(file, path, range)?);
                }
            }
        }
    }

    /// The layout of the table; `None` if there is no table, as in a fixed VHD.
    #[must_use]
    pub fn layout(&self) -> Option<&Layout> {
        self.layout.as_ref()
    }

    /// Puts what the header says into `info`.
    pub fn describe(&self, info: &mut Info) {
        info.virtual_size_bytes = self.size_bytes;
        info.cluster_size_bytes = self.layout.as_ref().map(Layout::block_bytes);
        info.compression = self.compressed.then_some(Compression::Zlib);
        info.notes.extend(self.notes.iter().map(|&note| note.to_owned()));
    }

    /// Puts the counts of blocks, if there are any, into `info`.
    pub fn count(&self, tally: &Tally, info: &mut Info) {
        if self.layout.is_some() {
            tally.describe(info);
        }
    }

    /// Judges every entry of the table.
    ///
    /// # Errors
    /// The read that failed; damaged entries are in the tally.
    pub fn tally(&self, file: &dyn Source, path: &Path) -> Result<Tally, ImageError> {
        let mut tally = Tally::default();
        let Some(layout) = &self.layout else { return Ok(tally) };
        for page in layout.pages() {
            let bytes = match page.stored.clone() {
                Some(stored) => read(file, path, stored)?,
                None => Vec::new(),
            };
            self.tally_page(&page, &bytes, &mut tally);
        }
        Ok(tally)
    }

    /// Adds one page, whose bytes are those of [`Page::stored`] (none if it is not stored), to
    /// `tally`.
    pub fn tally_page(&self, page: &Page, bytes: &[u8], tally: &mut Tally) {
        let Some(layout) = self.layout.as_ref().filter(|_| page.stored.is_some()) else {
            tally.counts.zero += page.blocks;
            return;
        };
        for (at, judged) in layout.judge_page(page, bytes) {
            match judged {
                Ok(Block::Data(_)) => tally.counts.data += 1,
                Ok(Block::Zero) => tally.counts.zero += 1,
                Ok(Block::Encoded(_)) => tally.counts.compressed += 1,
                Err(fault) => tally.add_fault(fault.at(at)),
            }
        }
    }
}

fn read(file: &dyn Source, path: &Path, range: Range<u64>) -> Result<Vec<u8>, ImageError> {
    let len = usize::try_from(range.end - range.start).unwrap_or(usize::MAX);
    let mut bytes = vec![0; len];
    file.read_exact(&mut bytes, range.start)
        .map_err(|source| ImageError::read(path, range.start, len, source))?;
    Ok(bytes)
}
