//! Images that are read while they are still arriving: through a real daemon, from a source that
//! answers small requests at once and sends all else only when it is told to.
#![expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

#[path = "../control_support/mod.rs"]
mod control_support;
#[expect(dead_code, clippy::cast_possible_truncation, reason = "this test uses a part")]
#[path = "../transfer/fault_server.rs"]
mod fault_server;
#[path = "../guest_support/mod.rs"]
mod guest_support;
#[path = "../nbd_support/mod.rs"]
mod nbd_support;
#[path = "../nginx_support/mod.rs"]
mod nginx_support;
#[path = "../qcow2_common/mod.rs"]
mod qcow2_common;

mod boot;
mod expanded;
mod formats;
mod lost;
mod origin;
mod reads;
mod stalls;
mod trace;
mod trickles;
