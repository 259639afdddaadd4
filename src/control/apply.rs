//! `POST /v1/apply`: manifests of Kubernetes and Longhorn.
//!
//! Why: a class and a claim say all that is needed to make an image and a volume.
//! How: all documents are read before the first is applied; then each is one command of the manager,
//! in the order of the manifest. Whatever exists as it is asked for is left as it is.
//! Never: repeats a URL, or goes on after a document that was refused.
//! Start at [`apply`].

use axum::Json;
use axum::extract::State;

use super::App;
use super::body::Text;
use super::error::ApiError;
use super::handlers::{Answer, new_image};
use super::types::CreateImage;
use super::types_volume::{Applied, AppliedDocument};
use super::wire_volume;
use crate::manager::{self, ClassRecord, ManagerError, NewImage, NewVolume, Selectors, unix_now_s};
use crate::manifest::{self, Claim, Document, ImageSource, Object};
use crate::names::ImageName;

pub(super) async fn apply(State(app): State<App>, Text(text): Text) -> Answer<Json<Applied>> {
    let documents =
        manifest::read(&text).map_err(|error| ApiError::bad_request(error.to_string()))?;
    let mut applied = Vec::with_capacity(documents.len());
    for document in documents {
        let (kind, name) = (document.object.kind(), document.object.name());
        let Document { number, line, object, mut notes } = document;
        let action = apply_one(&app, object, &mut notes).await.map_err(|mut error| {
            let place = format!("document {number} (line {line}): {kind} {name}");
            error.message = format!("{place}: {}", error.message);
            error
        })?;
        let (kind, action) = (kind.to_owned(), action.to_owned());
        applied.push(AppliedDocument { document: number, line, kind, name, action, notes });
    }
    Ok(Json(Applied { documents: applied }))
}

fn made(is_new: bool) -> &'static str {
    if is_new { "created" } else { "unchanged" }
}

async fn apply_one(app: &App, object: Object, notes: &mut Vec<String>) -> Answer<&'static str> {
    match object {
        Object::Class(class) => {
            let manifest::Class { name, provisioner, image, source, .. } = class;
            let manifest::Class { sha512, min_copies, replicas, kept, selectors, .. } = class;
            let created_unix_s = unix_now_s();
            let (url, clone_of) = match source {
                Some(ImageSource::Url(url)) => (Some(url), None),
                Some(ImageSource::Clone(image)) => (None, Some(image)),
                None => (None, None),
            };
            let record = ClassRecord {
                name,
                provisioner,
                image,
                url,
                clone_of,
                sha512,
                min_copies,
                replicas,
                selectors: Selectors { disk: selectors.disk, node: selectors.node },
                kept,
                created_unix_s,
            };
            Ok(match app.manager.put_class(record).await? {
                manager::Applied::Created => "created",
                manager::Applied::Configured => "configured",
                manager::Applied::Unchanged => "unchanged",
            })
        }
        Object::Claim(claim) => apply_claim(app, claim, notes).await,
        Object::Image(image) => {
            let manifest::Image { name, source, sha512, min_copies, selectors } = image;
            let mut new = image_of(&name, &source, sha512, min_copies)?;
            *new.selectors = Selectors { disk: selectors.disk, node: selectors.node };
            let (image, is_new) = app.manager.create(new).await?;
            if min_copies.is_some_and(|least| least.max(1) != image.record.min_copies.max(1)) {
                let text = "the image keeps its least number of copies; `bedplate set` changes it";
                notes.push(text.to_owned());
            }
            Ok(made(is_new))
        }
        Object::Volume(volume) => {
            let manifest::Volume { name, image, replicas, size_bytes } = volume;
            let new = NewVolume {
                name,
                image,
                new_image: None,
                sha512: None,
                disks: Vec::new(),
                replicas,
                size_bytes,
                backup: None,
                class: None,
                claim: None,
                created_unix_s: unix_now_s(),
            };
            create_volume(app, new, notes).await
        }
    }
}

/// Rule 13: the class's image is made, used, or refused; the volume stands on it.
async fn apply_claim(app: &App, claim: Claim, notes: &mut Vec<String>) -> Answer<&'static str> {
    let wanted = claim.class.clone();
    let class = app.manager.read(move |world| world.class(&wanted)).await?;
    let class = class.ok_or_else(|| ManagerError::NoSuchClass { name: claim.class.clone() })?;
    let Some(image) = class.image else {
        let message = format!("storage class {} names no image (backingImage)", class.name);
        let hint = "name one in the class; there are no volumes without an image here";
        let status = axum::http::StatusCode::CONFLICT;
        return Err(ApiError::new(status, "no-image", message, hint));
    };
    let source = class.url.map(ImageSource::Url).or(class.clone_of.map(ImageSource::Clone));
    let new_image = match &source {
        Some(source) => {
            let mut new = image_of(&image, source, class.sha512.clone(), class.min_copies)?;
            *new.selectors = class.selectors.clone();
            Some(Box::new(new))
        }
        None => None,
    };
    let new = NewVolume {
        name: claim.name.clone(),
        image,
        new_image,
        sha512: class.sha512,
        disks: Vec::new(),
        replicas: class.replicas,
        size_bytes: claim.size_bytes,
        backup: None,
        class: Some(class.name),
        claim: Some(format!("{}/{}", claim.namespace, claim.name)),
        created_unix_s: unix_now_s(),
    };
    create_volume(app, new, notes).await
}

async fn create_volume(app: &App, new: NewVolume, notes: &mut Vec<String>) -> Answer<&'static str> {
    let (volume, is_new) = app.manager.create_volume(new).await?;
    let message = wire_volume::volume(&volume, &app.sockets).message;
    if !message.is_empty() {
        notes.push(message);
    }
    Ok(made(is_new))
}

fn image_of(
    name: &ImageName,
    source: &ImageSource,
    sha512: Option<String>,
    min_copies: Option<u32>,
) -> Answer<NewImage> {
    let from = match source {
        ImageSource::Url(url) => CreateImage::of_url(url.expose().as_str()),
        ImageSource::Clone(image) => CreateImage::clone_of(image.as_str()),
    };
    new_image(&CreateImage { name: Some(name.to_string()), sha512, min_copies, ..from })
}
