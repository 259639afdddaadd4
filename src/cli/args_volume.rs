//! Arguments of the commands on volumes, storage classes and manifests.
//!
//! Why: one file for what belongs together; `args` is long enough.
//! Never: acts; see [`super::args`].

use std::path::PathBuf;

use clap::{Args, Subcommand};

use super::sizes::parse_bytes;
use crate::names::{ClassName, ImageName, VolumeName};

/// Arguments of `volume`.
#[derive(Debug, Args)]
#[command(after_help = "\
A volume names an image and the disks of its replicas. Nothing is fetched until it is attached; then
one copy comes from the source, and those on further disks from that one.

Examples:
  bedplate volume create vm-7 --image debian-12 --replicas 2
  bedplate volume attach vm-7
  bedplate volume get vm-7 --json | jq '.replicas[].conditions'
  bedplate volume restore vm-8 --backup volume.cfg
  bedplate volume detach vm-7; bedplate volume delete vm-7")]
pub struct VolumeArgs {
    /// What to do
    #[command(subcommand)]
    pub command: VolumeCommand,
}

/// The commands on volumes.
#[derive(Debug, Subcommand)]
pub enum VolumeCommand {
    /// Make a volume known
    Create(VolumeCreateArgs),
    /// Make a volume known that is restored from a backup
    Restore(VolumeRestoreArgs),
    /// List volumes
    List(VolumeListArgs),
    /// Show one volume, its replicas and why they wait
    Get(VolumeNameArgs),
    /// Attach a volume: bring its image in if need be, and print its replicas' files
    Attach(VolumeAttachArgs),
    /// Detach a volume
    Detach(VolumeNameArgs),
    /// Forget a volume; its image stays
    Delete(VolumeNameArgs),
}

/// Where the replicas of a volume are.
#[derive(Debug, Args)]
pub struct ReplicaArgs {
    /// How many replicas [default: as many as --disk is given, or 1]
    #[arg(long, value_name = "NUMBER")]
    pub replicas: Option<u32>,
    /// Disk of a replica; may be given several times [default: healthy ones with most room]
    #[arg(long, value_name = "DISK")]
    pub disk: Vec<String>,
    /// Size of the volume [default: the image's]
    #[arg(long, value_parser = parse_bytes, value_name = "SIZE")]
    pub size: Option<u64>,
    /// Where the image comes from if it is not known; - reads the URL from stdin
    #[arg(long, value_name = "URL")]
    pub url: Option<String>,
}

/// Arguments of `volume create`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  bedplate volume create vm-7 --image debian-12
  bedplate volume create vm-7 --image debian-12 --url https://example.org/debian-12.qcow2")]
pub struct VolumeCreateArgs {
    /// The volume
    pub name: VolumeName,
    /// The image that it stands on
    #[arg(long, value_name = "IMAGE")]
    pub image: ImageName,
    /// SHA-512 that the image's file must have
    #[arg(long, value_name = "HEX")]
    pub sha512: Option<String>,
    #[command(flatten)]
    #[expect(missing_docs, reason = "documented at its type")]
    pub replicas: ReplicaArgs,
}

/// Arguments of `volume restore`.
#[derive(Debug, Args)]
#[command(after_help = "\
The backup's volume.cfg says which image it was made on, and with which SHA-512. Another image, or
one whose SHA-512 is another or not known, is refused (exit code 1) unless --force is given: a backup
holds only what differs from its image.

Examples:
  bedplate volume restore vm-8 --backup volume.cfg
  bedplate volume restore vm-8 --backup - < volume.cfg
  bedplate volume restore vm-8 --backup volume.cfg --url https://example.org/debian-12.qcow2
  bedplate volume restore vm-8 --backup volume.cfg --image debian-12-copy")]
pub struct VolumeRestoreArgs {
    /// The volume
    pub name: VolumeName,
    /// The volume.cfg of the backup volume: a file, - for stdin, or the JSON itself
    #[arg(long, value_name = "FILE|JSON")]
    pub backup: String,
    /// Another image than the one that the backup records
    #[arg(long, value_name = "IMAGE")]
    pub image: Option<ImageName>,
    /// The image is right, whatever its digest
    #[arg(long)]
    pub force: bool,
    #[command(flatten)]
    #[expect(missing_docs, reason = "documented at its type")]
    pub replicas: ReplicaArgs,
}

/// Arguments of `volume list`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  bedplate volume list\n  bedplate volume list --json")]
pub struct VolumeListArgs {}

/// Arguments of the commands on one volume.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  bedplate volume get vm-7")]
pub struct VolumeNameArgs {
    /// The volume
    pub name: VolumeName,
}

/// Arguments of `volume attach`.
#[derive(Debug, Args)]
#[command(after_help = "\
Waits until every replica runs. Attaching again tries again what was refused.

Examples:
  bedplate volume attach vm-7
  bedplate volume attach vm-7 --no-wait --json")]
pub struct VolumeAttachArgs {
    /// The volume
    pub name: VolumeName,
    /// Return at once
    #[arg(long)]
    pub no_wait: bool,
}

/// Arguments of `class`.
#[derive(Debug, Args)]
#[command(after_help = "\
Storage classes come in by `bedplate apply`.

Examples:
  bedplate class list
  bedplate class get longhorn --json
  bedplate class delete longhorn")]
pub struct ClassArgs {
    /// What to do
    #[command(subcommand)]
    pub command: ClassCommand,
}

/// The commands on storage classes.
#[derive(Debug, Subcommand)]
pub enum ClassCommand {
    /// List storage classes
    List(ClassListArgs),
    /// Show one storage class
    Get(ClassNameArgs),
    /// Forget a storage class; what was made by it stays
    Delete(ClassNameArgs),
}

/// Arguments of `class list`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  bedplate class list\n  bedplate class list --json")]
pub struct ClassListArgs {}

/// Arguments of the commands on one storage class.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  bedplate class get longhorn")]
pub struct ClassNameArgs {
    /// The storage class
    pub name: ClassName,
}

/// Arguments of `apply`.
#[derive(Debug, Args)]
#[command(after_help = "\
Takes StorageClasses (also in a ConfigMap's storageclass.yaml), PersistentVolumeClaims, and Longhorn's
BackingImages and Volumes; several documents in one file. Applying again changes nothing. All are read
before the first is applied; an unknown kind is an error, an unknown parameter is said and passed over.

Examples:
  bedplate apply -f storageclass.yaml
  cat class.yaml claim.yaml | bedplate apply -f -
  bedplate volume attach my-claim")]
pub struct ApplyArgs {
    /// The manifest: a file, or - for stdin
    #[arg(short, long, value_name = "FILE")]
    pub file: PathBuf,
}
