//! Any bytes from a server of NBD: a client ends, and believes nothing that was not said.
//!
//! The first byte chooses how far the negotiation has come; the second and third are the export's size in
//! units of 64 KiB and in bytes.
#![no_main]

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::OnceLock;
use std::time::Duration;

use bedplate::fetch::{FetchError, NbdOutlet, NbdSession, Stopped};
use bedplate::ring::{BLOCK_BYTES, Buf, BufPool};
use libfuzzer_sys::fuzz_target;

/// In every buffer before it is filled.
const STALE: u8 = 0xee;
/// Of an export so much is wanted.
const MOST: u64 = 6 << 20;

/// Notes what it is given.
struct Notes {
    /// Ranges by their begin.
    taken: BTreeMap<u64, u64>,
    wanted: u64,
    /// No byte of the input is stale's.
    is_clean: bool,
}

fn pool() -> &'static BufPool {
    static POOL: OnceLock<BufPool> = OnceLock::new();
    POOL.get_or_init(|| BufPool::new(10))
}

impl Notes {
    fn take(&mut self, range: Range<u64>) {
        assert!(range.start < range.end && range.end <= self.wanted);
        let before = self.taken.range(..range.end).next_back();
        assert!(before.is_none_or(|(_, end)| *end <= range.start), "a byte twice");
        self.taken.insert(range.start, range.end);
    }
}

impl NbdOutlet for Notes {
    async fn buffer(&mut self) -> Result<Buf, FetchError> {
        let mut buf = pool().try_take().expect("at most eight are under way");
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
    let len = u32::try_from(data.len()).expect("a short one").to_be_bytes();
    let magic = 0x0003_e889_0455_65a9u64.to_be_bytes();
    [&magic[..], &to.to_be_bytes(), &kind.to_be_bytes(), &len, data].concat()
}

fuzz_target!(|data: &[u8]| {
    let [mode, units, bytes, rest @ ..] = data else { return };
    let mut input = Vec::new();
    if mode & 1 != 0 {
        input.extend_from_slice(b"NBDMAGICIHAVEOPT\0\x03");
    }
    if mode & 2 != 0 {
        let structured = mode & 4 != 0;
        input.extend(reply(8, if structured { 1 } else { 0x8000_0001 }, &[]));
        if structured {
            input.extend(reply(10, 4, b"\0\0\0\x07base:allocation"));
            input.extend(reply(10, 1, &[]));
        }
        let size = u64::from(*units % 80) * 65_536 + u64::from(*bytes);
        input.extend(reply(7, 3, &[&[0, 0][..], &size.to_be_bytes(), &[0, 3]].concat()));
        if mode & 8 != 0 {
            input.extend(reply(7, 3, &[&[0, 3, 0, 0, 2, 0, 0, 0, 16, 0][..], &[0, 1, 0, 0]].concat()));
        }
        input.extend(reply(7, 1, &[]));
    }
    input.extend_from_slice(rest);
    let is_clean = !input.contains(&STALE);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build();
    runtime.expect("a runtime").block_on(async {
        let stream = tokio::io::join(&input[..], tokio::io::sink());
        let Ok(session) = NbdSession::open(stream, "disk", Duration::from_secs(9)).await else {
            return;
        };
        let wanted = session.export().size.min(MOST);
        let mut notes = Notes { taken: BTreeMap::new(), wanted, is_clean };
        let ranges = if wanted > 0 { vec![0..wanted] } else { Vec::new() };
        if session.copy(ranges, &mut notes).await.is_ok() {
            let taken: u64 = notes.taken.iter().map(|(start, end)| end - start).sum();
            assert_eq!(taken, wanted, "all of it, or an error");
        }
    });
});
