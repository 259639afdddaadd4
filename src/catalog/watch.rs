//! A watch: every change of a catalog from a revision on, each once, in order.
//!
//! Why: whoever follows the records must neither poll nor miss anything, and must be able to go on where
//! an earlier process stopped.
//! How: changes are read from the catalog in batches; when there are none, the watch waits until the
//! catalog's last revision moves. So a slow watcher costs no memory and holds up nobody.
//! Never: skips: a watcher that is too far behind is told so and has to list again.
//! Start at [`Watch::from`].

use std::collections::VecDeque;
use std::sync::Arc;

use super::{Catalog, CatalogError, Change, Revision};

/// Changes that are read at a time.
const BATCH: usize = 256;

/// Follows a catalog.
pub struct Watch {
    catalog: Arc<dyn Catalog>,
    head: tokio::sync::watch::Receiver<Revision>,
    since: Revision,
    batch: VecDeque<Change>,
}

impl std::fmt::Debug for Watch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Watch {{ since: {} }}", self.since.0)
    }
}

impl Watch {
    /// Follows `catalog` from the first change after `since`, such as a listing's revision.
    #[must_use]
    pub fn from(catalog: Arc<dyn Catalog>, since: Revision) -> Self {
        let head = catalog.head();
        Self { catalog, head, since, batch: VecDeque::new() }
    }

    /// The last change that was given out: a later watch goes on from there.
    #[must_use]
    pub fn since(&self) -> Revision {
        self.since
    }

    /// The next change, once there is one. Cancel-safe. Reads the catalog, which may block.
    ///
    /// # Errors
    /// As [`Catalog::changes`]; the watch is of no use then.
    pub async fn next(&mut self) -> Result<Change, CatalogError> {
        loop {
            if let Some(change) = self.batch.pop_front() {
                self.since = change.revision;
                return Ok(change);
            }
            // Looked at before the changes are, so that one in between wakes.
            self.head.mark_unchanged();
            let (catalog, since) = (Arc::clone(&self.catalog), self.since);
            let read = tokio::task::spawn_blocking(move || catalog.changes(since, BATCH));
            self.batch = match read.await {
                Ok(changes) => changes?.into(),
                Err(error) => std::panic::resume_unwind(error.into_panic()),
            };
            if self.batch.is_empty() && self.head.changed().await.is_err() {
                // The catalog is ours as well: its sender lives.
                std::future::pending::<()>().await;
            }
        }
    }
}
