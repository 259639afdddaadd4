//! What the disk says of itself: features, configuration, serial number.
//!
//! Why: a guest's driver goes by these and by nothing else.
//! How: constants of the virtio headers, and the configuration as bytes of fixed places.
//! Never: offers to write: there is nothing that a guest could negotiate for it.
//! Start at [`Device`]. Spec: virtio 1.2, 5.2.3 and 5.2.4.

use virtio_bindings::bindings::{virtio_blk as blk, virtio_config, virtio_ring};
use zerocopy::byteorder::little_endian::{U16, U32, U64};
use zerocopy::{Immutable, IntoBytes};

use super::limits::{SEG_MAX, SIZE_MAX};
use crate::serve::Export;

/// Bytes of a sector, the unit of all positions.
pub(super) const SECTOR_BYTES: u64 = 512;
/// Bytes of a serial number (VIRTIO_BLK_ID_BYTES).
pub(super) const SERIAL_BYTES: usize = 20;
/// VHOST_USER_F_PROTOCOL_FEATURES.
pub(super) const PROTOCOL_FEATURES: u64 = 1 << 30;
/// VIRTIO_RING_F_EVENT_IDX.
pub(super) const EVENT_IDX: u64 = 1 << virtio_ring::VIRTIO_RING_F_EVENT_IDX;
/// VIRTIO_RING_F_INDIRECT_DESC.
pub(super) const INDIRECT: u64 = 1 << virtio_ring::VIRTIO_RING_F_INDIRECT_DESC;

/// Everything that may be negotiated.
pub(super) const FEATURES: u64 = 1 << virtio_config::VIRTIO_F_VERSION_1
    | EVENT_IDX
    | INDIRECT
    | PROTOCOL_FEATURES
    | 1 << blk::VIRTIO_BLK_F_RO
    | 1 << blk::VIRTIO_BLK_F_FLUSH
    | 1 << blk::VIRTIO_BLK_F_BLK_SIZE
    | 1 << blk::VIRTIO_BLK_F_SEG_MAX
    | 1 << blk::VIRTIO_BLK_F_SIZE_MAX
    | 1 << blk::VIRTIO_BLK_F_TOPOLOGY
    | 1 << blk::VIRTIO_BLK_F_MQ;

/// `struct virtio_blk_config` up to the fields of zoned devices.
#[derive(Clone, Copy, Debug, Default, IntoBytes, Immutable)]
#[repr(C)]
struct Config {
    capacity_sectors: U64,
    size_max: U32,
    seg_max: U32,
    cylinders: U16,
    heads: u8,
    sectors: u8,
    blk_size: U32,
    physical_block_exp: u8,
    alignment_offset: u8,
    min_io_blocks: U16,
    opt_io_blocks: U32,
    writeback: u8,
    unused: u8,
    num_queues: U16,
    max_discard_sectors: U32,
    max_discard_seg: U32,
    discard_sector_alignment: U32,
    max_write_zeroes_sectors: U32,
    max_write_zeroes_seg: U32,
    write_zeroes_may_unmap: u8,
    unused_too: [u8; 3],
}

const _: () = assert!(size_of::<Config>() == 60);

/// One disk, as its guest sees it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Device {
    config: Config,
    capacity_sectors: u64,
    serial: [u8; SERIAL_BYTES],
}

impl Device {
    /// The disk of an export.
    pub(super) fn of(export: &Export, queues: u16) -> Self {
        Self::new(export.view().size_bytes(), queues, export.identity())
    }

    /// A disk of `size_bytes` with `queues` queues. A last sector that the image does not fill is a
    /// whole one for the guest, with zeroes at its end: nothing of the image is cut off.
    fn new(size_bytes: u64, queues: u16, identity: &str) -> Self {
        let capacity_sectors = size_bytes.div_ceil(SECTOR_BYTES);
        let config = Config {
            capacity_sectors: U64::new(capacity_sectors),
            size_max: U32::new(SIZE_MAX),
            seg_max: U32::new(SEG_MAX),
            blk_size: U32::new(512),
            // Eight sectors to a block of the host, and 64 KiB, an image's cluster, at best.
            physical_block_exp: 3,
            min_io_blocks: U16::new(8),
            opt_io_blocks: U32::new(128),
            num_queues: U16::new(queues),
            ..Config::default()
        };
        Self { config, capacity_sectors, serial: serial(identity) }
    }

    pub(super) fn capacity_sectors(&self) -> u64 {
        self.capacity_sectors
    }

    pub(super) fn serial(&self) -> &[u8; SERIAL_BYTES] {
        &self.serial
    }

    /// `size` bytes of the configuration from `offset` on; zeroes after its end, where a newer
    /// frontend looks for newer fields.
    pub(super) fn config(&self, offset: usize, size: usize) -> Vec<u8> {
        let known = self.config.as_bytes().get(offset..).unwrap_or_default();
        let mut bytes: Vec<u8> = known.iter().copied().take(size).collect();
        bytes.resize(size, 0);
        bytes
    }
}

/// The same 20 characters for the same image, whichever process serves it: its identity if that is
/// short, else the beginning of it and a hash of all of it. A guest finds the disk by it
/// (`/dev/disk/by-id/virtio-…`).
fn serial(identity: &str) -> [u8; SERIAL_BYTES] {
    let plain = |c: char| if c.is_ascii_alphanumeric() || "-_.".contains(c) { c } else { '-' };
    let text: String = if identity.len() <= SERIAL_BYTES {
        identity.chars().map(plain).collect()
    } else {
        let hash = xxhash_rust::xxh3::xxh3_64(identity.as_bytes());
        let name = identity.split(' ').next().unwrap_or_default();
        let name: String = name.chars().map(plain).take(SERIAL_BYTES - 9).collect();
        format!("{name}-{:08x}", hash >> 32)
    };
    let mut serial = [0; SERIAL_BYTES];
    serial.iter_mut().zip(text.bytes()).for_each(|(to, byte)| *to = byte);
    serial
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_size_of_no_whole_sectors_is_rounded_up() {
        assert_eq!(Device::new(1025, 1, "x").capacity_sectors(), 3);
        assert_eq!(Device::new(1024, 1, "x").capacity_sectors(), 2);
    }

    #[test]
    fn a_part_of_the_configuration_is_that_part_and_zeroes_follow() {
        let device = Device::new(5 << 20, 4, "x");
        assert_eq!(device.config(0, 8), (10_240_u64).to_le_bytes());
        assert_eq!(device.config(34, 2), (4_u16).to_le_bytes(), "num_queues");
        assert_eq!(device.config(20, 4), (512_u32).to_le_bytes(), "blk_size");
        assert_eq!(device.config(56, 8), [0; 8]);
        assert_eq!(device.config(1000, 3), [0; 3]);
    }

    #[test]
    fn images_of_different_identity_have_different_serials_of_20_characters_at_most() {
        let of = |identity: &str| Device::new(1, 1, identity).serial;
        let text = |identity: &str| String::from_utf8(of(identity).to_vec()).unwrap();
        assert_eq!(text("debian"), format!("debian{}", "\0".repeat(14)));
        let (one, two) = (text("debian-12-generic 1234"), text("debian-12-generic 1235"));
        assert!(one.starts_with("debian-12-g-") && one != two, "{one} {two}");
        assert_eq!(text("ä b"), format!("--b{}", "\0".repeat(17)));
    }
}
