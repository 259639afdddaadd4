//! What the QCOW2 tests share: qemu's tools, a seeded generator, and the comparison with qemu.
#![allow(dead_code, reason = "each test binary uses its part of this module")]

pub mod choose;
pub mod craft;
pub mod craft_big;
pub mod make;
pub mod mutate;
pub mod uses;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use bedplate::disk::Sealed;
use bedplate::image::{DecodedCache, ReadError, RunKind, View};
use bedplate::units::GuestOffset;

/// True if qemu's tools are here. Without them a test says that it is skipped, or fails if the
/// environment says `REQUIRE_TOOLS=1`.
pub fn have_qemu() -> bool {
    let runs = |tool: &str| Command::new(tool).arg("--version").output().is_ok();
    if runs("qemu-img") && runs("qemu-io") {
        return true;
    }
    println!("SKIPPED: qemu-img or qemu-io is not installed");
    assert!(std::env::var("REQUIRE_TOOLS").as_deref() != Ok("1"), "REQUIRE_TOOLS=1");
    false
}

/// Runs a tool; its output if it succeeded, else a panic with what it said.
pub fn run(tool: &str, args: &[&str]) -> Output {
    let output = Command::new(tool).args(args).output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{tool} {args:?}: {stderr}");
    output
}

/// Runs commands of `qemu-io` on an image, of a format by qemu's name for it. Each has to succeed.
pub fn qemu_io_as(format: &str, image: &Path, commands: &[String]) {
    let mut args = vec!["-f", format];
    for command in commands {
        args.extend(["-c", command]);
    }
    args.push(image.to_str().unwrap());
    let output = run("qemu-io", &args);
    // It ends with success, too, when a command has failed.
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(!said.contains("failed"), "{commands:?}: {said}");
}

/// Bytes that compress to half their length, and are hardly ever zero for long.
pub fn half_random(seed: u64, len: usize) -> Vec<u8> {
    let mut random = Random(seed);
    (0..len).map(|_| random.next().to_le_bytes()[0] & 15).collect()
}

/// A QCOW2 image of these bytes, whose clusters are compressed with zlib.
pub fn compressed(dir: &Path, name: &str, bytes: &[u8]) -> PathBuf {
    let (raw, image) = (dir.join("raw"), dir.join(name));
    std::fs::write(&raw, bytes).unwrap();
    let (from, to) = (raw.to_str().unwrap(), image.to_str().unwrap());
    run("qemu-img", &["convert", "-q", "-c", "-f", "raw", "-O", "qcow2", from, to]);
    image
}

/// `qemu-img convert` to raw: the bytes, or `None` if qemu refuses the image or fails to read it.
pub fn qemu_bytes(image: &Path) -> Option<Vec<u8>> {
    qemu_bytes_as(image, "qcow2")
}

/// As [`qemu_bytes`], of a format by qemu's name for it.
pub fn qemu_bytes_as(image: &Path, format: &str) -> Option<Vec<u8>> {
    let raw = image.with_extension("raw");
    let (from, to) = (image.to_str().unwrap(), raw.to_str().unwrap());
    let args = ["convert", "-q", "-f", format, "-O", "raw", from, to];
    let output = Command::new("qemu-img").args(args).output().unwrap();
    let bytes = output.status.success().then(|| std::fs::read(&raw).unwrap());
    let _may_not_exist = std::fs::remove_file(&raw);
    bytes
}

/// A small seeded generator (splitmix64), so that a failure can be replayed.
#[derive(Clone, Debug)]
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `limit`, which is not 0.
    pub fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }

    pub fn index(&mut self, limit: usize) -> usize {
        usize::try_from(self.below(limit as u64)).unwrap()
    }
}

/// Opens `image` with a cache of its own.
pub fn open(image: &Path) -> View {
    let sealed = Sealed::open_path(image).unwrap();
    View::open_with_cache(sealed, None, DecodedCache::new(8 << 20)).unwrap()
}

/// All bytes of a view, read run by run.
pub fn all_bytes(view: &View) -> Result<Vec<u8>, ReadError> {
    let mut bytes = vec![0xa5; usize::try_from(view.size_bytes()).unwrap()];
    for (at, part) in (0..).step_by(1 << 20).zip(bytes.chunks_mut(1 << 20)) {
        view.read_at(part, GuestOffset(at))?;
    }
    Ok(bytes)
}

/// Asserts that the view's bytes are `want`: in order, by runs, and by reads of any alignment.
pub fn assert_same(view: &View, want: &[u8], name: &str) {
    assert_eq!(view.size_bytes(), want.len() as u64, "{name}: size");
    let got = all_bytes(view).unwrap();
    if let Some(at) = got.iter().zip(want).position(|(a, b)| a != b) {
        panic!("{name}: byte {at:#x} is {:#x}, qemu has {:#x}", got[at], want[at]);
    }
    assert_runs(view, want, name);
    let mut random = Random(want.len() as u64);
    for _ in 0..100 {
        let at = random.index(want.len());
        let most = if random.below(4) == 0 { 200_000 } else { 5000 };
        let len = random.index((want.len() - at).min(most) + 1);
        let mut part = vec![0x5a; len];
        view.read_at(&mut part, GuestOffset(at as u64)).unwrap();
        assert!(part == want[at..at + len], "{name}: {len} bytes at {at}");
    }
}

/// Asserts that runs cover the view, each as said: zero, in the file, or decoded.
fn assert_runs(view: &View, want: &[u8], name: &str) {
    let mut at = 0;
    while at < want.len() {
        let run = view.run_at(GuestOffset(at as u64), u64::MAX).unwrap();
        let len = usize::try_from(run.len_bytes).unwrap();
        assert!(len > 0, "{name}: empty run at {at}");
        let want = &want[at..at + len];
        match run.kind {
            RunKind::Zero => assert!(want.iter().all(|&b| b == 0), "{name}: zero run at {at}"),
            RunKind::Data(stored) => {
                assert!(view.mapped(stored, len).is_some(), "{name}: run past the file's end");
                let mut got = vec![0; len];
                let file = view.data_file(stored.layer).unwrap();
                file.read_exact_at(&mut got, stored.at.0).unwrap();
                assert!(got == want, "{name}: data run at {at}");
            }
            RunKind::Encoded => {
                // The cluster may go on where an image above it has something else.
                let at = GuestOffset(at as u64);
                let decoded = view.decoded(at).unwrap().from(at);
                assert!(decoded.get(..len) == Some(want), "{name}: encoded run at {at}");
            }
        }
        at += len;
    }
}

/// Writes `bytes` as the file `name` in `dir`.
pub fn write(dir: &Path, name: &str, bytes: &[u8]) -> PathBuf {
    let path = dir.join(name);
    File::create(&path).unwrap().write_all_at(bytes, 0).unwrap();
    path
}

/// A raw disk with text, random bytes, zeroes and holes.
pub fn raw_disk(dir: &Path, size: u64, random: &mut Random) -> PathBuf {
    let path = dir.join("disk.raw");
    let file = File::create(&path).unwrap();
    file.set_len(size).unwrap();
    let mut at = 0;
    while at < size {
        let len = (random.below(size.min(1 << 20) / 4 + 1) + 1).min(size - at);
        let bytes: Vec<u8> = match random.below(4) {
            0 => Vec::new(),
            1 => (0..len)
                .map(|n| b"the quick brown fox\n"[usize::try_from(n % 20).unwrap()])
                .collect(),
            2 => vec![0; usize::try_from(len).unwrap()],
            _ => (0..len).map(|_| random.next().to_le_bytes()[0]).collect(),
        };
        file.write_all_at(&bytes, at).unwrap();
        at += len;
    }
    path
}
