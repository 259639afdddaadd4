//! The handlers: parse, ask the manager, show.
//!
//! Why: a route's behaviour can be read in one place.
//! Never: decide; each is a few lines.
//! Start at [`super::routes::table`].

use std::collections::BTreeSet;

use axum::Json;
use axum::extract::{Path, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};

use super::App;
use super::body::Body;
use super::error::ApiError;
use super::inspection::Inspection;
use super::origin::{self, Origin};
use super::types::{
    Attachment, Attachments, CleanUp, CreateAttachment, CreateImage, Doctor, FetchImage, Health,
    Image, Images, SteerImage, Wait,
};
use super::types_health::{Node, ScrubImage};
use super::wire;
use crate::fetch::{DigestKind, DigestMap};
use crate::manager::{
    AttachmentId, AttachmentStatus, BackendError, Expected, Format, ImageStatus, Layout,
    NewAttachment, NewImage, Selectors, SourceUrl, SteeringChange, unix_now_s,
};
use crate::names::{DiskUuid, ImageName, ImageUuid, Tag};

/// Mirrors that an image may have.
const MAX_MIRRORS: usize = 16;

pub(super) type Answer<T> = Result<T, ApiError>;

/// The OpenAPI document, as it is in the source tree.
pub const OPENAPI: &str = include_str!("openapi.json");

fn show(app: &App, status: &ImageStatus) -> Json<Image> {
    Json(wire::image(status, &app.sockets))
}

fn show_attachment(app: &App, status: &AttachmentStatus) -> Json<Attachment> {
    Json(wire::attachment(status, &app.sockets))
}

pub(super) fn no_image(name: &ImageName) -> ApiError {
    crate::manager::ManagerError::NoSuchImage { name: name.clone() }.into()
}

pub(super) async fn list_images(State(app): State<App>) -> Answer<Json<Images>> {
    let all = app.manager.read(crate::manager::World::images).await?;
    Ok(Json(Images { images: all.iter().map(|i| wire::image(i, &app.sockets)).collect() }))
}

pub(super) async fn create_image(
    State(app): State<App>,
    Body(body): Body<CreateImage>,
) -> Answer<Response> {
    let (image, is_new) = app.manager.create(new_image(&body)?).await?;
    let status = if is_new { StatusCode::CREATED } else { StatusCode::OK };
    Ok((status, show(&app, &image)).into_response())
}

/// Checks a request to create an image. Of the URL only the scheme may be in an error.
pub(super) fn new_image(body: &CreateImage) -> Answer<NewImage> {
    let Origin { source, clone_of } = origin::of(body)?;
    body.access.check().map_err(|e| ApiError::bad_request(e.to_string()))?;
    let name = match &body.name {
        Some(name) => ImageName::parse(name)?,
        None => source
            .as_ref()
            .and_then(|source| ImageName::suggest(&source.title()))
            .ok_or_else(|| ApiError::bad_request("no URL's last part gives a name; give one"))?,
    };
    let format = body.format.as_deref().map(str::parse::<Format>).transpose();
    let declared_format = format.map_err(|e| ApiError::bad_request(format!("format: {e}")))?;
    // An export is a disk: what a guest has written to it must not be taken for an image's header.
    let is_disk = source.as_ref().is_some_and(SourceUrl::is_nbd);
    let declared_format = declared_format.or(is_disk.then_some(Format::Raw));
    let layout = body.layout.as_deref().map(str::parse::<Layout>).transpose();
    let layout = layout.map_err(|e| ApiError::bad_request(format!("layout: {e}")))?;
    let base = body.base.as_deref().map(ImageName::parse).transpose()?;
    let data_file = body.data_file.as_deref().map(ImageName::parse).transpose()?;
    let is_apart = base.is_some() || data_file.is_some() || body.snapshot.is_some();
    if layout == Some(Layout::Raw) && is_apart {
        let text = "layout: with a base, a data file or a snapshot an image is kept as-is";
        return Err(ApiError::bad_request(text));
    }
    let disks: Result<Vec<_>, _> = body.disks.iter().map(|d| DiskUuid::parse(d)).collect();
    Ok(NewImage {
        name,
        uuid: ImageUuid::random()?,
        upload_bytes: body.upload_bytes,
        access: Box::new(body.access.clone()),
        mirrors: mirrors(&body.mirrors, source.as_ref())?,
        source,
        clone_of,
        layout: layout.unwrap_or_default(),
        base,
        data_file,
        snapshot: body.snapshot.clone(),
        min_copies: body.min_copies.unwrap_or_default(),
        selectors: Box::new(selectors(body)?),
        expected: Box::new(expected(body)?),
        declared_format,
        disks: disks?,
        created_unix_s: unix_now_s(),
    })
}

fn selectors(body: &CreateImage) -> Answer<Selectors> {
    Ok(Selectors { disk: tags(&body.disk_selector)?, node: tags(&body.node_selector)? })
}

fn tags(texts: &[String]) -> Answer<BTreeSet<Tag>> {
    Ok(Tag::parse_all(texts.iter().map(String::as_str))?)
}

/// Checks the mirrors of a request. Of a URL nothing is in an error.
fn mirrors(texts: &[String], source: Option<&SourceUrl>) -> Answer<Vec<SourceUrl>> {
    if texts.len() > MAX_MIRRORS {
        return Err(ApiError::bad_request(format!("mirrors: give at most {MAX_MIRRORS}")));
    }
    let parse = |text: &String| {
        let mirror = SourceUrl::parse(text)?;
        source.map_or(Ok(()), |source| source.check_mirror(&mirror)).map(|()| mirror)
    };
    let parsed: Result<_, crate::fetch::SourceError> = texts.iter().map(parse).collect();
    parsed.map_err(|e| ApiError::bad_request(format!("mirrors: {e}")))
}

/// Checks what a request says of the digests.
fn expected(body: &CreateImage) -> Answer<Expected> {
    let given = [
        (DigestKind::Sha256, body.sha256.as_deref()),
        (DigestKind::Sha512, body.sha512.as_deref()),
        (DigestKind::Sha1, body.sha1.as_deref()),
        (DigestKind::Md5, body.md5.as_deref()),
        (DigestKind::Blake3, body.blake3.as_deref()),
    ];
    let digests = DigestMap::parse(given).map_err(|e| ApiError::bad_request(e.to_string()))?;
    let url = body.checksum_url.as_deref().map(SourceUrl::parse).transpose();
    let url = url.and_then(|url| url.map(|url| url.check_sums().map(|()| url)).transpose());
    let checksum_url = url.map_err(|e| ApiError::bad_request(format!("checksum_url: {e}")))?;
    Ok(Expected { digests, checksum_url })
}

pub(super) async fn get_image(
    State(app): State<App>,
    Path(name): Path<String>,
) -> Answer<Json<Image>> {
    let name = ImageName::parse(&name)?;
    let wanted = name.clone();
    let found = app.manager.read(move |world| world.image(&wanted)).await?;
    found.map(|image| show(&app, &image)).ok_or_else(|| no_image(&name))
}

pub(super) async fn steer_image(
    State(app): State<App>,
    Path(name): Path<String>,
    Body(body): Body<SteerImage>,
) -> Answer<Json<Image>> {
    let change = SteeringChange {
        paused: body.paused,
        priority: body.priority,
        rate_bytes_per_s: body.rate_limit_bytes_per_s,
        min_copies: body.min_copies,
        disk_tags: body.disk_selector.as_deref().map(tags).transpose()?,
        node_tags: body.node_selector.as_deref().map(tags).transpose()?,
    };
    let image = app.manager.steer(ImageName::parse(&name)?, change).await?;
    Ok(show(&app, &image))
}

pub(super) async fn cancel_image(
    State(app): State<App>,
    Path(name): Path<String>,
) -> Answer<Response> {
    let image = app.manager.cancel(ImageName::parse(&name)?).await?;
    Ok((StatusCode::ACCEPTED, show(&app, &image)).into_response())
}

pub(super) async fn clean_up_image(
    State(app): State<App>,
    Path(name): Path<String>,
    Body(body): Body<CleanUp>,
) -> Answer<Response> {
    if body.disks.is_empty() {
        return Err(ApiError::bad_request("disks: give at least one"));
    }
    let disks: Result<Vec<_>, _> = body.disks.iter().map(|d| DiskUuid::parse(d)).collect();
    let image = app.manager.clean_up(ImageName::parse(&name)?, disks?).await?;
    Ok((StatusCode::ACCEPTED, show(&app, &image)).into_response())
}

pub(super) async fn delete_image(
    State(app): State<App>,
    Path(name): Path<String>,
) -> Answer<Response> {
    match app.manager.delete(ImageName::parse(&name)?).await? {
        Some(image) => Ok((StatusCode::ACCEPTED, show(&app, &image)).into_response()),
        None => Ok(StatusCode::NO_CONTENT.into_response()),
    }
}

pub(super) async fn fetch_image(
    State(app): State<App>,
    Path(name): Path<String>,
    Body(body): Body<FetchImage>,
) -> Answer<Response> {
    let disk = body.disk.as_deref().map(DiskUuid::parse).transpose()?;
    let image = app.manager.fetch(ImageName::parse(&name)?, disk).await?;
    Ok((StatusCode::ACCEPTED, show(&app, &image)).into_response())
}

pub(super) async fn scrub_image(
    State(app): State<App>,
    Path(name): Path<String>,
    Body(body): Body<ScrubImage>,
) -> Answer<Response> {
    let disk = body.disk.as_deref().map(DiskUuid::parse).transpose()?;
    let image = app.manager.scrub(ImageName::parse(&name)?, disk).await?;
    Ok((StatusCode::ACCEPTED, show(&app, &image)).into_response())
}

pub(super) async fn inspect_image(
    State(app): State<App>,
    Path(name): Path<String>,
) -> Answer<Json<Inspection>> {
    let name = ImageName::parse(&name)?;
    let (asked, backend) = (name.clone(), app.backend.clone());
    let found = app.manager.read(move |world| world.sealed_copy(&asked)).await?;
    let (copy, beside) = match found {
        None => return Err(no_image(&name)),
        Some(None) => {
            let (message, hint) = ("no copy of the image is complete", "fetch it first");
            return Err(ApiError::new(StatusCode::CONFLICT, "not-ready", message, hint));
        }
        Some(Some(copy)) => copy,
    };
    let found = blocking(move || backend.inspect(&copy, beside)).await?;
    let failed = |error: BackendError| {
        let hint = "look at the disk with `bedplate doctor`";
        ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, "internal", error.message, hint)
    };
    found.map(|found| Json(Inspection::from(&found))).map_err(failed)
}

pub(super) async fn get_node(State(app): State<App>) -> Answer<Json<Node>> {
    let failed = app.manager.read(crate::manager::World::node_failed).await?;
    Ok(Json(Node::new(failed)))
}

pub(super) async fn fail_node(State(app): State<App>) -> Answer<Json<Node>> {
    app.manager.set_node_failed(true).await?;
    Ok(Json(Node::new(true)))
}

pub(super) async fn return_node(State(app): State<App>) -> Answer<Json<Node>> {
    app.manager.set_node_failed(false).await?;
    Ok(Json(Node::new(false)))
}

pub(super) async fn list_attachments(State(app): State<App>) -> Answer<Json<Attachments>> {
    let all = app.manager.read(crate::manager::World::attachments).await?;
    let attachments = all.iter().map(|a| wire::attachment(a, &app.sockets)).collect();
    Ok(Json(Attachments { attachments }))
}

pub(super) async fn create_attachment(
    State(app): State<App>,
    Body(body): Body<CreateAttachment>,
) -> Answer<Response> {
    let new = NewAttachment {
        id: AttachmentId::random()?,
        image: ImageName::parse(&body.image)?,
        disk: body.disk.as_deref().map(DiskUuid::parse).transpose()?,
        reader: body.reader.unwrap_or_default(),
        stream: body.wait == Wait::Stream,
        vm: body.vm,
        created_unix_s: unix_now_s(),
    };
    let (attachment, is_new) = app.manager.attach(new).await?;
    let status = if is_new { StatusCode::CREATED } else { StatusCode::OK };
    Ok((status, show_attachment(&app, &attachment)).into_response())
}

pub(super) async fn get_attachment(
    State(app): State<App>,
    Path(id): Path<String>,
) -> Answer<Json<Attachment>> {
    let id = AttachmentId::parse(&id)?;
    let wanted = id.clone();
    let found = app.manager.read(move |world| world.attachment(&wanted)).await?;
    let missing = || crate::manager::ManagerError::NoSuchAttachment { id };
    Ok(show_attachment(&app, &found.ok_or_else(missing)?))
}

pub(super) async fn delete_attachment(
    State(app): State<App>,
    Path(id): Path<String>,
) -> Answer<StatusCode> {
    app.manager.detach(AttachmentId::parse(&id)?).await?;
    Ok(StatusCode::NO_CONTENT)
}

pub(super) async fn doctor(State(app): State<App>) -> Answer<Json<Doctor>> {
    let parts = app.clone();
    Ok(Json(Doctor { checks: blocking(move || (parts.doctor)()).await? }))
}

pub(super) async fn health(State(app): State<App>) -> Answer<Json<Health>> {
    // A round through the manager's task: an answer means that it lives.
    app.manager.read(|_| ()).await?;
    let version = env!("CARGO_PKG_VERSION").to_owned();
    Ok(Json(Health { status: "ok".to_owned(), version }))
}

pub(super) async fn openapi() -> impl IntoResponse {
    ([(header::CONTENT_TYPE, "application/json")], OPENAPI)
}

/// Runs what may block on a thread that may.
pub(super) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Answer<T> {
    tokio::task::spawn_blocking(work).await.map_err(|_| {
        let message = "a check died; see the daemon's log";
        ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, "internal", message, "")
    })
}
