//! A StorageClass's parameters, each of Longhorn's by its name.
//!
//! Why: a class that is applied elsewhere should mean the same here, or say where it does not.
//! How: what makes images and volumes is read and checked; what means nothing on one node is kept as
//! it is; what is not known is said. The parameters of the data source are JSON within a text.
//! Never: repeats a URL in an error or a note.
//! Start at [`parse_class`].

use std::collections::BTreeMap;

use serde_json::Value;

use super::document::{Fields, ImageSource, Object, Selectors};
use super::error::Fault;
use crate::names::{ClassName, ImageName};

/// A storage class.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Class {
    /// Its name.
    pub name: ClassName,
    /// As it was given; may be empty.
    pub provisioner: String,
    /// Name of the image.
    pub image: Option<ImageName>,
    /// Where a missing image comes from.
    pub source: Option<ImageSource>,
    /// The SHA-512 that its file must have, lower-case hex.
    pub sha512: Option<String>,
    /// Copies that it is to have, and that stay although nobody uses them.
    pub min_copies: Option<u32>,
    /// Replicas of a volume.
    pub replicas: Option<u32>,
    /// On which disks its image may be.
    pub selectors: Selectors,
    /// Parameters that mean nothing on one node.
    pub kept: BTreeMap<String, String>,
}

/// Read, and used.
const USED: [&str; 11] = [
    "backingImage",
    "backingImageName",
    "backingImageURL",
    "backingImageDataSourceType",
    "backingImageDataSourceParameters",
    "backingImageChecksum",
    "backingImageMinNumberOfCopies",
    "backingImageNodeSelector",
    "backingImageDiskSelector",
    "numberOfReplicas",
    "fromBackup",
];
/// Said when given: they choose disks for what guests write, which is not kept here.
const SELECTORS: [&str; 2] = ["nodeSelector", "diskSelector"];
/// Kept, and without meaning on one node that never writes.
const KEPT: [&str; 20] = [
    "staleReplicaTimeout",
    "fsType",
    "mkfsParams",
    "migratable",
    "dataLocality",
    "dataEngine",
    "replicaAutoBalance",
    "recurringJobs",
    "recurringJobSelector",
    "unmapMarkSnapChainRemoved",
    "disableRevisionCounter",
    "replicaSoftAntiAffinity",
    "replicaZoneSoftAntiAffinity",
    "replicaDiskSoftAntiAffinity",
    "nfsOptions",
    "share",
    "exclusive",
    "freezeFilesystemForSnapshot",
    "backupTargetName",
    "snapshotDataIntegrity",
];
/// Longest value that is kept, in bytes.
const MAX_KEPT_LEN: usize = 1024;

pub(super) fn parse_class(value: &Value) -> Result<(Object, Vec<String>), Fault> {
    let fields = Fields::of("StorageClass", value)?;
    let of = |key: &str| format!("parameters.{key}");
    if fields.text(&of("fromBackup"))?.is_some() {
        let why = "a class restores nothing here; use `bedplate volume restore`";
        return Err(fields.wrong(&of("fromBackup"), &why));
    }
    let mut notes = Vec::new();
    let image = match fields.text(&of("backingImage"))? {
        Some(image) => Some(image),
        None => fields.text(&of("backingImageName"))?,
    };
    let image = image.map(|image| ImageName::parse(&image)).transpose();
    let mut class = Class {
        name: fields.parsed("metadata.name", ClassName::parse)?,
        provisioner: fields.text("provisioner")?.unwrap_or_default(),
        image: image.map_err(|e| fields.wrong(&of("backingImage"), &e))?,
        source: source(&fields, &mut notes)?,
        sha512: fields.sha512(&of("backingImageChecksum"))?,
        min_copies: fields.number(&of("backingImageMinNumberOfCopies"), u32::MAX)?,
        replicas: fields.number(&of("numberOfReplicas"), 64)?.filter(|count| *count > 0),
        selectors: Selectors {
            disk: fields.tags(&of("backingImageDiskSelector"))?,
            node: fields.tags(&of("backingImageNodeSelector"))?,
        },
        kept: BTreeMap::new(),
    };
    if class.image.is_none() {
        if class.source.is_some() {
            return Err(fields.wrong(&of("backingImage"), &"missing, and there is a source for it"));
        }
        notes.push("no backingImage: volumes of this class cannot be made here".to_owned());
    }
    let nothing = serde_json::Map::new();
    let parameters = value["parameters"].as_object().unwrap_or(&nothing);
    for key in parameters.keys().filter(|key| !USED.contains(&key.as_str())) {
        let shown: String = key.chars().take(80).collect();
        if SELECTORS.contains(&key.as_str()) {
            if fields.text(&of(key))?.is_some() {
                notes
                    .push(format!("{shown} is passed over: replicas are where their image may be"));
            }
        } else if !KEPT.contains(&key.as_str()) && !key.starts_with("csi.storage.k8s.io/") {
            notes.push(format!("{shown} is not known, and passed over"));
            continue;
        }
        // By its own name: a name with dots in it is no path.
        let text = match &parameters[key] {
            Value::String(text) => text.clone(),
            other @ (Value::Null
            | Value::Bool(_)
            | Value::Number(_)
            | Value::Array(_)
            | Value::Object(_)) => other.to_string(),
        };
        if text.len() > MAX_KEPT_LEN {
            return Err(fields.wrong(&of(key), &format!("more than {MAX_KEPT_LEN} bytes")));
        }
        class.kept.insert(key.clone(), text);
    }
    Ok((Object::Class(class), notes))
}

/// The URL: `backingImageURL`, as in 1.1.1, or `url` of the data source's parameters, or that of the
/// backup in a bucket from which it is restored; or the image that it is a clone of.
fn source(fields: &Fields<'_>, notes: &mut Vec<String>) -> Result<Option<ImageSource>, Fault> {
    let old = "parameters.backingImageURL";
    let old = fields.text(old)?.map(|text| fields.url(old, &text)).transpose()?;
    let kind = fields.text("parameters.backingImageDataSourceType")?;
    let field = "parameters.backingImageDataSourceParameters";
    let is_restored = kind.as_deref() == Some("restore");
    let is_clone = kind.as_deref() == Some("clone");
    let (mut new, mut other) = (None, None);
    if let Some(text) = fields.text(field)? {
        let parsed: Result<serde_json::Map<String, Value>, _> = serde_json::from_str(&text);
        // The parser's own words are left out: they may repeat a part of the URL.
        let parameters = parsed.map_err(|error| {
            let column = error.column();
            let why = format!(
                "not a JSON object of texts (at column {column}); write it in single quotes: \
                 '{{\"url\": \"https://…\"}}'"
            );
            fields.wrong(field, &why)
        })?;
        for (key, value) in &parameters {
            let shown: String = key.chars().take(80).collect();
            match (key.as_str(), value) {
                ("url", Value::String(text)) => new = Some(fields.url(field, text.trim())?),
                ("backup-url", Value::String(text)) if is_restored && is_readable(text.trim()) => {
                    other = Some(ImageSource::Url(fields.url(field, text.trim())?));
                }
                ("backing-image", Value::String(text)) if is_clone => {
                    let image = ImageName::parse(text).map_err(|e| fields.wrong(field, &e))?;
                    other = Some(ImageSource::Clone(image));
                }
                ("encryption" | "secret" | "secret-namespace", Value::String(text)) if is_clone => {
                    plain_clone(key, text).map_err(|why| fields.wrong(field, &why))?;
                }
                ("url", _) => return Err(fields.wrong(field, &"url: give a text")),
                _ => notes.push(format!("{shown} of the data source is passed over")),
            }
        }
    }
    match kind.as_deref() {
        None | Some("download") => {}
        Some(_) if new.is_some() || old.is_some() => {
            let why = "only download has a url";
            return Err(fields.wrong("parameters.backingImageDataSourceType", &why));
        }
        Some("clone" | "restore") if other.is_some() => return Ok(other),
        Some(other) => {
            let other: String = other.chars().take(40).collect();
            notes.push(format!(
                "{other}: its image is not made by a class here, and has to be known"
            ));
        }
    }
    match (old, new) {
        (Some(old), Some(new)) if old != new => {
            Err(fields.wrong("parameters.backingImageURL", &"another URL than the data source's"))
        }
        (old, new) => Ok(new.or(old).map(ImageSource::Url)),
    }
}

/// A clone has the bytes that it is a clone of: what would change them is refused, with what to do.
pub(super) fn plain_clone(key: &str, text: &str) -> Result<(), &'static str> {
    match (key, text) {
        (_, "") | ("encryption", "ignore") => Ok(()),
        ("encryption", "encrypt" | "decrypt") => {
            Err("images are neither encrypted nor decrypted here; give ignore, or leave it out")
        }
        ("encryption", _) => Err("encryption: give ignore, or leave it out"),
        _ => Err("a clone is made as it is, and needs no secret; leave it out"),
    }
}

/// True for the URL of a backup that can be read here: not of one on a share that is mounted elsewhere.
pub(super) fn is_readable(backup: &str) -> bool {
    backup.starts_with("s3://") || backup.starts_with("backup://")
}
