//! Header extensions: which ones an image has, as far as that matters to a reader.
//!
//! Why: an extension can name a data file or hold encryption keys; the rest is for writers.
//! How: one pass over the area behind the header; every extension moves on by at least 8 bytes.
//! Never: keeps an extension's data, which may be a path: of the name of a format only which one.
//! Start at [`read`]. Format: qemu `docs/interop/qcow2.rst`, "Header extensions".

use zerocopy::FromBytes;

use super::header::Given;
use super::raw::RawExtension;
use crate::image::fault::Fault;

const END: u32 = 0;
const BACKING_FORMAT: u32 = 0xe279_2aca;
const DATA_FILE_NAME: u32 = 0x4441_5441;
const ENCRYPTION_HEADER: u32 = 0x0537_be77;
/// The longest name of a backing format that qemu takes.
const MAX_BACKING_FORMAT_LEN: u64 = 15;

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
}

/// Reads the extensions in `area`, which begins at byte `at` of the file and ends with the
/// header's cluster, or before the name of a backing file.
///
/// # Errors
/// An extension that runs out of the area, or one that we do not serve.
pub(super) fn read(area: &[u8], at: u64, given: Given) -> Result<Extensions, Fault> {
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
            DATA_FILE_NAME if !given.data => {
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
            _known_or_not => {}
        }
        let padded = len_bytes.next_multiple_of(8);
        // The padding of the last extension may be cut off by the end of the area.
        rest = usize::try_from(padded).ok().and_then(|n| data.get(n..)).unwrap_or_default();
        at += size_of::<RawExtension>() as u64 + padded;
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn check_all(area: &[u8], at: u64) -> Result<(), Fault> {
        read(area, at, Given::default()).map(|_| ())
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
