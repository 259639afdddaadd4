//! Damage with a system: the sound samples, the edges of each field, and what may be said of it.

use std::ops::Range;

use super::Random;
use super::craft_big::{
    BACKING_FORMAT, BITMAPS, Built, COMPRESSED, COPIED, DATA_FILE_NAME, ENCRYPTION_HEADER,
    FEATURE_NAMES, Field, Mark, Part, Piece, Plan, Snap, content, n,
};

/// A sound image, and what a reader is given beside it.
#[derive(Clone, Debug)]
pub struct Sample {
    pub name: &'static str,
    pub built: Built,
    pub cluster: usize,
    /// The bytes of the base, for an image with a backing file: `base.raw`.
    pub base: Option<Vec<u8>>,
    /// The snapshot that is read.
    pub snapshot: Option<&'static str>,
    /// Its number; 0 is the disk as it is now.
    pub owner: usize,
}

fn sample(name: &'static str, plan: &Plan) -> Sample {
    let built = plan.build();
    let base = plan.backing.map(|_| content(99, n(plan.size_bytes) * 3 / 4 / 512 * 512));
    Sample { name, built, cluster: 1 << plan.cluster_bits, base, snapshot: None, owner: 0 }
}

fn standard() -> Vec<(u64, Piece)> {
    let (data, packed) = (Piece::Data, Piece::Packed);
    vec![
        (0, data(1)),
        (1, data(2)),
        (2, Piece::Zero),
        (3, Piece::Preallocated(3)),
        (4, packed(4)),
        (5, packed(5)),
        (6, Piece::Unallocated),
        (7, packed(6)),
    ]
}

/// Subclusters of every kind and in every order.
fn subclusters() -> Vec<(u64, Piece)> {
    vec![
        (0, Piece::Split(1, 0x0f00_ff00_f000_00ff)),
        (1, Piece::Split(2, 0x5555_5555_aaaa_aaaa)),
        (2, Piece::Split(3, 0xffff_0000_0000_0000)),
        (3, Piece::Packed(4)),
        (4, Piece::Packed(5)),
        (5, Piece::Zero),
        (6, Piece::Preallocated(6)),
        (7, Piece::Unallocated),
        (8, Piece::Split(7, 0x8000_0000_0000_0001)),
        (9, Piece::Split(8, 0)),
    ]
}

/// One image for each mix of features that readers tell apart.
pub fn samples() -> Vec<Sample> {
    let plain = Plan { disk: standard(), ..Plan::new(12, 16 * 4096) };
    let names = (FEATURE_NAMES, [vec![0, 0], vec![b'd'; 46]].concat());
    let unknown = (0x1234_5678, b"abc".to_vec());
    let v3 = Plan { extensions: vec![unknown.clone(), names], spare_l1: 2, ..plain.clone() };
    let mut several = standard();
    several.extend([(70, Piece::Data(7)), (71, Piece::Packed(8)), (140, Piece::Data(9))]);
    let v2 = Plan { version: 2, disk: Vec::new(), ..Plan::new(9, 141 * 512 - 512) };
    let without_zeroes = several.iter().filter(|(at, _)| !matches!(at, 2 | 3 | 140)).copied();
    let v2 = Plan { disk: without_zeroes.collect(), ..v2 };
    let odd = Plan {
        zstd: true,
        disk: several.clone(),
        features: [3, 1, 1 << 5],
        ..Plan::new(9, 141 * 512 - 300)
    };
    let ext = Plan { extended: true, disk: subclusters(), ..Plan::new(14, 10 * 16_384 - 3072) };
    let format = (BACKING_FORMAT, b"raw".to_vec());
    let backing = Some(&b"base.raw"[..]);
    let over = Plan { backing, extensions: vec![format.clone()], ..plain.clone() };
    let over_v2 = Plan { backing, extensions: vec![unknown, format.clone()], ..v2.clone() };
    let over_ext = Plan { backing, zstd: true, extensions: vec![format], ..ext.clone() };
    let file = (DATA_FILE_NAME, b"data.raw".to_vec());
    let not_packed = |disk: Vec<(u64, Piece)>| {
        disk.into_iter().filter(|(_, piece)| !matches!(piece, Piece::Packed(_))).collect()
    };
    let external = Plan {
        external: true,
        extensions: vec![file.clone()],
        disk: not_packed(standard()),
        ..Plan::new(12, 9 * 4096)
    };
    let external_ext = Plan {
        external: true,
        extensions: vec![file],
        disk: not_packed(subclusters()),
        ..ext.clone()
    };
    let old = Plan {
        header_len: 104,
        refcount_order: 0,
        disk: not_packed(standard()),
        ..Plan::new(12, 8 * 4096)
    };
    // As `qemu-img bitmap --add` makes them, one of them disabled, and one of a writer that died.
    let mark = |name, flags, granularity_bits| Mark { name, flags, granularity_bits };
    let bitmaps =
        vec![mark("b0", 2, 16), mark("disabled-1", 0, 9), mark("b1", 2, 9), mark("b2", 3, 12)];
    let features = [0, 0, 1];
    let marked = Plan { bitmaps, features, disk: standard(), ..Plan::new(9, 9 * 512) };
    let mut all = vec![
        sample("v3", &v3),
        sample("v2", &v2),
        sample("zstd, odd bits", &odd),
        sample("extended", &ext),
        sample("104 bytes of header", &old),
        sample("bitmaps", &marked),
        sample("base", &over),
        sample("base, v2", &over_v2),
        sample("base, extended, zstd", &over_ext),
        sample("external", &external),
        sample("external, extended", &external_ext),
    ];
    all.extend(snapshot_samples(several, &ext));
    all
}

/// Images with snapshots, and the snapshots in them.
fn snapshot_samples(several: Vec<(u64, Piece)>, ext: &Plan) -> Vec<Sample> {
    let then = vec![(0, Piece::Shared(0)), (1, Piece::Data(20)), (69, Piece::Data(21))];
    let snap = |id, name, extra_bytes| Snap { id, name, extra_bytes, disk: then.clone() };
    let snaps = vec![snap("1", "one", 24), snap("2", "a-long-name-of-a-snapshot", 16)];
    let shots = Plan { disk: several, snapshots: snaps, ..Plan::new(9, 141 * 512) };
    let ext_shots = Plan {
        snapshots: vec![Snap { disk: then[..2].to_vec(), ..snap("7", "x", 24) }],
        ..ext.clone()
    };
    // Of the other disks only the header and the snapshot table, which lead to this one's.
    let of = |snapshot, owner, mut sample: Sample, name| {
        sample.built.fields.retain(|f| f.owner == owner || f.part < Part::L1);
        Sample { snapshot: Some(snapshot), name, owner, ..sample }
    };
    vec![
        sample("snapshots", &shots),
        of("1", 1, sample("", &shots), "snapshot 1"),
        of("a-long-name-of-a-snapshot", 2, sample("", &shots), "snapshot 2"),
        of("x", 1, sample("", &ext_shots), "snapshot, extended"),
    ]
}

pub fn get(bytes: &[u8], at: usize, len: usize) -> u64 {
    let part = bytes.get(at..at + len).unwrap_or_default();
    part.iter().fold(0, |value, &byte| value << 8 | u64::from(byte))
}

pub fn put(bytes: &mut [u8], field: &Field, value: u64) {
    let all = value.to_be_bytes();
    bytes[field.at..field.at + field.len].copy_from_slice(&all[8 - field.len..]);
}

/// The values at the edges of a field: of its width, of the file, of its structure, and of what it
/// was. In order, each once.
pub fn edges(sample: &Sample, field: &Field) -> Vec<u64> {
    let bits = 8 * field.len;
    let (old, max) = (get(&sample.built.bytes, field.at, field.len), u64::MAX >> (64 - bits));
    let (len, cluster) = (sample.built.bytes.len() as u64, sample.cluster as u64);
    let mut all = vec![0, 1, 2, 3, 4, max, max - 1, max >> 1, (max >> 1) + 1, 511, 512, 513];
    for edge in [len, cluster, old] {
        for step in [1, 8, 512, cluster] {
            all.extend([edge, edge.wrapping_add(step), edge.wrapping_sub(step)]);
        }
    }
    all.extend([9, 21, 22, 72, 76, 104, 105, 108, 112, 116, 1023, 1024, 1025, 1 << 44]);
    all.extend([(1 << 44) + 512, 65_535, 65_536, 65_537]);
    if field.name == "size" {
        // As much as the L1 table maps.
        let entry = if get(&sample.built.bytes, 72, 8) & 16 != 0 { 16 } else { 8 };
        let most = get(&sample.built.bytes, 36, 4) * cluster * (cluster / entry);
        all.extend([most, most + 1, most + 511, most + 512, most - 512, most - 1]);
    }
    all.extend((0..bits).map(|bit| old ^ 1 << bit));
    let places: Vec<u64> = sample.built.places.iter().map(|&at| at as u64).collect();
    let is_entry = matches!(field.part, Part::L1 | Part::L2);
    for &place in &places {
        let flags: &[u64] = if is_entry { &[0, COPIED, COMPRESSED, 1, COPIED | 1] } else { &[0] };
        all.extend(flags.iter().map(|flag| place | flag));
    }
    all.extend(special(sample, field));
    all.iter_mut().for_each(|value| *value &= max);
    all.sort_unstable();
    all.dedup();
    all.retain(|&value| value != old);
    all
}

/// The edges that only a field of this kind has.
pub fn special(sample: &Sample, field: &Field) -> Vec<u64> {
    let old = get(&sample.built.bytes, field.at, field.len);
    let (len, cluster) = (sample.built.bytes.len() as u64, sample.cluster as u64);
    let low = u64::from(u32::MAX);
    match field.part {
        Part::L1 | Part::L2 => {
            let sectors = 0x3fff_ffff_ffff_ffff << (70 - cluster.trailing_zeros()) & !(3 << 62);
            vec![
                COPIED,
                COPIED | 1,
                old | 1,
                old ^ COPIED,
                old | sectors,
                old & !sectors,
                COMPRESSED | sectors | (len - 1),
                COMPRESSED | (len - 1),
                COMPRESSED | len,
                COMPRESSED | (cluster - 1),
                0x00ff_ffff_ffff_fe00,
                COPIED | (len - cluster / 2),
                1 | len,
            ]
        }
        Part::Bitmap => vec![
            low,
            low << 32,
            1 << 31 | 1 << 63,
            1 << 31,
            0x5555_5555,
            0xaaaa_aaaa_5555_5555,
            0x5555_5555_5555_5555,
            0x8000_0001,
        ],
        Part::ExtensionType => {
            let known = [BACKING_FORMAT, BITMAPS, DATA_FILE_NAME, ENCRYPTION_HEADER, FEATURE_NAMES];
            known.map(u64::from).to_vec()
        }
        Part::Directory => {
            let names = [0x30, 0x31, 0x32, 0x00];
            let numbers = [0, 1, 2, 3, 4, 8, 9, 31, 32, 1023, 1024, cluster, len, 1 << 20];
            [&numbers[..], &names, &[(1 << 20) + 1, 1 << 63, 0_u64.wrapping_sub(cluster)]].concat()
        }
        Part::BitmapTable => vec![
            1,
            2,
            len,
            len | 1,
            cluster,
            cluster | 1,
            cluster / 2,
            len - cluster / 2,
            1 << 55,
            1 << 56,
            1 << 63,
            0x00ff_ffff_ffff_fe00,
        ],
        Part::Refcount => vec![old | 1, old | 1 << 8, len, len - cluster, cluster / 2, 1 << 63],
        Part::Header | Part::ExtensionLength | Part::Snapshot => Vec::new(),
    }
}

/// Where an image's structures are, by a reading of its own that believes everything.
#[derive(Debug)]
pub struct Chart {
    pub cluster: u64,
    pub entry_bytes: u64,
    pub l1: Vec<Range<u64>>,
    pub l2_tables: Vec<u64>,
    pub extensions: Vec<u64>,
    pub snapshots: Vec<u64>,
    /// The bitmap directory, its entries, and the tables that they name.
    pub bitmap_directory: Option<Range<u64>>,
    pub bitmaps: Vec<u64>,
    pub bitmap_tables: Vec<Range<u64>>,
}

const TABLES: [&str; 6] = [
    "L2 table offset",
    "data cluster offset",
    "preallocated cluster offset",
    "compressed cluster offset",
    "L2 entry",
    "subcluster bitmap",
];

const HEADER: [(&str, u64); 20] = [
    ("file length", 0),
    ("magic", 0),
    ("version", 4),
    ("backing_file_offset", 8),
    ("backing_file_size", 16),
    ("cluster_bits", 20),
    ("size", 24),
    ("crypt_method", 32),
    ("l1_size", 36),
    ("l1_table_offset", 40),
    ("refcount_table_offset", 48),
    ("refcount_table_clusters", 56),
    ("nb_snapshots", 60),
    ("snapshots_offset", 64),
    ("incompatible_features", 72),
    ("compatible_features", 80),
    ("autoclear_features", 88),
    ("refcount_order", 96),
    ("header_length", 100),
    ("compression_type", 104),
];

impl Chart {
    pub fn of(bytes: &[u8]) -> Self {
        let quad = |at: u64| get(bytes, usize::try_from(at).unwrap_or(usize::MAX / 2), 8);
        let word = |at: u64| get(bytes, usize::try_from(at).unwrap_or(usize::MAX / 2), 4);
        let cluster = 1 << word(20).min(21);
        let v3 = word(4) >= 3;
        let entry_bytes = if v3 && quad(72) & 1 << 4 != 0 { 16 } else { 8 };
        let mut l1 = vec![quad(40)..quad(40).saturating_add(8 * word(36))];
        let mut snapshots = Vec::new();
        let mut at = quad(64);
        for _ in 0..word(60) {
            if at >= bytes.len() as u64 {
                break;
            }
            snapshots.push(at);
            l1.push(quad(at)..quad(at).saturating_add(8 * word(at.saturating_add(8))));
            let lens = word(at.saturating_add(12));
            let extra = word(at.saturating_add(36));
            let len = 40 + extra + (lens >> 16) + (lens & 0xffff);
            at = at.saturating_add(len.next_multiple_of(8));
        }
        let inside = |range: &Range<u64>| range.start..range.end.min(bytes.len() as u64);
        let entries = l1.iter().flat_map(|range| inside(range).step_by(8));
        let l2_tables = entries.map(|at| quad(at) & 0x00ff_ffff_ffff_fe00).filter(|&at| at != 0);
        let l2_tables = l2_tables.collect();
        let mut extensions = Vec::new();
        let mut at = if v3 { word(100) } else { 72 };
        while at + 8 <= cluster && at + 8 <= bytes.len() as u64 {
            extensions.push(at);
            at += 8 + word(at + 4).next_multiple_of(8);
        }
        // Where the next one would be: it may be cut off by the end of the area.
        extensions.push(at);
        let is_of_bitmaps = |ext: &&u64| word(**ext) == u64::from(BITMAPS);
        let of_bitmaps = extensions.iter().rfind(is_of_bitmaps).filter(|_| v3 && quad(88) & 1 != 0);
        let (mut bitmaps, mut bitmap_tables) = (Vec::new(), Vec::new());
        let mut bitmap_directory = None;
        if let Some(ext) = of_bitmaps {
            let (size, mut at) = (quad(ext + 16), quad(ext + 24));
            bitmap_directory = Some(at..at.saturating_add(size));
            let end = at.saturating_add(size).min(bytes.len() as u64);
            while at < end {
                bitmaps.push(at);
                let table = quad(at);
                bitmap_tables.push(table..table.saturating_add(8 * word(at + 8)));
                at += (24 + (word(at + 16) & 0xffff) + word(at + 20)).next_multiple_of(8);
            }
        }
        Self {
            cluster,
            entry_bytes,
            l1,
            l2_tables,
            extensions,
            snapshots,
            bitmap_directory,
            bitmaps,
            bitmap_tables,
        }
    }

    /// The length of the disk when this snapshot was taken, in whole sectors.
    pub fn disk_size(&self, bytes: &[u8], owner: usize) -> u64 {
        let at = usize::try_from(self.snapshots[owner - 1]).unwrap();
        let size_at = if get(bytes, at + 36, 4) >= 16 { at + 48 } else { 24 };
        get(bytes, size_at, 8) & !511
    }

    /// Whether a field of this name can be at `at`.
    pub fn has(&self, name: &str, at: u64) -> bool {
        let entry_of = |shift: u64| {
            self.l2_tables.iter().any(|&table| {
                let entry = at.wrapping_sub(shift);
                (table..table + self.cluster).contains(&entry)
                    && (entry - table).is_multiple_of(self.entry_bytes)
            })
        };
        let of_snapshot = |shift| self.snapshots.iter().any(|&snap| snap + shift == at);
        let of_bitmap = |shift| self.bitmaps.iter().any(|&entry| entry + shift == at);
        if HEADER.contains(&(name, at)) {
            return true;
        }
        match name {
            "L2 table offset" => {
                self.l1.iter().any(|l1| l1.contains(&at) && (at - l1.start).is_multiple_of(8))
            }
            "subcluster bitmap" => entry_of(8),
            "data cluster offset"
            | "preallocated cluster offset"
            | "compressed cluster offset"
            | "L2 entry" => entry_of(0),
            "extension length" | "extension backing format length" => {
                self.extensions.iter().any(|&ext| ext + 4 == at)
            }
            "l1_table_offset" => of_snapshot(0),
            "l1_size" => of_snapshot(8),
            "extra_data_size" => of_snapshot(36),
            "snapshot disk size" => of_snapshot(48),
            "bitmap_table_offset" => of_bitmap(0),
            "bitmap_table_size" => of_bitmap(8),
            "bitmap flags" => of_bitmap(12),
            "bitmap type" => of_bitmap(16),
            "granularity_bits" => of_bitmap(17),
            "name_size" => of_bitmap(18),
            "bitmap extra_data_size" => of_bitmap(20),
            "bitmap name" => of_bitmap(24),
            "bitmap table entry" => {
                let of = |t: &Range<u64>| t.contains(&at) && (at - t.start).is_multiple_of(8);
                self.bitmap_tables.iter().any(of)
            }
            _ if name.starts_with("extension ") => {
                self.extensions.iter().any(|ext| at.wrapping_sub(*ext) < 8)
            }
            _ if name.starts_with("bitmaps ") => {
                self.extensions.iter().any(|ext| at.wrapping_sub(*ext) < 32)
            }
            _ => false,
        }
    }
}

/// Whether damage to `field` can be what makes the reader name `name` at `at`.
pub fn explains(field: &Field, name: &str, at: u64) -> bool {
    let own = field.at as u64..(field.at + field.len) as u64;
    let is = |names: &[&str]| names.contains(&name);
    let table = TABLES.contains(&name);
    let extension = name.starts_with("extension ") || name.starts_with("bitmaps ");
    let bitmap = name.starts_with("bitmap") || is(&["granularity_bits", "name_size"]);
    let snapshot = is(&["snapshots_offset", "extra_data_size", "l1_size", "l1_table_offset"])
        || name == "snapshot disk size";
    if own.contains(&at) {
        return true;
    }
    match (field.part, field.name) {
        (Part::Header, "version" | "cluster_bits") => true,
        (Part::Header, "incompatible_features") => {
            table
                || extension
                || is(&["compression_type", "cluster_bits", "l1_size", "autoclear_features"])
        }
        (Part::Header, "header_length") => extension || is(&["compression_type"]),
        (Part::Header, "size") => table || is(&["l1_size", "bitmap_table_size"]),
        (Part::Header, "l1_size") => table || is(&["l1_table_offset"]),
        (Part::Header, "l1_table_offset") => table,
        (Part::Header, "refcount_table_clusters") => is(&["refcount_table_offset"]),
        (Part::Header, "nb_snapshots") => snapshot,
        (Part::Header, "snapshots_offset") | (Part::Snapshot, _) => snapshot || table,
        (Part::Header, "backing_file_offset") => extension || is(&["backing_file_size"]),
        (Part::ExtensionType | Part::ExtensionLength, _) => extension || bitmap,
        // The end of an entry is where the next one begins, and its table is where it says.
        (Part::Directory, _) => bitmap,
        // The entries of the L2 table that it names now, and what lies in that table.
        (Part::L1, _) => table,
        // An entry is its descriptor and its bitmap.
        (Part::L2, _) => name == "subcluster bitmap" && at == own.end,
        (Part::Bitmap, _) => table && at + 8 == own.start,
        (Part::Header | Part::BitmapTable | Part::Refcount, _) => false,
    }
}

/// What this reader refuses and qemu reads, and why.
const LIBERTIES: [(&str, &str); 17] = [
    ("a table inside the file", "qemu takes what is past the file's end for zeroes"),
    ("a cluster inside the file", "the same"),
    ("inside the file", "the same"),
    ("a directory inside the file", "the same"),
    ("bitmap tables of at most 16 MiB together", "a small file could be read for minutes"),
    ("a cluster inside the external data file", "the same"),
    ("past the header's cluster", "metadata is no data"),
    ("not in the L1 table", "the same"),
    ("not an L2 table", "the same"),
    ("not in an L1 or L2 table", "the same"),
    ("one L1 entry for each L2 table", "a small file could fill a map of any size"),
    ("at most 16 TiB", "the largest disk"),
    ("at least 512", "a disk of no bytes is nothing to serve"),
    ("a multiple of 8 from 104 to the cluster size", "qemu does not look at the lowest bits"),
    (
        "0, as no backing file was given (--base gives one)",
        "a name is not looked at, not even whether it is empty: qemu ends it at a zero byte",
    ),
    ("no external data file", "a name of another file is refused even where it is not used"),
    ("bit 1 clear (no raw external data file)", "the same"),
];

/// Whether a refusal for want of `need` is one that qemu does not share, on purpose.
pub fn is_liberty(need: &str, name: &str, at: u64) -> bool {
    // A snapshot's L1 table that is too short: qemu takes the rest of the disk for zeroes.
    let short = need == "enough entries for the disk's size" && name == "l1_size" && at != 36;
    short || LIBERTIES.iter().any(|(known, _)| *known == need)
}

/// Some of `all`, chosen by the generator.
pub fn some<T: Clone>(all: &[T], count: usize, random: &mut Random) -> Vec<T> {
    let mut all = all.to_vec();
    while all.len() > count {
        all.swap_remove(random.index(all.len()));
    }
    all
}
