//! Images that are sound, or nearly: what bedplate reads whole has qemu's bytes.
//!
//! The fuzzer's bytes choose a [`Plan`], so that most inputs are images with data; the rest of them
//! damages up to three fields. Only what is accepted is given to `qemu-img`, which costs some
//! milliseconds; without `qemu-img` the image is held against itself alone.
#![no_main]

#[allow(dead_code, reason = "the tests use all of it")]
#[path = "../../tests/qcow2_common/craft_big.rs"]
mod craft_big;
#[allow(dead_code, reason = "the tests use all of it")]
#[path = "../../tests/qcow2_common/choose.rs"]
mod choose;

use std::path::Path;
use std::process::Command;
use std::sync::{Arc, LazyLock};

use bedplate::disk::Sealed;
use bedplate::image::{DecodedCache, Format, RunKind, View, inspect};
use bedplate::units::GuestOffset;
use choose::Choices;
use craft_big::n;
use libfuzzer_sys::fuzz_target;

/// Larger disks are not read.
const READ_BYTES: u64 = 16 << 20;

static CACHE: LazyLock<Arc<DecodedCache>> = LazyLock::new(|| DecodedCache::new(1 << 20));
static HAVE_QEMU: LazyLock<bool> = LazyLock::new(|| {
    let have = Command::new("qemu-img").arg("--version").output().is_ok();
    if !have {
        eprintln!("qemu-img is not installed: images are held against themselves alone");
    }
    have
});

/// The disk, if all of it can be read; each run is what it says.
fn read_all(view: &View) -> Option<Vec<u8>> {
    let size = view.size_bytes();
    if size > READ_BYTES {
        return None;
    }
    let mut bytes = vec![0x5a; n(size)];
    let mut at = 0;
    let mut sound = true;
    while at < size {
        let Ok(run) = view.run_at(GuestOffset(at), u64::MAX) else {
            let step = view.info().cluster_size_bytes.unwrap();
            sound = false;
            at = (at / step + 1) * step;
            continue;
        };
        assert!(run.len_bytes > 0 && run.len_bytes <= size - at);
        let part = &mut bytes[n(at)..n(at + run.len_bytes)];
        sound &= view.read_at(part, GuestOffset(at)).is_ok();
        match run.kind {
            RunKind::Zero => assert!(part.iter().all(|&byte| byte == 0)),
            RunKind::Data(stored) => assert!(view.mapped(stored, part.len()).is_some()),
            RunKind::Encoded => {}
        }
        at += run.len_bytes;
    }
    sound.then_some(bytes)
}

fn qemu_bytes(image: &Path, raw: &Path) -> Option<Vec<u8>> {
    let args = ["convert", "-q", "-f", "qcow2", "-O", "raw"];
    let output = Command::new("qemu-img").args(args).arg(image).arg(raw).output().unwrap();
    output.status.success().then(|| std::fs::read(raw).unwrap())
}

fuzz_target!(|data: &[u8]| {
    let mut choices = Choices(data);
    let mut built = choices.plan().build();
    choices.damage(&mut built);
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let image = dir.path().join("image.qcow2");
    std::fs::write(&image, &built.bytes).unwrap();
    let declared = Some(Format::Qcow2);
    let file = std::fs::File::open(&image).unwrap();
    let whole = inspect(&file, &image, declared, &Default::default());
    let sealed = Sealed::open_path(&image).unwrap();
    let Ok(view) = View::open_with_cache(sealed, declared, Arc::clone(&CACHE)) else {
        assert!(whole.is_err(), "inspect takes what open refuses");
        return;
    };
    let Some(got) = read_all(&view) else { return };
    assert!(whole.is_ok(), "all bytes read, but inspect refuses: {whole:?}");
    if !*HAVE_QEMU {
        return;
    }
    let want = qemu_bytes(&image, &dir.path().join("disk.raw"));
    let want = want.expect("qemu refuses what bedplate reads");
    assert_eq!(got.len(), want.len(), "another length than qemu's");
    let at = got.iter().zip(&want).position(|(a, b)| a != b);
    assert_eq!(at, None, "another byte than qemu's");
});
