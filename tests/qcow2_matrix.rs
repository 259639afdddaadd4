//! Every byte of images that qemu's tools make is the byte that `qemu-img convert` gives.
#![expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod qcow2_common;

use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use bedplate::disk::Sealed;
use bedplate::image::qcow2::Terms;
use bedplate::image::{Inspection, MAX_LAYERS, Opening, RunKind, Verdict, View, inspect};
use bedplate::units::GuestOffset;
use qcow2_common::make::{commands, create, open_over, overlay, qemu_io};
use qcow2_common::{Random, all_bytes, assert_same, have_qemu, open, qemu_bytes, raw_disk, run};
use tempfile::TempDir;

const CLUSTER_SIZES: [u64; 8] = [512, 1024, 4096, 16_384, 65_536, 262_144, 1_048_576, 2_097_152];

/// Compares the image with qemu, and with a full inspection; what `qemu-img check` calls clean has no
/// findings.
fn compare(image: &Path, name: &str) {
    let want = qemu_bytes(image).unwrap_or_else(|| panic!("{name}: qemu-img refuses it"));
    let info = inspect(&File::open(image).unwrap(), image, None, &Terms::default())
        .unwrap_or_else(|e| panic!("{name}: {e}"));
    let clusters = info.clusters.unwrap();
    let total = want.len() as u64;
    let count = clusters.data + clusters.zero + clusters.compressed;
    assert_eq!(count, total.div_ceil(info.cluster_size_bytes.unwrap()), "{name}");
    assert_same(&open(image), &want, name);
    no_findings(image, name);
}

fn no_findings(image: &Path, name: &str) {
    run("qemu-img", &["check", "-q", "-f", "qcow2", image.to_str().unwrap()]);
    let file = File::open(image).unwrap();
    let found = Inspection::of_file(&file, image, None, &Terms::default()).unwrap();
    assert_eq!((found.verdict, &found.findings[..]), (Verdict::Ok, &[][..]), "{name}");
}

#[test]
fn written_zeroed_and_discarded_clusters_of_every_size_and_version() {
    if !have_qemu() {
        return;
    }
    let dir = TempDir::new().unwrap();
    let mut random = Random(1);
    for cluster in CLUSTER_SIZES {
        for compat in ["0.10", "1.1", "1.1,lazy_refcounts=on", "1.1,compression_type=zstd"] {
            let size = (cluster * 37 + 512 * random.below(64)).min(40 << 20);
            let name = format!("cluster {cluster} compat {compat} size {size}");
            let image =
                create(dir.path(), &format!("cluster_size={cluster},compat={compat}"), size);
            qemu_io(&image, &commands(&mut random, size, cluster, true));
            compare(&image, &name);
        }
    }
}

#[test]
fn subclusters_of_every_size_written_zeroed_and_discarded() {
    if !have_qemu() {
        return;
    }
    let dir = TempDir::new().unwrap();
    let mut random = Random(8);
    for cluster in [16_384, 32_768, 65_536, 131_072, 1 << 20, 2 << 20] {
        for more in ["", ",compression_type=zstd", ",preallocation=metadata", ",lazy_refcounts=on"]
        {
            let size = (cluster * 37 + 512 * random.below(64)).min(40 << 20);
            let options = format!("cluster_size={cluster},extended_l2=on{more}");
            let image = create(dir.path(), &options, size);
            // Lengths that are some subclusters and a part of one.
            let fine = [512, cluster / 32, cluster][random.index(3)];
            let packed = !more.contains("preallocation");
            qemu_io(&image, &commands(&mut random, size, cluster, packed));
            qemu_io(&image, &commands(&mut random, size, fine, false));
            compare(&image, &format!("{options} size {size}"));
        }
    }
}

#[test]
fn every_preallocation_with_writes_on_top() {
    if !have_qemu() {
        return;
    }
    let dir = TempDir::new().unwrap();
    let mut random = Random(2);
    for preallocation in ["off", "metadata", "falloc", "full"] {
        for (cluster, compat) in
            [(512, "1.1"), (4096, "0.10"), (65_536, "0.10"), (65_536, "1.1"), (2 << 20, "1.1")]
        {
            for size in [cluster * 11, cluster * 3 + 512] {
                let name = format!("{preallocation} cluster {cluster} compat {compat} size {size}");
                let options =
                    format!("cluster_size={cluster},compat={compat},preallocation={preallocation}");
                let image = create(dir.path(), &options, size);
                compare(&image, &name);
                qemu_io(&image, &commands(&mut random, size, cluster, false));
                compare(&image, &name);
            }
        }
    }
}

#[test]
fn compressed_images_of_every_cluster_size_and_odd_disk_sizes() {
    if !have_qemu() {
        return;
    }
    let dir = TempDir::new().unwrap();
    let mut random = Random(3);
    for cluster in CLUSTER_SIZES {
        for kind in [
            "compat=0.10",
            "compat=1.1",
            "compat=1.1,compression_type=zstd",
            "extended_l2=on",
            "extended_l2=on,compression_type=zstd",
        ] {
            if kind.starts_with("extended") && cluster < 16_384 {
                continue;
            }
            let size = (cluster * 50).clamp(100_000, 6 << 20) + 512 * random.below(9) + 512;
            let raw = raw_disk(dir.path(), size, &mut random);
            let want = padded(&raw);
            let image = dir.path().join("image.qcow2");
            let options = format!("cluster_size={cluster},{kind}");
            let (from, to) = (raw.to_str().unwrap(), image.to_str().unwrap());
            run(
                "qemu-img",
                &["convert", "-q", "-c", "-f", "raw", "-O", "qcow2", "-o", &options, from, to],
            );
            let name = format!("{options} size {size}");
            compare(&image, &name);
            assert!(
                all_bytes(&open(&image)).unwrap() == want,
                "{name}: not the disk it was made of"
            );
            let info =
                inspect(&File::open(&image).unwrap(), &image, None, &Terms::default()).unwrap();
            assert!(info.clusters.unwrap().compressed > 0, "{name}: nothing is compressed");
        }
    }
}

/// The disk as qemu sees it: whole sectors.
fn padded(raw: &Path) -> Vec<u8> {
    let mut bytes = std::fs::read(raw).unwrap();
    bytes.resize(bytes.len().next_multiple_of(512), 0);
    bytes
}

#[test]
fn a_raw_disk_of_any_length_survives_conversion() {
    if !have_qemu() {
        return;
    }
    let dir = TempDir::new().unwrap();
    let mut random = Random(4);
    for size in [1, 511, 513, 65_535, 65_537, 1_000_003] {
        let raw = raw_disk(dir.path(), size, &mut random);
        let want = padded(&raw);
        let image = dir.path().join("image.qcow2");
        let (from, to) = (raw.to_str().unwrap(), image.to_str().unwrap());
        run("qemu-img", &["convert", "-q", "-f", "raw", "-O", "qcow2", from, to]);
        compare(&image, &format!("{size} bytes"));
        assert!(all_bytes(&open(&image)).unwrap() == want, "{size} bytes");
    }
}

#[test]
fn internal_snapshots_do_not_touch_the_disk_and_each_can_be_the_view() {
    if !have_qemu() {
        return;
    }
    let dir = TempDir::new().unwrap();
    let mut random = Random(5);
    for options in ["compat=0.10", "compat=1.1", "extended_l2=on", "cluster_size=4096"] {
        let image = create(dir.path(), options, 5 << 20);
        let path = image.to_str().unwrap();
        let mut states = Vec::new();
        for (id, name) in [("1", "one"), ("2", "two"), ("3", "three")] {
            qemu_io(&image, &commands(&mut random, 5 << 20, 65_536, name == "one"));
            run("qemu-img", &["snapshot", "-c", name, path]);
            states.push((id, name, qemu_bytes(&image).unwrap()));
            if name == "two" && options != "compat=0.10" {
                run("qemu-img", &["resize", "-q", path, "9M"]);
            }
        }
        qemu_io(&image, &commands(&mut random, 5 << 20, 65_536, false));
        compare(&image, options);
        assert_eq!(open(&image).info().snapshots, Some(3));
        for (id, name, want) in states {
            for wanted in [id, name] {
                let opening = Opening { snapshot: Some(wanted), ..Opening::default() };
                let view = View::open_as(Sealed::open_path(&image).unwrap(), opening).unwrap();
                assert_same(&view, &want, &format!("{options} snapshot {wanted}"));
            }
        }
        let opening = Opening { snapshot: Some("four"), ..Opening::default() };
        let error = View::open_as(Sealed::open_path(&image).unwrap(), opening).unwrap_err();
        assert!(error.to_string().contains("no snapshot has the ID or name \"four\""), "{error}");
    }
}

#[test]
fn chains_of_images_of_any_length_and_kind_read_as_with_qemu() {
    if !have_qemu() {
        return;
    }
    let mut random = Random(9);
    let kinds = [
        "",
        "compat=0.10",
        "extended_l2=on",
        "cluster_size=4096",
        "cluster_size=2M,extended_l2=on",
        "compression_type=zstd",
    ];
    for round in 0..24 {
        let dir = TempDir::new().unwrap();
        let size = (2 << 20) + 512 * random.below(4000);
        let (bottom, format) = if round % 2 == 0 {
            let raw = raw_disk(dir.path(), size - random.below(512), &mut random);
            (raw, "raw")
        } else {
            let image = create(dir.path(), kinds[round % kinds.len()], size);
            qemu_io(&image, &commands(&mut random, size, 65_536, false));
            (image, "qcow2")
        };
        let (mut base, mut view, mut format) = (bottom.clone(), open(&bottom), format);
        for depth in 0..=random.index(4) {
            // Shorter than what is beneath, as long, or longer.
            let size = (size / 512 * (2 + random.below(3)) / 3) * 512;
            let options = kinds[random.index(kinds.len())];
            let image =
                overlay(dir.path(), &format!("{depth}.qcow2"), &base, format, options, size);
            let packed = !options.contains("cluster_size");
            qemu_io(&image, &commands(&mut random, size, 65_536, packed));
            qemu_io(&image, &commands(&mut random, size, 2048, false));
            view = open_over(&image, &view);
            let name = format!("round {round} depth {depth} {options:?} size {size}");
            assert_same(&view, &qemu_bytes(&image).unwrap(), &name);
            (base, format) = (image, "qcow2");
        }
    }
}

#[test]
fn a_base_is_given_and_never_found() {
    if !have_qemu() {
        return;
    }
    let dir = TempDir::new().unwrap();
    let raw = raw_disk(dir.path(), 1 << 20, &mut Random(10));
    let other = create(dir.path(), "compat=1.1", 1 << 20);
    let image = overlay(dir.path(), "over.qcow2", &raw, "raw", "", 1 << 20);
    let sealed = |path: &Path| Sealed::open_path(path).unwrap();
    let alone = View::open(sealed(&image), None).unwrap_err().to_string();
    assert!(alone.contains("backing_file_offset at byte 0x8"), "{alone}");
    let of_another_kind = open(&other);
    let opening = Opening { base: Some(&of_another_kind), ..Opening::default() };
    let error = View::open_as(sealed(&image), opening).unwrap_err().to_string();
    assert!(error.contains("made for a backing file of format Raw"), "{error}");
    let base = open(&raw);
    let opening = Opening { base: Some(&base), ..Opening::default() };
    let error = View::open_as(sealed(&other), opening).unwrap_err().to_string();
    assert!(error.contains("a base was given, and the image has none"), "{error}");
    let mut view = open_over(&image, &base);
    let up = overlay(dir.path(), "up.qcow2", &image, "qcow2", "", 1 << 20);
    for _ in 2..MAX_LAYERS {
        view = open_over(&up, &view);
    }
    let opening = Opening { base: Some(&view), ..Opening::default() };
    let error = View::open_as(sealed(&up), opening).unwrap_err().to_string();
    assert!(error.contains("more than 16 images stand on each other"), "{error}");
}

#[test]
fn an_external_data_file_is_read_where_it_is_given() {
    if !have_qemu() {
        return;
    }
    let mut random = Random(11);
    for more in ["", ",data_file_raw=on", ",extended_l2=on", ",cluster_size=4096"] {
        let dir = TempDir::new().unwrap();
        let data = dir.path().join("data.raw");
        let size = (3 << 20) + 512 * random.below(64);
        let options = format!("data_file={}{more}", data.to_str().unwrap());
        let image = create(dir.path(), &options, size);
        qemu_io(&image, &commands(&mut random, size, 65_536, false));
        let sealed = || Sealed::open_path(&image).unwrap();
        let alone = View::open(sealed(), None).unwrap_err().to_string();
        assert!(alone.contains("incompatible_features at byte 0x48"), "{alone}");
        let opening =
            Opening { data: Some(Sealed::open_path(&data).unwrap()), ..Opening::default() };
        let view = View::open_as(sealed(), opening).unwrap();
        assert_same(&view, &qemu_bytes(&image).unwrap(), &options);
        // A data file that is too short is an error where it is missing, and never zeroes.
        let want = qemu_bytes(&image).unwrap();
        File::options().write(true).open(&data).unwrap().set_len(size / 2).unwrap();
        let opening =
            Opening { data: Some(Sealed::open_path(&data).unwrap()), ..Opening::default() };
        let view = View::open_as(sealed(), opening).unwrap();
        for (at, want) in (0..).step_by(512).zip(want.chunks(512)) {
            let mut got = vec![0; want.len()];
            if view.read_at(&mut got, GuestOffset(at)).is_ok() {
                assert!(got == want, "{options}: byte {at}");
            }
        }
    }
}

#[test]
fn refcount_widths_bitmaps_and_resizes_change_nothing() {
    if !have_qemu() {
        return;
    }
    let dir = TempDir::new().unwrap();
    let mut random = Random(6);
    for width in [1, 2, 4, 8, 32, 64] {
        let image = create(dir.path(), &format!("refcount_bits={width}"), 3 << 20);
        let path = image.to_str().unwrap();
        run("qemu-img", &["bitmap", "--add", path, "dirty"]);
        qemu_io(&image, &commands(&mut random, 3 << 20, 65_536, true));
        compare(&image, &format!("refcount_bits {width}"));
        run("qemu-img", &["resize", "-q", path, "700M"]);
        let view = open(&image);
        assert_eq!(view.size_bytes(), 700 << 20);
        run("qemu-img", &["resize", "-q", "--shrink", path, "1M"]);
        compare(&image, &format!("refcount_bits {width}, shrunk"));
    }
}

#[test]
fn bitmaps_that_qemu_made_are_counted_and_change_nothing() {
    if !have_qemu() {
        return;
    }
    let dir = TempDir::new().unwrap();
    let mut random = Random(7);
    for options in ["cluster_size=512", "cluster_size=65536", "extended_l2=on"] {
        let image = create(dir.path(), options, 9 << 20);
        let path = image.to_str().unwrap();
        for (name, granularity) in [("b0", "65536"), ("b1", "512"), ("disabled", "4096")] {
            run("qemu-img", &["bitmap", "--add", "-g", granularity, path, name]);
        }
        run("qemu-img", &["bitmap", "--disable", path, "disabled"]);
        qemu_io(&image, &commands(&mut random, 9 << 20, 65_536, true));
        compare(&image, options);
        assert_eq!(open(&image).info().bitmaps, Some(3), "{options}");
    }
}

#[test]
fn bitmaps_at_qemus_own_limits_are_sound() {
    if !have_qemu() {
        return;
    }
    let dir = TempDir::new().unwrap();
    let long = "n".repeat(1023);
    for (options, size, granularity) in [
        ("cluster_size=512", 8 << 20, "512"),
        // As many clusters of bits as a table takes: 512 MiB of them.
        ("cluster_size=2097152", 2 << 40, "512"),
        ("cluster_size=65536", 1 << 40, "2147483648"),
        ("cluster_size=65536", 512, "512"),
    ] {
        let image = create(dir.path(), options, size);
        let path = image.to_str().unwrap();
        for name in [long.as_str(), "x"] {
            run("qemu-img", &["bitmap", "--add", "-g", granularity, path, name]);
        }
        // A bitmap is stored where bits are set.
        let ends = [0, size - 512].map(|at| format!("write -P 3 {at} 512"));
        qemu_io(&image, &ends);
        no_findings(&image, &format!("{options}, {size} bytes, {granularity}"));
        let view = open(&image);
        let mut sector = [0; 512];
        view.read_at(&mut sector, GuestOffset(size - 512)).unwrap();
        assert_eq!((view.info().bitmaps, sector), (Some(2), [3; 512]), "{options}");
    }
    // Very many of them: more than a cluster of directory, and tables that lie between data.
    let image = create(dir.path(), "cluster_size=512", 1 << 20);
    let path = image.to_str().unwrap();
    for number in 0..60 {
        run("qemu-img", &["bitmap", "--add", path, &format!("{number:0>200}")]);
    }
    qemu_io(&image, &commands(&mut Random(12), 1 << 20, 512, true));
    compare(&image, "60 bitmaps");
    assert_eq!(open(&image).info().bitmaps, Some(60));
}

#[test]
fn a_large_empty_image_is_zero_and_costs_no_memory() {
    if !have_qemu() {
        return;
    }
    let dir = TempDir::new().unwrap();
    let size = 16_u64 << 40;
    let image = create(dir.path(), "cluster_size=65536", size);
    qemu_io(
        &image,
        &[format!("write -P 7 {} 512", size - 512), format!("write -P 8 {} 512", size / 2)],
    );
    let view = open(&image);
    let mut at = 0;
    let mut runs = Vec::new();
    while at < size {
        let run = view.run_at(GuestOffset(at), u64::MAX).unwrap();
        runs.push(run.kind);
        at += run.len_bytes;
    }
    let data = runs.iter().filter(|kind| matches!(kind, RunKind::Data(_))).count();
    assert!(data == 2 && runs.len() <= 8, "{runs:?}");
    let memory = view.cluster_map().unwrap().table().fd().try_clone_to_owned().unwrap();
    let held_bytes = File::from(memory).metadata().unwrap().blocks() * 512;
    assert!(held_bytes <= 1 << 20, "the map of 2^28 clusters holds {held_bytes} bytes");
    let mut sector = [0; 512];
    view.read_at(&mut sector, GuestOffset(size - 512)).unwrap();
    assert_eq!(sector, [7; 512]);
    inspect(&File::open(&image).unwrap(), &image, None, &Terms::default()).unwrap();
}

#[test]
fn neighbouring_clusters_are_one_run() {
    if !have_qemu() {
        return;
    }
    let dir = TempDir::new().unwrap();
    let image = create(dir.path(), "preallocation=full", 100 << 20);
    let view = open(&image);
    view.read_at(&mut [0], GuestOffset(0)).unwrap();
    let run = view.run_at(GuestOffset(5), u64::MAX).unwrap();
    assert_eq!(run.len_bytes, (100 << 20) - 5, "one allocation, one run");
    assert!(matches!(run.kind, RunKind::Data(_)));
    assert_eq!(view.run_at(GuestOffset(70_000), 1000).unwrap().len_bytes, 1000);
}

#[test]
fn many_threads_read_one_view_of_a_compressed_image() {
    if !have_qemu() {
        return;
    }
    let dir = TempDir::new().unwrap();
    let raw = raw_disk(dir.path(), 5 << 20, &mut Random(7));
    let image = dir.path().join("image.qcow2");
    let (from, to) = (raw.to_str().unwrap(), image.to_str().unwrap());
    run("qemu-img", &["convert", "-q", "-c", "-f", "raw", "-O", "qcow2", from, to]);
    let (want, view) = (padded(&raw), open(&image));
    std::thread::scope(|scope| {
        for seed in 0..8 {
            let (want, view) = (&want, &view);
            scope.spawn(move || {
                let mut random = Random(seed);
                for _ in 0..300 {
                    let at = random.index(want.len() - 4096);
                    let mut part = [0; 4096];
                    view.read_at(&mut part, GuestOffset(at as u64)).unwrap();
                    assert!(part == want[at..at + 4096]);
                }
            });
        }
    });
}
