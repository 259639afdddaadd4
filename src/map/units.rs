//! The two address spaces of an image, as types that cannot be mixed.
//!
//! Why: a position in the stored file and a position in the guest's disk are both "an offset";
//! every silent mix-up of the two serves wrong bytes.
//! How: newtypes over `u64` bytes, with only the arithmetic that keeps its meaning.
//! Never: converts one into the other; only a cluster map may do that.
//! Start at [`FileOffset`] and [`GuestOffset`].

use std::fmt;

/// Bytes in one KiB, MiB and GiB: sizes read better as `64 * KIB`.
pub const KIB: u64 = 1024;
/// Bytes in one MiB.
pub const MIB: u64 = 1024 * KIB;
/// Bytes in one GiB.
pub const GIB: u64 = 1024 * MIB;
/// Bytes in one TiB.
pub const TIB: u64 = 1024 * GIB;

/// Byte position in the stored file of a copy. Never added to a [`GuestOffset`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FileOffset(pub u64);

/// Byte position in the disk as a guest sees it. Never added to a [`FileOffset`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct GuestOffset(pub u64);

macro_rules! offset {
    ($name:ident) => {
        impl $name {
            /// This position `len_bytes` further on, or `None` past 2^64.
            #[must_use]
            pub fn checked_add(self, len_bytes: u64) -> Option<Self> {
                self.0.checked_add(len_bytes).map(Self)
            }

            /// This position `len_bytes` further on.
            ///
            /// # Panics
            /// Past 2^64: the caller has checked the range against a file or view size.
            #[must_use]
            pub fn advance(self, len_bytes: u64) -> Self {
                Self(self.0.checked_add(len_bytes).expect("range was checked against the size"))
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:#x}", self.0)
            }
        }
    };
}

offset!(FileOffset);
offset!(GuestOffset);

/// `bytes` for people: binary units, one decimal from KiB on (`1.4 GiB`).
#[must_use]
pub fn human_bytes(bytes: u64) -> String {
    const UNITS: [(&str, u64); 4] = [("TiB", TIB), ("GiB", GIB), ("MiB", MIB), ("KiB", KIB)];
    for (name, size) in UNITS {
        if bytes >= size {
            let tenths = u128::from(bytes) * 10 / u128::from(size);
            return format!("{}.{} {name}", tenths / 10, tenths % 10);
        }
    }
    format!("{bytes} B")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_printed_in_binary_units() {
        assert_eq!(human_bytes(0), "0 B");
        assert_eq!(human_bytes(1023), "1023 B");
        assert_eq!(human_bytes(1536), "1.5 KiB");
        assert_eq!(human_bytes(3 * GIB), "3.0 GiB");
        assert_eq!(human_bytes(u64::MAX), "16777215.9 TiB");
    }

    #[test]
    fn an_offset_does_not_wrap() {
        assert_eq!(FileOffset(u64::MAX).checked_add(1), None);
        assert_eq!(GuestOffset(1).checked_add(2), Some(GuestOffset(3)));
    }
}
