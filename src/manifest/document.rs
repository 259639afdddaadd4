//! Documents: from a manifest's text to what each of them asks for.
//!
//! Why: what users of Kubernetes and Longhorn write says all that is needed.
//! How: the text is cut at the lines that separate documents, so that every error has its line; each
//! is read into a JSON value by a parser with bounds, and then field by field.
//! Never: passes over a field in silence that would change what is made.
//! Start at [`read`].

use std::collections::BTreeSet;

use serde_json::Value;

use super::class::{Class, is_readable, parse_class, plain_clone};
use super::error::{Fault, ManifestError};
use super::quantity::parse_quantity;
use crate::fetch::{DigestKind, DigestMap, SourceUrl};
use crate::names::{ClassName, ImageName, Tag, VolumeName};

/// Most documents of one manifest, those in ConfigMaps included.
pub const MAX_DOCUMENTS: usize = 256;

/// What one document asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Object {
    /// A `StorageClass`.
    Class(Class),
    /// A `PersistentVolumeClaim`.
    Claim(Claim),
    /// Longhorn's `BackingImage`.
    Image(Image),
    /// Longhorn's `Volume`.
    Volume(Volume),
}

/// A claim of a volume.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Claim {
    /// Its name, which the volume gets.
    pub name: VolumeName,
    /// Its namespace.
    pub namespace: String,
    /// Its storage class.
    pub class: ClassName,
    /// Size that is asked for, in bytes.
    pub size_bytes: Option<u64>,
}

/// An image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Image {
    /// Its name.
    pub name: ImageName,
    /// Where it comes from.
    pub source: ImageSource,
    /// The SHA-512 that its file must have, lower-case hex.
    pub sha512: Option<String>,
    /// Copies that it is to have, and that stay although nobody uses them.
    pub min_copies: Option<u32>,
    /// On which disks it may be.
    pub selectors: Selectors,
}

/// Tags that a disk, and its node, must have.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Selectors {
    /// Of its own.
    pub disk: BTreeSet<Tag>,
    /// Of its node's.
    pub node: BTreeSet<Tag>,
}

/// Where an image comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ImageSource {
    /// From a URL.
    Url(SourceUrl),
    /// It is a clone of this image.
    Clone(ImageName),
}

/// A volume.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Volume {
    /// Its name.
    pub name: VolumeName,
    /// The image that it stands on.
    pub image: ImageName,
    /// How many replicas.
    pub replicas: Option<u32>,
    /// Size in bytes.
    pub size_bytes: Option<u64>,
}

impl Object {
    /// The kind, as the manifest has it.
    #[must_use]
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Class(_) => "StorageClass",
            Self::Claim(_) => "PersistentVolumeClaim",
            Self::Image(_) => "BackingImage",
            Self::Volume(_) => "Volume",
        }
    }

    /// The name.
    #[must_use]
    pub fn name(&self) -> String {
        match self {
            Self::Class(class) => class.name.to_string(),
            Self::Claim(claim) => claim.name.to_string(),
            Self::Image(image) => image.name.to_string(),
            Self::Volume(volume) => volume.name.to_string(),
        }
    }
}

/// One document that was read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Document {
    /// Which one, from 1.
    pub number: u64,
    /// The line on which it begins, from 1.
    pub line: u64,
    /// What it asks for.
    pub object: Object,
    /// What was passed over, in words.
    pub notes: Vec<String>,
}

/// Reads all documents of a manifest.
///
/// # Errors
/// [`ManifestError`] of the first one that is wrong.
pub fn read(text: &str) -> Result<Vec<Document>, ManifestError> {
    let mut documents = Vec::new();
    for (index, (line, part)) in cut(text).into_iter().enumerate() {
        let number = index as u64 + 1;
        let at = |line, fault| ManifestError { document: number, line, fault };
        let value = parse(part).map_err(|(within, fault)| at(line + within, fault))?;
        let mut found = Vec::new();
        let within = |(within, fault)| at(line + within, fault);
        read_one(&value, Some(part), &mut found).map_err(within)?;
        for (object, notes) in found {
            documents.push(Document { number, line, object, notes });
        }
        if documents.len() > MAX_DOCUMENTS {
            return Err(at(line, Fault::TooMany { most: MAX_DOCUMENTS }));
        }
    }
    if documents.is_empty() {
        return Err(ManifestError { document: 1, line: 1, fault: Fault::Empty });
    }
    Ok(documents)
}

/// The documents and the lines on which they begin. A separator stands at the beginning of a line,
/// where no text of a document may have one.
fn cut(text: &str) -> Vec<(u64, &str)> {
    let (mut parts, mut start, mut at, mut first) = (Vec::new(), 0, 0, 1);
    for (index, line) in text.split_inclusive('\n').enumerate() {
        let mark = ["---", "..."].into_iter().find_map(|mark| line.strip_prefix(mark));
        if mark.is_some_and(|rest| rest.is_empty() || rest.starts_with(char::is_whitespace)) {
            parts.push((first, text.get(start..at).unwrap_or_default()));
            // What follows on the separator's own line belongs to the document.
            let rest = mark.unwrap_or_default();
            start = at + line.len() - rest.len();
            first = index as u64 + if rest.trim().is_empty() { 2 } else { 1 };
        }
        at += line.len();
    }
    parts.push((first, text.get(start..).unwrap_or_default()));
    let says = |line: &str| {
        let line = line.trim();
        !line.is_empty() && !line.starts_with('#') && !line.starts_with('%')
    };
    parts.retain(|(_, part)| part.lines().any(says));
    parts
}

/// A document from its first line on: a newline that is left of the separator's line is not counted.
fn from_first_line(text: &str) -> &str {
    text.strip_prefix("\r\n").or_else(|| text.strip_prefix('\n')).unwrap_or(text)
}

/// How many lines below a ConfigMap's first the text of its class begins. Of one in quotes, which may
/// be folded, only where it stands is known.
fn class_begins(config_map: &str) -> (u64, bool) {
    let key = |line: &str| {
        let line = line.trim_start().trim_start_matches(['"', '\'']);
        let rest = line.strip_prefix(CLASS_KEY)?.trim_start_matches(['"', '\'']).trim_start();
        rest.strip_prefix(':').map(|rest| rest.trim_start().starts_with('|'))
    };
    let mut lines = (0..).zip(from_first_line(config_map).lines());
    let found = lines.find_map(|(index, line)| Some((index, key(line)?)));
    found.map_or((0, false), |(index, is_block)| (index + u64::from(is_block), is_block))
}

/// A document's value; of an error, how many lines below the document's first it is.
fn parse(text: &str) -> Result<Value, (u64, Fault)> {
    let text = from_first_line(text);
    serde_saphyr::from_str(text).map_err(|error| {
        let within = error.location().map_or(0, |at| at.line().saturating_sub(1));
        let what = error.without_snippet().to_string();
        let what = what.lines().next().unwrap_or("no YAML");
        // Its own line counts from the document's first, and is told already.
        let what = what.split(" at line ").next().unwrap_or(what);
        let hint = match what.contains("escape") {
            true => "; in \"double quotes\" a backslash begins an escape: use 'single quotes'",
            false => "",
        };
        let what = what.chars().take(200).chain(hint.chars()).collect();
        (within, Fault::Yaml { what })
    })
}

/// Where Longhorn's ConfigMap has its class.
const CLASS_KEY: &str = "storageclass.yaml";

type Found = (Object, Vec<String>);

/// Adds what a document has; of an error, how many lines below the document's first it is. `outer` is
/// the document's text, unless it is in another one.
fn read_one(
    value: &Value,
    outer: Option<&str>,
    found: &mut Vec<Found>,
) -> Result<(), (u64, Fault)> {
    let here = |fault| (0, fault);
    let text = |field: &str| value[field].as_str().unwrap_or_default().chars().take(80).collect();
    let (kind, api): (String, String) = (text("kind"), text("apiVersion"));
    let group = api.split('/').next().unwrap_or_default();
    let one = match (kind.as_str(), group) {
        ("StorageClass", "storage.k8s.io") => parse_class(value).map_err(here)?,
        ("PersistentVolumeClaim", "v1") => parse_claim(value).map_err(here)?,
        ("BackingImage", "longhorn.io") => parse_image(value).map_err(here)?,
        ("Volume", "longhorn.io") => parse_volume(value).map_err(here)?,
        ("ConfigMap", "v1") if outer.is_some() && value["data"][CLASS_KEY].is_string() => {
            let inner = value["data"][CLASS_KEY].as_str().unwrap_or_default();
            let (start, is_block) = class_begins(outer.unwrap_or_default());
            for (first, part) in cut(inner) {
                let at = |(within, fault)| match is_block {
                    true => (start + first - 1 + within, fault),
                    false => (start, fault),
                };
                let value = parse(part).map_err(at)?;
                read_one(&value, None, found).map_err(at)?;
            }
            return Ok(());
        }
        _ => return Err(here(Fault::Kind { kind, api })),
    };
    found.push(one);
    Ok(())
}

/// Says which field of which object is wrong.
#[derive(Clone, Debug)]
pub(super) struct Fields<'a> {
    pub(super) kind: &'static str,
    pub(super) name: String,
    pub(super) value: &'a Value,
}

impl<'a> Fields<'a> {
    pub(super) fn of(kind: &'static str, value: &'a Value) -> Result<Self, Fault> {
        let name = value["metadata"]["name"].as_str().unwrap_or_default();
        let fields = Self { kind, name: name.chars().take(80).collect(), value };
        match name.is_empty() {
            true => Err(fields.wrong("metadata.name", &"missing")),
            false => Ok(fields),
        }
    }

    pub(super) fn wrong(&self, field: &str, why: &dyn std::fmt::Display) -> Fault {
        let (kind, name) = (self.kind, self.name.clone());
        Fault::Field { kind, name, field: field.to_owned(), why: why.to_string() }
    }

    /// A text or a number, as text; `None` if it is absent or empty. `field` has dots between.
    pub(super) fn text(&self, field: &str) -> Result<Option<String>, Fault> {
        let mut value = self.value;
        for part in field.split('.') {
            value = &value[part];
        }
        match value {
            Value::Null => Ok(None),
            Value::String(text) => Ok(Some(text.trim().to_owned()).filter(|t| !t.is_empty())),
            Value::Number(number) => Ok(Some(number.to_string())),
            Value::Bool(_) | Value::Array(_) | Value::Object(_) => {
                Err(self.wrong(field, &"give a text or a number"))
            }
        }
    }

    /// A text that has to be there and to obey its rules.
    pub(super) fn parsed<T, E: std::fmt::Display>(
        &self,
        field: &str,
        parse: impl FnOnce(&str) -> Result<T, E>,
    ) -> Result<T, Fault> {
        let text = self.text(field)?.ok_or_else(|| self.wrong(field, &"missing"))?;
        parse(&text).map_err(|e| self.wrong(field, &e))
    }

    /// A number from 0, or nothing.
    pub(super) fn number(&self, field: &str, most: u32) -> Result<Option<u32>, Fault> {
        let Some(text) = self.text(field)? else { return Ok(None) };
        let number = text.parse().ok().filter(|number| *number <= most);
        number.map(Some).ok_or_else(|| self.wrong(field, &format!("give 0 to {most}")))
    }

    /// A SHA-512, or nothing.
    pub(super) fn sha512(&self, field: &str) -> Result<Option<String>, Fault> {
        let Some(text) = self.text(field)? else { return Ok(None) };
        let digests = DigestMap::parse([(DigestKind::Sha512, Some(text.as_str()))]);
        let digests = digests.map_err(|e| self.wrong(field, &e))?;
        Ok(digests.get(DigestKind::Sha512).map(str::to_owned))
    }

    /// Tags: a list of texts, or one text with commas between, as in a class.
    pub(super) fn tags(&self, field: &str) -> Result<BTreeSet<Tag>, Fault> {
        let mut value = self.value;
        for part in field.split('.') {
            value = &value[part];
        }
        let wrong = |e: &dyn std::fmt::Display| Err(self.wrong(field, e));
        let Some(list) = value.as_array() else {
            let text = self.text(field)?.unwrap_or_default();
            let parts = text.split(',').map(str::trim).filter(|part| !part.is_empty());
            return Tag::parse_all(parts).or_else(|e| wrong(&e));
        };
        match list.iter().map(Value::as_str).collect::<Option<Vec<&str>>>() {
            Some(texts) => Tag::parse_all(texts).or_else(|e| wrong(&e)),
            None => wrong(&"give a list of texts"),
        }
    }

    /// A URL. Of it nothing but the scheme is in an error.
    pub(super) fn url(&self, field: &str, text: &str) -> Result<SourceUrl, Fault> {
        if text.contains('\\') {
            let why = "the URL has a backslash: YAML in single quotes needs no escapes, and in JSON \
                       only \\/ and \\uXXXX belong to a URL; write one that is meant as %5C";
            return Err(self.wrong(field, &why));
        }
        SourceUrl::parse(text).map_err(|e| self.wrong(field, &e))
    }
}

fn parse_claim(value: &Value) -> Result<Found, Fault> {
    let fields = Fields::of("PersistentVolumeClaim", value)?;
    let size = fields.text("spec.resources.requests.storage")?;
    let size = size.map(|text| parse_quantity(&text)).transpose();
    let claim = Claim {
        name: fields.parsed("metadata.name", VolumeName::parse)?,
        namespace: fields.text("metadata.namespace")?.unwrap_or_else(|| "default".to_owned()),
        class: fields.parsed("spec.storageClassName", ClassName::parse)?,
        size_bytes: size.map_err(|e| fields.wrong("spec.resources.requests.storage", &e))?,
    };
    if !value["spec"]["dataSource"].is_null() || !value["spec"]["dataSourceRef"].is_null() {
        let why = "a volume is not made from another one here; `bedplate volume restore` restores \
                   a backup";
        return Err(fields.wrong("spec.dataSource", &why));
    }
    Ok((Object::Claim(claim), Vec::new()))
}

fn parse_image(value: &Value) -> Result<Found, Fault> {
    let fields = Fields::of("BackingImage", value)?;
    let image = Image {
        name: fields.parsed("metadata.name", ImageName::parse)?,
        source: image_source(&fields)?,
        sha512: fields.sha512("spec.checksum")?,
        min_copies: fields.number("spec.minNumberOfCopies", u32::MAX)?,
        selectors: Selectors {
            disk: fields.tags("spec.diskSelector")?,
            node: fields.tags("spec.nodeSelector")?,
        },
    };
    Ok((Object::Image(image), Vec::new()))
}

/// Longhorn's `sourceType` and its parameters.
fn image_source(fields: &Fields<'_>) -> Result<ImageSource, Fault> {
    let kind = fields.text("spec.sourceType")?;
    let why = match kind.as_deref() {
        None | Some("download") => {
            let field = "spec.sourceParameters.url";
            let url = fields.text(field)?.ok_or_else(|| fields.wrong(field, &"missing"))?;
            return fields.url(field, &url).map(ImageSource::Url);
        }
        Some("clone") => return clone_source(fields),
        Some("upload") => "an upload is not applied; `bedplate upload FILE` brings a file in",
        Some("export-from-volume") => {
            "volumes hold no data here; serve the volume over NBD (such as with qemu-nbd -r) and use \
             `bedplate create NAME --from-nbd URI`"
        }
        Some("restore") => {
            let field = "spec.sourceParameters.backup-url";
            let url = fields.text(field)?.ok_or_else(|| fields.wrong(field, &"missing"))?;
            if is_readable(&url) {
                return fields.url(field, &url).map(ImageSource::Url);
            }
            "a backup target is not mounted here; mount it, and bring the image in by URL: `bedplate \
             create 'backup:///MOUNTED?backingImage=NAME'`"
        }
        Some(_) => "not known; download, clone and restore can be applied",
    };
    Err(fields.wrong("spec.sourceType", &why))
}

fn clone_source(fields: &Fields<'_>) -> Result<ImageSource, Fault> {
    for key in ["encryption", "secret", "secret-namespace"] {
        let field = format!("spec.sourceParameters.{key}");
        let text = fields.text(&field)?.unwrap_or_default();
        plain_clone(key, &text).map_err(|why| fields.wrong(&field, &why))?;
    }
    fields.parsed("spec.sourceParameters.backing-image", ImageName::parse).map(ImageSource::Clone)
}

fn parse_volume(value: &Value) -> Result<Found, Fault> {
    let fields = Fields::of("Volume", value)?;
    if fields.text("spec.fromBackup")?.is_some() {
        let why = "use `bedplate volume restore` with the backup's volume.cfg";
        return Err(fields.wrong("spec.fromBackup", &why));
    }
    let size = fields.text("spec.size")?.map(|text| parse_quantity(&text)).transpose();
    let volume = Volume {
        name: fields.parsed("metadata.name", VolumeName::parse)?,
        image: fields.parsed("spec.backingImage", ImageName::parse)?,
        replicas: fields.number("spec.numberOfReplicas", 64)?.filter(|count| *count > 0),
        size_bytes: size.map_err(|e| fields.wrong("spec.size", &e))?,
    };
    Ok((Object::Volume(volume), Vec::new()))
}
