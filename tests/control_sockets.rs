//! The daemon's sockets: NBD over TCP, and sockets that a service manager passes.

#![expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod control_support;
mod tls_support;

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};

use bedplate::replica::{Options, Replica};
use control_support::{
    BEDPLATE, Daemon, bedplate, clean, collect, curl, raw_image, stderr, stdout,
};
use serde_json::{Value, json};
use tls_support::Pki;

/// Makes the sockets that it is told of, and becomes the daemon with them, as systemd does.
const LAUNCHER: &str = "
import fcntl, os, socket, sys
high = []
for spec in sys.argv[1].split(','):
    name, kind, place = spec.split('=')
    if kind == 'tcp':
        host, port = place.rsplit(':', 1)
        family = socket.AF_INET6 if ':' in host else socket.AF_INET
        s = socket.socket(family, socket.SOCK_STREAM)
        s.bind((host, int(port)))
    else:
        kinds = {'stream': socket.SOCK_STREAM, 'packets': socket.SOCK_SEQPACKET}
        s = socket.socket(socket.AF_UNIX, kinds[kind])
        s.bind(place)
    s.listen()
    high.append((name, fcntl.fcntl(s.fileno(), fcntl.F_DUPFD, 100)))
for n, (_, fd) in enumerate(high):
    os.dup2(fd, 3 + n)
    os.close(fd)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS=str(len(high)))
os.environ['LISTEN_FDNAMES'] = ':'.join(name for name, _ in high)
os.execv(sys.argv[2], sys.argv[2:])
";

/// A daemon with sockets that were made for it.
struct Launched {
    child: Child,
    stderr: Arc<Mutex<String>>,
}

impl Launched {
    fn start(dir: &Path, sockets: &str, config: &str) -> Self {
        let mut child = launcher(dir, sockets, config).stderr(Stdio::piped()).spawn().unwrap();
        let (stderr, ready) = collect(child.stderr.take().unwrap(), "NBD socket:");
        ready.recv().unwrap_or_else(|_| panic!("no daemon: {}", stderr.lock().unwrap()));
        Self { child, stderr }
    }

    fn log(&self) -> String {
        self.stderr.lock().unwrap().clone()
    }

    fn end(mut self) -> Option<i32> {
        let pid = self.child.id().to_string();
        assert!(Command::new("kill").args(["-s", "TERM", &pid]).status().unwrap().success());
        self.child.wait().unwrap().code()
    }
}

impl Drop for Launched {
    fn drop(&mut self) {
        let _ended = self.child.kill();
        let _ended = self.child.wait();
    }
}

fn launcher(dir: &Path, sockets: &str, config: &str) -> Command {
    let disk = dir.join("disk");
    std::fs::create_dir_all(&disk).unwrap();
    let file = dir.join("bedplate.toml");
    std::fs::write(&file, format!("disks = [{disk:?}]\n{config}")).unwrap();
    let mut command = Command::new("python3");
    command.args(["-c", LAUNCHER, sockets, BEDPLATE, "serve", "-vv", "--config"]).arg(file);
    clean(&mut command).stdin(Stdio::null());
    command
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// A raw image, known to the daemon and attached.
fn attach(control: &Path, dir: &Path) -> PathBuf {
    let image = dir.join("image.raw");
    raw_image(&image, 3 << 20);
    let create = json!({"name": "disk", "url": format!("file://{}", image.display())}).to_string();
    let (status, answer) = curl(control, "POST", "/v1/images", Some(&create));
    assert_eq!(status, 201, "{answer}");
    let output = bedplate(&["--socket", text(control), "attach", "disk"]);
    assert!(output.status.success(), "{}", stderr(&output));
    image
}

/// What `nbdcopy` reads.
fn copied(uri: &str, dir: &Path) -> Vec<u8> {
    let copy = dir.join("copy");
    let output = Command::new("nbdcopy").args([uri, text(&copy)]).output().unwrap();
    assert!(output.status.success(), "{uri}: {}", stderr(&output));
    std::fs::read(copy).unwrap()
}

fn tls_keys(pki: &Pki) -> String {
    format!(
        "nbd_tls_cert = {:?}\nnbd_tls_key = {:?}\nnbd_tls_clients_ca = {:?}\n",
        pki.path("server.pem"),
        pki.path("server.key"),
        pki.path("ca.pem")
    )
}

/// Where a daemon says that it serves TCP.
fn address(log: &str) -> &str {
    log.lines().find_map(|line| line.strip_prefix("NBD over TCP:")).unwrap().trim()
}

#[test]
fn a_daemon_serves_a_network_over_tls_and_says_who_reads() {
    let dir = tempfile::tempdir().unwrap();
    let pki = Pki::make(&dir.path().join("pki"));
    let open = std::fs::Permissions::from_mode(0o644);
    std::fs::set_permissions(pki.path("server.key"), open).unwrap();
    let config = format!("nbd_tcp = '127.0.0.1:0'\n{}", tls_keys(&pki));
    let daemon = Daemon::start_in(dir, &config);
    let dir = daemon.dir.path();
    let image = attach(&daemon.socket, dir);
    let log = daemon.log();
    let address = address(&log);
    let uri = format!("nbds://{address}/disk?tls-certificates={}", pki.good().display());
    assert!(copied(&uri, dir) == std::fs::read(image).unwrap());
    // One who never gets further than hello holds up nobody, and not the end.
    let _silent = std::net::TcpStream::connect(address).unwrap();
    let stranger = pki.nobody();
    let refused = format!("nbds://{address}/disk?tls-certificates={}", stranger.display());
    assert!(!Command::new("nbdinfo").arg(refused).output().unwrap().status.success());
    let (code, _dir) = {
        let log = Arc::clone(&daemon.stderr);
        let ended = daemon.end("TERM");
        let log = log.lock().unwrap().clone();
        let reads = log.lines().find(|line| line.contains("a client reads over the network"));
        let reads = reads.unwrap_or_else(|| panic!("{log}"));
        assert!(reads.contains("127.0.0.1:") && reads.contains("disk"), "{reads}");
        assert!(reads.contains("TLSv1_3"), "{reads}");
        let refused = log.lines().find(|line| line.contains("TLS:") && line.contains("peer"));
        let warned = log.lines().find(|line| line.contains("may use this key"));
        assert!(warned.is_some_and(|line| line.contains("server.key") && line.contains("0644")));
        assert!(refused.is_some_and(|line| line.contains("127.0.0.1:")), "{log}");
        ended
    };
    assert_eq!(code, Some(0));
}

#[test]
fn what_contradicts_itself_does_not_start() {
    let dir = tempfile::tempdir().unwrap();
    let pki = Pki::make(&dir.path().join("pki"));
    let (cert, key) = (pki.path("server.pem"), pki.path("server.key"));
    let (cert, key) = (text(&cert), text(&key));
    let disk = dir.path().join("disk");
    std::fs::create_dir(&disk).unwrap();
    let serve = ["serve", "--disk", text(&disk)];
    for (args, code, wanted) in [
        (&["--tcp", "127.0.0.1:0"][..], 1, "nbd_tls_cert"),
        (&["--plain"], 1, "nbd_tcp"),
        (&["--tcp", "127.0.0.1:0", "--tls-cert", cert], 2, "--tls-key"),
        (&["--tcp", "127.0.0.1:0", "--tls-cert", cert, "--tls-key", key, "--plain"], 2, "--plain"),
        (&["--tcp", "127.0.0.1:0", "--tls-cert", cert, "--tls-key", cert], 1, "private key"),
        (&["--tcp", "localhost", "--plain"], 2, "--tcp"),
        (&["--tcp", "192.0.2.1:1", "--plain"], 3, "192.0.2.1:1: cannot listen here"),
    ] {
        let output = bedplate(&[&serve[..], args].concat());
        let said = stderr(&output);
        assert_eq!(output.status.code(), Some(code), "{args:?}: {said}");
        assert!(said.contains(wanted), "{args:?}: {said}");
    }
}

#[test]
fn export_serves_a_file_over_tls_or_in_plain_text_by_choice() {
    let dir = tempfile::tempdir().unwrap();
    let pki = Pki::make(&dir.path().join("pki"));
    let image = dir.path().join("image.raw");
    raw_image(&image, 2 << 20);
    let bytes = std::fs::read(&image).unwrap();
    let (cert, key) = (pki.path("server.pem"), pki.path("server.key"));
    let tls = ["--tls-cert", text(&cert), "--tls-key", text(&key)];
    let export = ["export", text(&image), "--name", "disk", "--json", "--tcp", "127.0.0.1:0"];
    let output = bedplate(&export);
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr(&output).contains("--tls-cert"), "{}", stderr(&output));
    for (more, scheme) in [(&tls[..], "nbds"), (&["--plain"], "nbd")] {
        let mut child = clean(Command::new(BEDPLATE).args(export).args(more))
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let (out, shown) = collect(child.stdout.take().unwrap(), "{");
        shown.recv().unwrap();
        let out: Value = serde_json::from_str(out.lock().unwrap().trim()).unwrap();
        let uri = out["uri"].as_str().unwrap();
        assert!(uri.starts_with(&format!("{scheme}://127.0.0.1:")), "{uri}");
        let with_ca = format!("{uri}?tls-certificates={}", pki.nobody().display());
        let uri = if scheme == "nbds" { with_ca } else { uri.to_owned() };
        assert!(copied(&uri, dir.path()) == bytes);
        let pid = child.id().to_string();
        assert!(Command::new("kill").args(["-s", "TERM", &pid]).status().unwrap().success());
        assert!(child.wait().unwrap().success());
    }
}

#[test]
fn a_daemon_takes_the_sockets_that_it_is_passed_by_their_names() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let pki = Pki::make(&dir.join("pki"));
    let place = |name: &str| dir.join(name).display().to_string();
    let (nbd, control, replica) = (place("n"), place("c"), place("r"));
    let sockets = format!(
        "nbd-tcp=tcp=::1:0,replica=packets={replica},nbd=stream={nbd},control=stream={control}"
    );
    let config = format!("{}allow_loopback = true\n\n", tls_keys(&pki));
    let daemon = Launched::start(dir, &sockets, &config);
    let image = attach(Path::new(&control), dir);
    let bytes = std::fs::read(image).unwrap();
    // The URI that clients are told is that of the passed socket.
    let shown = stdout(&bedplate(&["--socket", &control, "get", "disk", "--json"]));
    let shown: Value = serde_json::from_str(shown.trim()).unwrap();
    let uri = shown["nbd"]["uri"].as_str().unwrap();
    assert_eq!(uri, format!("nbd+unix:///disk?socket={nbd}"));
    assert!(copied(uri, dir) == bytes);
    let log = daemon.log();
    let address = address(&log);
    assert!(address.starts_with("[::1]:"), "{address}");
    let uri = format!("nbds://{address}/disk?tls-certificates={}", pki.good().display());
    assert!(copied(&uri, dir) == bytes);
    let reader = Replica::attach(&replica, "disk", Options::default()).unwrap();
    let mut first = [0; 512];
    reader.read_at(&mut first, 0).unwrap();
    assert_eq!(first, bytes[..512]);
    drop(reader);
    assert_eq!(daemon.end(), Some(0));
    for path in [nbd, control, replica] {
        assert!(Path::new(&path).exists(), "{path} belongs to who made it");
    }
}

#[test]
fn sockets_of_no_use_are_refused_with_their_names() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let place = |name: &str| dir.join(name).display().to_string();
    for (at, (sockets, config, wanted)) in [
        (format!("ndb=stream={}", place("a")), "", "no server is named \"ndb\""),
        (format!("nbd=packets={}", place("b")), "", "the socket named nbd is a Unix socket of"),
        ("nbd=tcp=127.0.0.1:0".to_owned(), "", "the socket named nbd is a TCP socket"),
        (format!("replica=stream={}", place("c")), "", "the socket named replica is"),
        (format!("nbd=stream={},nbd=stream={}", place("d"), place("e")), "", "several sockets"),
        ("nbd-tcp=tcp=127.0.0.1:0".to_owned(), "", "nbd_tls_cert"),
        (
            "nbd-tcp=tcp=127.0.0.1:0".to_owned(),
            "nbd_tcp = '127.0.0.1:0'\nnbd_tcp_plain = true",
            "a socket named nbd-tcp was passed",
        ),
        (format!("nbd=stream={}", place("f")), "nbd_socket = '/elsewhere'", "another socket was"),
    ]
    .into_iter()
    .enumerate()
    {
        let own = dir.join(at.to_string());
        std::fs::create_dir(&own).unwrap();
        let output = launcher(&own, &sockets, config).output().unwrap();
        assert_eq!(output.status.code(), Some(1), "{sockets}: {}", stderr(&output));
        assert!(stderr(&output).contains(wanted), "{sockets}: {}", stderr(&output));
    }
}
