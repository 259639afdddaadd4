//! Tests of `header`: one rule of the format each.

use proptest::prelude::*;
use zerocopy::IntoBytes;

use super::*;
use crate::image::qcow2::FaultKind;
use crate::units::GIB;

const FILE_LEN: u64 = 1 << 20;

/// A sound version 3 header: 1 GiB in clusters of 64 KiB, L1 table of 2 entries at 0x30000.
fn v3() -> Vec<u8> {
    let raw = RawHeader {
        magic: MAGIC.into(),
        version: 3.into(),
        backing_file_offset: 0.into(),
        backing_file_size: 0.into(),
        cluster_bits: 16.into(),
        size: GIB.into(),
        crypt_method: 0.into(),
        l1_size: 2.into(),
        l1_table_offset: 0x30000.into(),
        refcount_table_offset: 0x10000.into(),
        refcount_table_clusters: 1.into(),
        nb_snapshots: 0.into(),
        snapshots_offset: 0.into(),
    };
    let rest = RawHeaderV3 {
        incompatible_features: 0.into(),
        compatible_features: 0.into(),
        autoclear_features: 0.into(),
        refcount_order: 4.into(),
        header_length: 112.into(),
        compression_type: 0,
        padding: [0; 7],
    };
    let mut bytes = [raw.as_bytes(), rest.as_bytes()].concat();
    bytes.resize(65_536, 0);
    bytes
}

/// The header with `value` put at byte `at`.
fn with(at: usize, value: &[u8]) -> Vec<u8> {
    let mut bytes = v3();
    bytes[at..at + value.len()].copy_from_slice(value);
    bytes
}

fn parse(bytes: &[u8]) -> Result<Header, Fault> {
    Header::parse(bytes, FILE_LEN, Given::default())
}

/// Asserts that `value` at byte `at` is refused as `field`, with its place and value.
fn refused(field: &str, at: usize, value: &[u8]) -> Fault {
    let fault = parse(&with(at, value)).unwrap_err();
    assert_eq!((fault.field, fault.at.0), (field, at as u64));
    fault
}

fn u32be(value: u32) -> [u8; 4] {
    value.to_be_bytes()
}

fn u64be(value: u64) -> [u8; 8] {
    value.to_be_bytes()
}

#[test]
fn a_sound_header_is_taken_as_it_is() {
    let header = parse(&v3()).unwrap();
    assert_eq!((header.version, header.cluster_bits.get(), header.size_bytes), (3, 16, GIB));
    assert_eq!((header.l1.clone(), header.l1_entries), (0x30000..0x30010, 2));
    assert_eq!((header.compression, header.snapshots), (Compression::Zlib, 0));
    assert_eq!((header.clusters(), header.notes.len()), (16_384, 0));
}

#[test]
fn version_2_has_no_feature_bits() {
    let mut bytes = with(4, &u32be(2));
    bytes[72..112].fill(0);
    bytes[104] = 9;
    let header = parse(&bytes).unwrap();
    assert_eq!((header.version, header.compression), (2, Compression::Zlib));
}

#[test]
fn other_versions_and_magics_are_refused() {
    for version in [0, 1, 4, u32::MAX] {
        assert_eq!(refused("version", 4, &u32be(version)).kind, FaultKind::Unsupported);
    }
    refused("magic", 0, b"QFI\xfa");
}

#[test]
fn cluster_sizes_are_512_bytes_to_2_mib() {
    for bits in [0, 8, 22, 63, 64, u32::MAX] {
        refused("cluster_bits", 20, &u32be(bits));
    }
}

#[test]
fn a_backing_file_is_refused() {
    let mut bytes = with(8, &u64be(112));
    // A name of no bytes is none, and the length of no name says nothing.
    assert!(!parse(&bytes).unwrap().backing);
    assert!(!parse(&with(16, &u32be(7))).unwrap().backing);
    bytes[16..20].copy_from_slice(&u32be(7));
    let fault = parse(&bytes).unwrap_err();
    assert_eq!(
        (fault.field, fault.at.0, fault.kind),
        ("backing_file_offset", 8, FaultKind::Unsupported)
    );
}

#[test]
fn the_l1_table_reaches_the_size_as_it_is_stored() {
    // qemu rounds the size down for the disk, and not for the table that maps it.
    assert_eq!(parse(&with(24, &u64be(GIB))).unwrap().l1_entries, 2);
    let fault = parse(&with(24, &u64be(GIB + 1))).unwrap_err();
    assert_eq!((fault.field, fault.at.0), ("l1_size", 36));
}

#[test]
fn a_snapshot_table_is_not_in_the_header() {
    refused("snapshots_offset", 64, &u64be(1));
    let fault = parse(&with(60, &u32be(1))).unwrap_err();
    assert_eq!((fault.field, fault.need), ("snapshots_offset", "past the header's cluster"));
}

#[test]
fn encryption_is_refused() {
    for method in [1, 2, 3] {
        assert_eq!(refused("crypt_method", 32, &u32be(method)).kind, FaultKind::Unsupported);
    }
}

#[test]
fn unknown_and_unserved_incompatible_bits_are_refused() {
    for bit in [2, 5, 63] {
        let fault = refused("incompatible_features", 72, &u64be(1 << bit));
        assert_eq!((fault.kind, fault.found), (FaultKind::Unsupported, 1 << bit));
    }
}

#[test]
fn dirty_and_corrupt_images_are_read_with_a_note() {
    assert_eq!(parse(&with(72, &u64be(3))).unwrap().notes.len(), 2);
}

#[test]
fn compatible_and_autoclear_bits_are_ignored_but_for_raw_external() {
    assert!(parse(&with(80, &u64be(u64::MAX))).is_ok());
    assert!(parse(&with(88, &u64be(!2))).is_ok());
    refused("autoclear_features", 88, &u64be(2));
}

#[test]
fn refcount_orders_up_to_6_are_taken() {
    for order in 0..=6 {
        assert!(parse(&with(96, &u32be(order))).is_ok());
    }
    refused("refcount_order", 96, &u32be(7));
}

#[test]
fn header_length_is_a_multiple_of_8_inside_the_cluster() {
    for len in [0, 72, 100, 103, 105, 111, 65_544, u32::MAX] {
        refused("header_length", 100, &u32be(len));
    }
    assert!(parse(&with(100, &u32be(104))).is_ok());
    assert!(parse(&with(100, &u32be(65_536))).is_ok());
}

#[test]
fn compression_type_and_its_feature_bit_agree() {
    let mut bytes = with(72, &u64be(1 << 3));
    assert_eq!(parse(&bytes).unwrap_err().field, "compression_type");
    bytes[104] = 1;
    assert_eq!(parse(&bytes).unwrap().compression, Compression::Zstd);
    bytes[104] = 2;
    assert_eq!(parse(&bytes).unwrap_err().kind, FaultKind::Unsupported);
    refused("compression_type", 104, &[1]);
}

#[test]
fn compression_type_does_not_count_in_a_header_of_104_bytes() {
    let mut bytes = with(100, &u32be(104));
    bytes[104] = 0;
    bytes[107] = 0;
    assert_eq!(parse(&bytes).unwrap().compression, Compression::Zlib);
}

#[test]
fn a_size_is_rounded_down_to_512_and_has_limits() {
    let header = parse(&with(24, &u64be(GIB - 1))).unwrap();
    assert_eq!((header.size_bytes, header.notes.len()), (GIB - 512, 1));
    for size in [0, 1, 511, 16 * TIB + 512, 1 << 63, u64::MAX] {
        refused("size", 24, &u64be(size));
    }
}

#[test]
fn an_l1_table_is_aligned_large_enough_and_inside_the_file() {
    refused("l1_size", 36, &u32be(0));
    refused("l1_size", 36, &u32be(1));
    refused("l1_size", 36, &u32be((4 << 20) + 1));
    refused("l1_size", 36, &u32be(u32::MAX));
    for offset in [0, 0x30200, FILE_LEN, 1 << 62, u64::MAX << 16] {
        refused("l1_table_offset", 40, &u64be(offset));
    }
    assert!(parse(&with(40, &u64be(FILE_LEN - 65_536))).is_ok());
}

#[test]
fn a_refcount_table_has_qemus_limits_and_may_be_outside_the_file() {
    refused("refcount_table_clusters", 56, &u32be(0));
    refused("refcount_table_clusters", 56, &u32be(129));
    refused("refcount_table_offset", 48, &u64be(0x10200));
    refused("refcount_table_offset", 48, &u64be(u64::MAX << 16));
    assert!(parse(&with(48, &u64be(1 << 40))).is_ok());
}

#[test]
fn snapshots_are_ignored_within_qemus_limits() {
    let mut bytes = with(60, &u32be(65_536));
    bytes[64..72].copy_from_slice(&u64be(0x10000));
    assert_eq!(parse(&bytes).unwrap().snapshots, 65_536);
    refused("nb_snapshots", 60, &u32be(65_537));
    refused("nb_snapshots", 60, &u32be(0x7fff_ffff));
    refused("snapshots_offset", 64, &u64be(1));
}

#[test]
fn extensions_are_checked_where_the_header_ends() {
    let mut bytes = with(112, &u32be(0x4441_5441));
    bytes[119] = 4;
    let fault = parse(&bytes).unwrap_err();
    assert_eq!((fault.field, fault.at.0), ("extension data file name", 112));
    bytes[4..8].copy_from_slice(&u32be(2));
    bytes[72..112].fill(0);
    assert!(parse(&bytes).is_ok(), "an end marker at byte 72 of version 2");
    bytes.copy_within(112..120, 72);
    assert_eq!(parse(&bytes).unwrap_err().at.0, 72);
}

#[test]
fn a_file_shorter_than_its_header_is_refused() {
    for len in [0, 3, 71, 103] {
        assert!(Header::parse(&v3()[..len], len as u64, Given::default()).is_err(), "{len} bytes");
    }
}

proptest! {
    #[test]
    fn parsing_is_total(mut bytes in proptest::collection::vec(any::<u8>(), 0..1024), len: u64) {
        let _no_panic = Header::parse(&bytes, len, Given::default());
        if let Some(start) = bytes.get_mut(..8) {
            start.copy_from_slice(b"QFI\xfb\0\0\0\x03");
        }
        let _no_panic = Header::parse(&bytes, len, Given::default());
    }

    #[test]
    fn a_sound_header_with_one_field_changed_is_judged(at in 0..14_usize, value: u64, len: u64) {
        let bytes = with(at * 8, &u64be(value));
        if let Ok(header) = Header::parse(&bytes, len, Given::default()) {
            prop_assert!(header.l1.end <= len);
            prop_assert!(header.l1_entries * 8 <= header.l1.end - header.l1.start);
            prop_assert!(header.size_bytes.is_multiple_of(512));
        }
    }
}
