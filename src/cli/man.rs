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
    let mut pages = vec![("bedplate.1".to_owned(), command.clone())];
    for sub in command.get_subcommands() {
        let name = format!("bedplate-{}", sub.get_name());
        // Clap wants 'static names for pages; a handful of short ones live until the end anyway.
        let title: &'static str = Box::leak(name.clone().into_boxed_str());
        pages.push((
            format!("{name}.1"),
            sub.clone().name(title).version(env!("CARGO_PKG_VERSION")),
        ));
    }
    for (file, command) in pages {
        let path = dir.join(file);
        std::fs::write(&path, page(command)?).map_err(|e| failed(&path, &e))?;
    }
    Ok(())
}

fn page(command: clap::Command) -> Result<Vec<u8>, CliError> {
    let mut text = Vec::new();
    clap_mangen::Man::new(command).render(&mut text).map_err(|e| CliError::refused(&e))?;
    Ok(text)
}

fn failed(path: &Path, error: &std::io::Error) -> CliError {
    CliError::new(super::exit::Exit::Refused, format!("{}: {error}", path.display()), "")
}
