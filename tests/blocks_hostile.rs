//! Damaged, odd and truncated VMDK, VHD and VHDX images: qemu's bytes, or a refusal that names the
//! field.
#![expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod blocks_common;
mod qcow2_common;

use std::fs::File;
use std::path::Path;

use bedplate::disk::Sealed;
use bedplate::image::qcow2::Terms;
use bedplate::image::{
    Class, DecodedCache, Format, ImageError, Inspection, Verdict, View, inspect,
};
use bedplate::units::GuestOffset;
use blocks_common::*;
use qcow2_common::{Random, all_bytes, assert_same, have_qemu, qemu_bytes_as, write};
use tempfile::TempDir;

fn try_open(path: &Path, format: Format) -> Result<View, ImageError> {
    let sealed = Sealed::open_path(path).unwrap();
    View::open_with_cache(sealed, Some(format), DecodedCache::new(1 << 20))
}

fn try_inspect(path: &Path, format: Format) -> Result<bedplate::image::Info, ImageError> {
    inspect(&File::open(path).unwrap(), path, Some(format), &Terms::default())
}

/// Asserts that opening and inspecting fail, and name `field` and its place.
fn refused(image: &Crafted, field: &'static str, at: usize) {
    let dir = TempDir::new().unwrap();
    let path = write(dir.path(), "image", &image.bytes);
    let opened = try_open(&path, image.format).unwrap_err();
    let inspected = try_inspect(&path, image.format).unwrap_err();
    for error in [opened, inspected] {
        let place = error.place().map(|(field, at)| (field, at.0));
        assert_eq!(place, Some((field, at as u64)), "{error}");
        assert_eq!(error.class(), Class::Refuse);
    }
    let file = File::open(&path).unwrap();
    let seen = Inspection::of_file(&file, &path, Some(image.format), &Terms::default()).unwrap();
    assert_eq!((seen.verdict, seen.findings[0].field), (Verdict::Refused, Some(field)));
}

/// Asserts that inspecting fails, that reading block `index` fails with the same words, and that
/// `other` stays readable.
fn entry_refused(image: &Crafted, at: usize, index: usize, other: usize, need: &str) {
    let dir = TempDir::new().unwrap();
    let path = write(dir.path(), "image", &image.bytes);
    let words = format!("table entry at byte {at:#x} is ");
    let inspected = try_inspect(&path, image.format).unwrap_err().to_string();
    let view = try_open(&path, image.format).unwrap();
    let block = view.info().cluster_size_bytes.unwrap();
    let guest = |index: usize| GuestOffset(index as u64 * block);
    let read = view.read_at(&mut [0; 1], guest(index)).unwrap_err();
    assert_eq!(read.class(), Class::Refuse);
    let run = view.run_at(guest(index), 1).unwrap_err().to_string();
    for said in [inspected, read.to_string(), run] {
        assert!(said.contains(&words) && said.contains(need), "{said}\nneed: {words}, {need}");
    }
    view.read_at(&mut [0; 1], guest(other)).unwrap();
}

fn with(mut image: Crafted, change: impl FnOnce(&mut Crafted) -> &mut Crafted) -> Crafted {
    change(&mut image);
    image.sum();
    image
}

#[test]
fn the_crafted_images_are_sound_and_read_as_with_qemu() {
    for (name, image, disk) in all() {
        let dir = TempDir::new().unwrap();
        let path = write(dir.path(), "image", &image.bytes);
        let info = try_inspect(&path, image.format).unwrap();
        assert!(info.notes.is_empty(), "{name}: {:?}", info.notes);
        assert_same(&try_open(&path, image.format).unwrap(), &disk, name);
        if have_qemu() {
            let want = qemu_bytes_as(&path, image.qemu_format());
            assert!(want.as_ref() == Some(&disk), "{name}: qemu has other bytes");
        }
    }
}

#[test]
fn vmdk_header_fields_out_of_range_are_refused_by_name() {
    for (field, at, value) in [
        ("version", 4, 0_u32),
        ("version", 4, 4),
        ("flags", 8, 8),
        ("flags", 8, 0x1_0001),
        ("flags", 8, 0x2_0001),
        ("numGTEsPerGT", 44, 0),
        ("numGTEsPerGT", 44, 511),
        ("numGTEsPerGT", 44, 1024),
        ("singleEndLineChar", 73, 0x0a0d_0d0a),
    ] {
        refused(&with(vmdk(), |image| image.put(at, &value.to_le_bytes())), field, at);
    }
    for (field, at, value) in [
        ("capacity", 12, 0_u64),
        ("capacity", 12, 1 << 36),
        ("capacity", 12, u64::MAX),
        ("grainSize", 20, 0),
        ("grainSize", 20, 4),
        ("grainSize", 20, 12),
        ("grainSize", 20, 8192),
        ("grainSize", 20, 1 << 63),
        ("descriptorOffset", 28, 0),
        ("descriptorOffset", 28, 2),
        ("descriptorOffset", 28, 1 << 55),
        ("descriptorOffset", 28, u64::MAX),
        ("descriptorSize", 36, 0),
        ("descriptorSize", 36, 129),
        ("gdOffset", 56, 0),
        ("gdOffset", 56, 20),
        ("gdOffset", 56, 1000),
        ("gdOffset", 56, 1 << 55),
        ("overHead", 64, 1000),
    ] {
        refused(&with(vmdk(), |image| image.put(at, &value.to_le_bytes())), field, at);
    }
    refused(&with(vmdk(), |image| image.put(77, &[1])), "compressAlgorithm", 77);
    refused(&with(packed_vmdk(false), |image| image.put(77, &[0])), "compressAlgorithm", 77);
}

#[test]
fn kinds_of_vmdk_that_name_other_files_or_are_a_part_are_refused() {
    for magic in
        [&b"COWD"[..], b"# Disk DescriptorFile\nversion=1\n", &0xcafe_babe_u64.to_le_bytes()]
    {
        refused(&with(vmdk(), |image| image.put(0, magic)), "magic", 0);
    }
    for (from, to, field) in [
        ("parentCID=ffffffff", "parentCID=1234abcd", "parentCID"),
        ("createType=\"monolithicSparse\"", "parentFileNameHint=\"a.vmdk\" ", "parentFileNameHint"),
        ("SPARSE", "VMFS  ", "extent"),
        ("ddb.adapterType = \"ide\"", "RW 125 SPARSE \"b.vmdk\" ", "extent"),
    ] {
        let image = vmdk();
        let text = String::from_utf8(image.bytes[DESCRIPTOR_AT..GD_AT].to_vec()).unwrap();
        let changed = text.replace(from, to);
        assert!(changed.len() <= text.len() + 4 && changed != text, "{to}");
        let at = text[..text.find(from).unwrap()].rfind('\n').unwrap() + 1;
        let changed = changed.as_bytes()[..text.len() - 16].to_vec();
        refused(
            &with(image, |image| image.put(DESCRIPTOR_AT, &changed)),
            field,
            DESCRIPTOR_AT + at,
        );
    }
    let none = with(vmdk(), |image| image.put(DESCRIPTOR_AT + 21, &[0]));
    refused(&none, "extent", DESCRIPTOR_AT);
}

#[test]
fn grain_tables_are_inside_the_file_and_clear_of_all_else() {
    let field = "grain directory entry";
    for sector in [1_u32, 20, 21, 1000, u32::MAX] {
        refused(&with(vmdk(), |image| image.put(GD_AT, &sector.to_le_bytes())), field, GD_AT);
    }
    // Two spans of 512 grains: with one table for both, or with tables that overlap.
    for second in [22_u32, 23, 25] {
        let image = with(vmdk(), |image| {
            image.put(12, &(2 * 4096_u64).to_le_bytes()).put(GD_AT + 4, &second.to_le_bytes())
        });
        refused(&image, field, GD_AT + 4);
    }
}

#[test]
fn a_footer_must_be_one() {
    let whole = packed_vmdk(true);
    let len = whole.bytes.len();
    let end = len - SECTOR;
    for (at, field) in
        [(end - 2 * SECTOR + 12, "marker type"), (end - 2 * SECTOR + 8, "marker size")]
    {
        refused(&with(whole.clone(), |image| image.put(at, &[9])), field, at);
    }
    refused(&with(whole.clone(), |image| image.put(end, &[1])), "marker value", end);
    refused(&with(whole.clone(), |image| image.put(end + 12, &[1])), "marker type", end + 12);
    refused(&with(whole.clone(), |image| image.put(end - SECTOR, &[0])), "magic", end - SECTOR);
    let at = end - SECTOR + 56;
    refused(&with(whole.clone(), |image| image.put(at, &[0xff; 8])), "gdOffset", at);
    let mut cut = whole;
    cut.bytes.truncate(len - 1);
    refused(&cut, "file length", 0);
}

#[test]
fn table_entries_past_the_end_or_in_metadata_are_refused() {
    let inside = "a block inside the file";
    let clear = "a block clear of header and tables";
    let vmdk_end = u32::try_from(vmdk().bytes.len() / SECTOR).unwrap();
    for (sector, need) in [
        (vmdk_end - 7, inside),
        (u32::MAX, inside),
        (2, clear),
        (14, clear),
        (21, clear),
        (25, clear),
    ] {
        let image = with(vmdk(), |image| gte(image, 0, sector));
        entry_refused(&image, GT_AT, 0, 1, need);
    }
    let packed_end = u32::try_from(packed_vmdk(true).bytes.len() / SECTOR).unwrap();
    for (sector, need) in
        [(packed_end, inside), (packed_end - 1, clear), (packed_end - 3, clear), (22, clear)]
    {
        let image = with(packed_vmdk(true), |image| gte(image, 1, sector));
        entry_refused(&image, GT_AT + 4, 1, 0, need);
    }
    // Without the flag, 1 is the sector of the descriptor.
    let image = with(vmdk(), |image| image.put(8, &1_u32.to_le_bytes()));
    entry_refused(&image, GT_AT + 8, 2, 0, clear);

    let vhd_end = u32::try_from(vhd().bytes.len() / SECTOR).unwrap();
    for (sector, need) in [
        (vhd_end - 8, inside),
        (vhd_end - 9, clear),
        (u32::MAX - 1, inside),
        (0, clear),
        (1, clear),
        (3, clear),
    ] {
        let image = with(vhd(), |image| vhd_entry(image, 1, sector));
        entry_refused(&image, VHD_TABLE_AT + 4, 1, 0, need);
    }
    for (mib, state, need) in [
        (6, 6, inside),
        (!0 >> 20, 6, inside),
        (0, 6, clear),
        (1, 6, clear),
        (2, 6, clear),
        (3, 6, clear),
        (4, 7, "no block that is partly in a parent"),
        (4, 4, "a payload state"),
    ] {
        let image = with(vhdx(), |image| vhdx_entry(image, 1, mib << 20 | state));
        entry_refused(&image, BAT_AT + 8, 1, 0, need);
    }
}

#[test]
fn vhd_fields_out_of_range_are_refused_by_name() {
    for (field, at, bytes) in [
        ("file format version", 12, &[0, 2][..]),
        ("data offset", 16, &[0xff; 8]),
        ("data offset", 16, &0_u64.to_be_bytes()),
        ("data offset", 16, &1024_u64.to_be_bytes()),
        ("current size", 48, &[0; 8]),
        ("current size", 48, &[0x7f; 8]),
        ("disk geometry", 56, &[0, 0]),
        ("disk type", 60, &[0, 0, 0, 2]),
        ("disk type", 60, &[0, 0, 0, 4]),
        ("disk type", 60, &[0, 0, 0, 5]),
        ("table offset", VHD_HEADER_AT + 16, &[0xff; 8]),
        ("table offset", VHD_HEADER_AT + 16, &0_u64.to_be_bytes()),
        ("table offset", VHD_HEADER_AT + 16, &1024_u64.to_be_bytes()),
        ("header version", VHD_HEADER_AT + 24, &[0, 0]),
        ("max table entries", VHD_HEADER_AT + 28, &15_u32.to_be_bytes()),
        ("table offset", VHD_HEADER_AT + 16, &(32 * SECTOR as u64 - 60).to_be_bytes()),
        ("block size", VHD_HEADER_AT + 32, &0_u32.to_be_bytes()),
        ("block size", VHD_HEADER_AT + 32, &256_u32.to_be_bytes()),
        ("block size", VHD_HEADER_AT + 32, &4097_u32.to_be_bytes()),
    ] {
        let image = with(vhd(), |image| {
            if field == "disk geometry" {
                image.put(28, b"vpc ");
            }
            image.put(at, bytes)
        });
        refused(&image, field, at);
    }
    let mut image = vhd();
    image.put(24, &[1]);
    refused(&image, "footer checksum", 64);
    let mut image = vhd();
    image.put(VHD_HEADER_AT + 100, &[1]);
    refused(&image, "header checksum", VHD_HEADER_AT + 36);
    let footer = DISK;
    refused(&with(fixed_vhd(), |image| image.put(footer, b"x")), "cookie", footer);
    let differencing = with(fixed_vhd(), |image| image.put(footer + 63, &[4]));
    refused(&differencing, "disk type", footer + 60);
    let longer =
        with(fixed_vhd(), |image| image.put(footer + 48, &(DISK as u64 + 512).to_be_bytes()));
    refused(&longer, "current size", footer + 48);
}

#[test]
fn a_vhd_without_its_last_footer_is_read_and_noted() {
    let mut image = vhd();
    let end = image.bytes.len() - SECTOR;
    image.put(end, &[0; SECTOR]);
    let dir = TempDir::new().unwrap();
    let path = write(dir.path(), "image", &image.bytes);
    assert_eq!(try_inspect(&path, Format::Vhd).unwrap().notes.len(), 1);
    let disk = all().into_iter().find(|(name, ..)| *name == "vhd").unwrap().2;
    assert_same(&try_open(&path, Format::Vhd).unwrap(), &disk, "no footer");
}

#[test]
fn vhdx_fields_out_of_range_are_refused_by_name() {
    let (first, second) = (HEADERS_AT[0], HEADERS_AT[1]);
    let region = REGIONS_AT + 16;
    let unknown = guid("00112233-4455-6677-8899-aabbccddeeff");
    for (field, at, bytes) in [
        ("log GUID", second + 48, &[1][..]),
        ("log version", second + 64, &[1]),
        ("log offset", second + 72, &(MIB as u64 / 2).to_le_bytes()),
        ("log offset", second + 72, &(6 * MIB as u64).to_le_bytes()),
        ("log offset", second + 72, &[0xff; 8]),
        ("region table entry count", REGIONS_AT + 8, &2048_u32.to_le_bytes()),
        ("region table entry count", REGIONS_AT + 8, &1_u32.to_le_bytes()),
        ("region", region, &unknown),
        ("region offset", region + 16, &0_u64.to_le_bytes()),
        ("region offset", region + 16, &(LOG_AT as u64).to_le_bytes()),
        ("region offset", region + 16, &(6 * MIB as u64).to_le_bytes()),
        ("region offset", region + 16, &(3 * MIB as u64 + 4096).to_le_bytes()),
        ("metadata entry count", META_AT + 10, &2048_u16.to_le_bytes()),
        ("metadata entry count", META_AT + 10, &3_u16.to_le_bytes()),
        ("metadata item", META_AT + 32 + 64, &unknown),
        ("metadata item offset", META_AT + 32 + 16, &0_u32.to_le_bytes()),
        ("metadata item offset", META_AT + 32 + 16, &(MIB32 - 7).to_le_bytes()),
        ("block size", ITEMS_AT, &(MIB32 / 2).to_le_bytes()),
        ("block size", ITEMS_AT, &(MIB32 * 3).to_le_bytes()),
        ("block size", ITEMS_AT, &(MIB32 * 512).to_le_bytes()),
        ("file parameters", ITEMS_AT + 4, &[2]),
        ("virtual disk size", ITEMS_AT + 16, &0_u64.to_le_bytes()),
        ("virtual disk size", ITEMS_AT + 16, &513_u64.to_le_bytes()),
        ("virtual disk size", ITEMS_AT + 16, &u64::MAX.to_le_bytes()),
        ("logical sector size", ITEMS_AT + 48, &1024_u32.to_le_bytes()),
    ] {
        refused(&with(vhdx(), |image| image.put(at, bytes)), field, at);
    }
    // Two headers of one number may only be the same.
    let same = with(vhdx(), |image| image.put(second + 8, &[7]));
    let dir = TempDir::new().unwrap();
    try_inspect(&write(dir.path(), "image", &same.bytes), Format::Vhdx).unwrap();
    let unlike = with(same, |image| image.put(second + 16, &[8]));
    refused(&unlike, "sequence number", second + 8);
    // The size is for sectors of 512 bytes only.
    let image = with(vhdx(), |image| image.put(ITEMS_AT + 48, &4096_u32.to_le_bytes()));
    refused(&image, "virtual disk size", ITEMS_AT + 16);
    let image = with(vhdx(), |image| image.put(META_AT, b"metadatb"));
    refused(&image, "region offset", REGIONS_AT + 16 + 32 + 16);
    let table =
        with(vhdx(), |image| image.put(ITEMS_AT + 16, &((1_u64 << 37) + (1 << 30)).to_le_bytes()));
    refused(&table, "region offset", REGIONS_AT + 16 + 16);
    let mut sum = vhdx();
    sum.put(REGIONS_AT + 9000, &[1]);
    refused(&sum, "region table checksum", REGIONS_AT + 4);
    let mut sums = vhdx();
    sums.put(first + 3000, &[1]).put(second + 3000, &[1]);
    refused(&sums, "header checksum", first + 4);
    let versions = with(vhdx(), |image| image.put(first + 66, &[2]).put(second + 66, &[2]));
    refused(&versions, "header version", first + 66);
}

#[test]
fn of_two_vhdx_headers_the_newer_sound_one_counts() {
    let dir = TempDir::new().unwrap();
    let (first, second) = (HEADERS_AT[0], HEADERS_AT[1]);
    // The older one speaks of a log: nobody asks it.
    let old = with(vhdx(), |image| image.put(first + 48, &[1]));
    let path = write(dir.path(), "image", &old.bytes);
    assert!(try_inspect(&path, Format::Vhdx).unwrap().notes.is_empty());
    let mut torn = old.clone();
    torn.put(second + 3000, &[1]);
    refused(&torn, "log GUID", first + 48);
    let mut torn = vhdx();
    torn.put(second + 3000, &[1]);
    let path = write(dir.path(), "image", &torn.bytes);
    assert_eq!(try_inspect(&path, Format::Vhdx).unwrap().notes.len(), 1);
}

#[test]
fn vhdx_entries_of_sector_bitmaps_are_passed_over() {
    // Sectors of 4096 bytes and blocks of 256 MiB: a bitmap after each 128. With sectors of 512
    // bytes it is after each 16, so that block 16 has the 18th entry.
    let mut image = vhdx();
    image.put(ITEMS_AT, &(256 * MIB32).to_le_bytes());
    image.put(ITEMS_AT + 16, &(20 * 256 * MIB as u64).to_le_bytes());
    image.put(BAT_AT, &[0; 8 * 32]);
    vhdx_entry(&mut image, 17, (8 * MIB as u64) | 6);
    image.bytes.resize(8 * MIB, 0);
    image.bytes.extend(pattern(5, MIB));
    image.bytes.resize(8 * MIB + 256 * MIB, 0);
    let dir = TempDir::new().unwrap();
    for (sector, block) in [(512_u32, 16_u64), (4096, 17)] {
        image.put(ITEMS_AT + 48, &sector.to_le_bytes());
        let path = write(dir.path(), "image", &image.bytes);
        let info = try_inspect(&path, Format::Vhdx).unwrap();
        assert_eq!(info.clusters.unwrap().data, 1);
        let view = try_open(&path, Format::Vhdx).unwrap();
        let mut got = vec![0; MIB];
        view.read_at(&mut got, GuestOffset(block << 28)).unwrap();
        assert!(got == pattern(5, MIB), "sectors of {sector}");
    }
}

#[test]
fn truncated_files_are_an_error_and_never_zeroes() {
    let dir = TempDir::new().unwrap();
    for (name, whole, disk) in all() {
        let len = whole.bytes.len();
        let step = if len > MIB { 199_999 } else { 331 };
        let near = (1..40).map(|n| len - n).chain((len - 3000..len).step_by(97));
        for cut in (1..len).step_by(step).chain(near) {
            let path = write(dir.path(), "image", &whole.bytes[..cut]);
            let Ok(view) = try_open(&path, whole.format) else { continue };
            for (at, want) in (0..).step_by(BLOCK).zip(disk.chunks(BLOCK)) {
                let mut got = vec![0xee; want.len()];
                if view.read_at(&mut got, GuestOffset(at)).is_ok() {
                    assert!(got == want, "{name}: file of {cut} bytes, byte {at:#x}");
                }
            }
        }
    }
}

#[test]
fn damaged_and_odd_grains_are_errors() {
    let whole = packed_vmdk(false);
    let at = GRAINS_AT;
    let short = zlib(&pattern(1, BLOCK - 1));
    let long = zlib(&pattern(1, BLOCK + 1));
    let mut sum = zlib(&pattern(1, BLOCK));
    *sum.last_mut().unwrap() ^= 1;
    let len = |bytes: &[u8]| u32::try_from(bytes.len()).unwrap().to_le_bytes();
    let cases: [(Vec<u8>, &str); 6] = [
        ([&len(&short)[..], &short].concat(), "zlib stream ends early"),
        ([&len(&long)[..], &long].concat(), "zlib stream longer than the block"),
        ([&len(&sum)[..], &sum].concat(), "damaged zlib stream"),
        (vec![0; 4], "length of 0"),
        (8193_u32.to_le_bytes().to_vec(), "more than two grains"),
        (vec![0, 0x1f, 0, 0], "ends past the file"),
    ];
    for (bytes, words) in cases {
        let image = with(whole.clone(), |image| image.put(at + 8, &bytes));
        let dir = TempDir::new().unwrap();
        let path = write(dir.path(), "image", &image.bytes);
        let view = try_open(&path, Format::Vmdk).unwrap();
        let error = view.read_at(&mut [0; 1], GuestOffset(0)).unwrap_err();
        assert_eq!(error.class(), Class::Refuse);
        assert!(error.to_string().contains(words), "{error}\nneed: {words}");
        view.read_at(&mut [0; 1], GuestOffset(2 * BLOCK as u64)).unwrap();
        if have_qemu() && words != "ends past the file" {
            assert_eq!(qemu_bytes_as(&path, "vmdk"), None, "{words}: qemu reads it");
        }
    }
}

/// The bytes of an image that a reader looks at.
fn fields(image: &Crafted) -> Vec<std::ops::Range<usize>> {
    match image.format {
        Format::Vmdk => {
            let end = image.bytes.len();
            let footer = end - 3 * SECTOR..end - 2 * SECTOR + 80;
            let entries = GT_AT..GT_AT + 4 * BLOCKS;
            vec![0..80, 0..80, GD_AT..GD_AT + 4, entries, GRAINS_AT..GRAINS_AT + 16, footer]
        }
        Format::Vhd => {
            let end = image.bytes.len() - SECTOR;
            let header = VHD_HEADER_AT..VHD_HEADER_AT + 40;
            vec![0..85, header, VHD_TABLE_AT..VHD_TABLE_AT + 4 * BLOCKS, end..end + 85]
        }
        Format::Vhdx => vec![
            HEADERS_AT[1]..HEADERS_AT[1] + 80,
            REGIONS_AT..REGIONS_AT + 80,
            META_AT..META_AT + 32 * 6,
            ITEMS_AT..ITEMS_AT + 68,
            BAT_AT..BAT_AT + 32,
            BAT_AT..BAT_AT + 32,
        ],
        Format::Raw | Format::Qcow2 => Vec::new(),
    }
}

fn mutate(image: &mut Crafted, random: &mut Random) -> String {
    let all = fields(image);
    let range = all[random.index(all.len())].clone();
    let at = range.start + random.index(range.len());
    let old = image.bytes[at];
    let value = match random.below(4) {
        0 => [0, 1, 2, 7, 8, 0x7f, 0x80, 0xff][random.index(8)],
        1 => old ^ 1 << random.below(8),
        2 => old.wrapping_add(random.next().to_le_bytes()[0] % 5).wrapping_sub(2),
        _ => random.next().to_le_bytes()[0],
    };
    image.put(at, &[value]);
    format!("byte {at:#x} = {value:#x} (was {old:#x}); ")
}

/// Seeds to try: `BLOCKS_SEED` is the first, `BLOCKS_RUNS` how many.
fn seeds() -> std::ops::Range<u64> {
    let number = |name| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    let first = number("BLOCKS_SEED").unwrap_or(0);
    first..first + number("BLOCKS_RUNS").unwrap_or(600)
}

#[test]
fn a_changed_image_of_blocks_has_qemu_s_bytes_or_an_error() {
    if !have_qemu() {
        return;
    }
    let dir = TempDir::new().unwrap();
    let (all, mut accepted) = (all(), [0; 6]);
    for seed in seeds() {
        let mut random = Random(seed);
        let n = random.index(all.len());
        let (name, whole, _) = &all[n];
        let mut image = whole.clone();
        let changes: String =
            (0..=random.below(2)).map(|_| mutate(&mut image, &mut random)).collect();
        image.sum();
        let what = format!("seed {seed}, {name}: {changes}");
        let path = write(dir.path(), "image", &image.bytes);
        let Ok(view) = try_open(&path, image.format) else { continue };
        if view.size_bytes() > 64 << 20 {
            continue;
        }
        let whole = try_inspect(&path, image.format);
        let Ok(got) = all_bytes(&view) else { continue };
        assert!(whole.is_ok(), "{what}: all bytes read, but inspect: {whole:?}");
        let want = qemu_bytes_as(&path, image.qemu_format());
        assert!(want.is_some(), "{what}: qemu refuses it");
        assert!(want.unwrap() == got, "{what}: other bytes than qemu");
        accepted[n] += 1;
    }
    let least = seeds().count() / 100;
    assert!(accepted.iter().all(|&count| count > least), "accepted of each: {accepted:?}");
}

#[test]
fn the_fuzzer_s_seeds_are_these_images() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/seeds/block_formats");
    for (name, image, _) in all() {
        // A VHDX is a megabyte at least: its seed has the parts of it that count.
        let bytes = match image.format {
            Format::Vhdx => vhdx_parts(&image),
            Format::Raw | Format::Qcow2 | Format::Vmdk | Format::Vhd => image.bytes,
        };
        if std::env::var_os("WRITE_SEEDS").is_some() {
            std::fs::create_dir_all(&folder).unwrap();
            std::fs::write(folder.join(name), &bytes).unwrap();
        }
        assert!(std::fs::read(folder.join(name)).unwrap() == bytes, "{name}");
    }
}
