//! Why a transfer failed: what, where, and whether trying again can help.

use std::io;
use std::path::PathBuf;

use super::backup::BackupFault;
use super::http::{AccessError, AddressRefused};
use super::nbd::NbdFault;
use super::sums::SumsFault;
use crate::disk::DiskError;

/// What a caller does about an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// Trying again cannot help: the request, the source or its bytes are wrong.
    Refuse,
    /// A fault that may pass: the network, the server, a full disk.
    Retry,
    /// The caller itself ended it.
    Cancelled,
}

/// An error of HTTP, without a URL in it.
pub type HttpError = Box<dyn std::error::Error + Send + Sync>;

/// Why a transfer failed. URLs are redacted; the message prints every field.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "each field is named in the message above it")]
pub enum FetchError {
    #[error("{url}: cannot connect; check the host, the network and any proxy")]
    Connect {
        url: String,
        #[source]
        source: HttpError,
    },
    #[error(
        "{url}: its certificate is refused; name its authority (--cacert, access.ca), or give the host by the name in the certificate"
    )]
    Certificate {
        url: String,
        #[source]
        source: HttpError,
    },
    #[error("{url}: {source}")]
    Address { url: String, source: AddressRefused },
    #[error("{url}: access")]
    Access {
        url: String,
        #[source]
        source: AccessError,
    },
    #[error("{}: this daemon takes no source from there; {rule}", path.display())]
    Place { path: PathBuf, rule: String },
    #[error("{url}: {reason}; give the final URL")]
    Redirect { url: String, reason: String },
    #[error("{url}: the server answered {status}; {hint}")]
    Status { url: String, status: u16, hint: &'static str, retry_after_s: Option<u64> },
    #[error("{url}: {source}")]
    Nbd { url: String, source: NbdFault },
    #[error("{url}")]
    Backup {
        url: String,
        #[source]
        source: BackupFault,
    },
    #[error("{url}: no byte arrived for {seconds} s at byte {at:#x}")]
    Stalled { url: String, at: u64, seconds: u64 },
    #[error("{url}: the connection broke at byte {at:#x}")]
    Broken {
        url: String,
        at: u64,
        #[source]
        source: HttpError,
    },
    #[error("{url}: the server ended the body at byte {at:#x} of {total:#x}")]
    Short { url: String, at: u64, total: u64 },
    #[error(
        "{url}: the server sent more than the {total:#x} bytes that it announced; the server or a proxy is broken"
    )]
    TooMuch { url: String, total: u64 },
    #[error(
        "{url}: the transfer broke at byte {at:#x}, and the server cannot resume it (no byte ranges, or nothing that tells versions apart: no strong ETag, or a live export); run it again to start over, or give a digest"
    )]
    CannotResume {
        url: String,
        at: u64,
        #[source]
        source: Box<FetchError>,
    },
    #[error("{url}: header {field} is {found:?}, need {need}; the server or a proxy is broken")]
    Header { url: String, field: &'static str, found: String, need: String },
    #[error(
        "{url}: the server sent all of it where a part was asked for; the server or a proxy is broken"
    )]
    WholeAnswer { url: String },
    #[error(
        "{url}: parts of it cannot be asked for: {why}; bring it in as it is, without a layout"
    )]
    NoParts { url: String, why: &'static str },
    #[error("{url}: the compressed source is refused; check the URL, or bring it in as it is")]
    Decode {
        url: String,
        #[source]
        source: super::decode::DecodeError,
    },
    #[error("{url}: the image changed while it was brought in ({what}); run it again")]
    Changed { url: String, what: String },
    #[error("{url}: the source is empty; check the URL")]
    Empty { url: String },
    #[error("{url}: {total} bytes, more than the limit of {limit}")]
    TooLarge { url: String, total: u64, limit: u64 },
    #[error(
        "{url}: {kind} is {found}, expected {expected}; the bytes were thrown away: check the digest and the URL"
    )]
    Digest { url: String, kind: &'static str, expected: String, found: String },
    #[error("{url}: {source}")]
    Sums { url: String, source: SumsFault },
    #[error("{}: cannot {op}", path.display())]
    Local {
        op: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error(
        "{}: not the bytes that came (in the MiB from byte {at:#x} on); the copy is damaged",
        path.display()
    )]
    Duplicate { path: PathBuf, at: u64 },
    #[error(transparent)]
    Disk(#[from] DiskError),
    #[error("bytes of an earlier run cannot be read back; they are fetched anew, check the disk")]
    ReadBack {
        #[source]
        source: Box<DiskError>,
    },
    #[error("cannot set up an HTTP client")]
    Client {
        #[source]
        source: HttpError,
    },
    #[error("no memory for a buffer")]
    Memory {
        #[source]
        source: io::Error,
    },
    #[error("gave up after {attempts} attempts without a new byte")]
    GaveUp {
        attempts: u32,
        #[source]
        source: Box<FetchError>,
    },
    #[error("cancelled; what is durable is kept")]
    Cancelled,
}

impl FetchError {
    /// Whether trying again can help.
    #[must_use]
    pub fn class(&self) -> Class {
        match self {
            Self::Connect { .. }
            | Self::Stalled { .. }
            | Self::Broken { .. }
            | Self::Short { .. }
            | Self::WholeAnswer { .. }
            | Self::CannotResume { .. }
            | Self::Changed { .. }
            | Self::GaveUp { .. }
            | Self::ReadBack { .. }
            | Self::Memory { .. } => Class::Retry,
            Self::Status { status, .. } => match status {
                408 | 425 | 429 | 500..=599 => Class::Retry,
                _ => Class::Refuse,
            },
            Self::Disk(error) if error.may_retry() => Class::Retry,
            Self::Nbd { source, .. } => source.class(),
            Self::Backup { source, .. } => source.class(),
            Self::Redirect { .. }
            | Self::Address { .. }
            | Self::Place { .. }
            | Self::Certificate { .. }
            | Self::Access { .. }
            | Self::TooMuch { .. }
            | Self::NoParts { .. }
            | Self::Decode { .. }
            | Self::Header { .. }
            | Self::Empty { .. }
            | Self::TooLarge { .. }
            | Self::Digest { .. }
            | Self::Sums { .. }
            | Self::Local { .. }
            | Self::Duplicate { .. }
            | Self::Disk(_)
            | Self::Client { .. } => Class::Refuse,
            Self::Cancelled => Class::Cancelled,
        }
    }

    /// True for an error after which this run cannot go on, though another may.
    pub(super) fn ends_run(&self) -> bool {
        matches!(self, Self::Changed { .. } | Self::Disk(_) | Self::ReadBack { .. })
    }

    /// The message with its causes on one line; see [`one_line`].
    #[must_use]
    pub fn report(&self) -> String {
        one_line(self)
    }
}

/// A message with its causes on one line: every message, but of an HTTP library's error and those
/// beneath it only the last, which is the operating system's or the peer's own word.
#[must_use]
pub fn one_line(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    let mut in_library = false;
    while let Some(error) = cause {
        in_library |= error.is::<reqwest::Error>() || error.is::<hyper::Error>();
        let words = error.to_string();
        cause = error.source();
        if (!in_library || cause.is_none()) && !text.contains(&words) {
            text = format!("{text}: {words}");
        }
    }
    text
}

/// What to tell a person about an HTTP status.
pub(super) fn status_hint(status: u16) -> &'static str {
    match status {
        401 | 403 => "the server wants other credentials, or the signature has expired",
        404 | 410 => "check the URL",
        408 | 425 | 429 | 500..=599 => "the server is busy or broken; try again later",
        _ => "it does not serve this as a file",
    }
}
