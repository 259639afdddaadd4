//! The views that are open, for images that stand on them.
//!
//! Why: many overlays stand on one base; its map and its decoded clusters serve all of them.
//! How: views by copy, held weakly: who reads a view keeps it open.
//! Never: keeps a view open, or gives one of a copy whose files were removed.
//! Start at [`Views::find`].

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use super::backend::{CopyId, Link};
use crate::image::View;

/// The open views of a node.
#[derive(Debug, Default)]
pub(super) struct Views(Mutex<HashMap<Link, Weak<View>>>);

impl Views {
    fn lock(&self) -> MutexGuard<'_, HashMap<Link, Weak<View>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The view of `link`, if anybody has it open.
    pub(super) fn find(&self, link: &Link) -> Option<Arc<View>> {
        self.lock().get(link).and_then(Weak::upgrade)
    }

    /// Lets others find `view`.
    pub(super) fn keep(&self, link: &Link, view: &Arc<View>) {
        let mut views = self.lock();
        // Rarely, so that many that are opened in a row don't each look at all before them.
        if views.len() == views.capacity() {
            views.retain(|_, view| view.strong_count() > 0);
        }
        views.insert(link.clone(), Arc::downgrade(view));
    }

    /// The files of `copy` go.
    pub(super) fn forget(&self, copy: &CopyId) {
        self.lock().retain(|link, _| link.copy != *copy && link.data_file.as_ref() != Some(copy));
    }
}
