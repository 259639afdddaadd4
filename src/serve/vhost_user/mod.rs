//! The vhost-user server: an image as a read-only virtio disk of one VM.
//!
//! Why: a VMM hands the queues of a disk to us, and its guest's reads come with no copy and no
//! protocol between: bytes go from the image's map into the guest's memory.
//! How: one Unix socket for each VM and image. The frontend (QEMU, cloud-hypervisor, Firecracker)
//! sends its memory and the places of its queues; a thread for each queue takes requests in order and
//! answers them in order, so that after a restart the index of the last answer says where to go on.
//! Never: changes a byte of an image, believes a length, an address or an index, or touches the
//! guest's memory where a fault would be a signal.
//! Start at [`Server::bind`]; a queue without a frontend is [`drain`]. Layers, lowest first: `device` (what the disk says of itself), `chain`
//! (descriptors), `ring` (a queue's indices), `request` (reads), `worker` (a queue's thread),
//! `backend` (the frontend's messages), `server` (the socket).
//! Protocol: qemu `docs/interop/vhost-user.rst`; virtio 1.2, 2.7 (split queues) and 5.2 (block).

mod backend;
mod chain;
mod device;
mod limits;
mod request;
mod ring;
mod server;
mod worker;

pub use limits::Limits;
pub use ring::{Place, RingFault};
pub use server::Server;
pub use worker::drain;
