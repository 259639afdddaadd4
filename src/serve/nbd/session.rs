//! One connection, from greeting to goodbye.
//!
//! Why: a client is slow, broken or hostile on a thread of its own, and nobody else notices.
//! How: receive what has arrived, answer all of it into a [`Batch`], send the batch, again.
//! Never: holds a lock on the way of a byte, or waits for a client while it owes it an answer.
//! Start at [`serve`]. Protocol: "Transmission".

use std::io;
use std::time::Instant;

use zerocopy::IntoBytes;
use zerocopy::byteorder::big_endian::U64;

use super::handshake::{Agreed, Handshake, Step, greeting};
use super::inbox::Inbox;
use super::limits::{Limits, MAX_READ_BYTES};
use super::options::{Malformed, StatusFilter};
use super::reply::{Batch, Extent, Sent, send_all};
use super::style::{Asked, Incoming, Style};
use super::transport::Transport;
use super::wire::{NbdError, command, command_flag};
use crate::image::ReadError;
use crate::serve::{CounterValues, Exports, Socket, Via};
use crate::units::GuestOffset;

/// READs in a row, each beginning where the last one ended, that make a sequential reader.
const SEQUENTIAL_READS: u32 = 3;

/// Why a session ended.
#[derive(Debug, thiserror::Error)]
pub enum End {
    /// The client asked for it.
    #[error("the client said goodbye")]
    Goodbye,
    /// The peer closed the connection, or it was hung up from our side.
    #[error("the connection was closed")]
    HungUp,
    /// No transmission phase within [`Limits::handshake`].
    #[error("the handshake took too long")]
    TooSlow,
    /// A rule of the protocol was broken that has no error reply.
    #[error("the client broke the protocol: {0}")]
    Protocol(&'static str),
    /// Half a reply was sent when the other half could not be read.
    #[error("an image became unreadable in the middle of a reply")]
    Unreadable,
    /// The socket failed.
    #[error("the socket failed")]
    Socket(#[source] io::Error),
    /// No TLS with this client, or what it sent was damaged on the way.
    #[error("TLS: {0}")]
    Tls(String),
}

impl End {
    pub(super) fn from_io(error: io::Error) -> Self {
        use io::ErrorKind::{BrokenPipe, ConnectionReset, InvalidData, TimedOut, WouldBlock};
        let kind = error.kind();
        if matches!(kind, BrokenPipe | ConnectionReset) {
            Self::HungUp
        } else if matches!(kind, WouldBlock | TimedOut) {
            Self::TooSlow
        } else if kind == InvalidData {
            Self::Tls(error.to_string())
        } else {
            Self::Socket(error)
        }
    }
}

/// Serves one connection until it ends, and says why it did.
///
/// `socket`, if there is one, is what [`Exports::close`] hangs up.
pub fn serve<T: Transport>(
    transport: &mut T,
    socket: Option<Socket>,
    exports: &Exports,
    limits: &Limits,
) -> End {
    let deadline = Instant::now() + limits.handshake;
    let mut inbox = Inbox::new(limits);
    let mut handshake = Handshake::new(exports, limits, socket);
    let greeting = greeting();
    match negotiate(transport, &mut inbox, &mut handshake, greeting.as_bytes(), deadline) {
        Ok(Negotiated::Agreed(agreed)) => transmit(transport, inbox, agreed, limits),
        Ok(Negotiated::StartTls) => End::Protocol("STARTTLS where there is no TLS"),
        Err(end) => end,
    }
}

/// What a negotiation has come to.
#[derive(Debug)]
pub(super) enum Negotiated {
    /// Requests follow.
    Agreed(Agreed),
    /// TLS follows, and then the rest of the negotiation.
    StartTls,
}

/// Sends what is to be said `first`, and negotiates until that comes to something.
///
/// # Errors
/// [`End`] if the session is over before.
pub(super) fn negotiate<T: Transport>(
    transport: &mut T,
    inbox: &mut Inbox,
    handshake: &mut Handshake<'_>,
    first: &[u8],
    deadline: Instant,
) -> Result<Negotiated, End> {
    let mut out = first.to_vec();
    loop {
        let step = handshake.advance(inbox.bytes(), &mut out);
        if let Step::StartTls(count) = step
            && inbox.bytes().len() > count
        {
            // Somebody between us and the client would have them taken for the client's own, read
            // under TLS.
            return Err(End::Protocol("bytes in plain text after STARTTLS"));
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(End::TooSlow);
        }
        if !out.is_empty() || matches!(step, Step::More) {
            transport.set_time_left(Some(left)).map_err(End::from_io)?;
        }
        send_all(transport, &out)?;
        out.clear();
        match step {
            Step::More => inbox.fill(transport)?,
            Step::Used(count) => inbox.consume(count),
            Step::Leave => return Err(End::Goodbye),
            Step::Refuse(why) => return Err(End::Protocol(why)),
            Step::StartTls(count) => {
                inbox.consume(count);
                return Ok(Negotiated::StartTls);
            }
            Step::Enter(count, agreed) => {
                inbox.consume(count);
                transport.set_time_left(None).map_err(End::from_io)?;
                return Ok(Negotiated::Agreed(agreed));
            }
        }
    }
}

/// Serves a connection that has come to its transmission phase, until it ends.
pub(super) fn transmit<T: Transport>(
    transport: &mut T,
    inbox: Inbox,
    agreed: Agreed,
    limits: &Limits,
) -> End {
    let style = agreed.style;
    let mut session = Session {
        transport,
        limits,
        agreed,
        inbox,
        batch: Batch::new(style),
        tally: CounterValues::default(),
        extents: Vec::new(),
        next_read: u64::MAX,
        in_a_row: 0,
        errors_logged: 0,
        deferred: Vec::new(),
        arrived: Instant::now(),
    };
    match session.run() {
        Ok(never) => match never {},
        Err(end) => end,
    }
}

/// The transmission phase of one connection.
pub(super) struct Session<'a, T> {
    pub(super) transport: &'a mut T,
    pub(super) limits: &'a Limits,
    pub(super) agreed: Agreed,
    inbox: Inbox,
    pub(super) batch: Batch,
    pub(super) tally: CounterValues,
    /// Memory for BLOCK_STATUS, empty between requests.
    pub(super) extents: Vec<Extent>,
    /// Where the last READ ended.
    next_read: u64,
    in_a_row: u32,
    pub(super) errors_logged: u32,
    /// Reads of what is still to come, in the order in which they were asked.
    deferred: Vec<Incoming>,
    /// When the requests that are being answered arrived.
    arrived: Instant,
}

/// A request whose range is inside the export, with its fields in host order.
#[derive(Clone, Copy, Debug)]
pub(super) struct Range {
    pub(super) asked: Asked,
    pub(super) offset: u64,
    pub(super) len_bytes: u64,
}

impl<T: Transport> Session<'_, T> {
    fn run(&mut self) -> Result<std::convert::Infallible, End> {
        loop {
            let result = self.answer_arrived();
            // What was asked before the end of a session is answered first.
            self.flush()?;
            self.answer_deferred()?;
            result?;
            self.inbox.fill(self.transport)?;
            self.arrived = Instant::now();
        }
    }

    /// True for a read of an image that is still arriving, some of which is not here: all of that has
    /// been asked for, and the read is answered when the others are.
    fn defer(&mut self, request: &Incoming) -> bool {
        let view = self.agreed.attachment.export().view();
        let is_plain =
            request.command == command::READ && request.flags & command_flag::PAYLOAD_LEN == 0;
        if !is_plain || !view.is_arriving() {
            return false;
        }
        let len_bytes = request.len_bytes.min(MAX_READ_BYTES.into());
        let is_here = view.ask(GuestOffset(request.offset), len_bytes);
        if !is_here {
            self.deferred.push(*request);
        }
        !is_here
    }

    /// Answers what waited, as it comes. All of it has waited as long as the first: where that was in
    /// vain, as nothing comes at all, the others do not wait once more.
    fn answer_deferred(&mut self) -> Result<(), End> {
        let mut in_vain = None;
        for request in std::mem::take(&mut self.deferred) {
            let view = self.agreed.attachment.export().view();
            let len_bytes = request.len_bytes.min(MAX_READ_BYTES.into());
            let at = GuestOffset(request.offset);
            let brought = match in_vain.take() {
                None => view.bring(at, len_bytes),
                Some(_) if view.ask(at, len_bytes) => Ok(()),
                Some(error) => Err(error),
            };
            match brought {
                Ok(()) => self.answer(&request)?,
                Err(error) => {
                    self.tally.requests += 1;
                    let (cookie, offset) = (request.cookie, U64::new(request.offset));
                    self.batch.begin(Asked { cookie, offset });
                    self.cannot_read(at, &error)?;
                    in_vain = Some(error).filter(ReadError::has_timed_out);
                }
            }
            self.flush()?;
        }
        Ok(())
    }

    /// Answers all whole requests in the inbox.
    fn answer_arrived(&mut self) -> Result<(), End> {
        let style = self.agreed.style;
        let recorder = self.agreed.attachment.export().tracing().recorder();
        loop {
            let Some((request, len)) = style.first_request(self.inbox.bytes()) else {
                return self.inbox.check_magic(style);
            };
            self.inbox.check_magic(style)?;
            self.inbox.consume(len);
            if let Some(recorder) = &recorder
                && matches!(request.command, command::READ | command::CACHE)
            {
                recorder.note(request.offset, request.len_bytes);
            }
            if !self.defer(&request) {
                self.answer(&request)?;
            }
            if self.batch.room(self.limits.batch_bytes) == 0 {
                self.flush()?;
            }
        }
    }

    fn answer(&mut self, request: &Incoming) -> Result<(), End> {
        self.tally.requests += 1;
        let asked = Asked { cookie: request.cookie, offset: U64::new(request.offset) };
        if request.command == command::DISC {
            return Err(End::Goodbye);
        }
        if self.agreed.style == Style::Extended {
            if request.flags & command_flag::PAYLOAD_LEN != 0 {
                return self.answer_payload(request, asked);
            }
            if request.command == command::WRITE {
                self.batch.begin(asked);
                return self.fail(NbdError::Inval, "a write without PAYLOAD_LEN");
            }
        } else if request.command == command::WRITE {
            self.drain(request.len_bytes)?;
        }
        self.batch.begin(asked);
        self.answer_plain(request, asked)
    }

    /// Answers a request whose payload, if it had one, is behind us.
    fn answer_plain(&mut self, request: &Incoming, asked: Asked) -> Result<(), End> {
        let flags = request.flags;
        match request.command {
            command::WRITE | command::TRIM | command::WRITE_ZEROES => {
                self.fail(NbdError::Perm, "this export is read-only")
            }
            command::READ if flags & !self.read_flags() == 0 => {
                let Some(range) = self.checked(request, asked)? else { return Ok(()) };
                let Ok(len_bytes @ 0..=MAX_READ_BYTES) = u32::try_from(range.len_bytes) else {
                    return self.too_long();
                };
                self.read(range, len_bytes, flags & command_flag::DF != 0)
            }
            command::BLOCK_STATUS if flags & !command_flag::REQ_ONE == 0 => {
                let Some(range) = self.checked(request, asked)? else { return Ok(()) };
                let contexts = self.agreed.contexts;
                self.block_status(range, contexts, flags & command_flag::REQ_ONE != 0)
            }
            command::CACHE if flags == 0 => {
                let Some(range) = self.checked(request, asked)? else { return Ok(()) };
                self.cache(range);
                self.batch.done();
                Ok(())
            }
            command::FLUSH if flags == 0 => {
                self.batch.done();
                Ok(())
            }
            command::READ | command::BLOCK_STATUS | command::CACHE | command::FLUSH => {
                self.fail(NbdError::Inval, "this command has no such flag")
            }
            _unknown => self.fail(NbdError::Inval, "this command is not known here"),
        }
    }

    /// Answers a request with an extended header that says that a payload follows.
    fn answer_payload(&mut self, request: &Incoming, asked: Asked) -> Result<(), End> {
        let flags = request.flags & !command_flag::PAYLOAD_LEN;
        let is_filter = request.command == command::BLOCK_STATUS
            && request.len_bytes <= StatusFilter::MAX_BYTES as u64;
        if is_filter {
            let payload = self.payload(request.len_bytes)?;
            self.batch.begin(asked);
            let filter = match StatusFilter::parse(&payload, self.agreed.contexts) {
                _ if flags & !command_flag::REQ_ONE != 0 => Err(Malformed("no such flag")),
                parsed => parsed,
            };
            return match filter {
                Ok(StatusFilter { len_bytes, contexts }) => {
                    let request = Incoming { len_bytes, ..*request };
                    let Some(range) = self.checked(&request, asked)? else { return Ok(()) };
                    self.block_status(range, contexts, flags & command_flag::REQ_ONE != 0)
                }
                Err(Malformed(why)) => self.fail(NbdError::Inval, why),
            };
        }
        self.drain(request.len_bytes)?;
        self.batch.begin(asked);
        match request.command {
            command::WRITE => self.fail(NbdError::Perm, "this export is read-only"),
            _without_payload => self.fail(NbdError::Inval, "this command takes no such payload"),
        }
    }

    fn read_flags(&self) -> u16 {
        if self.agreed.style == Style::Simple { 0 } else { command_flag::DF }
    }

    /// The request's range if it is inside the export; else the error is in the batch, and `None`
    /// comes back.
    fn checked(&mut self, request: &Incoming, asked: Asked) -> Result<Option<Range>, End> {
        let (offset, len_bytes) = (request.offset, request.len_bytes);
        let size_bytes = self.agreed.attachment.export().view().size_bytes();
        let end = offset.checked_add(len_bytes);
        if end.is_none_or(|end| end > size_bytes) {
            self.fail(NbdError::Inval, "the range is not all inside the export")?;
            return Ok(None);
        }
        Ok(Some(Range { asked, offset, len_bytes }))
    }

    fn too_long(&mut self) -> Result<(), End> {
        // EOVERFLOW tells a client to try smaller; simple replies have only EINVAL for it.
        let simple = self.agreed.style == Style::Simple;
        let error = if simple { NbdError::Inval } else { NbdError::Overflow };
        self.fail(error, "longer than the maximum payload of 32 MiB")
    }

    /// Answers the current request with an error.
    pub(super) fn fail(&mut self, error: NbdError, text: &str) -> Result<(), End> {
        self.tally.errors += 1;
        self.batch.fail(error, text)
    }

    /// The payload of a request, of at most [`StatusFilter::MAX_BYTES`].
    fn payload(&mut self, len_bytes: u64) -> Result<Vec<u8>, End> {
        loop {
            let have = self.inbox.bytes();
            let whole = usize::try_from(len_bytes).ok().and_then(|len| have.get(..len));
            if let Some(payload) = whole.map(<[u8]>::to_vec) {
                self.inbox.consume(payload.len());
                return Ok(payload);
            }
            self.flush()?;
            self.inbox.fill(self.transport)?;
        }
    }

    /// Throws the payload of a refused request away.
    fn drain(&mut self, len_bytes: u64) -> Result<(), End> {
        if len_bytes > MAX_READ_BYTES.into() {
            return Err(End::Protocol("a payload of more than the maximum"));
        }
        let mut left = len_bytes;
        loop {
            let there = self.inbox.bytes().len();
            let here = usize::try_from(left).map_or(there, |left| left.min(there));
            self.inbox.consume(here);
            left -= here as u64;
            if left == 0 {
                return Ok(());
            }
            // The client may want its earlier answers before it sends the rest.
            self.flush()?;
            self.inbox.fill(self.transport)?;
        }
    }

    /// Notes where a READ ends; true if this one went on where the last ones ended.
    pub(super) fn is_sequential(&mut self, range: &Range) -> bool {
        let follows = range.offset == self.next_read;
        self.in_a_row = if follows { self.in_a_row.saturating_add(1) } else { 0 };
        self.next_read = range.offset + range.len_bytes;
        self.in_a_row >= SEQUENTIAL_READS
    }

    /// Sends what has been gathered.
    pub(super) fn flush(&mut self) -> Result<Sent, End> {
        if self.batch.is_empty() {
            return Ok(Sent::default());
        }
        let export = self.agreed.attachment.export();
        let sent = self.batch.send(self.transport, export.view(), export.warmth());
        self.tally.errors += sent.as_ref().map_or(0, |sent| sent.failed);
        export.counters().add_batch(self.tally);
        export.latency().record(Via::Nbd, self.arrived.elapsed(), self.tally.requests);
        self.tally = CounterValues::default();
        sent
    }
}
