//! A node or a disk that is gone, in earnest or as a drill (rules 15 and 16).
//!
//! Why: what happens when a node fails should be seen before one does; and a disk that is gone must
//! not look as if its copies could be read.
//! How: while the node counts as failed, no disk is fit: workers are killed where they stand,
//! unfinished copies are `failed`, finished ones `unknown`, exports are closed, and nothing is
//! started. When it is back, each copy gets a new worker, which resumes from what is durable or
//! checks what is finished; then finished ones are scrubbed whole. A drill ends with the daemon.
//! Never: touches a file: what a drill leaves is what a kill leaves.
//! Start at [`World::fail_node`].

use super::command::Outcome;
use super::world::{Action, Change, CopyState, Touched, Worker, World};
use crate::names::{DiskUuid, ImageName};

const DRILL: &str = "the node has failed (a drill; `bedplate node return` ends it)";

impl World {
    /// True while the node counts as gone.
    #[must_use]
    pub fn node_failed(&self) -> bool {
        self.node_failed
    }

    /// The node counts as gone from now on. A second time changes nothing.
    pub(super) fn fail_node(&mut self, touched: &mut Touched) -> Outcome {
        if std::mem::replace(&mut self.node_failed, true) {
            return Outcome::Done;
        }
        touched.actions.push(Action::Announce(Change::NodeUpdated));
        touched.actions.push(Action::DismissReaders);
        for (name, image) in &mut self.images {
            touched.images.insert(name.clone());
            let disks: Vec<DiskUuid> = image.copies.keys().cloned().collect();
            for disk in disks {
                let id = image.copy_id(&disk);
                let Some(copy) = image.copies.get_mut(&disk) else { continue };
                if let Worker::Running(number) | Worker::Stopping(number) = copy.worker {
                    copy.worker = Worker::Stopping(number);
                    touched.actions.push(Action::Kill(id));
                }
                if copy.refused || copy.cancelled || copy.state.is_sealed() {
                    continue;
                }
                (copy.state, copy.retry_at) = (CopyState::Failed, None);
                copy.message = DRILL.to_owned();
                (copy.progress.rate_bytes_per_s, copy.progress.connections) = (0, 0);
            }
        }
        Outcome::Done
    }

    /// The node is back: stale workers end, and every copy gets a new one.
    pub(super) fn return_node(&mut self, touched: &mut Touched) -> Outcome {
        if !std::mem::replace(&mut self.node_failed, false) {
            return Outcome::Done;
        }
        touched.actions.push(Action::Announce(Change::NodeUpdated));
        for (name, image) in &mut self.images {
            touched.images.insert(name.clone());
            for copy in image.copies.values_mut().filter(|copy| !copy.refused && !copy.cancelled) {
                (copy.retry_at, copy.failures) = (None, 0);
                // Its record is believed for now, so that readers need not wait for all of it.
                copy.scrub_wanted |= copy.state == CopyState::Unknown && copy.info.is_some();
                copy.message = "the node is back".to_owned();
            }
        }
        Outcome::Done
    }

    /// Finished copies on disks that are gone are `unknown`, whoever reads them.
    pub(super) fn lose_step(&mut self, touched: &mut Touched) {
        let names: Vec<ImageName> = self.images.keys().cloned().collect();
        for name in names {
            let Some(image) = self.images.get(&name).filter(|image| !image.record.deleting) else {
                continue;
            };
            let gone: Vec<DiskUuid> =
                image.copies.keys().filter(|disk| !self.is_fit(disk)).cloned().collect();
            let Some(image) = self.images.get_mut(&name) else { continue };
            for disk in gone {
                let id = image.copy_id(&disk);
                image.close_on(&disk, touched);
                let Some(copy) = image.copies.get_mut(&disk) else { continue };
                if !copy.state.is_sealed() || copy.cancelled {
                    continue;
                }
                copy.state = CopyState::Unknown;
                copy.message = match self.node_failed {
                    true => DRILL.to_owned(),
                    false => {
                        format!("disk {disk} is not there or not healthy; see `bedplate disks`")
                    }
                };
                if let Worker::Running(number) = copy.worker {
                    copy.worker = Worker::Stopping(number);
                    touched.actions.push(Action::Cancel(id));
                }
                touched.images.insert(name.clone());
            }
        }
    }
}
