//! From the greeting to the transmission phase: bytes in, bytes out, no I/O.
//!
//! Why: this is the first thing that a stranger talks to.
//! How: [`Handshake::advance`] looks at what has arrived, appends answers, and says what it used;
//! an option is looked at only when all of it is there.
//! Never: waits, allocates by a client's number, or tells an unknown option from a session's end.
//! Start at [`Handshake::advance`]. Protocol: "Fixed newstyle negotiation", "Option types".

use zerocopy::byteorder::big_endian::{U16, U32, U64};
use zerocopy::{FromBytes, IntoBytes};

use super::contexts::Contexts;
use super::limits::{Limits, MAX_READ_BYTES, PREFERRED_BLOCK_BYTES};
use super::options::{self, InfoRequest, Malformed, MetaRequest};
use super::style::Style;
use super::wire::{self, ExportNameReply, Greeting, InfoBlockSize, InfoExport, OptionHead};
use super::wire::{OptionReplyHead, export_flag, handshake_flag, info, option, option_reply};
use crate::serve::Socket;
use crate::serve::{Attachment, Export, Exports};

/// What client and server have agreed on.
#[derive(Debug)]
pub(super) struct Agreed {
    /// The export, held.
    pub(super) attachment: Attachment,
    /// The kind of headers and replies.
    pub(super) style: Style,
    /// The metadata contexts that were selected for this export.
    pub(super) contexts: Contexts,
}

/// What to do next.
#[derive(Debug)]
pub(super) enum Step {
    /// Not all of the next message is here.
    More,
    /// So many bytes are used up, and the answers are in the output.
    Used(usize),
    /// So many bytes are used up; after the answers, requests follow.
    Enter(usize, Agreed),
    /// So many bytes are used up; after the answer, TLS begins.
    StartTls(usize),
    /// After the answers the session ends, as the client asked.
    Leave,
    /// The session ends: a rule was broken that has no error reply.
    Refuse(&'static str),
}

/// What TLS is to this negotiation ("TLS support": NOTLS and FORCEDTLS).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Encryption {
    /// There is none.
    Never,
    /// Nothing is answered before it has begun.
    Required,
    /// It has begun.
    Begun,
}

/// The state of one negotiation.
#[derive(Debug)]
pub(super) struct Handshake<'a> {
    exports: &'a Exports,
    limits: &'a Limits,
    socket: Option<Socket>,
    encryption: Encryption,
    flags_known: bool,
    no_zeroes: bool,
    options: u32,
    style: Style,
    /// Canonical name of the export for which metadata contexts were selected, and which.
    selected: Option<(String, Contexts)>,
}

/// The first bytes that a server sends.
pub(super) fn greeting() -> Greeting {
    Greeting {
        init: U64::new(wire::INIT_MAGIC),
        newstyle: U64::new(wire::OPTION_MAGIC),
        flags: U16::new(handshake_flag::FIXED_NEWSTYLE | handshake_flag::NO_ZEROES),
    }
}

impl<'a> Handshake<'a> {
    /// A negotiation whose greeting has been sent. `socket` is how the export hangs it up later.
    pub(super) fn new(exports: &'a Exports, limits: &'a Limits, socket: Option<Socket>) -> Self {
        Self {
            exports,
            limits,
            socket,
            encryption: Encryption::Never,
            flags_known: false,
            no_zeroes: false,
            options: 0,
            style: Style::Simple,
            selected: None,
        }
    }

    /// This negotiation in another state of encryption.
    pub(super) fn with(self, encryption: Encryption) -> Self {
        Self { encryption, ..self }
    }

    /// Takes the next message off the front of `input` and appends its answer to `out`.
    pub(super) fn advance(&mut self, input: &[u8], out: &mut Vec<u8>) -> Step {
        if !self.flags_known {
            return self.client_flags(input);
        }
        let Ok((head, rest)) = OptionHead::read_from_prefix(input) else {
            return Step::More;
        };
        if head.magic.get() != wire::OPTION_MAGIC {
            return Step::Refuse("an option without its magic number");
        }
        let Ok(len_bytes) = usize::try_from(head.len_bytes.get()) else {
            return Step::Refuse("an option longer than memory");
        };
        if len_bytes > self.limits.option_bytes {
            return Step::Refuse("an option longer than the server takes");
        }
        let Some(data) = rest.get(..len_bytes) else { return Step::More };
        self.options += 1;
        if self.options > self.limits.options {
            return Step::Refuse("more options than the server takes");
        }
        let used = size_of::<OptionHead>() + len_bytes;
        self.option(head.option.get(), data, used, out)
    }

    fn client_flags(&mut self, input: &[u8]) -> Step {
        let Ok((flags, _)) = U32::read_from_prefix(input) else { return Step::More };
        let known = u32::from(handshake_flag::FIXED_NEWSTYLE | handshake_flag::NO_ZEROES);
        if flags.get() & !known != 0 {
            return Step::Refuse("unknown client flags");
        }
        let fixed = flags.get() & u32::from(handshake_flag::FIXED_NEWSTYLE) != 0;
        if self.encryption == Encryption::Required && !fixed {
            return Step::Refuse("a client without fixed newstyle negotiation cannot begin TLS");
        }
        self.no_zeroes = flags.get() & u32::from(handshake_flag::NO_ZEROES) != 0;
        self.flags_known = true;
        Step::Used(size_of::<U32>())
    }

    fn option(&mut self, number: u32, data: &[u8], used: usize, out: &mut Vec<u8>) -> Step {
        let mut answer = Answer { out, option: number };
        if self.encryption == Encryption::Required {
            return without_tls(number, data, used, &mut answer);
        }
        match number {
            option::EXPORT_NAME => return self.export_name(data, used, answer.out),
            option::GO => return self.go(data, used, &mut answer),
            option::ABORT => {
                answer.ack();
                return Step::Leave;
            }
            option::LIST => self.list(data, &mut answer),
            option::INFO => {
                if let Some((request, export)) = self.find_info(data, &mut answer) {
                    self.describe(&request, &export, &mut answer);
                    answer.ack();
                }
            }
            option::STRUCTURED_REPLY | option::EXTENDED_HEADERS if !data.is_empty() => {
                answer.invalid("this option has no data");
            }
            option::STRUCTURED_REPLY if self.style == Style::Extended => {
                let text = "extended headers were agreed on, which are more than this";
                answer.refuse(option_reply::ERR_EXT_HEADER_REQD, text);
            }
            option::STRUCTURED_REPLY => {
                self.style = Style::Structured;
                answer.ack();
            }
            option::EXTENDED_HEADERS => {
                self.style = Style::Extended;
                answer.ack();
            }
            option::LIST_META_CONTEXT => self.list_contexts(data, &mut answer),
            option::SET_META_CONTEXT => self.set_contexts(data, &mut answer),
            option::STARTTLS if !data.is_empty() => answer.invalid("STARTTLS has no data"),
            option::STARTTLS if self.encryption == Encryption::Begun => {
                answer.invalid("TLS is in use already");
            }
            option::STARTTLS => {
                answer.refuse(option_reply::ERR_UNSUP, "there is no TLS here; go on without it");
            }
            _unknown => answer.refuse(option_reply::ERR_UNSUP, "this option is not known here"),
        }
        Step::Used(used)
    }

    fn export_name(&mut self, data: &[u8], used: usize, out: &mut Vec<u8>) -> Step {
        if self.style == Style::Extended {
            return Step::Refuse("EXPORT_NAME after EXTENDED_HEADERS; the protocol wants GO");
        }
        let Ok(name) = options::export_name(data) else {
            return Step::Refuse("an export name that is no string");
        };
        let Some(agreed) = self.enter(name) else {
            return Step::Refuse("EXPORT_NAME of an export that is not here");
        };
        let size_bytes = U64::new(agreed.attachment.export().view().size_bytes());
        let flags = U16::new(self.flags(agreed.attachment.export()));
        out.extend_from_slice(ExportNameReply { size_bytes, flags }.as_bytes());
        if !self.no_zeroes {
            out.extend_from_slice(&[0; 124]);
        }
        Step::Enter(used, agreed)
    }

    fn go(&mut self, data: &[u8], used: usize, answer: &mut Answer<'_>) -> Step {
        let Some((request, found)) = self.find_info(data, answer) else {
            return Step::Used(used);
        };
        // The export may have been removed since it was found; attaching is what counts.
        let Some(agreed) = self.enter(found.name()) else {
            answer.unknown(request.name);
            return Step::Used(used);
        };
        self.describe(&request, agreed.attachment.export(), answer);
        answer.ack();
        Step::Enter(used, agreed)
    }

    fn enter(&mut self, name: &str) -> Option<Agreed> {
        let attachment = self.exports.attach(name, self.socket.clone())?;
        let contexts = self.contexts_of(attachment.export());
        Some(Agreed { attachment, style: self.style, contexts })
    }

    /// What was selected, if it was for this export.
    fn contexts_of(&self, export: &Export) -> Contexts {
        let fitting = self.selected.as_ref().filter(|(name, _)| name == export.name());
        fitting.map_or(Contexts::NONE, |(_, contexts)| *contexts)
    }

    fn flags(&self, export: &Export) -> u16 {
        let df = if self.style == Style::Simple { 0 } else { export_flag::SEND_DF };
        let has_filter =
            self.style == Style::Extended && self.contexts_of(export) != Contexts::NONE;
        let filter = if has_filter { export_flag::BLOCK_STATUS_PAYLOAD } else { 0 };
        export_flag::HAS_FLAGS
            | export_flag::READ_ONLY
            | export_flag::SEND_FLUSH
            | export_flag::CAN_MULTI_CONN
            | export_flag::SEND_CACHE
            | df
            | filter
    }

    /// The export that INFO or GO names, or `None` with the error in the answer.
    fn find_info<'d>(
        &self,
        data: &'d [u8],
        answer: &mut Answer<'_>,
    ) -> Option<(InfoRequest<'d>, std::sync::Arc<Export>)> {
        match InfoRequest::parse(data) {
            Ok(request) => Some((request, self.find(request.name, answer)?)),
            Err(Malformed(why)) => {
                answer.invalid(why);
                None
            }
        }
    }

    fn find(&self, name: &str, answer: &mut Answer<'_>) -> Option<std::sync::Arc<Export>> {
        let export = self.exports.get(name);
        if export.is_none() {
            answer.unknown(name);
        }
        export
    }

    fn describe(&self, request: &InfoRequest<'_>, export: &Export, answer: &mut Answer<'_>) {
        let whole = InfoExport {
            kind: U16::new(info::EXPORT),
            size_bytes: U64::new(export.view().size_bytes()),
            flags: U16::new(self.flags(export)),
        };
        answer.reply(option_reply::INFO, &[whole.as_bytes()]);
        if request.wants_name {
            let kind = U16::new(info::NAME);
            answer.reply(option_reply::INFO, &[kind.as_bytes(), export.name().as_bytes()]);
        }
        if request.wants_description && !export.description().is_empty() {
            let kind = U16::new(info::DESCRIPTION);
            answer.reply(option_reply::INFO, &[kind.as_bytes(), export.description().as_bytes()]);
        }
        if request.wants_block_size {
            let sizes = InfoBlockSize {
                kind: U16::new(info::BLOCK_SIZE),
                minimum: U32::new(1),
                preferred: U32::new(PREFERRED_BLOCK_BYTES),
                maximum: U32::new(MAX_READ_BYTES),
            };
            answer.reply(option_reply::INFO, &[sizes.as_bytes()]);
        }
    }

    fn list(&self, data: &[u8], answer: &mut Answer<'_>) {
        if !data.is_empty() {
            return answer.invalid("LIST has no data");
        }
        for export in self.exports.list() {
            let name = export.name().as_bytes();
            let name_bytes = u32::try_from(name.len()).expect("a name has at most 4096 bytes");
            let head = U32::new(name_bytes);
            let description = export.description().as_bytes();
            answer.reply(option_reply::SERVER, &[head.as_bytes(), name, description]);
        }
        answer.ack();
    }

    fn list_contexts(&self, data: &[u8], answer: &mut Answer<'_>) {
        let Some((request, _)) = self.find_meta(data, answer) else { return };
        for context in request.listed.iter() {
            let unused_id = U32::ZERO;
            let name = context.name().as_bytes();
            answer.reply(option_reply::META_CONTEXT, &[unused_id.as_bytes(), name]);
        }
        answer.ack();
    }

    fn set_contexts(&mut self, data: &[u8], answer: &mut Answer<'_>) {
        // Whatever comes of it, an earlier selection is over.
        self.selected = None;
        let Some((request, export)) = self.find_meta(data, answer) else { return };
        for context in request.selected.iter() {
            let id = U32::new(context.id());
            let name = context.name().as_bytes();
            answer.reply(option_reply::META_CONTEXT, &[id.as_bytes(), name]);
        }
        self.selected = Some((export.name().to_owned(), request.selected));
        answer.ack();
    }

    fn find_meta<'d>(
        &self,
        data: &'d [u8],
        answer: &mut Answer<'_>,
    ) -> Option<(MetaRequest<'d>, std::sync::Arc<Export>)> {
        if self.style == Style::Simple {
            answer.invalid("metadata contexts need structured replies; ask for those first");
            return None;
        }
        match MetaRequest::parse(data) {
            Ok(request) => Some((request, self.find(request.name, answer)?)),
            Err(Malformed(why)) => {
                answer.invalid(why);
                None
            }
        }
    }
}

/// Answers an option of a client that has to begin TLS before all else.
fn without_tls(number: u32, data: &[u8], used: usize, answer: &mut Answer<'_>) -> Step {
    match number {
        option::STARTTLS if data.is_empty() => {
            answer.ack();
            return Step::StartTls(used);
        }
        option::STARTTLS => answer.invalid("STARTTLS has no data"),
        option::ABORT => {
            answer.ack();
            return Step::Leave;
        }
        option::EXPORT_NAME => return Step::Refuse("EXPORT_NAME without TLS"),
        _any_other => {
            let text = "this server is read over TLS only; begin with STARTTLS";
            answer.refuse(option_reply::ERR_TLS_REQD, text);
        }
    }
    Step::Used(used)
}

/// Replies to one option.
struct Answer<'a> {
    out: &'a mut Vec<u8>,
    option: u32,
}

impl Answer<'_> {
    fn reply(&mut self, reply: u32, data: &[&[u8]]) {
        let len_bytes = data.iter().map(|part| part.len()).sum::<usize>();
        let head = OptionReplyHead {
            magic: U64::new(wire::OPTION_REPLY_MAGIC),
            option: U32::new(self.option),
            reply: U32::new(reply),
            len_bytes: U32::new(u32::try_from(len_bytes).expect("a name and a description")),
        };
        self.out.extend_from_slice(head.as_bytes());
        data.iter().for_each(|part| self.out.extend_from_slice(part));
    }

    fn ack(&mut self) {
        self.reply(option_reply::ACK, &[]);
    }

    fn refuse(&mut self, reply: u32, text: &str) {
        self.reply(reply, &[text.as_bytes()]);
    }

    fn invalid(&mut self, why: &str) {
        self.refuse(option_reply::ERR_INVALID, why);
    }

    fn unknown(&mut self, name: &str) {
        let shown: String = name.chars().take(80).collect();
        let text = match name {
            "" => "there is no default export here; name one (NBD_OPT_LIST shows them)".to_owned(),
            _ => format!("no export is named {shown:?} here; NBD_OPT_LIST shows them"),
        };
        self.refuse(option_reply::ERR_UNKNOWN, &text);
    }
}
