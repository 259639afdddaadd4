//! The plan: what is fetched, what is zero, and what is promised, for any tables.
use std::ops::Range;

use proptest::prelude::*;

use super::plan::Plan;
use crate::disk::UNIT_BYTES;
use crate::image::qcow2::{Cluster, Given, Header, Image, Packed};
use crate::units::FileOffset;

/// An image of `clusters` clusters of `1 << bits` bytes, the last one short by `short` sectors.
fn image(bits: u32, clusters: u64, short: u64) -> Image {
    let size = (clusters << bits) - (short * 512).min((1 << bits) - 512);
    let l1_entries = clusters.div_ceil(1 << (bits - 3));
    let mut head = vec![0u8; 1 << bits];
    let mut put = |at: usize, bytes: &[u8]| head[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, b"QFI\xfb");
    put(4, &2u32.to_be_bytes());
    put(20, &bits.to_be_bytes());
    put(24, &size.to_be_bytes());
    put(36, &u32::try_from(l1_entries).unwrap().to_be_bytes());
    put(40, &(1u64 << bits).to_be_bytes());
    put(48, &(1u64 << bits).to_be_bytes());
    put(56, &1u32.to_be_bytes());
    let header = Header::parse(&head, 1 << 40, Given::default()).unwrap();
    let l1 = vec![0; usize::try_from(l1_entries * 8).unwrap()];
    Image::from_l1(header, 1 << 40, &l1).unwrap()
}

fn meaning(kind: u8, bits: u32, index: u64) -> Cluster {
    match kind % 4 {
        0 => Cluster::Unallocated,
        1 => Cluster::Zero,
        2 => Cluster::Data(FileOffset((index + 8) << bits)),
        _ => Cluster::Compressed(Packed {
            at: FileOffset(((index + 8) << bits) + 77),
            len_bytes: 300,
        }),
    }
}

fn covers(ranges: &[Range<u64>], at: u64) -> bool {
    ranges.iter().any(|range| range.contains(&at))
}

proptest! {
    /// Each missing byte of the disk is either in a zero range or in a planned cluster, and never
    /// in both; what is here is not fetched; every stored byte is in a range of the source.
    #[test]
    fn every_missing_byte_has_one_way_to_come(
        bits in prop::sample::select(vec![9u32, 12, 16, 17, 21]),
        kinds in prop::collection::vec(any::<u8>(), 2..300),
        short in 0u64..100,
        here in prop::collection::vec(any::<bool>(), 64),
    ) {
        let image = image(bits, kinds.len() as u64, short);
        let total = image.header().size_bytes;
        let units = total.div_ceil(UNIT_BYTES);
        let mut missing: Vec<Range<u64>> = Vec::new();
        for unit in (0..units).filter(|u| !here[usize::try_from(u % 64).unwrap()]) {
            let range = unit * UNIT_BYTES..((unit + 1) * UNIT_BYTES).min(total);
            match missing.last_mut() {
                Some(last) if last.end == range.start => last.end = range.end,
                Some(_) | None => missing.push(range),
            }
        }
        let missing = super::expand::whole_clusters(image.header(), missing);
        let mut plan = Plan::new(&image, &missing, 0);
        for (index, kind) in kinds.iter().enumerate() {
            let index = index as u64;
            plan.add(index..index + 1, meaning(*kind, bits, index));
        }
        plan.close();
        let (zeroes, ranges) = (plan.zeroes(), plan.ranges());
        let planned: Vec<_> = plan.entries.iter().map(|entry| plan.guest(entry)).collect();
        for at in (0..total).step_by(usize::try_from(UNIT_BYTES.min(1 << bits)).unwrap()) {
            let unit = at / UNIT_BYTES * UNIT_BYTES..(at / UNIT_BYTES + 1) * UNIT_BYTES;
            let stored_in_unit = planned.iter().any(|g| g.start < unit.end && unit.start < g.end);
            if covers(&missing, at) {
                prop_assert!(covers(&zeroes, at) != stored_in_unit, "byte {at}");
            } else {
                prop_assert!(!covers(&zeroes, at) && !covers(&planned, at), "byte {at} is here");
            }
        }
        for zero in &zeroes {
            prop_assert!(zero.start % UNIT_BYTES == 0);
            prop_assert!(zero.end % UNIT_BYTES == 0 || zero.end == total);
        }
        for entry in &plan.entries {
            let stored = entry.stored();
            prop_assert!(ranges.iter().any(|r| r.start <= stored.start && stored.end <= r.end));
        }
        prop_assert!(ranges.windows(2).all(|pair| pair[0].end < pair[1].start));
        // What is here is held against what comes: it is all there is besides, and nothing more is made.
        let mut checking = Plan::new(&image, &missing, 0).checking_kept(true);
        for (index, kind) in kinds.iter().enumerate() {
            let index = index as u64;
            checking.add(index..index + 1, meaning(*kind, bits, index));
        }
        checking.close();
        prop_assert_eq!((checking.zeroes(), checking.data_bytes()), (zeroes, plan.data_bytes()));
        let (kept, made): (Vec<_>, Vec<_>) = checking.entries.iter().partition(|entry| entry.kept);
        prop_assert!(made.into_iter().eq(&plan.entries));
        let kept: Vec<_> = kept.into_iter().map(|entry| checking.guest(entry)).collect();
        let kept_zeroes = checking.kept_zeroes();
        for at in (0..total).step_by(512) {
            let found = [&kept, &kept_zeroes, &missing].map(|ranges| covers(ranges, at));
            prop_assert_eq!(found.into_iter().filter(|found| *found).count(), 1, "byte {}", at);
        }
    }
}

#[test]
fn entries_that_reach_into_a_range_are_found() {
    let image = image(16, 32, 0);
    let mut plan = Plan::new(&image, std::slice::from_ref(&(0..32 << 16)), 0);
    for index in 0..32 {
        plan.add(index..index + 1, meaning(2 + u8::try_from(index % 2).unwrap(), 16, index));
    }
    plan.close();
    let found: Vec<_> = plan.reaching(&((9 << 16) + 100..(11 << 16) + 1)).collect();
    // Cluster 1 is compressed and begins at byte 77; cluster 3 begins behind the range.
    assert_eq!(found, vec![1, 2]);
}
