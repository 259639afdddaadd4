//! Where a backup is: a backup target, and the name of an image in it.
//!
//! Why: `s3://BUCKET@REGION/PATH?backingImage=NAME` is Longhorn's URL of a backup in a bucket; of one on a
//! share it is `backup:///mnt/target?backingImage=NAME` here, with the directory at which the share is
//! mounted in the place of its address.
//! How: the layout of Longhorn's backup store: `backupstore/backing-images/` with
//! `backing-images/NAME/backing-image.cfg` and `blocks/AB/CD/DIGEST.blk`, as files or as objects.
//! Never: makes a path of a name that is neither checked nor a digest; opens what is no regular file.
//! Start at [`BackupPlace::of`].

use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use url::Url;

use super::super::error::{Class, FetchError};
use super::super::http::{Access, Client};
use super::super::pace::{Best, Level};
use super::super::parts::whole;
use super::super::places::Places;
use super::super::policy::Policy;
use super::super::progress::Progress;
use super::super::remote::retried;
use super::super::source::SourceUrl;
use super::super::threads::blocking;
use super::block::MAX_BYTES;
use super::record::Block;

/// Longest record that is read: of an image of 8 TiB in blocks of 2 MiB.
const MAX_RECORD_BYTES: u64 = 512 << 20;
/// A compressed block may be a little longer than what is in it.
const MAX_FILE_BYTES: u64 = MAX_BYTES + (1 << 20);
const STORE: &str = "backupstore/backing-images";

/// Why a backup cannot be read. The message prints every field.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "each field is named in the message above it")]
pub enum BackupFault {
    #[error("{}: cannot be read; is the backup target mounted there?", path.display())]
    File {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("{}: not a regular file of at most {most} bytes", path.display())]
    NotAFile { path: PathBuf, most: u64 },
    #[error("{object}: longer than {most} bytes")]
    TooLarge { object: String, most: u64 },
    #[error("its backing-image.cfg is not usable: {fault}")]
    Record { fault: String },
    #[error("it is not complete; wait until it is, or make it again")]
    Unfinished,
    #[error("{place}: damaged: not what its name says; the backup cannot be restored without it")]
    Block { place: String },
    #[error("the block at byte {at} has {len} bytes, {room} would fit")]
    TooLong { at: u64, len: u64, room: u64 },
}

impl BackupFault {
    /// Whether trying again can help.
    #[must_use]
    pub fn class(&self) -> Class {
        match self {
            Self::File { source, .. } if source.kind() != io::ErrorKind::NotFound => Class::Retry,
            Self::File { .. }
            | Self::NotAFile { .. }
            | Self::TooLarge { .. }
            | Self::Record { .. }
            | Self::Unfinished
            | Self::Block { .. }
            | Self::TooLong { .. } => Class::Refuse,
        }
    }
}

/// Where a backup is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::fetch) struct BackupPlace {
    target: Target,
    /// The name that the image was backed up under.
    pub(in crate::fetch) image: String,
}

/// A backup target.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Target {
    Directory(PathBuf),
    Bucket {
        /// The s3 URL of the store in it, with a `/` at its end.
        store: SourceUrl,
        region: Option<String>,
    },
}

impl BackupPlace {
    /// The place that `url` names; `None` if it is no URL of a backup.
    pub(in crate::fetch) fn of(url: &Url) -> Option<Result<Self, &'static str>> {
        let names_one = || url.query_pairs().any(|(key, _)| key == "backingImage");
        match url.scheme() {
            "backup" => Some(Self::parse(url, Self::directory)),
            "s3" if names_one() => Some(Self::parse(url, Self::bucket)),
            _ => None,
        }
    }

    fn parse(
        url: &Url,
        target: impl Fn(&Url) -> Result<Target, &'static str>,
    ) -> Result<Self, &'static str> {
        if url.fragment().is_some() {
            return Err("a fragment");
        }
        let mut pairs = url.query_pairs();
        let image = match (pairs.next(), pairs.next()) {
            (Some((key, image)), None) if key == "backingImage" => image.into_owned(),
            (_, _) => return Err("no backingImage, or more than that"),
        };
        // As Longhorn's own rule, so that it is one name of a directory and no way out of it.
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"_.-".contains(&byte);
        let begins = image.bytes().next().is_some_and(|byte| byte.is_ascii_alphanumeric());
        if !begins || image.len() > 253 || !image.bytes().all(plain) {
            return Err("a name that no image has");
        }
        Ok(Self { target: target(url)?, image })
    }

    fn directory(url: &Url) -> Result<Target, &'static str> {
        if url.host_str().is_some_and(|host| !host.is_empty()) {
            return Err("a host");
        }
        let path = percent_encoding::percent_decode_str(url.path()).decode_utf8();
        let path = path.map_err(|_| "a path that is no UTF-8")?;
        if path.len() < 2 || !path.starts_with('/') || path.contains('\0') {
            return Err("no directory");
        }
        Ok(Target::Directory(PathBuf::from(&*path)))
    }

    /// `s3://BUCKET@REGION/PATH`, or without the region.
    fn bucket(url: &Url) -> Result<Target, &'static str> {
        let host = url.host_str().filter(|host| !host.is_empty()).ok_or("no bucket")?;
        if url.password().is_some() || url.port().is_some() {
            return Err("more than bucket, region and path");
        }
        let (bucket, region) = match url.username() {
            "" => (host, None),
            bucket => (bucket, Some(host.to_owned())),
        };
        let path = url.path().trim_matches('/');
        let between = if path.is_empty() { "" } else { "/" };
        let store = SourceUrl::parse(&format!("s3://{bucket}/{path}{between}{STORE}/"));
        Ok(Target::Bucket { store: store.map_err(|_| "no bucket")?, region })
    }

    /// Gets ready to read.
    pub(super) fn open(
        &self,
        access: &Access,
        policy: &Policy,
        progress: &Arc<Progress>,
    ) -> Result<Store, FetchError> {
        let from = match &self.target {
            Target::Directory(path) => From::Directory(policy.places.real(path)?.join(STORE)),
            Target::Bucket { store, region } => {
                let mut access = access.clone();
                if let Some(region) = region {
                    let s3 = access.s3.get_or_insert_default();
                    s3.region.get_or_insert_with(|| region.clone());
                }
                From::Bucket(Client::new(store, &access, policy)?)
            }
        };
        let (policy, progress) = (policy.clone(), Arc::clone(progress));
        Ok(Store { from, policy, progress, best: Best::default(), level: Level::default() })
    }
}

/// A backup store that is open.
pub(super) struct Store {
    from: From,
    policy: Policy,
    progress: Arc<Progress>,
    /// What the fastest connections get.
    best: Best,
    /// How long an object may take that another connection could bring sooner.
    level: Level,
}

enum From {
    Directory(PathBuf),
    Bucket(Client),
}

impl Store {
    /// Requests that are worth making at the same time: one that is far answers late.
    pub(super) fn is_far(&self) -> bool {
        matches!(self.from, From::Bucket(_))
    }

    /// The text of an image's record.
    pub(super) async fn record(&self, url: &str, image: &str) -> Result<Vec<u8>, FetchError> {
        let path = format!("backing-images/{image}/backing-image.cfg");
        self.read(url, &path, MAX_RECORD_BYTES).await
    }

    /// What is stored of a block, as it is.
    pub(super) async fn block(&self, url: &str, block: &Block) -> Result<Vec<u8>, FetchError> {
        self.read(url, &block.path(), MAX_FILE_BYTES).await
    }

    async fn read(&self, url: &str, path: &str, most: u64) -> Result<Vec<u8>, FetchError> {
        let at_fault = |source| FetchError::Backup { url: url.to_owned(), source };
        match &self.from {
            From::Directory(store) => {
                let (path, places) = (store.join(path), self.policy.places.clone());
                blocking(move || read(&places, &path, most)).await.map_err(at_fault)
            }
            From::Bucket(client) => {
                let client = client.beneath(path);
                let pace = (&self.best, &self.level);
                let get = || whole(&client, most, &self.policy, &self.progress, pace);
                let bytes = retried(&self.policy, &self.progress, get).await?;
                let object = client.shown();
                bytes.ok_or_else(|| at_fault(BackupFault::TooLarge { object, most }))
            }
        }
    }
}

/// All of a regular file of at most `most` bytes.
fn read(places: &Places, path: &Path, most: u64) -> Result<Vec<u8>, BackupFault> {
    let failed = |source| BackupFault::File { path: path.to_owned(), source };
    let file = places.open_below(path).map_err(failed)?;
    let meta = file.metadata().map_err(failed)?;
    if !meta.is_file() || meta.len() > most {
        return Err(BackupFault::NotAFile { path: path.to_owned(), most });
    }
    let mut bytes = Vec::with_capacity(usize::try_from(meta.len()).unwrap_or(0));
    file.take(most).read_to_end(&mut bytes).map_err(failed)?;
    Ok(bytes)
}
