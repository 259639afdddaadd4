//! A reader process that is attached to a running engine, and says what attaching and reading took.
//!
//! Why: many readers of one image are many processes; what they share, and what they hold each other
//! up, is not seen within one.
//! How: `replica-load SOCKET IMAGE attach COUNT` attaches so often and gives the median and the 99th
//! percentile. `replica-load SOCKET IMAGE pread|mapped SECONDS` reads the disk once, says `ready`, waits for
//! a line on stdin, reads 4 KiB at random places for so long, prints one object, and stays until stdin
//! ends, so that its memory can be looked at.
//! Never: starts an engine, or compares.
//! Start at [`run`].

use std::hint::black_box;
use std::io::{BufRead, Write, stdin, stdout};
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use bedplate::replica::{Mode, Options, Replica};
use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeValLike;
use xxhash_rust::xxh3::Xxh3;

type Error = Box<dyn std::error::Error + Send + Sync>;
type Result<T> = std::result::Result<T, Error>;

const BLOCK: usize = 4 << 10;
const BETWEEN_LOOKS: u64 = 64;

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let [socket, image, what, limit] = words.as_slice() else {
        eprintln!("usage: replica-load SOCKET IMAGE attach COUNT | pread|mapped SECONDS");
        return ExitCode::from(2);
    };
    match run(Path::new(socket), image, what, limit) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("replica-load: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(socket: &Path, image: &str, what: &str, limit: &str) -> Result<()> {
    let mode = match what {
        "attach" => return attach(socket, image, limit.parse()?),
        "pread" => Mode::Pread,
        "mapped" => Mode::Mapped,
        other => return Err(format!("nothing is called {other}").into()),
    };
    let replica = Replica::attach(socket, image, Options { mode, ..Options::default() })?;
    read(&replica, Duration::try_from_secs_f64(limit.parse()?)?)
}

fn attach(socket: &Path, image: &str, count: usize) -> Result<()> {
    let mut times = Vec::with_capacity(count);
    let mut buf = [0; BLOCK];
    for _ in 0..count {
        let began = Instant::now();
        let replica = Replica::attach(socket, image, Options::default())?;
        times.push(u64::try_from(began.elapsed().as_nanos())?);
        // It is attached only if it can read.
        replica.read_at(black_box(&mut buf), 0)?;
    }
    times.sort_unstable();
    let at = |part: usize| times.get(count * part / 100).copied().unwrap_or_default();
    println!("{{\"median_ns\":{},\"p99_ns\":{}}}", at(50), at(99));
    Ok(())
}

fn read(replica: &Replica, time: Duration) -> Result<()> {
    let size_bytes = replica.size_bytes();
    let mut hash = Xxh3::new();
    let mut large = vec![0; 1 << 20];
    let mut at = 0;
    while at < size_bytes {
        let len = usize::try_from(size_bytes - at)?.min(large.len());
        let part = large.get_mut(..len).unwrap_or_default();
        replica.read_at(part, at)?;
        hash.update(part);
        at += len as u64;
    }
    drop(large);
    println!("ready");
    stdout().flush()?;
    let mut line = String::new();
    stdin().lock().read_line(&mut line)?;
    let (began, cpu) = (Instant::now(), cpu_ns()?);
    let (mut ops, mut state, mut buf) = (0, u64::from(std::process::id()), [0; BLOCK]);
    while began.elapsed() < time {
        for _ in 0..BETWEEN_LOOKS {
            replica.read_at(black_box(&mut buf), place(&mut state, size_bytes / BLOCK as u64))?;
        }
        ops += BETWEEN_LOOKS;
    }
    let (wall_ns, cpu_ns) = (began.elapsed().as_nanos(), cpu_ns()? - cpu);
    let xxh3 = hash.digest();
    println!("{{\"ops\":{ops},\"wall_ns\":{wall_ns},\"cpu_ns\":{cpu_ns},\"xxh3\":\"{xxh3:016x}\"}}");
    stdout().flush()?;
    stdin().lock().read_line(&mut line)?;
    Ok(())
}

/// A pseudo-random block (splitmix64), another row of them for each process.
fn place(state: &mut u64, blocks: u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut mixed = *state;
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    (((mixed >> 32) * blocks) >> 32) * BLOCK as u64
}

fn cpu_ns() -> Result<u64> {
    let usage = getrusage(UsageWho::RUSAGE_SELF)?;
    let spent = usage.user_time().num_nanoseconds() + usage.system_time().num_nanoseconds();
    Ok(u64::try_from(spent)?)
}
