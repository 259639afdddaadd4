//! Objects of S3 and of what speaks like it.
//!
//! Why: images live in buckets, and a pre-signed URL expires in the middle of a queue.
//! How: `s3://BUCKET/KEY` becomes an http(s) URL that is signed afresh (SigV4, in the query) for
//! each request; the bytes then come like any others.
//! Never: lets a signed URL out of the request: messages show the s3:// URL.
//! Start at [`Object::signed`].

use std::time::Duration;

use rusty_s3::actions::{GetObject, S3Action};
use rusty_s3::{Bucket, Credentials, UrlStyle};
use url::Url;

use super::access::{Access, S3Access, unusable};
use super::secret::{AccessError, Secret, Trust};

/// How long a signature is good: a request is sent at once.
const EXPIRES: Duration = Duration::from_secs(900);
/// The region of who names none.
const DEFAULT_REGION: &str = "us-east-1";

/// An object that can be asked for.
pub(super) struct Object {
    bucket: Bucket,
    key: String,
    credentials: Option<Credentials>,
}

impl Object {
    /// From an s3:// URL, what its access says, and, for a person, the environment.
    pub(super) fn new(url: &Url, access: &Access, trust: &Trust) -> Result<Self, AccessError> {
        let none = S3Access::default();
        let s3 = access.s3.as_ref().unwrap_or(&none);
        let env = |names: &[&str]| {
            let person = *trust == Trust::Person;
            let mut set = names.iter().filter_map(|name| std::env::var(name).ok());
            if person { set.find(|value| !value.is_empty()) } else { None }
        };
        let region = s3.region.clone().or_else(|| env(&["AWS_REGION", "AWS_DEFAULT_REGION"]));
        let region = region.unwrap_or_else(|| DEFAULT_REGION.to_owned());
        if !region.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_') {
            return Err(unusable("S3 region", "it has more than letters, digits, - and _"));
        }
        let given = s3.endpoint.clone();
        let given = given.or_else(|| env(&["AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"]));
        let name = url.host_str().unwrap_or_default();
        // A bucket's name with a dot is no host that AWS's certificate covers.
        let path = s3.path_style.unwrap_or(given.is_some() || name.contains('.'));
        let endpoint = given.unwrap_or_else(|| format!("https://s3.{region}.amazonaws.com"));
        let endpoint = Url::parse(&endpoint).ok().filter(|url| url.host().is_some());
        let endpoint = endpoint.ok_or_else(|| unusable("S3 endpoint", "it is not a URL"))?;
        let style = if path { UrlStyle::Path } else { UrlStyle::VirtualHost };
        let bucket = Bucket::new(endpoint, style, name.to_owned(), region)
            .map_err(|error| unusable("S3 endpoint", &error.to_string()))?;
        let signer = match (&s3.access_key, &s3.secret_key) {
            (Some(access_key), Some(secret_key)) => Some(credentials(
                trust.read("S3 access key", access_key)?,
                trust.read("S3 secret key", secret_key)?,
                s3.session_token
                    .as_ref()
                    .map(|t: &Secret| trust.read("S3 token", t))
                    .transpose()?,
            )),
            _ => env(&["AWS_ACCESS_KEY_ID"]).zip(env(&["AWS_SECRET_ACCESS_KEY"])).map(
                |(access_key, secret_key)| {
                    let token = env(&["AWS_SESSION_TOKEN"]);
                    credentials(access_key, secret_key, token)
                },
            ),
        };
        Ok(Self { bucket, key: key_of(url)?, credentials: signer })
    }

    /// A URL for one GET, now, of the object whose key has `beneath` at its end.
    pub(super) fn signed(&self, beneath: &str) -> Url {
        let key = format!("{}{beneath}", self.key);
        GetObject::new(&self.bucket, self.credentials.as_ref(), &key).sign(EXPIRES)
    }
}

fn credentials(access_key: String, secret_key: String, token: Option<String>) -> Credentials {
    match token {
        Some(token) => Credentials::new_with_token(access_key, secret_key, token),
        None => Credentials::new(access_key, secret_key),
    }
}

/// The object's key, unescaped.
fn key_of(url: &Url) -> Result<String, AccessError> {
    let path = url.path().strip_prefix('/').unwrap_or_default();
    let key = percent_encoding::percent_decode_str(path).decode_utf8();
    let key = key.map_err(|_| unusable("S3 key", "it is not UTF-8"))?.into_owned();
    // In a URL such parts mean another object, or another bucket.
    if key.is_empty() || key.split('/').any(|part| matches!(part, "." | "..")) {
        return Err(unusable("S3 key", "it is empty, or has a part . or .."));
    }
    Ok(key)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn signed(url: &str, json: &str) -> Result<Url, AccessError> {
        let access: Access = serde_json::from_str(json).unwrap();
        let trust = Trust::Clients { secrets_dir: None };
        Object::new(&Url::parse(url).unwrap(), &access, &trust).map(|object| object.signed(""))
    }

    #[test]
    fn a_bucket_is_found_where_its_server_has_it() {
        let cases = [
            ("s3://b/k/a.img", "{}", "https://b.s3.us-east-1.amazonaws.com/k/a.img"),
            ("s3://b.c/k", "{}", "https://s3.us-east-1.amazonaws.com/b.c/k"),
            (
                "s3://b/k%20x",
                r#"{"s3":{"region":"eu-1"}}"#,
                "https://b.s3.eu-1.amazonaws.com/k%20x",
            ),
            ("s3://b/k", r#"{"s3":{"endpoint":"http://m:9000"}}"#, "http://m:9000/b/k"),
            ("s3://b/k", r#"{"s3":{"endpoint":"https://m","path_style":false}}"#, "https://b.m/k"),
        ];
        for (url, access, expected) in cases {
            assert_eq!(signed(url, access).unwrap().as_str(), expected);
        }
    }

    #[test]
    fn a_key_that_leads_elsewhere_is_refused() {
        for bad in ["s3://b/", "s3://b", "s3://b/a%2f..%2f..%2fc/d", "s3://b/%ff"] {
            assert!(signed(bad, "{}").is_err(), "{bad}");
        }
        assert!(signed("s3://b/k", r#"{"s3":{"region":"a.evil/"}}"#).is_err());
        assert!(signed("s3://b/k", r#"{"s3":{"endpoint":"nothing"}}"#).is_err());
    }

    #[test]
    fn a_signature_holds_key_and_token_but_no_secret() {
        let json = r#"{"s3":{"access_key":"AK","secret_key":"hunter2","session_token":"tok"}}"#;
        let url = signed("s3://b/k", json).unwrap();
        assert!(url.as_str().contains("X-Amz-Signature=") && url.as_str().contains("tok"));
        assert!(!url.as_str().contains("hunter2"));
    }
}
