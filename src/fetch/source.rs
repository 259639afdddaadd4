//! Where an image comes from: a URL that may carry credentials.
//!
//! Why: a password in a URL's userinfo, or a signature in its query, must never reach a log, an
//! answer, an event or a process list (invariant 8).
//! How: `Display` and `Debug` print the redacted form; the type has no `Serialize`, so a wire type
//! can't hold it by accident. The catalog alone keeps it whole, through [`whole`].
//! Never: gives the whole URL to anybody who doesn't say [`SourceUrl::expose`].
//! Start at [`SourceUrl::parse`].

use std::fmt;
use std::path::Path;

use url::Url;

use super::backup::BackupPlace;
use super::nbd::Place;

/// What replaces each secret part.
const REDACTED: &str = "***";
/// Longest name in a query that is shown: `response-content-disposition` and its like fit.
const MAX_KEY_LEN: usize = 40;

/// An http, https, s3, file, NBD or backup URL. Prints itself without userinfo and without query values.
#[derive(Clone, PartialEq, Eq)]
pub struct SourceUrl(Url);

/// Why a source is refused. Never prints the text as given: it may hold a password.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SourceError {
    /// Not a URL at all.
    #[error(
        "source is not a URL ({reason}); give http://, https://, s3://, nbd://, backup:// or file:///absolute/path"
    )]
    NotAUrl {
        /// The parser's words, without the text.
        reason: String,
    },
    /// A URL of a scheme that nothing here can fetch.
    #[error(
        "scheme {scheme:?} is not supported; give http://, https://, s3://, nbd://, backup:// or file://"
    )]
    Scheme {
        /// The scheme as given.
        scheme: String,
    },
    /// NBD within TLS.
    #[error("{scheme}: NBD within TLS is not spoken here; use nbd+unix://, or nbd:// in a tunnel")]
    Tls {
        /// The scheme as given.
        scheme: String,
    },
    /// A file of digests that is no file.
    #[error(
        "a file of digests is in no NBD export or backup; give http://, https://, s3:// or file://"
    )]
    Sums,
    /// More or less than bucket and key in an s3 URL; a host or no absolute path in a file URL; no
    /// place of an export in one of NBD, or of a backup.
    #[error("{scheme} URL has {fault}; give {need}")]
    Shape {
        /// "s3", "file", "nbd", "nbd+unix" or "backup".
        scheme: String,
        /// What is wrong.
        fault: &'static str,
        /// What it should look like.
        need: &'static str,
    },
    /// A file of the node, an export and a backup have no mirrors and are none.
    #[error(
        "a file of the node, an NBD export or a backup is no mirror and has none; give http://, https:// or s3:// URLs"
    )]
    Mirror,
    /// Longer than [`SourceUrl::MAX_LEN`].
    #[error("source has {len_bytes} bytes; a URL has at most {}", SourceUrl::MAX_LEN)]
    TooLong {
        /// Length as given, in bytes.
        len_bytes: usize,
    },
}

impl SourceUrl {
    /// Longest URL in bytes. Pre-signed URLs of the large clouds stay below 4 KiB.
    pub const MAX_LEN: usize = 8192;

    /// Parses an absolute http, https, s3, file, NBD or backup URL.
    ///
    /// # Errors
    /// [`SourceError`]; its text holds nothing of the URL but its scheme.
    pub fn parse(text: &str) -> Result<Self, SourceError> {
        if text.len() > Self::MAX_LEN {
            return Err(SourceError::TooLong { len_bytes: text.len() });
        }
        let url = Url::parse(text).map_err(|e| SourceError::NotAUrl { reason: e.to_string() })?;
        let shape =
            |fault, need| Err(SourceError::Shape { scheme: url.scheme().to_owned(), fault, need });
        match url.scheme() {
            "http" | "https" => Ok(Self(url)),
            "backup" | "s3" if let Some(place) = BackupPlace::of(&url) => match place {
                Err(fault) if url.scheme() == "s3" => {
                    shape(fault, "s3://BUCKET@REGION/PATH?backingImage=NAME")
                }
                Err(fault) => shape(fault, "backup:///MOUNTED/TARGET?backingImage=NAME"),
                Ok(_) => Ok(Self(url)),
            },
            "s3" if url.host_str().is_none_or(str::is_empty) || url.path().len() < 2 => {
                shape("no bucket or no key", "s3://BUCKET/KEY")
            }
            // Credentials belong to the access; a `?` of the key is written %3F.
            "s3" if url.username() != "" || url.port().is_some() || url.query().is_some() => {
                shape("more than bucket and key", "s3://BUCKET/KEY")
            }
            "s3" => Ok(Self(url)),
            "file" if url.host().is_some() => shape("a host", "file:///absolute/path"),
            "file" if url.to_file_path().is_err() || url.path() == "/" => {
                shape("no path of a file", "file:///absolute/path")
            }
            "file" => Ok(Self(url)),
            scheme @ ("nbds" | "nbds+unix" | "nbds+vsock") => {
                Err(SourceError::Tls { scheme: scheme.to_owned() })
            }
            "nbd" | "nbd+unix" => match Place::of(&url) {
                Some(Err((fault, need))) => shape(fault, need),
                Some(Ok(_)) | None => Ok(Self(url)),
            },
            other => Err(SourceError::Scheme { scheme: other.to_owned() }),
        }
    }

    /// The URL of a file on this node. `None` unless `path` is absolute.
    #[must_use]
    pub fn from_file_path(path: &Path) -> Option<Self> {
        Url::from_file_path(path).ok().map(Self)
    }

    /// Checks what is to be a mirror of `self`.
    ///
    /// # Errors
    /// [`SourceError::Mirror`] if either is a file of the node, an export or a backup.
    pub fn check_mirror(&self, mirror: &Self) -> Result<(), SourceError> {
        let has_none =
            |url: &Self| url.0.scheme() == "file" || url.is_nbd() || url.backup().is_some();
        if has_none(self) || has_none(mirror) { Err(SourceError::Mirror) } else { Ok(()) }
    }

    /// Checks what is to be where a file of digests is.
    ///
    /// # Errors
    /// [`SourceError::Sums`] if it is an export or a backup.
    pub fn check_sums(&self) -> Result<(), SourceError> {
        let has_none = self.is_nbd() || self.backup().is_some();
        if has_none { Err(SourceError::Sums) } else { Ok(()) }
    }

    /// True for an NBD export.
    #[must_use]
    pub fn is_nbd(&self) -> bool {
        matches!(self.0.scheme(), "nbd" | "nbd+unix")
    }

    /// True if its bytes come encrypted; of an s3:// URL it is taken for granted.
    pub(super) fn is_encrypted(&self) -> bool {
        matches!(self.0.scheme(), "https" | "s3")
    }

    /// Where the export is, if this is one.
    pub(super) fn nbd(&self) -> Option<Place> {
        Place::of(&self.0)?.ok()
    }

    /// Where the backup is, if this is one.
    pub(super) fn backup(&self) -> Option<BackupPlace> {
        BackupPlace::of(&self.0)?.ok()
    }

    /// What an image is named after that comes from here.
    #[must_use]
    pub fn title(&self) -> String {
        let path = || percent_encoding::percent_decode_str(self.0.path()).decode_utf8_lossy();
        self.backup().map_or_else(|| path().into_owned(), |place| place.image)
    }

    /// What is at `path` beneath this URL, which ends in a `/`. `path` has letters, digits and `/._-`.
    #[must_use]
    pub(super) fn beneath(&self, path: &str) -> Self {
        Self(beneath(&self.0, path))
    }

    /// The whole URL, credentials included: only for the request itself and the catalog.
    #[must_use]
    pub fn expose(&self) -> &Url {
        &self.0
    }

    /// The path, if this is a file on this node.
    #[must_use]
    pub fn file_path(&self) -> Option<std::path::PathBuf> {
        (self.0.scheme() == "file").then(|| self.0.to_file_path().ok()).flatten()
    }
}

/// `url` with `path` at its end.
pub(super) fn beneath(url: &Url, path: &str) -> Url {
    let mut url = url.clone();
    url.set_path(&format!("{}{path}", url.path()));
    url
}

impl fmt::Display for SourceUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let url = &self.0;
        if self.is_nbd() || self.backup().is_some() {
            // It has no place for a secret: a user that is a bucket, a query that is a socket or a name.
            return f.write_str(url.as_str());
        }
        write!(f, "{}://", url.scheme())?;
        if !url.username().is_empty() || url.password().is_some() {
            write!(f, "{REDACTED}@")?;
        }
        f.write_str(url.host_str().unwrap_or(""))?;
        if let Some(port) = url.port() {
            write!(f, ":{port}")?;
        }
        f.write_str(url.path())?;
        let Some(query) = url.query() else { return Ok(()) };
        for (index, pair) in query.split('&').enumerate() {
            f.write_str(if index == 0 { "?" } else { "&" })?;
            // Of a token alone, `=` may be the padding.
            let key = pair
                .split_once('=')
                .filter(|(key, value)| is_plain_key(key) && value.bytes().any(|byte| byte != b'='));
            match key {
                Some((key, _value)) => write!(f, "{key}={REDACTED}")?,
                None => f.write_str(REDACTED)?,
            }
        }
        Ok(())
    }
}

impl SourceUrl {
    /// True if it has a part that is never shown.
    #[must_use]
    pub fn may_hold_secrets(&self) -> bool {
        let url = &self.0;
        !url.username().is_empty() || url.password().is_some() || url.query().is_some()
    }
}

/// True for what may be the name of a query's pair; a longer one, or an odd one, may be a secret.
fn is_plain_key(key: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"_.-".contains(&byte);
    (1..=MAX_KEY_LEN).contains(&key.len()) && key.bytes().all(plain)
}

impl fmt::Debug for SourceUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SourceUrl({self})")
    }
}

impl std::str::FromStr for SourceUrl {
    type Err = SourceError;
    fn from_str(text: &str) -> Result<Self, SourceError> {
        Self::parse(text)
    }
}

/// Serde for the catalog's records: `#[serde(with = "source::whole")]` on an `Option<SourceUrl>`.
pub mod whole {
    use super::SourceUrl;
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    /// Writes the whole URL.
    ///
    /// # Errors
    /// The serializer's.
    pub fn serialize<S: Serializer>(url: &Option<SourceUrl>, out: S) -> Result<S::Ok, S::Error> {
        url.as_ref().map(|u| u.expose().as_str()).serialize(out)
    }

    /// Reads it back, with the checks of [`SourceUrl::parse`].
    ///
    /// # Errors
    /// The deserializer's, or a record whose URL breaks the rules.
    pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Option<SourceUrl>, D::Error> {
        let text = Option::<String>::deserialize(from)?;
        text.map(|t| SourceUrl::parse(&t)).transpose().map_err(serde::de::Error::custom)
    }
}

/// As [`whole`], for a list.
pub mod whole_list {
    use super::SourceUrl;
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    /// Writes the whole URLs.
    ///
    /// # Errors
    /// The serializer's.
    pub fn serialize<S: Serializer>(urls: &[SourceUrl], out: S) -> Result<S::Ok, S::Error> {
        urls.iter().map(|url| url.expose().as_str()).collect::<Vec<_>>().serialize(out)
    }

    /// Reads them back, with the checks of [`SourceUrl::parse`].
    ///
    /// # Errors
    /// The deserializer's, or a record whose URL breaks the rules.
    pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<SourceUrl>, D::Error> {
        let texts = Vec::<String>::deserialize(from)?;
        let parse = |text: String| SourceUrl::parse(&text).map_err(serde::de::Error::custom);
        texts.into_iter().map(parse).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_title_is_the_path_as_a_person_reads_it() {
        for (url, title) in [
            ("https://h/a/Win%20Server%C3%A4.img?x=%2F", "/a/Win Serverä.img"),
            ("file:///x/%FF.img", "/x/\u{fffd}.img"),
            ("backup:///mnt/t?backingImage=a", "a"),
        ] {
            assert_eq!(SourceUrl::parse(url).unwrap().title(), title);
        }
    }

    #[test]
    fn a_printed_source_has_no_credentials() {
        let cases = [
            (
                "https://bob:hunter2@h.example:8443/a/b.qcow2",
                "https://***@h.example:8443/a/b.qcow2",
            ),
            ("https://hunter2@h/a", "https://***@h/a"),
            (
                "https://h/a?X-Amz-Signature=hunter2&v=hunter2",
                "https://h/a?X-Amz-Signature=***&v=***",
            ),
            ("https://h/a?hunter2", "https://h/a?***"),
            ("https://h/a?aHVudGVyMg==", "https://h/a?***"),
            ("https://h/a?hunter2=&v=1", "https://h/a?***&v=***"),
            ("https://h/a?hunter2/hunter2=hunter2", "https://h/a?***"),
            ("https://h/a#hunter2", "https://h/a"),
            ("file:///data/a%20b.img", "file:///data/a%20b.img"),
            ("nbd://h:7/a", "nbd://h:7/a"),
            ("backup:///mnt/t?backingImage=a", "backup:///mnt/t?backingImage=a"),
            ("nbd+unix:///a?socket=/run/n.sock", "nbd+unix:///a?socket=/run/n.sock"),
        ];
        for (whole, printed) in cases {
            let url = SourceUrl::parse(whole).unwrap();
            assert_eq!(url.to_string(), printed);
            assert_eq!(format!("{url:?}"), format!("SourceUrl({printed})"));
            assert_eq!(url.expose().as_str(), whole);
        }
    }

    #[test]
    fn a_refused_source_is_not_printed() {
        for bad in [
            "hunter2",
            "https://u:hunter2@",
            "ftp://u:hunter2@h/",
            "file://hunter2/x",
            "file:///",
            "s3://u:hunter2@b/k",
            "s3://b/k?hunter2",
            "s3://hunter2",
            "s3:///hunter2",
            "nbd://u:hunter2@h/a",
            "nbd://h/a?hunter2",
            "nbds://hunter2@h/a",
            "nbd+unix:///hunter2",
            "backup:///hunter2",
            "backup://hunter2/t?backingImage=a",
            "backup:///t?backingImage=../hunter2",
            "backup:///t?backingImage=a&x=hunter2",
            "nbd+unix:///a?socket=hunter2",
        ] {
            let text = SourceUrl::parse(bad).unwrap_err().to_string();
            assert!(!text.contains("hunter2"), "{text}");
        }
        assert!(SourceUrl::parse(&format!("http://h/{}", "a".repeat(9000))).is_err());
    }
}
