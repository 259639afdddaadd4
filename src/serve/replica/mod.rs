//! Attachments for readers on the node that read by themselves.
//!
//! Why: a base image's file is on the same node as its readers; a server between them costs ten
//! times what the read does.
//! How: a reader connects to a Unix socket, names an image, and is handed its files and maps, which
//! it can't write whoever it is; see [`crate::replica`] for its side and [`crate::replica::wire`] for
//! the messages. What it can't read by itself it asks for on the same connection, which is also its
//! lease: an image with one is in use.
//! Never: hands out a descriptor that its receiver could write through, if the kernel lets us; waits
//! for a reader while another one is asking.
//! Start at [`Server::bind`].

mod handout;
mod server;
mod session;

pub use handout::Handout;
pub use server::{Limits, Server};
pub use session::{Answer, Session};
