//! Volumes and storage classes as wire types.
//!
//! Why: as `wire`, for what stands on images.
//! Never: puts a whole URL into an answer.
//! Start at [`volume`].

use super::Sockets;
use super::types_volume::{Backup, Class, Condition, Replica, Volume};
use super::wire::{attach, nbd, rfc3339};
use crate::manager::{ClassRecord, ReplicaState, ReplicaStatus, VolumeStatus};
use crate::names::ImageName;

/// Longhorn's word for the condition.
const WAIT_FOR_BACKING_IMAGE: &str = "WaitForBackingImage";

/// A volume for the wire.
pub(crate) fn volume(status: &VolumeStatus, sockets: &Sockets) -> Volume {
    let record = &status.record;
    let here = status.replicas.len();
    let fewer = usize::try_from(record.replicas).is_ok_and(|wanted| here < wanted);
    let message = match fewer {
        true => format!(
            "{} replicas were asked for, and {here} made: a replica has a disk of its own, and no \
             other disk of the node was healthy and had room",
            record.replicas
        ),
        false => String::new(),
    };
    Volume {
        name: record.name.to_string(),
        image: record.image.to_string(),
        state: status.state().as_str().to_owned(),
        robustness: status.robustness().to_owned(),
        size_bytes: record.size_bytes,
        number_of_replicas: record.replicas,
        replicas: status.replicas.iter().map(|r| replica(r, &record.image, sockets)).collect(),
        backup: record.backup.as_ref().map(|backup| Backup {
            volume: backup.volume.clone(),
            backup: backup.backup.clone(),
            image: backup.image.as_ref().map(ToString::to_string),
            sha512: backup.sha512.clone(),
            forced: backup.forced,
        }),
        class: record.class.as_ref().map(ToString::to_string),
        claim: record.claim.clone(),
        message,
        created_at: rfc3339(record.created_unix_s),
    }
}

fn replica(status: &ReplicaStatus, image: &ImageName, sockets: &Sockets) -> Replica {
    let (waits, reason) = match status.state {
        ReplicaState::Stopped => ("False", "Detached"),
        ReplicaState::Waiting => ("True", "Waiting"),
        ReplicaState::Running => ("False", "Ready"),
        ReplicaState::Failed => ("True", "Failed"),
    };
    let message = match status.state {
        ReplicaState::Waiting => {
            let why = if status.message.is_empty() { "" } else { ": " };
            format!("the copy of {image} is {}{why}{}", status.copy_state, status.message)
        }
        ReplicaState::Failed => format!(
            "the copy of {image} was refused: {}; attach again to try again",
            status.message
        ),
        ReplicaState::Stopped | ReplicaState::Running => String::new(),
    };
    Replica {
        name: status.name.clone(),
        disk: status.disk.to_string(),
        state: status.state.as_str().to_owned(),
        copy_state: status.copy_state.to_string(),
        conditions: vec![Condition {
            kind: WAIT_FOR_BACKING_IMAGE.to_owned(),
            status: waits.to_owned(),
            reason: reason.to_owned(),
            message,
        }],
        path: status.path.as_ref().map(|path| path.display().to_string()),
        nbd: (status.state == ReplicaState::Running).then(|| nbd(image, &sockets.nbd)),
        attach: (status.state == ReplicaState::Running).then(|| attach(image, &sockets.replica)),
    }
}

/// A storage class for the wire.
pub(crate) fn class(record: &ClassRecord) -> Class {
    Class {
        name: record.name.to_string(),
        provisioner: record.provisioner.clone(),
        image: record.image.as_ref().map(ToString::to_string),
        source: record.url.as_ref().map(ToString::to_string),
        clone_of: record.clone_of.as_ref().map(ToString::to_string),
        sha512: record.sha512.clone(),
        min_copies: record.min_copies,
        number_of_replicas: record.replicas,
        kept: record.kept.clone(),
        created_at: rfc3339(record.created_unix_s),
    }
}
