//! The running transfers of a node, and how each is steered.
//!
//! Why: a rate or a priority that changes must reach a transfer that runs or waits for its turn.
//! How: a worker takes the helm of its copy for as long as it runs; steering finds it by the copy.
//! Never: keeps anything of a worker that has ended.
//! Start at [`Helms::take`].

use std::collections::HashMap;
use std::sync::atomic::{AtomicI32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::backend::CopyId;
use super::records::Steering;
use crate::fetch::Progress;

/// What of a running transfer can be steered.
#[derive(Clone, Debug, Default)]
struct Helm {
    priority: Arc<AtomicI32>,
    progress: Arc<Progress>,
}

impl Helm {
    fn steer(&self, steering: Steering) {
        self.priority.store(steering.priority, Ordering::Relaxed);
        self.progress.limit().set(steering.rate_bytes_per_s);
    }
}

/// The helms of all running transfers.
#[derive(Debug, Default)]
pub(super) struct Helms(Mutex<HashMap<CopyId, Helm>>);

/// One worker's helm, until it is dropped.
#[derive(Debug)]
pub(super) struct Held {
    helms: Arc<Helms>,
    copy: CopyId,
    helm: Helm,
}

impl Helms {
    fn lock(&self) -> MutexGuard<'_, HashMap<CopyId, Helm>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes the helm of `copy`, which begins as `steering` says.
    pub(super) fn take(self: &Arc<Self>, copy: &CopyId, steering: Steering) -> Held {
        let helm = Helm::default();
        helm.steer(steering);
        self.lock().insert(copy.clone(), helm.clone());
        Held { helms: Arc::clone(self), copy: copy.clone(), helm }
    }

    /// Steers the transfer of `copy`, if one runs.
    pub(super) fn steer(&self, copy: &CopyId, steering: Steering) {
        if let Some(helm) = self.lock().get(copy) {
            helm.steer(steering);
        }
    }
}

impl Held {
    /// The priority, as it is steered.
    pub(super) fn priority(&self) -> &Arc<AtomicI32> {
        &self.helm.priority
    }

    /// The transfer's numbers, with its limit as it is steered.
    pub(super) fn progress(&self) -> &Arc<Progress> {
        &self.helm.progress
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        let mut helms = self.helms.lock();
        // A newer worker of the same copy may have taken over.
        let ours = helms
            .get(&self.copy)
            .is_some_and(|helm| Arc::ptr_eq(&helm.progress, &self.helm.progress));
        if ours {
            helms.remove(&self.copy);
        }
    }
}
