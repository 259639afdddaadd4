//! Reads one image in one process through bedplate or one of its peers, and says what it took.
//!
//! Why: behind a socket the socket is what one measures; this is what a reader itself costs.
//! How: `read-peers READER IMAGE WORKLOAD LIMIT`, one reader and one workload per process, so that
//! nobody finds another's memory warm. One object on stdout: ops, bytes, wall and CPU time of the
//! timed part, and an xxh3 over bytes read outside of it, which must be equal for all readers.
//! Never: writes, reads in the timed part what it would hash, or compares: `tools/bench` does.
//! Start at [`run`].

mod codec;
mod readers;
mod workload;

use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use bedplate::replica::Mode;
use readers::Kind;
use workload::{Limit, Outcome, Workload};

type Error = Box<dyn std::error::Error + Send + Sync>;
type Result<T> = std::result::Result<T, Error>;

const USAGE: &str = "usage: read-peers READER IMAGE WORKLOAD LIMIT
  READER    bedplate, replica, replica-mapped (attached to an engine), imago, qcow2-rs (of a qcow2 image), mmap, pread (of a raw file),
            codec, codec-1, codec-keeps (first-1m only: each cluster decoded, on all cores, on
            one, or on all cores to memory that has all of it at the end)
  WORKLOAD  random-4k, sequential-1m, first-1m, open
  LIMIT     number of operations, or seconds as in 0.5s; first-1m is always one pass";

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let [reader, image, workload, limit] = words.as_slice() else {
        eprintln!("{USAGE}");
        return ExitCode::from(2);
    };
    match run(reader, Path::new(image), workload, limit) {
        Ok(outcome) => {
            let Outcome { ops, bytes, wall_ns, cpu_ns, xxh3 } = outcome;
            println!(
                "{{\"reader\":\"{reader}\",\"workload\":\"{workload}\",\"ops\":{ops},\
                 \"bytes\":{bytes},\"wall_ns\":{wall_ns},\"cpu_ns\":{cpu_ns},\
                 \"xxh3\":\"{xxh3:016x}\"}}"
            );
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("read-peers: {reader}: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(reader: &str, image: &Path, workload: &str, limit: &str) -> Result<Outcome> {
    let workload = match workload {
        "random-4k" => Workload::Random4K,
        "sequential-1m" => Workload::Sequential1M,
        "first-1m" => Workload::First1M,
        "open" => Workload::Open,
        other => return Err(format!("no workload is called {other}\n{USAGE}").into()),
    };
    let limit = match limit.strip_suffix('s') {
        Some(seconds) => Limit::Time(Duration::try_from_secs_f64(seconds.parse()?)?),
        None => Limit::Ops(limit.parse()?),
    };
    let kind = match reader {
        "codec" | "codec-1" | "codec-keeps" if workload != Workload::First1M => {
            return Err(format!("{reader} does first-1m only").into());
        }
        "codec" | "codec-keeps" => {
            let cores = std::thread::available_parallelism()?.get();
            return codec::run(image, cores, reader == "codec-keeps");
        }
        "codec-1" => return codec::run(image, 1, false),
        "bedplate" => Kind::Bedplate,
        "replica" => Kind::Replica(Mode::Pread),
        "replica-mapped" => Kind::Replica(Mode::Mapped),
        "imago" => Kind::Imago,
        "qcow2-rs" => Kind::Qcow2Rs,
        "mmap" => Kind::Mmap,
        "pread" => Kind::Pread,
        other => return Err(format!("no reader is called {other}\n{USAGE}").into()),
    };
    workload::run(kind, image, workload, limit)
}
