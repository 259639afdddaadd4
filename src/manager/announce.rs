//! What watchers are told of a change, and what follows a record besides.
//!
//! Why: a watcher gets the thing as it is after the change, and need not ask for it.
//! How: each change is looked up in the world, numbered, and sent to whoever watches; the last ones are
//! kept, but for progress.
//! Never: waits for a watcher; one that is too slow is told that it lost some.
//! Start at [`Driver::announce`].

use std::sync::Arc;

use super::driver::{Object, Told};
use super::perform::Driver;
use super::world::Change;

/// Changes that are kept for who asks later what has happened.
const PAST: usize = 256;

impl Driver {
    /// The socket of an attachment that is a VM follows its record, and what is kept of an image's
    /// readers the image.
    fn follow(&self, change: &Change) {
        match change {
            Change::AttachmentCreated(id) | Change::AttachmentUpdated(id) => {
                if let Some(held) = self.world.attachment(id).filter(|held| held.record.vm) {
                    self.exporter.serve_vm(id, &held.record.image);
                }
            }
            Change::AttachmentDeleted(id, _) => self.exporter.leave_vm(id),
            Change::ImageDeleted(name) => self.exporter.forget(name),
            Change::ImageCreated(_)
            | Change::ImageUpdated(_)
            | Change::ImageProgress(_)
            | Change::VolumeCreated(_)
            | Change::VolumeUpdated(_)
            | Change::VolumeDeleted(..)
            | Change::Warning(..)
            | Change::NodeUpdated
            | Change::DiskUpdated(_)
            | Change::DiskRemoved(_)
            | Change::SettingsUpdated => {}
        }
    }

    pub(super) fn announce(&mut self, change: Change) {
        self.follow(&change);
        let object = match &change {
            Change::ImageCreated(name)
            | Change::ImageUpdated(name)
            | Change::ImageProgress(name) => {
                self.world.image(name).map(Box::new).map(Object::Image)
            }
            Change::ImageDeleted(name) => Some(Object::ImageGone(name.clone())),
            Change::AttachmentCreated(id) | Change::AttachmentUpdated(id) => {
                self.world.attachment(id).map(Object::Attachment)
            }
            Change::AttachmentDeleted(id, image) => {
                Some(Object::AttachmentGone(id.clone(), image.clone()))
            }
            Change::VolumeCreated(name) | Change::VolumeUpdated(name) => {
                self.world.volume(name).map(Box::new).map(Object::Volume)
            }
            Change::VolumeDeleted(name, image) => {
                Some(Object::VolumeGone(name.clone(), image.clone()))
            }
            Change::Warning(name, message) => {
                tracing::warn!(image = %name, "{message}");
                Some(Object::Warning(name.clone(), message.clone()))
            }
            Change::DiskUpdated(disk) => {
                self.world.disk_view_of(disk).map(Box::new).map(Object::Disk)
            }
            Change::DiskRemoved(disk) => Some(Object::DiskGone(disk.clone())),
            Change::NodeUpdated => Some(Object::Node(self.world.node_failed())),
            Change::SettingsUpdated => {
                Some(Object::Settings(Box::new(self.world.settings().clone())))
            }
        };
        let Some(object) = object else { return };
        self.last_id += 1;
        let is_progress = matches!(change, Change::ImageProgress(_));
        let at_unix_s = self.world.now_unix_s(self.now());
        let told = Arc::new(Told { id: self.last_id, at_unix_s, change, object });
        if !is_progress {
            if self.past.len() == PAST {
                self.past.pop_front();
            }
            self.past.push_back(Arc::clone(&told));
        }
        let _nobody_watches = self.changes.send(told);
    }
}
