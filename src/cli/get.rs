//! `bedplate get`: one image, with its copies.
//!
//! Why: all that is known of an image, on one screen.
//! Never: prints a source with its credentials: it doesn't get them.

use super::args::{GetArgs, Global};
use super::exit::CliError;
use super::follow::moment;
use super::output::Output;
use super::table::Table;
use crate::control::client::Client;
use crate::control::types::{Attachments, Copy, Digests, Image};
use crate::control::types_volume::{Volume, Volumes};
use crate::units::human_bytes;

pub(super) async fn run(args: &GetArgs, global: &Global, output: &Output) -> Result<(), CliError> {
    let client = Client::new(&global.socket());
    let image: Image = client.get(&format!("/v1/images/{}", args.name)).await?;
    if output.json {
        return output.object(&image);
    }
    let size = |bytes: Option<u64>| bytes.map_or_else(|| "-".to_owned(), human_bytes);
    let text = |value: &Option<String>| value.clone().unwrap_or_else(|| "-".to_owned());
    let mut facts = vec![
        ("name", image.name.clone()),
        ("uuid", image.uuid.clone()),
        ("source", origin(&image)),
        ("created", image.created_at.clone()),
        ("state", state(&image)),
        ("layout", image.layout.clone()),
        ("format", text(&image.format)),
        ("virtual size", size(image.virtual_size_bytes)),
        ("file size", size(image.size_bytes)),
        ("on disk", size(image.stored_bytes)),
    ];
    facts.extend(image.base.clone().map(|base| ("base", base)));
    facts.extend(image.data_file.clone().map(|data| ("data file", data)));
    facts.extend(steered(&image));
    for (what, tags) in [("disk tags", &image.disk_selector), ("node tags", &image.node_selector)] {
        facts.extend((!tags.is_empty()).then(|| (what, tags.join(", "))));
    }
    facts.extend(image.snapshot.clone().map(|snapshot| ("snapshot", snapshot)));
    let found = image.digests.by_name().into_iter();
    facts.extend(found.filter_map(|(kind, digest)| Some((kind, digest?.to_owned()))));
    if image.digests == Digests::default() {
        facts.push(("digests", "-".to_owned()));
    }
    facts.extend(image.checksum_url.clone().map(|url| ("checksum url", url)));
    facts.extend(
        image
            .prefetch
            .map(|kept| ("trace", format!("{} ranges, {}", kept.ranges, human_bytes(kept.bytes)))),
    );
    facts.push(("readers", image.attachments.to_string()));
    facts.extend(image.nbd.as_ref().map(|nbd| ("nbd", nbd.uri.clone())));
    for (key, value) in facts {
        output.line(&format!("{key:<13} {}", super::output::printable(&value)))?;
    }
    if !image.copies.is_empty() {
        show_copies(&image, output)?;
    }
    if image.attachments == 0 {
        return Ok(());
    }
    show_readers(&image.name, &client, output).await
}

/// What was said of it beside where it is from, as far as it is not the usual.
fn steered(image: &Image) -> Vec<(&'static str, String)> {
    let mut facts: Vec<_> = image.mirrors.iter().map(|mirror| ("mirror", mirror.clone())).collect();
    facts.extend((!image.access.is_empty()).then(|| ("access by", image.access.join(", "))));
    facts.extend((image.priority != 0).then(|| ("priority", image.priority.to_string())));
    let rate = image.rate_limit_bytes_per_s;
    facts.extend((rate > 0).then(|| ("rate", format!("at most {}/s", human_bytes(rate)))));
    facts.extend((image.min_copies > 1).then(|| ("min copies", image.min_copies.to_string())));
    facts
}

/// Who has said that it reads the image: an image is not deleted before all are detached.
async fn show_readers(image: &str, client: &Client, output: &Output) -> Result<(), CliError> {
    let held: Attachments = client.get("/v1/attachments").await?;
    let volumes: Volumes = client.get("/v1/volumes").await?;
    let mut table = Table::new(&["READER", "LABEL", "DISK", "STATE", "MESSAGE"]);
    for held in held.attachments.into_iter().filter(|held| held.image == image) {
        let label = if held.reader.is_empty() { "-".to_owned() } else { held.reader };
        table.row(vec![held.id, label, held.disk, held.state, held.message]);
    }
    let is_reader = |volume: &Volume| volume.image == image && volume.state == "attached";
    for volume in volumes.volumes.into_iter().filter(is_reader) {
        for replica in volume.replicas {
            let label = format!("volume {}", volume.name);
            table.row(vec![replica.name, label, replica.disk, replica.state, String::new()]);
        }
    }
    output.line("")?;
    table.lines().iter().try_for_each(|line| output.line(line))
}

fn show_copies(image: &Image, output: &Output) -> Result<(), CliError> {
    let mut table =
        Table::new(&["DISK", "WORKER", "STATE", "SHARE", "RATE", "SCRUBBED", "MESSAGE"]);
    for copy in &image.copies {
        let share = moment(copy).share().map_or_else(|| "-".to_owned(), |p| format!("{p}%"));
        let rate = match copy.rate_bytes_per_s {
            0 => "-".to_owned(),
            rate => format!("{}/s", human_bytes(rate)),
        };
        let scrubbed = match (&copy.scrub, copy.scrubbing) {
            (_, true) => scrubbing(copy),
            (None, false) => "-".to_owned(),
            (Some(scrub), false) => format!("{} {}", scrub.result, scrub.at),
        };
        let cells =
            [&copy.disk, &copy.worker, &copy.state, &share, &rate, &scrubbed, &copy.message];
        table.row(cells.map(Clone::clone).to_vec());
    }
    output.line("")?;
    table.lines().iter().try_for_each(|line| output.line(line))
}

/// How far the check of a copy is: `now, 43%`.
fn scrubbing(copy: &Copy) -> String {
    let Some(done) = copy.scrubbed_bytes else { return "waits".to_owned() };
    match copy.bytes_total.filter(|total| *total > 0) {
        Some(total) => format!("now, {}%", u128::from(done.min(total)) * 100 / u128::from(total)),
        None => "now".to_owned(),
    }
}

/// Where an image's bytes are from, in words if there is no URL.
pub(super) fn origin(image: &Image) -> String {
    match (&image.source, &image.clone_of) {
        (Some(source), _) => source.clone(),
        (None, Some(of)) => format!("clone of {of}"),
        (None, None) => "upload".to_owned(),
    }
}

/// An image's state in a word or two: that of its best copy.
pub(super) fn state(image: &Image) -> String {
    if image.deleting {
        return "deleting".to_owned();
    }
    let unfinished = |copy: &Copy| !copy.state.starts_with("ready");
    if image.paused && image.copies.iter().all(unfinished) {
        return "paused".to_owned();
    }
    let order = ["ready", "ready-for-transfer", "in-progress", "starting", "pending"];
    let rank = |state: &str| order.iter().position(|s| *s == state).unwrap_or(order.len());
    match image.copies.iter().min_by_key(|c| rank(&c.state)) {
        None => "not fetched".to_owned(),
        Some(copy) if copy.state == "in-progress" => {
            let phase = copy.phase.clone().unwrap_or_else(|| copy.state.clone());
            moment(copy).share().map_or_else(|| phase.clone(), |p| format!("{phase} {p}%"))
        }
        Some(copy) => copy.state.clone(),
    }
}

/// An image on one line: `debian-12  qcow2  2.0 GiB virtual  412.3 MiB on disk  sha256:…`.
pub(super) fn summary(image: &Image) -> String {
    let mut parts = vec![image.name.clone()];
    parts.extend(image.format.clone());
    parts.extend(image.virtual_size_bytes.map(|b| format!("{} virtual", human_bytes(b))));
    parts.extend(image.stored_bytes.map(|b| format!("{} on disk", human_bytes(b))));
    let digest = image.digests.by_name().into_iter().find_map(|(kind, d)| Some((kind, d?)));
    parts.extend(digest.map(|(kind, digest)| format!("{kind}:{digest}")));
    parts.push(state(image));
    parts.join("  ")
}
