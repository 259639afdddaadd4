//! Many replicas read one compressed image: each cluster is decoded once, for all of them.
#![expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod nbd_support;
mod qcow2_common;

use std::path::{Path, PathBuf};
use std::sync::{Arc, Barrier};

use bedplate::disk::Sealed;
use bedplate::image::{DecodedCache, View, inspect};
use bedplate::units::GuestOffset;
use nbd_support::{MIB, TestServer};
use qcow2_common::{Random, have_qemu, qemu_bytes, run};
use tempfile::TempDir;

const REPLICAS: u64 = 16;

/// Text that compresses, of a length that leaves the last cluster short.
fn compressed(dir: &Path, kind: &str) -> PathBuf {
    let (raw, image) = (dir.join("disk.raw"), dir.join("disk.qcow2"));
    let mut random = Random(4);
    let bytes: Vec<u8> = (0..12 * MIB + 512).map(|_| random.next().to_le_bytes()[0] & 15).collect();
    std::fs::write(&raw, bytes).unwrap();
    let options = format!("compression_type={kind}");
    let (from, to) = (raw.to_str().unwrap(), image.to_str().unwrap());
    run("qemu-img", &["convert", "-q", "-c", "-f", "raw", "-O", "qcow2", "-o", &options, from, to]);
    image
}

fn compressed_clusters(image: &Path) -> u64 {
    let file = std::fs::File::open(image).unwrap();
    let terms = bedplate::image::qcow2::Terms::default();
    inspect(&file, image, None, &terms).unwrap().clusters.unwrap().compressed
}

#[test]
fn sixteen_replicas_over_nbd_decode_each_cluster_once() {
    if !have_qemu() {
        return;
    }
    let dir = TempDir::new().unwrap();
    let image = compressed(dir.path(), "zstd");
    let (want, count) = (qemu_bytes(&image).unwrap(), compressed_clusters(&image));
    assert!(count > 180, "{count} clusters are compressed");
    let server = TestServer::start();
    server.add_file("disk", &image);
    let before = DecodedCache::process_wide().decodes();
    let together = Barrier::new(usize::try_from(REPLICAS).unwrap());
    std::thread::scope(|scope| {
        for replica in 0..REPLICAS {
            let (server, want, together) = (&server, &want, &together);
            scope.spawn(move || {
                let mut wire = server.connect();
                wire.go("disk", true);
                together.wait();
                // Half of them forward, in pieces of all sizes, half here and there.
                let mut random = Random(replica);
                let mut at = 0;
                while at < want.len() {
                    let len = [4096, 65_536, 300_000, MIB][random.index(4)].min(want.len() - at);
                    let from =
                        if replica % 2 == 0 { at } else { random.index(want.len() - len + 1) };
                    let got = wire.read_structured(0, from as u64, u32::try_from(len).unwrap());
                    assert!(got == want[from..from + len], "{len} bytes at {from}");
                    at += len;
                }
            });
        }
    });
    assert_eq!(DecodedCache::process_wide().decodes() - before, count);
}

#[test]
fn memory_for_sixteen_readers_is_that_for_one_and_bounded() {
    if !have_qemu() {
        return;
    }
    let dir = TempDir::new().unwrap();
    let image = compressed(dir.path(), "zlib");
    let want = qemu_bytes(&image).unwrap();
    let held = |readers: u64, capacity: u64| {
        let cache = DecodedCache::new(capacity);
        let sealed = Sealed::open_path(&image).unwrap();
        let view = View::open_with_cache(sealed, None, Arc::clone(&cache)).unwrap();
        std::thread::scope(|scope| {
            for reader in 0..readers {
                let (view, want) = (&view, &want);
                scope.spawn(move || {
                    let mut random = Random(reader);
                    for _ in 0..400 {
                        let at = random.index(want.len() - 70_000);
                        let mut part = vec![0; 70_000];
                        view.read_at(&mut part, GuestOffset(at as u64)).unwrap();
                        assert!(part == want[at..at + 70_000]);
                    }
                });
            }
        });
        cache.held_bytes()
    };
    assert!(held(REPLICAS, 64 << 20) <= want.len() as u64 + (1 << 20), "all of it, once");
    assert!(held(REPLICAS, 4 << 20) <= 4 << 20, "no more than it may");
}

/// A view of a compressed image with its own cache, the image's bytes, and how many clusters of it
/// are compressed.
fn zlib_view() -> (Vec<u8>, u64, Arc<DecodedCache>, View) {
    let dir = TempDir::new().unwrap();
    let image = compressed(dir.path(), "zlib");
    let (want, count) = (qemu_bytes(&image).unwrap(), compressed_clusters(&image));
    let cache = DecodedCache::new(64 << 20);
    let sealed = Sealed::open_path(&image).unwrap();
    let view = View::open_with_cache(sealed, None, Arc::clone(&cache)).unwrap();
    (want, count, cache, view)
}

#[test]
fn a_forward_reader_of_small_pieces_finds_the_next_clusters_decoded() {
    if !have_qemu() {
        return;
    }
    let (want, count, cache, view) = zlib_view();
    for (at, want) in (0..).step_by(4096).zip(want.chunks(4096)) {
        let mut part = vec![0; want.len()];
        view.read_at(&mut part, GuestOffset(at)).unwrap();
        assert!(part == want, "byte {at}");
    }
    drop(view);
    assert_eq!(cache.decodes(), count, "ahead or not, each once");
}

#[test]
fn a_forward_reader_decodes_each_cluster_once_beside_readers_that_fill_the_cache() {
    if !have_qemu() {
        return;
    }
    let dir = TempDir::new().unwrap();
    let image = compressed(dir.path(), "zlib");
    let (want, count) = (qemu_bytes(&image).unwrap(), compressed_clusters(&image));
    for piece in [4096, 65_536, MIB] {
        // Less than both images.
        let cache = DecodedCache::new(16 << 20);
        let open = || {
            let sealed = Sealed::open_path(&image).unwrap();
            View::open_with_cache(sealed, None, Arc::clone(&cache)).unwrap()
        };
        let (other, view) = (open(), open());
        let mut part = vec![0; 65_536];
        for _ in 0..3 {
            // Not forward: nothing of it is decoded ahead, some time.
            for at in (0..12 * MIB).step_by(65_536).rev() {
                other.read_at(&mut part, GuestOffset(at as u64)).unwrap();
            }
        }
        let before = cache.decodes();
        for (at, want) in (0..).step_by(piece).zip(want.chunks(piece)) {
            let mut part = vec![0; want.len()];
            view.read_at(&mut part, GuestOffset(at)).unwrap();
            assert!(part == want, "byte {at}");
        }
        drop(view);
        // On a busy machine what is decoded ahead may come after its reader; twice each is the fault.
        let decodes = cache.decodes() - before;
        assert!(decodes <= count * 5 / 4, "{decodes} of {count}, in pieces of {piece}");
    }
}

#[test]
fn what_is_read_again_without_a_lock_stays_and_is_never_another_cluster() {
    if !have_qemu() {
        return;
    }
    let dir = TempDir::new().unwrap();
    let image = compressed(dir.path(), "zlib");
    let want = qemu_bytes(&image).unwrap();
    let cache = DecodedCache::new(8 << 20);
    let open = || {
        let sealed = Sealed::open_path(&image).unwrap();
        View::open_with_cache(sealed, None, Arc::clone(&cache)).unwrap()
    };
    let (view, other) = (open(), open());
    let check = |view: &View, at: usize, len: usize| {
        let mut part = vec![0; len];
        view.read_at(&mut part, GuestOffset(at as u64)).unwrap();
        assert!(part == want[at..at + len], "{len} bytes at {at}");
    };
    let again = 2 * MIB;
    let mut random = Random(7);
    // Not forward, and more than the cache holds.
    let places = || (0..want.len() - 65_536).step_by(65_536).rev();
    places().for_each(|at| check(&other, at, 65_536));
    let before = cache.decodes();
    for at in places().chain(places()) {
        check(&other, at, 65_536);
        (0..24).for_each(|_| check(&view, random.index(again / 4096) * 4096, 4096));
    }
    let (decodes, others) = (cache.decodes() - before, 2 * places().count() as u64);
    assert!(decodes < others + 2 * (again as u64 >> 16), "{decodes}, {others} of which for others");

    // Slots change hands under the eyes of many readers.
    let cache = DecodedCache::new(MIB as u64);
    let sealed = Sealed::open_path(&image).unwrap();
    let view = View::open_with_cache(sealed, None, Arc::clone(&cache)).unwrap();
    std::thread::scope(|scope| {
        for seed in 0..6 {
            let (view, check, want) = (&view, &check, &want);
            scope.spawn(move || {
                let mut random = Random(seed);
                for _ in 0..1500 {
                    // Most of them in a few clusters, so that some are found decoded.
                    let range = if random.below(4) == 0 { want.len() } else { MIB };
                    let len = [512, 4096, 16_384][random.index(3)];
                    let at = random.index((range - len) / 512) * 512;
                    check(view, at, len);
                }
            });
        }
    });
}

#[test]
fn a_hint_over_nbd_has_clusters_decoded_before_they_are_read() {
    if !have_qemu() {
        return;
    }
    let (want, count, cache, view) = zlib_view();
    let server = TestServer::start();
    server.exports.add("disk", Arc::new(view), "").unwrap();
    let mut wire = server.connect();
    wire.go("disk", true);
    wire.request(0, 5, 1, 0, u32::try_from(want.len()).unwrap());
    assert_eq!(wire.chunks()[0].kind, 0);
    while cache.decodes() < count {
        std::thread::yield_now();
    }
    assert!(wire.read_structured(0, 0, u32::try_from(want.len()).unwrap()) == want);
    assert_eq!(cache.decodes(), count, "nothing was decoded for the read");
}
