//! The uploads that wait for their bytes.
//!
//! Why: who brings bytes names an image; the worker that takes them must be found.
//! How: a worker registers its upload for as long as it runs; handlers find it by the copy.
//! Never: keeps an upload of a worker that has ended.
//! Start at [`Uploads::place`].

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::backend::CopyId;
use crate::fetch::Upload;

/// The uploads of a node.
#[derive(Debug, Default)]
pub(super) struct Uploads(Mutex<HashMap<CopyId, Arc<Upload>>>);

/// The place of one worker's upload, until it is dropped.
#[derive(Debug)]
pub(super) struct Place {
    uploads: Arc<Uploads>,
    copy: CopyId,
    upload: Mutex<Option<Arc<Upload>>>,
}

impl Uploads {
    fn lock(&self) -> MutexGuard<'_, HashMap<CopyId, Arc<Upload>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The upload of `copy`, if a worker waits for it.
    pub(super) fn find(&self, copy: &CopyId) -> Option<Arc<Upload>> {
        self.lock().get(copy).cloned()
    }

    /// A place for the upload of `copy`.
    pub(super) fn place(self: &Arc<Self>, copy: &CopyId) -> Place {
        Place { uploads: Arc::clone(self), copy: copy.clone(), upload: Mutex::default() }
    }
}

impl Place {
    /// Lets handlers find `upload`.
    pub(super) fn register(&self, upload: &Arc<Upload>) {
        self.uploads.lock().insert(self.copy.clone(), Arc::clone(upload));
        *self.upload.lock().unwrap_or_else(PoisonError::into_inner) = Some(Arc::clone(upload));
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let ours = self.upload.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some(ours) = ours else { return };
        let mut uploads = self.uploads.lock();
        // A newer worker of the same copy may have registered its own.
        if uploads.get(&self.copy).is_some_and(|upload| Arc::ptr_eq(upload, &ours)) {
            uploads.remove(&self.copy);
        }
    }
}
