//! The hot functions of a transfer: finding zero pages, hashing, recording presence.
#![expect(clippy::unwrap_used, reason = "a failed unwrap is a failed benchmark")]

use std::hint::black_box;

use bedplate::disk::{DigestKind, DigestSet, Dir, Hasher, Presence, UNIT_BYTES, Version};
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

criterion_group!(benches, zero_detection, digests, presence);
criterion_main!(benches);
