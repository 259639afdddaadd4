//! Keeps what comes of a compressed source in the spool of a filling copy.
//!
//! Why: the stream goes to its decoder at the rate of the network, and must not wait for syncs.
//! How: who receives appends; write-back begins every 8 MiB, and a thread of its own syncs what was
//! appended, then records it, then syncs the record: twice a second or every 64 MiB.
//! Never: records a byte before it is durable, or tries a failed sync again.
//! Start at [`Filling::spool`] or [`Filling::spool_on`], then [`SpoolEnd::append`].

use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::PathBuf;
use std::sync::mpsc::{self, SyncSender, TrySendError};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Instant;

use xxhash_rust::xxh3::Xxh3;

use super::DiskError;
use super::filling::Filling;
use super::presence::Version;
use super::space::Reservation;
use super::spool::{Record, Spool, data_at, read_checked};
use super::writer::{COMMIT_BYTES, COMMIT_INTERVAL};
use crate::ring::start_write_back;
use crate::units::MIB;

/// Bytes after which write-back is begun.
const WRITE_BACK_BYTES: u64 = 8 * MIB;
/// Room that must be free beside the rest of a spool, or the disk counts as full.
const SPARE_BYTES: u64 = 16 * MIB;
/// How many times too much an estimate of what an image still needs may be.
const DOUBT: u64 = 2;

impl Filling {
    /// What an earlier run has kept of a compressed source; `None` if nothing can be believed.
    ///
    /// # Errors
    /// [`DiskError::Io`].
    pub fn spooled(&self) -> Result<Option<Spool>, DiskError> {
        Spool::load(&self.dir, &self.layout.spool)
    }

    /// True if nothing of the file, or of its source, is durable.
    #[must_use]
    pub fn is_worthless(&self) -> bool {
        self.present_bytes() == 0 && !matches!(self.spooled(), Ok(Some(_)))
    }

    /// Removes what was kept of a compressed source.
    ///
    /// # Errors
    /// [`DiskError::Io`].
    pub fn drop_spool(&self) -> Result<(), DiskError> {
        self.dir.remove_file(&self.layout.spool)
    }

    /// Keeps from now on what comes of a compressed source of this version, from its first byte.
    ///
    /// # Errors
    /// [`DiskError::NoSpace`] if the disk has not room for three times the source: as it comes, and
    /// twice as much for what is made of it. [`DiskError`] else.
    pub fn spool(&self, version: Version) -> Result<SpoolEnd, DiskError> {
        let total = version.total_bytes.unwrap_or(0);
        let room = self.space.reserve(total.saturating_mul(3).saturating_add(data_at(total)))?;
        // Nobody knows what the image needs before its end: no room is promised to it.
        room.consume(total.saturating_mul(2), false);
        let spool = Spool::create(&self.dir, &self.layout.spool, version)?;
        room.consume(data_at(total), false);
        SpoolEnd::start(spool, room, Arc::clone(&self.file))
    }

    /// Room for the rest of `spool`; to be asked for while what was made of it is still here. `None`
    /// if the disk has not that much, and the image may fit without the spool.
    ///
    /// # Errors
    /// [`DiskError::NoSpace`] if it will hardly fit even then: what is kept should be kept until
    /// somebody has made room.
    pub fn room_for_spool(&self, spool: &Spool) -> Result<Option<Reservation>, DiskError> {
        let len = spool.len_bytes().max(1);
        let rest = spool.total_bytes().saturating_sub(len);
        let (path, free, reserved) = match self.space.reserve(rest.saturating_add(SPARE_BYTES)) {
            Ok(room) => {
                room.consume(SPARE_BYTES, false);
                return Ok(Some(room));
            }
            Err(DiskError::NoSpace { path, free, reserved, .. }) => (path, free, reserved),
            Err(error) => return Err(error),
        };
        let meta = self.file.metadata().map_err(|e| DiskError::io("stat", &self.path(), e))?;
        let made = u128::from(meta.blocks()) * 512;
        // As much of each further byte as of those before.
        let more = u64::try_from(made * u128::from(rest) / u128::from(len)).unwrap_or(u64::MAX);
        let without = free.saturating_sub(reserved).saturating_add(len);
        if more / DOUBT > without {
            let need = more.saturating_add(rest);
            return Err(DiskError::NoSpace { path, need, free, reserved });
        }
        Ok(None)
    }

    /// Goes on with what is kept in `spool`.
    ///
    /// # Errors
    /// [`DiskError::Io`].
    pub fn spool_on(&self, spool: Spool, room: Reservation) -> Result<SpoolEnd, DiskError> {
        SpoolEnd::start(spool, room, Arc::clone(&self.file))
    }
}

/// Where the next bytes of a compressed source are kept. When it is dropped without
/// [`SpoolEnd::finish`], what is not recorded is lost.
#[derive(Debug)]
pub struct SpoolEnd {
    file: Arc<File>,
    path: PathBuf,
    data_at: u64,
    state: Arc<Mutex<State>>,
    room: Reservation,
    since_write_back: u64,
    since_commit: u64,
    last_commit: Instant,
    committer: Committer,
}

/// What was appended, and is to be recorded.
struct State {
    len_bytes: u64,
    /// Of the MiB that is not full.
    block: Xxh3,
    /// Of those that are; the first ones are recorded.
    digests: Vec<u64>,
}

impl std::fmt::Debug for State {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("State").field("len_bytes", &self.len_bytes).finish_non_exhaustive()
    }
}

impl State {
    /// Takes the next bytes.
    fn take(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let room = usize::try_from(MIB - self.len_bytes % MIB).unwrap_or(usize::MAX);
            let (now, rest) = bytes.split_at(room.min(bytes.len()));
            self.block.update(now);
            self.len_bytes += now.len() as u64;
            if self.len_bytes.is_multiple_of(MIB) {
                self.digests.push(self.block.digest());
                self.block.reset();
            }
            bytes = rest;
        }
    }
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

impl SpoolEnd {
    /// `filled`: the file that is made of the source. It stays locked until nothing more is
    /// recorded.
    fn start(mut spool: Spool, room: Reservation, filled: Arc<File>) -> Result<Self, DiskError> {
        let mut block = Xxh3::new();
        let whole = spool.len_bytes() / MIB * MIB;
        match spool.read(whole) {
            Some(tail) => block.update(&tail),
            None => spool.cut(whole),
        }
        let data_at = data_at(spool.total_bytes());
        let Spool { file, path, record, .. } = spool;
        let mut digests = record.digests.clone();
        digests.truncate(usize::try_from(whole / MIB).unwrap_or(usize::MAX));
        let state = State { len_bytes: record.len_bytes, block, digests };
        let state = Arc::new(Mutex::new(state));
        let commit = Commit {
            file: Arc::clone(&file),
            path: path.clone(),
            data_at,
            record,
            state: Arc::clone(&state),
            _filled: filled,
        };
        let committer = Committer::start(commit)?;
        Ok(Self {
            file,
            path,
            data_at,
            state,
            room,
            since_write_back: 0,
            since_commit: 0,
            last_commit: Instant::now(),
            committer,
        })
    }

    /// How many bytes of the source are here, durable or not.
    #[must_use]
    pub fn len_bytes(&self) -> u64 {
        lock(&self.state).len_bytes
    }

    /// For who reads what is here while more is appended.
    #[must_use]
    pub fn reader(&self) -> SpoolReader {
        let (file, state) = (Arc::clone(&self.file), Arc::clone(&self.state));
        SpoolReader { file, path: self.path.clone(), data_at: self.data_at, state }
    }

    /// Keeps the next bytes of the source.
    ///
    /// # Errors
    /// [`DiskError::Full`], or [`DiskError::Io`] of this write or of an earlier sync: the spool is
    /// of no more use in this run.
    pub fn append(&mut self, bytes: &[u8]) -> Result<(), DiskError> {
        let at = self.len_bytes();
        let written = self.file.write_all_at(bytes, self.data_at + at);
        written.map_err(|e| DiskError::write(&self.path, at, e))?;
        self.room.consume(bytes.len() as u64, false);
        lock(&self.state).take(bytes);
        self.since_commit += bytes.len() as u64;
        self.since_write_back += bytes.len() as u64;
        if self.since_write_back >= WRITE_BACK_BYTES {
            self.since_write_back = 0;
            start_write_back(&self.file);
        }
        self.look()
    }

    /// Has what was appended made durable, if it is time. To be called now and then.
    ///
    /// # Errors
    /// An earlier sync has failed.
    pub fn look(&mut self) -> Result<(), DiskError> {
        let due =
            self.since_commit >= COMMIT_BYTES || self.last_commit.elapsed() >= COMMIT_INTERVAL;
        if due && self.since_commit > 0 && self.committer.offer()? {
            self.since_commit = 0;
            self.last_commit = Instant::now();
        }
        Ok(())
    }

    /// Makes everything durable that was appended.
    ///
    /// # Errors
    /// As [`SpoolEnd::append`].
    pub fn finish(mut self) -> Result<(), DiskError> {
        let mut commit = self.committer.end()?;
        commit.run()
    }

    /// Ends without making more durable than is on its way.
    ///
    /// # Errors
    /// As [`SpoolEnd::append`].
    pub fn close(mut self) -> Result<(), DiskError> {
        self.committer.end().map(drop)
    }
}

/// Reads what is in a spool, of this run and of earlier ones, while more is appended.
#[derive(Clone, Debug)]
pub struct SpoolReader {
    file: Arc<File>,
    path: PathBuf,
    data_at: u64,
    state: Arc<Mutex<State>>,
}

impl SpoolReader {
    /// How many bytes of the source are here, durable or not.
    #[must_use]
    pub fn len_bytes(&self) -> u64 {
        lock(&self.state).len_bytes
    }

    /// The bytes of the MiB that begins at `at`, as far as they are here. `None` if they are not
    /// those that came.
    #[must_use]
    pub fn read(&self, at: u64) -> Option<Vec<u8>> {
        let (len, digest) = {
            let state = lock(&self.state);
            let whole = usize::try_from(at / MIB).unwrap_or(usize::MAX);
            let digest = state.digests.get(whole).copied();
            let len = state.len_bytes.checked_sub(at)?.min(MIB);
            (usize::try_from(len).ok()?, digest.unwrap_or_else(|| state.block.digest()))
        };
        read_checked(&self.file, &self.path, self.data_at + at, len, digest)
    }
}

/// Syncs the bytes, then records them.
struct Commit {
    file: Arc<File>,
    path: PathBuf,
    data_at: u64,
    record: Record,
    state: Arc<Mutex<State>>,
    _filled: Arc<File>,
}

impl Commit {
    fn run(&mut self) -> Result<(), DiskError> {
        let from = self.record.len_bytes;
        let whole = usize::try_from(from / MIB).unwrap_or(usize::MAX);
        let (len, fresh) = {
            let state = lock(&self.state);
            let mut fresh = state.digests.get(whole..).unwrap_or_default().to_vec();
            if !state.len_bytes.is_multiple_of(MIB) {
                fresh.push(state.block.digest());
            }
            (state.len_bytes, fresh)
        };
        if len == from {
            return Ok(());
        }
        self.sync()?;
        self.record.len_bytes = len;
        self.record.digests.truncate(whole);
        self.record.digests.extend(fresh);
        let stored = self.record.store(&self.file, from);
        stored.map_err(|e| DiskError::write(&self.path, from, e))?;
        self.sync()?;
        // Nobody reads it again but after a crash.
        let many = std::num::NonZeroU64::new(len - from);
        let advice = rustix::fs::Advice::DontNeed;
        let _ = rustix::fs::fadvise(&*self.file, self.data_at + from, many, advice);
        Ok(())
    }

    fn sync(&self) -> Result<(), DiskError> {
        self.file.sync_data().map_err(|e| DiskError::io("sync", &self.path, e))
    }
}

/// The thread that makes durable.
#[derive(Debug)]
struct Committer {
    due: Option<SyncSender<()>>,
    thread: Option<JoinHandle<Result<Commit, DiskError>>>,
    path: PathBuf,
}

impl std::fmt::Debug for Commit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Commit").field("record", &self.record).finish_non_exhaustive()
    }
}

impl Committer {
    fn start(mut commit: Commit) -> Result<Self, DiskError> {
        let path = commit.path.clone();
        let (due, queue) = mpsc::sync_channel(1);
        let thread = std::thread::Builder::new()
            .name("spool-commit".into())
            .spawn(move || queue.into_iter().try_for_each(|()| commit.run()).map(|()| commit))
            .map_err(|e| DiskError::io("start a commit thread for", &path, e))?;
        Ok(Self { due: Some(due), thread: Some(thread), path })
    }

    /// Asks for a commit; false if one is under way and another waits.
    fn offer(&mut self) -> Result<bool, DiskError> {
        let Some(due) = &self.due else { return Ok(false) };
        match due.try_send(()) {
            Ok(()) => Ok(true),
            Err(TrySendError::Full(())) => Ok(false),
            // The thread ends early only with an error.
            Err(TrySendError::Disconnected(())) => self.end().map(|_commit| false),
        }
    }

    /// Waits for the thread.
    fn end(&mut self) -> Result<Commit, DiskError> {
        self.due = None;
        let Some(thread) = self.thread.take() else {
            let gone = std::io::Error::from(std::io::ErrorKind::BrokenPipe);
            return Err(DiskError::io("record what is in", &self.path, gone));
        };
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }
}
