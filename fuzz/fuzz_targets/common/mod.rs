//! What the targets of servers have in common.

use std::sync::{Arc, OnceLock};

use bedplate::disk::Sealed;
use bedplate::image::View;
use bedplate::serve::Exports;

/// One sparse export of 1 MiB, `disk`, for all runs.
pub fn exports() -> &'static Arc<Exports> {
    static EXPORTS: OnceLock<Arc<Exports>> = OnceLock::new();
    EXPORTS.get_or_init(|| {
        let file = tempfile::NamedTempFile::new().expect("a temporary file");
        std::fs::write(file.path(), vec![1; 300_000]).expect("a temporary file");
        file.as_file().set_len(1 << 20).expect("a temporary file");
        let sealed = Sealed::open_path(file.path()).expect("the file was just made");
        let exports = Exports::new();
        let view = View::open(sealed, None).expect("any bytes are a raw image");
        exports.add("disk", Arc::new(view), "fuzzed").expect("a new name");
        Arc::new(exports)
    })
}
