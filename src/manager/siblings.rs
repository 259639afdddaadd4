//! A copy from a complete one on another disk of the node (rule 17), or of the image that it clones.
//!
//! Why: a further disk, and a clone, must cost no request and no byte of the network.
//! How: the complete copies are tried in turn; each MiB is held against the digests of the one that
//! it comes from. Three at a time are made from one disk, and so many on the node. A copy that turns
//! out damaged or unreadable is passed over, and what came from it is thrown away; the source is
//! asked if none is left.
//! Never: takes a failure of its own disk, or a cancel, for the fault of the other copy.
//! Start at [`Worker::copy_from_others`].

use std::sync::Arc;

use super::backend::CopyInfo;
use super::node::store_id;
use super::slots::Slot;
use super::worker::{WorkError, Worker};
use crate::disk::{CopyId, CopyRecord, CopyState, DiskError, Sealed};
use crate::fetch::{self, Engine, Expect, FetchError, one_line};
use crate::image;
use crate::import::ImportError;

impl Worker {
    /// Copies from the first complete copy that is good; `None` if the source has to be asked.
    ///
    /// # Errors
    /// [`WorkError`]: of this copy's own disk, a cancel, or of the last complete copy if there is
    /// no source.
    pub(super) async fn copy_from_others(&self) -> Result<Option<CopyInfo>, WorkError> {
        let mut last = None;
        let nothing = Expect::default();
        // What is expected of an image's bytes was proved when its first copy came: of a clone, now.
        let expect = self.task.expected.digests.clone().into();
        // First from the disk from which the fewest copies are being made.
        let mut own: Vec<_> = self.others.iter().collect();
        own.sort_by_key(|slot| slot.outgoing.wanted());
        let own = own.into_iter().map(|other| (other, self.id(), &nothing));
        let origin = self.task.origin.as_ref();
        let cloned = self
            .origins
            .iter()
            .filter_map(|slot| Some((slot, store_id(&origin?.on(slot.disk.uuid())), &expect)));
        for (other, id, expect) in own.chain(cloned) {
            let Some((sealed, record)) = self.open(other, id).await else { continue };
            match self.copy_from(other, sealed, record, expect).await {
                Ok(info) => return Ok(Some(info)),
                Err(error) if is_of_the_other(&error) => {
                    let disk = other.disk.uuid();
                    let text = one_line(&error);
                    tracing::warn!(worker = %self.task.worker, %disk, error = %text, "a complete copy cannot be copied");
                    self.on_disk(|slot, id| slot.disk.remove(&id)).await?;
                    last = Some(error);
                }
                Err(error) => return Err(error),
            }
        }
        match (last, origin) {
            (Some(error), _) if self.task.source.is_none() && self.task.upload_bytes.is_none() => {
                Err(error)
            }
            (None, Some(origin)) => Err(WorkError::NoOrigin { image: origin.image.clone() }),
            (Some(_) | None, _) => Ok(None),
        }
    }

    /// The complete copy on `other`; `None` if it is none any more.
    async fn open(&self, other: &Arc<Slot>, id: CopyId) -> Option<(Sealed, CopyRecord)> {
        let other = Arc::clone(other);
        let opened = tokio::task::spawn_blocking(move || -> Result<_, DiskError> {
            match other.disk.copy_state(&id)? {
                Some(CopyState::Ready(record)) => Ok(Some((other.disk.sealed(&id)?, record))),
                Some(CopyState::Unchecked | CopyState::Filling { .. }) | None => Ok(None),
            }
        });
        match opened.await {
            Ok(Ok(opened)) => opened,
            Ok(Err(error)) => {
                tracing::warn!(worker = %self.task.worker, error = %one_line(&error), "a complete copy cannot be opened");
                None
            }
            Err(error) => std::panic::resume_unwind(error.into_panic()),
        }
    }

    async fn copy_from(
        &self,
        other: &Slot,
        sealed: Sealed,
        record: CopyRecord,
        expect: &Expect,
    ) -> Result<CopyInfo, WorkError> {
        let helm = self.shared.helms.take(&self.task.id, self.task.steering);
        // The other disk's first: who waits for that must not keep the node's from copies elsewhere.
        let _outgoing = self.turn(&other.outgoing, &helm).await.map_err(ImportError::from)?;
        // It costs the network nothing: it has turns and a rate of its own.
        let _turn = self.turn(&self.shared.copy_turns, &helm).await.map_err(ImportError::from)?;
        let mut filling = self.on_disk(|slot, id| slot.disk.filling(&id)).await?;
        let engine = Engine { limit: Arc::clone(&self.shared.copy_limit), ..self.engine() };
        let progress = Arc::clone(helm.progress());
        let known = &record.digests;
        let copying = fetch::duplicate(&engine, &sealed, known, expect, &mut filling, &progress);
        let copied = self.watch(copying, &progress).await.map_err(ImportError::from)?;
        self.judge_facts(&copied.digests)?;
        self.seal(filling, copied, sealed.path().to_owned()).await
    }
}

/// True if another complete copy, or the source, can be better.
fn is_of_the_other(error: &WorkError) -> bool {
    match error {
        WorkError::Import(ImportError::Fetch(error)) => matches!(
            error,
            FetchError::Duplicate { .. }
                | FetchError::Local { .. }
                | FetchError::Changed { .. }
                | FetchError::Empty { .. }
        ),
        WorkError::Image(error) => error.class() == image::Class::Refuse,
        WorkError::OtherImage { .. } => true,
        WorkError::Import(_)
        | WorkError::Disk(_)
        | WorkError::Unrepaired(_)
        | WorkError::NoOrigin { .. }
        | WorkError::NoSource => false,
    }
}
