//! A VM's disk: every byte, hostile guests and frontends, restarts, and a real guest.
//!
//! Why: a guest is the least trusted reader, and the one that nobody can tell to try again.
//! How: `client` is a frontend and a driver in one, on memory that it shares by a memfd; it writes
//! descriptors as a test says. A QEMU with a Debian kernel reads the disk to its end.
//! Never: a time limit to pass: waits are for a condition, with a deadline far away.

#![expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

#[path = "../control_support/mod.rs"]
mod control_support;
#[path = "../guest_support/mod.rs"]
mod guest_support;
#[path = "../nbd_support/mod.rs"]
mod nbd_support;

mod blkio;
mod boot;
mod client;
mod daemon;
mod hostile;
mod reads;
mod sessions;
