//! Page-aligned 1 MiB buffers from a pool of fixed size.
//!
//! Why: O_DIRECT wants aligned memory, and memory must not grow with image size or network speed.
//! How: a permit per buffer; who gets none waits, and while it waits the network is not read, so
//! the sender's window closes. That is all the back-pressure there is.
//! Never: hands out more than its capacity, or a buffer that somebody still reads.
//! Start at [`BufPool::take`].

use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use memmap2::MmapMut;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Capacity of a buffer in bytes; also the unit of [`crate::disk`]'s writes.
pub const BLOCK_BYTES: usize = 1 << 20;
/// Alignment of direct writes in bytes: covers every logical block size in use.
pub const PAGE_BYTES: usize = 4096;

/// Buffers whose memory stays when none is in use.
const KEPT: usize = 16;

#[derive(Debug)]
struct Shared {
    free: Mutex<Vec<MmapMut>>,
    permits: Arc<Semaphore>,
    capacity: usize,
    /// Those that no share is sure of, and that one may borrow.
    unshared: Arc<Semaphore>,
}

/// A fixed number of buffers, shared by all transfers of a process.
#[derive(Clone, Debug)]
pub struct BufPool(Arc<Shared>);

impl BufPool {
    /// A pool of `capacity` buffers of [`BLOCK_BYTES`]. Memory is taken when first used, and most of it
    /// given back when none is in use.
    #[must_use]
    pub fn new(capacity: usize) -> Self {
        Self::with_unshared(capacity, 0)
    }

    /// One of `shared` buffers for its users' shares, and `unshared` that a share may borrow for a while.
    #[must_use]
    pub fn with_unshared(shared: usize, unshared: usize) -> Self {
        let capacity = shared + unshared;
        Self(Arc::new(Shared {
            free: Mutex::new(Vec::new()),
            permits: Arc::new(Semaphore::new(capacity)),
            capacity,
            unshared: Arc::new(Semaphore::new(unshared)),
        }))
    }

    /// An empty buffer, as soon as one is free.
    ///
    /// # Errors
    /// The system has no memory to give.
    pub async fn take(&self) -> io::Result<Buf> {
        let permit = Arc::clone(&self.0.permits)
            .acquire_owned()
            .await
            .map_err(|_closed| io::Error::other("buffer pool is closed"))?;
        self.with_permit(permit)
    }

    /// An empty buffer if one is free now.
    ///
    /// # Errors
    /// All are in use (`WouldBlock`), or the system has no memory to give.
    pub fn try_take(&self) -> io::Result<Buf> {
        let permit = Arc::clone(&self.0.permits)
            .try_acquire_owned()
            .map_err(|_none| io::Error::from(io::ErrorKind::WouldBlock))?;
        self.with_permit(permit)
    }

    /// How many buffers are in use.
    #[must_use]
    pub fn in_use(&self) -> usize {
        self.0.capacity - self.0.permits.available_permits()
    }

    fn with_permit(&self, permit: OwnedSemaphorePermit) -> io::Result<Buf> {
        let kept = self.0.free.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let memory = match kept {
            Some(memory) => memory,
            None => MmapMut::map_anon(BLOCK_BYTES)?,
        };
        let pool = Arc::clone(&self.0);
        Ok(Buf { memory: Some(memory), len: 0, pool, permit: Some(permit), _share: None })
    }

    /// A part of the pool for one user: at most `most` of its buffers at a time, and `count` until
    /// [`BufShare::grow`].
    #[must_use]
    pub fn share(&self, count: usize, most: usize) -> BufShare {
        let count = count.clamp(1, most.max(1));
        BufShare {
            pool: self.clone(),
            permits: Arc::new(Semaphore::new(count)),
            count: Arc::new(AtomicUsize::new(count)),
            most: most.max(1),
            borrowed: Arc::default(),
        }
    }
}

/// One user's part of a [`BufPool`]: a slow user can't take the buffers of the others.
#[derive(Clone, Debug)]
pub struct BufShare {
    pool: BufPool,
    permits: Arc<Semaphore>,
    /// Buffers that this user may hold now, and at most.
    count: Arc<AtomicUsize>,
    most: usize,
    borrowed: Arc<Mutex<Option<OwnedSemaphorePermit>>>,
}

impl BufShare {
    /// An empty buffer, as soon as this user may have one more and one is free.
    ///
    /// # Errors
    /// The system has no memory to give.
    pub async fn take(&self) -> io::Result<Buf> {
        self.reserve(1).await?.take().await
    }

    /// An empty buffer if this user may have one more now, and one is free.
    #[must_use]
    pub fn try_take(&self) -> Option<Buf> {
        let share = Arc::clone(&self.permits).try_acquire_owned().ok()?;
        let mut buf = self.pool.try_take().ok()?;
        buf._share = Some(share);
        Some(buf)
    }

    /// The right to `count` buffers (or all of this user's, if that is less), as soon as they may
    /// be had. Whoever works on a piece of a file takes all that it needs before it begins: then
    /// no piece can wait for buffers that are held by pieces behind it.
    ///
    /// # Errors
    /// The pool is closed.
    pub async fn reserve(&self, count: usize) -> io::Result<BufPermits> {
        let count = count.min(self.count.load(Ordering::Relaxed));
        let permits = Arc::clone(&self.permits)
            .acquire_many_owned(u32::try_from(count).unwrap_or(u32::MAX))
            .await
            .map_err(|_closed| io::Error::other("buffer share is closed"))?;
        Ok(BufPermits { pool: self.pool.clone(), permits })
    }

    /// Buffers that this user may hold.
    #[must_use]
    pub fn count(&self) -> usize {
        self.count.load(Ordering::Relaxed)
    }

    /// Buffers that are this user's own, after [`BufShare::grow`].
    #[must_use]
    pub fn most(&self) -> usize {
        self.most
    }

    /// Lets this user hold as many as are its own. Until then it has few, which stay in the
    /// processor's cache.
    pub fn grow(&self) {
        let before = self.count.fetch_max(self.most, Ordering::Relaxed);
        self.permits.add_permits(self.most.saturating_sub(before));
    }

    /// Lets this user, which has grown, hold `count` of them, as far as there are some that are nobody's
    /// own. They go back with the share.
    pub fn borrow(&self, count: usize) {
        let mut borrowed = self.borrowed.lock().unwrap_or_else(PoisonError::into_inner);
        let unshared = &self.pool.0.unshared;
        let more = count.saturating_sub(self.count()).min(unshared.available_permits());
        let Ok(more @ 1..) = u32::try_from(more) else { return };
        let Ok(permits) = Arc::clone(unshared).try_acquire_many_owned(more) else { return };
        match borrowed.as_mut() {
            Some(before) => before.merge(permits),
            None => *borrowed = Some(permits),
        }
        self.count.fetch_add(more as usize, Ordering::Relaxed);
        self.permits.add_permits(more as usize);
    }
}

/// The right to some buffers, which nobody else can take meanwhile.
#[derive(Debug)]
pub struct BufPermits {
    pool: BufPool,
    permits: OwnedSemaphorePermit,
}

impl BufPermits {
    /// How many buffers are left.
    #[must_use]
    pub fn len(&self) -> usize {
        self.permits.num_permits()
    }

    /// True if none is left.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Adds those of `other`.
    pub fn merge(&mut self, other: Self) {
        self.permits.merge(other.permits);
    }

    /// Takes `count` of them out, or as many as there are.
    #[must_use]
    pub fn split(&mut self, count: usize) -> Self {
        let count = count.min(self.len());
        let permits = self.permits.split(count).expect("there are so many");
        Self { pool: self.pool.clone(), permits }
    }

    /// Gives all but `count` back.
    pub fn keep(&mut self, count: usize) {
        drop(self.permits.split(self.len().saturating_sub(count)));
    }

    /// An empty buffer. The shares of all users together fit into the pool, so this is quick.
    ///
    /// # Errors
    /// None is left (`WouldBlock`), or the system has no memory to give.
    pub async fn take(&mut self) -> io::Result<Buf> {
        let share =
            self.permits.split(1).ok_or_else(|| io::Error::from(io::ErrorKind::WouldBlock))?;
        let mut buf = self.pool.take().await?;
        buf._share = Some(share);
        Ok(buf)
    }
}

/// One buffer. Filled by one owner, then shared read-only in an `Arc`; returns to its pool on drop.
#[derive(Debug)]
pub struct Buf {
    memory: Option<MmapMut>,
    len: usize,
    pool: Arc<Shared>,
    permit: Option<OwnedSemaphorePermit>,
    _share: Option<OwnedSemaphorePermit>,
}

impl Buf {
    fn memory(&self) -> &MmapMut {
        self.memory.as_ref().expect("memory leaves only in drop")
    }

    /// The bytes that were put in.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        &self.memory()[..self.len]
    }

    /// The bytes that were put in, and zeroes up to the next page: what a direct write takes.
    /// Only right after [`Buf::pad`].
    #[must_use]
    pub fn padded(&self) -> &[u8] {
        &self.memory()[..self.len.next_multiple_of(PAGE_BYTES)]
    }

    /// Bytes in the buffer.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// True if nothing was put in yet.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// True if nothing more fits below `limit` bytes.
    #[must_use]
    pub fn is_full(&self, limit: usize) -> bool {
        self.len >= limit.min(BLOCK_BYTES)
    }

    /// Copies as much of `bytes` as fits below `limit` bytes in all; returns how much that was.
    pub fn fill(&mut self, bytes: &[u8], limit: usize) -> usize {
        let room = limit.min(BLOCK_BYTES).saturating_sub(self.len);
        let count = room.min(bytes.len());
        let start = self.len;
        let memory = self.memory.as_mut().expect("memory leaves only in drop");
        memory[start..start + count].copy_from_slice(&bytes[..count]);
        self.len += count;
        count
    }

    /// Room for a reader to put bytes into, up to `limit` bytes in all; see [`Buf::set_len`].
    pub fn spare(&mut self, limit: usize) -> &mut [u8] {
        let start = self.len;
        let memory = self.memory.as_mut().expect("memory leaves only in drop");
        &mut memory[start..limit.min(BLOCK_BYTES).max(start)]
    }

    /// Sets how many bytes count, after [`Buf::spare`] was filled or to cut a tail off.
    pub fn set_len(&mut self, len: usize) {
        self.len = len.min(BLOCK_BYTES);
    }

    /// Zeroes the rest of the last page, which a direct write carries along.
    pub fn pad(&mut self) {
        let (start, end) = (self.len, self.len.next_multiple_of(PAGE_BYTES));
        self.memory.as_mut().expect("memory leaves only in drop")[start..end].fill(0);
    }
}

impl Drop for Buf {
    fn drop(&mut self) {
        if let Some(memory) = self.memory.take() {
            let free = || self.pool.free.lock().unwrap_or_else(PoisonError::into_inner);
            free().push(memory);
            // Whoever lets go last sees that none is in use.
            drop(self.permit.take());
            if self.pool.permits.available_permits() == self.pool.capacity {
                let mut list = free();
                let kept = list.len().min(KEPT);
                let rest = list.split_off(kept);
                // What goes back does so without the lock.
                drop(list);
                drop(rest);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_is_borrowed_is_nobody_elses_until_its_share_is_gone() {
        let pool = BufPool::with_unshared(8, 6);
        let (first, second) = (pool.share(2, 4), pool.share(2, 4));
        first.grow();
        first.borrow(3);
        assert_eq!(first.count(), 4);
        first.borrow(8);
        first.borrow(9);
        assert_eq!(first.count(), 9);
        first.grow();
        assert_eq!((first.count(), first.most()), (9, 4));
        second.grow();
        second.borrow(100);
        assert_eq!(second.count(), 5);
        let (nine, five) = (first.reserve(100).await.unwrap(), second.reserve(100).await.unwrap());
        assert_eq!((nine.len(), five.len()), (9, 5));
        assert!(first.try_take().is_none() && second.try_take().is_none());
        drop((nine, first));
        second.borrow(100);
        assert_eq!(second.count(), 10);
    }

    #[tokio::test]
    async fn memory_goes_back_when_no_buffer_is_in_use() {
        let pool = BufPool::new(40);
        let free = || pool.0.free.lock().unwrap().len();
        let mut all = Vec::new();
        for _ in 0..40 {
            all.push(pool.take().await.unwrap());
        }
        let last = all.pop();
        drop(all);
        assert_eq!((pool.in_use(), free()), (1, 39));
        drop(last);
        assert_eq!((pool.in_use(), free()), (0, KEPT));
    }
}
