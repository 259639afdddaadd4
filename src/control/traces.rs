//! Traces of what readers ask for first, and what is kept of them with an image.
//!
//! Why: a boot on one node tells the next one what to fetch ahead.
//! How: a trace is recorded by an image's export, and kept on disk while it is; what is kept with an
//! image is in its record. Both are shown as a file has them, so that an answer can be saved and given again.
//! Never: decides whether a trace fits; the manager does.
//! Start at [`start`] and [`put_prefetch`].

use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};

use super::App;
use super::body::Body;
use super::error::ApiError;
use super::handlers::{Answer, no_image};
use super::types::Image;
use super::types_trace::RecordTrace;
use super::wire;
use crate::image::{Trace, TraceFile};
use crate::manager::ImageRecord;
use crate::names::ImageName;
use crate::serve::{Export, Recordings};

async fn record_of(app: &App, name: &ImageName) -> Answer<ImageRecord> {
    let wanted = name.clone();
    let found = app.manager.read(move |world| world.image(&wanted)).await?;
    found.map(|image| image.record).ok_or_else(|| no_image(name))
}

/// The image's record, and its export if it has one.
async fn look(app: &App, name: &str) -> Answer<(ImageRecord, Option<Arc<Export>>)> {
    let record = record_of(app, &ImageName::parse(name)?).await?;
    let export = app.readers.get(record.name.as_str());
    Ok((record, export))
}

fn file_of(trace: TraceFile, record: &ImageRecord) -> TraceFile {
    let (image, digests) = (Some(record.name.to_string()), record.known_digests());
    TraceFile { image, digests, ..trace }
}

/// Recordings are files.
async fn with_recordings<T: Send + 'static>(
    app: &App,
    work: impl FnOnce(&Recordings) -> T + Send + 'static,
) -> T {
    let recordings = Arc::clone(&app.recordings);
    let done = tokio::task::spawn_blocking(move || work(&recordings)).await;
    done.unwrap_or_else(|panic| std::panic::resume_unwind(panic.into_panic()))
}

fn not_traced(name: &ImageName) -> ApiError {
    let message = format!("image {name}: no trace is recorded");
    let hint = "begin with `bedplate trace record`";
    ApiError::new(StatusCode::NOT_FOUND, "not-found", message, hint)
}

pub(super) async fn start(
    State(app): State<App>,
    Path(name): Path<String>,
    Body(body): Body<RecordTrace>,
) -> Answer<Response> {
    let (record, export) = look(&app, &name).await?;
    if body.for_s == Some(0) {
        return Err(ApiError::bad_request("for_s: give 1 or more, or leave it out"));
    }
    let export = export.ok_or_else(|| {
        let message = format!("image {}: is not served, so nobody reads it", record.name);
        let hint = "attach it first: `bedplate attach NAME`, or `--stream` while it arrives";
        ApiError::new(StatusCode::CONFLICT, "not-ready", message, hint)
    })?;
    let lasts = body.for_s.map(Duration::from_secs);
    let started = with_recordings(&app, move |recordings| recordings.start(&export, lasts)).await;
    let recorder = started.map_err(|error| {
        let message = format!("image {}: cannot record a trace: {error}", record.name);
        let hint = "give the daemon more descriptors or memory";
        ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, "internal", message, hint)
    })?;
    tracing::info!(image = %record.name, "a trace is recorded");
    Ok((StatusCode::CREATED, Json(file_of(recorder.trace(), &record))).into_response())
}

pub(super) async fn get(
    State(app): State<App>,
    Path(name): Path<String>,
) -> Answer<Json<TraceFile>> {
    let (record, export) = look(&app, &name).await?;
    let name = record.name.clone();
    let get = move |recordings: &Recordings| recordings.get(name.as_str(), export.as_deref());
    let trace = with_recordings(&app, get).await.ok_or_else(|| not_traced(&record.name))?;
    Ok(Json(file_of(trace, &record)))
}

pub(super) async fn stop(
    State(app): State<App>,
    Path(name): Path<String>,
) -> Answer<Json<TraceFile>> {
    let (record, export) = look(&app, &name).await?;
    let name = record.name.clone();
    let stop = move |recordings: &Recordings| recordings.stop(name.as_str(), export.as_deref());
    let trace = with_recordings(&app, stop).await.ok_or_else(|| not_traced(&record.name))?;
    Ok(Json(file_of(TraceFile { recording: false, ..trace }, &record)))
}

pub(super) async fn get_prefetch(
    State(app): State<App>,
    Path(name): Path<String>,
) -> Answer<Json<TraceFile>> {
    let record = record_of(&app, &ImageName::parse(&name)?).await?;
    let trace = record.prefetch.ok_or_else(|| {
        let message = format!("image {}: no trace is kept with it", record.name);
        let hint = "give one with `bedplate trace use`";
        ApiError::new(StatusCode::NOT_FOUND, "not-found", message, hint)
    })?;
    Ok(Json(trace.to_file()))
}

pub(super) async fn put_prefetch(
    State(app): State<App>,
    Path(name): Path<String>,
    Body(body): Body<TraceFile>,
) -> Answer<Json<Image>> {
    let name = ImageName::parse(&name)?;
    let trace = Trace::from_file(body).map_err(|error| ApiError::bad_request(error.to_string()))?;
    let image = app.manager.set_prefetch(name, Some(Arc::new(trace))).await?;
    Ok(Json(wire::image(&image, &app.sockets)))
}

pub(super) async fn delete_prefetch(
    State(app): State<App>,
    Path(name): Path<String>,
) -> Answer<StatusCode> {
    app.manager.set_prefetch(ImageName::parse(&name)?, None).await?;
    Ok(StatusCode::NO_CONTENT)
}
