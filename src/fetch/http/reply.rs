//! An answer of either HTTP client: reqwest's, or the direct one's.
//!
//! Why: whoever judges an answer and reads its body need not know which client brought it.
//! How: the head is the same; a body is read in chunks, or into room that the caller brings.
//! Never: gives a byte twice, but one that was put back.
//! Start at [`Reply::fill`].

use bytes::{Buf, Bytes};
use reqwest::StatusCode;
use reqwest::header::HeaderMap;

use super::direct::DirectBody;
use crate::fetch::error::HttpError;

/// The head of an answer, and its body, not yet read.
#[derive(Debug)]
pub(super) struct Reply {
    pub(super) status: StatusCode,
    pub(super) headers: HeaderMap,
    body: Body,
    /// What came and was not taken yet.
    ahead: Bytes,
}

#[derive(Debug)]
enum Body {
    Library(reqwest::Response),
    Direct(Box<DirectBody>),
}

impl From<reqwest::Response> for Reply {
    fn from(mut answer: reqwest::Response) -> Self {
        let (status, headers) = (answer.status(), std::mem::take(answer.headers_mut()));
        Self { status, headers, body: Body::Library(answer), ahead: Bytes::new() }
    }
}

impl From<hyper::Response<DirectBody>> for Reply {
    fn from(answer: hyper::Response<DirectBody>) -> Self {
        let (head, body) = answer.into_parts();
        let (status, headers, body) = (head.status, head.headers, Body::Direct(Box::new(body)));
        Self { status, headers, body, ahead: Bytes::new() }
    }
}

impl Reply {
    /// True if HTTP itself fixes the length of the body.
    pub(super) fn has_length(&self) -> bool {
        match &self.body {
            Body::Library(answer) => answer.content_length().is_some(),
            Body::Direct(body) => body.has_length(),
        }
    }

    /// Gives back what was taken and nothing was taken after: it comes again.
    pub(super) fn put_back(&mut self, bytes: Bytes) {
        self.ahead = bytes;
    }

    /// The next bytes; `None` at the end of the body.
    pub(super) async fn chunk(&mut self) -> Result<Option<Bytes>, HttpError> {
        if !self.ahead.is_empty() {
            return Ok(Some(std::mem::take(&mut self.ahead)));
        }
        match &mut self.body {
            Body::Library(answer) => answer.chunk().await.map_err(|e| e.without_url().into()),
            Body::Direct(body) => body.chunk().await,
        }
    }

    /// Puts the next bytes into `room`, which is not empty; 0 at the end of the body.
    pub(super) async fn fill(&mut self, room: &mut [u8]) -> Result<usize, HttpError> {
        if self.ahead.is_empty() {
            if let Body::Direct(body) = &mut self.body
                && let Some(fixed) = body.fixed()
            {
                return Ok(fixed.fill(room).await?);
            }
            match self.chunk().await? {
                Some(chunk) => self.ahead = chunk,
                None => return Ok(0),
            }
        }
        let count = self.ahead.len().min(room.len());
        room[..count].copy_from_slice(&self.ahead[..count]);
        self.ahead.advance(count);
        Ok(count)
    }
}
