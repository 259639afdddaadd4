//! What images are given beside their own files: backing files, external data files.
//!
//! Why: a file is judged by what it will be opened with, and that may not be here when it comes.
//! How: of a backing file only that there is one; of a data file its length, which every entry is held
//! against.
//! Never: takes a name out of a file.
//! Start at [`World::beside`].

use super::records::ImageRecord;
use super::world::World;
use crate::image::qcow2::Terms;

/// What an image is given beside its own file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Beside {
    /// A backing file.
    pub base: bool,
    /// Length in bytes of its external data file.
    pub data_len_bytes: Option<u64>,
}

/// [`Terms`] that borrow nothing.
pub(super) struct OwnedTerms {
    pub(super) snapshot: Option<String>,
    pub(super) beside: Beside,
}

impl OwnedTerms {
    pub(super) fn borrow(&self) -> Terms<'_> {
        let Beside { base: backing, data_len_bytes } = self.beside;
        Terms { snapshot: self.snapshot.as_deref(), backing, data_len_bytes }
    }
}

impl World {
    /// What copies of `record` are given beside their own file.
    ///
    /// # Errors
    /// The length of its data file is not known yet, in words.
    pub(super) fn beside(&self, record: &ImageRecord) -> Result<Beside, String> {
        let data_len_bytes = record.data_file.as_ref().map(|name| {
            let image = self.images.get(name);
            let facts = image.and_then(|image| image.record.facts.as_ref());
            let known = facts.map(|facts| facts.size_bytes);
            known.ok_or_else(|| {
                let mut copies = image.iter().flat_map(|image| image.copies.values());
                match copies.find(|copy| copy.refused) {
                    Some(copy) => format!("its data file {name} cannot be had: {}", copy.message),
                    None => format!("waits for a first copy of its data file {name}"),
                }
            })
        });
        Ok(Beside { base: record.base.is_some(), data_len_bytes: data_len_bytes.transpose()? })
    }
}
