//! The node's disks: those that are here, and those that should be.
//!
//! Why: disks come and go while the daemon runs. A mount point whose file system is missing looks
//! like an empty disk: who fills it fills the file system above it.
//! How: a disk that was known at a path is opened there only if it is that disk. One that is missing
//! keeps its place, unhealthy, and is opened again when it is back; a file system that was mounted
//! anew is another one to the kernel, so what was opened before is let go.
//! Never: makes a disk where a known one is missing, or waits for a disk while another is looked up.
//! Start at [`Slots::open`].

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::backend::DiskStatus;
use super::node::{NodeError, NodeOptions};
use super::turns::Turns;
use crate::disk::{Disk, DiskError};
use crate::fetch::one_line;
use crate::names::DiskUuid;
use crate::ring::{Choice, Probe, probe};

/// Copies that are made from one disk's at the same time: a disk that replicas read from must not be
/// held up by all its images being copied away at once (rule 17).
const MOST_OUTGOING: usize = 3;

/// A disk that is open.
#[derive(Debug)]
pub(super) struct Slot {
    pub(super) disk: Disk,
    pub(super) probe: Probe,
    /// Turns of those who copy from this disk to others.
    pub(super) outgoing: Arc<Turns>,
}

#[derive(Clone, Debug)]
enum Place {
    Here(Arc<Slot>),
    Missing { uuid: DiskUuid, path: PathBuf, why: String },
}

impl Place {
    fn uuid(&self) -> &DiskUuid {
        match self {
            Self::Here(slot) => slot.disk.uuid(),
            Self::Missing { uuid, .. } => uuid,
        }
    }

    fn path(&self) -> &Path {
        match self {
            Self::Here(slot) => slot.disk.root(),
            Self::Missing { path, .. } => path,
        }
    }

    fn status(&self) -> DiskStatus {
        let (usage, sink, message) = match self {
            Self::Here(slot) => {
                let sink = slot.probe.kind.to_string();
                match slot.disk.usage() {
                    Ok(usage) => (Some(usage), sink, slot.probe.reason.clone().unwrap_or_default()),
                    Err(error) => (None, sink, one_line(&error)),
                }
            }
            Self::Missing { why, .. } => (None, String::new(), why.clone()),
        };
        DiskStatus {
            uuid: self.uuid().clone(),
            path: self.path().to_owned(),
            total_bytes: usage.map_or(0, |usage| usage.total),
            free_bytes: usage.map_or(0, |usage| usage.free),
            reserved_bytes: usage.map_or(0, |usage| usage.reserved),
            sink,
            healthy: usage.is_some(),
            message,
            node_tags: std::collections::BTreeSet::new(),
        }
    }
}

/// The disks of a node, in the order in which they were named.
#[derive(Debug)]
pub(super) struct Slots {
    sink: Choice,
    places: Mutex<Vec<Place>>,
}

impl Slots {
    /// Opens and locks every disk; of those that were known before, the missing ones may be back
    /// later.
    ///
    /// # Errors
    /// [`NodeError`]; no disk stays locked then.
    pub(super) fn open(options: &NodeOptions) -> Result<Self, NodeError> {
        let slots = Self { sink: options.sink, places: Mutex::default() };
        for root in &options.disks {
            let known = options.known.iter().find(|(_, path)| path == root);
            match known {
                Some((uuid, path)) => slots.open_known(uuid, path)?,
                None => drop(slots.add(root, options.create)?),
            }
        }
        for (uuid, path) in &options.known {
            if slots.places().iter().all(|place| place.uuid() != uuid) {
                slots.open_known(uuid, path)?;
            }
        }
        Ok(slots)
    }

    fn places(&self) -> MutexGuard<'_, Vec<Place>> {
        self.places.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn open_known(&self, uuid: &DiskUuid, path: &Path) -> Result<(), NodeError> {
        let place = match self.open_as(uuid, path) {
            Ok(slot) => Place::Here(slot),
            Err(error @ (NodeError::Disk(DiskError::Locked { .. }) | NodeError::Sink(_))) => {
                return Err(error);
            }
            Err(error) => {
                let why = one_line(&error);
                tracing::error!(disk = %path.display(), %uuid, error = %why, "a disk is missing");
                Place::Missing { uuid: uuid.clone(), path: path.to_owned(), why }
            }
        };
        self.places().push(place);
        Ok(())
    }

    fn open_slot(&self, root: &Path, create: bool) -> Result<Slot, NodeError> {
        let disk = Disk::open(root, create)?;
        let probe = probe(disk.root(), self.sink).map_err(NodeError::Sink)?;
        let reason = probe.reason.as_deref().unwrap_or("");
        tracing::info!(disk = %root.display(), uuid = %disk.uuid(), sink = %probe.kind, reason, "disk opened");
        Ok(Slot { disk, probe, outgoing: Arc::new(Turns::new(MOST_OUTGOING)) })
    }

    /// Opens the disk at `path`, which has to be `uuid`.
    fn open_as(&self, uuid: &DiskUuid, path: &Path) -> Result<Arc<Slot>, NodeError> {
        let slot = match self.open_slot(path, false) {
            // An empty mount point: nobody wants a disk made of it.
            Err(NodeError::Disk(DiskError::NotADisk { path })) => {
                return Err(DiskError::Gone { path }.into());
            }
            opened => opened?,
        };
        if slot.disk.uuid() == uuid {
            return Ok(Arc::new(slot));
        }
        let (path, found) = (path.to_owned(), slot.disk.uuid().clone());
        Err(NodeError::OtherDisk { path, found, known: uuid.clone() })
    }

    /// One disk more, or one that was missing. Gives the open disk.
    ///
    /// # Errors
    /// [`NodeError`]; nothing was changed, but with `create` a directory may have become a disk.
    pub(super) fn add(&self, root: &Path, create: bool) -> Result<Arc<Slot>, NodeError> {
        let here = |place: &Place| match place {
            Place::Here(slot) if slot.disk.root() == root => Some(Arc::clone(slot)),
            Place::Here(_) | Place::Missing { .. } => None,
        };
        if let Some(slot) = self.places().iter().find_map(here) {
            return Ok(slot);
        }
        let slot = Arc::new(self.open_slot(root, create)?);
        let mut places = self.places();
        match places.iter_mut().find(|place| place.uuid() == slot.disk.uuid()) {
            Some(Place::Here(first)) => {
                return Err(NodeError::SameUuid {
                    uuid: slot.disk.uuid().clone(),
                    first: first.disk.root().to_owned(),
                    second: slot.disk.root().to_owned(),
                });
            }
            Some(missing @ Place::Missing { .. }) => *missing = Place::Here(Arc::clone(&slot)),
            None => places.push(Place::Here(Arc::clone(&slot))),
        }
        Ok(slot)
    }

    /// Opens a disk again that is not at its path any more, or was not. What was opened before is let
    /// go when its last worker has ended.
    pub(super) fn reopen(&self, uuid: &DiskUuid) {
        let Some(place) = self.places().iter().find(|place| place.uuid() == uuid).cloned() else {
            return;
        };
        if let Place::Here(slot) = &place
            && slot.disk.usage().is_ok()
        {
            return;
        }
        let opened = self.open_as(uuid, place.path());
        let mut places = self.places();
        let Some(place) = places.iter_mut().find(|place| place.uuid() == uuid) else { return };
        match opened {
            Ok(slot) => *place = Place::Here(slot),
            Err(error) => {
                if let Place::Missing { why, .. } = place {
                    *why = one_line(&error);
                }
            }
        }
    }

    /// The disk is none of the node's any more; it is unlocked when its last worker has ended.
    pub(super) fn forget(&self, uuid: &DiskUuid) {
        self.places().retain(|place| place.uuid() != uuid);
    }

    /// The disk, if it is here.
    pub(super) fn find(&self, uuid: &DiskUuid) -> Option<Arc<Slot>> {
        let places = self.places();
        let found = places.iter().find(|place| place.uuid() == uuid)?;
        match found {
            Place::Here(slot) => Some(Arc::clone(slot)),
            Place::Missing { .. } => None,
        }
    }

    /// All disks that are here.
    pub(super) fn all(&self) -> Vec<Arc<Slot>> {
        let here = |place: &Place| match place {
            Place::Here(slot) => Some(Arc::clone(slot)),
            Place::Missing { .. } => None,
        };
        self.places().iter().filter_map(here).collect()
    }

    /// What can be said of all of them now.
    pub(super) fn statuses(&self) -> Vec<DiskStatus> {
        // A disk that does not answer holds up who looks, and nobody else.
        let places = self.places().clone();
        places.iter().map(Place::status).collect()
    }
}
