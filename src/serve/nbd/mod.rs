//! The NBD server: views as network block devices on a Unix socket, and over TCP.
//!
//! Why: qemu, libnbd, fio, backup tools and the kernel all speak it.
//! How: fixed newstyle handshake; one blocking thread a connection; all requests that have
//! arrived are answered with one vectored send straight from the map.
//! Never: changes a byte, lets one client hold up another, panics on what a client says, or serves
//! a network without TLS unless it was told to.
//! Start at [`Server::bind`]; a session without a socket is [`serve`]. Layers, lowest first:
//! `wire` (records), `contexts`, `options` (parsing), `handshake` (negotiation), `style` (headers of
//! each kind), `transport` (the stream, and `tls_stream` the encrypted one), `inbox`, `reply`
//! (gathering and sending), `commands` (runs to replies), `session` (the loop), `credentials` (who the
//! server is, and whom it lets in), `network` (sessions over TCP), `server` (where sessions come from).
//! Protocol: NetworkBlockDevice/nbd `doc/proto.md`.

mod commands;
mod contexts;
mod credentials;
mod handshake;
mod inbox;
mod limits;
mod network;
mod options;
mod reply;
mod server;
mod session;
mod style;
mod tls_stream;
mod transport;
pub mod wire;

pub use credentials::{Credentials, TlsFiles};
pub use limits::{Limits, MAX_READ_BYTES, PREFERRED_BLOCK_BYTES};
pub use network::Security;
pub use server::Server;
pub use session::{End, serve};
pub use transport::Transport;

#[cfg(test)]
mod tests;
