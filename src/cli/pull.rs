//! `bedplate pull`: the transfer alone, as curl is used.
//!
//! Why: half of the engine is useful without the other, and easy to compare with its peers.
//! Never: leaves an unchecked file under the name that was asked for.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::json;

use super::args::PullArgs;
use super::exit::{CliError, Exit};
use super::output::Output;
use super::progress::{Meter, Moment};
use super::signals::Signals;
use super::source;
use crate::fetch::{
    Class, DigestKind, Engine, Phase, Policy, Progress, Snapshot, Source, SourceError,
};
use crate::import::{ImportError, PullRequest, Pulled, pull};
use crate::ring;
use crate::units::human_bytes;

/// Buffers of 1 MiB: the transfer's memory at most, when several connections are of use.
const BUFFERS: usize = 64;
/// How often the numbers are drawn.
const TICK: Duration = Duration::from_millis(200);

pub(super) async fn run(args: &PullArgs, output: &Output) -> Result<(), CliError> {
    crate::daemon::logging::init(output.log_filter("error"));
    let url = source::parse(&args.source)?;
    let dir = directory(&args.output)?;
    let probe = ring::probe(dir, ring::Choice::Auto)
        .map_err(|reason| CliError::new(Exit::Refused, reason, ""))?;
    let engine = Engine::alone(probe, Policy::default(), BUFFERS);
    let mut source = Source::new(url)
        .expecting(args.expected.digests()?.into())
        .listed_in(args.expected.checksum_url()?);
    (source.digest, source.unpack) = (!args.no_digest, args.unpack);
    for text in &args.mirror {
        let mirror = super::source::url(text)?;
        let usage = |e: SourceError| CliError::new(Exit::Usage, e.to_string(), "");
        source.url.check_mirror(&mirror).map_err(usage)?;
        source.mirrors.push(mirror);
    }
    let source = source.reached_with(args.access.by_reference()?);
    let request = PullRequest { source, layout: args.layout, output: args.output.clone() };
    let started = Instant::now();
    let progress = Arc::new(Progress::default());
    progress.limit().set(args.rate);
    let pulled = watch(engine, request, progress, output).await?;
    show(args, &pulled, started.elapsed(), output)
}

/// Where the output is to be: a directory that is there.
fn directory(output: &Path) -> Result<&Path, CliError> {
    if output == Path::new("-") {
        let text = "-: the output is a file, which is checked whole before it has its name";
        return Err(CliError::new(Exit::Usage, text, "give a file; one of that name is `-o ./-`"));
    }
    let parent = output.parent().filter(|parent| !parent.as_os_str().is_empty());
    let dir = parent.unwrap_or(Path::new("."));
    match std::fs::metadata(dir) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            let text = format!("{}: no such directory", dir.display());
            Err(CliError::new(Exit::NotFound, text, "make it, or give another place with -o"))
        }
        Ok(_) | Err(_) => Ok(dir),
    }
}

/// Pulls, and draws how it goes; a signal ends it so that it can be resumed.
async fn watch(
    engine: Engine,
    request: PullRequest,
    progress: Arc<Progress>,
    output: &Output,
) -> Result<Pulled, CliError> {
    let mut signals = Signals::new()?;
    let name = request.output.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let mut meter = Meter::new(output, &name);
    let mut speed = Speed::default();
    // A task of its own runs where its socket wakes up, without a hop to this thread.
    let watched = Arc::clone(&progress);
    let mut pulling = tokio::spawn(async move { pull(&engine, &request, &watched).await });
    let mut tick = tokio::time::interval(TICK);
    let result = loop {
        tokio::select! {
            result = &mut pulling => break result,
            () = signals.next() => progress.stop(),
            _ = tick.tick() => meter.show(&speed.moment(&progress.snapshot())),
        }
    };
    meter.finish();
    match result {
        Ok(pulled) => pulled.map_err(|e| failure(&e)),
        Err(panic) => std::panic::resume_unwind(panic.into_panic()),
    }
}

fn failure(error: &ImportError) -> CliError {
    match error.class() {
        Class::Refuse => CliError::refused(error),
        Class::Retry => CliError::retry(error),
        Class::Cancelled => {
            let hint = "run the same command again: what has arrived is not fetched again";
            CliError::new(Exit::Interrupted, "interrupted", hint)
        }
    }
}

fn show(args: &PullArgs, pulled: &Pulled, took: Duration, output: &Output) -> Result<(), CliError> {
    let bytes = pulled.sealed.len_bytes();
    if output.json {
        let mut object = json!({
            "output": args.output.display().to_string(),
            "size_bytes": bytes,
            "received_bytes": pulled.received_bytes,
            "seconds": took.as_secs_f64(),
        });
        for kind in DigestKind::ALL {
            object[kind.key()] = pulled.digests.whole.get(kind).into();
        }
        return output.object(&object);
    }
    let mut parts = vec![args.output.display().to_string(), human_bytes(bytes)];
    parts.push(format!("{:.1} s", took.as_secs_f64()));
    parts.extend(pulled.digests.whole.iter().map(|(kind, d)| format!("{}:{d}", kind.key())));
    output.line(&parts.join("  "))
}

/// The rate of the last seconds, from snapshots.
#[derive(Default)]
struct Speed {
    marks: std::collections::VecDeque<(Instant, u64)>,
}

impl Speed {
    fn moment(&mut self, now: &Snapshot) -> Moment {
        self.marks.push_back((Instant::now(), now.bytes_received));
        while self.marks.len() > 15 {
            self.marks.pop_front();
        }
        let rate = match (self.marks.front(), self.marks.back()) {
            (Some((then, from)), Some((at, to))) => {
                let ms = u64::try_from(at.duration_since(*then).as_millis()).unwrap_or(u64::MAX);
                to.saturating_sub(*from).saturating_mul(1000).checked_div(ms).unwrap_or(0)
            }
            (None, _) | (_, None) => 0,
        };
        let left = now.bytes_total.map(|total| total.saturating_sub(now.bytes_done));
        let mut message = now.message.clone();
        if now.retries > 0 {
            message = format!("try {}: {message}", now.retries + 1);
        }
        Moment {
            connections: now.connections,
            phase: match now.phase {
                Phase::Connecting => "connecting",
                Phase::Fetching => "fetching",
                Phase::Verifying => "verifying",
                Phase::Retrying => "retrying",
            }
            .to_owned(),
            bytes_done: now.bytes_done,
            bytes_total: now.bytes_total,
            rate_bytes_per_s: rate,
            eta_s: left.and_then(|left| left.checked_div(rate)),
            message,
        }
    }
}
