//! Room on the disk: what is free, and what running transfers were promised.
//!
//! Why: a transfer that cannot fit must be refused before its first byte, also when three start
//! at once.
//! How: a transfer reserves its missing bytes; what it writes leaves the reservation as the file
//! system's own count of free blocks goes down.
//! Never: allocates the file ahead (that would undo its holes).
//! Start at [`Space::reserve`].

use std::collections::HashMap;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use super::{Dir, DiskError};

/// How full a disk is, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Usage {
    /// Size of the file system.
    pub total: u64,
    /// What an unprivileged writer may still take.
    pub free: u64,
    /// What running transfers were promised and have not written yet.
    pub reserved: u64,
}

#[derive(Debug, Default)]
struct Ledger {
    next_id: u64,
    promised: HashMap<u64, u64>,
}

/// The room on one file system.
#[derive(Clone, Debug)]
pub struct Space {
    fd: Arc<OwnedFd>,
    path: PathBuf,
    ledger: Arc<Mutex<Ledger>>,
}

impl Space {
    /// The room on the file system of `dir`.
    ///
    /// # Errors
    /// The process is out of descriptors.
    pub fn of(dir: &Dir) -> Result<Self, DiskError> {
        let fd = dir
            .fd()
            .try_clone_to_owned()
            .map_err(|e| DiskError::io("duplicate descriptor of", dir.path(), e))?;
        Ok(Self { fd: Arc::new(fd), path: dir.path().to_owned(), ledger: Arc::default() })
    }

    /// How full the disk is now.
    ///
    /// # Errors
    /// [`DiskError::Io`].
    pub fn usage(&self) -> Result<Usage, DiskError> {
        let stat = rustix::fs::fstatvfs(self.fd.as_fd())
            .map_err(|e| DiskError::io("ask the free space of", &self.path, e.into()))?;
        let ledger = self.ledger.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(Usage {
            total: stat.f_blocks.saturating_mul(stat.f_frsize),
            free: stat.f_bavail.saturating_mul(stat.f_frsize),
            reserved: ledger.promised.values().sum(),
        })
    }

    /// Promises `need_bytes` to the caller until the reservation is dropped.
    ///
    /// # Errors
    /// [`DiskError::NoSpace`] if that much is not free beyond what others were promised.
    pub fn reserve(&self, need_bytes: u64) -> Result<Reservation, DiskError> {
        let id = {
            let mut ledger = self.ledger.lock().unwrap_or_else(PoisonError::into_inner);
            ledger.next_id += 1;
            ledger.next_id
        };
        self.promise(id, need_bytes)?;
        Ok(Reservation { id, space: self.clone(), counts_zeroes: true })
    }

    /// As [`Space::reserve`], for a caller who knows which ranges are zero and counts only the
    /// others; see [`Reservation::extend`].
    ///
    /// # Errors
    /// As [`Space::reserve`].
    pub fn reserve_data(&self, need_bytes: u64) -> Result<Reservation, DiskError> {
        let mut reserved = self.reserve(need_bytes)?;
        reserved.counts_zeroes = false;
        Ok(reserved)
    }

    /// Adds `need_bytes` to what `id` was promised.
    fn promise(&self, id: u64, need_bytes: u64) -> Result<(), DiskError> {
        let usage = self.usage()?;
        let mut ledger = self.ledger.lock().unwrap_or_else(PoisonError::into_inner);
        let reserved = ledger.promised.values().sum::<u64>();
        if need_bytes > usage.free.saturating_sub(reserved) {
            let path = self.path.clone();
            return Err(DiskError::NoSpace { path, need: need_bytes, free: usage.free, reserved });
        }
        *ledger.promised.entry(id).or_default() += need_bytes;
        Ok(())
    }
}

/// Room promised to one transfer.
#[derive(Debug)]
pub struct Reservation {
    id: u64,
    space: Space,
    counts_zeroes: bool,
}

impl Reservation {
    /// Promises `need_bytes` more.
    ///
    /// # Errors
    /// As [`Space::reserve`]; what was promised before stays.
    pub fn extend(&self, need_bytes: u64) -> Result<(), DiskError> {
        self.space.promise(self.id, need_bytes)
    }

    /// Notes that `bytes` were written, or (`zero`) turned out to be a hole.
    pub fn consume(&self, bytes: u64, zero: bool) {
        if zero && !self.counts_zeroes {
            return;
        }
        let mut ledger = self.space.ledger.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(left) = ledger.promised.get_mut(&self.id) {
            *left = left.saturating_sub(bytes);
        }
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        let mut ledger = self.space.ledger.lock().unwrap_or_else(PoisonError::into_inner);
        ledger.promised.remove(&self.id);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_promise_counts_until_it_is_written_or_dropped() {
        let space = Space::of(&Dir::open(&std::env::temp_dir()).unwrap()).unwrap();
        let all = space.usage().unwrap().free;
        let first = space.reserve(1000).unwrap();
        assert_eq!(space.usage().unwrap().reserved, 1000);
        assert!(matches!(space.reserve(all.saturating_mul(2)), Err(DiskError::NoSpace { .. })));
        first.consume(400, false);
        assert_eq!(space.usage().unwrap().reserved, 600);
        first.consume(10_000, true);
        assert_eq!(space.usage().unwrap().reserved, 0);
        drop(first);
        assert_eq!(space.usage().unwrap().reserved, 0);
    }
}
