//! A refused request: status, fixed code, message, hint.
//!
//! Why: a script acts on the code, a person on the hint; both come from one table.
//! Never: repeats the text of a request: it may hold a credential.
//! Start at [`ApiError`].

use axum::Json;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};

use super::types::{ErrorBody, Problem};
use crate::manager::ManagerError;

/// A refused request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ApiError {
    pub(crate) status: StatusCode,
    pub(crate) code: &'static str,
    pub(crate) message: String,
    pub(crate) hint: String,
}

impl ApiError {
    pub(crate) fn new(
        status: StatusCode,
        code: &'static str,
        message: impl Into<String>,
        hint: impl Into<String>,
    ) -> Self {
        Self { status, code, message: message.into(), hint: hint.into() }
    }

    pub(crate) fn bad_request(message: impl Into<String>) -> Self {
        Self::new(
            StatusCode::BAD_REQUEST,
            "bad-request",
            message,
            "see GET /v1/openapi.json for what this route takes",
        )
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let problem =
            Problem { code: self.code.to_owned(), message: self.message, hint: self.hint };
        (self.status, Json(ErrorBody { error: problem })).into_response()
    }
}

impl From<crate::names::NameError> for ApiError {
    fn from(error: crate::names::NameError) -> Self {
        Self::bad_request(error.to_string())
    }
}

impl From<std::io::Error> for ApiError {
    fn from(error: std::io::Error) -> Self {
        let message = format!("cannot get random numbers: {error}");
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "internal", message, "")
    }
}

impl From<ManagerError> for ApiError {
    #[expect(clippy::too_many_lines, reason = "one table, a few lines for each refusal")]
    fn from(error: ManagerError) -> Self {
        let (status, code, hint) = match &error {
            ManagerError::NoSuchImage { .. } => {
                (StatusCode::NOT_FOUND, "not-found", "`bedplate list` shows the images")
            }
            ManagerError::NoSuchDisk { .. } => {
                (StatusCode::NOT_FOUND, "not-found", "`bedplate disks` shows the disks")
            }
            ManagerError::NoSuchAttachment { .. } => (
                StatusCode::NOT_FOUND,
                "not-found",
                "`bedplate get IMAGE` shows the readers of an image",
            ),
            ManagerError::OtherSource { .. } => {
                (StatusCode::CONFLICT, "name-taken", "give another name, or delete that image")
            }
            ManagerError::OtherExpectation { .. } => (
                StatusCode::CONFLICT,
                "name-taken",
                "drop the expectation, give another name, or delete that image",
            ),
            ManagerError::OtherWay { .. } => (
                StatusCode::CONFLICT,
                "name-taken",
                "give mirrors and checksum_url as the image has them, or delete that image",
            ),
            ManagerError::OtherTrace { .. } => (
                StatusCode::CONFLICT,
                "refused-trace",
                "record one on this image, or, if you know that this one fits, say --force or \
                 leave its digests out",
            ),
            ManagerError::InUse { .. } => (
                StatusCode::CONFLICT,
                "in-use",
                "`bedplate get IMAGE` shows who is attached, `bedplate top` the sessions; end them, \
                 then try again",
            ),
            ManagerError::IsABase { .. } => {
                (StatusCode::CONFLICT, "in-use", "delete the images that stand on it first")
            }
            ManagerError::HasClones { .. } => (
                StatusCode::CONFLICT,
                "in-use",
                "fetch these clones and wait until they are ready, or delete them first",
            ),
            ManagerError::NothingToClone { .. } => {
                (StatusCode::CONFLICT, "not-ready", "clone what it is a clone of")
            }
            ManagerError::NoSuchCopy { .. } => {
                (StatusCode::NOT_FOUND, "not-found", "`bedplate get NAME` shows its copies")
            }
            ManagerError::NoCompleteCopy { .. } => {
                (StatusCode::CONFLICT, "not-ready", "fetch it first, or wait until it is ready")
            }
            ManagerError::CopyInUse { .. } => {
                (StatusCode::CONFLICT, "in-use", "no copy was removed; leave that disk out")
            }
            ManagerError::TooFewCopies { .. } => (
                StatusCode::CONFLICT,
                "in-use",
                "no copy was removed; lower its min_copies, or delete the image to remove the last ones",
            ),
            ManagerError::TooManyBases { .. } => (
                StatusCode::UNPROCESSABLE_ENTITY,
                "refused-source",
                "merge some of them with `qemu-img convert`",
            ),
            ManagerError::NoDataFile { .. } => (
                StatusCode::UNPROCESSABLE_ENTITY,
                "refused-source",
                "give an image that stands on nothing, raw as qemu wrote it",
            ),
            ManagerError::HasVolumes { .. } => {
                (StatusCode::CONFLICT, "in-use", "delete these volumes first")
            }
            ManagerError::VolumeAttached { .. } => {
                (StatusCode::CONFLICT, "in-use", "detach it first: `bedplate volume detach NAME`")
            }
            ManagerError::NoSuchVolume { .. } => {
                (StatusCode::NOT_FOUND, "not-found", "`bedplate volume list` shows the volumes")
            }
            ManagerError::NoSuchClass { .. } => {
                (StatusCode::NOT_FOUND, "not-found", "`bedplate class list` shows the classes")
            }
            ManagerError::NoImageForVolume { .. } => (
                StatusCode::NOT_FOUND,
                "not-found",
                "make it known (`bedplate create URL --name IMAGE`), give a URL, or name another",
            ),
            ManagerError::VolumeTooSmall { .. } => {
                (StatusCode::UNPROCESSABLE_ENTITY, "too-small", "give the image's size, or more")
            }
            ManagerError::OtherVolume { .. } => {
                (StatusCode::CONFLICT, "name-taken", "give another name, or delete that volume")
            }
            ManagerError::OtherBackupImage { .. } => (
                StatusCode::CONFLICT,
                "refused-backup",
                "name the image that the backup was made on (--image), or, if you know that this \
                 one is right, say --force",
            ),
            ManagerError::UnprovenBackupImage { .. } => (
                StatusCode::CONFLICT,
                "refused-backup",
                "create the image under another name with --sha512 and name it with --image, or, \
                 if you know that this one is right, say --force",
            ),
            ManagerError::BadReplicas { .. } | ManagerError::DiskTwice { .. } => {
                (StatusCode::BAD_REQUEST, "bad-request", "`bedplate disks` shows the disks")
            }
            ManagerError::BeingDeleted { .. } => {
                (StatusCode::CONFLICT, "deleting", "wait until it is gone, then try again")
            }
            ManagerError::NotSelected { .. } | ManagerError::NoDiskSelected { .. } => (
                StatusCode::CONFLICT,
                "not-selected",
                "name another disk, or give one the tag: `bedplate disk set DISK --tags`; those of the \
                 node are in its configuration",
            ),
            ManagerError::NoRoom { .. } => (
                StatusCode::INSUFFICIENT_STORAGE,
                "no-room",
                "free space or delete an image; `bedplate disks` shows the room",
            ),
            ManagerError::BadReader { .. }
            | ManagerError::BadPriority { .. }
            | ManagerError::BadSetting { .. } => (StatusCode::BAD_REQUEST, "bad-request", ""),
            ManagerError::DiskClosed { .. } => (
                StatusCode::CONFLICT,
                "disk-closed",
                "name another disk, or open it: `bedplate disk set UUID --schedulable yes --evict no`",
            ),
            ManagerError::DiskInUse { .. } => (
                StatusCode::CONFLICT,
                "in-use",
                "empty it first: `bedplate disk set UUID --evict yes`; one that is gone for good \
                 goes with --force; the first, with the catalog, stays",
            ),
            ManagerError::DiskRefused { .. } => (
                StatusCode::UNPROCESSABLE_ENTITY,
                "refused-disk",
                "see the message; `bedplate doctor` looks at the disks that are here",
            ),
            ManagerError::Catalog(_) => (
                StatusCode::INTERNAL_SERVER_ERROR,
                "catalog",
                "see the daemon's log; `bedplate doctor` looks at its disk",
            ),
            ManagerError::Stopping => {
                (StatusCode::SERVICE_UNAVAILABLE, "shutting-down", "try again when it is back")
            }
        };
        Self::new(status, code, crate::fetch::one_line(&error), hint)
    }
}
