//! Replies gathered in memory, and sent with as few system calls as possible.
//!
//! Why: a reply is a short head and a long run of mapped bytes; one vectored send of many of them
//! costs a third of sending each by itself.
//! How: heads go into one arena, everything else is noted as a part; a send turns parts into
//! pieces. All vectors keep their memory from batch to batch. If a page cannot be read the kernel
//! says EFAULT; then each remaining reply is read, and sent or replaced by an error, one by one.
//! Never: touches a mapped byte, or lets an error reply follow half a reply of another kind.
//! Start at [`Batch`].

use zerocopy::IntoBytes;
use zerocopy::byteorder::big_endian::{U32, U64};

use super::session::End;
use super::style::{Asked, Style, simple_reply};
use super::transport::Transport;
use super::wire::{ExtendedExtent, ExtendedStatus, Hole, NbdError, StatusExtent, chunk};
use crate::image::{Decoded, ReadError, Stored, View};
use crate::map::{MAX_PIECES, Piece};
use crate::serve::{Wanted, Warmth};
use crate::units::GuestOffset;

/// Zeroes for replies that cannot say "hole".
static ZEROES: [u8; 64 << 10] = [0; 64 << 10];
/// Parts after which a batch is sent: one sendmsg takes no more.
const FULL_PARTS: usize = MAX_PIECES - 16;

/// One part of the output, in order.
#[derive(Debug)]
enum Part {
    /// Bytes of the arena.
    Head { start: usize, len: usize },
    /// Bytes of the mapped file, and where they are in the view.
    Mapped { stored: Stored, guest: GuestOffset, len: usize },
    /// Zeroes, at most as many as [`ZEROES`].
    Zeroes { len: usize },
    /// Bytes of a decoded cluster.
    Decoded { index: usize, start: usize, len: usize },
}

/// Where a reply begins, for the day on which it has to be replaced.
#[derive(Debug)]
struct Reply {
    asked: Asked,
    first_part: usize,
    arena_before: usize,
    bytes_before: usize,
    /// An error may be sent in its place: nothing of it has gone out but whole chunks.
    may_fail: bool,
}

/// A data chunk whose length is not known yet.
#[derive(Debug)]
pub(super) struct OpenChunk {
    arena_at: usize,
    bytes: u32,
}

/// A range of one state in a BLOCK_STATUS reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Extent {
    pub(super) len_bytes: u64,
    pub(super) flags: u32,
}

/// What became of a batch.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Sent {
    /// Replies that had to be replaced by errors.
    pub(super) failed: u64,
    /// The last reply was one of them: whoever still adds to it must stop.
    pub(super) last_failed: bool,
}

/// Replies that wait to be sent.
#[derive(Debug)]
pub(super) struct Batch {
    style: Style,
    arena: Vec<u8>,
    parts: Vec<Part>,
    replies: Vec<Reply>,
    decoded: Vec<Decoded>,
    wanted: Vec<Wanted>,
    bytes: usize,
    /// Bytes of decoded clusters that are kept until they are sent: a whole cluster for each part
    /// of one, however short.
    held: usize,
    /// Memory for the pieces of a send, empty between sends.
    pieces: Vec<Piece<'static>>,
}

impl Batch {
    /// An empty batch of replies of this kind.
    pub(super) fn new(style: Style) -> Self {
        Self {
            style,
            arena: Vec::new(),
            parts: Vec::new(),
            replies: Vec::new(),
            decoded: Vec::new(),
            wanted: Vec::new(),
            bytes: 0,
            held: 0,
            pieces: Vec::new(),
        }
    }

    /// Nothing waits.
    pub(super) fn is_empty(&self) -> bool {
        self.parts.is_empty()
    }

    /// Bytes that may still be gathered; 0 if it is time to send.
    pub(super) fn room(&self, batch_bytes: usize) -> usize {
        let gathered = self.bytes.max(self.held);
        if self.parts.len() >= FULL_PARTS { 0 } else { batch_bytes.saturating_sub(gathered) }
    }

    /// Begins the reply to a request.
    pub(super) fn begin(&mut self, asked: Asked) {
        self.resume(asked, true);
    }

    /// Goes on with a reply whose first part was sent with the last batch.
    pub(super) fn resume(&mut self, asked: Asked, may_fail: bool) {
        self.replies.push(Reply {
            asked,
            first_part: self.parts.len(),
            arena_before: self.arena.len(),
            bytes_before: self.bytes,
            may_fail,
        });
    }

    /// Success without data.
    pub(super) fn done(&mut self) {
        if self.style == Style::Simple {
            self.simple_head();
        } else {
            self.chunk(chunk::NONE, true, 0, &[]);
        }
    }

    /// The head of a successful simple reply; the data of a READ follow as parts.
    pub(super) fn simple_head(&mut self) {
        let (start, asked) = (self.arena.len(), self.asked());
        simple_reply(&mut self.arena, asked.cookie, 0);
        self.appended(start);
    }

    /// Replaces what has been gathered of the current reply by an error. `text` is for people and
    /// must not tell a client about our file system.
    ///
    /// # Errors
    /// [`End::Unreadable`] if half a reply has been sent.
    pub(super) fn fail(&mut self, error: NbdError, text: &str) -> Result<(), End> {
        let Some(reply) = self.replies.last() else { return Ok(()) };
        if !reply.may_fail {
            return Err(End::Unreadable);
        }
        self.parts.truncate(reply.first_part);
        self.arena.truncate(reply.arena_before);
        self.bytes = reply.bytes_before;
        let (asked, start) = (reply.asked, self.arena.len());
        self.style.error(&mut self.arena, asked, error, text);
        self.appended(start);
        Ok(())
    }

    /// Opens a data chunk at `offset`; parts follow, then [`close_data`](Self::close_data).
    pub(super) fn open_data(&mut self, offset: GuestOffset) -> OpenChunk {
        let arena_at = self.arena.len();
        self.chunk(chunk::OFFSET_DATA, false, 8, U64::new(offset.0).as_bytes());
        OpenChunk { arena_at, bytes: 0 }
    }

    /// The head of the only data chunk of a reply, whose `len_bytes` follow as parts.
    pub(super) fn whole_data(&mut self, offset: GuestOffset, len_bytes: u32) {
        self.chunk(chunk::OFFSET_DATA, true, len_bytes + 8, U64::new(offset.0).as_bytes());
    }

    /// Writes the length of a data chunk into its head.
    pub(super) fn close_data(&mut self, open: &OpenChunk, done: bool) {
        let head = self.arena.get_mut(open.arena_at..).expect("open_data appended it");
        self.style.finish_head(head, done, open.bytes + 8);
    }

    /// A whole chunk of zeroes.
    pub(super) fn hole(&mut self, offset: GuestOffset, hole_bytes: u32, done: bool) {
        let (offset, hole_bytes) = (U64::new(offset.0), U32::new(hole_bytes));
        self.chunk(chunk::OFFSET_HOLE, done, 12, Hole { offset, hole_bytes }.as_bytes());
    }

    /// A BLOCK_STATUS chunk for one context. `done`: the last one of its reply.
    pub(super) fn status(&mut self, context: u32, extents: &[Extent], done: bool) {
        let bounded = "extents of one reply are bounded";
        let count = u32::try_from(extents.len()).expect(bounded);
        let (start, asked) = (self.arena.len(), self.asked());
        let context = U32::new(context);
        if self.style == Style::Extended {
            let (kind, len_bytes) = (chunk::BLOCK_STATUS_EXT, 8 + 16 * count);
            self.style.chunk_head(&mut self.arena, kind, done, asked, len_bytes);
            let head = ExtendedStatus { context, extents: U32::new(count) };
            self.arena.extend_from_slice(head.as_bytes());
            for extent in extents {
                let (len_bytes, flags) =
                    (U64::new(extent.len_bytes), U64::new(extent.flags.into()));
                self.arena.extend_from_slice(ExtendedExtent { len_bytes, flags }.as_bytes());
            }
        } else {
            let (kind, len_bytes) = (chunk::BLOCK_STATUS, 4 + 8 * count);
            self.style.chunk_head(&mut self.arena, kind, done, asked, len_bytes);
            self.arena.extend_from_slice(context.as_bytes());
            for extent in extents {
                // The sum of them is the request's length, which has 32 bits here.
                let len_bytes = u32::try_from(extent.len_bytes).expect("of a 32-bit request");
                let (len_bytes, flags) = (U32::new(len_bytes), U32::new(extent.flags));
                self.arena.extend_from_slice(StatusExtent { len_bytes, flags }.as_bytes());
            }
        }
        self.appended(start);
    }

    /// A chunk's head and the `body` after it, the first part of its payload of `len_bytes`.
    fn chunk(&mut self, kind: u16, done: bool, len_bytes: u32, body: &[u8]) {
        let (start, asked) = (self.arena.len(), self.asked());
        self.style.chunk_head(&mut self.arena, kind, done, asked, len_bytes);
        self.arena.extend_from_slice(body);
        self.appended(start);
    }

    /// Mapped bytes, which are those from `guest` on in the view.
    /// `warmth` is asked whether they are in memory.
    pub(super) fn mapped(
        &mut self,
        open: Option<&mut OpenChunk>,
        guest: GuestOffset,
        wanted: Wanted,
        warmth: &Warmth,
    ) {
        let (stored, len) = (wanted.stored, wanted.len_bytes);
        if !warmth.is_resident(stored, len) {
            self.wanted.push(wanted);
        }
        self.data(open, Part::Mapped { stored, guest, len }, len);
    }

    /// Zeroes that are sent as data.
    pub(super) fn zeroes(&mut self, mut len: usize) {
        while len > 0 {
            let part = len.min(ZEROES.len());
            self.data(None, Part::Zeroes { len: part }, part);
            len -= part;
        }
    }

    /// Bytes of a decoded cluster, which is kept until they are sent.
    pub(super) fn decoded(
        &mut self,
        open: Option<&mut OpenChunk>,
        cluster: Decoded,
        start: usize,
        len: usize,
    ) {
        let index = self.decoded.len();
        self.held += cluster.bytes.len();
        self.decoded.push(cluster);
        self.data(open, Part::Decoded { index, start, len }, len);
    }

    fn data(&mut self, open: Option<&mut OpenChunk>, part: Part, len: usize) {
        if let Some(open) = open {
            open.bytes += u32::try_from(len).expect("a reply has at most MAX_READ_BYTES");
        }
        self.parts.push(part);
        self.bytes += len;
    }

    /// Notes as a part what has been appended to the arena since it was `start` long.
    fn appended(&mut self, start: usize) {
        let begins_reply = self.replies.last().is_some_and(|r| r.first_part == self.parts.len());
        let added = self.arena.len() - start;
        self.bytes += added;
        match self.parts.last_mut() {
            Some(Part::Head { start: first, len }) if !begins_reply && *first + *len == start => {
                *len += added;
            }
            _another_kind_or_reply => self.parts.push(Part::Head { start, len: added }),
        }
    }

    fn asked(&self) -> Asked {
        self.replies.last().map_or_else(Asked::default, |reply| reply.asked)
    }

    /// Sends everything, waiting as long as the peer needs to take it, and empties the batch.
    ///
    /// # Errors
    /// [`End`] if the session cannot go on.
    pub(super) fn send<T: Transport>(
        &mut self,
        transport: &mut T,
        view: &View,
        warmth: &Warmth,
    ) -> Result<Sent, End> {
        // What is around them may not be there yet.
        if !self.wanted.is_empty() && !view.is_arriving() {
            warmth.warm(view, &self.wanted);
        }
        let mut from = Position::default();
        let mut sent = Sent::default();
        while from.part < self.parts.len() {
            match self.send_once(transport, view, from) {
                Ok(0) => return Err(End::HungUp),
                Ok(count) => self.advance(&mut from, count),
                Err(error) if error.raw_os_error() == Some(EFAULT) => {
                    sent = self.send_carefully(transport, view, from)?;
                    break;
                }
                Err(error) => return Err(End::from_io(error)),
            }
        }
        self.clear();
        Ok(sent)
    }

    fn clear(&mut self) {
        self.arena.clear();
        self.parts.clear();
        self.replies.clear();
        self.decoded.clear();
        self.held = 0;
        self.wanted.clear();
        self.bytes = 0;
    }

    /// One send of what comes after `from`.
    fn send_once<T: Transport>(
        &mut self,
        transport: &mut T,
        view: &View,
        from: Position,
    ) -> std::io::Result<usize> {
        let mut pieces = with_lifetime(std::mem::take(&mut self.pieces));
        let parts = self.parts.get(from.part..).unwrap_or_default();
        for part in parts.iter().take(MAX_PIECES) {
            match self.piece(part, view) {
                Some(piece) => pieces.push(piece),
                // The view has lost its map: as unreadable as a bad page.
                None => break,
            }
        }
        let result = match pieces.first_mut() {
            Some(first) => {
                *first = first.skip(from.bytes);
                transport.send(&pieces)
            }
            None => Err(std::io::Error::from_raw_os_error(EFAULT)),
        };
        self.pieces = with_lifetime(pieces);
        result
    }

    fn piece<'a>(&'a self, part: &Part, view: &'a View) -> Option<Piece<'a>> {
        if let Part::Mapped { stored, len, .. } = *part {
            return Some(Piece::Mapped(view.mapped(stored, len)?));
        }
        Some(Piece::Bytes(self.own_bytes(part).unwrap_or_default()))
    }

    /// The bytes of a part that is in our own memory; `None` for a mapped one.
    fn own_bytes(&self, part: &Part) -> Option<&[u8]> {
        let (bytes, start, len): (&[u8], _, _) = match *part {
            Part::Head { start, len } => (&self.arena, start, len),
            Part::Zeroes { len } => (&ZEROES[..], 0, len),
            Part::Decoded { index, start, len } => (&self.decoded[index].bytes[..], start, len),
            Part::Mapped { .. } => return None,
        };
        Some(&bytes[start..start + len])
    }

    fn advance(&self, from: &mut Position, mut count: usize) {
        while let Some(part) = self.parts.get(from.part) {
            let left = part.len() - from.bytes;
            if count < left {
                from.bytes += count;
                return;
            }
            count -= left;
            *from = Position { part: from.part + 1, bytes: 0 };
        }
    }

    /// Sends the rest reply by reply, each from a copy that has been read before its first byte
    /// goes out, so that what cannot be read becomes an error and not half a reply.
    fn send_carefully<T: Transport>(
        &self,
        transport: &mut T,
        view: &View,
        mut from: Position,
    ) -> Result<Sent, End> {
        let mut sent = Sent::default();
        let mut copy = Vec::new();
        let first = self.replies.partition_point(|reply| reply.first_part <= from.part);
        let rest = self.replies.get(first.saturating_sub(1)..).unwrap_or_default();
        for (index, reply) in rest.iter().enumerate() {
            let end = rest.get(index + 1).map_or(self.parts.len(), |next| next.first_part);
            let untouched = from <= Position { part: reply.first_part, bytes: 0 };
            copy.clear();
            sent.last_failed = false;
            if let Err(error) = self.copy_parts(from, end, view, &mut copy) {
                tracing::warn!(%error, "a page of an image cannot be read");
                if !(untouched && reply.may_fail) {
                    return Err(End::Unreadable);
                }
                copy.clear();
                self.style.error(&mut copy, reply.asked, NbdError::Io, UNREADABLE);
                sent.failed += 1;
                sent.last_failed = true;
            }
            send_all(transport, &copy)?;
            from = Position { part: end, bytes: 0 };
        }
        Ok(sent)
    }

    fn copy_parts(
        &self,
        from: Position,
        end: usize,
        view: &View,
        copy: &mut Vec<u8>,
    ) -> Result<(), ReadError> {
        let mut skip = from.bytes;
        for part in self.parts.get(from.part..end).unwrap_or_default() {
            if let Part::Mapped { guest, len, .. } = *part {
                let before = copy.len();
                copy.resize(before + len - skip, 0);
                view.read_at(&mut copy[before..], guest.advance(skip as u64))?;
            } else {
                let bytes = self.own_bytes(part).unwrap_or_default();
                copy.extend_from_slice(bytes.get(skip..).unwrap_or_default());
            }
            skip = 0;
        }
        Ok(())
    }
}

/// How far the output has been sent: whole parts, and bytes of the next one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
struct Position {
    part: usize,
    bytes: usize,
}

impl Part {
    fn len(&self) -> usize {
        match *self {
            Self::Head { len, .. }
            | Self::Mapped { len, .. }
            | Self::Zeroes { len }
            | Self::Decoded { len, .. } => len,
        }
    }
}

/// What a client is told of a range that cannot be read; the log has the rest.
pub(super) const UNREADABLE: &str = "this part of the image cannot be read; see the server's log";

const EFAULT: i32 = rustix::io::Errno::FAULT.raw_os_error();

/// Sends bytes of our own, however many sends it takes.
///
/// # Errors
/// [`End`] if the session cannot go on.
pub(super) fn send_all<T: Transport>(transport: &mut T, mut bytes: &[u8]) -> Result<(), End> {
    while !bytes.is_empty() {
        match transport.send(&[Piece::Bytes(bytes)]).map_err(End::from_io)? {
            0 => return Err(End::HungUp),
            count => bytes = bytes.get(count..).unwrap_or_default(),
        }
    }
    Ok(())
}

/// An empty vector of pieces with another lifetime and the same memory.
fn with_lifetime<'to>(mut pieces: Vec<Piece<'_>>) -> Vec<Piece<'to>> {
    pieces.clear();
    pieces.into_iter().map(|_| unreachable!("the vector is empty")).collect()
}
