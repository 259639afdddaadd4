//! Sessions on bytes in memory: whatever comes in, and however little goes out at a time.

use std::io;
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use proptest::prelude::*;
use zerocopy::byteorder::big_endian::{U16, U32, U64};
use zerocopy::{FromBytes, IntoBytes};

use super::wire::{self, ChunkHead, Request, command, command_flag};
use super::{End, Limits, Transport, serve};
use crate::disk::Sealed;
use crate::image::View;
use crate::map::{Piece, send_pieces};
use crate::serve::Exports;

const SIZE: usize = 700 * 1024;

/// A client whose whole input is known before, and who takes what it is given.
struct Script {
    input: Vec<u8>,
    at: usize,
    /// Bytes that one receive gives, and one send takes, at most.
    step: usize,
    /// The kernel finds every mapped page unreadable.
    fault: bool,
    output: Vec<u8>,
    /// A real socket, since only the kernel may read mapped pieces.
    pair: (UnixStream, UnixStream),
}

impl Script {
    fn new(input: &[u8], step: usize, fault: bool) -> Self {
        let (input, output) = (input.to_vec(), Vec::new());
        Self { input, at: 0, step, fault, output, pair: UnixStream::pair().unwrap() }
    }
}

impl Transport for Script {
    fn receive(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let rest = &self.input[self.at..];
        let count = rest.len().min(buffer.len()).min(self.step);
        buffer[..count].copy_from_slice(&rest[..count]);
        self.at += count;
        Ok(count)
    }

    fn send(&mut self, pieces: &[Piece<'_>]) -> io::Result<usize> {
        let mut taken = Vec::new();
        let mut room = self.step.min(64 << 10);
        for piece in pieces {
            match *piece {
                Piece::Mapped(_) if self.fault && room > 0 => {
                    return Err(io::Error::from_raw_os_error(libc::EFAULT));
                }
                _ if piece.len() <= room => taken.push(*piece),
                Piece::Bytes(bytes) => taken.push(Piece::Bytes(&bytes[..room])),
                // A mapped piece cannot be cut short here; half of it goes with the next send.
                Piece::Mapped(_) if !taken.is_empty() => break,
                Piece::Mapped(_) => taken.push(*piece),
            }
            room = room.saturating_sub(piece.len());
        }
        let count: usize = taken.iter().map(Piece::len).sum();
        let ours = self.pair.0.try_clone()?;
        let mut sent = 0;
        while sent < count {
            // Never more at a time than a socket holds, so that nobody waits.
            let (mut skip, mut room) = (sent, 64 << 10);
            let mut now = Vec::new();
            for piece in &taken {
                let rest = piece.skip(skip);
                skip = skip.saturating_sub(piece.len());
                if rest.len() > room && !now.is_empty() {
                    break;
                }
                room = room.saturating_sub(rest.len());
                now.push(rest);
            }
            ours.set_nonblocking(true)?;
            let part = send_pieces(ours.as_fd(), &now)?;
            let before = self.output.len();
            self.output.resize(before + part, 0);
            self.pair.1.read_exact(&mut self.output[before..])?;
            sent += part;
        }
        Ok(count)
    }

    fn set_time_left(&mut self, _left: Option<Duration>) -> io::Result<()> {
        Ok(())
    }
}

fn exports() -> Exports {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    let mut bytes: Vec<u8> =
        (0..SIZE).map(|at| u8::try_from((at / 512 + at % 251) % 256).unwrap()).collect();
    bytes[128 << 10..256 << 10].fill(0);
    file.write_all(&bytes[..128 << 10]).unwrap();
    file.as_file().set_len(SIZE as u64).unwrap();
    std::os::unix::fs::FileExt::write_all_at(file.as_file(), &bytes[256 << 10..], 256 << 10)
        .unwrap();
    let view = View::open(Sealed::open_path(file.path()).unwrap(), None).unwrap();
    let exports = Exports::new();
    exports.add("disk", Arc::new(view), "").unwrap();
    exports
}

fn option(number: u32, data: &[u8]) -> Vec<u8> {
    let head = wire::OptionHead {
        magic: U64::new(wire::OPTION_MAGIC),
        option: U32::new(number),
        len_bytes: U32::new(u32::try_from(data.len()).unwrap()),
    };
    [head.as_bytes(), data].concat()
}

fn request(command: u16, flags: u16, cookie: u64, offset: u64, len_bytes: u32) -> Request {
    Request {
        magic: U32::new(wire::REQUEST_MAGIC),
        flags: U16::new(flags),
        command: U16::new(command),
        cookie: U64::new(cookie),
        offset: U64::new(offset),
        len_bytes: U32::new(len_bytes),
    }
}

/// What a client sends to be in the transmission phase.
fn beginning(structured: bool) -> Vec<u8> {
    let mut bytes = 3u32.to_be_bytes().to_vec();
    if structured {
        bytes.extend(option(wire::option::STRUCTURED_REPLY, b""));
        let meta = b"\0\0\0\x04disk\0\0\0\x01\0\0\0\x0fbase:allocation";
        bytes.extend(option(wire::option::SET_META_CONTEXT, meta));
    }
    bytes.extend(option(wire::option::GO, b"\0\0\0\x04disk\0\x01\0\x03"));
    bytes
}

fn play(input: &[u8], step: usize, fault: bool, limits: &Limits) -> (Vec<u8>, End) {
    let mut script = Script::new(input, step, fault);
    let end = serve(&mut script, None, &exports(), limits);
    (script.output, end)
}

fn mixed_requests(structured: bool) -> Vec<u8> {
    let mut input = beginning(structured);
    let whole = u32::try_from(SIZE).unwrap();
    let df = if structured { command_flag::DF } else { 0 };
    for request in [
        request(command::READ, 0, 1, 0, whole),
        request(command::READ, 0, 2, 100_000, 5),
        request(command::READ, df, 3, 100_000, 200_000),
        request(command::BLOCK_STATUS, 0, 4, 0, whole),
        request(command::READ, 0, 5, 600_000, whole),
        request(command::FLUSH, 0, 6, 0, 0),
        request(command::READ, 0, 7, 130_000, 4096),
        request(command::DISC, 0, 8, 0, 0),
    ] {
        input.extend_from_slice(request.as_bytes());
    }
    input
}

#[test]
fn short_sends_and_receives_change_nothing() {
    for structured in [false, true] {
        let input = mixed_requests(structured);
        let (want, end) = play(&input, usize::MAX, false, &Limits::default());
        assert!(matches!(end, End::Goodbye), "{end}");
        for step in [3, 29, 4097] {
            let (got, _) = play(&input, step, false, &Limits::default());
            assert!(got == want, "step {step}");
        }
    }
}

#[test]
fn a_fault_that_a_second_look_does_not_find_changes_nothing() {
    for structured in [false, true] {
        let input = mixed_requests(structured);
        let (want, _) = play(&input, usize::MAX, false, &Limits::default());
        for step in [29, 4097, usize::MAX] {
            let (got, end) = play(&input, step, true, &Limits::default());
            assert!(got == want, "step {step}: {end}");
        }
    }
}

#[test]
fn small_batches_send_the_same_simple_replies() {
    let input = mixed_requests(false);
    let (want, _) = play(&input, usize::MAX, false, &Limits::default());
    for batch_bytes in [50, 1000, 100_000] {
        for fault in [false, true] {
            let limits = Limits { batch_bytes, ..Limits::default() };
            let (got, _) = play(&input, usize::MAX, fault, &limits);
            assert!(got == want, "batches of {batch_bytes} bytes");
        }
    }
}

/// The chunks in a stream of structured replies: kind, done, cookie.
fn chunks(mut output: &[u8]) -> Vec<(u16, bool, u64)> {
    let mut chunks = Vec::new();
    while let Ok((head, rest)) = ChunkHead::read_from_prefix(output) {
        assert_eq!(head.magic.get(), wire::STRUCTURED_REPLY_MAGIC);
        chunks.push((head.kind.get(), head.flags.get() == 1, head.cookie.get()));
        output = &rest[head.len_bytes.get() as usize..];
    }
    assert!(output.is_empty(), "half a chunk at the end");
    chunks
}

fn any_request() -> impl Strategy<Value = (u16, u16, u64, u32)> {
    let flags = prop_oneof![4 => Just(0u16), 1 => Just(4), 1 => Just(8), 1 => any::<u16>()];
    let offset = prop_oneof![6 => 0..SIZE as u64, 1 => any::<u64>()];
    let len = prop_oneof![6 => 0..100_000u32, 1 => any::<u32>()];
    let commands = prop_oneof![6 => Just(0u16), 1 => 3..=9u16, 1 => any::<u16>()];
    let no_payload_and_no_end =
        commands.prop_filter("has a reply of its own", |c| ![1, 2].contains(c));
    (no_payload_and_no_end, flags, offset, len)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn any_bytes_end_a_session_without_a_panic(
        input: Vec<u8>,
        after in 0..3usize,
        step in 1..5000usize,
    ) {
        let before = [vec![], 3u32.to_be_bytes().to_vec(), beginning(true)];
        play(&[&before[after][..], &input].concat(), step, false, &Limits::default());
    }

    #[test]
    fn each_request_has_one_whole_reply_in_order(
        requests in prop::collection::vec(any_request(), 1..40),
        step in 1..10_000usize,
        fault: bool,
        batch_bytes in 100..200_000usize,
    ) {
        let limits = Limits { batch_bytes, ..Limits::default() };
        let (handshake, _) = play(&beginning(true), usize::MAX, false, &limits);
        let mut input = beginning(true);
        for (cookie, (command, flags, offset, len)) in requests.iter().enumerate() {
            let request = request(*command, *flags, cookie as u64, *offset, *len);
            input.extend_from_slice(request.as_bytes());
        }
        let (output, end) = play(&input, step, fault, &limits);
        prop_assert!(matches!(end, End::HungUp), "{end}");
        let chunks = chunks(&output[handshake.len()..]);
        let done: Vec<u64> = chunks.iter().filter(|c| c.1).map(|c| c.2).collect();
        let want: Vec<u64> = (0..requests.len() as u64).collect();
        prop_assert_eq!(done, want);
        prop_assert!(chunks.windows(2).all(|two| two[0].1 || two[0].2 == two[1].2));
    }
}
