//! One HTTP request for a range of the source, and the checks of its answer.
//!
//! Why: servers and proxies lie: they ignore ranges, answer with another version, encode bodies.
//! How: always a GET with `Range`, never a HEAD (pre-signed URLs refuse it); status, Content-Range,
//! Content-Encoding and validators are held against what was asked (RFC 9110 sections 14 and 15).
//! Never: gives bytes to a caller before the answer's headers were judged.
//! Start at [`Client::get`].

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use reqwest::StatusCode;
use reqwest::header::{
    CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_RANGE, ETAG, HeaderMap, HeaderName, HeaderValue,
    IF_MATCH, LAST_MODIFIED, RANGE, RETRY_AFTER,
};

use super::access::Access;
use super::reply::Reply;
use super::route::Route;
use crate::fetch::error::{FetchError, HttpError, status_hint};
use crate::fetch::policy::Policy;
use crate::fetch::source::SourceUrl;
use crate::fetch::version::Remote;

/// Makes requests for one source.
#[derive(Debug)]
pub(in crate::fetch) struct Client {
    route: Arc<Route>,
    url: SourceUrl,
    /// The part of the object's key that is not the route's.
    beneath: Option<String>,
}

/// A judged answer, its body not yet read.
#[derive(Debug)]
pub(in crate::fetch) struct Answer {
    /// The version that the server speaks of.
    pub(in crate::fetch) remote: Remote,
    /// The bytes of the object that the body holds; `None` where the end is not known.
    pub(in crate::fetch) start: u64,
    /// Length of the whole object, if told.
    pub(in crate::fetch) total: Option<u64>,
    /// True if the server served the range that was asked for.
    pub(in crate::fetch) ranged: bool,
    body: Reply,
}

impl Client {
    pub(in crate::fetch) fn new(
        url: &SourceUrl,
        access: &Access,
        policy: &Policy,
    ) -> Result<Self, FetchError> {
        let route = Arc::new(Route::new(url, access, policy)?);
        Ok(Self { route, url: url.clone(), beneath: None })
    }

    /// For what is at `path` beneath this URL, which ends in a `/`: the same way, with the same
    /// connections. `path` is plain: letters, digits, and `/._-`.
    pub(in crate::fetch) fn beneath(&self, path: &str) -> Self {
        let (route, url) = (Arc::clone(&self.route), self.url.beneath(path));
        Self { route, url, beneath: Some(path.to_owned()) }
    }

    /// The URL for messages.
    pub(in crate::fetch) fn shown(&self) -> String {
        self.url.to_string()
    }

    /// The next request begins at the source again, and not where its redirects have led to.
    pub(in crate::fetch) fn begin_anew(&self) {
        self.route.forget();
    }

    /// Asks for `range` (to the end if its end is `u64::MAX`) of the version `same`, if given.
    pub(in crate::fetch) async fn get(
        &self,
        range: Range<u64>,
        same: Option<&Remote>,
        policy: &Policy,
    ) -> Result<Answer, FetchError> {
        let bytes = match range.end {
            u64::MAX => format!("bytes={}-", range.start),
            end => format!("bytes={}-{}", range.start, end.saturating_sub(1)),
        };
        let mut headers = HeaderMap::new();
        let etag = same.and_then(|remote| remote.etag.as_deref());
        for (name, value) in [(RANGE, Some(bytes.as_str())), (IF_MATCH, etag)] {
            if let Some(value) = value.and_then(|text| HeaderValue::from_str(text).ok()) {
                headers.insert(name, value);
            }
        }
        let stalled = || FetchError::Stalled {
            url: self.shown(),
            at: range.start,
            seconds: policy.stall_timeout.as_secs(),
        };
        let sent = self.route.send(self.beneath.as_deref(), &headers);
        let sent = tokio::time::timeout(policy.stall_timeout + policy.connect_timeout, sent);
        let body = sent.await.map_err(|_elapsed| {
            self.route.forget();
            stalled()
        })??;
        self.judge(body, range.start)
    }

    fn judge(&self, body: Reply, asked: u64) -> Result<Answer, FetchError> {
        let headers = &body.headers;
        let text = |name: HeaderName| header_text(headers, &name);
        let remote = Remote::new(text(ETAG), text(LAST_MODIFIED));
        let encoding = text(CONTENT_ENCODING).filter(|e| !e.eq_ignore_ascii_case("identity"));
        if let Some(found) = encoding {
            return Err(self.bad_header("Content-Encoding", found, "none: bytes as they are"));
        }
        let length = text(CONTENT_LENGTH).and_then(|text| text.parse::<u64>().ok());
        match body.status {
            StatusCode::PARTIAL_CONTENT => {
                let found = text(CONTENT_RANGE).unwrap_or_default();
                // A total of `*` says nothing about where the object ends: a slice of it would
                // pass for the whole.
                let Some((start, end, total @ Some(_))) = parse_content_range(found) else {
                    return Err(self.bad_header("Content-Range", found, "bytes A-B/TOTAL"));
                };
                if start != asked {
                    let need = format!("a range that begins at {asked}");
                    return Err(self.bad_header("Content-Range", found, &need));
                }
                if length.is_some_and(|length| length != end - start) {
                    let need = format!("{} as in Content-Range", end - start);
                    return Err(self.bad_header(
                        "Content-Length",
                        text(CONTENT_LENGTH).unwrap_or_default(),
                        &need,
                    ));
                }
                Ok(Answer { remote, start, total, ranged: true, body })
            }
            StatusCode::OK => Ok(Answer { remote, start: 0, total: length, ranged: false, body }),
            StatusCode::PRECONDITION_FAILED => {
                let what = "the server no longer has the version with the ETag asked for".into();
                Err(FetchError::Changed { url: self.shown(), what })
            }
            StatusCode::RANGE_NOT_SATISFIABLE => Err(self.beyond_end(headers, asked)),
            status => {
                let retry_after_s = text(RETRY_AFTER).and_then(|text| text.trim().parse().ok());
                let (url, status) = (self.shown(), status.as_u16());
                Err(FetchError::Status { url, status, hint: status_hint(status), retry_after_s })
            }
        }
    }

    fn beyond_end(&self, headers: &HeaderMap, asked: u64) -> FetchError {
        let found = header_text(headers, &CONTENT_RANGE).unwrap_or_default();
        let total = found.trim().strip_prefix("bytes */").and_then(|t| t.parse::<u64>().ok());
        match total {
            Some(0) => FetchError::Empty { url: self.shown() },
            Some(total) if total <= asked => FetchError::Changed {
                url: self.shown(),
                what: format!("it has {total} bytes now, and byte {asked} was asked for"),
            },
            Some(_) | None => self.bad_header("Content-Range", found, "an answer to a valid range"),
        }
    }

    fn bad_header(&self, field: &'static str, found: &str, need: &str) -> FetchError {
        let found = found.chars().take(120).collect();
        FetchError::Header { url: self.shown(), field, found, need: need.to_owned() }
    }
}

impl Answer {
    /// True if the body's length is fixed by HTTP itself (Content-Length), so that no more can come.
    pub(in crate::fetch) fn has_length(&self) -> bool {
        self.body.has_length()
    }

    /// The whole body, from the object's beginning; `None` if it has more than `most` bytes.
    pub(in crate::fetch) async fn all(
        mut self,
        client: &Client,
        most: u64,
        policy: &Policy,
    ) -> Result<Option<Vec<u8>>, FetchError> {
        let mut bytes = Vec::new();
        loop {
            let at = bytes.len() as u64;
            match self.chunk(at, client, policy.stall_timeout).await? {
                Some(chunk) if at + chunk.len() as u64 > most => return Ok(None),
                Some(chunk) => bytes.extend_from_slice(&chunk),
                None if bytes.is_empty() => return Err(FetchError::Empty { url: client.shown() }),
                None => match self.total.filter(|total| at < *total) {
                    Some(total) => {
                        return Err(FetchError::Short { url: client.shown(), at, total });
                    }
                    None => return Ok(Some(bytes)),
                },
            }
        }
    }

    /// The first `len` bytes of the body, or all of a shorter one; they stay to be read.
    pub(in crate::fetch) async fn peek(
        &mut self,
        len: usize,
        client: &Client,
        stall: Duration,
    ) -> Result<bytes::Bytes, FetchError> {
        let mut seen = bytes::BytesMut::new();
        while seen.len() < len {
            match self.chunk(self.start + seen.len() as u64, client, stall).await? {
                Some(chunk) => seen.extend_from_slice(&chunk),
                None => break,
            }
        }
        let seen = seen.freeze();
        self.body.put_back(seen.clone());
        Ok(seen)
    }

    /// Puts the next bytes of the body into `room`, which is not empty; 0 at its end. `at` is their
    /// place in the file.
    pub(in crate::fetch) async fn fill(
        &mut self,
        at: u64,
        room: &mut [u8],
        client: &Client,
        stall: Duration,
    ) -> Result<usize, FetchError> {
        let filled = tokio::time::timeout(stall, self.body.fill(room)).await;
        told(filled, at, client, stall)
    }

    /// The next bytes of the body, `None` at its end. `at` is their place in the file.
    pub(in crate::fetch) async fn chunk(
        &mut self,
        at: u64,
        client: &Client,
        stall: Duration,
    ) -> Result<Option<bytes::Bytes>, FetchError> {
        let chunk = tokio::time::timeout(stall, self.body.chunk()).await;
        told(chunk, at, client, stall)
    }
}

/// What a body has given, or why it has ended at `at`.
fn told<T>(
    given: Result<Result<T, HttpError>, tokio::time::error::Elapsed>,
    at: u64,
    client: &Client,
    stall: Duration,
) -> Result<T, FetchError> {
    match given {
        Ok(Ok(given)) => Ok(given),
        Ok(Err(source)) => Err(FetchError::Broken { url: client.shown(), at, source }),
        Err(_elapsed) => {
            Err(FetchError::Stalled { url: client.shown(), at, seconds: stall.as_secs() })
        }
    }
}

fn header_text<'a>(headers: &'a HeaderMap, name: &HeaderName) -> Option<&'a str> {
    headers.get(name).and_then(|value| value.to_str().ok())
}

/// `bytes A-B/TOTAL` as (A, B + 1, TOTAL); the total may be `*` (RFC 9110 section 14.4).
///
/// Pure and total: `None` for any text that is not one non-empty range inside its total.
#[must_use]
pub fn parse_content_range(text: &str) -> Option<(u64, u64, Option<u64>)> {
    let (range, total) = text.trim().strip_prefix("bytes ")?.split_once('/')?;
    let (first, last) = range.split_once('-')?;
    let (first, last) = (first.trim().parse::<u64>().ok()?, last.trim().parse::<u64>().ok()?);
    let total = match total.trim() {
        "*" => None,
        digits => Some(digits.parse::<u64>().ok()?),
    };
    let end = last.checked_add(1)?;
    let inside = first < end && total.is_none_or(|total| end <= total);
    inside.then_some((first, end, total))
}
