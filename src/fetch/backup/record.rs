//! What a backup of an image says of itself: its `backing-image.cfg`.
//!
//! Why: it is read from a directory that others write.
//! How: JSON as Longhorn's backup store writes it: sizes as text, blocks with their offset and the first
//! 256 bits of their SHA-512. Offsets have to grow, and every name to be a digest.
//! Never: takes a record that is not complete, or a block outside of the image.
//! Start at [`BackupRecord::parse`].

use std::fmt;
use std::ops::Range;

use serde::de::{IgnoredAny, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};
use sha2::{Digest, Sha512};

use super::BackupFault;
use super::block::{Codec, decode};
use super::in_units;
use crate::disk::UNIT_BYTES;
use crate::names::hex;

/// Hex digits of a block's digest.
const DIGEST_LEN: usize = 64;
/// Most blocks: those of 2 MiB of an image of 8 TiB.
const MAX_BLOCKS: usize = 4 << 20;

/// A backup that is complete.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BackupRecord {
    /// Length of the image's file in bytes.
    pub size_bytes: u64,
    /// SHA-512 of the image's file, lower-case hex, if it was known.
    pub sha512: Option<String>,
    pub(super) codec: Codec,
    pub(super) blocks: Vec<Block>,
}

/// One block.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Block {
    /// Where it begins in the image's file.
    pub(super) offset: u64,
    /// How many bytes there are up to the next one, or to the end.
    pub(super) room: u64,
    /// The first half of its SHA-512, lower-case hex.
    pub(super) digest: String,
}

impl Block {
    /// Where it is, beneath the store.
    pub(super) fn path(&self) -> String {
        let (first, second) = (self.digest.get(..2), self.digest.get(2..4));
        let (first, second) = (first.unwrap_or_default(), second.unwrap_or_default());
        format!("blocks/{first}/{second}/{}.blk", self.digest)
    }

    /// Its bytes, in whole units, made of what is stored and checked.
    pub(super) fn bytes(
        &self,
        record: &BackupRecord,
        stored: &[u8],
    ) -> Result<Vec<u8>, BackupFault> {
        let Self { offset, room, digest } = self;
        let damaged = || BackupFault::Block { place: self.path() };
        let mut bytes = decode(record.codec, stored, digest).ok_or_else(damaged)?;
        let len = bytes.len() as u64;
        let over = bytes.get(usize::try_from(*room).unwrap_or(usize::MAX)..).unwrap_or_default();
        // The last block may be filled up to its usual length.
        let is_last = offset + room == record.size_bytes;
        if over.iter().any(|byte| *byte != 0) || !over.is_empty() && !is_last {
            return Err(BackupFault::TooLong { at: *offset, len, room: *room });
        }
        let whole = usize::try_from(in_units(len, *room)).unwrap_or(usize::MAX);
        bytes.resize(whole, 0);
        Ok(bytes)
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Written {
    size: String,
    #[serde(default)]
    checksum: String,
    #[serde(default)]
    compression_method: String,
    #[serde(default)]
    complete_time: String,
    #[serde(default)]
    blocks: Option<WrittenBlocks>,
}

/// At most [`MAX_BLOCKS`] of them; `None` if there are more. What would be too much is not kept.
struct WrittenBlocks(Option<Vec<WrittenBlock>>);

impl<'de> Deserialize<'de> for WrittenBlocks {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct Blocks;

        impl<'de> Visitor<'de> for Blocks {
            type Value = WrittenBlocks;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a list of blocks")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<WrittenBlocks, A::Error> {
                let mut blocks = Vec::new();
                while let Some(block) = seq.next_element()? {
                    if blocks.len() == MAX_BLOCKS {
                        while seq.next_element::<IgnoredAny>()?.is_some() {}
                        return Ok(WrittenBlocks(None));
                    }
                    blocks.push(block);
                }
                Ok(WrittenBlocks(Some(blocks)))
            }
        }

        from.deserialize_seq(Blocks)
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct WrittenBlock {
    offset: u64,
    block_checksum: String,
}

fn is_hex(text: &str, len: usize) -> bool {
    let hex = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
    text.len() == len && text.bytes().all(hex)
}

impl BackupRecord {
    /// Reads the text of a record.
    ///
    /// # Errors
    /// [`BackupFault::Record`] with what is wrong; [`BackupFault::Unfinished`].
    pub fn parse(json: &[u8]) -> Result<Self, BackupFault> {
        let bad = |fault: String| BackupFault::Record { fault };
        // The library's own words would repeat what is there, and that need not be a record.
        let written: Written = serde_json::from_slice(json).map_err(|error| {
            let (line, column) = (error.line(), error.column());
            bad(format!("not what a record is at line {line}, column {column}"))
        })?;
        if written.complete_time.is_empty() {
            return Err(BackupFault::Unfinished);
        }
        let size = written.size.parse::<u64>().ok().filter(|size| *size > 0);
        let size_bytes = size.ok_or_else(|| bad("Size is no number above 0".to_owned()))?;
        let sha512 = Some(written.checksum).filter(|text| !text.is_empty());
        if sha512.as_ref().is_some_and(|text| !is_hex(text, 128)) {
            return Err(bad("Checksum is no SHA-512 in lower-case hex".to_owned()));
        }
        let method = written.compression_method;
        let codec = Codec::parse(&method).ok_or_else(|| {
            let method: String = method.chars().take(40).collect();
            bad(format!("CompressionMethod {method:?} is not known; there are gzip, lz4 and none"))
        })?;
        let blocks = written.blocks.map_or(Some(Vec::new()), |blocks| blocks.0);
        let too_many = || bad(format!("at most {MAX_BLOCKS} blocks are read, and it has more"));
        let blocks = blocks.ok_or_else(too_many)?;
        let ends = blocks.iter().skip(1).map(|block| block.offset).chain([size_bytes]);
        let ends: Vec<u64> = ends.collect();
        let judged = blocks.into_iter().zip(ends).map(|(block, end)| {
            let WrittenBlock { offset, block_checksum: digest } = block;
            if !offset.is_multiple_of(UNIT_BYTES) {
                return Err(bad(format!("a block at {offset}, no multiple of {UNIT_BYTES}")));
            }
            // Of the last one: it is within the image.
            let room = end.checked_sub(offset).filter(|room| *room > 0);
            let room = room.ok_or_else(|| {
                bad(format!("a block at {offset}, not before the next one or the end, {end}"))
            })?;
            if !is_hex(&digest, DIGEST_LEN) {
                return Err(bad(format!("the block at {offset} has no digest of 64 hex digits")));
            }
            Ok(Block { offset, room, digest })
        });
        let blocks = judged.collect::<Result<Vec<_>, BackupFault>>()?;
        Ok(Self { size_bytes, sha512, codec, blocks })
    }

    /// Which bytes they are, as a strong validator: a digest of what is where.
    pub(super) fn tag(&self) -> String {
        let mut whole = Sha512::new();
        whole.update(self.size_bytes.to_le_bytes());
        for block in &self.blocks {
            whole.update(block.offset.to_le_bytes());
            whole.update(&block.digest);
        }
        format!("\"backup-{}\"", hex(&whole.finalize()))
    }

    /// The blocks that have bytes in `range`.
    pub(super) fn within(&self, range: &Range<u64>) -> &[Block] {
        let first = self.blocks.partition_point(|block| block.offset + block.room <= range.start);
        let end = self.blocks.partition_point(|block| block.offset < range.end);
        self.blocks.get(first..end).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(size: &str, blocks: &str) -> Result<BackupRecord, BackupFault> {
        let text = format!(
            r#"{{"Name":"a","Size":"{size}","BlockCount":"1","Checksum":"","Labels":null,
                 "CompressionMethod":"lz4","CompleteTime":"2026-01-01T00:00:00Z",
                 "ProcessingBlocks":{{"Blocks":{{}}}},"Blocks":[{blocks}]}}"#
        );
        BackupRecord::parse(text.as_bytes())
    }

    fn block(offset: u64) -> String {
        format!(r#"{{"Offset":{offset},"BlockChecksum":"{}"}}"#, "ab".repeat(32))
    }

    #[test]
    fn blocks_have_the_room_up_to_the_next_one() {
        let two = [block(2 << 20), block(6 << 20)].join(",");
        let record = record(&(7 << 20).to_string(), &two).unwrap();
        let rooms: Vec<u64> = record.blocks.iter().map(|block| block.room).collect();
        assert_eq!(rooms, [4 << 20, 1 << 20]);
        let at = |range: Range<u64>| {
            record.within(&range).iter().map(|block| block.offset >> 20).collect::<Vec<_>>()
        };
        assert_eq!(at(0..1 << 20).len(), 0);
        assert_eq!(at(0..(2 << 20) + 1), [2]);
        assert_eq!(at(5 << 20..7 << 20), [2, 6]);
        assert_eq!(at(6 << 20..7 << 20), [6]);
    }

    #[test]
    fn a_record_that_cannot_be_is_refused_with_the_reason() {
        let good = block(0);
        for (size, blocks, why) in [
            ("0", good.clone(), "Size"),
            ("x", good.clone(), "Size"),
            ("4096", block(65_536), "the end"),
            ("9999999", [block(65_536), block(65_536)].join(","), "the next one"),
            ("9999999", [block(65_536), block(0)].join(","), "the next one"),
            ("9999999", block(4096), "multiple"),
            ("9999999", good.replace("ab", "zz"), "digest"),
            ("9999999", good.replace("abab", "../x"), "digest"),
            ("9999999", r#"{"Offset":-1,"BlockChecksum":""}"#.to_owned(), "line 3"),
            ("9999999", "\"secret\"".to_owned(), "line 3"),
        ] {
            let error = record(size, &blocks).unwrap_err().to_string();
            assert!(error.contains(why) && !error.contains("secret"), "{error}");
        }
        let many = vec![r#"{"Offset":0,"BlockChecksum":""}"#; MAX_BLOCKS + 1].join(",");
        let error = record("9999999", &many).unwrap_err().to_string();
        assert!(error.contains("at most"), "{error}");
        let unfinished = br#"{"Size":"1","CompleteTime":""}"#;
        assert!(matches!(BackupRecord::parse(unfinished), Err(BackupFault::Unfinished)));
        let odd = br#"{"Size":"1","CompleteTime":"x","CompressionMethod":"zip"}"#;
        assert!(BackupRecord::parse(odd).unwrap_err().to_string().contains("zip"));
        let older = br#"{"Size":"1","CompleteTime":"x"}"#;
        assert_eq!(BackupRecord::parse(older).unwrap().codec, Codec::Gzip);
    }
}
