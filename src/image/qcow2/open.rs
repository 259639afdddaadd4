//! Header and L1 table of an image, read from its file and checked.
//!
//! Why: opening must be instant, so that only what every read needs is read.
//! How: one cluster for the header, then the L1 entries that the disk needs: 8 bytes per 512 MiB
//! of disk with clusters of 64 KiB.
//! Never: reads more than 2 MiB of header and 32 MiB of L1 table.
//! Start at [`Image::open`].

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;

use super::entry::{Limits, decode_l1};
use super::fault::EntryFault;
use super::header::{self, Header};
use crate::image::info::read_up_to;
use crate::image::{ImageError, Info};
use crate::units::FileOffset;

/// Enough for the header and the extensions of nearly every image.
const FIRST_READ_BYTES: usize = 4096;

/// A checked header and L1 table.
#[derive(Debug)]
pub struct Image {
    pub(super) header: Header,
    pub(super) file_len_bytes: u64,
    /// For each L1 entry that the disk needs, the place of its L2 table; 0 for none.
    pub(super) l1: Vec<u64>,
    /// The same places, ascending, without the zeroes.
    pub(super) l2_tables: Vec<u64>,
    /// Number of L1 entries with reserved bits set.
    pub(super) odd_l1_entries: u64,
}

impl Image {
    /// Reads and checks header, extensions and L1 table. `file_len_bytes` is the sealed length.
    ///
    /// # Errors
    /// [`ImageError`] with the first field at fault, or the read that failed.
    pub fn open(file: &File, path: &Path, file_len_bytes: u64) -> Result<Self, ImageError> {
        let mut first = read_up_to(file, FIRST_READ_BYTES, path)?;
        let wanted = header::wanted_len(&first);
        if wanted > first.len() {
            first = read_up_to(file, wanted, path)?;
        }
        let header = Header::parse(&first, file_len_bytes)
            .map_err(|fault| ImageError::fault(path, fault))?;
        let Range { start, end } = header.l1_needed();
        let len = usize::try_from(end - start).expect("an L1 table is <= 32 MiB");
        let mut bytes = vec![0; len];
        file.read_exact_at(&mut bytes, start)
            .map_err(|source| ImageError::read(path, start, len, source))?;
        Self::from_l1(header, file_len_bytes, &bytes, path)
    }

    /// From a checked header and the bytes of [`Header::l1_needed`], wherever they came from.
    /// `path` is for messages. Pure.
    ///
    /// # Errors
    /// [`ImageError`] with the first entry at fault.
    pub fn from_l1(
        header: Header,
        file_len_bytes: u64,
        l1_bytes: &[u8],
        path: &Path,
    ) -> Result<Self, ImageError> {
        let mut image = Self {
            header,
            file_len_bytes,
            l1: Vec::new(),
            l2_tables: Vec::new(),
            odd_l1_entries: 0,
        };
        image.take_l1(l1_bytes, path)?;
        image.refuse_shared_l2_tables(path)?;
        Ok(image)
    }

    /// What the entries of this image are judged against.
    pub(super) fn limits(&self) -> Limits<'_> {
        Limits {
            version: self.header.version,
            bits: self.header.cluster_bits,
            file_len_bytes: self.file_len_bytes,
            l1: &self.header.l1,
            l2_tables: &self.l2_tables,
        }
    }

    /// Puts what the header says into `info`.
    pub fn describe(&self, info: &mut Info) {
        let header = &self.header;
        info.virtual_size_bytes = header.size_bytes;
        info.cluster_size_bytes = Some(header.cluster_bits.size_bytes());
        info.qcow2_version = Some(header.version);
        info.compression = Some(header.compression);
        info.snapshots = Some(header.snapshots);
        info.notes.extend(header.notes.iter().map(|&note| note.to_owned()));
        if header.snapshots > 0 {
            info.notes.push(format!("{} internal snapshots are ignored", header.snapshots));
        }
        if self.odd_l1_entries > 0 {
            let count = self.odd_l1_entries;
            info.notes.push(format!("{count} L1 entries have reserved bits set; ignored"));
        }
    }

    fn take_l1(&mut self, bytes: &[u8], path: &Path) -> Result<(), ImageError> {
        let (entries, _none) = bytes.as_chunks();
        self.l1.reserve_exact(entries.len());
        for (index, &entry) in entries.iter().enumerate() {
            let raw = u64::from_be_bytes(entry);
            let table = decode_l1(raw, &self.limits())
                .map_err(|fault| self.l1_error(path, index, fault))?;
            self.odd_l1_entries += u64::from(super::entry::reserved_l1_bits(raw) != 0);
            self.l1.push(table.map_or(0, |at| at.0));
        }
        self.l2_tables = self.l1.iter().copied().filter(|&at| at != 0).collect();
        self.l2_tables.sort_unstable();
        Ok(())
    }

    /// Two L1 entries with one L2 table: no writer makes that, and it would let a small file fill
    /// a map of any size.
    fn refuse_shared_l2_tables(&self, path: &Path) -> Result<(), ImageError> {
        let twice = self.l2_tables.windows(2).find_map(|pair| match pair {
            [a, b] if a == b => Some(*a),
            _different => None,
        });
        let Some(table) = twice else { return Ok(()) };
        let index = self.l1.iter().rposition(|&at| at == table).unwrap_or(0);
        let fault = EntryFault::new("L2 table offset", table, "one L1 entry for each L2 table");
        Err(self.l1_error(path, index, fault))
    }

    fn l1_error(&self, path: &Path, index: usize, fault: EntryFault) -> ImageError {
        let at = FileOffset(self.header.l1.start + 8 * index as u64);
        ImageError::fault(path, fault.at(at))
    }
}
