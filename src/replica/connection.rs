//! One connection to the engine, and what is asked on it.
//!
//! Why: what a reader can't know by itself is one message away.
//! How: a request and its answer, in turn; whoever wants to ask at the same time takes another
//! connection.
//! Never: goes on with a connection whose last answer was not understood.
//! Start at [`Connection::attach`].

use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::Duration;

use zerocopy::{FromZeros, IntoBytes};

use crate::socket;
use crate::wire::{
    ATTACH, LayerPart, MAGIC, MAX_IDENTITY_BYTES, MAX_LAYERS, MAX_MESSAGE_BYTES, Reply, Request,
    Status,
};

/// Bytes of the longest answer to an attach.
const MAX_ATTACHED_BYTES: usize =
    size_of::<crate::wire::Attached>() + MAX_LAYERS * size_of::<LayerPart>() + MAX_IDENTITY_BYTES;
/// Longest text of a refusal that is kept.
const MAX_TEXT_BYTES: usize = 4096;

/// A connection that is attached to an image.
#[derive(Debug)]
pub(crate) struct Connection {
    socket: OwnedFd,
    cookie: u32,
}

/// Why an answer is none.
#[derive(Debug)]
pub(crate) enum Lost {
    /// The engine can't be reached, or the connection is over.
    Gone(io::Error),
    /// The engine refuses, and the connection goes on.
    Refused(Status, String),
    /// What came is no answer.
    Protocol(&'static str),
}

/// An answer's numbers.
pub(crate) struct Answer {
    pub(crate) a: u64,
    pub(crate) b: u64,
    /// Bytes after the head.
    pub(crate) len: usize,
}

impl Connection {
    /// Connects, and asks for `image`. Gives the answer's body and its descriptors.
    pub(crate) fn attach(
        path: &Path,
        image: &str,
        patience: Duration,
    ) -> Result<(Self, Vec<u8>, Vec<OwnedFd>), Lost> {
        let socket = socket::connect(path, patience).map_err(Lost::Gone)?;
        let mut connection = Self { socket, cookie: 0 };
        let len_bytes = u32::try_from(image.len()).unwrap_or(u32::MAX);
        let request = Request { len_bytes, ..Request::of_range(ATTACH, connection.cookie, 0, 0) };
        let mut body = vec![0; MAX_ATTACHED_BYTES.max(MAX_TEXT_BYTES)];
        let mut descriptors = Vec::new();
        let answer = connection.ask(&request, image, &mut body, &mut descriptors)?;
        body.truncate(answer.len);
        Ok((connection, body, descriptors))
    }

    /// Asks for bytes or for what a range is; bytes come into `body`.
    pub(crate) fn range(
        &mut self,
        kind: u16,
        at: u64,
        limit: u64,
        body: &mut [u8],
    ) -> Result<Answer, Lost> {
        self.cookie = self.cookie.wrapping_add(1);
        let request = Request::of_range(kind, self.cookie, at, limit);
        self.ask(&request, "", body, &mut Vec::new())
    }

    fn ask(
        &mut self,
        request: &Request,
        name: &str,
        body: &mut [u8],
        descriptors: &mut Vec<OwnedFd>,
    ) -> Result<Answer, Lost> {
        let parts = [IoSlice::new(request.as_bytes()), IoSlice::new(name.as_bytes())];
        let parts = if name.is_empty() { &parts[..1] } else { &parts[..] };
        socket::send(&self.socket, parts, &[]).map_err(Lost::Gone)?;
        let mut reply = Reply::new_zeroed();
        let (count, text) = self.receive(&mut reply, body, descriptors)?;
        let len = count.checked_sub(size_of::<Reply>());
        let told = usize::try_from(reply.len_bytes).ok();
        let Some(len) = len.filter(|_| reply.magic == MAGIC && len == told) else {
            return Err(Lost::Protocol("it has another form or length"));
        };
        if (reply.kind, reply.cookie) != (request.kind, request.cookie) {
            return Err(Lost::Protocol("it answers another request"));
        }
        match Status::of(reply.status) {
            Some(Status::Ok) if len <= body.len() => Ok(Answer { a: reply.a, b: reply.b, len }),
            Some(Status::Ok) | None => Err(Lost::Protocol("it has an unknown status, or is long")),
            Some(status) => {
                let mut bytes: Vec<u8> = body.iter().chain(&text).copied().take(len).collect();
                bytes.truncate(MAX_TEXT_BYTES);
                let text = String::from_utf8_lossy(&bytes);
                Err(Lost::Refused(status, text.chars().filter(|c| !c.is_control()).collect()))
            }
        }
    }

    /// Receives an answer; what does not fit into `body` comes back: a refusal may be longer than
    /// the bytes that were asked for.
    fn receive(
        &mut self,
        reply: &mut Reply,
        body: &mut [u8],
        descriptors: &mut Vec<OwnedFd>,
    ) -> Result<(usize, Vec<u8>), Lost> {
        let mut text = vec![0; MAX_TEXT_BYTES.min(MAX_MESSAGE_BYTES.saturating_sub(body.len()))];
        let count = {
            let mut parts = [
                IoSliceMut::new(reply.as_mut_bytes()),
                IoSliceMut::new(body),
                IoSliceMut::new(&mut text),
            ];
            socket::receive(&self.socket, &mut parts, descriptors).map_err(Lost::Gone)?
        };
        match count {
            0 => Err(Lost::Gone(io::ErrorKind::UnexpectedEof.into())),
            count => Ok((count, text)),
        }
    }
}
