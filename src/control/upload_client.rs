//! The client's side of an upload.
//!
//! Why: `bedplate upload` comes in by the same two requests as `curl`.
//! How: a `HEAD` for the offset, and a `PUT` whose body is what a channel gives.
//! Never: holds more of a body than the channel does.
//! Start at [`Client::upload`].

use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::Bytes;
use http_body_util::Empty;
use hyper::body::{Body, Frame, SizeHint};
use hyper::{Method, Request, header};
use tokio::sync::mpsc;

use super::client::{Client, ClientError};
use super::types::{Problem, Uploaded};
use super::upload::{LENGTH, OFFSET, PROBLEM};

/// A body of a known length from a channel.
struct Chunks {
    rx: mpsc::Receiver<Bytes>,
    left: u64,
}

impl Body for Chunks {
    type Data = Bytes;
    type Error = std::convert::Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        let next = self.rx.poll_recv(context);
        next.map(|chunk| {
            let chunk = chunk?;
            self.left = self.left.saturating_sub(chunk.len() as u64);
            Some(Ok(Frame::data(chunk)))
        })
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.left)
    }
}

fn target(image: &str, disk: Option<&str>) -> String {
    match disk {
        Some(disk) => {
            format!("/v1/images/{image}/upload?disk={}", super::wire::escape(disk.as_bytes()))
        }
        None => format!("/v1/images/{image}/upload"),
    }
}

impl Client {
    /// Where the upload of `image` goes on.
    ///
    /// # Errors
    /// [`ClientError`]; of a refusal only the code is known.
    pub async fn upload_offset(
        &self,
        image: &str,
        disk: Option<&str>,
    ) -> Result<Uploaded, ClientError> {
        let request = Request::builder()
            .method(Method::HEAD)
            .uri(target(image, disk))
            .header(header::HOST, "localhost")
            .body(Empty::<Bytes>::new())
            .map_err(|e| self.garbled(&e))?;
        let response = self.exchange(request).await?;
        let (status, headers) = (response.status().as_u16(), response.headers());
        let text = |name| headers.get(name).and_then(|value| value.to_str().ok());
        if status >= 400 {
            let code = text(PROBLEM).unwrap_or("internal").to_owned();
            let message = format!("image {image}: its upload cannot go on ({code})");
            let hint = "see `bedplate get`".to_owned();
            return Err(ClientError::Refused { status, problem: Problem { code, message, hint } });
        }
        let number = |name| text(name).and_then(|text| text.parse().ok());
        match (number(OFFSET), number(LENGTH)) {
            (Some(offset), Some(length)) => Ok(Uploaded { offset, length }),
            (_, _) => Err(self.garbled(&"no Upload-Offset")),
        }
    }

    /// Brings `len` bytes of the upload of `image` from `at` on: what `chunks` gives.
    ///
    /// # Errors
    /// [`ClientError`]; what has arrived counts, and [`Client::upload_offset`] tells how much.
    pub async fn upload(
        &self,
        image: &str,
        disk: Option<&str>,
        at: u64,
        len: u64,
        chunks: mpsc::Receiver<Bytes>,
    ) -> Result<Uploaded, ClientError> {
        let request = Request::builder()
            .method(Method::PUT)
            .uri(target(image, disk))
            .header(header::HOST, "localhost")
            .header(OFFSET, at)
            .body(Chunks { rx: chunks, left: len })
            .map_err(|e| self.garbled(&e))?;
        let response = self.accepted(self.exchange(request).await?).await?;
        self.read(response).await
    }
}
