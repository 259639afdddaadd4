//! Any bytes as L2 entries, and as a whole small image: inspect it, then read every byte.
#![no_main]

use std::io::Write;
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::sync::{Arc, LazyLock};

use bedplate::disk::Sealed;
use bedplate::image::qcow2::Terms;
use bedplate::image::qcow2::{
    Cluster, ClusterBits, Extended, L2Tables, Limits, decode_extended_l2, decode_l1, decode_l2,
};
use bedplate::image::{DecodedCache, Format, RunKind, View, inspect};
use bedplate::units::GuestOffset;
use libfuzzer_sys::fuzz_target;

/// Larger disks are read at both ends only.
const READ_WHOLE_BYTES: u64 = 1 << 20;

static CACHE: LazyLock<Arc<DecodedCache>> = LazyLock::new(|| DecodedCache::new(1 << 20));

fn decode_entries(data: &[u8]) {
    let (entries, _) = data.as_chunks::<8>();
    for &entry in entries.iter().take(64) {
        let raw = u64::from_be_bytes(entry);
        for bits in [9, 12, 16, 21].into_iter().filter_map(ClusterBits::new) {
            let (len, size) = (1_u64 << 40, bits.size_bytes());
            let l1 = 3 * size..3 * size + 64;
            let tables = L2Tables::of([5 * size].into_iter(), bits);
            let limits =
                Limits { version: 3, bits, file_len_bytes: len, l1: &l1, l2_tables: &tables, data_len_bytes: None };
            match decode_l2(raw, size, &limits) {
                Ok(Cluster::Data(at)) => assert!(at.0 >= size && at.0 + size <= len),
                Ok(Cluster::Compressed(packed)) => {
                    assert!(packed.at.0 + packed.len_bytes <= len && packed.len_bytes <= 2 * size);
                }
                Ok(Cluster::Zero | Cluster::Unallocated) | Err(_) => {}
            }
            let _no_panic = decode_l1(raw, &limits);
        }
    }
}

/// Pairs of words as extended entries: all 32 subclusters have one meaning each, inside the file.
fn decode_extended_entries(data: &[u8]) {
    let (entries, _) = data.as_chunks::<16>();
    for entry in entries.iter().take(64) {
        let word = |at: usize| u64::from_be_bytes(entry[at..at + 8].try_into().unwrap());
        let (raw, bitmap) = (word(0), word(8));
        for bits in [14, 16, 21].into_iter().filter_map(ClusterBits::new) {
            let (len, size) = (1_u64 << 40, bits.size_bytes());
            let unit = size / 32;
            let l1 = 3 * size..3 * size + 64;
            let tables = L2Tables::of([5 * size].into_iter(), bits);
            for data_len_bytes in [None, Some(7 * size + 512)] {
                let limits = Limits {
                    version: 3,
                    bits,
                    file_len_bytes: len,
                    l1: &l1,
                    l2_tables: &tables,
                    data_len_bytes,
                };
                let end = data_len_bytes.unwrap_or(len);
                let mut next = 0;
                match decode_extended_l2(raw, bitmap, size, &limits) {
                    Err(_) => continue,
                    Ok(Extended::Compressed(packed)) => {
                        assert!(packed.at.0 + packed.len_bytes <= len);
                        continue;
                    }
                    Ok(Extended::Split(parts)) => {
                        for (range, meaning) in parts.runs() {
                            assert!(range.start == next && range.end > next && range.end <= 32);
                            if let Cluster::Data(at) = meaning {
                                assert!(at.0 % unit == 0 && at.0 / size != 5 || data_len_bytes.is_some());
                                assert!(at.0 + unit * u64::from(range.end - range.start) <= end);
                                assert!(bitmap >> range.start & 1 == 1);
                            }
                            next = range.end;
                        }
                    }
                }
                assert_eq!(next, 32);
            }
        }
    }
}

/// Reads `[from, to)` in steps of odd length; every run must be as long as it says.
fn read(view: &View, from: u64, to: u64) -> bool {
    let mut buf = [0; 4099];
    let (mut at, mut sound) = (from, true);
    while at < to {
        let len = usize::try_from((to - at).min(buf.len() as u64)).unwrap();
        sound &= view.read_at(&mut buf[..len], GuestOffset(at)).is_ok();
        if let Ok(run) = view.run_at(GuestOffset(at), u64::MAX) {
            assert!(run.len_bytes > 0 && run.len_bytes <= view.size_bytes() - at);
            if let RunKind::Data(stored) = run.kind {
                assert!(view.mapped(stored, usize::try_from(run.len_bytes).unwrap()).is_some());
            }
        }
        at += len as u64;
    }
    sound
}

fuzz_target!(|data: &[u8]| {
    decode_entries(data);
    decode_extended_entries(data);
    if data.is_empty() {
        return;
    }
    let mut file = tempfile::tempfile_in("/dev/shm").unwrap();
    file.write_all(data).unwrap();
    let path = PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()));
    let whole = inspect(&file, &path, Some(Format::Qcow2), &Terms::default());
    let sealed = Sealed::open_path(&path).unwrap();
    let Ok(view) = View::open_with_cache(sealed, Some(Format::Qcow2), Arc::clone(&CACHE)) else {
        assert!(whole.is_err(), "inspect takes what open refuses");
        return;
    };
    let size = view.size_bytes();
    if size <= READ_WHOLE_BYTES {
        let sound = read(&view, 0, size);
        assert!(!sound || whole.is_ok(), "all bytes read, but inspect refuses: {whole:?}");
    } else {
        read(&view, 0, READ_WHOLE_BYTES / 2);
        read(&view, size - READ_WHOLE_BYTES / 2, size);
    }
});
