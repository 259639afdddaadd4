//! SOURCE as people type it: a URL, a path, or `-` for a URL on stdin.
//!
//! Why: a URL with a password on the command line is in every process list; stdin isn't.
//! Never: repeats a URL in an error, or starts with a file that isn't there.
//! Start at [`parse`].

use std::io::BufRead;
use std::path::Path;

use super::exit::{CliError, Exit};
use crate::fetch::SourceUrl;

/// Resolves `text`; a file on this node must be there. Errors don't repeat a URL.
pub(super) fn parse(text: &str) -> Result<SourceUrl, CliError> {
    if text == "-" {
        let mut line = String::new();
        let mut input = std::io::Read::take(std::io::stdin().lock(), 16_384);
        input.read_line(&mut line).map_err(|e| CliError::refused(&e))?;
        return if line.trim() == "-" { parse("") } else { parse(line.trim()) };
    }
    if text.is_empty() {
        let hint = "give a URL, or the path of an image file";
        return Err(CliError::new(Exit::Usage, "the source is empty", hint));
    }
    if text.contains("://") {
        let url = url(text)?;
        if let Some(path) = url.file_path() {
            check_file(&path)?;
        }
        return Ok(url);
    }
    let path = std::path::absolute(text)
        .map_err(|e| CliError::new(Exit::Usage, format!("{text}: {e}"), ""))?;
    check_file(&path)?;
    SourceUrl::from_file_path(&path)
        .ok_or_else(|| CliError::new(Exit::Usage, format!("{text}: not a usable path"), ""))
}

pub(super) fn url(text: &str) -> Result<SourceUrl, CliError> {
    SourceUrl::parse(text).map_err(|e| CliError::new(Exit::Usage, e.to_string(), ""))
}

fn check_file(path: &Path) -> Result<(), CliError> {
    let text = path.display();
    match std::fs::metadata(path) {
        Ok(meta) if meta.is_file() => Ok(()),
        Ok(_) => {
            let hint = "give the path of an image file";
            Err(CliError::new(Exit::Refused, format!("{text}: not a regular file"), hint))
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            let hint = "give the path of an image file, or a URL with http:// or https://";
            Err(CliError::new(Exit::NotFound, format!("{text}: no such file"), hint))
        }
        Err(error) => Err(CliError::new(Exit::Refused, format!("{text}: {error}"), "")),
    }
}
