//! Images of any mix of features, chosen by a generator: every byte of the disk, and of each of its
//! snapshots, is qemu's; and what `qemu-img check` calls clean is inspected as sound.
//!
//! `BEDPLATE_MATRIX=5000` makes so many images (128 without it; 3200 take five minutes on two
//! cores), `BEDPLATE_MATRIX_FIRST=N` begins with number N: an image is replayed by its number, with
//! `BEDPLATE_MATRIX=1`.
#![expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod qcow2_common;

use std::collections::BTreeMap;
use std::fs::File;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use bedplate::disk::Sealed;
use bedplate::image::qcow2::Terms;
use bedplate::image::{Format, Inspection, Opening, Verdict, View};
use qcow2_common::choose::Choices;
use qcow2_common::make::{commands, qemu_io};
use qcow2_common::{Random, assert_same, have_qemu, raw_disk, run, write};
use tempfile::TempDir;

/// How many images had each kind of feature.
type Kinds = BTreeMap<String, u64>;

/// An image as it is made, and what it is made of.
struct Making<'a> {
    dir: &'a Path,
    random: Random,
    /// What it has.
    kinds: Vec<String>,
}

/// What a reader is given.
struct Made {
    image: PathBuf,
    base: Option<View>,
    data: Option<PathBuf>,
    /// ID or name, and the disk as qemu has it.
    snapshots: Vec<String>,
    /// Made by qemu and closed, so that `qemu-img check` is content.
    is_clean: bool,
}

impl Making<'_> {
    fn is(&mut self, kind: &str) {
        self.kinds.push(kind.to_owned());
    }

    /// True once in so many times.
    fn once_in(&mut self, times: u64) -> bool {
        self.random.below(times) == 0
    }

    fn one_of<T: Copy>(&mut self, all: &[T]) -> T {
        all[self.random.index(all.len())]
    }

    /// An image that nobody but our own writer would make.
    fn crafted(&mut self) -> Made {
        let bytes: Vec<u8> = (0..600).map(|_| self.random.next().to_le_bytes()[0]).collect();
        let plan = Choices(&bytes).plan();
        self.is("crafted");
        self.is(&format!("version {}", plan.version));
        self.is(&format!("cluster_bits {}", plan.cluster_bits));
        self.is(&format!("refcount_order {}", plan.refcount_order));
        for (kind, has) in [
            ("crafted, extended L2", plan.extended),
            ("crafted, zstd", plan.zstd),
            ("crafted, bitmaps", !plan.bitmaps.is_empty()),
            ("crafted, snapshots", !plan.snapshots.is_empty()),
            ("header extensions", !plan.extensions.is_empty()),
            ("unknown feature bits", plan.features[1] | plan.features[2] > 1),
            ("dirty bit", plan.features[0] & 1 != 0),
            ("corrupt bit", plan.features[0] & 2 != 0),
            ("size of no whole sectors", plan.size_bytes % 512 != 0),
        ] {
            if has {
                self.is(kind);
            }
        }
        let image = write(self.dir, "image.qcow2", &plan.build().bytes);
        // Those of two snapshots are the same: only the first one could be chosen by name.
        let snapshots = plan.snapshots.iter().map(|snap| snap.id.to_owned()).collect();
        Made { image, base: None, data: None, snapshots, is_clean: false }
    }

    /// Version, cluster size and what goes with them; its cluster size.
    fn options(&mut self, alone: bool) -> (Vec<String>, u64) {
        let cluster_bits = 9 + self.random.below(13);
        let cluster = 1_u64 << cluster_bits;
        let mut options = vec![format!("cluster_size={cluster}")];
        let version_2 = alone && self.once_in(5);
        self.is(&format!("version {}", if version_2 { 2 } else { 3 }));
        self.is(&format!("cluster_bits {cluster_bits}"));
        if version_2 {
            options.push("compat=0.10".to_owned());
            return (options, cluster);
        }
        options.push("compat=1.1".to_owned());
        if cluster_bits >= 14 && self.once_in(3) {
            options.push("extended_l2=on".to_owned());
            self.is("extended L2");
        }
        if self.once_in(4) {
            options.push("lazy_refcounts=on".to_owned());
            self.is("lazy refcounts");
        } else if self.once_in(2) {
            let order = self.one_of(&[0, 1, 2, 3, 5, 6]);
            options.push(format!("refcount_bits={}", 1 << order));
            self.is(&format!("refcount_order {order}"));
        }
        (options, cluster)
    }

    /// The images beneath: their view, the path of the one on top, and its format.
    fn beneath(&mut self, size: u64) -> (View, PathBuf, &'static str) {
        let (mut view, mut path, mut format);
        if self.once_in(2) {
            path = raw_disk(
                self.dir,
                (size + 1).saturating_sub(self.random.below(512)),
                &mut self.random,
            );
            view = View::open(Sealed::open_path(&path).unwrap(), Some(Format::Raw)).unwrap();
            format = "raw";
        } else {
            let options = self.one_of(&["compat=0.10", "compat=1.1", "extended_l2=on"]);
            path = self.dir.join("0.qcow2");
            let (to, size) = (path.to_str().unwrap(), size.to_string());
            run("qemu-img", &["create", "-q", "-f", "qcow2", "-o", options, to, &size]);
            self.fill(&path, size.parse().unwrap(), 65_536, true);
            view = open(&path, None, None, None);
            format = "qcow2";
        }
        self.is(&format!("base, {format}"));
        if self.once_in(2) {
            let size = self.near(size);
            let top = self.dir.join("1.qcow2");
            self.create(&top, &["cluster_size=4096".to_owned()], size, Some((&path, format)));
            self.fill(&top, size, 4096, true);
            view = open(&top, Some(&view), None, None);
            (path, format) = (top, "qcow2");
            self.is("chain of three");
        }
        (view, path, format)
    }

    /// A length around this one, in sectors.
    fn near(&mut self, size: u64) -> u64 {
        size / 512 * (2 + self.random.below(3)) / 3 * 512
    }

    fn create(&self, path: &Path, options: &[String], size: u64, base: Option<(&Path, &str)>) {
        let (to, size, options) = (path.to_str().unwrap(), size.to_string(), options.join(","));
        let mut args = vec!["create", "-q", "-f", "qcow2", "-o", &options];
        if let Some((base, format)) = base {
            args.extend(["-b", base.to_str().unwrap(), "-F", format]);
        }
        args.extend([to, &size]);
        run("qemu-img", &args);
    }

    /// Writes, zero writes, discards; compressed ones only where nothing was written.
    fn fill(&mut self, image: &Path, size: u64, cluster: u64, packed: bool) {
        qemu_io(image, &commands(&mut self.random, size, cluster, packed));
    }

    /// An image of qemu's own tools.
    fn made(&mut self) -> Made {
        let (has_base, has_data) = (self.once_in(3), self.once_in(8));
        let (mut options, cluster) = self.options(!has_data);
        let size = (cluster * 37).clamp(8192, 3 << 20) + 512 * self.random.below(64);
        let extended = options.iter().any(|option| option == "extended_l2=on");
        let version_2 = options.iter().any(|option| option == "compat=0.10");
        let data = has_data.then(|| self.dir.join("data.raw"));
        if let Some(data) = &data {
            options.push(format!("data_file={}", data.to_str().unwrap()));
            let raw = !has_base && self.once_in(2);
            options.extend(raw.then(|| "data_file_raw=on".to_owned()));
            self.is(if raw { "data file, raw" } else { "data file" });
        } else if !version_2 && self.once_in(3) {
            options.push("compression_type=zstd".to_owned());
            self.is("zstd");
        } else {
            self.is("zlib");
        }
        if !has_base && !has_data && self.once_in(4) {
            let how = self.one_of(&["metadata", "falloc", "full"]);
            options.push(format!("preallocation={how}"));
            self.is("preallocation");
        }
        let image = self.dir.join("image.qcow2");
        let mut base = None;
        if has_base {
            let beneath = self.near(size);
            self.is(if beneath < size { "shorter base" } else { "base as long or longer" });
            let (view, path, format) = self.beneath(beneath);
            self.create(&image, &options, size, Some((&path, format)));
            base = Some(view);
        } else {
            self.create(&image, &options, size, None);
        }
        let preallocated = options.iter().any(|option| option.starts_with("preallocation"));
        let packed = data.is_none() && !preallocated && self.once_in(2);
        self.kinds.extend(packed.then(|| "compressed clusters".to_owned()));
        self.fill(&image, size, cluster, packed);
        if extended {
            self.fill(&image, size, (cluster / 32).max(512), false);
        }
        // Twelve streams may share a cluster, and snapshots share them all: narrow counts overflow.
        let is_narrow = |option: &String| {
            ["refcount_bits=1", "refcount_bits=2", "refcount_bits=4"].contains(&option.as_str())
        };
        let narrow = options.iter().any(is_narrow);
        let snapshots = if data.is_none() && !narrow && self.once_in(3) {
            self.snapshots(&image, size, cluster)
        } else {
            Vec::new()
        };
        if !version_2 && self.once_in(4) {
            self.bitmaps(&image);
        }
        // In version 2 qemu cannot hide what a longer base has there.
        let may_grow = snapshots.is_empty() && data.is_none() && !(version_2 && has_base);
        if may_grow && self.once_in(4) {
            let more = (size + cluster * self.random.below(40)).to_string();
            run("qemu-img", &["resize", "-q", image.to_str().unwrap(), &more]);
            self.is("longer than it was made");
        }
        let lazy = options.iter().any(|option| option == "lazy_refcounts=on");
        let is_dirty = lazy && self.once_in(2) && self.die(&image, size);
        Made { image, base, data, snapshots, is_clean: !is_dirty }
    }

    /// Internal snapshots, some of which are gone again; those that are left.
    fn snapshots(&mut self, image: &Path, size: u64, cluster: u64) -> Vec<String> {
        let path = image.to_str().unwrap();
        self.is("snapshots");
        let mut names = vec!["one".to_owned(), "two".to_owned()];
        for name in &names {
            run("qemu-img", &["snapshot", "-c", name, path]);
            self.fill(image, size, cluster, false);
        }
        if self.once_in(3) {
            run("qemu-img", &["snapshot", "-d", "one", path]);
            names.remove(0);
            self.is("deleted snapshot");
        }
        if self.once_in(3) {
            run("qemu-img", &["snapshot", "-a", "two", path]);
            self.is("applied snapshot");
        }
        names
    }

    fn bitmaps(&mut self, image: &Path) {
        let path = image.to_str().unwrap();
        self.is("bitmaps");
        for name in ["b0", "b1"] {
            let granularity = (1_u64 << (9 + self.random.below(9))).to_string();
            run("qemu-img", &["bitmap", "--add", "-g", &granularity, path, name]);
        }
        if self.once_in(2) {
            run("qemu-img", &["bitmap", "--disable", path, "b1"]);
        }
        // Marks what it writes.
        qemu_io(image, &["write -P 9 0 512".to_owned()]);
    }

    /// A writer that dies leaves the dirty bit, where it puts refcounts off.
    fn die(&mut self, image: &Path, size: u64) -> bool {
        let at = self.random.below(size / 512) * 512;
        let write = format!("write -P 77 {at} 512");
        let mut command = Command::new("sh");
        let args = ["-f", "qcow2", "-c", &write, "-c", "flush", "-c", "abort"];
        command.args(["-c", "ulimit -c 0; exec qemu-io \"$@\"", "sh"]).args(args).arg(image);
        assert!(!command.output().unwrap().status.success(), "qemu-io aborts");
        let head = std::fs::read(image).unwrap();
        let is_dirty = head[79] & 1 != 0;
        self.kinds.extend(is_dirty.then(|| "dirty bit of a writer that died".to_owned()));
        is_dirty
    }
}

fn open(image: &Path, base: Option<&View>, data: Option<&Path>, snapshot: Option<&str>) -> View {
    let data = data.map(|data| Sealed::open_path(data).unwrap());
    let opening =
        Opening { declared: Some(Format::Qcow2), base, data, snapshot, ..Opening::default() };
    View::open_as(Sealed::open_path(image).unwrap(), opening).unwrap()
}

/// The disk as qemu reads it, which finds what is beneath by the names in the image.
fn qemu_disk(image: &Path, snapshot: Option<&str>) -> Vec<u8> {
    let raw = image.with_extension("converted");
    let mut args = vec!["convert", "-q", "-f", "qcow2", "-O", "raw"];
    if let Some(snapshot) = snapshot {
        args.extend(["-l", snapshot]);
    }
    args.extend([image.to_str().unwrap(), raw.to_str().unwrap()]);
    run("qemu-img", &args);
    let bytes = std::fs::read(&raw).unwrap();
    std::fs::remove_file(&raw).unwrap();
    bytes
}

fn judge(made: &Made, name: &str) {
    let (image, data) = (&made.image, made.data.as_deref());
    let view = open(image, made.base.as_ref(), data, None);
    assert_same(&view, &qemu_disk(image, None), name);
    for snapshot in &made.snapshots {
        let view = open(image, made.base.as_ref(), data, Some(snapshot));
        assert_same(&view, &qemu_disk(image, Some(snapshot)), &format!("{name}, {snapshot}"));
    }
    let terms = Terms {
        snapshot: None,
        backing: made.base.is_some(),
        data_len_bytes: data.map(|data| data.metadata().unwrap().len()),
    };
    let file = File::open(image).unwrap();
    let found = Inspection::of_file(&file, image, Some(Format::Qcow2), &terms).unwrap();
    assert!(found.verdict < Verdict::Refused, "{name}: {found:?}");
    let check =
        Command::new("qemu-img").args(["check", "-f", "qcow2"]).arg(image).output().unwrap();
    if !check.status.success() {
        assert!(!made.is_clean, "{name}: {check:?}");
        return;
    }
    let harmless = ["dirty bit set", "corrupt bit set", "the size is no multiple of 512"];
    for finding in &found.findings {
        let known = harmless.iter().any(|text| finding.text.starts_with(text));
        assert!(known, "{name}: qemu-img check is silent, but {finding:?}");
    }
}

/// Makes and judges image `number`; what it had.
fn one(number: u64) -> Vec<String> {
    let dir = TempDir::new().unwrap();
    let random = Random(number.wrapping_mul(0x9e37_79b9_7f4a_7c15));
    let mut making = Making { dir: dir.path(), random, kinds: Vec::new() };
    let made = if number % 4 == 3 { making.crafted() } else { making.made() };
    let name = format!("image {number}: {:?}", making.kinds);
    judge(&made, &name);
    making.kinds
}

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

/// Kinds that must be among the images: features, and ways to make them.
const WANTED: [&str; 28] = [
    "version 2",
    "version 3",
    "zlib",
    "zstd",
    "compressed clusters",
    "extended L2",
    "lazy refcounts",
    "dirty bit of a writer that died",
    "dirty bit",
    "corrupt bit",
    "preallocation",
    "bitmaps",
    "snapshots",
    "deleted snapshot",
    "applied snapshot",
    "header extensions",
    "unknown feature bits",
    "base, raw",
    "base, qcow2",
    "shorter base",
    "base as long or longer",
    "chain of three",
    "data file",
    "data file, raw",
    "longer than it was made",
    "crafted, bitmaps",
    "crafted, snapshots",
    "size of no whole sectors",
];

#[test]
fn images_of_any_mix_of_features_read_as_with_qemu() {
    if !have_qemu() {
        return;
    }
    let (first, count) = (number("BEDPLATE_MATRIX_FIRST", 0), number("BEDPLATE_MATRIX", 128));
    let next = AtomicU64::new(first);
    let all: Mutex<(Kinds, Vec<u64>)> = Mutex::default();
    let threads = std::thread::available_parallelism().map_or(2, usize::from).min(8);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                loop {
                    let number = next.fetch_add(1, Ordering::Relaxed);
                    if number >= first + count {
                        break;
                    }
                    // One that fails must not hide the others; its panic was printed.
                    let result = catch_unwind(AssertUnwindSafe(|| one(number)));
                    let (kinds, failed) = &mut *all.lock().unwrap();
                    match result {
                        Ok(found) => {
                            found.into_iter().for_each(|kind| *kinds.entry(kind).or_default() += 1);
                        }
                        Err(_) => failed.push(number),
                    }
                }
            });
        }
    });
    let (kinds, failed) = all.into_inner().unwrap();
    println!("{count} images: {kinds:?}");
    assert!(failed.is_empty(), "images {failed:?} differ, each said above");
    if count >= 64 {
        let bits = (9..=21).map(|bits| format!("cluster_bits {bits}"));
        let orders = [0, 1, 2, 3, 5, 6].map(|order| format!("refcount_order {order}"));
        let wanted = WANTED.map(str::to_owned).into_iter().chain(bits).chain(orders);
        let missing: Vec<_> = wanted.filter(|kind| !kinds.contains_key(kind)).collect();
        assert!(missing.is_empty(), "no image has {missing:?}");
    }
}
