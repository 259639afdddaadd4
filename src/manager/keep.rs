//! Records are made durable before anything is done.
//!
//! Why: what is done must be known after a crash; what is known and not done is done again.
//! How: the records that a list of actions names are put into the catalog together, all or none, each only
//! over the revision that was read or written last; of an image's record only the parts that differ.
//! Never: acts.
//! Start at [`Driver::save_first`].

use std::collections::{BTreeMap, BTreeSet, HashMap};

use xxhash_rust::xxh3::xxh3_128;

use super::parts::{Parts, finalizers};
use super::perform::{Driver, SETTINGS, blocking};
use super::world::Action;
use crate::catalog::{CatalogError, Expect, Kind, Revision, Stored, What, Write, encode};

/// A record as the catalog has it; of its texts only what tells whether they differ.
#[derive(Clone, Copy, Debug)]
pub(super) struct Known {
    revision: Revision,
    spec: u128,
    status: Option<u128>,
    held: bool,
    deleting: bool,
}

/// What the catalog has, by kind and key.
pub(super) type Revisions = HashMap<(Kind, String), Known>;

impl Known {
    pub(super) fn of(stored: &Stored) -> Self {
        Self {
            revision: stored.revision,
            spec: xxh3_128(&stored.json),
            status: stored.status.as_deref().map(xxh3_128),
            held: !stored.finalizers.is_empty(),
            deleting: stored.deleting,
        }
    }
}

/// What is to become of a record.
enum Save {
    Spec(Vec<u8>),
    Image(Parts),
    Gone,
}

impl Save {
    /// The changes that make it so, and the record after them; `None`: there is none.
    fn changes(self, kind: Kind, known: Option<&Known>) -> (Vec<What>, Option<Known>) {
        let new = |spec| {
            let revision = Revision(0);
            Known { revision, spec, status: None, held: false, deleting: false }
        };
        match self {
            Self::Gone if kind == Kind::Image => {
                (vec![What::Delete, What::Finalizers(BTreeSet::new())], None)
            }
            Self::Gone => (vec![What::Delete], None),
            Self::Spec(json) => {
                let after = new(xxh3_128(&json));
                (vec![What::Spec(json)], Some(after))
            }
            Self::Image(Parts { spec, status, deleting }) => {
                let (spec_digest, status_digest) = (xxh3_128(&spec), xxh3_128(&status));
                let mut after = known.copied().unwrap_or_else(|| new(spec_digest));
                let mut changes = Vec::new();
                if known.is_none_or(|known| known.spec != spec_digest) {
                    changes.push(What::Spec(spec));
                }
                if !after.held && !after.deleting {
                    changes.push(What::Finalizers(finalizers()));
                }
                if after.status != Some(status_digest) {
                    changes.push(What::Status(status));
                }
                if deleting && !after.deleting {
                    changes.push(What::Delete);
                }
                (after.spec, after.status) = (spec_digest, Some(status_digest));
                (after.held, after.deleting) = (true, after.deleting || deleting);
                (changes, Some(after))
            }
        }
    }
}

impl Driver {
    /// Stores every record that the actions name, before any of them is performed: all or none.
    pub(super) async fn save_first(&mut self, actions: &[Action]) -> Result<(), CatalogError> {
        // Of a record that is changed twice the last state counts.
        let mut saves = BTreeMap::new();
        for action in actions {
            let (kind, key, save) = match action {
                Action::SaveImage(record) => {
                    (Kind::Image, record.name.as_str(), Save::Image(Parts::of(record)?))
                }
                Action::SaveAttachment(record) => {
                    spec(Kind::Attachment, record.id.as_str(), record)?
                }
                Action::SaveVolume(record) => spec(Kind::Volume, record.name.as_str(), record)?,
                Action::SaveClass(record) => spec(Kind::Class, record.name.as_str(), record)?,
                Action::SaveSettings(record) => spec(Kind::Setting, SETTINGS, record)?,
                Action::SaveDisk(record) => spec(Kind::Disk, record.uuid.as_str(), record)?,
                Action::ForgetImage(name) => (Kind::Image, name.as_str(), Save::Gone),
                Action::ForgetAttachment(id) => (Kind::Attachment, id.as_str(), Save::Gone),
                Action::ForgetVolume(name) => (Kind::Volume, name.as_str(), Save::Gone),
                Action::ForgetClass(name) => (Kind::Class, name.as_str(), Save::Gone),
                Action::ForgetDisk(disk) => (Kind::Disk, disk.as_str(), Save::Gone),
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
            saves.insert((kind, key.to_owned()), save);
        }
        let (mut writes, mut after) = (Vec::new(), Vec::new());
        for ((kind, key), save) in saves {
            let at = (kind, key);
            let known = self.revisions.get(&at);
            let is_gone = matches!(save, Save::Gone);
            let (changes, record) = save.changes(kind, known);
            let found = known.map_or(Expect::Absent, |known| Expect::At(known.revision));
            for (index, what) in changes.into_iter().enumerate() {
                // What follows in the same transaction finds what the first has made.
                let expect = if index == 0 && !is_gone { found } else { Expect::Any };
                writes.push(Write { kind, key: at.1.clone(), what, expect });
            }
            after.push((at, writes.len(), record));
        }
        if writes.is_empty() {
            return Ok(());
        }
        let catalog = self.catalog.clone();
        let made = blocking(move || catalog.write(&writes)).await?;
        let mut begin = 0;
        for (at, end, record) in after {
            let last = made.get(begin..end).and_then(<[Revision]>::last);
            begin = end;
            match (record, last) {
                (Some(record), Some(revision)) => {
                    self.revisions.insert(at, Known { revision: *revision, ..record });
                }
                // It is what it was.
                (Some(_), None) => {}
                (None, _) => drop(self.revisions.remove(&at)),
            }
        }
        Ok(())
    }
}

fn spec<'a, T: serde::Serialize>(
    kind: Kind,
    key: &'a str,
    record: &T,
) -> Result<(Kind, &'a str, Save), CatalogError> {
    Ok((kind, key, Save::Spec(encode(kind, key, record)?)))
}
