//! Records are made durable before anything is done.
//!
//! Why: what is done must be known after a crash; what is known and not done is done again.
//! How: the records that a list of actions names are put into the catalog in their order, each only over
//! the revision that was read or written last.
//! Never: acts.
//! Start at [`Driver::save_first`].

use super::perform::{Driver, SETTINGS, blocking};
use super::world::Action;
use crate::catalog::{CatalogError, Expect, Kind, put_as};

impl Driver {
    /// Stores every record that the actions name, before any of them is performed.
    pub(super) async fn save_first(&mut self, actions: &[Action]) -> Result<(), CatalogError> {
        for action in actions {
            match action {
                Action::SaveImage(record) => {
                    self.save(Kind::Image, record.name.as_str(), record.clone()).await?;
                }
                Action::SaveAttachment(record) => {
                    self.save(Kind::Attachment, record.id.as_str(), record.clone()).await?;
                }
                Action::ForgetImage(name) => self.forget(Kind::Image, name.as_str()).await?,
                Action::ForgetAttachment(id) => self.forget(Kind::Attachment, id.as_str()).await?,
                Action::SaveVolume(record) => {
                    self.save(Kind::Volume, record.name.as_str(), record.clone()).await?;
                }
                Action::SaveClass(record) => {
                    self.save(Kind::Class, record.name.as_str(), record.clone()).await?;
                }
                Action::SaveSettings(record) => {
                    self.save(Kind::Setting, SETTINGS, record.clone()).await?;
                }
                Action::SaveDisk(record) => {
                    self.save(Kind::Disk, record.uuid.as_str(), record.clone()).await?;
                }
                Action::ForgetDisk(disk) => self.forget(Kind::Disk, disk.as_str()).await?,
                Action::ForgetVolume(name) => self.forget(Kind::Volume, name.as_str()).await?,
                Action::ForgetClass(name) => self.forget(Kind::Class, name.as_str()).await?,
                Action::ApplySettings(_)
                | Action::Start(..)
                | Action::Scrub(..)
                | Action::ForgetView(_)
                | Action::Cancel(_)
                | Action::Kill(_)
                | Action::DismissReaders
                | Action::Steer(..)
                | Action::Remove(_)
                | Action::Publish(_)
                | Action::Stream(..)
                | Action::Withdraw(_)
                | Action::Announce(_) => {}
            }
        }
        Ok(())
    }

    async fn save<T: serde::Serialize + Send + 'static>(
        &mut self,
        kind: Kind,
        key: &str,
        record: T,
    ) -> Result<(), CatalogError> {
        let at = (kind, key.to_owned());
        let expect = self.revisions.get(&at).map_or(Expect::Absent, |r| Expect::At(*r));
        let (catalog, key) = (self.catalog.clone(), key.to_owned());
        let put = move || put_as(&*catalog, kind, &key, &record, expect);
        self.revisions.insert(at, blocking(put).await?);
        Ok(())
    }

    async fn forget(&mut self, kind: Kind, key: &str) -> Result<(), CatalogError> {
        let (catalog, owned) = (self.catalog.clone(), key.to_owned());
        blocking(move || catalog.delete(kind, &owned, Expect::Any)).await?;
        self.revisions.remove(&(kind, key.to_owned()));
        Ok(())
    }
}
