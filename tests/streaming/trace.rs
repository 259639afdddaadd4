//! Traces: what one node's readers asked for is here on the next node before it is read.

use std::process::{Command, Stdio};
use std::time::Duration;

use serde_json::{Value, json};

use bedplate::replica::{Mode, Options, Replica};

use crate::control_support::{BEDPLATE, Daemon, clean, collect, stderr, stdout};
use crate::fault_server::{Reply, Request};
use crate::nbd_support::{Wire, write_sparse};
use crate::origin::{MIB, Origin, attach, nbd, socket, state, stream};
use crate::qcow2_common::{Random, have_qemu, run};

const LEN: usize = 96 << 20;
const UNIT: usize = 64 << 10;
/// Reads of a boot that is none, all over the disk.
const READS: usize = 300;

/// Where they are, each in another unit; none at the beginning: the first MiB comes with the first
/// answer, and the next one is in the hands of the connection that the source keeps waiting.
fn boot() -> Vec<usize> {
    let units = LEN / UNIT - 64;
    let all: Vec<_> = (0..READS).map(|n| (64 + n * 467 % units) * UNIT).collect();
    let different: std::collections::BTreeSet<_> = all.iter().collect();
    assert_eq!(different.len(), READS);
    all
}

/// Noise that compresses a little, so that every format has it in the order of the disk.
fn noise() -> Vec<u8> {
    let mut random = Random(11);
    let word = move || (random.next() & 0x3f3f_3f3f_3f3f_3f3f).to_le_bytes();
    std::iter::repeat_with(word).take(LEN / 8).flatten().collect()
}

fn read_all(wire: &mut Wire, bytes: &[u8]) {
    for at in boot() {
        assert!(wire.read_structured(0, at as u64, 4096) == bytes[at..at + 4096], "{at}");
    }
}

fn stat(daemon: &Daemon, key: &str) -> u64 {
    daemon.get("/v1/stats")["images"][0][key].as_u64().unwrap()
}

fn qcow2(bytes: &[u8], options: &[&str]) -> Vec<u8> {
    let dir = tempfile::tempdir().unwrap();
    let (raw, image) = (dir.path().join("raw"), dir.path().join("image"));
    write_sparse(&raw, bytes);
    let mut args = vec!["convert", "-q", "-f", "raw", "-O", "qcow2"];
    args.extend(options);
    args.extend([raw.to_str().unwrap(), image.to_str().unwrap()]);
    run("qemu-img", &args);
    std::fs::read(image).unwrap()
}

/// Records the boot from `source` on a node of its own; the trace, and how often it waited.
fn record(source: Vec<u8>, bytes: &[u8]) -> (Value, u64) {
    let origin = Origin::start(source);
    let daemon = Daemon::start();
    attach(&daemon, &origin, &json!({}));
    let (status, begun) = daemon.curl("POST", "/v1/images/img/trace", None);
    assert_eq!((status, &begun["recording"]), (201, &json!(true)), "{begun}");
    let before = stat(&daemon, "demand_misses");
    read_all(&mut nbd(&daemon), bytes);
    let misses = stat(&daemon, "demand_misses") - before;
    let (status, trace) = daemon.curl("DELETE", "/v1/images/img/trace", None);
    assert_eq!(status, 200, "{trace}");
    assert_eq!(daemon.curl("GET", "/v1/images/img/trace", None).0, 404, "it is not kept");
    (trace, misses)
}

/// Creates the image, gives it the trace, and attaches while nothing of it is here.
fn attach_with(daemon: &Daemon, origin: &Origin, trace: &Value) {
    let image = json!({"name": "img", "url": format!("{}/disk.img", origin.server.url)});
    assert_eq!(daemon.curl("POST", "/v1/images", Some(&image.to_string())).0, 201);
    let (status, image) = daemon.curl("PUT", "/v1/images/img/prefetch", Some(&trace.to_string()));
    assert_eq!(status, 200, "{image}");
    let ranges = trace["ranges"].as_array().unwrap().len() as u64;
    assert_eq!(image["prefetch"]["ranges"], json!(ranges));
    stream(daemon);
}

/// Waits until all of the boot was fetched ahead, or more.
fn wait_until_fetched(daemon: &Daemon, bytes: usize) {
    while stat(daemon, "prefetched_bytes") < bytes as u64 {
        std::thread::yield_now();
    }
}

#[test]
fn what_one_node_s_guest_read_is_here_before_the_next_one_s_reads_it() {
    if !have_qemu() {
        return;
    }
    let bytes = noise();
    let plain = qcow2(&bytes, &[]);
    let (trace, misses) = record(plain.clone(), &bytes);
    assert_eq!(trace["ranges"].as_array().unwrap()[0], json!([boot()[0], UNIT]));
    assert!(misses > READS as u64 / 3, "{misses}: without a trace most reads wait");
    for (kind, source) in [("raw", bytes.clone()), ("qcow2", plain)] {
        let origin = Origin::start(source.clone());
        let daemon = Daemon::start();
        attach_with(&daemon, &origin, &trace);
        wait_until_fetched(&daemon, READS * UNIT);
        let before = stat(&daemon, "demand_misses");
        let mut wire = nbd(&daemon);
        read_all(&mut wire, &bytes);
        assert_eq!(stat(&daemon, "demand_misses") - before, 0, "{kind}: nothing is waited for");
        assert_eq!(state(&daemon), "in-progress", "{kind}: and most of it is still to come");
        origin.open(&daemon, "img");
        let image = daemon.wait_for("img", "ready");
        assert_eq!(image["digests"]["sha256"], json!(crate::reads::sha256(&source)), "{kind}");
        read_all(&mut wire, &bytes);
    }
}

#[test]
fn compressed_clusters_are_fetched_ahead_too_and_a_kill_in_the_middle_costs_nothing() {
    if !have_qemu() {
        return;
    }
    let bytes = noise();
    let packed = qcow2(&bytes, &["-c", "-o", "compression_type=zstd"]);
    let (trace, _) = record(packed.clone(), &bytes);
    for (kind, source) in [("zstd", packed), ("raw", bytes.clone())] {
        let origin = Origin::start(source.clone());
        let daemon = Daemon::start();
        attach_with(&daemon, &origin, &trace);
        // Some of it has come.
        wait_until_fetched(&daemon, 1);
        let (_, dir) = daemon.end("KILL");
        let daemon = Daemon::start_in(dir, "");
        stream(&daemon);
        while !daemon.log().contains("all of a trace was asked for") {
            std::thread::yield_now();
        }
        let before = stat(&daemon, "demand_misses");
        let mut wire = nbd(&daemon);
        read_all(&mut wire, &bytes);
        let misses = stat(&daemon, "demand_misses") - before;
        assert!(misses <= 30, "{kind}: only the last of {READS} may be on their way: {misses}");
        assert_eq!(state(&daemon), "in-progress", "{kind}");
        origin.open(&daemon, "img");
        let image = daemon.wait_for("img", "ready");
        assert_eq!(image["digests"]["sha256"], json!(crate::reads::sha256(&source)), "{kind}");
        read_all(&mut wire, &bytes);
    }
}

#[test]
fn a_trace_of_another_image_is_refused_and_one_of_another_size_used_as_far_as_it_fits() {
    let bytes = noise();
    let origin = Origin::start(bytes.clone());
    let daemon = Daemon::start();
    let file = daemon.dir.path().join("boot.trace");
    let (fits, past) = ((40 * MIB, UNIT), (200 * MIB, UNIT));
    let write = |digest: &str| {
        let trace = json!({
            "version": 1, "virtual_size_bytes": 300 * MIB, "digests": {"sha256": digest},
            "ranges": [[past.0, past.1], [fits.0, fits.1], [LEN - 100, 4 * MIB]],
        });
        std::fs::write(&file, trace.to_string()).unwrap();
    };
    write(&"ab".repeat(32));
    let url = format!("{}/disk.img", origin.server.url);
    let digest = crate::reads::sha256(&bytes);
    let path = file.to_str().unwrap();
    let create = ["create", &url, "--name", "img", "--sha256", &digest, "--trace", path];
    let refused = daemon.cli(&create);
    assert_eq!(refused.status.code(), Some(1));
    let said = stderr(&refused);
    assert!(said.contains(&format!("its sha256 is {digest}, and the trace")), "{said}");
    assert!(said.contains("--force"), "{said}");
    assert_eq!(daemon.curl("GET", "/v1/images/img/prefetch", None).0, 404);
    let forced = daemon.cli(&[&create[..], &["--force-trace"]].concat());
    assert!(forced.status.success(), "{}", stderr(&forced));
    write(&digest);
    assert!(daemon.cli(&["trace", "use", "img", path]).status.success());
    stream(&daemon);
    wait_until_fetched(&daemon, UNIT + 100);
    let before = stat(&daemon, "demand_misses");
    let mut wire = nbd(&daemon);
    for at in [40 << 20, LEN - 100] {
        assert!(wire.read_structured(0, at as u64, 100) == bytes[at..at + 100]);
    }
    assert_eq!(stat(&daemon, "demand_misses"), before);
    assert_eq!(daemon.log().matches("of another size").count(), 1, "it is said once");
    let shown: Value =
        serde_json::from_str(&stdout(&daemon.cli(&["trace", "show", "img"]))).unwrap();
    assert_eq!(shown["digests"]["sha256"], json!(digest));
    assert!(daemon.cli(&["trace", "drop", "img"]).status.success());
    assert_eq!(daemon.get("/v1/images/img")["prefetch"], Value::Null);
}

#[test]
fn a_trace_is_recorded_until_ctrl_c_and_only_of_what_is_served() {
    let bytes = noise();
    let origin = Origin::start(bytes.clone());
    let daemon = Daemon::start();
    let url = format!("{}/disk.img", origin.server.url);
    assert!(daemon.cli(&["create", &url, "--name", "img"]).status.success());
    let file = daemon.dir.path().join("boot.trace");
    let path = file.to_str().unwrap();
    let early = daemon.cli(&["trace", "record", "img", "-o", path]);
    assert_eq!(early.status.code(), Some(3), "{}", stderr(&early));
    assert!(stderr(&early).contains("attach it first"), "{}", stderr(&early));
    assert!(!file.exists() && !file.with_extension("trace.part").exists());
    stream(&daemon);
    let mut command = Command::new(BEDPLATE);
    command.arg("--socket").arg(&daemon.socket).args(["trace", "record", "img", "-o", path]);
    let mut child = clean(&mut command).stderr(Stdio::piped()).spawn().unwrap();
    let (_, begun) = collect(child.stderr.take().unwrap(), "img: recording");
    begun.recv().unwrap();
    let options = Options { mode: Mode::Pread, ..Options::default() };
    let replica = Replica::attach(socket(&daemon, "replica.sock"), "img", options).unwrap();
    replica.read_at(&mut [0; 512], 70 * MIB).unwrap();
    let mut wire = nbd(&daemon);
    for at in [20 * MIB, 10 * MIB + 5, 20 * MIB + 4096] {
        wire.read_structured(0, at, 100_000);
    }
    let pid = child.id().to_string();
    assert!(Command::new("kill").args(["-s", "INT", &pid]).status().unwrap().success());
    assert!(child.wait().unwrap().success());
    let trace: Value = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
    let unit = UNIT as u64;
    let wanted = json!([[70 * MIB, unit], [20 * MIB, 2 * unit], [10 * MIB, 2 * unit]]);
    assert_eq!(trace["ranges"], wanted, "what a program and a client asked for, in that order");
    assert_eq!((&trace["image"], &trace["recording"]), (&json!("img"), &json!(false)));
    assert_eq!(trace["virtual_size_bytes"], json!(LEN));
}

#[test]
fn a_source_that_sends_nothing_more_of_a_wanted_piece_is_asked_again_on_another_connection() {
    use crate::fault_server::{Cut, FaultServer};
    use std::sync::atomic::{AtomicBool, Ordering};

    let bytes = noise();
    let body = bytes.clone();
    let has_stalled = AtomicBool::new(false);
    // All but small requests stall after their first MiB; so does the first small one, in its middle.
    let server = FaultServer::start(move |request| {
        let reply = Reply::ranged(request, &body, "\"one\"");
        let range = request.range.clone().unwrap_or(0..u64::MAX);
        if range.end.min(LEN as u64) - range.start > MIB {
            return reply.cut(Cut::Stall(1 << 20));
        }
        let cut =
            if has_stalled.swap(true, Ordering::SeqCst) { Cut::None } else { Cut::Stall(100_000) };
        reply.cut(cut)
    });
    let daemon = Daemon::start();
    let image = json!({"name": "img", "url": format!("{}/disk.img", server.url)}).to_string();
    assert_eq!(daemon.curl("POST", "/v1/images", Some(&image)).0, 201);
    stream(&daemon);
    let mut wire = nbd(&daemon);
    let at = 50 << 20;
    assert!(wire.read_structured(0, at as u64, 200_000) == bytes[at..at + 200_000]);
    assert_eq!(stat(&daemon, "demand_stalls"), 1);
    let small = server.requests().into_iter().filter_map(|request| request.range);
    let small: Vec<_> = small.filter(|range| range.end - range.start <= MIB).collect();
    let rest = small[0].start + 100_000..small[0].end;
    assert!(small.contains(&rest), "it goes on where nothing came any more: {small:?}");
}

#[test]
fn a_wanted_piece_is_readable_as_far_as_it_has_come() {
    of_a_piece_that_stops_what_has_come_is_read(|_| {});
}

#[test]
fn what_has_come_before_anybody_waits_for_it_is_readable_as_well() {
    of_a_piece_that_stops_what_has_come_is_read(|wire| {
        // CACHE asks for it, and does not wait.
        wire.request(0, 5, 8, 50 << 20, 4096);
        assert_eq!(wire.chunks().len(), 1);
        std::thread::sleep(Duration::from_secs(1));
    });
}

fn of_a_piece_that_stops_what_has_come_is_read(before: impl FnOnce(&mut Wire)) {
    use crate::fault_server::{Cut, FaultServer};

    let bytes = noise();
    let body = bytes.clone();
    let at = 50 << 20;
    // Of what is wanted 100,000 bytes come, and never any more.
    let server = FaultServer::start(move |request| {
        let start = request.range.clone().map_or(0, |range| range.start);
        let sent = if start == 0 { 1 << 20 } else { 100_000 };
        let is_known = start == 0 || start == at as u64;
        Reply::ranged(request, &body, "\"one\"").cut(Cut::Stall(if is_known { sent } else { 0 }))
    });
    let daemon = Daemon::start();
    let image = json!({"name": "img", "url": format!("{}/disk.img", server.url)}).to_string();
    assert_eq!(daemon.curl("POST", "/v1/images", Some(&image)).0, 201);
    stream(&daemon);
    let mut wire = nbd(&daemon);
    before(&mut wire);
    assert!(wire.read_structured(0, at as u64, 4096) == bytes[at..at + 4096]);
}

#[test]
fn what_has_come_of_a_piece_that_broke_is_readable_although_nobody_goes_on_with_it() {
    use crate::fault_server::{Cut, FaultServer};

    const CAME: usize = 100_000;
    let bytes = noise();
    // The first one breaks in its second MiB, what is asked for out of turn in its first. Nobody is
    // answered who asks for the rest.
    let (mib, far) = (1 << 20, 50 << 20);
    for at in [mib, far] {
        let body = bytes.clone();
        let server = FaultServer::start(move |request| {
            let start = request.range.clone().map_or(0, |range| range.start);
            let mut reply = Reply::ranged(request, &body, "\"one\"");
            reply.cut = Cut::Close(if start == 0 { mib + CAME } else { CAME });
            if start != 0 && start != far as u64 {
                reply.head_pace = Duration::from_secs(3600);
            }
            reply
        });
        let daemon = Daemon::start();
        let image = json!({"name": "img", "url": format!("{}/disk.img", server.url)}).to_string();
        assert_eq!(daemon.curl("POST", "/v1/images", Some(&image)).0, 201);
        stream(&daemon);
        let mut wire = nbd(&daemon);
        if at == far {
            // CACHE asks for it, and does not wait.
            wire.request(0, 5, 8, at as u64, 4096);
            assert_eq!(wire.chunks().len(), 1);
        }
        let goes_on = |request: &Request| {
            request.range.as_ref().is_some_and(|range| range.start == (at + CAME) as u64)
        };
        while !server.requests().iter().any(goes_on) {
            std::thread::sleep(Duration::from_millis(10));
        }
        assert!(wire.read_structured(0, at as u64, 4096) == bytes[at..at + 4096]);
    }
}

#[test]
fn what_does_not_come_for_a_minute_is_an_error_and_not_zeroes() {
    use crate::fault_server::{Cut, FaultServer};

    let bytes = noise();
    let server = FaultServer::start(move |request| {
        let start = request.range.clone().map_or(0, |range| range.start);
        Reply::ranged(request, &bytes, "\"one\"").cut(Cut::Stall(if start == 0 {
            1 << 20
        } else {
            0
        }))
    });
    let daemon = Daemon::start();
    let image = json!({"name": "img", "url": format!("{}/disk.img", server.url)}).to_string();
    assert_eq!(daemon.curl("POST", "/v1/images", Some(&image)).0, 201);
    stream(&daemon);
    let mut wire = nbd(&daemon);
    let ask = |at: u64| Wire::request_bytes(0, 0, at, at, 4096);
    let before = stat(&daemon, "demand_misses");
    wire.send(&[ask(50 << 20), ask(20 << 20), ask(30 << 20)].concat());
    for _ in 0..3 {
        assert_eq!(wire.error(true), 5, "EIO");
    }
    let misses = stat(&daemon, "demand_misses") - before;
    assert_eq!(misses, 1, "all of them have waited that one minute");
}

#[test]
fn a_recording_goes_on_in_the_next_life_and_ends_with_its_image() {
    let bytes = noise();
    let origin = Origin::start(bytes.clone());
    origin.let_go();
    let daemon = Daemon::start();
    let held = attach(&daemon, &origin, &json!({}));
    daemon.wait_for("img", "ready");
    assert_eq!(daemon.curl("POST", "/v1/images/img/trace", None).0, 201);
    let kept = |daemon: &Daemon| daemon.socket.with_file_name("traces/img.json");
    assert!(kept(&daemon).exists(), "from its beginning");
    let read = |daemon: &Daemon, unit: usize| {
        nbd(daemon).read_structured(0, (unit * UNIT) as u64, 512);
    };
    let of = |units: &[usize]| json!(units.iter().map(|n| [n * UNIT, UNIT]).collect::<Vec<_>>());
    // Killed: what was written down is there, which is all but the last seconds.
    read(&daemon, 90);
    let written =
        || -> Value { serde_json::from_slice(&std::fs::read(kept(&daemon)).unwrap()).unwrap() };
    while written()["trace"]["ranges"] != of(&[90]) {
        std::thread::yield_now();
    }
    let (_, dir) = daemon.end("KILL");
    let daemon = Daemon::start_in(dir, "");
    daemon.wait_for("img", "ready");
    // Ended in order: nothing is lost.
    read(&daemon, 7);
    assert_eq!(daemon.get("/v1/images/img/trace")["ranges"], of(&[90, 7]));
    let (code, dir) = daemon.end("TERM");
    assert_eq!(code, Some(0));
    let daemon = Daemon::start_in(dir, "");
    daemon.wait_for("img", "ready");
    read(&daemon, 90);
    read(&daemon, 50);
    let ranges = of(&[90, 7, 50]);
    let (status, trace) = daemon.curl("DELETE", "/v1/images/img/trace", None);
    assert_eq!((status, &trace["ranges"], &trace["recording"]), (200, &ranges, &json!(false)));
    assert!(!kept(&daemon).exists());
    // An image takes its recording with it.
    assert_eq!(daemon.curl("POST", "/v1/images/img/trace", None).0, 201);
    assert!(kept(&daemon).exists());
    let attachment = format!("/v1/attachments/{}", held["id"].as_str().unwrap());
    assert_eq!(daemon.curl("DELETE", &attachment, None).0, 204);
    daemon.curl("DELETE", "/v1/images/img", None);
    while kept(&daemon).exists() {
        std::thread::yield_now();
    }
}
