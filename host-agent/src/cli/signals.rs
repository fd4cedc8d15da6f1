//! Signals that belong to the program in the sandbox.

use tokio::signal::unix::{Signal, SignalKind, signal};

use super::error::CliError;

pub(super) struct Signals {
    interrupt: Signal,
    terminate: Signal,
    hangup: Signal,
}

pub(super) const SIGINT: u32 = 2;

// === impl Signals ===

impl Signals {
    pub(super) fn install() -> Result<Self, CliError> {
        let install = |kind| signal(kind).map_err(|source| CliError::Runtime { source });
        Ok(Self {
            interrupt: install(SignalKind::interrupt())?,
            terminate: install(SignalKind::terminate())?,
            hangup: install(SignalKind::hangup())?,
        })
    }

    /// The number of the next one.
    pub(super) async fn next(&mut self) -> u32 {
        tokio::select! {
            _ = self.interrupt.recv() => SIGINT,
            _ = self.terminate.recv() => 15,
            _ = self.hangup.recv() => 1,
        }
    }
}
