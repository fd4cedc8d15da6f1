//! Signals that belong to the program in the sandbox.

use tokio::signal::unix::{Signal, SignalKind, signal};

use super::error::CliError;

pub(super) struct Signals {
    interrupt: Signal,
    terminate: Signal,
    hangup: Signal,
    /// Of a program that has a terminal: quit, and the terminal's new size.
    terminal: Option<(Signal, Signal)>,
}

pub(super) const SIGINT: u32 = 2;
pub(super) const SIGWINCH: u32 = 28;
const SIGHUP: u32 = 1;
const SIGQUIT: u32 = 3;
const SIGTERM: u32 = 15;

// === impl Signals ===

impl Signals {
    pub(super) fn install() -> Result<Self, CliError> {
        Ok(Self {
            interrupt: install(SignalKind::interrupt())?,
            terminate: install(SignalKind::terminate())?,
            hangup: install(SignalKind::hangup())?,
            terminal: None,
        })
    }

    /// From now on also those that would leave a terminal as it is, or change it.
    pub(super) fn watch_terminal(&mut self) -> Result<(), CliError> {
        let quit = install(SignalKind::quit())?;
        self.terminal = Some((quit, install(SignalKind::window_change())?));
        Ok(())
    }

    /// The number of the next one.
    pub(super) async fn next(&mut self) -> u32 {
        let terminal = async {
            match &mut self.terminal {
                Some((quit, window)) => tokio::select! {
                    _ = quit.recv() => SIGQUIT,
                    _ = window.recv() => SIGWINCH,
                },
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            _ = self.interrupt.recv() => SIGINT,
            _ = self.terminate.recv() => SIGTERM,
            _ = self.hangup.recv() => SIGHUP,
            signal = terminal => signal,
        }
    }
}

fn install(kind: SignalKind) -> Result<Signal, CliError> {
    signal(kind).map_err(|source| CliError::Runtime { source })
}
