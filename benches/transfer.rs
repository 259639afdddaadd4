//! The hot functions of a transfer: finding zero pages, hashing, recording presence.
#![expect(clippy::unwrap_used, reason = "a failed unwrap is a failed benchmark")]

use std::hint::black_box;
use std::process::{Command, Stdio};

use bedplate::disk::{DigestKind, DigestSet, Dir, Hasher, Presence, UNIT_BYTES, Version};
use bedplate::fetch::decode::{Codec, Decoder, Limits};
use bedplate::ring::{BLOCK_BYTES, data_runs, is_zero};
use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};

/// One block: every `nth` page has data; 0 for none.
fn block(nth: usize) -> Vec<u8> {
    let mut bytes = vec![0u8; BLOCK_BYTES];
    for (index, page) in bytes.chunks_mut(4096).enumerate() {
        if nth > 0 && index % nth == 0 {
            page.fill(0xA5);
        }
    }
    bytes
}

fn zero_detection(c: &mut Criterion) {
    let mut group = c.benchmark_group("zero_1mib");
    group.throughput(Throughput::Bytes(BLOCK_BYTES as u64));
    let zeroes = block(0);
    group.bench_function("is_zero/zeroes", |b| b.iter(|| is_zero(black_box(&zeroes))));
    // The limit for this size: a read of the same bytes by the C library.
    group.bench_function("peer/memchr_like_sum", |b| {
        b.iter(|| black_box(&zeroes).iter().map(|&byte| u64::from(byte)).sum::<u64>());
    });
    for (name, nth) in [("all_zero", 0), ("half", 2), ("all_data", 1)] {
        let bytes = block(nth);
        group.bench_function(format!("data_runs/{name}"), |b| {
            b.iter(|| data_runs(black_box(&bytes)).count());
        });
    }
    group.finish();
}

fn digests(c: &mut Criterion) {
    let mut group = c.benchmark_group("digest_1mib");
    group.throughput(Throughput::Bytes(BLOCK_BYTES as u64));
    let bytes = block(1);
    let each = DigestKind::ALL.iter().map(std::slice::from_ref);
    for kinds in std::iter::once(&[][..]).chain(each) {
        let name = kinds.iter().fold("xxh3".to_owned(), |name, kind| name + "+" + kind.key());
        group.bench_function(name, |b| {
            let mut hasher = Hasher::new(DigestSet::of(kinds));
            b.iter(|| hasher.update(black_box(&bytes)));
        });
    }
    group.finish();
}

fn presence(c: &mut Criterion) {
    let temp = tempfile::tempdir().unwrap();
    let dir = Dir::open(temp.path()).unwrap();
    let total = 1u64 << 40;
    let version = Version { total_bytes: Some(total), tag: String::new() };
    let mut presence = Presence::create(&dir, "p", version).unwrap();
    presence.commit(&[0..total / 2]).unwrap();
    c.bench_function("presence/missing_of_1tib", |b| b.iter(|| presence.missing(total).len()));
    c.bench_function("presence/commit_64mib_durable", |b| {
        let mut at = total / 2;
        b.iter_batched(
            || {
                at += 1024 * UNIT_BYTES;
                at % total
            },
            |at| presence.commit(&[at..at + 1024 * UNIT_BYTES]).unwrap(),
            BatchSize::PerIteration,
        );
    });
}

/// Like an image: text-like bytes that compress two to one, bytes that do not, and zeroes.
fn image(len: usize) -> Vec<u8> {
    let mut state = 1_u64;
    let mut bytes = vec![0; len];
    for (index, page) in bytes.chunks_mut(4096).enumerate() {
        let mask = [0x0f, 0xff, 0x00, 0x0f][index % 4];
        for byte in page {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            *byte = (state >> 56) as u8 & mask;
        }
    }
    bytes
}

/// One stream from start to end through a buffer of one block; MiB/s are of the decoded bytes.
fn decoding(c: &mut Criterion) {
    let temp = tempfile::tempdir().unwrap();
    let (path, len) = (temp.path().join("image"), 32 * BLOCK_BYTES);
    std::fs::write(&path, image(len)).unwrap();
    let mut group = c.benchmark_group("decode_32mib");
    group.throughput(Throughput::Bytes(len as u64)).sample_size(10);
    for (codec, tool, level) in [
        (Codec::Gzip, "gzip", "-6"),
        (Codec::Xz, "xz", "-1"),
        (Codec::Zstd, "zstd", "-3"),
        (Codec::Bzip2, "bzip2", "-9"),
    ] {
        let Ok(packed) = Command::new(tool).args([level, "-c"]).arg(&path).output() else {
            println!("SKIPPED: {tool} is not installed");
            continue;
        };
        let (stream, mut room) = (packed.stdout, vec![0; BLOCK_BYTES]);
        group.bench_function(format!("{codec}/bedplate"), |b| {
            b.iter(|| {
                let limits = Limits { max_output_bytes: len as u64 };
                let mut decoder = Decoder::new(codec, limits).unwrap();
                let mut at = 0;
                while decoder.finish().is_err() {
                    at += decoder.decode(black_box(&stream[at..]), &mut room).unwrap().read;
                }
                assert_eq!(decoder.written_bytes(), len as u64);
            });
        });
        // The tool with its process and its reads: 32 MiB are long enough to hide most of that.
        let stored = temp.path().join("image.packed");
        std::fs::write(&stored, &stream).unwrap();
        group.bench_function(format!("{codec}/peer_tool"), |b| {
            b.iter(|| {
                let from = std::fs::File::open(&stored).unwrap();
                let mut command = Command::new(tool);
                command.args(["-d", "-c"]).stdin(from).stdout(Stdio::null());
                assert!(command.status().unwrap().success());
            });
        });
    }
    group.finish();
}

criterion_group!(benches, zero_detection, digests, presence, decoding);
criterion_main!(benches);
