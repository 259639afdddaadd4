//! Header and L1 table of an image, read from its file and checked.
//!
//! Why: opening must be instant, so that only what every read needs is read.
//! How: one cluster for the header, then the L1 entries that the disk needs: 8 bytes per 512 MiB
//! of disk with clusters of 64 KiB. Tables of snapshots and bitmaps are read through, as by qemu.
//! Never: reads more than 2 MiB of header and 32 MiB of L1 table; 64 MiB each of snapshot table and
//! bitmap directory; 32 MiB of bitmap tables.
//! Start at [`Image::open`].

use std::io::{self, BufReader, Read};
use std::ops::Range;
use std::path::Path;

use super::bitmaps::Bitmaps;
use super::entry::{Limits, decode_l1};
use super::header::{self, Given, Header};
use super::places::{L1, L2Tables};
use super::snapshot::{self, Snapshot, SnapshotPlaces, TableError};
use crate::image::fault::{EntryFault, Fault};
use crate::image::info::read_up_to;
use crate::image::{ImageError, Info, Source};
use crate::units::FileOffset;

/// Enough for the header and the extensions of nearly every image.
const FIRST_READ_BYTES: usize = 4096;
/// Bytes of the L1 table that are read at once.
const L1_READ_BYTES: usize = 256 * 1024;
/// Bytes of the snapshot table that are read at once.
const TABLE_READ_BYTES: usize = 64 * 1024;
/// Snapshots that are listed at most.
const MAX_LISTED: usize = 1000;

/// A checked header and L1 table.
#[derive(Debug)]
pub struct Image {
    pub(super) header: Header,
    pub(super) file_len_bytes: u64,
    /// Length of the external data file, if one was given.
    data_len_bytes: Option<u64>,
    /// Its entries, as far as the disk needs them.
    pub(super) l1: L1,
    /// The same places, to be searched.
    pub(super) l2_tables: L2Tables,
    /// Number of L1 entries with reserved bits set.
    pub(super) odd_l1_entries: u64,
    /// Of all its snapshots.
    pub(super) snapshot_places: SnapshotPlaces,
}

/// What of an image is opened, and what the caller gives it beside its own file.
#[derive(Clone, Copy, Debug, Default)]
pub struct Terms<'a> {
    /// The disk as it was at this internal snapshot, by ID or name; `None`: as it is now.
    pub snapshot: Option<&'a str>,
    /// True if the caller resolves what is unallocated: a backing file is given.
    pub backing: bool,
    /// Length in bytes of the external data file that is given.
    pub data_len_bytes: Option<u64>,
}

impl Terms<'_> {
    /// What is given.
    #[must_use]
    pub fn given(&self) -> Given {
        Given { backing: self.backing, data: self.data_len_bytes.is_some() }
    }
}

impl Image {
    /// Reads and checks header, extensions, snapshot table, bitmaps and L1 table. `file_len_bytes` is the
    /// sealed length.
    ///
    /// # Errors
    /// [`ImageError`] with the first field at fault, or the read that failed;
    /// [`ImageError::NoSnapshot`].
    pub fn open(
        file: &dyn Source,
        path: &Path,
        file_len_bytes: u64,
        terms: &Terms<'_>,
    ) -> Result<Self, ImageError> {
        let mut first = read_up_to(file, FIRST_READ_BYTES, path)?;
        let wanted = header::wanted_len(&first);
        if wanted > first.len() {
            first = read_up_to(file, wanted, path)?;
        }
        let refused = |fault| ImageError::fault(path, fault);
        let mut header = Header::parse(&first, file_len_bytes, terms.given()).map_err(refused)?;
        check_bitmaps(&mut header, file, path, file_len_bytes)?;
        let (chosen, mut places) =
            find_snapshot(&header, file, path, file_len_bytes, terms.snapshot)?;
        if let Some(snapshot) = chosen {
            // That table is the disk's own then.
            places.l1.retain(|(at, _)| *at != snapshot.at);
            header = header.of_snapshot(&snapshot, file_len_bytes).map_err(refused)?;
        }
        let Range { start, end } = header.l1_needed();
        let mut image = Self::without_l1(header, file_len_bytes, terms.data_len_bytes);
        image.snapshot_places = places;
        let mut buffer =
            vec![0; L1_READ_BYTES.min(usize::try_from(end - start).unwrap_or(L1_READ_BYTES))];
        for at in (start..end).step_by(L1_READ_BYTES) {
            let len = usize::try_from(end - at).unwrap_or(L1_READ_BYTES).min(L1_READ_BYTES);
            let bytes = buffer.get_mut(..len).expect("at most the buffer");
            file.read_exact(bytes, at).map_err(|source| ImageError::read(path, at, len, source))?;
            image.take_l1(bytes).map_err(refused)?;
        }
        image.with_l2_tables().map_err(refused)
    }

    /// From a checked header and the bytes of [`Header::l1_needed`], wherever they came from, of an
    /// image without an external data file. Pure.
    ///
    /// # Errors
    /// The first entry at fault.
    pub fn from_l1(header: Header, file_len_bytes: u64, l1_bytes: &[u8]) -> Result<Self, Fault> {
        let mut image = Self::without_l1(header, file_len_bytes, None);
        image.take_l1(l1_bytes)?;
        image.with_l2_tables()
    }

    fn without_l1(header: Header, file_len_bytes: u64, data_len_bytes: Option<u64>) -> Self {
        let l2_tables = L2Tables::of(std::iter::empty(), header.cluster_bits);
        let l1 = L1::new(header.l1_entries);
        let snapshot_places = SnapshotPlaces::default();
        let odd_l1_entries = 0;
        Self {
            header,
            file_len_bytes,
            data_len_bytes,
            l1,
            l2_tables,
            odd_l1_entries,
            snapshot_places,
        }
    }

    fn with_l2_tables(mut self) -> Result<Self, Fault> {
        let bits = self.header.cluster_bits;
        self.l2_tables = L2Tables::of_l1(&self.l1, self.file_len_bytes, bits);
        self.refuse_shared_l2_tables()?;
        Ok(self)
    }

    /// The internal snapshots, the oldest first; at most 1000 of them.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn snapshots(&self, file: &dyn Source, path: &Path) -> Result<Vec<Snapshot>, ImageError> {
        let table = ReadFrom { file, at: self.header.snapshots_at };
        self.list_snapshots(table, path).map(|(listed, _)| listed)
    }

    /// The same, of an image [`from_l1`](Self::from_l1); its check holds everything else against them then.
    /// `table` reads from the snapshot table's first byte on; `path` is for messages.
    ///
    /// # Errors
    /// [`ImageError`] with the entry at fault, or the read that failed.
    pub fn take_snapshots(
        &mut self,
        table: impl Read,
        path: &Path,
    ) -> Result<Vec<Snapshot>, ImageError> {
        let (listed, places) = self.list_snapshots(table, path)?;
        self.snapshot_places = places;
        Ok(listed)
    }

    fn list_snapshots(
        &self,
        table: impl Read,
        path: &Path,
    ) -> Result<(Vec<Snapshot>, SnapshotPlaces), ImageError> {
        let (mut listed, mut places) = (Vec::new(), SnapshotPlaces::default());
        let end = each_snapshot(&self.header, table, path, |entry| {
            places.add(entry, &self.header, self.file_len_bytes);
            if listed.len() < MAX_LISTED {
                listed.push(entry.to_snapshot());
            }
        })?;
        places.table = self.header.snapshots_at..end;
        Ok((listed, places))
    }

    /// What the entries of this image are judged against.
    pub(super) fn limits(&self) -> Limits<'_> {
        Limits {
            version: self.header.version,
            bits: self.header.cluster_bits,
            file_len_bytes: self.file_len_bytes,
            l1: &self.header.l1,
            l2_tables: &self.l2_tables,
            data_len_bytes: self.data_len_bytes.filter(|_| self.header.external_data),
        }
    }

    /// Puts what the header says into `info`.
    pub fn describe(&self, info: &mut Info) {
        let header = &self.header;
        info.virtual_size_bytes = header.size_bytes;
        info.cluster_size_bytes = Some(header.cluster_bits.size_bytes());
        info.qcow2_version = Some(header.version);
        info.compression = Some(header.compression);
        info.extended_l2 = Some(header.extended_l2);
        info.snapshots = Some(header.snapshots);
        info.bitmaps = Some(header.bitmaps.map_or(0, |directory| directory.count()));
        info.notes.extend(header.notes.iter().map(|&note| note.to_owned()));
        if self.odd_l1_entries > 0 {
            let count = self.odd_l1_entries;
            info.notes.push(format!("{count} L1 entries have reserved bits set; ignored"));
        }
    }

    /// Takes the next L1 entries.
    fn take_l1(&mut self, bytes: &[u8]) -> Result<(), Fault> {
        let (entries, _none) = bytes.as_chunks();
        let mut l1 = std::mem::take(&mut self.l1);
        let (mut odd, limits) = (0, self.limits());
        for &entry in entries {
            let raw = u64::from_be_bytes(entry);
            if raw == 0 {
                l1.push(0);
                continue;
            }
            let table = decode_l1(raw, &limits).map_err(|fault| self.l1_fault(l1.len(), fault))?;
            odd += u64::from(super::entry::reserved_l1_bits(raw) != 0);
            l1.push(table.map_or(0, |at| at.0));
        }
        self.l1 = l1;
        self.odd_l1_entries += odd;
        Ok(())
    }

    /// Two L1 entries with one L2 table: no writer makes that, and it would let a small file fill
    /// a map of any size.
    fn refuse_shared_l2_tables(&self) -> Result<(), Fault> {
        let Some(table) = self.l2_tables.twice() else { return Ok(()) };
        let same = self.l1.iter().enumerate().filter(|&(_, at)| at == table);
        let index = same.last().map_or(0, |(index, _)| index);
        let fault = EntryFault::new("L2 table offset", table, "one L1 entry for each L2 table");
        Err(self.l1_fault(index, fault))
    }

    fn l1_fault(&self, index: usize, fault: EntryFault) -> Fault {
        fault.at(FileOffset(self.header.l1.start + 8 * index as u64))
    }
}

/// Reads from a place in a file on.
struct ReadFrom<'a> {
    file: &'a dyn Source,
    at: u64,
}

impl Read for ReadFrom<'_> {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        let count = self.file.read_some(bytes, self.at)?;
        self.at += count as u64;
        Ok(count)
    }
}

fn each_snapshot(
    header: &Header,
    table: impl Read,
    path: &Path,
    visit: impl FnMut(&snapshot::Entry),
) -> Result<u64, ImageError> {
    if header.snapshots == 0 {
        return Ok(header.snapshots_at);
    }
    let table = BufReader::with_capacity(TABLE_READ_BYTES, table);
    snapshot::each(header, table, visit).map_err(|error| match error {
        TableError::Fault(fault) => ImageError::fault(path, fault),
        TableError::Read(_, source) if source.kind() == io::ErrorKind::UnexpectedEof => {
            let need = "a table inside the file";
            let fault = Fault::malformed("snapshots_offset", 64, header.snapshots_at, need);
            ImageError::fault(path, fault)
        }
        TableError::Read(at, source) => ImageError::read(path, at, TABLE_READ_BYTES, source),
    })
}

/// Reads directory and tables of the bitmaps, as qemu does.
fn check_bitmaps(
    header: &mut Header,
    file: &dyn Source,
    path: &Path,
    file_len_bytes: u64,
) -> Result<(), ImageError> {
    let mut bitmaps = Bitmaps::of(header, file_len_bytes);
    let mut buffer = Vec::new();
    while let Some(Range { start, end }) = bitmaps.wanted() {
        let len = usize::try_from(end - start).expect("at most 1 MiB");
        buffer.resize(len, 0);
        file.read_exact(&mut buffer, start)
            .map_err(|source| ImageError::read(path, start, len, source))?;
        bitmaps.take(&buffer).map_err(|fault| ImageError::fault(path, fault))?;
    }
    header.notes.extend(bitmaps.notes());
    Ok(())
}

/// Reads the whole snapshot table, as qemu does, and gives the entry that is `wanted`: by its ID,
/// else by its name; the first if there are several. Also where all of it is.
fn find_snapshot(
    header: &Header,
    file: &dyn Source,
    path: &Path,
    file_len_bytes: u64,
    wanted: Option<&str>,
) -> Result<(Option<Snapshot>, SnapshotPlaces), ImageError> {
    let (mut by_id, mut by_name) = (None, None);
    let mut places = SnapshotPlaces::default();
    let table = ReadFrom { file, at: header.snapshots_at };
    let end = each_snapshot(header, table, path, |entry| {
        places.add(entry, header, file_len_bytes);
        let Some(wanted) = wanted else { return };
        if by_id.is_none() && entry.id.shown() == wanted {
            by_id = Some(entry.to_snapshot());
        } else if by_name.is_none() && entry.name.shown() == wanted {
            by_name = Some(entry.to_snapshot());
        }
    })?;
    places.table = header.snapshots_at..end;
    match (wanted, by_id.or(by_name)) {
        (None, _) => Ok((None, places)),
        (Some(_), Some(found)) => Ok((Some(found), places)),
        (Some(wanted), None) => Err(ImageError::NoSnapshot {
            path: path.to_owned(),
            wanted: wanted.chars().take(80).collect(),
            count: header.snapshots,
        }),
    }
}
