//! Pages of our own small files: 4 KiB, the last four bytes a CRC-32 of the rest.
//!
//! Why: a page is what a disk may tear; a torn one must be known as such.
//! How: [`Page::seal`] before the write, [`Page::check`] after the read.
//! Never: returns the content of a page whose checksum is wrong.
//! Start at [`Page`].

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

/// Bytes of a page on disk.
pub const PAGE_BYTES: usize = 4096;
/// Bytes of a page that carry content; the CRC-32 (little endian) follows them.
pub const CONTENT_BYTES: usize = PAGE_BYTES - 4;

/// The checksum that ends a page with this content.
#[must_use]
pub fn page_crc(content: &[u8]) -> u32 {
    crc32fast::hash(content)
}

/// One page in memory.
#[derive(Clone)]
pub struct Page([u8; PAGE_BYTES]);

impl Page {
    /// A page of zero content, not sealed.
    #[must_use]
    pub fn new() -> Self {
        Self([0; PAGE_BYTES])
    }

    /// The content.
    #[must_use]
    pub fn content(&self) -> &[u8] {
        &self.0[..CONTENT_BYTES]
    }

    /// The content, to be changed before [`Page::write`].
    pub fn content_mut(&mut self) -> &mut [u8] {
        &mut self.0[..CONTENT_BYTES]
    }

    /// Sets the checksum over the content.
    pub fn seal(&mut self) {
        let crc = page_crc(self.content());
        self.0[CONTENT_BYTES..].copy_from_slice(&crc.to_le_bytes());
    }

    /// True if the checksum is that of the content.
    #[must_use]
    pub fn check(&self) -> bool {
        self.0[CONTENT_BYTES..] == page_crc(self.content()).to_le_bytes()
    }

    /// The whole page as it stands on disk.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        &self.0
    }

    /// A little-endian word of the content, at byte `at`; zero outside.
    #[must_use]
    pub fn word(&self, at: usize) -> u64 {
        self.content()
            .get(at..at + 8)
            .and_then(|bytes| bytes.try_into().ok())
            .map_or(0, u64::from_le_bytes)
    }

    /// Sets a little-endian word of the content.
    ///
    /// # Panics
    /// `at + 8` is past the content.
    pub fn set_word(&mut self, at: usize, word: u64) {
        self.content_mut()[at..at + 8].copy_from_slice(&word.to_le_bytes());
    }

    /// Reads page `index` of `file`; `None` if it is past the end, torn or damaged.
    ///
    /// # Errors
    /// The read itself failed.
    pub fn read(file: &File, index: u64) -> io::Result<Option<Self>> {
        let mut page = Self::new();
        match file.read_exact_at(&mut page.0, index.saturating_mul(PAGE_BYTES as u64)) {
            Ok(()) => Ok(page.check().then_some(page)),
            Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// Seals the page and writes it as page `index` of `file`. Not durable before a sync.
    ///
    /// # Errors
    /// The write failed.
    pub fn write(&mut self, file: &File, index: u64) -> io::Result<()> {
        self.seal();
        file.write_all_at(&self.0, index * PAGE_BYTES as u64)
    }

    /// Reads the newer one of the two places of page `index` of a file whose pages come in pairs,
    /// after two others: word 0 is a sequence number, word 8 the index. `None` if neither is valid.
    ///
    /// # Errors
    /// The read itself failed.
    pub fn read_pair(file: &File, index: u64) -> io::Result<Option<Self>> {
        let mut newest: Option<Self> = None;
        for place in 0..2 {
            let page = Self::read(file, 2 + 2 * index + place)?;
            // The last number has no next one; nobody has come there by counting.
            let is_valid = |page: &Self| page.word(8) == index && page.word(0) < u64::MAX;
            let Some(page) = page.filter(is_valid) else { continue };
            if newest.as_ref().is_none_or(|old| old.word(0) < page.word(0)) {
                newest = Some(page);
            }
        }
        Ok(newest)
    }

    /// Writes the page over the older one of the two places of page `index`, as number `sequence`.
    ///
    /// # Errors
    /// The write failed.
    pub fn write_pair(&mut self, file: &File, index: u64, sequence: u64) -> io::Result<()> {
        self.set_word(0, sequence);
        self.set_word(8, index);
        self.write(file, 2 + 2 * index + sequence % 2)
    }
}

impl Default for Page {
    fn default() -> Self {
        Self::new()
    }
}

impl std::fmt::Debug for Page {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Page").field("valid", &self.check()).finish_non_exhaustive()
    }
}
