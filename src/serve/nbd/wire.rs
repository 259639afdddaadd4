//! The numbers and records of the NBD protocol, byte for byte.
//!
//! Why: every layout of the wire is written down once, where the compiler can check it.
//! How: big-endian zerocopy structs, each with its size and one offset asserted at compile time;
//! a received record is a view of the bytes, a sent one is its own bytes.
//! Never: decides anything; a number that the protocol does not define is carried as it came.
//! Start at [`Request`]. Names and sections are those of `doc/proto.md` without the `NBD_` prefix.

use std::mem::{offset_of, size_of};

use zerocopy::byteorder::big_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// First eight bytes of every server: `NBDMAGIC`.
pub const INIT_MAGIC: u64 = 0x4e42_444d_4147_4943;
/// `IHAVEOPT`: newstyle, and the first eight bytes of every option.
pub const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
/// First eight bytes of every reply to an option.
pub const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
/// First four bytes of every request of the transmission phase.
pub const REQUEST_MAGIC: u32 = 0x2560_9513;
/// First four bytes of a simple reply.
pub const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
/// First four bytes of a structured reply chunk.
pub const STRUCTURED_REPLY_MAGIC: u32 = 0x668e_33ef;
/// First four bytes of a request with an extended header.
pub const EXTENDED_REQUEST_MAGIC: u32 = 0x21e4_1c71;
/// First four bytes of a reply chunk with an extended header.
pub const EXTENDED_REPLY_MAGIC: u32 = 0x6e8a_278c;
/// Longest string that the protocol allows, in bytes ("Conventions", strings).
pub const MAX_STRING_BYTES: usize = 4096;

/// Handshake flags (server) and client flags have the same two bits.
pub mod handshake_flag {
    /// Fixed newstyle: options have replies.
    pub const FIXED_NEWSTYLE: u16 = 1;
    /// No 124 bytes of zeroes after the answer to EXPORT_NAME.
    pub const NO_ZEROES: u16 = 1 << 1;
}

/// Transmission flags: what the export can do.
pub mod export_flag {
    /// Always set.
    pub const HAS_FLAGS: u16 = 1;
    /// Writes are refused.
    pub const READ_ONLY: u16 = 1 << 1;
    /// FLUSH is known.
    pub const SEND_FLUSH: u16 = 1 << 2;
    /// READ knows DF; only with structured replies.
    pub const SEND_DF: u16 = 1 << 7;
    /// Several connections see the same bytes.
    pub const CAN_MULTI_CONN: u16 = 1 << 8;
    /// CACHE is known.
    pub const SEND_CACHE: u16 = 1 << 10;
    /// BLOCK_STATUS takes a payload that names contexts; only with extended headers.
    pub const BLOCK_STATUS_PAYLOAD: u16 = 1 << 12;
}

/// Option numbers ("Option types").
pub mod option {
    /// Choose an export and begin transmission, with no way to report an error.
    pub const EXPORT_NAME: u32 = 1;
    /// End the session.
    pub const ABORT: u32 = 2;
    /// Name all exports.
    pub const LIST: u32 = 3;
    /// Begin TLS.
    pub const STARTTLS: u32 = 5;
    /// Describe one export.
    pub const INFO: u32 = 6;
    /// Describe one export and begin transmission.
    pub const GO: u32 = 7;
    /// Replies with holes and error texts from now on.
    pub const STRUCTURED_REPLY: u32 = 8;
    /// Name the metadata contexts of an export.
    pub const LIST_META_CONTEXT: u32 = 9;
    /// Choose the metadata contexts that BLOCK_STATUS reports.
    pub const SET_META_CONTEXT: u32 = 10;
    /// 64-bit lengths in requests and replies from now on.
    pub const EXTENDED_HEADERS: u32 = 11;
}

/// Reply types ("Option reply types").
pub mod option_reply {
    /// Accepted, and nothing more follows.
    pub const ACK: u32 = 1;
    /// One export.
    pub const SERVER: u32 = 2;
    /// One fact about an export.
    pub const INFO: u32 = 3;
    /// One metadata context.
    pub const META_CONTEXT: u32 = 4;
    /// The option is unknown here.
    pub const ERR_UNSUP: u32 = (1 << 31) + 1;
    /// The option is malformed, or not allowed at this point.
    pub const ERR_INVALID: u32 = (1 << 31) + 3;
    /// Nothing is answered here before STARTTLS.
    pub const ERR_TLS_REQD: u32 = (1 << 31) + 5;
    /// No such export.
    pub const ERR_UNKNOWN: u32 = (1 << 31) + 6;
    /// Extended headers are in use, and there is no way back.
    pub const ERR_EXT_HEADER_REQD: u32 = (1 << 31) + 10;
}

/// Information types of INFO and GO.
pub mod info {
    /// Size and transmission flags.
    pub const EXPORT: u16 = 0;
    /// Canonical name.
    pub const NAME: u16 = 1;
    /// Text for people.
    pub const DESCRIPTION: u16 = 2;
    /// Smallest, best and largest request.
    pub const BLOCK_SIZE: u16 = 3;
}

/// Request types.
pub mod command {
    /// Read bytes.
    pub const READ: u16 = 0;
    /// Write bytes; the request is followed by them.
    pub const WRITE: u16 = 1;
    /// End the session; there is no reply.
    pub const DISC: u16 = 2;
    /// Make writes durable.
    pub const FLUSH: u16 = 3;
    /// Forget a range.
    pub const TRIM: u16 = 4;
    /// The client will read a range.
    pub const CACHE: u16 = 5;
    /// Write zeroes, without a payload.
    pub const WRITE_ZEROES: u16 = 6;
    /// Which parts of a range are data, and which are holes.
    pub const BLOCK_STATUS: u16 = 7;
}

/// Command flags.
pub mod command_flag {
    /// READ: at most one content chunk.
    pub const DF: u16 = 1 << 2;
    /// BLOCK_STATUS: at most one extent, inside the range.
    pub const REQ_ONE: u16 = 1 << 3;
    /// With extended headers: the length is that of a payload which follows.
    pub const PAYLOAD_LEN: u16 = 1 << 5;
}

/// Structured reply chunks.
pub mod chunk {
    /// Flag: the last chunk of its reply.
    pub const FLAG_DONE: u16 = 1;
    /// Nothing: ends a reply.
    pub const NONE: u16 = 0;
    /// Offset and bytes.
    pub const OFFSET_DATA: u16 = 1;
    /// Offset and length of a run of zeroes.
    pub const OFFSET_HOLE: u16 = 2;
    /// Context and extents.
    pub const BLOCK_STATUS: u16 = 5;
    /// Context, how many extents, and extents with 64-bit lengths.
    pub const BLOCK_STATUS_EXT: u16 = 6;
    /// Error number and text.
    pub const ERROR: u16 = (1 << 15) + 1;
}

/// State flags of `base:allocation`.
pub mod allocation {
    /// Data, or unknown.
    pub const DATA: u32 = 0;
    /// Not allocated, and reads as zeroes (HOLE and ZERO).
    pub const HOLE_ZERO: u32 = 3;
}

/// State flags of `bedplate:presence`.
pub mod presence {
    /// The bytes are on this node: a read waits for no network.
    pub const PRESENT: u32 = 1;
    /// They are still to come.
    pub const ABSENT: u32 = 0;
}

/// Error values of the transmission phase.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NbdError {
    /// Writes to a read-only export.
    Perm,
    /// The bytes cannot be read.
    Io,
    /// Malformed, unknown, or out of range.
    Inval,
    /// Longer than the server answers.
    Overflow,
}

impl NbdError {
    /// The number on the wire ("Error values").
    #[must_use]
    pub fn number(self) -> u32 {
        match self {
            Self::Perm => 1,
            Self::Io => 5,
            Self::Inval => 22,
            Self::Overflow => 75,
        }
    }
}

macro_rules! record {
    ($(#[$doc:meta])* $name:ident, $size:literal, $field:ident at $at:literal, { $($(#[$fdoc:meta])* $f:ident: $t:ty),+ $(,)? }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
        #[repr(C)]
        pub struct $name { $($(#[$fdoc])* pub $f: $t),+ }
        const _: () = assert!(size_of::<$name>() == $size && offset_of!($name, $field) == $at);
    };
}

record! {
    /// What a server says first.
    Greeting, 18, flags at 16, {
        /// [`INIT_MAGIC`].
        init: U64,
        /// [`OPTION_MAGIC`].
        newstyle: U64,
        /// [`handshake_flag`].
        flags: U16,
    }
}

record! {
    /// Head of an option; `len_bytes` bytes of data follow.
    OptionHead, 16, len_bytes at 12, {
        /// [`OPTION_MAGIC`].
        magic: U64,
        /// [`option`].
        option: U32,
        /// Length of the data in bytes.
        len_bytes: U32,
    }
}

record! {
    /// Head of a reply to an option; `len_bytes` bytes of data follow.
    OptionReplyHead, 20, len_bytes at 16, {
        /// [`OPTION_REPLY_MAGIC`].
        magic: U64,
        /// The option that is answered.
        option: U32,
        /// [`option_reply`].
        reply: U32,
        /// Length of the data in bytes.
        len_bytes: U32,
    }
}

record! {
    /// Answer to EXPORT_NAME, before the 124 zeroes.
    ExportNameReply, 10, flags at 8, {
        /// Size of the export in bytes.
        size_bytes: U64,
        /// [`export_flag`].
        flags: U16,
    }
}

record! {
    /// Data of an INFO reply for [`info::EXPORT`].
    InfoExport, 12, flags at 10, {
        /// [`info::EXPORT`].
        kind: U16,
        /// Size of the export in bytes.
        size_bytes: U64,
        /// [`export_flag`].
        flags: U16,
    }
}

record! {
    /// Data of an INFO reply for [`info::BLOCK_SIZE`].
    InfoBlockSize, 14, maximum at 10, {
        /// [`info::BLOCK_SIZE`].
        kind: U16,
        /// Smallest request and alignment, in bytes.
        minimum: U32,
        /// Size in bytes at and above which requests are efficient.
        preferred: U32,
        /// Largest payload in bytes.
        maximum: U32,
    }
}

record! {
    /// A request of the transmission phase.
    Request, 28, len_bytes at 24, {
        /// [`REQUEST_MAGIC`].
        magic: U32,
        /// [`command_flag`].
        flags: U16,
        /// [`command`].
        command: U16,
        /// The client's name for this request: eight opaque bytes.
        cookie: U64,
        /// First byte of the range.
        offset: U64,
        /// Length of the range in bytes.
        len_bytes: U32,
    }
}

record! {
    /// A request of the transmission phase with an extended header.
    ExtendedRequest, 32, len_bytes at 24, {
        /// [`EXTENDED_REQUEST_MAGIC`].
        magic: U32,
        /// [`command_flag`].
        flags: U16,
        /// [`command`].
        command: U16,
        /// The client's name for this request: eight opaque bytes.
        cookie: U64,
        /// First byte of the range.
        offset: U64,
        /// Length in bytes: of the payload with [`command_flag::PAYLOAD_LEN`], else of the range.
        len_bytes: U64,
    }
}

record! {
    /// A simple reply; the bytes of a successful READ follow.
    SimpleReply, 16, cookie at 8, {
        /// [`SIMPLE_REPLY_MAGIC`].
        magic: U32,
        /// 0, or [`NbdError::number`].
        error: U32,
        /// As in the request.
        cookie: U64,
    }
}

record! {
    /// Head of a structured reply chunk; `len_bytes` bytes of payload follow.
    ChunkHead, 20, len_bytes at 16, {
        /// [`STRUCTURED_REPLY_MAGIC`].
        magic: U32,
        /// [`chunk::FLAG_DONE`] or 0.
        flags: U16,
        /// [`chunk`].
        kind: U16,
        /// As in the request.
        cookie: U64,
        /// Length of the payload in bytes.
        len_bytes: U32,
    }
}

record! {
    /// Extended head of a reply chunk; `len_bytes` bytes of payload follow.
    ExtendedChunkHead, 32, len_bytes at 24, {
        /// [`EXTENDED_REPLY_MAGIC`].
        magic: U32,
        /// [`chunk::FLAG_DONE`] or 0.
        flags: U16,
        /// [`chunk`].
        kind: U16,
        /// As in the request.
        cookie: U64,
        /// As in the request.
        offset: U64,
        /// Length of the payload in bytes.
        len_bytes: U64,
    }
}

record! {
    /// Payload of an OFFSET_HOLE chunk.
    Hole, 12, hole_bytes at 8, {
        /// Where the zeroes begin in the export.
        offset: U64,
        /// How many they are.
        hole_bytes: U32,
    }
}

record! {
    /// Payload of an ERROR chunk up to its text.
    ErrorInfo, 6, text_bytes at 4, {
        /// [`NbdError::number`].
        error: U32,
        /// Length of the text in bytes, at most [`MAX_STRING_BYTES`].
        text_bytes: U16,
    }
}

record! {
    /// Payload of a BLOCK_STATUS_EXT chunk up to its extents.
    ExtendedStatus, 8, extents at 4, {
        /// The metadata context that is reported.
        context: U32,
        /// How many extents follow.
        extents: U32,
    }
}

record! {
    /// One extent of a BLOCK_STATUS chunk.
    StatusExtent, 8, flags at 4, {
        /// Length in bytes, not 0.
        len_bytes: U32,
        /// [`allocation`] or [`presence`].
        flags: U32,
    }
}

record! {
    /// One extent of a BLOCK_STATUS_EXT chunk.
    ExtendedExtent, 16, flags at 8, {
        /// Length in bytes, not 0.
        len_bytes: U64,
        /// [`allocation`] or [`presence`].
        flags: U64,
    }
}
