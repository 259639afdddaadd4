//! Why an export cannot be read.
//!
//! Why: what a server refuses, what breaks, and a server that does not keep to the protocol are three
//! things for whoever has to act.
//! Never: holds the address; the transfer's own error does.

use std::io;

use super::super::error::Class;

/// Why an export cannot be read. The message prints every field.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "each field is named in the message above it")]
pub enum NbdFault {
    #[error("cannot connect; is the server running?")]
    Connect {
        #[source]
        source: io::Error,
    },
    #[error("not a socket; name that of an NBD server")]
    NotASocket,
    #[error("what answers is no NBD server (it begins with {found:#018x})")]
    NoServer { found: u64 },
    #[error("the server is too old: {what}; use qemu-nbd, nbdkit or nbd-server of this decade")]
    TooOld { what: &'static str },
    #[error(
        "the server wants TLS, which is not spoken here; use a Unix socket, or a tunnel to the server"
    )]
    WantsTls,
    #[error("the server has no such export{text}; `nbdinfo --list` shows those that it has")]
    NoExport { text: String },
    #[error("the server refuses the export (reply {code:#x}){text}")]
    Refused { code: u32, text: String },
    #[error("the connection broke at byte {at:#x}")]
    Broken {
        at: u64,
        #[source]
        source: io::Error,
    },
    #[error("the server hung up at byte {at:#x}")]
    HungUp { at: u64 },
    #[error("no byte arrived for {seconds} s at byte {at:#x}")]
    Stalled { at: u64, seconds: u64 },
    #[error("the server cannot read {len} bytes at byte {at:#x}: error {errno}{text}")]
    CannotRead { at: u64, len: u32, errno: u32, text: String },
    #[error("the server breaks the protocol: {what} ({found:#x})")]
    Protocol { what: &'static str, found: u64 },
}

impl NbdFault {
    /// Whether trying again can help.
    #[must_use]
    pub fn class(&self) -> Class {
        match self {
            Self::Connect { .. }
            | Self::Broken { .. }
            | Self::HungUp { .. }
            | Self::Stalled { .. }
            | Self::CannotRead { .. } => Class::Retry,
            Self::NotASocket
            | Self::NoServer { .. }
            | Self::TooOld { .. }
            | Self::WantsTls
            | Self::NoExport { .. }
            | Self::Refused { .. }
            | Self::Protocol { .. } => Class::Refuse,
        }
    }
}

/// What a server says, made fit for a message: its beginning, with a colon before.
pub(super) fn said(text: &[u8]) -> String {
    let text = String::from_utf8_lossy(text);
    let plain: String = text.chars().filter(|c| !c.is_control()).take(200).collect();
    if plain.trim().is_empty() { String::new() } else { format!(": {}", plain.trim()) }
}
