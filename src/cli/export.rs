//! `bedplate export`: serves one file, as qemu-nbd is used.
//!
//! Why: the serving alone, to compare with its peers and to use without a daemon.
//! Never: brings anything in, or keeps a record.

use std::sync::Arc;

use serde_json::json;

use super::args::Global;
use super::args_view::ExportArgs;
use super::cat;
use super::exit::{CliError, Exit};
use super::output::Output;
use super::run::usage;
use super::signals::Signals;
use crate::control::nbd_uri;
use crate::names::ImageName;
use crate::serve::{Exports, nbd};
use crate::units::human_bytes;

pub(super) fn run(args: &ExportArgs, _global: &Global, output: &Output) -> Result<(), CliError> {
    crate::daemon::logging::init(output.log_filter("warn"));
    let view = Arc::new(cat::open(&args.file, &args.view)?);
    let file = args.file.to_string_lossy();
    let suggested = ImageName::suggest(&file).map_or_else(|| "image".to_owned(), String::from);
    let name = args.name.as_ref().map_or(suggested, ToString::to_string);
    let exports = Arc::new(Exports::new());
    exports.add(&name, view.clone(), "").map_err(|e| CliError::refused(&e))?;
    exports.set_default(Some(&name)).map_err(|e| CliError::refused(&e))?;
    // Signals end the server from here on, and the socket is removed.
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|e| CliError::retry(&e))?;
    let mut signals = runtime.block_on(async { Signals::new() })?;
    let server = listen(args, exports)?;
    let (stopper, socket) = (server.stopper(), server.path().map(std::path::Path::to_owned));
    let thread = std::thread::spawn(move || server.run());
    let uri = socket.map(|socket| nbd_uri(&name, &socket));
    let (format, size) = (view.format(), view.size_bytes());
    let shown = if output.json {
        output.object(&json!({
            "name": name, "format": format.to_string(), "virtual_size_bytes": size, "uri": uri,
        }))
    } else {
        output.line(&format!("{name}  {format}  {} virtual", human_bytes(size))).and_then(|()| {
            let lines = uri.as_deref().map_or_else(Vec::new, |uri| usage(uri).to_vec());
            lines.iter().try_for_each(|line| output.line(line))
        })
    };
    if shown.is_ok() {
        output.note("serving until Ctrl-C");
        runtime.block_on(signals.next());
    }
    stopper.stop();
    match thread.join() {
        Ok(result) => result.map_err(|e| CliError::retry(&e)).and(shown),
        Err(panic) => std::panic::resume_unwind(panic),
    }
}

/// The server on the socket that was asked for, or that a service manager passed.
fn listen(args: &ExportArgs, exports: Arc<Exports>) -> Result<nbd::Server, CliError> {
    let limits = nbd::Limits::default();
    if let Some(path) = &args.nbd {
        let socket = std::path::absolute(path).map_err(|e| CliError::refused(&e))?;
        return nbd::Server::bind(&socket, exports, limits).map_err(|e| CliError::refused(&e));
    }
    let passed =
        nbd::Server::from_activation(exports, limits).map_err(|e| CliError::refused(&e))?;
    passed.ok_or_else(|| CliError::new(Exit::Usage, "no socket to serve on", "give --nbd SOCKET"))
}
