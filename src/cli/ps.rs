//! `bedplate ps`: the workers, one for each copy, by their names.
//!
//! Why: what is under way on which disk, and what is kept for whom, is a question about copies.
//! Never: asks once per image.

use super::args::Global;
use super::exit::CliError;
use super::follow::moment;
use super::list::tint;
use super::output::Output;
use super::table::Table;
use crate::control::client::Client;
use crate::control::types::Images;
use crate::units::human_bytes;

pub(super) async fn run(global: &Global, output: &Output) -> Result<(), CliError> {
    let client = Client::new(&global.socket());
    let all: Images = client.get("/v1/images").await?;
    let mut copies = all.images.iter().flat_map(|image| &image.copies);
    if output.json {
        return copies.try_for_each(|copy| output.object(copy));
    }
    let heading =
        ["WORKER", "STATE", "PHASE", "SHARE", "RATE", "ON DISK", "DISK", "UNUSED SINCE", "MESSAGE"];
    let mut table = Table::new(&heading);
    let mut states = Vec::new();
    let dash = || "-".to_owned();
    for copy in copies {
        states.push(copy.state.clone());
        table.row(vec![
            copy.worker.clone(),
            copy.state.clone(),
            copy.phase.clone().unwrap_or_else(dash),
            moment(copy).share().map_or_else(dash, |share| format!("{share}%")),
            match copy.rate_bytes_per_s {
                0 => dash(),
                rate => format!("{}/s", human_bytes(rate)),
            },
            copy.stored_bytes.map_or_else(dash, human_bytes),
            copy.disk.clone(),
            copy.unused_since.clone().unwrap_or_else(dash),
            copy.message.clone(),
        ]);
    }
    if states.is_empty() {
        output.note("no copies; `bedplate attach NAME` brings an image in");
        return Ok(());
    }
    for (index, line) in table.lines().iter().enumerate() {
        let state = index.checked_sub(1).and_then(|row| states.get(row));
        let shown = match state {
            // After the worker's name, which may hold the same word.
            Some(state) => line.replacen(
                &format!("  {state}"),
                &format!("  {}", output.tint(state, tint(state))),
                1,
            ),
            None => line.clone(),
        };
        output.line(&shown)?;
    }
    Ok(())
}
