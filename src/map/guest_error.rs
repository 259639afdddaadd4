//! Why the memory that a VMM offers is refused.
//!
//! Why: what is wrong with it has to be found in the VMM, by the addresses that it knows.
//! Never: says where it is mapped here.
//! Start at [`GuestMemoryError`].

use std::io;

use super::guest::GuestMemory;

/// Why a guest's memory is refused.
#[derive(Debug)]
#[expect(missing_docs, reason = "each field is named in the message")]
pub enum GuestMemoryError {
    /// Another number of regions than there may be.
    Count { regions: usize },
    /// What is said of a region cannot be.
    Region { guest_at: u64, len_bytes: u64, rule: &'static str },
    /// The system refuses to map it.
    Map { guest_at: u64, len_bytes: u64, source: io::Error },
}

impl std::fmt::Display for GuestMemoryError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Count { regions } => {
                let most = GuestMemory::MAX_REGIONS;
                write!(f, "guest memory of {regions} regions: 1 to {most} can be")
            }
            Self::Region { guest_at, len_bytes, rule } => {
                write!(f, "guest memory at {guest_at:#x}, {len_bytes:#x} bytes: {rule}")
            }
            Self::Map { guest_at, len_bytes, .. } => {
                write!(f, "guest memory at {guest_at:#x}, {len_bytes:#x} bytes: cannot be mapped")
            }
        }
    }
}

impl std::error::Error for GuestMemoryError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Map { source, .. } => Some(source),
            Self::Count { .. } | Self::Region { .. } => None,
        }
    }
}
