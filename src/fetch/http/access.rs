//! What a source needs to be reached: credentials, certificates, a proxy.
//!
//! Why: most private images are behind a password, a token, a private CA or a proxy, and each image
//! behind another one.
//! How: plain data with serde, in the form of the control API's `access` object and of the catalog.
//! Every part that may be secret is a [`Secret`]. What this version doesn't know is kept, so that a
//! record of a newer one loses nothing, and refused by [`Access::check`].
//! Never: shows a value: an answer has only [`Access::kinds`].
//! Start at [`Access`].

use std::collections::BTreeMap;
use std::fmt;

use base64::prelude::{BASE64_STANDARD, Engine as _};
use reqwest::header::{AUTHORIZATION, HeaderMap, HeaderName, HeaderValue};
use serde::{Deserialize, Serialize};
use url::Url;

use super::secret::{AccessError, Secret, Trust};

/// Most headers that a source may have.
const MAX_HEADERS: usize = 32;
/// Longest value of a header in bytes.
const MAX_HEADER_BYTES: usize = 16 * 1024;
/// Headers that the transfer itself or HTTP's framing decides.
const RESERVED: &[&str] = &[
    "accept-encoding",
    "connection",
    "content-length",
    "expect",
    "host",
    "if-match",
    "if-modified-since",
    "if-none-match",
    "if-range",
    "if-unmodified-since",
    "keep-alive",
    "proxy-authorization",
    "proxy-connection",
    "range",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
];

/// What a source needs to be reached. Its `Debug` shows no secret.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Access {
    /// HTTP basic authentication.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub basic: Option<Basic>,
    /// A bearer token.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bearer: Option<Secret>,
    /// More request headers, by name.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub headers: BTreeMap<String, Secret>,
    /// Certificates of authorities (PEM) that are trusted besides the system's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ca: Option<Secret>,
    /// The client's certificate chain (PEM).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cert: Option<Secret>,
    /// Its private key (PEM).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub key: Option<Secret>,
    /// URL of an http or https proxy; may hold its credentials.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub proxy: Option<Secret>,
    /// Hosts, domains and networks that are reached without the proxy.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub no_proxy: Vec<String>,
    /// True: no proxy, whatever the environment says.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub direct: bool,
    /// For s3:// sources.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub s3: Option<S3Access>,
    /// What a newer version knows.
    #[serde(flatten)]
    pub unknown: Unknown,
}

/// A user and a password. Its `Debug` shows neither.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Basic {
    /// The user's name.
    pub user: String,
    /// The password.
    pub password: Secret,
}

impl fmt::Debug for Basic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Basic(***)")
    }
}

/// How a bucket is reached. What is absent has AWS's default; without a key, the bucket is public.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct S3Access {
    /// URL of the server; default: AWS's of the region.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub endpoint: Option<String>,
    /// Default `us-east-1`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub region: Option<String>,
    /// Who asks.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub access_key: Option<Secret>,
    /// The key's secret.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub secret_key: Option<Secret>,
    /// Of temporary credentials.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub session_token: Option<Secret>,
    /// True: the bucket is in the path; false: in the host's name. Default: in the path, but for
    /// AWS.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub path_style: Option<bool>,
    /// What a newer version knows.
    #[serde(flatten)]
    pub unknown: Unknown,
}

/// Properties that this version doesn't know. Prints only their names.
#[derive(Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Unknown(BTreeMap<String, serde_json::Value>);

impl fmt::Debug for Unknown {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.0.keys()).finish()
    }
}

/// How a request proves who asks.
#[derive(Clone)]
pub(super) enum Authorization {
    Basic(String, String),
    Bearer(String),
}

impl Authorization {
    /// The header of a request. `None` for a token that is none, which was checked when it was read.
    pub(super) fn header(&self) -> Option<(HeaderName, HeaderValue)> {
        let text = match self {
            Self::Basic(user, password) => {
                let plain = format!("{user}:{password}");
                format!("Basic {}", BASE64_STANDARD.encode(plain))
            }
            Self::Bearer(token) => format!("Bearer {token}"),
        };
        let mut value = HeaderValue::from_str(&text).ok()?;
        value.set_sensitive(true);
        Some((AUTHORIZATION, value))
    }
}

impl Access {
    /// True if the source needs nothing.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// What is set, as words: all that an answer may show.
    #[must_use]
    pub fn kinds(&self) -> Vec<&'static str> {
        let words = [
            ("basic", self.basic.is_some()),
            ("bearer", self.bearer.is_some()),
            ("headers", !self.headers.is_empty()),
            ("ca", self.ca.is_some()),
            ("cert", self.cert.is_some()),
            ("proxy", self.proxy.is_some()),
            ("no_proxy", !self.no_proxy.is_empty()),
            ("direct", self.direct),
            ("s3", self.s3.is_some()),
        ];
        words.into_iter().filter(|(_, set)| *set).map(|(word, _)| word).collect()
    }

    /// Checks what can be checked before anything is read.
    ///
    /// # Errors
    /// [`AccessError`] names the part and the rule, never the value.
    pub fn check(&self) -> Result<(), AccessError> {
        let unusable = |what, fault: &str| Err(unusable(what, fault));
        if let Some(name) = self.unknown.0.keys().next() {
            return unusable("access", &format!("property {:?} is not known", cut(name)));
        }
        if let Some(name) = self.s3.iter().flat_map(|s3| s3.unknown.0.keys()).next() {
            return unusable("access.s3", &format!("property {:?} is not known", cut(name)));
        }
        if self.basic.is_some() && self.bearer.is_some() {
            return unusable("access", "basic and bearer exclude each other");
        }
        if self.cert.is_some() != self.key.is_some() {
            return unusable("access", "cert and key belong together");
        }
        if self.direct && self.proxy.is_some() {
            return unusable("access", "direct and proxy exclude each other");
        }
        if self.basic.as_ref().is_some_and(|basic| basic.user.contains([':', '\r', '\n'])) {
            return unusable("basic user", "it has a colon or a line end");
        }
        if self.headers.len() > MAX_HEADERS {
            return unusable("headers", &format!("more than {MAX_HEADERS}"));
        }
        for (name, value) in &self.headers {
            let name = header_name(name)?;
            if name == AUTHORIZATION && (self.basic.is_some() || self.bearer.is_some()) {
                return unusable("headers", "Authorization is set by basic or bearer already");
            }
            value.literal().map(header_value).transpose()?;
        }
        if let Some(proxy) = self.proxy.as_ref().and_then(Secret::literal) {
            proxy_url(proxy)?;
        }
        if self.no_proxy.iter().any(|entry| entry.contains([',', ' '])) {
            return unusable("no_proxy", "an entry has a comma or a space");
        }
        self.s3.as_ref().map_or(Ok(()), S3Access::check)
    }

    /// The headers, their values read and marked as secret.
    pub(super) fn read_headers(&self, trust: &Trust) -> Result<HeaderMap, AccessError> {
        let mut headers = HeaderMap::new();
        for (name, value) in &self.headers {
            let value = header_value(&trust.read("header", value)?)?;
            headers.insert(header_name(name)?, value);
        }
        Ok(headers)
    }

    /// User and password, or token: of the access, or else of the URL.
    pub(super) fn read_authorization(
        &self,
        url: &Url,
        trust: &Trust,
    ) -> Result<Option<Authorization>, AccessError> {
        if let Some(basic) = &self.basic {
            let password = trust.read("password", &basic.password)?;
            return Ok(Some(Authorization::Basic(basic.user.clone(), password)));
        }
        if let Some(token) = &self.bearer {
            let token = trust.read("bearer token", token)?;
            header_value(&token)?;
            return Ok(Some(Authorization::Bearer(token)));
        }
        if url.username().is_empty() && url.password().is_none() {
            return Ok(None);
        }
        let plain = |text: &str| {
            percent_encoding::percent_decode_str(text).decode_utf8_lossy().into_owned()
        };
        let password = plain(url.password().unwrap_or_default());
        Ok(Some(Authorization::Basic(plain(url.username()), password)))
    }
}

impl S3Access {
    fn check(&self) -> Result<(), AccessError> {
        if self.access_key.is_some() != self.secret_key.is_some() {
            return Err(unusable("access.s3", "access_key and secret_key belong together"));
        }
        // An endpoint is shown; the credentials are the access key's.
        if let Some(endpoint) = &self.endpoint {
            let url = Url::parse(endpoint).ok().filter(|url| {
                let web = matches!(url.scheme(), "http" | "https");
                web && url.username().is_empty() && url.password().is_none()
            });
            if url.is_none() {
                let rule = "endpoint is no http:// or https:// URL without credentials";
                return Err(unusable("access.s3", rule));
            }
        }
        if self.session_token.is_some() && self.access_key.is_none() {
            return Err(unusable("access.s3", "session_token needs access_key and secret_key"));
        }
        Ok(())
    }
}

/// The URL of a proxy: http or https, with a host.
pub(super) fn proxy_url(text: &str) -> Result<Url, AccessError> {
    let url = Url::parse(text).ok().filter(|url| matches!(url.scheme(), "http" | "https"));
    url.ok_or_else(|| unusable("proxy", "not an http:// or https:// URL"))
}

fn header_name(text: &str) -> Result<HeaderName, AccessError> {
    let name = HeaderName::from_bytes(text.as_bytes())
        .map_err(|_| unusable("headers", &format!("{:?} is no header's name", cut(text))))?;
    if RESERVED.contains(&name.as_str()) {
        return Err(unusable("headers", &format!("{name} is set by the transfer itself")));
    }
    Ok(name)
}

fn header_value(text: &str) -> Result<HeaderValue, AccessError> {
    let value = HeaderValue::from_str(text).ok().filter(|value| value.len() <= MAX_HEADER_BYTES);
    let mut value = value.ok_or_else(|| {
        unusable("header", "its value has a line end, is not ASCII, or is longer than 16 KiB")
    })?;
    value.set_sensitive(true);
    Ok(value)
}

pub(super) fn unusable(what: &'static str, fault: &str) -> AccessError {
    AccessError::Unusable { what, fault: fault.to_owned() }
}

fn cut(text: &str) -> String {
    text.chars().take(64).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn access(json: &str) -> Access {
        serde_json::from_str(json).unwrap()
    }

    const FULL: &str = r#"{"basic":{"user":"hunter2","password":"hunter2"},
        "headers":{"X-Token":"hunter2","Cookie":{"file":"/etc/c"}},"ca":"hunter2",
        "cert":"hunter2","key":"hunter2","proxy":"http://u:hunter2@p:3128","no_proxy":["h"],
        "s3":{"region":"eu","access_key":"hunter2","secret_key":"hunter2"}}"#;

    #[test]
    fn an_access_shows_kinds_and_nothing_else() {
        let full = access(FULL);
        full.check().unwrap();
        assert!(!format!("{full:?}").contains("hunter2"), "{full:?}");
        let kinds = ["basic", "headers", "ca", "cert", "proxy", "no_proxy", "s3"];
        assert_eq!(full.kinds(), kinds);
        assert!(Access::default().is_empty() && Access::default().kinds().is_empty());
    }

    #[test]
    fn a_newer_record_keeps_what_is_not_known_but_a_request_is_refused() {
        let newer = access(r#"{"bearer":"t","later":"hunter2","s3":{"later":"hunter2"}}"#);
        assert!(!format!("{newer:?}").contains("hunter2"), "{newer:?}");
        let again: Access = serde_json::from_str(&serde_json::to_string(&newer).unwrap()).unwrap();
        assert_eq!(again, newer);
        assert!(newer.check().unwrap_err().to_string().contains("later"));
    }

    #[test]
    fn what_cannot_be_meant_is_refused_without_its_value() {
        for bad in [
            r#"{"bearer":"hunter2","basic":{"user":"u","password":"hunter2"}}"#,
            r#"{"cert":"hunter2"}"#,
            r#"{"headers":{"Range":"hunter2"}}"#,
            r#"{"headers":{"host":"hunter2"}}"#,
            r#"{"headers":{"a b":"hunter2"}}"#,
            r#"{"headers":{"X":"a\r\nY: hunter2"}}"#,
            r#"{"headers":{"Authorization":"hunter2"},"bearer":"hunter2"}"#,
            r#"{"proxy":"socks5://hunter2"}"#,
            r#"{"proxy":"http://p","direct":true}"#,
            r#"{"s3":{"access_key":"hunter2"}}"#,
            r#"{"s3":{"session_token":"hunter2"}}"#,
            r#"{"s3":{"endpoint":"http://u:hunter2@h"}}"#,
        ] {
            let text = access(bad).check().unwrap_err().to_string();
            assert!(!text.contains("hunter2"), "{text}");
        }
    }

    #[test]
    fn credentials_in_a_url_are_used_unescaped() {
        let url = Url::parse("https://bob:p%40ss@h/").unwrap();
        let found = Access::default().read_authorization(&url, &Trust::Person).unwrap();
        let Some(Authorization::Basic(user, password)) = found else { panic!("no credentials") };
        assert_eq!((user.as_str(), password.as_str()), ("bob", "p@ss"));
    }

    /// Found by the fuzzer: parsed without care, this number was another one after a round trip.
    #[test]
    fn a_number_of_a_newer_version_comes_back_the_same() {
        let text = r#"{"newer":5555555555555555.55555555555555555555555555559312e20}"#;
        let long =
            r#"{"newer":55555555555555555555555555555555555555555555.555555555555555559312}"#;
        for text in [text, long] {
            let access: Access = serde_json::from_str(text).unwrap();
            let kept = serde_json::to_string(&access).unwrap();
            assert_eq!(serde_json::from_str::<Access>(&kept).unwrap(), access);
        }
    }
}
