//! A file that is still being brought in: has writes; servers have it as [`Arriving`], if at all.
//!
//! Why: bytes that are not there must never be served, and nothing may write once all are.
//! How: the data goes to `*.tmp`, its durable units to the presence file; [`Filling::seal`]
//! consumes the writer's side and renames. A unit that is not known to be durable is a hole before
//! it is written again, so that a zero run needs no write.
//! Never: keeps bytes of one version of the source under the bits of another.
//! Start at [`Filling::open`], then [`Filling::begin`], [`super::Writer`], [`Filling::seal`].

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rustix::fs::{FallocateFlags, FlockOperation, OFlags, SeekFrom};
use rustix::io::Errno;

use super::arrivals::Place;
use super::arriving::Arriving;
use super::cfg::CopyCfg;
use super::layout::{FileNames, SealRecord};
use super::presence::{MAX_FILE_BYTES, Presence, Version};
use super::space::{Reservation, Space};
use super::spool::Spool;
use super::{Dir, DiskError, Sealed};
use crate::ring::PAGE_BYTES;

/// How often a file is tried that somebody else has, and the pause after each try.
const LOCK_TRIES: u32 = 20;
const LOCK_PAUSE: Duration = Duration::from_millis(10);

/// A file that is being brought in.
#[derive(Debug)]
pub struct Filling {
    pub(super) dir: Dir,
    pub(super) layout: FileNames,
    pub(super) space: Space,
    pub(super) file: Arc<File>,
    presence: Option<Arc<Mutex<Presence>>>,
    total_bytes: Option<u64>,
    reservation: Option<Arc<Reservation>>,
    /// Where readers find the file before it is complete, if they may.
    place: Option<Place>,
    /// As they have it, once its length is known.
    arriving: Option<Arc<Arriving>>,
}

/// Why a file was not sealed. It can go on filling, or be discarded.
#[derive(Debug)]
pub struct SealError {
    /// The file, as it was.
    pub filling: Box<Filling>,
    /// What went wrong.
    pub error: DiskError,
}

impl Filling {
    /// Opens the unfinished file of `layout` in `dir`, or begins one. What an earlier run left
    /// durable is taken over; anything else in the file is not believed.
    ///
    /// # Errors
    /// [`DiskError::Io`].
    pub fn open(dir: Dir, layout: FileNames, space: Space) -> Result<Self, DiskError> {
        let file = lock_partial(&dir, &layout.partial)?;
        let presence = believable(&dir, &layout, &file)?;
        let total_bytes = presence.as_ref().and_then(|p| p.version().total_bytes);
        let presence = presence.map(|p| Arc::new(Mutex::new(p)));
        let file = Arc::new(file);
        Ok(Self {
            dir,
            layout,
            space,
            file,
            presence,
            total_bytes,
            reservation: None,
            place: None,
            arriving: None,
        })
    }

    /// Lets readers find the file at `place` while it is filling.
    pub(super) fn shown_at(self, place: Place) -> Self {
        Self { place: Some(place), ..self }
    }

    /// The file as readers have it, who do not wait until it is complete; `None` while its length is
    /// not known, or if nobody may.
    #[must_use]
    pub fn arriving(&self) -> Option<&Arc<Arriving>> {
        self.arriving.as_ref()
    }

    /// Bytes that are durable of an unfinished file (of a compressed source: as they came), and its
    /// length if known; without touching it. `None` if there is none.
    ///
    /// # Errors
    /// [`DiskError::Io`].
    pub fn peek(dir: &Dir, layout: &FileNames) -> Result<Option<(u64, Option<u64>)>, DiskError> {
        let Some(file) = dir.try_open_file(&layout.partial, OFlags::RDONLY)? else {
            return Ok(None);
        };
        let spooled = Spool::load(dir, &layout.spool)?.map_or(0, |spool| spool.len_bytes());
        let presence = believable(dir, layout, &file)?;
        let total = presence.as_ref().and_then(|presence| presence.version().total_bytes);
        let (Some(presence), Some(whole)) = (presence, total) else {
            return Ok(Some((spooled, None)));
        };
        let missing: u64 =
            presence.missing(whole).iter().map(|range| range.end - range.start).sum();
        Ok(Some((whole - missing, total)))
    }

    /// Path of the unfinished file, for messages.
    #[must_use]
    pub fn path(&self) -> PathBuf {
        self.dir.join(&self.layout.partial)
    }

    /// The version that the durable bytes belong to; `None` if there are none.
    #[must_use]
    pub fn version(&self) -> Option<Version> {
        let presence = self.presence.as_ref()?;
        Some(presence.lock().unwrap_or_else(PoisonError::into_inner).version().clone())
    }

    /// Length of the whole file in bytes, once known.
    #[must_use]
    pub fn total_bytes(&self) -> Option<u64> {
        self.total_bytes
    }

    /// The byte ranges that are not durable yet. All of them before [`Filling::begin`].
    #[must_use]
    pub fn missing(&self) -> Vec<Range<u64>> {
        let total = self.total_bytes.unwrap_or(0);
        match &self.presence {
            Some(presence) => {
                presence.lock().unwrap_or_else(PoisonError::into_inner).missing(total)
            }
            None if total == 0 => Vec::new(),
            None => std::iter::once(0..total).collect(),
        }
    }

    /// Bytes that are durably here.
    #[must_use]
    pub fn present_bytes(&self) -> u64 {
        let missing: u64 = self.missing().iter().map(|range| range.end - range.start).sum();
        self.total_bytes.unwrap_or(0).saturating_sub(missing)
    }

    /// The file for reading back what is durable (digests, inspection).
    #[must_use]
    pub fn file(&self) -> &Arc<File> {
        &self.file
    }

    /// Throws away whatever is here and starts on `version`.
    ///
    /// # Errors
    /// [`DiskError::NoSpace`] if it cannot fit, [`DiskError::Io`].
    pub fn begin(&mut self, version: &Version) -> Result<(), DiskError> {
        self.start_over(version, false)?;
        self.prepare(None)
    }

    /// As [`Filling::begin`], but what is spooled of the source stays.
    ///
    /// # Errors
    /// As [`Filling::begin`].
    pub fn begin_beside_spool(&mut self, version: &Version) -> Result<(), DiskError> {
        self.start_over(version, true)?;
        self.prepare(None)
    }

    fn start_over(&mut self, version: &Version, keep_spool: bool) -> Result<(), DiskError> {
        let path = self.path();
        if version.total_bytes.is_some_and(|total| total > MAX_FILE_BYTES) {
            let why = format!("longer than the limit of {MAX_FILE_BYTES} bytes");
            return Err(DiskError::Damaged { path, field: "source length", why });
        }
        self.presence = None;
        self.reservation = None;
        // The bits must be gone for good before the bytes that they speak for are.
        self.dir.remove_file(&self.layout.presence)?;
        if !keep_spool {
            self.drop_spool()?;
        }
        self.dir.sync()?;
        if let Some(place) = &self.place {
            // Whoever reads the old file must not see it become another.
            self.dir.remove_file(&self.layout.partial)?;
            self.file = Arc::new(lock_partial(&self.dir, &self.layout.partial)?);
            self.arriving = None;
            if version.total_bytes.is_none() {
                place.no_length();
            }
        } else {
            self.file.set_len(0).map_err(|e| DiskError::io("truncate", &path, e))?;
        }
        self.total_bytes = version.total_bytes;
        let presence = Presence::create(&self.dir, &self.layout.presence, version.clone())?;
        self.presence = Some(Arc::new(Mutex::new(presence)));
        Ok(())
    }

    /// As [`Filling::begin`] or, with `keep`, [`Filling::resume`], for a caller who knows how many
    /// bytes will be written: only so much room is promised. See [`Filling::promise`].
    ///
    /// # Errors
    /// As [`Filling::begin`].
    pub fn begin_sparse(&mut self, version: &Version, keep: bool) -> Result<(), DiskError> {
        if keep && !self.is_unsure() {
            return self.prepare(Some(0));
        }
        self.start_over(version, false)?;
        self.prepare(Some(0))
    }

    /// Promises room for `need_bytes` more, after [`Filling::begin_sparse`].
    ///
    /// # Errors
    /// [`DiskError::NoSpace`].
    pub fn promise(&self, need_bytes: u64) -> Result<(), DiskError> {
        self.reservation.as_ref().map_or(Ok(()), |reservation| reservation.extend(need_bytes))
    }

    /// Goes on with the durable bytes that are here: reserves room for the rest, and makes sure
    /// that what is missing is a hole.
    ///
    /// # Errors
    /// As [`Filling::begin`].
    pub fn resume(&mut self) -> Result<(), DiskError> {
        if let (true, Some(version)) = (self.is_unsure(), self.version()) {
            self.start_over(&version, false)?;
        }
        self.prepare(None)
    }

    /// As [`Filling::resume`], with what is durable up to the first byte that is missing: what is behind it
    /// counts as missing too. For bytes that come in their order, from somebody who may have others now.
    ///
    /// # Errors
    /// As [`Filling::begin`].
    pub fn resume_prefix(&mut self) -> Result<(), DiskError> {
        let (missing, total) = (self.missing(), self.total_bytes);
        let Some((first, version)) = missing.first().zip(self.version()) else {
            return self.resume();
        };
        if Some(first.end) != total {
            // Fewer bits at every instant: none, and then those of the prefix.
            let mut presence = Presence::create(&self.dir, &self.layout.presence, version)?;
            presence.commit(&[0..first.start])?;
            self.presence = Some(Arc::new(Mutex::new(presence)));
        }
        self.resume()
    }

    /// True if readers have been given bytes that never became durable, as a sync has failed: these
    /// would have to be written again under their eyes.
    fn is_unsure(&self) -> bool {
        let inode = self.file.metadata().map_or(0, |meta| meta.ino());
        self.place.as_ref().is_some_and(|place| place.conflicts(inode, &self.missing()))
    }

    /// `need`: bytes that will be written; `None`: everything that is missing.
    fn prepare(&mut self, need: Option<u64>) -> Result<(), DiskError> {
        let Some(total) = self.total_bytes else { return Ok(()) };
        let (path, missing) = (self.path(), self.missing());
        self.reservation = None;
        let whole = || missing.iter().map(|range| range.end - range.start).sum();
        let reserved = match need {
            Some(need) => self.space.reserve_data(need)?,
            None => self.space.reserve(whole())?,
        };
        self.reservation = Some(Arc::new(reserved));
        let padded = total.next_multiple_of(PAGE_BYTES as u64);
        let set_len = |len| self.file.set_len(len).map_err(|e| DiskError::write(&path, len, e));
        if self.file.metadata().is_ok_and(|meta| meta.len() > padded) {
            set_len(padded)?;
        }
        for range in &missing {
            self.punch_if_data(range).map_err(|e| DiskError::io("punch a hole in", &path, e))?;
        }
        set_len(padded)?;
        if let Some(place) = &self.place {
            let file = self.dir.open_file(&self.layout.partial, OFlags::RDONLY)?;
            let begun = place.begin(file, path.clone(), total, &missing);
            self.arriving = Some(begun.map_err(|e| DiskError::io("show", &path, e))?);
        }
        Ok(())
    }

    /// Bytes that were written but never became durable may be anything: back to a hole.
    fn punch_if_data(&self, range: &Range<u64>) -> io::Result<()> {
        match rustix::fs::seek(&*self.file, SeekFrom::Data(range.start)) {
            Ok(data) if data < range.end => {}
            Ok(_) | Err(Errno::NXIO) => return Ok(()),
            Err(e) => return Err(e.into()),
        }
        let end = range.end.next_multiple_of(PAGE_BYTES as u64);
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        match rustix::fs::fallocate(&*self.file, flags, range.start, end - range.start) {
            Ok(()) => Ok(()),
            // A file system without holes: zeroes do as well.
            Err(Errno::OPNOTSUPP | Errno::NOSYS) => self.write_zeroes(range),
            Err(e) => Err(e.into()),
        }
    }

    fn write_zeroes(&self, range: &Range<u64>) -> io::Result<()> {
        let zeroes = vec![0; 1 << 20];
        let mut at = range.start;
        while at < range.end {
            let left = usize::try_from(range.end - at).unwrap_or(zeroes.len());
            let piece = &zeroes[..left.min(zeroes.len())];
            self.file.write_all_at(piece, at)?;
            at += piece.len() as u64;
        }
        Ok(())
    }

    /// What [`super::Writer`] needs of this file.
    pub(super) fn write_side(&self) -> Result<WriteSide, DiskError> {
        let path = self.path();
        let Some(presence) = &self.presence else {
            let why = "nothing was begun".to_owned();
            return Err(DiskError::Damaged { path, field: "presence", why });
        };
        let direct = self.dir.open_file(&self.layout.partial, OFlags::RDWR | OFlags::DIRECT);
        Ok(WriteSide {
            path,
            plain: Arc::clone(&self.file),
            direct: direct.ok().map(Arc::new),
            presence: Arc::clone(presence),
            reservation: self.reservation.clone(),
            arriving: self.arriving.clone(),
            total_known: self.total_bytes.is_some(),
        })
    }

    /// Tells the length of a source that did not say it, at its end: all of it was written.
    ///
    /// # Errors
    /// [`DiskError::Io`].
    pub fn end_at(&mut self, total_bytes: u64) -> Result<(), DiskError> {
        let path = self.path();
        let tag = self.version().map(|version| version.tag).unwrap_or_default();
        self.file
            .set_len(total_bytes.next_multiple_of(PAGE_BYTES as u64))
            .and_then(|()| self.file.sync_all())
            .map_err(|e| DiskError::write(&path, total_bytes, e))?;
        let version = Version { total_bytes: Some(total_bytes), tag };
        let mut presence = Presence::create(&self.dir, &self.layout.presence, version)?;
        presence.commit(std::slice::from_ref(&(0..total_bytes)))?;
        self.presence = Some(Arc::new(Mutex::new(presence)));
        self.total_bytes = Some(total_bytes);
        Ok(())
    }

    /// Cuts the padding of the last block off, so that the file has its final length.
    ///
    /// # Errors
    /// [`DiskError::Io`].
    pub fn trim(&self) -> Result<(), DiskError> {
        let Some(total) = self.total_bytes else { return Ok(()) };
        let path = self.path();
        self.file.set_len(total).map_err(|e| DiskError::write(&path, total, e))
    }

    /// Makes the file final: durable, named, read-only. Nothing writes to it after this.
    ///
    /// # Errors
    /// [`SealError`] gives the file back; what is durable stays so.
    pub fn seal(self, record: &SealRecord) -> Result<Sealed, SealError> {
        match self.try_seal(record) {
            Ok(sealed) => Ok(sealed),
            Err(error) => Err(SealError { filling: Box::new(self), error }),
        }
    }

    fn try_seal(&self, record: &SealRecord) -> Result<Sealed, DiskError> {
        let (path, total) = (self.path(), self.total_bytes.unwrap_or(0));
        let missing: u64 = self.missing().iter().map(|range| range.end - range.start).sum();
        if self.total_bytes.is_none() || missing > 0 {
            return Err(DiskError::Incomplete { path, missing, total });
        }
        let failed = |e| DiskError::write(&path, total, e);
        self.trim()?;
        self.file.sync_all().map_err(failed)?;
        if let Some(name) = &self.layout.digests {
            record.digest_record(total).store(&self.dir, name)?;
        }
        if let Some(name) = &self.layout.cfg {
            let data_path = self.dir.join(&self.layout.data);
            CopyCfg::of_file(&data_path, &self.file, record)?.store(&self.dir, name)?;
        }
        // Before the name is final: after it nobody would look for a spool.
        self.drop_spool()?;
        self.dir.rename(&self.layout.partial, &self.layout.data)?;
        // Not before the rename: an unprivileged owner could not open it again to go on.
        rustix::fs::fchmod(&*self.file, rustix::fs::Mode::from_raw_mode(0o444))
            .map_err(|e| DiskError::io("chmod", &path, e.into()))?;
        self.dir.remove_file(&self.layout.presence)?;
        let file = self.dir.open_file(&self.layout.data, OFlags::RDONLY)?;
        let sealed = Sealed::from_file(file, self.dir.join(&self.layout.data))?;
        if let Some(arriving) = &self.arriving {
            arriving.complete();
        }
        Ok(sealed)
    }

    /// Removes the unfinished file and its bits.
    ///
    /// # Errors
    /// [`DiskError::Io`].
    pub fn discard(self) -> Result<(), DiskError> {
        if let Some(place) = &self.place {
            place.lose("what has arrived of the image was refused; see the image's message");
        }
        self.dir.remove_file(&self.layout.presence)?;
        self.drop_spool()?;
        self.dir.remove_file(&self.layout.partial)?;
        self.dir.sync()
    }
}

/// The handles that a [`super::Writer`] works with.
#[derive(Debug)]
pub(super) struct WriteSide {
    pub(super) path: PathBuf,
    pub(super) plain: Arc<File>,
    pub(super) direct: Option<Arc<File>>,
    pub(super) presence: Arc<Mutex<Presence>>,
    pub(super) reservation: Option<Arc<Reservation>>,
    pub(super) arriving: Option<Arc<Arriving>>,
    pub(super) total_known: bool,
}

/// Opens the unfinished file, made if it is missing, and takes it for this process alone.
fn lock_partial(dir: &Dir, name: &str) -> Result<File, DiskError> {
    let path = dir.join(name);
    let inode = |file: &File| {
        file.metadata().map(|meta| meta.ino()).map_err(|e| DiskError::io("stat", &path, e))
    };
    let mut patience = LOCK_TRIES;
    loop {
        let file = dir.open_file(name, OFlags::RDWR | OFlags::CREATE)?;
        if rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
            // Who has let go of it may have a child that has not: one that begins, or is being killed.
            patience -= 1;
            if patience == 0 {
                return Err(DiskError::Busy { path });
            }
            std::thread::sleep(LOCK_PAUSE);
            continue;
        }
        // Another process may have sealed or removed the file between the open and the lock.
        let now = dir.try_open_file(name, OFlags::RDONLY)?;
        if let Some(now) = now
            && inode(&now)? == inode(&file)?
        {
            return Ok(file);
        }
    }
}

/// The presence of an unfinished file, if its data can be what it says.
fn believable(dir: &Dir, layout: &FileNames, file: &File) -> Result<Option<Presence>, DiskError> {
    let len = file.metadata().map_err(|e| DiskError::io("stat", dir.path(), e))?.len();
    let presence = Presence::load(dir, &layout.presence)?;
    Ok(presence.filter(|presence| {
        // A file shorter than its last present unit was cut by somebody else.
        let total = presence.version().total_bytes.unwrap_or(0);
        let missing = presence.missing(total);
        let here_to = match missing.last() {
            Some(last) if last.end == total => last.start,
            Some(_) | None => total,
        };
        len >= here_to
    }))
}
