//! `bedplate delete`: an image and its copies.
//!
//! Why: when it returns, the files are gone and the name is free.
//! Never: takes an image away from its readers: the daemon refuses.

use super::args::{DeleteArgs, Global};
use super::exit::CliError;
use super::output::Output;
use crate::control::client::Client;
use crate::control::types::{Health, Image};

pub(super) async fn run(
    args: &DeleteArgs,
    global: &Global,
    output: &Output,
) -> Result<(), CliError> {
    let client = Client::new(&global.socket());
    let answer: Option<Image> = client.delete(&format!("/v1/images/{}", args.name)).await?;
    if answer.is_some() && !args.no_wait {
        until_gone(&client, args.name.as_str()).await?;
    }
    output.note(&match answer.is_some() && args.no_wait {
        true => format!("{} is being deleted", args.name),
        false => format!("{} deleted", args.name),
    });
    Ok(())
}

/// Waits for the image's last event.
pub(super) async fn until_gone(client: &Client, name: &str) -> Result<(), CliError> {
    loop {
        let mut events = client.events(Some(name)).await?;
        let mut seen = false;
        while let Some(event) = events.next().await? {
            match event.kind.as_str() {
                "image.snapshot" => seen = true,
                "image.deleted" => return Ok(()),
                "snapshot.end" if !seen => return Ok(()),
                "lagged" => break,
                _ => {}
            }
        }
        let _alive: Health = client.get("/healthz").await?;
    }
}
