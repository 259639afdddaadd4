//! The numbers and records that a client of NBD needs, byte for byte.
//!
//! Why: the server's ones are in a room that this one does not depend on, and a client needs few.
//! How: constants, and functions from and to arrays; big-endian.
//! Never: decides anything. Names and sections are those of `doc/proto.md` without the `NBD_` prefix.

/// First eight bytes of every server: `NBDMAGIC`.
pub(super) const INIT_MAGIC: u64 = 0x4e42_444d_4147_4943;
/// `IHAVEOPT`: newstyle, and the first eight bytes of every option.
pub(super) const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
/// Second eight bytes of a server of the old style.
pub(super) const OLDSTYLE_MAGIC: u64 = 0x0000_4202_8186_1253;
/// First eight bytes of every reply to an option.
pub(super) const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
/// First four bytes of every request.
const REQUEST_MAGIC: u32 = 0x2560_9513;
/// First four bytes of a simple reply.
pub(super) const SIMPLE_MAGIC: u32 = 0x6744_6698;
/// First four bytes of a chunk of a structured reply.
pub(super) const CHUNK_MAGIC: u32 = 0x668e_33ef;

/// Handshake flags; the client's have the same bits.
pub(super) const FIXED_NEWSTYLE: u16 = 1;
pub(super) const NO_ZEROES: u16 = 1 << 1;

/// Options.
pub(super) const OPT_GO: u32 = 7;
pub(super) const OPT_STRUCTURED_REPLY: u32 = 8;
pub(super) const OPT_SET_META_CONTEXT: u32 = 10;

/// Replies to options.
pub(super) const REP_ACK: u32 = 1;
pub(super) const REP_INFO: u32 = 3;
pub(super) const REP_META_CONTEXT: u32 = 4;
pub(super) const REP_ERROR_BIT: u32 = 1 << 31;
pub(super) const REP_ERR_UNSUP: u32 = REP_ERROR_BIT + 1;
pub(super) const REP_ERR_POLICY: u32 = REP_ERROR_BIT + 2;
pub(super) const REP_ERR_TLS_REQD: u32 = REP_ERROR_BIT + 5;
pub(super) const REP_ERR_UNKNOWN: u32 = REP_ERROR_BIT + 6;

/// Information about an export.
pub(super) const INFO_EXPORT: u16 = 0;
pub(super) const INFO_BLOCK_SIZE: u16 = 3;

/// Requests.
pub(super) const CMD_READ: u16 = 0;
pub(super) const CMD_DISC: u16 = 2;
pub(super) const CMD_BLOCK_STATUS: u16 = 7;

/// Chunks of structured replies.
pub(super) const CHUNK_NONE: u16 = 0;
pub(super) const CHUNK_DATA: u16 = 1;
pub(super) const CHUNK_HOLE: u16 = 2;
pub(super) const CHUNK_STATUS: u16 = 5;
pub(super) const CHUNK_ERROR_BIT: u16 = 1 << 15;
/// The last chunk of its reply.
pub(super) const CHUNK_DONE: u16 = 1;

/// Of `base:allocation`: reads as zeroes.
pub(super) const STATE_ZERO: u32 = 1 << 1;

/// The metadata context that tells holes.
pub(super) const BASE_ALLOCATION: &[u8] = b"base:allocation";
/// Longest string that the protocol allows, in bytes.
pub(super) const MAX_STRING_BYTES: usize = 4096;

pub(super) fn be16(bytes: &[u8; 2]) -> u16 {
    u16::from_be_bytes(*bytes)
}

pub(super) fn be32(bytes: &[u8; 4]) -> u32 {
    u32::from_be_bytes(*bytes)
}

pub(super) fn be64(bytes: &[u8; 8]) -> u64 {
    u64::from_be_bytes(*bytes)
}

/// A request of the transmission phase.
pub(super) fn request(kind: u16, cookie: u64, at: u64, len: u32) -> [u8; 28] {
    let mut bytes = [0; 28];
    bytes[..4].copy_from_slice(&REQUEST_MAGIC.to_be_bytes());
    bytes[6..8].copy_from_slice(&kind.to_be_bytes());
    bytes[8..16].copy_from_slice(&cookie.to_be_bytes());
    bytes[16..24].copy_from_slice(&at.to_be_bytes());
    bytes[24..].copy_from_slice(&len.to_be_bytes());
    bytes
}

/// An option with its data.
pub(super) fn option(number: u32, data: &[u8]) -> Vec<u8> {
    let len = u32::try_from(data.len()).unwrap_or(u32::MAX);
    let mut bytes = Vec::with_capacity(16 + data.len());
    bytes.extend_from_slice(&OPTION_MAGIC.to_be_bytes());
    bytes.extend_from_slice(&number.to_be_bytes());
    bytes.extend_from_slice(&len.to_be_bytes());
    bytes.extend_from_slice(data);
    bytes
}

/// A string with its length before it, as in options.
pub(super) fn text(bytes: &[u8]) -> Vec<u8> {
    let len = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
    [&len.to_be_bytes()[..], bytes].concat()
}
