//! Decodes one compressed cluster from memory to memory.
//!
//! Why: streams come from strangers: too long, too short, or made to use memory.
//! How: libdeflate for deflate, and a streaming decoder for what libdeflate refuses but qemu
//! takes; zstd straight into the cluster, which is then its window, so that no frame header can
//! ask for memory. All three are kept for the next cluster.
//! Never: writes past the cluster, accepts less than a cluster, or loops without progress.
//! Start at [`Codec::decode`].

use std::fmt;

use flate2::{Decompress, FlushDecompress};
use libdeflater::DecompressionError;
use zstd_safe::{DCtx, DParameter, InBuffer, OutBuffer, ResetDirective};

use super::header::Compression;

/// Largest window that a zstd frame may declare, as qemu's decoder has it: 128 MiB, and with a
/// stable output buffer none of it is allocated.
const ZSTD_WINDOW_LOG_MAX: u32 = 27;

/// Why a stream is not a cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CodecFault {
    /// The bits are no deflate stream.
    BadDeflate,
    /// The deflate stream ends before the cluster is full.
    ShortDeflate,
    /// The bytes are no zlib stream, or its checksum is not that of what it holds.
    BadZlib,
    /// The zlib stream holds less than it must.
    ShortZlib,
    /// The zlib stream holds more than the cluster.
    LongZlib,
    /// The bytes are no zstd frame.
    BadZstd,
    /// The zstd frames end before the cluster is full.
    ShortZstd,
    /// A zstd frame goes on when the cluster is full.
    LongZstd,
}

impl CodecFault {
    /// The fault in words.
    #[must_use]
    pub fn text(self) -> &'static str {
        match self {
            Self::BadDeflate => "damaged deflate stream",
            Self::ShortDeflate => "deflate stream ends early",
            Self::BadZlib => "damaged zlib stream",
            Self::ShortZlib => "zlib stream ends early",
            Self::LongZlib => "zlib stream longer than the block",
            Self::BadZstd => "damaged zstd frame",
            Self::ShortZstd => "zstd frames end early",
            Self::LongZstd => "zstd frame longer than the cluster",
        }
    }
}

impl fmt::Display for CodecFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.text())
    }
}

impl std::error::Error for CodecFault {}

/// Decoders that are set up once and used for many clusters, by one thread at a time.
pub struct Codec {
    deflate: libdeflater::Decompressor,
    inflate: Option<Decompress>,
    zstd: Option<DCtx<'static>>,
}

impl fmt::Debug for Codec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Codec").finish_non_exhaustive()
    }
}

impl Default for Codec {
    fn default() -> Self {
        Self::new()
    }
}

impl Codec {
    /// Decoders with nothing decoded yet.
    #[must_use]
    pub fn new() -> Self {
        Self { deflate: libdeflater::Decompressor::new(), inflate: None, zstd: None }
    }

    /// Fills all of `cluster` from the stream at the start of `stored`; what follows the stream is
    /// ignored. After an error `cluster` holds anything.
    ///
    /// # Errors
    /// [`CodecFault`]: the stream is damaged, or does not give a whole cluster.
    pub fn decode(
        &mut self,
        compression: Compression,
        stored: &[u8],
        cluster: &mut [u8],
    ) -> Result<(), CodecFault> {
        match compression {
            Compression::Zlib => match self.deflate.deflate_decompress(stored, cluster) {
                Ok(len) if len == cluster.len() => Ok(()),
                // Too long, without an end, or shorter: rare, so the slower decoder decides.
                Ok(_) | Err(_) => self.inflate(stored, cluster),
            },
            Compression::Zstd => self.unzstd(stored, cluster),
        }
    }

    /// Decodes a whole zlib stream (RFC 1950, with its checksum) of at least `least_bytes` to the
    /// start of `block`. After an error `block` holds anything.
    ///
    /// # Errors
    /// [`CodecFault`]: the stream is damaged, or its length is wrong.
    pub fn unzlib(
        &mut self,
        stored: &[u8],
        block: &mut [u8],
        least_bytes: usize,
    ) -> Result<(), CodecFault> {
        match self.deflate.zlib_decompress(stored, block) {
            Ok(len) if len >= least_bytes => Ok(()),
            Ok(_shorter) => Err(CodecFault::ShortZlib),
            Err(DecompressionError::InsufficientSpace) => Err(CodecFault::LongZlib),
            Err(DecompressionError::BadData) => Err(CodecFault::BadZlib),
        }
    }

    /// As qemu: a stream counts if it fills the cluster, ended or not.
    fn inflate(&mut self, stored: &[u8], cluster: &mut [u8]) -> Result<(), CodecFault> {
        let inflate = self.inflate.get_or_insert_with(|| Decompress::new(false));
        inflate.reset(false);
        let (mut read, mut written) = (0, 0);
        loop {
            let from = stored.get(read..).unwrap_or_default();
            let to = cluster.get_mut(written..).unwrap_or_default();
            let (read_before, written_before) = (inflate.total_in(), inflate.total_out());
            let status = inflate.decompress(from, to, FlushDecompress::Finish);
            // Both counts are of bytes inside the two slices.
            let step = |now: u64, before: u64| usize::try_from(now - before).unwrap_or(usize::MAX);
            let step_in = step(inflate.total_in(), read_before);
            let step_out = step(inflate.total_out(), written_before);
            (read, written) = (read + step_in, written + step_out);
            match status {
                Err(_) => return Err(CodecFault::BadDeflate),
                Ok(_) if written == cluster.len() => return Ok(()),
                Ok(flate2::Status::StreamEnd) => return Err(CodecFault::ShortDeflate),
                Ok(flate2::Status::Ok | flate2::Status::BufError) => {
                    if (step_in, step_out) == (0, 0) {
                        return Err(CodecFault::ShortDeflate);
                    }
                }
            }
        }
    }

    /// As qemu: frames one after the other until the cluster is full, and the last one has ended.
    fn unzstd(&mut self, stored: &[u8], cluster: &mut [u8]) -> Result<(), CodecFault> {
        let context = self.zstd.get_or_insert_with(new_zstd);
        context.reset(ResetDirective::SessionOnly).map_err(|_| CodecFault::BadZstd)?;
        let len = cluster.len();
        let mut output = OutBuffer::around(cluster);
        let mut input = InBuffer::around(stored);
        let mut left_in_frame = 0;
        while output.pos() < len {
            let before = (input.pos, output.pos());
            left_in_frame = context
                .decompress_stream(&mut output, &mut input)
                .map_err(|_| CodecFault::BadZstd)?;
            if (input.pos, output.pos()) == before {
                return Err(CodecFault::ShortZstd);
            }
        }
        if left_in_frame == 0 { Ok(()) } else { Err(CodecFault::LongZstd) }
    }
}

fn new_zstd() -> DCtx<'static> {
    let mut context = DCtx::create();
    for parameter in
        [DParameter::WindowLogMax(ZSTD_WINDOW_LOG_MAX), DParameter::StableOutBuffer(true)]
    {
        context.set_parameter(parameter).expect("both parameters are in zstd's range");
    }
    context
}

#[cfg(test)]
#[path = "codec_tests.rs"]
mod tests;
