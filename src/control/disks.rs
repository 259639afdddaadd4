//! `/v1/disks`: the disks of the node, and how they are steered.
//!
//! Why: a disk is added, emptied and taken away without a restart.
//! Never: looks at a disk itself; the backend does.

use std::path::PathBuf;

use axum::extract::rejection::QueryRejection;
use axum::extract::{Path, Query, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::{Extension, Json};
use serde::Deserialize;

use super::App;
use super::body::Body;
use super::error::ApiError;
use super::handlers::{Answer, blocking};
use super::routes::Caller;
use super::types_disk::{AddDisk, ChangeDisk, Disk, Disks};
use super::wire;
use crate::manager::{DiskChange, ManagerError};
use crate::names::{DiskUuid, Tag};

/// With its room as it is at this moment.
pub(super) async fn list(State(app): State<App>) -> Answer<Json<Disks>> {
    let backend = app.backend.clone();
    let now = blocking(move || backend.disks()).await?;
    let views = move |world: &crate::manager::World| {
        now.iter().map(|status| world.disk_view(status)).collect::<Vec<_>>()
    };
    let disks = app.manager.read(views).await?;
    Ok(Json(Disks { disks: disks.iter().map(wire::disk).collect() }))
}

pub(super) async fn get(State(app): State<App>, Path(uuid): Path<String>) -> Answer<Json<Disk>> {
    let disk = DiskUuid::parse(&uuid)?;
    let wanted = disk.clone();
    let found = app.manager.read(move |world| world.disk_view_of(&wanted)).await?;
    Ok(Json(wire::disk(&found.ok_or(ManagerError::NoSuchDisk { disk })?)))
}

/// Only for who could write there anyhow: what lies in the directory is taken for the node's own, and
/// what others may name must not be.
pub(super) async fn add(
    State(app): State<App>,
    Extension(caller): Extension<Caller>,
    Body(body): Body<AddDisk>,
) -> Answer<Response> {
    if caller != Caller::Owner {
        let message = "only root and the daemon's own user add disks";
        let hint = "ask one of them to, or name the directory in the daemon's configuration";
        return Err(ApiError::new(StatusCode::FORBIDDEN, "forbidden", message, hint));
    }
    let (disk, is_new) = app.manager.add_disk(PathBuf::from(body.path)).await?;
    let status = if is_new { StatusCode::CREATED } else { StatusCode::OK };
    Ok((status, Json(wire::disk(&disk))).into_response())
}

pub(super) async fn change(
    State(app): State<App>,
    Path(uuid): Path<String>,
    Body(body): Body<ChangeDisk>,
) -> Answer<Json<Disk>> {
    let ChangeDisk { schedulable, evict, tags } = body;
    let tags = tags.map(|tags| Tag::parse_all(tags.iter().map(String::as_str))).transpose()?;
    let change = DiskChange { schedulable, evict, tags };
    Ok(Json(wire::disk(&app.manager.change_disk(DiskUuid::parse(&uuid)?, change).await?)))
}

/// What a removal may do.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Removal {
    #[serde(default)]
    force: bool,
}

pub(super) async fn remove(
    State(app): State<App>,
    Path(uuid): Path<String>,
    removal: Result<Query<Removal>, QueryRejection>,
) -> Answer<StatusCode> {
    let Query(Removal { force }) =
        removal.map_err(|error| ApiError::bad_request(error.body_text()))?;
    app.manager.remove_disk(DiskUuid::parse(&uuid)?, force).await?;
    Ok(StatusCode::NO_CONTENT)
}
