//! The three kinds of headers that a client can ask for, as bytes.
//!
//! Why: a reply is the same thing with a simple, a structured and an extended header; who gathers it
//! should not care.
//! How: [`Style`] parses the request at the front of the input into one type, and writes the head of
//! a chunk, or a whole error, of its kind.
//! Never: decides what is answered, or waits.
//! Start at [`Style`]. Protocol: "Request message", "Structured reply chunk message", and
//! "Extended reply chunk message" in its branch `extension-ext-header`.

use zerocopy::byteorder::big_endian::{U16, U32, U64};
use zerocopy::{FromBytes, IntoBytes};

use super::wire::{self, ChunkHead, ErrorInfo, ExtendedChunkHead, ExtendedRequest, NbdError};
use super::wire::{Request, SimpleReply, chunk};

/// What client and server have agreed to say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Style {
    /// Simple replies: success is followed by bytes, an error by nothing.
    Simple,
    /// Structured replies: chunks, holes, texts.
    Structured,
    /// The same with 64-bit lengths, in requests too.
    Extended,
}

/// What a reply repeats of its request.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Asked {
    pub(super) cookie: U64,
    /// Said again in extended headers only.
    pub(super) offset: U64,
}

/// A request with either header, its numbers in host order.
#[derive(Clone, Copy, Debug)]
pub(super) struct Incoming {
    pub(super) flags: u16,
    pub(super) command: u16,
    pub(super) cookie: U64,
    pub(super) offset: u64,
    pub(super) len_bytes: u64,
}

impl Style {
    /// First four bytes of each request.
    pub(super) fn request_magic(self) -> u32 {
        match self {
            Self::Simple | Self::Structured => wire::REQUEST_MAGIC,
            Self::Extended => wire::EXTENDED_REQUEST_MAGIC,
        }
    }

    /// The request at the front of `bytes`, with its length there; `None` if it has not all
    /// arrived. Its magic number is to be checked by who calls.
    pub(super) fn first_request(self, bytes: &[u8]) -> Option<(Incoming, usize)> {
        if self == Self::Extended {
            let (request, _) = ExtendedRequest::read_from_prefix(bytes).ok()?;
            let incoming = Incoming {
                flags: request.flags.get(),
                command: request.command.get(),
                cookie: request.cookie,
                offset: request.offset.get(),
                len_bytes: request.len_bytes.get(),
            };
            return Some((incoming, size_of::<ExtendedRequest>()));
        }
        let (request, _) = Request::read_from_prefix(bytes).ok()?;
        let incoming = Incoming {
            flags: request.flags.get(),
            command: request.command.get(),
            cookie: request.cookie,
            offset: request.offset.get(),
            len_bytes: request.len_bytes.get().into(),
        };
        Some((incoming, size_of::<Request>()))
    }

    /// Appends the head of a chunk with `len_bytes` of payload; not for simple replies.
    pub(super) fn chunk_head(
        self,
        out: &mut Vec<u8>,
        kind: u16,
        done: bool,
        asked: Asked,
        len_bytes: u32,
    ) {
        let flags = U16::new(if done { chunk::FLAG_DONE } else { 0 });
        let (kind, Asked { cookie, offset }) = (U16::new(kind), asked);
        if self == Self::Extended {
            let (magic, len_bytes) =
                (U32::new(wire::EXTENDED_REPLY_MAGIC), U64::new(len_bytes.into()));
            let head = ExtendedChunkHead { magic, flags, kind, cookie, offset, len_bytes };
            out.extend_from_slice(head.as_bytes());
        } else {
            let (magic, len_bytes) = (U32::new(wire::STRUCTURED_REPLY_MAGIC), U32::new(len_bytes));
            let head = ChunkHead { magic, flags, kind, cookie, len_bytes };
            out.extend_from_slice(head.as_bytes());
        }
    }

    /// Writes flags and length into the head of a chunk that was appended before.
    ///
    /// # Panics
    /// If `head` is shorter than a head.
    pub(super) fn finish_head(self, head: &mut [u8], done: bool, len_bytes: u32) {
        let short = "a whole head was appended";
        let flags = U16::new(if done { chunk::FLAG_DONE } else { 0 });
        if self == Self::Extended {
            let (head, _) = ExtendedChunkHead::mut_from_prefix(head).expect(short);
            (head.flags, head.len_bytes) = (flags, U64::new(len_bytes.into()));
        } else {
            let (head, _) = ChunkHead::mut_from_prefix(head).expect(short);
            (head.flags, head.len_bytes) = (flags, U32::new(len_bytes));
        }
    }

    /// Appends an error: a chunk with its text, or a simple reply without.
    pub(super) fn error(self, out: &mut Vec<u8>, asked: Asked, error: NbdError, text: &str) {
        if self == Self::Simple {
            return simple_reply(out, asked.cookie, error.number());
        }
        let text = text.get(..wire::MAX_STRING_BYTES).unwrap_or(text);
        let text_bytes = u16::try_from(text.len()).expect("at most MAX_STRING_BYTES");
        self.chunk_head(out, chunk::ERROR, true, asked, 6 + u32::from(text_bytes));
        let (error, text_bytes) = (U32::new(error.number()), U16::new(text_bytes));
        out.extend_from_slice(ErrorInfo { error, text_bytes }.as_bytes());
        out.extend_from_slice(text.as_bytes());
    }
}

/// Appends a simple reply; `error` is 0 for success.
pub(super) fn simple_reply(out: &mut Vec<u8>, cookie: U64, error: u32) {
    let magic = U32::new(wire::SIMPLE_REPLY_MAGIC);
    out.extend_from_slice(SimpleReply { magic, error: U32::new(error), cookie }.as_bytes());
}
