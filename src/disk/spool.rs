//! What has come of a compressed source, while its copy is filling: `backing.spool`.
//!
//! Why: the state of a decoder is not on the disk. After a crash the stream is decoded anew from
//! here, and only what is not here is fetched again.
//! How: the bytes in their order, behind a record of how many of them are durable and of an xxh3
//! of each MiB. Pages of the record have two places each, as those of the presence file.
//! Never: gives a byte that is not the one that came: what is torn, stale, cut or damaged ends what
//! is here, and the good part before it is used.
//! Start at [`Spool::load`], then [`Spool::read`]; [`super::SpoolEnd`] writes it.
//!
//! ```text
//! page 0            header: magic, version, MiB, JSON {"total_bytes":…,"tag":…}
//! page 1            unused
//! page 2 + 2i + s   MiBs [i*508, (i+1)*508): how many bytes of them are durable, then the xxh3 of
//!                   each, the last of a part of one; place s = sequence number mod 2
//! page 2 + 2n       the bytes, where n pages can speak for all of the source
//! ```

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{FallocateFlags, OFlags};
use rustix::io::Errno;

use super::digests::xxh3_of;
use super::page::{CONTENT_BYTES, PAGE_BYTES, Page};
use super::presence::Version;
use super::{Dir, DiskError};
use crate::units::MIB;

const MAGIC: &[u8; 8] = b"BEDSPOL1";
/// Where the count of durable bytes is in a page, after sequence number and index.
const COUNT_AT: usize = 16;
/// Where its digests begin.
const DIGESTS_AT: usize = 24;
const DIGESTS_PER_PAGE: usize = 508;
/// Bytes of the source that a page speaks for.
pub(super) const PAGE_SPAN: u64 = DIGESTS_PER_PAGE as u64 * MIB;

const _: () = assert!(DIGESTS_AT + DIGESTS_PER_PAGE * 8 <= CONTENT_BYTES);

/// What is durable of a compressed source.
#[derive(Debug)]
pub struct Spool {
    pub(super) file: Arc<File>,
    pub(super) path: PathBuf,
    version: Version,
    total_bytes: u64,
    pub(super) record: Record,
}

/// How much is here, and the digests that prove it.
#[derive(Debug, Default)]
pub(super) struct Record {
    pub(super) len_bytes: u64,
    /// xxh3 of each MiB; the last may be of a part of one.
    pub(super) digests: Vec<u64>,
    /// Of each page, that of its last write.
    sequence: Vec<u64>,
}

/// Pages that can speak for so many bytes.
fn pages_of(total_bytes: u64) -> u64 {
    total_bytes.div_ceil(PAGE_SPAN)
}

/// Where the source's first byte is in the file.
pub(super) fn data_at(total_bytes: u64) -> u64 {
    (2 + 2 * pages_of(total_bytes)) * PAGE_BYTES as u64
}

impl Spool {
    /// An empty spool for a source of this version, which has a length; durable when this returns.
    ///
    /// # Errors
    /// [`DiskError::Io`], [`DiskError::Full`], or a version that cannot be kept.
    pub(super) fn create(dir: &Dir, name: &str, version: Version) -> Result<Self, DiskError> {
        let path = dir.join(name);
        let header = version.header(MAGIC, MIB);
        let (Some(mut page), Some(total_bytes)) = (header, version.total_bytes) else {
            let why = "the source's version is too long, or has no length".to_owned();
            return Err(DiskError::Damaged { path, field: "spool header", why });
        };
        dir.remove_file(name)?;
        let file = dir.open_file(name, OFlags::RDWR | OFlags::CREATE | OFlags::EXCL)?;
        page.write(&file, 0).map_err(|e| DiskError::write(&path, 0, e))?;
        // On a disk that fills up meanwhile, what is durable can still be recorded.
        match rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, data_at(total_bytes)) {
            Ok(()) | Err(Errno::OPNOTSUPP | Errno::NOSYS) => {}
            Err(e) => return Err(DiskError::write(&path, 0, e.into())),
        }
        file.sync_all().map_err(|e| DiskError::io("sync", &path, e))?;
        dir.sync()?;
        let (file, record) = (Arc::new(file), Record::default());
        Ok(Self { file, path, version, total_bytes, record })
    }

    /// The spool of an earlier run; `None` if there is none that can be believed, or it is empty.
    ///
    /// # Errors
    /// [`DiskError::Io`] if it can't be read. Damage is no error: those bytes are fetched again.
    pub fn load(dir: &Dir, name: &str) -> Result<Option<Self>, DiskError> {
        let path = dir.join(name);
        let Some(file) = dir.try_open_file(name, OFlags::RDWR)? else { return Ok(None) };
        let failed = |e| DiskError::io("read", &path, e);
        let Some(header) = Page::read(&file, 0).map_err(failed)? else { return Ok(None) };
        let version = Version::of_header(&header, MAGIC, MIB);
        let with_length = version.and_then(|version| version.total_bytes.map(|len| (len, version)));
        let Some((total_bytes, version)) = with_length else { return Ok(None) };
        let record = Record::load(&file, total_bytes).map_err(failed)?;
        let spool = Self { file: Arc::new(file), path, version, total_bytes, record };
        Ok(Some(spool).filter(|spool| spool.len_bytes() > 0))
    }

    /// The version of the source that the bytes are of, with the source's own length.
    #[must_use]
    pub fn version(&self) -> &Version {
        &self.version
    }

    /// Length of the whole source.
    #[must_use]
    pub fn total_bytes(&self) -> u64 {
        self.total_bytes
    }

    /// How many bytes, from the first on, are said to be here.
    #[must_use]
    pub fn len_bytes(&self) -> u64 {
        self.record.len_bytes
    }

    /// The bytes of the MiB that begins at `at`, as far as they are here. `None` if they are not
    /// those that came; [`Spool::cut`] there then.
    #[must_use]
    pub fn read(&self, at: u64) -> Option<Vec<u8>> {
        let len = usize::try_from(self.len_bytes().checked_sub(at)?.min(MIB)).ok()?;
        let digest = *self.record.digests.get(usize::try_from(at / MIB).ok()?)?;
        read_checked(&self.file, &self.path, data_at(self.total_bytes) + at, len, digest)
    }

    /// Gives up what is here from `at` on, a multiple of a MiB.
    pub fn cut(&mut self, at: u64) {
        let whole = at.min(self.len_bytes()) / MIB;
        self.record.len_bytes = whole * MIB;
        self.record.digests.truncate(usize::try_from(whole).unwrap_or(usize::MAX));
    }
}

/// Reads `len` bytes at `from` of the file of a spool; `None` if they have another digest.
pub(super) fn read_checked(
    file: &File,
    path: &Path,
    from: u64,
    len: usize,
    digest: u64,
) -> Option<Vec<u8>> {
    let mut bytes = vec![0; len];
    if let Err(error) = file.read_exact_at(&mut bytes, from) {
        tracing::warn!(path = %path.display(), from, %error, "a spool cannot be read");
        return None;
    }
    // It is read once: others have more use for the memory.
    let many = std::num::NonZeroU64::new(len as u64);
    let _ = rustix::fs::fadvise(file, from, many, rustix::fs::Advice::DontNeed);
    (xxh3_of(&bytes) == digest).then_some(bytes)
}

impl Record {
    /// Reads all pages; those after the first that is not full count only by their number.
    fn load(file: &File, total_bytes: u64) -> std::io::Result<Self> {
        let (mut record, mut ended) = (Self::default(), false);
        for index in 0..pages_of(total_bytes) {
            let Some(page) = Page::read_pair(file, index)? else { break };
            record.sequence.push(page.word(0));
            let (count, most) = (page.word(COUNT_AT), total_bytes - index * PAGE_SPAN);
            if ended || count > most.min(PAGE_SPAN) {
                ended = true;
                continue;
            }
            let digests = usize::try_from(count.div_ceil(MIB)).unwrap_or(0);
            record.digests.extend((0..digests).map(|i| page.word(DIGESTS_AT + i * 8)));
            record.len_bytes += count;
            ended = count < PAGE_SPAN;
        }
        Ok(record)
    }

    /// Writes the pages that speak for what is here from `from` on. Not durable before a sync.
    pub(super) fn store(&mut self, file: &File, from: u64) -> std::io::Result<()> {
        for index in from / PAGE_SPAN..pages_of(self.len_bytes) {
            let (first, place) = (index * PAGE_SPAN, usize::try_from(index).unwrap_or(usize::MAX));
            let mut page = Page::new();
            page.set_word(COUNT_AT, (self.len_bytes - first).min(PAGE_SPAN));
            let digests = self.digests.iter().skip(place * DIGESTS_PER_PAGE);
            for (i, digest) in digests.take(DIGESTS_PER_PAGE).enumerate() {
                page.set_word(DIGESTS_AT + i * 8, *digest);
            }
            if self.sequence.len() <= place {
                self.sequence.resize(place + 1, 0);
            }
            let sequence = self.sequence[place] + 1;
            page.write_pair(file, index, sequence)?;
            self.sequence[place] = sequence;
        }
        Ok(())
    }
}

#[cfg(test)]
#[path = "spool_tests.rs"]
mod tests;
