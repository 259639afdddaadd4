//! Serves image files over NBD: `nbd_serve SOCKET NAME=FILE...`; the first is the default export.
//!
//! Why: to measure the server, and to try it, without a daemon around it.
//! Start at `main`.

use std::path::Path;
use std::sync::Arc;

use bedplate::disk::Sealed;
use bedplate::image::View;
use bedplate::serve::Exports;
use bedplate::serve::nbd::{Limits, Server};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let socket = arguments.next().ok_or("usage: nbd_serve SOCKET NAME=FILE...")?;
    let exports = Arc::new(Exports::new());
    for argument in arguments {
        let (name, file) = argument.split_once('=').ok_or("give NAME=FILE")?;
        let view = View::open(Sealed::open_path(Path::new(file))?, None)?;
        exports.add(name, Arc::new(view), file)?;
        if exports.list().len() == 1 {
            exports.set_default(Some(name))?;
        }
    }
    Ok(Server::bind(Path::new(&socket), exports, Limits::default())?.run()?)
}
