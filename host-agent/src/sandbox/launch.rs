//! The monitor for a machine: a shell, or a new process.

use std::fs::File;

use super::actor::Actor;
use super::error::StartError;
use super::machine::Machine;
use super::shells::Shape;
use crate::id::SnapshotId;
use crate::record::Transition;
use crate::store::{Change, CommitError};
use crate::time::Stopwatch;

/// What the machine is to be made with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Wanted {
    Shell,
    New,
}

#[derive(Debug)]
pub(super) struct Launched {
    pub(super) pagemap: Option<File>,
    pub(super) is_shell: bool,
    /// Whose memory it has mapped.
    pub(super) first_layer: Option<SnapshotId>,
}

// === impl Actor ===

impl Actor {
    /// Comes by a monitor and notes it in `self`. That is to be stored next.
    pub(super) fn launch(
        &mut self,
        wanted: Wanted,
        watch: &mut Stopwatch,
    ) -> Result<Launched, StartError> {
        let shape = Shape::from(self.record.resources);
        let shell = match wanted {
            Wanted::Shell => self.pool.shells.take(shape),
            Wanted::New => None,
        };
        let launched = match shell {
            Some(shell) => {
                self.machine = Some(shell.machine);
                if let Err(source) = self.files.take_log(&shell.log) {
                    // The machine goes with the sandbox; its log is left here.
                    let _ = std::fs::remove_file(&shell.log);
                    let what = "log";
                    return Err(StartError::Prepare { what, source });
                }
                watch.lap("shell");
                Launched {
                    pagemap: shell.pagemap,
                    is_shell: true,
                    first_layer: shell.first_layer,
                }
            }
            None => {
                let pagemap = self.spawn()?;
                watch.lap("spawn");
                Launched {
                    pagemap,
                    is_shell: false,
                    first_layer: None,
                }
            }
        };
        if let Some(machine) = &self.machine {
            let spawned = Transition::Spawned(machine.process.identity());
            self.record = self.record.apply(spawned)?;
        }
        Ok(launched)
    }

    /// No await between the start and the note of it in `self`.
    fn spawn(&mut self) -> Result<Option<File>, StartError> {
        let log = self
            .files
            .open_log()
            .map_err(|source| StartError::Prepare {
                what: "log",
                source,
            })?;
        let (process, socket) =
            crate::monitor::spawn(&self.pool.monitor_binary, log).map_err(|error| {
                StartError::Spawn {
                    error,
                    log_line: self.files.last_log_line(),
                }
            })?;
        let pagemap = process.pagemap();
        self.machine = Some(Machine::new(process, socket));
        if let Err(error) = &pagemap {
            tracing::warn!(sandbox = %self.record.id, %error, "there will be no snapshots of it: its monitor's pagemap cannot be opened");
        }
        Ok(pagemap.ok())
    }

    /// Begins to store the record as it is; what is returned is ready when it is
    /// durable.
    pub(super) fn note(&mut self) -> impl Future<Output = Result<(), CommitError>> + use<> {
        let mut changes = std::mem::take(&mut self.unstored);
        let stored = self.is_listed.then(|| {
            changes.push(Change::PutSandbox(self.record.clone()));
            self.pool.store.commit(changes)
        });
        async move {
            match stored {
                Some(stored) => stored.await,
                None => Ok(()),
            }
        }
    }
}
