//! The four libraries behind one call: some input in, some output out, and whether a member ended.
//!
//! Why: each library has its own idea of an end, of an error and of a limit; the framing around
//! members is written once and should not know them.
//! How: a library's state is made when a member starts and is kept for the next member where the
//! library can be reset (gzip, zstd); xz and bzip2 get a new one, after the old one is gone.
//! Never: uses more memory than [`XZ_MEMORY_BYTES`] or [`ZSTD_WINDOW_BYTES`] and small change,
//! whatever a header declares.
//! Start at [`Engine::step`].

use zstd_safe::{DCtx, DParameter, InBuffer, OutBuffer};

use super::{Codec, gzip::Gzip};

/// All that one xz stream may use, its dictionary included: 256 MiB. `xz -9` needs 65 MiB.
pub const XZ_MEMORY_BYTES: u64 = 256 << 20;
/// Largest window that a zstd frame may declare: 128 MiB, the default of the `zstd` tool too, and
/// what `zstd --long` and `--ultra -22` make.
pub const ZSTD_WINDOW_BYTES: u64 = 1 << ZSTD_WINDOW_LOG_MAX;
const ZSTD_WINDOW_LOG_MAX: u32 = 27;

/// What a step did. With neither a byte read nor written nor an end, it needs more input or room.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Moved {
    pub(super) read: usize,
    pub(super) written: usize,
    /// The member is over and its checksums were right; the next byte is not part of it.
    pub(super) ended: bool,
}

/// Why a step failed, and how many bytes of its input were taken until then.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Fault {
    pub(super) kind: FaultKind,
    pub(super) read: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum FaultKind {
    Corrupt(&'static str),
    /// The header asks for more memory than this many bytes.
    Memory(u64),
    /// The host has no memory for a decoder within the limits.
    NoMemory,
}

impl Fault {
    pub(super) fn corrupt(what: &'static str) -> Self {
        Self { kind: FaultKind::Corrupt(what), read: 0 }
    }

    /// The same fault, in a part of the input that starts after `read` bytes.
    pub(super) fn after(self, read: usize) -> Self {
        Self { read: self.read + read, ..self }
    }
}

/// One codec's decoder, within a member or before one.
pub(super) enum Engine {
    Gzip(Box<Gzip>),
    Xz(Option<liblzma::stream::Stream>),
    Zstd(DCtx<'static>),
    Bzip2(Option<bzip2::Decompress>),
}

impl Engine {
    pub(super) fn new(codec: Codec) -> Result<Self, FaultKind> {
        Ok(match codec {
            Codec::Gzip => Self::Gzip(Box::new(Gzip::new())),
            Codec::Xz => Self::Xz(None),
            Codec::Bzip2 => Self::Bzip2(None),
            Codec::Zstd => {
                let mut context = DCtx::try_create().ok_or(FaultKind::NoMemory)?;
                context
                    .set_parameter(DParameter::WindowLogMax(ZSTD_WINDOW_LOG_MAX))
                    .map_err(|_| FaultKind::NoMemory)?;
                Self::Zstd(context)
            }
        })
    }

    /// Decodes within one member; the first byte after an `ended` starts the next.
    pub(super) fn step(&mut self, input: &[u8], output: &mut [u8]) -> Result<Moved, Fault> {
        match self {
            Self::Gzip(gzip) => gzip.step(input, output),
            Self::Xz(stream) => step_xz(stream, input, output),
            Self::Zstd(context) => step_zstd(context, input, output),
            Self::Bzip2(stream) => step_bzip2(stream, input, output),
        }
    }
}

/// The difference of two counters of bytes within one slice.
fn step_len(now: u64, before: u64) -> usize {
    usize::try_from(now - before).unwrap_or(usize::MAX)
}

fn step_xz(
    slot: &mut Option<liblzma::stream::Stream>,
    input: &[u8],
    output: &mut [u8],
) -> Result<Moved, Fault> {
    use liblzma::stream::{Action, Error, Status, Stream, TELL_UNSUPPORTED_CHECK};
    let stream = if let Some(stream) = slot {
        stream
    } else {
        // Not CONCATENATED: its end and its padding are the framing's.
        let stream = Stream::new_stream_decoder(XZ_MEMORY_BYTES, TELL_UNSUPPORTED_CHECK)
            .map_err(|_| Fault { kind: FaultKind::NoMemory, read: 0 })?;
        slot.insert(stream)
    };
    let (in_before, out_before) = (stream.total_in(), stream.total_out());
    let result = stream.process(input, output, Action::Run);
    let read = step_len(stream.total_in(), in_before);
    let written = step_len(stream.total_out(), out_before);
    let kind = match result {
        Ok(Status::StreamEnd) => {
            *slot = None;
            return Ok(Moved { read, written, ended: true });
        }
        Ok(Status::Ok | Status::GetCheck | Status::MemNeeded) => {
            return Ok(Moved { read, written, ended: false });
        }
        Err(Error::MemLimit) => FaultKind::Memory(XZ_MEMORY_BYTES),
        Err(Error::Mem) => FaultKind::NoMemory,
        Err(Error::Options) => FaultKind::Corrupt("unknown xz filter or option"),
        Err(Error::Format) => FaultKind::Corrupt("no xz header"),
        Err(Error::UnsupportedCheck) => FaultKind::Corrupt("unknown xz checksum"),
        Err(Error::Data | Error::Program | Error::NoCheck) => {
            FaultKind::Corrupt("damaged xz stream")
        }
    };
    Err(Fault { kind, read })
}

fn step_zstd(context: &mut DCtx<'static>, input: &[u8], output: &mut [u8]) -> Result<Moved, Fault> {
    let mut from = InBuffer::around(input);
    let mut to = OutBuffer::around(output);
    match context.decompress_stream(&mut to, &mut from) {
        // 0 without a byte is no end: it is the state before a frame.
        Ok(left) => {
            let (read, written) = (from.pos(), to.pos());
            Ok(Moved { read, written, ended: left == 0 && (read, written) != (0, 0) })
        }
        // The library does not say how much it had taken of the input.
        Err(code) => Err(Fault { kind: zstd_fault(code), read: 0 }),
    }
}

fn zstd_fault(code: usize) -> FaultKind {
    use zstd_safe::is_error_kind;
    use zstd_safe::zstd_sys::ZSTD_ErrorCode::{
        ZSTD_error_frameParameter_windowTooLarge as WINDOW_TOO_LARGE,
        ZSTD_error_memory_allocation as NO_MEMORY,
    };
    if is_error_kind(code, WINDOW_TOO_LARGE) {
        FaultKind::Memory(ZSTD_WINDOW_BYTES)
    } else if is_error_kind(code, NO_MEMORY) {
        FaultKind::NoMemory
    } else {
        FaultKind::Corrupt(zstd_safe::get_error_name(code))
    }
}

fn step_bzip2(
    slot: &mut Option<bzip2::Decompress>,
    input: &[u8],
    output: &mut [u8],
) -> Result<Moved, Fault> {
    use bzip2::{Decompress, Error, Status};
    let stream = slot.get_or_insert_with(|| Decompress::new(false));
    let (in_before, out_before) = (stream.total_in(), stream.total_out());
    let result = stream.decompress(input, output);
    let read = step_len(stream.total_in(), in_before);
    let written = step_len(stream.total_out(), out_before);
    let kind = match result {
        Ok(Status::StreamEnd) => {
            *slot = None;
            return Ok(Moved { read, written, ended: true });
        }
        Ok(Status::Ok | Status::RunOk | Status::FlushOk | Status::FinishOk) => {
            return Ok(Moved { read, written, ended: false });
        }
        Ok(Status::MemNeeded) => FaultKind::NoMemory,
        Err(Error::DataMagic) => FaultKind::Corrupt("no bzip2 header"),
        Err(Error::Data | Error::Sequence | Error::Param) => {
            FaultKind::Corrupt("damaged bzip2 stream")
        }
    };
    Err(Fault { kind, read })
}
