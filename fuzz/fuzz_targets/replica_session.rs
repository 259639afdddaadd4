//! Any messages from a reader: each has one answer of the length that it says, and none reads
//! outside the image.
//!
//! Messages are cut out of the input by a length byte before each.
#![no_main]

use std::sync::{Arc, OnceLock};

use bedplate::disk::Sealed;
use bedplate::image::View;
use bedplate::replica::wire::MAX_READ_BYTES;
use bedplate::serve::Exports;
use bedplate::serve::replica::Session;
use libfuzzer_sys::fuzz_target;

/// One sparse export of 1 MiB, for all runs.
fn exports() -> Arc<Exports> {
    static EXPORTS: OnceLock<Arc<Exports>> = OnceLock::new();
    let made = EXPORTS.get_or_init(|| {
        let file = tempfile::NamedTempFile::new().expect("a temporary file");
        std::fs::write(file.path(), vec![1; 300_000]).expect("a temporary file");
        file.as_file().set_len(1 << 20).expect("a temporary file");
        let sealed = Sealed::open_path(file.path()).expect("the file was just made");
        let exports = Exports::new();
        let view = View::open(sealed, None).expect("any bytes are a raw image");
        exports.add("disk", Arc::new(view), "fuzzed").expect("a new name");
        Arc::new(exports)
    });
    Arc::clone(made)
}

fuzz_target!(|data: &[u8]| {
    let Some((&mode, mut rest)) = data.split_first() else { return };
    let mut session = Session::new(exports(), None, mode & 7 != 0);
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
