//! The checksum of VHDX structures: CRC-32C (Castagnoli).
//!
//! Why: a torn header must not be taken for the current one.
//! How: a byte at a time through a table; at most 64 KiB are summed when an image is opened.
//! Never: sums data.
//! Start at [`of_zeroed`].

const TABLE: [u32; 256] = table();

const fn table() -> [u32; 256] {
    let mut table = [0; 256];
    let mut byte: u32 = 0;
    while byte < 256 {
        let (mut value, mut bit) = (byte, 0);
        while bit < 8 {
            value = if value & 1 == 1 { value >> 1 ^ 0x82f6_3b78 } else { value >> 1 };
            bit += 1;
        }
        table[byte as usize] = value;
        byte += 1;
    }
    table
}

/// The checksum of `bytes` with the four from `skip` on, where it is stored, taken for zero.
pub(super) fn of_zeroed(bytes: &[u8], skip: usize) -> u32 {
    let mut crc = u32::MAX;
    for (at, &byte) in bytes.iter().enumerate() {
        let byte = if (skip..skip + 4).contains(&at) { 0 } else { byte };
        let [low, ..] = crc.to_le_bytes();
        let entry = TABLE.get(usize::from(low ^ byte)).copied().unwrap_or_default();
        crc = crc >> 8 ^ entry;
    }
    !crc
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_the_castagnoli_polynomial() {
        assert_eq!(of_zeroed(b"123456789", 100), 0xe306_9283);
    }

    #[test]
    fn the_stored_checksum_is_left_out() {
        assert_eq!(of_zeroed(b"ab\xff\xff\xff\xffcd", 2), of_zeroed(b"ab\0\0\0\0cd", 100));
        assert_ne!(of_zeroed(b"ab\xff\xff\xff\xffcd", 2), of_zeroed(b"ab\0\0\0\0ce", 100));
    }
}
