//! `bedplate disks` and `bedplate disk`: the daemon's disks, and how they are steered.
//!
//! Why: before an image is brought in, one wants to see the room; and disks are replaced.
//! How: a disk may be given by the beginning of its UUID or by its path; the daemon is asked which
//! it is.
//! Never: looks at a disk itself; the daemon does.

use std::time::Duration;

use super::args::Global;
use super::args_disk::{DiskCommand, DiskSetArgs, TagList, YesNo};
use super::exit::{CliError, Exit};
use super::output::Output;
use super::table::Table;
use crate::control::client::Client;
use crate::control::types_disk::{AddDisk, ChangeDisk, Disk, Disks};
use crate::units::human_bytes;

/// How often a disk is looked at that is waited for.
const LOOK_EVERY: Duration = Duration::from_millis(200);

pub(super) async fn run(
    command: &DiskCommand,
    global: &Global,
    output: &Output,
) -> Result<(), CliError> {
    let client = Client::new(&global.socket());
    match command {
        DiskCommand::List => list(global, output).await,
        DiskCommand::Get(args) => show(&find(&client, &args.disk).await?, output),
        DiskCommand::Add(args) => {
            let path = std::path::absolute(&args.path).map_err(|e| CliError::refused(&e))?;
            let body = AddDisk { path: path.display().to_string() };
            let mut disk: Disk = client.post("/v1/disks", &body).await?;
            if !args.tag.is_empty() {
                let tags = Some(disk.tags.iter().chain(&args.tag).cloned().collect());
                let change = ChangeDisk { tags, ..ChangeDisk::default() };
                disk = client.patch(&format!("/v1/disks/{}", disk.uuid), &change).await?;
            }
            show(&disk, output)
        }
        DiskCommand::Set(args) => set(&client, args, output).await,
        DiskCommand::Remove(args) => {
            let disk = find(&client, &args.disk).await?;
            let target = format!("/v1/disks/{}?force={}", disk.uuid, args.force);
            let _nothing: Option<serde_json::Value> = client.delete(&target).await?;
            output.note(&format!("{} removed", disk.uuid));
            Ok(())
        }
    }
}

async fn set(client: &Client, args: &DiskSetArgs, output: &Output) -> Result<(), CliError> {
    let disk = find(client, &args.disk).await?;
    let change = ChangeDisk {
        schedulable: args.schedulable.map(YesNo::is_yes),
        evict: args.evict.map(YesNo::is_yes),
        tags: args.tags.as_ref().map(TagList::texts),
    };
    let target = format!("/v1/disks/{}", disk.uuid);
    let mut disk: Disk = client.patch(&target, &change).await?;
    while args.wait && disk.evicting && disk.copies > 0 {
        tokio::time::sleep(LOOK_EVERY).await;
        disk = client.get(&target).await?;
    }
    show(&disk, output)
}

/// The only disk whose UUID begins so, or whose path this is.
async fn find(client: &Client, text: &str) -> Result<Disk, CliError> {
    let all: Disks = client.get("/v1/disks").await?;
    let path = std::path::absolute(text).map(|path| path.display().to_string());
    let is_it = |disk: &Disk| {
        disk.uuid.starts_with(text) || path.as_ref().is_ok_and(|path| *path == disk.path)
    };
    let mut found = all.disks.into_iter().filter(is_it);
    match (found.next(), found.next()) {
        (Some(disk), None) => Ok(disk),
        (Some(_), Some(_)) => {
            let text = format!("{text}: more than one disk begins so");
            Err(CliError::new(Exit::Usage, text, "`bedplate disks` shows the UUIDs"))
        }
        (None, _) => {
            let text = format!("disk {text}: not found");
            Err(CliError::new(Exit::NotFound, text, "`bedplate disks` shows the disks"))
        }
    }
}

fn show(disk: &Disk, output: &Output) -> Result<(), CliError> {
    if output.json {
        return output.object(disk);
    }
    print(std::slice::from_ref(disk), output)
}

pub(super) async fn list(global: &Global, output: &Output) -> Result<(), CliError> {
    let client = Client::new(&global.socket());
    let all: Disks = client.get("/v1/disks").await?;
    if output.json {
        return all.disks.iter().try_for_each(|disk| output.object(disk));
    }
    print(&all.disks, output)
}

fn print(disks: &[Disk], output: &Output) -> Result<(), CliError> {
    let heading =
        ["UUID", "PATH", "SIZE", "FREE", "RESERVED", "COPIES", "SINK", "STATE", "TAGS", "MESSAGE"];
    let mut table = Table::new(&heading);
    for disk in disks {
        let state = match disk {
            Disk { healthy: false, .. } => "fail",
            Disk { evicting: true, .. } => "evicting",
            Disk { schedulable: false, .. } => "closed",
            Disk { .. } => "ok",
        };
        table.row(vec![
            disk.uuid.clone(),
            disk.path.clone(),
            human_bytes(disk.total_bytes),
            human_bytes(disk.free_bytes),
            human_bytes(disk.reserved_bytes),
            disk.copies.to_string(),
            disk.sink.clone(),
            state.to_owned(),
            disk.tags.iter().map(String::as_str).collect::<Vec<_>>().join(","),
            disk.message.clone(),
        ]);
    }
    table.lines().iter().try_for_each(|line| output.line(line))
}
