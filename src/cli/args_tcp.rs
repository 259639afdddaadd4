//! Arguments of NBD over TCP, for `export` and `serve`.
//!
//! Why: both serve the same, secured in the same way.
//! Never: acts; see [`super::args`].

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::Args;

use crate::daemon::Config;

/// Where NBD is served over TCP, and how it is secured.
#[derive(Clone, Debug, Default, Args)]
pub struct TcpArgs {
    /// Serve NBD over TCP at this address, as `0.0.0.0:10809` or `[::]:10809`, with TLS or --plain
    #[arg(long, value_name = "ADDRESS:PORT")]
    pub tcp: Option<SocketAddr>,
    /// Certificate for TLS, and those between it and its authority (PEM)
    #[arg(long, value_name = "FILE", requires = "tls_key")]
    pub tls_cert: Option<PathBuf>,
    /// Its private key (PEM)
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    pub tls_key: Option<PathBuf>,
    /// Authorities of the certificates that clients must have (PEM) [default: any client may read]
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    pub tls_clients_ca: Option<PathBuf>,
    /// Serve TCP in plain text, to anybody who can connect
    #[arg(long, conflicts_with = "tls_cert")]
    pub plain: bool,
}

impl TcpArgs {
    /// What is given here holds; the security as a whole.
    pub(super) fn put_into(&self, config: &mut Config) {
        config.nbd_tcp = self.tcp.or(config.nbd_tcp);
        if self.plain || self.tls_cert.is_some() {
            config.nbd_tcp_plain = self.plain;
            config.nbd_tls_cert.clone_from(&self.tls_cert);
            config.nbd_tls_key.clone_from(&self.tls_key);
            config.nbd_tls_clients_ca.clone_from(&self.tls_clients_ca);
        }
    }
}
