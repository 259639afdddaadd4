//! What a daemon is told: a TOML file, or flags that say the same.
//!
//! Why: a misspelt key that is ignored is a setting that isn't in force.
//! How: serde with unknown keys refused; what is absent has the default named at the field.
//! Never: ignores a key that it doesn't know.
//! Start at [`Config`].

use std::collections::BTreeSet;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;

use super::{CONTROL_SOCKET, DaemonError, NBD_SOCKET, REPLICA_SOCKET, sockets};
use crate::fetch::{AddressPolicy, Places, Trust};
use crate::manager::{NodeOptions, Setting, Settings};
use crate::names::{ImageName, Tag};
use crate::serve::{nbd, vhost_user};

/// Queues of a VM that may be set.
const MAX_VM_QUEUES: u16 = 128;
/// Longer looking is a processor for each queue.
const MAX_VM_POLL_US: u32 = 10_000;

/// What a daemon is told.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Directories, each on a file system of its own: where copies live. At least one. The first
    /// also holds the catalog and, by default, the sockets.
    pub disks: Vec<PathBuf>,
    /// Tags of this node, for images that may be only on some. Default: none.
    #[serde(default)]
    pub node_tags: BTreeSet<Tag>,
    /// Default: `<first disk>/bedplate/control.sock`.
    pub control_socket: Option<PathBuf>,
    /// Default: `<first disk>/bedplate/nbd.sock`.
    pub nbd_socket: Option<PathBuf>,
    /// Where NBD is served over TCP as well, as `0.0.0.0:10809` or `[::]:10809`, with the certificates
    /// below. Default: nowhere.
    pub nbd_tcp: Option<SocketAddr>,
    /// File (PEM) with the server's certificate, and those between it and its authority. It and the two
    /// below are read again when they change.
    pub nbd_tls_cert: Option<PathBuf>,
    /// File (PEM) with its private key.
    pub nbd_tls_key: Option<PathBuf>,
    /// File (PEM) with the authorities of clients: who has no certificate of theirs is not let in.
    /// Default: any client may read.
    pub nbd_tls_clients_ca: Option<PathBuf>,
    /// Serve TCP in plain text, to anybody who can connect. Default: no.
    #[serde(default)]
    pub nbd_tcp_plain: bool,
    /// Where readers on this node attach to images. Default: `<first disk>/bedplate/replica.sock`.
    pub replica_socket: Option<PathBuf>,
    /// Users, besides root and the daemon's own, that may attach. Default: none.
    #[serde(default)]
    pub replica_uids: Vec<u32>,
    /// Groups whose members may attach. Default: none.
    #[serde(default)]
    pub replica_gids: Vec<u32>,
    /// Directory of the sockets of VMs, one for each attachment. Default: `<first disk>/bedplate`.
    pub vm_sockets: Option<PathBuf>,
    /// Group that these sockets belong to, such as that of QEMU's user. Default: the daemon's.
    pub vm_gid: Option<u32>,
    /// Microseconds that a queue of a VM is looked at before its thread sleeps, at most; 0: never.
    /// Default: 32.
    pub vm_poll_us: Option<u32>,
    /// Queues that a VM may use, each a thread. Default: 16.
    pub vm_queues: Option<u16>,
    /// Users, besides root and the daemon's own, that may use the control socket. Default: none.
    #[serde(default)]
    pub control_uids: Vec<u32>,
    /// Groups whose members may use it. The socket belongs to the first. Default: none.
    #[serde(default)]
    pub control_gids: Vec<u32>,
    /// How files are written: `auto`, `uring`, `threads` or `uncached`. Default: `auto`, io_uring where
    /// it works, and uncached writes for a transfer that has nothing to hash.
    pub sink: Option<String>,
    /// Transfers at the same time; further ones wait. Default: 8.
    pub max_transfers: Option<usize>,
    /// Bytes per second at most, of all transfers together. Default: no limit.
    pub rate_limit: Option<u64>,
    /// Minutes that a copy stays which nobody uses, if enough copies are left; -1: for ever.
    /// Default: 60; a person's own process removes nothing.
    pub cleanup_wait_minutes: Option<i64>,
    /// Bytes per second at most, of all copies between disks together. Default: no limit.
    pub disk_copy_rate: Option<u64>,
    /// Copies between disks at the same time; further ones wait. Default: 5.
    pub max_disk_copies: Option<usize>,
    /// Copies made at the same time so that images have their `min_copies`; 0: none is made by itself.
    /// Default: 5.
    pub max_replenished: Option<usize>,
    /// Seconds for which all copies of an image have failed before one is started again, or one of
    /// several before another is made; -1: never.
    /// Default: 300; a person's own process starts nothing again.
    pub recovery_wait_seconds: Option<i64>,
    /// Minutes after which a complete copy is read and checked again; 0: only when asked. Default:
    /// 10080, a week; a person's own process checks nothing by itself.
    pub scrub_interval_minutes: Option<i64>,
    /// Bytes per second at most, of the scrub of each disk; 0: no limit. Default: 32 MiB.
    pub scrub_rate: Option<u64>,
    /// Bytes of decoded clusters that are kept in memory for readers of compressed images, at most and
    /// whatever others need. Default: up to a quarter of the memory, but 32 GiB at most, while an eighth,
    /// or 16 GiB, is available to others; always a 64th, but 64 MiB at least and 512 MiB at most.
    pub decoded_cache: Option<u64>,
    /// The image that NBD clients get who name none. Default: the only one, if there is only one.
    pub default_export: Option<ImageName>,
    /// Sources on this host's loopback addresses may be fetched from. Default: no.
    #[serde(default)]
    pub allow_loopback: bool,
    /// Networks that sources may be in whatever they are, as `10.1.2.0/24`. Default: none.
    #[serde(default)]
    pub allow_addresses: Vec<ipnet::IpNet>,
    /// Directories below which the files, backups and sockets of this node are that a client may name as a
    /// source. Default: any that the daemon may read, unless `control_uids` or `control_gids` let others use
    /// the control socket: then none.
    pub source_dirs: Option<Vec<PathBuf>>,
    /// Directory of the files that a client may name for credentials. Default: none.
    pub secrets_dir: Option<PathBuf>,
    /// True for a person's own process: it goes and reads where the person may.
    #[serde(skip)]
    pub personal: bool,
}

/// What is said of the security of NBD over TCP.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum NbdSecurity {
    /// Nothing.
    Unsaid,
    /// Plain text is wanted.
    Plain,
    /// TLS with these files.
    Tls(nbd::TlsFiles),
}

/// Why a configuration is refused.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "each field is named in the message above it")]
pub enum ConfigError {
    /// The file can't be read.
    #[error("{}: cannot read the configuration", path.display())]
    Read {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    /// It isn't what it should be.
    #[error("{}: the configuration does not read", path.display())]
    Parse {
        path: PathBuf,
        #[source]
        source: Box<toml::de::Error>,
    },
}

impl Config {
    /// A daemon with these disks and defaults for the rest.
    #[must_use]
    pub fn with_disks(disks: Vec<PathBuf>) -> Self {
        Self { disks, ..Self::default() }
    }

    /// Reads a TOML file.
    ///
    /// # Errors
    /// [`ConfigError`] names the file, the line and the key.
    pub fn read(path: &Path) -> Result<Self, ConfigError> {
        let text = std::fs::read_to_string(path)
            .map_err(|source| ConfigError::Read { path: path.to_owned(), source })?;
        toml::from_str(&text).map_err(|source| ConfigError::Parse {
            path: path.to_owned(),
            source: Box::new(source),
        })
    }

    /// How the node is set up.
    ///
    /// # Errors
    /// [`DaemonError::BadSetting`] for a sink that isn't known or no transfer at all.
    pub fn node_options(&self) -> Result<NodeOptions, DaemonError> {
        let mut options = NodeOptions::new(self.disks.clone());
        options.node_tags.clone_from(&self.node_tags);
        if let Some(sink) = &self.sink {
            let refuse = |rule| DaemonError::BadSetting { key: "sink", rule };
            options.sink = sink.parse().map_err(refuse)?;
        }
        let settings = self.settings()?.node();
        options.rate_bytes_per_s = settings.rate_bytes_per_s;
        options.max_transfers = settings.max_transfers;
        let addresses =
            if self.personal { AddressPolicy::person() } else { AddressPolicy::daemon() };
        options.policy.addresses = AddressPolicy {
            loopback: addresses.loopback || self.allow_loopback,
            allow: self.allow_addresses.clone(),
            ..addresses
        };
        if !self.personal {
            options.policy.trust = Trust::Clients { secrets_dir: self.secrets_dir.clone() };
            let for_others = !self.control_uids.is_empty() || !self.control_gids.is_empty();
            let source_dirs = self.source_dirs.clone().or(for_others.then(Vec::new));
            options.policy.places = source_dirs.map_or(Places::Any, Places::Below);
        }
        Ok(options)
    }

    /// What holds unless it is set on the running daemon. A person's own process removes, checks and
    /// restarts nothing by itself.
    ///
    /// # Errors
    /// [`DaemonError::BadSetting`].
    pub fn settings(&self) -> Result<Settings, DaemonError> {
        let (never, scrub) = if self.personal { (Some(-1), Some(0)) } else { (None, None) };
        let bytes = |rate: Option<u64>| rate.map(|rate| i64::try_from(rate).unwrap_or(i64::MAX));
        let count = |most: Option<usize>| most.map(|most| i64::try_from(most).unwrap_or(i64::MAX));
        let configured = [
            ("rate_limit", Setting::RateLimit, bytes(self.rate_limit)),
            ("max_transfers", Setting::MaxTransfers, count(self.max_transfers)),
            ("disk_copy_rate", Setting::DiskCopyRate, bytes(self.disk_copy_rate)),
            ("max_disk_copies", Setting::MaxDiskCopies, count(self.max_disk_copies)),
            ("max_replenished", Setting::MaxReplenished, count(self.max_replenished)),
            ("cleanup_wait_minutes", Setting::CleanupWait, self.cleanup_wait_minutes.or(never)),
            ("recovery_wait_seconds", Setting::RecoveryWait, self.recovery_wait_seconds.or(never)),
            (
                "scrub_interval_minutes",
                Setting::ScrubInterval,
                self.scrub_interval_minutes.or(scrub),
            ),
            ("scrub_rate", Setting::ScrubRate, bytes(self.scrub_rate)),
        ];
        let given = configured.into_iter().filter_map(|(key, s, value)| Some((key, s, value?)));
        let given: Vec<_> = given.collect();
        if let Some((key, setting, _)) = given.iter().find(|(_, s, v)| !s.allowed().contains(v)) {
            return Err(DaemonError::BadSetting { key, rule: setting.rule() });
        }
        Ok(Settings::configured(given.into_iter().map(|(_, setting, value)| (setting, value))))
    }

    /// Where the control socket is to be.
    ///
    /// # Errors
    /// [`DaemonError`] if there is no disk, or the given path is too long.
    pub fn control_socket(&self) -> Result<PathBuf, DaemonError> {
        self.socket(self.control_socket.as_deref(), CONTROL_SOCKET)
    }

    /// Where the NBD socket is to be.
    ///
    /// # Errors
    /// As [`Config::control_socket`].
    pub fn nbd_socket(&self) -> Result<PathBuf, DaemonError> {
        self.socket(self.nbd_socket.as_deref(), NBD_SOCKET)
    }

    /// How NBD over TCP is to be secured.
    ///
    /// # Errors
    /// [`DaemonError::BadSetting`] for keys that contradict each other, or need others.
    pub(super) fn nbd_security(&self) -> Result<NbdSecurity, DaemonError> {
        let refuse = |key, rule: &str| Err(DaemonError::BadSetting { key, rule: rule.to_owned() });
        let (cert, key) = (self.nbd_tls_cert.clone(), self.nbd_tls_key.clone());
        let clients_ca = self.nbd_tls_clients_ca.clone();
        match (cert, key) {
            (Some(_), _) | (_, Some(_)) if self.nbd_tcp_plain => {
                refuse("nbd_tcp_plain", "contradicts nbd_tls_cert and nbd_tls_key; leave one out")
            }
            (Some(cert), Some(key)) => {
                Ok(NbdSecurity::Tls(nbd::TlsFiles { cert, key, clients_ca }))
            }
            (Some(_), None) => refuse("nbd_tls_key", "is needed beside nbd_tls_cert"),
            (None, Some(_)) => refuse("nbd_tls_cert", "is needed beside nbd_tls_key"),
            (None, None) if clients_ca.is_some() => {
                let rule = "needs nbd_tls_cert and nbd_tls_key: only over TLS do clients say who \
                            they are";
                refuse("nbd_tls_clients_ca", rule)
            }
            (None, None) if self.nbd_tcp_plain => Ok(NbdSecurity::Plain),
            (None, None) => Ok(NbdSecurity::Unsaid),
        }
    }

    /// Where the socket that readers attach at is to be.
    ///
    /// # Errors
    /// As [`Config::control_socket`].
    pub fn replica_socket(&self) -> Result<PathBuf, DaemonError> {
        self.socket(self.replica_socket.as_deref(), REPLICA_SOCKET)
    }

    /// Where the sockets of VMs are to be.
    ///
    /// # Errors
    /// As [`Config::control_socket`].
    pub fn vm_sockets(&self) -> Result<PathBuf, DaemonError> {
        // An attachment's id has 8 characters.
        let name = "vm-00000000.sock";
        let given = self.vm_sockets.as_ref().map(|dir| dir.join(name));
        let path = self.socket(given.as_deref(), name)?;
        Ok(path.parent().unwrap_or(Path::new("/")).to_owned())
    }

    /// What a VM may cost.
    ///
    /// # Errors
    /// [`DaemonError::BadSetting`] for a number of queues or microseconds that cannot be.
    pub fn vm_limits(&self) -> Result<vhost_user::Limits, DaemonError> {
        let mut limits = vhost_user::Limits::default();
        if let Some(queues) = self.vm_queues {
            if !(1..=MAX_VM_QUEUES).contains(&queues) {
                let rule = format!("give 1 to {MAX_VM_QUEUES}");
                return Err(DaemonError::BadSetting { key: "vm_queues", rule });
            }
            limits.queues = queues;
        }
        if let Some(micros) = self.vm_poll_us {
            if micros > MAX_VM_POLL_US {
                let rule = format!("give 0 to {MAX_VM_POLL_US}");
                return Err(DaemonError::BadSetting { key: "vm_poll_us", rule });
            }
            limits.poll = Duration::from_micros(u64::from(micros));
        }
        Ok(limits)
    }

    fn socket(&self, given: Option<&Path>, name: &str) -> Result<PathBuf, DaemonError> {
        if let Some(path) = given {
            if path.as_os_str().len() > sockets::SUN_PATH_MAX {
                return Err(DaemonError::SocketPath { path: path.to_owned() });
            }
            return Ok(path.to_owned());
        }
        let first = self.disks.first().ok_or(DaemonError::NoDisk)?;
        let path = sockets::default_socket(first, name);
        if !path.starts_with(first) {
            sockets::make_private_dir(path.parent().unwrap_or(Path::new("/")))?;
            tracing::warn!(
                disk = %first.display(), socket = %path.display(),
                "the disk's path is too long for a socket in it; the socket is elsewhere"
            );
        }
        Ok(path)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Config, String> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("b.toml");
        std::fs::write(&path, text).unwrap();
        Config::read(&path).map_err(|e| crate::fetch::one_line(&e))
    }

    #[test]
    fn a_configuration_has_defaults_for_all_but_the_disks() {
        let config = parse("disks = ['/d']").unwrap();
        assert_eq!(config, Config::with_disks(vec!["/d".into()]));
        assert_eq!(config.control_socket().unwrap(), Path::new("/d/bedplate/control.sock"));
        assert_eq!(config.nbd_socket().unwrap(), Path::new("/d/bedplate/nbd.sock"));
    }

    #[test]
    fn a_daemon_goes_to_loopback_and_reads_secrets_only_where_it_is_told() {
        let policy = |text: &str| parse(text).unwrap().node_options().unwrap().policy;
        let closed = policy("disks = ['/d']");
        assert_eq!(closed.addresses, AddressPolicy::daemon());
        assert_eq!(closed.trust, Trust::Clients { secrets_dir: None });
        assert_eq!(closed.places, Places::Any);
        let open = policy(
            "disks = ['/d']\nallow_loopback = true\nallow_addresses = ['169.254.7.0/24']\n\
             secrets_dir = '/run/secrets'",
        );
        let allows = |address: &str| open.addresses.allows(address.parse().unwrap());
        assert!(allows("127.0.0.1") && allows("169.254.7.1") && !allows("169.254.8.1"));
        assert_eq!(open.trust, Trust::Clients { secrets_dir: Some("/run/secrets".into()) });
        for others in ["control_uids = [4242]", "control_gids = [4343]"] {
            let shared = policy(&format!("disks = ['/d']\n{others}"));
            assert_eq!(shared.places, Places::Below(Vec::new()));
            let named = policy(&format!("disks = ['/d']\n{others}\nsource_dirs = ['/srv']"));
            assert_eq!(named.places, Places::Below(vec!["/srv".into()]));
        }
        assert!(parse("disks = ['/d']\nallow_addresses = ['10.0.0.0/99']").is_err());
    }

    #[test]
    fn a_misspelt_key_is_refused_with_its_line() {
        let error = parse("disks = ['/d']\ncontrol_soket = '/x'").unwrap_err();
        assert!(error.contains("line 2") && error.contains("control_soket"), "{error}");
    }

    #[test]
    fn a_server_on_a_network_is_secured_or_plain_by_choice_and_never_both() {
        let security = |text: &str| {
            let config = parse(&format!("disks = ['/d']\n{text}")).unwrap();
            config.nbd_security().map_err(|error| error.to_string())
        };
        let tls = "nbd_tls_cert = '/c'\nnbd_tls_key = '/k'\n";
        let files = |clients_ca: Option<PathBuf>| {
            NbdSecurity::Tls(nbd::TlsFiles { cert: "/c".into(), key: "/k".into(), clients_ca })
        };
        assert_eq!(security(""), Ok(NbdSecurity::Unsaid));
        assert_eq!(security("nbd_tcp_plain = true"), Ok(NbdSecurity::Plain));
        assert_eq!(security(tls), Ok(files(None)));
        let with_ca = format!("{tls}nbd_tls_clients_ca = '/a'");
        assert_eq!(security(&with_ca), Ok(files(Some("/a".into()))));
        for (text, key) in [
            ("nbd_tls_cert = '/c'", "nbd_tls_key:"),
            ("nbd_tls_key = '/k'", "nbd_tls_cert:"),
            ("nbd_tls_clients_ca = '/a'", "nbd_tls_clients_ca:"),
            ("nbd_tls_clients_ca = '/a'\nnbd_tcp_plain = true", "nbd_tls_clients_ca:"),
            ("nbd_tls_cert = '/c'\nnbd_tcp_plain = true", "nbd_tcp_plain:"),
            (&format!("{tls}nbd_tcp_plain = true"), "nbd_tcp_plain:"),
        ] {
            let error = security(text).unwrap_err();
            assert!(error.starts_with(key), "{text}: {error}");
        }
        assert!(parse("disks = ['/d']\nnbd_tcp = 'somewhere'").unwrap_err().contains("line 2"));
    }

    #[test]
    fn a_socket_path_that_is_too_long_is_refused() {
        let long = format!("disks = ['/d']\nnbd_socket = '/{}'", "x".repeat(107));
        assert!(parse(&long).unwrap().nbd_socket().is_err());
    }
}
