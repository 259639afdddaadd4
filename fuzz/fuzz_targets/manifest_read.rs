//! A manifest: YAML that somebody applies, with StorageClasses, claims, BackingImages and Volumes.
#![no_main]

use bedplate::manifest::{MAX_DOCUMENTS, read};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    // A carriage return ends a line of YAML, too.
    let lines = text.split(['\n', '\r']).count() as u64;
    match read(text) {
        Ok(documents) => {
            // One document may have several objects, as a ConfigMap or a List; all are bounded.
            assert!(!documents.is_empty() && documents.len() <= MAX_DOCUMENTS);
            let places = documents.iter().map(|document| (document.number, document.line));
            assert!(places.clone().is_sorted(), "in the order of the text");
            for (number, line) in places {
                assert!(number >= 1 && (1..=lines).contains(&line), "{number} at line {line}");
            }
        }
        Err(error) => {
            assert!((1..=lines.max(1)).contains(&error.line), "line {} of {lines}", error.line);
            drop(error.to_string());
        }
    }
});
