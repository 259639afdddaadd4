//! A raw image read through a view gives the file's bytes, and never reads its holes.
#![expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::PathBuf;

use bedplate::disk::Sealed;
use bedplate::image::qcow2::Terms;
use bedplate::image::{Format, ImageError, ReadError, Run, RunKind, Stored, View, inspect};
use bedplate::units::{FileOffset, GuestOffset, KIB, MIB};
use tempfile::TempDir;

fn stored(at: u64) -> Stored {
    Stored { layer: 0, at: FileOffset(at) }
}

struct Fixture {
    _dir: TempDir,
    path: PathBuf,
    file: File,
}

fn fixture(len: u64) -> Fixture {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("disk.qcow2");
    let file = File::options().read(true).write(true).create_new(true).open(&path).unwrap();
    file.set_len(len).unwrap();
    Fixture { _dir: dir, path, file }
}

impl Fixture {
    fn view(&self) -> View {
        View::open(Sealed::open_path(&self.path).unwrap(), None).unwrap()
    }
}

#[test]
fn every_byte_is_the_files_byte_at_any_alignment() {
    let len = 3 * MIB + 12_345;
    let fixture = fixture(len);
    let pattern: Vec<u8> =
        (0..700_001_u32).map(|n| n.to_le_bytes()[0] ^ n.to_le_bytes()[1]).collect();
    fixture.file.write_all_at(&pattern, MIB + 77).unwrap();
    fixture.file.write_all_at(b"end", len - 3).unwrap();
    let want = std::fs::read(&fixture.path).unwrap();
    let view = fixture.view();
    assert_eq!((view.size_bytes(), view.format()), (len, Format::Raw), "by content, not by name");
    for (at, count) in [(0, len), (1, len - 1), (MIB + 70, 100), (len - 1, 1), (5, 0), (len, 0)] {
        let mut got = vec![0xaa; usize::try_from(count).unwrap()];
        view.read_at(&mut got, GuestOffset(at)).unwrap();
        let from = usize::try_from(at).unwrap();
        assert!(got == want[from..from + got.len()], "{count} bytes at {at}");
    }
}

#[test]
fn holes_are_zero_runs_and_data_is_where_the_file_has_it() {
    let fixture = fixture(10 * MIB);
    fixture.file.write_all_at(&[1; 128 * 1024], 4 * MIB).unwrap();
    let view = fixture.view();
    let run = |at, limit| view.run_at(GuestOffset(at), limit).unwrap();
    assert_eq!(run(0, u64::MAX), Run { kind: RunKind::Zero, len_bytes: 4 * MIB });
    let data = Run { kind: RunKind::Data(stored(4 * MIB + 5)), len_bytes: 128 * KIB - 5 };
    assert_eq!(run(4 * MIB + 5, u64::MAX), data);
    assert_eq!(run(4 * MIB, 7).len_bytes, 7);
    assert_eq!(run(5 * MIB, u64::MAX), Run { kind: RunKind::Zero, len_bytes: 5 * MIB });
    assert_eq!(view.mapped(stored(4 * MIB), 4096).unwrap().len(), 4096);
    assert!(view.mapped(stored(10 * MIB), 1).is_none());
}

#[test]
fn reading_all_of_a_sparse_file_leaves_it_sparse() {
    let fixture = fixture(64 * MIB);
    let view = fixture.view();
    view.read_at(&mut vec![1; 64 << 20], GuestOffset(0)).unwrap();
    assert_eq!(fixture.file.metadata().unwrap().blocks(), 0);
    assert_eq!(view.info().allocated_bytes, 0);
}

#[test]
fn a_read_past_the_end_is_an_error_and_writes_nothing() {
    let fixture = fixture(1000);
    let view = fixture.view();
    let mut buf = [7; 10];
    for at in [991, 1000, u64::MAX] {
        let error = view.read_at(&mut buf, GuestOffset(at)).unwrap_err();
        assert!(matches!(error, ReadError::PastEnd { .. }), "{error}");
    }
    assert_eq!(buf, [7; 10]);
    assert!(view.run_at(GuestOffset(1000), 1).is_err());
    assert!(view.run_at(GuestOffset(0), 0).is_err());
}

#[test]
fn a_file_cut_short_after_opening_is_an_error_and_no_signal() {
    let fixture = fixture(0);
    fixture.file.write_all_at(&vec![3; 1 << 20], 0).unwrap();
    let view = fixture.view();
    fixture.file.set_len(4096).unwrap();
    let error = view.read_at(&mut [0; 4096], GuestOffset(512 * KIB)).unwrap_err();
    assert!(matches!(error, ReadError::Io { .. }), "{error}");
    view.read_at(&mut [0; 4096], GuestOffset(0)).unwrap();
}

#[test]
fn an_empty_file_is_refused() {
    let fixture = fixture(0);
    let error = View::open(Sealed::open_path(&fixture.path).unwrap(), None).unwrap_err();
    assert!(matches!(error, ImageError::Empty { .. }), "{error}");
}

#[test]
fn a_declared_format_must_agree_with_the_content() {
    let fixture = fixture(MIB);
    let sealed = Sealed::open_path(&fixture.path).unwrap();
    let error = View::open(sealed, Some(Format::Qcow2)).unwrap_err();
    assert!(matches!(error, ImageError::FormatMismatch { .. }), "{error}");
    fixture.file.write_all_at(b"KDMV", 0).unwrap();
    let info = inspect(&fixture.file, &fixture.path, Some(Format::Raw), &Terms::default()).unwrap();
    assert!(info.notes[0].contains("VMDK"), "{:?}", info.notes);
}
