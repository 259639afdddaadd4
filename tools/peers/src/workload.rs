//! What is done and timed.
//!
//! Why: all readers have to do the same, and none may profit from work outside the timed part.
//! How: what is timed is only reads into one buffer; the hash is made of reads before it (of what
//! has to be warm) or, for a first pass, after it and with a reader opened anew.
//! Never: hashes in the timed part, or takes random numbers that depend on the reader.
//! Start at [`run`].

use std::hint::black_box;
use std::path::Path;
use std::time::{Duration, Instant};

use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeValLike;
use xxhash_rust::xxh3::Xxh3;

use crate::Result;
use crate::readers::{Kind, Reader};

const SMALL_BYTES: usize = 4 << 10;
const LARGE_BYTES: usize = 1 << 20;
/// Random reads that are hashed, and reads between two looks at the clock.
const CHECKED: u64 = 4096;
const BETWEEN_LOOKS: u64 = 64;
/// Places of a disk just opened that are hashed.
const PROBES: u64 = 64;

/// A pattern of reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Workload {
    /// 4 KiB at pseudo-random positions, after everything was read once.
    Random4K,
    /// 1 MiB after 1 MiB, after everything was read once.
    Sequential1M,
    /// 1 MiB after 1 MiB, once, with nothing of the image mapped, decoded or looked up before.
    First1M,
    /// Open, read the first 4 KiB, close.
    Open,
}

/// When to end.
#[derive(Clone, Copy, Debug)]
pub enum Limit {
    /// After this many operations.
    Ops(u64),
    /// At the first look at the clock after this time.
    Time(Duration),
}

/// What it took.
#[derive(Debug)]
pub struct Outcome {
    /// Reads, or openings.
    pub ops: u64,
    /// Bytes read in the timed part.
    pub bytes: u64,
    /// Wall time of the timed part.
    pub wall_ns: u64,
    /// User and system time of all threads in the timed part.
    pub cpu_ns: u64,
    /// Over what was read outside the timed part.
    pub xxh3: u64,
}

/// Wall and CPU clocks, running.
#[derive(Debug)]
pub struct Clocks {
    began: Instant,
    cpu_ns: u64,
}

impl Clocks {
    /// Starts both.
    pub fn start() -> Result<Self> {
        Ok(Self { cpu_ns: cpu_ns()?, began: Instant::now() })
    }

    /// Reads both.
    pub fn stop(self, ops: u64, bytes: u64, xxh3: u64) -> Result<Outcome> {
        let wall_ns = u64::try_from(self.began.elapsed().as_nanos())?;
        Ok(Outcome { ops, bytes, wall_ns, cpu_ns: cpu_ns()? - self.cpu_ns, xxh3 })
    }

    fn over(&self, limit: Limit, ops: u64) -> bool {
        match limit {
            Limit::Ops(most) => ops >= most,
            Limit::Time(most) => self.began.elapsed() >= most,
        }
    }
}

/// Of all threads of the process so far.
fn cpu_ns() -> Result<u64> {
    let usage = getrusage(UsageWho::RUSAGE_SELF)?;
    let spent = usage.user_time().num_nanoseconds() + usage.system_time().num_nanoseconds();
    Ok(u64::try_from(spent)?)
}

/// Does a workload with a reader.
pub fn run(kind: Kind, path: &Path, workload: Workload, limit: Limit) -> Result<Outcome> {
    match workload {
        Workload::Random4K => random(kind.open(path)?.as_mut(), limit),
        Workload::Sequential1M => {
            let mut reader = kind.open(path)?;
            let xxh3 = hash_all(reader.as_mut())?;
            let clocks = Clocks::start()?;
            let (mut ops, mut bytes) = (0, 0);
            while !clocks.over(limit, ops) {
                pass(reader.as_mut(), |part| {
                    (ops, bytes) = (ops + 1, bytes + part.len() as u64);
                    !clocks.over(limit, ops)
                })?;
            }
            clocks.stop(ops, bytes, xxh3)
        }
        Workload::First1M => {
            let mut reader = kind.open_in_use(path)?;
            let clocks = Clocks::start()?;
            let mut ops = 0;
            let bytes = pass(reader.as_mut(), |_| {
                ops += 1;
                true
            })?;
            let outcome = clocks.stop(ops, bytes, 0)?;
            drop(reader);
            Ok(Outcome { xxh3: hash_all(kind.open(path)?.as_mut())?, ..outcome })
        }
        Workload::Open => open(kind, path, limit),
    }
}

fn random(reader: &mut dyn Reader, limit: Limit) -> Result<Outcome> {
    pass(reader, |_| true)?;
    let mut buf = [0; SMALL_BYTES];
    let (mut hash, mut positions) = (Xxh3::new(), Positions::of(reader.size_bytes()));
    for _ in 0..CHECKED {
        reader.read_at(&mut buf, positions.next())?;
        hash.update(&buf);
    }
    let mut positions = Positions::of(reader.size_bytes());
    let clocks = Clocks::start()?;
    let mut ops = 0;
    while !clocks.over(limit, ops) {
        for _ in 0..BETWEEN_LOOKS {
            reader.read_at(black_box(&mut buf), positions.next())?;
        }
        ops += BETWEEN_LOOKS;
    }
    clocks.stop(ops, ops * SMALL_BYTES as u64, hash.digest())
}

fn open(kind: Kind, path: &Path, limit: Limit) -> Result<Outcome> {
    let mut buf = [0; SMALL_BYTES];
    let clocks = Clocks::start()?;
    let mut ops = 0;
    while !clocks.over(limit, ops) {
        kind.open(path)?.read_at(black_box(&mut buf), 0)?;
        ops += 1;
    }
    let outcome = clocks.stop(ops, ops * SMALL_BYTES as u64, 0)?;
    let (mut hash, mut reader) = (Xxh3::new(), kind.open(path)?);
    let every = reader.size_bytes() / PROBES;
    for n in 0..PROBES {
        reader.read_at(&mut buf, n * every)?;
        hash.update(&buf);
    }
    Ok(Outcome { xxh3: hash.digest(), ..outcome })
}

fn hash_all(reader: &mut dyn Reader) -> Result<u64> {
    let mut hash = Xxh3::new();
    pass(reader, |part| {
        hash.update(part);
        true
    })?;
    Ok(hash.digest())
}

/// Reads the disk from its start, until its end or until `each` says no; returns the bytes.
fn pass(reader: &mut dyn Reader, mut each: impl FnMut(&[u8]) -> bool) -> Result<u64> {
    let (mut at, size_bytes) = (0, reader.size_bytes());
    let mut buf = vec![0; LARGE_BYTES];
    while at < size_bytes {
        let len = usize::try_from(size_bytes - at)?.min(LARGE_BYTES);
        let part = buf.get_mut(..len).unwrap_or_default();
        reader.read_at(black_box(part), at)?;
        at += len as u64;
        if !each(part) {
            break;
        }
    }
    Ok(at)
}

/// Pseudo-random positions of 4 KiB blocks (splitmix64), the same for every reader.
struct Positions {
    state: u64,
    blocks: u64,
}

impl Positions {
    fn of(size_bytes: u64) -> Self {
        Self { state: 0, blocks: size_bytes / SMALL_BYTES as u64 }
    }

    fn next(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.state;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        // Disks up to 16 TiB: fewer than 2^32 blocks, so that the product fits.
        (((mixed >> 32) * self.blocks) >> 32) * SMALL_BYTES as u64
    }
}
