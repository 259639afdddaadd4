//! What should be: images, copies, attachments; decided here, performed elsewhere.
//!
//! Why: one place that knows the rules of the lifecycle, so that each rule can be tested alone and
//! the same rules can later be driven by Kubernetes objects.
//! How: a pure core ([`World`]: state and event in, actions out) and a [`driver`] that owns the
//! world, writes records to the catalog before it acts, and performs the actions.
//! Never: blocks, touches bytes, or does anything that the core didn't ask for.
//! Start at [`World`], then [`driver::Manager`]; what it asks of the node is [`Backend`].

pub mod backend;
pub mod records;
pub mod source;

pub use backend::{
    Backend, BackendError, Cancel, CopyId, CopyInfo, CopyTask, DiskStatus, FailureClass, FoundCopy,
    FoundState, Phase, Progress, Report, Reporter, WorkerEvent, WorkerHandle,
};
pub use records::{AttachmentId, AttachmentRecord, Expected, Facts, Format, ImageRecord};
pub use source::SourceUrl;
