//! Any bytes as the start of a file: the header parser must judge them, in bounds.
#![no_main]

use bedplate::image::qcow2::{Given, Header};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    for file_len_bytes in [data.len() as u64, 1 << 30, u64::MAX] {
        let Ok(header) = Header::parse(data, file_len_bytes, Given::default()) else { continue };
        assert!(header.l1.end <= file_len_bytes);
        assert!(header.l1_entries * 8 <= header.l1.end - header.l1.start);
        assert!(header.l1.start >= header.cluster_bits.size_bytes());
        assert!(header.size_bytes >= 512 && header.size_bytes % 512 == 0);
        let mapped =
            header.l1_entries << (header.l2_bits() + header.cluster_bits.get());
        assert!(mapped >= header.size_bytes);
    }
});
