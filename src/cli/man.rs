//! `bedplate man`: manual pages, from the same definitions as the parser.
//!
//! Why: packages ship manual pages; written by hand they would be out of date.
//! Never: describes what `--help` doesn't.

use std::path::Path;

use clap::CommandFactory;

use super::args::{Cli, ManArgs};
use super::exit::CliError;
use super::output::Output;

pub(super) fn run(args: &ManArgs, output: &Output) -> Result<(), CliError> {
    let command = Cli::command();
    let Some(dir) = &args.dir else {
        return output.bytes(&page(command)?);
    };
    std::fs::create_dir_all(dir).map_err(|e| failed(dir, &e))?;
    for (name, command) in pages("bedplate", command) {
        let path = dir.join(format!("{name}.1"));
        std::fs::write(&path, page(command)?).map_err(|e| failed(&path, &e))?;
    }
    Ok(())
}

/// A page for a command and, as its page names them, for each of those beneath it.
fn pages(name: &str, command: clap::Command) -> Vec<(String, clap::Command)> {
    let beneath: Vec<_> = command.get_subcommands().cloned().collect();
    // Clap wants 'static names for pages; some short ones live until the end anyway.
    let title: &'static str = Box::leak(name.to_owned().into_boxed_str());
    let version = env!("CARGO_PKG_VERSION");
    let command = command.name(title).version(version).disable_help_subcommand(true);
    let mut all = vec![(name.to_owned(), command)];
    all.extend(beneath.into_iter().flat_map(|command| {
        let name = format!("{name}-{}", command.get_name());
        pages(&name, command)
    }));
    all
}

fn page(command: clap::Command) -> Result<Vec<u8>, CliError> {
    let mut text = Vec::new();
    clap_mangen::Man::new(command).render(&mut text).map_err(|e| CliError::refused(&e))?;
    Ok(text)
}

fn failed(path: &Path, error: &std::io::Error) -> CliError {
    CliError::new(super::exit::Exit::Refused, format!("{}: {error}", path.display()), "")
}
