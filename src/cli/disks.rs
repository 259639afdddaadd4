//! `bedplate disks`: the daemon's disks.
//!
//! Why: before an image is brought in, one wants to see the room.
//! Never: looks at a disk itself; the daemon does.

use super::args::Global;
use super::exit::CliError;
use super::output::Output;
use super::table::Table;
use crate::control::client::Client;
use crate::control::types::Disks;
use crate::units::human_bytes;

pub(super) async fn run(global: &Global, output: &Output) -> Result<(), CliError> {
    let client = Client::new(&global.socket());
    let all: Disks = client.get("/v1/disks").await?;
    if output.json {
        return all.disks.iter().try_for_each(|disk| output.object(disk));
    }
    let heading = ["UUID", "PATH", "SIZE", "FREE", "RESERVED", "SINK", "HEALTH", "TAGS", "MESSAGE"];
    let mut table = Table::new(&heading);
    for disk in &all.disks {
        table.row(vec![
            disk.uuid.clone(),
            disk.path.clone(),
            human_bytes(disk.total_bytes),
            human_bytes(disk.free_bytes),
            human_bytes(disk.reserved_bytes),
            disk.sink.clone(),
            if disk.healthy { "ok" } else { "fail" }.to_owned(),
            if disk.tags.is_empty() { "-".to_owned() } else { disk.tags.join(",") },
            disk.message.clone(),
        ]);
    }
    table.lines().iter().try_for_each(|line| output.line(line))
}
