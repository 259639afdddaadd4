//! `bedplate cat`: a view's bytes to stdout.
//!
//! Why: what a guest reads can be piped into any tool, without a daemon or a socket.
//! Never: holds more than one block, whatever the image's size.

use std::path::Path;

use super::args_view::{CatArgs, ViewArgs};
use super::exit::{CliError, Exit};
use super::output::Output;
use crate::disk::Sealed;
use crate::image::{Class, Opening, View};
use crate::units::{GuestOffset, MIB};

/// Bytes that are read and written at a time.
const BLOCK: u64 = MIB;

pub(super) fn run(args: &CatArgs, output: &Output) -> Result<(), CliError> {
    let view = open(&args.file, &args.view)?;
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

/// Opens the view of a file that a person names, over the backing files that are named too.
pub(super) fn open(path: &Path, args: &ViewArgs) -> Result<View, CliError> {
    let mut base = None;
    for file in args.base.iter().rev() {
        let opening = Opening { base: base.as_ref(), ..Opening::default() };
        base = Some(open_as(file, opening)?);
    }
    open_as(
        path,
        Opening {
            declared: args.format.map(Into::into),
            snapshot: args.snapshot.as_deref(),
            base: base.as_ref(),
            data: args.data_file.as_deref().map(sealed).transpose()?,
            cache: None,
        },
    )
}

fn open_as(path: &Path, opening: Opening<'_>) -> Result<View, CliError> {
    View::open_as(sealed(path)?, opening).map_err(|e| {
        let lacks_base = e.is_for_want_of_a_base();
        let error = match e.class() {
            Class::Retry => CliError::retry(&e),
            Class::Refuse | Class::Bug => CliError::refused(&e),
        };
        match lacks_base {
            true => CliError { hint: "give the backing file with --base".to_owned(), ..error },
            false => error,
        }
    })
}

fn sealed(path: &Path) -> Result<Sealed, CliError> {
    if let Err(error) = std::fs::metadata(path)
        && error.kind() == std::io::ErrorKind::NotFound
    {
        let text = format!("{}: no such file", path.display());
        return Err(CliError::new(Exit::NotFound, text, ""));
    }
    Sealed::open_path(path).map_err(|e| CliError::refused(&e))
}
