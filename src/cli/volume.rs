//! `bedplate volume`: what replicas stand on.
//!
//! Why: whoever runs replicas asks for a volume, and wants to know which file each of them reads,
//! or why it waits.
//! Never: chooses disks or judges a backup: the daemon does.

use std::io::Read;

use super::args::Global;
use super::args_volume::{
    ReplicaArgs, VolumeAttachArgs, VolumeCommand, VolumeCreateArgs, VolumeRestoreArgs,
};
use super::disks;
use super::exit::{CliError, Exit};
use super::follow::{self, OnFailure};
use super::list::tint;
use super::output::Output;
use super::source;
use super::table::Table;
use crate::control::client::Client;
use crate::control::types_volume::{CreateVolume, Replica, Volume, Volumes};
use crate::names::VolumeName;
use crate::units::human_bytes;

/// Longest volume.cfg that is read, in bytes.
const MAX_BACKUP_LEN: u64 = 256 << 10;

pub(super) async fn run(
    command: &VolumeCommand,
    global: &Global,
    output: &Output,
) -> Result<(), CliError> {
    let client = Client::new(&global.socket());
    match command {
        VolumeCommand::Create(args) => create(args, &client, output).await,
        VolumeCommand::Restore(args) => restore(args, &client, output).await,
        VolumeCommand::List(_) => list(&client, output).await,
        VolumeCommand::Get(args) => show(&client.get(&at(&args.name, "")).await?, output),
        VolumeCommand::Attach(args) => attach(args, &client, output).await,
        VolumeCommand::Detach(args) => {
            let volume: Volume = client.post(&at(&args.name, "/detach"), &Nothing {}).await?;
            show(&volume, output)
        }
        VolumeCommand::Delete(args) => {
            let _nothing: Option<serde_json::Value> = client.delete(&at(&args.name, "")).await?;
            output.note(&format!("{} deleted", args.name));
            Ok(())
        }
    }
}

/// The body of a request that needs none.
#[derive(serde::Serialize)]
struct Nothing {}

fn at(name: &VolumeName, rest: &str) -> String {
    format!("/v1/volumes/{name}{rest}")
}

async fn create(args: &VolumeCreateArgs, client: &Client, output: &Output) -> Result<(), CliError> {
    let mut body = request(&args.name, &args.replicas, client).await?;
    body.image = Some(args.image.to_string());
    body.sha512.clone_from(&args.sha512);
    show(&client.post("/v1/volumes", &body).await?, output)
}

async fn restore(
    args: &VolumeRestoreArgs,
    client: &Client,
    output: &Output,
) -> Result<(), CliError> {
    let mut body = request(&args.name, &args.replicas, client).await?;
    body.image = args.image.as_ref().map(ToString::to_string);
    body.backup = Some(backup(&args.backup)?);
    body.force = args.force;
    show(&client.post("/v1/volumes", &body).await?, output)
}

async fn request(
    name: &VolumeName,
    replicas: &ReplicaArgs,
    client: &Client,
) -> Result<CreateVolume, CliError> {
    let url = replicas.url.as_deref().map(source::parse).transpose()?;
    Ok(CreateVolume {
        name: name.to_string(),
        url: url.map(|url| url.expose().to_string()),
        disks: disks::uuids(client, &replicas.disk).await?,
        replicas: replicas.replicas,
        size_bytes: replicas.size,
        ..CreateVolume::default()
    })
}

/// A `volume.cfg`: the JSON itself, a file, or standard input.
fn backup(text: &str) -> Result<serde_json::Value, CliError> {
    let json = match text {
        json if json.trim_start().starts_with('{') => json.to_owned(),
        "-" => read(std::io::stdin().lock(), "standard input")?,
        path => {
            let file = std::fs::File::open(path).map_err(|e| {
                let missing = e.kind() == std::io::ErrorKind::NotFound;
                let exit = if missing { Exit::NotFound } else { Exit::Refused };
                CliError::new(exit, format!("{path}: {e}"), "give the volume.cfg of a backup")
            })?;
            read(file, path)?
        }
    };
    serde_json::from_str(&json).map_err(|e| {
        let hint = "give the volume.cfg of a backup volume, which is JSON";
        CliError::new(Exit::Usage, format!("--backup does not read: {e}"), hint)
    })
}

fn read(from: impl Read, name: &str) -> Result<String, CliError> {
    let mut text = String::new();
    let failed = |e: std::io::Error| CliError::new(Exit::Refused, format!("{name}: {e}"), "");
    from.take(MAX_BACKUP_LEN + 1).read_to_string(&mut text).map_err(failed)?;
    if text.len() as u64 > MAX_BACKUP_LEN {
        let text = format!("{name}: more than {MAX_BACKUP_LEN} bytes: no volume.cfg");
        return Err(CliError::new(Exit::Refused, text, ""));
    }
    Ok(text)
}

async fn list(client: &Client, output: &Output) -> Result<(), CliError> {
    let all: Volumes = client.get("/v1/volumes").await?;
    if output.json {
        return all.volumes.iter().try_for_each(|volume| output.object(volume));
    }
    if all.volumes.is_empty() {
        output.note("no volumes; `bedplate volume create NAME --image IMAGE` makes one known");
        return Ok(());
    }
    let heading = ["NAME", "IMAGE", "STATE", "ROBUSTNESS", "REPLICAS", "SIZE", "CLASS"];
    let mut table = Table::new(&heading);
    let dash = || "-".to_owned();
    for volume in &all.volumes {
        let running = volume.replicas.iter().filter(|r| r.state == "running").count();
        table.row(vec![
            volume.name.clone(),
            volume.image.clone(),
            volume.state.clone(),
            volume.robustness.clone(),
            format!("{running}/{}", volume.replicas.len()),
            volume.size_bytes.map_or_else(dash, human_bytes),
            volume.class.clone().unwrap_or_else(dash),
        ]);
    }
    table.lines().iter().try_for_each(|line| output.line(line))
}

/// Waits until every replica runs.
async fn attach(args: &VolumeAttachArgs, client: &Client, output: &Output) -> Result<(), CliError> {
    let mut volume: Volume = client.post(&at(&args.name, "/attach"), &Nothing {}).await?;
    if !args.no_wait {
        for replica in volume.replicas.clone() {
            let disk = Some(replica.disk.as_str());
            follow::until_ready(client, &volume.image, disk, OnFailure::Wait, output).await?;
        }
        volume = client.get(&at(&args.name, "")).await?;
    }
    show(&volume, output)
}

fn show(volume: &Volume, output: &Output) -> Result<(), CliError> {
    if output.json {
        return output.object(volume);
    }
    let mut parts = vec![volume.name.clone(), volume.image.clone(), volume.state.clone()];
    if volume.robustness != "unknown" {
        parts.push(volume.robustness.clone());
    }
    parts.extend(volume.size_bytes.map(human_bytes));
    parts.extend(volume.class.as_ref().map(|class| format!("class {class}")));
    if let Some(backup) = &volume.backup {
        parts.push(format!("from backup {} of {}", backup.backup, backup.volume));
    }
    output.line(&parts.join("  "))?;
    if !volume.message.is_empty() {
        output.note(&volume.message);
    }
    volume.replicas.iter().try_for_each(|replica| show_replica(replica, output))
}

fn show_replica(replica: &Replica, output: &Output) -> Result<(), CliError> {
    let state = output.tint(&replica.state, tint(&replica.state));
    let mut parts = vec![format!("  {}", replica.name), format!("disk {}", replica.disk), state];
    parts.extend(replica.path.clone());
    let waiting = replica.conditions.iter().filter(|condition| condition.status == "True");
    parts.extend(waiting.map(|c| format!("{} ({}): {}", c.kind, c.reason, c.message)));
    output.line(&parts.join("  "))
}
