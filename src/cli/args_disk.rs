//! Arguments of `disk`: the disks of a node, and how they are steered.
//!
//! Why: as `args`, which is long enough.
//! Never: acts; see [`super::args`].

use std::collections::BTreeSet;
use std::path::PathBuf;

use clap::{ArgGroup, Args, Subcommand, ValueEnum};

use crate::names::{NameError, Tag};

/// Arguments of `disk`.
#[derive(Debug, Args)]
#[command(after_help = "\
A disk is a directory on a file system of its own. Give a disk by its UUID, by the beginning of it, or
by its path.

Examples:
  bedplate disk add /var/lib/longhorn-2
  bedplate disk set 0b7c2f6e --evict yes     # its copies go elsewhere, then:
  bedplate disk remove 0b7c2f6e")]
pub struct DiskArgs {
    /// What to do
    #[command(subcommand)]
    pub command: DiskCommand,
}

/// The commands on disks.
#[derive(Debug, Subcommand)]
pub enum DiskCommand {
    /// List disks
    #[command(after_help = "Examples:\n  bedplate disk list --json")]
    List,
    /// Show one disk
    Get(DiskGetArgs),
    /// Make a directory one of the node's disks
    Add(DiskAddArgs),
    /// Close a disk to new copies, empty it, or tag it
    Set(DiskSetArgs),
    /// Let go of a disk that holds no copies
    Remove(DiskRemoveArgs),
}

/// Arguments of `disk get`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  bedplate disk get /var/lib/longhorn-2")]
pub struct DiskGetArgs {
    /// The disk
    #[arg(value_name = "DISK")]
    pub disk: String,
}

/// Arguments of `disk add`.
#[derive(Debug, Args)]
#[command(after_help = "\
The directory has to be there; one that is no disk yet becomes one. What a disk holds already is adopted.
The daemon keeps it, also if its configuration does not name it.

Examples:
  bedplate disk add /var/lib/longhorn-2 --tag ssd")]
pub struct DiskAddArgs {
    /// Its directory
    #[arg(value_name = "DIR")]
    pub path: PathBuf,
    /// A word for it; may be repeated
    #[arg(long, value_name = "TAG")]
    pub tag: Vec<Tag>,
}

/// Arguments of `disk set`.
#[derive(Debug, Args)]
#[command(group = ArgGroup::new("change").required(true).multiple(true).args(
    ["schedulable", "evict", "tags"]))]
#[command(after_help = "\
A disk that is being emptied takes no new copies. Of each image that is on it, enough complete copies are
brought in on other disks first; copies that are read stay until nobody reads them.

Examples:
  bedplate disk set 0b7c2f6e --schedulable no
  bedplate disk set 0b7c2f6e --evict yes --wait
  bedplate disk set /var/lib/longhorn-2 --tags ssd,fast")]
pub struct DiskSetArgs {
    /// The disk
    #[arg(value_name = "DISK")]
    pub disk: String,
    /// Whether new copies may be brought in on it
    #[arg(long, value_name = "yes|no")]
    pub schedulable: Option<YesNo>,
    /// Whether its copies are to go elsewhere
    #[arg(long, value_name = "yes|no")]
    pub evict: Option<YesNo>,
    /// Words for it, all of them; none: an empty text
    #[arg(long, value_name = "TAG,TAG")]
    pub tags: Option<TagList>,
    /// Wait until it holds no copies
    #[arg(long, requires = "evict")]
    pub wait: bool,
}

/// Arguments of `disk remove`.
#[derive(Debug, Args)]
#[command(after_help = "\
Refused while there are copies on it; `bedplate disk set DISK --evict yes` moves them. A disk that the
configuration names comes back with the next start.

Examples:
  bedplate disk remove 0b7c2f6e
  bedplate disk remove 0b7c2f6e --force    # it is gone for good, with what was on it")]
pub struct DiskRemoveArgs {
    /// The disk
    #[arg(value_name = "DISK")]
    pub disk: String,
    /// Also one that is gone, with its copies
    #[arg(long)]
    pub force: bool,
}

/// Yes or no.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum YesNo {
    /// Yes
    Yes,
    /// No
    No,
}

impl YesNo {
    /// True for yes.
    #[must_use]
    pub fn is_yes(self) -> bool {
        self == Self::Yes
    }
}

/// Tags separated by commas; an empty text is none.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TagList(BTreeSet<Tag>);

impl TagList {
    /// The tags, as a request has them.
    #[must_use]
    pub fn texts<T: FromIterator<String>>(&self) -> T {
        self.0.iter().map(ToString::to_string).collect()
    }
}

impl std::str::FromStr for TagList {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        let tags = text.split(',').map(str::trim).filter(|tag| !tag.is_empty());
        Tag::parse_all(tags).map(Self)
    }
}
