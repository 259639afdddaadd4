//! What the bytes of an image are read from.
//!
//! Why: tables and compressed clusters are read from files that are complete, and from files that
//! are still arriving; the code that judges them must not care.
//! How: a trait with the few things that it asks. A [`LayerFile`] that is arriving makes its reader
//! wait until the bytes are here; [`Impatient`] says instead what is missing.
//! Never: gives a byte that is not the file's.
//! Start at [`Source`].

use std::fmt;
use std::fs::File;
use std::io;
use std::num::NonZeroU64;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::sync::{Arc, OnceLock};

use rustix::fs::Advice;

use crate::disk::{Arriving, Sealed, Waits};

/// Bytes at positions, of a known number.
pub trait Source: fmt::Debug + Send + Sync {
    /// How many there are.
    ///
    /// # Errors
    /// Those of stat.
    fn len_bytes(&self) -> io::Result<u64>;

    /// How many of them take room on the disk, as far as they are there.
    ///
    /// # Errors
    /// Those of stat.
    fn allocated_bytes(&self) -> io::Result<u64>;

    /// Fills `bytes` from position `at` on.
    ///
    /// # Errors
    /// `UnexpectedEof` past the end, and those of pread.
    fn read_exact(&self, bytes: &mut [u8], at: u64) -> io::Result<()>;

    /// Says that a range will be read soon. A hint.
    fn will_read(&self, at: u64, len_bytes: u64);

    /// True if reading a range takes no longer than the disk does.
    fn is_here(&self, _at: u64, _len_bytes: u64) -> bool {
        true
    }

    /// As far as there are bytes: how many of `bytes` were filled from `at` on.
    ///
    /// # Errors
    /// Those of [`read_exact`](Self::read_exact).
    fn read_some(&self, bytes: &mut [u8], at: u64) -> io::Result<usize> {
        let left = self.len_bytes()?.saturating_sub(at);
        let len = usize::try_from(left).unwrap_or(bytes.len()).min(bytes.len());
        let (bytes, _) = bytes.split_at_mut(len);
        self.read_exact(bytes, at).map(|()| len)
    }
}

impl Source for File {
    fn len_bytes(&self) -> io::Result<u64> {
        self.metadata().map(|meta| meta.len())
    }

    fn allocated_bytes(&self) -> io::Result<u64> {
        self.metadata().map(|meta| meta.blocks().saturating_mul(512))
    }

    fn read_exact(&self, bytes: &mut [u8], at: u64) -> io::Result<()> {
        self.read_exact_at(bytes, at)
    }

    fn will_read(&self, at: u64, len_bytes: u64) {
        let _hint_only =
            rustix::fs::fadvise(self, at, NonZeroU64::new(len_bytes), Advice::WillNeed);
    }
}

/// The file of a layer of a view.
#[derive(Debug)]
pub enum LayerFile {
    /// Complete.
    Sealed(Sealed),
    /// Still arriving when it was opened.
    Arriving(Arc<Arriving>),
}

impl From<Sealed> for LayerFile {
    fn from(sealed: Sealed) -> Self {
        Self::Sealed(sealed)
    }
}

impl From<Arc<Arriving>> for LayerFile {
    fn from(arriving: Arc<Arriving>) -> Self {
        Self::Arriving(arriving)
    }
}

impl LayerFile {
    /// The file; of one that is [arriving](Self::arriving) only what is here may be read.
    pub(super) fn file(&self) -> &File {
        match self {
            Self::Sealed(sealed) => sealed.file(),
            Self::Arriving(arriving) => arriving.file(),
        }
    }

    /// Where it was opened, for messages.
    pub(super) fn path(&self) -> &Path {
        match self {
            Self::Sealed(sealed) => sealed.path(),
            Self::Arriving(arriving) => arriving.path(),
        }
    }

    /// Length of the whole file in bytes.
    pub(super) fn len_bytes(&self) -> u64 {
        match self {
            Self::Sealed(sealed) => sealed.len_bytes(),
            Self::Arriving(arriving) => arriving.len_bytes(),
        }
    }

    /// How often readers of one that was arriving had to wait.
    pub(super) fn waits(&self) -> Option<Waits> {
        match self {
            Self::Sealed(_) => None,
            Self::Arriving(arriving) => Some(arriving.waits()),
        }
    }

    /// While it is not complete.
    #[inline]
    pub(super) fn arriving(&self) -> Option<&Arriving> {
        match self {
            Self::Sealed(_) => None,
            Self::Arriving(arriving) => Some(&**arriving).filter(|arriving| !arriving.is_whole()),
        }
    }
}

impl Source for LayerFile {
    fn len_bytes(&self) -> io::Result<u64> {
        Ok(self.len_bytes())
    }

    fn allocated_bytes(&self) -> io::Result<u64> {
        Source::allocated_bytes(self.file())
    }

    fn read_exact(&self, bytes: &mut [u8], at: u64) -> io::Result<()> {
        match self.arriving() {
            Some(arriving) => arriving.read_exact_at(bytes, at),
            None => self.file().read_exact_at(bytes, at),
        }
    }

    fn is_here(&self, at: u64, len_bytes: u64) -> bool {
        self.arriving().is_none_or(|arriving| arriving.is_here(at, len_bytes))
    }

    fn will_read(&self, at: u64, len_bytes: u64) {
        match self.arriving() {
            Some(arriving) => arriving.will_read(at, len_bytes),
            None => Source::will_read(self.file(), at, len_bytes),
        }
    }
}

/// How what is not here is asked for by somebody who does not wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Asking {
    /// A reader wants it.
    Now,
    /// A reader may want it later.
    Later,
}

impl Asking {
    /// Asks for a range.
    pub(super) fn ask(self, arriving: &Arriving, at: u64, len_bytes: u64) {
        match self {
            Self::Now => arriving.will_read(at, len_bytes),
            Self::Later => arriving.foresee(at, len_bytes),
        }
    }
}

/// A layer's file for somebody who does not wait: what is not here is asked for, and noted.
#[derive(Debug)]
pub(super) struct Impatient<'a> {
    file: &'a LayerFile,
    asking: Asking,
    /// The first range that was missing: where it begins, and its length.
    missing: OnceLock<(u64, u64)>,
}

impl<'a> Impatient<'a> {
    pub(super) fn new(file: &'a LayerFile, asking: Asking) -> Self {
        Self { file, asking, missing: OnceLock::new() }
    }

    /// What was missing, if anything was.
    pub(super) fn missing(&self) -> Option<(u64, u64)> {
        self.missing.get().copied()
    }
}

impl Source for Impatient<'_> {
    fn len_bytes(&self) -> io::Result<u64> {
        Ok(self.file.len_bytes())
    }

    fn allocated_bytes(&self) -> io::Result<u64> {
        self.file.allocated_bytes()
    }

    fn read_exact(&self, bytes: &mut [u8], at: u64) -> io::Result<()> {
        let len_bytes = bytes.len() as u64;
        match self.file.arriving() {
            Some(arriving) if !arriving.is_here(at, len_bytes) => {
                self.asking.ask(arriving, at, len_bytes);
                self.missing.get_or_init(|| (at, len_bytes));
                Err(io::ErrorKind::WouldBlock.into())
            }
            _here => self.file.read_exact(bytes, at),
        }
    }

    fn is_here(&self, at: u64, len_bytes: u64) -> bool {
        self.file.is_here(at, len_bytes)
    }

    fn will_read(&self, at: u64, len_bytes: u64) {
        match self.file.arriving() {
            Some(arriving) => self.asking.ask(arriving, at, len_bytes),
            None => self.file.will_read(at, len_bytes),
        }
    }
}
