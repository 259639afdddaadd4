//! The two requests of an upload: where it goes on, and more of its bytes.
//!
//! Why: 75 GiB come in by more than one request; each tells where the next begins.
//! How: the body goes to the upload piece by piece, so its back-pressure is the connection's; what
//! has arrived counts even if the request breaks.
//! Never: holds a body, or waits for a silent client for good.
//! Start at [`write()`].

use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::extract::{Path, Query, Request, State};
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use http_body_util::BodyExt;

use super::App;
use super::error::ApiError;
use super::handlers::{Answer, no_image};
use super::types::Uploaded;
use crate::fetch::{Upload, UploadError, parse_content_range};
use crate::manager::{CopyId, CopyState, ImageStatus};
use crate::names::{DiskUuid, ImageName};

/// Where an upload goes on.
pub const OFFSET: &str = "upload-offset";
/// How many bytes it will have.
pub const LENGTH: &str = "upload-length";
/// Why there is no offset: a `HEAD` has no body to say it in.
pub const PROBLEM: &str = "upload-problem";
/// A client that is silent for so long gives its place up.
const SILENCE: Duration = Duration::from_secs(60);

/// Of a query.
#[derive(serde::Deserialize)]
pub(super) struct Which {
    disk: Option<String>,
}

/// What an image's upload is now.
enum Found {
    /// A worker waits for it.
    Waiting(Arc<Upload>),
    /// It is all here, so many bytes.
    Done(u64),
}

impl Found {
    fn now(&self) -> Uploaded {
        match self {
            Self::Waiting(upload) => Uploaded { offset: upload.offset(), length: upload.total() },
            Self::Done(length) => Uploaded { offset: *length, length: *length },
        }
    }
}

fn with_headers(now: Uploaded, answer: impl IntoResponse) -> Response {
    let mut response = answer.into_response();
    let headers = response.headers_mut();
    headers.insert(OFFSET, HeaderValue::from(now.offset));
    headers.insert(LENGTH, HeaderValue::from(now.length));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    response
}

fn conflict(code: &'static str, message: String, hint: &str) -> ApiError {
    ApiError::new(StatusCode::CONFLICT, code, message, hint)
}

async fn find(app: &App, name: &str, which: &Which) -> Answer<Found> {
    let name = ImageName::parse(name)?;
    let disk = which.disk.as_deref().map(DiskUuid::parse).transpose()?;
    let wanted = name.clone();
    let image = app.manager.read(move |world| world.image(&wanted)).await?;
    let image = image.ok_or_else(|| no_image(&name))?;
    let Some(length) = image.record.upload_bytes else {
        let message = format!("image {name}: its bytes are not uploaded");
        let hint = "an image that is created with upload_bytes is";
        return Err(conflict("not-an-upload", message, hint));
    };
    among(app, &image, disk.as_ref(), length)
}

/// The upload of one of the image's copies.
fn among(app: &App, image: &ImageStatus, disk: Option<&DiskUuid>, length: u64) -> Answer<Found> {
    let name = &image.record.name;
    let copies = || image.copies.iter().filter(|c| disk.is_none_or(|disk| *disk == c.disk));
    let waiting: Vec<Arc<Upload>> = copies()
        .filter_map(|copy| {
            let (image, uuid) = (name.clone(), image.record.uuid.clone());
            app.backend.upload(&CopyId { image, uuid, disk: copy.disk.clone() })
        })
        .collect();
    match waiting.as_slice() {
        [one] => return Ok(Found::Waiting(Arc::clone(one))),
        [_, _, ..] => {
            let message = format!("image {name}: {} disks wait for its upload", waiting.len());
            return Err(conflict("several-disks", message, "name one of them: ?disk=UUID"));
        }
        [] => {}
    }
    let done = |state| matches!(state, CopyState::Ready | CopyState::ReadyForTransfer);
    if copies().any(|copy| done(copy.state)) {
        return Ok(Found::Done(length));
    }
    let message = format!("image {name}: nothing waits for its upload");
    let hint = if image.record.steering.paused {
        "it is paused; resume it"
    } else if let Some(copy) = copies().find(|copy| copy.refused) {
        // Not the whole story, but where to find it.
        tracing::debug!(image = %name, message = copy.message, "upload to a refused copy");
        "the last upload was refused (see the image's copies); fetch it again to start over"
    } else if copies().next().is_none() {
        "no disk wants it yet: POST /v1/images/NAME/fetch, or attach it, first"
    } else {
        "its worker is starting or waits to try again; ask again in a moment"
    };
    Err(conflict("not-waiting", message, hint))
}

/// `HEAD`: where to go on.
pub(super) async fn offset(
    State(app): State<App>,
    Path(name): Path<String>,
    Query(which): Query<Which>,
) -> Response {
    match find(&app, &name, &which).await {
        Ok(found) => with_headers(found.now(), StatusCode::OK),
        Err(error) => {
            let code = HeaderValue::from_static(error.code);
            let mut response = error.into_response();
            response.headers_mut().insert(PROBLEM, code);
            response
        }
    }
}

/// What a request says of its body.
struct Announced {
    at: u64,
    /// How many bytes the body has, if the request says so.
    len: Option<u64>,
}

fn announced(headers: &HeaderMap, length: u64) -> Answer<Announced> {
    let text = |name: &str| {
        let value = headers.get(name).map(|v| v.to_str().map(str::trim));
        value.transpose().map_err(|_| ApiError::bad_request(format!("{name}: not text")))
    };
    let number = |name: &str| -> Answer<Option<u64>> {
        let digits = |t: &&str| !t.is_empty() && t.bytes().all(|b| b.is_ascii_digit());
        let parse = |t: &str| Some(t).filter(digits).and_then(|t| t.parse().ok());
        let wrong = || ApiError::bad_request(format!("{name}: not a number of bytes"));
        text(name)?.map(|t| parse(t).ok_or_else(wrong)).transpose()
    };
    let body = number("content-length")?;
    match (number(OFFSET)?, text("content-range")?) {
        (Some(at), None) => Ok(Announced { at, len: body }),
        (None, Some(range)) => {
            let wrong = |what| Err(ApiError::bad_request(format!("content-range: {what}")));
            let Some((first, end, Some(total))) = parse_content_range(range) else {
                return wrong("give `bytes FIRST-LAST/LENGTH`".to_owned());
            };
            if total != length {
                return wrong(format!("the upload has {length} bytes, not {total}"));
            }
            let len = end - first;
            if body.is_some_and(|body| body != len) {
                return wrong("the body has another length".to_owned());
            }
            Ok(Announced { at: first, len: Some(len) })
        }
        (Some(_), Some(_)) => {
            Err(ApiError::bad_request("upload-offset, content-range: give one, not both"))
        }
        (None, None) => Err(ApiError::bad_request("upload-offset: give the body's first byte")),
    }
}

/// `PUT`: more bytes.
pub(super) async fn write(
    State(app): State<App>,
    Path(name): Path<String>,
    Query(which): Query<Which>,
    request: Request,
) -> Answer<Response> {
    let found = find(&app, &name, &which).await?;
    let now = found.now();
    let announced = announced(request.headers(), now.length)?;
    let result = if announced.at == now.offset
        && announced.len.is_some_and(|len| len > now.length - announced.at)
    {
        Err(refusal(&UploadError::TooMuch { total: now.length }))
    } else {
        match &found {
            Found::Waiting(upload) if now.offset < now.length => {
                take(upload, &announced, request).await
            }
            Found::Waiting(_) | Found::Done(_) if announced.at == now.length => Ok(()),
            Found::Waiting(_) | Found::Done(_) => {
                let wrong = UploadError::WrongOffset { offset: now.offset, given: announced.at };
                Err(refusal(&wrong))
            }
        }
    };
    let now = found.now();
    Ok(match result {
        Ok(()) => with_headers(now, Json(now)),
        Err(error) => with_headers(now, error),
    })
}

/// Hands the body over as it comes.
async fn take(upload: &Arc<Upload>, announced: &Announced, request: Request) -> Answer<()> {
    let mut writer = upload.writer(announced.at).map_err(|error| refusal(&error))?;
    let mut body = request.into_body();
    let mut taken = 0_u64;
    loop {
        let next = tokio::select! {
            next = tokio::time::timeout(SILENCE, body.frame()) => next,
            () = upload.over() => return Err(refusal(&UploadError::Stopped)),
        };
        let Ok(next) = next else {
            let message = format!("no byte arrived for {} s", SILENCE.as_secs());
            let hint = "what has arrived is kept; go on from Upload-Offset";
            return Err(ApiError::new(StatusCode::REQUEST_TIMEOUT, "timeout", message, hint));
        };
        let frame = match next {
            None => break,
            Some(Ok(frame)) => frame,
            Some(Err(_)) => return Err(ApiError::bad_request("the body broke off")),
        };
        let Some(data) = frame.data_ref() else { continue };
        taken += data.len() as u64;
        if announced.len.is_some_and(|len| taken > len) {
            return Err(ApiError::bad_request("the body is longer than its range"));
        }
        writer.write(data).await.map_err(|error| refusal(&error))?;
    }
    if announced.len.is_some_and(|len| taken < len) {
        return Err(ApiError::bad_request("the body is shorter than its range"));
    }
    Ok(())
}

fn refusal(error: &UploadError) -> ApiError {
    let (status, code, hint) = match error {
        UploadError::Busy => (StatusCode::CONFLICT, "busy", "wait for it, then ask for the offset"),
        UploadError::WrongOffset { .. } => {
            (StatusCode::CONFLICT, "wrong-offset", "go on from Upload-Offset")
        }
        UploadError::TooMuch { .. } => {
            (StatusCode::PAYLOAD_TOO_LARGE, "too-large", "create an image with the right length")
        }
        UploadError::Stopped => {
            (StatusCode::CONFLICT, "stopped", "look at the image; then ask for the offset")
        }
        UploadError::Fetch(_) => (StatusCode::INTERNAL_SERVER_ERROR, "internal", "try again"),
    };
    ApiError::new(status, code, crate::fetch::one_line(error), hint)
}
