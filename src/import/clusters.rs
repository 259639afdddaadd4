//! Makes the guest's bytes of the source's, on all cores.
//!
//! Why: decompression is the slowest stage of an expansion, and clusters do not depend on each
//! other.
//! How: each buffer that arrives goes to one of a few threads, which decodes the clusters in it
//! into buffers of the guest's; clusters that follow each other in the guest share one. A cluster
//! that lies across two buffers is put together first. Clusters smaller than a unit are written
//! where they belong, and their unit counts once all of it is there. What readers wait for may be made
//! before its turn ([`super::early`]); in its turn it is only held against that.
//! Never: holds more of cut clusters than a bounded number of bytes, or panics on a bad stream.
//! Start at [`Clusters::start`].

use std::collections::HashMap;
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use super::early::{InTurn, Marks};
use super::error::ImportError;
use super::plan::{Entry, Plan, units_of};
use crate::disk::{DiskError, Filling, UNIT_BYTES};
use crate::fetch::{Feed, FetchError, Stopped, Taker};
use crate::image::ReadError;
use crate::image::qcow2::Codec;
use crate::ring::{BLOCK_BYTES, Buf, BufShare, data_runs};
use crate::units::{FileOffset, GuestOffset};

/// Bytes of clusters that lie across buffers which are kept at most. Sound images have one such
/// cluster at each end of a buffer.
const MAX_CUT_BYTES: usize = 64 << 20;

/// A buffer of the source, and where it begins.
type Piece = (u64, Arc<Buf>);

/// The threads that decode.
pub(super) struct Clusters {
    pieces: Sender<Piece>,
    threads: Vec<JoinHandle<Result<(), ImportError>>>,
    shared: Arc<Shared>,
}

impl std::fmt::Debug for Clusters {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Clusters({} threads)", self.threads.len())
    }
}

impl Taker for Clusters {
    fn take(&self, at: u64, buf: Arc<Buf>) -> Result<(), Stopped> {
        if self.shared.stopped.load(Ordering::Relaxed) {
            return Err(Stopped);
        }
        self.shared.come_to.fetch_max(at + buf.len() as u64, Ordering::Relaxed);
        self.pieces.send((at, buf)).map_err(|_ended| Stopped)
    }
}

/// What the threads share.
pub(super) struct Shared {
    pub(super) plan: Plan,
    /// Who makes which entry.
    pub(super) marks: Marks,
    /// How far into the source its pieces have come in their turn.
    pub(super) come_to: AtomicU64,
    /// Why something was not made before its turn: nothing will be of use then.
    failed: Mutex<Option<ImportError>>,
    /// Something failed: no piece is taken, or looked at, any more.
    stopped: AtomicBool,
    pieces: Mutex<Receiver<Piece>>,
    cut: Mutex<Cut>,
    units: Mutex<HashMap<u64, u32>>,
    feed: Feed,
    made: BufShare,
    file: Arc<File>,
    path: PathBuf,
    name: PathBuf,
    runtime: tokio::runtime::Handle,
}

/// Clusters of which a part has arrived, by the number of their entry.
#[derive(Default)]
struct Cut {
    parts: HashMap<usize, CutCluster>,
    bytes: usize,
}

struct CutCluster {
    bytes: Vec<u8>,
    missing: usize,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Clusters {
    /// Starts a thread for each core. `name` is the source's, for messages.
    pub(super) fn start(
        mut plan: Plan,
        feed: Feed,
        made: &BufShare,
        filling: &Filling,
        name: &Path,
    ) -> Result<Self, ImportError> {
        let (pieces, queue) = mpsc::channel();
        let shared = Arc::new(Shared {
            units: Mutex::new(std::mem::take(&mut plan.units)),
            marks: Marks::new(plan.entries.len()),
            come_to: AtomicU64::new(0),
            failed: Mutex::default(),
            stopped: AtomicBool::new(false),
            plan,
            pieces: Mutex::new(queue),
            cut: Mutex::default(),
            feed,
            made: made.clone(),
            file: Arc::clone(filling.file()),
            path: filling.path(),
            name: name.to_owned(),
            runtime: tokio::runtime::Handle::current(),
        });
        let count = std::thread::available_parallelism().map_or(1, usize::from);
        let mut threads = Vec::new();
        for _ in 0..count {
            let shared = Arc::clone(&shared);
            let thread = std::thread::Builder::new()
                .name("expand".into())
                .spawn(move || Decoder::new(&shared).run());
            threads.push(thread.map_err(|e| DiskError::io("decode into", &filling.path(), e))?);
        }
        Ok(Self { pieces, threads, shared })
    }

    /// What the threads share.
    pub(super) fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }

    /// Waits until everything that was taken is handed on. Blocks the thread.
    ///
    /// # Errors
    /// The first cluster that could not be decoded, or [`ImportError::Stopped`].
    pub(super) fn finish(self) -> Result<(), ImportError> {
        drop(self.pieces);
        let join = |thread: JoinHandle<_>| {
            thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        };
        let ends: Vec<_> = self.threads.into_iter().map(join).collect();
        let mut errors: Vec<_> = ends.into_iter().filter_map(Result::err).collect();
        errors.extend(lock(&self.shared.failed).take());
        // A reason is worth more than the fact that something has stopped.
        errors.sort_by_key(|error| matches!(error, ImportError::Stopped));
        errors.into_iter().next().map_or(Ok(()), Err)
    }
}

impl Shared {
    /// The threads stop at their next piece, and the network with them. Waits for none of them: one may
    /// wait for a piece that never comes, and hold the queue meanwhile.
    fn stop(&self) {
        self.stopped.store(true, Ordering::Relaxed);
    }

    /// What is here of the bytes at `at` of the source is not what came.
    fn unsteady(&self, at: u64) -> ImportError {
        ImportError::Unsteady { url: self.name.display().to_string(), at }
    }

    /// Makes entries of which `bytes`, which begin at `at` of the source, have all, before their turn.
    /// Blocks.
    pub(super) fn make_early(&self, entries: &[usize], at: u64, bytes: &[u8]) {
        let mut decoder = Decoder::new(self);
        let within = |place: u64| usize::try_from(place - at).unwrap_or(usize::MAX);
        let mut make = || -> Result<(), ImportError> {
            for &index in entries {
                let entry = self.plan.entries[index];
                let stored = &bytes[within(entry.stored().start)..within(entry.stored().end)];
                if self.marks.begin_early(index, stored) {
                    decoder.cluster(&entry, stored)?;
                }
            }
            decoder.close()
        };
        if let Err(error) = make() {
            lock(&self.failed).get_or_insert(error);
            self.stop();
        }
    }
}

/// One thread.
struct Decoder<'a> {
    codec: Codec,
    scratch: Vec<u8>,
    /// The guest's bytes that are being gathered, and where they begin.
    open: Option<(u64, Buf)>,
    shared: &'a Shared,
}

impl<'a> Decoder<'a> {
    fn new(shared: &'a Shared) -> Self {
        Self { codec: Codec::new(), scratch: Vec::new(), open: None, shared }
    }
}

impl Decoder<'_> {
    fn run(&mut self) -> Result<(), ImportError> {
        loop {
            let next = lock(&self.shared.pieces).recv();
            let Ok((at, buf)) = next else { return Ok(()) };
            if self.shared.stopped.load(Ordering::Relaxed) {
                return Ok(());
            }
            let done = self.piece(at, buf.bytes());
            if let Err(error) = done {
                self.shared.stop();
                return Err(error);
            }
        }
    }

    fn piece(&mut self, at: u64, bytes: &[u8]) -> Result<(), ImportError> {
        let range = at..at + bytes.len() as u64;
        let plan = &self.shared.plan;
        for index in plan.reaching(&range) {
            let entry = plan.entries[index];
            let stored = entry.stored();
            let within = |at: u64| usize::try_from(at - range.start).unwrap_or(usize::MAX);
            if stored.start >= range.start && stored.end <= range.end {
                let bytes = &bytes[within(stored.start)..within(stored.end)];
                self.in_turn(index, &entry, bytes)?;
                continue;
            }
            let part = stored.start.max(range.start)..stored.end.min(range.end);
            let bytes = &bytes[within(part.start)..within(part.end)];
            if let Some(whole) = self.put_together(index, &entry, &part, bytes)? {
                self.in_turn(index, &entry, &whole)?;
            }
        }
        self.close()
    }

    /// Makes a cluster whose turn has come, unless it was made before.
    fn in_turn(&mut self, index: usize, entry: &Entry, stored: &[u8]) -> Result<(), ImportError> {
        match self.shared.marks.begin_in_turn(index, stored) {
            InTurn::Make if entry.kept => self.compare(entry, stored),
            InTurn::Make => self.cluster(entry, stored),
            InTurn::IsMade => Ok(()),
            InTurn::Differs => Err(self.shared.unsteady(entry.at)),
        }
    }

    /// Holds a cluster that an earlier run has made against what came now.
    fn compare(&mut self, entry: &Entry, stored: &[u8]) -> Result<(), ImportError> {
        let guest = self.shared.plan.guest(entry);
        let visible = usize::try_from(guest.end - guest.start).unwrap_or(usize::MAX);
        let (mut made, mut kept) = (Vec::new(), vec![0; visible]);
        let made = match entry.packed {
            true => {
                let size = self.shared.plan.bits.size_bytes();
                made.resize(usize::try_from(size).unwrap_or(usize::MAX), 0);
                self.unpack(entry, stored, &mut made)?;
                &made[..visible]
            }
            false => stored,
        };
        let (file, path) = (&self.shared.file, &self.shared.path);
        let read = file.read_exact_at(&mut kept, guest.start);
        read.map_err(|e| FetchError::ReadBack {
            source: Box::new(DiskError::io("read back", path, e)),
        })?;
        if kept == made { Ok(()) } else { Err(self.shared.unsteady(entry.at)) }
    }

    /// Keeps a part of a cluster; gives all of it once it is complete.
    fn put_together(
        &self,
        index: usize,
        entry: &Entry,
        part: &Range<u64>,
        bytes: &[u8],
    ) -> Result<Option<Vec<u8>>, ImportError> {
        let len = usize::try_from(entry.len).unwrap_or(usize::MAX);
        let mut cut = lock(&self.shared.cut);
        if !cut.parts.contains_key(&index) {
            cut.bytes += len;
            if cut.bytes > MAX_CUT_BYTES {
                return Err(self.fault(entry, "too many clusters at one place of the file"));
            }
            cut.parts.insert(index, CutCluster { bytes: vec![0; len], missing: len });
        }
        let Some(cluster) = cut.parts.get_mut(&index) else { return Ok(None) };
        let start = usize::try_from(part.start - entry.at).unwrap_or(usize::MAX);
        cluster.bytes[start..start + bytes.len()].copy_from_slice(bytes);
        cluster.missing -= bytes.len();
        if cluster.missing > 0 {
            return Ok(None);
        }
        cut.bytes -= len;
        Ok(cut.parts.remove(&index).map(|cluster| cluster.bytes))
    }

    fn fault(&self, entry: &Entry, what: &'static str) -> ImportError {
        let at = GuestOffset(entry.guest_at);
        let (path, stored_at) = (self.shared.name.clone(), FileOffset(entry.at));
        ReadError::Decode { path, what, at, stored_at }.into()
    }

    /// Hands on one cluster, of which `stored` is in the source.
    fn cluster(&mut self, entry: &Entry, stored: &[u8]) -> Result<(), ImportError> {
        let guest = self.shared.plan.guest(entry);
        let size = usize::try_from(self.shared.plan.bits.size_bytes()).unwrap_or(usize::MAX);
        if self.shared.plan.is_fine() {
            return self.small_cluster(entry, stored, guest, size);
        }
        if !entry.packed {
            return self.append(guest.start, stored);
        }
        let visible = usize::try_from(guest.end - guest.start).unwrap_or(usize::MAX);
        if size > BLOCK_BYTES {
            let mut scratch = std::mem::take(&mut self.scratch);
            scratch.resize(size, 0);
            self.unpack(entry, stored, &mut scratch)?;
            let appended = self.append(guest.start, &scratch[..visible]);
            self.scratch = scratch;
            return appended;
        }
        // Decoded right where it is written from: the cluster divides the MiB.
        let mut buf = self.buf_at(guest.start)?;
        let len = buf.len();
        let Self { codec, shared, .. } = self;
        let room = &mut buf.spare(len + size)[..size];
        let done = codec.decode(shared.plan.compression, stored, room);
        done.map_err(|fault| self.fault(entry, fault.text()))?;
        buf.set_len(len + visible);
        self.keep(guest.start - len as u64, buf)
    }

    fn unpack(
        &mut self,
        entry: &Entry,
        stored: &[u8],
        cluster: &mut [u8],
    ) -> Result<(), ImportError> {
        let done = self.codec.decode(self.shared.plan.compression, stored, cluster);
        done.map_err(|fault| self.fault(entry, fault.text()))
    }

    /// The open buffer if it goes on at `at` of the guest, else a new one.
    fn buf_at(&mut self, at: u64) -> Result<Buf, ImportError> {
        if let Some((start, buf)) = self.open.take() {
            if start + buf.len() as u64 == at {
                return Ok(buf);
            }
            self.hand_on(start, buf)?;
        }
        let taken = self.shared.runtime.block_on(self.shared.made.take());
        Ok(taken.map_err(|source| FetchError::Memory { source })?)
    }

    /// Keeps `buf` open, or hands it on if it ends at a MiB.
    fn keep(&mut self, start: u64, buf: Buf) -> Result<(), ImportError> {
        if (start + buf.len() as u64).is_multiple_of(BLOCK_BYTES as u64) {
            return self.hand_on(start, buf);
        }
        self.open = Some((start, buf));
        Ok(())
    }

    fn append(&mut self, mut at: u64, mut bytes: &[u8]) -> Result<(), ImportError> {
        while !bytes.is_empty() {
            let mut buf = self.buf_at(at)?;
            let start = at - buf.len() as u64;
            let in_block = usize::try_from(start % BLOCK_BYTES as u64).unwrap_or(0);
            let taken = buf.fill(bytes, BLOCK_BYTES - in_block);
            at += taken as u64;
            bytes = &bytes[taken..];
            self.keep(start, buf)?;
        }
        Ok(())
    }

    fn hand_on(&self, start: u64, buf: Buf) -> Result<(), ImportError> {
        self.shared.feed.send(start, buf).map_err(|Stopped| ImportError::Stopped)
    }

    /// The piece is over: what follows it in the guest may be with another thread.
    fn close(&mut self) -> Result<(), ImportError> {
        self.open.take().map_or(Ok(()), |(start, buf)| self.hand_on(start, buf))
    }

    /// What may be less than a unit is written at once; a unit counts when all of it is there.
    fn small_cluster(
        &mut self,
        entry: &Entry,
        stored: &[u8],
        guest: Range<u64>,
        size: usize,
    ) -> Result<(), ImportError> {
        let mut scratch = std::mem::take(&mut self.scratch);
        let visible = usize::try_from(guest.end - guest.start).unwrap_or(usize::MAX);
        let bytes = if entry.packed {
            scratch.resize(size, 0);
            self.unpack(entry, stored, &mut scratch)?;
            &scratch[..visible]
        } else {
            stored
        };
        for run in data_runs(bytes) {
            let at = guest.start + run.start as u64;
            let wrote = self.shared.file.write_all_at(&bytes[run], at);
            wrote.map_err(|e| DiskError::write(&self.shared.path, at, e))?;
        }
        self.scratch = scratch;
        for unit in units_of(&guest) {
            if self.is_last_of(unit) {
                let end = self.shared.plan.virtual_bytes.min((unit + 1) * UNIT_BYTES);
                let (at, len) = (unit * UNIT_BYTES, end - unit * UNIT_BYTES);
                let sent = self.shared.feed.send_written(at, len);
                sent.map_err(|Stopped| ImportError::Stopped)?;
            }
        }
        Ok(())
    }

    /// Counts an entry of `unit` as written; true if it was the last one.
    fn is_last_of(&self, unit: u64) -> bool {
        let mut units = lock(&self.shared.units);
        let left = units.get_mut(&unit).expect("each unit with an entry is counted");
        *left -= 1;
        let is_last = *left == 0;
        if is_last {
            units.remove(&unit);
        }
        is_last
    }
}
