//! Small sound images with any mix of features, made by hand, and where each of their fields is.
//!
//! A [`Plan`] says what every guest cluster is; [`Plan::build`] lays the file out and counts the
//! references, so that `qemu-img check` finds nothing. The fuzz targets build with it too, so this
//! file uses nothing of its neighbours.

use libdeflater::{CompressionLvl, Compressor};

pub const COPIED: u64 = 1 << 63;
pub const COMPRESSED: u64 = 1 << 62;
pub const BACKING_FORMAT: u32 = 0xe279_2aca;
pub const DATA_FILE_NAME: u32 = 0x4441_5441;
pub const ENCRYPTION_HEADER: u32 = 0x0537_be77;
pub const FEATURE_NAMES: u32 = 0x6803_f857;
pub const BITMAPS: u32 = 0x2385_2875;

const SECTOR: usize = 512;
const V2_LEN: usize = 72;

/// What a field belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Part {
    Header,
    ExtensionType,
    ExtensionLength,
    Snapshot,
    L1,
    L2,
    Bitmap,
    /// Of the bitmap directory, and of the tables that it names.
    Directory,
    BitmapTable,
    /// An entry of the refcount table.
    Refcount,
}

/// A number in the file, big-endian.
#[derive(Clone, Copy, Debug)]
pub struct Field {
    pub name: &'static str,
    pub part: Part,
    pub at: usize,
    pub len: usize,
    /// Whose table it is in: 0 for the disk, or the number of a snapshot.
    pub owner: usize,
}

/// What a guest cluster is.
#[derive(Clone, Copy, Debug)]
pub enum Piece {
    /// Nothing is stored; listed so that its entry is a field.
    Unallocated,
    /// Stored, with bytes that follow from this seed.
    Data(u8),
    /// The zero flag alone.
    Zero,
    /// The zero flag, and a cluster with other bytes (of this seed).
    Preallocated(u8),
    /// A compressed stream of bytes that follow from this seed.
    Packed(u8),
    /// A cluster of this seed, and the subcluster bitmap; only with extended L2 entries.
    Split(u8, u64),
    /// Of a snapshot: the cluster that the disk has at this place.
    Shared(u64),
}

/// An internal snapshot.
#[derive(Clone, Debug, Default)]
pub struct Snap {
    pub id: &'static str,
    pub name: &'static str,
    pub extra_bytes: usize,
    pub disk: Vec<(u64, Piece)>,
}

/// A bitmap. The first of its clusters has bits that are set, the others are not stored.
#[derive(Clone, Debug)]
pub struct Mark {
    pub name: &'static str,
    /// 1: in use, 2: enabled.
    pub flags: u32,
    pub granularity_bits: u32,
}

/// What an image is to be.
#[derive(Clone, Debug)]
pub struct Plan {
    pub version: u32,
    pub cluster_bits: u32,
    pub extended: bool,
    pub zstd: bool,
    /// More incompatible, compatible and autoclear bits.
    pub features: [u64; 3],
    pub header_len: usize,
    pub extensions: Vec<(u32, Vec<u8>)>,
    pub backing: Option<&'static [u8]>,
    /// True if data is in another file, at the guest's own offsets.
    pub external: bool,
    pub size_bytes: u64,
    pub refcount_order: u32,
    /// The bitmaps.
    pub bitmaps: Vec<Mark>,
    /// L1 entries that the disk does not need.
    pub spare_l1: usize,
    pub disk: Vec<(u64, Piece)>,
    pub snapshots: Vec<Snap>,
}

/// The file, the external data file if there is one, and where things are.
#[derive(Clone, Debug, Default)]
pub struct Built {
    pub bytes: Vec<u8>,
    pub data: Vec<u8>,
    pub fields: Vec<Field>,
    /// Where structures and clusters begin.
    pub places: Vec<usize>,
}

pub fn n(value: u64) -> usize {
    usize::try_from(value).unwrap()
}

/// A cluster of bytes that compress well and differ by seed and place.
pub fn content(seed: u8, len: usize) -> Vec<u8> {
    let mut state = u64::from(seed).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = Vec::with_capacity(len);
    for _ in 0..len.div_ceil(32) {
        state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
        bytes.extend([state.to_le_bytes()[6] | 1; 32]);
    }
    bytes.truncate(len);
    bytes
}

pub fn pack(bytes: &[u8], zstd: bool) -> Vec<u8> {
    let mut out = vec![0; 2 * bytes.len() + 1024];
    let len = if zstd {
        zstd_safe::compress(&mut out[..], bytes, 3).unwrap()
    } else {
        Compressor::new(CompressionLvl::default()).deflate_compress(bytes, &mut out).unwrap()
    };
    out.truncate(len);
    out
}

/// The L2 entry of a stream of `len` bytes at `at`.
pub fn packed_entry(at: usize, len: usize, cluster_bits: u32) -> u64 {
    let sectors = (at % SECTOR + len).div_ceil(SECTOR) as u64 - 1;
    COMPRESSED | sectors << (70 - cluster_bits) | at as u64
}

impl Plan {
    /// Version 3 with nothing in it.
    pub fn new(cluster_bits: u32, size_bytes: u64) -> Self {
        Self {
            version: 3,
            cluster_bits,
            extended: false,
            zstd: false,
            features: [0; 3],
            header_len: 112,
            extensions: Vec::new(),
            backing: None,
            external: false,
            size_bytes,
            refcount_order: 4,
            bitmaps: Vec::new(),
            spare_l1: 0,
            disk: Vec::new(),
            snapshots: Vec::new(),
        }
    }

    fn cluster(&self) -> usize {
        1 << self.cluster_bits
    }

    fn entry_bytes(&self) -> usize {
        if self.extended { 16 } else { 8 }
    }

    fn entries_per_table(&self) -> u64 {
        (self.cluster() / self.entry_bytes()) as u64
    }

    pub fn build(&self) -> Built {
        let mut site = Site::new(self);
        let (l1_at, l1_entries) = site.disk(&self.disk, &[]);
        let snapshots_at = site.snapshots();
        let bitmaps = site.bitmaps();
        site.header(l1_at, l1_entries, snapshots_at, bitmaps);
        site.refcounts();
        if self.external {
            site.built.data.resize(n(self.size_bytes), 0);
        }
        site.built
    }
}

/// An image that grows.
struct Site<'a> {
    plan: &'a Plan,
    built: Built,
    /// How often each cluster of the file is referred to.
    refs: Vec<u64>,
    /// Entries that name a cluster, which have the copied flag if nothing else does.
    names: Vec<(usize, usize)>,
    /// Where the disk's clusters are, for the snapshots.
    hosts: Vec<(u64, usize)>,
    /// Whose tables are being made.
    owner: usize,
}

impl<'a> Site<'a> {
    /// Clusters 0 to 2 are the header, the refcount table and its first block.
    fn new(plan: &'a Plan) -> Self {
        let (built, refs, names, hosts) = (Built::default(), vec![], vec![], vec![]);
        let mut site = Self { plan, built, refs, names, hosts, owner: 0 };
        for _ in 0..3 {
            site.alloc(1);
        }
        site
    }

    fn alloc(&mut self, clusters: usize) -> usize {
        let (at, cluster) = (self.built.bytes.len(), self.plan.cluster());
        self.built.bytes.resize(at + clusters * cluster, 0);
        self.refs.resize(self.refs.len() + clusters, 1);
        self.built.places.push(at);
        at
    }

    fn put(&mut self, at: usize, value: u64, len: usize) {
        self.built.bytes[at..at + len].copy_from_slice(&value.to_be_bytes()[8 - len..]);
    }

    fn field(&mut self, part: Part, name: &'static str, at: usize, len: usize) {
        self.built.fields.push(Field { name, part, at, len, owner: self.owner });
    }

    /// A disk's tables and clusters; the place and length of its L1 table.
    fn disk(&mut self, pieces: &[(u64, Piece)], active: &[(u64, usize)]) -> (usize, usize) {
        let plan = self.plan;
        let per_table = plan.entries_per_table();
        let clusters = plan.size_bytes.div_ceil(plan.cluster() as u64);
        let entries = n(clusters.div_ceil(per_table)) + plan.spare_l1;
        let l1_at = self.alloc((entries * 8).div_ceil(plan.cluster()));
        let mut tables: Vec<Option<usize>> = vec![None; entries];
        for index in 0..entries {
            self.field(Part::L1, "L1 entry", l1_at + 8 * index, 8);
        }
        let mut places = Vec::new();
        for &(guest, piece) in pieces {
            let index = n(guest / per_table);
            let table = match tables[index] {
                Some(table) => table,
                None => self.alloc(1),
            };
            tables[index] = Some(table);
            let entry_at = table + n(guest % per_table) * plan.entry_bytes();
            self.field(Part::L2, "L2 entry", entry_at, 8);
            if plan.extended {
                self.field(Part::Bitmap, "subcluster bitmap", entry_at + 8, 8);
            }
            places.push((guest, piece, entry_at));
        }
        for (index, table) in tables.iter().enumerate() {
            if let &Some(table) = table {
                self.put(l1_at + 8 * index, table as u64, 8);
                self.names.push((l1_at + 8 * index, table));
            }
        }
        for &(guest, piece, entry_at) in &places {
            self.piece(guest, piece, entry_at, active);
        }
        self.streams(&places);
        (l1_at, entries)
    }

    fn piece(&mut self, guest: u64, piece: Piece, entry_at: usize, active: &[(u64, usize)]) {
        let zero_bit = u64::from(!self.plan.extended);
        let bitmap;
        let host = match piece {
            Piece::Unallocated | Piece::Packed(_) => return,
            Piece::Zero => {
                self.put(entry_at, zero_bit, 8);
                bitmap = u64::from(u32::MAX) << 32;
                None
            }
            Piece::Data(seed) => {
                bitmap = u64::from(u32::MAX);
                Some(self.store(guest, seed))
            }
            Piece::Preallocated(seed) => {
                let host = self.store(guest, seed);
                self.put(entry_at, zero_bit, 8);
                bitmap = u64::from(u32::MAX) << 32;
                Some(host)
            }
            Piece::Split(seed, wanted) => {
                bitmap = wanted;
                Some(self.store(guest, seed))
            }
            Piece::Shared(of) => {
                let host = active.iter().find(|(at, _)| *at == of).unwrap().1;
                self.refs[host / self.plan.cluster()] += 1;
                bitmap = u64::from(u32::MAX);
                Some(host)
            }
        };
        if let Some(host) = host {
            let flags = u64::from_be_bytes(self.built.bytes[entry_at..][..8].try_into().unwrap());
            self.put(entry_at, flags | host as u64, 8);
            self.names.push((entry_at, host));
            self.hosts.push((guest, host));
        }
        if self.plan.extended {
            self.put(entry_at + 8, bitmap, 8);
        }
    }

    /// A cluster of data; where it is.
    fn store(&mut self, guest: u64, seed: u8) -> usize {
        let cluster = self.plan.cluster();
        let bytes = content(seed, cluster);
        if self.plan.external {
            let at = n(guest) * cluster;
            let end = at + cluster;
            let data = &mut self.built.data;
            data.resize(data.len().max(end), 0);
            data[at..end].copy_from_slice(&bytes);
            return at;
        }
        let at = self.alloc(1);
        self.built.bytes[at..at + cluster].copy_from_slice(&bytes);
        at
    }

    /// All compressed clusters, one behind the other, so that they share sectors.
    fn streams(&mut self, places: &[(u64, Piece, usize)]) {
        let (cluster, bits) = (self.plan.cluster(), self.plan.cluster_bits);
        let start = self.built.bytes.len();
        let mut at = start;
        for &(_, piece, entry_at) in places {
            let Piece::Packed(seed) = piece else { continue };
            let stream = pack(&content(seed, cluster), self.plan.zstd);
            let end = at + stream.len();
            while self.built.bytes.len() < end {
                self.alloc(1);
                *self.refs.last_mut().unwrap() = 0;
            }
            self.built.bytes[at..end].copy_from_slice(&stream);
            self.put(entry_at, packed_entry(at, stream.len(), bits), 8);
            let last = (end.next_multiple_of(SECTOR) - 1) / cluster;
            for refs in &mut self.refs[at / SECTOR * SECTOR / cluster..=last] {
                *refs += 1;
            }
            self.built.places.push(at);
            at = end;
        }
    }

    /// The snapshot table, if there are any; where it is.
    fn snapshots(&mut self) -> usize {
        let plan = self.plan;
        if plan.snapshots.is_empty() {
            return 0;
        }
        let active = std::mem::take(&mut self.hosts);
        let mut tables = Vec::new();
        for snap in &plan.snapshots {
            self.owner += 1;
            tables.push(self.disk(&snap.disk, &active));
        }
        self.owner = 0;
        let table: usize = plan.snapshots.iter().map(snapshot_bytes).sum();
        let table_at = self.alloc(table.div_ceil(plan.cluster()));
        // A longer table would still be in the file.
        let room = (2048_usize).div_ceil(plan.cluster());
        self.alloc(room);
        self.refs.iter_mut().rev().take(room).for_each(|refs| *refs = 0);
        let mut at = table_at;
        for (snap, (l1_at, l1_entries)) in plan.snapshots.iter().zip(tables) {
            let head = [
                ("l1_table_offset", 0, 8, l1_at as u64),
                ("l1_size", 8, 4, l1_entries as u64),
                ("id_str_size", 12, 2, snap.id.len() as u64),
                ("name_size", 14, 2, snap.name.len() as u64),
                ("date_sec", 16, 4, 1_700_000_000),
                ("date_nsec", 20, 4, 5),
                ("vm_clock_nsec", 24, 8, 7),
                ("vm_state_size", 32, 4, 0),
                ("extra_data_size", 36, 4, snap.extra_bytes as u64),
                ("vm_state_size_large", 40, 8, 0),
                ("disk_size", 48, 8, plan.size_bytes),
                ("icount", 56, 8, u64::MAX),
            ];
            for (name, offset, len, value) in head {
                if offset + len <= 40 + snap.extra_bytes {
                    self.put(at + offset, value, len);
                    self.field(Part::Snapshot, name, at + offset, len);
                }
            }
            let id_at = at + 40 + snap.extra_bytes;
            let text = [snap.id.as_bytes(), snap.name.as_bytes()].concat();
            self.built.bytes[id_at..id_at + text.len()].copy_from_slice(&text);
            at += snapshot_bytes(snap);
        }
        table_at
    }

    /// Tables and directory of the bitmaps: the extension's data, if there are any.
    fn bitmaps(&mut self) -> Option<Vec<u8>> {
        let plan = self.plan;
        if plan.bitmaps.is_empty() {
            return None;
        }
        let len: usize = plan.bitmaps.iter().map(mark_bytes).sum();
        let directory_at = self.alloc(len.div_ceil(plan.cluster()));
        let mut at = directory_at;
        for mark in &plan.bitmaps {
            let bits = (plan.size_bytes / 512 * 512).div_ceil(1 << mark.granularity_bits);
            let needed = n(bits.div_ceil(8)).div_ceil(plan.cluster());
            // One in use may be of an earlier, larger disk.
            let entries = if mark.flags & 1 == 0 { needed } else { needed + 1 };
            let table_at = self.alloc((8 * entries).div_ceil(plan.cluster()));
            let bits_at = self.alloc(1);
            self.put(bits_at, 0x0102_0408, 8);
            self.put(table_at, bits_at as u64, 8);
            for index in 0..entries {
                self.field(Part::BitmapTable, "bitmap table entry", table_at + 8 * index, 8);
            }
            let head = [
                ("bitmap_table_offset", 0, 8, table_at as u64),
                ("bitmap_table_size", 8, 4, entries as u64),
                ("bitmap flags", 12, 4, mark.flags.into()),
                ("bitmap type", 16, 1, 1),
                ("granularity_bits", 17, 1, mark.granularity_bits.into()),
                ("name_size", 18, 2, mark.name.len() as u64),
                ("bitmap extra_data_size", 20, 4, 0),
            ];
            for (name, offset, len, value) in head {
                self.put(at + offset, value, len);
                self.field(Part::Directory, name, at + offset, len);
            }
            let name = mark.name.as_bytes();
            self.built.bytes[at + 24..at + 24 + name.len()].copy_from_slice(name);
            self.field(Part::Directory, "bitmap name", at + 24 + name.len() - 1, 1);
            at += mark_bytes(mark);
        }
        let (count, reserved) = (u32::try_from(plan.bitmaps.len()).unwrap(), [0; 4]);
        let place = [(len as u64).to_be_bytes(), (directory_at as u64).to_be_bytes()].concat();
        Some([&count.to_be_bytes()[..], &reserved, &place].concat())
    }

    fn header(
        &mut self,
        l1_at: usize,
        l1_entries: usize,
        snapshots_at: usize,
        bitmaps: Option<Vec<u8>>,
    ) {
        let plan = self.plan;
        let (start, mut ext) = (if plan.version == 2 { V2_LEN } else { plan.header_len }, vec![]);
        let (mut at, mut names) = (start, vec![]);
        let bitmaps: Vec<_> = bitmaps.map(|data| (BITMAPS, data)).into_iter().collect();
        let end = [(0, Vec::new())];
        for (magic, data) in plan.extensions.iter().chain(&bitmaps).chain(&end) {
            names.push((Part::ExtensionType, "extension type", at, 4));
            names.push((Part::ExtensionLength, "extension length", at + 4, 4));
            if *magic == BITMAPS {
                names.push((Part::ExtensionLength, "bitmaps count", at + 8, 4));
                names.push((Part::ExtensionLength, "bitmaps reserved", at + 12, 4));
                names.push((Part::ExtensionLength, "bitmaps directory size", at + 16, 8));
                names.push((Part::ExtensionLength, "bitmaps directory offset", at + 24, 8));
            }
            ext.extend(magic.to_be_bytes());
            ext.extend(u32::try_from(data.len()).unwrap().to_be_bytes());
            ext.extend(data);
            ext.resize(ext.len().next_multiple_of(8), 0);
            at = start + ext.len();
        }
        self.built.bytes[start..at].copy_from_slice(&ext);
        let name = plan.backing.unwrap_or_default();
        self.built.bytes[at..at + name.len()].copy_from_slice(name);
        let external = if plan.external { 1 << 2 } else { 0 };
        let zstd = u64::from(plan.zstd);
        let incompatible = plan.features[0] | external | zstd << 3 | u64::from(plan.extended) << 4;
        let fields = [
            ("magic", 0, 4, 0x5146_49fb),
            ("version", 4, 4, plan.version.into()),
            ("backing_file_offset", 8, 8, if plan.backing.is_some() { at as u64 } else { 0 }),
            ("backing_file_size", 16, 4, name.len() as u64),
            ("cluster_bits", 20, 4, plan.cluster_bits.into()),
            ("size", 24, 8, plan.size_bytes),
            ("crypt_method", 32, 4, 0),
            ("l1_size", 36, 4, l1_entries as u64),
            ("l1_table_offset", 40, 8, l1_at as u64),
            ("refcount_table_offset", 48, 8, plan.cluster() as u64),
            ("refcount_table_clusters", 56, 4, 1),
            ("nb_snapshots", 60, 4, plan.snapshots.len() as u64),
            ("snapshots_offset", 64, 8, snapshots_at as u64),
            ("incompatible_features", 72, 8, incompatible),
            ("compatible_features", 80, 8, plan.features[1]),
            ("autoclear_features", 88, 8, plan.features[2]),
            ("refcount_order", 96, 4, plan.refcount_order.into()),
            ("header_length", 100, 4, plan.header_len as u64),
            ("compression_type", 104, 1, zstd),
        ];
        for (name, at, len, value) in fields {
            if at + len <= start {
                self.put(at, value, len);
                self.field(Part::Header, name, at, len);
            }
        }
        for (part, name, at, len) in names {
            self.field(part, name, at, len);
        }
    }

    /// The refcounts, and the copied flag of every entry whose cluster is referred to once.
    fn refcounts(&mut self) {
        let cluster = self.plan.cluster();
        let bits = 1_usize << self.plan.refcount_order;
        let per_block = cluster * 8 / bits;
        let mut blocks = vec![2 * cluster];
        while blocks.len() * per_block < self.refs.len() {
            let more = self.alloc(1);
            blocks.push(more);
        }
        for (index, &block) in blocks.iter().enumerate() {
            self.put(cluster + 8 * index, block as u64, 8);
            self.field(Part::Refcount, "refcount table entry", cluster + 8 * index, 8);
        }
        for (index, count) in self.refs.clone().into_iter().enumerate() {
            let block = blocks[index / per_block];
            let bit = index % per_block * bits;
            let at = block + bit / 8;
            if bits >= 8 {
                self.put(at, count, bits / 8);
            } else {
                // Narrow counts begin in the low bits of a byte.
                self.built.bytes[at] |= u8::try_from(count << (bit % 8)).unwrap();
            }
        }
        for (entry_at, host) in std::mem::take(&mut self.names) {
            let is_data = self.built.fields.iter().any(|f| f.at == entry_at && f.part == Part::L2);
            let once = (self.plan.external && is_data) || self.refs[host / cluster] == 1;
            if once {
                self.built.bytes[entry_at] |= 0x80;
            }
        }
    }
}

/// Bytes of a snapshot's entry.
fn snapshot_bytes(snap: &Snap) -> usize {
    (40 + snap.extra_bytes + snap.id.len() + snap.name.len()).next_multiple_of(8)
}

/// Bytes of a bitmap's entry in the directory.
fn mark_bytes(mark: &Mark) -> usize {
    (24 + mark.name.len()).next_multiple_of(8)
}
