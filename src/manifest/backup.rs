//! A Longhorn backup volume's configuration, `volume.cfg`: which image a backup was made on.
//!
//! Why: a backup holds only what differs from its image; on another image it is garbage.
//! How: the few properties that matter, as JSON. Go's `json:",string"` writes a text within a text
//! (`"\"parrot\""`), and older and other writers do not: both are read.
//! Never: believes a name or a digest that breaks its rules, or repeats the text in an error.
//! Start at [`Backup::parse`].

use serde_json::Value;

use crate::fetch::{DigestKind, DigestMap};
use crate::names::ImageName;

/// Longest name of a volume or a backup that is kept, in bytes.
const MAX_NAME_LEN: usize = 253;

/// What of a backup volume's configuration matters here.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Backup {
    /// `Name`: the volume that was backed up; may be empty.
    pub volume: String,
    /// `LastBackupName`; may be empty.
    pub backup: String,
    /// `BackingImageName`; `None` if the volume had no image.
    pub image: Option<ImageName>,
    /// `BackingImageChecksum`: the image's SHA-512, lower-case hex.
    pub sha512: Option<String>,
    /// `Size`: bytes of the volume.
    pub size_bytes: Option<u64>,
}

/// Why a configuration is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {why}; give the volume.cfg of a backup volume")]
pub struct BadBackup {
    /// Which property; "volume.cfg" for the whole.
    pub field: &'static str,
    /// What is wrong with it.
    pub why: String,
}

impl Backup {
    /// Reads a `volume.cfg`.
    ///
    /// # Errors
    /// [`BadBackup`] names the property that breaks its rule.
    pub fn parse(cfg: &Value) -> Result<Self, BadBackup> {
        let Some(all) = cfg.as_object() else {
            return Err(BadBackup { field: "volume.cfg", why: "not a JSON object".to_owned() });
        };
        let known = ["Name", "Size", "BackingImageName", "BackingImageChecksum"];
        if !known.iter().any(|field| all.contains_key(*field)) {
            let why = "has none of Name, Size, BackingImageName, BackingImageChecksum".to_owned();
            return Err(BadBackup { field: "volume.cfg", why });
        }
        let name = |field| {
            let text = text(cfg, field)?;
            let ok = text.len() <= MAX_NAME_LEN && !text.chars().any(char::is_control);
            let why = || format!("more than {MAX_NAME_LEN} bytes, or control characters");
            if ok { Ok(text) } else { Err(BadBackup { field, why: why() }) }
        };
        let image = text(cfg, "BackingImageName")?;
        let image = Some(image).filter(|name| !name.is_empty());
        let image = image.map(|name| ImageName::parse(&name)).transpose();
        let sha512 = text(cfg, "BackingImageChecksum")?;
        let digests = Some(sha512.as_str()).filter(|text| !text.is_empty());
        let digests = DigestMap::parse([(DigestKind::Sha512, digests)]);
        let size = text(cfg, "Size")?;
        let size = Some(size).filter(|size| !size.is_empty()).map(|size| size.parse());
        let not = |field| {
            move |error: &dyn std::fmt::Display| BadBackup { field, why: error.to_string() }
        };
        Ok(Self {
            volume: name("Name")?,
            backup: name("LastBackupName")?,
            image: image.map_err(|e| not("BackingImageName")(&e))?,
            sha512: digests
                .map_err(|e| not("BackingImageChecksum")(&e))?
                .get(DigestKind::Sha512)
                .map(str::to_owned),
            size_bytes: size.transpose().map_err(|_| not("Size")(&"not a number of bytes"))?,
        })
    }
}

/// A text, a text within a text, or a number; nothing at all is empty.
fn text(cfg: &Value, field: &'static str) -> Result<String, BadBackup> {
    match &cfg[field] {
        Value::Null => Ok(String::new()),
        Value::String(text) if text.starts_with('"') => serde_json::from_str(text)
            .map_err(|_| BadBackup { field, why: "a quoted text that does not end".to_owned() }),
        Value::String(text) => Ok(text.clone()),
        Value::Number(number) => Ok(number.to_string()),
        Value::Bool(_) | Value::Array(_) | Value::Object(_) => {
            Err(BadBackup { field, why: "not a text".to_owned() })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(json: &str) -> Result<Backup, BadBackup> {
        Backup::parse(&serde_json::from_str(json).unwrap())
    }

    #[test]
    fn longhorns_own_configuration_is_read_with_and_without_texts_within_texts() {
        let sha512 = "AB".repeat(64);
        let within = format!(
            r#"{{"Name":"vm","Size":"10737418240","Labels":{{"a":"b"}},"CreatedTime":"2026",
                "LastBackupName":"backup-1","BlockCount":"3","BackingImageName":"\"parrot\"",
                "BackingImageChecksum":"\"{sha512}\"","CompressionMethod":"\"lz4\""}}"#
        );
        let plain = format!(
            r#"{{"Name":"vm","Size":10737418240,"LastBackupName":"backup-1",
                "BackingImageName":"parrot","BackingImageChecksum":"{sha512}"}}"#
        );
        let want = Backup {
            volume: "vm".to_owned(),
            backup: "backup-1".to_owned(),
            image: Some(ImageName::parse("parrot").unwrap()),
            sha512: Some(sha512.to_lowercase()),
            size_bytes: Some(10_737_418_240),
        };
        assert_eq!(parse(&within), Ok(want.clone()));
        assert_eq!(parse(&plain), Ok(want));
        let none = parse(r#"{"Name":"vm","BackingImageName":"\"\"","BackingImageChecksum":""}"#);
        assert_eq!(none.map(|backup| (backup.image, backup.sha512)), Ok((None, None)));
    }

    #[test]
    fn what_cannot_be_right_is_refused_by_its_property() {
        for (json, field) in [
            ("[]", "volume.cfg"),
            ("{}", "volume.cfg"),
            (r#"{"Name":7,"BackingImageName":"../x"}"#, "BackingImageName"),
            (r#"{"BackingImageName":["x"]}"#, "BackingImageName"),
            (r#"{"BackingImageName":"\"x"}"#, "BackingImageName"),
            (r#"{"BackingImageName":"x","BackingImageChecksum":"abc"}"#, "BackingImageChecksum"),
            (r#"{"Name":"a\u0007"}"#, "Name"),
            (r#"{"Size":"-1"}"#, "Size"),
        ] {
            assert_eq!(parse(json).map_err(|e| e.field), Err(field), "{json}");
        }
    }
}
