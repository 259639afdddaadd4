//! What should be: images, copies, attachments; decided here, performed elsewhere.
//!
//! Why: one place that knows the rules of the lifecycle, so that each rule can be tested alone and
//! the same rules can later be driven by Kubernetes objects.
//! How: a pure core ([`World`]: state and event in, actions out) and a driver ([`Manager`]) that
//! owns the world, writes records to the catalog before it acts, and performs the actions.
//! Never: blocks, touches bytes, or does anything that the core didn't ask for.
//! Start at [`World`], then [`Manager`]; what it asks of the node is [`Backend`].

mod announce;
mod back_off;
pub mod backend;
mod beside;
mod chain;
mod class;
mod cleanup;
mod clone;
mod command;
mod copies;
mod disks;
mod drill;
mod driver;
mod error;
mod facts;
mod helm;
mod index;
mod keep;
mod mend;
mod node;
mod parts;
mod perform;
mod prefetch;
pub mod records;
mod recovery;
mod replenish;
mod same;
mod scrub;
mod selectors;
mod settings;
mod siblings;
mod slots;
mod status;
mod steer;
mod step;
mod stream;
#[cfg(test)]
mod tests;
mod turns;
mod uploads;
mod views;
mod volume;
mod worker;
mod world;

pub use crate::fetch::SourceUrl;
pub use crate::image::Format;
pub use crate::import::Layout;
pub use back_off::{BACK_OFF_FIRST, BACK_OFF_MOST, back_off};
pub use backend::{
    Backend, BackendError, Cancel, CopyId, CopyInfo, CopyOf, CopyTask, DiskStatus, FailureClass,
    FoundCopy, FoundState, Link, NodeSettings, Phase, Progress, Report, Reporter, ScrubReport,
    WorkerEvent, WorkerHandle,
};
pub use beside::Beside;
pub use command::{Applied, Command, NewAttachment, NewImage, Outcome, READER_MAX_LEN};
pub use disks::{DiskChange, DiskView, OpenedDisk};
pub use driver::{Exporter, Manager, Object, Subscription, Told};
pub use error::ManagerError;
pub use node::{Node, NodeError, NodeOptions};
pub(crate) use records::unix_now_s;
pub use records::{
    AttachmentId, AttachmentRecord, BackupRecord, ClassRecord, CloneOf, DiskRecord, Expected,
    Facts, ImageRecord, ScrubRecord, ScrubResult, Steering, VolumeRecord,
};
pub use selectors::Selectors;
pub use settings::{Setting, Settings, SettingsChange, SettingsRecord};
pub use status::{AttachmentStatus, CopyStatus, ImageStatus, ReplicaStatus, VolumeStatus};
pub use steer::{PRIORITIES, SteeringChange};
pub use volume::{MAX_REPLICAS, NewVolume, ReplicaState, VolumeState};
pub use world::{Action, AttachmentState, Change, CopyState, Event, Records, World};
