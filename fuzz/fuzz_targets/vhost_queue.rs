//! Any memory of a guest: what it says of requests writes only where it says, and ends.
//!
//! The input is a byte of features and size, a byte of regions, and the memory from address 0 on:
//! descriptors first, requests at 4 KiB, answers at 8 KiB.
#![no_main]

mod common;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::OnceLock;

use bedplate::map::{GuestMemory, GuestRegion};
use bedplate::serve::vhost_user::{Place, drain};
use common::exports;
use libfuzzer_sys::fuzz_target;

const LEN: u64 = 64 << 10;
const USER: u64 = 1 << 40;
/// After the guest's memory in its file; nobody may write there.
const BEYOND: u64 = 4096;

/// A file of memory, mapped as one region and as three.
fn memory() -> &'static (File, [GuestMemory; 2]) {
    static MEMORY: OnceLock<(File, [GuestMemory; 2])> = OnceLock::new();
    MEMORY.get_or_init(|| {
        let fd = rustix::fs::memfd_create("guest", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        let file = File::from(fd);
        file.set_len(LEN + BEYOND).unwrap();
        let region = |at: u64, len_bytes: u64| GuestRegion {
            guest_at: at,
            user_at: USER + at,
            len_bytes,
            file: file.try_clone().unwrap(),
            file_at: at,
        };
        let one = GuestMemory::new(vec![region(0, LEN)]).unwrap();
        let parts = [(0, 16 << 10), (16 << 10, 16 << 10), (40 << 10, 24 << 10)];
        let three = parts.into_iter().map(|(at, len)| region(at, len)).collect();
        (file, [one, GuestMemory::new(three).unwrap()])
    })
}

fuzz_target!(|data: &[u8]| {
    let [mode, shape, bytes @ ..] = data else { return };
    let (file, memories) = memory();
    let mut all = vec![0; LEN as usize];
    let len = bytes.len().min(all.len());
    all[..len].copy_from_slice(&bytes[..len]);
    file.write_all_at(&all, 0).unwrap();
    let features = 1 << 32 | u64::from(mode & 3) << 28;
    let size = 1 << (mode >> 4 & 7);
    let place = Place { size, descriptors: USER, available: USER + 4096, used: USER + 8192 };
    let export = exports().list().into_iter().next().expect("an export");
    let _stood = drain(&export, &memories[usize::from(shape & 1)], place, features, 512);
    let mut beyond = [1; BEYOND as usize];
    file.read_exact_at(&mut beyond, LEN).unwrap();
    assert!(beyond.iter().all(|byte| *byte == 0), "written past the memory");
    if shape & 1 == 1 {
        let mut gap = [0; 8 << 10];
        file.read_exact_at(&mut gap, 32 << 10).unwrap();
        assert!(gap[..] == all[32 << 10..40 << 10], "written between the regions");
    }
});
