//! `/v1/events`: everything as it is, then every change, as server-sent events; before them, if they are
//! asked for, the last changes that led there.
//!
//! Why: a watcher that first listed and then watched would miss what is between.
//! How: snapshot and subscription come from the manager in one step. A watcher that is too slow is
//! told (`lagged`) and dropped, so that it can't hold up anybody. The stream ends with the daemon.
//! Never: buffers without a limit.
//! Start at [`stream`].

use std::collections::VecDeque;
use std::convert::Infallible;
use std::time::Duration;

use axum::extract::rejection::QueryRejection;
use axum::extract::{Query, State};
use axum::response::sse::{Event as Sse, KeepAlive};
use axum::response::{IntoResponse, Sse as SseResponse};
use serde::Deserialize;
use serde_json::json;
use tokio::sync::broadcast::error::RecvError;
use tokio::sync::{broadcast, watch};

use super::App;
use super::error::ApiError;
use super::types::Event;
use super::{wire, wire_volume};
use crate::manager::{Object, Subscription, Told};
use crate::names::ImageName;

/// A comment is sent after so much silence, so that dead peers are noticed.
const KEEP_ALIVE: Duration = Duration::from_secs(15);

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Filter {
    image: Option<String>,
    /// Begin with the last changes before.
    #[serde(default)]
    past: bool,
}

struct Watcher {
    app: App,
    only: Option<ImageName>,
    first: VecDeque<Event>,
    changes: broadcast::Receiver<std::sync::Arc<Told>>,
    closing: watch::Receiver<bool>,
    over: bool,
}

pub(super) async fn stream(
    State(app): State<App>,
    filter: Result<Query<Filter>, QueryRejection>,
) -> Result<impl IntoResponse, ApiError> {
    let Query(filter) = filter.map_err(|e| ApiError::bad_request(e.body_text()))?;
    let only = filter.image.as_deref().map(ImageName::parse).transpose()?;
    let subscription = app.manager.subscribe().await?;
    let mut first = VecDeque::new();
    if filter.past {
        let wanted = subscription.past.iter().filter(|told| wants(only.as_ref(), told));
        first.extend(wanted.map(|told| wire::event(told, &app.sockets)));
    }
    first.extend(snapshot(&app, &subscription, only.as_ref()));
    let closing = app.closing.clone();
    let changes = subscription.changes;
    let watcher = Watcher { app, only, first, changes, closing, over: false };
    let events = futures_util::stream::unfold(watcher, |mut watcher| async move {
        let event = watcher.next().await?;
        let data = serde_json::to_string(&event).unwrap_or_default();
        let sse = Sse::default().id(event.id.to_string()).event(event.kind).data(data);
        Some((Ok::<_, Infallible>(sse), watcher))
    });
    Ok(SseResponse::new(events).keep_alive(KeepAlive::new().interval(KEEP_ALIVE)))
}

fn snapshot(app: &App, all: &Subscription, only: Option<&ImageName>) -> VecDeque<Event> {
    let id = all.last_id;
    let mut first = VecDeque::new();
    for image in all.images.iter().filter(|i| only.is_none_or(|o| *o == i.record.name)) {
        let object = json!(wire::image(image, &app.sockets));
        first.push_back(as_it_is(id, "image.snapshot", object));
    }
    for held in all.attachments.iter().filter(|a| only.is_none_or(|o| *o == a.record.image)) {
        let object = json!(wire::attachment(held, &app.sockets));
        first.push_back(as_it_is(id, "attachment.snapshot", object));
    }
    for volume in all.volumes.iter().filter(|v| only.is_none_or(|o| *o == v.record.image)) {
        let object = json!(wire_volume::volume(volume, &app.sockets));
        first.push_back(as_it_is(id, "volume.snapshot", object));
    }
    first.push_back(as_it_is(id, "snapshot.end", json!({})));
    first
}

fn as_it_is(id: u64, kind: &str, object: serde_json::Value) -> Event {
    Event { id, kind: kind.to_owned(), at: None, object }
}

impl Watcher {
    /// The next event; `None` ends the stream.
    async fn next(&mut self) -> Option<Event> {
        if let Some(event) = self.first.pop_front() {
            return Some(event);
        }
        while !self.over {
            let change = tokio::select! {
                change = self.changes.recv() => change,
                _ = self.closing.wait_for(|closing| *closing) => return None,
            };
            match change {
                Ok(told) if wants(self.only.as_ref(), &told) => {
                    return Some(wire::event(&told, &self.app.sockets));
                }
                Ok(_) => {}
                Err(RecvError::Closed) => return None,
                Err(RecvError::Lagged(missed)) => {
                    self.over = true;
                    let object = json!({ "missed": missed });
                    return Some(as_it_is(0, "lagged", object));
                }
            }
        }
        None
    }
}

fn wants(only: Option<&ImageName>, told: &Told) -> bool {
    let Some(only) = only else { return true };
    match &told.object {
        Object::Image(image) => image.record.name == *only,
        Object::ImageGone(name)
        | Object::Warning(name, _)
        | Object::AttachmentGone(_, name)
        | Object::VolumeGone(_, name) => name == only,
        Object::Attachment(held) => held.record.image == *only,
        Object::Volume(volume) => volume.record.image == *only,
        Object::Settings(_) | Object::Node(_) | Object::Disk(_) | Object::DiskGone(_) => false,
    }
}
