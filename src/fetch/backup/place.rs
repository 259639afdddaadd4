//! Where a backup is: the directory of a backup target, and the name of an image in it.
//!
//! Why: `backup:///mnt/target?backingImage=NAME` is Longhorn's URL of a backup, with the directory at
//! which the target is mounted in the place of its address.
//! How: the layout of Longhorn's backup store: `backupstore/backing-images/` with
//! `backing-images/NAME/backing-image.cfg` and `blocks/AB/CD/DIGEST.blk`.
//! Never: makes a path of a name that is neither checked nor a digest; opens what is no regular file.
//! Start at [`BackupPlace::of`].

use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use url::Url;

use super::super::error::Class;
use super::block::{MAX_BYTES, decode};
use super::in_units;
use super::record::{BackupRecord, Block};

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
    #[error("its backing-image.cfg is not usable: {fault}")]
    Record { fault: String },
    #[error("it is not complete; wait until it is, or make it again")]
    Unfinished,
    #[error("{}: damaged: not what its name says; the backup cannot be restored without it", path.display())]
    Block { path: PathBuf },
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
    target: PathBuf,
    /// The name that the image was backed up under.
    pub(in crate::fetch) image: String,
}

impl BackupPlace {
    /// The place that `url` names; `None` if it is of another scheme.
    pub(in crate::fetch) fn of(url: &Url) -> Option<Result<Self, &'static str>> {
        (url.scheme() == "backup").then(|| Self::parse(url))
    }

    fn parse(url: &Url) -> Result<Self, &'static str> {
        if url.host_str().is_some_and(|host| !host.is_empty()) || url.fragment().is_some() {
            return Err("a host or a fragment");
        }
        let path = percent_encoding::percent_decode_str(url.path()).decode_utf8();
        let path = path.map_err(|_| "a path that is no UTF-8")?;
        if path.len() < 2 || !path.starts_with('/') || path.contains('\0') {
            return Err("no directory");
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
        Ok(Self { target: PathBuf::from(&*path), image })
    }

    /// Reads the record. Blocks.
    pub(super) fn open(&self) -> Result<BackupRecord, BackupFault> {
        let store = self.target.join(STORE);
        let path = store.join("backing-images").join(&self.image).join("backing-image.cfg");
        BackupRecord::parse(&read(&path, MAX_RECORD_BYTES)?)
    }

    /// The bytes of a block, in whole units, checked. Blocks.
    pub(super) fn read(
        &self,
        record: &BackupRecord,
        block: &Block,
    ) -> Result<Vec<u8>, BackupFault> {
        let Block { offset, room, digest } = block;
        let (first, second) = (digest.get(..2), digest.get(2..4));
        let dir = self.target.join(STORE).join("blocks");
        let dir = dir.join(first.unwrap_or_default()).join(second.unwrap_or_default());
        let path = dir.join(format!("{digest}.blk"));
        let stored = read(&path, MAX_FILE_BYTES)?;
        let mut bytes = decode(record.codec, &stored, digest).ok_or(BackupFault::Block { path })?;
        let len = bytes.len() as u64;
        let over = bytes.get(usize::try_from(*room).unwrap_or(usize::MAX)..).unwrap_or_default();
        // The last block may be filled up to its usual length.
        let is_last = offset + room == record.size_bytes;
        if over.iter().any(|byte| *byte != 0) || !over.is_empty() && !is_last {
            return Err(BackupFault::TooLong { at: *offset, len, room: *room });
        }
        let whole = usize::try_from(in_units(len, *room)).unwrap_or(usize::MAX);
        bytes.resize(whole, 0);
        Ok(bytes)
    }
}

/// All of a regular file of at most `most` bytes.
fn read(path: &Path, most: u64) -> Result<Vec<u8>, BackupFault> {
    let failed = |source| BackupFault::File { path: path.to_owned(), source };
    let nonblock = i32::try_from(rustix::fs::OFlags::NONBLOCK.bits()).unwrap_or(0);
    // A pipe in its place would be waited for.
    let file: File =
        OpenOptions::new().read(true).custom_flags(nonblock).open(path).map_err(failed)?;
    let meta = file.metadata().map_err(failed)?;
    if !meta.is_file() || meta.len() > most {
        return Err(BackupFault::NotAFile { path: path.to_owned(), most });
    }
    let mut bytes = Vec::with_capacity(usize::try_from(meta.len()).unwrap_or(0));
    file.take(most).read_to_end(&mut bytes).map_err(failed)?;
    Ok(bytes)
}
