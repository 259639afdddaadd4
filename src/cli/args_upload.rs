//! Arguments of `upload`.
//!
//! Why: `args` is long enough.
//! Never: acts; see [`super::args`].

use std::path::PathBuf;

use clap::Args;

use super::args::FormatArg;
use super::args_digest::DigestArgs;
use super::args_view::StandsArgs;
use crate::names::ImageName;

/// Arguments of `upload`.
#[derive(Debug, Args)]
#[command(after_help = "\
A broken connection or a daemon that restarts costs only what was not durable yet. The same command
again goes on where the last one ended. Without a digest the file is read for one first: another
file of the same length is then refused.

Examples:
  bedplate upload ./golden.qcow2
  bedplate upload ./golden.qcow2 --name golden --sha256 \"$(sha256sum < golden.qcow2 | cut -c -64)\"
  bedplate upload ./golden.qcow2 --json | jq -r .nbd.uri")]
pub struct UploadArgs {
    /// The file
    pub file: PathBuf,
    /// Name of the image [default: made of the file's name]
    #[arg(long)]
    pub name: Option<ImageName>,
    /// Format of the file [default: look]
    #[arg(long)]
    pub format: Option<FormatArg>,
    /// Do not read the file for a digest first: whoever goes on with an upload vouches for its file
    #[arg(long, conflicts_with_all = ["sha256", "sha512", "checksum"])]
    pub no_digest: bool,
    /// Disk to bring it in on [default: one with room]
    #[arg(long, value_name = "DISK")]
    pub disk: Option<String>,
    #[command(flatten)]
    #[expect(missing_docs, reason = "documented at its type")]
    pub stands: StandsArgs,
    #[command(flatten)]
    #[expect(missing_docs, reason = "documented at its type")]
    pub expected: DigestArgs,
}
