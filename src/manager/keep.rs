//! Records are made durable before anything is done.
//!
//! Why: what is done must be known after a crash; what is known and not done is done again.
//! How: the records that a list of actions names are put into the catalog together, all or none, each only
//! over the revision that was read or written last.
//! Never: acts.
//! Start at [`Driver::save_first`].

use std::collections::BTreeMap;

use super::perform::{Driver, SETTINGS, blocking};
use super::world::Action;
use crate::catalog::{CatalogError, Expect, Kind, Write, encode};

impl Driver {
    /// Stores every record that the actions name, before any of them is performed: all or none.
    pub(super) async fn save_first(&mut self, actions: &[Action]) -> Result<(), CatalogError> {
        let mut writes = BTreeMap::new();
        for action in actions {
            let write = match action {
                Action::SaveImage(record) => save(Kind::Image, record.name.as_str(), record)?,
                Action::SaveAttachment(record) => {
                    save(Kind::Attachment, record.id.as_str(), record)?
                }
                Action::SaveVolume(record) => save(Kind::Volume, record.name.as_str(), record)?,
                Action::SaveClass(record) => save(Kind::Class, record.name.as_str(), record)?,
                Action::SaveSettings(record) => save(Kind::Setting, SETTINGS, record)?,
                Action::SaveDisk(record) => save(Kind::Disk, record.uuid.as_str(), record)?,
                Action::ForgetImage(name) => forget(Kind::Image, name.as_str()),
                Action::ForgetAttachment(id) => forget(Kind::Attachment, id.as_str()),
                Action::ForgetVolume(name) => forget(Kind::Volume, name.as_str()),
                Action::ForgetClass(name) => forget(Kind::Class, name.as_str()),
                Action::ForgetDisk(disk) => forget(Kind::Disk, disk.as_str()),
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
                | Action::Announce(_) => continue,
            };
            // Of a record that is changed twice the last state counts.
            writes.insert((write.kind, write.key.clone()), write);
        }
        if writes.is_empty() {
            return Ok(());
        }
        for (at, write) in writes.iter_mut().filter(|(_, write)| write.json.is_some()) {
            let known = self.revisions.get(at);
            write.expect = known.map_or(Expect::Absent, |revision| Expect::At(*revision));
        }
        let writes: Vec<Write> = writes.into_values().collect();
        let catalog = self.catalog.clone();
        let (writes, made) = blocking(move || {
            let made = catalog.write(&writes);
            (writes, made)
        })
        .await;
        for (write, revision) in writes.into_iter().zip(made?) {
            let at = (write.kind, write.key);
            match write.json {
                Some(_) => self.revisions.insert(at, revision),
                None => self.revisions.remove(&at),
            };
        }
        Ok(())
    }
}

fn save<T: serde::Serialize>(kind: Kind, key: &str, record: &T) -> Result<Write, CatalogError> {
    let json = Some(encode(kind, key, record)?);
    Ok(Write { kind, key: key.to_owned(), json, expect: Expect::Any })
}

fn forget(kind: Kind, key: &str) -> Write {
    Write { kind, key: key.to_owned(), json: None, expect: Expect::Any }
}
