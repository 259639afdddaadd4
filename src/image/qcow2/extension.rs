//! Header extensions: which ones an image has, as far as that matters to a reader.
//!
//! Why: an extension can name a data file or hold encryption keys; the rest is for writers.
//! How: one pass over the area behind the header; every extension moves on by at least 8 bytes.
//! Never: keeps an extension's data, which may be a path: of the name of a format only which one.
//! Start at [`read`]. Format: qemu `docs/interop/qcow2.rst`, "Header extensions".

use zerocopy::FromBytes;

use super::bitmaps::BitmapDirectory;
use super::header::{ClusterBits, Given};
use super::raw::{RawBitmaps, RawExtension};
use crate::image::fault::Fault;

const END: u32 = 0;
const BACKING_FORMAT: u32 = 0xe279_2aca;
const DATA_FILE_NAME: u32 = 0x4441_5441;
const ENCRYPTION_HEADER: u32 = 0x0537_be77;
const BITMAPS: u32 = 0x2385_2875;
/// The longest name of a backing format that qemu takes.
const MAX_BACKING_FORMAT_LEN: u64 = 15;
const MAX_BITMAPS: u32 = 65_535;
const MAX_BITMAP_DIRECTORY_BYTES: u64 = 1024 * 65_535;

/// What an image says of the format of its backing file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BackingFormat {
    /// The file is the disk.
    Raw,
    /// QCOW2.
    Qcow2,
    /// Another one.
    Other,
}

/// What matters of all extensions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Extensions {
    pub(super) backing_format: Option<BackingFormat>,
    pub(super) bitmaps: Option<BitmapDirectory>,
}

/// What extensions are judged by.
#[derive(Clone, Copy, Debug)]
pub(super) struct Rules {
    pub(super) bits: ClusterBits,
    pub(super) given: Given,
    /// True if the bitmaps of the image are said to be up to date, so that qemu reads them.
    pub(super) bitmaps: bool,
    pub(super) file_len_bytes: u64,
    /// Length of the disk.
    pub(super) size_bytes: u64,
}

/// Reads the extensions in `area`, which begins at byte `at` of the file and ends with the
/// header's cluster, or before the name of a backing file.
///
/// # Errors
/// An extension that runs out of the area, or one that we do not serve.
pub(super) fn read(area: &[u8], at: u64, rules: Rules) -> Result<Extensions, Fault> {
    let (mut rest, mut at) = (area, at);
    let mut found = Extensions::default();
    while let Ok((head, data)) = RawExtension::read_from_prefix(rest) {
        let (magic, len_bytes) = (head.magic.get(), u64::from(head.len_bytes.get()));
        // First, as in qemu: even an end marker has a length.
        if len_bytes > data.len() as u64 {
            let need = "an end inside the header's cluster";
            return Err(Fault::malformed("extension length", at + 4, len_bytes, need));
        }
        match magic {
            END => return Ok(found),
            DATA_FILE_NAME if !rules.given.data => {
                let need = "no external data file";
                return Err(Fault::unsupported("extension data file name", at, magic.into(), need));
            }
            ENCRYPTION_HEADER => {
                let need = "no encryption";
                return Err(Fault::unsupported("extension encryption", at, magic.into(), need));
            }
            BACKING_FORMAT if len_bytes > MAX_BACKING_FORMAT_LEN => {
                let (field, need) = ("extension backing format length", "at most 15");
                return Err(Fault::malformed(field, at + 4, len_bytes, need));
            }
            BACKING_FORMAT => {
                let name = usize::try_from(len_bytes).ok().and_then(|len| data.get(..len));
                found.backing_format = Some(match name.unwrap_or_default() {
                    b"raw" => BackingFormat::Raw,
                    b"qcow2" => BackingFormat::Qcow2,
                    _another => BackingFormat::Other,
                });
            }
            // As qemu: of several the last one counts.
            BITMAPS => {
                found.bitmaps = read_bitmaps(data, len_bytes, at, rules)?.or(found.bitmaps);
            }
            _known_or_not => {}
        }
        let padded = len_bytes.next_multiple_of(8);
        // The padding of the last extension may be cut off by the end of the area.
        rest = usize::try_from(padded).ok().and_then(|n| data.get(n..)).unwrap_or_default();
        at += size_of::<RawExtension>() as u64 + padded;
    }
    // As qemu: what is left before the name of a backing file is another extension, cut off.
    match rest.len() as u64 {
        0 => Ok(found),
        left => Err(Fault::malformed("extension type", at, left, "room for 8 bytes, or none left")),
    }
}

/// The directory that the extension names; `None` if the bitmaps are out of date, as qemu then does
/// not look at them.
fn read_bitmaps(
    data: &[u8],
    len_bytes: u64,
    at: u64,
    rules: Rules,
) -> Result<Option<BitmapDirectory>, Fault> {
    let need = "24, as for bitmaps";
    let wrong_len = Err(Fault::malformed("extension length", at + 4, len_bytes, need));
    let Ok((raw, _)) = RawBitmaps::read_from_prefix(data) else { return wrong_len };
    if len_bytes != size_of::<RawBitmaps>() as u64 {
        return wrong_len;
    }
    if !rules.bitmaps {
        return Ok(None);
    }
    let bad = |field, offset, found, need| Err(Fault::malformed(field, at + offset, found, need));
    let (count, reserved) = (raw.nb_bitmaps.get(), raw.reserved.get());
    let (size, directory) = (raw.directory_size.get(), raw.directory_offset.get());
    if !(1..=MAX_BITMAPS).contains(&count) {
        return bad("bitmaps count", 8, count.into(), "1 to 65535");
    }
    if reserved != 0 {
        return bad("bitmaps reserved", 12, reserved.into(), "0");
    }
    if size == 0 || size > MAX_BITMAP_DIRECTORY_BYTES {
        return bad("bitmaps directory size", 16, size, "1 byte to 64 MiB");
    }
    if directory & rules.bits.offset_mask() != 0 {
        return bad("bitmaps directory offset", 24, directory, "a multiple of the cluster size");
    }
    if directory.checked_add(size).is_none_or(|end| end > rules.file_len_bytes) {
        return bad("bitmaps directory offset", 24, directory, "a directory inside the file");
    }
    let size_bytes = rules.size_bytes;
    Ok(Some(BitmapDirectory {
        at: directory,
        len_bytes: size,
        count,
        extension_at: at,
        size_bytes,
    }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn check_all(area: &[u8], at: u64) -> Result<(), Fault> {
        let bits = ClusterBits::new(16).unwrap();
        let (given, file_len_bytes, size_bytes) = (Given::default(), 1 << 20, 1 << 30);
        let rules = Rules { bits, given, bitmaps: true, file_len_bytes, size_bytes };
        read(area, at, rules).map(|_| ())
    }

    fn extension(magic: u32, data: &[u8]) -> Vec<u8> {
        let len = u32::try_from(data.len()).unwrap();
        let mut bytes = [magic.to_be_bytes(), len.to_be_bytes()].concat();
        bytes.extend_from_slice(data);
        bytes.resize(bytes.len().next_multiple_of(8), 0);
        bytes
    }

    #[test]
    fn unknown_extensions_and_a_backing_format_are_passed_over() {
        let area = [extension(0x1234_5678, b"abc"), extension(BACKING_FORMAT, b"raw"), vec![0; 8]]
            .concat();
        assert_eq!(check_all(&area, 112), Ok(()));
        assert_eq!(check_all(&[], 112), Ok(()));
        assert_eq!(check_all(&extension(1, &[0; 8]), 112), Ok(()), "no end marker");
    }

    #[test]
    fn a_data_file_and_encryption_are_refused_with_their_place() {
        let area = [extension(7, b"12345"), extension(DATA_FILE_NAME, b"/etc/passwd")].concat();
        let fault = check_all(&area, 112).unwrap_err();
        assert_eq!((fault.field, fault.at.0), ("extension data file name", 128));
        let fault = check_all(&extension(ENCRYPTION_HEADER, &[0; 16]), 72).unwrap_err();
        assert_eq!((fault.field, fault.at.0), ("extension encryption", 72));
    }

    #[test]
    fn an_extension_that_leaves_the_area_is_refused() {
        let mut area = extension(7, &[0; 16]);
        area[7] = 17;
        assert_eq!(check_all(&area, 0).unwrap_err().field, "extension length");
        area[4..8].fill(0xff);
        assert_eq!(check_all(&area, 0).unwrap_err().found, 0xffff_ffff);
    }

    #[test]
    fn what_is_too_short_for_an_extension_is_refused_as_qemu_does() {
        let area = [extension(7, b"12345"), vec![0; 4]].concat();
        let fault = check_all(&area, 112).unwrap_err();
        assert_eq!((fault.field, fault.at.0, fault.found), ("extension type", 128, 4));
    }

    #[test]
    fn bitmaps_that_qemu_refuses_are_refused() {
        let bitmaps = |count: u32, reserved: u32, size: u64, at: u64| {
            let words = [count.to_be_bytes(), reserved.to_be_bytes()].concat();
            let quads = [size.to_be_bytes(), at.to_be_bytes()].concat();
            extension(BITMAPS, &[words, quads].concat())
        };
        assert_eq!(check_all(&bitmaps(1, 0, 32, 0x10000), 112), Ok(()));
        for (area, field, at) in [
            (bitmaps(0, 0, 32, 0x10000), "bitmaps count", 120),
            (bitmaps(65_536, 0, 32, 0x10000), "bitmaps count", 120),
            (bitmaps(1, 1, 32, 0x10000), "bitmaps reserved", 124),
            (bitmaps(1, 0, 0, 0x10000), "bitmaps directory size", 128),
            (bitmaps(1, 0, 1 << 26, 0x10000), "bitmaps directory size", 128),
            (bitmaps(1, 0, 32, 0x10001), "bitmaps directory offset", 136),
            (bitmaps(1, 0, 32, 1 << 20), "bitmaps directory offset", 136),
            (bitmaps(1, 0, 32, !0xffff), "bitmaps directory offset", 136),
            (extension(BITMAPS, &[0; 16]), "extension length", 116),
        ] {
            let fault = check_all(&area, 112).unwrap_err();
            assert_eq!((fault.field, fault.at.0), (field, at));
        }
    }

    #[test]
    fn a_long_backing_format_is_refused_as_qemu_does() {
        let fault = check_all(&extension(BACKING_FORMAT, &[b'x'; 16]), 0).unwrap_err();
        assert_eq!(fault.field, "extension backing format length");
    }

    proptest! {
        #[test]
        fn any_area_is_judged(area in proptest::collection::vec(any::<u8>(), 0..600)) {
            let _no_panic = check_all(&area, 104);
        }
    }
}
