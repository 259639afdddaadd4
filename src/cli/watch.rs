//! `bedplate watch`: every copy that is under way, until none is.
//!
//! Why: one look tells what arrives, how fast, on how many connections, and what is wrong.
//! How: the event stream, a [`Meter`] for each copy that is under way.
//! Never: polls, or ends while something is still to come.

use std::collections::BTreeMap;

use super::args::Global;
use super::args_steer::WatchArgs;
use super::exit::{CliError, Exit};
use super::follow::{moment, object};
use super::output::Output;
use super::progress::Meter;
use super::signals::Signals;
use crate::control::client::Client;
use crate::control::types::{Copy, Image};

pub(super) async fn run(
    args: &WatchArgs,
    global: &Global,
    output: &Output,
) -> Result<(), CliError> {
    let client = Client::new(&global.socket());
    let mut signals = Signals::new()?;
    let mut watch = Watch { output, meters: BTreeMap::new(), open: BTreeMap::new(), refusal: None };
    loop {
        let mut events = client.events(args.name.as_ref().map(|name| name.as_str())).await?;
        let mut complete = false;
        watch.open.clear();
        loop {
            let event = tokio::select! {
                event = events.next() => event?,
                // Whoever goes on after it must not take it for the end.
                () = signals.next() => return Err(CliError::new(Exit::Interrupted, "", "")),
            };
            let Some(event) = event else { break };
            match event.kind.as_str() {
                "lagged" => break,
                "snapshot.end" => complete = true,
                "image.deleted" => watch.forget(event.object.get("name").and_then(|n| n.as_str())),
                "image.snapshot" | "image.created" | "image.updated" | "image.progress" => {
                    watch.take(&object(&event)?)?;
                }
                _ => {}
            }
            if complete && watch.open.values().all(|under_way| !under_way) {
                return watch.verdict(args, output);
            }
        }
        // The stream ends when the daemon does; asking again tells which it was.
        let _alive: crate::control::types::Health = client.get("/healthz").await?;
    }
}

struct Watch<'a> {
    output: &'a Output,
    /// By image and disk.
    meters: BTreeMap<(String, String), Meter<'a>>,
    /// Images, and whether a copy of them is under way.
    open: BTreeMap<String, bool>,
    /// Why no copy of the image that was seen last is ready, nor will be.
    refusal: Option<String>,
}

impl Watch<'_> {
    fn take(&mut self, image: &Image) -> Result<(), CliError> {
        let under_way = |copy: &Copy| {
            let failed_for_now = copy.state == "failed" && !copy.refused;
            matches!(copy.state.as_str(), "pending" | "starting" | "in-progress") || failed_for_now
        };
        self.open.insert(image.name.clone(), image.copies.iter().any(under_way));
        self.refusal = refusal(image);
        for copy in &image.copies {
            let key = (image.name.clone(), copy.disk.clone());
            if self.output.json {
                self.output.object(&serde_json::json!({ "image": image.name, "copy": copy }))?;
            } else if under_way(copy) {
                let output = self.output;
                let meter =
                    self.meters.entry(key).or_insert_with(|| Meter::new(output, &copy.worker));
                meter.show(&moment(copy));
            } else if self.meters.remove(&key).is_some() {
                let message = match copy.message.as_str() {
                    "" => String::new(),
                    message => format!("  {message}"),
                };
                self.output.note(&format!("{}  {}{message}", copy.worker, copy.state));
            }
        }
        Ok(())
    }

    fn forget(&mut self, name: Option<&str>) {
        let Some(name) = name else { return };
        self.open.remove(name);
        self.meters.retain(|(image, _), _| image != name);
    }

    /// Nothing is under way: says so, and whether the image that was asked for is there.
    fn verdict(&self, args: &WatchArgs, output: &Output) -> Result<(), CliError> {
        if let Some(name) = args.name.as_ref().filter(|name| !self.open.contains_key(name.as_str()))
        {
            return Err(CliError::new(Exit::NotFound, format!("image {name}: not found"), ""));
        }
        if let (Some(_), Some(reason)) = (&args.name, &self.refusal) {
            return Err(CliError::new(Exit::Refused, reason, ""));
        }
        output.note("nothing is under way");
        Ok(())
    }
}

/// Why an image has no copy that is ready, if one was refused for good.
fn refusal(image: &Image) -> Option<String> {
    if image.copies.iter().any(|copy| copy.state == "ready") {
        return None;
    }
    image.copies.iter().find(|copy| copy.refused).map(|copy| copy.message.clone())
}
