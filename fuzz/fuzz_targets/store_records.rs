//! The small files of a copy, as somebody else or a dying disk may have left them.
#![no_main]

use bedplate::disk::{CopyCfg, DigestRecord, Dir, Presence};
use libfuzzer_sys::fuzz_target;

/// Sets the checksums of all pages right: otherwise no mutation gets past them.
fn sealed(bytes: &[u8]) -> Vec<u8> {
    let mut pages = bytes.to_vec();
    pages.resize(bytes.len().next_multiple_of(4096), 0);
    for page in pages.chunks_mut(4096) {
        let crc = bedplate::disk::page_crc(&page[..4092]);
        page[4092..].copy_from_slice(&crc.to_le_bytes());
    }
    pages
}

fuzz_target!(|bytes: &[u8]| {
    let _ = serde_json::from_slice::<CopyCfg>(bytes);
    let _ = bedplate::fetch::BackupRecord::parse(bytes);
    let temp = tempfile::tempdir().expect("a directory");
    std::fs::write(temp.path().join("p"), sealed(bytes)).expect("written");
    let dir = Dir::open(temp.path()).expect("opened");
    if let Ok(Some(presence)) = Presence::load(&dir, "p") {
        let total = presence.version().total_bytes.unwrap_or(0);
        let mut end = 0;
        for range in presence.missing(total.min(1 << 40)) {
            assert!(range.start >= end && range.start < range.end && range.end <= total);
            end = range.end;
        }
    }
    if let Ok(Some(record)) = DigestRecord::load(&dir, "p") {
        assert_eq!(record.digests.xxh3_per_mib.len() as u64, record.size_bytes.div_ceil(1 << 20));
    }
});
