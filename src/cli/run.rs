//! `bedplate run`: one command brings an image in and serves it.
//!
//! Why: a stranger has a served image in a minute, with nothing to install or configure.
//! How: a daemon in this process with one disk; then this is a client of its control socket, like
//! anybody else. Other `bedplate` commands reach it meanwhile.
//! Never: uses the daemon in another way than its socket.

use std::path::PathBuf;
use std::sync::Arc;

use super::args::{Global, RunArgs, default_data_dir};
use super::exit::{CliError, Exit};
use super::follow::{self, OnFailure};
use super::output::Output;
use super::signals::Signals;
use super::{create, delete, get, source};
use crate::control::client::Client;
use crate::control::server::BindError;
use crate::control::types::{Attachment, CreateAttachment, Image};
use crate::daemon::{Config, Daemon, DaemonError, DaemonHandle, logging};
use crate::manager::Backend;
use crate::names::ImageName;

/// What this reader calls itself: a second run after a crash takes the same attachment.
const READER: &str = "bedplate-run";

pub(super) async fn run(args: RunArgs, global: &Global, output: &Output) -> Result<(), CliError> {
    logging::init(output.log_filter("error"));
    let url = source::parse(&args.source)?;
    let name = match &args.name {
        Some(name) => name.clone(),
        None => ImageName::suggest(&url.title()).ok_or_else(|| {
            CliError::new(Exit::Usage, "the source's last part gives no name", "give --name NAME")
        })?,
    };
    let mut signals = Signals::new()?;
    let config = config(&args, global, &name)?;
    let node = open_node(config.clone()).await?;
    let daemon = Daemon::start(&config, node).await.map_err(in_use)?;
    let client = Client::new(daemon.control_socket());
    let (expected, format) = (&args.expected, args.format);
    let mut request = create::request(&url, Some(name.to_string()), expected, format, args.layout)?;
    request.access = args.access.by_reference()?;
    args.stands.put_into(&mut request);
    let known: Result<Image, _> = client.post("/v1/images", &request).await;
    // An image that isn't ours (its name was taken) is left as it is.
    let ours = known.is_ok();
    let result = match known {
        Ok(_) => bring_in_and_serve(&client, &name, &mut signals, output).await,
        Err(error) => Err(error.into()),
    };
    end(daemon, &client, &name, ours && result.is_err()).await;
    result
}

/// Where a daemon is already, there is no need for another.
fn in_use(error: DaemonError) -> CliError {
    let is_taken = matches!(error, DaemonError::Control(BindError::InUse { .. }));
    let hint = "have that daemon bring it in: `bedplate create SOURCE`, `bedplate attach NAME`; or, for \
                one of its own, unset BEDPLATE_SOCKET or give another --socket";
    let error = CliError::from(error);
    if is_taken { CliError { hint: hint.to_owned(), ..error } } else { error }
}

fn config(args: &RunArgs, global: &Global, name: &ImageName) -> Result<Config, CliError> {
    let absolute = |path: PathBuf| std::path::absolute(path).map_err(|e| CliError::refused(&e));
    let data = absolute(args.data.clone().unwrap_or_else(default_data_dir))?;
    std::fs::create_dir_all(&data).map_err(|e| {
        let text = format!("{}: cannot make the directory: {e}", data.display());
        CliError::new(Exit::Refused, text, "give --data DIR")
    })?;
    Ok(Config {
        control_socket: global.socket.clone().map(absolute).transpose()?,
        nbd_socket: args.nbd.clone().map(absolute).transpose()?,
        default_export: Some(name.clone()),
        personal: true,
        ..Config::with_disks(vec![data])
    })
}

async fn open_node(config: Config) -> Result<Arc<dyn Backend>, CliError> {
    let opening = tokio::task::spawn_blocking(move || Daemon::open_node(&config));
    Ok(opening.await.map_err(|e| CliError::refused(&e))??)
}

async fn bring_in_and_serve(
    client: &Client,
    name: &ImageName,
    signals: &mut Signals,
    output: &Output,
) -> Result<(), CliError> {
    let body = CreateAttachment {
        image: name.to_string(),
        reader: Some(READER.to_owned()),
        ..CreateAttachment::default()
    };
    let held: Attachment = client.post("/v1/attachments", &body).await?;
    let disk = Some(held.disk.as_str());
    let waiting = follow::until_ready(client, name.as_str(), disk, OnFailure::GiveUp, output);
    let image = tokio::select! {
        image = waiting => image?,
        () = signals.next() => {
            let hint = "run the same command again: what has arrived is not fetched again";
            return Err(CliError::new(Exit::Interrupted, "interrupted", hint));
        }
    };
    show(&image, output)?;
    output.note("serving until Ctrl-C");
    signals.next().await;
    Ok(())
}

/// What the image is, and how to use it.
fn show(image: &Image, output: &Output) -> Result<(), CliError> {
    if output.json {
        return output.object(image);
    }
    output.line(&get::summary(image))?;
    let Some(nbd) = &image.nbd else { return Ok(()) };
    usage(&nbd.uri).iter().try_for_each(|line| output.line(line))
}

/// The commands that read an export, ready to be pasted.
pub(super) fn usage(uri: &str) -> [String; 5] {
    // A URI has no quote in it: they are escaped.
    let drive = uri.replace(',', ",,");
    [
        format!("uri      {uri}"),
        format!("inspect  nbdinfo '{uri}'"),
        format!("         qemu-img info '{uri}'"),
        format!("copy     qemu-img convert -p -O qcow2 '{uri}' copy.qcow2"),
        format!(
            "boot     qemu-system-x86_64 -m 1G -nographic \
             -drive 'file={drive},format=raw,if=virtio,snapshot=on'"
        ),
    ]
}

/// Lets the attachment go and ends the daemon. A crash before this leaves an attachment with our
/// label, which the next run takes over. An image of which nothing has arrived is forgotten: a
/// mistyped URL or digest must not keep its name, nor be tried again by a later run.
async fn end(daemon: DaemonHandle, client: &Client, name: &ImageName, failed: bool) {
    if let Ok(all) = client.get::<crate::control::types::Attachments>("/v1/attachments").await {
        let ours = |a: &&Attachment| a.reader == READER && a.image == name.as_str();
        for held in all.attachments.iter().filter(ours) {
            let target = format!("/v1/attachments/{}", held.id);
            if let Err(error) = client.delete::<serde_json::Value>(&target).await {
                tracing::warn!(%error, "the attachment stays");
            }
        }
    }
    if failed && let Err(error) = forget_if_empty(client, name.as_str()).await {
        tracing::warn!(%error, "the image stays known");
    }
    daemon.shutdown().await;
}

async fn forget_if_empty(client: &Client, name: &str) -> Result<(), CliError> {
    let target = format!("/v1/images/{name}");
    let image: Image = client.get(&target).await?;
    if image.copies.iter().all(|c| c.bytes_done == 0) && image.attachments == 0 {
        let _deleting: Option<Image> = client.delete(&target).await?;
        delete::until_gone(client, name).await?;
    }
    Ok(())
}
