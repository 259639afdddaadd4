//! `bedplate serve`: the daemon.
//!
//! Why: one process for a node, under any supervisor, in the foreground.
//! Never: makes a directory for a disk: an unmounted disk must not be mistaken for an empty one.

use super::args::{Global, ServeArgs};
use super::exit::{CliError, Exit};
use super::output::Output;
use super::signals::Signals;
use crate::daemon::{Config, Daemon, logging};
use crate::serve::activation::Inherited;

pub(super) async fn run(
    args: &ServeArgs,
    global: &Global,
    output: &Output,
) -> Result<(), CliError> {
    logging::init(output.log_filter("info"));
    let mut signals = Signals::new()?;
    let mut config = match &args.config {
        Some(path) => Config::read(path)
            .map_err(|e| CliError::new(Exit::Usage, crate::fetch::one_line(&e), ""))?,
        None => Config::with_disks(args.disk.clone()),
    };
    config.allow_loopback |= args.allow_loopback;
    config.nbd_socket = args.nbd.clone().or(config.nbd_socket);
    args.tcp.put_into(&mut config);
    config.control_socket = global.socket.clone().or(config.control_socket);
    make_absolute(&mut config).map_err(|e| CliError::refused(&e))?;
    let missing: Vec<_> = config.disks.iter().filter(|disk| !disk.is_dir()).collect();
    // One that is missing may be back later, if it is known.
    let known = match config.disks.first() {
        Some(first) if first.is_dir() && !missing.is_empty() => Daemon::known_disks(&config)?,
        Some(_) | None => Vec::new(),
    };
    for disk in missing {
        if known.iter().all(|(_, path)| path != disk) {
            let text = format!("{}: not a directory", disk.display());
            let hint = "make it, or mount what belongs there: a daemon makes no disk by itself";
            return Err(CliError::new(Exit::Refused, text, hint));
        }
    }
    let passed = Inherited::take().map_err(|e| CliError::refused(&e))?;
    let opening = config.clone();
    let node = tokio::task::spawn_blocking(move || Daemon::open_node(&opening));
    let node = node.await.map_err(|e| CliError::refused(&e))??;
    let daemon = Daemon::start_on(&config, node, passed).await?;
    output.note(&format!("control socket: {}", daemon.control_socket().display()));
    if let Some(address) = daemon.nbd_address() {
        output.note(&format!("NBD over TCP:   {address}"));
    }
    output.note(&format!("replica socket: {}", daemon.replica_socket().display()));
    output.note(&format!("NBD socket:     {}", daemon.nbd_socket().display()));
    signals.next().await;
    output.note("ending; what has arrived is kept");
    daemon.shutdown().await;
    Ok(())
}

/// What readers are told must not depend on the directory in which the daemon was started.
fn make_absolute(config: &mut Config) -> std::io::Result<()> {
    let sockets = [
        &mut config.control_socket,
        &mut config.nbd_socket,
        &mut config.replica_socket,
        &mut config.vm_sockets,
    ];
    for path in config.disks.iter_mut().chain(sockets.into_iter().flatten()) {
        *path = std::path::absolute(&*path)?;
    }
    Ok(())
}
