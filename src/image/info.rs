//! What a file is: format, sizes, and what is odd about it.
//!
//! Why: a person wants to see it, a manager needs the virtual size, and a copy is sealed only after
//! all of its tables were checked.
//! How: [`inspect`] reads the header and every table entry, in bounded memory; opening a view
//! reads the header only and checks the rest when it is touched.
//! Never: follows a path from inside the file, or decodes data.
//! Start at [`inspect`].

use std::path::Path;

use super::format::{PROBE_LEN_BYTES, looks_like};
use super::qcow2::{self, Compression};
use super::{Format, ImageError, Source, blocks, detect};

/// What a file is. `clusters` is known only after a full check.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Info {
    /// By content, or as declared.
    pub format: Format,
    /// Length of the disk that a guest sees.
    pub virtual_size_bytes: u64,
    /// Length of the file.
    pub file_size_bytes: u64,
    /// Bytes of the file that occupy disk space (`st_blocks * 512`).
    pub allocated_bytes: u64,
    /// Bytes of one cluster, grain or block; not of a raw disk or a fixed VHD.
    pub cluster_size_bytes: Option<u64>,
    /// QCOW2 only: 2 (`compat=0.10`) or 3 (`compat=1.1`).
    pub qcow2_version: Option<u32>,
    /// QCOW2 and VMDK only: how compressed clusters, if there are any, are compressed.
    pub compression: Option<Compression>,
    /// QCOW2 only: true if clusters have subclusters (extended L2 entries).
    pub extended_l2: Option<bool>,
    /// QCOW2 only: number of internal snapshots.
    pub snapshots: Option<u32>,
    /// QCOW2 only: number of bitmaps that are up to date.
    pub bitmaps: Option<u32>,
    /// Only from [`inspect`], and where there are clusters: how many of each kind.
    pub clusters: Option<ClusterCounts>,
    /// Oddities that change no byte, in words: dirty bit, reserved bits, looks like a VMDK.
    pub notes: Vec<String>,
}

/// Guest clusters by kind; their sum is the disk's size in clusters, rounded up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ClusterCounts {
    /// Stored as they are.
    pub data: u64,
    /// Zero, by a flag or because nothing is stored.
    pub zero: u64,
    /// Stored compressed.
    pub compressed: u64,
}

/// A backing file, and an external data file of any length.
const GIVEN_LATER: qcow2::Terms<'_> =
    qcow2::Terms { snapshot: None, backing: true, data_len_bytes: Some(u64::MAX) };

/// Checks `file` whole, as it must be before a copy is sealed: the header and every table entry.
///
/// `path` is for messages. `declared` is what its owner says it is; `None` takes the content's
/// word. A file that is declared raw is raw, whatever it holds (with a note). `terms` say what else
/// it will be given, and whether a snapshot is read: then its tables are checked too.
///
/// # Errors
/// [`ImageError`] that names the first field at fault, or the read that failed.
pub fn inspect(
    file: &dyn Source,
    path: &Path,
    declared: Option<Format>,
    terms: &qcow2::Terms<'_>,
) -> Result<Info, ImageError> {
    let mut info = identify(file, path, declared)?;
    let not_needed = |what| Err(ImageError::NotNeeded { path: path.to_owned(), what });
    if info.format != Format::Qcow2 {
        match terms {
            qcow2::Terms { backing: true, .. } => return not_needed("a base"),
            qcow2::Terms { data_len_bytes: Some(_), .. } => {
                return not_needed("an external data file");
            }
            qcow2::Terms { snapshot: Some(_), .. } => return not_needed("a snapshot"),
            _nothing_given => {}
        }
        if let Some(image) = blocks::Image::open(file, path, info.format, info.file_size_bytes)? {
            image.describe(&mut info);
            let tally = image.tally(file, path)?;
            if let Some(&fault) = tally.faults().first() {
                return Err(ImageError::fault(path, fault));
            }
            image.count(&tally, &mut info);
        }
        return Ok(info);
    }
    let open = |terms| qcow2::Image::open(file, path, info.file_size_bytes, terms);
    if terms.snapshot.is_some() {
        open(terms)?.check(file, path, &mut info.clone())?;
    }
    let image = open(&qcow2::Terms { snapshot: None, ..*terms })?;
    if terms.backing && !image.header().backing {
        return not_needed("a base");
    }
    if terms.data_len_bytes.is_some() && !image.header().external_data {
        return not_needed("an external data file");
    }
    image.describe(&mut info);
    image.check(file, path, &mut info)?;
    Ok(info)
}

/// What the header of a complete file says, which was inspected before. Its tables are not read, and
/// what it needs beside itself counts as given: whoever opens it will give it.
///
/// # Errors
/// As [`inspect`].
pub fn peek(file: &dyn Source, path: &Path, declared: Option<Format>) -> Result<Info, ImageError> {
    let mut info = identify(file, path, declared)?;
    if info.format == Format::Qcow2 {
        let terms = GIVEN_LATER;
        qcow2::Image::open(file, path, info.file_size_bytes, &terms)?.describe(&mut info);
    }
    if let Some(image) = blocks::Image::open(file, path, info.format, info.file_size_bytes)? {
        image.describe(&mut info);
    }
    Ok(info)
}

/// Size of the disk of a complete QCOW2 file as it was at an internal snapshot, by ID or name, in bytes.
///
/// # Errors
/// As [`inspect`].
pub fn snapshot_size_bytes(
    file: &dyn Source,
    path: &Path,
    snapshot: &str,
) -> Result<u64, ImageError> {
    let len_bytes = identify(file, path, Some(Format::Qcow2))?.file_size_bytes;
    let terms = qcow2::Terms { snapshot: Some(snapshot), ..GIVEN_LATER };
    Ok(qcow2::Image::open(file, path, len_bytes, &terms)?.header().size_bytes)
}

/// What the first bytes and the file's inode say; the fields of formats are not filled in yet.
pub(super) fn identify(
    file: &dyn Source,
    path: &Path,
    declared: Option<Format>,
) -> Result<Info, ImageError> {
    let failed = |source| ImageError::read(path, 0, 0, source);
    let len_bytes = file.len_bytes().map_err(failed)?;
    if len_bytes == 0 {
        return Err(ImageError::Empty { path: path.to_owned() });
    }
    let first_bytes = read_up_to(file, PROBE_LEN_BYTES, path)?;
    let mut info = Info::of_head(&first_bytes, len_bytes, path, declared)?;
    info.allocated_bytes = file.allocated_bytes().map_err(failed)?;
    if info.format == Format::Raw && ends_as_vhd(file, len_bytes) {
        let note =
            "served as a raw disk, but it ends like a fixed VHD; declare it vhd if it is one";
        info.notes.push(note.to_owned());
    }
    Ok(info)
}

/// True if the file ends with the footer of a VHD. One that cannot be read does not: the data there
/// will say so.
fn ends_as_vhd(file: &dyn Source, len_bytes: u64) -> bool {
    let mut last = [0; 512];
    // It is worth a note, not a wait.
    let at = len_bytes.checked_sub(512).filter(|&at| file.is_here(at, 512));
    at.is_some_and(|at| file.read_exact(&mut last, at).is_ok()) && blocks::is_vhd_footer(&last)
}

impl Info {
    /// What the first bytes of a file of this length say; the fields of formats are not filled in yet,
    /// and all of the file counts as allocated. `path` is for messages.
    ///
    /// # Errors
    /// [`ImageError::FormatMismatch`] if the content is not what was declared.
    pub fn of_head(
        first_bytes: &[u8],
        len_bytes: u64,
        path: &Path,
        declared: Option<Format>,
    ) -> Result<Self, ImageError> {
        let found = detect(first_bytes);
        let format = declared.unwrap_or(found);
        // A fixed VHD begins with the disk.
        let may_be = (format, found) == (Format::Vhd, Format::Raw);
        if format != Format::Raw && found != format && !may_be {
            return Err(ImageError::FormatMismatch {
                path: path.to_owned(),
                declared: format,
                found,
            });
        }
        let mut notes = Vec::new();
        if let (Format::Raw, Some(name)) = (format, looks_like(first_bytes)) {
            notes.push(format!("served as a raw disk, but the content looks like {name}"));
        }
        Ok(Info {
            format,
            virtual_size_bytes: len_bytes,
            file_size_bytes: len_bytes,
            allocated_bytes: len_bytes,
            cluster_size_bytes: None,
            qcow2_version: None,
            compression: None,
            extended_l2: None,
            snapshots: None,
            bitmaps: None,
            clusters: None,
            notes,
        })
    }
}

/// The first `len_bytes` of the file, or all of a shorter one.
pub(super) fn read_up_to(
    file: &dyn Source,
    len_bytes: usize,
    path: &Path,
) -> Result<Vec<u8>, ImageError> {
    let mut bytes = vec![0; len_bytes];
    let mut filled = 0;
    while let Some(rest) = bytes.get_mut(filled..).filter(|rest| !rest.is_empty()) {
        match file.read_some(rest, filled as u64) {
            Ok(0) => break,
            Ok(count) => filled += count,
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
            Err(source) => return Err(ImageError::read(path, filled as u64, len_bytes, source)),
        }
    }
    bytes.truncate(filled);
    Ok(bytes)
}
