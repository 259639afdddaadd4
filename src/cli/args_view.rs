//! Arguments of the commands on files: `export`, `cat` and `inspect`.
//!
//! Why: `args` is long enough.
//! Never: acts; see [`super::args`].

use std::path::PathBuf;

use clap::Args;

use super::args::FormatArg;
use super::args_access::AccessArgs;
use super::args_tcp::TcpArgs;
use super::sizes::parse_bytes;
use crate::control::types::CreateImage;
use crate::names::{ImageName, Tag};

/// Arguments of `export`.
#[derive(Debug, Args)]
#[command(after_help = "\
The file must not change while it is served.

An image's own names for other files are never followed: its backing file is given with --base.

Examples:
  bedplate export disk.qcow2 --nbd /tmp/nbd.sock
  bedplate export overlay.qcow2 --base bottom.raw --nbd /tmp/nbd.sock
  nbdinfo 'nbd+unix:///?socket=/tmp/nbd.sock'
  bedplate export disk.qcow2 --tcp '[::]:10809' --tls-cert cert.pem --tls-key key.pem
  nbdinfo 'nbds://HOST/?tls-certificates=DIRECTORY'")]
pub struct ExportArgs {
    /// The image file
    pub file: PathBuf,
    /// Unix socket to serve NBD on [default: the one that a service manager passed, LISTEN_FDS]
    #[arg(long, value_name = "SOCKET", conflicts_with = "tcp")]
    pub nbd: Option<PathBuf>,
    /// Unix socket to serve the disk of one VM on, over vhost-user, instead of NBD
    #[arg(long, value_name = "SOCKET", conflicts_with_all = ["nbd", "tcp"])]
    pub vhost_user: Option<PathBuf>,
    #[command(flatten)]
    #[expect(missing_docs, reason = "documented at its type")]
    pub tcp: TcpArgs,
    #[command(flatten)]
    #[expect(missing_docs, reason = "documented at its type")]
    pub view: ViewArgs,
    /// Name of the export, which is also the default export [default: made of the file's name]
    #[arg(long)]
    pub name: Option<ImageName>,
}

/// Arguments of `cat`.
#[derive(Debug, Args)]
#[command(after_help = "\
Sizes may end in K, M, G or T.

Examples:
  bedplate cat disk.qcow2 > disk.raw
  bedplate cat disk.qcow2 --offset 1M --length 512 | xxd
  bedplate cat disk.qcow2 --snapshot before-upgrade > then.raw
  bedplate cat overlay.qcow2 --base middle.qcow2 --base bottom.raw > disk.raw")]
pub struct CatArgs {
    /// The image file
    pub file: PathBuf,
    /// First byte, as the guest counts
    #[arg(long, default_value = "0", value_parser = parse_bytes, value_name = "SIZE")]
    pub offset: u64,
    /// How many bytes [default: to the end]
    #[arg(long, value_parser = parse_bytes, value_name = "SIZE")]
    pub length: Option<u64>,
    #[command(flatten)]
    #[expect(missing_docs, reason = "documented at its type")]
    pub view: ViewArgs,
}

/// How a file becomes a disk.
#[derive(Debug, Args)]
pub struct ViewArgs {
    /// Format of the file [default: look]
    #[arg(long)]
    pub format: Option<FormatArg>,
    /// The disk as it was at this internal snapshot, by ID or name
    #[arg(long, value_name = "SNAPSHOT")]
    pub snapshot: Option<String>,
    /// The backing file; given again, the backing file of that one, and so on
    #[arg(long, value_name = "FILE")]
    pub base: Vec<PathBuf>,
    /// The external data file
    #[arg(long, value_name = "FILE")]
    pub data_file: Option<PathBuf>,
}

/// Arguments of `inspect`.
#[derive(Debug, Args)]
#[command(after_help = "\
Of a URL only the header and the tables are fetched. Ends with status 1 if the image is refused.

Examples:
  bedplate inspect disk.qcow2
  bedplate inspect https://cloud.debian.org/images/cloud/bookworm/latest/debian-12-generic-amd64.qcow2
  bedplate inspect debian-12 --json | jq -r .verdict")]
pub struct InspectArgs {
    /// A file, a URL (- reads it from stdin), or the name of an image of the daemon's
    pub target: String,
    /// Format of a file or URL [default: look]
    #[arg(long)]
    pub format: Option<FormatArg>,
    /// A backing file will be given when it is used, so that naming one is no reason to refuse it
    #[arg(long)]
    pub overlay: bool,
    #[command(flatten)]
    #[expect(missing_docs, reason = "documented at its type")]
    pub access: AccessArgs,
}

/// What an image of the daemon's stands on, what is read of it, and how much of it stays.
#[derive(Clone, Debug, Default, Args)]
pub struct StandsArgs {
    /// Image of the daemon's that is its backing file; the name in the file is not looked at
    #[arg(long, value_name = "IMAGE")]
    pub base: Option<ImageName>,
    /// Image of the daemon's whose file is its external data file; the name in the file is not looked at
    #[arg(long, value_name = "IMAGE")]
    pub data_file: Option<ImageName>,
    /// Readers get the disk as it was at this internal snapshot, by ID or name
    #[arg(long, value_name = "SNAPSHOT")]
    pub snapshot: Option<String>,
    /// Copies that it is to have, and that stay although nobody uses them [default: 1]
    #[arg(long, value_name = "NUMBER")]
    pub min_copies: Option<u32>,
    /// Tag that a disk must have for it; repeatable, all must match
    #[arg(long, value_name = "TAG")]
    pub disk_tag: Vec<Tag>,
    /// Tag that the node must have; repeatable
    #[arg(long, value_name = "TAG")]
    pub node_tag: Vec<Tag>,
}

impl StandsArgs {
    pub(super) fn put_into(&self, request: &mut CreateImage) {
        request.base = self.base.as_ref().map(ToString::to_string);
        request.data_file = self.data_file.as_ref().map(ToString::to_string);
        request.snapshot.clone_from(&self.snapshot);
        request.min_copies = self.min_copies;
        request.disk_selector = self.disk_tag.iter().map(ToString::to_string).collect();
        request.node_selector = self.node_tag.iter().map(ToString::to_string).collect();
    }
}
