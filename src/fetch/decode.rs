//! Decoders for compressed sources: bytes of a gzip, xz, zstd or bzip2 stream in, an image out.
//!
//! Why: published images come compressed, and a stream from a stranger may be cut, damaged, or
//! made to fill a disk or the memory.
//! How: a push interface without I/O. One call takes what it can of an input slice and writes what
//! it can of an output slice, directly from one to the other. What the tools write after each
//! other is one stream here: gzip members (`bgzip`), xz and bzip2 streams (`pbzip2`), zstd frames
//! with skippable ones between them. Zeroes may follow the last gzip member, and any xz stream in
//! fours; any other byte after the end is an error, though the tools only warn.
//! Never: allocates per call, makes more output than [`Limits`] say, uses more memory than
//! [`XZ_MEMORY_BYTES`] or [`ZSTD_WINDOW_BYTES`] and a few MiB, or goes on after an error.
//! Start at [`Decoder::decode`].

mod engine;
mod gzip;

use std::fmt;

use super::Class;
use engine::{Engine, Fault, FaultKind, Moved};
pub use engine::{XZ_MEMORY_BYTES, ZSTD_WINDOW_BYTES};

/// How a source is compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Codec {
    /// RFC 1952, also of many members.
    Gzip,
    /// The .xz format; not the older .lzma, which has no checksum.
    Xz,
    /// RFC 8878.
    Zstd,
    /// What `bzip2` writes.
    Bzip2,
}

impl fmt::Display for Codec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Gzip => "gzip",
            Self::Xz => "xz",
            Self::Zstd => "zstd",
            Self::Bzip2 => "bzip2",
        })
    }
}

impl Codec {
    /// How many bytes [`Codec::sniff`] wants to see.
    pub const SNIFF_BYTES: usize = 6;

    /// The codec of a stream that starts with these bytes, by its magic number alone; `None` for
    /// anything else and for fewer than [`Codec::SNIFF_BYTES`] bytes.
    ///
    /// A zstd stream may start with a skippable frame (`pzstd` writes one). LZ4 uses the same
    /// numbers for its own skippable frames; such a stream is refused at its first LZ4 frame.
    #[must_use]
    pub fn sniff(first_bytes: &[u8]) -> Option<Self> {
        match *first_bytes.first_chunk::<{ Self::SNIFF_BYTES }>()? {
            [0x1f, 0x8b, 8, flags, _, _] if flags & gzip::RESERVED_FLAGS == 0 => Some(Self::Gzip),
            [0xfd, b'7', b'z', b'X', b'Z', 0] => Some(Self::Xz),
            [0x28, 0xb5, 0x2f, 0xfd, _, _] | [0x50..=0x5f, 0x2a, 0x4d, 0x18, _, _] => {
                Some(Self::Zstd)
            }
            // The digits of pi start a block, those of its square root end an empty stream.
            [b'B', b'Z', b'h', b'1'..=b'9', 0x31, 0x41]
            | [b'B', b'Z', b'h', b'1'..=b'9', 0x17, 0x72] => Some(Self::Bzip2),
            _ => None,
        }
    }

    /// Whether byte `index` of a member that starts with `first` may be `byte`, as far as the
    /// magic number goes.
    fn magic_allows(self, first: u8, index: u64, byte: u8) -> bool {
        let magic: &[u8] = match self {
            Self::Gzip => &[0x1f, 0x8b, 8],
            Self::Xz => &[0xfd, b'7', b'z', b'X', b'Z', 0],
            Self::Zstd if first == 0x28 => &[0x28, 0xb5, 0x2f, 0xfd],
            Self::Zstd if index == 0 => return matches!(byte, 0x50..=0x5f),
            Self::Zstd => &[0x50, 0x2a, 0x4d, 0x18],
            Self::Bzip2 if index == 3 => return byte.is_ascii_digit() && byte != b'0',
            Self::Bzip2 => b"BZh",
        };
        let wanted = usize::try_from(index).ok().and_then(|index| magic.get(index));
        wanted.is_none_or(|&wanted| wanted == byte)
    }

    /// The longest magic number.
    const MAGIC_BYTES: u64 = 6;
}

/// What a caller allows one stream.
///
/// The limit is on the sum, not on the ratio of output to input: a mostly empty disk image
/// legitimately decodes to thousands of times its size (zstd reaches 20 000 to one on zeroes, and
/// bzip2 more), so a limit on the ratio would refuse the images that compression is best for. What
/// a bomb costs is output, and the caller knows how much of that the disk image may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Most bytes that the whole stream may decode to; exactly as many are allowed.
    pub max_output_bytes: u64,
}

/// Why a stream is refused. `at` counts from the start of the compressed stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[expect(missing_docs, reason = "each field is named in the message above it")]
pub enum DecodeError {
    /// What was noticed at `at` may have its cause before it; for zstd `at` is the start of the
    /// input that was being decoded.
    #[error("damaged {codec} stream at or about byte {at} of the compressed source: {fault}")]
    Corrupt { codec: Codec, at: u64, fault: &'static str },
    /// The input ended within a member, or before the first.
    #[error("{codec} stream ends early, after {at} bytes of the compressed source")]
    Truncated { codec: Codec, at: u64 },
    /// `at` is the first byte that belongs to nothing.
    #[error("{codec} stream is followed by other bytes, from byte {at} of the compressed source")]
    TrailingGarbage { codec: Codec, at: u64 },
    #[error(
        "{codec} stream decodes to more than the allowed {max_output_bytes} bytes, \
         after {at} bytes of the compressed source"
    )]
    TooLarge { codec: Codec, at: u64, max_output_bytes: u64 },
    /// A header asks for more memory than any stream gets here.
    #[error(
        "{codec} stream needs more than {limit_bytes} bytes of memory to decode, says its header \
         at or about byte {at} of the compressed source; compress it with a smaller dictionary"
    )]
    NeedsMemory { codec: Codec, at: u64, limit_bytes: u64 },
    /// The host has not even the memory that a stream may use.
    #[error("no memory for a {codec} decoder, at byte {at} of the compressed source")]
    NoMemory { codec: Codec, at: u64 },
}

impl DecodeError {
    /// Whether trying again can help: never, the stream would be the same.
    #[must_use]
    pub fn class(&self) -> Class {
        Class::Refuse
    }
}

/// What the decoder waits for after a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// All input was taken, and the stream goes on.
    NeedsInput,
    /// The output is full, and there may be more, also without further input.
    OutputFull,
    /// All input was taken and a member is complete: this is the end if the input ends here, and
    /// if not, the next member or padding may follow.
    MemberEnd,
}

/// What one call did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Step {
    /// Bytes taken from the start of the input. Offer the rest again.
    pub read: usize,
    /// Bytes written to the start of the output.
    pub written: usize,
    /// What to do next.
    pub state: State,
}

/// One stream being decoded.
pub struct Decoder {
    codec: Codec,
    limits: Limits,
    engine: Engine,
    read: u64,
    written: u64,
    /// Bytes taken of the member that is open; 0 between members.
    member_read: u64,
    /// The first of them.
    member_first: u8,
    members: u64,
    /// Zeroes since the last member.
    padding: u64,
    /// The last call could do nothing without more input.
    starved: bool,
    failed: Option<DecodeError>,
}

impl fmt::Debug for Decoder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Decoder")
            .field("codec", &self.codec)
            .field("read", &self.read)
            .field("written", &self.written)
            .field("members", &self.members)
            .field("failed", &self.failed)
            .finish_non_exhaustive()
    }
}

impl Decoder {
    /// A decoder at the start of a stream.
    ///
    /// # Errors
    /// [`DecodeError::NoMemory`].
    pub fn new(codec: Codec, limits: Limits) -> Result<Self, DecodeError> {
        let engine = Engine::new(codec).map_err(|_| DecodeError::NoMemory { codec, at: 0 })?;
        Ok(Self {
            codec,
            limits,
            engine,
            read: 0,
            written: 0,
            member_read: 0,
            member_first: 0,
            members: 0,
            padding: 0,
            starved: false,
            failed: None,
        })
    }

    /// Bytes of the compressed stream taken so far.
    #[must_use]
    pub fn read_bytes(&self) -> u64 {
        self.read
    }

    /// Bytes decoded so far.
    #[must_use]
    pub fn written_bytes(&self) -> u64 {
        self.written
    }

    /// Decodes from the start of `input` to the start of `output` until one of them is used up.
    ///
    /// While the state is [`State::OutputFull`], call again with the rest of the input, empty or
    /// not, and with room: an empty `output` is full already. Bytes that a failing call wrote are
    /// not counted, and every call after it gets the same error.
    ///
    /// # Errors
    /// [`DecodeError`], but never [`DecodeError::Truncated`], which only [`Decoder::finish`] knows.
    pub fn decode(&mut self, input: &[u8], output: &mut [u8]) -> Result<Step, DecodeError> {
        if let Some(error) = self.failed {
            return Err(error);
        }
        let result = self.run(input, output);
        self.failed = result.err();
        result
    }

    /// Call it when the source has ended and all input was taken.
    ///
    /// # Errors
    /// [`DecodeError::Truncated`] if a member is open, if there was none, or if xz padding is not
    /// whole; the error of the call before, if that failed.
    pub fn finish(&self) -> Result<(), DecodeError> {
        if let Some(error) = self.failed {
            return Err(error);
        }
        let whole = self.codec != Codec::Xz || self.padding.is_multiple_of(4);
        if self.members > 0 && self.member_read == 0 && whole {
            return Ok(());
        }
        Err(DecodeError::Truncated { codec: self.codec, at: self.read })
    }

    fn run(&mut self, input: &[u8], output: &mut [u8]) -> Result<Step, DecodeError> {
        let (mut read, mut written) = (0, 0);
        loop {
            if self.member_read == 0 && self.members > 0 {
                read += self.skip_padding(input.get(read..).unwrap_or_default());
            }
            let rest = input.get(read..).unwrap_or_default();
            let room = output.get_mut(written..).unwrap_or_default();
            let between = self.member_read == 0;
            if rest.is_empty() && (between || self.starved) {
                let ended = between && self.members > 0;
                let state = if ended { State::MemberEnd } else { State::NeedsInput };
                return Ok(Step { read, written, state });
            }
            if room.is_empty() {
                return Ok(Step { read, written, state: State::OutputFull });
            }
            self.check_magic(rest)?;
            let moved = self.step(rest, room)?;
            let idle = (moved.read, moved.written, moved.ended) == (0, 0, false);
            if idle && !rest.is_empty() {
                return Err(self.corrupt("no progress"));
            }
            self.starved = idle;
            read += moved.read;
            written += moved.written;
        }
    }

    /// One step within a member, within the limit, with all counters brought up to date.
    fn step(&mut self, rest: &[u8], room: &mut [u8]) -> Result<Moved, DecodeError> {
        let left = self.limits.max_output_bytes.saturating_sub(self.written);
        // At the limit a byte of room still shows whether there is more.
        let mut spare = [0];
        let room = match usize::try_from(left) {
            Ok(0) => &mut spare[..],
            Ok(left) if left < room.len() => room.get_mut(..left).unwrap_or_default(),
            Ok(_) | Err(_) => room,
        };
        let moved = self.engine.step(rest, room).map_err(|fault| self.fault(fault))?;
        if left == 0 && moved.written > 0 {
            let max_output_bytes = self.limits.max_output_bytes;
            return Err(DecodeError::TooLarge {
                codec: self.codec,
                at: self.read,
                max_output_bytes,
            });
        }
        if self.member_read == 0 {
            self.member_first = rest.first().copied().unwrap_or_default();
            self.padding = 0;
        }
        self.read += moved.read as u64;
        self.written += moved.written as u64;
        self.member_read += moved.read as u64;
        if moved.ended {
            self.member_read = 0;
            self.members += 1;
        }
        Ok(moved)
    }

    /// Takes the zeroes that may follow a member of this codec; how many.
    fn skip_padding(&mut self, rest: &[u8]) -> usize {
        if !matches!(self.codec, Codec::Gzip | Codec::Xz) {
            return 0;
        }
        let zeroes = rest.iter().position(|&byte| byte != 0).unwrap_or(rest.len());
        self.padding += zeroes as u64;
        self.read += zeroes as u64;
        zeroes
    }

    /// Refuses what is no further member before a library sees it, and so at its exact place.
    fn check_magic(&self, rest: &[u8]) -> Result<(), DecodeError> {
        if self.member_read >= Codec::MAGIC_BYTES {
            return Ok(());
        }
        let codec = self.codec;
        let padded = match codec {
            // As gzip: after zeroes nothing else comes.
            Codec::Gzip => self.padding > 0,
            Codec::Xz => !self.padding.is_multiple_of(4),
            Codec::Zstd | Codec::Bzip2 => false,
        };
        let starts = self.member_read == 0;
        let first = if starts { rest.first().copied() } else { Some(self.member_first) };
        let first = first.unwrap_or_default();
        let good = |(index, &byte)| codec.magic_allows(first, index, byte);
        let same = (self.member_read..Codec::MAGIC_BYTES).zip(rest).all(good);
        if same && !(starts && padded) {
            Ok(())
        } else if self.members > 0 {
            Err(DecodeError::TrailingGarbage { codec, at: self.read - self.member_read })
        } else {
            Err(self.corrupt("no magic number of this codec"))
        }
    }

    fn corrupt(&self, fault: &'static str) -> DecodeError {
        DecodeError::Corrupt { codec: self.codec, at: self.read, fault }
    }

    fn fault(&self, fault: Fault) -> DecodeError {
        let (codec, at) = (self.codec, self.read + fault.read as u64);
        match fault.kind {
            FaultKind::Corrupt(fault) => DecodeError::Corrupt { codec, at, fault },
            FaultKind::Memory(limit_bytes) => DecodeError::NeedsMemory { codec, at, limit_bytes },
            FaultKind::NoMemory => DecodeError::NoMemory { codec, at },
        }
    }
}

#[cfg(test)]
#[path = "decode_tests.rs"]
mod tests;
