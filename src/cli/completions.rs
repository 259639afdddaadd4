//! `bedplate completions`: for a shell, from the same definitions as the parser.
//!
//! Why: a shell that completes a word that the parser refuses is worse than none.
//! Never: lists a word of its own.

use clap::CommandFactory;

use super::args::{Cli, CompletionsArgs};
use super::exit::CliError;
use super::output::Output;

pub(super) fn run(args: &CompletionsArgs, output: &Output) -> Result<(), CliError> {
    let mut text = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "bedplate", &mut text);
    output.bytes(&text)
}
