//! `bedplate events`: what has happened, or happens, a line each.
//!
//! Why: who comes after a fault sees what led to it; who watches sees what goes on, and a script gets the
//! events as they are.
//! Never: goes on after events were lost without saying so.

use super::args::{EventsArgs, Global};
use super::exit::{CliError, Exit};
use super::follow::object;
use super::get;
use super::output::{Output, printable};
use crate::control::client::Client;
use crate::control::types::{Attachment, Event, Image};

pub(super) async fn run(
    args: &EventsArgs,
    global: &Global,
    output: &Output,
) -> Result<(), CliError> {
    let client = Client::new(&global.socket());
    let image = args.image.as_ref().map(|name| name.as_str());
    let mut events = match args.watch {
        true => client.events(image).await?,
        false => client.past_events(image).await?,
    };
    while let Some(event) = events.next().await? {
        if !args.watch && event.at.is_none() {
            // What is now: all that came before has been told.
            return Ok(());
        }
        if output.json {
            output.object(&event)?;
        } else {
            output.line(&printable(&describe(&event)?))?;
        }
        if event.kind == "lagged" {
            let hint = "run it again: it begins with everything as it is";
            return Err(CliError::new(Exit::Retry, "events were lost: too slow", hint));
        }
    }
    Err(CliError::new(Exit::Retry, "the daemon has ended", ""))
}

/// An event for people.
fn describe(event: &Event) -> Result<String, CliError> {
    let text = match event.kind.as_str() {
        "image.snapshot" | "image.created" | "image.updated" | "image.progress" => {
            let image: Image = object(event)?;
            let failed = image.copies.iter().find(|c| !c.message.is_empty());
            let why = failed.map(|c| format!("  {}", c.message)).unwrap_or_default();
            format!("{}  {}{why}", image.name, get::state(&image))
        }
        "attachment.snapshot" | "attachment.created" | "attachment.updated" => {
            let held: Attachment = object(event)?;
            let reader =
                if held.reader.is_empty() { String::new() } else { format!(" ({})", held.reader) };
            format!("{}  {}{reader}  {}", held.id, held.image, held.state)
        }
        "image.warning" => {
            let field = |key| event.object.get(key).and_then(|v| v.as_str()).unwrap_or_default();
            format!("{}  {}", field("name"), field("message"))
        }
        _ => {
            let field = |key| event.object.get(key).and_then(|v| v.as_str()).unwrap_or_default();
            [field("id"), field("image"), field("name")].join(" ").trim().to_owned()
        }
    };
    let at = event.at.as_deref().map(|at| format!("{at}  ")).unwrap_or_default();
    Ok(format!("{at}{:<20}  {text}", event.kind).trim_end().to_owned())
}
