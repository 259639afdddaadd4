//! A client of the control socket, for the CLI.
//!
//! Why: the CLI comes in by the same door as everybody else.
//! How: one HTTP/1.1 connection for a request, over hyper; JSON by the types in [`super::types`].
//! Never: knows anything of the daemon but its socket.
//! Start at [`Client`].

use std::io;
use std::path::{Path, PathBuf};

use axum::body::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::{Body, Incoming};
use hyper::client::conn::http1;
use hyper::{Method, Request, Response, StatusCode, header};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::net::UnixStream;

use super::types::{ErrorBody, Event, Problem};

/// Longest answer that is read, apart from event streams.
const MAX_ANSWER: usize = 64 << 20;
/// Longest line of an event stream.
const MAX_LINE: usize = 16 << 20;

/// Why a request gave no result.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "each field is named in the message above it")]
pub enum ClientError {
    /// Nobody listens.
    #[error(
        "{}: no daemon listens here; start one (`bedplate serve --disk DIR`), or give --socket",
        path.display()
    )]
    NoDaemon {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    /// The socket can't be used.
    #[error("{}: cannot connect", path.display())]
    Connect {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    /// The connection broke.
    #[error("{}: the daemon closed the connection", path.display())]
    Broken {
        path: PathBuf,
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The daemon refused.
    #[error("{}", problem.message)]
    Refused { status: u16, problem: Problem },
    /// The answer isn't what the API promises.
    #[error("{}: the answer does not read ({reason}); are both of one version?", path.display())]
    Garbled { path: PathBuf, reason: String },
}

/// A client of one control socket.
#[derive(Clone, Debug)]
pub struct Client {
    path: PathBuf,
}

impl Client {
    /// A client of the socket at `path`; connects with each request.
    #[must_use]
    pub fn new(path: &Path) -> Self {
        Self { path: path.to_owned() }
    }

    /// `GET target`.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn get<T: DeserializeOwned>(&self, target: &str) -> Result<T, ClientError> {
        self.json(Method::GET, target, None).await
    }

    /// `PATCH target` with a JSON body.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn patch<T: DeserializeOwned>(
        &self,
        target: &str,
        body: &impl Serialize,
    ) -> Result<T, ClientError> {
        let body = serde_json::to_vec(body).map_err(|e| self.garbled(&e))?;
        self.json(Method::PATCH, target, Some(body)).await
    }

    /// `POST target` with a JSON body.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn post<T: DeserializeOwned>(
        &self,
        target: &str,
        body: &impl Serialize,
    ) -> Result<T, ClientError> {
        let body = serde_json::to_vec(body).map_err(|e| self.garbled(&e))?;
        self.json(Method::POST, target, Some(body)).await
    }

    /// `POST target` with a text, as it is.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn post_text<T: DeserializeOwned>(
        &self,
        target: &str,
        text: String,
    ) -> Result<T, ClientError> {
        self.json(Method::POST, target, Some(text.into_bytes())).await
    }

    /// `PUT target` with a JSON body.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn put<T: DeserializeOwned>(
        &self,
        target: &str,
        body: &impl Serialize,
    ) -> Result<T, ClientError> {
        let body = serde_json::to_vec(body).map_err(|e| self.garbled(&e))?;
        self.json(Method::PUT, target, Some(body)).await
    }

    /// `DELETE target`. The answer's body, if it has one.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn delete<T: DeserializeOwned>(
        &self,
        target: &str,
    ) -> Result<Option<T>, ClientError> {
        let response = self.send(Method::DELETE, target, None).await?;
        if response.status() == StatusCode::NO_CONTENT {
            return Ok(None);
        }
        let bytes = self.collect(response).await?;
        serde_json::from_slice(&bytes).map(Some).map_err(|e| self.garbled(&e))
    }

    /// `GET /v1/events`, of one image or of all.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn events(&self, image: Option<&str>) -> Result<Events, ClientError> {
        self.follow(image, false).await
    }

    /// As [`Client::events`], with the last changes before.
    ///
    /// # Errors
    /// As [`Client::events`].
    pub async fn past_events(&self, image: Option<&str>) -> Result<Events, ClientError> {
        self.follow(image, true).await
    }

    async fn follow(&self, image: Option<&str>, past: bool) -> Result<Events, ClientError> {
        let mut target = format!("/v1/events?past={past}");
        if let Some(name) = image {
            target.push_str("&image=");
            target.push_str(&super::wire::escape(name.as_bytes()));
        }
        let response = self.send(Method::GET, &target, None).await?;
        Ok(Events { body: response.into_body(), buffer: Vec::new(), client: self.clone() })
    }

    async fn json<T: DeserializeOwned>(
        &self,
        method: Method,
        target: &str,
        body: Option<Vec<u8>>,
    ) -> Result<T, ClientError> {
        let response = self.send(method, target, body).await?;
        self.read(response).await
    }

    pub(super) async fn read<T: DeserializeOwned>(
        &self,
        response: Response<Incoming>,
    ) -> Result<T, ClientError> {
        let bytes = self.collect(response).await?;
        serde_json::from_slice(&bytes).map_err(|e| self.garbled(&e))
    }

    /// Sends one request; a status of 400 or more is an error.
    async fn send(
        &self,
        method: Method,
        target: &str,
        body: Option<Vec<u8>>,
    ) -> Result<Response<Incoming>, ClientError> {
        let request = Request::builder()
            .method(method)
            .uri(target)
            .header(header::HOST, "localhost")
            .header(header::CONTENT_TYPE, "application/json")
            .body(Full::new(Bytes::from(body.unwrap_or_default())))
            .map_err(|e| self.garbled(&e))?;
        self.accepted(self.exchange(request).await?).await
    }

    /// Sends one request over a connection of its own.
    pub(super) async fn exchange<B>(
        &self,
        request: Request<B>,
    ) -> Result<Response<Incoming>, ClientError>
    where
        B: Body<Data = Bytes, Error = std::convert::Infallible> + Send + 'static,
    {
        let stream = UnixStream::connect(&self.path).await.map_err(|e| self.no_connection(e))?;
        let (mut sender, connection) =
            http1::handshake(TokioIo::new(stream)).await.map_err(|e| self.broken(e))?;
        // Drives the connection for as long as the answer's body is read.
        tokio::spawn(connection);
        sender.send_request(request).await.map_err(|e| self.broken(e))
    }

    /// The answer, unless its status is 400 or more.
    pub(super) async fn accepted(
        &self,
        response: Response<Incoming>,
    ) -> Result<Response<Incoming>, ClientError> {
        let status = response.status();
        if status.as_u16() < 400 {
            return Ok(response);
        }
        let bytes = self.collect(response).await?;
        let body: ErrorBody = serde_json::from_slice(&bytes).map_err(|e| self.garbled(&e))?;
        Err(ClientError::Refused { status: status.as_u16(), problem: body.error })
    }

    async fn collect(&self, response: Response<Incoming>) -> Result<Bytes, ClientError> {
        let body = Limited::new(response.into_body(), MAX_ANSWER);
        let broken = |source| ClientError::Broken { path: self.path.clone(), source };
        body.collect().await.map(|all| all.to_bytes()).map_err(broken)
    }

    fn no_connection(&self, source: io::Error) -> ClientError {
        let path = self.path.clone();
        let nobody = [io::ErrorKind::NotFound, io::ErrorKind::ConnectionRefused];
        if nobody.contains(&source.kind()) {
            return ClientError::NoDaemon { path, source };
        }
        ClientError::Connect { path, source }
    }

    fn broken(&self, source: hyper::Error) -> ClientError {
        ClientError::Broken { path: self.path.clone(), source: Box::new(source) }
    }

    pub(super) fn garbled(&self, reason: &dyn std::fmt::Display) -> ClientError {
        ClientError::Garbled { path: self.path.clone(), reason: reason.to_string() }
    }
}

/// A stream of events.
#[derive(Debug)]
pub struct Events {
    body: Incoming,
    buffer: Vec<u8>,
    client: Client,
}

impl Events {
    /// The next event; `None` when the daemon has ended the stream. Cancel-safe.
    ///
    /// # Errors
    /// [`ClientError`] if the connection broke or an event doesn't read.
    pub async fn next(&mut self) -> Result<Option<Event>, ClientError> {
        loop {
            while let Some(end) = self.buffer.iter().position(|b| *b == b'\n') {
                let line: Vec<u8> = self.buffer.drain(..=end).collect();
                if let Some(data) = line.strip_prefix(b"data:") {
                    let event = serde_json::from_slice(data);
                    return event.map(Some).map_err(|e| self.client.garbled(&e));
                }
            }
            if self.buffer.len() > MAX_LINE {
                return Err(self.client.garbled(&"an endless line"));
            }
            match self.body.frame().await {
                None => return Ok(None),
                Some(Ok(frame)) => {
                    if let Some(data) = frame.data_ref() {
                        self.buffer.extend_from_slice(data);
                    }
                }
                Some(Err(error)) => return Err(self.client.broken(error)),
            }
        }
    }
}
