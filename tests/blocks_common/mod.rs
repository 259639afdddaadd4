//! Small sound VMDK, VHD and VHDX images made by hand, to be damaged byte by byte.
#![allow(dead_code, reason = "each test binary uses its part of this module")]

use bedplate::image::Format;

pub const SECTOR: usize = 512;
pub const MIB: usize = 1 << 20;
pub const MIB32: u32 = 1 << 20;
/// Bytes of a VMDK grain and of a VHD block here.
pub const BLOCK: usize = 4096;
/// Blocks of the VMDK and VHD disks; the last one is not whole.
pub const BLOCKS: usize = 16;
pub const DISK: usize = BLOCKS * BLOCK - 3 * SECTOR;

/// Where things are in the VMDK images.
pub const DESCRIPTOR_AT: usize = SECTOR;
pub const GD_AT: usize = 21 * SECTOR;
pub const GT_AT: usize = 22 * SECTOR;
pub const GRAINS_AT: usize = 32 * SECTOR;

/// Where things are in the VHD image.
pub const VHD_HEADER_AT: usize = SECTOR;
pub const VHD_TABLE_AT: usize = 3 * SECTOR;
pub const VHD_BLOCKS_AT: usize = 4 * SECTOR;

/// Where things are in the VHDX image.
pub const HEADERS_AT: [usize; 2] = [0x1_0000, 0x2_0000];
pub const REGIONS_AT: usize = 0x3_0000;
pub const LOG_AT: usize = MIB;
pub const META_AT: usize = 2 * MIB;
pub const ITEMS_AT: usize = META_AT + 0x1_0000;
pub const BAT_AT: usize = 3 * MIB;
pub const VHDX_DISK: usize = 4 * MIB - 3 * SECTOR;

#[derive(Clone)]
pub struct Crafted {
    pub format: Format,
    pub bytes: Vec<u8>,
}

impl Crafted {
    fn new(format: Format, len: usize) -> Self {
        Self { format, bytes: vec![0; len] }
    }

    pub fn put(&mut self, at: usize, bytes: &[u8]) -> &mut Self {
        self.bytes[at..at + bytes.len()].copy_from_slice(bytes);
        self
    }

    /// Sums right again after a change.
    pub fn sum(&mut self) -> &mut Self {
        match self.format {
            Format::Vhd => sum_vhd(&mut self.bytes),
            Format::Vhdx => sum_vhdx(&mut self.bytes),
            Format::Raw | Format::Qcow2 | Format::Vmdk => {}
        }
        self
    }

    /// qemu's name of the format.
    pub fn qemu_format(&self) -> &'static str {
        qemu_name(self.format)
    }
}

pub fn qemu_name(format: Format) -> &'static str {
    match format {
        Format::Vhd => "vpc",
        Format::Vhdx => "vhdx",
        Format::Vmdk => "vmdk",
        Format::Qcow2 => "qcow2",
        Format::Raw => "raw",
    }
}

/// Bytes that compress somewhat.
pub fn pattern(seed: u8, len: usize) -> Vec<u8> {
    let mut n = u64::from(seed) + 1;
    let mut next = || {
        n = n.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1);
        (n >> 60).to_le_bytes()[0]
    };
    (0..len).map(|_| next()).collect()
}

pub fn zlib(bytes: &[u8]) -> Vec<u8> {
    let mut out = vec![0; 2 * bytes.len() + 1024];
    let level = libdeflater::CompressionLvl::default();
    let len = libdeflater::Compressor::new(level).zlib_compress(bytes, &mut out).unwrap();
    out.truncate(len);
    out
}

const DESCRIPTOR: &[u8] = b"# Disk DescriptorFile\nversion=1\nCID=12345678\nparentCID=ffffffff\n\
    createType=\"monolithicSparse\"\n\nRW 125 SPARSE \"disk.vmdk\"\n\nddb.adapterType = \"ide\"\n";

fn vmdk_header(version: u32, flags: u32, gd: u64, algorithm: u16) -> [u8; SECTOR] {
    let mut raw = [0; SECTOR];
    let mut put = |at: usize, bytes: &[u8]| raw[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, b"KDMV");
    put(4, &version.to_le_bytes());
    put(8, &flags.to_le_bytes());
    for (at, value) in [(12, 125), (20, 8), (28, 1), (36, 20), (56, gd), (64, 32_u64)] {
        put(at, &value.to_le_bytes());
    }
    put(44, &512_u32.to_le_bytes());
    put(73, b"\n \r\n");
    put(77, &algorithm.to_le_bytes());
    raw
}

/// Sets entry `index` of the grain table.
pub fn gte(image: &mut Crafted, index: usize, sector: u32) -> &mut Crafted {
    image.put(GT_AT + 4 * index, &sector.to_le_bytes())
}

/// Plain grains: 0 and 1 data, 2 zero flag, 15 data as far as the disk goes.
pub fn vmdk() -> Crafted {
    let mut image = Crafted::new(Format::Vmdk, GRAINS_AT + 2 * BLOCK + 5 * SECTOR);
    image.put(0, &vmdk_header(1, 5, 21, 0)).put(DESCRIPTOR_AT, DESCRIPTOR);
    image.put(GD_AT, &22_u32.to_le_bytes());
    for (index, sector) in [(0, 32), (1, 40), (2, 1), (15, 48)] {
        gte(&mut image, index, sector);
    }
    image.put(GRAINS_AT, &pattern(1, BLOCK)).put(GRAINS_AT + BLOCK, &pattern(2, BLOCK));
    image.put(GRAINS_AT + 2 * BLOCK, &pattern(3, 5 * SECTOR));
    image
}

/// The same disk with compressed grains. With `footer`, the directory is found at the end only.
pub fn packed_vmdk(footer: bool) -> Crafted {
    let mut image = Crafted::new(Format::Vmdk, GRAINS_AT);
    let flags = 0x3_0001 | 4;
    let gd = if footer { u64::MAX } else { 21 };
    image.put(0, &vmdk_header(3, flags, gd, 1)).put(DESCRIPTOR_AT, DESCRIPTOR);
    image.put(GD_AT, &22_u32.to_le_bytes());
    gte(&mut image, 2, 1);
    for (index, seed, len) in [(0, 1, BLOCK), (1, 2, BLOCK), (15, 3, 5 * SECTOR)] {
        let at = image.bytes.len();
        gte(&mut image, index, u32::try_from(at / SECTOR).unwrap());
        let stream = zlib(&pattern(seed, len));
        image.bytes.extend((8 * index as u64).to_le_bytes());
        image.bytes.extend(u32::try_from(stream.len()).unwrap().to_le_bytes());
        image.bytes.extend(stream);
        image.bytes.resize(image.bytes.len().next_multiple_of(SECTOR), 0);
    }
    if footer {
        let mut marker = [0; SECTOR];
        (marker[0], marker[12]) = (1, 3);
        image.bytes.extend(marker);
        image.bytes.extend(vmdk_header(3, flags, 21, 1));
        image.bytes.extend([0; SECTOR]);
    }
    image
}

fn sum_bytes(bytes: &[u8]) -> [u8; 4] {
    (!bytes.iter().map(|&byte| u32::from(byte)).sum::<u32>()).to_be_bytes()
}

fn sum_vhd(bytes: &mut [u8]) {
    let end = bytes.len() - SECTOR;
    let areas = [(0, SECTOR, 64, b"conectix"), (VHD_HEADER_AT, 1024, 36, b"cxsparse")];
    for (at, len, sum_at, cookie) in areas.into_iter().chain([(end, SECTOR, 64, b"conectix")]) {
        let area = &mut bytes[at..at + len];
        if area.starts_with(cookie) {
            area[sum_at..sum_at + 4].fill(0);
            let sum = sum_bytes(area);
            area[sum_at..sum_at + 4].copy_from_slice(&sum);
        }
    }
}

fn vhd_footer(disk_type: u32, data_offset: u64, disk: usize) -> [u8; SECTOR] {
    let mut raw = [0; SECTOR];
    let mut put = |at: usize, bytes: &[u8]| raw[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, b"conectix");
    put(8, &2_u32.to_be_bytes());
    put(12, &0x1_0000_u32.to_be_bytes());
    put(16, &data_offset.to_be_bytes());
    put(28, b"win ");
    put(40, &(disk as u64).to_be_bytes());
    put(48, &(disk as u64).to_be_bytes());
    // A geometry of less than the size, which "win " does not look at.
    put(56, &[0, 25, 4, 1]);
    put(60, &disk_type.to_be_bytes());
    raw
}

/// Sets entry `index` of the block allocation table of the VHD.
pub fn vhd_entry(image: &mut Crafted, index: usize, sector: u32) -> &mut Crafted {
    image.put(VHD_TABLE_AT + 4 * index, &sector.to_be_bytes())
}

/// Dynamic: blocks 0, 1 and 15 are stored.
pub fn vhd() -> Crafted {
    let end = VHD_BLOCKS_AT + 3 * (SECTOR + BLOCK);
    let mut image = Crafted::new(Format::Vhd, end + SECTOR);
    let footer = vhd_footer(3, VHD_HEADER_AT as u64, DISK);
    image.put(0, &footer).put(end, &footer);
    let at = VHD_HEADER_AT;
    image.put(at, b"cxsparse").put(at + 8, &[0xff; 8]);
    image.put(at + 16, &(VHD_TABLE_AT as u64).to_be_bytes());
    image.put(at + 24, &0x1_0000_u32.to_be_bytes()).put(at + 28, &16_u32.to_be_bytes());
    image.put(at + 32, &4096_u32.to_be_bytes());
    image.put(VHD_TABLE_AT, &[0xff; SECTOR]);
    for (n, index, seed) in [(0, 0, 1), (1, 1, 2), (2, 15, 3)] {
        let at = VHD_BLOCKS_AT + n * (SECTOR + BLOCK);
        vhd_entry(&mut image, index, u32::try_from(at / SECTOR).unwrap());
        image.put(at, &[0xff; SECTOR]).put(at + SECTOR, &pattern(seed, BLOCK));
    }
    image.sum();
    image
}

/// Fixed: the disk and a footer.
pub fn fixed_vhd() -> Crafted {
    let mut image = Crafted::new(Format::Vhd, DISK + SECTOR);
    image.put(0, &pattern(4, DISK)).put(DISK, &vhd_footer(2, u64::MAX, DISK)).sum();
    image
}

pub fn crc32c(bytes: &[u8]) -> u32 {
    let mut crc = u32::MAX;
    for &byte in bytes {
        crc ^= u32::from(byte);
        for _ in 0..8 {
            crc = if crc & 1 == 1 { crc >> 1 ^ 0x82f6_3b78 } else { crc >> 1 };
        }
    }
    !crc
}

fn sum_vhdx(bytes: &mut [u8]) {
    for (at, len) in [(HEADERS_AT[0], 4096), (HEADERS_AT[1], 4096), (REGIONS_AT, 0x1_0000)] {
        bytes[at + 4..at + 8].fill(0);
        let sum = crc32c(&bytes[at..at + len]);
        bytes[at + 4..at + 8].copy_from_slice(&sum.to_le_bytes());
    }
}

/// A GUID as it is stored, from the way it is written.
pub fn guid(text: &str) -> Vec<u8> {
    let hex: String = text.chars().filter(|c| *c != '-').collect();
    let byte = |n: usize| u8::from_str_radix(&hex[2 * n..2 * n + 2], 16).unwrap();
    [3, 2, 1, 0, 5, 4, 7, 6, 8, 9, 10, 11, 12, 13, 14, 15].map(byte).to_vec()
}

/// Sets entry `index` of the block allocation table of the VHDX.
pub fn vhdx_entry(image: &mut Crafted, index: usize, entry: u64) -> &mut Crafted {
    image.put(BAT_AT + 8 * index, &entry.to_le_bytes())
}

/// Dynamic, blocks of 1 MiB: 0 data, 1 zero, 2 not present, 3 data.
pub fn vhdx() -> Crafted {
    let mut image = Crafted::new(Format::Vhdx, 6 * MIB);
    image.put(0, b"vhdxfile");
    for (n, at) in HEADERS_AT.into_iter().enumerate() {
        image.put(at, b"head").put(at + 8, &(7 + n as u64).to_le_bytes());
        image.put(at + 16, &[9; 32]).put(at + 66, &1_u16.to_le_bytes());
        image.put(at + 68, &(MIB32).to_le_bytes());
        image.put(at + 72, &(LOG_AT as u64).to_le_bytes());
    }
    image.put(REGIONS_AT, b"regi").put(REGIONS_AT + 8, &2_u32.to_le_bytes());
    let regions = [
        ("2dc27766-f623-4200-9d64-115e9bfd4a08", BAT_AT),
        ("8b7ca206-4790-4b9a-b8fe-575f050f886e", META_AT),
    ];
    for (n, (id, place)) in regions.into_iter().enumerate() {
        let at = REGIONS_AT + 16 + 32 * n;
        image.put(at, &guid(id)).put(at + 16, &(place as u64).to_le_bytes());
        image.put(at + 24, &(MIB32).to_le_bytes()).put(at + 28, &1_u32.to_le_bytes());
    }
    image.put(META_AT, b"metadata").put(META_AT + 10, &5_u16.to_le_bytes());
    let items: [(&str, u32, Vec<u8>); 5] = [
        ("caa16737-fa36-4d43-b3b6-33f0aa44e76b", 4, [MIB32, 0].map(u32::to_le_bytes).concat()),
        ("2fa54224-cd1b-4876-b211-5dbed83bf4b8", 6, (VHDX_DISK as u64).to_le_bytes().into()),
        ("beca12ab-b2e6-4523-93ef-c309e000c746", 6, vec![7; 16]),
        ("8141bf1d-a96f-4709-ba47-f233a8faab5f", 6, 512_u32.to_le_bytes().into()),
        ("cda348c7-445d-4471-9cc9-e9885251c556", 6, 512_u32.to_le_bytes().into()),
    ];
    for (n, (id, flags, value)) in items.into_iter().enumerate() {
        let at = META_AT + 32 + 32 * n;
        let place = 0x1_0000 + 16 * n;
        image.put(at, &guid(id)).put(at + 16, &u32::try_from(place).unwrap().to_le_bytes());
        image.put(at + 20, &u32::try_from(value.len()).unwrap().to_le_bytes());
        image.put(at + 24, &flags.to_le_bytes()).put(META_AT + place, &value);
    }
    for (index, entry) in [(0, (4 * MIB as u64) | 6), (1, 2), (3, (5 * MIB as u64) | 6)] {
        vhdx_entry(&mut image, index, entry);
    }
    image.put(4 * MIB, &pattern(1, MIB)).put(5 * MIB, &pattern(2, MIB));
    image.sum();
    image
}

/// Every crafted image by name, and the disk that it is.
pub fn all() -> Vec<(&'static str, Crafted, Vec<u8>)> {
    let mut small = vec![0; DISK];
    for (index, seed) in [(0, 1), (1, 2), (15, 3)] {
        let len = BLOCK.min(DISK - index * BLOCK);
        small[index * BLOCK..index * BLOCK + len].copy_from_slice(&pattern(seed, len));
    }
    let mut large = vec![0; VHDX_DISK];
    large[..MIB].copy_from_slice(&pattern(1, MIB));
    large[3 * MIB..].copy_from_slice(&pattern(2, MIB - 3 * SECTOR));
    vec![
        ("vmdk", vmdk(), small.clone()),
        ("vmdk_packed", packed_vmdk(false), small.clone()),
        ("vmdk_footer", packed_vmdk(true), small.clone()),
        ("vhd", vhd(), small),
        ("vhd_fixed", fixed_vhd(), pattern(4, DISK)),
        ("vhdx", vhdx(), large),
    ]
}

/// The parts of a VHDX that count, as the fuzzer takes it: places of 512 bytes each, in order.
pub fn vhdx_parts(image: &Crafted) -> Vec<u8> {
    let places = [0, HEADERS_AT[0], HEADERS_AT[1], REGIONS_AT, META_AT, ITEMS_AT, BAT_AT];
    places.iter().flat_map(|&at| image.bytes[at..at + SECTOR].to_vec()).collect()
}
