//! Which format a file has, by its content.
//!
//! Why: a name or a declaration may be wrong; the first bytes decide.
//! How: the magic numbers of what is served, and those of containers that people take for raw disks.
//! A fixed VHD begins with the disk, so it is one only if its owner says so.
//! Never: looks at a file name.
//! Start at [`detect`].

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// The first four bytes of every QCOW2 file: `QFI` and 0xfb.
pub const QCOW2_MAGIC: [u8; 4] = *b"QFI\xfb";

/// How many bytes of a file [`detect`] and the notes of an inspection want to see.
pub const PROBE_LEN_BYTES: usize = 512;

/// How the bytes of a file become the bytes of a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    /// The file is the disk, byte for byte.
    Raw,
    /// QEMU's copy-on-write format, versions 2 and 3.
    Qcow2,
    /// VMware's, of one file with sparse or compressed grains.
    Vmdk,
    /// Virtual PC's, fixed or dynamic.
    Vhd,
    /// Hyper-V's, fixed or dynamic.
    Vhdx,
}

/// A format's name that is not one of ours.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("image format {found:?} is not known; use raw, qcow2, vmdk, vhd or vhdx")]
pub struct UnknownFormat {
    /// The text as given, cut to 80 characters.
    pub found: String,
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
            Self::Vmdk => "vmdk",
            Self::Vhd => "vhd",
            Self::Vhdx => "vhdx",
        })
    }
}

impl FromStr for Format {
    type Err = UnknownFormat;

    fn from_str(text: &str) -> Result<Self, UnknownFormat> {
        match text {
            "raw" => Ok(Self::Raw),
            "qcow2" => Ok(Self::Qcow2),
            "vmdk" => Ok(Self::Vmdk),
            "vhd" => Ok(Self::Vhd),
            "vhdx" => Ok(Self::Vhdx),
            _ => Err(UnknownFormat { found: text.chars().take(80).collect() }),
        }
    }
}

/// The format of a file that begins with `first_bytes` (21 are enough), by content alone.
///
/// A QCOW2 magic with a version that we cannot read is still [`Format::Qcow2`]: refusing it is
/// right, serving its tables as a raw disk is not. So is a VMDK of a kind that is not served. A
/// fixed VHD, whose footer is at its end, is [`Format::Raw`] here.
#[must_use]
pub fn detect(first_bytes: &[u8]) -> Format {
    const MAGICS: [(&[u8], Format); 7] = [
        (&QCOW2_MAGIC, Format::Qcow2),
        (b"KDMV", Format::Vmdk),
        (b"COWD", Format::Vmdk),
        (b"# Disk DescriptorFile", Format::Vmdk),
        (&[0xbe, 0xba, 0xfe, 0xca, 0, 0, 0, 0], Format::Vmdk),
        (b"conectix", Format::Vhd),
        (b"vhdxfile", Format::Vhdx),
    ];
    let found = MAGICS.iter().find(|(magic, _)| first_bytes.starts_with(magic));
    found.map_or(Format::Raw, |&(_, format)| format)
}

/// What else a file that counts as raw looks like, in words; `None` for a plain disk.
///
/// Serving a VMDK or a gzip file as a raw disk is allowed (its bytes are its bytes) and nearly
/// always a mistake, so an inspection says it.
pub(super) fn looks_like(first_bytes: &[u8]) -> Option<&'static str> {
    const MAGICS: [(usize, &[u8], &str); 11] = [
        (0, &QCOW2_MAGIC, "QCOW2"),
        (0, b"KDMV", "VMDK"),
        (0, b"# Disk DescriptorFile", "VMDK descriptor"),
        (0, b"vhdxfile", "VHDX"),
        (0, b"conectix", "VHD"),
        (0x40, &[0x7f, 0x10, 0xda, 0xbe], "VDI"),
        (0, b"QED\0", "QED"),
        (0, b"LUKS\xba\xbe", "LUKS (encrypted: only who has the key can read it)"),
        (0, &[0x1f, 0x8b], "gzip"),
        (0, &[0xfd, b'7', b'z', b'X', b'Z', 0], "xz"),
        (0, &[0x28, 0xb5, 0x2f, 0xfd], "zstd"),
    ];
    let found = |&(at, magic, _): &(usize, &[u8], &str)| {
        first_bytes.get(at..).is_some_and(|bytes| bytes.starts_with(magic))
    };
    MAGICS.iter().find(|&entry| found(entry)).map(|&(_, _, name)| name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn content_decides_the_format() {
        assert_eq!(detect(b"QFI\xfb\0\0\0\x03"), Format::Qcow2);
        assert_eq!(detect(b"QFI\xfb\0\0\0\x09"), Format::Qcow2);
        assert_eq!(detect(b"KDMV\x01"), Format::Vmdk);
        assert_eq!(detect(b"COWD"), Format::Vmdk);
        assert_eq!(detect(b"# Disk DescriptorFile\n"), Format::Vmdk);
        assert_eq!(detect(b"# Disk"), Format::Raw);
        assert_eq!(detect(b"conectix"), Format::Vhd);
        assert_eq!(detect(b"vhdxfile"), Format::Vhdx);
        assert_eq!(detect(b"QFI"), Format::Raw);
        assert_eq!(detect(b""), Format::Raw);
        assert_eq!(detect(&[0; 512]), Format::Raw);
    }

    #[test]
    fn names_round_trip() {
        for format in [Format::Raw, Format::Qcow2, Format::Vmdk, Format::Vhd, Format::Vhdx] {
            assert_eq!(format.to_string().parse(), Ok(format));
            let json = serde_json::to_string(&format).unwrap();
            assert_eq!(json, format!("\"{format}\""));
        }
        assert!("vdi".parse::<Format>().is_err());
    }

    #[test]
    fn containers_that_are_no_raw_disk_are_named() {
        assert_eq!(looks_like(b"KDMV\x01"), Some("VMDK"));
        assert_eq!(looks_like(&[0x1f, 0x8b, 8]), Some("gzip"));
        let mut vdi = vec![0; 0x44];
        vdi[0x40..].copy_from_slice(&[0x7f, 0x10, 0xda, 0xbe]);
        assert_eq!(looks_like(&vdi), Some("VDI"));
        assert_eq!(looks_like(&[0; 512]), None);
        assert_eq!(looks_like(&[]), None);
    }
}
