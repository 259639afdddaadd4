//! Exit codes, in one table, and the errors that carry them.
//!
//! Why: a script decides by the code whether to try again, and a person by the hint what to do.
//! Never: gives a code that isn't in the table.
//! Start at [`Exit`].

use std::fmt;

use crate::control::client::ClientError;

/// How the program ended. The table is part of `--help`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// Done.
    Ok,
    /// Refused or failed for good.
    Refused,
    /// The command line, or a value in it, is wrong.
    Usage,
    /// A fault that may pass: the network, a full disk, something in use, no daemon.
    Retry,
    /// What was named isn't there.
    NotFound,
    /// A signal ended it before it was done.
    Interrupted,
}

impl Exit {
    /// Every code with what it means, as `--help` shows it.
    pub const TABLE: [(Self, &'static str); 6] = [
        (Self::Ok, "done"),
        (Self::Refused, "refused, or failed for good: trying again cannot help"),
        (Self::Usage, "the command line, or a value in it, is wrong"),
        (Self::Retry, "may pass: network, full disk, in use, no daemon; try again"),
        (Self::NotFound, "the image, disk, attachment or file is not there"),
        (Self::Interrupted, "a signal ended it before it was done; run it again to resume"),
    ];

    /// The number.
    #[must_use]
    pub fn code(self) -> u8 {
        match self {
            Self::Ok => 0,
            Self::Refused => 1,
            Self::Usage => 2,
            Self::Retry => 3,
            Self::NotFound => 4,
            Self::Interrupted => 130,
        }
    }
}

impl From<Exit> for std::process::ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit.code())
    }
}

/// Why a command failed: code, message, hint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CliError {
    /// How the program ends.
    pub exit: Exit,
    /// What and where; empty says nothing (a closed pipe).
    pub message: String,
    /// What to do; may be empty.
    pub hint: String,
}

impl CliError {
    /// An error with its exit code, message and hint.
    pub fn new(exit: Exit, message: impl Into<String>, hint: impl Into<String>) -> Self {
        Self { exit, message: message.into(), hint: hint.into() }
    }

    /// The end of an output that nobody reads any more: no failure.
    #[must_use]
    pub fn closed_pipe() -> Self {
        Self::new(Exit::Ok, "", "")
    }

    /// An error with its causes, for good.
    #[must_use]
    pub fn refused(error: &(dyn std::error::Error + 'static)) -> Self {
        Self::new(Exit::Refused, crate::fetch::one_line(error), "")
    }

    /// An error with its causes, that may pass.
    #[must_use]
    pub fn retry(error: &(dyn std::error::Error + 'static)) -> Self {
        Self::new(Exit::Retry, crate::fetch::one_line(error), "")
    }
}

impl fmt::Display for CliError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

/// Who may use a control socket.
const NOT_ALLOWED: &str = "be root or the daemon's user, or have control_uids or control_gids of its \
                           configuration name you";

impl From<ClientError> for CliError {
    fn from(error: ClientError) -> Self {
        let exit = match &error {
            ClientError::NoDaemon { .. } | ClientError::Broken { .. } => Exit::Retry,
            ClientError::Connect { .. } | ClientError::Garbled { .. } => Exit::Refused,
            ClientError::Refused { problem, .. } => match problem.code.as_str() {
                "bad-request" => Exit::Usage,
                "not-found" => Exit::NotFound,
                "in-use" | "deleting" | "no-room" | "shutting-down" | "timeout" | "catalog"
                | "internal" | "busy" | "stopped" | "not-waiting" | "not-ready"
                | "wrong-offset" => Exit::Retry,
                _ => Exit::Refused,
            },
        };
        let hint = match &error {
            // A hint for who speaks to the socket by hand helps nobody who typed a command.
            ClientError::Refused { problem, .. } if problem.hint.contains("GET /v1/") => {
                String::new()
            }
            ClientError::Refused { problem, .. } => problem.hint.clone(),
            ClientError::Connect { source, .. }
                if source.kind() == std::io::ErrorKind::PermissionDenied =>
            {
                NOT_ALLOWED.to_owned()
            }
            ClientError::NoDaemon { .. }
            | ClientError::Broken { .. }
            | ClientError::Connect { .. }
            | ClientError::Garbled { .. } => String::new(),
        };
        Self::new(exit, crate::fetch::one_line(&error), hint)
    }
}

impl From<crate::daemon::DaemonError> for CliError {
    fn from(error: crate::daemon::DaemonError) -> Self {
        if error.may_retry() { Self::retry(&error) } else { Self::refused(&error) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_exit_code_is_in_the_table_once() {
        let codes: Vec<u8> = Exit::TABLE.iter().map(|(exit, _)| exit.code()).collect();
        assert_eq!(codes, [0, 1, 2, 3, 4, 130]);
    }
}
