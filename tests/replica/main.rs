//! Readers that attach and read by themselves: the bytes, the protocol, and what may go wrong.
#![expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

#[path = "../control_support/mod.rs"]
mod control_support;
#[path = "../nbd_support/mod.rs"]
mod nbd_support;
#[path = "../qcow2_common/mod.rs"]
mod qcow2_common;

mod c;
mod give_back;
mod protocol;
mod reads;
mod restart;
mod server;
mod system_calls;
