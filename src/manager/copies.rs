//! One image and its copies, as the world holds them.
//!
//! Why: what is durable is in the record; beside it stand facts that only this run of the daemon
//! knows: workers, progress, failures.
//! How: plain data; a copy exists as long as its disk is wanted or its files are being removed.
//! Never: decides.
//! Start at [`Image`].

use std::collections::BTreeMap;
use std::time::Duration;

use super::backend::{CopyId, CopyInfo, Progress};
use super::records::ImageRecord;
use super::recovery::Failing;
use super::replenish::Short;
use super::world::{Action, CopyState, Touched};
use crate::names::{DiskUuid, ImageName};

/// A copy's worker, as far as the world knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Worker {
    Idle,
    Running(u64),
    Stopping(u64),
}

/// Who has the image's export open.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Export {
    Closed,
    Opening(DiskUuid),
    /// On a copy that is still arriving.
    Streaming(DiskUuid),
    Open(DiskUuid),
}

/// One image on one disk.
#[derive(Clone, Debug)]
pub(super) struct Copy {
    pub(super) worker_name: String,
    pub(super) state: CopyState,
    pub(super) worker: Worker,
    pub(super) removing: bool,
    /// A user wants it no more: it stops, and its files go.
    pub(super) cancelled: bool,
    /// Its disk is being emptied.
    pub(super) evicting: bool,
    /// Its worker is a scrub.
    pub(super) scrubbing: bool,
    /// How far that is.
    pub(super) scrubbed_bytes: u64,
    /// Somebody asked for a scrub.
    pub(super) scrub_wanted: bool,
    pub(super) progress: Progress,
    pub(super) info: Option<CopyInfo>,
    pub(super) failures: u32,
    /// Bytes that were there at the last failure: more at the next one means that trying helps.
    pub(super) bytes_at_failure: u64,
    pub(super) retry_at: Option<Duration>,
    pub(super) refused: bool,
    /// Why it can't be read before it is complete, if that was tried.
    pub(super) no_stream: Option<String>,
    pub(super) message: String,
}

impl Copy {
    pub(super) fn new(worker_name: String) -> Self {
        Self {
            worker_name,
            state: CopyState::Pending,
            worker: Worker::Idle,
            removing: false,
            cancelled: false,
            evicting: false,
            scrubbing: false,
            scrubbed_bytes: 0,
            scrub_wanted: false,
            progress: Progress::default(),
            info: None,
            failures: 0,
            bytes_at_failure: 0,
            retry_at: None,
            refused: false,
            no_stream: None,
            message: String::new(),
        }
    }
}

#[derive(Clone, Debug)]
pub(super) struct Image {
    pub(super) record: ImageRecord,
    pub(super) copies: BTreeMap<DiskUuid, Copy>,
    pub(super) export: Export,
    /// It is being opened on bytes that were repaired, turned out bad or went meanwhile.
    pub(super) stale: bool,
    pub(super) failing: Failing,
    pub(super) short: Short,
}

impl Image {
    pub(super) fn new(record: ImageRecord) -> Self {
        let mut image = Self {
            record,
            copies: BTreeMap::new(),
            export: Export::Closed,
            stale: false,
            failing: Failing::default(),
            short: Short::default(),
        };
        let wanted: Vec<_> =
            image.record.disks.iter().map(|(d, want)| (d.clone(), want.clone())).collect();
        for (disk, want) in wanted {
            let copy = image.copy_on(&disk);
            if let Some(why) = want.refused {
                (copy.state, copy.refused, copy.message) = (CopyState::Failed, true, why);
            }
        }
        image
    }

    /// The copy on `disk`, wanted from now on.
    pub(super) fn copy_on(&mut self, disk: &DiskUuid) -> &mut Copy {
        self.record.disks.entry(disk.clone()).or_default();
        self.copy_entry(disk)
    }

    /// The copy on `disk`, wanted or not.
    pub(super) fn copy_entry(&mut self, disk: &DiskUuid) -> &mut Copy {
        let name = worker_name(&self.record.name, disk, self.copies.keys());
        self.copies.entry(disk.clone()).or_insert_with(|| Copy::new(name))
    }

    /// What is open on `disk`, or being opened, is not to be read any more.
    pub(super) fn close_on(&mut self, disk: &DiskUuid, touched: &mut Touched) {
        match &self.export {
            Export::Open(on) | Export::Streaming(on) if on == disk => self.close(touched),
            Export::Opening(on) if on == disk => self.stale = true,
            Export::Open(_) | Export::Streaming(_) | Export::Opening(_) | Export::Closed => {}
        }
    }

    /// Closes the export; its copies can be opened again.
    pub(super) fn close(&mut self, touched: &mut Touched) {
        self.export = Export::Closed;
        touched.actions.push(Action::Withdraw(self.record.name.clone()));
        touched.images.insert(self.record.name.clone());
        for copy in self.copies.values_mut().filter(|copy| copy.state == CopyState::Ready) {
            copy.state = CopyState::ReadyForTransfer;
        }
    }

    pub(super) fn copy_id(&self, disk: &DiskUuid) -> CopyId {
        CopyId {
            image: self.record.name.clone(),
            uuid: self.record.uuid.clone(),
            disk: disk.clone(),
        }
    }
}

/// `<image name>-<first 8 of disk UUID>`, or 16 when another disk begins with the same 8.
fn worker_name<'a>(
    image: &ImageName,
    disk: &DiskUuid,
    mut others: impl Iterator<Item = &'a DiskUuid>,
) -> String {
    let clash = others.any(|other| other != disk && other.first8() == disk.first8());
    let part: String = disk.as_str().chars().take(if clash { 16 } else { 8 }).collect();
    format!("{image}-{part}")
}
