//! `bedplate pause`, `resume`, `cancel`, `cleanup` and `set`: transfers under way.
//!
//! Why: what is more urgent must be able to go first.
//! Never: waits; `bedplate watch` shows what comes of it.

use serde::Serialize;

use super::args::Global;
use super::args_disk::TagList;
use super::args_steer::{CancelArgs, CleanupArgs, PauseArgs, ResumeArgs, SetArgs};
use super::disks;
use super::exit::CliError;
use super::get;
use super::output::Output;
use crate::control::client::Client;
use crate::control::types::{CleanUp, Image, SteerImage};
use crate::names::ImageName;
use crate::units::human_bytes;

pub(super) async fn pause(
    args: &PauseArgs,
    global: &Global,
    output: &Output,
) -> Result<(), CliError> {
    let change = SteerImage { paused: Some(true), ..SteerImage::default() };
    change_image(&args.name, change, global, output).await
}

pub(super) async fn resume(
    args: &ResumeArgs,
    global: &Global,
    output: &Output,
) -> Result<(), CliError> {
    let change = SteerImage { paused: Some(false), ..SteerImage::default() };
    change_image(&args.name, change, global, output).await
}

pub(super) async fn set(args: &SetArgs, global: &Global, output: &Output) -> Result<(), CliError> {
    let change = SteerImage {
        priority: args.priority,
        rate_limit_bytes_per_s: args.rate,
        min_copies: args.min_copies,
        disk_selector: args.disk_tags.as_ref().map(TagList::texts),
        node_selector: args.node_tags.as_ref().map(TagList::texts),
        ..SteerImage::default()
    };
    change_image(&args.name, change, global, output).await
}

async fn change_image(
    name: &ImageName,
    change: SteerImage,
    global: &Global,
    output: &Output,
) -> Result<(), CliError> {
    let client = Client::new(&global.socket());
    let image: Image = client.patch(&format!("/v1/images/{name}"), &change).await?;
    show(&image, output)
}

pub(super) async fn cancel(
    args: &CancelArgs,
    global: &Global,
    output: &Output,
) -> Result<(), CliError> {
    let client = Client::new(&global.socket());
    let target = format!("/v1/images/{}/cancel", args.name);
    let image: Image = client.post(&target, &Nothing {}).await?;
    show(&image, output)
}

pub(super) async fn clean_up(
    args: &CleanupArgs,
    global: &Global,
    output: &Output,
) -> Result<(), CliError> {
    let client = Client::new(&global.socket());
    let target = format!("/v1/images/{}/cleanup", args.name);
    let disks = disks::uuids(&client, &args.disk).await?;
    let image: Image = client.post(&target, &CleanUp { disks }).await?;
    show(&image, output)
}

/// The body of a request that needs none.
#[derive(Serialize)]
struct Nothing {}

fn show(image: &Image, output: &Output) -> Result<(), CliError> {
    if output.json {
        return output.object(image);
    }
    let mut parts = vec![image.name.clone(), get::state(image)];
    if image.priority != 0 {
        parts.push(format!("priority {}", image.priority));
    }
    if image.rate_limit_bytes_per_s > 0 {
        parts.push(format!("at most {}/s", human_bytes(image.rate_limit_bytes_per_s)));
    }
    output.line(&parts.join("  "))
}
