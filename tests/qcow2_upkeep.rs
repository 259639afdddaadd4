//! Bitmaps and refcounts that lie where something else is: said with field and place, and read as
//! with qemu, also when `qemu-img check` calls the image clean.
#![expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod qcow2_common;

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;

use bedplate::image::qcow2::Terms;
use bedplate::image::{Finding, Format, Inspection, Verdict, inspect};
use qcow2_common::craft_big::{Built, COPIED, Field, Mark, Part, Piece, Plan, Snap};
use qcow2_common::mutate::{get, put};
use qcow2_common::{assert_same, have_qemu, open, qemu_bytes, write};
use tempfile::TempDir;

const CLUSTER: usize = 4096;

fn sound() -> Built {
    let mark = |name| Mark { name, flags: 2, granularity_bits: 9 };
    let disk = vec![
        (0, Piece::Data(1)),
        (1, Piece::Data(2)),
        (2, Piece::Preallocated(3)),
        (3, Piece::Packed(4)),
        (4, Piece::Zero),
    ];
    let bitmaps = vec![mark("b0"), mark("b1")];
    Plan { bitmaps, features: [0, 0, 1], disk, ..Plan::new(12, 8 * 4096) }.build()
}

fn field(built: &Built, name: &str, part: Part, index: usize) -> Field {
    let all = built.fields.iter().filter(|field| field.part == part && field.name == name);
    *all.copied().collect::<Vec<_>>().get(index).unwrap()
}

fn inspected(path: &Path) -> Inspection {
    let file = File::open(path).unwrap();
    Inspection::of_file(&file, path, Some(Format::Qcow2), &Terms::default()).unwrap()
}

fn only(found: &Inspection, what: &str) -> Finding {
    assert_eq!(
        (found.verdict, found.findings.len()),
        (Verdict::Repairable, 1),
        "{what}: {found:?}"
    );
    found.findings[0].clone()
}

/// What `qemu-img check` says, and whether it is content.
fn check(path: &Path) -> (bool, String) {
    let output =
        Command::new("qemu-img").args(["check", "-f", "qcow2"]).arg(path).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    (output.status.success(), said + &String::from_utf8_lossy(&output.stdout))
}

/// Counts one use more or less of the cluster at `at`, as a writer would; entries that name a cluster
/// of two users have no copied flag.
fn count(built: &mut Built, at: usize, more: bool) {
    let refcount = Field {
        name: "refcount",
        part: Part::Refcount,
        at: 2 * CLUSTER + at / CLUSTER * 2,
        len: 2,
        owner: 0,
    };
    let now = get(&built.bytes, refcount.at, 2);
    put(&mut built.bytes, &refcount, if more { now + 1 } else { now - 1 });
    if more {
        for entry in built.fields.clone() {
            let raw = get(&built.bytes, entry.at, 8);
            let is_entry = matches!(entry.part, Part::L1 | Part::L2);
            if is_entry && raw & !COPIED & !1 == at as u64 && raw & COPIED != 0 {
                put(&mut built.bytes, &entry, raw & !COPIED);
            }
        }
    }
}

/// Where things are in the sound image.
fn places(built: &Built) -> Vec<(&'static str, usize)> {
    let of = |name, part, index| {
        let field = field(built, name, part, index);
        usize::try_from(get(&built.bytes, field.at, field.len) & 0x00ff_ffff_ffff_fe00).unwrap()
    };
    vec![
        ("refcount table", CLUSTER),
        ("refcount block", 2 * CLUSTER),
        ("L1", of("l1_table_offset", Part::Header, 0)),
        ("L2", of("L1 entry", Part::L1, 0)),
        ("data", of("L2 entry", Part::L2, 0)),
        ("preallocated", of("L2 entry", Part::L2, 2)),
        ("directory", of("bitmaps directory offset", Part::ExtensionLength, 0)),
        ("table", of("bitmap_table_offset", Part::Directory, 0)),
        ("bits", of("bitmap table entry", Part::BitmapTable, 1)),
    ]
}

fn written(dir: &TempDir, built: &Built) -> PathBuf {
    write(dir.path(), "image.qcow2", &built.bytes)
}

#[test]
fn a_bitmap_on_anything_else_is_said_and_the_disk_reads_as_with_qemu() {
    if !have_qemu() {
        return;
    }
    let dir = TempDir::new().unwrap();
    let sound = sound();
    let path = written(&dir, &sound);
    assert!(check(&path).0 && inspected(&path).verdict == Verdict::Ok);
    let want = qemu_bytes(&path).unwrap();
    let entry = field(&sound, "bitmap table entry", Part::BitmapTable, 0);
    let old = usize::try_from(get(&sound.bytes, entry.at, 8)).unwrap();
    for (what, place) in places(&sound) {
        let mut built = sound.clone();
        put(&mut built.bytes, &entry, place as u64);
        // First with refcounts that do not fit, of which `qemu-img check` has an opinion.
        written(&dir, &built);
        let (clean, said) = check(&path);
        assert!(!clean && said.contains("reference=2"), "{what}: {said}");
        let first = only(&inspected(&path), what);
        // Then with counts that do.
        count(&mut built, place, true);
        count(&mut built, old, false);
        written(&dir, &built);
        let (clean, said) = check(&path);
        // Of a refcount block that is used twice it is never content.
        assert!(clean != (what == "refcount block"), "{what}: {said}");
        let finding = only(&inspected(&path), what);
        assert_eq!(finding, first, "{what}");
        // Of two users of a cluster the one is said that is less to be missed: bits, unless the
        // cluster is data.
        let (names, at) = match what {
            "data" => ("data cluster offset", field(&built, "L2 entry", Part::L2, 0).at),
            "preallocated" => {
                ("preallocated cluster offset", field(&built, "L2 entry", Part::L2, 2).at)
            }
            // The other bitmap's table is behind.
            "bits" => {
                ("bitmap table entry", field(&built, "bitmap table entry", Part::BitmapTable, 1).at)
            }
            _table => ("bitmap table entry", entry.at),
        };
        assert_eq!((finding.field, finding.at), (Some(names), Some(at as u64)), "{what}");
        assert!(finding.text.starts_with(&format!("{names} at byte {at:#x} is ")), "{finding:?}");
        // A copy of it is sealed, with a note, and served.
        let file = File::open(&path).unwrap();
        let info = inspect(&file, &path, Some(Format::Qcow2), &Terms::default()).unwrap();
        assert!(info.notes.iter().any(|note| note.contains(names)), "{what}: {:?}", info.notes);
        assert_eq!(qemu_bytes(&path).as_ref(), Some(&want), "{what}");
        assert_same(&open(&path), &want, what);
    }
}

#[test]
fn refcounts_on_anything_else_are_said_and_the_disk_reads_as_with_qemu() {
    if !have_qemu() {
        return;
    }
    let dir = TempDir::new().unwrap();
    let sound = sound();
    let path = written(&dir, &sound);
    let want = qemu_bytes(&path).unwrap();
    let spare = Field {
        name: "refcount table entry",
        part: Part::Refcount,
        at: CLUSTER + 8,
        len: 8,
        owner: 0,
    };
    for (what, place) in places(&sound) {
        let mut built = sound.clone();
        put(&mut built.bytes, &spare, place as u64);
        written(&dir, &built);
        assert!(!check(&path).0, "{what}");
        let found = inspected(&path);
        assert_eq!(found.verdict, Verdict::Repairable, "{what}: {found:?}");
        assert_eq!(qemu_bytes(&path).as_ref(), Some(&want), "{what}");
        assert_same(&open(&path), &want, what);
    }
}

#[test]
fn a_snapshot_on_anything_else_is_said_and_the_disk_reads_as_with_qemu() {
    if !have_qemu() {
        return;
    }
    let dir = TempDir::new().unwrap();
    let snap = |id, disk| Snap { id, name: id, extra_bytes: 16, disk };
    let snapshots = vec![
        snap("1", vec![(0, Piece::Shared(0)), (1, Piece::Data(7))]),
        snap("2", vec![(0, Piece::Shared(0)), (5, Piece::Data(8))]),
    ];
    let bitmaps = vec![Mark { name: "b0", flags: 2, granularity_bits: 9 }];
    let disk = vec![(0, Piece::Data(1)), (1, Piece::Data(2)), (2, Piece::Packed(4))];
    let plan = Plan { bitmaps, features: [0, 0, 1], disk, ..Plan::new(12, 8 * 4096) };
    let sound = Plan { snapshots, ..plan }.build();
    let path = written(&dir, &sound);
    assert!(check(&path).0 && inspected(&path).verdict == Verdict::Ok, "{:?}", inspected(&path));
    let want = qemu_bytes(&path).unwrap();
    let l1_of = |index| field(&sound, "l1_table_offset", Part::Snapshot, index);
    let value = |field: &Field| usize::try_from(get(&sound.bytes, field.at, field.len)).unwrap();
    let names = "snapshot l1_table_offset";
    let place_of = |name: &str, part, index| {
        let raw = value(&field(&sound, name, part, index));
        raw & 0x00ff_ffff_ffff_fe00
    };
    let (first, second) = (l1_of(0), l1_of(1));
    for (what, place, finding) in [
        ("refcount table", CLUSTER, (names, first.at)),
        ("refcount block", 2 * CLUSTER, (names, first.at)),
        ("L1", place_of("l1_table_offset", Part::Header, 0), (names, first.at)),
        ("L2", place_of("L1 entry", Part::L1, 0), (names, first.at)),
        (
            "data",
            place_of("L2 entry", Part::L2, 0),
            ("data cluster offset", field(&sound, "L2 entry", Part::L2, 0).at),
        ),
        ("snapshot table", place_of("snapshots_offset", Part::Header, 0), (names, first.at)),
        ("the other one's", value(&second), (names, second.at)),
        (
            "directory",
            place_of("bitmaps directory offset", Part::ExtensionLength, 0),
            (
                "bitmaps directory offset",
                field(&sound, "bitmaps directory offset", Part::ExtensionLength, 0).at,
            ),
        ),
    ] {
        let mut built = sound.clone();
        put(&mut built.bytes, &first, place as u64);
        written(&dir, &built);
        assert!(!check(&path).0, "{what}");
        let found = inspected(&path);
        let is_it =
            |one: &&Finding| (one.field, one.at) == (Some(finding.0), Some(finding.1 as u64));
        assert!(found.verdict == Verdict::Repairable, "{what}: {found:?}");
        assert!(found.findings.iter().any(|one| is_it(&one)), "{what}: {found:?}");
        assert_eq!(qemu_bytes(&path).as_ref(), Some(&want), "{what}");
        assert_same(&open(&path), &want, what);
    }
}

#[test]
fn a_url_of_an_image_is_judged_as_its_file() {
    if !have_qemu() {
        return;
    }
    let dir = TempDir::new().unwrap();
    let sound = sound();
    let entry = field(&sound, "bitmap table entry", Part::BitmapTable, 0);
    let mut built = sound.clone();
    put(&mut built.bytes, &entry, places(&sound)[3].1 as u64);
    let path = written(&dir, &built);
    let of = |target: &str| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_bedplate"));
        let output = command.args(["--json", "inspect", target]).output().unwrap();
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).unwrap()
    };
    let of_file = of(path.to_str().unwrap());
    assert!(
        of_file.contains("\"repairable\"") && of_file.contains("bitmap table entry"),
        "{of_file}"
    );
    assert_eq!(of(&format!("file://{}", path.to_str().unwrap())), of_file);
}
