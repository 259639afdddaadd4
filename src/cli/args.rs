//! The command line as data: parser, help, completions and man pages all come from here.
//!
//! Why: so they cannot disagree.
//! How: clap's derive. Each command's `--help` ends with examples.
//! Never: acts; a definition says what may be typed, not what is done.
//! Start at [`Command`].

use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use clap::{ArgGroup, Args, Parser, Subcommand, ValueEnum};
use clap_complete::Shell;

use super::args_access::AccessArgs;
use super::args_attach::{AttachArgs, DetachArgs};
use super::args_digest::DigestArgs;
use super::args_disk::DiskArgs;
use super::args_health::{NodeArgs, ScrubArgs, SettingsArgs};
use super::args_steer::{CancelArgs, CleanupArgs, PauseArgs, ResumeArgs, SetArgs, WatchArgs};
use super::args_tcp::TcpArgs;
use super::args_top::TopArgs;
use super::args_trace::TraceArgs;
use super::args_upload::UploadArgs;
use super::args_view::{CatArgs, ExportArgs, InspectArgs, StandsArgs};
use super::args_volume::{ApplyArgs, ClassArgs, VolumeArgs};
use super::exit::Exit;
use super::sizes::parse_bytes;
use crate::daemon;
use crate::image::Format;
use crate::import::Layout;
use crate::names::ImageName;

static EXIT_CODES: LazyLock<String> = LazyLock::new(|| {
    let mut text = String::from("Exit codes:\n");
    for (exit, meaning) in Exit::TABLE {
        text.push_str(&format!("  {:>3}  {meaning}\n", exit.code()));
    }
    text.push_str(
        "\nExamples:\n  \
         bedplate run https://cloud.debian.org/images/cloud/bookworm/latest/debian-12-genericcloud-amd64.qcow2\n  \
         bedplate pull https://example.org/disk.img -o disk.img\n  \
         bedplate export disk.qcow2 --nbd /tmp/nbd.sock\n  \
         bedplate serve --disk /var/lib/bedplate",
    );
    text
});

/// Brings virtual disk images in from URLs, keeps one copy per disk, serves it read-only over NBD.
#[derive(Debug, Parser)]
#[command(name = "bedplate", version, after_help = EXIT_CODES.as_str(), max_term_width = 100)]
#[command(disable_help_subcommand = true)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
    /// For every command.
    #[command(flatten)]
    pub global: Global,
}

/// Options that every command takes.
#[derive(Clone, Debug, Args)]
pub struct Global {
    /// The daemon's control socket [default: bedplate/control.sock in the XDG data directory's
    /// bedplate]
    #[arg(long, global = true, env = "BEDPLATE_SOCKET", value_name = "PATH")]
    pub socket: Option<PathBuf>,
    /// Print results as JSON, one object a line
    #[arg(long, global = true)]
    pub json: bool,
    /// Say more on stderr; twice for everything
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    pub verbose: u8,
    /// Say nothing on stderr but errors
    #[arg(short, long, global = true, conflicts_with = "verbose")]
    pub quiet: bool,
}

impl Global {
    /// The control socket to use.
    #[must_use]
    pub fn socket(&self) -> PathBuf {
        self.socket
            .clone()
            .unwrap_or_else(|| daemon::default_socket(&default_data_dir(), daemon::CONTROL_SOCKET))
    }
}

/// `$XDG_DATA_HOME/bedplate`, or `~/.local/share/bedplate`.
#[must_use]
pub fn default_data_dir() -> PathBuf {
    let absolute = |name| std::env::var_os(name).map(PathBuf::from).filter(|p| p.is_absolute());
    let data = absolute("XDG_DATA_HOME")
        .or_else(|| absolute("HOME").map(|home| home.join(".local/share")))
        .unwrap_or_else(|| Path::new("/var/lib").to_owned());
    data.join("bedplate")
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Bring an image in and serve it until Ctrl-C
    Run(RunArgs),
    /// Bring a URL into a plain file, checked, resumable
    Pull(PullArgs),
    /// Serve an image file over NBD until Ctrl-C
    Export(ExportArgs),
    /// Write an image's bytes, as a guest sees them, to stdout
    Cat(CatArgs),
    /// Say what an image is, what is wrong with it, and whether it is served
    Inspect(InspectArgs),
    /// Run the daemon
    Serve(ServeArgs),
    /// Make an image known to the daemon
    Create(CreateArgs),
    /// Bring a file of this host in, resumable
    Upload(UploadArgs),
    /// List images
    List(ListArgs),
    /// List the workers: one for each copy
    Ps(PsArgs),
    /// What readers do now, and how long they wait
    Top(TopArgs),
    /// What readers ask for first: record it, and keep it with an image
    Trace(TraceArgs),
    /// Show one image
    Get(GetArgs),
    /// Delete an image and its copies
    Delete(DeleteArgs),
    /// Read an image: bring it in if need be, and print where it is served
    Attach(AttachArgs),
    /// Read an image no more
    Detach(DetachArgs),
    /// Volumes: an image, and the disks of replicas that stand on it
    Volume(VolumeArgs),
    /// Apply a manifest: StorageClasses, claims, Longhorn's BackingImages and Volumes
    Apply(ApplyArgs),
    /// Storage classes
    Class(ClassArgs),
    /// Stop fetching an image for now
    Pause(PauseArgs),
    /// Go on fetching an image
    Resume(ResumeArgs),
    /// Stop fetching an image and remove what has arrived
    Cancel(CancelArgs),
    /// Remove an image's copies on chosen disks
    Cleanup(CleanupArgs),
    /// Set an image's rate, priority or least number of copies
    Set(SetArgs),
    /// Show or change what holds for all transfers
    Settings(SettingsArgs),
    /// Read an image's copies against their digests, and repair them
    Scrub(ScrubArgs),
    /// Drills: let the node fail, and return
    Node(NodeArgs),
    /// Show transfers under way until they are done
    Watch(WatchArgs),
    /// Print what happens
    Events(EventsArgs),
    /// List disks
    Disks(DisksArgs),
    /// Add, empty, tag or remove a disk
    Disk(DiskArgs),
    /// Check this host and the daemon, and say what to do
    Doctor(DoctorArgs),
    /// Print completions for a shell
    Completions(CompletionsArgs),
    /// Print the man page, or write all of them into a directory
    Man(ManArgs),
}

/// An image's format, on the command line.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum FormatArg {
    /// The file's bytes are the guest's
    Raw,
    /// QEMU's copy-on-write format
    Qcow2,
    /// VMware's, in one file: monolithicSparse or streamOptimized
    Vmdk,
    /// Virtual PC's, fixed or dynamic
    Vhd,
    /// Hyper-V's, fixed or dynamic
    Vhdx,
}

impl From<FormatArg> for Format {
    fn from(format: FormatArg) -> Self {
        match format {
            FormatArg::Raw => Self::Raw,
            FormatArg::Qcow2 => Self::Qcow2,
            FormatArg::Vmdk => Self::Vmdk,
            FormatArg::Vhd => Self::Vhd,
            FormatArg::Vhdx => Self::Vhdx,
        }
    }
}

/// Arguments of `run`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  bedplate run https://example.org/debian-12.qcow2
  bedplate run ./disk.img --name golden --nbd /tmp/golden.sock
  bedplate run https://example.org/d.qcow2 --sha256 $(cut -c1-64 d.sha256)
  bedplate run https://example.org/d.qcow2 --checksum-url https://example.org/SHA256SUMS
  bedplate run - < file-with-a-secret-url")]
pub struct RunArgs {
    /// http://, https:// or s3:// URL, a path, or - for a URL on stdin (keeps it out of process lists)
    pub source: String,
    /// Name of the image and of its export [default: made of the source's last part]
    #[arg(long)]
    pub name: Option<ImageName>,
    /// Unix socket to serve NBD on [default: bedplate/nbd.sock in the data directory]
    #[arg(long, value_name = "SOCKET")]
    pub nbd: Option<PathBuf>,
    #[command(flatten)]
    #[expect(missing_docs, reason = "documented at its type")]
    pub expected: DigestArgs,
    /// Format of the file [default: look]
    #[arg(long)]
    pub format: Option<FormatArg>,
    /// What to make of a QCOW2 source: a copy as it is, or of the guest's disk, sparse
    #[arg(long, default_value = "as-is", value_name = "LAYOUT")]
    pub layout: Layout,
    #[command(flatten)]
    #[expect(missing_docs, reason = "documented at its type")]
    pub stands: StandsArgs,
    /// Directory where images are kept; made if it isn't there [default: bedplate in the XDG data
    /// directory]
    #[arg(long, value_name = "DIR")]
    pub data: Option<PathBuf>,
    #[command(flatten)]
    #[expect(missing_docs, reason = "documented at its type")]
    pub access: AccessArgs,
}

/// Arguments of `pull`.
#[derive(Debug, Args)]
#[command(after_help = "\
Run it again after an interruption: what has arrived is not fetched again.

Examples:
  bedplate pull https://example.org/disk.img -o disk.img
  bedplate pull https://example.org/disk.img -o disk.img --sha256 HEX --json
  bedplate pull https://example.org/disk.img -o disk.img --checksum md5:HEX --checksum sha1:HEX
  bedplate pull https://example.org/d.img -o d.img --checksum-url https://example.org/SHA256SUMS
  bedplate pull https://example.org/disk.qcow2 -o disk.raw --layout raw
  bedplate pull s3://images/disk.img -o disk.img --s3-region eu-central-1
  bedplate pull https://example.org/d.img -o d.img --user me --password-file pw.txt")]
pub struct PullArgs {
    /// http://, https:// or s3:// URL, a path, or - for a URL on stdin
    pub source: String,
    /// The file to make; an existing one is replaced once the new one is complete
    #[arg(short, long, value_name = "FILE")]
    pub output: PathBuf,
    /// Another URL of the same bytes; repeatable, needs a digest
    #[arg(long, value_name = "URL", requires = "DigestArgs")]
    pub mirror: Vec<String>,
    /// What to make of a QCOW2 source: the file as it is, or the guest's disk, sparse
    #[arg(long, default_value = "as-is", value_name = "LAYOUT")]
    pub layout: Layout,
    /// Decode a gz, xz, zst or bz2 source on the way; digests are then those of the source
    #[arg(long)]
    pub unpack: bool,
    /// Make no digest of a file for which none is given
    #[arg(long, conflicts_with_all = ["sha256", "sha512", "checksum", "checksum_url"])]
    pub no_digest: bool,
    /// Bytes per second at most, such as 20M
    #[arg(long, value_parser = parse_bytes, value_name = "SIZE")]
    pub rate: Option<u64>,
    #[command(flatten)]
    #[expect(missing_docs, reason = "documented at its type")]
    pub expected: DigestArgs,
    #[command(flatten)]
    #[expect(missing_docs, reason = "documented at its type")]
    pub access: AccessArgs,
}

/// Arguments of `serve`.
#[derive(Debug, Args)]
#[command(group = ArgGroup::new("setup").args(["disk", "config"]).required(true))]
#[command(after_help = "\
A configuration file has these keys; only disks is needed:
  disks = [\"/mnt/a\", \"/mnt/b\"]      # the first also holds the catalog and the sockets
  node_tags = [\"rack-1\"]            # tags of this node, for images that want some
  control_socket = \"/run/bedplate/control.sock\"
  nbd_socket = \"/run/bedplate/nbd.sock\"
  nbd_tcp = \"[::]:10809\"             # NBD on a network, with:
  nbd_tls_cert = \"/etc/bedplate/server.pem\"
  nbd_tls_key = \"/etc/bedplate/server.key\"
  nbd_tls_clients_ca = \"/etc/bedplate/ca.pem\"   # only clients of this authority
  nbd_tcp_plain = false               # or, instead of these, in plain text to anybody
  replica_socket = \"/run/bedplate/replica.sock\"
  replica_uids = [1000]               # who may attach there, besides root and the daemon's user
  replica_gids = [64055]
  vm_sockets = \"/run/bedplate\"       # directory of the sockets of VMs
  vm_gid = 64055                      # the group that may use them
  vm_poll_us = 32                     # how long a queue is looked at before its thread sleeps
  vm_queues = 16                      # that a VM may have
  control_uids = [1000]               # besides root and the daemon's own user
  control_gids = [64055]
  sink = \"auto\"                       # auto, uring, threads or uncached
  max_transfers = 8
  cleanup_wait_minutes = 60           # and all others that `bedplate settings` shows, rates
                                      # as disk_copy_rate and scrub_rate
  rate_limit = 100000000              # bytes per second, all transfers together
  decoded_cache = 268435456           # bytes kept of decoded clusters, and not as memory allows
  default_export = \"debian-12\"        # what NBD clients get who name none
  allow_loopback = false              # may sources be on this host itself?
  allow_addresses = [\"169.254.7.0/24\"] # networks that are allowed whatever they are
  secrets_dir = \"/run/secrets\"        # files that requests may name for credentials
  source_dirs = [\"/srv/images\"]       # files, backups and sockets that requests may name as sources;
                                      # default: any, but none with control_uids or control_gids

Examples:
  bedplate serve --disk /var/lib/bedplate
  bedplate serve --config /etc/bedplate.toml")]
pub struct ServeArgs {
    /// Configuration file (TOML)
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Directory where copies are kept; may be given several times
    #[arg(long, value_name = "DIR")]
    pub disk: Vec<PathBuf>,
    /// Unix socket to serve NBD on [default: bedplate/nbd.sock on the first disk]
    #[arg(long, value_name = "SOCKET")]
    pub nbd: Option<PathBuf>,
    #[command(flatten)]
    #[expect(missing_docs, reason = "documented at its type")]
    pub tcp: TcpArgs,
    /// Fetch from this host's loopback addresses too
    #[arg(long)]
    pub allow_loopback: bool,
}

/// Arguments of `create`.
#[derive(Debug, Args)]
#[command(after_help = "\
Nothing is fetched until the image is attached, unless --fetch or --wait is given.
The same name with the same source is the same image.

Examples:
  bedplate create https://example.org/debian-12.qcow2
  bedplate create https://example.org/d.qcow2 --name debian --wait
  bedplate create https://example.org/d.qcow2 --checksum-url https://example.org/SHA512SUMS
  bedplate create ./overlay.qcow2 --base debian-12
  bedplate create https://example.org/d.qcow2 --trace boot.trace
  bedplate create golden --clone debian-12
  bedplate create vm-7 --from-nbd 'nbd+unix:///disk?socket=/run/vm-7.sock'
  bedplate create - --name private < file-with-a-secret-url")]
pub struct CreateArgs {
    /// http://, https://, s3:// or nbd:// URL, a path on the daemon's node, or - for a URL on stdin;
    /// with --clone or --from-nbd the image's name
    pub source: String,
    /// Name of the image [default: made of the source's last part]
    #[arg(long)]
    pub name: Option<ImageName>,
    /// Image of the daemon's whose bytes, format and base it has: a copy of its copy on the node
    #[arg(long, value_name = "IMAGE", conflicts_with_all = ["name", "format", "mirror", "layout", "base"])]
    pub clone: Option<ImageName>,
    /// NBD export whose bytes it has, as a disk: `nbd://HOST[:PORT]/EXPORT` or
    /// `nbd+unix:///EXPORT?socket=PATH`
    #[arg(long, value_name = "URI", conflicts_with_all = ["name", "clone", "mirror", "layout"])]
    pub from_nbd: Option<String>,
    #[command(flatten)]
    #[expect(missing_docs, reason = "documented at its type")]
    pub expected: DigestArgs,
    /// Format of the file [default: look]
    #[arg(long)]
    pub format: Option<FormatArg>,
    /// Another URL of the same bytes; repeatable, needs a digest
    #[arg(long, value_name = "URL", requires = "DigestArgs")]
    pub mirror: Vec<String>,
    /// What to make of a QCOW2 source: copies as it is, or of the guest's disk, sparse
    #[arg(long, default_value = "as-is", value_name = "LAYOUT")]
    pub layout: Layout,
    #[command(flatten)]
    #[expect(missing_docs, reason = "documented at its type")]
    pub stands: StandsArgs,
    /// A trace of what its readers ask for first: fetched ahead while it is read as it arrives
    #[arg(long, value_name = "FILE")]
    pub trace: Option<PathBuf>,
    /// Take the trace also if it was recorded on an image with another digest
    #[arg(long, requires = "trace")]
    pub force_trace: bool,
    /// Bring it in now
    #[arg(long)]
    pub fetch: bool,
    /// Bring it in now, and wait until it is ready
    #[arg(long)]
    pub wait: bool,
    /// Disk to bring it in on, by UUID, its beginning, or path [default: one with room]
    #[arg(long, value_name = "DISK")]
    pub disk: Option<String>,
    #[command(flatten)]
    #[expect(missing_docs, reason = "documented at its type")]
    pub access: AccessArgs,
}

/// Arguments of `list`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  bedplate list\n  bedplate list --json | jq -r .name")]
pub struct ListArgs {}

/// Arguments of `ps`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  bedplate ps\n  bedplate ps --json | jq -r .worker")]
pub struct PsArgs {}

/// Arguments of `get`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  bedplate get debian-12\n  bedplate get debian-12 --json")]
pub struct GetArgs {
    /// The image
    pub name: ImageName,
}

/// Arguments of `delete`.
#[derive(Debug, Args)]
#[command(after_help = "\
Refused (exit code 3) while the image has attachments or open sessions.

Examples:
  bedplate delete debian-12")]
pub struct DeleteArgs {
    /// The image
    pub name: ImageName,
    /// Return at once; events tell when it is gone
    #[arg(long)]
    pub no_wait: bool,
}

/// Arguments of `events`.
#[derive(Debug, Args)]
#[command(after_help = "\
What has happened, and why: the last 256 changes since the daemon's start, but for progress. With -w
everything as it is, then what changes, until Ctrl-C.

Examples:
  bedplate events --image debian-12
  bedplate events -w --json | jq -r .type")]
pub struct EventsArgs {
    /// Go on as things happen
    #[arg(short, long)]
    pub watch: bool,
    /// Only this image
    #[arg(long, value_name = "NAME")]
    pub image: Option<ImageName>,
}

/// Arguments of `disks`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  bedplate disks\n  bedplate disks --json")]
pub struct DisksArgs {}

/// Arguments of `doctor`.
#[derive(Debug, Args)]
#[command(after_help = "\
Works without a daemon too. Exit code 1 if anything fails.

Examples:
  bedplate doctor
  bedplate doctor --disk /mnt/a --disk /mnt/b")]
pub struct DoctorArgs {
    /// Directory that a daemon would use [default: bedplate in the XDG data directory]
    #[arg(long, value_name = "DIR")]
    pub disk: Vec<PathBuf>,
}

/// Arguments of `completions`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  bedplate completions bash > ~/.local/share/bash-completion/completions/bedplate
  bedplate completions zsh > ~/.zfunc/_bedplate")]
pub struct CompletionsArgs {
    /// The shell
    pub shell: Shell,
}

/// Arguments of `man`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  bedplate man | man -l -
  bedplate man /usr/local/share/man/man1")]
pub struct ManArgs {
    /// Directory to write every page into
    pub dir: Option<PathBuf>,
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_definitions_are_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_command_has_examples() {
        for command in Cli::command().get_subcommands() {
            let after = command.get_after_help().map(ToString::to_string).unwrap_or_default();
            assert!(after.contains("Examples:"), "{}", command.get_name());
            assert!(after.contains(&format!("bedplate {}", command.get_name())));
        }
    }
}
