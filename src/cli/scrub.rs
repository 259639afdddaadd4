//! `bedplate scrub`: reads an image's copies against their digests now.
//!
//! Why: after trouble with a disk nobody wants to wait for the next round.
//! How: the daemon does it; with `--wait`, the event stream tells when it is done.
//! Never: polls.

use super::args::Global;
use super::args_health::ScrubArgs;
use super::disks;
use super::exit::{CliError, Exit};
use super::follow::object;
use super::output::Output;
use super::table::Table;
use crate::control::client::Client;
use crate::control::types::{Copy, Image};
use crate::control::types_health::ScrubImage;

pub(super) async fn run(
    args: &ScrubArgs,
    global: &Global,
    output: &Output,
) -> Result<(), CliError> {
    let client = Client::new(&global.socket());
    let body = ScrubImage { disk: disks::uuid(&client, args.disk.as_ref()).await? };
    let image: Image = client.post(&format!("/v1/images/{}/scrub", args.name), &body).await?;
    if !args.wait {
        return match output.json {
            true => output.object(&image),
            false => {
                output.note(&format!(
                    "{}: being read; `bedplate get` shows what is found",
                    args.name
                ));
                Ok(())
            }
        };
    }
    let scrubbed: Vec<&str> =
        image.copies.iter().filter(|copy| copy.scrubbing).map(|copy| copy.disk.as_str()).collect();
    let image = until_done(&client, args.name.as_str(), &scrubbed).await?;
    show(&image, &scrubbed, output)
}

fn among<'a>(image: &'a Image, disks: &'a [&str]) -> impl Iterator<Item = &'a Copy> {
    image.copies.iter().filter(|copy| disks.contains(&copy.disk.as_str()))
}

/// Waits until none of the copies on `disks` is being read any more.
async fn until_done(client: &Client, name: &str, disks: &[&str]) -> Result<Image, CliError> {
    loop {
        let mut events = client.events(Some(name)).await?;
        let mut seen = false;
        while let Some(event) = events.next().await? {
            match event.kind.as_str() {
                "lagged" => break,
                "image.snapshot" | "image.updated" | "image.progress" => {
                    seen = true;
                    let image: Image = object(&event)?;
                    if among(&image, disks).all(|copy| !copy.scrubbing) {
                        return Ok(image);
                    }
                }
                "snapshot.end" | "image.deleted" if !seen || event.kind == "image.deleted" => {
                    return Err(CliError::new(
                        Exit::NotFound,
                        format!("image {name}: deleted"),
                        "",
                    ));
                }
                _ => {}
            }
        }
        // The stream ends when the daemon does; asking again tells which it was.
        let _alive: crate::control::types::Health = client.get("/healthz").await?;
    }
}

fn show(image: &Image, disks: &[&str], output: &Output) -> Result<(), CliError> {
    let mut table = Table::new(&["DISK", "RESULT", "MESSAGE"]);
    let mut trouble = None;
    for copy in among(image, disks) {
        let Some(scrub) = &copy.scrub else { continue };
        table.row(vec![copy.disk.clone(), scrub.result.clone(), scrub.message.clone()]);
        if !matches!(scrub.result.as_str(), "good" | "repaired") {
            trouble.get_or_insert_with(|| scrub.message.clone());
        }
    }
    match output.json {
        true => output.object(image)?,
        false => table.lines().iter().try_for_each(|line| output.line(line))?,
    }
    let hint = "readers get another copy, or an error; fetch it again once its source is there";
    trouble.map_or(Ok(()), |message| Err(CliError::new(Exit::Refused, message, hint)))
}
