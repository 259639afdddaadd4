//! Images made to harm: each rule is named when it is broken, and what is accepted has qemu's bytes.
#![expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod qcow2_common;

use std::fs::File;
use std::path::Path;

use bedplate::disk::Sealed;
use bedplate::image::qcow2::Terms;
use bedplate::image::{Class, DecodedCache, ImageError, View, inspect};
use bedplate::units::GuestOffset;
use qcow2_common::craft::{
    CLUSTER, CLUSTERS, COMPRESSED, Crafted, DATA_AT, L1_AT, L2_AT, PACKED_AT,
};
use qcow2_common::craft::{SECTORS_SHIFT, deflate, packed, pattern};
use qcow2_common::{Random, all_bytes, assert_same, have_qemu, open, qemu_bytes, write};
use tempfile::TempDir;

fn try_open(path: &Path) -> Result<View, ImageError> {
    View::open_with_cache(Sealed::open_path(path).unwrap(), None, DecodedCache::new(1 << 20))
}

/// Asserts that opening and inspecting fail, and name `field` and its place.
fn refused(image: &Crafted, field: &str, at: usize) {
    let dir = TempDir::new().unwrap();
    let path = write(dir.path(), "image.qcow2", &image.bytes);
    let place = format!("{field} at byte {at:#x} is ");
    let opened = try_open(&path).unwrap_err();
    let inspected =
        inspect(&File::open(&path).unwrap(), &path, None, &Terms::default()).unwrap_err();
    for error in [opened, inspected] {
        assert!(error.to_string().contains(&place), "{error}\nshould say: {place}");
        assert_eq!(error.class(), Class::Refuse);
    }
}

/// Asserts that inspecting fails, that reading guest cluster `index` fails with the same words, and
/// that other clusters stay readable.
fn entry_refused(image: &Crafted, index: usize, field: &str, need: &str) {
    let dir = TempDir::new().unwrap();
    let path = write(dir.path(), "image.qcow2", &image.bytes);
    let words = format!("{field} at byte {:#x} is ", L2_AT + 8 * index);
    let inspected = inspect(&File::open(&path).unwrap(), &path, None, &Terms::default())
        .unwrap_err()
        .to_string();
    let view = try_open(&path).unwrap();
    let at = GuestOffset((index * CLUSTER) as u64);
    let read = view.read_at(&mut [0; 1], at).unwrap_err();
    assert_eq!(read.class(), Class::Refuse);
    for said in [inspected, read.to_string(), view.run_at(at, 1).unwrap_err().to_string()] {
        assert!(said.contains(&words) && said.contains(need), "{said}\nneed: {words}, {need}");
    }
    let other = GuestOffset(((index + 1) % 6 * CLUSTER) as u64);
    view.read_at(&mut [0; 1], other).unwrap();
}

/// Asserts that the image opens and guest cluster `index` reads as `want`.
fn reads(image: &Crafted, index: usize, want: &[u8]) {
    let dir = TempDir::new().unwrap();
    let path = write(dir.path(), "image.qcow2", &image.bytes);
    inspect(&File::open(&path).unwrap(), &path, None, &Terms::default()).unwrap();
    let mut got = vec![0xee; CLUSTER];
    open(&path).read_at(&mut got, GuestOffset((index * CLUSTER) as u64)).unwrap();
    assert!(got == want, "cluster {index}");
}

fn with(change: impl FnOnce(&mut Crafted) -> &mut Crafted) -> Crafted {
    let mut image = Crafted::new();
    change(&mut image);
    image
}

#[test]
fn the_crafted_image_is_sound_and_reads_as_with_qemu() {
    let image = Crafted::new();
    for (index, seed) in [(0, 3), (1, 4), (4, 1), (5, 2)] {
        reads(&image, index, &pattern(seed));
    }
    for index in [2, 3, 6, CLUSTERS - 1] {
        reads(&image, index, &[0; CLUSTER]);
    }
    if have_qemu() {
        let dir = TempDir::new().unwrap();
        let path = write(dir.path(), "image.qcow2", &image.bytes);
        assert_same(&open(&path), &qemu_bytes(&path).unwrap(), "crafted");
    }
}

#[test]
fn header_fields_out_of_range_are_refused_by_name() {
    for (field, at, value) in [
        ("version", 4, 1_u32),
        ("version", 4, 4),
        ("cluster_bits", 20, 8),
        ("cluster_bits", 20, 22),
        ("cluster_bits", 20, 64),
        ("crypt_method", 32, 1),
        ("crypt_method", 32, 2),
        ("l1_size", 36, 0),
        ("l1_size", 36, 1 << 28),
        ("refcount_table_clusters", 56, 0),
        ("refcount_table_clusters", 56, u32::MAX),
        ("nb_snapshots", 60, 0x7fff_ffff),
        ("refcount_order", 96, 7),
        ("header_length", 100, 100),
        ("header_length", 100, 108),
        ("header_length", 100, u32::MAX),
    ] {
        refused(&with(|image| image.put32(at, value)), field, at);
    }
    for (field, at, value) in [
        ("size", 24, 0_u64),
        ("size", 24, 1 << 63),
        ("size", 24, u64::MAX),
        ("l1_table_offset", 40, 0),
        ("l1_table_offset", 40, L1_AT as u64 + 512),
        ("l1_table_offset", 40, 9 * CLUSTER as u64),
        ("l1_table_offset", 40, !0xfff),
        ("refcount_table_offset", 48, 7),
        ("snapshots_offset", 64, 7),
        ("incompatible_features", 72, 1 << 2),
        ("incompatible_features", 72, 1 << 63),
        ("autoclear_features", 88, 1 << 1),
    ] {
        refused(&with(|image| image.put64(at, value)), field, at);
    }
}

#[test]
fn the_length_of_no_name_says_nothing() {
    // The specification calls it undefined, and qemu does not look.
    reads(&with(|image| image.put32(16, 5)), 0, &pattern(3));
    reads(&with(|image| image.put32(16, u32::MAX)), 6, &[0; CLUSTER]);
    // An empty name is none.
    reads(&with(|image| image.put64(8, 200)), 6, &[0; CLUSTER]);
    refused(&with(|image| image.put64(8, 200).put32(16, 1)), "backing_file_offset", 8);
}

#[test]
fn subclusters_need_clusters_of_16_kib() {
    refused(&with(|image| image.put64(72, 1 << 4)), "cluster_bits", 20);
}

#[test]
fn a_size_that_the_l1_table_cannot_map_is_refused() {
    let most = (CLUSTER / 8 * CLUSTER) as u64;
    refused(&with(|image| image.put64(24, most + 512)), "l1_size", 36);
}

#[test]
fn compression_type_and_bit_must_agree() {
    refused(&with(|image| image.put(104, &[1])), "compression_type", 104);
    refused(&with(|image| image.put64(72, 8)), "compression_type", 104);
    refused(&with(|image| image.put64(72, 8).put(104, &[2])), "compression_type", 104);
}

#[test]
fn extensions_that_name_files_keys_or_too_much_are_refused() {
    refused(
        &with(|image| image.put32(112, 0x4441_5441).put32(116, 8)),
        "extension data file name",
        112,
    );
    refused(
        &with(|image| image.put32(112, 0x0537_be77).put32(116, 16)),
        "extension encryption",
        112,
    );
    refused(&with(|image| image.put32(112, 7).put32(116, 4096 - 119)), "extension length", 116);
}

#[test]
fn a_name_from_inside_an_image_opens_nothing() {
    let dir = TempDir::new().unwrap();
    let other = write(dir.path(), "other", b"secret");
    let name = other.to_str().unwrap().as_bytes();
    let image = with(|image| {
        let len = u32::try_from(name.len()).unwrap();
        image.put64(8, 200).put32(16, len).put(200, name)
    });
    refused(&image, "backing_file_offset", 8);
}

#[test]
fn l1_entries_are_aligned_inside_the_file_and_distinct() {
    for offset in [CLUSTER + 512, 0x200, 9 * CLUSTER, L1_AT, 8 * CLUSTER + 512] {
        let image = with(|image| image.put64(L1_AT, offset as u64));
        refused(&image, "L2 table offset", L1_AT);
    }
    refused(&with(|image| image.put64(L1_AT, 0x00ff_ffff_ffff_f000)), "L2 table offset", L1_AT);
    let twice = with(|image| {
        let most = (CLUSTER / 8 * CLUSTER) as u64;
        image.put64(24, 2 * most).put32(36, 2);
        image.put64(L1_AT, L2_AT as u64).put64(L1_AT + 8, L2_AT as u64)
    });
    refused(&twice, "L2 table offset", L1_AT + 8);
}

#[test]
fn l2_entries_are_aligned_inside_the_file_and_behind_the_metadata() {
    let data = "data cluster offset";
    for (entry, field, need) in [
        (DATA_AT + 512, data, "a multiple of the cluster size"),
        (9 * CLUSTER, data, "a cluster inside the file"),
        (L1_AT, data, "not in the L1 table"),
        (L2_AT, data, "not an L2 table"),
        (1 | (DATA_AT + 512), "preallocated cluster offset", "a multiple"),
    ] {
        entry_refused(&with(|image| image.l2(0, entry as u64)), 0, field, need);
    }
    let past = 0x00ff_ffff_ffff_f000;
    entry_refused(&with(|image| image.l2(1, past)), 1, data, "a cluster inside the file");
    let packed_field = "compressed cluster offset";
    for (at, need) in [
        (0, "past the header's cluster"),
        (CLUSTER - 1, "past the header's cluster"),
        (9 * CLUSTER, "inside the file"),
        (L1_AT + 1, "not in an L1 or L2 table"),
        (L2_AT + 1, "not in an L1 or L2 table"),
    ] {
        let image = with(|image| image.l2(4, COMPRESSED | at as u64));
        entry_refused(&image, 4, packed_field, need);
    }
}

#[test]
fn version_2_has_no_zero_flag_and_no_feature_bits() {
    let mut image = with(|image| image.put32(4, 2).put(72, &[0; 40]).l2(3, 0));
    entry_refused(&image, 2, "L2 entry", "bit 0 clear in version 2");
    image.l2(2, 0);
    reads(&image, 0, &pattern(3));
}

#[test]
fn odd_and_harmless_bits_are_read_and_noted() {
    let image = with(|image| {
        image.put64(72, 3).put64(80, 1 << 63).put64(88, 1 << 5);
        image.put64(L1_AT, 0x7f00_0000_0000_01ff | L2_AT as u64);
        image.l2(0, 0x3f00_0000_0000_01fe | DATA_AT as u64).l2(6, 1 << 63);
        let compressed =
            u64::from_be_bytes(image.bytes[L2_AT + 32..L2_AT + 40].try_into().unwrap());
        image.l2(4, compressed | 1 << 63)
    });
    reads(&image, 0, &pattern(3));
    reads(&image, 4, &pattern(1));
    reads(&image, 6, &[0; CLUSTER]);
    let dir = TempDir::new().unwrap();
    let path = write(dir.path(), "image.qcow2", &image.bytes);
    let notes = inspect(&File::open(&path).unwrap(), &path, None, &Terms::default()).unwrap().notes;
    assert_eq!(notes.len(), 4, "{notes:?}");
}

#[test]
fn a_truncated_file_is_an_error_and_never_zeroes() {
    let whole = Crafted::new();
    let dir = TempDir::new().unwrap();
    let path = write(dir.path(), "whole.qcow2", &whole.bytes);
    let want = all_bytes(&open(&path)).unwrap();
    for len in (1..9 * CLUSTER).step_by(509).chain([103, 104, 112, L1_AT + 7, L1_AT + 8]) {
        let path = write(dir.path(), "cut.qcow2", &whole.bytes[..len]);
        let Ok(view) = try_open(&path) else { continue };
        for (index, want) in want.chunks(CLUSTER).enumerate() {
            let mut got = vec![0xee; CLUSTER];
            if view.read_at(&mut got, GuestOffset((index * CLUSTER) as u64)).is_ok() {
                assert!(got == want, "file of {len} bytes, cluster {index}");
            }
        }
    }
}

#[test]
fn damaged_and_odd_streams_are_judged_as_qemu_does() {
    let short = deflate(&pattern(1)[..CLUSTER - 1]);
    let image = with(|image| image.put(PACKED_AT, &short).l2(4, packed(PACKED_AT, short.len())));
    let dir = TempDir::new().unwrap();
    let path = write(dir.path(), "image.qcow2", &image.bytes);
    let view = open(&path);
    let error = view.read_at(&mut [0; 1], GuestOffset(4 * CLUSTER as u64)).unwrap_err();
    assert!(error.to_string().contains("deflate stream ends early"), "{error}");
    let bomb = deflate(&[pattern(1), vec![0; 8 << 20]].concat());
    let mut image = Crafted::new();
    let at = image.bytes.len();
    image.bytes.extend(&bomb);
    image.l2(4, COMPRESSED | 15 << SECTORS_SHIFT | at as u64);
    reads(&image, 4, &pattern(1));
}

/// The fields of the crafted image that a reader looks at, by place and width in bytes.
fn fields() -> Vec<(usize, usize)> {
    let words = [4, 16, 20, 32, 36, 56, 60, 96, 100, 112, 116].map(|at| (at, 4));
    let quads = [8, 24, 40, 48, 64, 72, 80, 88, 104, L1_AT].map(|at| (at, 8));
    let entries = (0..CLUSTERS).map(|n| (L2_AT + 8 * n, 8));
    words.into_iter().chain(quads).chain(entries).collect()
}

/// A value at an edge: of the field, of the file, or a flipped bit of what was there.
fn edge(random: &mut Random, old: u64, bits: u32) -> u64 {
    let interesting = [0, 1, 2, 511, 512, 4095, 4096, 4097, 8191, 8192, 9 * 4096, 9 * 4096 - 1];
    match random.below(6) {
        0 => interesting[random.index(interesting.len())],
        1 => u64::MAX >> random.below(64),
        2 => old ^ 1 << random.below(u64::from(bits)),
        3 => old.wrapping_add(random.below(5)).wrapping_sub(2),
        4 => (random.below(10) * 4096) | (random.below(4) << 62) | random.below(2),
        _ => old ^ 512 << random.below(8),
    }
}

fn mutate(image: &mut Crafted, random: &mut Random) -> String {
    let all = fields();
    let (at, len) = all[random.index(all.len())];
    let mut old = [0; 8];
    old[8 - len..].copy_from_slice(&image.bytes[at..at + len]);
    let bits = if len == 4 { 32 } else { 64 };
    let value = edge(random, u64::from_be_bytes(old), bits);
    image.put(at, &value.to_be_bytes()[8 - len..]);
    format!("byte {at:#x} = {value:#x}; ")
}

/// Compares what is accepted with qemu; true if all bytes could be read.
fn compare_if_accepted(bytes: &[u8], dir: &Path, what: &str) -> bool {
    let path = write(dir, "image.qcow2", bytes);
    let Ok(view) = try_open(&path) else { return false };
    assert!(view.size_bytes() <= 64 << 20, "{what}");
    let whole = inspect(&File::open(&path).unwrap(), &path, None, &Terms::default());
    let Ok(got) = all_bytes(&view) else { return false };
    assert!(whole.is_ok(), "{what}: all bytes read, but inspect: {whole:?}");
    // A snapshot table is nothing to a reader; qemu reads it, and may refuse it.
    if view.info().snapshots != Some(0) {
        return false;
    }
    let want = qemu_bytes(&path);
    assert!(want.is_some(), "{what}: qemu refuses it");
    assert!(want.unwrap() == got, "{what}: other bytes than qemu");
    true
}

/// Seeds to try: `QCOW2_SEED` is the first, `QCOW2_RUNS` how many.
fn seeds() -> std::ops::Range<u64> {
    let number = |name| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    let first = number("QCOW2_SEED").unwrap_or(0);
    first..first + number("QCOW2_RUNS").unwrap_or(400)
}

#[test]
fn whatever_is_changed_the_bytes_are_qemus_or_there_is_an_error() {
    if !have_qemu() {
        return;
    }
    let dir = TempDir::new().unwrap();
    let mut accepted = 0;
    for seed in seeds() {
        let mut random = Random(seed);
        let mut image = Crafted::new();
        let changes: String =
            (0..=random.below(3)).map(|_| mutate(&mut image, &mut random)).collect();
        let what = format!("seed {seed}: {changes}");
        accepted += u64::from(compare_if_accepted(&image.bytes, dir.path(), &what));
    }
    assert!(accepted > seeds().count() as u64 / 10, "only {accepted} images were accepted");
}

#[test]
fn flipped_bits_give_qemus_bytes_or_an_error() {
    if !have_qemu() {
        return;
    }
    let dir = TempDir::new().unwrap();
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/seeds/qcow2_tables");
    let names =
        ["v2_512_zlib", "v3_512_zstd", "v3_512_plain", "v3_1024_lazy", "v3_4096", "v3_512_bitmaps"];
    let images = names.map(|name| std::fs::read(folder.join(name)).unwrap());
    let mut accepted = 0;
    for seed in seeds() {
        let mut random = Random(seed);
        let n = random.index(images.len());
        let mut bytes = images[n].clone();
        let mut what = format!("seed {seed}, {}: bits", names[n]);
        for _ in 0..=random.below(3) {
            // Most of an image is nothing to a reader; half of the flips hit what is not zero.
            let mut at = random.index(bytes.len());
            if random.below(2) == 0 {
                at = (at..bytes.len()).find(|&at| bytes[at] != 0).unwrap_or(at);
            }
            let bit = random.below(8);
            bytes[at] ^= 1 << bit;
            what += &format!(" {at:#x}.{bit}");
        }
        accepted += u64::from(compare_if_accepted(&bytes, dir.path(), &what));
    }
    assert!(accepted > seeds().count() as u64 / 10, "only {accepted} images were accepted");
}
