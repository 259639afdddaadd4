//! Opening an image costs bounded memory and bounded reads, whatever the file says.
//!
//! A test of its own binary: its allocator counts what is held. `BEDPLATE_KEEP=DIR` leaves the costliest
//! files there, to be timed: `bedplate cat FILE --length 0` opens one, `bedplate inspect FILE` judges it.
#![expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod qcow2_common;

use std::alloc::{GlobalAlloc, Layout, System};
use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use bedplate::disk::Sealed;
use bedplate::image::qcow2::Terms;
use bedplate::image::{DecodedCache, Format, Inspection, Opening, Verdict, View, peek};
use bedplate::units::GuestOffset;
use qcow2_common::craft::Crafted;
use qcow2_common::craft_big::{Built, Mark, Piece, Plan, Snap};
use qcow2_common::mutate::{Chart, samples};
use qcow2_common::{Random, have_qemu, run, write};
use tempfile::TempDir;

const MIB: usize = 1 << 20;
/// Most that an image may cost while it is opened, or inspected: its L1 table and what is made of it.
const MOST_BYTES: usize = 64 * MIB;
/// Read beside header, L1 table and snapshot table: a buffer's worth.
const MORE_READ_BYTES: u64 = 1 << 20;

/// The system's allocator, which counts.
struct Counting;

static HELD: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);
static ALLOCATIONS: AtomicUsize = AtomicUsize::new(0);
/// The counters are the process's: one measurement at a time.
static TURN: Mutex<()> = Mutex::new(());

// SAFETY: every call is handed on as it came; counting allocates nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let held = HELD.fetch_add(layout.size(), Ordering::Relaxed) + layout.size();
        PEAK.fetch_max(held, Ordering::Relaxed);
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller's promise is the same.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, place: *mut u8, layout: Layout) {
        HELD.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: `place` came from `alloc` above, so from the system, with this layout.
        unsafe { System.dealloc(place, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn turn() -> MutexGuard<'static, ()> {
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Bytes that this process has asked the kernel to read, from files and all else, and how often.
fn reads() -> (u64, u64) {
    let text = std::fs::read_to_string("/proc/self/io").unwrap();
    let of = |name| text.lines().find_map(|line| line.strip_prefix(name)).unwrap().parse().unwrap();
    (of("rchar: "), of("syscr: "))
}

/// What something cost.
#[derive(Debug)]
struct Cost {
    /// Most that was held at a time.
    peak_bytes: usize,
    allocations: usize,
    read_bytes: u64,
    reads: u64,
}

/// What `work` cost, beside its result.
fn cost<T>(work: impl FnOnce() -> T) -> (Cost, T) {
    let (held, read) = (HELD.load(Ordering::Relaxed), reads());
    PEAK.store(held, Ordering::Relaxed);
    let before = ALLOCATIONS.load(Ordering::Relaxed);
    let result = work();
    let allocations = ALLOCATIONS.load(Ordering::Relaxed) - before;
    let peak_bytes = PEAK.load(Ordering::Relaxed) - held;
    let now = reads();
    (Cost { peak_bytes, allocations, read_bytes: now.0 - read.0, reads: now.1 - read.1 }, result)
}

/// Bytes that a view's shared table holds: untouched pages are none.
fn shared_bytes(view: &View) -> usize {
    view.cluster_map().map_or(0, |map| {
        let memory = File::from(map.table().fd().try_clone_to_owned().unwrap());
        usize::try_from(memory.metadata().unwrap().blocks() * 512).unwrap()
    })
}

/// What an image is opened with.
#[derive(Default)]
struct Given<'a> {
    snapshot: Option<&'a str>,
    base: Option<&'a Path>,
    data: Option<&'a Path>,
    /// Not inspected whole: it has too many L2 tables for that.
    header_only: bool,
}

/// Opens and inspects `path` and asserts the bounds; whether it opened.
fn bounded(path: &Path, given: &Given<'_>, what: &str) -> bool {
    let sealed = |path: &Path| Sealed::open_path(path).unwrap();
    let cache = || Some(DecodedCache::new(1 << 20));
    let base = given.base.map(|base| View::open(sealed(base), Some(Format::Raw)).unwrap());
    let tables_bytes = tables_bytes(&std::fs::File::open(path).unwrap());
    let opening = || Opening {
        declared: Some(Format::Qcow2),
        snapshot: given.snapshot,
        base: base.as_ref(),
        data: given.data.map(sealed),
        cache: cache(),
    };
    // What is made once in a process is no cost of this image.
    drop(View::open_as(sealed(path), opening()));
    let before = HELD.load(Ordering::Relaxed);
    let (Cost { peak_bytes: peak, read_bytes: read, .. }, view) =
        cost(|| View::open_as(sealed(path), opening()));
    // The L1 table is let go part by part while the shared table is filled from it.
    let kept = HELD.load(Ordering::Relaxed) - before + view.as_ref().map_or(0, shared_bytes);
    assert!(peak.max(kept) < MOST_BYTES, "{what}: opening holds {peak}, then {kept} bytes");
    assert!(read <= tables_bytes + MORE_READ_BYTES, "{what}: {read} bytes read, {tables_bytes}");
    let opened = view.is_ok();
    drop(view);
    let terms = Terms {
        snapshot: given.snapshot,
        backing: base.is_some(),
        data_len_bytes: given.data.map(|data| data.metadata().unwrap().len()),
    };
    if given.header_only {
        header_bounded(path, what);
        return opened;
    }
    let file = File::open(path).unwrap();
    let inspect = || Inspection::of_file(&file, path, Some(Format::Qcow2), &terms);
    let (Cost { peak_bytes: peak, .. }, inspection) = cost(inspect);
    assert!(peak < MOST_BYTES, "{what}: inspecting holds {peak} bytes");
    assert!(opened || inspection.unwrap().verdict == Verdict::Refused, "{what}");
    opened
}

/// All that an inspection holds beside header and L1 table is one L2 table.
fn header_bounded(path: &Path, what: &str) {
    let file = File::open(path).unwrap();
    let (Cost { peak_bytes: peak, .. }, info) = cost(|| peek(&file, path, Some(Format::Qcow2)));
    assert!(info.is_ok(), "{what}: {info:?}");
    assert!(peak + 2 * MIB < MOST_BYTES, "{what}: reading holds {peak} bytes");
}

/// Header, L1 table and snapshot table as the header has them, or as much as there is of them;
/// and all of bitmaps that may be read, if there are any.
fn tables_bytes(file: &File) -> u64 {
    let mut head = [0; 72];
    let _may_be_shorter = file.read_at(&mut head, 0).unwrap();
    let word = |at: usize| u64::from(u32::from_be_bytes(head[at..at + 4].try_into().unwrap()));
    let quad = |at: usize| u64::from_be_bytes(head[at..at + 8].try_into().unwrap());
    let len = file.metadata().unwrap().len();
    let snapshots = if word(60) == 0 { 0 } else { len.saturating_sub(quad(64)).min(64 << 20) };
    let mut start = vec![0; 1 << 20];
    let read = file.read_at(&mut start, 0).unwrap();
    start.truncate(read);
    let chart = Chart::of(&start);
    let bitmaps = u64::from(chart.bitmap_directory.is_some()) * (32 << 20);
    let directory = chart.bitmap_directory.map_or(0, |range| range.end - range.start);
    let bitmaps = bitmaps + directory.min(64 << 20);
    // Of a snapshot's L1 table the size is in the snapshot table; no limit is larger than this.
    (1 << word(20).min(21)) + (8 * word(36)).min(32 << 20).min(len) + snapshots + bitmaps
}

#[test]
fn each_seed_of_the_fuzzer_and_each_sample_opens_within_bounds() {
    let _turn = turn();
    let dir = TempDir::new().unwrap();
    let seeds = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/seeds");
    let (mut opened, mut count) = (0, 0);
    for folder in ["qcow2_header", "qcow2_tables", "qcow2_inspect"] {
        for entry in seeds.join(folder).read_dir().unwrap() {
            let path = entry.unwrap().path();
            opened += u64::from(bounded(&path, &Given::default(), &path.display().to_string()));
            count += 1;
        }
    }
    assert!(count >= 12 && opened >= 6, "{opened} of {count}");
    let image = write(dir.path(), "image.qcow2", &Crafted::new().bytes);
    assert!(bounded(&image, &Given::default(), "crafted"));
    for sample in samples() {
        let image = write(dir.path(), sample.name, &sample.built.bytes);
        let base = sample.base.map(|bytes| write(dir.path(), "base.raw", &bytes));
        let data = &sample.built.data;
        let data = (!data.is_empty()).then(|| write(dir.path(), "data.raw", data));
        let given = Given {
            snapshot: sample.snapshot,
            base: base.as_deref(),
            data: data.as_deref(),
            ..Given::default()
        };
        assert!(bounded(&image, &given, sample.name), "{}", sample.name);
    }
}

/// A sparse file that begins with `built`.
fn sparse(dir: &Path, built: &Built, len_bytes: u64) -> (PathBuf, File) {
    let path = write(dir, "image.qcow2", &built.bytes);
    let file = File::options().write(true).open(&path).unwrap();
    file.set_len(len_bytes).unwrap();
    (path, file)
}

fn put64(file: &File, at: u64, value: u64) {
    file.write_all_at(&value.to_be_bytes(), at).unwrap();
}

fn put32(file: &File, at: u64, value: u32) {
    file.write_all_at(&value.to_be_bytes(), at).unwrap();
}

/// An L1 table of 32 MiB in which each entry names an L2 table of its own, the last one first.
fn largest_l1(dir: &Path, tables_at: u64) -> PathBuf {
    let (cluster, entries, l1_at) = (512_u64, 4 << 20, 1 << 20);
    let built = Plan::new(9, 512).build();
    let (path, file) = sparse(dir, &built, tables_at + entries * cluster);
    put64(&file, 24, entries * (cluster / 8) * cluster);
    put64(&file, 40, l1_at);
    put32(&file, 36, u32::try_from(entries).unwrap());
    let places = (0..entries).rev().map(|index| 1 << 63 | (tables_at + index * cluster));
    let l1: Vec<u8> = places.flat_map(u64::to_be_bytes).collect();
    file.write_all_at(&l1, l1_at).unwrap();
    path
}

#[test]
fn the_largest_l1_table_of_distinct_l2_tables_opens_within_bounds() {
    let _turn = turn();
    let dir = TempDir::new().unwrap();
    let path = largest_l1(dir.path(), 64 << 20);
    assert!(bounded(&path, &Given { header_only: true, ..Given::default() }, "32 MiB of L1"));
    // So far back that cluster numbers are wide. A view would have a bit for each page of the file,
    // of which none is touched; this allocator could not tell.
    let path = largest_l1(dir.path(), 3 << 40);
    header_bounded(&path, "32 MiB of L1, far back");
}

#[test]
fn the_largest_disks_open_within_bounds() {
    let _turn = turn();
    let dir = TempDir::new().unwrap();
    for (bits, extended, opens) in [
        (9, false, false),
        (14, true, true),
        (16, false, true),
        (21, true, true),
        (21, false, true),
    ] {
        let size = 16_u64 << 40;
        let cluster = 1_u64 << bits;
        let plan = Plan { extended, size_bytes: 512, ..Plan::new(bits, 512) };
        let span = cluster * cluster / if extended { 16 } else { 8 };
        let entries = size / span;
        let (path, file) = sparse(dir.path(), &plan.build(), (1 << 26) + 8 * entries);
        put64(&file, 24, size);
        put32(&file, 36, u32::try_from(entries).unwrap());
        put64(&file, 40, 1 << 26);
        let what = format!("16 TiB in clusters of 2^{bits}, subclusters {extended}");
        assert_eq!(bounded(&path, &Given::default(), &what), opens, "{what}");
    }
}

#[test]
fn the_largest_snapshot_tables_open_within_bounds() {
    let _turn = turn();
    let dir = TempDir::new().unwrap();
    let snap = Snap { id: "1", name: "one", extra_bytes: 24, disk: vec![(0, Piece::Data(1))] };
    let plan =
        Plan { snapshots: vec![snap], disk: vec![(1, Piece::Data(2))], ..Plan::new(9, 4096) };
    let built = plan.build();
    let table_at = 1 << 20;
    for (count, extra, id, name, opens) in [
        (65_536, 16_u32, 1_u64, 3_u64, true),
        (65_536, 0, 0, 0, true),
        (65_536, 1024, 0, 0, false),
        (1000, 1024, 255, 60_000, true),
        (1100, 1024, 60_000, 60_000, false),
        (65_537, 0, 0, 0, false),
    ] {
        let (path, file) = sparse(dir.path(), &built, 256 << 20);
        put32(&file, 60, count);
        put64(&file, 64, table_at);
        let mut at = table_at;
        for _ in 0..count.min(70_000) {
            let mut head = [0; 40];
            head[12..16].copy_from_slice(&u32::try_from(id << 16 | name).unwrap().to_be_bytes());
            head[36..40].copy_from_slice(&extra.to_be_bytes());
            file.write_all_at(&head, at).unwrap();
            // A name that is no text grows when it is made text.
            file.write_all_at(
                &[0xff; 300][..usize::try_from(name.min(300)).unwrap()],
                at + 40 + u64::from(extra) + id,
            )
            .unwrap();
            at += (40 + u64::from(extra) + id + name).next_multiple_of(8);
        }
        let what = format!("{count} snapshots of {extra}, {id}, {name}");
        assert_eq!(bounded(&path, &Given::default(), &what), opens, "{what}");
        let last = Given { snapshot: Some("none of these"), ..Given::default() };
        assert!(!bounded(&path, &last, &what));
    }
}

/// Bitmaps that differ in nothing but their names, and perhaps in where their tables are.
struct Bitmaps {
    count: u32,
    name_bytes: u16,
    flags: u32,
    /// Of each table.
    entries: u32,
}

impl Bitmaps {
    /// Writes their directory at `at`, and the extension that tells of it.
    fn put(&self, file: &File, extension_at: u64, at: u64, table_at: impl Fn(u32) -> u64) {
        let mut directory = Vec::new();
        let entry_bytes = (24 + usize::from(self.name_bytes)).next_multiple_of(8);
        for number in 0..self.count {
            let start = directory.len();
            directory.extend(table_at(number).to_be_bytes());
            directory.extend([self.entries.to_be_bytes(), self.flags.to_be_bytes()].concat());
            directory.extend([1, 31]);
            directory.extend(self.name_bytes.to_be_bytes());
            directory.extend([0; 4]);
            directory.extend(format!("{number:08}").bytes());
            directory.resize(start + entry_bytes, b'x');
        }
        file.write_all_at(&directory, at).unwrap();
        put32(file, extension_at + 8, self.count);
        put64(file, extension_at + 16, directory.len() as u64);
        put64(file, extension_at + 24, at);
    }
}

#[test]
fn the_largest_bitmap_directories_open_within_bounds() {
    let _turn = turn();
    let dir = TempDir::new().unwrap();
    let mark = Mark { name: "b", flags: 2, granularity_bits: 31 };
    let plan = Plan { bitmaps: vec![mark], features: [0, 0, 1], ..Plan::new(9, 4096) };
    let built = plan.build();
    let chart = Chart::of(&built.bytes);
    let extension_at = chart.extensions[0];
    let directory_at = 1 << 20;
    // A table of as many entries as qemu takes, and one of one.
    let (large, small) = (1 << 20, 1);
    for (count, name_bytes, flags, entries, opens) in [
        (65_535, 1000_u16, 2_u32, small, true),
        (65_535, 8, 0, small, true),
        (65_535, 1000, 1, large, true),
        (65_535, 1023, 2, small, false),
        (65_536, 8, 2, small, false),
        (65_535, 8, 2, large, false),
    ] {
        let (path, file) = sparse(dir.path(), &built, 256 << 20);
        let bitmaps = Bitmaps { count, name_bytes, flags, entries };
        bitmaps.put(&file, extension_at, directory_at, |_| 128 << 20);
        let what = format!("{count} bitmaps of {name_bytes}, {flags}, {entries}");
        assert_eq!(bounded(&path, &Given::default(), &what), opens, "{what}");
    }
}

#[test]
fn a_header_full_of_extensions_opens_within_bounds() {
    let _turn = turn();
    let dir = TempDir::new().unwrap();
    let empty = |magic: u32| (magic, Vec::new());
    let extensions = (1..=(2 << 20) / 8 - 15).map(empty).collect();
    let plan = Plan { extensions, ..Plan::new(21, 2 << 20) };
    let image = write(dir.path(), "image.qcow2", &plan.build().bytes);
    assert!(bounded(&image, &Given::default(), "2 MiB of extensions"));
}

/// Most that a file of a fuzzer's has, and that opening one may cost beside its memory.
const LARGEST_FILE: u64 = 64 << 20;
const MOST_ALLOCATIONS: usize = 2000;
const MOST_READS: u64 = 2000;

/// Builds a file of at most 64 MiB, and its name.
type Build = fn(&Path) -> (PathBuf, File);

/// An L1 table of 32 MiB: `tables` of its entries name an L2 table of their own, the last one first,
/// each with entries like `entry`.
fn full_of_tables(dir: &Path, l1_entries: u64, tables: u64, entry: u64) -> (PathBuf, File) {
    let (cluster, l1_at) = (512_u64, 1 << 20);
    let tables_at = (l1_at + 8 * l1_entries).next_multiple_of(cluster);
    let (path, file) = sparse(dir, &Plan::new(9, 512).build(), LARGEST_FILE);
    assert!(tables_at + tables * cluster <= LARGEST_FILE);
    put64(&file, 24, l1_entries * (cluster / 8) * cluster);
    put64(&file, 40, l1_at);
    put32(&file, 36, u32::try_from(l1_entries).unwrap());
    let places = (0..tables).rev().map(|index| 1 << 63 | (tables_at + index * cluster));
    let l1: Vec<u8> = places.flat_map(u64::to_be_bytes).collect();
    file.write_all_at(&l1, l1_at).unwrap();
    if entry != 0 {
        let table = entry.to_be_bytes().repeat(usize::try_from(tables * cluster / 8).unwrap());
        file.write_all_at(&table, tables_at).unwrap();
    }
    (path, file)
}

/// Snapshots whose table fills the file.
fn full_of_snapshots(dir: &Path, id: u16, name: u16, count: u32) -> (PathBuf, File) {
    let snap = Snap { id: "1", name: "one", extra_bytes: 24, disk: vec![(0, Piece::Data(1))] };
    let plan = Plan { snapshots: vec![snap], ..Plan::new(9, 4096) };
    let (path, file) = sparse(dir, &plan.build(), LARGEST_FILE);
    let table_at = 1 << 20;
    let mut table = Vec::new();
    for _ in 0..count {
        let mut head = [0; 40];
        head[12..14].copy_from_slice(&id.to_be_bytes());
        head[14..16].copy_from_slice(&name.to_be_bytes());
        head[36..40].copy_from_slice(&16_u32.to_be_bytes());
        table.extend(head);
        table.extend([0; 8]);
        table.extend(4096_u64.to_be_bytes());
        table.resize(table.len() + usize::from(id) + usize::from(name), 0xff);
        table.resize(table.len().next_multiple_of(8), 0);
    }
    put32(&file, 60, count);
    put64(&file, 64, table_at);
    file.write_all_at(&table, table_at).unwrap();
    assert!(table_at + table.len() as u64 <= LARGEST_FILE);
    (path, file)
}

/// 65535 bitmaps whose names have so many bytes, each with a table of its own, or all with one;
/// `entries` of each table.
fn full_of_bitmaps(
    dir: &Path,
    name_bytes: u16,
    flags: u32,
    own: bool,
    entries: u32,
) -> (PathBuf, File) {
    let mark = Mark { name: "b", flags: 2, granularity_bits: 31 };
    let plan = Plan { bitmaps: vec![mark], features: [0, 0, 1], ..Plan::new(9, 4096) };
    let built = plan.build();
    let extension_at = Chart::of(&built.bytes).extensions[0];
    let (path, file) = sparse(dir, &built, LARGEST_FILE);
    let (count, directory_at) = (65_535_u32, 1 << 19);
    let entry_bytes = (24 + u64::from(name_bytes)).next_multiple_of(8);
    let tables_at = directory_at + (entry_bytes * u64::from(count)).next_multiple_of(512);
    let bitmaps = Bitmaps { count, name_bytes, flags, entries };
    // The last one first: no table is behind the one before.
    let table = |number| if own { count - 1 - number } else { 0 };
    bitmaps.put(&file, extension_at, directory_at, |n| tables_at + 512 * u64::from(table(n)));
    let end = tables_at + if own { 512 * u64::from(count) } else { 8 * u64::from(entries) };
    assert!(end <= LARGEST_FILE, "{end}");
    (path, file)
}

/// A refcount table of 8 MiB, each entry of which names a place.
fn full_of_refcounts(dir: &Path) -> (PathBuf, File) {
    let (path, file) = full_of_tables(dir, 64, 0, 0);
    let (entries, table_at) = (1_u64 << 20, 8 << 20);
    let blocks = (0..entries).map(|index| (16 << 20) + index * 7919 % (48 << 11) * 512);
    let table: Vec<u8> = blocks.flat_map(u64::to_be_bytes).collect();
    file.write_all_at(&table, table_at).unwrap();
    put64(&file, 48, table_at);
    put32(&file, 56, u32::try_from(8 * entries / 512).unwrap());
    (path, file)
}

fn extensions(dir: &Path) -> (PathBuf, File) {
    let empty = |magic: u32| (magic, Vec::new());
    let extensions = (1..=(2 << 20) / 8 - 15).map(empty).collect();
    let plan = Plan { extensions, ..Plan::new(21, 2 << 20) };
    sparse(dir, &plan.build(), LARGEST_FILE)
}

#[test]
fn the_costliest_files_of_64_mib_are_opened_at_little_cost() {
    let _turn = turn();
    let kept = std::env::var_os("BEDPLATE_KEEP").map(PathBuf::from);
    let files: [(&str, Build); 12] = [
        ("l1-empty", |dir| full_of_tables(dir, 4 << 20, 0, 0)),
        ("l1-of-tables", |dir| full_of_tables(dir, 4 << 20, 63_000, 0)),
        ("tables", |dir| full_of_tables(dir, 126_000, 126_000, 0)),
        ("tables-of-streams", |dir| full_of_tables(dir, 126_000, 126_000, 1 << 62 | 1024)),
        ("snapshots", |dir| full_of_snapshots(dir, 456, 456, 65_536)),
        ("snapshots-named", |dir| full_of_snapshots(dir, 60_000, 60_000, 540)),
        ("snapshots-short", |dir| full_of_snapshots(dir, 1, 1, 65_536)),
        ("bitmaps-named", |dir| full_of_bitmaps(dir, 980, 2, false, 1)),
        ("bitmaps-of-tables", |dir| full_of_bitmaps(dir, 448, 2, true, 1)),
        ("bitmaps-in-use", |dir| full_of_bitmaps(dir, 900, 1, false, 32)),
        ("refcounts", full_of_refcounts),
        ("extensions", extensions),
    ];
    for (name, build) in files {
        let dir = TempDir::new().unwrap();
        let (path, file) = build(dir.path());
        let len = file.metadata().unwrap().len();
        assert!(len <= LARGEST_FILE, "{name}: {len} bytes");
        if let Some(kept) = &kept {
            std::fs::copy(&path, kept.join(name).with_extension("qcow2")).unwrap();
        }
        assert!(bounded(&path, &Given::default(), name), "{name} is refused");
        let sealed = Sealed::open_path(&path).unwrap();
        let cache = Some(DecodedCache::new(1 << 20));
        let opening = Opening { declared: Some(Format::Qcow2), cache, ..Opening::default() };
        let (cost, view) = cost(|| View::open_as(sealed, opening));
        println!("{name}: {cost:?}");
        view.unwrap();
        assert!(cost.allocations <= MOST_ALLOCATIONS, "{name}: {cost:?}");
        assert!(cost.reads <= MOST_READS, "{name}: {cost:?}");
        assert!(cost.read_bytes <= LARGEST_FILE + MORE_READ_BYTES, "{name}: {cost:?}");
    }
}

#[test]
fn a_read_of_what_is_in_memory_allocates_nothing_and_asks_the_kernel_for_nothing() {
    if !have_qemu() {
        return;
    }
    let _turn = turn();
    let dir = TempDir::new().unwrap();
    let raw = dir.path().join("disk.raw");
    let mut random = Random(4);
    let bytes: Vec<u8> = (0..4 * MIB).map(|_| random.next().to_le_bytes()[0] & 15).collect();
    std::fs::write(&raw, &bytes).unwrap();
    for options in [&["-o", "cluster_size=64k"][..], &["-c"]] {
        let image = dir.path().join("disk.qcow2");
        let (from, to) = (raw.to_str().unwrap(), image.to_str().unwrap());
        let convert = ["convert", "-q", "-f", "raw", "-O", "qcow2"];
        run("qemu-img", &[&convert[..], options, &[from, to]].concat());
        let cache = DecodedCache::new(64 << 20);
        let view = View::open_with_cache(Sealed::open_path(&image).unwrap(), None, cache).unwrap();
        let mut buf = [0; 4096];
        let mut all = || {
            for (at, want) in (0..).step_by(4096).zip(bytes.chunks(4096)) {
                view.read_at(&mut buf, GuestOffset(at)).unwrap();
                assert!(buf == want, "byte {at}");
            }
        };
        all();
        let (looking, ()) = cost(|| ());
        // Another thread of this process may allocate something meanwhile; not each time.
        let least =
            (0..5).map(|_| cost(&mut all).0).min_by_key(|cost| (cost.allocations, cost.reads));
        let least = least.unwrap();
        assert_eq!(least.allocations, looking.allocations, "{options:?}");
        if cfg!(target_arch = "x86_64") {
            assert_eq!(least.reads, looking.reads, "{options:?}");
        }
    }
}
