//! Digests of a copy's bytes, and the file that keeps them: `backing.digests`.
//!
//! Why: "complete" must mean "the right bytes"; and a byte that rots later should be found by the
//! MiB that holds it.
//! How: [`Hasher`] takes the file's bytes in order, once, and feeds every digest that was asked
//! for; xxh3-64 of each MiB is always made, since it costs next to nothing.
//! Never: compares anything; callers do.
//! Start at [`Hasher::update`].

use std::sync::LazyLock;

use md5::Md5;
use sha1::Sha1;
use sha2::{Digest, Sha256, Sha512};
use xxhash_rust::xxh3::Xxh3;

use super::kinds::{DigestKind, DigestMap, DigestSet};
use super::page::{CONTENT_BYTES, Page};
use super::{Dir, DiskError};
use crate::names::hex;
use crate::units::MIB;

const MAGIC: &[u8; 8] = b"BEDDIGS1";
/// xxh3 words of one page.
const WORDS_PER_PAGE: usize = CONTENT_BYTES / 8;
/// Bytes that go through all digests before the next do.
const STEP_BYTES: usize = 64 * 1024;
static ZEROES: [u8; 64 * 1024] = [0; 64 * 1024];
/// xxh3-64 of a MiB of zeroes.
static ZERO_MIB: LazyLock<u64> = LazyLock::new(|| {
    let mut hash = Xxh3::new();
    (0..MIB / ZEROES.len() as u64).for_each(|_| hash.update(&ZEROES));
    hash.digest()
});

/// The digests of a file.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Digests {
    /// Those of the whole file that were made.
    pub whole: DigestMap,
    /// xxh3-64 of each MiB; the last may be short.
    pub xxh3_per_mib: Vec<u64>,
}

/// One digest of the whole file that is being made.
enum Making {
    Sha256(Sha256),
    Sha512(Sha512),
    Sha1(Sha1),
    Md5(Md5),
    // Ten times the size of the others.
    Blake3(Box<blake3::Hasher>),
}

impl Making {
    fn new(kind: DigestKind) -> Self {
        match kind {
            DigestKind::Sha256 => Self::Sha256(Sha256::new()),
            DigestKind::Sha512 => Self::Sha512(Sha512::new()),
            DigestKind::Sha1 => Self::Sha1(Sha1::new()),
            DigestKind::Md5 => Self::Md5(Md5::new()),
            DigestKind::Blake3 => Self::Blake3(Box::default()),
        }
    }

    fn update(&mut self, bytes: &[u8]) {
        match self {
            Self::Sha256(hash) => hash.update(bytes),
            Self::Sha512(hash) => hash.update(bytes),
            Self::Sha1(hash) => hash.update(bytes),
            Self::Md5(hash) => hash.update(bytes),
            Self::Blake3(hash) => drop(hash.update(bytes)),
        }
    }

    fn finish(self) -> (DigestKind, String) {
        match self {
            Self::Sha256(hash) => (DigestKind::Sha256, hex(&hash.finalize())),
            Self::Sha512(hash) => (DigestKind::Sha512, hex(&hash.finalize())),
            Self::Sha1(hash) => (DigestKind::Sha1, hex(&hash.finalize())),
            Self::Md5(hash) => (DigestKind::Md5, hex(&hash.finalize())),
            Self::Blake3(hash) => (DigestKind::Blake3, hex(hash.finalize().as_bytes())),
        }
    }
}

/// The digest of one block of [`Digests::xxh3_per_mib`].
#[must_use]
pub fn xxh3_of(block: &[u8]) -> u64 {
    // Of its vector code it takes what this processor has; xxhash-rust what the build was for.
    twox_hash::XxHash3_64::oneshot(block)
}

/// The digest of a MiB of zeroes.
#[must_use]
pub fn xxh3_of_zero_mib() -> u64 {
    *ZERO_MIB
}

/// Takes a file's bytes in order and makes its digests.
pub struct Hasher {
    whole: Vec<Making>,
    block: Xxh3,
    blocks: Vec<u64>,
    len_bytes: u64,
}

impl std::fmt::Debug for Hasher {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Hasher").field("len_bytes", &self.len_bytes).finish_non_exhaustive()
    }
}

impl Hasher {
    /// A hasher at byte 0.
    #[must_use]
    pub fn new(set: DigestSet) -> Self {
        Self {
            whole: set.kinds().map(Making::new).collect(),
            block: Xxh3::new(),
            blocks: Vec::new(),
            len_bytes: 0,
        }
    }

    /// How many bytes were taken so far: the file offset of the next one.
    #[must_use]
    pub fn len_bytes(&self) -> u64 {
        self.len_bytes
    }

    /// Takes the next bytes.
    pub fn update(&mut self, bytes: &[u8]) {
        let mut rest = bytes;
        while !rest.is_empty() {
            let room = usize::try_from(MIB - self.len_bytes % MIB).unwrap_or(usize::MAX);
            let take = room.min(rest.len()).min(STEP_BYTES);
            // What one has read is in the processor's cache for the others.
            self.whole.iter_mut().for_each(|digest| digest.update(&rest[..take]));
            self.block.update(&rest[..take]);
            self.len_bytes += take as u64;
            if self.len_bytes.is_multiple_of(MIB) {
                self.blocks.push(self.block.digest());
                self.block.reset();
            }
            rest = &rest[take..];
        }
    }

    /// Takes the next `len_bytes` bytes, all zero.
    pub fn update_zeroes(&mut self, len_bytes: u64) {
        let mut left = len_bytes;
        while left > 0 {
            if self.whole.is_empty() && self.len_bytes.is_multiple_of(MIB) && left >= MIB {
                // A MiB of zeroes has always the same digest: a hole of terabytes costs no time.
                self.blocks.push(*ZERO_MIB);
                self.len_bytes += MIB;
                left -= MIB;
                continue;
            }
            let take = usize::try_from(left).unwrap_or(usize::MAX).min(ZEROES.len());
            self.update(&ZEROES[..take]);
            left -= take as u64;
        }
    }

    /// The digests of all that was taken.
    #[must_use]
    pub fn finish(mut self) -> Digests {
        if !self.len_bytes.is_multiple_of(MIB) {
            self.blocks.push(self.block.digest());
        }
        let mut whole = DigestMap::default();
        for (kind, text) in self.whole.into_iter().map(Making::finish) {
            whole.set(kind, text);
        }
        Digests { whole, xxh3_per_mib: self.blocks }
    }
}

#[derive(serde::Serialize, serde::Deserialize)]
struct Head {
    size_bytes: u64,
    #[serde(flatten)]
    whole: DigestMap,
    #[serde(default)]
    declared: Option<String>,
}

/// What `backing.digests` says of a finished file.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DigestRecord {
    /// Length of the file in bytes.
    pub size_bytes: u64,
    /// The format that its owner declared, in the caller's own word; `None` if none was.
    pub declared: Option<String>,
    /// The digests.
    pub digests: Digests,
}

impl DigestRecord {
    /// Writes the record as `name` in `dir`; durable when this returns.
    ///
    /// Layout: a header page (magic, length of the JSON, JSON), then pages of 511 little-endian
    /// xxh3 words, each page with its CRC-32.
    ///
    /// # Errors
    /// [`DiskError::Io`] or [`DiskError::Full`].
    pub fn store(&self, dir: &Dir, name: &str) -> Result<(), DiskError> {
        let head = Head {
            size_bytes: self.size_bytes,
            whole: self.digests.whole.clone(),
            declared: self.declared.clone(),
        };
        let json = serde_json::to_vec(&head).unwrap_or_default();
        let mut page = Page::new();
        page.content_mut()[..8].copy_from_slice(MAGIC);
        page.set_word(8, json.len() as u64);
        page.content_mut()[16..16 + json.len()].copy_from_slice(&json);
        page.seal();
        let mut bytes = page.bytes().to_vec();
        for words in self.digests.xxh3_per_mib.chunks(WORDS_PER_PAGE) {
            let mut page = Page::new();
            for (index, word) in words.iter().enumerate() {
                page.set_word(index * 8, *word);
            }
            page.seal();
            bytes.extend_from_slice(page.bytes());
        }
        dir.replace(name, &bytes)
    }

    /// The record in the file `name` of `dir`. `None` if there is none, or it is damaged.
    ///
    /// # Errors
    /// [`DiskError::Io`].
    pub fn load(dir: &Dir, name: &str) -> Result<Option<Self>, DiskError> {
        let read_failed = |e| DiskError::io("read", &dir.join(name), e);
        let Some(file) = dir.try_open_file(name, rustix::fs::OFlags::RDONLY)? else {
            return Ok(None);
        };
        let Some(page) = Page::read(&file, 0).map_err(read_failed)? else { return Ok(None) };
        let Some(head) = parse_head(&page) else { return Ok(None) };
        let blocks = usize::try_from(head.size_bytes.div_ceil(MIB)).unwrap_or(usize::MAX);
        let mut words = Vec::new();
        for index in 0..blocks.div_ceil(WORDS_PER_PAGE) {
            let page = Page::read(&file, 1 + index as u64).map_err(read_failed)?;
            let Some(page) = page else { return Ok(None) };
            words.extend((0..WORDS_PER_PAGE).map(|word| page.word(word * 8)));
        }
        words.truncate(blocks);
        let digests = Digests { whole: head.whole, xxh3_per_mib: words };
        Ok(Some(Self { size_bytes: head.size_bytes, declared: head.declared, digests }))
    }
}

fn parse_head(page: &Page) -> Option<Head> {
    let len = usize::try_from(page.word(8)).ok()?;
    let json = page.content().get(16..)?.get(..len)?;
    (&page.content()[..8] == MAGIC).then(|| serde_json::from_slice(json).ok())?
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all() -> DigestSet {
        DigestSet::of(&DigestKind::ALL)
    }

    /// Of "abc": FIPS 180-4's examples, RFC 1321 appendix A.5, and BLAKE3's `b3sum`.
    const OF_ABC: [(DigestKind, &str); 5] = [
        (DigestKind::Sha256, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"),
        (
            DigestKind::Sha512,
            "ddaf35a193617abacc417349ae20413112e6fa4e89a97ea20a9eeee64b55d39a\
             2192992a274fc1a836ba3c23a3feebbd454d4423643ce80e2a9ac94fa54ca49f",
        ),
        (DigestKind::Sha1, "a9993e364706816aba3e25717850c26c9cd0d89d"),
        (DigestKind::Md5, "900150983cd24fb0d6963f7d28e17f72"),
        (DigestKind::Blake3, "6437b3ac38465133ffb63b75273a8db548c558465d79db03fd359c6cd5bd9d85"),
    ];

    #[test]
    fn digests_are_those_of_the_standard() {
        let mut hasher = Hasher::new(all());
        hasher.update(b"abc");
        let digests = hasher.finish();
        for (kind, wanted) in OF_ABC {
            assert_eq!(digests.whole.get(kind), Some(wanted), "{kind}");
        }
        assert_eq!(digests.xxh3_per_mib, vec![xxhash_rust::xxh3::xxh3_64(b"abc")]);
    }

    #[test]
    fn both_libraries_make_the_same_of_any_length() {
        let bytes: Vec<u8> = (0..MIB + 9).map(|at| (at * at % 253).to_le_bytes()[0]).collect();
        let short = (0..2100).chain([4096, 65_537, 1 << 20, bytes.len()]);
        for len in short {
            let mut grown = Xxh3::new();
            grown.update(&bytes[..len]);
            assert_eq!(xxh3_of(&bytes[..len]), grown.digest(), "{len}");
        }
        assert_eq!(xxh3_of_zero_mib(), xxh3_of(&vec![0; 1 << 20]));
    }

    #[test]
    fn pieces_and_zero_runs_hash_as_the_whole() {
        let mut bytes = vec![0u8; 3 * 1024 * 1024 + 77];
        bytes[..1000].fill(3);
        bytes[2_500_000..].fill(9);
        let mut whole = Hasher::new(all());
        whole.update(&bytes);
        let mut pieces = Hasher::new(all());
        pieces.update(&bytes[..1]);
        pieces.update(&bytes[1..1000]);
        pieces.update_zeroes(2_499_000);
        pieces.update(&bytes[2_500_000..]);
        assert_eq!(pieces.len_bytes(), bytes.len() as u64);
        assert_eq!(pieces.finish(), whole.finish());
    }

    #[test]
    fn a_hole_hashes_as_its_zeroes() {
        let mut hole = Hasher::new(DigestSet::default());
        hole.update(b"x");
        hole.update_zeroes(5 * MIB);
        let mut bytes = vec![0; 5 << 20 | 1];
        bytes[0] = b'x';
        let mut read = Hasher::new(DigestSet::default());
        read.update(&bytes);
        assert_eq!(hole.finish(), read.finish());
    }

    #[test]
    fn stored_digests_come_back_and_damage_is_noticed() {
        let temp = tempfile::tempdir().unwrap();
        let dir = Dir::open(temp.path()).unwrap();
        let size = 1200 * MIB + 1;
        let record = DigestRecord {
            size_bytes: size,
            declared: Some("raw".into()),
            digests: Digests {
                whole: format!("md5:{}", "ab".repeat(16)).parse().unwrap(),
                xxh3_per_mib: (0..1201).collect(),
            },
        };
        record.store(&dir, "d").unwrap();
        assert_eq!(DigestRecord::load(&dir, "d").unwrap(), Some(record));
        use std::os::unix::fs::FileExt;
        let file = dir.open_file("d", rustix::fs::OFlags::RDWR).unwrap();
        file.write_all_at(&[1], 5000).unwrap();
        assert_eq!(DigestRecord::load(&dir, "d").unwrap(), None);
    }

    #[test]
    fn a_record_of_the_first_form_is_read() {
        let temp = tempfile::tempdir().unwrap();
        let dir = Dir::open(temp.path()).unwrap();
        let json = br#"{"size_bytes":0,"sha256":"ab","sha512":null,"declared":"raw"}"#;
        let mut page = Page::new();
        page.content_mut()[..8].copy_from_slice(MAGIC);
        page.set_word(8, json.len() as u64);
        page.content_mut()[16..16 + json.len()].copy_from_slice(json);
        page.seal();
        dir.replace("d", page.bytes()).unwrap();
        let record = DigestRecord::load(&dir, "d").unwrap().unwrap();
        assert_eq!(record.digests.whole.to_string(), "sha256:ab");
        assert_eq!(record.declared.as_deref(), Some("raw"));
    }
}
