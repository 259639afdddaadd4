//! Fetches L2 tables, several at a time.
//!
//! Why: tables lie between the data they describe; one request after the other would cost a way to
//! the server and back for each 512 MiB of the disk.
//! How: tables that lie close together are read in one part, and a few parts at a time.
//! Never: holds more than a bounded number of tables.
//! Start at [`read_batch`].

use std::ops::Range;
use std::path::Path;

use futures_util::stream::{self, StreamExt, TryStreamExt};

use super::error::ImportError;
use super::plan::Plan;
use crate::fetch::{FetchError, SourceFile};
use crate::image::ImageError;
use crate::image::qcow2::{Image, L2Table, Tally, Upkeep};

/// Bytes of tables that are read for one group.
const GROUP_BYTES: u64 = 8 << 20;
/// A gap between tables that is rather read than asked around.
const BRIDGE_BYTES: u64 = 64 * 1024;
/// Parts that are asked for at the same time.
const PARTS_AT_ONCE: usize = 8;

/// Adds tables to `plan` from number `first` on, until it has `most_entries` or all are added, and
/// at a unit of the disk. Returns the number of the first table that was not added.
pub(super) async fn read_batch(
    file: &SourceFile<'_>,
    image: &Image,
    tables: &[L2Table],
    first: usize,
    most_entries: usize,
    plan: &mut Plan,
    name: &Path,
) -> Result<usize, ImportError> {
    let mut next = first;
    while next < tables.len() && plan.entries.len() < most_entries {
        let most = most_entries - plan.entries.len();
        let group = group_from(tables, next, first, most, image.header().units_in_cluster_bits());
        let parts = read_group(file, stored(&tables[group.clone()])).await?;
        for table in &tables[group.clone()] {
            add(image, table, &parts, plan, name)?;
        }
        next = group.end;
    }
    Ok(next)
}

/// Tables of about [`GROUP_BYTES`], whose number since `first` is even unless they are the last: a
/// table of the smallest clusters maps half a unit of the disk.
fn group_from(
    tables: &[L2Table],
    start: usize,
    first: usize,
    most_entries: usize,
    units_in_cluster_bits: u32,
) -> Range<usize> {
    // Every other subcluster may be stored.
    let most_in_cluster = 1 << units_in_cluster_bits.saturating_sub(1);
    let (mut end, mut bytes, mut entries) = (start, 0, 0);
    while let Some(table) = tables.get(end) {
        let whole_units = (end - first).is_multiple_of(2);
        if end > start && whole_units && (bytes >= GROUP_BYTES || entries >= most_entries) {
            break;
        }
        let len = table.stored.as_ref().map_or(0, |stored| stored.end - stored.start);
        bytes += len;
        let clusters = table.stored.as_ref().map_or(0, |_| table.clusters);
        entries += usize::try_from(clusters).unwrap_or(usize::MAX) * most_in_cluster;
        end += 1;
    }
    start..end
}

/// Parts of the source, ascending, with their places.
pub(super) type Parts = Vec<(u64, Vec<u8>)>;

/// Reads what is `stored` of some tables, several parts at a time.
pub(super) async fn read_group(
    file: &SourceFile<'_>,
    stored: impl Iterator<Item = Option<Range<u64>>>,
) -> Result<Parts, FetchError> {
    let mut stored: Vec<_> = stored.flatten().collect();
    stored.sort_unstable_by_key(|range| range.start);
    let mut parts: Vec<Range<u64>> = Vec::new();
    for range in stored {
        match parts.last_mut() {
            Some(last)
                if range.start <= last.end + BRIDGE_BYTES
                    && range.end - last.start <= 2 * GROUP_BYTES =>
            {
                last.end = last.end.max(range.end);
            }
            Some(_) | None => parts.push(range),
        }
    }
    let reads = parts.into_iter().map(|part| async move {
        let start = part.start;
        file.read(part).await.map(|bytes| (start, bytes))
    });
    stream::iter(reads).buffered(PARTS_AT_ONCE).try_collect().await
}

/// Judges all L2 tables of `image`, also behind a damaged entry, and holds them against refcounts
/// and bitmaps.
pub(super) async fn tally(file: &SourceFile<'_>, image: &Image) -> Result<Tally, FetchError> {
    let tables: Vec<L2Table> = image.tables().collect();
    let (mut tally, mut next) = (Tally::default(), 0);
    let mut upkeep = Upkeep::of(image);
    while let Some(wanted) = upkeep.wanted() {
        upkeep.take(&file.read(wanted).await?);
    }
    let upkeep = upkeep.into_places(&mut tally);
    while next < tables.len() {
        let group = group_from(&tables, next, 0, usize::MAX, 0);
        let parts = read_group(file, stored(&tables[group.clone()])).await?;
        for table in &tables[group.clone()] {
            image.tally_table(table, bytes_of(&table.stored, &parts), &upkeep, &mut tally);
        }
        next = group.end;
    }
    Ok(tally)
}

fn stored(tables: &[L2Table]) -> impl Iterator<Item = Option<Range<u64>>> {
    tables.iter().map(|table| table.stored.clone())
}

/// The bytes of a table, of which `parts` has all; none of one that is not stored.
pub(super) fn bytes_of<'a>(stored: &Option<Range<u64>>, parts: &'a Parts) -> &'a [u8] {
    let Some(stored) = stored else { return &[] };
    let index = parts.partition_point(|(start, _)| *start <= stored.start) - 1;
    let (start, bytes) = &parts[index];
    let within = |at: u64| usize::try_from(at - start).unwrap_or(usize::MAX);
    &bytes[within(stored.start)..within(stored.end)]
}

fn add(
    image: &Image,
    table: &L2Table,
    parts: &Parts,
    plan: &mut Plan,
    name: &Path,
) -> Result<(), ImportError> {
    if table.stored.is_none() {
        plan.add_zeroes(table.first_cluster, table.clusters);
        return Ok(());
    }
    let bytes = bytes_of(&table.stored, parts);
    let judged = image.decode_table(table, bytes, &mut |units, meaning| plan.add(units, meaning));
    Ok(judged.map_err(|fault| ImageError::fault(name, fault))?)
}
