//! Images that are sound, or nearly: what bedplate reads whole has qemu's bytes.
//!
//! The fuzzer's bytes choose a [`Plan`], so that most inputs are images with data; the rest of them
//! damages up to three fields. Only what is accepted is given to `qemu-img`, which costs some
//! milliseconds; without `qemu-img` the image is held against itself alone.
#![no_main]

#[allow(dead_code, reason = "the tests use all of it")]
#[path = "../../tests/qcow2_common/craft_big.rs"]
mod craft_big;

use std::path::Path;
use std::process::Command;
use std::sync::{Arc, LazyLock};

use bedplate::disk::Sealed;
use bedplate::image::{DecodedCache, Format, RunKind, View, inspect};
use bedplate::units::GuestOffset;
use craft_big::{Built, FEATURE_NAMES, Piece, Plan, Snap, n};
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

/// The fuzzer's bytes, as choices; zeroes when they are used up.
struct Choices<'a>(&'a [u8]);

impl Choices<'_> {
    fn byte(&mut self) -> u8 {
        let Some((&first, rest)) = self.0.split_first() else { return 0 };
        self.0 = rest;
        first
    }

    fn below(&mut self, limit: u8) -> u8 {
        self.byte() % limit
    }

    fn quad(&mut self) -> u64 {
        (0..8).fold(0, |value, _| value << 8 | u64::from(self.byte()))
    }

    fn disk(&mut self, clusters: u64, plan: &Plan, shared: &[u64]) -> Vec<(u64, Piece)> {
        let mut disk: Vec<(u64, Piece)> = Vec::new();
        for _ in 0..self.below(20) {
            let at = u64::from(self.byte()) % clusters;
            if disk.iter().any(|(other, _)| *other == at) {
                continue;
            }
            let seed = self.byte();
            let piece = match self.below(8) {
                0 => Piece::Unallocated,
                1 if plan.version > 2 => Piece::Zero,
                2 if plan.version > 2 => Piece::Preallocated(seed),
                3 | 4 => Piece::Packed(seed),
                5 if plan.extended => {
                    let bits = self.quad();
                    // No subcluster is both.
                    Piece::Split(seed, bits & !(bits << 32))
                }
                6 if !shared.is_empty() => Piece::Shared(shared[usize::from(seed) % shared.len()]),
                _ => Piece::Data(seed),
            };
            disk.push((at, piece));
        }
        disk
    }

    fn plan(&mut self) -> Plan {
        let kind = self.byte();
        let extended = kind & 3 == 3;
        let cluster_bits = u32::from(if extended { 14 + self.below(2) } else { 9 + self.below(6) });
        let version = if kind & 3 == 2 { 2 } else { 3 };
        let cluster = 1_u64 << cluster_bits;
        let clusters = 1 + u64::from(self.below(200)).min((1 << 22) / cluster);
        let size_bytes = clusters * cluster - u64::from(self.byte()) % cluster;
        let mut plan = Plan { version, extended, ..Plan::new(cluster_bits, size_bytes.max(512)) };
        plan.zstd = version == 3 && kind & 4 != 0;
        plan.spare_l1 = usize::from(kind >> 6);
        if kind & 8 != 0 && version == 3 {
            plan.features = [u64::from(self.below(4)), self.quad(), self.quad() & !2];
            plan.header_len = 104 + 8 * usize::from(self.below(4));
            plan.zstd &= plan.header_len > 104;
        }
        if kind & 16 != 0 {
            for _ in 0..self.below(4) {
                let magic = if self.byte() & 1 == 0 { FEATURE_NAMES } else { self.quad() as u32 };
                let len = usize::from(self.below(48));
                plan.extensions.push((magic, vec![self.byte(); len]));
            }
        }
        plan.disk = self.disk(clusters, &plan, &[]);
        if kind & 32 != 0 {
            let shared = plan.disk.iter().filter(|(_, piece)| matches!(piece, Piece::Data(_)));
            let shared: Vec<u64> = shared.map(|(at, _)| *at).collect();
            for id in ["1", "2"].into_iter().take(usize::from(1 + self.below(2))) {
                let extra_bytes = usize::from(self.below(4)) * 8;
                let disk = self.disk(clusters, &plan, &shared);
                plan.snapshots.push(Snap { id, name: "a snapshot", extra_bytes, disk });
            }
        }
        plan
    }

    /// Sets some fields to places, edges, or anything.
    fn damage(&mut self, built: &mut Built) {
        for _ in 0..self.below(8).saturating_sub(4) {
            let field = built.fields[usize::from(self.byte()) % built.fields.len()];
            let part = &mut built.bytes[field.at..field.at + field.len];
            let old = part.iter().fold(0, |value, &byte| value << 8 | u64::from(byte));
            let place = built.places[usize::from(self.byte()) % built.places.len()] as u64;
            let value = match self.below(6) {
                0 => old ^ 1 << self.below(64),
                1 => place,
                2 => place | u64::from(self.below(4)) << 62 | u64::from(self.below(2)),
                3 => old.wrapping_add(u64::from(self.byte())).wrapping_sub(128),
                4 => (old & (3 << 62)) | (self.quad() >> 20),
                _ => self.quad(),
            };
            part.copy_from_slice(&value.to_be_bytes()[8 - field.len..]);
        }
    }
}

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
