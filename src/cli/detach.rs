//! `bedplate detach`: reads an image no more.
//!
//! Why: a reader knows its own label better than the id that it was given.
//! Never: detaches by guess: without a label it takes only an id.

use super::args::Global;
use super::args_attach::DetachArgs;
use super::exit::{CliError, Exit};
use super::output::Output;
use crate::control::client::Client;
use crate::control::types::Attachments;
use crate::manager::AttachmentId;

pub(super) async fn run(
    args: &DetachArgs,
    global: &Global,
    output: &Output,
) -> Result<(), CliError> {
    let client = Client::new(&global.socket());
    let id = match &args.reader {
        Some(reader) => find(&client, &args.id, reader).await?,
        None => AttachmentId::parse(&args.id)
            .map_err(|e| {
                CliError::new(Exit::Usage, e.to_string(), "or name the image and give --reader")
            })?
            .to_string(),
    };
    let _nothing: Option<serde_json::Value> =
        client.delete(&format!("/v1/attachments/{id}")).await?;
    output.note(&format!("{id} detached"));
    Ok(())
}

/// The id of the attachment of `image` with this label.
async fn find(client: &Client, image: &str, reader: &str) -> Result<String, CliError> {
    let all: Attachments = client.get("/v1/attachments").await?;
    let mut held = all.attachments.into_iter().filter(|a| a.image == image && a.reader == reader);
    match (held.next(), held.next()) {
        (Some(held), None) => Ok(held.id),
        (Some(one), Some(other)) => {
            let text = format!("image {image}: reader {reader:?} has {} and {}", one.id, other.id);
            Err(CliError::new(Exit::Usage, text, "detach each by its id"))
        }
        (None, _) => {
            let text = format!("image {image}: no reader {reader:?}");
            let hint = format!("`bedplate get {image}` shows its readers");
            Err(CliError::new(Exit::NotFound, text, hint))
        }
    }
}
