//! A server of NBD whose words are made of any bytes, and a client that is held against them: what the
//! fuzz target and the tests of noise share.
//!
//! The first byte chooses how far the negotiation has come; the second and third are the export's size in
//! units of 64 KiB and in bytes.

#![expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use std::collections::BTreeMap;
use std::ops::Range;
use std::time::Duration;

use bedplate::fetch::{FetchError, NbdOutlet, NbdSession, Stopped};
use bedplate::ring::{BLOCK_BYTES, Buf, BufPool};

/// In every buffer before it is filled.
const STALE: u8 = 0xee;

/// Notes what it is given.
struct Notes {
    pool: BufPool,
    taken: BTreeMap<u64, u64>,
    size: u64,
    is_clean: bool,
}

impl Notes {
    fn take(&mut self, range: Range<u64>) {
        assert!(range.start < range.end && range.end <= self.size);
        let before = self.taken.range(..range.end).next_back();
        assert!(before.is_none_or(|(_, end)| *end <= range.start), "a byte twice");
        self.taken.insert(range.start, range.end);
    }
}

impl NbdOutlet for Notes {
    async fn buffer(&mut self) -> Result<Buf, FetchError> {
        let mut buf = self.pool.try_take().expect("at most eight are under way");
        buf.spare(BLOCK_BYTES).fill(STALE);
        Ok(buf)
    }

    fn data(&mut self, at: u64, buf: Buf) -> Result<(), Stopped> {
        self.take(at..at + buf.len() as u64);
        assert!(!self.is_clean || !buf.bytes().contains(&STALE), "a byte that nobody has sent");
        Ok(())
    }

    fn zeroes(&mut self, range: Range<u64>) -> Result<(), Stopped> {
        self.take(range);
        Ok(())
    }

    async fn arrived(&mut self, _bytes: usize) {}
}

fn reply(to: u32, kind: u32, data: &[u8]) -> Vec<u8> {
    let len = u32::try_from(data.len()).unwrap().to_be_bytes();
    let magic = 0x0003_e889_0455_65a9u64.to_be_bytes();
    [&magic[..], &to.to_be_bytes(), &kind.to_be_bytes(), &len, data].concat()
}

/// What a server says, by these bytes.
pub fn server(input: &[u8]) -> Vec<u8> {
    let [mode, units, bytes, rest @ ..] = input else { return Vec::new() };
    let mut stream = Vec::new();
    if mode & 1 != 0 {
        stream.extend_from_slice(b"NBDMAGICIHAVEOPT\0\x03");
    }
    if mode & 2 != 0 {
        let structured = mode & 4 != 0;
        stream.extend(reply(8, if structured { 1 } else { 0x8000_0001 }, &[]));
        if structured {
            stream.extend(reply(10, 4, b"\0\0\0\x07base:allocation"));
            stream.extend(reply(10, 1, &[]));
        }
        let size = u64::from(*units % 80) * 65_536 + u64::from(*bytes);
        stream.extend(reply(7, 3, &[&[0, 0][..], &size.to_be_bytes(), &[0, 3]].concat()));
        if mode & 8 != 0 {
            let sizes = [&[0, 3, 0, 0, 2, 0, 0, 0, 16, 0][..], &[0, 1, 0, 0]].concat();
            stream.extend(reply(7, 3, &sizes));
        }
        stream.extend(reply(7, 1, &[]));
    }
    stream.extend_from_slice(rest);
    stream
}

/// Plays a server's bytes to a client; true if it took them for a whole export.
pub fn play(stream: &[u8], pool: &BufPool) -> bool {
    let is_clean = !stream.contains(&STALE);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
    runtime.block_on(async {
        let stream = tokio::io::join(stream, tokio::io::sink());
        let patience = Duration::from_secs(9);
        let Ok(session) = NbdSession::open(stream, "disk", patience).await else { return false };
        let size = session.export().size.min(6 << 20);
        let mut notes = Notes { pool: pool.clone(), taken: BTreeMap::new(), size, is_clean };
        let done = session.copy(std::iter::once(0..size).collect(), &mut notes).await.is_ok();
        let taken: u64 = notes.taken.iter().map(|(start, end)| end - start).sum();
        assert!(!done || taken == size, "all of it, or an error");
        done && size > 0
    })
}
