//! What belongs to an attachment on the wire.
//!
//! Why: as `types`, for readers.
//! How: plain values, with the names that JSON has.
//! Never: computes.
//! Start at [`Vm`].

use serde::{Deserialize, Serialize};

/// The disk of one VM, over vhost-user.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Vm {
    /// Path of its Unix socket.
    pub socket: String,
}

/// Where a program attaches that reads in its own process (`bedplate_replica.h`).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attach {
    /// Path of the Unix socket.
    pub socket: String,
    /// The image to name there.
    pub image: String,
}

/// What an attachment waits for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Wait {
    /// The whole image, checked.
    #[default]
    Ready,
    /// Its first bytes.
    Stream,
}
