//! Certificates for tests, made with openssl, where libnbd and qemu look for them.

#![allow(dead_code, reason = "each test file uses a part")]
#![expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use std::path::{Path, PathBuf};
use std::process::Command;

use bedplate::serve::nbd::TlsFiles;

const KEY: &str = "-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes";
/// Names of this host's that the server's certificate is for.
const NAMES: &str = "subjectAltName=DNS:localhost,IP:127.0.0.1,IP:::1";

/// A time that is over.
const PAST: &str = "-startdate 20200101000000Z -enddate 20200102000000Z";
/// Of `openssl ca`.
const CONFIG: &str = "[ca]\ndefault_ca = d\n[d]\ndatabase = index.txt\nnew_certs_dir = .\n\
                      serial = serial\ndefault_md = sha256\npolicy = p\n[p]\ncommonName = supplied\n";

/// An authority in a directory, the server's files, and a directory for each client.
pub struct Pki {
    pub dir: PathBuf,
}

impl Pki {
    /// With a server's certificate and the client `good`.
    pub fn make(dir: &Path) -> Self {
        std::fs::create_dir_all(dir).unwrap();
        let pki = Self { dir: dir.to_owned() };
        let ca = "-x509 -days 2 -subj /CN=bedplate-test-authority \
                  -addext basicConstraints=critical,CA:TRUE";
        pki.openssl(&format!("req {KEY} {ca} -keyout ca.key -out ca.pem"));
        pki.server("server", 2);
        pki.client("good", 2);
        pki
    }

    fn openssl(&self, args: &str) {
        let args = args.split_whitespace();
        let output = Command::new("openssl").args(args).current_dir(&self.dir).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }

    /// A certificate that is good for so many days, or has expired if there are none.
    fn sign(&self, name: &str, extensions: &[&str], days: i32) {
        self.openssl(&format!("req {KEY} -subj /CN={name} -keyout {name}.key -out {name}.csr"));
        let all = format!("basicConstraints=critical,CA:FALSE\n{}\n", extensions.join("\n"));
        std::fs::write(self.dir.join("extensions"), all).unwrap();
        let valid = if days > 0 { format!("-days {days}") } else { PAST.to_owned() };
        std::fs::write(self.dir.join("index.txt"), "").unwrap();
        std::fs::write(self.dir.join("ca.cnf"), CONFIG).unwrap();
        self.openssl(&format!(
            "ca -batch -notext -create_serial -config ca.cnf -cert ca.pem -keyfile ca.key {valid} \
             -extfile extensions -in {name}.csr -out {name}.pem"
        ));
    }

    pub fn server(&self, name: &str, days: i32) {
        self.sign(name, &[NAMES, "extendedKeyUsage=serverAuth"], days);
    }

    /// A directory as libnbd and qemu want it.
    pub fn client(&self, name: &str, days: i32) -> PathBuf {
        self.sign(name, &["extendedKeyUsage=clientAuth"], days);
        let dir = self.dir.join(format!("{name}.d"));
        std::fs::create_dir_all(&dir).unwrap();
        let files = [("ca.pem", "ca-cert.pem")].map(|(from, to)| (from.to_owned(), to));
        let own =
            [(format!("{name}.pem"), "client-cert.pem"), (format!("{name}.key"), "client-key.pem")];
        for (from, to) in files.into_iter().chain(own) {
            std::fs::copy(self.dir.join(from), dir.join(to)).unwrap();
        }
        dir
    }

    /// The directory of the client `good`.
    pub fn good(&self) -> PathBuf {
        self.dir.join("good.d")
    }

    /// A directory without a certificate of the client's own.
    pub fn nobody(&self) -> PathBuf {
        let dir = self.dir.join("nobody.d");
        std::fs::create_dir_all(&dir).unwrap();
        std::fs::copy(self.dir.join("ca.pem"), dir.join("ca-cert.pem")).unwrap();
        dir
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// The server's files; with `mutual`, clients need a certificate.
    pub fn files(&self, mutual: bool) -> TlsFiles {
        TlsFiles {
            cert: self.path("server.pem"),
            key: self.path("server.key"),
            clients_ca: mutual.then(|| self.path("ca.pem")),
        }
    }
}
