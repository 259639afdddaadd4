//! The bytes that a reader gets are the image's, however they are had.

use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Barrier;

use bedplate::image::DecodedCache;
use bedplate::replica::{Extent, ExtentKind, Mode, Replica, ReplicaError};

use crate::nbd_support::{MIB, patterned, write_sparse};
use crate::qcow2_common::{Random, compressed, half_random, have_qemu, qemu_bytes, run};
use crate::server::TestServer;

pub const MODES: [Mode; 2] = [Mode::Pread, Mode::Mapped];

/// All bytes, twice in pieces of all sizes here and there, and once forward.
pub fn assert_reads(replica: &Replica, want: &[u8], seed: u64) {
    assert_eq!(replica.size_bytes(), want.len() as u64);
    let mut random = Random(seed);
    for _ in 0..400 {
        let at = random.index(want.len());
        let most = [1, 512, 4096, 70_000, 600_000][random.index(5)];
        let len = (random.index(most) + 1).min(want.len() - at);
        let mut found = vec![0xee; len];
        replica.read_at(&mut found, at as u64).unwrap();
        assert!(found == want[at..at + len], "{len} bytes at {at}");
    }
    let mut found = vec![0xee; want.len()];
    replica.read_at(&mut found, 0).unwrap();
    assert!(found == want, "all of it");
}

fn extents(replica: &Replica) -> Vec<Extent> {
    let all: Result<Vec<Extent>, _> = replica.extents(0, replica.size_bytes()).unwrap().collect();
    let all = all.unwrap();
    let mut at = 0;
    for extent in &all {
        assert!(extent.at == at && extent.len_bytes > 0, "{extent:?} at {at}");
        at += extent.len_bytes;
    }
    assert_eq!(at, replica.size_bytes());
    all
}

fn assert_extents(replica: &Replica, want: &[u8]) -> Vec<Extent> {
    let all = extents(replica);
    for extent in all.iter().filter(|extent| extent.kind == ExtentKind::Zero) {
        let range = usize::try_from(extent.at).unwrap()..;
        let bytes = &want[range][..usize::try_from(extent.len_bytes).unwrap()];
        assert!(bytes.iter().all(|&byte| byte == 0), "{extent:?} is not zero");
    }
    all
}

#[test]
fn a_sparse_raw_file_is_read_and_its_holes_are_not() {
    let server = TestServer::start();
    let bytes = patterned(8 * 1024 * 1024 + 12_345);
    let path = server.dir.path().join("disk.raw");
    write_sparse(&path, &bytes);
    server.add("disk", &path);
    for mode in MODES {
        let replica = server.attach("disk", mode);
        assert_reads(&replica, &bytes, 1);
        let all = assert_extents(&replica, &bytes);
        assert!(all.iter().any(|extent| extent.kind == ExtentKind::Zero));
        assert!(all.iter().all(|extent| extent.kind != ExtentKind::Encoded));
    }
    let before = server.exports.get("disk").unwrap().counters().values();
    assert_eq!(before.requests, 0, "nothing of a raw file is asked for");
}

#[test]
fn qcow2_of_every_kind_is_read_as_qemu_reads_it() {
    if !have_qemu() {
        return;
    }
    let server = TestServer::start();
    let dir = server.dir.path();
    let raw = dir.join("disk.raw");
    let mut bytes = patterned(20 * 1024 * 1024 + 512);
    let mut random = Random(5);
    bytes[..6 << 20].iter_mut().for_each(|byte| *byte = random.next().to_le_bytes()[0] & 7);
    write_sparse(&raw, &bytes);
    let kinds = [
        ("plain", vec![]),
        ("zlib", vec!["-c"]),
        ("zstd", vec!["-c", "-o", "compression_type=zstd"]),
        ("small", vec!["-c", "-o", "cluster_size=4k"]),
        ("tiny", vec!["-c", "-o", "cluster_size=512"]),
        ("subclusters", vec!["-o", "extended_l2=on,cluster_size=128k"]),
        ("large", vec!["-c", "-o", "cluster_size=2M"]),
    ];
    for (name, options) in kinds {
        let image = dir.join(name);
        let mut args = vec!["convert", "-q", "-f", "raw", "-O", "qcow2"];
        args.extend(options);
        args.extend([raw.to_str().unwrap(), image.to_str().unwrap()]);
        run("qemu-img", &args);
        let want = qemu_bytes(&image).unwrap();
        server.add(name, &image);
        for mode in MODES {
            let replica = server.attach(name, mode);
            assert_extents(&replica, &want);
            assert_reads(&replica, &want, 2);
            assert_extents(&replica, &want);
        }
    }
}

#[test]
fn a_chain_is_read_through_all_its_layers() {
    if !have_qemu() {
        return;
    }
    let server = TestServer::start();
    let dir = server.dir.path();
    let (base, middle, top) = (dir.join("base"), dir.join("middle"), dir.join("top"));
    write_sparse(&base, &patterned(3 * 1024 * 1024 + 512));
    let path = |path: &Path| path.to_str().unwrap().to_owned();
    let on = |from: &Path, format: &str, to: &Path, size: &str| {
        let (from, to) = (path(from), path(to));
        run("qemu-img", &["create", "-q", "-f", "qcow2", "-F", format, "-b", &from, &to, size]);
    };
    on(&base, "raw", &middle, "8M");
    let write = |image: &Path, commands: &[&str]| {
        for command in commands {
            run("qemu-io", &["-f", "qcow2", "-c", command, &path(image)]);
        }
    };
    write(&middle, &["write -P 5 1M 200k", "write -z 2M 128k", "write -c -P 6 4M 64k"]);
    on(&middle, "qcow2", &top, "6M");
    write(&top, &["write -P 7 1100k 10k", "write -c -P 8 5M 128k"]);
    let want = qemu_bytes(&top).unwrap();
    let cache = DecodedCache::new(64 << 20);
    let base = server.add_on("base", &base, None, cache.clone());
    let middle = server.add_on("middle", &middle, Some(&base), cache.clone());
    server.add_on("top", &top, Some(&middle), cache);
    for mode in MODES {
        let replica = server.attach("top", mode);
        assert_reads(&replica, &want, 3);
        assert_extents(&replica, &want);
    }
}

#[test]
fn other_formats_are_read_through_the_same_maps() {
    if !have_qemu() {
        return;
    }
    let server = TestServer::start();
    let dir = server.dir.path();
    let raw = dir.join("disk.raw");
    write_sparse(&raw, &patterned(9 * 1024 * 1024));
    for (format, options) in
        [("vmdk", "subformat=streamOptimized"), ("vpc", "subformat=dynamic"), ("vhdx", "")]
    {
        let image = dir.join(format);
        let mut args = vec!["convert", "-q", "-f", "raw", "-O", format];
        if !options.is_empty() {
            args.extend(["-o", options]);
        }
        args.extend([raw.to_str().unwrap(), image.to_str().unwrap()]);
        run("qemu-img", &args);
        let view = server.add(format, &image);
        let want = crate::qcow2_common::all_bytes(&view).unwrap();
        for mode in MODES {
            let replica = server.attach(format, mode);
            assert_reads(&replica, &want, 4);
            assert_extents(&replica, &want);
        }
    }
}

#[test]
fn what_is_decoded_once_is_read_by_all_without_a_question() {
    if !have_qemu() {
        return;
    }
    let server = TestServer::start();
    let bytes = half_random(7, 10 * MIB);
    let image = compressed(server.dir.path(), "image", &bytes);
    let view = server.add("disk", &image);
    let together = Barrier::new(16);
    std::thread::scope(|scope| {
        for seed in 0..16 {
            let (server, bytes, together) = (&server, &bytes, &together);
            scope.spawn(move || {
                let replica = server.attach("disk", MODES[seed % 2]);
                together.wait();
                assert_reads(&replica, bytes, seed as u64);
            });
        }
    });
    let clusters = 10 * MIB as u64 / 65_536;
    assert_eq!(view.cache().decodes(), clusters, "each cluster once");
    let export = server.exports.get("disk").unwrap();
    let asked = export.counters().values().requests;
    let replica = server.attach("disk", Mode::Mapped);
    assert_reads(&replica, &bytes, 99);
    assert_eq!(export.counters().values().requests, asked, "nothing is asked for any more");
}

#[test]
fn a_long_read_of_what_is_not_decoded_is_one_question_for_many_clusters() {
    if !have_qemu() {
        return;
    }
    let server = TestServer::start();
    let bytes = half_random(9, 40 * MIB);
    let image = compressed(server.dir.path(), "image", &bytes);
    // With room for the image, and with less: what was prepared for one read has left when another wants it.
    let cases = [("pread", 64), ("mapped", 64), ("pread, less", 32), ("mapped, less", 32)];
    for ((name, cache_mib), mode) in cases.into_iter().zip(MODES.into_iter().cycle()) {
        let cache = DecodedCache::new(cache_mib * MIB as u64);
        let view = server.add_on(name, &image, None, cache);
        let export = server.exports.get(name).unwrap();
        let replica = server.attach(name, mode);
        let mut buf = vec![0; 8 * MIB];
        for (read, at) in (0..5).map(|n| n * 8 * MIB).enumerate() {
            replica.read_at(&mut buf, at as u64).unwrap();
            assert!(buf == bytes[at..at + buf.len()], "{name}: {at}");
            let counted = export.counters().values();
            // For up to 2 MiB each; what is decoded ahead is not asked for. No byte comes by message, but of
            // what has left again before a reader who was held up came to copy it: a cluster now and then.
            let again = counted.bytes.div_ceil(65_536);
            let most = if cache_mib > 40 { 0 } else { 128 * (read as u64 + 1) / 16 };
            assert!(again <= most, "{name}: {counted:?}");
            assert!(counted.requests - again <= 4 * (read as u64 + 1), "{name}: {counted:?}");
        }
        assert!(view.cache().decodes() <= 40 * 16 * 5 / 4, "{}", view.cache().decodes());
        assert_reads(&replica, &bytes, 3);
    }
}

#[test]
fn a_cache_that_cannot_hold_the_image_gives_right_bytes_to_many_readers() {
    if !have_qemu() {
        return;
    }
    let server = TestServer::start();
    let bytes = half_random(8, 8 * MIB);
    let image = compressed(server.dir.path(), "image", &bytes);
    // Eight clusters of 128: slots are used again under the readers' eyes.
    server.add_on("disk", &image, None, DecodedCache::new(8 * 65_536 + 4096));
    std::thread::scope(|scope| {
        for seed in 0..6 {
            let (server, bytes) = (&server, &bytes);
            scope.spawn(move || {
                let replica = server.attach("disk", MODES[seed % 2]);
                for round in 0..3 {
                    assert_reads(&replica, bytes, seed as u64 * 10 + round);
                }
            });
        }
    });
}

#[test]
fn a_file_cut_short_is_an_error_to_its_reader_and_no_signal() {
    let server = TestServer::start();
    let path = server.dir.path().join("disk.raw");
    let bytes = vec![7; 4 << 20];
    std::fs::write(&path, &bytes).unwrap();
    server.add("disk", &path);
    for mode in MODES {
        std::fs::write(&path, &bytes).unwrap();
        let replica = server.attach("disk", mode);
        assert_reads(&replica, &bytes, 6);
        let file = std::fs::File::options().write(true).open(&path).unwrap();
        file.set_len(1 << 20).unwrap();
        let mut block = [0; 4096];
        replica.read_at(&mut block, 0).unwrap();
        let error = replica.read_at(&mut block, 3 << 20).unwrap_err();
        assert!(matches!(error, ReplicaError::Io { at: 0x30_0000, .. }), "{error}");
        assert_eq!(error.errno(), 5);
    }
}

#[test]
fn a_range_that_is_not_inside_the_disk_is_refused_and_nothing_is_read() {
    let server = TestServer::start();
    let path = server.dir.path().join("disk.raw");
    std::fs::write(&path, vec![7; 10_000]).unwrap();
    server.add("disk", &path);
    let replica = server.attach("disk", Mode::Pread);
    for (at, len) in [(10_000, 1), (9_999, 2), (u64::MAX, 1), (u64::MAX - 1, 8)] {
        let mut buf = vec![0xee; len];
        let error = replica.read_at(&mut buf, at).unwrap_err();
        assert!(matches!(error, ReplicaError::PastEnd { .. }), "{error}");
        assert!(buf.iter().all(|&byte| byte == 0xee));
        assert!(replica.extents(at, len as u64).is_err());
    }
    replica.read_at(&mut [], 10_000).unwrap();
    assert_eq!(replica.extents(0, 0).unwrap().count(), 0);
}

#[test]
fn a_damaged_entry_is_an_error_of_its_own_reader() {
    if !have_qemu() {
        return;
    }
    let server = TestServer::start();
    let dir = server.dir.path();
    let (raw, image) = (dir.join("raw"), dir.join("image"));
    std::fs::write(&raw, patterned(4 << 20)).unwrap();
    let (from, to) = (raw.to_str().unwrap(), image.to_str().unwrap());
    run("qemu-img", &["convert", "-q", "-S", "0", "-f", "raw", "-O", "qcow2", from, to]);
    let want = qemu_bytes(&image).unwrap();
    // The first L2 entry points past the file.
    let file = std::fs::File::options().read(true).write(true).open(&image).unwrap();
    let read = |at| {
        let mut bytes = [0; 8];
        file.read_exact_at(&mut bytes, at).unwrap();
        u64::from_be_bytes(bytes)
    };
    let l2 = read(read(40)) & 0x00ff_ffff_ffff_fe00;
    file.write_all_at(&(1_u64 << 63 | 1 << 50).to_be_bytes(), l2).unwrap();
    server.add("disk", &image);
    for mode in MODES {
        let replica = server.attach("disk", mode);
        let mut block = [0; 4096];
        for _ in 0..2 {
            let error = replica.read_at(&mut block, 100).unwrap_err();
            assert!(error.to_string().contains("data cluster offset"), "{error}");
            replica.read_at(&mut block, 65_536).unwrap();
            assert!(block == want[65_536..69_632]);
        }
    }
}
