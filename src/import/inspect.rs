//! Inspects a source where it is: header and tables are fetched, data is not.
//!
//! Why: whether an image of many gigabytes can be used is known from a few megabytes of it.
//! How: the parts that [`Inspection::of_file`] would read, by ranges, all of one version.
//! Never: keeps anything on a disk.
//! Start at [`inspect_source`].

use std::path::Path;
use std::sync::Arc;

use super::blocks;
use super::error::ImportError;
use super::expand::open_image;
use super::tables;
use crate::fetch::{Engine, MAX_PART_BYTES, Progress, Source, SourceFile};
use crate::image::qcow2::{Image, Snapshot, Tally, Terms};
use crate::image::{Format, ImageError, Info, Inspection};

/// Bytes of a snapshot table that are fetched first.
const FIRST_TABLE_BYTES: u64 = 64 * 1024;

/// Inspects what `source` names, from its header and tables alone. Digests are not looked at, and
/// of `terms` only what is given.
///
/// # Errors
/// [`ImportError`]: the source cannot be read, or not in parts. A bad image is no error.
pub async fn inspect_source(
    engine: &Engine,
    source: &Source,
    declared: Option<Format>,
    terms: &Terms<'_>,
    progress: &Arc<Progress>,
) -> Result<Inspection, ImportError> {
    let (file, head) = SourceFile::open(engine, source, progress).await?;
    let name = source.url.file_path().unwrap_or_else(|| source.url.to_string().into());
    let total = file.len_bytes();
    if total == 0 {
        return Ok(Inspection::refused(None, ImageError::Empty { path: name })?);
    }
    let info = match Info::of_head(&head, total, &name, declared) {
        Ok(info) => info,
        Err(error) => return Ok(Inspection::refused(None, error)?),
    };
    if info.format == Format::Raw {
        return Ok(Inspection::of_raw(info));
    }
    match blocks::read_image(&file, info.format, &name).await {
        Ok(None) => {}
        Ok(Some((image, tally))) => return Ok(Inspection::of_blocks(info, &image, &tally)),
        Err(ImportError::Image(error)) => return Ok(Inspection::refused(Some(info), error)?),
        Err(error) => return Err(error),
    }
    let read = read_image(&file, head, terms, &name).await;
    match read {
        Ok((image, snapshots, tally)) => Ok(Inspection::of_tables(info, &image, snapshots, &tally)),
        Err(ImportError::Image(error)) => Ok(Inspection::refused(Some(info), error)?),
        Err(error) => Err(error),
    }
}

async fn read_image(
    file: &SourceFile<'_>,
    head: Vec<u8>,
    terms: &Terms<'_>,
    name: &Path,
) -> Result<(Image, Vec<Snapshot>, Tally), ImportError> {
    let mut image = open_image(file, head, terms.given(), name).await?;
    let snapshots = read_snapshots(file, &mut image, name).await?;
    let tally = tables::tally(file, &image).await?;
    Ok((image, snapshots, tally))
}

/// Most tables are small; one that does not fit is fetched again, as far as a part goes.
async fn read_snapshots(
    file: &SourceFile<'_>,
    image: &mut Image,
    name: &Path,
) -> Result<Vec<Snapshot>, ImportError> {
    let header = image.header();
    if header.snapshots == 0 {
        return Ok(Vec::new());
    }
    let at = header.snapshots_at.min(file.len_bytes());
    for most in [FIRST_TABLE_BYTES, MAX_PART_BYTES] {
        let end = file.len_bytes().min(at + most);
        let bytes = file.read(at..end).await?;
        match image.take_snapshots(&bytes[..], name) {
            Err(_) if most < MAX_PART_BYTES && end < file.len_bytes() => {}
            listed => return Ok(listed?),
        }
    }
    Ok(Vec::new())
}
