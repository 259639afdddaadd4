//! The OpenAPI document says what the daemon does: routes both ways, and real answers.

#![expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod control_support;

use std::collections::BTreeSet;

use bedplate::control::routes;
use control_support::{Daemon, raw_image};
use serde_json::{Value, json};

fn document(daemon: &Daemon) -> Value {
    daemon.get("/v1/openapi.json")
}

#[test]
fn the_document_has_the_routes_and_only_them() {
    let daemon = Daemon::start();
    let document = document(&daemon);
    let mut documented = BTreeSet::new();
    for (path, methods) in document["paths"].as_object().unwrap() {
        for method in methods.as_object().unwrap().keys() {
            documented.insert((method.to_uppercase(), path.clone()));
        }
    }
    let table = routes::table();
    let routes: BTreeSet<_> =
        table.iter().map(|r| (r.method.to_owned(), r.path.to_owned())).collect();
    assert_eq!(documented, routes);
    assert_eq!(table.len(), routes.len(), "no route twice");
}

#[test]
fn every_reference_leads_somewhere_and_every_schema_is_used() {
    let daemon = Daemon::start();
    let document = document(&daemon);
    let text = document.to_string();
    for name in document["components"]["schemas"].as_object().unwrap().keys() {
        assert!(text.contains(&format!("\"#/components/schemas/{name}\"")), "{name} is unused");
    }
    for part in text.split("\"$ref\":\"#").skip(1) {
        let pointer = part.split('"').next().unwrap();
        assert!(document.pointer(pointer).is_some(), "{pointer}");
    }
}

/// Holds `value` against `schema`: type, enum, references, and exactly the required properties.
fn check(document: &Value, schema: &Value, value: &Value, at: &str) {
    if let Some(pointer) = schema["$ref"].as_str() {
        return check(document, document.pointer(&pointer[1..]).unwrap(), value, at);
    }
    if let Some(any) = schema["oneOf"].as_array() {
        let null = any.iter().any(|s| s["type"] == "null");
        if value.is_null() {
            return assert!(null, "{at}: null");
        }
        let object = any.iter().find(|s| s["type"] != "null").unwrap();
        return check(document, object, value, at);
    }
    let kind = match value {
        Value::Null => "null",
        Value::Bool(_) => "boolean",
        Value::Number(_) => "integer",
        Value::String(_) => "string",
        Value::Array(_) => "array",
        Value::Object(_) => "object",
    };
    let allowed = match &schema["type"] {
        Value::String(one) => vec![one.as_str()],
        Value::Array(many) => many.iter().map(|t| t.as_str().unwrap()).collect(),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::Object(_) => {
            panic!("{at}: its type is {}", schema["type"])
        }
    };
    assert!(allowed.contains(&kind), "{at}: {kind}, documented {allowed:?}");
    if let Some(words) = schema["enum"].as_array() {
        assert!(words.contains(value), "{at}: {value}, documented {words:?}");
    }
    if let Some(items) = value.as_array() {
        for item in items {
            check(document, &schema["items"], item, &format!("{at}[]"));
        }
    }
    let (Some(object), Some(required)) = (value.as_object(), schema["required"].as_array()) else {
        return;
    };
    let found: BTreeSet<&str> = object.keys().map(String::as_str).collect();
    let wanted: BTreeSet<&str> = required.iter().map(|r| r.as_str().unwrap()).collect();
    assert_eq!(found, wanted, "{at}");
    for (key, value) in object {
        check(document, &schema["properties"][key], value, &format!("{at}.{key}"));
    }
}

/// One request; its answer must be as documented for its status.
fn ask(
    daemon: &Daemon,
    document: &Value,
    method: &str,
    route: &str,
    path: &str,
    body: Option<&str>,
) {
    let (status, value) = daemon.curl(method, path, body);
    let operation = &document["paths"][route][method.to_lowercase()];
    let response = &operation["responses"][status.to_string()];
    assert!(response.is_object(), "{method} {route}: {status} is not documented: {value}");
    let schema = &response["content"]["application/json"]["schema"];
    if schema.is_null() {
        assert_eq!(value, Value::Null, "{method} {route} {status}");
    } else {
        check(document, schema, &value, &format!("{method} {route} {status}"));
    }
}

/// A QCOW2 image with a dirty bit and a snapshot, of one empty cluster of 4 KiB.
fn odd_qcow2() -> Vec<u8> {
    let mut bytes = vec![0_u8; 5 * 4096];
    let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
    put(0, b"QFI\xfb\0\0\0\x03");
    put(20, &12_u32.to_be_bytes());
    put(24, &4096_u64.to_be_bytes());
    put(36, &1_u32.to_be_bytes());
    put(40, &0x2000_u64.to_be_bytes());
    put(48, &0x1000_u64.to_be_bytes());
    put(56, &1_u32.to_be_bytes());
    put(60, &1_u32.to_be_bytes());
    put(64, &0x3000_u64.to_be_bytes());
    put(72, &1_u64.to_be_bytes());
    put(96, &4_u32.to_be_bytes());
    put(100, &104_u32.to_be_bytes());
    // The snapshot: L1 table, ID and name of a byte each.
    put(0x3000, &0x4000_u64.to_be_bytes());
    put(0x3008, &[0, 0, 0, 1, 0, 1, 0, 1]);
    put(0x3028, b"1s");
    bytes
}

#[test]
fn real_answers_are_as_documented() {
    let daemon = Daemon::start();
    let doc = document(&daemon);
    let file = daemon.dir.path().join("a.img");
    raw_image(&file, 100_000);
    let ask = |method: &str, route: &str, path: &str, body: Option<&str>| {
        ask(&daemon, &doc, method, route, path, body);
    };
    let create = json!({ "url": format!("file://{}", file.display()) }).to_string();
    for body in
        [create.as_str(), &create, "{", r#"{"url":"x"}"#, r#"{"name":"a","url":"http://h/"}"#]
    {
        ask("POST", "/v1/images", "/v1/images", Some(body));
    }
    for path in ["/v1/images/a", "/v1/images/b", "/v1/images/B"] {
        ask("GET", "/v1/images/{name}", path, None);
    }
    for path in ["/v1/images/a/fetch", "/v1/images/b/fetch"] {
        ask("POST", "/v1/images/{name}/fetch", path, None);
    }
    for body in [r#"{"name":"u","upload_bytes":7}"#, r#"{"name":"u","upload_bytes":8}"#, "{}"] {
        ask("POST", "/v1/images", "/v1/images", Some(body));
    }
    for path in ["/v1/images/a/upload", "/v1/images/u/upload", "/v1/images/b/upload"] {
        ask("PUT", "/v1/images/{name}/upload", path, Some("x"));
    }
    for body in
        [r#"{"image":"a","reader":"r"}"#, r#"{"image":"a","reader":"r"}"#, r#"{"image":"b"}"#]
    {
        ask("POST", "/v1/attachments", "/v1/attachments", Some(body));
    }
    let ready = daemon.wait_for("a", "ready");
    check(&doc, &json!({ "$ref": "#/components/schemas/Image" }), &ready, "event");
    for path in ["/v1/images", "/v1/disks", "/v1/attachments", "/v1/doctor", "/healthz"] {
        ask("GET", path, path, None);
    }
    let image = daemon.dir.path().join("odd.qcow2");
    std::fs::write(&image, odd_qcow2()).unwrap();
    let create = json!({ "url": format!("file://{}", image.display()) }).to_string();
    ask("POST", "/v1/images", "/v1/images", Some(&create));
    ask("POST", "/v1/images/{name}/fetch", "/v1/images/odd/fetch", None);
    daemon.wait_for("odd", "ready");
    for name in ["a", "odd", "u", "b", "B"] {
        let path = format!("/v1/images/{name}/inspection");
        ask("GET", "/v1/images/{name}/inspection", &path, None);
    }
    let id = daemon.get("/v1/attachments")["attachments"][0]["id"].as_str().unwrap().to_owned();
    let held = format!("/v1/attachments/{id}");
    for path in [held.as_str(), "/v1/attachments/00000000", "/v1/attachments/x"] {
        ask("GET", "/v1/attachments/{id}", path, None);
    }
    for (path, body) in [("a", "{}"), ("a", r#"{"disk":"none"}"#), ("b", "{}"), ("u", "{}")] {
        let path = format!("/v1/images/{path}/scrub");
        ask("POST", "/v1/images/{name}/scrub", &path, Some(body));
    }
    daemon.events_until("?image=a", |event| event["object"]["copies"][0]["scrub"].is_object());
    ask("GET", "/v1/images/{name}", "/v1/images/a", None);
    traces_and_volumes_are_as_documented(ask);
    ask("GET", "/v1/settings", "/v1/settings", None);
    ask("POST", "/v1/node/fail", "/v1/node/fail", None);
    ask("GET", "/v1/images/{name}", "/v1/images/a", None);
    ask("GET", "/v1/node", "/v1/node", None);
    ask("POST", "/v1/node/return", "/v1/node/return", None);
    daemon.wait_for("a", "ready");
    for body in [r#"{"max_transfers":3}"#, r#"{"max_transfers":null}"#, r#"{"x":1}"#] {
        ask("PATCH", "/v1/settings", "/v1/settings", Some(body));
    }
    ask("DELETE", "/v1/images/{name}", "/v1/images/a", None);
    ask("DELETE", "/v1/attachments/{id}", &held, None);
    ask("DELETE", "/v1/attachments/{id}", &held, None);
    ask("DELETE", "/v1/images/{name}", "/v1/images/a", None);
}

fn traces_and_volumes_are_as_documented(ask: impl Fn(&str, &str, &str, Option<&str>) + Copy) {
    traces_are_as_documented(ask);
    volumes_are_as_documented(ask);
}

/// Of the image `a`, which is ready, `u`, which is not, and `b`, which is none.
fn traces_are_as_documented(ask: impl Fn(&str, &str, &str, Option<&str>)) {
    for name in ["a", "u", "b", "B"] {
        let path = format!("/v1/images/{name}/trace");
        for body in [r#"{"for_s":0}"#, r#"{"x":1}"#, r#"{"for_s":600}"#, "{}"] {
            ask("POST", "/v1/images/{name}/trace", &path, Some(body));
        }
        ask("GET", "/v1/images/{name}/trace", &path, None);
        ask("DELETE", "/v1/images/{name}/trace", &path, None);
        ask("DELETE", "/v1/images/{name}/trace", &path, None);
    }
    let other =
        format!(r#"{{"version":1,"digests":{{"sha256":"{}"}},"ranges":[[0,1]]}}"#, "ab".repeat(32));
    let route = "/v1/images/{name}/prefetch";
    for name in ["a", "u", "b", "B"] {
        let path = format!("/v1/images/{name}/prefetch");
        ask("GET", route, &path, None);
        let trace = r#"{"version":1,"virtual_size_bytes":7,"ranges":[[0,65536],[1,2]]}"#;
        for body in ["{}", r#"{"version":2,"ranges":[]}"#, other.as_str(), trace] {
            ask("PUT", route, &path, Some(body));
        }
        ask("GET", route, &path, None);
        ask("GET", "/v1/images/{name}", &format!("/v1/images/{name}"), None);
        ask("DELETE", route, &path, None);
    }
}

/// Of the image `a`, which is ready.
fn volumes_are_as_documented(ask: impl Fn(&str, &str, &str, Option<&str>)) {
    let backup = r#"{"name":"r","backup":{"Name":"v","BackingImageName":"a"}}"#;
    for body in [
        r#"{"name":"v","image":"a"}"#,
        r#"{"name":"v","image":"a"}"#,
        r#"{"name":"v","image":"u"}"#,
        r#"{"name":"w","image":"none"}"#,
        r#"{"name":"w","image":"a","size_bytes":1}"#,
        "{}",
        backup,
    ] {
        ask("POST", "/v1/volumes", "/v1/volumes", Some(body));
    }
    for name in ["v", "r", "none", "V"] {
        let path = format!("/v1/volumes/{name}");
        ask("GET", "/v1/volumes/{name}", &path, None);
        for action in ["attach", "detach", "attach"] {
            let route = format!("/v1/volumes/{{name}}/{action}");
            ask("POST", &route, &format!("{path}/{action}"), None);
        }
        ask("DELETE", "/v1/volumes/{name}", &path, None);
        ask("POST", "/v1/volumes/{name}/detach", &format!("{path}/detach"), None);
        ask("GET", "/v1/volumes", "/v1/volumes", None);
        ask("DELETE", "/v1/volumes/{name}", &path, None);
    }
    let class = r#"{"kind":"StorageClass","apiVersion":"storage.k8s.io/v1","metadata":{"name":"c"},
                    "parameters":{"backingImage":"a","x":"y"}}"#;
    for body in [class, class, "kind: Pod"] {
        ask("POST", "/v1/apply", "/v1/apply", Some(body));
    }
    ask("GET", "/v1/classes", "/v1/classes", None);
    for path in ["/v1/classes/c", "/v1/classes/C"] {
        ask("GET", "/v1/classes/{name}", path, None);
        ask("DELETE", "/v1/classes/{name}", path, None);
        ask("DELETE", "/v1/classes/{name}", path, None);
    }
}

#[test]
fn real_events_are_as_documented() {
    let daemon = Daemon::start();
    let doc = document(&daemon);
    let file = daemon.dir.path().join("a.img");
    raw_image(&file, 100_000);
    let create = json!({ "url": format!("file://{}", file.display()) }).to_string();
    daemon.curl("POST", "/v1/images", Some(&create));
    daemon.curl("POST", "/v1/attachments", Some(r#"{"image":"a"}"#));
    let ready = |event: &Value| event["object"]["copies"][0]["state"] == "ready";
    for event in daemon.events_until("", ready) {
        check(&doc, &json!({ "$ref": "#/components/schemas/Event" }), &event, "event");
        let kind = event["type"].as_str().unwrap();
        let schema = match kind.split('.').next().unwrap() {
            "image" => "Image",
            "attachment" => "Attachment",
            "volume" => "Volume",
            _ => continue,
        };
        let schema = json!({ "$ref": format!("#/components/schemas/{schema}") });
        check(&doc, &schema, &event["object"], kind);
    }
}
