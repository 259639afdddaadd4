//! Who uses which cluster of an image: an account of its own, to hold inspections against.

use std::collections::BTreeMap;

use super::mutate::{Chart, get};

const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
const COMPRESSED: u64 = 1 << 62;

/// A field that names a cluster; `upkeep`: only writers use that.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct User {
    pub field: &'static str,
    pub at: u64,
    pub upkeep: bool,
}

/// The users of each cluster of the file, each field once.
pub type Uses = BTreeMap<u64, Vec<User>>;

/// Of an image that was opened, and nothing of which is refused. `owner`: whose disk it is.
pub fn uses(bytes: &[u8], owner: usize) -> Uses {
    let chart = Chart::of(bytes);
    let mut uses = Uses::new();
    let mut add = |field, at, upkeep, from: u64, to: u64| {
        for cluster in from / chart.cluster..to.max(from + 1).div_ceil(chart.cluster) {
            let users = uses.entry(cluster).or_default();
            let user = User { field, at, upkeep };
            if !users.contains(&user) {
                users.push(user);
            }
        }
    };
    let (len, quad) = (bytes.len() as u64, |at: u64| get(bytes, usize::try_from(at).unwrap(), 8));
    add("header", 0, false, 0, 1);
    let l1 = chart.l1[owner].clone();
    add("l1_table_offset", 40, false, l1.start, l1.end);
    of_disk(&chart, bytes, owner, &mut add);
    let refcounts = quad(48)..quad(48) + chart.cluster * get(bytes, 56, 4);
    if refcounts.end <= len {
        add("refcount_table_offset", 48, true, refcounts.start, refcounts.end);
    }
    for at in (refcounts.start..refcounts.end.min(len)).step_by(8) {
        let place = quad(at);
        if place != 0 && place % chart.cluster == 0 && place < len {
            add("refcount table entry", at, true, place, place + 1);
        }
    }
    of_snapshots(&chart, bytes, owner, &mut add);
    let Some(directory) = &chart.bitmap_directory else { return uses };
    // As in `Chart`: the last extension of bitmaps.
    let named_at = chart
        .extensions
        .iter()
        .rfind(|&&ext| get(bytes, usize::try_from(ext).unwrap(), 4) == 0x2385_2875);
    add("bitmaps directory offset", named_at.unwrap() + 24, true, directory.start, directory.end);
    for (&entry, table) in chart.bitmaps.iter().zip(&chart.bitmap_tables) {
        if table.end > len {
            continue;
        }
        add("bitmap_table_offset", entry, true, table.start, table.end);
        for at in table.clone().step_by(8) {
            let raw = quad(at);
            if raw & !1 == raw & OFFSET && raw & OFFSET != 0 {
                let is_sound = raw % chart.cluster == 0 && raw + chart.cluster <= len;
                if is_sound {
                    add("bitmap table entry", at, true, raw, raw + 1);
                }
            }
        }
    }
    uses
}

/// The snapshot table, and the L1 tables of those whose disk this is not.
fn of_snapshots(
    chart: &Chart,
    bytes: &[u8],
    owner: usize,
    add: &mut impl FnMut(&'static str, u64, bool, u64, u64),
) {
    let number = |at: u64, len| get(bytes, usize::try_from(at).unwrap(), len);
    let (table, count) = (number(64, 8), number(60, 4));
    let mut at = table;
    for snapshot in 1..=count {
        let (start, entries) = (number(at, 8), number(at + 8, 4));
        let end = start.saturating_add(8 * entries);
        let is_sound = start % chart.cluster == 0 && entries > 0 && end <= bytes.len() as u64;
        if is_sound && snapshot != owner as u64 {
            add("l1_table_offset", at, true, start, end);
        }
        let len = 40 + number(at + 36, 4) + number(at + 12, 2) + number(at + 14, 2);
        at = (at + len).next_multiple_of(8);
    }
    if count > 0 {
        add("snapshots_offset", 64, true, table, at);
    }
}

/// What the tables of the disk name.
fn of_disk(
    chart: &Chart,
    bytes: &[u8],
    owner: usize,
    add: &mut impl FnMut(&'static str, u64, bool, u64, u64),
) {
    let quad = |at: u64| get(bytes, usize::try_from(at).unwrap(), 8);
    let external = get(bytes, 4, 4) >= 3 && quad(72) & 4 != 0;
    let size = if owner == 0 { quad(24) & !511 } else { chart.disk_size(bytes, owner) };
    let per_table = chart.cluster / chart.entry_bytes;
    let clusters = size.div_ceil(chart.cluster);
    for index in 0..clusters.div_ceil(per_table) {
        let entry_at = chart.l1[owner].start + 8 * index;
        let table = quad(entry_at) & OFFSET;
        if table == 0 {
            continue;
        }
        add("L2 table offset", entry_at, false, table, table + 1);
        for entry in 0..per_table.min(clusters - index * per_table) {
            let at = table + entry * chart.entry_bytes;
            let raw = quad(at);
            let (field, place) = if raw & COMPRESSED != 0 {
                let bits = 70 - chart.cluster.trailing_zeros();
                ("compressed cluster offset", raw & ((1 << bits) - 1))
            } else {
                ("cluster offset", raw & OFFSET)
            };
            if !external && place != 0 {
                add(field, at, false, place, place + 1);
            }
        }
    }
}

/// Whether the findings (their fields and places) are those of clusters with two users, of which one
/// is for writers: what is missing, and what is too much.
pub fn misjudged(uses: &Uses, found: &[(&str, u64, &str)]) -> Vec<String> {
    let mut wrong = Vec::new();
    let is = |user: &User, field: &str, at: u64| user.at == at && field.ends_with(user.field);
    let shared: Vec<(&u64, &Vec<User>)> = uses
        .iter()
        .filter(|(_, users)| users.len() > 1 && users.iter().any(|u| u.upkeep))
        .collect();
    for (cluster, users) in &shared {
        let said = found.iter().any(|(field, at, _)| users.iter().any(|u| is(u, field, *at)));
        // Only the first twenty are kept.
        if !said && found.len() < 20 {
            wrong.push(format!("nothing is said of cluster {cluster}: {users:?}"));
        }
    }
    for (field, at, text) in found {
        let of_two = ["need not ", "need past the header's cluster"];
        let is_shared = shared.iter().any(|(_, users)| users.iter().any(|u| is(u, field, *at)));
        // Of a snapshot that cannot be served something else is said.
        if text.starts_with(field) && of_two.iter().any(|need| text.contains(need)) && !is_shared {
            wrong.push(format!("{text}, but nobody else uses it"));
        }
    }
    wrong
}
