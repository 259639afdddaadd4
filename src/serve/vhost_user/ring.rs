//! A split queue: which requests wait, and which are answered.
//!
//! Why: its indices are in the guest's memory, and say what the guest likes.
//! How: requests are taken and given back in one order, so that the index of answers also says what
//! is taken next: whoever comes after us, or we after a restart, go on from there.
//! Never: keeps a number of the guest's, or takes more than the queue has.
//! Start at [`Ring::new`]. Spec: virtio 1.2, 2.7.6 to 2.7.10.

use std::sync::atomic::{Ordering, fence};

use super::chain::{BadChain, Chain, DESCRIPTOR_BYTES};
use super::device::{EVENT_IDX, INDIRECT};
use super::limits::MAX_QUEUE_SIZE;
use crate::map::{GuestMemory, GuestSlice, Unreachable};

/// Flags and index before the entries of either ring.
const HEAD_BYTES: usize = 4;
/// Where the index is.
const INDEX: usize = 2;
/// VRING_AVAIL_F_NO_INTERRUPT and VRING_USED_F_NO_NOTIFY.
const NO_NOTICE: u16 = 1;
/// Bytes of an entry of the ring of answers.
const ANSWER_BYTES: usize = 8;

/// Where a queue is, as its frontend says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Number of entries.
    pub size: u16,
    /// Address of the descriptors in the frontend.
    pub descriptors: u64,
    /// Of the ring of requests.
    pub available: u64,
    /// Of the ring of answers.
    pub used: u64,
}

/// Why a queue cannot go on: its guest must set it up again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RingFault {
    /// It has another number of entries than a queue may have.
    #[error("a queue has 1 to {MAX_QUEUE_SIZE} entries, a power of two")]
    Size,
    /// It is where no queue can be.
    #[error("the queue's address is not aligned, or not in the guest's memory")]
    Place,
    /// The index of requests cannot be.
    #[error("the guest says that more requests wait than the queue has entries")]
    Index,
    /// The first descriptor of a request cannot be.
    #[error("a request begins at a descriptor that the queue does not have")]
    Head,
    /// Its memory has gone, or that of a status.
    #[error("the queue's memory cannot be reached any more")]
    Memory,
}

impl From<Unreachable> for RingFault {
    fn from(_: Unreachable) -> Self {
        Self::Memory
    }
}

/// A queue in use.
#[derive(Debug)]
pub(super) struct Ring<'m> {
    memory: &'m GuestMemory,
    descriptors: GuestSlice<'m>,
    available: GuestSlice<'m>,
    used: GuestSlice<'m>,
    size: u16,
    features: u64,
    /// Requests taken so far, modulo 2^16.
    taken: u16,
    /// Requests answered so far.
    answered: u16,
    /// Answers that the guest has been told of, or did not want to be.
    told: u16,
}

impl<'m> Ring<'m> {
    /// The queue at `place`, to go on after its last answer.
    ///
    /// # Errors
    /// [`RingFault`]: it is not all in memory, or cannot be.
    pub(super) fn new(
        memory: &'m GuestMemory,
        place: Place,
        features: u64,
    ) -> Result<Self, RingFault> {
        let Place { size, descriptors, available, used } = place;
        if !size.is_power_of_two() || size > MAX_QUEUE_SIZE {
            return Err(RingFault::Size);
        }
        let entries = usize::from(size);
        let event = if features & EVENT_IDX != 0 { 2 } else { 0 };
        let find = |at: u64, align: u64, len: usize| {
            let found = memory.at_user(at, len as u64).filter(|_| at.is_multiple_of(align));
            found.ok_or(RingFault::Place)
        };
        let used = find(used, 4, HEAD_BYTES + entries * ANSWER_BYTES + event)?;
        let answered = u16::from_le(used.load_u16(INDEX)?);
        Ok(Self {
            memory,
            descriptors: find(descriptors, 16, entries * DESCRIPTOR_BYTES)?,
            available: find(available, 2, HEAD_BYTES + entries * 2 + event)?,
            used,
            size,
            features,
            taken: answered,
            answered,
            told: answered,
        })
    }

    /// Requests answered so far, modulo 2^16: where to go on.
    pub(super) fn answered(&self) -> u16 {
        self.answered
    }

    /// How many requests wait.
    ///
    /// # Errors
    /// [`RingFault::Index`], [`RingFault::Memory`].
    pub(super) fn waiting(&self) -> Result<u16, RingFault> {
        let index = u16::from_le(self.available.load_u16(INDEX)?);
        let waiting = index.wrapping_sub(self.taken);
        if waiting <= self.size { Ok(waiting) } else { Err(RingFault::Index) }
    }

    /// Takes the next request, of which there must be one. What is wrong with it alone is the inner
    /// result.
    ///
    /// # Errors
    /// [`RingFault::Head`], [`RingFault::Memory`].
    pub(super) fn take(&mut self, chain: &mut Chain) -> Result<Result<(), BadChain>, RingFault> {
        let slot = usize::from(self.taken % self.size);
        let head = u16::from_le(self.available.load_u16(HEAD_BYTES + slot * 2)?);
        if head >= self.size {
            return Err(RingFault::Head);
        }
        self.taken = self.taken.wrapping_add(1);
        let indirect = self.features & INDIRECT != 0;
        Ok(chain.follow(self.memory, self.descriptors, head, indirect))
    }

    /// Answers the oldest request that was taken and not answered, which began at `head`;
    /// `len_bytes` were written for it.
    ///
    /// # Errors
    /// [`RingFault::Memory`].
    pub(super) fn answer(&mut self, head: u16, len_bytes: u32) -> Result<(), RingFault> {
        let slot = usize::from(self.answered % self.size);
        let entry = u64::from(len_bytes) << 32 | u64::from(head);
        let at = HEAD_BYTES + slot * ANSWER_BYTES;
        let place = self.used.part(at, ANSWER_BYTES).ok_or(RingFault::Memory)?;
        place.write_from(&entry.to_le_bytes())?;
        self.answered = self.answered.wrapping_add(1);
        self.used.store_u16(INDEX, self.answered.to_le())?;
        Ok(())
    }

    /// Whether the guest wants to be told of the answers since it was last asked.
    ///
    /// # Errors
    /// [`RingFault::Memory`].
    pub(super) fn wants_to_be_told(&mut self) -> Result<bool, RingFault> {
        let before = std::mem::replace(&mut self.told, self.answered);
        if before == self.answered {
            return Ok(false);
        }
        // The index of answers must be seen before the guest's wish is looked at.
        fence(Ordering::SeqCst);
        if self.features & EVENT_IDX == 0 {
            return Ok(u16::from_le(self.available.load_u16(0)?) & NO_NOTICE == 0);
        }
        let at = HEAD_BYTES + usize::from(self.size) * 2;
        let wish = u16::from_le(self.available.load_u16(at)?);
        let since_wish = self.answered.wrapping_sub(wish).wrapping_sub(1);
        Ok(since_wish < self.answered.wrapping_sub(before))
    }

    /// Asks the guest to tell us of its next request; true if one waits already.
    ///
    /// # Errors
    /// As [`waiting`](Self::waiting).
    pub(super) fn ask_to_be_told(&self) -> Result<bool, RingFault> {
        if self.features & EVENT_IDX == 0 {
            self.used.store_u16(0, 0)?;
        } else {
            let at = HEAD_BYTES + usize::from(self.size) * ANSWER_BYTES;
            self.used.store_u16(at, self.taken.to_le())?;
        }
        // The wish must be seen before the index of requests is looked at.
        fence(Ordering::SeqCst);
        Ok(self.waiting()? > 0)
    }

    /// While we look by ourselves. With event indices a wish is over once it was granted.
    ///
    /// # Errors
    /// [`RingFault::Memory`].
    pub(super) fn ask_for_silence(&self) -> Result<(), RingFault> {
        if self.features & EVENT_IDX == 0 {
            self.used.store_u16(0, NO_NOTICE.to_le())?;
        }
        Ok(())
    }
}
