//! One gzip member: header, deflate body, checksum.
//!
//! Why: the library's gzip readers want to own the source; a push decoder has to stop anywhere,
//! inside a header too, and say where a member ended.
//! How: the header's fields are taken one after the other as bytes come in, none of them is kept;
//! the body goes straight from the caller's input to the caller's output. Format: RFC 1952.
//! Never: keeps more of a header than ten bytes, or calls a member good before both its checksum
//! and its length match.
//! Start at [`Gzip::step`].

use crc32fast::Hasher;
use flate2::{Decompress, FlushDecompress, Status};

use super::engine::{Fault, FaultKind, Moved};

const HAS_HEADER_CRC: u8 = 1 << 1;
const HAS_EXTRA: u8 = 1 << 2;
const HAS_NAME: u8 = 1 << 3;
const HAS_COMMENT: u8 = 1 << 4;
pub(super) const RESERVED_FLAGS: u8 = 0b1110_0000;

const FIXED_LEN: usize = 10;
const TRAILER_LEN: usize = 8;

/// The field that the next byte belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Fixed,
    ExtraLen,
    Extra,
    Name,
    Comment,
    HeaderCrc,
    Body,
    Trailer,
}

/// Decodes members one after the other; the same inflate state serves all of them.
pub(super) struct Gzip {
    inflate: Decompress,
    phase: Phase,
    flags: u8,
    /// The field being gathered, if it is one whose bytes matter.
    field: [u8; FIXED_LEN],
    field_len: usize,
    extra_left: usize,
    header_crc: Hasher,
    body_crc: Hasher,
    body_bytes: u64,
}

impl Gzip {
    pub(super) fn new() -> Self {
        Self {
            inflate: Decompress::new(false),
            phase: Phase::Fixed,
            flags: 0,
            field: [0; FIXED_LEN],
            field_len: 0,
            extra_left: 0,
            header_crc: Hasher::new(),
            body_crc: Hasher::new(),
            body_bytes: 0,
        }
    }

    /// Takes what it can of this member; `ended` is true at most once per member.
    pub(super) fn step(&mut self, input: &[u8], output: &mut [u8]) -> Result<Moved, Fault> {
        let mut moved = Moved { read: self.header(input)?, written: 0, ended: false };
        if self.phase == Phase::Body {
            let rest = input.get(moved.read..).unwrap_or_default();
            let (read, written) =
                self.body(rest, output).map_err(|fault| fault.after(moved.read))?;
            moved.read += read;
            moved.written = written;
        }
        // Also without a byte read: the body's last bits may have been taken a call earlier.
        if self.phase == Phase::Trailer {
            let rest = input.get(moved.read..).unwrap_or_default();
            moved.read += self.gather(rest, TRAILER_LEN);
            if self.field_len == TRAILER_LEN {
                self.check_trailer().map_err(|fault| fault.after(moved.read))?;
                self.restart();
                moved.ended = true;
            }
        }
        Ok(moved)
    }

    fn restart(&mut self) {
        self.inflate.reset(false);
        self.enter(Phase::Fixed);
        self.header_crc.reset();
        self.body_crc.reset();
        self.body_bytes = 0;
    }

    fn enter(&mut self, phase: Phase) {
        self.phase = phase;
        self.field_len = 0;
    }

    /// Copies bytes into `field` until it holds `len`; how many were taken.
    fn gather(&mut self, input: &[u8], len: usize) -> usize {
        let room = self.field.get_mut(self.field_len..len).unwrap_or_default();
        let take = room.len().min(input.len());
        for (to, from) in room.iter_mut().zip(input) {
            *to = *from;
        }
        self.field_len += take;
        take
    }

    /// Takes header bytes until the body starts; how many were taken.
    fn header(&mut self, input: &[u8]) -> Result<usize, Fault> {
        let mut read = 0;
        while !matches!(self.phase, Phase::Body | Phase::Trailer) {
            let rest = input.get(read..).unwrap_or_default();
            if rest.is_empty() {
                break;
            }
            let phase = self.phase;
            let taken = match phase {
                Phase::Fixed => self.gather(rest, FIXED_LEN),
                Phase::ExtraLen | Phase::HeaderCrc => self.gather(rest, 2),
                Phase::Extra => self.extra_left.min(rest.len()),
                Phase::Name | Phase::Comment => {
                    rest.iter().position(|&byte| byte == 0).map_or(rest.len(), |at| at + 1)
                }
                Phase::Body | Phase::Trailer => 0,
            };
            let bytes = rest.get(..taken).unwrap_or_default();
            if phase != Phase::HeaderCrc {
                self.header_crc.update(bytes);
            }
            read += taken;
            self.advance(bytes).map_err(|fault| fault.after(read))?;
        }
        Ok(read)
    }

    /// Goes on to the next field if `bytes` ended this one.
    fn advance(&mut self, bytes: &[u8]) -> Result<(), Fault> {
        let [a, b, ..] = self.field;
        let pair = u16::from_le_bytes([a, b]);
        match self.phase {
            Phase::Fixed if self.field_len == FIXED_LEN => {
                let [_, _, method, flags, ..] = self.field;
                if method != 8 {
                    return Err(Fault::corrupt("gzip method is not deflate"));
                }
                if flags & RESERVED_FLAGS != 0 {
                    return Err(Fault::corrupt("reserved gzip flags are set"));
                }
                self.flags = flags;
                self.after(Phase::Fixed);
            }
            Phase::ExtraLen if self.field_len == 2 => {
                self.extra_left = usize::from(pair);
                self.enter(Phase::Extra);
                if pair == 0 {
                    self.after(Phase::Extra);
                }
            }
            Phase::Extra => {
                self.extra_left -= bytes.len();
                if self.extra_left == 0 {
                    self.after(Phase::Extra);
                }
            }
            Phase::Name | Phase::Comment if bytes.last() == Some(&0) => self.after(self.phase),
            Phase::HeaderCrc if self.field_len == 2 => {
                // The low half of the CRC-32 of the header before it.
                if u32::from(pair) != self.header_crc.clone().finalize() & 0xffff {
                    return Err(Fault::corrupt("gzip header checksum does not match"));
                }
                self.after(Phase::HeaderCrc);
            }
            Phase::Fixed
            | Phase::ExtraLen
            | Phase::Name
            | Phase::Comment
            | Phase::HeaderCrc
            | Phase::Body
            | Phase::Trailer => {}
        }
        Ok(())
    }

    /// Enters the next field that this header has after `done`.
    fn after(&mut self, done: Phase) {
        let order = [
            (Phase::Fixed, 0),
            (Phase::ExtraLen, HAS_EXTRA),
            (Phase::Extra, 0),
            (Phase::Name, HAS_NAME),
            (Phase::Comment, HAS_COMMENT),
            (Phase::HeaderCrc, HAS_HEADER_CRC),
        ];
        let later = order.iter().skip_while(|(phase, _)| *phase != done).skip(1);
        let next = later.copied().find(|(_, flag)| self.flags & flag != 0);
        self.enter(next.map_or(Phase::Body, |(phase, _)| phase));
    }

    /// Inflates from memory to memory; at the end of the deflate stream the trailer is next.
    fn body(&mut self, input: &[u8], output: &mut [u8]) -> Result<(usize, usize), Fault> {
        let (in_before, out_before) = (self.inflate.total_in(), self.inflate.total_out());
        let status = self.inflate.decompress(input, output, FlushDecompress::None);
        // Both counts are of bytes inside the two slices.
        let step = |now: u64, before: u64| usize::try_from(now - before).unwrap_or(usize::MAX);
        let read = step(self.inflate.total_in(), in_before);
        let written = step(self.inflate.total_out(), out_before);
        match status {
            Err(_) => Err(Fault { kind: FaultKind::Corrupt("damaged deflate stream"), read }),
            Ok(status) => {
                self.body_crc.update(output.get(..written).unwrap_or_default());
                self.body_bytes = self.body_bytes.wrapping_add(written as u64);
                if status == Status::StreamEnd {
                    self.enter(Phase::Trailer);
                }
                Ok((read, written))
            }
        }
    }

    fn check_trailer(&self) -> Result<(), Fault> {
        let [a, b, c, d, e, f, g, h, ..] = self.field;
        if u32::from_le_bytes([a, b, c, d]) != self.body_crc.clone().finalize() {
            return Err(Fault::corrupt("gzip checksum does not match"));
        }
        // The trailer has the length modulo 2^32.
        if u64::from(u32::from_le_bytes([e, f, g, h])) != self.body_bytes & 0xffff_ffff {
            return Err(Fault::corrupt("gzip length does not match"));
        }
        Ok(())
    }
}
