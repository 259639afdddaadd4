//! Transfer: from a source's bytes to a verified file on a disk.
//!
//! Why: an image should be ready about when its last byte arrives, checked, and no fault of
//! network, server or power may cost more than the bytes in flight.
//! How: one stream is copied into pooled aligned buffers; each full buffer goes to the disk writer
//! and to the digest thread, and is free again when both are done with it. No free buffer means
//! the body is not read: that is all the back-pressure. Every answer is held against the version
//! of the source that the bytes here belong to.
//! Never: knows image formats, or believes a server: what it says is checked or bounded.
//! Start at [`transfer()`].

mod backup;
mod book;
mod crew;
pub mod decode;
mod demand;
mod digest;
mod duplicate;
mod error;
mod expect;
mod fleet;
mod foreseen;
mod hosts;
mod http;
mod limit;
mod local;
mod loose;
mod nbd;
mod needs;
mod opening;
mod pace;
mod packed;
mod parts;
mod pipeline;
mod places;
mod policy;
mod progress;
mod remote;
mod scale;
pub mod source;
mod spec;
mod spool;
mod stream;
mod sums;
pub(crate) mod threads;
mod todo;
mod traffic;
mod transfer;
mod unpack;
mod upload;
mod version;
mod ways;
mod widening;

pub use crate::disk::{BadDigest, DigestKind, DigestMap};
pub use backup::{BackupFault, BackupRecord};
pub use duplicate::duplicate;
pub use error::{Class, FetchError, HttpError, one_line};
pub use expect::Expect;
pub use hosts::Hosts;
pub use http::{
    Access, AccessError, AddressClass, AddressPolicy, AddressRefused, Basic, S3Access, Secret,
    Trust, judge_address, parse_content_range,
};
pub use limit::RateLimit;
pub use nbd::{NbdEnded, NbdExport, NbdFault, NbdOutlet, NbdSession};
pub use pipeline::{Feed, Pipeline, Stopped, Taker};
pub use places::Places;
pub use policy::Policy;
pub use progress::{Phase, Progress, Snapshot, overtaken};
pub use remote::{MAX_PART_BYTES, SourceFile};
pub use source::{SourceError, SourceUrl};
pub use spec::Source;
pub use sums::{SumsFault, parse_sums, settle};
pub use transfer::{Engine, Fetched, transfer};
pub use upload::{Upload, UploadError, UploadWriter, receive};
pub use widening::Widening;
