//! `bedplate list`: all images.
//!
//! Why: the first question is what is there.
//! Never: asks once per image.

use super::args::Global;
use super::exit::CliError;
use super::get::{origin, state};
use super::output::{Output, Tint};
use super::table::Table;
use crate::control::client::Client;
use crate::control::types::Images;
use crate::units::human_bytes;

pub(super) async fn run(global: &Global, output: &Output) -> Result<(), CliError> {
    let client = Client::new(&global.socket());
    let all: Images = client.get("/v1/images").await?;
    if output.json {
        return all.images.iter().try_for_each(|image| output.object(image));
    }
    if all.images.is_empty() {
        output.note("no images; `bedplate create URL` makes one known");
        return Ok(());
    }
    let heading = ["NAME", "STATE", "FORMAT", "VIRTUAL", "ON DISK", "COPIES", "READERS", "SOURCE"];
    let mut table = Table::new(&heading);
    let size = |bytes: Option<u64>| bytes.map_or_else(|| "-".to_owned(), human_bytes);
    for image in &all.images {
        table.row(vec![
            image.name.clone(),
            state(image),
            image.format.clone().unwrap_or_else(|| "-".to_owned()),
            size(image.virtual_size_bytes),
            size(image.stored_bytes),
            image.copies.len().to_string(),
            image.attachments.to_string(),
            origin(image),
        ]);
    }
    for (index, line) in table.lines().iter().enumerate() {
        let state = index.checked_sub(1).and_then(|i| all.images.get(i)).map(state);
        let line = match state {
            Some(state) => line.replacen(&state, &output.tint(&state, tint(&state)), 1),
            None => line.clone(),
        };
        output.line(&line)?;
    }
    Ok(())
}

/// How good a state is.
pub(super) fn tint(state: &str) -> Tint {
    match state {
        "ready" | "running" | "ok" => Tint::Good,
        "unknown" | "fail" => Tint::Bad,
        other if other.starts_with("failed") => Tint::Bad,
        _ => Tint::Busy,
    }
}
