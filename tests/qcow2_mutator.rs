//! Every field of every kind of image, set to its edges: the reader names the field and its place,
//! or gives qemu's bytes; and an inspection says beforehand which of the two.
//!
//! `QCOW2_SEED` and `QCOW2_RUNS` choose other values and more of them, `QCOW2_SAMPLE` one kind.
#![expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod qcow2_common;

use std::collections::BTreeMap;
use std::fs::File;
use std::path::PathBuf;
use std::process::{Command, Output};
use std::sync::Mutex;

use bedplate::disk::Sealed;
use bedplate::image::qcow2::Terms;
use bedplate::image::{
    DecodedCache, Format, ImageError, Inspection, Opening, ReadError, Verdict, View, inspect,
};
use bedplate::units::GuestOffset;
use qcow2_common::craft_big::{Field, Part};
use qcow2_common::mutate::{
    Chart, Sample, edges, explains, get, is_liberty, put, samples, some, special,
};
use qcow2_common::uses::{misjudged, uses};
use qcow2_common::{Random, have_qemu, write};
use tempfile::TempDir;

/// Disks that are longer are opened and inspected, and not read.
const READ_BYTES: u64 = 32 << 20;

/// What a reader is given beside a damaged image: what the image, as it is now, asks for.
#[derive(Clone, Copy)]
struct Beside {
    base: bool,
    data: bool,
}

impl Beside {
    fn of(sample: &Sample, bytes: &[u8]) -> Self {
        let version_3 = get(bytes, 4, 4) >= 3;
        Self {
            base: sample.base.is_some() && get(bytes, 8, 8) != 0 && get(bytes, 16, 4) != 0,
            data: !sample.built.data.is_empty() && version_3 && get(bytes, 72, 8) & 4 != 0,
        }
    }
}

/// A field that was named as being at fault.
#[derive(Clone, Debug)]
struct Named {
    field: &'static str,
    at: u64,
    need: &'static str,
    text: String,
}

/// What the reader made of an image.
struct Reading {
    /// Why it was not opened.
    refused: Option<ImageError>,
    /// Length of the disk, and what every cluster of it is; no clusters if it is too long.
    size_bytes: u64,
    clusters: Vec<Result<Vec<u8>, ReadError>>,
    inspection: Inspection,
    whole: bool,
}

impl Reading {
    fn named(&self) -> Vec<Named> {
        let mut all = Vec::new();
        let text = |error: &dyn std::fmt::Display| error.to_string();
        if let Some(
            error @ (ImageError::Malformed { field, at, need, .. }
            | ImageError::Unsupported { field, at, need, .. }),
        ) = &self.refused
        {
            assert_eq!(error.place(), Some((*field, *at)));
            all.push(Named { field, at: at.0, need, text: text(error) });
        }
        for cluster in &self.clusters {
            if let Err(error @ ReadError::Malformed { field, at, need, .. }) = cluster {
                all.push(Named { field, at: at.0, need, text: text(error) });
            }
        }
        all
    }

    /// All bytes, if every one could be read.
    fn bytes(&self) -> Option<Vec<u8>> {
        let all: Option<Vec<_>> = self.clusters.iter().map(|part| part.as_deref().ok()).collect();
        all.filter(|all| !all.is_empty()).map(|all| all.concat())
    }
}

/// A directory with the files of one sample.
struct Bench<'a> {
    dir: TempDir,
    sample: &'a Sample,
    image: PathBuf,
    counts: BTreeMap<&'static str, u64>,
    /// How often qemu was asked about refusals of one kind.
    asked: BTreeMap<(Part, &'static str, &'static str), u64>,
}

impl<'a> Bench<'a> {
    fn new(sample: &'a Sample) -> Self {
        let dir = TempDir::new().unwrap();
        write(dir.path(), "base.raw", sample.base.as_deref().unwrap_or_default());
        write(dir.path(), "data.raw", &sample.built.data);
        let image = write(dir.path(), "image.qcow2", &sample.built.bytes);
        Self { dir, sample, image, counts: BTreeMap::new(), asked: BTreeMap::new() }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn count(&mut self, what: &'static str) {
        *self.counts.entry(what).or_default() += 1;
    }

    fn read(&self, bytes: &[u8]) -> Reading {
        let beside = Beside::of(self.sample, bytes);
        write(self.dir.path(), "image.qcow2", bytes);
        File::options().write(true).open(&self.image).unwrap().set_len(bytes.len() as u64).unwrap();
        let cache = || Some(DecodedCache::new(1 << 20));
        let sealed = |name: &str| Sealed::open_path(&self.path(name)).unwrap();
        let raw = Opening { declared: Some(Format::Raw), cache: cache(), ..Opening::default() };
        let base = beside.base.then(|| View::open_as(sealed("base.raw"), raw).unwrap());
        let data = beside.data.then(|| sealed("data.raw"));
        let terms = Terms {
            snapshot: self.sample.snapshot,
            backing: beside.base,
            data_len_bytes: data.as_ref().map(Sealed::len_bytes),
        };
        let (file, declared) = (File::open(&self.image).unwrap(), Some(Format::Qcow2));
        let inspection = Inspection::of_file(&file, &self.image, declared, &terms).unwrap();
        let whole = inspect(&file, &self.image, declared, &terms).is_ok();
        let opening = Opening {
            declared,
            snapshot: terms.snapshot,
            base: base.as_ref(),
            data,
            cache: cache(),
        };
        let none = Reading { refused: None, size_bytes: 0, clusters: vec![], inspection, whole };
        let view = match View::open_as(sealed("image.qcow2"), opening) {
            Ok(view) => view,
            Err(error) => return Reading { refused: Some(error), ..none },
        };
        let size_bytes = view.size_bytes();
        if size_bytes > READ_BYTES {
            return Reading { size_bytes, ..none };
        }
        let step = usize::try_from(view.info().cluster_size_bytes.unwrap()).unwrap();
        let parts = (0..size_bytes).step_by(step).map(|at| {
            let len = usize::try_from((size_bytes - at).min(step as u64)).unwrap();
            let mut bytes = vec![0xee; len];
            view.read_at(&mut bytes, GuestOffset(at)).map(|()| bytes)
        });
        Reading { size_bytes, clusters: parts.collect(), ..none }
    }

    fn qemu(&self, args: &[&str]) -> Output {
        Command::new("qemu-img").args(args).current_dir(&self.dir).output().unwrap()
    }

    /// The disk as qemu reads it, with the same files beside it.
    fn qemu_bytes(&self, beside: Beside) -> Option<Vec<u8>> {
        let mut options = "driver=qcow2,file.driver=file,file.filename=image.qcow2".to_owned();
        if beside.base {
            options +=
                ",backing.driver=raw,backing.file.driver=file,backing.file.filename=base.raw";
        }
        if beside.data {
            options += ",data-file.driver=file,data-file.filename=data.raw";
        }
        let mut args = vec!["convert", "-q", "-O", "raw", "--image-opts"];
        if let Some(snapshot) = self.sample.snapshot {
            args.extend(["-l", snapshot]);
        }
        args.extend([options.as_str(), "disk.raw"]);
        let output = self.qemu(&args);
        let disk = self.path("disk.raw");
        let bytes = output.status.success().then(|| std::fs::read(&disk).unwrap());
        let _may_not_exist = std::fs::remove_file(&disk);
        bytes
    }

    /// What `qemu-img check` finds wrong that a reader would see.
    fn check(&self, bytes: &[u8], fields: &[Field]) -> Vec<String> {
        if self.sample.snapshot.is_some() {
            // It looks at all tables, and the ones that were damaged may be those of the disk.
            return Vec::new();
        }
        let output = self.qemu(&["check", "--output=json", "-f", "qcow2", "image.qcow2"]);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        let errors = said.lines().filter(|line| line.starts_with("ERROR"));
        let beyond = fields.iter().any(|field| is_beyond(bytes, field));
        let counted = |line: &&str| {
            let snapshot = line.starts_with("ERROR snapshot") && line.contains("corrupted");
            !is_of_writers(line, bytes) && (!beyond || snapshot)
        };
        errors.filter(counted).map(str::to_owned).collect()
    }

    /// Holds the reader to its promises about one damaged image. `fields` were damaged. With `ask`,
    /// or if one of them decides how all is read, the bytes are held against qemu's.
    fn judge(&mut self, bytes: &[u8], fields: &[Field], what: &str, ask: bool) {
        let reading = self.read(bytes);
        let named = reading.named();
        self.places_are_right(bytes, fields, &reading, &named, what);
        verdict_is_right(&reading, &named, what);
        self.shared_clusters_are_said(bytes, &reading.inspection, what);
        self.count("images");
        let decisive = self.sample.snapshot.is_none() && fields.iter().any(decides);
        if !(ask || decisive && reading.bytes().is_some()) {
            return;
        }
        self.count("asked about");
        let beside = Beside::of(self.sample, bytes);
        if let Some(got) = reading.bytes() {
            self.count("read");
            let want = self.qemu_bytes(beside);
            let want = want.unwrap_or_else(|| panic!("{what}: qemu refuses it, and we read it"));
            self.same(bytes, &got, &want, what);
            if reading.inspection.verdict == Verdict::Ok {
                let wrong = self.check(bytes, fields);
                assert!(wrong.is_empty(), "{what}: inspected as ok, but qemu-img check: {wrong:?}");
            }
            return;
        }
        self.count(if reading.refused.is_some() { "not opened" } else { "read in part" });
        // qemu is asked about the first refusals of each kind, and each partly readable image of
        // which something can be compared.
        let part = fields.first().map_or(Part::Header, |field| field.part);
        let kind = named.first().map_or(("", ""), |named| (named.field, named.need));
        let asked = self.asked.entry((part, kind.0, kind.1)).or_default();
        *asked += 1;
        if *asked > 3 {
            return;
        }
        let Some(want) = self.qemu_bytes(beside) else { return };
        self.count("read by qemu alone");
        for Named { field, at, need, text } in &named {
            assert!(is_liberty(need, field, *at), "{what}: qemu reads it, and we do not: {text}");
        }
        let mut at = 0;
        for part in &reading.clusters {
            let len = want.len().saturating_sub(at).min(self.cluster_of(bytes));
            if let Ok(got) = part {
                let want = want.get(at..at + len).unwrap_or_default();
                assert!(got.starts_with(want), "{what}: byte {at:#x} on, read in part");
            }
            at += self.cluster_of(bytes);
        }
    }

    /// Each cluster that is used twice, of which one use is for writers, is said; and no other.
    fn shared_clusters_are_said(&self, bytes: &[u8], found: &Inspection, what: &str) {
        let size = found.info.as_ref().map_or(u64::MAX, |info| info.virtual_size_bytes);
        if found.verdict == Verdict::Refused || size > READ_BYTES {
            return;
        }
        let findings = found.findings.iter();
        let said: Vec<_> =
            findings.filter_map(|f| Some((f.field?, f.at?, f.text.as_str()))).collect();
        let wrong = misjudged(&uses(bytes, self.sample.owner), &said);
        assert!(wrong.is_empty(), "{what}: {wrong:?}, of {found:?}");
    }

    fn cluster_of(&self, bytes: &[u8]) -> usize {
        1 << get(bytes, 20, 4).min(21)
    }

    /// The disk is qemu's. A snapshot of another length than the disk has now is compared as far
    /// as qemu shows it, which leaves the length as it is.
    fn same(&self, bytes: &[u8], got: &[u8], want: &[u8], what: &str) {
        let shown =
            if self.sample.snapshot.is_some() { got.len().min(want.len()) } else { want.len() };
        let length = match self.sample.owner {
            0 => want.len() as u64,
            owner => Chart::of(bytes).disk_size(bytes, owner),
        };
        assert_eq!(got.len() as u64, length, "{what}: length");

        let at = got.iter().zip(want).take(shown).position(|(a, b)| a != b);
        assert!(at.is_none(), "{what}: other byte than qemu at {:#x}", at.unwrap_or(0));
    }

    /// Every refusal names a field that is there, and that follows from what was damaged.
    fn places_are_right(
        &self,
        bytes: &[u8],
        fields: &[Field],
        reading: &Reading,
        named: &[Named],
        what: &str,
    ) {
        let chart = Chart::of(bytes);
        for Named { field, at, text, .. } in named {
            assert!(text.contains(&format!("{field} at byte {at:#x} is ")), "{what}: {text}");
            assert!(chart.has(field, *at), "{what}: no such field there: {text}");
            let explained = fields.iter().any(|damaged| explains(damaged, field, *at));
            assert!(explained, "{what}: has nothing to do with it: {text}");
        }
        match &reading.refused {
            None | Some(ImageError::Malformed { .. } | ImageError::Unsupported { .. }) => {}
            Some(ImageError::FormatMismatch { .. }) => assert!(get(bytes, 0, 4) != 0x5146_49fb),
            // Its ID or name is no longer what it was.
            Some(ImageError::NoSnapshot { .. }) => assert!(
                fields.iter().any(|f| f.part == Part::Snapshot || f.name.contains("snapshots")),
                "{what}"
            ),
            Some(ImageError::BaseFormat { .. }) => {
                let of_extensions = |f: &Field| {
                    let header = ["version", "header_length", "backing_file_offset"];
                    f.name.starts_with("extension ") || header.contains(&f.name)
                };
                assert!(fields.iter().any(of_extensions), "{what}");
            }
            Some(
                error @ (ImageError::NotNeeded { .. }
                | ImageError::TooManyLayers { .. }
                | ImageError::Empty { .. }
                | ImageError::Read { .. }
                | ImageError::Map { .. }),
            ) => panic!("{what}: {error}"),
        }
        for error in reading.clusters.iter().filter_map(|part| part.as_ref().err()) {
            let of_the_bytes =
                matches!(error, ReadError::Malformed { .. } | ReadError::Decode { .. });
            assert!(of_the_bytes, "{what}: {error}");
        }
    }
}

/// Whether a field decides how others are read: where it is taken, qemu must take it too.
fn decides(field: &Field) -> bool {
    let names = [
        "version",
        "cluster_bits",
        "size",
        "l1_size",
        "nb_snapshots",
        "incompatible_features",
        "refcount_order",
        "header_length",
        "compression_type",
        "backing_file_offset",
        "extra_data_size",
    ];
    names.contains(&field.name) || matches!(field.part, Part::ExtensionLength | Part::Directory)
}

/// Lines of `qemu-img check` about what only a writer looks at: how often a cluster is used, the
/// copied flag, which says the same, and the table of these counts.
fn is_of_writers(line: &str, bytes: &[u8]) -> bool {
    let table =
        format!("the end of the file by one cluster or more: offset {:#x} ", get(bytes, 48, 8));
    let words = ["refcount", "Refcount", "OFLAG_COPIED", "overflow cluster offset", &table];
    words.iter().any(|word| line.contains(word))
}

/// Whether `qemu-img check` goes on from this field to tables that the reader of the disk does not
/// look at: those of snapshots, and L1 entries behind the disk's end.
fn is_beyond(bytes: &[u8], field: &Field) -> bool {
    let counts = ["nb_snapshots", "snapshots_offset", "l1_size", "size"];
    let of_snapshot = field.owner > 0 || field.part == Part::Snapshot;
    let entry_bytes = if get(bytes, 72, 8) & 16 != 0 && get(bytes, 4, 4) > 2 { 16 } else { 8 };
    let cluster = 1_u64 << get(bytes, 20, 4).min(21);
    let needed = get(bytes, 24, 8).div_ceil(cluster * cluster / entry_bytes);
    let spare = field.part == Part::L1 && field.at as u64 >= get(bytes, 40, 8) + 8 * needed;
    of_snapshot || spare || counts.contains(&field.name)
}

/// Refused if and only if opening or a read fails. A stream is decoded by no inspection, so a
/// damaged one is found by reading alone.
fn verdict_is_right(reading: &Reading, named: &[Named], what: &str) {
    let Reading { refused, inspection, whole, size_bytes, .. } = reading;
    let is_refused = inspection.verdict == Verdict::Refused;
    assert!(inspection.verdict != Verdict::Ok || inspection.findings.is_empty(), "{what}");
    match refused {
        // Of what was given, not of the image.
        Some(ImageError::BaseFormat { .. }) => return,
        Some(error) => assert!(is_refused, "{what}: inspected as sound, but {error}"),
        None if *size_bytes > READ_BYTES => return,
        None => assert_eq!(is_refused, !named.is_empty(), "{what}: {inspection:?}, {named:?}"),
    }
    for finding in inspection.findings.iter().filter(|_| is_refused && refused.is_none()) {
        let known = |n: &Named| Some(n.field) == finding.field && Some(n.at) == finding.at;
        let is_note = finding.verdict == Verdict::Repairable;
        assert!(is_note || named.iter().any(known), "{what}: not found by reading: {finding:?}");
    }
    assert!(!whole || !is_refused, "{what}: a copy of it would be sealed: {inspection:?}");
}

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

fn damaged(sample: &Sample, changes: &[(Field, u64)]) -> (Vec<u8>, String) {
    let mut bytes = sample.built.bytes.clone();
    let mut what = sample.name.to_owned();
    for (field, value) in changes {
        put(&mut bytes, field, *value);
        what += &format!(", {} at {:#x} = {value:#x}", field.name, field.at);
    }
    (bytes, what)
}

/// A damaged image: what is set to what, and whether qemu is asked about it.
type Damage = (Vec<(Field, u64)>, bool);

/// Judges all damaged images of one sample: what came of it, and how many were misjudged.
fn damage_one(
    sample: &Sample,
    damages: impl Fn(&Sample, &mut Random) -> Vec<Damage>,
) -> (BTreeMap<&'static str, u64>, u64) {
    let (mut random, mut faults) = (Random(number("QCOW2_SEED", 0)), 0);
    let mut bench = Bench::new(sample);
    for (changes, ask) in damages(sample, &mut random) {
        let (bytes, what) = damaged(sample, &changes);
        let fields: Vec<Field> = changes.iter().map(|(field, _)| *field).collect();
        // One that fails must not hide the others.
        let judged = std::panic::AssertUnwindSafe(|| bench.judge(&bytes, &fields, &what, ask));
        faults += u64::from(std::panic::catch_unwind(judged).is_err());
    }
    (bench.counts, faults)
}

/// Judges all damaged images of each sample, and prints what came of it.
fn damage_all(damages: impl Fn(&Sample, &mut Random) -> Vec<Damage> + Sync) {
    if !have_qemu() {
        return;
    }
    // One kind alone, to look into it.
    let only = std::env::var("QCOW2_SAMPLE").ok();
    let samples = samples();
    let wanted = |sample: &&Sample| only.as_deref().is_none_or(|name| name == sample.name);
    let queue = Mutex::new(samples.iter().filter(wanted));
    let total = Mutex::new((BTreeMap::<&str, u64>::new(), 0));
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(1, usize::from) {
            scope.spawn(|| {
                let next = || queue.lock().unwrap().next();
                while let Some(sample) = next() {
                    let (found, bad) = damage_one(sample, &damages);
                    let (counts, faults) = &mut *total.lock().unwrap();
                    found.into_iter().for_each(|(name, n)| *counts.entry(name).or_default() += n);
                    *faults += bad;
                }
            });
        }
    });
    let (counts, faults) = total.into_inner().unwrap();
    println!("{counts:?}");
    assert_eq!(faults, 0, "images misjudged, each said above");
    let of = |name| counts.get(name).copied().unwrap_or(0);
    assert!(of("read") > of("asked about") / 20, "too few images are read: {counts:?}");
}

#[test]
fn the_samples_are_sound_and_read_as_with_qemu() {
    if !have_qemu() {
        return;
    }
    for sample in &samples() {
        let mut bench = Bench::new(sample);
        let output = bench.qemu(&["check", "-f", "qcow2", "image.qcow2"]);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        let said = said + &String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success(), "{}: {said}", sample.name);
        bench.judge(&sample.built.bytes, &[], sample.name, true);
        assert_eq!(bench.counts.get("read"), Some(&1), "{}", sample.name);
    }
}

#[test]
fn one_field_at_an_edge_is_named_or_the_bytes_are_qemus() {
    // Every field to every edge; qemu is asked about so many of each field, and about what only
    // fields of a kind have, for two fields of that kind.
    let most = usize::try_from(number("QCOW2_RUNS", 50)).unwrap();
    damage_all(|sample, random| {
        let (fields, mut all) = (&sample.built.fields, Vec::new());
        for &field in fields {
            let values = edges(sample, &field);
            let asked = some(&values, most.div_ceil(fields.len()), random);
            all.extend(values.into_iter().map(|v| (vec![(field, v)], asked.contains(&v))));
        }
        for part in [
            Part::L1,
            Part::L2,
            Part::Bitmap,
            Part::ExtensionType,
            Part::Directory,
            Part::BitmapTable,
            Part::Refcount,
        ] {
            let of_part = |f: &&Field| f.part == part;
            let fields: Vec<Field> = fields.iter().filter(of_part).copied().collect();
            let count = fields.first().map_or(0, |field| special(sample, field).len());
            for index in 0..count {
                for field in some(&fields, 2, random) {
                    all.push((vec![(field, special(sample, &field)[index])], true));
                }
            }
        }
        all
    });
}

#[test]
fn two_fields_at_edges_are_named_or_the_bytes_are_qemus() {
    let most = number("QCOW2_RUNS", 50) / 2;
    damage_all(|sample, random| {
        let fields = &sample.built.fields;
        let one = |random: &mut Random| {
            let field = fields[random.index(fields.len())];
            let values = edges(sample, &field);
            (field, values[random.index(values.len())])
        };
        (0..most).map(|_| (vec![one(random), one(random)], true)).collect()
    });
}
