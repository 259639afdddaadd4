//! Names that a user, a manager or a directory listing gives us, checked once.
//!
//! Why: an image's name becomes a directory, an NBD export and a worker's name; an unchecked one
//! is a path traversal.
//! How: parsed into types whose value obeys the rules; everything downstream takes the type. Their
//! text is shared: a name is cloned all the time, and never changes.
//! Never: joins a string that is not one of these types into a path.
//! Start at [`ImageName`].

use std::collections::BTreeSet;
use std::fmt;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

/// Why a name is refused. The message prints the name and the rule.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{what} {found:?} is not usable: {rule}")]
pub struct NameError {
    /// What was being named: "image name", "disk UUID", "image uuid", …
    pub what: &'static str,
    /// The text as given, cut to 80 characters.
    pub found: String,
    /// The rule that it breaks, in words.
    pub rule: &'static str,
}

impl NameError {
    fn new(what: &'static str, found: &str, rule: &'static str) -> Self {
        Self { what, found: found.chars().take(80).collect(), rule }
    }
}

/// An image's name: a DNS label as in RFC 1123 (`a-z 0-9 -`, 1 to 63 characters, no dash at an end).
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ImageName(Arc<str>);

impl ImageName {
    /// Longest name in bytes.
    pub const MAX_LEN: usize = 63;

    /// Checks `text` against the rules of a DNS label.
    ///
    /// # Errors
    /// [`NameError`] with the broken rule.
    pub fn parse(text: &str) -> Result<Self, NameError> {
        check_label("image name", text)?;
        Ok(Self(text.into()))
    }

    /// The best name that can be made of a URL's or a path's last part:
    /// `…/Debian_12-cloud.qcow2?x=1` gives `debian-12-cloud`. `None` if nothing usable is left.
    #[must_use]
    pub fn suggest(source: &str) -> Option<Self> {
        let path = source.split(['?', '#']).next().unwrap_or(source);
        let last = path.trim_end_matches('/').rsplit('/').next()?.to_ascii_lowercase();
        let without = |text: &str, endings: &[&str]| {
            let short = endings.iter().find_map(|ending| text.strip_suffix(ending));
            short.unwrap_or(text).to_owned()
        };
        let stem = without(&last, &[".gz", ".xz", ".zst", ".bz2"]);
        let formats = [".qcow2", ".img", ".raw", ".qcow", ".iso", ".vmdk", ".vhdx", ".vhd"];
        let stem = without(&stem, &formats);
        let mut name: String = stem
            .chars()
            .map(|c| if c.is_ascii_lowercase() || c.is_ascii_digit() { c } else { '-' })
            .collect();
        while name.contains("--") {
            name = name.replace("--", "-");
        }
        let name: String = name.trim_matches('-').chars().take(Self::MAX_LEN).collect();
        Self::parse(name.trim_matches('-')).ok()
    }
}

/// The rules of a DNS label, as in RFC 1123.
fn check_label(what: &'static str, text: &str) -> Result<(), NameError> {
    let refuse = |rule| Err(NameError::new(what, text, rule));
    if text.is_empty() || text.len() > ImageName::MAX_LEN {
        return refuse("a name has 1 to 63 characters");
    }
    if !text.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-') {
        return refuse("a name has only a-z, 0-9 and '-'");
    }
    if text.starts_with('-') || text.ends_with('-') {
        return refuse("a name begins and ends with a letter or digit");
    }
    Ok(())
}

/// A volume's name: a DNS label, as an image's.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct VolumeName(Arc<str>);

impl VolumeName {
    /// Checks `text` against the rules of a DNS label.
    ///
    /// # Errors
    /// [`NameError`] with the broken rule.
    pub fn parse(text: &str) -> Result<Self, NameError> {
        check_label("volume name", text)?;
        Ok(Self(text.into()))
    }
}

/// A storage class's name: a DNS subdomain as in RFC 1123 (labels with dots between, up to 253
/// characters).
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ClassName(Arc<str>);

impl ClassName {
    /// Checks `text` against the rules of a DNS subdomain.
    ///
    /// # Errors
    /// [`NameError`] with the broken rule.
    pub fn parse(text: &str) -> Result<Self, NameError> {
        if text.len() > 253 {
            let rule = "a name has 1 to 253 characters";
            return Err(NameError::new("storage class name", text, rule));
        }
        text.split('.').try_for_each(|label| check_label("storage class name", label))?;
        Ok(Self(text.into()))
    }
}

/// A tag of a disk or of a node, as Longhorn's: `a-z A-Z 0-9 . _ -`, 1 to 63 characters, a letter or digit
/// first.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Tag(Arc<str>);

impl Tag {
    /// Tags that may be given at once.
    pub const MOST: usize = 64;

    /// Checks `text`.
    ///
    /// # Errors
    /// [`NameError`] with the rule.
    pub fn parse(text: &str) -> Result<Self, NameError> {
        let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-');
        let first = text.bytes().next().is_some_and(|b| b.is_ascii_alphanumeric());
        if !first || text.len() > 63 || !text.bytes().all(plain) {
            let rule =
                "a tag has 1 to 63 of a-z, A-Z, 0-9, '.', '_' and '-', a letter or digit first";
            return Err(NameError::new("tag", text, rule));
        }
        Ok(Self(text.into()))
    }

    /// A set of tags; the same one twice counts once.
    ///
    /// # Errors
    /// [`NameError`] of the first that is none, or if there are more than [`Tag::MOST`].
    pub fn parse_all<'a>(
        texts: impl IntoIterator<Item = &'a str>,
    ) -> Result<BTreeSet<Self>, NameError> {
        let mut tags = BTreeSet::new();
        for text in texts {
            tags.insert(Self::parse(text)?);
            if tags.len() > Self::MOST {
                return Err(NameError::new("list of tags", text, "give at most 64"));
            }
        }
        Ok(tags)
    }
}

/// What every checked name can do.
macro_rules! as_text {
    ($($name:ty),*) => {$(
        impl $name {
            /// The name as text.
            #[must_use]
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl TryFrom<String> for $name {
            type Error = NameError;
            fn try_from(text: String) -> Result<Self, NameError> {
                Self::parse(&text)
            }
        }

        impl From<$name> for String {
            fn from(name: $name) -> Self {
                name.as_str().to_owned()
            }
        }

        impl std::str::FromStr for $name {
            type Err = NameError;
            fn from_str(text: &str) -> Result<Self, NameError> {
                Self::parse(text)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    )*};
}

as_text!(ImageName, VolumeName, ClassName, Tag, ImageUuid, DiskUuid);

/// Longhorn's image uuid: 8 lower-case hex digits, given once, never changed.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ImageUuid(Arc<str>);

impl ImageUuid {
    /// Checks `text`: 1 to 36 characters of `0-9a-f-`, so that Longhorn's files are adopted too.
    ///
    /// # Errors
    /// [`NameError`] with the broken rule.
    pub fn parse(text: &str) -> Result<Self, NameError> {
        let ok = (1..=36).contains(&text.len())
            && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f' | b'-'));
        if !ok {
            return Err(NameError::new("image uuid", text, "a uuid is 1 to 36 of 0-9, a-f, '-'"));
        }
        Ok(Self(text.into()))
    }

    /// A new random uuid of 8 hex digits.
    ///
    /// # Errors
    /// The system has no random numbers to give.
    pub fn random() -> std::io::Result<Self> {
        Ok(Self(random_hex(4)?.into()))
    }
}

/// A disk's UUID, from its `longhorn-disk.cfg`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct DiskUuid(Arc<str>);

impl DiskUuid {
    /// Checks `text`: 8 to 64 characters of `0-9 a-z A-Z -`.
    ///
    /// # Errors
    /// [`NameError`] with the broken rule.
    pub fn parse(text: &str) -> Result<Self, NameError> {
        let ok = (8..=64).contains(&text.len())
            && text.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-');
        if !ok {
            return Err(NameError::new(
                "disk UUID",
                text,
                "a UUID is 8 to 64 letters, digits, '-'",
            ));
        }
        Ok(Self(text.into()))
    }

    /// A new random UUID (version 4, RFC 9562).
    ///
    /// # Errors
    /// The system has no random numbers to give.
    pub fn random() -> std::io::Result<Self> {
        let hex = random_hex(16)?;
        let uuid = format!(
            "{}-{}-4{}-8{}-{}",
            &hex[0..8],
            &hex[8..12],
            &hex[13..16],
            &hex[17..20],
            &hex[20..32]
        );
        Ok(Self(uuid.into()))
    }

    /// The first 8 characters, as a copy's handler is named by them.
    #[must_use]
    pub fn first8(&self) -> &str {
        &self.0[..8]
    }
}

/// `len_bytes` random bytes as lower-case hex.
fn random_hex(len_bytes: usize) -> std::io::Result<String> {
    use std::io::Read;
    let mut bytes = vec![0u8; len_bytes];
    std::fs::File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(hex(&bytes))
}

/// `bytes` as lower-case hex.
#[must_use]
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_a_dns_label() {
        for good in ["a", "debian-12", "0", &"x".repeat(63)] {
            assert_eq!(ImageName::parse(good).unwrap().as_str(), good);
        }
        for bad in ["", "-a", "a-", "A", "a.b", "a/b", "../a", "a b", "ä", &"x".repeat(64)] {
            assert!(ImageName::parse(bad).is_err(), "{bad:?}");
            assert!(VolumeName::parse(bad).is_err(), "{bad:?}");
        }
        assert!(ClassName::parse("longhorn.fast-2").is_ok());
        for bad in ["", ".", "a..b", "a/b", "A", &"x.".repeat(127)] {
            assert!(ClassName::parse(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_name_is_suggested_from_the_last_part_of_a_url() {
        let name = |s| ImageName::suggest(s).map(String::from);
        assert_eq!(name("https://h/Debian_12-cloud.qcow2?x=1"), Some("debian-12-cloud".into()));
        assert_eq!(name("/tmp/a b..img"), Some("a-b".into()));
        assert_eq!(name("https://h/"), Some("h".into()));
        assert_eq!(name("https://h/fedora.raw.xz"), Some("fedora".into()));
        assert_eq!(name("w.vhdx"), Some("w".into()));
        assert_eq!(name("https://h/a.tar.gz"), Some("a-tar".into()));
        assert_eq!(name("///"), None);
    }

    #[test]
    fn random_uuids_obey_their_own_rules() {
        let disk = DiskUuid::random().unwrap();
        assert_eq!(DiskUuid::parse(disk.as_str()).unwrap(), disk);
        assert_eq!(disk.as_str().len(), 36);
        let image = ImageUuid::random().unwrap();
        assert_eq!(ImageUuid::parse(image.as_str()).unwrap(), image);
    }
}
