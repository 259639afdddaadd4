//! `bedplate upload`: brings a file of this host in through the control socket.
//!
//! Why: the file may be where no URL leads, and the way to the daemon may break.
//! How: asks where the upload goes on, sends from there, and asks again after any fault, as long
//! as something arrives now and then.
//! Never: holds more of the file than a few chunks.
//! Start at [`run`].

use std::fs::File;
use std::io::{Error, ErrorKind, Read, Seek, SeekFrom};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio::sync::mpsc;

use super::args::Global;
use super::args_upload::UploadArgs;
use super::disks;
use super::exit::{CliError, Exit};
use super::follow::{self, OnFailure};
use super::get;
use super::output::Output;
use super::progress::{Meter, Moment};
use crate::control::client::{Client, ClientError};
use crate::control::types::{Copy, CreateImage, Digests, FetchImage, Image, Uploaded};
use crate::disk::{DigestSet, Hasher, hash_file};
use crate::fetch::{DigestKind, DigestMap, one_line};
use crate::image::Format;
use crate::names::ImageName;
use crate::units::human_bytes;

/// Faults in a row, without a new byte, until it gives up: about two minutes.
const MOST_FAULTS: u32 = 30;
/// How often the daemon may go away once it has everything.
const MOST_ENDS: u32 = 5;
/// Longest rest after a fault.
const MOST_REST: Duration = Duration::from_secs(5);
/// Bytes that are read of the file at once.
const CHUNK: usize = 256 << 10;
/// Chunks that wait to be sent.
const CHUNKS: usize = 4;
/// How often the numbers are shown.
const TICK: Duration = Duration::from_millis(200);

/// One upload under way.
struct Sending<'a> {
    client: Client,
    image: String,
    disk: Option<&'a str>,
    file: File,
    path: &'a Path,
    len: u64,
    /// A digest was given.
    is_proved: bool,
}

pub(super) async fn run(
    args: &UploadArgs,
    global: &Global,
    output: &Output,
) -> Result<(), CliError> {
    let client = Client::new(&global.socket());
    let (file, len) = open(&args.file)?;
    let mut request = CreateImage::of_upload(len);
    request.name = Some(name_of(args)?.to_string());
    request.format = args.format.map(|f| Format::from(f).to_string());
    args.expected.put_into(&mut request)?;
    if args.expected.digests()?.is_empty() && !args.no_digest {
        output.note("reading the file for its digest, which proves an upload that goes on later");
        request.sha256 = Digests::from(&sha256_of(&file, &args.file, len).await?).sha256;
    }
    args.stands.put_into(&mut request);
    let disk = disks::uuid(&client, args.disk.as_ref()).await?;
    let image: Image = client.post("/v1/images", &request).await?;
    let disk = disk.as_deref();
    let target = format!("/v1/images/{}/fetch", image.name);
    let _wanted: Image =
        client.post(&target, &FetchImage { disk: disk.map(str::to_owned) }).await?;
    let is_proved =
        request.sha256.is_some() || request.sha512.is_some() || request.blake3.is_some();
    let path = args.file.as_path();
    let sending = Sending { client, image: image.name, disk, file, path, len, is_proved };
    let image = sending.until_ready(output).await?;
    if output.json {
        return output.object(&image);
    }
    output.line(&get::summary(&image))
}

fn failed(path: &Path, op: &str, error: &std::io::Error) -> CliError {
    let missing = error.kind() == std::io::ErrorKind::NotFound;
    let exit = if missing { Exit::NotFound } else { Exit::Refused };
    CliError::new(exit, format!("{}: cannot {op}: {error}", path.display()), "")
}

fn open(path: &Path) -> Result<(File, u64), CliError> {
    let file = File::open(path).map_err(|e| failed(path, "open", &e))?;
    let meta = file.metadata().map_err(|e| failed(path, "look at", &e))?;
    if !meta.is_file() || meta.len() == 0 {
        let text = format!("{}: not a file with bytes in it", path.display());
        return Err(CliError::new(Exit::Usage, text, "give an image file"));
    }
    Ok((file, meta.len()))
}

/// The file's SHA-256: another file of the same length must not end an upload that this one began.
async fn sha256_of(file: &File, path: &Path, len: u64) -> Result<DigestMap, CliError> {
    let file = file.try_clone().map_err(|e| failed(path, "read", &e))?;
    let path = path.to_owned();
    let hashing = tokio::task::spawn_blocking(move || {
        let mut hasher = Hasher::new(DigestSet::of(&[DigestKind::Sha256]));
        hash_file(&file, &path, len, &mut hasher, &mut |_| true).map(|()| hasher.finish().whole)
    });
    let hashed = hashing.await.map_err(|e| CliError::refused(&e))?;
    hashed.map_err(|e| CliError::refused(&e))
}

fn name_of(args: &UploadArgs) -> Result<ImageName, CliError> {
    let suggested = || ImageName::suggest(&args.file.to_string_lossy());
    args.name.clone().or_else(suggested).ok_or_else(|| {
        let text = format!("{}: its name gives no image name", args.file.display());
        CliError::new(Exit::Usage, text, "give --name")
    })
}

impl Sending<'_> {
    /// Sends and waits. A daemon that restarts while it verifies may have forgotten the end.
    async fn until_ready(&self, output: &Output) -> Result<Image, CliError> {
        let (client, name, mut tries) = (&self.client, self.image.as_str(), 0);
        loop {
            self.send_all(output).await?;
            match follow::until_ready(client, name, self.disk, OnFailure::Wait, output).await {
                Err(error) if error.exit == Exit::Retry && tries < MOST_ENDS => tries += 1,
                other => return other,
            }
        }
    }

    /// Sends until the daemon has everything.
    async fn send_all(&self, output: &Output) -> Result<(), CliError> {
        let mut meter = Meter::new(output, &self.image);
        let (mut best, mut faults) = (None, 0_u32);
        loop {
            let fault = match self.client.upload_offset(&self.image, self.disk).await {
                Ok(now) if now.offset >= now.length => return Ok(()),
                Ok(now) => {
                    if best.is_none() && now.offset > 0 && !self.is_proved {
                        let at = human_bytes(now.offset);
                        output.note(&format!(
                            "going on after {at}; nothing proves that the file is still the same"
                        ));
                    }
                    if best.is_none_or(|best| now.offset > best) {
                        (best, faults) = (Some(now.offset), 0);
                    }
                    match self.send_from(now, &mut meter).await? {
                        Ok(_) => continue,
                        Err(error) => error,
                    }
                }
                Err(error) => error,
            };
            self.judge(&fault).await?;
            faults += 1;
            if faults > MOST_FAULTS {
                return Err(fault.into());
            }
            tracing::info!(error = %one_line(&fault), "asking again where the upload goes on");
            let rest = Duration::from_millis(50).saturating_mul(1 << faults.min(10));
            tokio::time::sleep(rest.min(MOST_REST)).await;
        }
    }

    /// An error if trying again cannot help.
    async fn judge(&self, fault: &ClientError) -> Result<(), CliError> {
        let ClientError::Refused { problem, .. } = fault else { return Ok(()) };
        match problem.code.as_str() {
            "not-waiting" | "stopped" => {}
            "busy" | "wrong-offset" | "timeout" | "shutting-down" | "bad-request" => return Ok(()),
            code => {
                let error = CliError::new(Exit::Refused, problem.message.clone(), &*problem.hint);
                let exit = if code == "not-found" { Exit::NotFound } else { Exit::Refused };
                return Err(CliError { exit, ..error });
            }
        }
        // The upload is over, or its worker rests; the image knows.
        let asked = self.client.get(&format!("/v1/images/{}", self.image)).await;
        let Ok(image): Result<Image, _> = asked else { return Ok(()) };
        let ours = |copy: &&Copy| self.disk.is_none_or(|disk| disk == copy.disk);
        match image.copies.iter().filter(ours).find(|copy| copy.refused) {
            Some(copy) => Err(CliError::new(Exit::Refused, copy.message.clone(), "")),
            None => Ok(()),
        }
    }

    /// Sends the rest of the file in one request, and shows how it goes.
    async fn send_from(
        &self,
        now: Uploaded,
        meter: &mut Meter<'_>,
    ) -> Result<Result<Uploaded, ClientError>, CliError> {
        let (tx, rx) = mpsc::channel(CHUNKS);
        let file = self.file.try_clone().map_err(|e| failed(self.path, "open", &e))?;
        let (at, left) = (now.offset, self.len - now.offset);
        let sent = Arc::new(AtomicU64::new(0));
        let counter = Arc::clone(&sent);
        let reading = tokio::task::spawn_blocking(move || read(file, at, left, &tx, &counter));
        let sending = self.client.upload(&self.image, self.disk, at, left, rx);
        tokio::pin!(sending);
        let (begun, mut tick) = (Instant::now(), tokio::time::interval(TICK));
        let result = loop {
            tokio::select! {
                result = &mut sending => break result,
                _ = tick.tick() => {
                    meter.show(&self.moment(at, sent.load(Ordering::Relaxed), begun));
                }
            }
        };
        if result.is_ok() {
            let sent = sent.load(Ordering::Relaxed);
            meter.show(&self.moment(at, sent, begun));
        }
        match reading.await {
            // A file that cannot be read is no fault of the way.
            Ok(Err(error)) => Err(failed(self.path, "read", &error)),
            Ok(Ok(())) => Ok(result),
            Err(died) => std::panic::resume_unwind(died.into_panic()),
        }
    }

    fn moment(&self, at: u64, sent: u64, begun: Instant) -> Moment {
        let millis = u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX);
        let rate = sent.saturating_mul(1000).checked_div(millis).unwrap_or(0);
        let left = self.len.saturating_sub(at + sent);
        Moment {
            phase: "uploading".to_owned(),
            bytes_done: at + sent,
            bytes_total: Some(self.len),
            rate_bytes_per_s: rate,
            eta_s: left.checked_div(rate),
            ..Moment::default()
        }
    }
}

/// Reads `left` bytes from `at` on into `tx`, until nobody takes them any more.
fn read(
    mut file: File,
    at: u64,
    mut left: u64,
    tx: &mpsc::Sender<Bytes>,
    sent: &AtomicU64,
) -> std::io::Result<()> {
    file.seek(SeekFrom::Start(at))?;
    while left > 0 {
        let len = usize::try_from(left).unwrap_or(CHUNK).min(CHUNK);
        let mut chunk = vec![0; len];
        file.read_exact(&mut chunk).map_err(|error| {
            let is_short = error.kind() == ErrorKind::UnexpectedEof;
            if is_short { Error::other("it became shorter while it was read") } else { error }
        })?;
        if tx.blocking_send(chunk.into()).is_err() {
            return Ok(());
        }
        left -= len as u64;
        sent.fetch_add(len as u64, Ordering::Relaxed);
    }
    Ok(())
}
