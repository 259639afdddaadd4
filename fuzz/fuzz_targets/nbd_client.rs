//! Any bytes from a server of NBD: a client ends, and believes nothing that was not said.
#![no_main]

#[path = "../../tests/nbd_words/mod.rs"]
mod nbd_words;

use std::sync::OnceLock;

use bedplate::ring::BufPool;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    static POOL: OnceLock<BufPool> = OnceLock::new();
    let pool = POOL.get_or_init(|| BufPool::new(10));
    nbd_words::play(&nbd_words::server(data), pool);
});
