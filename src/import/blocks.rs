//! Inspects a VMDK, VHD or VHDX source where it is.
//!
//! Why: as for QCOW2, its header and tables say whether it can be used.
//! How: the pure parser says which bytes it needs; the pages of the table are read several at a
//! time.
//! Never: expands one of these formats: they are brought in as they are.
//! Start at [`read_image`].

use std::path::Path;

use super::error::ImportError;
use super::tables::{bytes_of, read_group};
use crate::fetch::{FetchError, SourceFile};
use crate::image::blocks::{Image, Page, Parts, Want};
use crate::image::qcow2::Tally;
use crate::image::{Format, ImageError};

/// Pages of a table that are read for one group: 4 MiB at most.
const GROUP_PAGES: usize = 1024;

/// Reads header and table; `None` if `format` is none of these. `name` is for messages.
pub(super) async fn read_image(
    file: &SourceFile<'_>,
    format: Format,
    name: &Path,
) -> Result<Option<(Image, Tally)>, ImportError> {
    let mut parts = Parts::new(file.len_bytes());
    let image = loop {
        match Image::parse(format, &parts) {
            None => return Ok(None),
            Some(Ok(image)) => break image,
            Some(Err(Want::Refused(fault))) => return Err(ImageError::fault(name, fault).into()),
            Some(Err(Want::Bytes(range))) => {
                let at = range.start;
                parts.add(at, file.read(range).await?);
            }
        }
    };
    let tally = tally(file, &image).await?;
    Ok(Some((image, tally)))
}

async fn tally(file: &SourceFile<'_>, image: &Image) -> Result<Tally, FetchError> {
    let mut tally = Tally::default();
    let mut pages = image.layout().into_iter().flat_map(|layout| layout.pages()).peekable();
    while pages.peek().is_some() {
        let group: Vec<Page> = pages.by_ref().take(GROUP_PAGES).collect();
        let parts = read_group(file, group.iter().map(|page| page.stored.clone())).await?;
        for page in &group {
            image.tally_page(page, bytes_of(&page.stored, &parts), &mut tally);
        }
    }
    Ok(tally)
}
