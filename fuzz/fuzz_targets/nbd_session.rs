//! Any bytes from a client: a session must end, in bounds, and answer only what it may.
//!
//! The first byte chooses how far the handshake has come, and how the bytes are cut up.
#![no_main]

mod common;

use std::io;
use std::time::Duration;

use bedplate::map::Piece;
use bedplate::serve::nbd::{Limits, Transport, serve};
use common::exports;
use libfuzzer_sys::fuzz_target;

/// Gives its input a few bytes at a time, and counts what comes back.
struct Script<'a> {
    input: &'a [u8],
    step: usize,
    sent_bytes: u64,
}

impl Transport for Script<'_> {
    fn receive(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.step.min(self.input.len()).min(buffer.len());
        let (now, later) = self.input.split_at(count);
        buffer[..count].copy_from_slice(now);
        self.input = later;
        Ok(count)
    }

    fn send(&mut self, pieces: &[Piece<'_>]) -> io::Result<usize> {
        let count = pieces.iter().map(Piece::len).sum();
        self.sent_bytes += count as u64;
        Ok(count)
    }

    fn set_time_left(&mut self, _left: Option<Duration>) -> io::Result<()> {
        Ok(())
    }
}

fuzz_target!(|data: &[u8]| {
    let Some((&mode, rest)) = data.split_first() else { return };
    let mut input = Vec::new();
    if mode & 1 != 0 {
        input.extend_from_slice(b"\0\0\0\x03");
    }
    if mode & 8 != 0 {
        // Extended headers.
        input.extend_from_slice(b"IHAVEOPT\0\0\0\x0b\0\0\0\0");
    }
    if mode & 2 != 0 {
        input.extend_from_slice(b"IHAVEOPT\0\0\0\x08\0\0\0\0");
        let query = b"\0\0\0\x04disk\0\0\0\x01\0\0\0\x0fbase:allocation";
        input.extend_from_slice(b"IHAVEOPT\0\0\0\x0a\0\0\0\x1f");
        input.extend_from_slice(query);
    }
    if mode & 4 != 0 {
        input.extend_from_slice(b"IHAVEOPT\0\0\0\x07\0\0\0\x0a\0\0\0\x04disk\0\0");
    }
    input.extend_from_slice(rest);
    let step = [usize::MAX, 1, 7, 4096][usize::from(mode >> 6)];
    let mut script = Script { input: &input, step, sent_bytes: 0 };
    let limits = Limits { batch_bytes: 64 << 10, ..Limits::default() };
    let _end = serve(&mut script, None, exports(), &limits);
    assert_eq!(exports().in_use("disk"), 0, "the session has let go of its export");
    // Each 16 bytes of input ask for a listing at most, each 28 for a read of the export.
    assert!(script.sent_bytes <= 200 + input.len() as u64 * (1 << 20));
});
