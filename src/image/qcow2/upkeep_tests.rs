//! Tests of `upkeep`: who may lie on whom.

use std::convert::Infallible;

use proptest::prelude::*;

use super::*;
use crate::image::qcow2::{Given, Header};

const CLUSTER: u64 = 4096;
const REFCOUNTS: u64 = CLUSTER;
const BLOCK: u64 = 2 * CLUSTER;
const L1: u64 = 3 * CLUSTER;
const L2: u64 = 4 * CLUSTER;
const DATA: u64 = 5 * CLUSTER;
const DIRECTORY: u64 = 6 * CLUSTER;
const TABLES: [u64; 2] = [7 * CLUSTER, 8 * CLUSTER];
const BITS: [u64; 2] = [9 * CLUSTER, 10 * CLUSTER];
const FREE: u64 = 11 * CLUSTER;
const EXTENSION: u64 = 112;

/// A disk of 64 MiB with one cluster of data, and two bitmaps with one cluster of bits each.
#[derive(Clone)]
struct File(Vec<u8>);

impl File {
    fn new() -> Self {
        let mut file = Self(vec![0; 13 * 4096]);
        file.put(0, &0x5146_49fb_0000_0003_u64.to_be_bytes());
        file.put32(20, 12).put64(24, 64 << 20).put32(36, 32).put64(40, L1);
        file.put64(48, REFCOUNTS).put32(56, 1).put64(88, 1).put32(96, 4).put32(100, 112);
        file.put32(EXTENSION, 0x2385_2875).put32(EXTENSION + 4, 24).put32(EXTENSION + 8, 2);
        file.put64(EXTENSION + 16, 64).put64(EXTENSION + 24, DIRECTORY);
        file.put64(REFCOUNTS, BLOCK).put64(L1, 1 << 63 | L2).put64(L2, 1 << 63 | DATA);
        for index in 0..2_u64 {
            let (entry, which) = (DIRECTORY + 32 * index, usize::try_from(index).unwrap());
            // 64 MiB at 2^10 bytes are 2^16 bits: two clusters.
            file.put64(entry, TABLES[which]).put32(entry + 8, 2).put32(entry + 12, 2);
            file.put(entry + 16, &[1, 10, 0, 1]).put(entry + 24, &[b'a' + index.to_le_bytes()[0]]);
            file.put64(TABLES[which], BITS[which]);
        }
        file
    }

    fn put(&mut self, at: u64, bytes: &[u8]) -> &mut Self {
        let at = usize::try_from(at).unwrap();
        self.0[at..at + bytes.len()].copy_from_slice(bytes);
        self
    }

    fn put32(&mut self, at: u64, value: u32) -> &mut Self {
        self.put(at, &value.to_be_bytes())
    }

    fn put64(&mut self, at: u64, value: u64) -> &mut Self {
        self.put(at, &value.to_be_bytes())
    }

    fn part(&self, range: Range<u64>) -> &[u8] {
        &self.0[usize::try_from(range.start).unwrap()..usize::try_from(range.end).unwrap()]
    }

    fn tally(&self) -> Tally {
        let len = self.0.len() as u64;
        let header = Header::parse(&self.0[..4096], len, Given::default()).unwrap();
        let l1 = self.part(header.l1_needed());
        let image = Image::from_l1(header.clone(), len, l1).unwrap();
        let read = |range: Range<u64>, bytes: &mut [u8]| {
            bytes.copy_from_slice(self.part(range));
            Ok::<_, Infallible>(())
        };
        image.tally(read).unwrap()
    }

    /// What is odd: fields, their places and values, and what they should be.
    fn odd(&self) -> Vec<(&'static str, u64, u64, &'static str)> {
        let tally = self.tally();
        assert_eq!(tally.faults_total(), 0, "nothing is refused");
        assert_eq!(tally.oddities_total(), tally.oddities().len() as u64);
        tally.oddities().iter().map(|f| (f.field, f.at.0, f.found, f.need)).collect()
    }
}

fn with(
    change: impl FnOnce(&mut File) -> &mut File,
) -> Vec<(&'static str, u64, u64, &'static str)> {
    let mut file = File::new();
    change(&mut file);
    file.odd()
}

#[test]
fn nothing_is_odd_where_each_cluster_is_used_once() {
    assert_eq!(File::new().odd(), []);
    assert_eq!(with(|file| file.put64(TABLES[0] + 8, FREE)), []);
    // All bits set, or none: no cluster.
    assert_eq!(with(|file| file.put64(TABLES[0] + 8, 1)), []);
}

#[test]
fn a_cluster_of_bits_on_anything_else_is_said_with_its_entry() {
    let entry = TABLES[1] + 8;
    for (place, need) in [
        (L1, "not in the L1 table"),
        (L2, "not an L2 table"),
        (REFCOUNTS, "not in the refcount table"),
        (BLOCK, "not a refcount block"),
        (DIRECTORY, "not in the bitmap directory"),
        (TABLES[0], "not in the table of a bitmap"),
        (TABLES[1], "not in the table of a bitmap"),
        (BITS[0], "not a cluster of a bitmap's bits"),
        (BITS[1], "not a cluster of a bitmap's bits"),
    ] {
        let said = with(|file| file.put64(entry, place));
        assert_eq!(said, [("bitmap table entry", entry, place, need)]);
    }
}

#[test]
fn data_on_what_only_writers_use_is_said_with_its_l2_entry() {
    for (place, need) in [
        (REFCOUNTS, "not in the refcount table"),
        (BLOCK, "not a refcount block"),
        (DIRECTORY, "not in the bitmap directory"),
        (TABLES[0], "not in the table of a bitmap"),
        (BITS[1], "not a cluster of a bitmap's bits"),
    ] {
        for (flags, field) in [
            (1 << 63, "data cluster offset"),
            (1, "preallocated cluster offset"),
            (1 << 62, "compressed cluster offset"),
        ] {
            let said = with(|file| file.put64(L2 + 24, flags | place));
            assert_eq!(said, [(field, L2 + 24, place, need)]);
        }
        let inside = place + 77;
        let said = with(|file| file.put64(L2 + 24, 1 << 62 | inside));
        assert_eq!(said, [("compressed cluster offset", L2 + 24, inside, need)]);
    }
}

#[test]
fn tables_on_other_tables_are_said_with_the_field_that_names_them() {
    let second = DIRECTORY + 32;
    // The entries of a table that two bitmaps have are each one field, which is no fault of theirs.
    let need = "not in the table of a bitmap";
    let said = with(|file| file.put64(second, TABLES[0]));
    assert_eq!(said, [("bitmap_table_offset", second, TABLES[0], need)]);
    // As a bitmap's table, the refcount table has an entry that names a block.
    let said = with(|file| file.put64(second, REFCOUNTS));
    let table = ("bitmap_table_offset", second, REFCOUNTS, "not in the refcount table");
    let entry = ("bitmap table entry", REFCOUNTS, BLOCK, "not a refcount block");
    assert_eq!(said, [table, entry]);
    // A directory in the disk's data.
    let mut file = File::new();
    let directory = file.part(DIRECTORY..DIRECTORY + CLUSTER).to_vec();
    file.put(DATA, &directory).put64(EXTENSION + 24, DATA);
    let said = file.odd();
    assert_eq!(said, [("data cluster offset", L2, DATA, "not in the bitmap directory")]);
}

#[test]
fn the_refcount_table_is_judged_and_refuses_nothing() {
    let end = 13 * CLUSTER;
    for (raw, need) in [
        (BLOCK | 1, "bits 0 to 8 clear"),
        (BLOCK | 1 << 8, "bits 0 to 8 clear"),
        (BLOCK + 512, "a multiple of the cluster size"),
        (end, "a refcount block inside the file"),
        (!0xfff, "a refcount block inside the file"),
    ] {
        let said = with(|file| file.put64(REFCOUNTS, raw));
        assert_eq!(said, [("refcount table entry", REFCOUNTS, raw, need)]);
    }
    let entry = REFCOUNTS + 8;
    for (place, need) in [
        (L1, "not in the L1 table"),
        (L2, "not an L2 table"),
        (REFCOUNTS, "not in the refcount table"),
        (BLOCK, "not a refcount block"),
    ] {
        let said = with(|file| file.put64(entry, place));
        assert_eq!(said, [("refcount table entry", entry, place, need)]);
    }
    for place in [13 * CLUSTER, 1 << 62] {
        let said = with(|file| file.put64(48, place));
        assert_eq!(said, [("refcount_table_offset", 48, place, "a table inside the file")]);
    }
    let said = with(|file| file.put64(48, L1).put64(L1, 0));
    assert_eq!(said, [("refcount_table_offset", 48, L1, "not in the L1 table")]);
    let said = with(|file| file.put64(48, 0));
    assert_eq!(said[0], ("refcount_table_offset", 48, 0, "past the header's cluster"));
}

#[test]
fn bitmaps_of_before_are_not_looked_at() {
    let said = with(|file| file.put64(TABLES[1], L1).put64(88, 0));
    assert_eq!(said, []);
}

#[test]
fn what_is_kept_is_bounded_and_the_rest_is_noted() {
    let (file, len) = (File::new(), 1 << 40);
    let header = Header::parse(&file.0[..4096], len, Given::default()).unwrap();
    let l1 = file.part(header.l1_needed());
    let image = Image::from_l1(header.clone(), len, l1).unwrap();
    let mut upkeep = Upkeep::of(&image);
    for block in 0..MAX_PLACES as u64 + 100 {
        let place = FREE + block * CLUSTER;
        upkeep.add(Use::RefcountBlock, 8 * block, &(place..place + CLUSTER));
    }
    assert!(upkeep.is_full && upkeep.places.len() <= MAX_PLACES);
    let mut tally = Tally::default();
    let _places = upkeep.into_places(&mut tally);
    assert!(tally.odd.is_partial);
    // Those that are there twice make no difference.
    let mut upkeep = Upkeep::of(&image);
    for _ in 0..2 * MAX_PLACES {
        upkeep.add(Use::RefcountBlock, 8, &(FREE..FREE + CLUSTER));
    }
    assert!(!upkeep.is_full && upkeep.places.len() <= MAX_PLACES);
    let mut tally = Tally::default();
    assert_eq!(upkeep.into_places(&mut tally).need(FREE + 5), Some("not a refcount block"));
    assert_eq!(tally.oddities_total(), 0);
}

#[test]
fn a_place_has_its_use_and_its_field() {
    for by in USES {
        for at in [0, 8, 48, 1 << 40, (1 << 63) - 8] {
            let place = Place::new(7, by, at);
            assert_eq!((place.by(), place.at()), (by, at));
        }
    }
}

proptest! {
    #[test]
    fn a_cluster_that_two_use_is_said_and_no_other(entry in 0_usize..4, place in 0_u64..12) {
        let at = [TABLES[0], TABLES[0] + 8, TABLES[1], TABLES[1] + 8][entry];
        let mut file = File::new();
        file.put64(at, place * CLUSTER);
        let free = [0, FREE].contains(&(place * CLUSTER));
        // The bits that an entry named before are free now.
        let own = [Some(BITS[0]), None, Some(BITS[1]), None][entry] == Some(place * CLUSTER);
        let odd = file.odd();
        prop_assert_eq!(odd.is_empty(), free || own);
        // Of two entries of one cluster the later one is said.
        prop_assert!(odd.len() <= 1);
    }
}
