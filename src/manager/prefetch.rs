//! What an image's readers will ask for first, kept with the image.
//!
//! Why: a boot that was traced on one node saves the next one its waiting.
//! How: the trace is in the image's record; it is handed on when a copy is opened for readers while it
//! arrives. A trace that names a digest is held against what is known of the image.
//! Never: keeps a trace of another image, or looks at its ranges.
//! Start at [`World::command`].

use std::sync::Arc;

use super::command::Outcome;
use super::error::ManagerError;
use super::records::ImageRecord;
use super::world::{Action, Touched, World};
use crate::fetch::DigestMap;
use crate::image::Trace;
use crate::names::ImageName;

impl ImageRecord {
    /// The digests of its source that are known: those that were given, and those that were made.
    #[must_use]
    pub fn known_digests(&self) -> DigestMap {
        let mut known = self.expected.digests.clone();
        if let Some(facts) = &self.facts {
            known.fill_from(&facts.digests);
        }
        known
    }
}

impl World {
    pub(super) fn set_prefetch(
        &mut self,
        name: ImageName,
        trace: Option<Arc<Trace>>,
        touched: &mut Touched,
    ) -> Result<Outcome, ManagerError> {
        let known = self.usable(&name)?.record.known_digests();
        let Some(image) = self.images.get_mut(&name) else {
            return Err(ManagerError::NoSuchImage { name });
        };
        if let Some((kind, found, given)) =
            trace.as_ref().and_then(|trace| known.differs(trace.digests()))
        {
            let (kind, found, given) = (kind.key(), found.to_owned(), given.to_owned());
            return Err(ManagerError::OtherTrace { name, kind, found, given });
        }
        if image.record.prefetch != trace {
            image.record.prefetch = trace;
            touched.actions.push(Action::SaveImage(Box::new(image.record.clone())));
            touched.images.insert(name.clone());
        }
        Ok(Outcome::Image(name, false))
    }
}
