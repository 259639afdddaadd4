//! Any messages from a reader: each has one answer of the length that it says, and none reads
//! outside the image.
//!
//! Messages are cut out of the input by a length byte before each.
#![no_main]

mod common;

use std::sync::Arc;

use bedplate::replica::wire::MAX_READ_BYTES;
use bedplate::serve::replica::Session;
use common::exports;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let Some((&mode, mut rest)) = data.split_first() else { return };
    let mut session = Session::new(Arc::clone(exports()), None, mode & 7 != 0);
    while let Some((&len, after)) = rest.split_first() {
        let (message, later) = after.split_at(usize::from(len).min(after.len()));
        rest = later;
        let answer = session.answer(message);
        assert_eq!(usize::try_from(answer.head.len_bytes), Ok(answer.body.len()));
        assert!(answer.body.len() <= MAX_READ_BYTES as usize);
        let is_handed = answer.head.status == 0 && answer.head.kind == 1;
        assert_eq!(answer.descriptors.is_empty(), !is_handed);
        if answer.is_last {
            return;
        }
    }
});
