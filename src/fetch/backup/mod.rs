//! A backup of an image, as Longhorn's backup store keeps it, as a source.
//!
//! Why: an image that was backed up comes back without the system that made the backup: from the bucket of
//! the backup target, or the directory where it is mounted.
//! How: the backup's record ([`BackupRecord`]) names the blocks of the image by their digests, and where each
//! belongs; the blocks are files or objects, compressed; several are read and decoded ahead and passed on in
//! the order of the image. What no block covers is zeroes. The record has the SHA-512 of the whole.
//! Never: passes on a block whose digest is another; follows a name of the record that is no digest.
//! Start at [`Run::backup`].

mod block;
mod place;
mod record;

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;

use tokio::runtime::Handle;
use tokio::task::JoinHandle;

pub use place::BackupFault;
pub(in crate::fetch) use place::BackupPlace;
pub use record::BackupRecord;

use place::Store;
use record::Block;

use super::error::FetchError;
use super::limit::RateLimit;
use super::pipeline::{Feed, Stopped};
use super::progress::{Phase, Progress};
use super::threads::{blocking, in_place};
use super::transfer::{Fetched, Run};
use super::version::{Remote, Resume};
use crate::disk::{DigestKind, UNIT_BYTES};
use crate::ring::{BLOCK_BYTES, BufShare};

/// Blocks of a bucket that are asked for at the same time.
const FAR_BLOCKS: usize = 8;
/// Bytes, decoded, after which no further block is asked for ahead.
const AHEAD_BYTES: u64 = 32 << 20;

impl Run<'_> {
    /// From a backup. What is durable of the same backup is not read again.
    pub(super) async fn backup(&mut self, place: &BackupPlace) -> Result<Fetched, FetchError> {
        self.progress.set_phase(Phase::Connecting);
        let url = self.url.to_string();
        let store = Arc::new(place.open(self.access, &self.engine.policy, self.progress)?);
        let text = store.record(&url, &place.image).await?;
        let record = BackupRecord::parse(&text);
        let record = record.map_err(|source| FetchError::Backup { url: url.clone(), source })?;
        let (total, remote) = (record.size_bytes, Remote::new(Some(&record.tag()), None));
        let known = self.known_version();
        if known.is_some_and(|known| known.may_resume(&remote, false) == Resume::Same)
            && self.filling.total_bytes() == Some(total)
        {
            in_place(|| self.filling.resume())?;
        } else {
            self.begin(&remote, Some(total))?;
        }
        self.progress.set_total(Some(total));
        self.progress.set_phase(Phase::Fetching);
        let missing = self.filling.missing();
        let sha512 = record.sha512.clone();
        let wanted = match &sha512 {
            Some(_) => self.source.wanted().with(DigestKind::Sha512),
            None => self.source.wanted(),
        };
        let feed = self.start_pipeline(&missing, wanted)?;
        let reader = Reader {
            store,
            record: Arc::new(record),
            url: url.clone(),
            feed,
            share: self.share.clone(),
            runtime: Handle::current(),
            progress: Arc::clone(self.progress),
            limit: Arc::clone(&self.engine.limit),
        };
        match blocking(move || reader.copy(&missing)).await {
            Ok(Ok(())) => {}
            Ok(Err(Stopped)) => return Err(self.writer_error().await),
            Err(error) => return self.abandon(error).await,
        }
        let fetched = self.complete(remote.etag, total).await?;
        let found = fetched.digests.whole.get(DigestKind::Sha512);
        match (sha512, found) {
            (Some(expected), Some(found)) if expected != found => {
                let (kind, found) = (DigestKind::Sha512.name(), found.to_owned());
                Err(FetchError::Digest { url, kind, expected, found })
            }
            _same_or_unknown => Ok(fetched),
        }
    }
}

/// What brings the blocks in.
struct Reader {
    store: Arc<Store>,
    record: Arc<BackupRecord>,
    url: String,
    feed: Feed,
    share: BufShare,
    runtime: Handle,
    progress: Arc<Progress>,
    limit: Arc<RateLimit>,
}

type Sent = Result<Result<(), Stopped>, FetchError>;

/// Blocks that are on their way, in the order of the image; they are let go with it.
struct Ahead(VecDeque<(Block, Reading)>);

type Reading = JoinHandle<Result<Vec<u8>, FetchError>>;

impl Drop for Ahead {
    fn drop(&mut self) {
        self.0.iter().for_each(|(_, task)| task.abort());
    }
}

impl Reader {
    /// Sends what belongs into `missing`, in the order of the image. Blocks the thread.
    fn copy(&self, missing: &[Range<u64>]) -> Sent {
        for range in missing {
            let mut at = range.start;
            let mut blocks = self.record.within(range).iter();
            let mut ahead = Ahead(VecDeque::new());
            loop {
                while self.may_begin_another(&ahead)
                    && let Some(block) = blocks.next()
                {
                    let task = self.runtime.spawn(self.begin(block.clone()));
                    ahead.0.push_back((block.clone(), task));
                }
                let Some((block, task)) = ahead.0.front_mut() else { break };
                let bytes = match self.runtime.block_on(task) {
                    Ok(bytes) => bytes?,
                    Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
                    Err(_cancelled) => return Err(FetchError::Cancelled),
                };
                let begin = block.offset.max(at);
                let sent = self.zeroes(at..begin)?;
                if sent.is_err() {
                    return Ok(sent);
                }
                let skip = usize::try_from(begin - block.offset).unwrap_or(usize::MAX);
                let end = (block.offset + bytes.len() as u64).min(range.end);
                let len = usize::try_from(end.saturating_sub(begin)).unwrap_or(usize::MAX);
                let part = bytes.get(skip..).and_then(|rest| rest.get(..len));
                let sent = self.data(begin, part.unwrap_or_default())?;
                if sent.is_err() {
                    return Ok(sent);
                }
                at = at.max(end);
                ahead.0.pop_front();
            }
            let sent = self.zeroes(at..range.end)?;
            if sent.is_err() {
                return Ok(sent);
            }
        }
        Ok(Ok(()))
    }

    /// True as long as what is on its way is little, by number and by bytes.
    fn may_begin_another(&self, ahead: &Ahead) -> bool {
        let threads = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        let most = if self.store.is_far() { threads.max(FAR_BLOCKS) } else { threads };
        let bytes: u64 = ahead.0.iter().map(|(block, _)| block.room.min(block::MAX_BYTES)).sum();
        ahead.0.is_empty() || ahead.0.len() < most && bytes < AHEAD_BYTES
    }

    /// Reads and decodes one block.
    fn begin(&self, block: Block) -> impl Future<Output = Result<Vec<u8>, FetchError>> + use<> {
        let (store, record) = (Arc::clone(&self.store), Arc::clone(&self.record));
        let url = self.url.clone();
        async move {
            let stored = store.block(&url, &block).await?;
            let decoded = blocking(move || block.bytes(&record, &stored)).await;
            decoded.map_err(|source| FetchError::Backup { url, source })
        }
    }

    fn zeroes(&self, range: Range<u64>) -> Sent {
        if self.progress.is_stopped() {
            return Err(FetchError::Cancelled);
        }
        match range.is_empty() {
            true => Ok(Ok(())),
            false => Ok(self.feed.send_zeroes(range.start, range.end - range.start)),
        }
    }

    fn data(&self, at: u64, bytes: &[u8]) -> Sent {
        let mut at = at;
        let mut left = bytes;
        while !left.is_empty() {
            // No buffer crosses the border of a MiB.
            let room = BLOCK_BYTES as u64 - at % BLOCK_BYTES as u64;
            let len = usize::try_from(room).unwrap_or(BLOCK_BYTES).min(left.len());
            let (part, rest) = left.split_at(len);
            let taken = self.runtime.block_on(async {
                tokio::select! {
                    buf = self.share.take() => buf.map_err(|source| FetchError::Memory { source }),
                    () = self.progress.stopped() => Err(FetchError::Cancelled),
                }
            });
            let mut buf = taken?;
            buf.spare(len)[..len].copy_from_slice(part);
            buf.set_len(len);
            self.progress.add_received(len as u64);
            self.runtime.block_on(async {
                tokio::select! {
                    () = self.limit.spend(len) => {}
                    () = self.progress.stopped() => {}
                }
            });
            if let Err(stopped) = self.feed.send(at, buf) {
                return Ok(Err(stopped));
            }
            at += len as u64;
            left = rest;
        }
        Ok(Ok(()))
    }
}

/// A length as a whole number of the units in which a copy is filled, but never past `most`.
fn in_units(len: u64, most: u64) -> u64 {
    len.div_ceil(UNIT_BYTES).saturating_mul(UNIT_BYTES).min(most)
}
