//! A daemon that is killed or stopped again and again under load costs its readers time, and no byte.
//!
//! Why: an engine is updated, and dies, while VMs and tools read through it.
//! How: NBD clients of three kinds that come back by themselves (nbdkit's and QEMU's read through a
//! proxy each, one on libnbd connects anew when it is hung up) and replicas read a raw and a compressed
//! image all the time, and compare every byte. Twenty times the daemon ends, by SIGKILL and by SIGTERM
//! in turn, and each reader must have read on before it ends again.
//! Never: sleeps for a while and hopes: it waits for reads, and fails if a reader has ended.
#![expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod control_support;
mod nbd_support;
mod qcow2_common;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{Scope, ScopedJoinHandle};
use std::time::Duration;

use bedplate::replica::{Mode, Options, Replica};
use control_support::{Daemon, stderr};
use nbd_support::{Wire, command, have, patterned, write_sparse};
use qcow2_common::{Random, run};

/// So small that clusters have to be decoded all the time.
const CONFIG: &str = "decoded_cache = 1048576";
const ROUNDS: u64 = 20;
/// Reads after a restart: more than a client has in flight, so that the last one was asked for anew.
const READS_A_ROUND: u64 = 20;
const LONGEST: usize = 100_000;
/// The sockets of the proxies.
const BY_NBDKIT: &str = "nbdkit.sock";
const BY_QEMU: &str = "qemu.sock";

/// A client on libnbd, with eight reads and a status in flight; it counts in a file that is shared.
const LIBNBD_CLIENT: &str = r#"
import errno, mmap, os, random, struct, sys, time
import nbd

uri, image, shared, seed = sys.argv[1:]
want = open(image, "rb").read()
counts = mmap.mmap(os.open(shared, os.O_RDWR), 24)
rng = random.Random(int(seed))
reads = connections = 0

def is_over():
    return counts[16] != 0

def connect():
    while not is_over():
        h = nbd.NBD()
        h.add_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
        try:
            h.connect_uri(uri)
        except nbd.Error as error:
            # No server, or one that ends; but who answers must have the image.
            assert "server replied with error" not in error.string, error.string
            time.sleep(0.001)
            continue
        assert h.get_size() == len(want)
        return h

def status(at):
    def extents(context, offset, entries, error):
        for length, flags in zip(entries[::2], entries[1::2]):
            if flags & nbd.STATE_ZERO:
                part = want[offset:offset + length]
                assert part.count(0) == len(part), f"data called zeroes at {offset}"
            offset += length
        return 0
    return extents

def batch(h):
    """True if all was answered; False if the connection has gone."""
    asked = []
    lost = False
    try:
        for _ in range(8):
            size = rng.randrange(1, 100_000)
            at = rng.randrange(len(want) - size)
            buf = bytearray(size)
            asked.append((h.aio_pread(buf, at), at, buf))
        at = rng.randrange(len(want) - 1_000_000)
        asked.append((h.aio_block_status(1_000_000, at, status(at)), at, b""))
        while h.aio_in_flight() > 0:
            h.poll(-1)
    except nbd.Error as error:
        assert h.aio_is_dead() or h.aio_is_closed(), error.string
        lost = True
    for cookie, at, buf in asked:
        try:
            done = h.aio_command_completed(cookie)
        except nbd.Error as error:
            assert error.errnum == errno.ENOTCONN, f"refused: {error.string}"
            lost = True
            continue
        if done:
            assert buf == want[at:at + len(buf)], f"{len(buf)} wrong bytes at {at}"
    return not lost

while not is_over():
    h = connect()
    if h is None:
        break
    connections += 1
    while not is_over() and batch(h):
        reads += 8
        struct.pack_into("<QQ", counts, 0, reads, connections)
"#;

/// An image that is served, and what must be read of it.
struct Image {
    name: &'static str,
    bytes: Vec<u8>,
    /// A file of these bytes.
    raw: PathBuf,
}

impl Image {
    fn make(dir: &Path, name: &'static str, bytes: Vec<u8>, convert: &[&str]) -> (Self, PathBuf) {
        let raw = dir.join(format!("{name}.raw"));
        write_sparse(&raw, &bytes);
        let mut stored = raw.clone();
        if !convert.is_empty() {
            stored = dir.join(format!("{name}.qcow2"));
            let (from, to) = (raw.to_str().unwrap(), stored.to_str().unwrap());
            run("qemu-img", &[&["convert", "-q", "-f", "raw"], convert, &[from, to]].concat());
        }
        (Self { name, bytes, raw }, stored)
    }

    /// Where its client on libnbd counts.
    fn shared(&self, dir: &Path) -> PathBuf {
        dir.join(format!("{}.counts", self.name))
    }

    /// A place and a length to read.
    fn part(&self, random: &mut Random) -> (usize, usize) {
        let len = random.index(LONGEST) + 1;
        (random.index(self.bytes.len() - len), len)
    }
}

/// The processes of clients, which end with the test, and the sign for all readers that it is over.
struct Clients<'a> {
    is_over: &'a AtomicBool,
    /// Where they write what they say.
    dir: &'a Path,
    running: Vec<(String, Child)>,
}

impl Clients<'_> {
    fn start(&mut self, name: &str, program: &str, args: &[&str]) {
        let said = File::create(self.said(name)).unwrap();
        let child = command(program).args(args).stdin(Stdio::null()).stderr(said).spawn().unwrap();
        self.running.push((name.to_owned(), child));
    }

    fn said(&self, name: &str) -> PathBuf {
        self.dir.join(format!("{name}.stderr"))
    }

    fn assert_success(&self, name: &str, status: ExitStatus) {
        let said = std::fs::read_to_string(self.said(name)).unwrap();
        assert!(status.success(), "{name}: {status}\n{said}");
    }

    fn assert_running(&mut self) {
        let ended = |(name, child): &mut (String, Child)| {
            child.try_wait().unwrap().map(|status| (name.clone(), status))
        };
        if let Some((name, status)) = self.running.iter_mut().find_map(ended) {
            self.assert_success(&name, status);
            panic!("{name} has ended before the test");
        }
    }

    /// Until those have ended that end by themselves.
    fn join(&mut self, count: usize) {
        for (name, mut child) in self.running.split_off(self.running.len() - count) {
            let status = child.wait().unwrap();
            self.assert_success(&name, status);
        }
    }
}

impl Drop for Clients<'_> {
    fn drop(&mut self) {
        // First, so that a reader of a proxy does not wait for it for ever when the test has failed.
        self.is_over.store(true, Ordering::Relaxed);
        for (_, child) in &mut self.running {
            let _ended = child.kill();
            let _ended = child.wait();
        }
    }
}

/// What a libnbd client counts.
struct Counts(File);

impl Counts {
    fn make(path: &Path) -> Self {
        std::fs::write(path, [0; 24]).unwrap();
        Self(File::options().read(true).write(true).open(path).unwrap())
    }

    fn word(&self, at: u64) -> u64 {
        let mut word = [0; 8];
        self.0.read_exact_at(&mut word, at).unwrap();
        u64::from_le_bytes(word)
    }

    fn reads(&self) -> u64 {
        self.word(0)
    }

    fn connections(&self) -> u64 {
        self.word(8)
    }

    fn tell_it_is_over(&self) {
        self.0.write_all_at(&[1], 16).unwrap();
    }
}

/// Reads through a proxy that never hangs up, until the test is over.
fn read_by_proxy(socket: &Path, image: &Image, is_over: &AtomicBool, reads: &AtomicU64) {
    let mut wire = loop {
        match std::os::unix::net::UnixStream::connect(socket) {
            Ok(stream) => break Wire(stream),
            Err(_) if is_over.load(Ordering::Relaxed) => return,
            Err(_) => std::thread::sleep(Duration::from_millis(5)),
        }
    };
    assert_eq!(wire.take(16), b"NBDMAGICIHAVEOPT");
    wire.take_u16();
    wire.client_flags();
    wire.option(1, b"");
    assert_eq!(wire.take_u64(), image.bytes.len() as u64);
    wire.take_u16();
    let mut random = Random(11);
    while !is_over.load(Ordering::Relaxed) {
        let (at, len) = image.part(&mut random);
        let got = wire.read_simple(at as u64, u32::try_from(len).unwrap());
        assert!(got == image.bytes[at..at + len], "{}: {len} bytes at {at}", image.name);
        reads.fetch_add(1, Ordering::Relaxed);
    }
}

fn read_as_replica(
    socket: &Path,
    mode: Mode,
    image: &Image,
    is_over: &AtomicBool,
    reads: &AtomicU64,
) {
    let options = Options { mode, ..Options::default() };
    let replica = Replica::attach(socket, image.name, options).unwrap();
    let mut random = Random(12);
    while !is_over.load(Ordering::Relaxed) {
        let (at, len) = image.part(&mut random);
        let mut part = vec![0; len];
        replica.read_at(&mut part, at as u64).unwrap();
        assert!(part == image.bytes[at..at + len], "{}: {len} bytes at {at}", image.name);
        reads.fetch_add(1, Ordering::Relaxed);
    }
}

/// What the test serves, and who reads it.
struct Load {
    raw: Image,
    packed: Image,
    root: PathBuf,
    is_over: AtomicBool,
    /// Two readers of each proxy, and two replicas.
    reads: [AtomicU64; 6],
    /// Of the clients on libnbd.
    counts: [Counts; 2],
}

impl Load {
    /// Makes the images, and a daemon that serves them.
    fn make() -> (Self, Daemon) {
        let dir = tempfile::tempdir().unwrap();
        let mut random = Random(5);
        let nibbles = (0..16 << 20).map(|_| random.next().to_le_bytes()[0] & 15).collect();
        let (raw, raw_file) = Image::make(dir.path(), "raw", patterned(16 << 20), &[]);
        let compressed = ["-c", "-O", "qcow2"];
        let (packed, packed_file) = Image::make(dir.path(), "packed", nibbles, &compressed);
        let daemon = Daemon::start_in(dir, CONFIG);
        for (image, file) in [(&raw, raw_file), (&packed, packed_file)] {
            let file = file.to_str().unwrap();
            let output = daemon.cli(&["create", file, "--name", image.name, "--wait"]);
            assert!(output.status.success(), "{}", stderr(&output));
        }
        let root = daemon.dir.path().to_owned();
        let counts = [&raw, &packed].map(|image| Counts::make(&image.shared(&root)));
        let (is_over, reads) = (AtomicBool::new(false), Default::default());
        (Self { raw, packed, root, is_over, reads, counts }, daemon)
    }

    fn nbd(&self) -> String {
        self.place("disk/bedplate/nbd.sock")
    }

    fn place(&self, name: &str) -> String {
        self.root.join(name).to_str().unwrap().to_owned()
    }

    fn uri(&self, image: &Image) -> String {
        format!("nbd+unix:///{}?socket={}", image.name, self.nbd())
    }

    /// The processes: two proxies, then the clients on libnbd.
    fn start_clients(&self) -> Clients<'_> {
        let mut clients = Clients { is_over: &self.is_over, dir: &self.root, running: Vec::new() };
        let (to, from) = (self.place(BY_NBDKIT), format!("uri={}", self.uri(&self.raw)));
        let args = ["-f", "-r", "-U", &to, "--filter=retry", "nbd", &from];
        let retry = ["retries=60", "retry-delay=1", "retry-exponential=no", "retry=60"];
        clients.start("nbdkit", "nbdkit", &[&args[..], &retry].concat());
        let (to, from) = (
            self.place(BY_QEMU),
            format!(
                "driver=raw,file.driver=nbd,file.server.type=unix,file.server.path={},\
                 file.export={},file.reconnect-delay=60",
                self.nbd(),
                self.packed.name
            ),
        );
        let args = ["-r", "-t", "-e", "4", "-x", "", "-k", &to, "--image-opts", &from];
        clients.start("qemu-nbd", "qemu-nbd", &args);
        for (image, seed) in [(&self.raw, "1"), (&self.packed, "2")] {
            let (file, shared) = (image.raw.to_str().unwrap(), image.shared(&self.root));
            let args =
                ["-c", LIBNBD_CLIENT, &self.uri(image), file, shared.to_str().unwrap(), seed];
            clients.start(&format!("libnbd-{}", image.name), "python3", &args);
        }
        clients
    }

    fn start_readers<'s>(&'s self, scope: &'s Scope<'s, '_>) -> Vec<ScopedJoinHandle<'s, ()>> {
        let (raw, packed) = (&self.raw, &self.packed);
        let proxies = [(BY_NBDKIT, raw), (BY_NBDKIT, raw), (BY_QEMU, packed), (BY_QEMU, packed)];
        let replicas = [(Mode::Pread, raw), (Mode::Mapped, packed)];
        let (of_proxies, of_replicas) = self.reads.split_at(proxies.len());
        let proxies = proxies.into_iter().zip(of_proxies).map(|((socket, image), reads)| {
            scope.spawn(move || read_by_proxy(&self.root.join(socket), image, &self.is_over, reads))
        });
        let replicas = replicas.into_iter().zip(of_replicas).map(|((mode, image), reads)| {
            let socket = self.root.join("disk/bedplate/replica.sock");
            scope.spawn(move || read_as_replica(&socket, mode, image, &self.is_over, reads))
        });
        proxies.chain(replicas).collect()
    }

    /// How many reads each has done.
    fn so_far(&self) -> Vec<u64> {
        let threads = self.reads.iter().map(|reads| reads.load(Ordering::Relaxed));
        threads.chain(self.counts.iter().map(Counts::reads)).collect()
    }

    fn end(&self) {
        self.is_over.store(true, Ordering::Relaxed);
        self.counts.iter().for_each(Counts::tell_it_is_over);
    }
}

#[test]
fn a_daemon_that_ends_twenty_times_under_load_costs_no_reader_a_byte() {
    if !have(&["qemu-img", "qemu-nbd", "nbdkit", "nbdsh"]) {
        return;
    }
    let (load, mut daemon) = Load::make();
    // It must outlive the readers, who may have asked it something.
    let _daemon = std::thread::scope(|scope| {
        let mut clients = load.start_clients();
        let readers = load.start_readers(scope);
        let mut all_read_on = || {
            let before = load.so_far();
            let wanted = before.iter().map(|reads| reads + READS_A_ROUND);
            while load.so_far().into_iter().zip(wanted.clone()).any(|(now, wanted)| now < wanted) {
                assert!(!readers.iter().any(|reader| reader.is_finished()), "a reader has failed");
                clients.assert_running();
                std::thread::sleep(Duration::from_millis(2));
            }
        };
        for round in 0..ROUNDS {
            all_read_on();
            let (signal, wanted) = if round % 2 == 0 { ("KILL", None) } else { ("TERM", Some(0)) };
            let (code, dir) = daemon.end(signal);
            assert_eq!(code, wanted, "{signal}");
            daemon = Daemon::start_in(dir, CONFIG);
        }
        all_read_on();
        load.end();
        clients.join(load.counts.len());
        for counts in &load.counts {
            assert!(counts.connections() > ROUNDS, "it has connected anew after each restart");
        }
        readers.into_iter().for_each(|reader| reader.join().unwrap());
        daemon
    });
}

/// Images whose opening takes long: each has a table of snapshots that is as large as may be.
const SLOW: usize = 4;

/// A QCOW2 image of zeroes with 65,000 snapshots of the disk as it is now, with long names.
fn with_many_snapshots(path: &Path) {
    const SNAPSHOTS: u32 = 65_000;
    const NAME: usize = 960;
    run("qemu-img", &["create", "-q", "-f", "qcow2", path.to_str().unwrap(), "64M"]);
    let file = File::options().read(true).write(true).open(path).unwrap();
    let mut head = [0; 72];
    file.read_exact_at(&mut head, 0).unwrap();
    let (l1_entries, l1_at) = (&head[36..40], &head[40..48]);
    let mut entry = vec![0; 40 + NAME];
    entry[..8].copy_from_slice(l1_at);
    entry[8..12].copy_from_slice(l1_entries);
    entry[14..16].copy_from_slice(&u16::try_from(NAME).unwrap().to_be_bytes());
    entry[40..].fill(b'n');
    let at = file.metadata().unwrap().len().next_multiple_of(1 << 16);
    file.write_all_at(&entry.repeat(SNAPSHOTS as usize), at).unwrap();
    file.write_all_at(&SNAPSHOTS.to_be_bytes(), 60).unwrap();
    file.write_all_at(&at.to_be_bytes(), 64).unwrap();
}

/// Connects as soon as somebody listens, and asks for `name`: it must be there.
fn comes_back(socket: &Path, name: &str) {
    let mut wire = loop {
        match std::os::unix::net::UnixStream::connect(socket) {
            Ok(stream) => break Wire(stream),
            Err(_) => std::thread::sleep(Duration::from_millis(1)),
        }
    };
    assert_eq!(wire.take(18), b"NBDMAGICIHAVEOPT\0\x03");
    let (size, _flags) = wire.go(name, true);
    assert_eq!(size, 64 << 20, "{name}");
    assert!(wire.read_structured(0, 1 << 20, 4096) == [0; 4096], "{name}");
}

#[test]
fn who_comes_back_at_once_is_answered_when_its_image_is_open_and_not_that_it_is_unknown() {
    if !have(&["qemu-img"]) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("slow.qcow2");
    with_many_snapshots(&file);
    let mut daemon = Daemon::start_in(dir, "");
    let names: Vec<String> = (0..SLOW).map(|index| format!("slow-{index}")).collect();
    for name in &names {
        let output = daemon.cli(&["create", file.to_str().unwrap(), "--name", name, "--wait"]);
        assert!(output.status.success(), "{}", stderr(&output));
    }
    for signal in ["KILL", "TERM"] {
        let (_, dir) = daemon.end(signal);
        let socket = dir.path().join("disk/bedplate/nbd.sock");
        daemon = std::thread::scope(|scope| {
            let readers: Vec<_> =
                names.iter().map(|name| scope.spawn(|| comes_back(&socket, name))).collect();
            let daemon = Daemon::start_in(dir, "");
            for (reader, name) in readers.into_iter().zip(&names) {
                assert!(reader.join().is_ok(), "{name} was not there after {signal}");
            }
            daemon
        });
    }
}
