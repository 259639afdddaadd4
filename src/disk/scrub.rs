//! Holds a sealed file against the digests of its MiBs, and mends it where it is.
//!
//! Why: a byte that rots, or that somebody changed, must be found and made good before a reader gets
//! it, and while readers have the file open.
//! How: each MiB is read past the page cache where that works, so that what is judged is the disk's,
//! and readers' warm pages stay. What is bad is written down in `backing.repair`, durably, before
//! the first byte is mended; while that file is there the copy counts as unchecked, so that a crash
//! at any moment ends in a check of the whole. Then right bytes are written over wrong ones.
//! Never: writes a byte that is not the one of the recorded digest; truncates or renames over a file
//! that was handed out: descriptors and maps would go on showing the bad bytes, or fault.
//! Start at [`Disk::scrub`], then [`Mending`].

use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::PathBuf;

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use super::cfg::go_time;
use super::digests::DigestRecord;
use super::layout::FileNames;
use super::readback::next_data;
use super::store::{read_cfg, ready_record};
use super::{CopyId, Dir, Disk, DiskError, xxh3_of, xxh3_of_zero_mib};
use crate::ring::{Buf, BufPool};
use crate::units::MIB;

/// The ranges that are bad, while they are mended and until the whole was checked.
const MARK: &str = "backing.repair";

/// What a scrub has found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Scrubbed {
    /// Bytes that are wrong or cannot be read: whole MiBs, ascending, adjoining ones in one range.
    pub bad: Vec<Range<u64>>,
    /// True if the file's size or time is not the recorded one.
    pub changed: bool,
}

#[derive(Serialize, Deserialize)]
struct Mark {
    bad: Vec<(u64, u64)>,
}

/// Bytes of these ranges.
#[must_use]
pub fn bytes_of(ranges: &[Range<u64>]) -> u64 {
    ranges.iter().map(|range| range.end.saturating_sub(range.start)).sum()
}

/// True if a scrub has found bad bytes and nobody has checked the whole since.
pub(super) fn is_suspect(dir: &Dir) -> Result<bool, DiskError> {
    Ok(dir.try_open_file(MARK, OFlags::RDONLY)?.is_some())
}

/// The whole was checked and is not right, somewhere.
pub(super) fn suspect(dir: &Dir) -> Result<(), DiskError> {
    if is_suspect(dir)? { Ok(()) } else { store_mark(dir, &[]) }
}

/// The whole was checked.
pub(super) fn clear(dir: &Dir) -> Result<(), DiskError> {
    if is_suspect(dir)? {
        dir.remove_file(MARK)?;
        dir.sync()?;
    }
    Ok(())
}

/// A file as a scrub reads it.
struct Reader {
    file: File,
    direct: Option<File>,
    path: PathBuf,
    buf: Buf,
}

impl Reader {
    fn open(dir: &Dir, name: &str) -> Result<Self, DiskError> {
        let path = dir.join(name);
        let file = dir.open_file(name, OFlags::RDONLY)?;
        let direct = dir.open_file(name, OFlags::RDONLY | OFlags::DIRECT).ok();
        let buf = BufPool::new(1).try_take();
        let buf = buf.map_err(|e| DiskError::io("get memory to read", &path, e))?;
        Ok(Self { file, direct, path, buf })
    }

    fn len_bytes(&self) -> Result<u64, DiskError> {
        let meta = self.file.metadata().map_err(|e| DiskError::io("stat", &self.path, e))?;
        Ok(meta.len())
    }

    /// The digest of the block at `at`; `None` if it cannot be read, or not all of it is there.
    fn digest(&mut self, at: u64, len: usize) -> Option<u64> {
        let whole = usize::try_from(MIB).unwrap_or(len);
        self.buf.set_len(0);
        if let Some(direct) = &self.direct {
            match direct.read_at(self.buf.spare(whole), at) {
                Ok(count) if count >= len => {
                    self.buf.set_len(len);
                    return Some(xxh3_of(self.buf.bytes()));
                }
                // Short in the middle, or refused: as anybody else reads it.
                Ok(_) => {}
                Err(error) if error.raw_os_error() == Some(Errno::INVAL.raw_os_error()) => {
                    self.direct = None;
                }
                Err(error) => {
                    tracing::warn!(path = %self.path.display(), at, %error, "a scrub cannot read");
                    return None;
                }
            }
        }
        match self.file.read_exact_at(self.buf.spare(len), at) {
            Ok(()) => {
                self.buf.set_len(len);
                Some(xxh3_of(self.buf.bytes()))
            }
            Err(error) => {
                tracing::warn!(path = %self.path.display(), at, %error, "a scrub cannot read");
                None
            }
        }
    }
}

/// Length of block `index` of a file of `size` bytes.
fn block_len(index: u64, size: u64) -> usize {
    usize::try_from(size.saturating_sub(index * MIB).min(MIB)).unwrap_or(0)
}

fn zero_digest(len: usize) -> u64 {
    if len as u64 == MIB { xxh3_of_zero_mib() } else { xxh3_of(&vec![0; len]) }
}

fn add(bad: &mut Vec<Range<u64>>, range: Range<u64>) {
    match bad.last_mut() {
        Some(last) if last.end == range.start => last.end = range.end,
        Some(_) | None => bad.push(range),
    }
}

impl Disk {
    /// Reads a sealed file against the recorded digests of its MiBs. What is found bad is marked:
    /// the copy is [`super::CopyState::Unchecked`] from then on, also after a crash.
    ///
    /// `pace` is told how far it is, in bytes, and how many of them were read since it was last told;
    /// it may wait, and ends the work by returning false.
    ///
    /// # Errors
    /// [`DiskError::NoDigests`] if there are none to hold it against; [`DiskError::Damaged`] if the
    /// file is longer than recorded; [`DiskError::Io`], of kind `Interrupted` if `pace` ended it.
    pub fn scrub(
        &self,
        id: &CopyId,
        pace: &mut dyn FnMut(u64, u64) -> bool,
    ) -> Result<Scrubbed, DiskError> {
        let (dir, layout, record) = self.recorded_blocks(id)?;
        let mut reader = Reader::open(&dir, &layout.data)?;
        let changed = is_suspect(&dir)? || ready_record(&dir, &layout, &reader.file)?.is_none();
        let (len, size) = (reader.len_bytes()?, record.size_bytes);
        if len > size {
            let why = format!("it has {len} bytes, recorded are {size}");
            return Err(DiskError::Damaged { path: reader.path, field: "length", why });
        }
        let mut bad = Vec::new();
        let mut data_at = 0;
        for (index, wanted) in (0u64..).zip(&record.digests.xxh3_per_mib) {
            let (at, block) = (index * MIB, block_len(index, size));
            let end = at + block as u64;
            if data_at < end && data_at <= at {
                let failed = |e: Errno| DiskError::io("seek in", &reader.path, e.into());
                data_at = next_data(&reader.file, at).map_err(failed)?.unwrap_or(u64::MAX);
            }
            // A hole is not read: its zeroes are known.
            let (found, read) = match data_at >= end && end <= len {
                true => (Some(zero_digest(block)), 0),
                false => (reader.digest(at, block), block as u64),
            };
            if found != Some(*wanted) {
                add(&mut bad, at..end);
            }
            if !pace(end, read) {
                let stopped = io::Error::from(io::ErrorKind::Interrupted);
                return Err(DiskError::io("go on reading", &reader.path, stopped));
            }
        }
        if !bad.is_empty() {
            store_mark(&dir, &bad)?;
        }
        Ok(Scrubbed { bad, changed })
    }

    /// What a scrub has marked as bad, if nobody has checked the whole since.
    ///
    /// # Errors
    /// [`DiskError::Io`]. A mark that does not read is none: the whole is checked anyway.
    pub fn marked_bad(&self, id: &CopyId) -> Result<Vec<Range<u64>>, DiskError> {
        let dir = self.images().open_dir(&id.dir_name())?;
        let Some(bytes) = dir.read_small(MARK)? else { return Ok(Vec::new()) };
        let mark = serde_json::from_slice(&bytes).unwrap_or(Mark { bad: Vec::new() });
        Ok(mark.bad.into_iter().map(|(start, end)| start..end).collect())
    }

    /// Begins to mend `bad` ranges, which become durably known first.
    ///
    /// # Errors
    /// As [`Disk::scrub`].
    pub fn mend(&self, id: &CopyId, bad: &[Range<u64>]) -> Result<Mending, DiskError> {
        let (dir, layout, record) = self.recorded_blocks(id)?;
        store_mark(&dir, bad)?;
        let blocks = record.digests.xxh3_per_mib.len() as u64;
        let left = bad.iter().flat_map(|r| r.start / MIB..r.end.div_ceil(MIB).min(blocks));
        let left: BTreeSet<u64> = left.collect();
        let file = open_writable(&dir, &layout.data)?;
        Ok(Mending { dir, layout, file, record, all: left.clone(), left })
    }

    /// Notes the file's time as it is now: every MiB was just found right.
    ///
    /// # Errors
    /// [`DiskError::Io`] or [`DiskError::Full`].
    pub fn vouch(&self, id: &CopyId) -> Result<(), DiskError> {
        let (dir, layout, record) = self.recorded_blocks(id)?;
        let (path, file) = (dir.join(&layout.data), dir.open_file(&layout.data, OFlags::RDONLY)?);
        // What is vouched for must be on the disk, not only in the page cache.
        file.sync_all().map_err(|e| DiskError::io("sync", &path, e))?;
        let meta = file.metadata().map_err(|e| DiskError::io("stat", &path, e))?;
        if let (Some(name), Some(mut cfg)) = (&layout.cfg, read_cfg(&dir, &layout)?) {
            cfg.size = i64::try_from(record.size_bytes).unwrap_or(i64::MAX);
            cfg.real_size = i64::try_from(meta.blocks().saturating_mul(512)).unwrap_or(i64::MAX);
            cfg.modification_time = go_time(&meta);
            cfg.store(&dir, name)?;
        }
        clear(&dir)
    }

    /// The digests of a copy's MiBs, whatever its file's time.
    fn recorded_blocks(&self, id: &CopyId) -> Result<(Dir, FileNames, DigestRecord), DiskError> {
        let dir = self.images().open_dir(&id.dir_name())?;
        let layout = FileNames::copy();
        let record = match &layout.digests {
            Some(name) => DigestRecord::load(&dir, name)?,
            None => None,
        };
        let is_whole = |record: &DigestRecord| {
            record.digests.xxh3_per_mib.len() as u64 == record.size_bytes.div_ceil(MIB)
        };
        match record.filter(is_whole) {
            Some(record) => Ok((dir, layout, record)),
            None => Err(DiskError::NoDigests { path: dir.join(&layout.data) }),
        }
    }
}

fn store_mark(dir: &Dir, bad: &[Range<u64>]) -> Result<(), DiskError> {
    // So many that the list stays small; the check of the whole finds the others.
    let bad = bad.iter().take(1000).map(|range| (range.start, range.end)).collect();
    dir.replace(MARK, &serde_json::to_vec(&Mark { bad }).unwrap_or_default())
}

/// Opens a file of mode 0444 to write to it; its mode is as before when this returns. It stays
/// read-only for everybody else: an owner without privileges has to lift the mode for a moment.
fn open_writable(dir: &Dir, name: &str) -> Result<File, DiskError> {
    match dir.open_file(name, OFlags::RDWR) {
        Err(DiskError::Io { source, .. }) if source.kind() == io::ErrorKind::PermissionDenied => {}
        other => return other,
    }
    let path = dir.join(name);
    let chmod = |file: &File, mode: u32| {
        rustix::fs::fchmod(file, Mode::from_raw_mode(mode))
            .map_err(|e| DiskError::io("chmod", &path, e.into()))
    };
    let plain = dir.open_file(name, OFlags::RDONLY)?;
    let mode = plain.metadata().map_err(|e| DiskError::io("stat", &path, e))?.mode() & 0o7777;
    chmod(&plain, mode | 0o200)?;
    let opened = dir.open_file(name, OFlags::RDWR);
    chmod(&plain, mode)?;
    opened
}

/// A sealed file whose bad MiBs are being made good.
///
/// Readers may have it open and mapped. A block is written where it is, by one `pwrite` of the bytes
/// that it should have: a reader gets either what it would have got without, or the right bytes.
#[derive(Debug)]
pub struct Mending {
    dir: Dir,
    layout: FileNames,
    file: File,
    record: DigestRecord,
    all: BTreeSet<u64>,
    left: BTreeSet<u64>,
}

impl Mending {
    /// Length of the file in bytes.
    #[must_use]
    pub fn size_bytes(&self) -> u64 {
        self.record.size_bytes
    }

    /// What is still bad, ascending, adjoining MiBs in one range.
    #[must_use]
    pub fn left(&self) -> Vec<Range<u64>> {
        let mut ranges = Vec::new();
        for index in &self.left {
            let at = index * MIB;
            add(&mut ranges, at..at + block_len(*index, self.record.size_bytes) as u64);
        }
        ranges
    }

    /// Writes the MiB at byte `at` if `bytes` are those of its digest; false if they are not.
    ///
    /// # Errors
    /// [`DiskError::Io`] or [`DiskError::Full`].
    pub fn put(&mut self, at: u64, bytes: &[u8]) -> Result<bool, DiskError> {
        let index = at / MIB;
        let wanted = usize::try_from(index).ok();
        let wanted = wanted.and_then(|index| self.record.digests.xxh3_per_mib.get(index));
        let fits = at.is_multiple_of(MIB)
            && bytes.len() == block_len(index, self.record.size_bytes)
            && self.left.contains(&index);
        if !fits || wanted != Some(&xxh3_of(bytes)) {
            return Ok(false);
        }
        let path = self.dir.join(&self.layout.data);
        self.file.write_all_at(bytes, at).map_err(|e| DiskError::write(&path, at, e))?;
        self.left.remove(&index);
        Ok(true)
    }

    /// Makes durable what was written and reads it back. The copy stays marked until
    /// [`Disk::vouch`] or [`Disk::verify`].
    ///
    /// # Errors
    /// [`DiskError::Damaged`] if the disk does not give back what was written.
    pub fn finish(self) -> Result<(), DiskError> {
        let path = self.dir.join(&self.layout.data);
        self.file.sync_all().map_err(|e| DiskError::write(&path, 0, e))?;
        let mut reader = Reader::open(&self.dir, &self.layout.data)?;
        for index in self.all.difference(&self.left) {
            let wanted = usize::try_from(*index).ok();
            let wanted = wanted.and_then(|index| self.record.digests.xxh3_per_mib.get(index));
            let len = block_len(*index, self.record.size_bytes);
            if reader.digest(index * MIB, len).as_ref() != wanted {
                let why = format!("the MiB at byte {:#x} does not stay as written", index * MIB);
                return Err(DiskError::Damaged { path, field: "disk", why });
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::{CopyState, DigestKind, DigestSet};
    use crate::names::{ImageName, ImageUuid};

    const LEN: usize = 4 << 20 | 700;

    fn id() -> CopyId {
        CopyId { name: ImageName::parse("a").unwrap(), uuid: ImageUuid::parse("ab12").unwrap() }
    }

    /// A finished copy whose third MiB is a hole.
    fn copy(whole: DigestSet) -> (tempfile::TempDir, Disk, File, Vec<u8>) {
        let temp = tempfile::tempdir().unwrap();
        let disk = Disk::open(temp.path(), true).unwrap();
        let dir = disk.images().make_dir(&id().dir_name()).unwrap();
        let file = dir.open_file("backing", OFlags::RDWR | OFlags::CREATE).unwrap();
        let mut bytes: Vec<u8> = (0..LEN).map(|at| u8::try_from(at % 251).unwrap() + 1).collect();
        bytes[2 << 20..3 << 20].fill(0);
        file.write_all_at(&bytes[..2 << 20], 0).unwrap();
        file.write_all_at(&bytes[3 << 20..], 3 << 20).unwrap();
        disk.verify(&id(), LEN as u64, whole, &mut |_| true).unwrap();
        (temp, disk, file, bytes)
    }

    fn is_ready(disk: &Disk) -> bool {
        matches!(disk.copy_state(&id()).unwrap(), Some(CopyState::Ready(_)))
    }

    fn bad(disk: &Disk) -> Vec<Range<u64>> {
        disk.scrub(&id(), &mut |_, _| true).unwrap().bad
    }

    #[test]
    fn a_wrong_byte_is_found_in_data_in_a_hole_and_in_the_short_tail() {
        let (_temp, disk, file, bytes) = copy(DigestSet::default());
        let mut read = 0;
        let found = disk.scrub(&id(), &mut |_, bytes| {
            read += bytes;
            true
        });
        assert_eq!(found.unwrap(), Scrubbed::default());
        assert_eq!(read, LEN as u64 - MIB, "a hole is not read");
        for (at, range) in
            [(0, 0..MIB), (2 * MIB + 7, 2 * MIB..3 * MIB), (LEN as u64 - 1, 4 * MIB..LEN as u64)]
        {
            let right = bytes[usize::try_from(at).unwrap()];
            file.write_all_at(&[right ^ 1], at).unwrap();
            let found = disk.scrub(&id(), &mut |_, _| true).unwrap();
            assert!(found.changed && found.bad == [range], "{at}: {found:?}");
            file.write_all_at(&[right], at).unwrap();
        }
        let stopped = disk.scrub(&id(), &mut |_, _| false).unwrap_err();
        assert!(
            matches!(stopped, DiskError::Io { source, .. } if source.kind() == io::ErrorKind::Interrupted)
        );
    }

    #[test]
    fn only_right_bytes_are_written_and_the_copy_is_suspect_until_it_is_vouched_for() {
        let (_temp, disk, file, bytes) = copy(DigestSet::default());
        file.write_all_at(b"no", MIB).unwrap();
        assert_eq!(bad(&disk), [MIB..2 * MIB]);
        assert!(!is_ready(&disk), "also with the time that is recorded");
        assert_eq!(disk.marked_bad(&id()).unwrap(), [MIB..2 * MIB]);
        let mut mending = disk.mend(&id(), &[MIB..2 * MIB]).unwrap();
        let right = &bytes[1 << 20..2 << 20];
        let mut wrong = right.to_vec();
        wrong[5] ^= 1;
        assert!(!mending.put(MIB, &wrong).unwrap());
        assert!(!mending.put(0, &bytes[..1 << 20]).unwrap(), "it is not bad");
        assert!(!mending.put(MIB, &right[..100]).unwrap());
        assert!(!mending.put(MIB + 1, right).unwrap());
        assert!(!mending.put(99 * MIB, right).unwrap());
        assert_eq!(mending.left(), [MIB..2 * MIB]);
        assert!(mending.put(MIB, right).unwrap());
        assert!(mending.left().is_empty());
        // A crash here, or before: the whole is checked.
        assert!(!is_ready(&disk));
        mending.finish().unwrap();
        assert!(!is_ready(&disk));
        disk.vouch(&id()).unwrap();
        assert!(is_ready(&disk) && bad(&disk).is_empty());
        assert_eq!(file.metadata().unwrap().mode() & 0o777, 0o644, "as it was");
    }

    #[test]
    fn a_check_of_the_whole_ends_the_suspicion_only_if_all_is_right() {
        for whole in [DigestSet::default(), DigestSet::of(&[DigestKind::Sha256])] {
            let (_temp, disk, file, bytes) = copy(whole);
            file.write_all_at(b"no", 3 * MIB).unwrap();
            let check = |disk: &Disk| disk.verify(&id(), LEN as u64, whole, &mut |_| true);
            let refused = check(&disk).unwrap_err();
            assert!(matches!(refused, DiskError::DigestMismatch { .. }), "{refused}");
            assert!(!is_ready(&disk) && disk.marked_bad(&id()).unwrap().is_empty());
            file.write_all_at(&bytes[3 << 20..][..2], 3 * MIB).unwrap();
            check(&disk).unwrap();
            assert!(is_ready(&disk));
            file.set_len(LEN as u64 - 1).unwrap();
            assert!(check(&disk).is_err(), "shorter");
            assert_eq!(bad(&disk), [4 * MIB..LEN as u64]);
        }
    }

    #[test]
    fn what_cannot_be_held_against_anything_is_refused() {
        let (_temp, disk, file, _) = copy(DigestSet::default());
        file.set_len(LEN as u64 + 1).unwrap();
        let refused = disk.scrub(&id(), &mut |_, _| true).unwrap_err();
        assert!(matches!(refused, DiskError::Damaged { .. }), "{refused}");
        let dir = disk.images().open_dir(&id().dir_name()).unwrap();
        dir.remove_file("backing.digests").unwrap();
        let refused = disk.scrub(&id(), &mut |_, _| true).unwrap_err();
        assert!(matches!(refused, DiskError::NoDigests { .. }), "{refused}");
        dir.replace(MARK, b"junk").unwrap();
        assert_eq!(disk.marked_bad(&id()).unwrap(), [] as [Range<u64>; 0]);
        assert!(!is_ready(&disk));
    }
}
