//! S3: every request signed, by a check of the signature that shares nothing with the signer.

use std::collections::BTreeMap;

use hmac::{Hmac, KeyInit, Mac};
use sha2::{Digest, Sha256};

use crate::fault_server::{Cut, FaultServer, Reply, Request};
use crate::{Place, SECRET, content};

pub const KEY_ID: &str = "AKIDEXAMPLE";
const TOKEN: &str = "token/of+the=session";

fn hmac(key: &[u8], text: &str) -> Vec<u8> {
    let mut mac = Hmac::<Sha256>::new_from_slice(key).unwrap();
    mac.update(text.as_bytes());
    mac.finalize().into_bytes().to_vec()
}

/// Signature Version 4 of a pre-signed GET, as AWS writes it down ("Authenticating Requests: Using
/// Query Parameters"); an error says what is wrong.
pub fn verify(request: &Request, region: &str, token: Option<&str>) -> Result<(), String> {
    let (path, query) = request.path.split_once('?').ok_or("no query")?;
    let mut pairs: Vec<&str> = query.split('&').collect();
    let value = |name: &str| {
        let prefix = format!("{name}=");
        pairs.iter().find_map(|pair| pair.strip_prefix(&prefix)).map(str::to_owned)
    };
    let need = |name: &str| value(name).ok_or(format!("no {name}"));
    let (signature, date) = (need("X-Amz-Signature")?, need("X-Amz-Date")?);
    let day = &date[..8];
    let scope = format!("{day}/{region}/s3/aws4_request");
    if need("X-Amz-Credential")? != format!("{KEY_ID}/{scope}").replace('/', "%2F") {
        return Err("another scope".into());
    }
    let escaped = token.map(|t| t.replace('/', "%2F").replace('+', "%2B").replace('=', "%3D"));
    if value("X-Amz-Security-Token") != escaped {
        return Err("another token".into());
    }
    if need("X-Amz-SignedHeaders")? != "host" || need("X-Amz-Algorithm")? != "AWS4-HMAC-SHA256" {
        return Err("another algorithm".into());
    }
    pairs.retain(|pair| !pair.starts_with("X-Amz-Signature="));
    pairs.sort_unstable();
    let host = request.header("host").ok_or("no host")?;
    let canonical =
        format!("GET\n{path}\n{}\nhost:{host}\n\nhost\nUNSIGNED-PAYLOAD", pairs.join("&"));
    let digest = bedplate::names::hex(&Sha256::digest(canonical));
    let text = format!("AWS4-HMAC-SHA256\n{date}\n{scope}\n{digest}");
    let mut key = hmac(format!("AWS4{SECRET}").as_bytes(), day);
    for part in [region, "s3", "aws4_request"] {
        key = hmac(&key, part);
    }
    let expected = bedplate::names::hex(&hmac(&key, &text));
    if expected == signature { Ok(()) } else { Err("another signature".into()) }
}

/// A bucket that gives its objects to who signs; it breaks once in the middle.
fn bucket(bytes: Vec<u8>, token: Option<&'static str>) -> FaultServer {
    FaultServer::start(move |request| match verify(request, "eu-test-1", token) {
        Err(_) => Reply::status("403 Forbidden"),
        Ok(()) => {
            let cut = if request.index == 0 { Cut::Close(1_500_000) } else { Cut::None };
            Reply::ranged(request, &bytes, "\"v\"").cut(cut)
        }
    })
}

#[test]
fn an_object_is_asked_for_with_a_fresh_signature_each_time() {
    let (place, bytes) = (Place::empty(), content(3_000_000));
    let server = bucket(bytes.clone(), None);
    let (id, secret) = (place.file("id", KEY_ID), place.file("key", SECRET));
    let common = ["--s3-endpoint", &server.url, "--s3-region", "eu-test-1"];
    let keys = ["--s3-access-key-file", &id, "--s3-secret-key-file", &secret];
    let url = "s3://images/dir/a%20b%2Bc.img";
    place.pulled(&[&[url], &common[..], &keys[..]].concat(), &[], &bytes);
    let requests = server.requests();
    assert_eq!(requests.len(), 2, "one break, one resume");
    for request in &requests {
        assert!(request.path.starts_with("/images/dir/a%20b%2Bc.img?"), "{}", request.path);
        verify(request, "eu-test-1", None).unwrap();
    }
    place.refused(&[&[url], &common[..]].concat(), &[], &["s3://images/dir/a%20b%2Bc.img", "403"]);
    let wrong = place.file("wrong", "nothing");
    let keys = ["--s3-access-key-file", &id, "--s3-secret-key-file", &wrong];
    place.refused(&[&[url], &common[..], &keys[..]].concat(), &[], &["403"]);
}

#[test]
fn a_person_s_environment_signs_too() {
    let (place, bytes) = (Place::empty(), content(100_000));
    let server = bucket(bytes.clone(), Some(TOKEN));
    let env = BTreeMap::from([
        ("AWS_ACCESS_KEY_ID", KEY_ID),
        ("AWS_SECRET_ACCESS_KEY", SECRET),
        ("AWS_SESSION_TOKEN", TOKEN),
        ("AWS_REGION", "eu-test-1"),
        ("AWS_ENDPOINT_URL", &server.url),
    ]);
    let env: Vec<_> = env.into_iter().collect();
    place.pulled(&["s3://images/a.img"], &env, &bytes);
}

#[test]
fn a_public_bucket_needs_no_signature() {
    let (place, bytes) = (Place::empty(), content(100_000));
    let served = bytes.clone();
    let server = FaultServer::start(move |request| match request.path.as_str() {
        "/images/a.img" => Reply::ranged(request, &served, "\"v\""),
        _ => Reply::status("403 Forbidden"),
    });
    place.pulled(&["s3://images/a.img", "--s3-endpoint", &server.url], &[], &bytes);
}
