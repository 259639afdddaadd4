//! Promise: a transfer ends with the right bytes or one clear error, whatever happens to it.
#![expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]
#![expect(clippy::cast_possible_truncation, reason = "test files are small")]

mod bad_input;
#[path = "../blocks_common/mod.rs"]
mod blocks_common;
#[path = "../control_support/mod.rs"]
mod control_support;
mod crash;
mod daemon;
mod digests;
mod expand;
mod fallback;
mod fault_server;
mod faults;
mod file_systems;
mod full_disk;
mod kill;
mod loop_disk;
mod matrix;
#[path = "../nginx_support/mod.rs"]
mod nginx_support;
mod parallel;
mod spool;
mod steer;
mod store_faults;
mod trickle;
mod unpack;
mod upload;

use std::path::Path;

use bedplate::fetch::{Engine, Policy};
use bedplate::ring::{Choice, probe};

/// Bytes that look random and have zero pages, the same for the same length and seed.
pub fn content(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut bytes = vec![0u8; len];
    for (index, page) in bytes.chunks_mut(4096).enumerate() {
        if index % 4 == 1 {
            continue;
        }
        for word in page.chunks_mut(8) {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            word.copy_from_slice(&state.to_le_bytes()[..word.len()]);
        }
    }
    bytes
}

/// SHA-256 in hex.
pub fn sha256(bytes: &[u8]) -> String {
    use sha2::Digest;
    bedplate::names::hex(&sha2::Sha256::digest(bytes))
}

/// An engine for files in `dir` that insists only briefly.
pub fn engine(dir: &Path, sink: Choice) -> Engine {
    let policy = Policy {
        stall_timeout: std::time::Duration::from_millis(300),
        backoff: std::time::Duration::from_millis(1),
        ..Policy::default()
    };
    Engine::alone(probe(dir, sink).expect("a sink"), policy, 8)
}
