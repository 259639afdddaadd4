//! Follows an image's events until a copy is ready, and shows how it goes.
//!
//! Why: `run`, `attach` and `create --wait` wait for the same thing.
//! How: the event stream begins with everything as it is, so nothing is missed; a stream that
//! ended because we were slow is opened again.
//! Never: polls.
//! Start at [`until_ready`].

use serde::de::DeserializeOwned;

use super::exit::{CliError, Exit};
use super::output::Output;
use super::progress::{Meter, Moment};
use crate::control::client::Client;
use crate::control::types::{Attachment, Copy, Event, Image};

/// What to do when a try of the copy has failed and the daemon will try again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum OnFailure {
    /// Say so and wait on.
    Wait,
    /// Give up, so that the person decides.
    GiveUp,
}

/// Waits until the copy of `name` on `disk` (or any copy) is ready.
///
/// # Errors
/// The copy was refused, or failed and `on_failure` says to give up, the image was deleted, or the
/// daemon has gone.
pub(super) async fn until_ready(
    client: &Client,
    name: &str,
    disk: Option<&str>,
    on_failure: OnFailure,
    output: &Output,
) -> Result<Image, CliError> {
    let mut meter = Meter::new(output, name);
    loop {
        let mut events = client.events(Some(name)).await?;
        let mut seen = false;
        while let Some(event) = events.next().await? {
            match event.kind.as_str() {
                "lagged" => break,
                "image.deleted" => return Err(gone(name)),
                "snapshot.end" if !seen => return Err(gone(name)),
                "image.snapshot" | "image.created" | "image.updated" | "image.progress" => {
                    seen = true;
                    let image: Image = object(&event)?;
                    if judge(&image, disk, on_failure, &mut meter)? {
                        meter.finish();
                        return Ok(image);
                    }
                }
                _ => {}
            }
        }
        // The stream ends when the daemon does; asking again tells which it was.
        let _alive: crate::control::types::Health = client.get("/healthz").await?;
    }
}

/// Waits until `held` can be read, which does not wait until its image is complete.
///
/// # Errors
/// As [`until_ready`]; the attachment was deleted.
pub(super) async fn until_readable(client: &Client, held: &Attachment) -> Result<(), CliError> {
    loop {
        let mut events = client.events(Some(&held.image)).await?;
        while let Some(event) = events.next().await? {
            match event.kind.as_str() {
                "lagged" => break,
                "image.deleted" => return Err(gone(&held.image)),
                "attachment.snapshot" | "attachment.created" | "attachment.updated" => {
                    let now: Attachment = object(&event)?;
                    match now.state.as_str() {
                        _ if now.id != held.id => {}
                        "ready" => return Ok(()),
                        "failed" => return Err(CliError::new(Exit::Refused, now.message, "")),
                        _waiting => {}
                    }
                }
                _ => {}
            }
        }
        let _alive: crate::control::types::Health = client.get("/healthz").await?;
    }
}

fn gone(name: &str) -> CliError {
    CliError::new(Exit::NotFound, format!("image {name}: deleted"), "")
}

/// The object of an event.
pub(super) fn object<T: DeserializeOwned>(event: &Event) -> Result<T, CliError> {
    serde_json::from_value(event.object.clone()).map_err(|e| {
        let text = format!("event {} does not read: {e}", event.id);
        CliError::new(Exit::Refused, text, "are the daemon and this program of one version?")
    })
}

/// True once there is a ready copy.
fn judge(
    image: &Image,
    disk: Option<&str>,
    on_failure: OnFailure,
    meter: &mut Meter<'_>,
) -> Result<bool, CliError> {
    let wanted = image.copies.iter().filter(|c| disk.is_none_or(|d| d == c.disk));
    let copies: Vec<&Copy> = wanted.collect();
    if copies.iter().any(|c| c.state == "ready") {
        return Ok(true);
    }
    let failed = copies.iter().find(|c| c.state.starts_with("failed"));
    if let Some(copy) = failed {
        let give_up = on_failure == OnFailure::GiveUp;
        if copy.refused || give_up {
            let exit = if copy.refused { Exit::Refused } else { Exit::Retry };
            let hint = if copy.refused { "" } else { "what has arrived is kept; run it again" };
            return Err(CliError::new(exit, copy.message.clone(), hint));
        }
    }
    if let Some(copy) = copies.first() {
        meter.show(&moment(copy));
    }
    Ok(false)
}

/// A copy's numbers, for drawing.
pub(super) fn moment(copy: &Copy) -> Moment {
    let mut message = copy.message.clone();
    if copy.retries > 0 {
        message = format!("try {}: {message}", copy.retries + 1);
    }
    Moment {
        phase: copy.phase.clone().unwrap_or_else(|| copy.state.clone()),
        bytes_done: copy.bytes_done,
        bytes_total: copy.bytes_total,
        rate_bytes_per_s: copy.rate_bytes_per_s,
        eta_s: copy.eta_s,
        connections: copy.connections,
        message,
    }
}
