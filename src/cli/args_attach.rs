//! Arguments of `attach` and `detach`.
//!
//! Why: see `args`.
//! Never: decides anything.

use clap::Args;

use crate::names::ImageName;

/// Arguments of `attach`.
#[derive(Debug, Args)]
#[command(after_help = "\
Prints the NBD URI once the image is ready. With --reader, repeating the command gives the same
attachment.

Examples:
  bedplate attach debian-12
  bedplate attach debian-12 --reader vm-7
  nbdinfo \"$(bedplate attach debian-12 --reader vm-7)\"
  bedplate attach debian-12 --vm --reader vm-7     # a path for -chardev socket,path=
  bedplate attach debian-12 --no-wait --json | jq -r .id")]
pub struct AttachArgs {
    /// The image
    pub name: ImageName,
    /// Disk whose copy to read [default: one that has it, else one with room]
    #[arg(long, value_name = "DISK")]
    pub disk: Option<String>,
    /// What the reader calls itself
    #[arg(long, value_name = "LABEL")]
    pub reader: Option<String>,
    /// Read it while it is still arriving: what is read next is fetched first
    #[arg(long)]
    pub stream: bool,
    /// For a VM: print the path of its own vhost-user socket, which is there until it is detached
    #[arg(long)]
    pub vm: bool,
    /// Return at once, and print the attachment's id
    #[arg(long)]
    pub no_wait: bool,
}

/// Arguments of `detach`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  bedplate detach 0a1b2c3d
  bedplate detach debian-12 --reader vm-7")]
pub struct DetachArgs {
    /// The attachment's id; or, with --reader, the image's name
    pub id: String,
    /// Detach this reader of the image
    #[arg(long, value_name = "LABEL")]
    pub reader: Option<String>,
}
