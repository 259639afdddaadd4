//! Promise: whatever a server does, in whatever order, a pull ends with the right bytes or with one
//! clear error that gives no secret away; and the next pull from a good server ends well, without
//! asking again for what is durable.
//!
//! Each run draws its image, its server and a script of faults from a seed. `SEED=N` repeats one
//! run: the same script, though connections may meet its faults in another order.

use std::collections::BTreeMap;
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use crate::fault_server::{Cut, FaultServer, Reply, Request};
use crate::{content, sha256};
use bedplate::disk::{Dir, FileNames, Filling, Presence};
use bedplate::fetch::{Class, Engine, Expect, Policy, Progress, Source, SourceUrl};
use bedplate::import::{ImportError, Layout, PullRequest, Pulled, pull};
use bedplate::ring::{Choice, probe};

/// Each of the kinds is three times the first fault of a script. `RUNS=N` looks further.
const RUNS: u64 = 3 * KINDS;
const KINDS: u64 = 26;
const MIB: usize = 1 << 20;
const SECRET: &str = "hunter2";
const ETAGS: [&str; 2] = ["\"first\"", "\"second\""];
/// Faults of a script that an engine with six attempts has to survive, with room for a slow host.
const SURVIVABLE: usize = 3;

/// What a server does to one request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
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
enum Weight {
    Passes,
    BeginsAgain,
    MayEnd,
}

impl Fault {
    fn draw(random: &mut Random) -> Self {
        let kind = random.next() % KINDS;
        Self::of_kind(kind, random.next())
    }

    fn of_kind(kind: u64, at: u64) -> Self {
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

    fn weight(self) -> Weight {
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
    fn kind(self) -> String {
        format!("{self:?}").split('(').next().unwrap().to_owned()
    }
}

/// How a server tells versions apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Identity {
    Strong,
    Weak,
    None,
}

/// Everything that a seed decides.
#[derive(Clone, Debug)]
struct Script {
    raw: bool,
    identity: Identity,
    digest: bool,
    honours_if_match: bool,
    pace: Duration,
    len: usize,
    /// By the number of the request.
    faults: BTreeMap<usize, Fault>,
    /// Requests from which on the object is the other version.
    switches: Vec<usize>,
}

struct Random(u64);

impl Random {
    fn new(seed: u64) -> Self {
        let mut random = Self(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1);
        for _ in 0..4 {
            random.next();
        }
        random
    }

    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 >> 8
    }

    fn below(&mut self, limit: usize) -> usize {
        (self.next() % limit as u64) as usize
    }

    fn one_in(&mut self, count: usize) -> bool {
        self.below(count) == 0
    }
}

impl Script {
    fn draw(seed: u64) -> Self {
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

    fn has(&self, weight: Weight) -> bool {
        self.faults.values().any(|fault| fault.weight() == weight)
    }

    /// True if nothing that it does excuses an error.
    fn has_to_work(&self) -> bool {
        let provable = self.identity == Identity::Strong || self.digest;
        provable
            && self.faults.len() <= SURVIVABLE
            && self.switches.is_empty()
            && !self.has(Weight::MayEnd)
            && !(self.raw && self.has(Weight::BeginsAgain))
    }

    /// The version in the end; the one that a digest is of.
    fn last(&self) -> usize {
        self.switches.len() % 2
    }

    fn version(&self, request: usize) -> usize {
        self.switches.iter().filter(|&&from| from <= request).count() % 2
    }
}

/// The two versions of an object, no page of them alike, and what a pull makes of each.
struct Objects {
    served: [Vec<u8>; 2],
    made: [Vec<u8>; 2],
}

impl Objects {
    fn of(script: &Script, seed: u64) -> Self {
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
    fn fault(&self, script: &Script, found: &[u8]) -> Option<&'static str> {
        let version = self.made.iter().position(|made| made == found);
        match version {
            None => Some("neither version"),
            Some(version) if script.digest && version != script.last() => Some("not the digest's"),
            Some(1) if script.switches.is_empty() => Some("a version that was never named"),
            Some(_) => None,
        }
    }
}

fn inverse(bytes: &[u8]) -> Vec<u8> {
    bytes.iter().map(|byte| !byte).collect()
}

fn have_qemu() -> bool {
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
fn qcow2_pair() -> [[Vec<u8>; 2]; 2] {
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
fn good(script: &Script, objects: &Objects, version: usize, request: &Request) -> Reply {
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

fn replace(reply: &mut Reply, name: &str, value: &str) {
    reply.headers.retain(|line| !line.starts_with(&format!("{name}:")));
    reply.headers.push(format!("{name}: {value}"));
}

fn to(place: &str) -> Reply {
    let mut reply = Reply::status("302 Found");
    reply.headers.push(format!("Location: {place}?sig={SECRET}"));
    reply
}

/// A good reply with `fault`.
fn faulty(fault: Fault, mut reply: Reply, request: &Request, whole: &[u8], other: &[u8]) -> Reply {
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

/// One run: its script, its server, its directory.
struct Run {
    label: String,
    script: Script,
    objects: Arc<Objects>,
    server: FaultServer,
    healthy: Arc<AtomicBool>,
    met: Arc<Mutex<Vec<Fault>>>,
    temp: tempfile::TempDir,
}

/// What a pull came to, and how many connections it had at most.
struct Ended {
    result: Result<Pulled, ImportError>,
    received: u64,
    connections: u64,
}

impl Run {
    fn start(seed: u64) -> Self {
        let script = Script::draw(seed);
        let label = format!("SEED={seed} {script:?}");
        let objects = Arc::new(Objects::of(&script, seed));
        let (healthy, met) = (Arc::new(AtomicBool::new(false)), Arc::new(Mutex::new(Vec::new())));
        let (well, seen) = (Arc::clone(&healthy), Arc::clone(&met));
        let (drawn, both) = (script.clone(), Arc::clone(&objects));
        let server = FaultServer::start(move |request| {
            if well.load(Ordering::SeqCst) {
                return good(&drawn, &both, drawn.last(), request);
            }
            if request.path.starts_with("/loop") {
                return to("/loop");
            }
            let version = drawn.version(request.index);
            let reply = good(&drawn, &both, version, request);
            let Some(&fault) = drawn.faults.get(&request.index) else { return reply };
            if reply.body.is_empty() {
                return reply;
            }
            seen.lock().unwrap().push(fault);
            faulty(fault, reply, request, &both.served[version], &both.served[1 - version])
        });
        let temp = tempfile::tempdir().unwrap();
        Self { label, script, objects, server, healthy, met, temp }
    }

    fn output(&self) -> std::path::PathBuf {
        self.temp.path().join("out.img")
    }

    fn names(&self) -> Vec<String> {
        let entries = self.temp.path().read_dir().unwrap();
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    }

    fn pull(&self) -> Ended {
        let policy = Policy {
            connect_timeout: Duration::from_millis(1000),
            stall_timeout: Duration::from_millis(400),
            backoff: Duration::from_millis(1),
            ..Policy::default()
        };
        let engine = Engine::alone(probe(self.temp.path(), Choice::Auto).unwrap(), policy, 16);
        let url = format!("{}/x?token={SECRET}", self.server.url);
        let mut source = Source::new(SourceUrl::parse(&url).unwrap());
        if self.script.digest {
            let digest = sha256(&self.objects.served[self.script.last()]);
            source = source.expecting(Expect::parse(Some(&digest), None).unwrap());
        }
        let layout = if self.script.raw { Layout::Raw } else { Layout::AsIs };
        let request = PullRequest { source, layout, output: self.output() };
        let (progress, most) = (Arc::new(Progress::default()), Arc::new(AtomicU64::new(0)));
        let (watched, seen) = (Arc::clone(&progress), Arc::clone(&most));
        let runtime = tokio::runtime::Runtime::new().unwrap();
        runtime.spawn(async move {
            loop {
                seen.fetch_max(watched.snapshot().connections.into(), Ordering::Relaxed);
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        });
        let result = runtime.block_on(pull(&engine, &request, &progress));
        let received = progress.snapshot().bytes_received;
        Ended { result, received, connections: most.load(Ordering::Relaxed) }
    }

    fn is_right(&self) {
        let found = std::fs::read(self.output()).unwrap();
        assert_eq!(self.objects.fault(&self.script, &found), None, "{}", self.label);
        assert_eq!(self.names(), ["out.img"], "{}", self.label);
    }

    fn is_clear(&self, error: &ImportError) {
        let (label, text) = (&self.label, error.report());
        assert!(!self.output().exists(), "a file under the final name; {label}");
        assert_ne!(error.class(), Class::Cancelled, "{text}; {label}");
        assert!(text.contains(&format!("{}/x", self.server.url)), "{text}; {label}");
        for text in [&text, &format!("{error:?}")] {
            assert!(!text.contains(SECRET), "{text}; {label}");
        }
        assert!(!self.script.has_to_work(), "{text}; {label}");
        let lies = self.script.has(Weight::MayEnd);
        let no_parts = self.script.raw;
        let same = self.script.switches.is_empty();
        if !lies && !no_parts && same {
            assert_eq!(error.class(), Class::Retry, "{text}; {label}");
        }
    }

    /// Bytes that a good server need not send again.
    fn durable(&self) -> u64 {
        let dir = Dir::open(self.temp.path()).unwrap();
        let names = FileNames::file("out.img");
        let Some((bytes, Some(total))) = Filling::peek(&dir, &names).unwrap() else { return 0 };
        let presence = Presence::load(&dir, &names.presence).unwrap();
        let tag = presence.map(|presence| presence.version().tag.clone()).unwrap_or_default();
        let etag = ETAGS[self.script.last()].trim_matches('"');
        let same = total == self.objects.made[self.script.last()].len() as u64;
        let strong = self.script.identity == Identity::Strong && tag.contains(etag);
        if same && strong { bytes } else { 0 }
    }

    /// The same pull from a server that has recovered.
    fn recover(&self) {
        self.healthy.store(true, Ordering::SeqCst);
        let (label, durable) = (&self.label, self.durable());
        let mut ended = self.pull();
        // Wrong bytes under the right name are found out by the digest alone, in the end.
        let lied = self.met.lock().unwrap().contains(&Fault::OtherBytes);
        if lied && ended.result.is_err() {
            ended = self.pull();
        } else if !self.script.raw {
            let missing = self.objects.served[self.script.last()].len() as u64 - durable;
            // Where one connection hands over to several, the end of its last read is dropped.
            let dropped = if ended.connections > 1 { MIB as u64 } else { 0 };
            let most = missing.max(1) + dropped;
            assert!(ended.received <= most, "{} > {most}; {label}", ended.received);
        }
        let provable = self.script.identity == Identity::Strong || self.script.digest;
        match ended.result {
            Ok(_) => self.is_right(),
            // Parts of a source without versions cannot be put together, by anybody.
            Err(error) if self.script.raw && !provable => {
                assert!(error.report().contains("parts of it"), "{}; {label}", error.report());
            }
            Err(error) => panic!("after recovery: {}; {label}", error.report()),
        }
    }
}

/// What the runs have met, so that they are known to mean something.
#[derive(Default)]
struct Tally {
    right: AtomicUsize,
    refused: AtomicUsize,
    several: AtomicUsize,
    met: Mutex<BTreeMap<String, usize>>,
}

fn run(seed: u64, tally: &Tally) {
    let run = Run::start(seed);
    println!("{}", run.label);
    let ended = run.pull();
    let most = run.most_received();
    assert!(ended.received <= most, "{} > {most} bytes; {}", ended.received, run.label);
    match ended.result {
        Ok(_) => {
            run.is_right();
            tally.right.fetch_add(1, Ordering::Relaxed);
        }
        Err(error) => {
            println!("  {}", error.report());
            run.is_clear(&error);
            run.recover();
            tally.refused.fetch_add(1, Ordering::Relaxed);
        }
    }
    tally.several.fetch_add(usize::from(ended.connections > 1), Ordering::Relaxed);
    for fault in run.met.lock().unwrap().iter() {
        *tally.met.lock().unwrap().entry(fault.kind()).or_default() += 1;
    }
}

impl Run {
    /// Bytes of one pull at most: all of it, again for each time that it may begin again.
    fn most_received(&self) -> u64 {
        let script = &self.script;
        let total = self.objects.served.iter().map(Vec::len).max().unwrap() as u64;
        let once = script.switches.is_empty()
            && !script.has(Weight::BeginsAgain)
            && !script.has(Weight::MayEnd);
        let times = if once { 1 } else { 4 };
        times * (total + script.faults.len() as u64 * MIB as u64)
    }
}

#[test]
fn whatever_a_server_does_the_bytes_are_right_or_the_error_is_clear() {
    let tally = Tally::default();
    if let Some(seed) = std::env::var("SEED").ok().and_then(|text| text.parse().ok()) {
        return run(seed, &tally);
    }
    // Most of the time a run waits for a server that does nothing.
    let next = AtomicU64::new(1);
    let runs = std::env::var("RUNS").ok().and_then(|text| text.parse().ok()).unwrap_or(RUNS);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed > runs {
                        return;
                    }
                    run(seed, &tally);
                }
            });
        }
    });
    let (right, refused) = (tally.right.into_inner(), tally.refused.into_inner());
    let (several, met) = (tally.several.into_inner(), tally.met.into_inner().unwrap());
    println!("{right} right, {refused} refused, {several} on several connections; {met:?}");
    assert!(right >= 10 && refused >= 10 && several >= 3, "{right}, {refused}, {several}");
    assert_eq!(met.len() as u64, KINDS, "{met:?}");
}

#[test]
fn a_mix_of_two_versions_would_be_found() {
    let mut script = Script::draw(1);
    (script.raw, script.digest, script.switches, script.len) = (false, false, vec![1], MIB);
    let objects = Objects::of(&script, 1);
    let mut mix = objects.made[0].clone();
    mix[4096..8192].copy_from_slice(&objects.made[1][4096..8192]);
    assert_eq!(objects.fault(&script, &mix), Some("neither version"));
    assert_eq!(objects.fault(&script, &objects.made[0][1..]), Some("neither version"));
    assert_eq!(objects.fault(&script, &objects.made[0]), None);
    script.digest = true;
    assert_eq!(objects.fault(&script, &objects.made[0]), Some("not the digest's"));
    (script.digest, script.switches) = (false, Vec::new());
    assert_eq!(objects.fault(&script, &objects.made[1]), Some("a version that was never named"));
    let alike = |(a, b): (&[u8], &[u8])| a == b;
    let [first, second] = &objects.made;
    assert!(!first.chunks(4096).zip(second.chunks(4096)).any(alike), "each page differs");
}
