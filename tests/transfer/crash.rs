//! Promise: whatever the power takes, no presence bit ever lies, and no file has its final name
//! before it is whole.
//!
//! The program runs under strace. Every write may reach the disk as soon as it has begun, in any
//! order, torn; it is sure to be there once a sync that began after its end has ended. From that
//! follows what has to hold at each prefix, for every reordering: the bytes of a unit are sure
//! before the page that speaks for them is begun. Besides, seeded crashes are built as files and
//! opened again.

use std::collections::HashMap;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use crate::control_support::{BEDPLATE, clean, stderr};
use crate::fallback::forbid_io_uring;
use crate::fault_server::{Cut, FaultServer, Reply};
use crate::{content, engine, sha256};
use bedplate::disk::{Dir, Presence, UNIT_BYTES};
use bedplate::fetch::{Expect, Progress, Source, SourceUrl};
use bedplate::import::{Layout, PullRequest, pull};
use bedplate::ring::Choice;

const LEN: usize = 6 * 1024 * 1024 + 4321;
const PAGE: usize = 4096;
const SECTOR: usize = 512;
/// Where the bits of a presence page begin, and the units of one (see `disk::presence`).
const BITS_AT: usize = 16;
const UNITS_PER_PAGE: usize = 508 * 64;
/// Crashes that are built and opened.
const CRASHES: usize = 300;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Which {
    Data,
    Bits,
    Spool,
}

#[derive(Clone, Debug)]
enum Act {
    Write {
        to: Which,
        at: usize,
        len: usize,
        bytes: Vec<u8>,
    },
    Sync(Which),
    /// Bytes from `at` on are gone.
    Cut {
        of: Which,
        at: usize,
    },
    Punch {
        at: usize,
        len: usize,
    },
    Rename,
}

/// One system call: the lines of the trace at which it began and had ended.
#[derive(Clone, Debug)]
struct Op {
    began: usize,
    ended: usize,
    act: Act,
}

fn unhex(text: &str) -> Vec<u8> {
    let digits = text.split("\\x").skip(1);
    digits.map(|two| u8::from_str_radix(&two[..2], 16).unwrap()).collect()
}

fn which(descriptor: &str) -> Option<Which> {
    let path = String::from_utf8(unhex(descriptor.split('<').nth(1)?)).ok()?;
    match path.rsplit('.').next()? {
        "bedplate-part" => Some(Which::Data),
        "bedplate-presence" => Some(Which::Bits),
        "bedplate-spool" => Some(Which::Spool),
        _ => None,
    }
}

fn act(name: &str, args: &[&str]) -> Option<Act> {
    let number = |index: usize| args[index].trim().parse::<usize>().unwrap();
    if name.starts_with("rename") {
        return Some(Act::Rename);
    }
    let file = which(args[0])?;
    match name {
        "pwrite64" => {
            let (len, at) = (number(2), number(3));
            Some(Act::Write { to: file, at, len, bytes: unhex(args[1].split('"').nth(1)?) })
        }
        "fdatasync" | "fsync" => Some(Act::Sync(file)),
        "ftruncate" => Some(Act::Cut { of: file, at: number(1) }),
        "fallocate" if args[1].contains("PUNCH") => {
            Some(Act::Punch { at: number(2), len: number(3) })
        }
        _ => None,
    }
}

/// The calls that matter, in the order in which they began.
fn parse(trace: &str) -> Vec<Op> {
    let (mut open, mut ops) = (HashMap::new(), Vec::new());
    for (line_number, line) in trace.lines().enumerate() {
        let Some((pid, rest)) = line.split_once(' ') else { continue };
        let rest = rest.trim();
        let (began, call) = if let Some(head) = rest.strip_suffix(" <unfinished ...>") {
            open.insert(pid.to_owned(), (line_number, head.to_owned()));
            continue;
        } else if let Some(tail) = rest.strip_prefix("<... ") {
            let Some((began, head)) = open.remove(pid) else { continue };
            (began, format!("{head}{}", tail.split_once("resumed>").unwrap().1))
        } else {
            (line_number, rest.to_owned())
        };
        let Some((call, result)) = call.rsplit_once(" = ") else { continue };
        let failed = result.starts_with('-');
        let Some((name, args)) = call.split_once('(') else { continue };
        let args: Vec<&str> = args.trim_end().trim_end_matches(')').split(", ").collect();
        if let Some(act) = act(name, &args).filter(|_| !failed) {
            ops.push(Op { began, ended: line_number, act });
        }
    }
    ops.sort_by_key(|op| op.began);
    ops
}

/// True if all of `write` is sure to be on the disk when line `at` is reached.
fn is_sure(ops: &[Op], write: &Op, file: Which, at: usize) -> bool {
    ops.iter().any(|sync| {
        matches!(sync.act, Act::Sync(of) if of == file)
            && sync.began > write.ended
            && sync.ended < at
    })
}

/// The first page of a unit whose bytes are not sure at line `at`.
fn unsure_page(ops: &[Op], bytes: &[u8], unit: usize, at: usize) -> Option<usize> {
    let unit_len = UNIT_BYTES as usize;
    let end = bytes.len().min((unit + 1) * unit_len);
    (unit * unit_len..end).step_by(PAGE).find(|&page| {
        let page_end = end.min(page + PAGE);
        // What took the page away last, before this line.
        let gone = |op: &&Op| match op.act {
            Act::Cut { of: Which::Data, at } => at < page_end,
            Act::Punch { at, len } => at < page_end && page < at + len,
            Act::Cut { .. } | Act::Write { .. } | Act::Sync(_) | Act::Rename => false,
        };
        let since = ops.iter().filter(|op| op.began < at).filter(gone).map(|op| op.began).max();
        let zero = bytes[page..page_end].iter().all(|&byte| byte == 0);
        let written = ops.iter().any(|op| match op.act {
            Act::Write { to: Which::Data, at: start, len, .. } => {
                let covers = start <= page && page_end <= start + len;
                covers && Some(op.began) > since && is_sure(ops, op, Which::Data, at)
            }
            Act::Write { .. }
            | Act::Sync(_)
            | Act::Cut { .. }
            | Act::Punch { .. }
            | Act::Rename => false,
        });
        !zero && !written
    })
}

/// The units that a presence page speaks for.
fn units_of(at: usize, page: &[u8]) -> Vec<usize> {
    if at < 2 * PAGE || page.len() < PAGE {
        return Vec::new();
    }
    let first = (at / PAGE - 2) / 2 * UNITS_PER_PAGE;
    let bit = |unit: usize| page[BITS_AT + unit / 8] >> (unit % 8) & 1 == 1;
    (0..UNITS_PER_PAGE).filter(|&unit| bit(unit)).map(|unit| first + unit).collect()
}

/// The first lie that some crash could leave on the disk.
fn lie(ops: &[Op], bytes: &[u8]) -> Option<String> {
    for op in ops {
        let units = match &op.act {
            Act::Write { to: Which::Bits, at, bytes: page, .. } => units_of(*at, page),
            Act::Rename => (0..bytes.len().div_ceil(UNIT_BYTES as usize)).collect(),
            Act::Write { .. } | Act::Sync(_) | Act::Cut { .. } | Act::Punch { .. } => continue,
        };
        for unit in units {
            if let Some(page) = unsure_page(ops, bytes, unit, op.began) {
                let line = op.began;
                return Some(format!(
                    "line {line} speaks for unit {unit}, byte {page} is not sure"
                ));
            }
        }
    }
    None
}

struct Random(u64);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % limit as u64) as usize
    }
}

/// The files as a crash at line `at` may leave them: what is sure, and of the rest what chance
/// chooses, torn in pages and sectors.
fn crashed(ops: &[Op], content: &[u8], at: usize, random: &mut Random) -> (Vec<u8>, Vec<u8>) {
    let mut padded = content.to_vec();
    padded.resize(content.len().next_multiple_of(PAGE), 0);
    let (mut data, mut bits) = (Vec::new(), Vec::new());
    for op in ops.iter().filter(|op| op.began < at) {
        match &op.act {
            Act::Write { to, at: start, len, bytes } => {
                let sure = is_sure(ops, op, *to, at);
                let (file, from, grain): (&mut Vec<u8>, &[u8], usize) = match to {
                    Which::Data => (&mut data, &padded[*start..start + len], PAGE),
                    Which::Bits => (&mut bits, bytes, SECTOR),
                    Which::Spool => continue,
                };
                file.resize(file.len().max(start + len), 0);
                let all = random.below(2) == 0;
                for (index, part) in from.chunks(grain).enumerate() {
                    if sure || (all && random.below(8) > 0) {
                        let to = start + index * grain;
                        file[to..to + part.len()].copy_from_slice(part);
                    }
                }
            }
            Act::Cut { of, at } => match of {
                Which::Data => data.resize(*at, 0),
                Which::Bits => bits.resize(*at, 0),
                Which::Spool => {}
            },
            Act::Punch { at, len } => {
                let end = data.len().min(at + len);
                data[*at..end].fill(0);
            }
            Act::Sync(_) | Act::Rename => {}
        }
    }
    (data, bits)
}

/// What two runs in a row did, of which the first does not end well, and in how many lines of a trace;
/// `None` where they cannot be traced.
fn broken_then_whole(dir: &Path, args: &[&str]) -> Option<(Vec<Op>, usize)> {
    let (first_ended_well, mut trace) = traced(dir, args, "1.txt")?;
    let (second_ended_well, second) = traced(dir, args, "2.txt").unwrap();
    assert!(!first_ended_well && second_ended_well);
    trace.push_str(&second);
    Some((parse(&trace), trace.lines().count()))
}

/// Runs `bedplate pull` under strace, without io_uring so that every write is seen; what it did.
fn traced(dir: &Path, args: &[&str], name: &str) -> Option<(bool, String)> {
    let trace = dir.join(name);
    let calls = "trace=pwrite64,fdatasync,fsync,ftruncate,fallocate,rename,renameat,renameat2";
    let mut command = Command::new("strace");
    command.args(["-f", "-y", "-xx", "-s", "4096", "-e", calls, "-o"]).arg(&trace);
    forbid_io_uring(clean(&mut command).arg(BEDPLATE).args(["-q", "pull"]).args(args), libc::EPERM);
    let Ok(output) = command.output() else {
        println!("SKIPPED: strace is not installed");
        assert!(std::env::var("REQUIRE_TOOLS").as_deref() != Ok("1"), "REQUIRE_TOOLS=1");
        return None;
    };
    if stderr(&output).contains("PTRACE_TRACEME") {
        println!("SKIPPED: this host does not permit ptrace");
        return None;
    }
    Some((output.status.success(), std::fs::read_to_string(trace).unwrap()))
}

#[test]
fn no_presence_bit_ever_lies_whatever_the_power_takes() {
    let bytes = content(LEN, 91);
    let served = bytes.clone();
    // The first run breaks in the middle and ends; the second goes on. A weak ETag: one connection.
    let server = FaultServer::start(move |request| {
        let mut reply = Reply::ranged(request, &served, "W/\"x\"");
        reply.pace = Duration::from_millis(25);
        match request.index {
            0 => reply.cut(Cut::Close(LEN * 2 / 3)),
            1 => Reply::status("404 Not Found"),
            _ => reply,
        }
    });
    let temp = tempfile::tempdir().unwrap();
    let (url, output) = (format!("{}/x", server.url), temp.path().join("out.img"));
    let digest = sha256(&bytes);
    let args = [url.as_str(), "-o", output.to_str().unwrap(), "--sha256", &digest];
    let Some((ops, lines)) = broken_then_whole(temp.path(), &args) else { return };
    assert!(std::fs::read(&output).unwrap() == bytes);
    let pages =
        ops.iter().filter(|op| matches!(op.act, Act::Write { to: Which::Bits, .. })).count();
    assert!(pages >= 5, "{pages} commits: too few to mean anything");
    assert_eq!(lie(&ops, &bytes), None);
    // The same without a sync of the data, and with each commit begun before the sync has ended:
    // both are found out, or the search above means nothing.
    let no_sync: Vec<Op> =
        ops.iter().filter(|op| !matches!(op.act, Act::Sync(Which::Data))).cloned().collect();
    assert!(lie(&no_sync, &bytes).is_some());
    let mut early = ops.clone();
    for op in early.iter_mut().filter(|op| matches!(op.act, Act::Sync(Which::Data))) {
        op.ended += 3;
    }
    assert!(lie(&early, &bytes).is_some());
    open_crashes(&ops, &bytes, lines);
}

/// Builds crashes as files and opens them.
fn open_crashes(ops: &[Op], bytes: &[u8], lines: usize) {
    let seed = std::env::var("SEED").ok().and_then(|text| text.parse().ok()).unwrap_or(1u64);
    println!("SEED={seed}");
    let mut random = Random(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1);
    let served = bytes.to_vec();
    let server = FaultServer::start(move |r| Reply::ranged(r, &served, "W/\"x\""));
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let mut with_bits = 0;
    for crash in 0..CRASHES {
        let at = random.below(lines + 1);
        let (data, bits) = crashed(ops, bytes, at, &mut random);
        let temp = tempfile::tempdir().unwrap();
        std::fs::write(temp.path().join("out.img.bedplate-part"), &data).unwrap();
        std::fs::write(temp.path().join("out.img.bedplate-presence"), &bits).unwrap();
        let dir = Dir::open(temp.path()).unwrap();
        let mut missing = LEN as u64;
        if let Some(presence) = Presence::load(&dir, "out.img.bedplate-presence").unwrap() {
            for unit in (0..LEN as u64 / UNIT_BYTES).filter(|&unit| presence.has_unit(unit)) {
                let range = (unit * UNIT_BYTES) as usize..((unit + 1) * UNIT_BYTES) as usize;
                assert!(
                    data.get(range.clone()) == Some(&bytes[range]),
                    "crash {crash}, unit {unit}"
                );
            }
            missing =
                presence.missing(LEN as u64).iter().map(|range| range.end - range.start).sum();
        }
        if missing == LEN as u64 || with_bits >= 20 {
            continue;
        }
        with_bits += 1;
        // The program itself goes on from there, and asks for no more than what is missing.
        let url = SourceUrl::parse(&format!("{}/x", server.url)).unwrap();
        let expect = Expect::parse(Some(&sha256(bytes)), None).unwrap();
        let source = Source::new(url).expecting(expect);
        let output = temp.path().join("out.img");
        let request = PullRequest { source, layout: Layout::AsIs, output: output.clone() };
        let engine = engine(temp.path(), Choice::Auto);
        let pulled = runtime.block_on(pull(&engine, &request, &Arc::new(Progress::default())));
        let received = pulled.unwrap_or_else(|e| panic!("crash {crash}: {}", e.report()));
        assert!(std::fs::read(output).unwrap() == bytes, "crash {crash}");
        let most = missing.max(1);
        assert!(received.received_bytes <= most, "{} > {most}", received.received_bytes);
    }
    assert!(with_bits >= 10, "only {with_bits} crashes left something to go on with");
}

/// Where a spool's bytes begin, of a source for which one page speaks (see `disk::spool`).
const SPOOL_AT: usize = 4 * PAGE;

/// How many pages were written that speak for bytes of a source, and the first that lies after some
/// crash.
fn spool_lie(ops: &[Op]) -> (usize, Option<String>) {
    let spooled = |op: &Op| match op.act {
        Act::Write { to: Which::Spool, at, len, .. } => Some((at, len)),
        Act::Write { .. } | Act::Sync(_) | Act::Cut { .. } | Act::Punch { .. } | Act::Rename => {
            None
        }
    };
    let mut pages = 0;
    for op in ops {
        let Act::Write { to: Which::Spool, at, bytes: page, .. } = &op.act else { continue };
        if !(2 * PAGE..SPOOL_AT).contains(at) {
            continue;
        }
        pages += 1;
        let count = u64::from_le_bytes(page[16..24].try_into().unwrap()) as usize;
        // What is sure by now, from the first byte on: writes follow each other.
        let mut sure = SPOOL_AT;
        for write in ops.iter().filter(|write| is_sure(ops, write, Which::Spool, op.began)) {
            if let Some((start, len)) = spooled(write)
                && (SPOOL_AT..=sure).contains(&start)
            {
                sure = sure.max(start + len);
            }
        }
        if sure < SPOOL_AT + count {
            let (line, sure) = (op.began, sure - SPOOL_AT);
            return (pages, Some(format!("line {line} speaks for {count} bytes, {sure} are sure")));
        }
    }
    (pages, None)
}

#[test]
fn no_spool_ever_lies_whatever_the_power_takes() {
    let bytes = content(LEN, 92);
    let Some(stream) = crate::unpack::packed("gzip", &bytes) else { return };
    let (served, digest) = (stream.clone(), sha256(&stream));
    let server = FaultServer::start(move |request| {
        let mut reply = Reply::ranged(request, &served, "\"x\"");
        reply.pace = Duration::from_millis(25);
        match request.index {
            0 => reply.cut(Cut::Close(served.len() * 2 / 3)),
            1 => Reply::status("404 Not Found"),
            _ => reply,
        }
    });
    let temp = tempfile::tempdir().unwrap();
    let (url, output) = (format!("{}/x", server.url), temp.path().join("out.img"));
    let args = [url.as_str(), "-o", output.to_str().unwrap(), "--unpack", "--sha256", &digest];
    let Some((ops, _)) = broken_then_whole(temp.path(), &args) else { return };
    assert!(std::fs::read(&output).unwrap() == bytes);
    let (pages, lie) = spool_lie(&ops);
    assert!(pages >= 4, "{pages} commits: too few to mean anything");
    assert_eq!(lie, None);
    // Without its first syncs it does lie: the search above means something.
    let no_sync: Vec<Op> =
        ops.iter().filter(|op| !matches!(op.act, Act::Sync(Which::Spool))).cloned().collect();
    assert!(spool_lie(&no_sync).1.is_some());
    let mut early = ops.clone();
    for op in early.iter_mut().filter(|op| matches!(op.act, Act::Sync(Which::Spool))) {
        op.ended += 3;
    }
    assert!(spool_lie(&early).1.is_some());
}
