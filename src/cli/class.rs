//! `bedplate class`: storage classes.
//!
//! Why: what claims are made by can be looked at, and forgotten.
//! Never: makes a class: `bedplate apply` does.

use super::args::Global;
use super::args_volume::ClassCommand;
use super::exit::CliError;
use super::output::Output;
use super::table::Table;
use crate::control::client::Client;
use crate::control::types_volume::{Class, Classes};

pub(super) async fn run(
    command: &ClassCommand,
    global: &Global,
    output: &Output,
) -> Result<(), CliError> {
    let client = Client::new(&global.socket());
    match command {
        ClassCommand::List(_) => {
            let all: Classes = client.get("/v1/classes").await?;
            if all.classes.is_empty() && !output.json {
                output.note("no storage classes; `bedplate apply -f FILE` makes one known");
                return Ok(());
            }
            show(&all.classes, output)
        }
        ClassCommand::Get(args) => {
            show(&[client.get(&format!("/v1/classes/{}", args.name)).await?], output)
        }
        ClassCommand::Delete(args) => {
            let target = format!("/v1/classes/{}", args.name);
            let _nothing: Option<serde_json::Value> = client.delete(&target).await?;
            output.note(&format!("{} deleted", args.name));
            Ok(())
        }
    }
}

fn show(classes: &[Class], output: &Output) -> Result<(), CliError> {
    if output.json {
        return classes.iter().try_for_each(|class| output.object(class));
    }
    let mut table = Table::new(&["NAME", "IMAGE", "REPLICAS", "MIN COPIES", "SHA512", "SOURCE"]);
    let dash = || "-".to_owned();
    for class in classes {
        let clone = class.clone_of.as_ref().map(|image| format!("clone of {image}"));
        table.row(vec![
            class.name.clone(),
            class.image.clone().unwrap_or_else(dash),
            class.number_of_replicas.map_or_else(dash, |n| n.to_string()),
            class.min_copies.map_or_else(dash, |n| n.to_string()),
            class.sha512.as_ref().map_or_else(dash, |s| format!("{}…", s.get(..12).unwrap_or(s))),
            class.source.clone().or(clone).unwrap_or_else(dash),
        ]);
    }
    table.lines().iter().try_for_each(|line| output.line(line))
}
