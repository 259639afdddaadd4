//! Arguments of `trace`, and of whoever takes a trace.
//!
//! Why: `args` is long enough.
//! Never: acts; see [`super::args`].

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Subcommand};

use crate::names::ImageName;

/// Arguments of `trace`.
#[derive(Debug, Args)]
#[command(after_help = "\
A trace is a list of what a guest reads first: recorded on one node, it lets the next one fetch just
that ahead of the rest while the image arrives (`bedplate attach --stream`).

Examples:
  bedplate attach debian-12 --vm --reader vm-7
  bedplate trace record debian-12 -o boot.trace --for 2m     # boot the VM meanwhile
  bedplate create https://example.org/debian-12.qcow2 --trace boot.trace   # on the next node")]
pub struct TraceArgs {
    /// What to do.
    #[command(subcommand)]
    pub command: TraceCommand,
}

/// The commands of `trace`.
#[derive(Debug, Subcommand)]
pub enum TraceCommand {
    /// Record what readers of an image ask for first, until Ctrl-C
    #[command(after_help = "\
The image must be attached. Each 64 KiB of the disk is noted once, in the order of the first request,
whether NBD clients, VMs or attached programs ask. A program that reads by itself (`bedplate-replica`)
asks only for what it does not find: of such readers a trace is whole only while the image arrives.

Examples:
  bedplate trace record debian-12 -o boot.trace
  bedplate trace record debian-12 --for 90s > boot.trace")]
    Record(TraceRecordArgs),
    /// Keep a trace with an image
    #[command(after_help = "\
Used when a copy is next opened while it arrives. A trace of an image with another digest is refused.

Examples:
  bedplate trace use debian-12 boot.trace
  bedplate trace use golden boot.trace --force     # another file of the same disk")]
    Use(TraceUseArgs),
    /// Print the trace that is kept with an image
    #[command(after_help = "Examples:\n  bedplate trace show debian-12 > boot.trace")]
    Show(TraceShowArgs),
    /// Keep no trace with an image any more
    #[command(after_help = "Examples:\n  bedplate trace drop debian-12")]
    Drop(TraceShowArgs),
}

/// Arguments of `trace record`.
#[derive(Debug, Args)]
pub struct TraceRecordArgs {
    /// The image
    pub name: ImageName,
    /// The file to write; an existing one is replaced at the end [default: stdout]
    #[arg(short, long, value_name = "FILE")]
    pub output: Option<PathBuf>,
    /// How long, such as 90s, 5m or 1h [default: until Ctrl-C]
    #[arg(long = "for", value_name = "DURATION", value_parser = parse_duration)]
    pub lasts: Option<Duration>,
}

/// Arguments of `trace use`.
#[derive(Debug, Args)]
pub struct TraceUseArgs {
    /// The image
    pub name: ImageName,
    /// The trace
    pub file: PathBuf,
    /// Also if it was recorded on an image with another digest
    #[arg(long)]
    pub force: bool,
}

/// Arguments of `trace show` and `trace drop`.
#[derive(Debug, Args)]
pub struct TraceShowArgs {
    /// The image
    pub name: ImageName,
}

/// Parses whole seconds, or a number with s, m or h; at least a second.
///
/// # Errors
/// The text isn't such a duration.
pub fn parse_duration(text: &str) -> Result<Duration, String> {
    let refuse = || format!("{text:?} is not a duration; give seconds, or a number with s, m or h");
    let (digits, seconds) = match text.char_indices().next_back() {
        Some((at, 's')) => (text.get(..at), 1),
        Some((at, 'm')) => (text.get(..at), 60),
        Some((at, 'h')) => (text.get(..at), 3600),
        Some(_) | None => (Some(text), 1),
    };
    let digits = digits.filter(|digits| digits.bytes().all(|b| b.is_ascii_digit()));
    let number = digits.and_then(|digits| digits.parse::<u64>().ok()).filter(|&number| number > 0);
    let seconds = number.and_then(|number| number.checked_mul(seconds));
    seconds.map(Duration::from_secs).ok_or_else(refuse)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_have_units() {
        for (text, seconds) in [("1", 1), ("90s", 90), ("5m", 300), ("2h", 7200)] {
            assert_eq!(parse_duration(text), Ok(Duration::from_secs(seconds)), "{text}");
        }
        for bad in ["", "s", "0", "0m", "-1s", "1.5h", "1d", "1ms", "99999999999999999h", "ä"] {
            assert!(parse_duration(bad).is_err(), "{bad}");
        }
    }
}
