//! A vendor's file of digests, as it is on whatever server a URL names.
//!
//! The input is the name that is looked for, a line's end, and the file.
#![no_main]

use bedplate::fetch::{DigestKind, DigestMap, SumsFault, parse_sums};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let split = bytes.iter().position(|byte| *byte == b'\n').unwrap_or(bytes.len());
    let (name, text) = (&bytes[..split], bytes.get(split + 1..).unwrap_or_default());
    match parse_sums(text, name, DigestKind::Sha256) {
        Ok(found) => {
            assert!(!found.is_empty());
            for (kind, hex) in found.iter() {
                // What is found is in the text, and a user could have given it.
                assert_eq!(hex.len(), kind.hex_digits());
                let here = |part: &[u8]| part.eq_ignore_ascii_case(hex.as_bytes());
                assert!(text.windows(hex.len()).any(here));
                let prefixed = format!("{}:{hex}", kind.key());
                assert_eq!(prefixed.parse::<DigestMap>().expect("its own form").get(kind), Some(hex));
            }
        }
        Err(SumsFault::Unusable { line, .. } | SumsFault::Ambiguous { line, .. }) => {
            assert!(line <= text.split(|byte| *byte == b'\n').count());
        }
        Err(fault) => drop(fault.to_string()),
    }
});
