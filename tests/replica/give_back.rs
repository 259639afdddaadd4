//! Memory of decoded clusters goes back to the system while readers have it mapped.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bedplate::image::{Bounds, DecodedCache, Memory};

use crate::nbd_support::MIB;
use crate::protocol::is_root;
use crate::qcow2_common::{compressed, half_random, have_qemu};
use crate::reads::{MODES, assert_reads};
use crate::server::TestServer;

#[test]
fn readers_have_right_bytes_while_memory_is_given_back_under_their_eyes_and_comes_again() {
    if !have_qemu() {
        return;
    }
    let server = TestServer::start();
    // No zeroes: they are what is left of memory that was given back.
    let bytes: Vec<u8> = half_random(9, 12 * MIB).into_iter().map(|byte| byte | 16).collect();
    let image = compressed(server.dir.path(), "image", &bytes);
    let mib = MIB as u64;
    let bounds = Bounds { floor_bytes: mib, most_bytes: 64 * mib, reserve_bytes: 64 * mib };
    let available = Arc::new(AtomicU64::new(u64::MAX));
    let measured = Arc::clone(&available);
    let cache = DecodedCache::elastic(bounds, move || {
        let available_bytes = measured.load(Ordering::Relaxed);
        Some(Memory { total_bytes: u64::MAX, available_bytes })
    });
    let gives_back = cache.slab().unwrap().can_give_back();
    assert!(gives_back || !is_root(), "root can give memory back");
    server.add_on("disk", &image, None, cache.clone());
    let readers = AtomicU64::new(6);
    std::thread::scope(|scope| {
        for seed in 0..6 {
            let (server, bytes, readers) = (&server, &bytes, &readers);
            scope.spawn(move || {
                let _ends = Ends(readers);
                let replica = server.attach("disk", MODES[seed % 2]);
                for round in 0..8 {
                    assert_reads(&replica, bytes, seed as u64 * 10 + round);
                }
            });
        }
        let (mut shrunk, mut grown) = (0, 0);
        while readers.load(Ordering::Relaxed) > 0 {
            available.store(0, Ordering::Relaxed);
            let before = cache.memory_bytes();
            cache.look();
            let after = cache.memory_bytes();
            shrunk += u32::from(after < before);
            available.store(u64::MAX, Ordering::Relaxed);
            cache.look();
            // Until readers have some of it decoded again.
            while gives_back
                && readers.load(Ordering::Relaxed) > 0
                && cache.memory_bytes() < after + 2 * mib
            {
                std::thread::yield_now();
            }
            grown += u32::from(cache.memory_bytes() > after);
        }
        assert!(!gives_back || shrunk > 3 && grown > 3, "{shrunk} times less, {grown} times more");
    });
}

/// One reader fewer, also if it panics.
struct Ends<'a>(&'a AtomicU64);

impl Drop for Ends<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}
