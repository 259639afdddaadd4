//! Byte counts as people type them: `64K`, `1.5G` is not one, `2M`, `512`.
//!
//! Why: nobody counts zeroes.
//! Never: rounds, or takes a size past 2^64.

/// Parses a count of bytes with an optional suffix K, M, G or T (powers of 1024).
///
/// # Errors
/// The text isn't such a count, or is past 2^64.
pub fn parse_bytes(text: &str) -> Result<u64, String> {
    let refuse = || format!("{text:?} is not a size; give bytes, or a number with K, M, G or T");
    let upper = text.trim().to_ascii_uppercase();
    let upper = upper.strip_suffix("IB").or(upper.strip_suffix('B')).unwrap_or(&upper);
    let (digits, shift) = match upper.char_indices().next_back() {
        Some((at, 'K')) => (&upper[..at], 10),
        Some((at, 'M')) => (&upper[..at], 20),
        Some((at, 'G')) => (&upper[..at], 30),
        Some((at, 'T')) => (&upper[..at], 40),
        Some(_) | None => (upper, 0),
    };
    if digits.is_empty() || !digits.bytes().all(|b| b.is_ascii_digit()) {
        return Err(refuse());
    }
    let number: u64 = digits.parse().map_err(|_| refuse())?;
    number.checked_mul(1 << shift).ok_or_else(refuse)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_binary_suffixes() {
        for (text, bytes) in [
            ("0", 0),
            ("512", 512),
            ("64K", 65_536),
            ("2m", 2 << 20),
            ("1GiB", 1 << 30),
            ("3TB", 3 << 40),
        ] {
            assert_eq!(parse_bytes(text), Ok(bytes), "{text}");
        }
        for bad in ["", "K", "-1", "1.5G", "1X", "99999999999999999999", "99999999999T", "ä"] {
            assert!(parse_bytes(bad).is_err(), "{bad}");
        }
    }
}
