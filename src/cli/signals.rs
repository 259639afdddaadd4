//! SIGINT and SIGTERM, as one thing to wait for.
//!
//! Why: Ctrl-C and a supervisor's stop mean the same: keep what is durable, end in order.
//! Never: ends the process by itself.

use tokio::signal::unix::{Signal, SignalKind, signal};

use super::exit::CliError;

/// The signals that ask the program to end. From its making on they don't kill the process.
pub(super) struct Signals {
    interrupt: Signal,
    terminate: Signal,
}

impl Signals {
    pub(super) fn new() -> Result<Self, CliError> {
        let catch = |kind| signal(kind).map_err(|e| CliError::refused(&e));
        Ok(Self {
            interrupt: catch(SignalKind::interrupt())?,
            terminate: catch(SignalKind::terminate())?,
        })
    }

    /// Resolves with the next signal. Cancel-safe.
    pub(super) async fn next(&mut self) {
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
        }
    }
}
