//! Log lines: to stderr, filtered by `RUST_LOG`.
//!
//! Why: stdout is for results.
//! Never: writes to stdout.
//! Start at [`init`].

use std::io::IsTerminal;

use tracing_subscriber::EnvFilter;

/// Sets up logging for the process, once; later calls change nothing. `RUST_LOG` wins over
/// `default` ("warn", "info,bedplate=debug").
pub fn init(default: &str) {
    // What this library logs as an error is in the error that we tell.
    let default = format!("{default},rustls_platform_verifier=off");
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(default));
    let colour = std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none();
    let _set_already = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(colour)
        .try_init();
}
