//! The command line: arguments to requests, answers to text.
//!
//! Why: people and scripts use one program; results are on stdout, all else on stderr, and exit
//! codes have fixed meanings ([`exit::Exit`]).
//! How: clap's definitions in [`args`] give the parser, the help, the completions and the man
//! pages; each command is a file with one function. Commands on a daemon come in by its control
//! socket, like anybody else; `run` starts a daemon in the same process and then does so too.
//! Never: reaches into a daemon, or prints a credential.
//! Start at [`main`] and [`args::Command`].

pub mod args;
pub mod args_access;
pub mod args_attach;
pub mod args_digest;
mod args_disk;
pub mod args_health;
pub mod args_steer;
pub mod args_tcp;
pub mod args_top;
pub mod args_trace;
pub mod args_upload;
pub mod args_view;
pub mod args_volume;
pub mod exit;

mod apply;
mod attach;
mod cat;
mod class;
mod completions;
mod create;
mod delete;
mod detach;
mod disks;
mod doctor;
mod events;
mod export;
mod follow;
mod get;
mod inspect;
mod list;
mod man;
mod node;
mod output;
mod progress;
mod ps;
mod pull;
mod run;
mod scrub;
mod serve;
mod settings;
mod signals;
mod sizes;
mod source;
mod steer;
mod table;
mod top;
mod trace;
mod upload;
mod volume;
mod watch;

use std::process::ExitCode;

use clap::Parser;

use args::{Cli, Command, Global};
use exit::{CliError, Exit};
use output::Output;

/// Runs the program.
#[must_use]
pub fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            // Help and version are results; a closed pipe is no failure.
            let _closed = error.print();
            let exit = if error.use_stderr() { Exit::Usage } else { Exit::Ok };
            return exit.into();
        }
    };
    let output = Output::new(&cli.global);
    match dispatch(cli, &output) {
        Ok(()) => Exit::Ok.into(),
        Err(error) => {
            output.failure(&error);
            error.exit.into()
        }
    }
}

fn dispatch(cli: Cli, output: &Output) -> Result<(), CliError> {
    let global = cli.global;
    match cli.command {
        Command::Completions(args) => return completions::run(&args, output),
        Command::Man(args) => return man::run(&args, output),
        Command::Cat(args) => return cat::run(&args, output),
        Command::Export(args) => return export::run(&args, &global, output),
        Command::Run(_)
        | Command::Pull(_)
        | Command::Inspect(_)
        | Command::Serve(_)
        | Command::Create(_)
        | Command::Upload(_)
        | Command::List(_)
        | Command::Ps(_)
        | Command::Top(_)
        | Command::Trace(_)
        | Command::Get(_)
        | Command::Delete(_)
        | Command::Attach(_)
        | Command::Detach(_)
        | Command::Volume(_)
        | Command::Apply(_)
        | Command::Class(_)
        | Command::Pause(_)
        | Command::Resume(_)
        | Command::Cancel(_)
        | Command::Cleanup(_)
        | Command::Set(_)
        | Command::Settings(_)
        | Command::Scrub(_)
        | Command::Node(_)
        | Command::Watch(_)
        | Command::Events(_)
        | Command::Disks(_)
        | Command::Disk(_)
        | Command::Doctor(_) => {}
    }
    let runtime = tokio::runtime::Runtime::new()
        .map_err(|e| CliError::new(Exit::Retry, format!("cannot start threads: {e}"), ""))?;
    let result = runtime.block_on(run_async(cli.command, &global, output));
    // A thread that is stuck in a system call must not keep the program.
    runtime.shutdown_background();
    result
}

/// The commands that need a runtime.
async fn run_async(command: Command, global: &Global, output: &Output) -> Result<(), CliError> {
    match command {
        Command::Run(args) => run::run(args, global, output).await,
        Command::Pull(args) => pull::run(&args, output).await,
        Command::Inspect(args) => inspect::run(&args, global, output).await,
        Command::Serve(args) => serve::run(&args, global, output).await,
        Command::Create(args) => create::run(&args, global, output).await,
        Command::Upload(args) => upload::run(&args, global, output).await,
        Command::List(_) => list::run(global, output).await,
        Command::Ps(_) => ps::run(global, output).await,
        Command::Top(args) => top::run(&args, global, output).await,
        Command::Trace(args) => trace::run(&args.command, global, output).await,
        Command::Get(args) => get::run(&args, global, output).await,
        Command::Delete(args) => delete::run(&args, global, output).await,
        Command::Attach(args) => attach::run(&args, global, output).await,
        Command::Detach(args) => detach::run(&args, global, output).await,
        Command::Volume(args) => volume::run(&args.command, global, output).await,
        Command::Apply(args) => apply::run(&args, global, output).await,
        Command::Class(args) => class::run(&args.command, global, output).await,
        Command::Pause(args) => steer::pause(&args, global, output).await,
        Command::Resume(args) => steer::resume(&args, global, output).await,
        Command::Cancel(args) => steer::cancel(&args, global, output).await,
        Command::Cleanup(args) => steer::clean_up(&args, global, output).await,
        Command::Set(args) => steer::set(&args, global, output).await,
        Command::Settings(args) => settings::run(&args, global, output).await,
        Command::Scrub(args) => scrub::run(&args, global, output).await,
        Command::Node(args) => node::run(&args, global, output).await,
        Command::Watch(args) => watch::run(&args, global, output).await,
        Command::Events(args) => events::run(&args, global, output).await,
        Command::Disks(_) => disks::list(global, output).await,
        Command::Disk(args) => disks::run(&args.command, global, output).await,
        Command::Doctor(args) => doctor::run(&args, global, output).await,
        Command::Completions(_) | Command::Man(_) | Command::Cat(_) | Command::Export(_) => Ok(()),
    }
}
