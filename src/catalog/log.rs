//! The changes that are kept for watchers, in a redb table.
//!
//! Why: a watcher that was away for a moment must not have to read everything again, and one that was
//! away too long has to be told.
//! How: revision to kind, a byte 0 or 1 (removed), and key. A change appends its row in its own transaction
//! and takes the oldest away, so that log and records cannot disagree.
//! Never: keeps what was in a record: a deleted image's credentials must not live on here.
//! Start at [`append`].

use redb::{ReadableTable, ReadableTableMetadata, Table, TableDefinition};

use super::{Change, Kind, Revision};

pub(super) const LOG: TableDefinition<'static, u64, &'static [u8]> =
    TableDefinition::new("changes");

/// Adds a change, and takes the oldest away until at most `kept` are left.
pub(super) fn append(
    table: &mut Table<'_, u64, &'static [u8]>,
    change: &Change,
    kept: u64,
) -> Result<(), redb::StorageError> {
    table.insert(change.revision.0, encode(change).as_slice())?;
    while table.len()? > kept {
        table.pop_first()?;
    }
    Ok(())
}

/// The revision after which all changes are kept; `newest` is the catalog's last.
pub(super) fn oldest(
    table: &impl ReadableTable<u64, &'static [u8]>,
    newest: u64,
) -> Result<u64, redb::StorageError> {
    // A catalog that was written before there was a log begins it with its next change.
    let first = table.first()?;
    Ok(first.map_or(newest, |(revision, _)| revision.value().saturating_sub(1)))
}

pub(super) fn encode(change: &Change) -> Vec<u8> {
    let mut row = Vec::with_capacity(16 + change.key.len());
    row.extend_from_slice(change.kind.as_str().as_bytes());
    row.push(u8::from(change.deleted));
    row.extend_from_slice(change.key.as_bytes());
    row
}

/// A row's change. `None` for one of a kind that a newer daemon knows, or a damaged one.
pub(super) fn decode(revision: u64, row: &[u8]) -> Option<Change> {
    let mark = row.iter().position(|byte| *byte < 2)?;
    let (kind, rest) = row.split_at(mark);
    let (deleted, key) = rest.split_first()?;
    Some(Change {
        revision: Revision(revision),
        kind: Kind::parse(std::str::from_utf8(kind).ok()?)?,
        key: std::str::from_utf8(key).ok()?.to_owned(),
        deleted: *deleted == 1,
    })
}
