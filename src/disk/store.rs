//! One disk: a directory with a UUID, a lock, and the copies in it.
//!
//! Why: everything that happens to files of copies happens here, under names that were checked.
//! How: Longhorn's layout, `<disk>/backing-images/<name>-<uuid>/backing`; a copy with a valid
//! record and an unchanged modification time is ready at once, another is hashed first.
//! Never: decides which copies there should be.
//! Start at [`Disk::open`], then [`Disk::scan`].

use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{FlockOperation, OFlags};

use super::arrivals::{Arrivals, Found};
use super::cfg::{CopyCfg, DiskCfg, go_time};
use super::digests::{DigestRecord, Digests};
use super::filling::Filling;
use super::layout::{FileNames, SealRecord};
use super::readback::hash_file;
use super::scrub;
use super::space::{Space, Usage};
use super::{DigestKind, DigestSet, Dir, DiskError, Hasher, Sealed};
use crate::names::{DiskUuid, ImageName, ImageUuid};

const DISK_CFG: &str = "longhorn-disk.cfg";
const IMAGES_DIR: &str = "backing-images";
const LOCK_FILE: &str = "bedplate.lock";

/// One disk, locked by this process.
#[derive(Debug)]
pub struct Disk {
    root: Dir,
    images: Dir,
    uuid: DiskUuid,
    space: Space,
    arrivals: Arrivals,
    _lock: File,
}

/// Identifies a copy on a disk.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct CopyId {
    /// The image's name.
    pub name: ImageName,
    /// The image's uuid.
    pub uuid: ImageUuid,
}

impl CopyId {
    pub(super) fn dir_name(&self) -> String {
        format!("{}-{}", self.name, self.uuid)
    }

    /// `debian-12-4f3e2d1c` as the parts before and after the last dash.
    fn parse(dir_name: &str) -> Option<Self> {
        let (name, uuid) = dir_name.rsplit_once('-')?;
        Some(Self { name: ImageName::parse(name).ok()?, uuid: ImageUuid::parse(uuid).ok()? })
    }
}

/// What is known of a finished copy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CopyRecord {
    /// Bytes of the file.
    pub size_bytes: u64,
    /// Bytes of the guest's disk; 0 if the record's writer did not know.
    pub virtual_size_bytes: u64,
    /// Digests of the file, as far as they were made.
    pub digests: Digests,
    /// The format that its owner declared, in the caller's own word; `None` if none was.
    pub declared: Option<String>,
}

/// A copy found on a disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CopyState {
    /// Finished, recorded, not touched since.
    Ready(CopyRecord),
    /// Finished, but without a valid record, or changed since: [`Disk::verify`] decides.
    Unchecked,
    /// Unfinished.
    Filling {
        /// Bytes that are durably here; of a compressed source, as they came.
        present_bytes: u64,
        /// Bytes of the whole, if known.
        total_bytes: Option<u64>,
    },
}

impl Disk {
    /// Opens the disk in directory `root` and locks it. With `create`, a directory without
    /// `longhorn-disk.cfg` (or none at all) becomes a disk with a new UUID.
    ///
    /// # Errors
    /// [`DiskError::Locked`], [`DiskError::NotADisk`], [`DiskError::DiskFile`], [`DiskError::Io`].
    pub fn open(root: &Path, create: bool) -> Result<Self, DiskError> {
        if create {
            std::fs::create_dir_all(root).map_err(|e| DiskError::io("make directory", root, e))?;
        }
        let root = Dir::open(root)?;
        if !create {
            // Nothing is written to what is none, as a mount point without its file system.
            disk_uuid(&root, false)?;
        }
        let lock = take_lock(&root)?;
        let uuid = disk_uuid(&root, create)?;
        let images = root.make_dir(IMAGES_DIR)?;
        let space = Space::of(&root)?;
        Ok(Self { root, images, uuid, space, arrivals: Arrivals::default(), _lock: lock })
    }

    /// The disk's UUID.
    #[must_use]
    pub fn uuid(&self) -> &DiskUuid {
        &self.uuid
    }

    /// The disk's directory.
    #[must_use]
    pub fn root(&self) -> &Path {
        self.root.path()
    }

    /// The room on the disk.
    #[must_use]
    pub fn space(&self) -> &Space {
        &self.space
    }

    /// The room on the disk, if it is still where it was: a file system that was unmounted can be
    /// written to by who has it open, and nobody else would ever see that.
    ///
    /// # Errors
    /// [`DiskError::Gone`]: nothing is there now, or something else; [`DiskError::Io`].
    pub fn usage(&self) -> Result<Usage, DiskError> {
        let path = self.root.path();
        let place = |stat: rustix::fs::Stat| (stat.st_dev, stat.st_ino);
        let ours = rustix::fs::fstat(self.root.fd())
            .map_err(|errno| DiskError::io("stat", path, errno.into()))?;
        let is_here = rustix::fs::stat(path).is_ok_and(|there| place(there) == place(ours));
        if is_here { self.space.usage() } else { Err(DiskError::Gone { path: path.to_owned() }) }
    }

    /// Where the sealed file of a copy is, or will be: the path that a replica opens.
    #[must_use]
    pub fn data_path(&self, id: &CopyId) -> PathBuf {
        self.images.path().join(id.dir_name()).join(FileNames::copy().data)
    }

    /// Every copy on the disk. Directories with other names are left alone.
    ///
    /// # Errors
    /// [`DiskError::Io`] if the disk itself can't be read. Trouble with one copy is logged and
    /// that copy is [`CopyState::Unchecked`].
    pub fn scan(&self) -> Result<Vec<(CopyId, CopyState)>, DiskError> {
        let mut found = Vec::new();
        for dir_name in self.images.names()? {
            let Some(id) = CopyId::parse(&dir_name) else { continue };
            match self.copy_state(&id) {
                Ok(Some(state)) => found.push((id, state)),
                Ok(None) => {}
                Err(error) => {
                    tracing::warn!(copy = %dir_name, %error, "cannot judge a copy");
                    found.push((id, CopyState::Unchecked));
                }
            }
        }
        Ok(found)
    }

    /// The state of one copy; `None` if there is nothing of it.
    ///
    /// # Errors
    /// [`DiskError::Io`].
    pub fn copy_state(&self, id: &CopyId) -> Result<Option<CopyState>, DiskError> {
        let Some(dir) = self.copy_dir(id)? else { return Ok(None) };
        let layout = FileNames::copy();
        if let Some(file) = dir.try_open_file(&layout.data, OFlags::RDONLY)? {
            let record = ready_record(&dir, &layout, &file)?;
            let record = if scrub::is_suspect(&dir)? { None } else { record };
            return Ok(Some(record.map_or(CopyState::Unchecked, CopyState::Ready)));
        }
        let Some((present_bytes, total_bytes)) = Filling::peek(&dir, &layout)? else {
            return Ok(None);
        };
        Ok(Some(CopyState::Filling { present_bytes, total_bytes }))
    }

    /// The directory of all copies.
    pub(super) fn images(&self) -> &Dir {
        &self.images
    }

    fn copy_dir(&self, id: &CopyId) -> Result<Option<Dir>, DiskError> {
        match self.images.open_dir(&id.dir_name()) {
            Ok(dir) => Ok(Some(dir)),
            Err(DiskError::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => {
                Ok(None)
            }
            Err(e) => Err(e),
        }
    }

    /// The unfinished file of a copy, made if there is none.
    ///
    /// # Errors
    /// [`DiskError::Io`].
    pub fn filling(&self, id: &CopyId) -> Result<Filling, DiskError> {
        let dir = self.images.make_dir(&id.dir_name())?;
        let filling = Filling::open(dir, FileNames::copy(), self.space.clone())?;
        Ok(filling.shown_at(self.arrivals.place(id)))
    }

    /// What there is to read of a copy that is not complete; waits up to `patience` for its transfer
    /// to begin.
    #[must_use]
    pub fn arriving(&self, id: &CopyId, patience: Duration) -> Found {
        self.arrivals.find(id, patience)
    }

    /// Readers of files that are not complete get errors from now on, those who wait too.
    pub fn dismiss_readers(&self, why: &str) {
        self.arrivals.fail_all(why);
    }

    /// The sealed file of a ready copy.
    ///
    /// # Errors
    /// [`DiskError::Io`] if there is none.
    pub fn sealed(&self, id: &CopyId) -> Result<Sealed, DiskError> {
        let dir = self.images.open_dir(&id.dir_name())?;
        let layout = FileNames::copy();
        let file = dir.open_file(&layout.data, OFlags::RDONLY)?;
        Sealed::from_file(file, dir.join(&layout.data))
    }

    /// Hashes a finished file whose record is missing or outdated. If its digest is the recorded
    /// one, or none was recorded, the record is written anew and the copy is ready.
    ///
    /// `progress` is told the bytes read so far; it ends the work by returning false.
    ///
    /// # Errors
    /// [`DiskError::DigestMismatch`]: the bytes are not those that were recorded.
    pub fn verify(
        &self,
        id: &CopyId,
        virtual_size_bytes: u64,
        want: DigestSet,
        progress: &mut dyn FnMut(u64) -> bool,
    ) -> Result<CopyRecord, DiskError> {
        let dir = self.images.open_dir(&id.dir_name())?;
        let layout = FileNames::copy();
        let path = dir.join(&layout.data);
        let file = dir.open_file(&layout.data, OFlags::RDONLY)?;
        let stat = || file.metadata().map_err(|e| DiskError::io("stat", &path, e));
        // What is vouched for must be on the disk, not only in the page cache.
        file.sync_all().map_err(|e| DiskError::io("sync", &path, e))?;
        let (size_bytes, time) = (stat()?.len(), go_time(&stat()?));
        let (old_cfg, old) = recorded(&dir, &layout)?;
        let mut hasher = Hasher::new(old.digests.whole.kinds().and(want));
        hash_file(&file, &path, size_bytes, &mut hasher, progress)?;
        if (stat()?.len(), go_time(&stat()?)) != (size_bytes, time) {
            let changed = std::io::Error::from(std::io::ErrorKind::ResourceBusy);
            return Err(DiskError::io("check a file that is being written:", &path, changed));
        }
        let digests = hasher.finish();
        if let Err(mismatch) = holds(&path, &old, size_bytes, &digests) {
            // Whatever its time says: it is not to count as ready after a restart.
            scrub::suspect(&dir)?;
            return Err(mismatch);
        }
        let expected = old_cfg.map(|cfg| cfg.expected_checksum).filter(|text| !text.is_empty());
        let record = SealRecord {
            uuid: id.uuid.to_string(),
            virtual_size_bytes,
            digests: digests.clone(),
            expected_sha512: expected,
            declared: old.declared,
        };
        if let Some(name) = &layout.digests {
            record.digest_record(size_bytes).store(&dir, name)?;
        }
        if let Some(name) = &layout.cfg {
            CopyCfg::of_file(&path, &file, &record)?.store(&dir, name)?;
        }
        scrub::clear(&dir)?;
        Ok(CopyRecord { size_bytes, virtual_size_bytes, digests, declared: record.declared })
    }

    /// Removes all files of a copy. The caller knows that nobody uses it.
    ///
    /// # Errors
    /// [`DiskError::Io`]. A copy that is not there is fine.
    pub fn remove(&self, id: &CopyId) -> Result<(), DiskError> {
        let Some(dir) = self.copy_dir(id)? else { return Ok(()) };
        let layout = FileNames::copy();
        self.arrivals.place(id).lose("the copy was removed");
        // The bits go first: without them nothing of an unfinished file is believed.
        dir.remove_file(&layout.presence)?;
        for name in dir.names()? {
            dir.remove_file(&name)?;
        }
        dir.sync()?;
        self.images.remove_dir(&id.dir_name())?;
        self.images.sync()
    }
}

/// Holds a file's digests against the recorded ones. Of a file of which no digest of the whole was
/// made, those of its MiBs tell.
fn holds(path: &Path, old: &DigestRecord, size_bytes: u64, now: &Digests) -> Result<(), DiskError> {
    if let Some((kind, expected, found)) = old.digests.whole.differs(&now.whole) {
        let (kind, expected, found) = (kind.name(), expected.to_owned(), found.to_owned());
        return Err(DiskError::DigestMismatch { path: path.to_owned(), kind, expected, found });
    }
    let (then, now) = (&old.digests.xxh3_per_mib, &now.xxh3_per_mib);
    let differ = then.iter().zip(now).position(|(then, now)| then != now);
    let (expected, found) = match differ {
        _ if then.is_empty() => return Ok(()),
        Some(index) => {
            let of = |digests: &[u64]| digests.get(index).copied().unwrap_or_default();
            (format!("{:016x}", of(then)), format!("{:016x} in MiB {index}", of(now)))
        }
        None if old.size_bytes == size_bytes => return Ok(()),
        None => (format!("that of {} bytes", old.size_bytes), format!("of {size_bytes} bytes")),
    };
    Err(DiskError::DigestMismatch { path: path.to_owned(), kind: "xxh3", expected, found })
}

/// What `backing.cfg` and `backing.digests` say, whatever the file's state.
fn recorded(dir: &Dir, layout: &FileNames) -> Result<(Option<CopyCfg>, DigestRecord), DiskError> {
    let cfg = read_cfg(dir, layout)?;
    let mut record = match &layout.digests {
        Some(name) => DigestRecord::load(dir, name)?.unwrap_or_default(),
        None => DigestRecord::default(),
    };
    if let Some(cfg) = &cfg {
        let sums = [&cfg.current_checksum, &cfg.expected_checksum];
        if let Some(text) = sums.into_iter().find(|text| !text.is_empty()) {
            record.digests.whole.set(DigestKind::Sha512, text.to_ascii_lowercase());
        }
    }
    Ok((cfg, record))
}

pub(super) fn read_cfg(dir: &Dir, layout: &FileNames) -> Result<Option<CopyCfg>, DiskError> {
    let Some(name) = &layout.cfg else { return Ok(None) };
    let Some(bytes) = dir.read_small(name)? else { return Ok(None) };
    Ok(serde_json::from_slice(&bytes).ok())
}

/// The record of a finished file, if it is valid and the file was not touched since.
pub(super) fn ready_record(
    dir: &Dir,
    layout: &FileNames,
    file: &File,
) -> Result<Option<CopyRecord>, DiskError> {
    let meta = file.metadata().map_err(|e| DiskError::io("stat", dir.path(), e))?;
    let (cfg, record) = recorded(dir, layout)?;
    let Some(cfg) = cfg else { return Ok(None) };
    let same = u64::try_from(cfg.size) == Ok(meta.len()) && cfg.modification_time == go_time(&meta);
    if !same {
        return Ok(None);
    }
    let DigestRecord { mut digests, declared, .. } = record;
    if digests.xxh3_per_mib.len() as u64 != meta.len().div_ceil(crate::units::MIB) {
        digests.xxh3_per_mib = Vec::new();
    }
    let virtual_size_bytes = u64::try_from(cfg.virtual_size).unwrap_or(0);
    Ok(Some(CopyRecord { size_bytes: meta.len(), virtual_size_bytes, digests, declared }))
}

/// Locks the disk for this process, by `flock`: the lock ends with the process, however it ends.
fn take_lock(root: &Dir) -> Result<File, DiskError> {
    let path = root.join(LOCK_FILE);
    let mut lock = root.open_file(LOCK_FILE, OFlags::RDWR | OFlags::CREATE)?;
    if rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive).is_err() {
        let mut holder = String::new();
        let _ = (&lock).take(32).read_to_string(&mut holder);
        let holder = holder.trim().chars().filter(char::is_ascii_digit).collect();
        return Err(DiskError::Locked { path: root.path().to_owned(), holder });
    }
    // The number is only for messages; the lock itself is the flock.
    lock.set_len(0)
        .and_then(|()| lock.seek(SeekFrom::Start(0)).map(drop))
        .and_then(|()| writeln!(lock, "{}", std::process::id()))
        .map_err(|e| DiskError::write(&path, 0, e))?;
    Ok(lock)
}

fn disk_uuid(root: &Dir, create: bool) -> Result<DiskUuid, DiskError> {
    let path = root.join(DISK_CFG);
    let Some(bytes) = root.read_small(DISK_CFG)? else {
        if !create {
            return Err(DiskError::NotADisk { path: root.path().to_owned() });
        }
        let uuid = DiskUuid::random().map_err(|e| DiskError::io("make a UUID for", &path, e))?;
        let cfg = DiskCfg { disk_uuid: uuid.to_string() };
        root.replace(DISK_CFG, &serde_json::to_vec(&cfg).unwrap_or_default())?;
        return Ok(uuid);
    };
    let cfg: DiskCfg = serde_json::from_slice(&bytes)
        .map_err(|e| DiskError::DiskFile { path: path.clone(), why: e.to_string() })?;
    DiskUuid::parse(&cfg.disk_uuid).map_err(|e| DiskError::DiskFile { path, why: e.to_string() })
}
