//! Any bytes as an image: what an inspection says of it is what opening and reading find, for the
//! disk and for its snapshots, alone, over a base, and with an external data file.
#![no_main]

use std::fs::File;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, LazyLock};

use bedplate::disk::Sealed;
use bedplate::image::qcow2::Terms;
use bedplate::image::{
    DecodedCache, Format, ImageError, Inspection, Opening, ReadError, Verdict, View, inspect,
};
use bedplate::units::GuestOffset;
use libfuzzer_sys::fuzz_target;

/// Larger disks are inspected and opened only.
const READ_BYTES: u64 = 1 << 20;
const BESIDE_BYTES: usize = 100 * 512;

static CACHE: LazyLock<Arc<DecodedCache>> = LazyLock::new(|| DecodedCache::new(1 << 20));
/// What a base and a data file hold.
static BESIDE: LazyLock<File> = LazyLock::new(|| memory(&[0xb5; BESIDE_BYTES]));
static BASE: LazyLock<View> = LazyLock::new(|| View::open(sealed(&BESIDE), Some(Format::Raw)).unwrap());

fn memory(bytes: &[u8]) -> File {
    let mut file = tempfile::tempfile_in("/dev/shm").unwrap();
    file.write_all(bytes).unwrap();
    file
}

fn path_of(file: &File) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()))
}

fn sealed(file: &File) -> Sealed {
    Sealed::open_path(&path_of(file)).unwrap()
}

/// Whether all bytes can be read; of a stream an inspection says nothing.
fn reads(view: &View) -> bool {
    let mut buf = [0; 4096];
    let step = usize::try_from(view.info().cluster_size_bytes.unwrap()).unwrap().min(buf.len());
    let mut sound = true;
    for at in (0..view.size_bytes()).step_by(step) {
        let len = usize::try_from(view.size_bytes() - at).unwrap().min(step);
        match view.read_at(&mut buf[..len], GuestOffset(at)) {
            Ok(()) | Err(ReadError::Decode { .. }) => {}
            Err(ReadError::Malformed { .. }) => sound = false,
            Err(error) => panic!("{error}"),
        }
    }
    sound
}

/// The inspection of the file with this beside it, held against opening and reading.
fn judge(file: &File, path: &Path, snapshot: Option<&str>, base: bool, data: bool) -> Inspection {
    let declared = Some(Format::Qcow2);
    let data_len_bytes = data.then_some(BESIDE_BYTES as u64);
    let terms = Terms { snapshot, backing: base, data_len_bytes };
    let inspection = Inspection::of_file(file, path, declared, &terms).unwrap();
    let refused = inspection.verdict == Verdict::Refused;
    assert!(inspection.findings.iter().all(|finding| finding.verdict <= inspection.verdict));
    assert!(inspection.findings.is_empty() == (inspection.verdict == Verdict::Ok));
    let opening = Opening {
        declared,
        snapshot,
        base: base.then(|| &*BASE),
        data: data.then(|| sealed(&BESIDE)),
        cache: Some(Arc::clone(&CACHE)),
    };
    match View::open_as(sealed(file), opening) {
        // Of what was given, and not of the image.
        Err(ImageError::NotNeeded { .. } | ImageError::BaseFormat { .. }) => {}
        Err(error) => assert!(refused, "inspected as sound, but {error}"),
        Ok(view) if view.size_bytes() <= READ_BYTES => assert_eq!(refused, !reads(&view)),
        Ok(_) => {}
    }
    if snapshot.is_none() && !data && inspect(file, path, declared, &terms).is_ok() {
        assert!(!refused, "a copy of it would be sealed");
    }
    inspection
}

fuzz_target!(|data: &[u8]| {
    if data.is_empty() {
        return;
    }
    let file = memory(data);
    let path = path_of(&file);
    let snapshots = judge(&file, &path, None, false, false).snapshots;
    for snapshot in snapshots.iter().take(3) {
        judge(&file, &path, Some(&snapshot.id), false, false);
        judge(&file, &path, Some(&snapshot.name), true, false);
    }
    judge(&file, &path, None, true, false);
    judge(&file, &path, None, false, true);
});
