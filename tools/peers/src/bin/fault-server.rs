//! An NBD server that faults its map in: what a server is that sends from a map and does no more.
//!
//! Why: a page that is not in memory stops such a server until the disk has brought it, whatever its
//! client has asked for besides; `tools/bench` shows what it is worth to read cold pages otherwise.
//! How: `fault-server SOCKET FILE`: a thread a connection, which takes all requests that have arrived,
//! and answers with one vectored write from a map without read-ahead. One unnamed export, simple replies.
//! Never: writes to the file, or has a limit on its clients: it is for benchmarks alone.
//! Start at [`serve`]. Protocol: NBD `doc/proto.md`, the baseline.

use std::fs::File;
use std::io::{self, ErrorKind, IoSlice, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::ExitCode;
use std::sync::Arc;

use memmap2::{Advice, Mmap};

const IHAVEOPT: u64 = 0x4948_4156_454f_5054;
const OPTION_REPLY: u64 = 0x0003_e889_0455_65a9;
const REQUEST_MAGIC: u32 = 0x2560_9513;
const REPLY_MAGIC: u32 = 0x6744_6698;
const REQUEST_BYTES: usize = 28;
/// Has flags, read-only, several connections.
const FLAGS: u16 = 1 | 1 << 1 | 1 << 8;
const OPT_EXPORT_NAME: u32 = 1;
const OPT_ABORT: u32 = 2;
const OPT_GO: u32 = 7;
const REP_ACK: u32 = 1;
const REP_INFO: u32 = 3;
const REP_ERR_UNSUP: u32 = 1 << 31 | 1;
/// Longest option.
const MAX_OPTION_BYTES: u32 = 64 << 10;
const EINVAL: u32 = 22;

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let [socket, file] = words.as_slice() else {
        eprintln!("usage: fault-server SOCKET FILE");
        return ExitCode::from(2);
    };
    match run(socket, file) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("fault-server: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(socket: &str, file: &str) -> io::Result<()> {
    // SAFETY: the file is this benchmark's own, and nobody changes it meanwhile.
    let map = unsafe { Mmap::map(&File::open(file)?) }?;
    map.advise(Advice::Random)?;
    let map = Arc::new(map);
    for stream in UnixListener::bind(socket)?.incoming() {
        let (stream, map) = (stream?, Arc::clone(&map));
        std::thread::spawn(move || {
            // A client that goes without a word is how most of them end.
            let _ended = serve(stream, &map);
        });
    }
    Ok(())
}

fn serve(mut stream: UnixStream, map: &Mmap) -> io::Result<()> {
    if !handshake(&mut stream, map.len() as u64)? {
        return Ok(());
    }
    let (mut pending, mut filled) = (vec![0; 64 << 10], 0);
    loop {
        let room = pending.get_mut(filled..).unwrap_or_default();
        let count = stream.read(room)?;
        if count == 0 {
            return Ok(());
        }
        filled += count;
        let whole = filled / REQUEST_BYTES * REQUEST_BYTES;
        let (requests, _rest) = pending.split_at(whole);
        let mut parts = Vec::new();
        let mut is_over = false;
        for request in requests.chunks_exact(REQUEST_BYTES) {
            match answer(request, map)? {
                Some(part) => parts.push(part),
                None => is_over = true,
            }
        }
        send(&mut stream, &parts)?;
        if is_over {
            return Ok(());
        }
        pending.copy_within(whole..filled, 0);
        filled -= whole;
    }
}

/// The head and the bytes of one reply; `None` for a farewell.
fn answer<'a>(request: &[u8], map: &'a Mmap) -> io::Result<Option<([u8; 16], &'a [u8])>> {
    let mut fields = request;
    let (magic, _flags) = (u32_of(&mut fields)?, u16_of(&mut fields)?);
    let (kind, cookie) = (u16_of(&mut fields)?, u64_of(&mut fields)?);
    let (at, len) = (u64_of(&mut fields)?, u32_of(&mut fields)?);
    if magic != REQUEST_MAGIC {
        return Err(ErrorKind::InvalidData.into());
    }
    if kind == 2 {
        return Ok(None);
    }
    let range = usize::try_from(at).ok().zip(usize::try_from(at.saturating_add(len.into())).ok());
    let bytes = range.and_then(|(at, end)| map.get(at..end)).filter(|_| kind == 0);
    let error = if bytes.is_some() { 0 } else { EINVAL };
    let mut head = [0; 16];
    let mut room = &mut head[..];
    room.write_all(&REPLY_MAGIC.to_be_bytes())?;
    room.write_all(&error.to_be_bytes())?;
    room.write_all(&cookie.to_be_bytes())?;
    Ok(Some((head, bytes.unwrap_or_default())))
}

/// The kernel reads the mapped bytes, and waits for those that are not in memory.
fn send(stream: &mut UnixStream, parts: &[([u8; 16], &[u8])]) -> io::Result<()> {
    for parts in parts.chunks(256) {
        let both = parts.iter().flat_map(|(head, bytes)| [IoSlice::new(head), IoSlice::new(bytes)]);
        let mut slices: Vec<IoSlice<'_>> = both.filter(|slice| !slice.is_empty()).collect();
        let mut left = &mut slices[..];
        while !left.is_empty() {
            let sent = stream.write_vectored(left)?;
            IoSlice::advance_slices(&mut left, sent);
        }
    }
    Ok(())
}

/// True if the client wants the export.
fn handshake(stream: &mut UnixStream, size: u64) -> io::Result<bool> {
    stream.write_all(b"NBDMAGIC")?;
    stream.write_all(&IHAVEOPT.to_be_bytes())?;
    stream.write_all(&3_u16.to_be_bytes())?;
    let no_zeroes = u32_of(stream)? & 2 != 0;
    loop {
        let (magic, option, len) = (u64_of(stream)?, u32_of(stream)?, u32_of(stream)?);
        if magic != IHAVEOPT || len > MAX_OPTION_BYTES {
            return Err(ErrorKind::InvalidData.into());
        }
        io::copy(&mut stream.take(len.into()), &mut io::sink())?;
        match option {
            OPT_EXPORT_NAME => {
                stream.write_all(&size.to_be_bytes())?;
                stream.write_all(&FLAGS.to_be_bytes())?;
                stream.write_all(&[0; 124][..if no_zeroes { 0 } else { 124 }])?;
                return Ok(true);
            }
            OPT_GO => {
                let mut info = 0_u16.to_be_bytes().to_vec();
                info.extend(size.to_be_bytes());
                info.extend(FLAGS.to_be_bytes());
                reply(stream, option, REP_INFO, &info)?;
                reply(stream, option, REP_ACK, &[])?;
                return Ok(true);
            }
            OPT_ABORT => return reply(stream, option, REP_ACK, &[]).map(|()| false),
            _unknown => reply(stream, option, REP_ERR_UNSUP, &[])?,
        }
    }
}

fn reply(stream: &mut UnixStream, option: u32, kind: u32, data: &[u8]) -> io::Result<()> {
    let len = u32::try_from(data.len()).map_err(io::Error::other)?;
    let mut whole = OPTION_REPLY.to_be_bytes().to_vec();
    for field in [option, kind, len] {
        whole.extend(field.to_be_bytes());
    }
    whole.extend(data);
    stream.write_all(&whole)
}

fn u16_of(from: &mut impl Read) -> io::Result<u16> {
    let mut bytes = [0; 2];
    from.read_exact(&mut bytes)?;
    Ok(u16::from_be_bytes(bytes))
}

fn u32_of(from: &mut impl Read) -> io::Result<u32> {
    let mut bytes = [0; 4];
    from.read_exact(&mut bytes)?;
    Ok(u32::from_be_bytes(bytes))
}

fn u64_of(from: &mut impl Read) -> io::Result<u64> {
    let mut bytes = [0; 8];
    from.read_exact(&mut bytes)?;
    Ok(u64::from_be_bytes(bytes))
}
