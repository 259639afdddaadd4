//! `bedplate attach`: reads an image; waits until it can be read.
//!
//! Why: a reader wants a URI that works when it is printed, not a promise.
//! Never: leaves without saying how to detach.

use super::args::Global;
use super::args_attach::AttachArgs;
use super::disks;
use super::exit::CliError;
use super::follow::{self, OnFailure};
use super::output::Output;
use crate::control::client::Client;
use crate::control::types::{Attachment, CreateAttachment, Wait};

pub(super) async fn run(
    args: &AttachArgs,
    global: &Global,
    output: &Output,
) -> Result<(), CliError> {
    let client = Client::new(&global.socket());
    let body = CreateAttachment {
        image: args.name.to_string(),
        disk: disks::uuid(&client, args.disk.as_ref()).await?,
        reader: args.reader.clone(),
        wait: if args.stream { Wait::Stream } else { Wait::Ready },
        vm: args.vm,
    };
    let mut held: Attachment = client.post("/v1/attachments", &body).await?;
    if !args.no_wait {
        // Before the wait: it is held as well if that fails or is interrupted.
        output.note(&format!("attached as {}; detach with `bedplate detach {0}`", held.id));
        let disk = Some(held.disk.as_str());
        if args.stream {
            follow::until_readable(&client, &held).await?;
        } else {
            follow::until_ready(&client, args.name.as_str(), disk, OnFailure::Wait, output).await?;
        }
        held = client.get(&format!("/v1/attachments/{}", held.id)).await?;
    }
    if output.json {
        return output.object(&held);
    }
    let place = match &held.vm {
        Some(vm) => Some(&vm.socket),
        None => held.nbd.as_ref().map(|nbd| &nbd.uri),
    };
    match place {
        Some(place) if !args.no_wait => output.line(place),
        Some(_) | None => output.line(&held.id),
    }
}
