//! Where an image that is to be made known comes from, as a request says it.
//!
//! Why: a URL, an upload and a clone exclude each other, and each excludes some of what else may be said.
//! How: one table of what doesn't go together, with the reason.
//! Never: repeats a URL in an error.
//! Start at [`of`].

use axum::http::StatusCode;

use super::error::ApiError;
use super::handlers::Answer;
use super::types::CreateImage;
use crate::fetch::Policy;
use crate::manager::SourceUrl;
use crate::names::ImageName;

/// Where the bytes come from; neither if they are to be uploaded.
#[derive(Debug)]
pub(super) struct Origin {
    pub(super) source: Option<SourceUrl>,
    pub(super) clone_of: Option<ImageName>,
}

/// The origin that a request names, with nothing said that doesn't go with it.
pub(super) fn of(body: &CreateImage) -> Answer<Origin> {
    match (&body.url, body.upload_bytes, &body.clone_of) {
        (Some(url), None, None) => {
            let source = SourceUrl::parse(url).map_err(|e| {
                let (status, hint) =
                    (StatusCode::UNPROCESSABLE_ENTITY, "give the URL of an image file");
                ApiError::new(status, "refused-source", e.to_string(), hint)
            })?;
            if source.is_nbd() {
                check_export(body)?;
            }
            Ok(Origin { source: Some(source), clone_of: None })
        }
        (None, Some(bytes), None) => {
            check_upload(body, bytes)?;
            Ok(Origin { source: None, clone_of: None })
        }
        (None, None, Some(image)) => {
            let clone_of = ImageName::parse(image)?;
            check_clone(body)?;
            Ok(Origin { source: None, clone_of: Some(clone_of) })
        }
        (None, None, None) => {
            Err(ApiError::bad_request("url, upload_bytes, clone_of: give one of them"))
        }
        (_, _, _) => {
            Err(ApiError::bad_request("url, upload_bytes, clone_of: give only one of them"))
        }
    }
}

fn check_upload(body: &CreateImage, bytes: u64) -> Answer<()> {
    let most = Policy::default().max_bytes;
    if bytes == 0 || bytes > most {
        return Err(ApiError::bad_request(format!("upload_bytes: give 1 to {most}")));
    }
    if body.layout.as_deref() == Some("raw") {
        return Err(ApiError::bad_request("layout: an upload is kept as-is; raw needs a url"));
    }
    check_no_url(body, "an upload")
}

fn check_export(body: &CreateImage) -> Answer<()> {
    if body.layout.as_deref() == Some("raw") {
        let text = "layout: an export is brought in as it is; raw needs the url of a file";
        return Err(ApiError::bad_request(text));
    }
    if !body.access.is_empty() {
        return Err(ApiError::bad_request("access: an NBD export has none; leave it out"));
    }
    Ok(())
}

fn check_clone(body: &CreateImage) -> Answer<()> {
    let (layout, format) = (&body.layout, &body.format);
    let (base, data_file) = (&body.base, &body.data_file);
    for (what, given) in
        [("layout", layout), ("format", format), ("base", base), ("data_file", data_file)]
    {
        if given.is_some() {
            let text = format!("{what}: a clone has that of its image; leave it out");
            return Err(ApiError::bad_request(text));
        }
    }
    check_no_url(body, "a clone")
}

fn check_no_url(body: &CreateImage, what: &str) -> Answer<()> {
    if body.checksum_url.is_some() || !body.mirrors.is_empty() {
        let text = format!("checksum_url, mirrors: {what} has none; they belong to a url");
        return Err(ApiError::bad_request(text));
    }
    if !body.access.is_empty() {
        let text = format!("access: {what} has none; it belongs to a url");
        return Err(ApiError::bad_request(text));
    }
    Ok(())
}
