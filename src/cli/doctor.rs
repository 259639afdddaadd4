//! `bedplate doctor`: is everything as it should be, and if not, what to do.
//!
//! Why: most trouble can be named before it happens, also when the daemon won't start.
//! Never: changes anything.

use super::args::{DoctorArgs, Global, default_data_dir};
use super::exit::{CliError, Exit};
use super::list::tint;
use super::output::{Output, printable};
use crate::control::client::{Client, ClientError};
use crate::control::types::{Check, Doctor, Level};
use crate::daemon::doctor;

pub(super) async fn run(
    args: &DoctorArgs,
    global: &Global,
    output: &Output,
) -> Result<(), CliError> {
    let checks = collect(args, global).await;
    for check in &checks {
        if output.json {
            output.object(check)?;
            continue;
        }
        let word = match check.level {
            Level::Ok => "ok",
            Level::Warn => "warn",
            Level::Fail => "fail",
        };
        let padding = " ".repeat(4 - word.len());
        let word = output.tint(word, tint(word));
        let text = printable(&format!("{}: {}", check.name, check.message));
        output.line(&format!("{word}{padding}  {text}"))?;
        if !check.hint.is_empty() {
            output.line(&format!("      {}", printable(&check.hint)))?;
        }
    }
    if checks.iter().any(|c| c.level == Level::Fail) {
        return Err(CliError::new(Exit::Refused, "something fails; see above", ""));
    }
    Ok(())
}

/// The daemon's own checks, or without one those that this process can make.
async fn collect(args: &DoctorArgs, global: &Global) -> Vec<Check> {
    let socket = global.socket();
    let result: Result<Doctor, ClientError> = Client::new(&socket).get("/v1/doctor").await;
    let mut checks = match &result {
        Ok(answer) if args.disk.is_empty() => answer.checks.clone(),
        Ok(_) | Err(_) if !args.disk.is_empty() => doctor::of_host(&args.disk),
        Ok(_) | Err(_) => {
            let data = default_data_dir();
            let there = data.is_dir().then_some(data);
            doctor::of_host(there.as_slice())
        }
    };
    if let Err(error) = result {
        let is_gone = matches!(error, ClientError::NoDaemon { .. });
        let CliError { message, hint, .. } = CliError::from(error);
        let (level, hint) = match is_gone {
            true => (Level::Warn, "start one with `bedplate serve`, or give --socket".to_owned()),
            false if hint.is_empty() => (Level::Fail, "see the daemon's log".to_owned()),
            false => (Level::Fail, hint),
        };
        checks.push(Check { name: "daemon".into(), level, message, hint });
    }
    checks
}
