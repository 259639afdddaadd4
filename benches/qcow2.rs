//! How fast a view answers: entry decoding, lookups, small random reads, and whole clusters.
//!
//! Images are made by qemu-img from bytes that compress about twofold; all in the page cache.
#![expect(clippy::unwrap_used, reason = "a bench that cannot set up has no result")]

use std::hint::black_box;
use std::path::{Path, PathBuf};
use std::process::Command;

use bedplate::disk::Sealed;
use bedplate::image::qcow2::{ClusterBits, Codec, Compression, L2Tables, Limits, decode_l2};
use bedplate::image::{DecodedCache, View};
use bedplate::units::GuestOffset;
use criterion::{Criterion, Throughput, criterion_group, criterion_main};

const DISK_BYTES: usize = 64 << 20;
/// Holds the whole disk decoded, and nothing.
const CACHES: [(&str, u64); 2] = [("cached", 256 << 20), ("uncached", 0)];

/// Bytes that compress about twofold: random nibbles.
fn disk() -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()[3] & 15
    };
    (0..DISK_BYTES).map(|_| next()).collect()
}

fn convert(raw: &Path, name: &str, args: &[&str]) -> PathBuf {
    let image = raw.with_file_name(name);
    let status = Command::new("qemu-img")
        .args(["convert", "-q", "-f", "raw", "-O", "qcow2"])
        .args(args)
        .args([raw, &image])
        .status();
    assert!(status.unwrap().success(), "qemu-img is needed to make {name}");
    image
}

fn open(path: &Path, cache_bytes: u64) -> View {
    let cache = DecodedCache::new(cache_bytes);
    View::open_with_cache(Sealed::open_path(path).unwrap(), None, cache).unwrap()
}

/// Guest positions in no order that read-ahead or a cache likes.
fn positions() -> impl Iterator<Item = GuestOffset> {
    (0_u64..).map(|n| GuestOffset(n * 104_729 % (DISK_BYTES as u64 / 4096) * 4096))
}

fn entries(c: &mut Criterion) {
    let bits = ClusterBits::new(16).unwrap();
    let tables = L2Tables::of((1000..1080).map(|n| n << 16), bits);
    let limits = Limits {
        version: 3,
        bits,
        file_len_bytes: 1 << 40,
        l1: &(0x30000..0x30280),
        l2_tables: &tables,
        data_len_bytes: None,
    };
    let mut group = c.benchmark_group("decode_l2");
    group.throughput(Throughput::Elements(8192));
    group.bench_function("table_of_8192", |b| {
        b.iter(|| {
            for n in 0..8192_u64 {
                let raw = 1 << 63 | (n + 2000) << 16;
                black_box(decode_l2(black_box(raw), 65_536, &limits)).unwrap();
            }
        });
    });
    group.finish();
}

fn lookups(c: &mut Criterion, qcow2: &Path, raw: &Path) {
    let mut group = c.benchmark_group("run_at");
    for (name, path) in [("raw", raw), ("qcow2", qcow2)] {
        let view = open(path, 0);
        let mut at = positions();
        group.bench_function(format!("{name}_4k"), |b| {
            b.iter(|| black_box(view.run_at(at.next().unwrap(), 4096)).unwrap());
        });
    }
    group.finish();
}

fn reads(c: &mut Criterion, images: &[(&str, PathBuf)]) {
    let mut group = c.benchmark_group("read_4k_random");
    group.throughput(Throughput::Bytes(4096));
    for (name, path) in images {
        for (cached, cache_bytes) in CACHES {
            if cache_bytes == 0 && !name.starts_with('z') {
                continue;
            }
            let view = open(path, cache_bytes);
            view.read_at(&mut vec![0; DISK_BYTES], GuestOffset(0)).unwrap();
            let (mut at, mut buf) = (positions(), [0; 4096]);
            group.bench_function(format!("{name}_{cached}"), |b| {
                b.iter(|| view.read_at(black_box(&mut buf), at.next().unwrap()).unwrap());
            });
        }
    }
    group.finish();
}

fn clusters(c: &mut Criterion, cluster: &[u8]) {
    let mut group = c.benchmark_group("decode_cluster_64k");
    group.throughput(Throughput::Bytes(cluster.len() as u64));
    let mut zlib = vec![0; 2 * cluster.len()];
    let level = libdeflater::CompressionLvl::default();
    let len = libdeflater::Compressor::new(level).deflate_compress(cluster, &mut zlib).unwrap();
    zlib.truncate(len);
    let mut zstd = vec![0; 2 * cluster.len()];
    let len = zstd_safe::compress(zstd.as_mut_slice(), cluster, 3).unwrap();
    zstd.truncate(len);
    let (mut codec, mut out) = (Codec::new(), vec![0; cluster.len()]);
    for (name, compression, stored) in
        [("zlib", Compression::Zlib, zlib), ("zstd", Compression::Zstd, zstd)]
    {
        group.bench_function(name, |b| {
            b.iter(|| codec.decode(compression, black_box(&stored), &mut out).unwrap());
        });
    }
    group.finish();
}

fn all(c: &mut Criterion) {
    let dir = tempfile::TempDir::new().unwrap();
    let (raw, bytes) = (dir.path().join("disk.raw"), disk());
    std::fs::write(&raw, &bytes).unwrap();
    let plain = convert(&raw, "plain.qcow2", &[]);
    let zlib = convert(&raw, "zlib.qcow2", &["-c"]);
    let zstd = convert(&raw, "zstd.qcow2", &["-c", "-o", "compression_type=zstd"]);
    entries(c);
    lookups(c, &plain, &raw);
    reads(c, &[("raw", raw), ("plain", plain), ("zlib", zlib), ("zstd", zstd)]);
    clusters(c, bytes.get(..65_536).unwrap());
}

criterion_group!(benches, all);
criterion_main!(benches);
