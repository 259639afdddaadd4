//! NBD over TCP: real clients over TLS, those that are not let in, and those that cheat.
//!
//! Clients are libnbd's and qemu's tools, and rustls where a byte has to be wrong.
#![expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod nbd_support;
mod tls_support;

use std::fs::OpenOptions;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use bedplate::disk::Sealed;
use bedplate::image::View;
use bedplate::serve::nbd::{Credentials, Limits, Security, Server};
use bedplate::serve::{Exports, ServeError, Stopper};
use nbd_support::{ERR_INVALID, MIB, Wire, command, have, patterned, run, text, write_sparse};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned};
use tls_support::Pki;

const EIO: u32 = 5;
const ERR_TLS_REQD: u32 = 0x8000_0005;
const TOOLS: [&str; 3] = ["nbdinfo", "nbdcopy", "qemu-img"];

/// A server on the network of this host, stopped when dropped.
struct Network {
    dir: tempfile::TempDir,
    pki: Pki,
    address: SocketAddr,
    exports: Arc<Exports>,
    stopper: Stopper,
    bytes: Vec<u8>,
    thread: Option<JoinHandle<Result<(), ServeError>>>,
}

impl Network {
    fn tls(mutual: bool, limits: Limits) -> Self {
        Self::start("127.0.0.1:0", limits, |pki| {
            Security::Tls(Credentials::load(pki.files(mutual)).unwrap())
        })
    }

    fn plain(limits: Limits) -> Self {
        Self::start("127.0.0.1:0", limits, |_| Security::Plain)
    }

    fn start(at: &str, limits: Limits, security: impl FnOnce(&Pki) -> Security) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let pki = Pki::make(&dir.path().join("pki"));
        let exports = Arc::new(Exports::new());
        let bytes = patterned(4 * MIB);
        let path = dir.path().join("disk.raw");
        write_sparse(&path, &bytes);
        let view = View::open(Sealed::open_path(&path).unwrap(), None).unwrap();
        exports.add("disk", Arc::new(view), "a test image").unwrap();
        let security = security(&pki);
        let server =
            Server::bind_tcp(at.parse().unwrap(), security, Arc::clone(&exports), limits).unwrap();
        let (address, stopper) = (server.address().unwrap(), server.stopper());
        let thread = Some(std::thread::spawn(move || server.run()));
        Self { dir, pki, address, exports, stopper, bytes, thread }
    }

    fn uri(&self, client: &Path) -> String {
        format!("nbds://{}/disk?tls-certificates={}", self.address, client.display())
    }

    fn raw(&self) -> Raw {
        Raw::connect(self.address)
    }

    /// Reads with a certificate, as somebody else would.
    fn still_serves(&self) {
        let mut tls = self.raw().begin_tls(client_config(&self.pki, Some("good"))).unwrap();
        assert_eq!(tls.read("disk", 1000, 5000).unwrap(), self.bytes[1000..6000]);
    }

    fn stop(&mut self) -> Result<(), ServeError> {
        self.stopper.stop();
        self.thread.take().unwrap().join().expect("the server does not panic")
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        if self.thread.is_some() {
            self.stop().unwrap();
        }
    }
}

/// What rustls wants to know; `client` names the certificate.
fn client_config(pki: &Pki, client: Option<&str>) -> Arc<ClientConfig> {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_file(pki.path("ca.pem")).unwrap()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots);
    let Some(name) = client else { return Arc::new(builder.with_no_client_auth()) };
    let chain = vec![CertificateDer::from_pem_file(pki.path(&format!("{name}.pem"))).unwrap()];
    let key = PrivateKeyDer::from_pem_file(pki.path(&format!("{name}.key"))).unwrap();
    Arc::new(builder.with_client_auth_cert(chain, key).unwrap())
}

/// A client that says what a test wants, in plain text or under TLS.
struct Raw<S = TcpStream>(S);

impl Raw<TcpStream> {
    fn connect(address: SocketAddr) -> Self {
        let mut raw = Self(TcpStream::connect(address).unwrap());
        assert_eq!(raw.take(18).unwrap(), b"NBDMAGICIHAVEOPT\0\x03");
        raw
    }

    fn begin_tls(
        mut self,
        config: Arc<ClientConfig>,
    ) -> std::io::Result<Raw<StreamOwned<ClientConnection, TcpStream>>> {
        self.send(&3u32.to_be_bytes());
        self.option(5, b"");
        assert_eq!(self.reply(5)?, (1, vec![]));
        let name = ServerName::try_from("localhost").unwrap();
        let mut stream = StreamOwned::new(ClientConnection::new(config, name).unwrap(), self.0);
        while stream.conn.is_handshaking() {
            stream.conn.complete_io(&mut stream.sock)?;
        }
        Ok(Raw(stream))
    }

    /// Waits for the end of the connection; what came before.
    fn closed(mut self) -> Vec<u8> {
        let mut rest = Vec::new();
        let _end_or_reset = self.0.read_to_end(&mut rest);
        rest
    }
}

impl<S: Read + Write> Raw<S> {
    fn send(&mut self, bytes: &[u8]) {
        self.0.write_all(bytes).unwrap();
    }

    fn take(&mut self, count: usize) -> std::io::Result<Vec<u8>> {
        let mut bytes = vec![0; count];
        self.0.read_exact(&mut bytes)?;
        Ok(bytes)
    }

    fn option(&mut self, number: u32, data: &[u8]) {
        self.send(&option(number, data));
    }

    fn reply(&mut self, number: u32) -> std::io::Result<(u32, Vec<u8>)> {
        let head = self.take(20)?;
        let word = |at: usize| u32::from_be_bytes(head[at..at + 4].try_into().unwrap());
        assert_eq!((&head[..8], word(8)), (&0x0003_e889_0455_65a9_u64.to_be_bytes()[..], number));
        Ok((word(12), self.take(word(16) as usize)?))
    }

    /// GO, and one read with a simple reply.
    fn read(&mut self, export: &str, at: u64, len: u32) -> std::io::Result<Vec<u8>> {
        self.option(7, &Wire::go_data(export, &[]));
        assert_eq!(self.reply(7)?.0, 3);
        assert_eq!(self.reply(7)?.0, 1);
        self.send(&Wire::request_bytes(0, 0, 7, at, len));
        assert_eq!(self.take(16)?[..8], *b"\x67\x44\x66\x98\0\0\0\0");
        self.take(len as usize)
    }
}

fn option(number: u32, data: &[u8]) -> Vec<u8> {
    let len = u32::try_from(data.len()).unwrap();
    [b"IHAVEOPT", &number.to_be_bytes()[..], &len.to_be_bytes(), data].concat()
}

#[test]
fn libnbd_and_qemu_read_the_same_bytes_over_tls() {
    if !have(&TOOLS) {
        return;
    }
    for at in ["127.0.0.1:0", "[::1]:0", "[::]:0"] {
        let server = Network::start(at, Limits::default(), |pki| {
            Security::Tls(Credentials::load(pki.files(true)).unwrap())
        });
        let good = server.pki.good();
        let port = server.address.port();
        let host = if at.starts_with("127") { "127.0.0.1" } else { "::1" };
        let in_uri = if host.contains(':') { "[::1]" } else { host };
        let uri = format!("nbds://{in_uri}:{port}/disk?tls-certificates={}", good.display());
        assert_eq!(run("nbdinfo", &["--size", &uri]).trim(), "4194304");
        assert!(run("nbdinfo", &[&uri]).contains("with TLS"));
        let copy = server.dir.path().join("copy");
        run("nbdcopy", &[&uri, copy.to_str().unwrap()]);
        assert!(std::fs::read(&copy).unwrap() == server.bytes);
        for versions in ["NORMAL", "NORMAL:-VERS-TLS1.3"] {
            let creds = format!(
                "tls-creds-x509,id=tls0,dir={},endpoint=client,priority={versions}",
                good.display()
            );
            let nbd = format!("driver=nbd,host={host},port={port},export=disk,tls-creds=tls0");
            let info = run("qemu-img", &["info", "--object", &creds, "--image-opts", &nbd]);
            assert!(info.contains("virtual size: 4 MiB"), "{info}");
            let file = format!("driver=file,filename={}", copy.display());
            let args = ["compare", "--object", &creds, "--image-opts", &nbd, &file];
            let compared = run("qemu-img", &args);
            assert!(compared.contains("identical"), "{compared}");
        }
    }
}

#[test]
fn a_server_at_all_addresses_is_reached_by_ipv4_too() {
    let server = Network::start("[::]:0", Limits::default(), |_| Security::Plain);
    let v4 = SocketAddr::from(([127, 0, 0, 1], server.address.port()));
    let mut raw = Raw::connect(v4);
    raw.send(&3u32.to_be_bytes());
    assert_eq!(raw.read("disk", 0, 4096).unwrap(), server.bytes[..4096]);
}

#[test]
fn plain_text_is_served_where_it_was_chosen() {
    let server = Network::plain(Limits::default());
    if have(&TOOLS) {
        let copy = server.dir.path().join("copy");
        let uri = format!("nbd://{}/disk", server.address);
        run("nbdcopy", &[&uri, copy.to_str().unwrap()]);
        assert!(std::fs::read(&copy).unwrap() == server.bytes);
    }
    let mut raw = server.raw();
    raw.send(&3u32.to_be_bytes());
    raw.option(5, b"");
    let (kind, why) = raw.reply(5).unwrap();
    assert!(kind >> 31 == 1 && kind != ERR_TLS_REQD, "{}", text(&why));
    assert_eq!(raw.read("disk", 100_000, 4096).unwrap(), server.bytes[100_000..104_096]);
}

#[test]
fn who_has_no_good_certificate_is_not_let_in_and_the_others_are() {
    let server = Network::tls(true, Limits::default());
    let strangers = Pki::make(&server.dir.path().join("strangers"));
    // A client of another authority that trusts the server.
    let stranger = strangers.good();
    std::fs::copy(server.pki.path("ca.pem"), stranger.join("ca-cert.pem")).unwrap();
    let distrustful = server.pki.client("distrustful", 2);
    std::fs::copy(strangers.path("ca.pem"), distrustful.join("ca-cert.pem")).unwrap();
    let expired = server.pki.client("expired", 0);
    let nobody = server.pki.nobody();
    if have(&TOOLS) {
        for (who, dir) in [
            ("of another authority", &stranger),
            ("trusting another authority", &distrustful),
            ("expired", &expired),
            ("without a certificate", &nobody),
        ] {
            let output = command("nbdinfo").arg(server.uri(dir)).output().unwrap();
            assert!(!output.status.success(), "a client {who} was let in");
        }
        let plain = format!("nbd://{}/disk", server.address);
        let output = command("nbdinfo").arg(plain).output().unwrap();
        assert!(!output.status.success(), "a client without TLS was let in");
    }
    // TLS 1.3 lets a client finish before it hears; then it reads nothing, and hears why.
    for (client, why) in [(Some("expired"), "Expired"), (None, "CertificateRequired")] {
        let read = server
            .raw()
            .begin_tls(client_config(&server.pki, client))
            .and_then(|mut tls| tls.read("disk", 0, 512));
        let error = format!("{:?}", read.unwrap_err());
        assert!(error.contains(why), "{client:?}: {error}");
    }
    assert_eq!(server.exports.in_use("disk"), 0);
    server.still_serves();
}

#[test]
fn an_expired_certificate_of_the_server_is_refused_by_clients() {
    let server = Network::start("127.0.0.1:0", Limits::default(), |pki| {
        pki.server("server", 0);
        Security::Tls(Credentials::load(pki.files(false)).unwrap())
    });
    let error = server.raw().begin_tls(client_config(&server.pki, None)).err().unwrap();
    assert!(format!("{error:?}").contains("Expired"), "{error:?}");
}

#[test]
fn before_tls_only_starttls_and_abort_are_answered() {
    let server = Network::tls(false, Limits::default());
    let mut raw = server.raw();
    raw.send(&3u32.to_be_bytes());
    for number in [3, 6, 7, 8, 9, 10, 11, 99] {
        raw.option(number, &Wire::go_data("disk", &[]));
        let (kind, text) = raw.reply(number).unwrap();
        assert_eq!(kind, ERR_TLS_REQD, "option {number}");
        assert!(!text.is_empty());
    }
    raw.option(5, b"x");
    assert_eq!(raw.reply(5).unwrap().0, ERR_INVALID);
    raw.option(2, b"");
    assert_eq!(raw.reply(2).unwrap(), (1, vec![]));
    assert_eq!(raw.closed(), Vec::<u8>::new());
    // What cannot be refused with a reply ends the session, and names no size.
    let mut raw = server.raw();
    raw.send(&3u32.to_be_bytes());
    raw.option(1, b"disk");
    assert_eq!(raw.closed(), Vec::<u8>::new());
    // TLS needs fixed newstyle negotiation.
    for flags in [0u32, 2] {
        let mut raw = server.raw();
        raw.send(&flags.to_be_bytes());
        raw.option(5, b"");
        assert_eq!(raw.closed(), Vec::<u8>::new());
    }
    server.still_serves();
}

#[test]
fn under_tls_everything_is_as_ever_and_starttls_is_invalid() {
    let server = Network::tls(false, Limits::default());
    let mut tls = server.raw().begin_tls(client_config(&server.pki, None)).unwrap();
    tls.option(5, b"");
    assert_eq!(tls.reply(5).unwrap().0, ERR_INVALID);
    tls.option(3, b"");
    let (kind, listed) = tls.reply(3).unwrap();
    assert_eq!((kind, &listed[..8]), (2, &b"\0\0\0\x04disk"[..]));
    assert_eq!(tls.reply(3).unwrap(), (1, vec![]));
    assert_eq!(tls.read("disk", 0, 3 << 20).unwrap(), server.bytes[..3 << 20]);
    // A soft disconnect ends TLS, and then the connection: no truncation.
    tls.send(&Wire::request_bytes(0, 2, 0, 0, 0));
    let mut rest = Vec::new();
    tls.0.read_to_end(&mut rest).unwrap();
    assert!(rest.is_empty());
}

#[test]
fn plain_bytes_after_starttls_are_never_taken_for_encrypted_ones() {
    let server = Network::tls(false, Limits::default());
    let injected = option(7, &Wire::go_data("disk", &[]));
    // With STARTTLS in one packet, wherever the packet is cut.
    for len in [1, 8, injected.len()] {
        let mut raw = server.raw();
        let all = [&3u32.to_be_bytes()[..], &option(5, b""), &injected[..len]].concat();
        raw.send(&all);
        assert_eq!(raw.closed(), Vec::<u8>::new(), "not even acknowledged");
    }
    // After the answer: TLS alone hears it, and it is no TLS.
    let mut raw = server.raw();
    raw.send(&3u32.to_be_bytes());
    raw.option(5, b"");
    assert_eq!(raw.reply(5).unwrap(), (1, vec![]));
    raw.send(&injected);
    let rest = raw.closed();
    assert!(rest.len() <= 7, "an alert at most: {rest:?}");
    assert_eq!(server.exports.get("disk").unwrap().counters().values().connections, 0);
    server.still_serves();
}

#[test]
fn a_handshake_that_dribbles_or_stops_is_ended_when_its_time_is_over() {
    let limits = Limits { handshake: Duration::from_millis(500), ..Limits::default() };
    let server = Network::tls(false, limits);
    // A head of a record that promises 16 KiB, and then a byte now and then.
    let mut dribbling = server.raw();
    dribbling.send(&3u32.to_be_bytes());
    dribbling.option(5, b"");
    dribbling.reply(5).unwrap();
    let silent = server.raw();
    let mut stopped = server.raw();
    stopped.send(&3u32.to_be_bytes());
    stopped.option(5, b"");
    stopped.reply(5).unwrap();
    dribbling.send(b"\x16\x03\x01\x3f\xff");
    while dribbling.0.write_all(&[1]).is_ok() {
        std::thread::sleep(Duration::from_millis(5));
    }
    assert_eq!(silent.closed(), Vec::<u8>::new());
    assert_eq!(stopped.closed(), Vec::<u8>::new());
    while server.stopper.connections() > 0 {
        std::thread::yield_now();
    }
    server.still_serves();
}

#[test]
fn fifty_clients_at_once_are_served_whatever_others_leave_unfinished() {
    let server = Network::tls(true, Limits { connections_per_host: 256, ..Limits::default() });
    let mut unfinished = Vec::new();
    for at in 0..50 {
        let mut raw = server.raw();
        if at % 3 > 0 {
            raw.send(&3u32.to_be_bytes());
            raw.option(5, b"");
        }
        if at % 3 > 1 {
            raw.reply(5).unwrap();
            raw.send(b"\x16\x03\x01");
        }
        unfinished.push(raw);
    }
    std::thread::scope(|scope| {
        for _ in 0..50 {
            scope.spawn(|| server.still_serves());
        }
    });
    assert_eq!(server.exports.get("disk").unwrap().counters().values().connections, 50);
}

#[test]
fn one_host_cannot_take_all_connections() {
    let server = Network::tls(false, Limits { connections_per_host: 2, ..Limits::default() });
    let (one, _two) = (server.raw(), server.raw());
    let third = Raw(TcpStream::connect(server.address).unwrap());
    assert_eq!(third.closed(), Vec::<u8>::new());
    // Another address of this host is another host.
    let other = std::net::Ipv4Addr::new(127, 0, 0, 2);
    let socket = rustix::net::socket(
        rustix::net::AddressFamily::INET,
        rustix::net::SocketType::STREAM,
        None,
    );
    let socket = socket.unwrap();
    rustix::net::bind(&socket, &std::net::SocketAddrV4::new(other, 0)).unwrap();
    rustix::net::connect(&socket, &server.address).unwrap();
    let mut from_other = TcpStream::from(socket);
    from_other.read_exact(&mut [0; 18]).unwrap();
    drop(one);
    while server.stopper.connections() > 2 {
        std::thread::yield_now();
    }
    server.still_serves();
}

#[test]
fn clients_that_stop_reading_under_tls_hold_up_nobody_and_not_the_end() {
    let limits = Limits { farewell: Duration::ZERO, ..Limits::default() };
    let mut server = Network::tls(false, limits);
    let mut stuck = Vec::new();
    for _ in 0..8 {
        let mut tls = server.raw().begin_tls(client_config(&server.pki, None)).unwrap();
        assert_eq!(tls.read("disk", 0, 1).unwrap(), server.bytes[..1]);
        for cookie in 0..64 {
            tls.send(&Wire::request_bytes(0, 0, cookie, 0, 4 << 20));
        }
        stuck.push(tls);
    }
    server.still_serves();
    stuck.truncate(4);
    server.still_serves();
    server.stop().unwrap();
}

#[test]
fn a_page_that_cannot_be_read_is_an_error_over_tls_and_tcp_too() {
    for tls in [true, false] {
        let server = match tls {
            true => Network::tls(false, Limits::default()),
            false => Network::plain(Limits::default()),
        };
        let path = server.dir.path().join("disk.raw");
        OpenOptions::new().write(true).open(path).unwrap().set_len(3 << 20).unwrap();
        if tls {
            let mut tls = server.raw().begin_tls(client_config(&server.pki, None)).unwrap();
            good_and_gone(&mut tls, &server.bytes);
        } else {
            let mut raw = server.raw();
            raw.send(&3u32.to_be_bytes());
            good_and_gone(&mut raw, &server.bytes);
        }
    }
}

/// Reads what is there and what is not in one batch.
fn good_and_gone<S: Read + Write>(raw: &mut Raw<S>, bytes: &[u8]) {
    assert_eq!(raw.read("disk", 0, 10).unwrap(), bytes[..10]);
    let gone = (3 << 20) + 64 * 1024;
    let places = [0, gone, 4096, gone, 0];
    let requests = places.map(|at| Wire::request_bytes(0, 0, at, at, 8192));
    raw.send(&requests.concat());
    for at in places {
        let head = raw.take(16).unwrap();
        let error = u32::from_be_bytes(head[4..8].try_into().unwrap());
        assert_eq!(u64::from_be_bytes(head[8..].try_into().unwrap()), at);
        assert_eq!(error, if at == gone { EIO } else { 0 });
        if at != gone {
            let at = usize::try_from(at).unwrap();
            assert!(raw.take(8192).unwrap() == bytes[at..at + 8192]);
        }
    }
}

#[test]
fn renewed_certificates_are_taken_and_broken_ones_change_nothing() {
    let server = Network::tls(true, Limits::default());
    let before = server_certificate(&server);
    // Half of a renewal: a certificate whose key is not there yet.
    server.pki.server("next", 2);
    std::fs::rename(server.pki.path("next.pem"), server.pki.path("server.pem")).unwrap();
    assert_eq!(server_certificate(&server), before);
    std::fs::rename(server.pki.path("next.key"), server.pki.path("server.key")).unwrap();
    let after = server_certificate(&server);
    assert_ne!(after, before);
    std::fs::remove_file(server.pki.path("ca.pem")).unwrap();
    std::fs::write(server.pki.path("server.pem"), "rubbish").unwrap();
    std::fs::copy(server.pki.good().join("ca-cert.pem"), server.pki.path("kept.pem")).unwrap();
    std::fs::write(server.pki.path("ca.pem"), std::fs::read(server.pki.path("kept.pem")).unwrap())
        .unwrap();
    assert_eq!(server_certificate(&server), after);
}

/// What the server shows now.
fn server_certificate(server: &Network) -> Vec<u8> {
    let tls = server.raw().begin_tls(client_config(&server.pki, Some("good"))).unwrap();
    tls.0.conn.peer_certificates().unwrap()[0].to_vec()
}

#[test]
fn what_is_wrong_with_a_certificate_or_key_is_said_with_its_file() {
    let dir = tempfile::tempdir().unwrap();
    let pki = Pki::make(&dir.path().join("pki"));
    std::fs::write(pki.path("rubbish"), "rubbish").unwrap();
    std::fs::write(
        pki.path("bad.pem"),
        "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n",
    )
    .unwrap();
    let fifo = pki.path("fifo");
    run("mkfifo", &[fifo.to_str().unwrap()]);
    for (cert, key, ca, file, fault) in [
        ("none", "server.key", "ca.pem", "none", "cannot be read"),
        ("rubbish", "server.key", "ca.pem", "rubbish", "holds no PEM certificate"),
        ("bad.pem", "server.key", "ca.pem", "bad.pem", "is of no use"),
        ("fifo", "server.key", "ca.pem", "fifo", "is not a file"),
        ("server.pem", "server.pem", "ca.pem", "server.pem", "holds no PEM private key"),
        ("server.pem", "none", "ca.pem", "none", "cannot be read"),
        ("server.pem", "good.key", "ca.pem", "good.key", "is not that of the certificate in"),
        ("server.pem", "server.key", "server.key", "server.key", "holds no PEM certificate"),
        ("server.pem", "server.key", "bad.pem", "bad.pem", "is of no use"),
    ] {
        let files = bedplate::serve::nbd::TlsFiles {
            cert: pki.path(cert),
            key: pki.path(key),
            clients_ca: Some(pki.path(ca)),
        };
        let error = Credentials::load(files).unwrap_err().to_string();
        let at = format!("{}: ", pki.path(file).display());
        assert!(error.starts_with(&at) && error.contains(fault), "{error}");
    }
}

#[test]
fn an_address_that_is_taken_is_said() {
    let server = Network::plain(Limits::default());
    let again = Server::bind_tcp(
        server.address,
        Security::Plain,
        Arc::new(Exports::new()),
        Limits::default(),
    );
    let error = again.unwrap_err().to_string();
    assert!(error.starts_with(&format!("{}: cannot listen here", server.address)), "{error}");
}
