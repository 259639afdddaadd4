//! An image's record as the catalog keeps it: what is wanted, and what was found out.
//!
//! Why: who changes what is wanted must not write over what is found out meanwhile, nor the other way
//! round; and a record must not go before the files that it speaks of.
//! How: the spec is the record without what workers, scrubs and cleanup have told; that is its status. A
//! record that is deleted stays, marked, until its finalizer goes: when no file of it is left.
//! Never: loses a field: what is not of the status is of the spec.
//! Start at [`Parts::of`].

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use super::records::{Facts, ImageRecord, Want};
use crate::catalog::{Catalog, CatalogError, Kind, Stored, decode, encode};
use crate::names::DiskUuid;

/// What holds an image's record until its copies' files are gone.
const FINALIZER: &str = "bedplate.io.copies";

/// What was found out of an image.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct ImageStatus {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    facts: Option<Facts>,
    /// Of the disks on which a copy is wanted, those of which there is something to say.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    disks: BTreeMap<DiskUuid, Want>,
}

/// An image's record, taken apart.
pub(super) struct Parts {
    /// JSON of what is wanted.
    pub(super) spec: Vec<u8>,
    /// JSON of what was found out.
    pub(super) status: Vec<u8>,
    /// It is being deleted.
    pub(super) deleting: bool,
}

impl Parts {
    /// Takes a record apart.
    ///
    /// # Errors
    /// [`CatalogError::Encode`].
    pub(super) fn of(record: &ImageRecord) -> Result<Self, CatalogError> {
        let mut spec = record.clone();
        let disks = std::mem::take(&mut spec.disks);
        spec.disks = disks.keys().map(|disk| (disk.clone(), Want::default())).collect();
        let told = disks.into_iter().filter(|(_, want)| *want != Want::default());
        let status = ImageStatus { facts: spec.facts.take(), disks: told.collect() };
        let deleting = std::mem::take(&mut spec.deleting);
        let key = record.name.as_str();
        Ok(Self {
            spec: encode(Kind::Image, key, &spec)?,
            status: encode(Kind::Image, key, &status)?,
            deleting,
        })
    }
}

/// Puts a record together again; also one that was written when it was kept in one piece.
fn image_of(key: &str, stored: &Stored) -> Result<ImageRecord, CatalogError> {
    let mut record: ImageRecord = decode(Kind::Image, key, &stored.json)?;
    record.deleting |= stored.deleting;
    let Some(status) = &stored.status else { return Ok(record) };
    let status: ImageStatus = decode(Kind::Image, key, status)?;
    record.facts = status.facts;
    for (disk, told) in status.disks {
        if let Some(want) = record.disks.get_mut(&disk) {
            *want = told;
        }
    }
    Ok(record)
}

/// All images.
///
/// # Errors
/// As [`decode`].
pub(super) fn list_images(
    catalog: &dyn Catalog,
) -> Result<Vec<(ImageRecord, Stored)>, CatalogError> {
    let one = |(key, stored): (String, Stored)| Ok((image_of(&key, &stored)?, stored));
    catalog.list(Kind::Image)?.records.into_iter().map(one).collect()
}

/// The finalizers of an image's record.
pub(super) fn finalizers() -> BTreeSet<String> {
    [FINALIZER.to_owned()].into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::catalog::Revision;

    const RECORD: &str = r#"{
        "name":"a", "uuid":"0a0a0a0a-0a0a-4a0a-8a0a-0a0a0a0a0a0a", "source":"https://u:p@h/a",
        "facts":{"size_bytes":7,"virtual_size_bytes":7,"format":"raw","digests":{"sha256":"HEX"}},
        "disks":{"aaaaaaaa-1111":{"refused":"no","unused_since_unix_s":9},"bbbbbbbb-1111":{}},
        "min_copies":2, "deleting":true, "created_unix_s":5 }"#;

    fn record() -> ImageRecord {
        serde_json::from_str(&RECORD.replace("HEX", &"a".repeat(64))).unwrap()
    }

    #[test]
    fn a_record_is_put_together_as_it_was_and_each_part_has_its_own() {
        let record = record();
        let parts = Parts::of(&record).unwrap();
        let text = |json: &[u8]| String::from_utf8(json.to_vec()).unwrap();
        let (spec, status) = (text(&parts.spec), text(&parts.status));
        for told in ["size_bytes", "refused", "unused_since", "\"deleting\":true"] {
            assert!(!spec.contains(told), "{told}: {spec}");
        }
        for wanted in ["u:p@h", "min_copies", "bbbbbbbb", "created"] {
            assert!(spec.contains(wanted) && !status.contains(wanted), "{wanted}: {status}");
        }
        assert!(parts.deleting);
        let stored = Stored {
            status: Some(parts.status),
            finalizers: finalizers(),
            deleting: true,
            ..Stored::new(Revision(3), parts.spec)
        };
        assert_eq!(image_of("a", &stored).unwrap(), record);
    }

    #[test]
    fn a_record_in_one_piece_is_read_and_a_status_of_other_disks_is_passed_over() {
        let record = record();
        let whole = Stored::new(Revision(1), serde_json::to_vec(&record).unwrap());
        assert_eq!(image_of("a", &whole).unwrap(), record);
        let status = br#"{"disks":{"cccccccc-1111":{"refused":"no"}}}"#.to_vec();
        let other = image_of("a", &Stored { status: Some(status), ..whole.clone() }).unwrap();
        assert_eq!((other.facts, other.disks), (None, record.disks));
        let bad = Stored { status: Some(b"hunter2".to_vec()), ..whole };
        let error = image_of("a", &bad).unwrap_err().to_string();
        assert!(error.contains("\"a\"") && !error.contains("hunter2"), "{error}");
    }
}
