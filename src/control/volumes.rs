//! The handlers of volumes and storage classes.
//!
//! Why: as `handlers`, for what stands on images.
//! Never: decide; each is a few lines.
//! Start at [`create_volume`].

use axum::Json;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};

use super::App;
use super::body::Body;
use super::error::ApiError;
use super::handlers::{Answer, new_image};
use super::types::CreateImage;
use super::types_volume::{Class, Classes, CreateVolume, Volume, Volumes};
use super::wire_volume;
use crate::fetch::{DigestKind, DigestMap};
use crate::manager::{BackupRecord, ManagerError, NewVolume, VolumeStatus, World, unix_now_s};
use crate::manifest;
use crate::names::{ClassName, DiskUuid, ImageName, VolumeName};

fn show(app: &App, status: &VolumeStatus) -> Json<Volume> {
    Json(wire_volume::volume(status, &app.sockets))
}

pub(super) async fn list_volumes(State(app): State<App>) -> Answer<Json<Volumes>> {
    let all = app.manager.read(World::volumes).await?;
    let volumes = all.iter().map(|v| wire_volume::volume(v, &app.sockets)).collect();
    Ok(Json(Volumes { volumes }))
}

pub(super) async fn create_volume(
    State(app): State<App>,
    Body(body): Body<CreateVolume>,
) -> Answer<Response> {
    let (volume, is_new) = app.manager.create_volume(new_volume(body)?).await?;
    let status = if is_new { StatusCode::CREATED } else { StatusCode::OK };
    Ok((status, show(&app, &volume)).into_response())
}

/// Checks a request to create a volume. Of a URL only the scheme may be in an error.
fn new_volume(body: CreateVolume) -> Answer<NewVolume> {
    let backup = body.backup.as_ref().map(|cfg| backup_of(cfg, body.force)).transpose()?;
    if body.force && backup.is_none() {
        return Err(ApiError::bad_request("force: belongs to a backup"));
    }
    let recorded = backup.as_ref().and_then(|backup| backup.image.clone());
    let image = match (&body.image, recorded) {
        (Some(image), _) => ImageName::parse(image)?,
        (None, Some(image)) => image,
        (None, None) if backup.is_some() => {
            let text = "image: the backup records none (BackingImageName is empty); name one";
            return Err(ApiError::bad_request(text));
        }
        (None, None) => return Err(ApiError::bad_request("image, backup: give one of them")),
    };
    let new_image = match &body.url {
        None => None,
        Some(url) => Some(Box::new(new_image(&CreateImage {
            name: Some(image.to_string()),
            sha512: body.sha512.clone(),
            ..CreateImage::of_url(url)
        })?)),
    };
    let disks: Result<Vec<_>, _> = body.disks.iter().map(|d| DiskUuid::parse(d)).collect();
    Ok(NewVolume {
        name: VolumeName::parse(&body.name)?,
        image,
        new_image,
        sha512: body.sha512.as_deref().map(sha512).transpose()?,
        disks: disks?,
        replicas: body.replicas,
        size_bytes: body.size_bytes,
        backup,
        class: None,
        claim: None,
        created_unix_s: unix_now_s(),
    })
}

fn backup_of(cfg: &serde_json::Value, forced: bool) -> Answer<BackupRecord> {
    let cfg =
        manifest::Backup::parse(cfg).map_err(|e| ApiError::bad_request(format!("backup: {e}")))?;
    let manifest::Backup { volume, backup, image, sha512, .. } = cfg;
    Ok(BackupRecord { volume, backup, image, sha512, forced })
}

/// 128 hex digits, in lower case.
pub(super) fn sha512(text: &str) -> Answer<String> {
    let digests = DigestMap::parse([(DigestKind::Sha512, Some(text))]);
    let digests = digests.map_err(|e| ApiError::bad_request(e.to_string()))?;
    Ok(digests.get(DigestKind::Sha512).unwrap_or_default().to_owned())
}

pub(super) async fn get_volume(
    State(app): State<App>,
    Path(name): Path<String>,
) -> Answer<Json<Volume>> {
    let name = VolumeName::parse(&name)?;
    let wanted = name.clone();
    let found = app.manager.read(move |world| world.volume(&wanted)).await?;
    Ok(show(&app, &found.ok_or(ManagerError::NoSuchVolume { name })?))
}

pub(super) async fn attach_volume(
    State(app): State<App>,
    Path(name): Path<String>,
) -> Answer<Response> {
    let volume = app.manager.set_attached(VolumeName::parse(&name)?, true).await?;
    Ok((StatusCode::ACCEPTED, show(&app, &volume)).into_response())
}

pub(super) async fn detach_volume(
    State(app): State<App>,
    Path(name): Path<String>,
) -> Answer<Json<Volume>> {
    let volume = app.manager.set_attached(VolumeName::parse(&name)?, false).await?;
    Ok(show(&app, &volume))
}

pub(super) async fn delete_volume(
    State(app): State<App>,
    Path(name): Path<String>,
) -> Answer<StatusCode> {
    app.manager.delete_volume(VolumeName::parse(&name)?).await?;
    Ok(StatusCode::NO_CONTENT)
}

pub(super) async fn list_classes(State(app): State<App>) -> Answer<Json<Classes>> {
    let all = app.manager.read(World::classes).await?;
    Ok(Json(Classes { classes: all.iter().map(wire_volume::class).collect() }))
}

pub(super) async fn get_class(
    State(app): State<App>,
    Path(name): Path<String>,
) -> Answer<Json<Class>> {
    let name = ClassName::parse(&name)?;
    let wanted = name.clone();
    let found = app.manager.read(move |world| world.class(&wanted)).await?;
    Ok(Json(wire_volume::class(&found.ok_or(ManagerError::NoSuchClass { name })?)))
}

pub(super) async fn delete_class(
    State(app): State<App>,
    Path(name): Path<String>,
) -> Answer<StatusCode> {
    app.manager.delete_class(ClassName::parse(&name)?).await?;
    Ok(StatusCode::NO_CONTENT)
}
