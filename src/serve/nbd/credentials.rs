//! The certificates and the key of a server, and whose certificates it accepts.
//!
//! Why: what is wrong with them should be said at the start, by file, and not by the first client; and
//! certificates are renewed while a server runs.
//! How: PEM files, read, parsed and held against each other. Each connection looks whether the files
//! are still those that were read; if not, they are read again, and what can't be used changes nothing.
//! Never: turns verification off, resumes a session (an expired client would come back), or shows a key.
//! Start at [`Credentials::load`].

use std::fs::{File, Metadata};
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::{NoServerSessionStorage, WebPkiClientVerifier};
use rustls::{RootCertStore, ServerConfig};

use crate::ciphers::provider;
use crate::serve::ServeError;

/// More than a bundle of all public authorities has.
const MAX_PEM_BYTES: u64 = 1 << 20;

/// Where they are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TlsFiles {
    /// The server's certificate and those between it and its authority, PEM.
    pub cert: PathBuf,
    /// Its private key, PEM.
    pub key: PathBuf,
    /// Authorities of clients' certificates, PEM: who has none from them is not let in. Without, all
    /// clients are.
    pub clients_ca: Option<PathBuf>,
}

/// What a server needs for TLS, read again when its files change.
pub struct Credentials {
    files: TlsFiles,
    current: Mutex<Current>,
}

struct Current {
    config: Arc<ServerConfig>,
    /// Of the files when they were read last, whatever came of it.
    seen: Seen,
}

/// Which files they are: these numbers differ if anything was written or renamed.
type Seen = Vec<Option<(u64, u64, u64, i64, i64)>>;

impl std::fmt::Debug for Credentials {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Credentials").field("files", &self.files).finish_non_exhaustive()
    }
}

impl Credentials {
    /// Reads the files.
    ///
    /// # Errors
    /// [`ServeError::Credential`] names the file and what is wrong with it.
    pub fn load(files: TlsFiles) -> Result<Self, ServeError> {
        let seen = files.look();
        let config = Arc::new(files.read()?);
        Ok(Self { files, current: Mutex::new(Current { config, seen }) })
    }

    /// Whether clients need a certificate.
    #[must_use]
    pub fn knows_clients(&self) -> bool {
        self.files.clients_ca.is_some()
    }

    /// What the next connection is to be served with.
    pub(super) fn config(&self) -> Arc<ServerConfig> {
        let seen = self.files.look();
        // A panic would leave an old configuration at worst.
        let mut current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        if current.seen != seen {
            match self.files.read() {
                Ok(config) => {
                    current.config = Arc::new(config);
                    let cert = self.files.cert.display();
                    tracing::info!(%cert, "the certificates have changed and were read again");
                }
                Err(error) => {
                    let error = &error as &dyn std::error::Error;
                    tracing::error!(
                        error,
                        "the changed certificates are of no use; the old ones stay"
                    );
                }
            }
            current.seen = seen;
        }
        Arc::clone(&current.config)
    }
}

impl TlsFiles {
    fn look(&self) -> Seen {
        let all = [Some(&self.cert), Some(&self.key), self.clients_ca.as_ref()];
        let look = |path: &PathBuf| std::fs::metadata(path).ok().map(|meta| stamp(&meta));
        all.into_iter().flatten().map(look).collect()
    }

    fn read(&self) -> Result<ServerConfig, ServeError> {
        let chain = certificates("certificate", &self.cert)?;
        let key = self.read_key()?;
        let provider = Arc::new(provider());
        let refuse = |what, path: &Path, fault: String| ServeError::Credential {
            what,
            path: path.to_owned(),
            fault,
            source: None,
        };
        let builder = ServerConfig::builder_with_provider(Arc::clone(&provider))
            .with_protocol_versions(&[&rustls::version::TLS13, &rustls::version::TLS12])
            .map_err(|error| refuse("certificate", &self.cert, format!("is of no use: {error}")))?;
        let builder = match &self.clients_ca {
            None => builder.with_no_client_auth(),
            Some(ca) => {
                let what = "authority of clients";
                let mut roots = RootCertStore::empty();
                for root in certificates(what, ca)? {
                    let added = roots.add(root);
                    added.map_err(|error| refuse(what, ca, format!("is of no use: {error}")))?;
                }
                let verifier = WebPkiClientVerifier::builder_with_provider(roots.into(), provider)
                    .build()
                    .map_err(|error| refuse(what, ca, format!("is of no use: {error}")))?;
                builder.with_client_cert_verifier(verifier)
            }
        };
        let mut config = builder.with_single_cert(chain, key).map_err(|error| {
            if matches!(error, rustls::Error::InconsistentKeys(_)) {
                let cert = self.cert.display();
                return refuse(
                    "key",
                    &self.key,
                    format!("is not that of the certificate in {cert}"),
                );
            }
            let of_cert = matches!(error, rustls::Error::InvalidCertificate(_));
            let (what, path) =
                if of_cert { ("certificate", &self.cert) } else { ("key", &self.key) };
            refuse(what, path, format!("is of no use: {error}"))
        })?;
        config.ignore_client_order = true;
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        Ok(config)
    }

    fn read_key(&self) -> Result<PrivateKeyDer<'static>, ServeError> {
        let what = "key";
        let (pem, meta) = read("key", &self.key)?;
        if meta.mode() & 0o077 != 0 {
            let mode = format!("{:04o}", meta.mode() & 0o7777);
            tracing::warn!(
                path = %self.key.display(), mode,
                "others than the owner may use this key of TLS; chmod 0600, unless they are to"
            );
        }
        PrivateKeyDer::from_pem_slice(&pem).map_err(|_| ServeError::Credential {
            what,
            path: self.key.clone(),
            fault: "holds no PEM private key (without a passphrase)".to_owned(),
            source: None,
        })
    }
}

fn certificates(
    what: &'static str,
    path: &Path,
) -> Result<Vec<CertificateDer<'static>>, ServeError> {
    let (pem, _) = read(what, path)?;
    let all: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&pem).collect();
    all.ok().filter(|all| !all.is_empty()).ok_or_else(|| ServeError::Credential {
        what,
        path: path.to_owned(),
        fault: "holds no PEM certificate".to_owned(),
        source: None,
    })
}

fn read(what: &'static str, path: &Path) -> Result<(Vec<u8>, Metadata), ServeError> {
    let refuse = |fault: &str, source| ServeError::Credential {
        what,
        path: path.to_owned(),
        fault: fault.to_owned(),
        source,
    };
    let unreadable = |source: io::Error| refuse("cannot be read", Some(source));
    // A FIFO would hold up the start for ever.
    let is_file = std::fs::metadata(path).map_err(unreadable)?.is_file();
    if !is_file {
        return Err(refuse("is not a file", None));
    }
    let file = File::open(path).map_err(unreadable)?;
    let meta = file.metadata().map_err(unreadable)?;
    let mut bytes = Vec::new();
    file.take(MAX_PEM_BYTES + 1).read_to_end(&mut bytes).map_err(unreadable)?;
    if bytes.len() as u64 > MAX_PEM_BYTES {
        return Err(refuse("is longer than 1 MiB", None));
    }
    Ok((bytes, meta))
}

fn stamp(meta: &Metadata) -> (u64, u64, u64, i64, i64) {
    (meta.dev(), meta.ino(), meta.size(), meta.ctime(), meta.ctime_nsec())
}
