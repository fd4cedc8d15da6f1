//! The task that owns one sandbox, from its admission to its last trace.
//!
//! Nobody else writes its record or touches its monitor, so its steps need no
//! locks. How it starts is in `start`, how it goes in `stop`.

use std::collections::VecDeque;
use std::sync::Arc;

use tokio::sync::{mpsc, oneshot};

use super::create::{Created, Origin};
use super::error::{CreateError, DeleteError, StartError, UseError};
use super::files::SandboxFiles;
use super::fork::Together;
use super::machine::{Machine, failure};
use super::network::Attached;
use super::operate::Operation;
use super::pool::Pool;
use super::registry::Live;
use super::requests::Claimed;
use super::save::Making;
use crate::admission::Reservation;
use crate::guest::Guest;
use crate::record::{Failure, Reply, SandboxRecord, State, Transition};
use crate::status::Refusal;
use crate::store::Change;
use crate::time::Stopwatch;

/// Commands that may wait for an actor that is busy; more wait to be queued.
pub(super) const MAX_COMMANDS: usize = 16;

#[derive(Debug)]
pub(super) enum Command {
    Delete(Delete),
    /// Record that it goes with an Exec call. Dropped unanswered when it is going
    /// already, or the daemon is.
    GoWithExec(oneshot::Sender<Result<(), UseError>>),
    /// Dropped unanswered when it is going already, or the daemon is.
    Operate(Operation),
}

/// The commands of one sandbox, in the order in which they came, but that deletes
/// overtake.
pub(super) struct Inbox {
    commands: mpsc::Receiver<Command>,
    overtaken: VecDeque<Command>,
}

#[derive(Debug)]
pub(super) struct Delete {
    /// Skip the guest's clean stop.
    pub(super) force: bool,
    pub(super) done: oneshot::Sender<Result<(), DeleteError>>,
}

pub(super) struct Actor {
    pub(super) pool: Arc<Pool>,
    pub(super) record: SandboxRecord,
    pub(super) files: SandboxFiles,
    /// Held while anything of the sandbox but its record exists.
    pub(super) reservation: Option<Reservation>,
    pub(super) machine: Option<Machine>,
    pub(super) guest: Option<Guest>,
    /// From before it has a machine until that is gone.
    pub(super) network: Option<Attached>,
    /// The snapshot that it is in the middle of.
    pub(super) making: Option<Making>,
    /// Why its machine was ended, when it was this daemon that did so.
    pub(super) verdict: Option<Failure>,
    /// What is to be stored with the record.
    pub(super) unstored: Vec<Change>,
    /// It has a record, and others see it.
    pub(super) is_listed: bool,
    /// Who is to be told that their sandbox did not come to run.
    pub(super) refused: Option<(Caller, Refusal)>,
}

/// A `CreateSandbox` call that waits for its sandbox.
pub(super) struct Caller {
    pub(super) claimed: Option<Claimed>,
    /// It is one of several that come to run together.
    pub(super) together: Option<Together>,
    pub(super) done: oneshot::Sender<Result<Created, Refusal>>,
}

// === impl Actor ===

impl Actor {
    pub(super) fn new(pool: &Arc<Pool>, record: SandboxRecord) -> Self {
        Self {
            files: SandboxFiles::new(&pool.config.paths, &record.id),
            pool: Arc::clone(pool),
            record,
            reservation: None,
            machine: None,
            guest: None,
            network: None,
            making: None,
            verdict: None,
            unstored: Vec::new(),
            is_listed: true,
            refused: None,
        }
    }

    /// The life of a new sandbox.
    pub(super) async fn run_new(
        mut self,
        origin: Origin,
        mut watch: Stopwatch,
        mut caller: Caller,
        commands: mpsc::Receiver<Command>,
    ) {
        let mut inbox = Inbox::new(commands);
        let mut deletes = Vec::new();
        let stopping = self.pool.stopping.clone();
        // Someone who gave a request_id can ask again and find the sandbox;
        // anybody else could never name it.
        let must_stay = caller.claimed.is_none();
        let started = {
            let claimed = caller.claimed.as_ref();
            tokio::select! {
                started = self.start(origin, claimed, &mut watch) => started,
                Some(delete) = inbox.next_delete() => {
                    deletes.push(delete);
                    Err(StartError::Deleted)
                }
                () = caller.done.closed(), if must_stay => Err(StartError::CallerGone),
                () = stopping.cancelled() => Err(StartError::Stopping),
            }
        };
        let started = match started {
            Ok(restored) => self.announce(&mut caller, restored, watch).await,
            Err(error) => Err(self.explain(error).await),
        };
        match started {
            Ok(created) => {
                if caller.done.send(Ok(created)).is_err() && must_stay {
                    tracing::info!(sandbox = %self.record.id, "the caller went away as its sandbox was ready; deleting it");
                    self.stop(Vec::new(), inbox).await;
                    return;
                }
                self.serve(inbox).await;
            }
            Err(error) => self.undo(error, caller, deletes, inbox).await,
        }
    }

    /// The life of a sandbox that an earlier daemon left behind: running,
    /// paused or failed.
    pub(super) async fn run_adopted(self, commands: mpsc::Receiver<Command>) {
        let inbox = Inbox::new(commands);
        if self.record.state == State::Failed {
            self.await_delete(inbox).await;
        } else {
            self.serve(inbox).await;
        }
    }

    /// Stores that it runs, with the reply for repeated requests, and shows it.
    async fn announce(
        &mut self,
        caller: &mut Caller,
        restored: bool,
        watch: Stopwatch,
    ) -> Result<Created, StartError> {
        let record = self.record.apply(Transition::Run)?;
        let created = Created {
            record: record.clone(),
            stages: watch.finish(),
            restored,
        };
        if let Some(together) = caller.together.take() {
            // Stored for all of them at once.
            together.proven(record.clone()).await?;
            self.record = record;
            self.publish();
            return Ok(created);
        }
        let reply = Reply::from(created.clone());
        let mut changes = vec![Change::PutSandbox(record.clone())];
        if let Some(claimed) = &caller.claimed {
            changes.extend(claimed.prepare_answer(&reply));
        }
        self.pool.store.commit(changes).await?;
        self.record = record;
        self.publish();
        if let Some(claimed) = caller.claimed.take() {
            claimed.answer(reply);
        }
        tracing::info!(sandbox = %self.record.id, template = self.record.template, "running");
        Ok(created)
    }

    /// While it runs or is paused.
    async fn serve(mut self, mut inbox: Inbox) {
        let leave = self.pool.leaving.clone();
        let expiry = self.expiry();
        tokio::pin!(expiry);
        loop {
            let machine = self.machine.as_mut();
            let ended = async {
                match machine {
                    Some(machine) => machine.ended().await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                command = inbox.next() => match command {
                    Some(Command::GoWithExec(done)) => {
                        // A caller that is gone has no program either.
                        let _ = done.send(self.go_with_exec().await);
                    }
                    Some(Command::Operate(operation)) => {
                        let interrupted = tokio::select! {
                            () = self.perform(operation) => None,
                            Some(delete) = inbox.next_delete() => Some(delete),
                            // What is half done is found by the next daemon.
                            () = leave.cancelled() => return,
                        };
                        if let Some(delete) = interrupted {
                            // Its programs may stand still.
                            self.guest = None;
                            return self.stop(vec![delete], inbox).await;
                        }
                    }
                    Some(Command::Delete(delete)) => return self.stop(vec![delete], inbox).await,
                    None => return self.stop(Vec::new(), inbox).await,
                },
                () = &mut expiry => {
                    tracing::info!(sandbox = %self.record.id, "its time to live is over; deleting it");
                    return self.stop(Vec::new(), inbox).await;
                }
                () = ended => return self.fail(inbox).await,
                // The monitor runs on, for the next daemon to adopt.
                () = leave.cancelled() => return,
            }
        }
    }

    /// Stores that a daemon that finds it without its call is to delete it.
    async fn go_with_exec(&mut self) -> Result<(), UseError> {
        if self.record.goes_with_exec {
            return Ok(());
        }
        let mut record = self.record.clone();
        record.goes_with_exec = true;
        let stored = self
            .pool
            .store
            .commit(vec![Change::PutSandbox(record.clone())]);
        stored.await.map_err(|error| UseError::Store {
            message: error.to_string(),
        })?;
        self.record = record;
        Ok(())
    }

    /// Its machine has ended by itself: records why, frees what it held, and
    /// keeps the record until somebody has seen it.
    async fn fail(mut self, inbox: Inbox) {
        let why = self.bury().await;
        let why = self.verdict.take().unwrap_or(why);
        tracing::warn!(sandbox = %self.record.id, reason = why.reason, message = why.message, "failed");
        self.guest = None;
        let detached = self.detach();
        self.store_failure(why).await;
        detached.await;
        self.reservation = None;
        self.pool.collect().await;
        self.await_delete(inbox).await;
    }

    /// Stores why it failed, and removes all but that.
    pub(super) async fn store_failure(&mut self, why: Failure) {
        let mut changes = Vec::new();
        if let Some(making) = self.making.take() {
            changes = self.forget_making(making);
        }
        match self.record.apply(Transition::Fail(why)) {
            Ok(failed) => self.record = failed,
            Err(error) => tracing::error!(sandbox = %self.record.id, %error, "not failed"),
        }
        changes.push(Change::PutSandbox(self.record.clone()));
        if let Err(error) = self.pool.store.commit(changes).await {
            // Callers must learn of it even when the disk is full.
            tracing::error!(sandbox = %self.record.id, %error, "the failure is not on disk");
        }
        self.publish();
        if let Err(error) = self.files.remove() {
            tracing::error!(sandbox = %self.record.id, %error, "files are left over");
        }
    }

    /// With nothing left but its record.
    async fn await_delete(mut self, mut inbox: Inbox) {
        let leave = self.pool.leaving.clone();
        let deletes = tokio::select! {
            delete = inbox.next_delete() => delete.into_iter().collect(),
            () = self.expiry() => Vec::new(),
            () = leave.cancelled() => return,
        };
        self.machine = None;
        self.stop(deletes, inbox).await;
    }

    /// Waits for the machine's last word and its end.
    pub(super) async fn bury(&mut self) -> Failure {
        match self.machine.take() {
            Some(mut machine) => {
                let observed = machine.bury().await;
                failure(&observed, self.files.last_log_line())
            }
            None => Failure::new("MONITOR_DIED", "the monitor is gone"),
        }
    }

    /// Stores a step and shows it.
    pub(super) async fn transition(&mut self, step: Transition) -> Result<(), StartError> {
        let next = self.record.apply(step)?;
        self.record = next;
        self.note().await?;
        self.publish();
        Ok(())
    }

    pub(super) fn publish(&self) {
        if !self.is_listed {
            return;
        }
        let live = match (&self.record.state, &self.guest, &self.machine) {
            (State::Running, Some(guest), Some(machine)) => Some(Arc::new(Live {
                guest: guest.clone(),
                control: Arc::clone(&machine.control),
                monitor: machine.process.identity(),
            })),
            _ => None,
        };
        self.pool.registry.publish(&self.record, live);
    }

    /// A create that failed: everything is taken down again, then the call and its
    /// repetitions are told why.
    async fn undo(mut self, error: StartError, caller: Caller, deletes: Vec<Delete>, inbox: Inbox) {
        tracing::warn!(sandbox = %self.record.id, %error, "not started");
        let refusal = Refusal::from(&CreateError::from(error));
        // The reply is stored when the sandbox's removal is.
        if let Some(claimed) = &caller.claimed {
            let _ = claimed.prepare_answer(&Reply::Refused(refusal.clone()));
        }
        self.refused = Some((caller, refusal));
        self.guest = None;
        self.stop(deletes, inbox).await;
    }

    /// Answers a create that failed, once.
    pub(super) fn refuse(&mut self) {
        let Some((mut caller, refusal)) = self.refused.take() else {
            return;
        };
        if let Some(claimed) = caller.claimed.take() {
            claimed.answer(Reply::Refused(refusal.clone()));
        }
        // The caller may be gone, which may even be the reason.
        let _ = caller.done.send(Err(refusal));
    }

    fn expiry(&self) -> impl Future<Output = ()> + use<> {
        let expires_at = self.record.expires_at;
        async move {
            match expires_at {
                Some(at) => sleep_until_wall(at).await,
                None => std::future::pending().await,
            }
        }
    }
}

// === impl Inbox ===

impl Inbox {
    pub(super) fn new(commands: mpsc::Receiver<Command>) -> Self {
        Self {
            commands,
            overtaken: VecDeque::new(),
        }
    }

    /// The next command; none when nobody can give one any more.
    async fn next(&mut self) -> Option<Command> {
        match self.overtaken.pop_front() {
            Some(command) => Some(command),
            None => self.commands.recv().await,
        }
    }

    /// The next wish to delete the sandbox. Others wait, or are dropped when
    /// there are too many.
    pub(super) async fn next_delete(&mut self) -> Option<Delete> {
        loop {
            match self.commands.recv().await? {
                Command::Delete(delete) => return Some(delete),
                other if self.overtaken.len() < MAX_COMMANDS => self.overtaken.push_back(other),
                _ => {}
            }
        }
    }

    /// No more commands are taken, and those that wait are dropped.
    pub(super) fn close(&mut self) {
        self.commands.close();
        self.overtaken.clear();
    }
}

/// Sleeps until the host's clock shows `at`, also when that is set meanwhile.
async fn sleep_until_wall(at: crate::time::UnixMillis) {
    const LOOK_AGAIN: std::time::Duration = std::time::Duration::from_secs(60);
    loop {
        let left = at.from_now();
        if left.is_zero() {
            return;
        }
        tokio::time::sleep(left.min(LOOK_AGAIN)).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::admission::Amounts;
    use crate::config::{Config, Paths};
    use crate::host::HostFacts;
    use crate::record::tests::sample;

    #[tokio::test]
    async fn a_failed_create_is_answered_though_its_end_cannot_be_stored() {
        let folder = tempfile::tempdir().unwrap();
        let config = Config {
            paths: Paths {
                state_dir: folder.path().join("state"),
                run_dir: folder.path().join("run"),
                ..Paths::default()
            },
            network: crate::config::Network {
                enabled: false,
                ..Default::default()
            },
            ..Config::default()
        };
        let opened = Pool::open(
            config,
            HostFacts::default(),
            "/none".into(),
            Amounts::default(),
        );
        let (pool, _) = opened.await.unwrap();
        pool.store.close();
        let record = sample(State::Starting);
        let id = record.id.clone();
        let (commands, commands_rx) = mpsc::channel(MAX_COMMANDS);
        pool.registry.insert(record.clone(), commands);
        let (done, outcome) = oneshot::channel();
        let caller = Caller {
            claimed: None,
            together: None,
            done,
        };
        let actor = Actor::new(&pool, record);
        let inbox = Inbox::new(commands_rx);
        let undone = actor.undo(StartError::Protocol, caller, Vec::new(), inbox);
        pool.actors.spawn(undone);
        let refused = outcome.await.unwrap().unwrap_err();
        assert_eq!(refused.reason, "PROTOCOL_MISMATCH");
        // It is still there, and its removal is tried again.
        assert!(pool.view(&id).is_ok());
        assert!(matches!(
            pool.delete(&id, true).await,
            Err(DeleteError::Store { .. })
        ));
        pool.leave().await;
    }
}
