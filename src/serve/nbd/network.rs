//! A session over TCP, with TLS or, by somebody's explicit choice, without.
//!
//! Why: across a network nobody vouches for a peer, and anybody may read along.
//! How: with TLS, nothing but STARTTLS is answered before it has begun (FORCEDTLS), and what is
//! negotiated afterwards is all that counts. Dead peers are found by keepalive.
//! Never: goes on in plain text where TLS is wanted, or takes a plain byte for an encrypted one.
//! Start at [`serve`]. Protocol: "TLS support".

use std::time::{Duration, Instant};

use rustix::net::sockopt;
use sha2::{Digest, Sha256};
use zerocopy::IntoBytes;

use super::credentials::Credentials;
use super::handshake::{Encryption, Handshake, greeting};
use super::inbox::Inbox;
use super::limits::Limits;
use super::session::{End, Negotiated, negotiate, transmit};
use super::tls_stream::TlsStream;
use super::transport::Transport;
use crate::serve::{Exports, Socket};

/// A peer that says nothing is asked after so long whether it is still there,
const KEEPALIVE_IDLE: Duration = Duration::from_secs(60);
/// and again after so long,
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);
/// and is given up after so many times.
const KEEPALIVE_PROBES: u32 = 6;

/// How a server on a network protects what it sends.
#[derive(Debug)]
pub enum Security {
    /// By TLS, which every client has to begin.
    Tls(Credentials),
    /// Not at all: anybody who can connect reads all exports, and so does who listens on the way.
    Plain,
}

/// Serves one connection until it ends.
pub(super) fn serve(
    id: u64,
    socket: &Socket,
    security: &Security,
    exports: &Exports,
    limits: &Limits,
) -> End {
    let deadline = Instant::now() + limits.handshake;
    if let Err(errno) = tune(socket) {
        return End::Socket(errno.into());
    }
    let mut session = Begun {
        id,
        socket,
        limits,
        deadline,
        inbox: Inbox::new(limits),
        handshake: Handshake::new(exports, limits, Some(socket.clone())),
    };
    let mut plain = socket.clone();
    match security {
        Security::Plain => session.finish(&mut plain, greeting().as_bytes(), "none", ""),
        Security::Tls(credentials) => {
            session.handshake = session.handshake.with(Encryption::Required);
            let mut stream = match session.upgrade(&mut plain, credentials) {
                Ok(stream) => stream,
                Err(end) => return end,
            };
            session.handshake = session.handshake.with(Encryption::Begun);
            let client = stream.client().map(|der| fingerprint(der)).unwrap_or_default();
            let tls = stream.describe();
            let end = session.finish(&mut stream, &[], &tls, &client);
            stream.farewell();
            end
        }
    }
}

/// A session that is not in its transmission phase.
struct Begun<'a> {
    id: u64,
    socket: &'a Socket,
    limits: &'a Limits,
    deadline: Instant,
    inbox: Inbox,
    handshake: Handshake<'a>,
}

impl Begun<'_> {
    /// Waits for STARTTLS, and does the handshake of TLS.
    fn upgrade(&mut self, plain: &mut Socket, credentials: &Credentials) -> Result<TlsStream, End> {
        let (inbox, handshake) = (&mut self.inbox, &mut self.handshake);
        match negotiate(plain, inbox, handshake, greeting().as_bytes(), self.deadline)? {
            Negotiated::StartTls => {}
            Negotiated::Agreed(_) => return Err(End::Protocol("an export before STARTTLS")),
        }
        TlsStream::accept(self.socket.clone(), credentials.config(), self.deadline)
    }

    /// Negotiates, and serves what was agreed on.
    fn finish(
        mut self,
        transport: &mut impl Transport,
        first: &[u8],
        tls: &str,
        client: &str,
    ) -> End {
        let (inbox, handshake) = (&mut self.inbox, &mut self.handshake);
        let agreed = match negotiate(transport, inbox, handshake, first, self.deadline) {
            Ok(Negotiated::Agreed(agreed)) => agreed,
            Ok(Negotiated::StartTls) => return End::Protocol("STARTTLS twice"),
            Err(end) => return end,
        };
        let peer = self.socket.peer().map(|peer| peer.to_string()).unwrap_or_default();
        let export = agreed.attachment.export().name();
        tracing::info!(id = self.id, peer, export, tls, client, "a client reads over the network");
        transmit(transport, self.inbox, agreed, self.limits)
    }
}

/// What TCP needs for requests and answers, and to find out that a peer is gone.
fn tune(socket: &Socket) -> rustix::io::Result<()> {
    sockopt::set_tcp_nodelay(socket, true)?;
    sockopt::set_socket_keepalive(socket, true)?;
    sockopt::set_tcp_keepidle(socket, KEEPALIVE_IDLE)?;
    sockopt::set_tcp_keepintvl(socket, KEEPALIVE_INTERVAL)?;
    sockopt::set_tcp_keepcnt(socket, KEEPALIVE_PROBES)
}

/// As `openssl x509 -fingerprint -sha256` says it, without colons.
fn fingerprint(der: &[u8]) -> String {
    Sha256::digest(der).iter().map(|byte| format!("{byte:02x}")).collect()
}
