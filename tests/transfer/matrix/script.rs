//! What a seed decides: the image, the server, and what goes wrong when.

use std::collections::BTreeMap;
use std::process::Command;
use std::sync::OnceLock;
use std::time::Duration;

use super::{MIB, SECRET, SURVIVABLE};
use crate::content;
use crate::fault_server::{Cut, Reply, Request};

pub const KINDS: u64 = 26;
pub const ETAGS: [&str; 2] = ["\"first\"", "\"second\""];

/// What a server does to one request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    // Those that pass: the same request works the next time.
    Close(u64),
    Reset(u64),
    Stall(u64),
    BrokenChunks(u64),
    Chunked,
    TooLong,
    Busy,
    Later(u64),
    SlowHead,
    EndlessHead,
    LongHeader,
    HeaderFlood,
    Redirect,
    // Those that make a run begin again.
    Whole,
    Gone,
    // Those that are a lie, and may end it.
    LongerTotal,
    ShorterTotal,
    OtherStart,
    OtherEnd,
    OtherLength,
    NoRangeSaid,
    Unsatisfiable,
    Encoded,
    TooManyChunks,
    Loop,
    /// Bytes of the other version under this one's name: only a digest can tell.
    OtherBytes,
}

/// How much a fault may cost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Weight {
    Passes,
    BeginsAgain,
    MayEnd,
}

impl Fault {
    pub fn draw(random: &mut Random) -> Self {
        let kind = random.next() % KINDS;
        Self::of_kind(kind, random.next())
    }

    pub fn of_kind(kind: u64, at: u64) -> Self {
        match kind {
            0 => Self::Close(at),
            1 => Self::Reset(at),
            2 => Self::Stall(at),
            3 => Self::BrokenChunks(at),
            4 => Self::Chunked,
            5 => Self::TooLong,
            6 => Self::Busy,
            7 => Self::Later(at % 2),
            8 => Self::SlowHead,
            9 => Self::EndlessHead,
            10 => Self::LongHeader,
            11 => Self::HeaderFlood,
            12 => Self::Redirect,
            13 => Self::Whole,
            14 => Self::Gone,
            15 => Self::LongerTotal,
            16 => Self::ShorterTotal,
            17 => Self::OtherStart,
            18 => Self::OtherEnd,
            19 => Self::OtherLength,
            20 => Self::NoRangeSaid,
            21 => Self::Unsatisfiable,
            22 => Self::Encoded,
            23 => Self::TooManyChunks,
            24 => Self::Loop,
            _ => Self::OtherBytes,
        }
    }

    pub fn weight(self) -> Weight {
        match self {
            Self::Close(_)
            | Self::Reset(_)
            | Self::Stall(_)
            | Self::BrokenChunks(_)
            | Self::Chunked
            | Self::TooLong
            | Self::Busy
            | Self::Later(_)
            | Self::SlowHead
            | Self::EndlessHead
            | Self::LongHeader
            | Self::HeaderFlood
            | Self::Redirect => Weight::Passes,
            Self::Whole | Self::Gone => Weight::BeginsAgain,
            Self::LongerTotal
            | Self::ShorterTotal
            | Self::OtherStart
            | Self::OtherEnd
            | Self::OtherLength
            | Self::NoRangeSaid
            | Self::Unsatisfiable
            | Self::Encoded
            | Self::TooManyChunks
            | Self::Loop
            | Self::OtherBytes => Weight::MayEnd,
        }
    }

    /// The word before the numbers.
    pub fn kind(self) -> String {
        format!("{self:?}").split('(').next().unwrap().to_owned()
    }
}

/// How a server tells versions apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Identity {
    Strong,
    Weak,
    None,
}

/// Everything that a seed decides.
#[derive(Clone, Debug)]
pub struct Script {
    pub raw: bool,
    pub identity: Identity,
    pub digest: bool,
    pub honours_if_match: bool,
    pub pace: Duration,
    pub len: usize,
    /// By the number of the request.
    pub faults: BTreeMap<usize, Fault>,
    /// Requests from which on the object is the other version.
    pub switches: Vec<usize>,
}

pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        let mut random = Self(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1);
        for _ in 0..4 {
            random.next();
        }
        random
    }

    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 >> 8
    }

    pub fn below(&mut self, limit: usize) -> usize {
        (self.next() % limit as u64) as usize
    }

    pub fn one_in(&mut self, count: usize) -> bool {
        self.below(count) == 0
    }
}

impl Script {
    pub fn draw(seed: u64) -> Self {
        let mut random = Random::new(seed);
        let identity = match random.below(6) {
            0 => Identity::Weak,
            1 => Identity::None,
            _ => Identity::Strong,
        };
        let opening = Fault::of_kind(seed % KINDS, random.next());
        let raw = random.one_in(4) && have_qemu();
        let digest = random.one_in(2) || opening == Fault::OtherBytes;
        // Where each connection is slow there are several.
        let slow = random.one_in(3);
        let len = if slow { 10 * MIB } else { 3 * MIB } + random.below(2 * MIB);
        let pace = Duration::from_millis(if slow { 8 } else { 0 });
        let mut faults = BTreeMap::new();
        // Mostly few faults; now and then a server that does nothing right for long.
        let (requests, most) = if random.one_in(5) { (24, 24) } else { (8, SURVIVABLE) };
        let only_passing = random.one_in(2) && opening.weight() == Weight::Passes;
        faults.insert(0, opening);
        for index in 1..requests {
            let fault = Fault::draw(&mut random);
            let wanted = !random.one_in(3);
            let passes = fault.weight() == Weight::Passes || !only_passing;
            let told = fault != Fault::OtherBytes || digest;
            if faults.len() < most && wanted && passes && told {
                faults.insert(index, fault);
            }
        }
        let switches = match random.below(6) {
            0 => vec![1 + random.below(5)],
            // There and back again.
            1 => vec![1 + random.below(3), 4 + random.below(3)],
            _ => Vec::new(),
        };
        let honours_if_match = random.one_in(2);
        Self { raw, identity, digest, honours_if_match, pace, len, faults, switches }
    }

    pub fn has(&self, weight: Weight) -> bool {
        self.faults.values().any(|fault| fault.weight() == weight)
    }

    /// True if nothing that it does excuses an error.
    pub fn has_to_work(&self) -> bool {
        let provable = self.identity == Identity::Strong || self.digest;
        provable
            && self.faults.len() <= SURVIVABLE
            && self.switches.is_empty()
            && !self.has(Weight::MayEnd)
            && !(self.raw && self.has(Weight::BeginsAgain))
    }

    /// The version in the end; the one that a digest is of.
    pub fn last(&self) -> usize {
        self.switches.len() % 2
    }

    pub fn version(&self, request: usize) -> usize {
        self.switches.iter().filter(|&&from| from <= request).count() % 2
    }
}

/// The two versions of an object, no page of them alike, and what a pull makes of each.
pub struct Objects {
    pub served: [Vec<u8>; 2],
    pub made: [Vec<u8>; 2],
}

impl Objects {
    pub fn of(script: &Script, seed: u64) -> Self {
        if script.raw {
            static MADE: OnceLock<[[Vec<u8>; 2]; 2]> = OnceLock::new();
            let [served, made] = MADE.get_or_init(qcow2_pair).clone();
            return Self { served, made };
        }
        let first = content(script.len, seed);
        let second = inverse(&first);
        Self { served: [first.clone(), second.clone()], made: [first, second] }
    }

    /// What is wrong with `found`.
    pub fn fault(&self, script: &Script, found: &[u8]) -> Option<&'static str> {
        let version = self.made.iter().position(|made| made == found);
        match version {
            None => Some("neither version"),
            Some(version) if script.digest && version != script.last() => Some("not the digest's"),
            Some(1) if script.switches.is_empty() => Some("a version that was never named"),
            Some(_) => None,
        }
    }
}

pub fn inverse(bytes: &[u8]) -> Vec<u8> {
    bytes.iter().map(|byte| !byte).collect()
}

pub fn have_qemu() -> bool {
    static FOUND: OnceLock<bool> = OnceLock::new();
    *FOUND.get_or_init(|| {
        let found = Command::new("qemu-img").arg("--version").output().is_ok();
        if !found {
            println!("SKIPPED: qemu-img is not installed: no layout raw");
            assert!(std::env::var("REQUIRE_TOOLS").as_deref() != Ok("1"), "REQUIRE_TOOLS=1");
        }
        found
    })
}

/// QCOW2 images of two disks, and the disks.
pub fn qcow2_pair() -> [[Vec<u8>; 2]; 2] {
    let first = content(6 * MIB, 1001);
    let made = [first.clone(), inverse(&first)];
    let temp = tempfile::tempdir().unwrap();
    let served = made.each_ref().map(|bytes| {
        let (raw, image) = (temp.path().join("raw"), temp.path().join("image"));
        std::fs::write(&raw, bytes).unwrap();
        let mut convert = Command::new("qemu-img");
        convert.args(["convert", "-f", "raw", "-O", "qcow2"]).arg(raw).arg(&image);
        assert!(convert.status().unwrap().success());
        std::fs::read(image).unwrap()
    });
    [served, made]
}

/// The reply that a good server would give.
pub fn good(script: &Script, objects: &Objects, version: usize, request: &Request) -> Reply {
    let etag = match script.identity {
        Identity::Strong => ETAGS[version].to_owned(),
        Identity::Weak => format!("W/{}", ETAGS[version]),
        Identity::None => String::new(),
    };
    let asked = request.header("if-match");
    if script.honours_if_match && asked.is_some_and(|asked| asked != etag) {
        return Reply::status("412 Precondition Failed");
    }
    let mut reply = Reply::ranged(request, &objects.served[version], &etag);
    if script.identity == Identity::None {
        reply.headers.retain(|line| !line.starts_with("ETag:"));
    }
    reply.pace = script.pace;
    reply
}

pub fn replace(reply: &mut Reply, name: &str, value: &str) {
    reply.headers.retain(|line| !line.starts_with(&format!("{name}:")));
    reply.headers.push(format!("{name}: {value}"));
}

pub fn to(place: &str) -> Reply {
    let mut reply = Reply::status("302 Found");
    reply.headers.push(format!("Location: {place}?sig={SECRET}"));
    reply
}

/// A good reply with `fault`.
pub fn faulty(
    fault: Fault,
    mut reply: Reply,
    request: &Request,
    whole: &[u8],
    other: &[u8],
) -> Reply {
    let (len, total) = (reply.body.len(), whole.len());
    let first = request.range.as_ref().map_or(0, |range| range.start as usize);
    let place = |at: u64| (at % (len as u64 + 1)) as usize;
    let mut range = |start: usize, end: usize, total: usize| {
        replace(&mut reply, "Content-Range", &format!("bytes {start}-{end}/{total}"));
    };
    let last = first + len.saturating_sub(1);
    match fault {
        Fault::OtherStart => range(first + 65_536, last + 65_536, total + 65_536),
        Fault::OtherEnd => range(first, last.saturating_sub(4096), total),
        Fault::LongerTotal => range(first, last, total + 4096),
        Fault::ShorterTotal => range(first, last, total.saturating_sub(4096)),
        Fault::Close(at) => return reply.cut(Cut::Close(place(at))),
        Fault::Reset(at) => return reply.cut(Cut::Reset(place(at))),
        Fault::Stall(at) => return reply.cut(Cut::Stall(place(at))),
        Fault::BrokenChunks(at) => return reply.in_chunks().cut(Cut::Close(place(at))),
        Fault::Chunked => return reply.in_chunks(),
        Fault::TooLong => reply.body.extend([7; 1000]),
        Fault::TooManyChunks => {
            reply.body.extend([7; 1000]);
            return reply.in_chunks();
        }
        Fault::Busy => return Reply::status("503 Service Unavailable"),
        Fault::Later(seconds) => {
            let mut reply = Reply::status("429 Too Many Requests");
            reply.headers.push(format!("Retry-After: {seconds}"));
            return reply;
        }
        Fault::SlowHead => reply.head_pace = Duration::from_millis(1),
        Fault::EndlessHead => reply.head_pace = Duration::from_millis(30),
        Fault::LongHeader => reply.headers.push(format!("X-Long: {}", "x".repeat(100 << 10))),
        Fault::HeaderFlood => {
            reply.headers.extend((0..5000).map(|index| format!("X-{index}: {index}")));
        }
        Fault::Redirect => return to("/elsewhere"),
        Fault::Loop => return to("/loop"),
        Fault::Whole => {
            reply.headers.retain(|line| line.starts_with("ETag:"));
            reply.headers.push(format!("Content-Length: {total}"));
            (reply.status, reply.body) = ("200 OK", whole.to_vec());
        }
        Fault::Gone => return Reply::status("412 Precondition Failed"),
        Fault::OtherLength => replace(&mut reply, "Content-Length", &(len + 1000).to_string()),
        Fault::NoRangeSaid => reply.headers.retain(|line| !line.starts_with("Content-Range:")),
        Fault::Unsatisfiable => return Reply::status("416 Range Not Satisfiable"),
        Fault::Encoded => reply.headers.push("Content-Encoding: gzip".into()),
        Fault::OtherBytes => {
            reply.body = other.get(first..first + len).map_or(reply.body, <[u8]>::to_vec);
        }
    }
    reply
}
