//! The messages between a reader and the engine.
//!
//! Why: a reader in any language must be able to do without this library.
//! How: a `SOCK_SEQPACKET` Unix socket, so that a message is whole or not there. A request is 32
//! bytes and, for an attach, the image's name; the answer is 32 bytes and what was asked for. All
//! numbers are in host byte order: both are on one machine. Requests are answered in their order.
//!
//! | request | `at` | `limit` | answer |
//! |---|---|---|---|
//! | [`ATTACH`] | 0 | 0 | [`Attached`], a [`LayerPart`] for each layer, the identity; descriptors |
//! | [`READ`] | first byte | length, at most [`MAX_READ_BYTES`] | the bytes |
//! | [`EXTENT`] | first byte | length | `a`: bytes of one kind from there on; `b`: the kind |
//! | [`PREPARE`] | first byte | length | `a`: bytes from there on that can be read without asking now |
//!
//! The first request on a connection is an attach, and there is no second one. A connection is a
//! lease: the files that were handed out stay as they are for as long as it is open.
//! An answer whose status is not [`Status::Ok`] carries a text for people instead.
//! Never: has a number that the receiver need not check.
//! Start at [`Request`] and [`Reply`].

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Begins each message: `BPR1`.
pub const MAGIC: u32 = u32::from_ne_bytes(*b"BPR1");
/// Asks for an image.
pub const ATTACH: u16 = 1;
/// Asks for bytes.
pub const READ: u16 = 2;
/// Asks what a range is.
pub const EXTENT: u16 = 3;
/// Asks for a range to be brought and decoded, where it has to be: only of an engine that has set
/// [`PREPARES`]. What is prepared may be gone again when it is read; then it is asked for.
pub const PREPARE: u16 = 4;
/// Longest read in bytes: with its head it fits into a socket's usual buffer.
pub const MAX_READ_BYTES: u32 = 128 << 10;
/// How much of a [`PREPARE`] is looked at, in bytes.
pub const MAX_PREPARE_BYTES: u64 = 2 << 20;
/// Longest name of an image in bytes.
pub const MAX_NAME_BYTES: usize = 255;
/// Longest identity in bytes.
pub const MAX_IDENTITY_BYTES: usize = 512;
/// Most layers of an image.
pub const MAX_LAYERS: usize = 16;
/// Most descriptors in one message: four a layer, and the memory for decoded blocks.
pub const MAX_DESCRIPTORS: usize = 4 * MAX_LAYERS + 1;
/// Longest message in bytes.
pub const MAX_MESSAGE_BYTES: usize = size_of::<Reply>() + MAX_READ_BYTES as usize;
/// No descriptor.
pub const NONE: u32 = u32::MAX;
/// Flag of [`Attached`]: nobody can make the descriptors of files writable, root included.
pub const PROTECTED: u32 = 1;
/// Flag of [`Attached`]: [`PREPARE`] is known, and what is decoded is kept for some time.
pub const PREPARES: u32 = 2;

/// Kind of an [`EXTENT`]: bytes in a file.
pub const KIND_DATA: u64 = 1;
/// Kind of an [`EXTENT`]: zeroes.
pub const KIND_ZERO: u64 = 2;
/// Kind of an [`EXTENT`]: in one encoded block.
pub const KIND_ENCODED: u64 = 3;
/// Kind of an [`EXTENT`]: not here yet.
pub const KIND_ABSENT: u64 = 4;

/// What a reader asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Request {
    /// [`MAGIC`].
    pub magic: u32,
    /// [`ATTACH`], [`READ`], [`EXTENT`] or [`PREPARE`].
    pub kind: u16,
    /// 0.
    pub later: u16,
    /// Comes back with the answer.
    pub cookie: u32,
    /// Bytes after this: the name's.
    pub len_bytes: u32,
    /// First byte of the range.
    pub at: u64,
    /// Its length in bytes.
    pub limit: u64,
}

/// What every answer begins with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Reply {
    /// [`MAGIC`].
    pub magic: u32,
    /// [`Status`] as a number.
    pub status: u16,
    /// The request's.
    pub kind: u16,
    /// The request's.
    pub cookie: u32,
    /// Bytes after this.
    pub len_bytes: u32,
    /// Of an [`EXTENT`] or a [`PREPARE`]: its length.
    pub a: u64,
    /// Of an [`EXTENT`]: its kind.
    pub b: u64,
}

/// The answer to an [`ATTACH`]; the layers, and the identity's text, come after it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Attached {
    /// Another one when the maps are other ones: the engine, or the image, was opened anew.
    pub generation: u64,
    /// Bytes of the disk.
    pub size_bytes: u64,
    /// Bytes of the memory for decoded blocks.
    pub arena_bytes: u64,
    /// [`PROTECTED`], [`PREPARES`].
    pub flags: u32,
    /// Layers, from the image itself down.
    pub layers: u32,
    /// Which descriptor of the message is the memory for decoded blocks, or [`NONE`].
    pub arena: u32,
    /// Bytes of the identity: equal if, and only if, it is the same image with the same bytes.
    pub identity_bytes: u32,
}

/// One layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct LayerPart {
    /// Bytes of its file that count.
    pub file_bytes: u64,
    /// Which descriptor is its file.
    pub file: u32,
    /// Which is its map: *words* or *bits*.
    pub map: u32,
    /// Which is its map of decoded blocks, or [`NONE`].
    pub decoded: u32,
    /// Which is its map of presence, or [`NONE`]: all of the file is there.
    pub presence: u32,
    /// 0.
    pub later: [u32; 2],
}

/// Why a request was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum Status {
    /// It was not.
    Ok = 0,
    /// No such image, or it is not ready.
    Unknown = 1,
    /// This user may not.
    Denied = 2,
    /// A request that is not one.
    Malformed = 3,
    /// The range is not inside the disk.
    PastEnd = 4,
    /// Bytes that can't be read: a bad page, a damaged entry.
    Unreadable = 5,
    /// Too many readers.
    TooMany = 6,
}

impl Status {
    /// The status of that number.
    #[must_use]
    pub fn of(number: u16) -> Option<Self> {
        let all = [
            Self::Ok,
            Self::Unknown,
            Self::Denied,
            Self::Malformed,
            Self::PastEnd,
            Self::Unreadable,
            Self::TooMany,
        ];
        all.into_iter().find(|status| *status as u16 == number)
    }
}

impl Request {
    /// A request for a range.
    #[must_use]
    pub fn of_range(kind: u16, cookie: u32, at: u64, limit: u64) -> Self {
        Self { magic: MAGIC, kind, later: 0, cookie, len_bytes: 0, at, limit }
    }
}

const _: () = assert!(size_of::<Request>() == 32 && size_of::<Reply>() == 32);
const _: () = assert!(size_of::<Attached>() == 40 && size_of::<LayerPart>() == 32);
