//! The NBD server: views as network block devices on a Unix socket.
//!
//! Why: qemu, libnbd, fio, backup tools and the kernel all speak it.
//! How: fixed newstyle handshake; one blocking thread a connection; all requests that have
//! arrived are answered with one vectored send straight from the map.
//! Never: changes a byte, lets one client hold up another, or panics on what a client says.
//! Start at [`Server::bind`]; a session without a socket is [`serve`]. Layers, lowest first:
//! `wire` (records), `contexts`, `options` (parsing), `handshake` (negotiation), `style` (headers of
//! each kind), `reply` (gathering and sending), `commands` (runs to replies), `session` (the loop),
//! `server` (where sessions come from).
//! Protocol: NetworkBlockDevice/nbd `doc/proto.md`.

mod activation;
mod commands;
mod contexts;
mod handshake;
mod limits;
mod options;
mod reply;
mod server;
mod session;
mod style;
mod transport;
pub mod wire;

pub use limits::{Limits, MAX_READ_BYTES, PREFERRED_BLOCK_BYTES};
pub use server::Server;
pub use session::{End, serve};
pub use transport::Transport;

#[cfg(test)]
mod tests;
