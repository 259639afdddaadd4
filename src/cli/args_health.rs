//! Arguments of `settings`, `scrub` and `node`: what holds on a node, its health, and drills.
//!
//! Why: one file for what belongs together; `args` is long enough.
//! Never: acts; see [`super::args`].

use clap::{Args, Subcommand};

use super::sizes::parse_bytes;
use crate::manager::Setting;
use crate::names::ImageName;

/// Arguments of `scrub`.
#[derive(Debug, Args)]
#[command(after_help = "\
Every complete copy is read and checked once in a while by itself (`bedplate settings`); this asks for
it now. Bad bytes are repaired where they are, from a copy on another disk, else from the source.
With --wait, exits with 1 if some are bad and could not be repaired.

Examples:
  bedplate scrub debian-12
  bedplate scrub debian-12 --disk 0b7c2f6e --wait
  bedplate get debian-12 --json | jq '.copies[].scrub'")]
pub struct ScrubArgs {
    /// The image
    pub name: ImageName,
    /// Only the copy on this disk
    #[arg(long, value_name = "DISK")]
    pub disk: Option<String>,
    /// Wait until it is done
    #[arg(long)]
    pub wait: bool,
}

/// Arguments of `node`.
#[derive(Debug, Args)]
#[command(after_help = "\
A drill: after `fail` the daemon treats its node as gone. Workers end as when they are killed,
unfinished copies are failed, finished ones unknown, readers are cut off, and nothing is started.
`return` brings all of it back from what is durable, checked. A drill ends with the daemon.

Examples:
  bedplate node fail; bedplate ps; bedplate node return
  bedplate node get")]
pub struct NodeArgs {
    /// What to do
    #[command(subcommand)]
    pub command: NodeCommand,
}

/// The commands on the node.
#[derive(Clone, Copy, Debug, Subcommand)]
pub enum NodeCommand {
    /// Show whether the node counts as gone
    #[command(after_help = "Examples:\n  bedplate node get")]
    Get,
    /// Treat the node as gone
    #[command(after_help = "Examples:\n  bedplate node fail")]
    Fail,
    /// The node is back
    #[command(after_help = "Examples:\n  bedplate node return")]
    Return,
}

/// Arguments of `settings`.
#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true)]
#[command(after_help = "\
Without a command or options, shows every setting, its default and what it is. What is set holds at
once, outlives the daemon, and wins over its configuration file until it is reset. Rates may end in
K, M or G (of 1024).

Examples:
  bedplate settings
  bedplate settings set cleanup_wait_minutes=240 scrub_rate_bytes_per_s=64M
  bedplate settings get recovery_wait_seconds
  bedplate settings reset cleanup_wait_minutes
  bedplate settings --rate 100M --max-transfers 4")]
pub struct SettingsArgs {
    /// What to do
    #[command(subcommand)]
    pub command: Option<SettingsCommand>,
    /// As `set rate_limit_bytes_per_s=SIZE`
    #[arg(long, value_parser = parse_bytes, value_name = "SIZE")]
    pub rate: Option<u64>,
    /// As `set max_transfers=NUMBER`
    #[arg(long, value_name = "NUMBER")]
    pub max_transfers: Option<u64>,
    /// As `set cleanup_wait_minutes=MINUTES`
    #[arg(long, allow_negative_numbers = true, value_name = "MINUTES")]
    pub cleanup_wait: Option<i64>,
}

/// The commands on settings.
#[derive(Debug, Subcommand)]
pub enum SettingsCommand {
    /// Show all settings, or print the value of one
    Get(SettingsGetArgs),
    /// Set some, all or none of them
    Set(SettingsSetArgs),
    /// Go back to the defaults of some
    Reset(SettingsResetArgs),
}

/// Arguments of `settings get`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  bedplate settings get max_transfers")]
pub struct SettingsGetArgs {
    /// The setting
    #[arg(value_parser = parse_key, value_name = "KEY")]
    pub key: Option<Setting>,
}

/// Arguments of `settings set`.
#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  bedplate settings set max_disk_copies=2 disk_copy_rate_bytes_per_s=50M"
)]
pub struct SettingsSetArgs {
    /// The settings with their values
    #[arg(value_parser = parse_pair, value_name = "KEY=VALUE", required = true)]
    pub pairs: Vec<(Setting, i64)>,
}

/// Arguments of `settings reset`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  bedplate settings reset cleanup_wait_minutes")]
pub struct SettingsResetArgs {
    /// The settings
    #[arg(value_parser = parse_key, value_name = "KEY", required = true)]
    pub keys: Vec<Setting>,
}

/// A setting by its key.
fn parse_key(text: &str) -> Result<Setting, String> {
    Setting::from_key(text).ok_or_else(|| format!("no such setting; there are {}", Setting::keys()))
}

/// `KEY=VALUE`. Whether the value is allowed, the daemon says; here it must be a number.
fn parse_pair(text: &str) -> Result<(Setting, i64), String> {
    let (key, value) = text.split_once('=').ok_or("write KEY=VALUE")?;
    let setting = parse_key(key)?;
    let number = value.parse().ok();
    let size = || parse_bytes(value).ok().and_then(|bytes| i64::try_from(bytes).ok());
    let number = number.or_else(|| size().filter(|_| setting.is_rate()));
    number.map(|number| (setting, number)).ok_or_else(|| setting.rule())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pairs_are_numbers_and_rates_may_have_suffixes() {
        assert_eq!(parse_pair("scrub_rate_bytes_per_s=2M"), Ok((Setting::ScrubRate, 2 << 20)));
        assert_eq!(parse_pair("cleanup_wait_minutes=-1"), Ok((Setting::CleanupWait, -1)));
        for bad in ["max_transfers=2K", "max_transfers=", "max_transfers", "colour=1", "=1"] {
            assert!(parse_pair(bad).is_err(), "{bad}");
        }
    }
}
