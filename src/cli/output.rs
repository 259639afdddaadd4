//! Where text goes: results to stdout, all else to stderr.
//!
//! Why: `bedplate list | head` must not be an error, and `--json` must be parseable to the last
//! byte.
//! How: one type writes both; a closed stdout ends the command quietly.
//! Never: colours or control characters off a terminal, or with NO_COLOR.
//! Start at [`Output`].

use std::io::{self, IsTerminal, Write};

use serde::Serialize;

use super::args::Global;
use super::exit::{CliError, Exit};

/// Where a command's text goes.
#[derive(Clone, Debug)]
pub(super) struct Output {
    /// One JSON object a line instead of text for people.
    pub(super) json: bool,
    /// Say less than usual: negative; more: positive.
    verbosity: i8,
    stdout_colour: bool,
    stdout_terminal: bool,
    stderr_colour: bool,
    stderr_terminal: bool,
}

impl Output {
    pub(super) fn new(global: &Global) -> Self {
        let colour = std::env::var_os("NO_COLOR").is_none_or(|v| v.is_empty())
            && std::env::var_os("TERM").is_none_or(|t| t != "dumb");
        let more = i8::try_from(global.verbose).unwrap_or(i8::MAX);
        Self {
            json: global.json,
            verbosity: if global.quiet { -1 } else { more },
            stdout_colour: colour && io::stdout().is_terminal(),
            stdout_terminal: io::stdout().is_terminal(),
            stderr_colour: colour && io::stderr().is_terminal(),
            stderr_terminal: io::stderr().is_terminal(),
        }
    }

    /// A line of the result.
    pub(super) fn line(&self, text: &str) -> Result<(), CliError> {
        self.bytes(format!("{text}\n").as_bytes())
    }

    /// An object of the result, on one line.
    pub(super) fn object(&self, object: &impl Serialize) -> Result<(), CliError> {
        let text = serde_json::to_string(object).map_err(|e| CliError::refused(&e))?;
        self.line(&text)
    }

    /// Bytes of the result.
    pub(super) fn bytes(&self, bytes: &[u8]) -> Result<(), CliError> {
        let mut out = io::stdout().lock();
        match out.write_all(bytes).and_then(|()| out.flush()) {
            Ok(()) => Ok(()),
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Err(CliError::closed_pipe()),
            Err(error) => {
                let text = format!("standard output: cannot write: {error}");
                Err(CliError::new(Exit::Retry, text, ""))
            }
        }
    }

    /// A line for people, beside the result; not with `--quiet`.
    pub(super) fn note(&self, text: &str) {
        if self.verbosity >= 0 {
            let _nobody_reads = writeln!(io::stderr(), "{}", printable(text));
        }
    }

    /// Whether to show how work goes on.
    pub(super) fn shows_progress(&self) -> bool {
        self.verbosity >= 0
    }

    /// Whether progress may redraw its line.
    pub(super) fn is_interactive(&self) -> bool {
        self.stderr_terminal && std::env::var_os("TERM").is_none_or(|t| t != "dumb")
    }

    /// Whether a result may be shown in the place of the one before.
    pub(super) fn redraws_stdout(&self) -> bool {
        self.stdout_terminal && std::env::var_os("TERM").is_none_or(|t| t != "dumb")
    }

    /// The log filter that `-v` and `-q` ask for.
    pub(super) fn log_filter(&self, usual: &'static str) -> &'static str {
        match self.verbosity {
            i8::MIN..0 => "error",
            0 => usual,
            1 => "info",
            2.. => "debug",
        }
    }

    /// Why the command failed, and what to do.
    pub(super) fn failure(&self, error: &CliError) {
        if error.message.is_empty() {
            return;
        }
        let (red, plain) = if self.stderr_colour { ("\x1b[31m", "\x1b[0m") } else { ("", "") };
        let mut err = io::stderr().lock();
        let message = printable(&error.message);
        let _nobody_reads = writeln!(err, "{red}bedplate:{plain} {message}");
        if !error.hint.is_empty() {
            let _nobody_reads = writeln!(err, "  hint: {}", printable(&error.hint));
        }
    }

    /// `text` in a colour that says how good it is, on a terminal.
    pub(super) fn tint(&self, text: &str, good: Tint) -> String {
        if !self.stdout_colour {
            return text.to_owned();
        }
        let colour = match good {
            Tint::Good => "\x1b[32m",
            Tint::Busy => "\x1b[33m",
            Tint::Bad => "\x1b[31m",
        };
        format!("{colour}{text}\x1b[0m")
    }
}

/// How good a word is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Tint {
    Good,
    Busy,
    Bad,
}

/// `text` without control characters but newlines, and without those that change the direction of what
/// follows: a server's words must not drive a terminal, nor change places with ours.
pub(super) fn printable(text: &str) -> String {
    let drives = |c: char| {
        let turns = matches!(c, '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}')
            || matches!(c, '\u{2066}'..='\u{2069}');
        (c.is_control() && c != '\n') || turns
    };
    text.chars().map(|c| if drives(c) { '\u{fffd}' } else { c }).collect()
}
