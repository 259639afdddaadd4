//! `bedplate disks` and `bedplate disk`: the daemon's disks, and how they are steered.
//!
//! Why: before an image is brought in, one wants to see the room; and disks are replaced.
//! How: wherever a disk is named, it may be by the beginning of its UUID or by its path; the daemon is
//! asked which it is.
//! Never: looks at a disk itself; the daemon does.

use std::time::Duration;

use super::args::Global;
use super::args_disk::{DiskCommand, DiskSetArgs, TagList, YesNo};
use super::exit::{CliError, Exit};
use super::output::Output;
use super::table::Table;
use crate::control::client::Client;
use crate::control::types::{Image, Images};
use crate::control::types_disk::{AddDisk, ChangeDisk, Disk, Disks};
use crate::units::human_bytes;

/// How often a disk is looked at that is waited for.
const LOOK_EVERY: Duration = Duration::from_millis(200);
/// Images that are named while a disk is emptied.
const MOST_NAMES: usize = 8;

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
                let more = args.tag.iter().map(ToString::to_string);
                let tags = Some(disk.tags.iter().cloned().chain(more).collect());
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
    let mut told = String::new();
    while args.wait && disk.evicting && disk.copies > 0 {
        let left = left_on(client, &disk.uuid).await?;
        if left != told {
            output.note(&format!("still on it: {left}"));
            told = left;
        }
        tokio::time::sleep(LOOK_EVERY).await;
        disk = client.get(&target).await?;
    }
    show(&disk, output)
}

/// The images with a copy on this disk, and who holds them there, in words.
async fn left_on(client: &Client, uuid: &str) -> Result<String, CliError> {
    let all: Images = client.get("/v1/images").await?;
    let on_it = |image: &&Image| image.copies.iter().any(|copy| copy.disk == uuid);
    let mut names: Vec<String> = Vec::new();
    for image in all.images.iter().filter(on_it) {
        names.push(match image.attachments {
            0 => image.name.clone(),
            readers => format!("{} (readers: {readers})", image.name),
        });
    }
    let more = names.len().saturating_sub(MOST_NAMES);
    names.truncate(MOST_NAMES);
    let more = if more > 0 { format!(" and {more} more") } else { String::new() };
    Ok(format!("{}{more}", names.join(", ")))
}

/// The UUIDs of disks as a person names them.
///
/// # Errors
/// One of them is none of the daemon's disks, or may be several.
pub(super) async fn uuids(client: &Client, texts: &[String]) -> Result<Vec<String>, CliError> {
    let mut uuids = Vec::new();
    for text in texts {
        uuids.push(find(client, text).await?.uuid);
    }
    Ok(uuids)
}

/// As [`uuids`], of one that may be left to the daemon.
///
/// # Errors
/// As [`uuids`].
pub(super) async fn uuid(
    client: &Client,
    text: Option<&String>,
) -> Result<Option<String>, CliError> {
    let Some(text) = text else { return Ok(None) };
    Ok(Some(find(client, text).await?.uuid))
}

/// The only disk whose UUID begins so, or whose path this is.
async fn find(client: &Client, text: &str) -> Result<Disk, CliError> {
    if text.is_empty() {
        // A variable that is not set must not be the only disk.
        let hint = "give its UUID, the beginning of it, or its path; `bedplate disks` shows them";
        return Err(CliError::new(Exit::Usage, "the disk's name is empty", hint));
    }
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
