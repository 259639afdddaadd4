//! Our own rules about the code, which no compiler checks.
//!
//! Each rule is one test with the reason in its name; a failure lists every place.
#![expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Every file below `dir` with this ending, and its text, by path relative to the repository.
fn files(dir: &str, ending: &str) -> BTreeMap<String, String> {
    let mut found = BTreeMap::new();
    let mut open = vec![root().join(dir)];
    while let Some(dir) = open.pop() {
        let Ok(entries) = dir.read_dir() else { continue };
        for entry in entries {
            let path: PathBuf = entry.unwrap().path();
            let name = path.file_name().unwrap().to_string_lossy().into_owned();
            if path.is_dir() {
                if !matches!(name.as_str(), "target" | "seeds" | "corpus" | "artifacts") {
                    open.push(path);
                }
            } else if name.ends_with(ending) {
                let text = std::fs::read_to_string(&path).unwrap();
                let relative = path.strip_prefix(root()).unwrap().to_string_lossy().into_owned();
                found.insert(relative, text);
            }
        }
    }
    found
}

fn is_test_file(path: &str) -> bool {
    path.ends_with("tests.rs") || path.contains("/tests/")
}

/// The text before an inline test module.
fn product_part(text: &str) -> &str {
    text.split("\n#[cfg(test)]\nmod ").next().unwrap_or(text)
}

fn assert_none(rule: &str, faults: &[String]) {
    assert!(faults.is_empty(), "{rule}:\n  {}", faults.join("\n  "));
}

#[test]
fn every_source_file_says_what_why_how_and_never() {
    let mut faults = Vec::new();
    for (path, text) in files("src", ".rs") {
        if is_test_file(&path) {
            continue;
        }
        let head: Vec<&str> = text.lines().take_while(|line| line.starts_with("//!")).collect();
        let head = head.join("\n");
        let front_door = path.ends_with("/mod.rs");
        // The crate's tour, the binary's entry and plain lists of errors are short by nature.
        let short = path == "src/main.rs" || path == "src/lib.rs" || path.ends_with("error.rs");
        for word in ["Why:", "Never:", "How:", "Start at"] {
            let wanted = front_door || !matches!(word, "How:" | "Start at");
            if wanted && !short && !head.contains(word) {
                faults.push(format!("{path}: its head lacks {word:?}"));
            }
        }
        if head.is_empty() {
            faults.push(format!("{path}: no module documentation"));
        }
    }
    assert_none("each file opens with what, why, how, never, start", &faults);
}

#[test]
fn a_file_can_be_held_in_the_head() {
    let mut faults = Vec::new();
    for (path, text) in files("src", ".rs") {
        let (lines, limit) = (product_part(&text).lines().count(), 500);
        if lines > limit && !is_test_file(&path) {
            faults.push(format!("{path}: {lines} lines, at most {limit} without tests"));
        }
    }
    assert_none("files stay short", &faults);
}

/// The rooms in the order of data: a room may use those to the right of it in this table.
const ALLOWED: &[(&str, &[&str])] = &[
    ("cli", &["control", "daemon", "disk", "fetch", "image", "import", "manager", "ring", "serve"]),
    (
        "daemon",
        &["control", "manager", "catalog", "disk", "fetch", "image", "serve", "ring", "map"],
    ),
    ("control", &["manifest", "manager", "catalog", "image", "fetch", "serve"]),
    ("manifest", &["fetch"]),
    ("manager", &["catalog", "import", "fetch", "disk", "image", "ring"]),
    ("catalog", &[]),
    ("import", &["fetch", "disk", "image", "ring"]),
    ("fetch", &["disk", "ring"]),
    ("disk", &["ring", "map"]),
    ("image", &["disk", "map"]),
    ("serve", &["image", "map", "disk", "replica"]),
    ("replica", &["map"]),
    ("ring", &[]),
    ("map", &[]),
];

#[test]
fn data_flows_one_way_through_the_rooms() {
    let mut faults = Vec::new();
    for (room, allowed) in ALLOWED {
        for (path, text) in files(&format!("src/{room}"), ".rs") {
            for (other, _) in ALLOWED.iter().filter(|(other, _)| other != room) {
                let used = product_part(&text).lines().any(|line| {
                    let code = line.split("//").next().unwrap_or("");
                    code.contains(&format!("crate::{other}::"))
                        || code.contains(&format!("crate::{other};"))
                });
                if used && !allowed.contains(other) && !is_test_file(&path) {
                    faults.push(format!("{path} uses crate::{other}"));
                }
            }
        }
    }
    assert_none("arrows between rooms go one way (see ARCHITECTURE.md)", &faults);
}

#[test]
fn unsafe_lives_in_two_rooms_and_the_c_functions_and_each_block_has_its_own_reason() {
    let (mut faults, mut reasons) = (Vec::new(), BTreeMap::<String, String>::new());
    for (path, text) in files("src", ".rs") {
        let lines: Vec<&str> = text.lines().collect();
        for (index, line) in lines.iter().enumerate() {
            let code = line.split("//").next().unwrap_or("");
            let allowed = path.starts_with("src/ring/") || path.starts_with("src/map/");
            // What takes pointers from C can be no other.
            let allowed = allowed || path == "src/replica/c.rs";
            let is_unsafe = ["unsafe {", "unsafe impl", "unsafe fn"];
            if !allowed && is_unsafe.iter().any(|word| code.contains(word)) {
                faults.push(format!("{path}:{}: unsafe outside ring/ and map/", index + 1));
            }
            let Some(start) = line.trim().strip_prefix("// SAFETY:") else { continue };
            let rest = lines[index + 1..].iter().take_while(|l| l.trim().starts_with("//"));
            let text: Vec<&str> = rest.map(|l| l.trim().trim_start_matches('/').trim()).collect();
            let sentence = format!("{} {}", start.trim(), text.join(" "));
            let place = format!("{path}:{}", index + 1);
            if let Some(first) = reasons.insert(sentence, place.clone()) {
                faults.push(format!("{place}: the same SAFETY comment as {first}"));
            }
        }
    }
    assert_none("unsafe is rare and argued for", &faults);
}

#[test]
fn an_exception_to_a_lint_is_an_expectation_with_a_reason() {
    let mut faults = Vec::new();
    let mut all = files("src", ".rs");
    all.append(&mut files("tests", ".rs"));
    all.append(&mut files("benches", ".rs"));
    for (path, text) in all {
        for (index, line) in text.lines().enumerate() {
            // What several test binaries share is used in part by each: no expectation fits all.
            let shared = path.contains("_support/") || path.contains("_common/");
            let part = shared && line.contains("dead_code") && line.contains("reason");
            let starts = |word: &&str| line.trim().starts_with(*word);
            let bare = ["#[allow(", "#![allow("].iter().any(starts) && !part;
            if bare {
                faults.push(format!("{path}:{}: allow; write expect with a reason", index + 1));
            }
        }
    }
    assert_none("no bare allow", &faults);
}

#[test]
fn nothing_is_left_unfinished_or_ignored() {
    let mut faults = Vec::new();
    let words = [["to", "do!("].concat(), ["FIX", "ME"].concat(), ["#[ign", "ore"].concat()];
    let mut all = files("src", ".rs");
    all.append(&mut files("tests", ".rs"));
    for (path, text) in all {
        for (index, line) in text.lines().enumerate() {
            if words.iter().any(|word| line.contains(word.as_str())) {
                faults.push(format!("{path}:{}: {}", index + 1, line.trim()));
            }
        }
    }
    assert_none("no stub is called done", &faults);
}

#[test]
fn a_test_sets_no_time_limit_and_does_not_sleep_to_wait() {
    let mut faults = Vec::new();
    for (path, text) in files("tests", ".rs") {
        for (index, line) in text.lines().enumerate() {
            let assert_time = line.contains("assert") && line.contains("elapsed()");
            if assert_time && !path.ends_with("tidy.rs") {
                faults.push(format!("{path}:{}: {}", index + 1, line.trim()));
            }
        }
    }
    assert_none("time is for benchmarks", &faults);
}

#[test]
fn the_map_shows_every_room_and_names_tests_that_exist() {
    let map = std::fs::read_to_string(root().join("ARCHITECTURE.md")).unwrap();
    let mut faults = Vec::new();
    for entry in root().join("src").read_dir().unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        if !map.contains(&format!("`{name}")) && !map.contains(&format!("`{name}/`")) {
            faults.push(format!("ARCHITECTURE.md does not mention src/{name}"));
        }
    }
    let mut code = files("src", ".rs");
    code.append(&mut files("tests", ".rs"));
    let all: String = code.into_values().collect();
    let mut guards = 0;
    for line in
        map.lines().chain(std::fs::read_to_string(root().join("README.md")).unwrap().lines())
    {
        // A guard is written as: test `name_of_the_test`.
        for part in line.split("test `").skip(1) {
            guards += 1;
            let name = part.split('`').next().unwrap();
            if !all.contains(&format!("fn {name}(")) {
                faults.push(format!("no test is called {name}"));
            }
        }
    }
    assert!(guards >= 10, "the map names only {guards} tests that guard its invariants");
    assert_none("the map matches the code", &faults);
}

#[test]
fn texts_hold_no_path_of_somebodys_machine() {
    let mut faults = Vec::new();
    let mut all = files("src", ".rs");
    for ending in [".md", ".toml", ".py", ".sh"] {
        all.append(&mut files("", ending));
    }
    let words = [["/ro", "ot/"].concat(), ["/wo", "rk/"].concat(), ["/ho", "me/"].concat()];
    for (path, text) in all {
        for (index, line) in text.lines().enumerate() {
            if words.iter().any(|word| line.contains(word.as_str())) {
                faults.push(format!("{path}:{}: {}", index + 1, line.trim()));
            }
        }
    }
    assert_none("no machine's paths", &faults);
}
