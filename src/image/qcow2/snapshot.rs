//! Internal snapshots: earlier states of the disk in the same file.
//!
//! Why: a snapshot may be what somebody wants to serve, and a table that qemu refuses must not be
//! taken.
//! How: entries are read one after the other through a buffer; a chosen one gives the header
//! another L1 table and another size, and everything else goes on as with the active disk.
//! Never: keeps the table, or believes a length that leaves it.
//! Start at [`each`] and [`Header::of_snapshot`]. Format: qemu `docs/interop/qcow2.rst`,
//! "Snapshots".

use std::borrow::Cow;
use std::io::{self, Read};
use std::ops::Range;

use zerocopy::FromBytes;

use super::header::{Header, check_l1, check_size};
use super::raw::RawSnapshot;
use crate::image::fault::Fault;
use crate::units::MIB;

/// Largest table that qemu reads.
const MAX_TABLE_BYTES: u64 = 64 * MIB;
/// Most extra data of an entry that qemu reads.
const MAX_EXTRA_BYTES: u32 = 1024;
/// Extra data up to and with the disk's size.
const DISK_SIZE_AT: usize = 8;
/// Bytes that are kept of an ID or a name.
const MAX_KEPT_BYTES: usize = 256;

/// An entry of the snapshot table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// Its ID: unique, mostly a number.
    pub id: String,
    /// Its name, for people.
    pub name: String,
    /// Length of the disk then, in bytes; `None`: as now.
    pub disk_size_bytes: Option<u64>,
    /// When it was taken, in seconds since 1970.
    pub taken_at_s: u32,
    /// Bytes of a running machine's memory that are kept with it.
    pub vm_state_bytes: u32,
    pub(super) l1_at: u64,
    pub(super) l1_entries: u32,
    /// Where the entry is in the file.
    pub(super) at: u64,
}

/// Where the snapshot table is, and the L1 tables that it names, as far as they can be: what nothing else
/// may lie on.
#[derive(Debug, Default)]
pub(super) struct SnapshotPlaces {
    /// Empty without snapshots.
    pub(super) table: Range<u64>,
    /// The position of the entry's field, and the L1 table.
    pub(super) l1: Vec<(u64, Range<u64>)>,
}

impl SnapshotPlaces {
    /// Adds the L1 table of an entry, if it is inside the file and a table at all.
    pub(super) fn add(&mut self, entry: &Entry, header: &Header, file_len_bytes: u64) {
        let start = entry.raw.l1_table_offset.get();
        let end = start.saturating_add(8 * u64::from(entry.raw.l1_size.get()));
        // What is wrong with others, who wants the snapshot is told: `Header::check_snapshot`.
        if start & header.cluster_bits.offset_mask() == 0 && start < end && end <= file_len_bytes {
            self.l1.push((entry.at, start..end));
        }
    }
}

/// Why a snapshot table cannot be read.
#[derive(Debug)]
pub(super) enum TableError {
    Fault(Fault),
    Read(u64, io::Error),
}

/// Gives each of the header's snapshots to `visit`. `table` reads from the table's first byte on. Returns
/// where it ends.
///
/// # Errors
/// An entry at fault, or a failed read with its place in the file.
pub(super) fn each(
    header: &Header,
    table: impl Read,
    mut visit: impl FnMut(&Entry),
) -> Result<u64, TableError> {
    let mut reader = Counted { inner: table, at: header.snapshots_at };
    for _ in 0..header.snapshots {
        let entry = entry(&mut reader)?;
        if reader.at - header.snapshots_at > MAX_TABLE_BYTES {
            let (field, found) = ("nb_snapshots", header.snapshots.into());
            let fault = Fault::malformed(field, 60, found, "a table of at most 64 MiB");
            return Err(TableError::Fault(fault));
        }
        visit(&entry);
    }
    Ok(reader.at)
}

/// Reads, and counts where it is.
struct Counted<R> {
    inner: R,
    at: u64,
}

impl<R: Read> Counted<R> {
    fn fill(&mut self, bytes: &mut [u8]) -> Result<(), TableError> {
        self.inner.read_exact(bytes).map_err(|error| TableError::Read(self.at, error))?;
        self.at += bytes.len() as u64;
        Ok(())
    }

    fn skip(&mut self, len: usize) -> Result<(), TableError> {
        let (mut nowhere, mut left) = ([0; 1024], len);
        while left > 0 {
            let (part, _) = nowhere.split_at_mut(left.min(1024));
            self.fill(part)?;
            left -= part.len();
        }
        Ok(())
    }

    fn text(&mut self, len: u16) -> Result<Text, TableError> {
        let kept = usize::from(len).min(MAX_KEPT_BYTES);
        let mut text = Text { bytes: [0; MAX_KEPT_BYTES], len: kept };
        let (bytes, _) = text.bytes.split_at_mut(kept);
        self.fill(bytes)?;
        self.skip(usize::from(len) - kept)?;
        Ok(text)
    }
}

/// The beginning of an ID or a name, as it is stored.
pub(super) struct Text {
    bytes: [u8; MAX_KEPT_BYTES],
    len: usize,
}

impl Text {
    /// As text, which is a copy only if it is none.
    pub(super) fn shown(&self) -> Cow<'_, str> {
        String::from_utf8_lossy(self.bytes.get(..self.len).unwrap_or_default())
    }
}

/// An entry of the table as it is read: most are only passed by.
pub(super) struct Entry {
    raw: RawSnapshot,
    pub(super) id: Text,
    pub(super) name: Text,
    disk_size_bytes: Option<u64>,
    at: u64,
}

impl Entry {
    pub(super) fn to_snapshot(&self) -> Snapshot {
        Snapshot {
            id: self.id.shown().into_owned(),
            name: self.name.shown().into_owned(),
            disk_size_bytes: self.disk_size_bytes,
            taken_at_s: self.raw.date_sec.get(),
            vm_state_bytes: self.raw.vm_state_size.get(),
            l1_at: self.raw.l1_table_offset.get(),
            l1_entries: self.raw.l1_size.get(),
            at: self.at,
        }
    }
}

fn entry(reader: &mut Counted<impl Read>) -> Result<Entry, TableError> {
    let at = reader.at;
    let mut head = [0; size_of::<RawSnapshot>()];
    reader.fill(&mut head)?;
    let raw = RawSnapshot::read_from_bytes(&head).expect("a buffer of its size");
    let extra_len = raw.extra_data_size.get();
    if extra_len > MAX_EXTRA_BYTES {
        let (field, found) = ("extra_data_size", extra_len.into());
        return Err(TableError::Fault(Fault::malformed(field, at + 36, found, "at most 1024")));
    }
    let mut extra = [0; DISK_SIZE_AT + 8];
    let extra_len = usize::try_from(extra_len).unwrap_or(0);
    let known = extra_len.min(extra.len());
    let (first, _) = extra.split_at_mut(known);
    reader.fill(first)?;
    let disk_size_bytes = first.get(DISK_SIZE_AT..).and_then(|rest| rest.first_chunk::<8>());
    let disk_size_bytes = disk_size_bytes.map(|bytes| u64::from_be_bytes(*bytes));
    reader.skip(extra_len - known)?;
    let (id, name) = (reader.text(raw.id_len.get())?, reader.text(raw.name_len.get())?);
    let padding = usize::try_from(reader.at.next_multiple_of(8) - reader.at).unwrap_or(0);
    // That of the table's last entry may be past the file's end.
    let _none_needed = reader.skip(padding);
    Ok(Entry { raw, id, name, disk_size_bytes, at })
}

impl Header {
    /// Whether the disk as it was when `snapshot` was taken can be opened: its size and its L1
    /// table's place, not what is in that table.
    ///
    /// # Errors
    /// The field at fault.
    pub fn check_snapshot(&self, snapshot: &Snapshot, file_len_bytes: u64) -> Result<(), Fault> {
        self.of_snapshot(snapshot, file_len_bytes).map(|_| ())
    }

    /// The header of the disk as it was when `snapshot` was taken.
    ///
    /// # Errors
    /// A size or an L1 table that cannot be: the rules are those of the active disk.
    pub(super) fn of_snapshot(
        &self,
        snapshot: &Snapshot,
        file_len_bytes: u64,
    ) -> Result<Self, Fault> {
        let size = snapshot.disk_size_bytes.unwrap_or(self.size_bytes);
        let size_at = snapshot.at + (size_of::<RawSnapshot>() + DISK_SIZE_AT) as u64;
        let size_bytes = check_size("snapshot disk size", size_at, size)?;
        let table = (snapshot.l1_at, snapshot.l1_entries);
        let places = (snapshot.at, snapshot.at + 8);
        let (bits, l2_bits) = (self.cluster_bits, self.l2_bits());
        let (l1, l1_entries) =
            check_l1(table, places, bits, l2_bits, (size_bytes, size), file_len_bytes)?;
        Ok(Self { size_bytes, l1, l1_entries, ..self.clone() })
    }
}
