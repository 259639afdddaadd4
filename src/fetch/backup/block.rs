//! One block of a backup: a file, compressed or not, named by the digest of what is in it.
//!
//! Why: a block may be shared by many backups, of which some say another compression than it has.
//! How: decoded as the record says, else in the other ways, until the digest is right.
//! Never: makes more than [`MAX_BYTES`] of a block.
//! Start at [`decode`].

use std::borrow::Cow;
use std::io::Read;

use sha2::{Digest, Sha512};

use crate::names::hex;

/// Longest block, decoded. Longhorn's have 2 MiB, newer ones up to 16.
pub(super) const MAX_BYTES: u64 = 16 << 20;

/// How blocks are compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Codec {
    /// RFC 1952; also what the oldest records mean, which say nothing.
    Gzip,
    /// LZ4's frame format.
    Lz4,
    /// As they are.
    None,
}

impl Codec {
    const ALL: [Self; 3] = [Self::Lz4, Self::Gzip, Self::None];

    pub(super) fn parse(text: &str) -> Option<Self> {
        match text {
            "" | "gzip" => Some(Self::Gzip),
            "lz4" => Some(Self::Lz4),
            "none" => Some(Self::None),
            _ => None,
        }
    }

    /// What is in `bytes`, if they are of this kind.
    fn decode(self, bytes: &[u8]) -> Option<Cow<'_, [u8]>> {
        let all = |mut from: Box<dyn Read + '_>| {
            let mut out = Vec::new();
            let read = from.as_mut().take(MAX_BYTES + 1).read_to_end(&mut out);
            read.is_ok().then_some(Cow::Owned(out))
        };
        match self {
            Self::Gzip => all(Box::new(flate2::read::GzDecoder::new(bytes))),
            Self::Lz4 => all(Box::new(lz4_flex::frame::FrameDecoder::new(bytes))),
            Self::None => Some(Cow::Borrowed(bytes)),
        }
    }
}

/// What is in the block of this digest; `None` if it is damaged.
pub(super) fn decode(codec: Codec, bytes: &[u8], digest: &str) -> Option<Vec<u8>> {
    let others = Codec::ALL.into_iter().filter(|other| *other != codec);
    let mut ways = std::iter::once(codec).chain(others).filter_map(|codec| codec.decode(bytes));
    let is_it = |found: &Cow<'_, [u8]>| {
        let half = Sha512::digest(found);
        found.len() as u64 <= MAX_BYTES && half.get(..32).is_some_and(|half| hex(half) == digest)
    };
    ways.find(is_it).map(Cow::into_owned)
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn digest(bytes: &[u8]) -> String {
        hex(&Sha512::digest(bytes)[..32])
    }

    #[test]
    fn a_block_is_found_in_whichever_way_it_is_compressed_and_damage_is_told() {
        let bytes: Vec<u8> = (0..100_000u32).flat_map(|n| (n / 7).to_le_bytes()).collect();
        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        gzip.write_all(&bytes).unwrap();
        let mut lz4 = lz4_flex::frame::FrameEncoder::new(Vec::new());
        lz4.write_all(&bytes).unwrap();
        let packed = [gzip.finish().unwrap(), lz4.finish().unwrap(), bytes.clone()];
        for stored in &packed {
            for codec in Codec::ALL {
                assert_eq!(decode(codec, stored, &digest(&bytes)).as_ref(), Some(&bytes));
                assert_eq!(decode(codec, stored, &digest(b"another")), None);
                assert_eq!(decode(codec, &stored[..stored.len() / 2], &digest(&bytes)), None);
            }
        }
    }

    #[test]
    fn a_block_that_grows_without_end_is_cut_off() {
        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        for _ in 0..=MAX_BYTES >> 20 {
            gzip.write_all(&[0; 1 << 20]).unwrap();
        }
        let bomb = gzip.finish().unwrap();
        let whole = vec![0; usize::try_from(MAX_BYTES + (1 << 20)).unwrap()];
        assert_eq!(decode(Codec::Gzip, &bomb, &digest(&whole)), None);
    }
}
