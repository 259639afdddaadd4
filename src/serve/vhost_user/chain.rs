//! The descriptors of one request.
//!
//! Why: a guest writes them, and may write anything.
//! How: a chain is followed once, each descriptor copied before it is looked at, into two lists of
//! addresses: what we read, and what we write. Counts and order are checked; addresses are not: they
//! are when they are used.
//! Never: follows more descriptors than a request may have, so that a loop ends.
//! Start at [`Chain::follow`]. Spec: virtio 1.2, 2.7.5.

use virtio_bindings::bindings::virtio_ring;
use zerocopy::byteorder::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes};

use super::limits::MAX_DESCRIPTORS;
use crate::map::{GuestMemory, GuestSlice, Unreachable};

/// Bytes of a descriptor.
pub(super) const DESCRIPTOR_BYTES: usize = 16;

const NEXT: u16 = flag(virtio_ring::VRING_DESC_F_NEXT);
const WRITE: u16 = flag(virtio_ring::VRING_DESC_F_WRITE);
const INDIRECT: u16 = flag(virtio_ring::VRING_DESC_F_INDIRECT);

#[expect(clippy::cast_possible_truncation, reason = "the flags of a descriptor have 16 bits")]
const fn flag(value: u32) -> u16 {
    value as u16
}

/// `struct virtq_desc`.
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
struct Descriptor {
    at: U64,
    len_bytes: U32,
    flags: U16,
    next: U16,
}

const _: () = assert!(size_of::<Descriptor>() == DESCRIPTOR_BYTES);

/// A buffer of the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Segment {
    /// Its address in the guest.
    pub(super) at: u64,
    /// Its length in bytes, at least 1.
    pub(super) len_bytes: u32,
}

/// Why a chain is no request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum BadChain {
    /// A rule is broken.
    Rule(&'static str),
    /// A table of descriptors is not in memory.
    Unreachable,
}

impl From<Unreachable> for BadChain {
    fn from(_: Unreachable) -> Self {
        Self::Unreachable
    }
}

/// The buffers of one request, used again for the next.
#[derive(Debug, Default)]
pub(super) struct Chain {
    /// Its first descriptor, by which it is given back.
    pub(super) head: u16,
    /// What the guest wrote for us.
    pub(super) readable: Vec<Segment>,
    /// Where we write.
    pub(super) writable: Vec<Segment>,
}

/// Where descriptors are.
enum Table<'m> {
    /// The queue's own.
    Own(GuestSlice<'m>),
    /// A guest address of `count` descriptors.
    Indirect { at: u64, count: usize },
}

impl Chain {
    /// Takes in the chain that begins at `head` of the queue's table `own`.
    ///
    /// # Errors
    /// [`BadChain`]; what was found so far is kept, and is not to be used.
    pub(super) fn follow(
        &mut self,
        memory: &GuestMemory,
        own: GuestSlice<'_>,
        head: u16,
        indirect: bool,
    ) -> Result<(), BadChain> {
        self.head = head;
        self.readable.clear();
        self.writable.clear();
        let mut table = Table::Own(own);
        let mut next = usize::from(head);
        for _ in 0..MAX_DESCRIPTORS {
            let found = table.get(memory, next)?;
            let flags = found.flags.get();
            if flags & INDIRECT == 0 {
                self.add(&found)?;
                if flags & NEXT == 0 {
                    return Ok(());
                }
                next = usize::from(found.next.get());
                continue;
            }
            if !indirect || flags & NEXT != 0 || matches!(table, Table::Indirect { .. }) {
                return Err(BadChain::Rule("an indirect table where none may be"));
            }
            let len = usize::try_from(found.len_bytes.get()).unwrap_or(usize::MAX);
            let count = len / DESCRIPTOR_BYTES;
            if len % DESCRIPTOR_BYTES != 0 || !(1..=MAX_DESCRIPTORS).contains(&count) {
                return Err(BadChain::Rule("an indirect table of no such length"));
            }
            table = Table::Indirect { at: found.at.get(), count };
            next = 0;
        }
        Err(BadChain::Rule("too many descriptors, or a loop of them"))
    }

    fn add(&mut self, found: &Descriptor) -> Result<(), BadChain> {
        let segment = Segment { at: found.at.get(), len_bytes: found.len_bytes.get() };
        let is_writable = found.flags.get() & WRITE != 0;
        if !is_writable && !self.writable.is_empty() {
            return Err(BadChain::Rule("a buffer to read after one to write"));
        }
        // An empty one says nothing, and what ends at the last address has none after it.
        if segment.len_bytes == 0 {
            return Ok(());
        }
        if segment.at.checked_add(u64::from(segment.len_bytes)).is_none() {
            return Err(BadChain::Rule("a buffer that ends after the last address"));
        }
        let list = if is_writable { &mut self.writable } else { &mut self.readable };
        list.push(segment);
        Ok(())
    }
}

impl Table<'_> {
    fn get(&self, memory: &GuestMemory, index: usize) -> Result<Descriptor, BadChain> {
        let mut bytes = [0; DESCRIPTOR_BYTES];
        match *self {
            Self::Own(own) => {
                let place = own.part(index.saturating_mul(DESCRIPTOR_BYTES), DESCRIPTOR_BYTES);
                let place = place.ok_or(BadChain::Rule("a descriptor outside the table"))?;
                place.read_into(&mut bytes)?;
            }
            Self::Indirect { count, .. } if index >= count => {
                return Err(BadChain::Rule("a descriptor outside an indirect table"));
            }
            Self::Indirect { at, .. } => {
                let at = at.checked_add((index * DESCRIPTOR_BYTES) as u64);
                memory.read(&mut bytes, at.ok_or(BadChain::Unreachable)?)?;
            }
        }
        Descriptor::read_from_bytes(&bytes).map_err(|_| BadChain::Rule("no descriptor"))
    }
}
