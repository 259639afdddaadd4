//! Request bodies: JSON of at most 1 MiB, read in bounded time.
//!
//! Why: a wrong body gets an answer that names the wrong field; a huge or endless one costs nothing.
//! How: any content type is read as JSON, so that plain `curl -d` works. An empty body is `{}`
//! only for types that say so.
//! Never: repeats the body in an error.
//! Start at [`Body`].

use std::time::Duration;

use axum::body::{Bytes, to_bytes};
use axum::extract::{FromRequest, Request};
use axum::http::StatusCode;
use serde::de::DeserializeOwned;

use super::error::ApiError;

/// Longest body in bytes.
pub(crate) const MAX_LEN: usize = 1 << 20;
/// Longest time for a body to arrive.
const ARRIVAL: Duration = Duration::from_secs(30);

/// A body that parsed.
pub(crate) struct Body<T>(pub(crate) T);

impl<T: DeserializeOwned, S: Send + Sync> FromRequest<S> for Body<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, _state: &S) -> Result<Self, ApiError> {
        let bytes = read(request).await?;
        let bytes = if bytes.is_empty() { b"{}".as_slice() } else { bytes.as_ref() };
        parse(bytes).map(Self)
    }
}

/// A body that is text of some other kind.
pub(crate) struct Text(pub(crate) String);

impl<S: Send + Sync> FromRequest<S> for Text {
    type Rejection = ApiError;

    async fn from_request(request: Request, _state: &S) -> Result<Self, ApiError> {
        let bytes = read(request).await?;
        let text = String::from_utf8(bytes.into());
        text.map(Self).map_err(|_| ApiError::bad_request("the body is no UTF-8 text"))
    }
}

/// All of a body, within its bounds.
async fn read(request: Request) -> Result<Bytes, ApiError> {
    let too_large = || {
        let message = format!("the body has more than {MAX_LEN} bytes");
        ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, "too-large", message, "send less")
    };
    let declared = request.headers().get("content-length");
    let declared = declared.and_then(|v| v.to_str().ok()).and_then(|v| v.parse::<u64>().ok());
    if declared.is_some_and(|len| len > MAX_LEN as u64) {
        return Err(too_large());
    }
    let reading = to_bytes(request.into_body(), MAX_LEN);
    let Ok(read) = tokio::time::timeout(ARRIVAL, reading).await else {
        let message = format!("the body did not arrive within {} s", ARRIVAL.as_secs());
        return Err(ApiError::new(StatusCode::REQUEST_TIMEOUT, "timeout", message, ""));
    };
    match read {
        Ok(bytes) => Ok(bytes),
        Err(error) if is_length_limit(&error) => Err(too_large()),
        Err(_) => Err(ApiError::bad_request("the body ended too early")),
    }
}

fn is_length_limit(error: &axum::Error) -> bool {
    std::error::Error::source(error).is_some_and(|e| e.is::<http_body_util::LengthLimitError>())
}

/// Parses JSON. An error says where, and which rule; of the values only field names are repeated.
pub(crate) fn parse<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, ApiError> {
    if bytes.trim_ascii_start().first() == Some(&b'[') {
        return Err(ApiError::bad_request("body does not read: a list, expected an object"));
    }
    let mut json = serde_json::Deserializer::from_slice(bytes);
    let value: T = serde_path_to_error::deserialize(&mut json).map_err(|error| {
        let path = error.path().to_string();
        let error = error.into_inner();
        let rule = error.to_string();
        // "invalid type: string \"hunter2\", expected …" would repeat a value.
        let rule =
            match rule.strip_prefix("invalid type: ").or(rule.strip_prefix("invalid value: ")) {
                Some(rest) => match rest.rfind(", expected ") {
                    Some(at) => format!("wrong type{}", rest.get(at..).unwrap_or_default()),
                    None => "wrong type".to_owned(),
                },
                None => rule,
            };
        let at = if path == "." { String::new() } else { format!("{path}: ") };
        ApiError::bad_request(format!("body does not read: {at}{rule}"))
    })?;
    json.end().map_err(|e| ApiError::bad_request(format!("body does not read: {e}")))?;
    Ok(value)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::types::{CreateAttachment, CreateImage};

    #[test]
    fn a_wrong_body_is_refused_with_the_field_and_without_the_value() {
        let cases: [(&[u8], &str); 5] = [
            (b"{", "EOF while parsing"),
            (br#"{"url":7}"#, "url: wrong type, expected a string"),
            (br#"{"url":"u","disks":"hunter2"}"#, "disks: wrong type, expected a sequence"),
            (br#"{"url":"u","disks":["a",[1]]}"#, "disks[1]: wrong type, expected a string"),
            (br#"{"url":"u","colour":"hunter2"}"#, "colour: unknown field `colour`, expected"),
        ];
        for (body, want) in cases {
            let text = parse::<CreateImage>(body).unwrap_err().message;
            assert!(text.contains(want), "{text}");
            assert!(!text.contains("hunter2"), "{text}");
        }
        assert!(parse::<CreateAttachment>(br#"{"image":"a"} x"#).is_err());
        // A list would be taken for the fields in their order.
        let list = parse::<CreateAttachment>(br#" ["a"]"#).unwrap_err().message;
        assert!(list.contains("an object"), "{list}");
        assert!(parse::<CreateAttachment>(b" \n{\"image\":\"a\"}").is_ok());
    }
}
