//! What a change makes of a record, and how a record is laid out in a value of the store.
//!
//! Why: every catalog has to agree on what a finalizer holds up and what a status leaves alone.
//! How: [`apply`] is pure: the record that is there and what is to be done give the record that will be
//! there. A value is the revision (8 bytes, little-endian) and the spec; one that has more begins with a 1
//! after the revision, which no JSON does.
//! Never: removes a record that has finalizers; adds one to a record that is being deleted.
//! Start at [`apply`].

use std::collections::BTreeSet;

use super::{CatalogError, Revision, Stored, What, Write, conflict};

/// What marks a value that has more than a spec.
const MORE: u8 = 1;
const DELETING: u8 = 1;
const STATUS: u8 = 2;

/// What a change comes to.
#[derive(Debug)]
pub(super) enum Made {
    /// Nothing is different.
    Same,
    /// The record is this one now; its revision is still to be given.
    Record(Stored),
    /// There is no record any more.
    Gone,
}

/// What `write` makes of what is there.
///
/// # Errors
/// [`CatalogError::Conflict`] for a status or finalizers of nothing; [`CatalogError::BeingDeleted`].
pub(super) fn apply(found: Option<Stored>, write: &Write) -> Result<Made, CatalogError> {
    let Write { kind, key, .. } = write;
    let nothing = || conflict(*kind, key, None, "a record".to_owned());
    match (&write.what, found) {
        (What::Spec(json), None) => Ok(Made::Record(Stored::new(Revision(0), json.clone()))),
        (What::Spec(json), Some(found)) => Ok(Made::Record(Stored { json: json.clone(), ..found })),
        (What::Status(_), None) => Err(nothing()),
        (What::Status(json), Some(found)) => {
            Ok(Made::Record(Stored { status: Some(json.clone()), ..found }))
        }
        (What::Delete, None) => Ok(Made::Same),
        (What::Delete, Some(found)) if found.finalizers.is_empty() => Ok(Made::Gone),
        (What::Delete, Some(found)) if found.deleting => Ok(Made::Same),
        (What::Delete, Some(found)) => Ok(Made::Record(Stored { deleting: true, ..found })),
        (What::Finalizers(wanted), None) if wanted.is_empty() => Ok(Made::Same),
        (What::Finalizers(_), None) => Err(nothing()),
        (What::Finalizers(wanted), Some(found)) if found.deleting => {
            match (wanted.is_empty(), wanted.is_subset(&found.finalizers)) {
                (true, _) => Ok(Made::Gone),
                (_, true) => Ok(Made::Record(Stored { finalizers: wanted.clone(), ..found })),
                (_, false) => {
                    Err(CatalogError::BeingDeleted { kind: kind.as_str(), key: key.clone() })
                }
            }
        }
        (What::Finalizers(wanted), Some(found)) => {
            Ok(Made::Record(Stored { finalizers: wanted.clone(), ..found }))
        }
    }
}

/// The value of a record.
pub(super) fn encode(stored: &Stored) -> Vec<u8> {
    let Stored { revision, json, status, finalizers, deleting } = stored;
    let mut value = revision.0.to_le_bytes().to_vec();
    let is_plain = status.is_none() && finalizers.is_empty() && !deleting;
    if is_plain && json.first() != Some(&MORE) {
        value.extend_from_slice(json);
        return value;
    }
    let flags = if *deleting { DELETING } else { 0 } | if status.is_some() { STATUS } else { 0 };
    // Lengths were checked: see `check_write`.
    let count = u8::try_from(finalizers.len()).unwrap_or(u8::MAX);
    value.extend_from_slice(&[MORE, flags, count]);
    for name in finalizers.iter().take(usize::from(count)) {
        value.push(u8::try_from(name.len()).unwrap_or(u8::MAX));
        value.extend_from_slice(name.as_bytes());
    }
    value.extend_from_slice(&u32::try_from(json.len()).unwrap_or(u32::MAX).to_le_bytes());
    value.extend_from_slice(json);
    value.extend_from_slice(status.as_deref().unwrap_or_default());
    value
}

/// The record of a value; `None` if it is damaged.
pub(super) fn decode(value: &[u8]) -> Option<Stored> {
    let (revision, rest) = value.split_first_chunk::<8>()?;
    let revision = Revision(u64::from_le_bytes(*revision));
    let Some((&MORE, rest)) = rest.split_first() else {
        return Some(Stored::new(revision, rest.to_vec()));
    };
    let ([flags, count], mut rest) = rest.split_first_chunk::<2>()?;
    let mut finalizers = BTreeSet::new();
    for _ in 0..*count {
        let (len, after) = rest.split_first()?;
        let (name, after) = after.split_at_checked(usize::from(*len))?;
        finalizers.insert(std::str::from_utf8(name).ok()?.to_owned());
        rest = after;
    }
    let (len, rest) = rest.split_first_chunk::<4>()?;
    let (json, status) = rest.split_at_checked(usize::try_from(u32::from_le_bytes(*len)).ok()?)?;
    let has_status = flags & STATUS != 0;
    if flags & !(DELETING | STATUS) != 0 || !has_status && !status.is_empty() {
        return None;
    }
    Some(Stored {
        revision,
        json: json.to_vec(),
        status: has_status.then(|| status.to_vec()),
        finalizers,
        deleting: flags & DELETING != 0,
    })
}
