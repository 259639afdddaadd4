//! READ, CACHE and BLOCK_STATUS: from runs of a view to replies.
//!
//! Why: data, zeroes and compressed clusters alternate inside one request, and each has its
//! cheapest answer: mapped bytes, a hole, a decoded cluster that is kept until it is sent.
//! How: the range is walked run by run. With structured replies neighbouring data share a chunk
//! and zeroes become holes; otherwise everything is one flat payload.
//! Never: says hole for data, or touches a mapped byte.
//! Start at [`Session::read`]. Protocol: "Request types", "Structured reply types".

use super::contexts::{Context, Contexts};
use super::reply::{Extent, OpenChunk, UNREADABLE};
use super::session::{End, Range, Session};
use super::style::Style;
use super::transport::Transport;
use super::wire::NbdError;
use crate::image::{ReadError, Run, RunKind, Stored};
use crate::serve::Wanted;
use crate::units::GuestOffset;

/// Runs that one BLOCK_STATUS or CACHE looks at; the client asks again for the rest.
const MAX_LOOKUPS: usize = 1 << 18;
/// Read errors of one session that are logged as warnings; a client may repeat one for ever.
const LOGGED_ERRORS: u32 = 8;

/// How far the walk over one READ has come.
struct Walk {
    range: Range,
    whole_bytes: u32,
    at: GuestOffset,
    left: u32,
    sequential: bool,
    /// Zeroes become holes, and data chunks; otherwise all goes into one payload.
    chunked: bool,
    open: Option<OpenChunk>,
    /// Compressed clusters up to here were decoded together.
    prepared: GuestOffset,
}

impl Walk {
    fn advance(&mut self, len_bytes: u32) {
        self.at = self.at.advance(u64::from(len_bytes));
        self.left -= len_bytes;
    }
}

impl<T: Transport> Session<'_, T> {
    /// Answers READ of `len_bytes`. `whole` is DF: at most one content chunk.
    pub(super) fn read(&mut self, range: Range, len_bytes: u32, whole: bool) -> Result<(), End> {
        let sequential = self.is_sequential(&range);
        let at = GuestOffset(range.offset);
        if len_bytes == 0 {
            self.batch.done();
            return Ok(());
        }
        self.tally.bytes += range.len_bytes;
        let simple = self.agreed.style == Style::Simple;
        let chunked = !simple && (!whole || self.is_all_zero(range));
        if simple {
            self.batch.simple_head();
        } else if !chunked {
            self.batch.whole_data(at, len_bytes);
        }
        self.walk(Walk {
            range,
            whole_bytes: len_bytes,
            at,
            left: len_bytes,
            sequential,
            chunked,
            open: None,
            prepared: at,
        })
    }

    /// One run of zeroes from end to end, so that a single hole chunk answers it.
    fn is_all_zero(&self, range: Range) -> bool {
        let whole = range.len_bytes;
        self.run_at(GuestOffset(range.offset), whole)
            .is_ok_and(|run| run.kind == RunKind::Zero && run.len_bytes == whole)
    }

    fn run_at(&self, at: GuestOffset, limit_bytes: u64) -> Result<Run, ReadError> {
        self.agreed.attachment.export().view().run_at(at, limit_bytes)
    }

    fn walk(&mut self, mut walk: Walk) -> Result<(), End> {
        while walk.left > 0 {
            let room = self.batch.room(self.limits.batch_bytes);
            if room == 0 {
                self.close_chunk(&mut walk, false);
                if self.flush()?.last_failed {
                    return Ok(());
                }
                // Whole chunks may be followed by an error; half a flat payload may not.
                self.batch.resume(walk.range.asked, walk.chunked);
                continue;
            }
            let run = match self.run_at(walk.at, u64::from(walk.left)) {
                Ok(run) => run,
                Err(error) => return self.cannot_read(walk.at, &error),
            };
            // Only what takes room is cut to the room there is: a hole is 32 bytes.
            let len_bytes =
                u32::try_from(run.len_bytes).map_or(walk.left, |len| len.min(walk.left));
            let clipped = u32::try_from(room).map_or(len_bytes, |room| len_bytes.min(room));
            match run.kind {
                RunKind::Zero if walk.chunked => {
                    self.close_chunk(&mut walk, false);
                    self.batch.hole(walk.at, len_bytes, len_bytes == walk.left);
                    walk.advance(len_bytes);
                }
                RunKind::Zero => {
                    self.batch.zeroes(clipped as usize);
                    walk.advance(clipped);
                }
                RunKind::Data(stored) => {
                    if let Err(error) = self.bring(walk.at, clipped) {
                        return self.cannot_read(walk.at, &error);
                    }
                    self.data(&mut walk, stored, clipped);
                }
                RunKind::Encoded => {
                    if len_bytes < walk.left && walk.prepared.0 <= walk.at.0 {
                        let view = self.agreed.attachment.export().view();
                        walk.prepared = view.prepare(walk.at, walk.left.into());
                    }
                    if let Err(error) = self.encoded(&mut walk, clipped) {
                        return self.cannot_read(walk.at, &error);
                    }
                }
            }
        }
        self.close_chunk(&mut walk, true);
        Ok(())
    }

    fn data(&mut self, walk: &mut Walk, stored: Stored, len_bytes: u32) {
        self.open_chunk(walk);
        let wanted = Wanted {
            stored,
            len_bytes: len_bytes as usize,
            whole_request_bytes: walk.whole_bytes,
            sequential: walk.sequential,
        };
        let warmth = self.agreed.attachment.export().warmth();
        self.batch.mapped(walk.open.as_mut(), walk.at, wanted, warmth);
        walk.advance(len_bytes);
    }

    fn encoded(&mut self, walk: &mut Walk, len_bytes: u32) -> Result<(), ReadError> {
        let cluster = self.agreed.attachment.export().view().decoded(walk.at)?;
        let start = usize::try_from(walk.at.0 - cluster.start.0).unwrap_or(usize::MAX);
        let there = cluster.bytes.len().saturating_sub(start);
        let len_bytes = u32::try_from(there).map_or(len_bytes, |there| len_bytes.min(there));
        if len_bytes == 0 {
            return Err(ReadError::NotEncoded { at: walk.at });
        }
        self.tally.decoded += 1;
        self.open_chunk(walk);
        self.batch.decoded(walk.open.as_mut(), cluster, start, len_bytes as usize);
        walk.advance(len_bytes);
        Ok(())
    }

    fn open_chunk(&mut self, walk: &mut Walk) {
        if walk.chunked && walk.open.is_none() {
            walk.open = Some(self.batch.open_data(walk.at));
        }
    }

    fn close_chunk(&mut self, walk: &mut Walk, done: bool) {
        if let Some(open) = walk.open.take() {
            self.batch.close_data(&open, done);
        }
    }

    /// Waits until a run is here: of a file that is still arriving, the map has zeroes where nothing is yet.
    fn bring(&self, at: GuestOffset, len_bytes: u32) -> Result<(), ReadError> {
        let view = self.agreed.attachment.export().view();
        if view.is_arriving() { view.bring(at, len_bytes.into()) } else { Ok(()) }
    }

    /// Tells the client that this can't be read, and the log why.
    pub(super) fn cannot_read(&mut self, at: GuestOffset, error: &ReadError) -> Result<(), End> {
        self.log(at, error);
        self.fail(NbdError::Io, UNREADABLE)
    }

    fn log(&mut self, at: GuestOffset, error: &ReadError) {
        let export = self.agreed.attachment.export().name();
        self.errors_logged = self.errors_logged.saturating_add(1);
        if self.errors_logged <= LOGGED_ERRORS {
            tracing::warn!(export, %at, error = error as &dyn std::error::Error, "read failed");
        } else {
            tracing::debug!(export, %at, error = error as &dyn std::error::Error, "read failed");
        }
    }

    /// Starts reading and decoding what the client says it will want, and waits for none of it. A
    /// hint: errors show when it is read.
    pub(super) fn cache(&mut self, range: Range) {
        let mut at = GuestOffset(range.offset);
        let mut left = range.len_bytes;
        let export = self.agreed.attachment.export();
        if export.view().is_arriving() {
            export.view().ask(at, left);
            return;
        }
        let mut decoding = false;
        for _ in 0..MAX_LOOKUPS {
            let Ok(run) = self.run_at(at, left) else { return };
            match run.kind {
                RunKind::Data(stored) => export.warmth().ask(export.view(), stored, run.len_bytes),
                RunKind::Encoded if !decoding => {
                    export.view().will_read(at, left);
                    decoding = true;
                }
                RunKind::Encoded | RunKind::Zero => {}
            }
            (at, left) = (at.advance(run.len_bytes), left - run.len_bytes);
            if left == 0 {
                return;
            }
        }
    }

    /// Answers BLOCK_STATUS for these contexts. `one` is REQ_ONE: a single extent of each.
    pub(super) fn block_status(
        &mut self,
        range: Range,
        contexts: Contexts,
        one: bool,
    ) -> Result<(), End> {
        if contexts == Contexts::NONE {
            return self.fail(NbdError::Inval, "no metadata context was selected");
        }
        if range.len_bytes == 0 {
            return self.fail(NbdError::Inval, "a status of no bytes");
        }
        let max_extents = if one { 1 } else { self.limits.status_extents.max(1) };
        let mut extents = std::mem::take(&mut self.extents);
        let mut rest = contexts.iter().peekable();
        while let Some(context) = rest.next() {
            extents.clear();
            match self.collect_extents(range, context, max_extents, &mut extents) {
                Ok(()) => self.batch.status(context.id(), &extents, rest.peek().is_none()),
                Err((at, error)) => {
                    self.log(at, &error);
                    self.fail(
                        NbdError::Io,
                        "the image's tables are damaged here; see the server's log",
                    )?;
                    break;
                }
            }
        }
        self.extents = extents;
        Ok(())
    }

    /// Merged extents from the range's first byte on, at most `max_extents`, at least one.
    fn collect_extents(
        &self,
        range: Range,
        context: Context,
        max_extents: usize,
        extents: &mut Vec<Extent>,
    ) -> Result<(), (GuestOffset, ReadError)> {
        let mut at = GuestOffset(range.offset);
        let mut left = range.len_bytes;
        for _ in 0..MAX_LOOKUPS {
            let run = match self.run_at(at, left) {
                Ok(run) => run,
                // What is known so far is an answer; the client comes back for the rest.
                Err(_) if !extents.is_empty() => return Ok(()),
                Err(error) => return Err((at, error)),
            };
            let view = self.agreed.attachment.export().view();
            let (flags, len_bytes) = context.state(view, at, run);
            let len_bytes = len_bytes.min(left);
            if let Some(last) = extents.last_mut().filter(|last| last.flags == flags) {
                last.len_bytes += len_bytes;
            } else if extents.len() < max_extents {
                extents.push(Extent { len_bytes, flags });
            } else {
                return Ok(());
            }
            (at, left) = (at.advance(len_bytes), left - len_bytes);
            if left == 0 {
                return Ok(());
            }
        }
        Ok(())
    }
}
