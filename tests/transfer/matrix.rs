//! Promise: whatever a server does, in whatever order, a pull ends with the right bytes or with one
//! clear error that gives no secret away; and the next pull from a good server ends well, without
//! asking again for what is durable.
//!
//! Each run draws its image, its server and a script of faults from a seed. `SEED=N` repeats one
//! run: the same script, though connections may meet its faults in another order.

mod script;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use script::{ETAGS, Fault, Identity, KINDS, Objects, Script, Weight, faulty, good, to};

use crate::fault_server::FaultServer;
use crate::sha256;
use bedplate::disk::{Dir, FileNames, Filling, Presence};
use bedplate::fetch::{Class, Engine, Expect, Policy, Progress, Source, SourceUrl};
use bedplate::import::{ImportError, Layout, PullRequest, Pulled, pull};
use bedplate::ring::{Choice, probe};

/// Each of the kinds is three times the first fault of a script. `RUNS=N` looks further.
const RUNS: u64 = 3 * KINDS;
const MIB: usize = 1 << 20;
const SECRET: &str = "hunter2";
/// Faults of a script that an engine with six attempts has to survive, with room for a slow host.
const SURVIVABLE: usize = 3;

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
