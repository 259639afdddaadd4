//! Ready copies as NBD exports.
//!
//! Why: the manager says which copy readers get; here its view is opened and given a name.
//! How: one registry that the NBD server reads; the default export follows what is there.
//! Never: opens a copy that the manager hasn't named.
//! Start at [`NodeExports`].

use std::sync::Arc;

use super::Config;
use super::vms::Vms;
use crate::image::{Trace, View};
use crate::manager::{AttachmentId, Backend, BackendError, Exporter, FailureClass, Link};
use crate::names::ImageName;
use crate::serve::{self, Recordings, ServeError};

/// The node's exports.
pub(super) struct NodeExports {
    backend: Arc<dyn Backend>,
    registry: Arc<serve::Exports>,
    default: Option<ImageName>,
    vms: Vms,
    recordings: Arc<Recordings>,
}

impl NodeExports {
    pub(super) fn new(
        backend: Arc<dyn Backend>,
        registry: &Arc<serve::Exports>,
        config: &Config,
        vms: Vms,
        recordings: Arc<Recordings>,
    ) -> Self {
        let (registry, default) = (Arc::clone(registry), config.default_export.clone());
        Self { backend, registry, default, vms, recordings }
    }

    /// Ends the sessions of all VMs, and waits until they have ended. Blocks.
    pub(super) fn leave_vms(&self) {
        self.vms.end();
    }

    /// The configured image if it is there, else the only one, else none.
    fn choose_default(&self) {
        let configured = self.default.as_ref().map(ImageName::as_str);
        let configured = configured.filter(|name| self.registry.get(name).is_some());
        let only = self.registry.only();
        let chosen = configured.or(only.as_ref().map(|export| export.name()));
        if let Err(error) = self.registry.set_default(chosen) {
            tracing::warn!(%error, "the default export has gone meanwhile");
        }
    }
}

impl NodeExports {
    fn add(&self, chain: &[Link], view: Arc<View>) -> Result<(), BackendError> {
        let Some(Link { copy, .. }) = chain.first() else { return Ok(()) };
        let description = format!("{} {}, copy on disk {}", copy.image, copy.uuid, copy.disk);
        // What it stands on belongs to what its bytes are.
        let identity: Vec<String> = chain.iter().map(identity_of).collect();
        let identity = identity.join(" on ");
        match self.registry.add_as(copy.image.as_str(), view, &description, &identity) {
            Ok(export) => {
                self.recordings.resume(&export);
                self.choose_default();
                Ok(())
            }
            Err(error) => {
                let message = error.to_string();
                Err(BackendError { class: FailureClass::Retry, message })
            }
        }
    }
}

impl Exporter for NodeExports {
    fn publish(&self, chain: &[Link]) -> Result<(), BackendError> {
        self.add(chain, self.backend.open_view(chain)?)
    }

    fn stream(&self, chain: &[Link], prefetch: Option<Arc<Trace>>) -> Result<(), BackendError> {
        let view = self.backend.open_arriving(chain)?;
        if let Some(Err(error)) = prefetch.map(|trace| view.prefetch(trace)) {
            tracing::warn!(%error, "a trace is not followed: no thread can be started");
        }
        self.add(chain, view)
    }

    fn is_lost(&self, image: &ImageName) -> bool {
        self.registry.get(image.as_str()).is_some_and(|export| export.view().has_failed())
    }

    fn withdraw(&self, image: &ImageName) {
        if let Some(export) = self.registry.get(image.as_str()) {
            self.recordings.keep(&export);
        }
        match self.registry.close(image.as_str()) {
            Ok(_) | Err(ServeError::Unknown { .. }) => {}
            Err(error) => tracing::warn!(%error, "an export can't be closed"),
        }
        self.choose_default();
    }

    fn forget(&self, image: &ImageName) {
        self.recordings.forget(image.as_str());
    }

    fn sessions(&self, image: &ImageName) -> usize {
        self.registry.in_use(image.as_str())
    }

    fn serve_vm(&self, id: &AttachmentId, image: &ImageName) {
        self.vms.serve(id, image, &self.registry);
    }

    fn leave_vm(&self, id: &AttachmentId) {
        self.vms.leave(id);
    }
}

/// Whichever copy it is, the bytes are the image's: its UUID is given once, and a copy with another
/// digest is refused.
fn identity_of(link: &Link) -> String {
    // A data file is the image's for good, as its base is.
    let Link { copy, snapshot, data_file: _ } = link;
    match snapshot {
        Some(snapshot) => format!("{} {} at {snapshot}", copy.image, copy.uuid),
        None => format!("{} {}", copy.image, copy.uuid),
    }
}
