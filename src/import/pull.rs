//! The transfer alone: a URL into a plain file, as curl is used.
//!
//! Why: half of the engine is useful without the other, and easy to compare with its peers.
//! How: the same path as a copy's, with names beside the output: `FILE.part` and its presence file
//! while it fills, so that the same command resumes; `FILE` once it is complete and checked.
//! Never: leaves an unchecked file under the final name, or takes the place of what is no file.
//! Start at [`pull`].

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::{ImportError, Layout, import};
use crate::disk::{self, Digests, Dir, DiskError, Filling, SealRecord, Sealed, Space};
use crate::fetch::{Engine, Fetched, Progress, Source};

/// What to pull, and where to.
#[derive(Debug)]
pub struct PullRequest {
    /// What to bring in.
    pub source: Source,
    /// As the source has them, or expanded.
    pub layout: Layout,
    /// The file to make; an existing one is replaced when the new one is complete.
    pub output: PathBuf,
}

/// A pulled file.
#[derive(Debug)]
pub struct Pulled {
    /// The file, open for reading.
    pub sealed: Sealed,
    /// Its digests.
    pub digests: Digests,
    /// Bytes that came from the source in this run.
    pub received_bytes: u64,
}

/// Brings `request.source` into `request.output`.
///
/// # Errors
/// [`ImportError`]. What has arrived is kept for the next try, but for bytes with a wrong digest.
pub async fn pull(
    engine: &Engine,
    request: &PullRequest,
    progress: &Arc<Progress>,
) -> Result<Pulled, ImportError> {
    let (dir, name) = split(&request.output)?;
    let space = Space::of(&dir)?;
    let mut filling = Filling::open(dir, disk::FileNames::file(&name), space)?;
    let fetched = import(engine, &request.source, request.layout, &mut filling, progress).await;
    match fetched {
        Ok(Fetched { digests, .. }) => {
            let sealing = tokio::task::spawn_blocking(move || filling.seal(&SealRecord::default()));
            let sealed = match sealing.await {
                Ok(result) => result.map_err(|refused| refused.error)?,
                Err(error) => std::panic::resume_unwind(error.into_panic()),
            };
            let received_bytes = progress.snapshot().bytes_received;
            Ok(Pulled { sealed, digests, received_bytes })
        }
        Err(error) if error.condemns_bytes() => {
            filling.discard()?;
            Err(error)
        }
        // A refused request that brought nothing leaves nothing.
        Err(error) => {
            if filling.is_worthless() {
                filling.discard()?;
            }
            Err(error)
        }
    }
}

fn split(output: &Path) -> Result<(Dir, String), ImportError> {
    let unusable = || {
        let source = std::io::Error::from(std::io::ErrorKind::InvalidFilename);
        ImportError::Disk(DiskError::io("write to", output, source))
    };
    let name = output.file_name().and_then(|name| name.to_str()).ok_or_else(unusable)?;
    // A rename would take the place of a device as well: of /dev/null, for root.
    if std::fs::metadata(output).is_ok_and(|there| !there.is_file()) {
        return Err(ImportError::Disk(DiskError::NotRegular { path: output.to_owned() }));
    }
    let parent = match output.parent() {
        Some(parent) if parent.as_os_str().is_empty() => Path::new("."),
        Some(parent) => parent,
        None => return Err(unusable()),
    };
    Ok((Dir::open(parent)?, name.to_owned()))
}
