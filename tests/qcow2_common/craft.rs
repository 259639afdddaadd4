//! A small sound image made by hand, to be damaged byte by byte.

use super::Random;

/// Bytes of a cluster in the crafted image.
pub const CLUSTER: usize = 4096;
/// Where things are in the crafted image.
pub const L1_AT: usize = 3 * CLUSTER;
pub const L2_AT: usize = 4 * CLUSTER;
pub const DATA_AT: usize = 5 * CLUSTER;
pub const PACKED_AT: usize = 7 * CLUSTER;
/// Clusters of the disk.
pub const CLUSTERS: usize = 16;

/// The bit that says "compressed", and the descriptor of 4 KiB clusters: x = 62 - (12 - 8).
pub const COMPRESSED: u64 = 1 << 62;
pub const SECTORS_SHIFT: u32 = 58;

/// The image's bytes, and where its fields are.
#[derive(Clone)]
pub struct Crafted {
    pub bytes: Vec<u8>,
}

impl Crafted {
    /// Version 3, 4 KiB clusters, a disk of 16 clusters: 0 and 1 data, 2 zero flag, 3 zero flag
    /// with an offset, 4 and 5 deflate at even and odd offsets, the rest unallocated.
    pub fn new() -> Self {
        let mut image = Self { bytes: vec![0; 9 * CLUSTER] };
        image.put(0, b"QFI\xfb").put32(4, 3).put32(20, 12);
        image.put64(24, (CLUSTERS * CLUSTER) as u64);
        image.put32(36, 1).put64(40, L1_AT as u64);
        image.put64(48, CLUSTER as u64).put32(56, 1);
        image.put32(96, 4).put32(100, 112);
        // Refcount table with one block, in which all nine clusters are used once.
        image.put64(CLUSTER, 2 * CLUSTER as u64);
        for n in 0..9 {
            image.put(2 * CLUSTER + 2 * n, &1_u16.to_be_bytes());
        }
        image.put64(L1_AT, 1 << 63 | L2_AT as u64);
        let (one, two) = (deflate(&pattern(1)), deflate(&pattern(2)));
        let odd = (PACKED_AT + one.len()) | 1;
        image.put(PACKED_AT, &one).put(odd, &two);
        image.l2(0, 1 << 63 | DATA_AT as u64).l2(1, 1 << 63 | (DATA_AT + CLUSTER) as u64);
        image.l2(2, 1).l2(3, 1 << 63 | 1 | DATA_AT as u64);
        image.l2(4, packed(PACKED_AT, one.len())).l2(5, packed(odd, two.len()));
        image.put(DATA_AT, &pattern(3)).put(DATA_AT + CLUSTER, &pattern(4));
        image
    }

    pub fn put(&mut self, at: usize, bytes: &[u8]) -> &mut Self {
        self.bytes[at..at + bytes.len()].copy_from_slice(bytes);
        self
    }

    pub fn put32(&mut self, at: usize, value: u32) -> &mut Self {
        self.put(at, &value.to_be_bytes())
    }

    pub fn put64(&mut self, at: usize, value: u64) -> &mut Self {
        self.put(at, &value.to_be_bytes())
    }

    /// Sets entry `index` of the L2 table.
    pub fn l2(&mut self, index: usize, entry: u64) -> &mut Self {
        self.put64(L2_AT + 8 * index, entry)
    }
}

/// The L2 entry of a stream of `len` bytes at `at`.
pub fn packed(at: usize, len: usize) -> u64 {
    let sectors = (at % 512 + len).div_ceil(512) as u64 - 1;
    COMPRESSED | sectors << SECTORS_SHIFT | at as u64
}

/// A cluster of bytes that compress somewhat.
pub fn pattern(seed: u64) -> Vec<u8> {
    let mut random = Random(seed);
    (0..CLUSTER).map(|_| random.next().to_le_bytes()[0] & 3).collect()
}

pub fn deflate(bytes: &[u8]) -> Vec<u8> {
    let mut out = vec![0; 2 * bytes.len() + 1024];
    let level = libdeflater::CompressionLvl::default();
    let len = libdeflater::Compressor::new(level).deflate_compress(bytes, &mut out).unwrap();
    out.truncate(len);
    out
}
