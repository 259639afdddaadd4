//! Tests of `bitmaps`: one rule of the format each.

use proptest::prelude::*;

use super::*;

const CLUSTER: u64 = 65_536;
const FILE_LEN: u64 = 16 << 20;
const EXTENSION_AT: u64 = 112;
const DIRECTORY_AT: u64 = 2 * CLUSTER;
const TABLE_AT: u64 = 4 * CLUSTER;
const AUTO: u32 = 2;

/// An entry of the directory as its writer would make it: granularity 2^16, table of one cluster.
#[derive(Clone)]
struct Entry {
    table: (u64, u32),
    flags: u32,
    kind: u8,
    granularity_bits: u8,
    extra: u32,
    name: Vec<u8>,
}

fn named(name: impl AsRef<[u8]>) -> Entry {
    let name = name.as_ref().to_vec();
    Entry { table: (TABLE_AT, 1), flags: AUTO, kind: 1, granularity_bits: 16, extra: 0, name }
}

impl Entry {
    fn bytes(&self) -> Vec<u8> {
        let name_len = u16::try_from(self.name.len()).unwrap();
        let words = [self.table.1, self.flags].map(u32::to_be_bytes).concat();
        let kind = [self.kind, self.granularity_bits];
        let lens = [&name_len.to_be_bytes()[..], &self.extra.to_be_bytes()].concat();
        let mut all = [&self.table.0.to_be_bytes()[..], &words, &kind, &lens, &self.name].concat();
        all.resize(all.len().next_multiple_of(8), 0);
        all
    }
}

/// Of a disk of 1 GiB in clusters of 64 KiB.
fn bitmaps(count: u32, len_bytes: u64) -> Bitmaps {
    let directory = BitmapDirectory {
        at: DIRECTORY_AT,
        len_bytes,
        count,
        extension_at: EXTENSION_AT,
        size_bytes: 1 << 30,
    };
    Bitmaps::new(ClusterBits::new(16).unwrap(), FILE_LEN, Some(directory))
}

/// Takes all, with the directory in parts of this many bytes, and every table's entries being
/// `table`. The notes, and the number of bytes that were wanted of tables.
fn check(
    count: u32,
    directory: &[u8],
    part: usize,
    table: u64,
) -> Result<(Vec<&'static str>, u64), Fault> {
    let mut bitmaps = bitmaps(count, directory.len() as u64);
    for bytes in directory.chunks(part) {
        assert!(bitmaps.wanted().unwrap().start < DIRECTORY_AT + directory.len() as u64);
        bitmaps.take(bytes)?;
    }
    let mut tables_bytes = 0;
    while let Some(range) = bitmaps.wanted() {
        let len = range.end - range.start;
        assert!(len > 0 && len <= PART_BYTES && range.end <= FILE_LEN);
        tables_bytes += len;
        bitmaps.take(&table.to_be_bytes().repeat(usize::try_from(len / 8).unwrap()))?;
    }
    Ok((bitmaps.notes().to_vec(), tables_bytes))
}

fn check_entries(entries: &[Entry], table: u64) -> Result<(Vec<&'static str>, u64), Fault> {
    let directory: Vec<u8> = entries.iter().flat_map(Entry::bytes).collect();
    let count = u32::try_from(entries.len()).unwrap();
    let whole = check(count, &directory, 1 << 20, table);
    for part in [1, 7, 24, 1000] {
        assert_eq!(check(count, &directory, part, table), whole, "in parts of {part}");
    }
    whole
}

fn fault(entries: &[Entry], table: u64) -> (&'static str, u64) {
    let fault = check_entries(entries, table).unwrap_err();
    (fault.field, fault.at.0)
}

#[test]
fn bitmaps_of_any_name_are_taken() {
    let entries = [named("b0"), named(""), named([0xff, 0xfe]), named(vec![b'x'; 1023])];
    assert_eq!(check_entries(&entries, 0), Ok((vec![], 8)));
    assert_eq!(check_entries(&entries, 1), Ok((vec![], 8)), "all bits set");
    assert_eq!(check_entries(&entries, 5 * CLUSTER), Ok((vec![], 8)));
}

#[test]
fn no_directory_wants_nothing() {
    let mut none = bitmaps(1, 32);
    none.directory = None;
    assert_eq!(none.wanted(), None);
    assert_eq!(none.take(&[0xff; 64]), Ok(()));
}

#[test]
fn each_number_out_of_range_is_named_with_its_place() {
    let at = DIRECTORY_AT + 32;
    let with = |change: &dyn Fn(&mut Entry)| {
        let mut entry = named("b1");
        change(&mut entry);
        fault(&[named("b0"), entry], 0)
    };
    assert_eq!(with(&|e| e.table.0 = 0), ("bitmap_table_offset", at));
    assert_eq!(with(&|e| e.table.0 += 512), ("bitmap_table_offset", at));
    assert_eq!(with(&|e| e.table.0 = FILE_LEN), ("bitmap_table_offset", at));
    assert_eq!(with(&|e| e.table.0 = !(CLUSTER - 1)), ("bitmap_table_offset", at));
    for size in [0, 2, 8193, u32::MAX] {
        assert_eq!(with(&|e| e.table.1 = size), ("bitmap_table_size", at + 8));
    }
    assert_eq!(with(&|e| e.flags = 4), ("bitmap flags", at + 12));
    assert_eq!(with(&|e| e.flags = 1 << 31), ("bitmap flags", at + 12));
    assert_eq!(with(&|e| e.kind = 0), ("bitmap type", at + 16));
    assert_eq!(with(&|e| e.kind = 2), ("bitmap type", at + 16));
    for bits in [0, 8, 32, 255] {
        assert_eq!(with(&|e| e.granularity_bits = bits), ("granularity_bits", at + 17));
    }
    assert_eq!(with(&|e| e.name = vec![b'x'; 1024]), ("name_size", at + 18));
    assert_eq!(with(&|e| e.extra = 8), ("bitmap extra_data_size", at + 20));
}

#[test]
fn a_table_has_as_many_clusters_as_the_disk_has_bits() {
    // 2^30 bytes at a granularity of 512 are 2^21 bits: 4 clusters.
    let of = |entries| Entry { table: (TABLE_AT, entries), granularity_bits: 9, ..named("b") };
    assert_eq!(check_entries(&[of(4)], 0), Ok((vec![], 32)));
    for entries in [3, 5] {
        assert_eq!(fault(&[of(entries)], 0), ("bitmap_table_size", DIRECTORY_AT + 8));
        let in_use = Entry { flags: FLAG_IN_USE, ..of(entries) };
        assert_eq!(check_entries(&[in_use], 0), Ok((vec![], 8 * u64::from(entries))));
    }
}

#[test]
fn the_directory_ends_with_its_last_entry() {
    let two = [named("b0").bytes(), named("b1").bytes()].concat();
    let said = |count, bytes: &[u8]| {
        let fault = check(count, bytes, 1 << 20, 0).unwrap_err();
        (fault.field, fault.at.0)
    };
    assert_eq!(said(1, &two), ("bitmaps count", EXTENSION_AT + 8));
    assert_eq!(said(3, &two), ("bitmaps count", EXTENSION_AT + 8));
    // Padding is part of an entry, but an entry of 26 bytes does not fit 31.
    assert_eq!(said(2, &two[..63]), ("name_size", DIRECTORY_AT + 32 + 18));
    for more in [1, 8, 23] {
        let longer = [&two[..], &vec![0; more]].concat();
        assert_eq!(said(2, &longer), ("bitmaps directory size", EXTENSION_AT + 16));
        assert_eq!(said(3, &longer), ("bitmaps directory size", EXTENSION_AT + 16));
    }
}

#[test]
fn a_name_is_one_bitmaps_alone_up_to_its_first_zero_byte() {
    for (first, second) in [("b0", "b0"), ("a\0b", "a\0c"), ("", "\0"), ("a", "a\0")] {
        let name_at = DIRECTORY_AT + named(first).bytes().len() as u64 + 24;
        assert_eq!(fault(&[named(first), named(second)], 0), ("bitmap name", name_at));
        let in_use = |name| Entry { flags: FLAG_IN_USE, ..named(name) };
        assert_eq!(fault(&[in_use(first), named(second)], 0), ("bitmap name", name_at));
        assert_eq!(check_entries(&[named(first), in_use(second)], 0), Ok((vec![TWICE], 8)));
    }
}

#[test]
fn table_entries_are_zero_one_or_the_place_of_a_cluster() {
    for entry in [2, 1 << 8, 1 << 56, 1 << 63, CLUSTER | 1, 512, CLUSTER + 512] {
        assert_eq!(fault(&[named("b")], entry), ("bitmap table entry", TABLE_AT));
        let in_use = Entry { flags: FLAG_IN_USE, ..named("b") };
        assert_eq!(check_entries(&[in_use], entry), Ok((vec![DAMAGED], 8)));
    }
    for entry in [FILE_LEN, 1 << 55, ENTRY_OFFSET & !(CLUSTER - 1)] {
        assert_eq!(check_entries(&[named("b")], entry), Ok((vec![PAST_END], 8)));
    }
}

#[test]
fn a_table_that_is_not_in_the_file_is_noted_if_it_is_in_use() {
    for at in [FILE_LEN, 1 << 63, !(CLUSTER - 1)] {
        let lost = Entry { table: (at, 8192), flags: FLAG_IN_USE, ..named("b") };
        assert_eq!(check_entries(&[lost], 0), Ok((vec![DAMAGED], 0)));
    }
}

#[test]
fn tables_are_read_up_to_a_bound() {
    let directory = |flags| {
        let place = |name: u32| TABLE_AT + u64::from(name % 100) * CLUSTER;
        let of = |name: u32| Entry { flags, table: (place(name), 8192), ..named(name.to_string()) };
        (0..1000).flat_map(|name| of(name).bytes()).collect::<Vec<u8>>()
    };
    let (notes, bytes) = check(1000, &directory(FLAG_IN_USE), 1 << 20, 0).unwrap();
    // 256 of them are within the bound; a table that several bitmaps have is read once.
    assert_eq!((notes, bytes), (vec![NOT_READ], 100 * CLUSTER));
    // 64 TiB at 2^17 are 2^29 bits: 1024 clusters.
    let mut large = bitmaps(65_535, 32 * 65_535);
    large.size_bytes = 64 << 40;
    let entry = |name: u32| Entry {
        table: (TABLE_AT, 1024),
        granularity_bits: 17,
        ..named(format!("{name:8}"))
    };
    let bytes: Vec<u8> = (0..65_535).flat_map(|name| entry(name).bytes()).collect();
    let said = large.take(&bytes).unwrap_err();
    assert_eq!(
        (said.field, said.need),
        ("bitmap_table_size", "bitmap tables of at most 16 MiB together")
    );
    assert_eq!(said.at.0, DIRECTORY_AT + 32 * 2048 + 8);
}

proptest! {
    #[test]
    fn any_bytes_are_judged_alike_in_any_parts(
        bytes in proptest::collection::vec(any::<u8>(), 1..600),
        sound in 0_usize..4,
        count in 1_u32..6,
        part in 1_usize..100,
        table: u64,
    ) {
        let names = (0..sound).map(|name| named(name.to_string()));
        let directory = names.flat_map(|entry| entry.bytes()).chain(bytes).collect::<Vec<u8>>();
        let whole = check(count, &directory, 1 << 20, table);
        prop_assert_eq!(check(count, &directory, part, table), whole);
    }
}

#[test]
fn tables_that_lie_close_are_read_together_in_the_order_of_the_file() {
    let at = |place: u64, entries: u32, name: u32| Entry {
        table: (place, entries),
        flags: FLAG_IN_USE,
        ..named(name.to_string())
    };
    let far = TABLE_AT + 4 * CLUSTER;
    let entries =
        [at(far, 1, 0), at(TABLE_AT, 8192, 1), at(TABLE_AT + CLUSTER, 2, 2), at(far, 1, 3)];
    let directory: Vec<u8> = entries.iter().flat_map(Entry::bytes).collect();
    let mut bitmaps = bitmaps(4, directory.len() as u64);
    bitmaps.take(&directory).unwrap();
    let mut wanted = Vec::new();
    while let Some(range) = bitmaps.wanted() {
        bitmaps.take(&vec![0; usize::try_from(range.end - range.start).unwrap()]).unwrap();
        wanted.push(range);
    }
    assert_eq!(wanted, [TABLE_AT..TABLE_AT + CLUSTER + 16, far..far + 8]);
}

#[test]
fn tables_that_overlap_are_judged_each_whole() {
    // The second begins in the middle of the first, which is longer than what is read at once.
    let entries = u32::try_from(PART_BYTES / 8 + 8192).unwrap();
    let of = |place: u64, entries: u32, flags: u32, name: u32| Entry {
        table: (place, entries),
        flags,
        ..named(name.to_string())
    };
    let all = [of(TABLE_AT, entries, 1, 0), of(TABLE_AT + CLUSTER, 1, 2, 1)];
    let directory: Vec<u8> = all.iter().flat_map(Entry::bytes).collect();
    let small = ClusterBits::new(9).unwrap();
    let place = BitmapDirectory {
        at: DIRECTORY_AT,
        len_bytes: directory.len() as u64,
        count: 2,
        extension_at: EXTENSION_AT,
        // One bit.
        size_bytes: 512,
    };
    let mut bitmaps = Bitmaps::new(small, FILE_LEN, Some(place));
    bitmaps.take(&directory).unwrap();
    let (mut named, mut seen) = (Vec::new(), 0);
    while let Some(range) = bitmaps.wanted() {
        assert_eq!(range.start, TABLE_AT + seen);
        seen += range.end - range.start;
        let len = usize::try_from(range.end - range.start).unwrap();
        let bytes = CLUSTER.to_be_bytes().repeat(len / 8);
        bitmaps.take_named(&bytes, &mut |one| named.push(one.at)).unwrap();
    }
    assert_eq!(seen, u64::from(entries) * 8);
    named.sort_unstable();
    let twice = named.windows(2).filter(|pair| pair[0] == pair[1]).count();
    assert_eq!((named.len(), twice), (usize::try_from(entries).unwrap() + 1, 1));
}
