//! Bytes as choices: a sound image of any kind, and some damage to it.
//!
//! The fuzz targets choose with it too, so this file uses nothing but `craft_big`.

use super::craft_big::{Built, FEATURE_NAMES, Mark, Piece, Plan, Snap};

/// The bytes; zeroes when they are used up.
#[derive(Debug)]
pub struct Choices<'a>(pub &'a [u8]);

impl Choices<'_> {
    fn byte(&mut self) -> u8 {
        let Some((&first, rest)) = self.0.split_first() else { return 0 };
        self.0 = rest;
        first
    }

    fn below(&mut self, limit: u8) -> u8 {
        self.byte() % limit
    }

    fn quad(&mut self) -> u64 {
        (0..8).fold(0, |value, _| value << 8 | u64::from(self.byte()))
    }

    /// What the clusters of a disk are.
    fn disk(&mut self, clusters: u64, plan: &Plan, shared: &[u64]) -> Vec<(u64, Piece)> {
        let mut disk: Vec<(u64, Piece)> = Vec::new();
        for _ in 0..self.below(20) {
            let at = u64::from(self.byte()) % clusters;
            if disk.iter().any(|(other, _)| *other == at) {
                continue;
            }
            let seed = self.byte();
            let piece = match self.below(8) {
                0 => Piece::Unallocated,
                1 if plan.version > 2 => Piece::Zero,
                2 if plan.version > 2 => Piece::Preallocated(seed),
                3 | 4 => Piece::Packed(seed),
                5 if plan.extended => {
                    let bits = self.quad();
                    // No subcluster is both.
                    Piece::Split(seed, bits & !(bits << 32))
                }
                6 if !shared.is_empty() => Piece::Shared(shared[usize::from(seed) % shared.len()]),
                _ => Piece::Data(seed),
            };
            disk.push((at, piece));
        }
        disk
    }

    /// A sound image with any mix of features, alone.
    pub fn plan(&mut self) -> Plan {
        let kind = self.byte();
        let extended = kind & 3 == 3;
        let cluster_bits = u32::from(if extended { 14 + self.below(2) } else { 9 + self.below(6) });
        let version = if kind & 3 == 2 { 2 } else { 3 };
        let cluster = 1_u64 << cluster_bits;
        let clusters = 1 + u64::from(self.below(200)).min((1 << 22) / cluster);
        let size_bytes = clusters * cluster - u64::from(self.byte()) % cluster;
        let mut plan = Plan { version, extended, ..Plan::new(cluster_bits, size_bytes.max(512)) };
        plan.zstd = version == 3 && kind & 4 != 0;
        plan.spare_l1 = usize::from(kind >> 6);
        if kind & 8 != 0 && version == 3 {
            plan.features = [u64::from(self.below(4)), self.quad(), self.quad() & !2];
            plan.header_len = 104 + 8 * usize::from(self.below(4));
            plan.zstd &= plan.header_len > 104;
        }
        if kind & 16 != 0 {
            for _ in 0..self.below(4) {
                let magic = if self.byte() & 1 == 0 {
                    FEATURE_NAMES
                } else {
                    u32::try_from(self.quad() >> 32).unwrap()
                };
                let len = usize::from(self.below(48));
                plan.extensions.push((magic, vec![self.byte(); len]));
            }
        }
        plan.disk = self.disk(clusters, &plan, &[]);
        if kind & 32 != 0 {
            let shared = plan.disk.iter().filter(|(_, piece)| matches!(piece, Piece::Data(_)));
            let shared: Vec<u64> = shared.map(|(at, _)| *at).collect();
            for id in ["1", "2"].into_iter().take(usize::from(1 + self.below(2))) {
                let extra_bytes = usize::from(self.below(4)) * 8;
                let disk = self.disk(clusters, &plan, &shared);
                plan.snapshots.push(Snap { id, name: "a snapshot", extra_bytes, disk });
            }
        }
        // Behind all else: bytes that were kept make nearly the images that they made before.
        if version == 3 {
            plan.refcount_order = [4, 3, 5, 6][usize::from(self.below(4))];
        }
        for name in ["b0", "b1"].into_iter().take(usize::from(self.below(3))) {
            if version == 3 {
                let granularity_bits = 9 + u32::from(self.below(10));
                let flags = u32::from(self.below(2)) * 2;
                plan.bitmaps.push(Mark { name, flags, granularity_bits });
                plan.features[2] |= 1;
            }
        }
        plan
    }

    /// Sets some fields to places, edges, or anything.
    pub fn damage(&mut self, built: &mut Built) {
        for _ in 0..self.below(8).saturating_sub(4) {
            let field = built.fields[usize::from(self.byte()) % built.fields.len()];
            let part = &mut built.bytes[field.at..field.at + field.len];
            let old = part.iter().fold(0, |value, &byte| value << 8 | u64::from(byte));
            let place = built.places[usize::from(self.byte()) % built.places.len()] as u64;
            let value = match self.below(6) {
                0 => old ^ 1 << self.below(64),
                1 => place,
                2 => place | u64::from(self.below(4)) << 62 | u64::from(self.below(2)),
                3 => old.wrapping_add(u64::from(self.byte())).wrapping_sub(128),
                4 => (old & (3 << 62)) | (self.quad() >> 20),
                _ => self.quad(),
            };
            part.copy_from_slice(&value.to_be_bytes()[8 - field.len..]);
        }
    }
}
