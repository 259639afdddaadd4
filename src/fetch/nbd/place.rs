//! Where an export is: the parts of an NBD URI, and the way there.
//!
//! Why: `nbd://host:port/export` and `nbd+unix:///export?socket=/path` are what every tool prints.
//! How: by the rules of NBD's own `doc/uri.md`, without TLS; the name is percent-decoded. A host is
//! resolved by the one resolver that knows the address policy.
//! Never: connects to an address that the policy refuses, or opens what is no socket.
//! Start at [`Place::of`].

use std::io;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};
use url::Url;

use super::super::error::FetchError;
use super::super::http::{AddressRefused, Guarded};
use super::super::policy::Policy;
use super::super::source::SourceUrl;
use super::fault::NbdFault;
use super::wire::MAX_STRING_BYTES;

/// The port of NBD.
const PORT: u16 = 10_809;
/// Longest path of a socket in bytes.
const MAX_SOCKET_BYTES: usize = 107;

/// What is wrong with a URI, and what it should look like.
pub(in crate::fetch) type BadPlace = (&'static str, &'static str);

/// Where an export is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::fetch) struct Place {
    server: Server,
    pub(super) export: String,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Server {
    Unix(PathBuf),
    Tcp { host: String, port: u16 },
}

/// A connection of either kind.
pub(super) trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<S: AsyncRead + AsyncWrite + Send + Unpin> Stream for S {}

impl Place {
    /// The place that `url` names; `None` if it is of another scheme.
    pub(in crate::fetch) fn of(url: &Url) -> Option<Result<Self, BadPlace>> {
        let parse = match url.scheme() {
            "nbd" => Self::tcp,
            "nbd+unix" => Self::unix,
            _ => return None,
        };
        let need = match url.scheme() {
            "nbd" => "nbd://HOST[:PORT]/EXPORT",
            _ => "nbd+unix:///EXPORT?socket=/PATH",
        };
        if url.username() != "" || url.password().is_some() {
            return Some(Err(("a user, which NBD does not have", need)));
        }
        if url.fragment().is_some() {
            return Some(Err(("a fragment", need)));
        }
        Some(
            parse(url)
                .and_then(|server| Ok(Self { server, export: export(url)? }))
                .map_err(|fault| (fault, need)),
        )
    }

    fn tcp(url: &Url) -> Result<Server, &'static str> {
        let host = url.host_str().filter(|host| !host.is_empty()).ok_or("no host")?;
        if url.query().is_some() {
            return Err("a query");
        }
        // An address of IPv6 is in brackets only within a URL.
        let host = host.trim_start_matches('[').trim_end_matches(']');
        let host = decoded(host)?;
        Ok(Server::Tcp { host, port: url.port().unwrap_or(PORT) })
    }

    fn unix(url: &Url) -> Result<Server, &'static str> {
        if url.host_str().is_some_and(|host| !host.is_empty()) || url.port().is_some() {
            return Err("a host");
        }
        let mut pairs = url.query_pairs();
        let socket = match (pairs.next(), pairs.next()) {
            (Some((key, path)), None) if key == "socket" => PathBuf::from(path.into_owned()),
            (None, _) => return Err("no socket"),
            (Some(_), _) => return Err("more than a socket in its query"),
        };
        let bytes = socket.as_os_str().as_encoded_bytes();
        if !socket.is_absolute() || bytes.contains(&0) || bytes.len() > MAX_SOCKET_BYTES {
            return Err("a socket whose path is not absolute, or too long");
        }
        Ok(Server::Unix(socket))
    }

    /// Connects, by the rules of `policy`. `url` is for messages.
    pub(super) async fn connect(
        &self,
        policy: &Policy,
        url: &SourceUrl,
    ) -> Result<Box<dyn Stream>, FetchError> {
        match &self.server {
            Server::Unix(path) => {
                let path = policy.places.real(path)?;
                match connect_unix(&path, policy.connect_timeout).await {
                    Ok(stream) => Ok(Box::new(stream)),
                    Err(source) => Err(FetchError::Nbd { url: url.to_string(), source }),
                }
            }
            Server::Tcp { host, port } => connect_tcp(host, *port, policy, url).await,
        }
    }
}

/// The name of the export: all of the path after the first slash.
fn export(url: &Url) -> Result<String, &'static str> {
    let name = decoded(url.path().strip_prefix('/').unwrap_or(url.path()))?;
    if name.len() > MAX_STRING_BYTES || name.contains('\0') {
        return Err("an export's name that NBD does not allow");
    }
    Ok(name)
}

fn decoded(text: &str) -> Result<String, &'static str> {
    let text = percent_encoding::percent_decode_str(text).decode_utf8();
    text.map(std::borrow::Cow::into_owned).map_err(|_| "a name that is no UTF-8")
}

async fn within<T>(
    patience: Duration,
    io: impl Future<Output = io::Result<T>>,
) -> Result<T, NbdFault> {
    let late = |_| Err(io::Error::from(io::ErrorKind::TimedOut));
    let done = tokio::time::timeout(patience, io).await.unwrap_or_else(late);
    done.map_err(|source| NbdFault::Connect { source })
}

async fn connect_unix(path: &Path, patience: Duration) -> Result<UnixStream, NbdFault> {
    let meta = tokio::fs::metadata(path).await.map_err(|source| NbdFault::Connect { source })?;
    if !meta.file_type().is_socket() {
        return Err(NbdFault::NotASocket);
    }
    within(patience, UnixStream::connect(path)).await
}

async fn connect_tcp(
    host: &str,
    port: u16,
    policy: &Policy,
    url: &SourceUrl,
) -> Result<Box<dyn Stream>, FetchError> {
    let failed = |source| FetchError::Nbd { url: url.to_string(), source };
    let guarded = Guarded(Arc::new(policy.addresses.clone()));
    let found =
        guarded.lookup(host).await.map_err(|error| match error.downcast::<AddressRefused>() {
            Ok(refused) => FetchError::Address { url: url.to_string(), source: *refused },
            Err(error) => failed(NbdFault::Connect { source: io::Error::other(error) }),
        })?;
    let mut last = NbdFault::Connect { source: io::Error::from(io::ErrorKind::NotFound) };
    for mut address in found {
        address.set_port(port);
        match within(policy.connect_timeout, TcpStream::connect(address)).await {
            Ok(stream) => {
                // Small requests must not wait for each other.
                let _slower = stream.set_nodelay(true);
                return Ok(Box::new(stream));
            }
            Err(fault) => last = fault,
        }
    }
    Err(failed(last))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(text: &str) -> Result<Place, BadPlace> {
        Place::of(&Url::parse(text).unwrap()).unwrap()
    }

    #[test]
    fn the_parts_of_a_uri_are_read() {
        let tcp = |host: &str, port, export: &str| Place {
            server: Server::Tcp { host: host.to_owned(), port },
            export: export.to_owned(),
        };
        let unix = |path: &str, export: &str| Place {
            server: Server::Unix(path.into()),
            export: export.to_owned(),
        };
        for (text, wanted) in [
            ("nbd://h", tcp("h", 10_809, "")),
            ("nbd://h/", tcp("h", 10_809, "")),
            ("nbd://h:7/a/b%20c", tcp("h", 7, "a/b c")),
            ("nbd://[fd12::1]:7/a", tcp("fd12::1", 7, "a")),
            ("nbd://127.0.0.1/%2fa", tcp("127.0.0.1", 10_809, "/a")),
            ("nbd+unix:///?socket=/run/a.sock", unix("/run/a.sock", "")),
            ("nbd+unix:///a?socket=/run/a%20b%26c", unix("/run/a b&c", "a")),
        ] {
            assert_eq!(place(text), Ok(wanted), "{text}");
        }
        assert_eq!(Place::of(&Url::parse("nbds://h/a").unwrap()), None);
    }

    #[test]
    fn a_uri_with_more_or_less_is_refused() {
        for text in [
            "nbd:///a",
            "nbd://u@h/a",
            "nbd://u:hunter2@h/a",
            "nbd://h/a?tls=1",
            "nbd://h/a#b",
            "nbd://h/%ff",
            "nbd://h/a%00b",
            "nbd+unix:///a",
            "nbd+unix:///a?socket=relative",
            "nbd+unix:///a?socket=",
            "nbd+unix:///a?socket=/a%00b",
            "nbd+unix:///a?socket=/a&socket=/b",
            "nbd+unix:///a?sock=/a",
            "nbd+unix://h/a?socket=/a",
            &format!("nbd+unix:///a?socket=/{}", "a".repeat(107)),
            &format!("nbd://h/{}", "a".repeat(4097)),
        ] {
            assert!(place(text).is_err(), "{text}");
        }
    }
}
