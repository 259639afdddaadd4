//! `bedplate cat`: a view's bytes to stdout.
//!
//! Why: what a guest reads can be piped into any tool, without a daemon or a socket.
//! Never: holds more than one block, whatever the image's size.

use std::path::Path;

use super::args::{CatArgs, FormatArg};
use super::exit::{CliError, Exit};
use super::output::Output;
use crate::disk::Sealed;
use crate::image::{Class, View};
use crate::units::{GuestOffset, MIB};

/// Bytes that are read and written at a time.
const BLOCK: u64 = MIB;

pub(super) fn run(args: &CatArgs, output: &Output) -> Result<(), CliError> {
    let view = open(&args.file, args.format)?;
    let size = view.size_bytes();
    if args.offset > size {
        let text = format!(
            "{}: offset {} is past the end; the disk has {size} bytes",
            args.file.display(),
            args.offset
        );
        return Err(CliError::new(Exit::Refused, text, ""));
    }
    let end = args.length.map_or(size, |len| args.offset.saturating_add(len).min(size));
    let mut buffer = vec![0; usize::try_from(BLOCK).unwrap_or(1)];
    let mut at = args.offset;
    while at < end {
        let len = usize::try_from((end - at).min(BLOCK)).unwrap_or(buffer.len());
        let (block, _) = buffer.split_at_mut(len);
        view.read_at(block, GuestOffset(at)).map_err(|e| CliError::refused(&e))?;
        output.bytes(block)?;
        at += len as u64;
    }
    Ok(())
}

/// Opens the view of a file that a person names.
pub(super) fn open(path: &Path, format: Option<FormatArg>) -> Result<View, CliError> {
    if let Err(error) = std::fs::metadata(path)
        && error.kind() == std::io::ErrorKind::NotFound
    {
        let text = format!("{}: no such file", path.display());
        return Err(CliError::new(Exit::NotFound, text, ""));
    }
    let sealed = Sealed::open_path(path).map_err(|e| CliError::refused(&e))?;
    View::open(sealed, format.map(Into::into)).map_err(|e| match e.class() {
        Class::Retry => CliError::retry(&e),
        Class::Refuse | Class::Bug => CliError::refused(&e),
    })
}
