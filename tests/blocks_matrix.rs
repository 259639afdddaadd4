//! Every byte of VMDK, VHD and VHDX images that qemu's tools make is the byte that `qemu-img
//! convert` gives.
#![expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod blocks_common;
mod qcow2_common;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use bedplate::disk::Sealed;
use bedplate::image::qcow2::Terms;
use bedplate::image::{
    DecodedCache, Format, Inspection, Opening, RunKind, Verdict, View, detect, inspect, peek,
};
use bedplate::units::GuestOffset;
use blocks_common::qemu_name;
use qcow2_common::{Random, assert_same, have_qemu, qemu_bytes_as, qemu_io_as, raw_disk, run};
use tempfile::TempDir;

fn open(image: &Path, format: Format) -> View {
    let sealed = Sealed::open_path(image).unwrap();
    View::open_with_cache(sealed, Some(format), DecodedCache::new(8 << 20)).unwrap()
}

/// Compares the image with qemu, and with a full inspection.
fn compare(image: &Path, format: Format, name: &str) {
    let want = qemu_bytes_as(image, qemu_name(format))
        .unwrap_or_else(|| panic!("{name}: qemu-img refuses it"));
    let file = File::open(image).unwrap();
    let info = inspect(&file, image, Some(format), &Terms::default())
        .unwrap_or_else(|e| panic!("{name}: {e}"));
    assert_eq!(info.virtual_size_bytes, want.len() as u64, "{name}");
    assert_eq!(peek(&file, image, Some(format)).unwrap().virtual_size_bytes, want.len() as u64);
    if let Some(clusters) = info.clusters {
        let count = clusters.data + clusters.zero + clusters.compressed;
        let blocks = info.virtual_size_bytes.div_ceil(info.cluster_size_bytes.unwrap());
        assert_eq!(count, blocks, "{name}");
        let mut head = [0; 512];
        file.read_exact_at(&mut head, 0).unwrap();
        assert_eq!(detect(&head), format, "{name}");
    }
    let seen = Inspection::of_file(&file, image, Some(format), &Terms::default()).unwrap();
    assert_eq!(seen.verdict, Verdict::Ok, "{name}: {seen:?}");
    assert_same(&open(image, format), &want, name);
}

fn create(dir: &Path, format: Format, options: &str, size: u64) -> PathBuf {
    let image = dir.join("image");
    let _may_not_exist = std::fs::remove_file(&image);
    let (path, size) = (image.to_str().unwrap(), size.to_string());
    let mut args = vec!["create", "-q", "-f", qemu_name(format)];
    if !options.is_empty() {
        args.extend(["-o", options]);
    }
    args.extend([path, &size]);
    run("qemu-img", &args);
    image
}

fn convert(from: &Path, dir: &Path, format: Format, options: &str) -> PathBuf {
    let image = dir.join("image");
    let _may_not_exist = std::fs::remove_file(&image);
    let (path, from) = (image.to_str().unwrap(), from.to_str().unwrap());
    let mut args = vec!["convert", "-q", "-f", "raw", "-O", qemu_name(format)];
    if !options.is_empty() {
        args.extend(["-o", options]);
    }
    args.extend([from, path]);
    run("qemu-img", &args);
    image
}

/// Writes and, where the format knows them, zero writes at places of any alignment.
fn commands(random: &mut Random, size: u64, zeroes: bool) -> Vec<String> {
    let mut commands = Vec::new();
    for n in 0..16 {
        let at = random.below(size / 512) * 512;
        let len = (random.below((size - at).min(300_000) / 512 + 1) * 512).max(512).min(size - at);
        let pattern = random.below(255) + 1;
        commands.push(match n % 4 {
            3 if zeroes => format!("write -z {at} {len}"),
            _ => format!("write -P {pattern} {at} {len}"),
        });
    }
    commands
}

/// Formats, options, and whether qemu can write zeroes to such an image.
const CREATED: [(Format, &str, bool); 13] = [
    (Format::Vmdk, "subformat=monolithicSparse", false),
    (Format::Vmdk, "subformat=monolithicSparse,zeroed_grain=on", true),
    (Format::Vmdk, "subformat=monolithicSparse,compat6", false),
    (Format::Vhd, "subformat=dynamic", false),
    (Format::Vhd, "subformat=dynamic,force_size=on", false),
    (Format::Vhd, "subformat=fixed", false),
    (Format::Vhd, "subformat=fixed,force_size=on", false),
    (Format::Vhdx, "", false),
    (Format::Vhdx, "subformat=fixed", false),
    (Format::Vhdx, "block_size=1M,log_size=1M", false),
    (Format::Vhdx, "block_size=2M,log_size=8M,block_state_zero=off", false),
    (Format::Vhdx, "block_size=16M,subformat=fixed", false),
    (Format::Vhdx, "block_size=256M", false),
];

#[test]
fn created_and_written_images_of_every_kind() {
    if !have_qemu() {
        return;
    }
    let dir = TempDir::new().unwrap();
    let mut random = Random(1);
    for (format, options, zeroes) in CREATED {
        for size in [512, 65_536, (5 << 20) + 512 * (1 + random.below(64)), 21 << 20] {
            let name = format!("{format} {options} size {size}");
            let image = create(dir.path(), format, options, size);
            compare(&image, format, &format!("{name}, empty"));
            // What it was rounded to.
            let size = open(&image, format).size_bytes().min(size);
            qemu_io_as(qemu_name(format), &image, &commands(&mut random, size, zeroes));
            compare(&image, format, &name);
        }
    }
}

#[test]
fn converted_images_of_every_kind() {
    if !have_qemu() {
        return;
    }
    let dir = TempDir::new().unwrap();
    let mut random = Random(2);
    let packed = (Format::Vmdk, "subformat=streamOptimized", false);
    for (format, options, _) in CREATED.into_iter().chain([packed]) {
        for size in [3 << 20, 9 * 65_536 + 512 * (1 + random.below(100)), (12 << 20) + 1536] {
            let disk = raw_disk(dir.path(), size, &mut random);
            let image = convert(&disk, dir.path(), format, options);
            compare(&image, format, &format!("{format} {options} size {size}"));
        }
    }
}

#[test]
fn the_directory_at_the_end_of_a_stream_is_found() {
    if !have_qemu() {
        return;
    }
    let dir = TempDir::new().unwrap();
    let disk = raw_disk(dir.path(), (70 << 20) + 512, &mut Random(3));
    let image = convert(&disk, dir.path(), Format::Vmdk, "subformat=streamOptimized");
    let mut bytes = std::fs::read(&image).unwrap();
    bytes.resize(bytes.len().next_multiple_of(512), 0);
    let header = bytes[..512].to_vec();
    let mut marker = [0; 512];
    (marker[0], marker[12]) = (1, 3);
    bytes.extend(marker);
    bytes.extend(header);
    bytes.extend([0; 512]);
    bytes[56..64].fill(0xff);
    std::fs::write(&image, &bytes).unwrap();
    compare(&image, Format::Vmdk, "footer");
    let view = open(&image, Format::Vmdk);
    assert!(view.info().compression.is_some());
}

/// Asserts that the disk is `pattern` at `spots` of 1 MiB, and that all else is zero.
fn assert_spots(view: &View, spots: &[(u64, u8)], name: &str) {
    let mut stored = 0;
    let mut at = 0;
    while at < view.size_bytes() {
        let run = view.run_at(GuestOffset(at), u64::MAX).unwrap();
        if run.kind != RunKind::Zero {
            stored += run.len_bytes;
            let mut part = vec![0; usize::try_from(run.len_bytes).unwrap()];
            view.read_at(&mut part, GuestOffset(at)).unwrap();
            let mut want = vec![0; part.len()];
            for (spot, byte) in spots {
                let index = |at: u64| usize::try_from(at).unwrap();
                let from = spot.saturating_sub(at).min(run.len_bytes);
                let to = (spot + (1 << 20)).saturating_sub(at).min(run.len_bytes);
                want[index(from)..index(to)].fill(*byte);
            }
            assert!(part == want, "{name}: {} bytes at {at:#x}", part.len());
        }
        at += run.len_bytes;
    }
    assert!(stored >= (spots.len() as u64) << 20, "{name}: {stored} bytes are stored");
}

#[test]
fn large_and_nearly_empty_disks() {
    if !have_qemu() {
        return;
    }
    let dir = TempDir::new().unwrap();
    const TIB: u64 = 1 << 40;
    for (format, options, size) in [
        (Format::Vmdk, "subformat=monolithicSparse", TIB),
        (Format::Vhd, "subformat=dynamic,force_size=on", 2040 << 30),
        (Format::Vhd, "subformat=dynamic", TIB),
        // 4096 blocks to a sector bitmap: some of these are behind a few.
        (Format::Vhdx, "block_size=1M", 16 * TIB),
        (Format::Vhdx, "", 16 * TIB),
        (Format::Vhdx, "block_size=32M", 3 * TIB),
    ] {
        let name = format!("{format} {options} size {size}");
        let image = create(dir.path(), format, options, size);
        let spots = [(0, 1), (4095 << 20, 2), (4096 << 20, 3), (size / 2 + 512, 4)];
        let spots = spots.into_iter().chain([(size - (1 << 20), 5)]).collect::<Vec<_>>();
        let writes: Vec<String> =
            spots.iter().map(|(at, byte)| format!("write -P {byte} {at} 1M")).collect();
        qemu_io_as(qemu_name(format), &image, &writes);
        let view = open(&image, format);
        assert!(view.size_bytes() >= size, "{name}");
        assert_spots(&view, &spots, &name);
        let info = inspect(&File::open(&image).unwrap(), &image, None, &Terms::default()).unwrap();
        assert!(info.clusters.unwrap().data >= 4, "{name}");
    }
}

#[test]
fn a_fixed_vhd_is_one_only_if_its_owner_says_so_and_is_noted() {
    if !have_qemu() {
        return;
    }
    let dir = TempDir::new().unwrap();
    let image = create(dir.path(), Format::Vhd, "subformat=fixed,force_size=on", 4 << 20);
    let file = File::open(&image).unwrap();
    let info = inspect(&file, &image, None, &Terms::default()).unwrap();
    assert_eq!((info.format, info.virtual_size_bytes), (Format::Raw, (4 << 20) + 512));
    assert!(info.notes.iter().any(|note| note.contains("fixed VHD")), "{:?}", info.notes);
    let info = inspect(&file, &image, Some(Format::Vhd), &Terms::default()).unwrap();
    assert_eq!((info.virtual_size_bytes, info.notes.len()), (4 << 20, 0));
}

#[test]
fn what_such_an_image_has_no_use_for_is_refused() {
    for (name, image, _) in blocks_common::all() {
        let dir = TempDir::new().unwrap();
        let path = qcow2_common::write(dir.path(), "image", &image.bytes);
        let base = open(&path, image.format);
        let declared = Some(image.format);
        for (opening, word) in [
            (Opening { declared, snapshot: Some("1"), ..Opening::default() }, "a snapshot"),
            (Opening { declared, base: Some(&base), ..Opening::default() }, "a base"),
        ] {
            let error = View::open_as(Sealed::open_path(&path).unwrap(), opening).unwrap_err();
            assert!(error.to_string().contains(word), "{name}: {error}");
        }
    }
}
