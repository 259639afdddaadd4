//! One reader's questions, one by one.
//!
//! Why: what a reader asks is a message, and so is the answer; nothing else is between them.
//! How: [`Session::answer`] takes the bytes of a message and gives those of the answer, with no
//! socket in sight. Each message is judged by itself; one that is none ends the session.
//! Never: reads outside an image, or keeps what a reader said.
//! Start at [`Session::answer`].

use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::Instant;

use zerocopy::{FromBytes, IntoBytes};

use crate::image::{ReadError, RunKind};
use crate::replica::wire::{
    ATTACH, EXTENT, KIND_DATA, KIND_ENCODED, KIND_ZERO, MAGIC, MAX_NAME_BYTES, MAX_PREPARE_BYTES,
    MAX_READ_BYTES, PREPARE, READ, Reply, Request, Status,
};
use crate::serve::{Attachment, CounterValues, Export, Exports, Socket, Via};
use crate::units::GuestOffset;

/// A reader's session.
#[derive(Debug)]
pub struct Session {
    exports: Arc<Exports>,
    socket: Option<Socket>,
    is_admitted: bool,
    attachment: Option<Attachment>,
    body: Vec<u8>,
}

/// The answer to one message.
#[derive(Debug)]
pub struct Answer<'a> {
    /// Its head.
    pub head: Reply,
    /// What comes after it.
    pub body: &'a [u8],
    /// What goes with it.
    pub descriptors: Vec<BorrowedFd<'a>>,
    /// The session is over after it.
    pub is_last: bool,
}

/// A refusal.
struct Refusal {
    status: Status,
    text: String,
    is_last: bool,
}

fn refuse(status: Status, text: impl Into<String>) -> Refusal {
    Refusal { status, text: text.into(), is_last: status == Status::Malformed }
}

impl Session {
    /// A session that has not begun. `is_admitted`: the peer may read at all. Its exports hang it up
    /// through `socket`.
    #[must_use]
    pub fn new(exports: Arc<Exports>, socket: Option<Socket>, is_admitted: bool) -> Self {
        Self { exports, socket, is_admitted, attachment: None, body: Vec::new() }
    }

    /// Whether it has an image.
    #[must_use]
    pub fn is_attached(&self) -> bool {
        self.attachment.is_some()
    }

    /// The answer to a message, which may be anything.
    pub fn answer(&mut self, message: &[u8]) -> Answer<'_> {
        let begun = Instant::now();
        let mut head = Reply {
            magic: MAGIC,
            status: Status::Ok as u16,
            kind: 0,
            cookie: 0,
            len_bytes: 0,
            a: 0,
            b: 0,
        };
        let request = Request::read_from_prefix(message);
        if let Ok((request, _)) = &request {
            (head.kind, head.cookie) = (request.kind, request.cookie);
        }
        let done = match request {
            Ok((request, name)) if request.magic == MAGIC => {
                self.perform(&request, name, &mut head)
            }
            Ok(_) | Err(_) => Err(refuse(Status::Malformed, "not a request of this protocol")),
        };
        let mut is_last = false;
        let mut with_descriptors = head.kind == ATTACH;
        if let Err(refusal) = done {
            (head.status, head.a, head.b) = (refusal.status as u16, 0, 0);
            self.body = refusal.text.into_bytes();
            self.body.truncate(1024);
            (is_last, with_descriptors) = (refusal.is_last, false);
        }
        head.len_bytes = u32::try_from(self.body.len()).unwrap_or(0);
        let export = self.attachment.as_ref().map(Attachment::export);
        if let Some(export) = export {
            let via = if head.kind == ATTACH { Via::Attach } else { Via::Replica };
            export.latency().record(via, begun.elapsed(), 1);
        }
        let descriptors = match export.filter(|_| with_descriptors) {
            Some(export) => export.handout().descriptors(),
            None => Vec::new(),
        };
        Answer { head, body: &self.body, descriptors, is_last }
    }

    fn perform(&mut self, request: &Request, name: &[u8], head: &mut Reply) -> Result<(), Refusal> {
        self.body.clear();
        if !self.is_admitted {
            let text = "this user may not read images; use root or the daemon's user, or name the \
                        uid or gid in its configuration (replica_uids, replica_gids)";
            return Err(Refusal { is_last: true, ..refuse(Status::Denied, text) });
        }
        let told = usize::try_from(request.len_bytes).unwrap_or(usize::MAX);
        if request.later != 0 || told != name.len() {
            return Err(refuse(Status::Malformed, "a request of another length than it says"));
        }
        match (request.kind, &self.attachment) {
            (ATTACH, None) => self.attach(name),
            (READ, Some(attachment)) if name.is_empty() => {
                read(attachment.export(), request, &mut self.body)
            }
            (EXTENT, Some(attachment)) if name.is_empty() => {
                let (len_bytes, kind) = extent(attachment.export(), request)?;
                (head.a, head.b) = (len_bytes, kind);
                Ok(())
            }
            (PREPARE, Some(attachment)) if name.is_empty() => {
                head.a = prepare(attachment.export(), request)?;
                Ok(())
            }
            (ATTACH, Some(_)) => Err(refuse(Status::Malformed, "attached already")),
            (READ | EXTENT | PREPARE, None) => Err(refuse(Status::Malformed, "attach first")),
            (_, _) => Err(refuse(Status::Malformed, "an unknown request, or one with a name")),
        }
    }

    fn attach(&mut self, name: &[u8]) -> Result<(), Refusal> {
        let name = std::str::from_utf8(name).ok().filter(|name| name.len() <= MAX_NAME_BYTES);
        let name = name.ok_or_else(|| refuse(Status::Malformed, "a name that is no text"))?;
        let attachment = self.exports.attach(name, self.socket.clone()).ok_or_else(|| {
            let text = format!("{name:?} is not here, or not ready; see `bedplate list`");
            refuse(Status::Unknown, text)
        })?;
        let export = attachment.export();
        let Some(body) = export.handout().body(export) else {
            let text = "the daemon is out of descriptors; give it more (LimitNOFILE)";
            return Err(refuse(Status::TooMany, text));
        };
        self.body = body;
        self.attachment = Some(attachment);
        Ok(())
    }
}

fn read(export: &Export, request: &Request, body: &mut Vec<u8>) -> Result<(), Refusal> {
    let most = u64::from(MAX_READ_BYTES);
    let Some(len) = usize::try_from(request.limit).ok().filter(|_| request.limit <= most) else {
        return Err(refuse(Status::PastEnd, format!("a read of more than {most} bytes")));
    };
    if let Some(recorder) = export.tracing().recorder() {
        recorder.note(request.at, request.limit);
    }
    body.resize(len, 0);
    let read = export.view().read_at(body, GuestOffset(request.at));
    count(export, request.limit, read.is_err());
    read.map_err(|error| unreadable(&error))
}

/// Has a range ready for who reads it without us; how much of it was looked at.
fn prepare(export: &Export, request: &Request) -> Result<u64, Refusal> {
    let (at, view) = (GuestOffset(request.at), export.view());
    let left = view.size_bytes().saturating_sub(at.0);
    if request.limit == 0 || request.limit > left {
        let (len_bytes, size_bytes) = (request.limit, view.size_bytes());
        return Err(unreadable(&ReadError::PastEnd { at, len_bytes, size_bytes }));
    }
    let len_bytes = request.limit.min(MAX_PREPARE_BYTES);
    if let Some(recorder) = export.tracing().recorder() {
        recorder.note(at.0, len_bytes);
    }
    // What fails of it is told to who reads it.
    let until = view.prepare(at, len_bytes);
    count(export, 0, false);
    Ok(until.0.saturating_sub(at.0).clamp(1, len_bytes))
}

fn extent(export: &Export, request: &Request) -> Result<(u64, u64), Refusal> {
    let run = export.view().run_at(GuestOffset(request.at), request.limit);
    count(export, 0, run.is_err());
    let run = run.map_err(|error| unreadable(&error))?;
    let kind = match run.kind {
        RunKind::Data(_) => KIND_DATA,
        RunKind::Zero => KIND_ZERO,
        RunKind::Encoded => KIND_ENCODED,
    };
    Ok((run.len_bytes, kind))
}

fn count(export: &Export, bytes: u64, failed: bool) {
    let (bytes, errors) = if failed { (0, 1) } else { (bytes, 0) };
    export.counters().add_batch(CounterValues {
        requests: 1,
        bytes,
        errors,
        ..CounterValues::default()
    });
}

fn unreadable(error: &ReadError) -> Refusal {
    let is_outside = matches!(error, ReadError::PastEnd { .. });
    let status = if is_outside { Status::PastEnd } else { Status::Unreadable };
    let mut text = error.to_string();
    let mut source = std::error::Error::source(error);
    while let Some(error) = source {
        text = format!("{text}: {error}");
        source = error.source();
    }
    refuse(status, text)
}

impl Drop for Session {
    fn drop(&mut self) {
        if let Some(attachment) = &self.attachment {
            tracing::debug!(export = attachment.export().name(), "a reader's lease has ended");
        }
    }
}

/// The bytes of an answer's head.
pub(super) fn head_bytes(head: &Reply) -> &[u8] {
    head.as_bytes()
}
