//! Kubernetes' quantities of bytes: `10Gi`, `1.5G`, `512M`, `1073741824`.
//!
//! Why: a claim says its size so.
//! How: an exact decimal number and a suffix; a part of a byte counts as one, as in Kubernetes.
//! Never: overflows in silence.
//! Start at [`parse_quantity`].

/// Why a quantity is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{found:?} is no size; give a number with Ki, Mi, Gi, Ti, Pi, k, M, G, T or P, or none")]
pub struct BadQuantity {
    /// The text as given, cut to 40 characters.
    pub found: String,
}

/// Bytes of a quantity.
///
/// # Errors
/// [`BadQuantity`] if it is no number, has another suffix, or does not fit 64 bits.
pub fn parse_quantity(text: &str) -> Result<u64, BadQuantity> {
    let bad = || BadQuantity { found: text.chars().take(40).collect() };
    let number_len = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, suffix) = text.split_at(number_len);
    let unit: u128 = match suffix {
        "" => 1,
        "k" => 1000,
        "M" => 1000_u128.pow(2),
        "G" => 1000_u128.pow(3),
        "T" => 1000_u128.pow(4),
        "P" => 1000_u128.pow(5),
        "Ki" => 1 << 10,
        "Mi" => 1 << 20,
        "Gi" => 1 << 30,
        "Ti" => 1 << 40,
        "Pi" => 1 << 50,
        _ => return Err(bad()),
    };
    let (whole, part) = number.split_once('.').unwrap_or((number, ""));
    if whole.is_empty() || whole.len() > 20 || part.len() > 12 || part.contains('.') {
        return Err(bad());
    }
    let digits: u128 = format!("{whole}{part}").parse().map_err(|_| bad())?;
    let scale = (0..part.len()).fold(1_u128, |scale, _| scale * 10);
    let bytes = digits.checked_mul(unit).ok_or_else(bad)?.div_ceil(scale);
    u64::try_from(bytes).map_err(|_| bad())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_those_of_kubernetes() {
        for (text, bytes) in [
            ("1073741824", 1 << 30),
            ("10Gi", 10 << 30),
            ("1.5Gi", 3 << 29),
            ("2G", 2_000_000_000),
            ("100k", 100_000),
            ("0.5", 1),
            ("18446744073709551615", u64::MAX),
        ] {
            assert_eq!(parse_quantity(text), Ok(bytes), "{text}");
        }
        for bad in
            ["", "Gi", "-1", "1.2.3", "1GiB", "1e3", ".5", "20000000Pi", "99999999999999999999"]
        {
            assert!(parse_quantity(bad).is_err(), "{bad}");
        }
    }
}
