//! `bedplate create`: makes an image known; brings it in only if asked.
//!
//! Why: knowing an image costs nothing; bytes move only when somebody says so.
//! Never: sends a URL anywhere but to the control socket.

use super::args::{CreateArgs, Global};
use super::exit::{CliError, Exit};
use super::follow::{self, OnFailure};
use super::get;
use super::output::Output;
use super::{disks, source, trace};
use crate::control::client::Client;
use crate::control::types::{CreateImage, FetchImage, Image};
use crate::fetch::SourceUrl;
use crate::image::Format;
use crate::import::Layout;
use crate::names::ImageName;

pub(super) async fn run(
    args: &CreateArgs,
    global: &Global,
    output: &Output,
) -> Result<(), CliError> {
    let client = Client::new(&global.socket());
    let file = args.trace.as_deref();
    let prefetch = file.map(|file| trace::read(file, args.force_trace)).transpose()?;
    let mut request = match (&args.clone, &args.from_nbd) {
        (Some(image), _) => clone(&args.source, image, &args.expected)?,
        (None, Some(uri)) => {
            let (name, url) = (new_name(&args.source)?, source::parse(uri)?);
            if !url.is_nbd() {
                let text = "--from-nbd: no URI of NBD";
                let hint = "give nbd://HOST[:PORT]/EXPORT or nbd+unix:///EXPORT?socket=PATH";
                return Err(CliError::new(Exit::Usage, text, hint));
            }
            request(&url, Some(name.to_string()), &args.expected, args.format, args.layout)?
        }
        (None, None) => {
            let url = source::parse(&args.source)?;
            let name = args.name.as_ref().map(ToString::to_string);
            request(&url, name, &args.expected, args.format, args.layout)?
        }
    };
    request.mirrors.clone_from(&args.mirror);
    request.access = args.access.by_value()?;
    args.stands.put_into(&mut request);
    // Before the image is made: nothing is left behind by a disk that is not there.
    let disk = disks::uuid(&client, args.disk.as_ref()).await?;
    let mut image: Image = client.post("/v1/images", &request).await?;
    if let Some(prefetch) = prefetch {
        let name = ImageName::parse(&image.name).map_err(|error| CliError::refused(&error))?;
        image = trace::put(&client, &name, &prefetch).await?;
    }
    if args.fetch || args.wait || disk.is_some() {
        let target = format!("/v1/images/{}/fetch", image.name);
        image = client.post(&target, &FetchImage { disk: disk.clone() }).await?;
    }
    if args.wait {
        let disk = disk.as_deref();
        image = follow::until_ready(&client, &image.name, disk, OnFailure::Wait, output).await?;
    }
    if output.json {
        return output.object(&image);
    }
    output.line(&get::summary(&image))
}

/// What stands where else the source does.
fn new_name(text: &str) -> Result<ImageName, CliError> {
    ImageName::parse(text).map_err(|e| {
        let hint = "with --clone or --from-nbd, give the name of the new image first";
        CliError::new(Exit::Usage, e.to_string(), hint)
    })
}

/// The body of `POST /v1/images` for a clone.
fn clone(
    name: &str,
    image: &ImageName,
    expected: &super::args_digest::DigestArgs,
) -> Result<CreateImage, CliError> {
    let mut request = CreateImage::clone_of(image.as_str());
    request.name = Some(new_name(name)?.to_string());
    expected.put_into(&mut request)?;
    Ok(request)
}

/// The body of `POST /v1/images`.
pub(super) fn request(
    url: &SourceUrl,
    name: Option<String>,
    expected: &super::args_digest::DigestArgs,
    format: Option<super::args::FormatArg>,
    layout: Layout,
) -> Result<CreateImage, CliError> {
    let mut request = CreateImage::of_url(url.expose().as_str());
    request.name = name;
    request.format = format.map(|f| Format::from(f).to_string());
    request.layout = (layout != Layout::default()).then(|| layout.to_string());
    expected.put_into(&mut request)?;
    Ok(request)
}
