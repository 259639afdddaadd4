//! Any bytes as a VMDK, VHD or VHDX image: inspect it, then read every byte. Sums are put right, as
//! no fuzzer finds them, and of a VHDX only the parts that count are given: see `spread`.
#![no_main]

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::{Arc, LazyLock};

use bedplate::disk::Sealed;
use bedplate::image::qcow2::Terms;
use bedplate::image::{DecodedCache, Format, Inspection, RunKind, Verdict, View, inspect};
use bedplate::units::GuestOffset;
use libfuzzer_sys::fuzz_target;

/// Larger disks are read at both ends only.
const READ_WHOLE_BYTES: u64 = 1 << 20;
/// Larger disks have tables that take long to inspect.
const INSPECT_BYTES: u64 = 1 << 34;
const SECTOR: usize = 512;

static CACHE: LazyLock<Arc<DecodedCache>> = LazyLock::new(|| DecodedCache::new(1 << 20));

fn new_file() -> File {
    tempfile::tempfile_in("/dev/shm").unwrap()
}

fn path_of(file: &File) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()))
}

/// Puts the sums of a VHD right, where there is one.
fn sum_vhd(bytes: &mut [u8]) {
    let header_at = bytes.get(16..24).map_or(0, |b| u64::from_be_bytes(b.try_into().unwrap()));
    let header_at = usize::try_from(header_at).unwrap_or(usize::MAX);
    let end = bytes.len().saturating_sub(SECTOR);
    for (at, len, sum_at) in [(0, SECTOR, 64), (header_at, 1024, 36), (end, SECTOR, 64)] {
        let Some(area) = at.checked_add(len).and_then(|end| bytes.get_mut(at..end)) else { continue };
        if area.starts_with(b"conectix") || area.starts_with(b"cxsparse") {
            area[sum_at..sum_at + 4].fill(0);
            let sum = !area.iter().map(|&byte| u32::from(byte)).sum::<u32>();
            area[sum_at..sum_at + 4].copy_from_slice(&sum.to_be_bytes());
        }
    }
}

fn crc32c(bytes: &[u8]) -> u32 {
    static TABLE: LazyLock<[u32; 256]> = LazyLock::new(|| {
        std::array::from_fn(|n| {
            (0..8).fold(n as u32, |n, _| if n & 1 == 1 { n >> 1 ^ 0x82f6_3b78 } else { n >> 1 })
        })
    });
    !bytes.iter().fold(u32::MAX, |crc, &b| crc >> 8 ^ TABLE[usize::from(crc as u8 ^ b)])
}

/// A VHDX of 6 MiB from seven parts of 512 bytes: what is at its start, the headers, the region
/// table, the metadata table, the metadata, and the block allocation table.
fn spread(data: &[u8]) -> File {
    const PLACES: [(u64, usize); 7] = [
        (0, 0),
        (0x1_0000, 4096),
        (0x2_0000, 4096),
        (0x3_0000, 0x1_0000),
        (2 << 20, 0),
        (2 << 20 | 0x1_0000, 0),
        (3 << 20, 0),
    ];
    let file = new_file();
    file.set_len(6 << 20).unwrap();
    for ((at, summed), part) in PLACES.into_iter().zip(data.chunks(SECTOR)) {
        let mut part = part.to_vec();
        if summed > 0 {
            part.resize(summed, 0);
            part[4..8].fill(0);
            let sum = crc32c(&part);
            part[4..8].copy_from_slice(&sum.to_le_bytes());
        }
        file.write_all_at(&part, at).unwrap();
    }
    file
}

/// Reads `[from, to)` in steps of odd length; every run must be as long as it says.
fn read(view: &View, from: u64, to: u64) -> bool {
    let mut buf = [0; 4099];
    let (mut at, mut sound) = (from, true);
    while at < to {
        let len = usize::try_from((to - at).min(buf.len() as u64)).unwrap();
        sound &= view.read_at(&mut buf[..len], GuestOffset(at)).is_ok();
        if let Ok(run) = view.run_at(GuestOffset(at), 1 << 30) {
            assert!(run.len_bytes > 0 && run.len_bytes <= view.size_bytes() - at);
            if let RunKind::Data(stored) = run.kind {
                assert!(view.mapped(stored, usize::try_from(run.len_bytes).unwrap()).is_some());
            }
        }
        at += len as u64;
    }
    sound
}

fn check(file: &File, format: Format) {
    let path = path_of(file);
    let sealed = Sealed::open_path(&path).unwrap();
    let Ok(view) = View::open_with_cache(sealed, Some(format), Arc::clone(&CACHE)) else {
        let whole = inspect(file, &path, Some(format), &Terms::default());
        assert!(whole.is_err(), "inspect takes what open refuses");
        return;
    };
    let size = view.size_bytes();
    assert!((512..=16 << 40).contains(&size));
    let whole = (size <= INSPECT_BYTES).then(|| {
        let whole = inspect(file, &path, Some(format), &Terms::default());
        let seen = Inspection::of_file(file, &path, Some(format), &Terms::default()).unwrap();
        assert_eq!(whole.is_err(), seen.verdict == Verdict::Refused, "{whole:?} {seen:?}");
        whole
    });
    if size <= READ_WHOLE_BYTES {
        let sound = read(&view, 0, size);
        let whole = whole.unwrap();
        assert!(!sound || whole.is_ok(), "all bytes read, but inspect refuses: {whole:?}");
    } else {
        read(&view, 0, READ_WHOLE_BYTES / 2);
        read(&view, size - READ_WHOLE_BYTES / 2, size);
    }
}

fuzz_target!(|data: &[u8]| {
    if data.is_empty() {
        return;
    }
    if data.starts_with(b"vhdxfile") {
        check(&spread(data), Format::Vhdx);
        return;
    }
    let format = if data.starts_with(b"KDMV") { Format::Vmdk } else { Format::Vhd };
    let mut bytes = data.to_vec();
    if format == Format::Vhd {
        sum_vhd(&mut bytes);
    }
    let file = new_file();
    file.write_all_at(&bytes, 0).unwrap();
    check(&file, format);
});
