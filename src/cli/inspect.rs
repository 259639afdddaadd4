//! `bedplate inspect`: what an image is, what is wrong with it, and whether it is served.
//!
//! Why: a person wants to know before bringing in many gigabytes, and to see every reason at once.
//! How: a file is read here; of a URL only header and tables are fetched; an image of the daemon's
//! is inspected by the daemon.
//! Never: changes or keeps a byte.

use std::fs::File;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use super::args::Global;
use super::args_view::InspectArgs;
use super::exit::{CliError, Exit};
use super::output::{Output, Tint, printable};
use super::table::Table;
use crate::control::client::Client;
use crate::control::inspection::Inspection;
use crate::disk::Sealed;
use crate::fetch::{Class, Engine, Policy, Progress, Source, SourceUrl};
use crate::image;
use crate::image::qcow2::Terms;
use crate::import::{ImportError, inspect_source};
use crate::names::ImageName;
use crate::ring;
use crate::units::human_bytes;

/// Buffers of 1 MiB; parts of an image are read without any.
const BUFFERS: usize = 4;
/// How often it is looked whether the source is tried again.
const TICK: Duration = Duration::from_millis(100);

pub(super) async fn run(
    args: &InspectArgs,
    global: &Global,
    output: &Output,
) -> Result<(), CliError> {
    crate::daemon::logging::init(output.log_filter("error"));
    let inspection = inspect(args, global, output).await?;
    if output.json {
        output.object(&inspection)?;
    } else {
        show(&args.target, &inspection, output)?;
    }
    match inspection.verdict.as_str() {
        "refused" => Err(CliError::new(Exit::Refused, "", "")),
        _served => Ok(()),
    }
}

async fn inspect(
    args: &InspectArgs,
    global: &Global,
    output: &Output,
) -> Result<Inspection, CliError> {
    let target = &args.target;
    if target == "-" || target.contains("://") {
        return of_source(super::source::parse(target)?, args, output).await;
    }
    let path = Path::new(target);
    match std::fs::metadata(path) {
        Ok(_) => of_file(path, args),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            let Ok(name) = ImageName::parse(target) else { return Err(nothing(target)) };
            let client = Client::new(&global.socket());
            let found = client.get(&format!("/v1/images/{name}/inspection")).await;
            found.map_err(|error| match CliError::from(error) {
                refused if refused.exit == Exit::Refused || refused.exit == Exit::Usage => refused,
                other => CliError { hint: no_file(target, &other), ..other },
            })
        }
        Err(error) => Err(CliError::new(Exit::Refused, format!("{target}: {error}"), "")),
    }
}

fn nothing(target: &str) -> CliError {
    let hint = "give a file, a URL, or the name of an image";
    CliError::new(Exit::NotFound, format!("{target}: no such file"), hint)
}

fn no_file(target: &str, error: &CliError) -> String {
    let there = format!("there is no file {target} here either");
    if error.hint.is_empty() { there } else { format!("{}; {there}", error.hint) }
}

fn of_file(path: &Path, args: &InspectArgs) -> Result<Inspection, CliError> {
    let sealed = Sealed::open_path(path).map_err(|e| CliError::refused(&e))?;
    let file: &File = sealed.file();
    let declared = args.format.map(Into::into);
    let terms = Terms { backing: args.overlay, ..Terms::default() };
    let inspection = image::Inspection::of_file(file, path, declared, &terms);
    inspection.map(|found| Inspection::from(&found)).map_err(|e| CliError::retry(&e))
}

async fn of_source(
    url: SourceUrl,
    args: &InspectArgs,
    output: &Output,
) -> Result<Inspection, CliError> {
    // Nothing is written, so the plainest way to write will do.
    let probe = ring::probe(&std::env::temp_dir(), ring::Choice::Threads)
        .map_err(|reason| CliError::new(Exit::Refused, reason, ""))?;
    let engine = Engine::alone(probe, Policy::default(), BUFFERS);
    let source = Source::new(url).reached_with(args.access.by_reference()?);
    let progress = Arc::new(Progress::default());
    let declared = args.format.map(Into::into);
    let terms = Terms { backing: args.overlay, ..Terms::default() };
    let inspecting = inspect_source(&engine, &source, declared, &terms, &progress);
    tokio::pin!(inspecting);
    let (mut tick, mut told) = (tokio::time::interval(TICK), 0);
    let found = loop {
        tokio::select! {
            found = &mut inspecting => break found,
            _ = tick.tick() => {}
        }
        // Who waits is told why; a source that answers needs no words.
        let now = progress.snapshot();
        if now.retries > told {
            told = now.retries;
            output.note(&format!("try {}: {}", told + 1, now.message));
        }
    };
    found.map(|found| Inspection::from(&found)).map_err(|error: ImportError| match error.class() {
        Class::Refuse | Class::Cancelled => CliError::refused(&error),
        Class::Retry => CliError::retry(&error),
    })
}

fn show(target: &str, found: &Inspection, output: &Output) -> Result<(), CliError> {
    let tint = match found.verdict.as_str() {
        "ok" => Tint::Good,
        "repairable" => Tint::Busy,
        _refused => Tint::Bad,
    };
    // A URL may hold a password.
    let shown = SourceUrl::parse(target).map_or_else(|_| target.to_owned(), |url| url.to_string());
    let verdict = output.tint(&found.verdict, tint);
    output.line(&format!("{}: {verdict}", printable(&shown)))?;
    for finding in &found.findings {
        output.line(&format!("  {}: {}", finding.verdict, printable(&finding.text)))?;
    }
    if found.more_faults > 0 {
        output.line(&format!("  refused: {} more table entries", found.more_faults))?;
    }
    for (key, value) in facts(found) {
        output.line(&format!("{key:<13} {}", printable(&value)))?;
    }
    if found.snapshots.is_empty() {
        return Ok(());
    }
    let mut table = Table::new(&["SNAPSHOT", "NAME", "VIRTUAL SIZE", "TAKEN"]);
    for snapshot in &found.snapshots {
        let size = snapshot.virtual_size_bytes.map_or_else(|| "as now".to_owned(), human_bytes);
        table.row(vec![
            snapshot.id.clone(),
            snapshot.name.clone(),
            size,
            snapshot.taken_at.clone(),
        ]);
    }
    output.line("")?;
    table.lines().iter().try_for_each(|line| output.line(line))
}

fn facts(found: &Inspection) -> Vec<(&'static str, String)> {
    let mut facts = Vec::new();
    if let Some(format) = &found.format {
        let version = found.qcow2_version.map(|version| format!(" version {version}"));
        facts.push(("format", format!("{format}{}", version.unwrap_or_default())));
    }
    let size = |bytes: u64| format!("{} ({bytes} bytes)", human_bytes(bytes));
    facts.extend(found.virtual_size_bytes.map(|bytes| ("virtual size", size(bytes))));
    facts.extend(found.file_size_bytes.map(|bytes| ("file size", size(bytes))));
    if let Some(bytes) = found.cluster_size_bytes {
        let parts = if found.extended_l2 == Some(true) { ", each of 32 subclusters" } else { "" };
        facts.push(("cluster size", format!("{}{parts}", human_bytes(bytes))));
    }
    let counts = (found.data_clusters, found.compressed_clusters, found.zero_clusters);
    if let (Some(data), Some(compressed), Some(zero)) = counts {
        let codec = found.compression.as_deref().filter(|_| compressed > 0).unwrap_or_default();
        let codec = if codec.is_empty() { String::new() } else { format!(" ({codec})") };
        let text = format!("{data} of data, {compressed} compressed{codec}, {zero} zero");
        facts.push(("clusters", text));
    }
    let bitmaps = found.bitmaps.filter(|&count| count > 0);
    facts.extend(bitmaps.map(|count| ("bitmaps", count.to_string())));
    facts
}
