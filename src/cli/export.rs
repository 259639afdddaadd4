//! `bedplate export`: serves one file, as qemu-nbd is used.
//!
//! Why: the serving alone, to compare with its peers and to use without a daemon.
//! Never: brings anything in, or keeps a record.

use std::sync::Arc;

use serde_json::json;

use super::args::Global;
use super::args_tcp::TcpArgs;
use super::args_view::ExportArgs;
use super::cat;
use super::exit::{CliError, Exit};
use super::output::Output;
use super::run::usage;
use super::signals::Signals;
use crate::control::{nbd_tcp_uri, nbd_uri};
use crate::daemon::DaemonError;
use crate::names::ImageName;
use crate::serve::activation::{Inherited, Kind};
use crate::serve::{Exports, ServeError, Stopper, nbd, vhost_user};
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
    let Listening { stopper, uri, vm, run } = listen(args, exports, &name)?;
    let thread = std::thread::spawn(run);
    let (format, size) = (view.format(), view.size_bytes());
    let shown = if output.json {
        output.object(&json!({
            "name": name, "format": format.to_string(), "virtual_size_bytes": size, "uri": uri,
            "vhost_user": vm,
        }))
    } else {
        output.line(&format!("{name}  {format}  {} virtual", human_bytes(size))).and_then(|()| {
            let lines = uri.as_deref().map_or_else(Vec::new, |uri| usage(uri).to_vec());
            lines.iter().try_for_each(|line| output.line(line))?;
            vm.iter().try_for_each(|socket| output.line(&vm_usage(socket)))
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

/// A server that listens.
struct Listening {
    stopper: Stopper,
    /// Of an NBD server, unless its socket has no path.
    uri: Option<String>,
    /// The path of a VM's disk.
    vm: Option<String>,
    run: Box<dyn FnOnce() -> Result<(), ServeError> + Send>,
}

/// The server on the socket that was asked for, or that a service manager passed.
fn listen(args: &ExportArgs, exports: Arc<Exports>, name: &str) -> Result<Listening, CliError> {
    let absolute = |path| std::path::absolute(path).map_err(|e| CliError::refused(&e));
    if let Some(path) = &args.vhost_user {
        let socket = absolute(path)?;
        let limits = vhost_user::Limits::default();
        let server =
            vhost_user::Server::bind(&socket, exports, name, limits).map_err(DaemonError::from)?;
        let (stopper, vm) = (server.stopper(), Some(socket.display().to_string()));
        return Ok(Listening { stopper, uri: None, vm, run: Box::new(move || server.run()) });
    }
    let limits = nbd::Limits::default();
    let server = match (&args.nbd, args.tcp.tcp) {
        (Some(path), _) => nbd::Server::bind(&absolute(path)?, exports, limits),
        (None, Some(address)) => {
            nbd::Server::bind_tcp(address, security(&args.tcp)?, exports, limits)
        }
        (None, None) => match Inherited::take().and_then(Inherited::only) {
            Ok(Some((Kind::UnixStream, socket))) => nbd::Server::on_passed(socket, exports, limits),
            Ok(Some((Kind::Tcp, socket))) => {
                nbd::Server::on_passed_tcp(socket, security(&args.tcp)?, exports, limits)
            }
            Ok(Some((kind @ Kind::UnixPackets, _))) => {
                let (stream, tcp) = (Kind::UnixStream, Kind::Tcp);
                let what = format!("{kind} was passed; NBD is served on {stream} or {tcp}");
                Err(ServeError::Activation { what, source: None })
            }
            Ok(None) => {
                let hint = "give --nbd SOCKET, --tcp ADDRESS:PORT, or --vhost-user SOCKET";
                return Err(CliError::new(Exit::Usage, "no socket to serve on", hint));
            }
            Err(error) => Err(error),
        },
    };
    let server = server.map_err(DaemonError::from)?;
    let encrypted = args.tcp.tls_cert.is_some();
    let local = server.path().map(|socket| nbd_uri(name, socket));
    let uri = local.or_else(|| server.address().map(|at| nbd_tcp_uri(name, at, encrypted)));
    let stopper = server.stopper();
    Ok(Listening { stopper, uri, vm: None, run: Box::new(move || server.run()) })
}

/// How a server over TCP is to be secured.
fn security(args: &TcpArgs) -> Result<nbd::Security, CliError> {
    if let (Some(cert), Some(key)) = (args.tls_cert.clone(), args.tls_key.clone()) {
        let files = nbd::TlsFiles { cert, key, clients_ca: args.tls_clients_ca.clone() };
        let credentials = nbd::Credentials::load(files).map_err(|e| CliError::refused(&e))?;
        return Ok(nbd::Security::Tls(credentials));
    }
    if args.plain {
        return Ok(nbd::Security::Plain);
    }
    let hint = "give --tls-cert FILE and --tls-key FILE; or, to let anybody on the network read the \
                image in plain text, --plain";
    Err(CliError::new(Exit::Usage, "nothing is said of TLS", hint))
}

/// What QEMU is to be told.
fn vm_usage(socket: &str) -> String {
    format!(
        "qemu-system-x86_64 -object memory-backend-memfd,id=mem,size=1G,share=on -m 1G \\\n  \
         -machine q35,memory-backend=mem -chardev socket,id=disk,path={socket},reconnect=1 \\\n  \
         -device vhost-user-blk-pci,chardev=disk ..."
    )
}
