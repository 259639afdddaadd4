//! Tests of `entry`: one rule of the format each.

use proptest::prelude::*;

use super::*;

const CLUSTER: u64 = 65_536;
const FILE_LEN: u64 = 0x10_0000;

/// Clusters of 64 KiB in a file of 1 MiB; L1 at 0x30000, L2 tables at 0x40000 and 0x60000.
fn decode_in(version: u32, raw: u64) -> Result<Cluster, EntryFault> {
    let bits = ClusterBits::new(16).unwrap();
    let limits = Limits {
        version,
        bits,
        file_len_bytes: FILE_LEN,
        l1: &(0x30000..0x30010),
        l2_tables: &L2Tables::of([0x40000, 0x60000].into_iter(), bits),
        data_len_bytes: None,
    };
    decode_l2(raw, CLUSTER, &limits)
}

fn decode(raw: u64) -> Result<Cluster, EntryFault> {
    decode_in(3, raw)
}

fn packed(at: u64, len_bytes: u64) -> Cluster {
    Cluster::Compressed(Packed { at: FileOffset(at), len_bytes })
}

#[test]
fn a_standard_cluster_is_data_at_its_offset() {
    assert_eq!(decode(0x8000_0000_0005_0000), Ok(Cluster::Data(FileOffset(0x50000))));
    assert_eq!(decode_in(2, 0x0000_0000_0005_0000), Ok(Cluster::Data(FileOffset(0x50000))));
}

#[test]
fn no_offset_is_unallocated_even_with_the_copied_flag() {
    assert_eq!(decode(0), Ok(Cluster::Unallocated));
    assert_eq!(decode(COPIED), Ok(Cluster::Unallocated));
}

#[test]
fn the_zero_flag_wins_over_a_preallocated_offset() {
    assert_eq!(decode(1), Ok(Cluster::Zero));
    assert_eq!(decode(0x8000_0000_0005_0001), Ok(Cluster::Zero));
    assert_eq!(decode(0x8000_0000_0005_0201).unwrap_err().field, "preallocated cluster offset");
}

#[test]
fn version_2_has_no_zero_flag() {
    assert_eq!(decode_in(2, 0x0000_0000_0005_0001).unwrap_err().field, "L2 entry");
    assert!(decode_in(2, 1).is_err());
}

#[test]
fn reserved_bits_are_masked_and_reported() {
    let raw = 0x3f00_0000_0005_01fe;
    assert_eq!(decode(raw), Ok(Cluster::Data(FileOffset(0x50000))));
    assert_eq!(reserved_l2_bits(raw), 0x3f00_0000_0000_01fe);
    assert_eq!(reserved_l2_bits(0x8000_0000_0005_0001), 0);
    assert_eq!(reserved_l2_bits(COMPRESSED | COPIED), COPIED);
    assert_eq!(reserved_l1_bits(0xff00_0000_0005_01ff), 0x7f00_0000_0000_01ff);
}

#[test]
fn data_is_aligned_inside_the_file_and_behind_the_metadata() {
    let need = |raw| decode(raw).unwrap_err().need;
    assert_eq!(need(0x50200), "a multiple of the cluster size");
    assert_eq!(need(FILE_LEN), "a cluster inside the file");
    assert_eq!(need(OFFSET & !0xffff), "a cluster inside the file");
    assert_eq!(need(0x30000), "not in the L1 table");
    assert_eq!(need(0x60000), "not an L2 table");
    assert_eq!(decode(FILE_LEN - CLUSTER), Ok(Cluster::Data(FileOffset(FILE_LEN - CLUSTER))));
}

#[test]
fn the_last_cluster_may_end_in_the_file_where_the_disk_ends() {
    let limits = Limits {
        version: 3,
        bits: ClusterBits::new(16).unwrap(),
        file_len_bytes: 0x50200,
        l1: &(0x30000..0x30010),
        l2_tables: &L2Tables::of([].into_iter(), ClusterBits::new(16).unwrap()),
        data_len_bytes: None,
    };
    assert_eq!(decode_l2(0x50000, 512, &limits), Ok(Cluster::Data(FileOffset(0x50000))));
    assert!(decode_l2(0x50000, 513, &limits).is_err());
}

#[test]
fn bit_0_of_a_compressed_entry_belongs_to_its_offset() {
    assert_eq!(decode(COMPRESSED | 0x50001), Ok(packed(0x50001, 511)));
}

#[test]
fn a_compressed_length_counts_sectors_from_the_first_bytes_sector() {
    // x = 62 - (16 - 8) = 54: the sector count begins at bit 54.
    assert_eq!(decode(COMPRESSED | 2 << 54 | 0x50010), Ok(packed(0x50010, 3 * 512 - 16)));
    assert_eq!(decode(COMPRESSED | COPIED | 0x50010), Ok(packed(0x50010, 512 - 16)));
    let most = decode(COMPRESSED | 0xff << 54 | 0x50000).unwrap();
    assert_eq!(most, packed(0x50000, 256 * 512));
}

#[test]
fn a_compressed_length_is_clamped_at_the_files_end() {
    assert_eq!(decode(COMPRESSED | 9 << 54 | (FILE_LEN - 3)), Ok(packed(FILE_LEN - 3, 3)));
}

#[test]
fn a_compressed_cluster_is_inside_the_file_and_behind_the_metadata() {
    let need = |raw| decode(COMPRESSED | raw).unwrap_err().need;
    assert_eq!(need(0), "past the header's cluster");
    assert_eq!(need(0xffff), "past the header's cluster");
    assert_eq!(need(FILE_LEN), "inside the file");
    assert_eq!(need((1 << 54) - 1), "inside the file");
    assert_eq!(need(0x3000f), "not in an L1 or L2 table");
    assert_eq!(need(0x4ffff), "not in an L1 or L2 table");
}

#[test]
fn the_smallest_and_largest_clusters_split_an_entry_elsewhere() {
    let small = Packed::of_entry(COMPRESSED | 1 << 61 | 0x1001, ClusterBits::new(9).unwrap());
    assert_eq!(small, Packed { at: FileOffset(0x1001), len_bytes: 1023 });
    let large = Packed::of_entry(u64::MAX, ClusterBits::new(21).unwrap());
    assert_eq!(large.at, FileOffset((1 << 49) - 1));
    assert_eq!(large.len_bytes, 8192 * 512 - 511);
}

fn any_bits() -> impl Strategy<Value = ClusterBits> {
    (9_u32..=21).prop_map(|bits| ClusterBits::new(bits).unwrap())
}

proptest! {
    #[test]
    fn decoding_is_total_and_stays_inside_the_file(
        raw: u64, mask: u64, bits in any_bits(), len: u64, version in 2_u32..=3,
    ) {
        let l1 = 0x30000..0x30010;
        let limits =
            Limits { version, bits, file_len_bytes: len, l1: &l1, l2_tables: &L2Tables::of([0x20_0000].into_iter(), bits), data_len_bytes: None };
        for raw in [raw, raw & mask, raw & OFFSET & !bits.offset_mask()] {
            match decode_l2(raw, bits.size_bytes(), &limits) {
                Ok(Cluster::Data(at)) => {
                    prop_assert_eq!(at.0 & bits.offset_mask(), 0);
                    prop_assert!(at.0 + bits.size_bytes() <= len && at.0 >= bits.size_bytes());
                }
                Ok(Cluster::Compressed(packed)) => {
                    prop_assert!(packed.at.0 + packed.len_bytes <= len);
                    prop_assert!((1..=2 * bits.size_bytes()).contains(&packed.len_bytes));
                }
                Ok(Cluster::Zero | Cluster::Unallocated) | Err(_) => {}
            }
            if let Ok(Some(at)) = decode_l1(raw, &limits) {
                prop_assert!(at.0 + bits.size_bytes() <= len);
            }
        }
    }
}

/// As `decode_in`, with subclusters of 2 KiB.
fn decode_extended(raw: u64, bitmap: u64) -> Result<Vec<(Range<u32>, Cluster)>, EntryFault> {
    let bits = ClusterBits::new(16).unwrap();
    let limits = Limits {
        version: 3,
        bits,
        file_len_bytes: FILE_LEN,
        l1: &(0x30000..0x30010),
        l2_tables: &L2Tables::of([0x40000, 0x60000].into_iter(), bits),
        data_len_bytes: None,
    };
    Ok(match decode_extended_l2(raw, bitmap, CLUSTER, &limits)? {
        Extended::Split(parts) => parts.runs().collect(),
        Extended::Compressed(packed) => vec![(0..32, Cluster::Compressed(packed))],
    })
}

#[test]
fn subclusters_are_stored_zero_or_neither() {
    let at = |offset| Cluster::Data(FileOffset(offset));
    assert_eq!(decode_extended(0x50000, 0xffff_ffff), Ok(vec![(0..32, at(0x50000))]));
    assert_eq!(decode_extended(0, 0xffff_ffff_0000_0000), Ok(vec![(0..32, Cluster::Zero)]));
    assert_eq!(decode_extended(COPIED, 0), Ok(vec![(0..32, Cluster::Unallocated)]));
    let mixed = decode_extended(0x50000, 0x8000_000c_4000_0003).unwrap();
    let want = vec![
        (0..2, at(0x50000)),
        (2..4, Cluster::Zero),
        (4..30, Cluster::Unallocated),
        (30..31, at(0x50000 + 30 * 2048)),
        (31..32, Cluster::Zero),
    ];
    assert_eq!(mixed, want);
}

#[test]
fn a_subcluster_has_one_state_and_a_place() {
    for (raw, bitmap) in [(0x50000, 0x1_0000_0001), (0, 1), (COPIED | 1, 0x8000_0000)] {
        assert_eq!(decode_extended(raw, bitmap).unwrap_err().field, "subcluster bitmap");
    }
    for raw in [0x50200, 0x100_0000, 0x30000, 0x40000, 0xfffff] {
        assert!(decode_extended(raw, 1).is_err(), "{raw:#x}");
    }
    // With nothing stored only the alignment counts, as with a zero cluster.
    assert!(decode_extended(0x50200, 1 << 32).is_err());
    assert!(decode_extended(0x100_0000, 1 << 32).is_ok());
    // The zero flag of the descriptor means nothing here.
    assert_eq!(decode_extended(0x50001, 1).unwrap()[0], (0..1, Cluster::Data(FileOffset(0x50000))));
}

#[test]
fn the_last_stored_subcluster_ends_inside_the_file() {
    let raw = FILE_LEN - 0x10000;
    assert!(decode_extended(raw, 1 << 31).is_ok());
    let limits_end = |len: u64, bitmap| {
        let limits = Limits {
            version: 3,
            bits: ClusterBits::new(16).unwrap(),
            file_len_bytes: len,
            l1: &(0x30000..0x30010),
            l2_tables: &L2Tables::of([].into_iter(), ClusterBits::new(16).unwrap()),
            data_len_bytes: None,
        };
        decode_extended_l2(raw, bitmap, CLUSTER, &limits)
    };
    assert!(limits_end(FILE_LEN - 0x8000, 0xffff).is_ok());
    assert!(limits_end(FILE_LEN - 0x8000, 0x1_ffff).is_err());
}

#[test]
fn a_fault_in_the_bitmap_is_said_of_the_bitmap() {
    for (raw, bitmap, at) in
        [(0, 1, 0x1008), (0x50000, 0x1_0000_0001, 0x1008), (0x50200, 1, 0x1000)]
    {
        let fault = decode_extended(raw, bitmap).unwrap_err().at(FileOffset(0x1000));
        assert_eq!(fault.at, FileOffset(at));
    }
}

#[test]
fn external_data_is_at_the_guest_s_own_offset() {
    let (zero, start) = (READS_AS_ZERO, 0x20000);
    for extended in [false, true] {
        assert!(check_external(COPIED | start, start, extended).is_ok());
        assert!(check_external(COPIED, 0, extended).is_ok());
        assert!(check_external(0, start, extended).is_ok(), "unallocated");
        assert!(check_external(COPIED, start, extended).is_err(), "offset 0 is a place");
        assert!(check_external(COMPRESSED, start, extended).is_err());
    }
    assert!(check_external(COPIED | zero, start, false).is_ok(), "zero, without a place");
    assert!(check_external(COPIED | zero, start, true).is_err(), "no zero flag with subclusters");
}

#[test]
fn zero_and_compressed_entries_may_name_what_is_missing() {
    let bits = ClusterBits::new(16).unwrap();
    let (l1, len) = (0x30000..0x30010, FILE_LEN);
    let limits = Limits {
        version: 3,
        bits,
        file_len_bytes: len,
        l1: &l1,
        l2_tables: &L2Tables::of([].into_iter(), bits),
        data_len_bytes: None,
    };
    let missing = |raw| names_what_is_missing(raw, &limits);
    assert!(!missing(READS_AS_ZERO) && !missing(READS_AS_ZERO | (len - 0x10000)));
    assert!(missing(READS_AS_ZERO | len));
    let sectors = |count: u64| COMPRESSED | count << 54 | (len - 512);
    assert!(!missing(sectors(0)) && !missing(sectors(127)) && missing(sectors(128)));
}

#[test]
fn a_compressed_entry_has_no_subclusters() {
    let raw = COMPRESSED | 0x50123;
    let Ok(runs) = decode_extended(raw, u64::MAX) else { panic!() };
    assert!(matches!(runs[..], [(Range { start: 0, end: 32 }, Cluster::Compressed(_))]));
    assert_eq!(reserved_extended_bits(raw, 5), 5);
    assert_eq!(reserved_extended_bits(0x50001, 5), 1);
}

proptest! {
    /// Each subcluster is in one run, with the state that its bits say.
    #[test]
    fn runs_of_subclusters_say_what_the_bits_say(stored in any::<u32>(), noise in any::<u32>()) {
        let zero = noise & !stored;
        let runs = decode_extended(0x50000, u64::from(zero) << 32 | u64::from(stored)).unwrap();
        let mut next = 0;
        for (range, meaning) in runs {
            prop_assert_eq!(range.start, next);
            prop_assert!(range.end > next && range.end <= 32);
            for n in range.clone() {
                let want = match (stored >> n & 1, zero >> n & 1) {
                    (1, _) => Cluster::Data(FileOffset(0x50000 + 2048 * u64::from(range.start))),
                    (_, 1) => Cluster::Zero,
                    _neither => Cluster::Unallocated,
                };
                prop_assert_eq!(meaning, want);
            }
            next = range.end;
        }
        prop_assert_eq!(next, 32);
    }
}
