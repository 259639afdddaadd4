//! `bedplate trace`: what readers of an image ask for first.
//!
//! Why: whoever starts many guests of one image records one boot, and the other nodes fetch ahead.
//! How: the daemon notes; the file is what it answers when it is told to stop.
//! Never: leaves the daemon recording when it ends by itself or by a signal, or half a file.
//! Start at [`run`].

use std::fs::File;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use super::args::Global;
use super::args_trace::{TraceCommand, TraceRecordArgs, TraceUseArgs};
use super::exit::{CliError, Exit};
use super::get;
use super::output::Output;
use super::signals::Signals;
use crate::control::client::Client;
use crate::control::types::Image;
use crate::control::types_trace::RecordTrace;
use crate::image::{MAX_TRACE_BYTES, Trace, TraceFile};
use crate::names::ImageName;
use crate::units::human_bytes;

pub(super) async fn run(
    command: &TraceCommand,
    global: &Global,
    output: &Output,
) -> Result<(), CliError> {
    let client = Client::new(&global.socket());
    match command {
        TraceCommand::Record(args) => record(args, &client, output).await,
        TraceCommand::Use(args) => keep(args, &client, output).await,
        TraceCommand::Show(args) => {
            let trace: TraceFile = client.get(&prefetch_of(args.name.as_str())).await?;
            output.object(&trace)
        }
        TraceCommand::Drop(args) => {
            let _nothing: Option<Image> = client.delete(&prefetch_of(args.name.as_str())).await?;
            output.note(&format!("{}: no trace is kept with it", args.name));
            Ok(())
        }
    }
}

fn prefetch_of(name: &str) -> String {
    format!("/v1/images/{name}/prefetch")
}

async fn record(args: &TraceRecordArgs, client: &Client, output: &Output) -> Result<(), CliError> {
    let target = format!("/v1/images/{}/trace", args.name);
    // A place that cannot be written to is found before, not after.
    let part = args.output.as_deref().map(Part::of).transpose()?;
    let mut signals = Signals::new()?;
    let body = RecordTrace { for_s: args.lasts.map(|lasts| lasts.as_secs()) };
    let _begun: TraceFile = client.post(&target, &body).await?;
    let until = match args.lasts {
        Some(lasts) => format!("for {} s, or until Ctrl-C", lasts.as_secs()),
        None => "until Ctrl-C".to_owned(),
    };
    output.note(&format!("{}: recording what its readers ask for {until}", args.name));
    let ended = async {
        match args.lasts {
            Some(lasts) => tokio::time::sleep(lasts).await,
            None => std::future::pending().await,
        }
    };
    tokio::select! {
        () = ended => {}
        () = signals.next() => {}
    }
    let trace: Option<TraceFile> = client.delete(&target).await?;
    let trace = TraceFile { recording: false, ..trace.unwrap_or_default() };
    let bytes: u64 = trace.ranges.iter().map(|[_, len_bytes]| len_bytes).sum();
    let more = if trace.truncated { "; more was read than a trace may have" } else { "" };
    output.note(&format!("{} ranges, {}{more}", trace.ranges.len(), human_bytes(bytes)));
    let Some(part) = part else { return output.object(&trace) };
    let text = serde_json::to_string(&trace).map_err(|error| CliError::refused(&error))?;
    part.complete(&format!("{text}\n"))
}

/// A file beside its place, which it takes when it is complete; gone if it never is.
struct Part {
    file: File,
    path: PathBuf,
    place: PathBuf,
}

impl Part {
    fn of(place: &Path) -> Result<Self, CliError> {
        let mut path = place.as_os_str().to_owned();
        path.push(".part");
        let path = PathBuf::from(path);
        let file = File::create(&path).map_err(|error| unusable(&path, "write", &error))?;
        Ok(Self { file, path, place: place.to_owned() })
    }

    fn complete(mut self, text: &str) -> Result<(), CliError> {
        let written = self.file.write_all(text.as_bytes()).and_then(|()| self.file.sync_all());
        let placed = written.and_then(|()| std::fs::rename(&self.path, &self.place));
        placed.map_err(|error| unusable(&self.place, "write", &error))
    }
}

impl Drop for Part {
    fn drop(&mut self) {
        let _it_has_its_place = std::fs::remove_file(&self.path);
    }
}

fn unusable(path: &Path, what: &str, error: &std::io::Error) -> CliError {
    let is_missing = error.kind() == std::io::ErrorKind::NotFound;
    let exit = if is_missing { Exit::NotFound } else { Exit::Refused };
    CliError::new(exit, format!("{}: cannot {what}: {error}", path.display()), "")
}

async fn keep(args: &TraceUseArgs, client: &Client, output: &Output) -> Result<(), CliError> {
    let trace = read(&args.file, args.force)?;
    let image = put(client, &args.name, &trace).await?;
    if output.json {
        return output.object(&image);
    }
    output.line(&get::summary(&image))
}

/// Keeps a trace with an image.
pub(super) async fn put(
    client: &Client,
    name: &ImageName,
    trace: &TraceFile,
) -> Result<Image, CliError> {
    Ok(client.put(&prefetch_of(name.as_str()), trace).await?)
}

/// Reads a trace, whose digests count for nothing with `force`.
pub(super) fn read(path: &Path, force: bool) -> Result<TraceFile, CliError> {
    let mut bytes = Vec::new();
    let file = File::open(path).map_err(|error| unusable(path, "open", &error))?;
    let read = file.take(MAX_TRACE_BYTES as u64 + 1).read_to_end(&mut bytes);
    read.map_err(|error| unusable(path, "read", &error))?;
    let trace = Trace::parse(&bytes).map_err(|error| {
        CliError::new(Exit::Refused, format!("{}: {error}", path.display()), "")
    })?;
    let mut file = trace.to_file();
    if force {
        file.digests = crate::fetch::DigestMap::default();
    }
    Ok(file)
}
