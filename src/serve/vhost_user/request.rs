//! What a request asks, and its answer.
//!
//! Why: bytes go from the image into the guest's memory with no stop between.
//! How: a chain is parsed into a [`Request`]; a read walks the view's runs and fills the guest's
//! buffers in order: stored bytes by a guarded copy from the map or by one preadv, zeroes by a fill,
//! compressed clusters from the decoded ones.
//! Never: writes into an image; reads past its end; gives up a queue for one request.
//! Start at [`Disk::parse`] and [`Disk::serve`]. Spec: virtio 1.2, 5.2.6.

use std::sync::atomic::{AtomicBool, Ordering};

use virtio_bindings::bindings::virtio_blk as blk;
use zerocopy::byteorder::little_endian::{U32, U64};
use zerocopy::{FromBytes, IntoBytes};

use super::chain::{Chain, Segment};
use super::device::{Device, SECTOR_BYTES};
use super::limits::MAX_READ_BYTES;
use crate::image::{ReadError, RunKind, View};
use crate::map::{GuestMemory, GuestSlice, Unreachable};
use crate::serve::Export;
use crate::units::GuestOffset;

/// Buffers of the guest that one read of the file fills.
const MAX_SLICES: usize = 256;
/// Bytes after which a queue that is to stop is asked for, in the middle of a request.
const STEP_BYTES: u64 = 8 << 20;
/// Runs of a request that the kernel is told of in advance.
const MAX_HINTED_RUNS: usize = 16;

/// `struct virtio_blk_outhdr`.
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes)]
#[repr(C)]
struct Head {
    kind: U32,
    later: U32,
    sector: U64,
}

/// How a request ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Status {
    Ok,
    IoError,
    Unsupported,
}

impl Status {
    fn byte(self) -> u8 {
        let status = match self {
            Self::Ok => blk::VIRTIO_BLK_S_OK,
            Self::IoError => blk::VIRTIO_BLK_S_IOERR,
            Self::Unsupported => blk::VIRTIO_BLK_S_UNSUPP,
        };
        u8::try_from(status).unwrap_or(u8::MAX)
    }
}

/// What a chain asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Request {
    /// Bytes of the disk; all inside its sectors.
    Read { at: u64, len_bytes: u64 },
    /// Its serial number, in as many bytes.
    Identify { len_bytes: u64 },
    /// Nothing to do, or nothing that is done here.
    Ended(Status),
    /// No place for a status: not even a refusal can be said.
    Mute,
}

/// What a request came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Served {
    /// Bytes of the guest's memory that were written, the status included.
    pub(super) written_bytes: u32,
    /// Bytes of the image among them.
    pub(super) image_bytes: u64,
    /// It was answered with an error.
    pub(super) failed: bool,
}

/// One disk of one VM.
#[derive(Clone, Copy, Debug)]
pub(super) struct Disk<'a> {
    pub(super) export: &'a Export,
    pub(super) device: &'a Device,
    pub(super) memory: &'a GuestMemory,
    /// Once this is set, no request is begun and a long one is left.
    pub(super) stop: &'a AtomicBool,
}

/// Why a request is not answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Unserved {
    /// Its queue is to stop; whoever goes on with the queue does the request again.
    Stopped,
    /// The status cannot be written, so that the guest would never know.
    NoStatus,
}

/// Why bytes did not get to the guest.
enum Failure {
    Image(ReadError),
    Memory,
    Stopped,
}

impl From<Unreachable> for Failure {
    fn from(_: Unreachable) -> Self {
        Self::Memory
    }
}

impl From<ReadError> for Failure {
    fn from(error: ReadError) -> Self {
        Self::Image(error)
    }
}

impl<'a> Disk<'a> {
    fn view(&self) -> &'a View {
        self.export.view()
    }

    /// What `chain` asks for.
    pub(super) fn parse(&self, chain: &Chain) -> Request {
        let room: u64 = chain.writable.iter().map(|s| u64::from(s.len_bytes)).sum();
        let Some(len_bytes) = room.checked_sub(1) else { return Request::Mute };
        let Some(head) = self.head(&chain.readable) else {
            return Request::Ended(Status::IoError);
        };
        match head.kind.get() {
            blk::VIRTIO_BLK_T_IN => self.read_request(head.sector.get(), len_bytes),
            blk::VIRTIO_BLK_T_GET_ID => Request::Identify { len_bytes },
            // What has been written is on the disk: nothing is ever written.
            blk::VIRTIO_BLK_T_FLUSH => Request::Ended(Status::Ok),
            blk::VIRTIO_BLK_T_OUT => Request::Ended(Status::IoError),
            _discard_and_what_is_not_known => Request::Ended(Status::Unsupported),
        }
    }

    fn read_request(&self, sector: u64, len_bytes: u64) -> Request {
        let sectors = len_bytes / SECTOR_BYTES;
        let fits = sector.checked_add(sectors).is_some_and(|e| e <= self.device.capacity_sectors());
        if !fits || !len_bytes.is_multiple_of(SECTOR_BYTES) || len_bytes > MAX_READ_BYTES {
            return Request::Ended(Status::IoError);
        }
        Request::Read { at: sector * SECTOR_BYTES, len_bytes }
    }

    fn head(&self, readable: &[Segment]) -> Option<Head> {
        let mut head = Head::default();
        let mut rest = head.as_mut_bytes();
        for segment in readable {
            let len = usize::try_from(segment.len_bytes).unwrap_or(usize::MAX).min(rest.len());
            let (part, after) = rest.split_at_mut(len);
            self.memory.read(part, segment.at).ok()?;
            rest = after;
            if rest.is_empty() {
                return Some(head);
            }
        }
        None
    }

    /// Does what is asked, and writes the status.
    ///
    /// # Errors
    /// [`Unserved`]: the request is not to be answered.
    pub(super) fn serve(&self, chain: &Chain, request: Request) -> Result<Served, Unserved> {
        let (status, data_bytes, image_bytes) = match request {
            Request::Mute => {
                return Ok(Served { written_bytes: 0, image_bytes: 0, failed: true });
            }
            Request::Ended(status) => (status, 0, 0),
            Request::Identify { len_bytes } => {
                let serial = self.device.serial();
                let len = len_bytes.min(serial.len() as u64);
                let written = Target::new(chain, len).write(self.memory, serial);
                if written.is_ok() { (Status::Ok, len, 0) } else { (Status::IoError, 0, 0) }
            }
            Request::Read { at, len_bytes } => match self.read(at, Target::new(chain, len_bytes)) {
                Ok(()) => (Status::Ok, len_bytes, len_bytes),
                Err(Failure::Stopped) => return Err(Unserved::Stopped),
                Err(failure) => {
                    self.say(at, len_bytes, &failure);
                    (Status::IoError, 0, 0)
                }
            },
        };
        let last = chain.writable.last().ok_or(Unserved::NoStatus)?;
        let at = last.at + u64::from(last.len_bytes - 1);
        let place = self.memory.at_guest(at, 1).ok_or(Unserved::NoStatus)?;
        place.write_from(&[status.byte()]).map_err(|Unreachable| Unserved::NoStatus)?;
        let written_bytes = u32::try_from(data_bytes + 1).unwrap_or(u32::MAX);
        Ok(Served { written_bytes, image_bytes, failed: status != Status::Ok })
    }

    fn say(&self, at: u64, len_bytes: u64, failure: &Failure) {
        let export = self.export.name();
        match failure {
            Failure::Image(error) => {
                let error = error as &dyn std::error::Error;
                tracing::warn!(export, at, len_bytes, error, "a VM's read failed");
            }
            Failure::Memory => tracing::warn!(
                export,
                at,
                len_bytes,
                "a VM gave a buffer that is not in its memory"
            ),
            Failure::Stopped => {}
        }
    }

    /// Fills `target` with the disk from `at` on.
    fn read(&self, at: u64, mut target: Target<'_>) -> Result<(), Failure> {
        let (view, mut at, mut prepared) = (self.view(), GuestOffset(at), GuestOffset(0));
        while target.left > 0 {
            if self.stop.load(Ordering::Relaxed) {
                return Err(Failure::Stopped);
            }
            let left = target.left.min(STEP_BYTES);
            let inside = left.min(view.size_bytes().saturating_sub(at.0));
            if inside == 0 {
                // The end of the last sector, which the image does not fill.
                target.each(self.memory, left, |slice, _| slice.fill_with_zeroes())?;
                at = at.advance(left);
                continue;
            }
            if view.is_arriving() {
                self.bring(at, inside)?;
            }
            let run = view.run_at(at, inside)?;
            match run.kind {
                RunKind::Zero => {
                    target.each(self.memory, run.len_bytes, |s, _| s.fill_with_zeroes())?;
                }
                RunKind::Data(mut stored) => {
                    let mut rest = run.len_bytes;
                    while rest > 0 {
                        let mut slices = Slices::default();
                        let len = target.take(self.memory, rest, &mut slices)?;
                        view.read_to_guest(stored, slices.as_slice())?;
                        (stored, rest) = (stored.advance(len), rest - len);
                    }
                }
                RunKind::Encoded => {
                    if at >= prepared && run.len_bytes < target.left {
                        prepared = view.prepare(at, target.left);
                    }
                    let decoded = view.decoded(at)?;
                    let skip = usize::try_from(at.0 - decoded.start.0).unwrap_or(usize::MAX);
                    let bytes = decoded.bytes.get(skip..).unwrap_or_default();
                    target.each(self.memory, run.len_bytes, |slice, done| {
                        let bytes = bytes.get(done..).and_then(|bytes| bytes.get(..slice.len()));
                        slice.write_from(bytes.ok_or(Unreachable)?)
                    })?;
                }
            }
            at = at.advance(run.len_bytes);
        }
        Ok(())
    }

    /// Waits for what is not on this node yet, but not for a queue that is to stop.
    #[cold]
    fn bring(&self, at: GuestOffset, len_bytes: u64) -> Result<(), Failure> {
        let goes_on = || !self.stop.load(Ordering::Relaxed);
        match self.view().bring_while(at, len_bytes, Some(&goes_on)) {
            Err(_) if !goes_on() => Err(Failure::Stopped),
            other => other.map_err(Failure::from),
        }
    }

    /// Whether all that a request reads was in memory when it was read last.
    pub(super) fn is_resident(&self, request: Request) -> bool {
        if matches!(request, Request::Read { .. }) && self.view().is_arriving() {
            return false;
        }
        let mut is_cold = false;
        self.each_stored(request, |view, stored, len| is_cold |= !view.is_resident(stored, len));
        !is_cold
    }

    /// Tells the kernel what a request will read from a disk, or the transfer what it will want, and
    /// does not wait.
    pub(super) fn hint(&self, request: Request) {
        if let Request::Read { at, len_bytes } = request
            && self.view().is_arriving()
        {
            self.view().ask(GuestOffset(at), len_bytes);
            return;
        }
        self.each_stored(request, |view, stored, len| {
            if let Some(map) = view.map(stored.layer).filter(|_| !view.is_resident(stored, len)) {
                map.will_need(stored.at, len);
            }
        });
    }

    fn each_stored(
        &self,
        request: Request,
        mut act: impl FnMut(&View, crate::image::Stored, usize),
    ) {
        let Request::Read { at, len_bytes } = request else { return };
        let (view, mut at) = (self.view(), GuestOffset(at));
        let end = at.0.saturating_add(len_bytes);
        for _ in 0..MAX_HINTED_RUNS {
            let Ok(run) = view.run_at(at, end.saturating_sub(at.0)) else { return };
            if let (RunKind::Data(stored), Ok(len)) = (run.kind, usize::try_from(run.len_bytes)) {
                act(view, stored, len);
            }
            at = at.advance(run.len_bytes);
        }
    }
}

/// Buffers of the guest, for one call.
#[derive(Default)]
struct Slices<'m> {
    /// The usual request has one.
    first: Option<GuestSlice<'m>>,
    all: Vec<GuestSlice<'m>>,
}

impl<'m> Slices<'m> {
    fn push(&mut self, slice: GuestSlice<'m>) {
        match self.first.take() {
            None if self.all.is_empty() => self.first = Some(slice),
            first => {
                self.all.extend(first);
                self.all.push(slice);
            }
        }
    }

    fn as_slice(&self) -> &[GuestSlice<'m>] {
        match &self.first {
            Some(first) => std::slice::from_ref(first),
            None => &self.all,
        }
    }
}

/// The part of a chain's writable buffers that is for data, and how far it is filled.
struct Target<'c> {
    segments: std::slice::Iter<'c, Segment>,
    now: Segment,
    left: u64,
}

impl<'c> Target<'c> {
    /// The first `len_bytes` of the buffers.
    fn new(chain: &'c Chain, len_bytes: u64) -> Self {
        let now = Segment { at: 0, len_bytes: 0 };
        Self { segments: chain.writable.iter(), now, left: len_bytes }
    }

    /// The next buffer, of at most `limit` bytes and at least one.
    fn next<'m>(
        &mut self,
        memory: &'m GuestMemory,
        limit: u64,
    ) -> Result<GuestSlice<'m>, Unreachable> {
        if self.now.len_bytes == 0 {
            self.now = *self.segments.next().ok_or(Unreachable)?;
        }
        let len = u64::from(self.now.len_bytes).min(limit).min(self.left);
        let slice = memory.at_guest(self.now.at, len).ok_or(Unreachable)?;
        let len = slice.len() as u64;
        self.left -= len;
        self.now.at += len;
        self.now.len_bytes -= u32::try_from(len).map_err(|_| Unreachable)?;
        Ok(slice)
    }

    /// Buffers for as much of `len_bytes` as one call fills; says how much that is.
    fn take<'m>(
        &mut self,
        memory: &'m GuestMemory,
        len_bytes: u64,
        slices: &mut Slices<'m>,
    ) -> Result<u64, Unreachable> {
        let mut taken = 0;
        for _ in 0..MAX_SLICES {
            if taken == len_bytes {
                break;
            }
            let slice = self.next(memory, len_bytes - taken)?;
            taken += slice.len() as u64;
            slices.push(slice);
        }
        Ok(taken)
    }

    /// Fills `len_bytes`, buffer by buffer: `fill` is told how much came before.
    fn each(
        &mut self,
        memory: &GuestMemory,
        len_bytes: u64,
        fill: impl Fn(GuestSlice<'_>, usize) -> Result<(), Unreachable>,
    ) -> Result<(), Unreachable> {
        let mut done = 0;
        while done < len_bytes {
            let slice = self.next(memory, len_bytes - done)?;
            fill(slice, usize::try_from(done).map_err(|_| Unreachable)?)?;
            done += slice.len() as u64;
        }
        Ok(())
    }

    fn write(mut self, memory: &GuestMemory, bytes: &[u8]) -> Result<(), Unreachable> {
        let left = self.left;
        self.each(memory, left, |slice, done| {
            slice.write_from(bytes.get(done..).unwrap_or_default())
        })
    }
}
