//! `bedplate apply`: manifests that users of Kubernetes and Longhorn have.
//!
//! Why: a StorageClass and a claim say all that is needed; nobody should write it twice.
//! Never: reads YAML itself: the daemon does, so that `curl` can do the same.

use std::io::Read;
use std::path::Path;

use super::args::Global;
use super::args_volume::ApplyArgs;
use super::exit::{CliError, Exit};
use super::output::Output;
use crate::control::client::Client;
use crate::control::types_volume::Applied;

/// Longest manifest, in bytes: what the daemon takes.
const MAX_LEN: u64 = 1 << 20;

pub(super) async fn run(
    args: &ApplyArgs,
    global: &Global,
    output: &Output,
) -> Result<(), CliError> {
    let text = read(&args.file)?;
    let client = Client::new(&global.socket());
    let applied: Applied = client.post_text("/v1/apply", text).await?;
    for document in &applied.documents {
        for note in &document.notes {
            let (kind, name) = (&document.kind, &document.name);
            output.note(&format!("{kind} {name} (line {}): {note}", document.line));
        }
        if output.json {
            output.object(document)?;
        } else {
            output.line(&format!("{} {} {}", document.kind, document.name, document.action))?;
        }
    }
    Ok(())
}

fn read(path: &Path) -> Result<String, CliError> {
    let name = path.display();
    let failed = |e: std::io::Error| {
        let missing = e.kind() == std::io::ErrorKind::NotFound;
        let exit = if missing { Exit::NotFound } else { Exit::Refused };
        CliError::new(exit, format!("{name}: {e}"), "")
    };
    let mut text = String::new();
    let length = match path.to_str() {
        Some("-") => std::io::stdin().lock().take(MAX_LEN + 1).read_to_string(&mut text),
        Some(_) | None => {
            std::fs::File::open(path).map_err(failed)?.take(MAX_LEN + 1).read_to_string(&mut text)
        }
    };
    if length.map_err(failed)? as u64 > MAX_LEN {
        let text = format!("{name}: more than {MAX_LEN} bytes");
        return Err(CliError::new(Exit::Refused, text, "apply it in parts"));
    }
    Ok(text)
}
