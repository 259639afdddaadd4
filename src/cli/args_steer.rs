//! Arguments of the commands that steer and watch transfers.
//!
//! Why: one file for what belongs together; `args` is long enough.
//! Never: acts; see [`super::args`].

use clap::{ArgGroup, Args};

use super::args_disk::TagList;
use super::sizes::parse_bytes;
use crate::names::ImageName;

/// Arguments of `pause`.
#[derive(Debug, Args)]
#[command(after_help = "\
What has arrived is kept. Readers that wait for it go on waiting.

Examples:
  bedplate pause debian-12")]
pub struct PauseArgs {
    /// The image
    pub name: ImageName,
}

/// Arguments of `resume`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  bedplate resume debian-12")]
pub struct ResumeArgs {
    /// The image
    pub name: ImageName,
}

/// Arguments of `cancel`.
#[derive(Debug, Args)]
#[command(after_help = "\
Only unfinished copies go; the image stays known, and `bedplate attach` or `create --fetch` begins
anew. Refused (exit code 3) while a reader waits for one of them.

Examples:
  bedplate cancel debian-12")]
pub struct CancelArgs {
    /// The image
    pub name: ImageName,
}

/// Arguments of `cleanup`.
#[derive(Debug, Args)]
#[command(after_help = "\
All of them go, or none: refused (exit code 3) with the reason if a copy is in use, or too few would
be left. Copies that nobody uses go by themselves after a while; see `bedplate settings`.

Examples:
  bedplate cleanup debian-12 --disk 0b7c2f6e
  bedplate cleanup debian-12 --disk /mnt/a --disk /mnt/b")]
pub struct CleanupArgs {
    /// The image
    pub name: ImageName,
    /// Disk whose copy goes, by UUID, its beginning, or path; may be given several times
    #[arg(long, value_name = "DISK", required = true)]
    pub disk: Vec<String>,
}

/// Arguments of `set`.
#[derive(Debug, Args)]
#[command(override_usage = "bedplate set <NAME> <OPTIONS>")]
#[command(group = ArgGroup::new("change").required(true).multiple(true).args(
    ["rate", "priority", "min_copies", "disk_tags", "node_tags"]))]
#[command(after_help = "\
A running transfer hears of it at once. Rates may end in K, M or G (of 1024); 0 is no limit.

Examples:
  bedplate set debian-12 --rate 20M
  bedplate set debian-12 --priority 10 --rate 0
  bedplate set debian-12 --min-copies 2 --disk-tags ssd")]
pub struct SetArgs {
    /// The image
    pub name: ImageName,
    /// Bytes per second at most, of each copy
    #[arg(long, value_parser = parse_bytes, value_name = "SIZE")]
    pub rate: Option<u64>,
    /// -100 to 100: of images that wait for their turn, higher ones come first
    #[arg(long, allow_negative_numbers = true, value_name = "NUMBER")]
    pub priority: Option<i32>,
    /// Copies that it is to have, and that stay although nobody uses them
    #[arg(long, value_name = "NUMBER")]
    pub min_copies: Option<u32>,
    /// Tags that a disk must have for further copies, separated by commas; empty: any disk
    #[arg(long, value_name = "TAGS")]
    pub disk_tags: Option<TagList>,
    /// Tags that the node must have for further copies, separated by commas; empty: any node
    #[arg(long, value_name = "TAGS")]
    pub node_tags: Option<TagList>,
}

/// Arguments of `watch`.
#[derive(Debug, Args)]
#[command(after_help = "\
Ends when nothing is under way any more. On a terminal a bar a copy; elsewhere a line a copy every
few seconds and when something changes; with --json every change as it comes.

Examples:
  bedplate watch
  bedplate watch debian-12
  bedplate watch --json | jq -r .message")]
pub struct WatchArgs {
    /// Only this image
    pub name: Option<ImageName>,
}
