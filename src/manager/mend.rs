//! Scrubs one copy, and mends what is bad of it.
//!
//! Why: of a damaged copy a few MiB are bad; they must not cost a transfer of all, nor its readers.
//! How: the store finds the bad MiBs and writes the right ones ([`crate::disk::Mending`]); here they
//! are fetched: from complete copies on other disks of the node, else from the source, by range and
//! bound to the version that the image came from. What came from the source proves itself by the
//! digest of the whole too, which 64 bits a MiB are too few for.
//! Never: reads at more than the scrub's rate, or believes bytes that no digest proves.
//! Start at [`run`].

use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::backend::{CopyInfo, FailureClass, ScrubReport, WorkerEvent};
use super::slots::Slot;
use super::worker::{TICK, WorkError, Worker};
use crate::disk::{self, DiskError, Mending, Scrubbed, bytes_of};
use crate::fetch::{self, Class, Engine, Expect, FetchError, RateLimit, SourceFile, one_line};
use crate::import::{ImportError, Layout};
use crate::ring::idle_io_priority;
use crate::units::MIB;

/// Largest part that is asked for at once.
const PART_BYTES: u64 = 8 * MIB;
/// Longest sleep before a scrub looks whether it should stop or its rate has changed.
const NAP: Duration = Duration::from_millis(100);
/// Attempts at a source before a copy counts as not repaired; its worker tries again.
const ATTEMPTS: u32 = 3;
/// Ranges that a message names.
const SHOWN_RANGES: usize = 8;

/// `0x100000-0x1fffff, 0x400000-0x4fffff and 3 more`.
pub(super) fn show_ranges(ranges: &[Range<u64>]) -> String {
    let one = |range: &Range<u64>| format!("{:#x}-{:#x}", range.start, range.end.saturating_sub(1));
    let mut text = ranges.iter().take(SHOWN_RANGES).map(one).collect::<Vec<_>>().join(", ");
    if ranges.len() > SHOWN_RANGES {
        text.push_str(&format!(" and {} more", ranges.len() - SHOWN_RANGES));
    }
    text
}

/// Why bad bytes stay bad.
#[derive(Debug, thiserror::Error)]
#[error(
    "{}: {} bytes are not those of its digests ({}) and were not repaired: {why}",
    path.display(), bytes_of(bad), show_ranges(bad)
)]
pub(super) struct Unrepaired {
    path: PathBuf,
    bad: Vec<Range<u64>>,
    why: String,
    /// Whether the same may work later.
    pub(super) may_retry: bool,
    /// True if the source may have them, but not by range: only a transfer of all can help.
    pub(super) start_over: bool,
}

/// Scrubs the copy of `worker` and reports what came of it; says nothing if it was cancelled.
pub(super) async fn run(worker: Worker) {
    let report = match worker.scrub_and_mend().await {
        Ok(report) => report,
        Err(WorkError::Unrepaired(error)) => ScrubReport {
            bad_bytes: bytes_of(&error.bad),
            class: Some(match error.may_retry || error.start_over {
                true => FailureClass::Retry,
                false => FailureClass::Refuse,
            }),
            message: one_line(&error),
            ..ScrubReport::default()
        },
        Err(error) => {
            let Some(class) = error.class().filter(|_| !worker.is_cancelled()) else { return };
            let judged = matches!(
                &error,
                WorkError::Disk(DiskError::DigestMismatch { .. } | DiskError::Damaged { .. })
            );
            // Bytes that are wrong condemn the copy; trouble on the way to them does not.
            let class =
                judged.then_some(if worker.has_origin() { FailureClass::Retry } else { class });
            ScrubReport {
                class,
                unchecked: !judged,
                message: one_line(&error),
                ..ScrubReport::default()
            }
        }
    };
    if report.is_good() {
        tracing::info!(worker = %worker.task.worker, repaired_bytes = report.repaired_bytes, "scrubbed");
    } else {
        tracing::warn!(worker = %worker.task.worker, error = %report.message, "scrub");
    }
    worker.events.send(WorkerEvent::Scrubbed(report));
}

impl Worker {
    async fn scrub_and_mend(&self) -> Result<ScrubReport, WorkError> {
        let found = match self.scrub(Some(Arc::clone(&self.shared.scrub_limit))).await {
            Ok(found) => found,
            Err(WorkError::Disk(DiskError::NoDigests { .. })) => {
                // A file that was adopted: the digest of the whole, and those of its MiBs are made.
                self.verify().await?;
                return Ok(ScrubReport::default());
            }
            Err(error) => return Err(error),
        };
        if found.bad.is_empty() {
            if found.changed {
                self.on_disk(|slot, id| slot.disk.vouch(&id)).await?;
                let message = "its time or size was changed, its bytes were not".to_owned();
                return Ok(ScrubReport { message, ..ScrubReport::default() });
            }
            return Ok(ScrubReport::default());
        }
        let bytes = bytes_of(&found.bad);
        tracing::warn!(
            worker = %self.task.worker, ranges = %show_ranges(&found.bad), "bytes are bad: repairing"
        );
        match self.mend(found.bad.clone()).await? {
            Origin::Node => self.on_disk(|slot, id| slot.disk.vouch(&id)).await?,
            Origin::Source => drop(self.verify().await?),
        }
        let message = format!("repaired {bytes} bytes: {}", show_ranges(&found.bad));
        Ok(ScrubReport { repaired_bytes: bytes, message, ..ScrubReport::default() })
    }

    /// A finished file that was changed, or was being mended when the daemon ended: mended, and
    /// hashed before it counts.
    pub(super) async fn check(&self) -> Result<CopyInfo, WorkError> {
        let marked = self.on_disk(|slot, id| slot.disk.marked_bad(&id)).await?;
        if !marked.is_empty() {
            self.mend(marked).await?;
        }
        let mismatch = match self.verify().await {
            Err(error @ WorkError::Disk(DiskError::DigestMismatch { .. })) => error,
            other => return other,
        };
        let found = match self.scrub(None).await {
            Ok(found) if !found.bad.is_empty() => found,
            Ok(_)
            | Err(WorkError::Disk(DiskError::NoDigests { .. } | DiskError::Damaged { .. })) => {
                return Err(mismatch);
            }
            Err(error) => return Err(error),
        };
        self.mend(found.bad).await?;
        self.verify().await
    }

    /// True if the bytes can come from anywhere else.
    pub(super) fn has_origin(&self) -> bool {
        self.task.source.is_some() || !self.others.is_empty()
    }

    /// Finds the bad MiBs, at `limit` if there is one, on a thread that yields to all others.
    async fn scrub(&self, limit: Option<Arc<RateLimit>>) -> Result<Scrubbed, WorkError> {
        let (slot, id, cancel) = (Arc::clone(&self.slot), self.id(), self.cancel.clone());
        let (tx, mut rx) = tokio::sync::oneshot::channel();
        let done = Arc::new(AtomicU64::new(0));
        let at = Arc::clone(&done);
        let work = move || {
            let mut since = Instant::now();
            if limit.is_some() {
                idle_io_priority();
            }
            let pace = &mut |end: u64, bytes: u64| {
                at.store(end, Ordering::Relaxed);
                while let Some(rate) = limit.as_ref().and_then(|limit| limit.get()) {
                    let cost = Duration::from_nanos(bytes.saturating_mul(1_000_000_000) / rate);
                    let left = cost.saturating_sub(since.elapsed());
                    if left.is_zero() || cancel.is_cancelled() {
                        break;
                    }
                    std::thread::sleep(left.min(NAP));
                }
                since = Instant::now();
                !cancel.is_cancelled()
            };
            let _nobody_waits = tx.send(slot.disk.scrub(&id, pace));
        };
        let spawned = std::thread::Builder::new().name("scrub".to_owned()).spawn(work);
        let failed =
            |source| DiskError::io("start a thread to scrub", self.slot.disk.root(), source);
        let _detached = spawned.map_err(failed)?;
        let died = |_| failed(std::io::Error::other("it died; see the log"));
        let mut tick = tokio::time::interval(TICK);
        loop {
            tokio::select! {
                found = &mut rx => return Ok(found.map_err(died)??),
                _ = tick.tick() => {
                    let bytes = done.load(Ordering::Relaxed);
                    self.events.send(WorkerEvent::Scrubbing(bytes));
                }
            }
        }
    }

    /// Makes `bad` ranges good.
    ///
    /// # Errors
    /// [`WorkError::Unrepaired`] with what is left of them; others of this copy's own disk.
    async fn mend(&self, bad: Vec<Range<u64>>) -> Result<Origin, WorkError> {
        let mut mending = self.on_disk(move |slot, id| slot.disk.mend(&id, &bad)).await?;
        for other in &self.others {
            if mending.left().is_empty() {
                break;
            }
            mending = mend_from(Arc::clone(other), self.id(), mending).await?;
        }
        let (mut origin, mut trouble) = (Origin::Node, None);
        if !mending.left().is_empty() {
            origin = Origin::Source;
            trouble = self.mend_from_sources(&mut mending).await?;
        }
        let left = mending.left();
        in_place(move || mending.finish()).await?;
        let Some(Trouble { why, may_retry, start_over }) = trouble.filter(|_| !left.is_empty())
        else {
            return Ok(origin);
        };
        let path = self.slot.disk.data_path(&self.id());
        Err(WorkError::Unrepaired(Unrepaired { path, bad: left, why, may_retry, start_over }))
    }

    /// Asks the source and its mirrors, one after the other; `None` if all is mended.
    async fn mend_from_sources(&self, mending: &mut Mending) -> Result<Option<Trouble>, WorkError> {
        let task = &self.task;
        let Some(source) = &task.source else {
            let why = "no other disk has a good copy, and the image has no source".to_owned();
            return Ok(Some(Trouble { why, may_retry: false, start_over: false }));
        };
        if task.layout == Layout::Raw {
            let why = "the copy is an expanded one; it has to be brought in anew".to_owned();
            return Ok(Some(Trouble { why, may_retry: true, start_over: true }));
        }
        let mut trouble = None;
        for url in std::iter::once(source).chain(&task.mirrors) {
            match self.mend_from_source(url, mending).await? {
                None => return Ok(None),
                Some(found) => {
                    trouble.get_or_insert(found);
                }
            }
        }
        Ok(trouble)
    }

    async fn mend_from_source(
        &self,
        url: &fetch::SourceUrl,
        mending: &mut Mending,
    ) -> Result<Option<Trouble>, WorkError> {
        let mut engine = self.engine();
        engine.policy.max_attempts = engine.policy.max_attempts.min(ATTEMPTS);
        // Whether versions can be told apart or not: each MiB is held against its digest.
        let known = self.task.facts.as_ref().map(|facts| facts.digests.clone());
        let mut source = self.from(url).expecting(Expect::from(known.unwrap_or_default()));
        source.mirrors.clear();
        let progress = Arc::new(fetch::Progress::default());
        let mending_from = self.ask(&engine, &source, &progress, mending);
        match self.watch(mending_from, &progress).await? {
            Ok(trouble) => Ok(trouble),
            Err(error) if error.class() == Class::Cancelled => Err(ImportError::from(error).into()),
            Err(error) => {
                let start_over = matches!(error, FetchError::NoParts { .. });
                let may_retry = error.class() == Class::Retry;
                Ok(Some(Trouble { why: one_line(&error), may_retry, start_over }))
            }
        }
    }

    /// Reads what is bad from one source. The outer error is of this copy's own disk.
    async fn ask(
        &self,
        engine: &Engine,
        source: &fetch::Source,
        progress: &Arc<fetch::Progress>,
        mending: &mut Mending,
    ) -> Result<Result<Option<Trouble>, FetchError>, DiskError> {
        let file = match SourceFile::open(engine, source, progress).await {
            Ok((file, _head)) => file,
            Err(error) => return Ok(Err(error)),
        };
        let refuse = |why: String, start_over| Trouble { why, may_retry: false, start_over };
        let url = &source.url;
        if file.len_bytes() != mending.size_bytes() {
            // Compressed: its bytes are not the file's. The transfer of all knows better.
            let why = format!("{url} has {} bytes, the copy another number", file.len_bytes());
            return Ok(Ok(Some(refuse(why, true))));
        }
        let then = self.task.facts.as_ref().and_then(|facts| facts.etag.clone());
        let is_first = Some(url) == self.task.source.as_ref();
        if let (Some(then), Some(now), true) = (then, file.etag(), is_first)
            && then != now
        {
            let why = format!("{url} has another version now (ETag {now}, the image had {then})");
            return Ok(Ok(Some(refuse(why, false))));
        }
        for range in mending.left() {
            let mut at = range.start;
            while at < range.end {
                let end = range.end.min(at + PART_BYTES);
                let bytes = match file.read(at..end).await {
                    Ok(bytes) => bytes,
                    Err(error) => return Ok(Err(error)),
                };
                engine.limit.spend(bytes.len()).await;
                let blocks = bytes.chunks(usize::try_from(MIB).unwrap_or(usize::MAX));
                for (index, block) in (0u64..).zip(blocks) {
                    if !mending.put(at + index * MIB, block)? {
                        let why = format!(
                            "{url} has other bytes now in the MiB from byte {:#x} on",
                            at + index * MIB
                        );
                        return Ok(Ok(Some(refuse(why, false))));
                    }
                }
                at = end;
            }
        }
        Ok(Ok(None))
    }
}

/// Where the bytes that a copy was mended with came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Origin {
    Node,
    Source,
}

struct Trouble {
    why: String,
    may_retry: bool,
    start_over: bool,
}

/// Mends what the complete copy on `other` has right, whatever its own state: each MiB proves itself.
async fn mend_from(
    other: Arc<Slot>,
    id: disk::CopyId,
    mut mending: Mending,
) -> Result<Mending, DiskError> {
    in_place(move || {
        use std::os::unix::fs::FileExt;
        let sealed = match other.disk.sealed(&id) {
            Ok(sealed) => sealed,
            Err(error) => {
                tracing::warn!(error = %one_line(&error), "a complete copy cannot be opened");
                return Ok(mending);
            }
        };
        let mut block = vec![0; usize::try_from(MIB).unwrap_or(0)];
        for range in mending.left() {
            let mut at = range.start;
            while at < range.end {
                let len = usize::try_from((range.end - at).min(MIB)).unwrap_or(block.len());
                let bytes = block.get_mut(..len).unwrap_or_default();
                match sealed.file().read_exact_at(bytes, at) {
                    Ok(()) => drop(mending.put(at, bytes)?),
                    Err(error) => tracing::warn!(%error, at, "a complete copy cannot be read"),
                }
                at += MIB;
            }
        }
        Ok(mending)
    })
    .await
}

/// Runs what blocks on a thread that may. A panic there goes on here.
async fn in_place<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    match tokio::task::spawn_blocking(work).await {
        Ok(value) => value,
        Err(error) => std::panic::resume_unwind(error.into_panic()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_shown_bounded() {
        let ranges: Vec<_> = (0..11).map(|n| n * 2 * MIB..(n * 2 + 1) * MIB).collect();
        let text = show_ranges(&ranges);
        assert!(text.starts_with("0x0-0xfffff, 0x200000-0x2fffff, "), "{text}");
        assert!(text.ends_with(" and 3 more"), "{text}");
    }
}
