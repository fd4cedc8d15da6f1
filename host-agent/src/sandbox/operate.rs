//! What is done with a sandbox that is there: pause, resume, snapshot, rollback.

use tokio::sync::oneshot;

use super::actor::{Actor, Command};
use super::error::{OperateError, SaveError, StartError, UseError};
use super::pool::Pool;
use super::restore::{Plan, RestoreFiles};
use super::save::{SaveSpec, Saved};
use super::spec::SnapshotSpec;
use crate::guest::Identity;
use crate::id::{SandboxId, SnapshotId};
use crate::net::Policy;
use crate::record::{
    SandboxRecord, SnapshotKind, SnapshotRecord, SnapshotState, State, Transition,
};
use crate::snapshot::Manifest;
use crate::store::Change;
use crate::time::{Stage, Stopwatch, UnixMillis};

/// A sandbox after an operation, and how long that took.
#[derive(Debug, Clone)]
pub struct Operated {
    pub record: SandboxRecord,
    pub stages: Vec<Stage>,
}

pub(super) type Done<T> = oneshot::Sender<Result<T, OperateError>>;

#[derive(Debug)]
pub(super) enum Operation {
    Pause {
        cold: bool,
        done: Done<Operated>,
    },
    Resume {
        done: Done<Operated>,
    },
    Save {
        spec: SaveSpec,
        done: Done<Saved>,
    },
    RollBack {
        plan: Box<Plan>,
        done: Done<Operated>,
    },
    SetNetwork {
        policy: Box<Policy>,
        done: Done<Policy>,
    },
}

// === impl Pool ===

impl Pool {
    pub async fn pause(&self, id: &SandboxId, cold: bool) -> Result<Operated, OperateError> {
        self.operate(id, |done| Operation::Pause { cold, done })
            .await
    }

    pub async fn resume(&self, id: &SandboxId) -> Result<Operated, OperateError> {
        self.operate(id, |done| Operation::Resume { done }).await
    }

    pub async fn snapshot(
        &self,
        id: &SandboxId,
        spec: SnapshotSpec,
    ) -> Result<Saved, OperateError> {
        if let Some(name) = &spec.name
            && self.templates.exists(name)
        {
            return Err(OperateError::Invalid(vec![spec.name_is_a_templates()]));
        }
        let spec = SaveSpec {
            name: spec.name,
            labels: spec.labels,
            cold: spec.cold,
            ..SaveSpec::new(SnapshotKind::User)
        };
        self.save_with(id, spec).await
    }

    pub(super) async fn save_with(
        &self,
        id: &SandboxId,
        spec: SaveSpec,
    ) -> Result<Saved, OperateError> {
        self.operate(id, |done| Operation::Save { spec, done })
            .await
    }

    pub async fn roll_back(
        &self,
        id: &SandboxId,
        to: &SnapshotId,
    ) -> Result<Operated, OperateError> {
        self.view(id)?;
        let found = self.snapshots.take(to);
        let (snapshot, hold) = found
            .filter(|(snapshot, _)| snapshot.kind == SnapshotKind::User)
            .ok_or_else(|| OperateError::SnapshotNotFound(to.to_string()))?;
        if snapshot.sandbox.as_ref() != Some(id) {
            return Err(OperateError::OtherSandbox {
                snapshot: to.clone(),
                sandbox: id.clone(),
            });
        }
        let plan = self.plan(&snapshot, hold).map_err(StartError::from)?;
        let plan = Box::new(plan);
        self.operate(id, |done| Operation::RollBack { plan, done })
            .await
    }

    /// Replaces what a sandbox may reach, at one moment.
    pub async fn set_network(
        &self,
        id: &SandboxId,
        policy: Policy,
    ) -> Result<Policy, OperateError> {
        let checked = self.check_policy(&policy, "policy").await;
        checked.map_err(OperateError::Invalid)?;
        let policy = Box::new(policy);
        self.operate(id, |done| Operation::SetNetwork { policy, done })
            .await
    }

    /// Has the sandbox's actor do it, and waits for that.
    async fn operate<T>(
        &self,
        id: &SandboxId,
        operation: impl FnOnce(Done<T>) -> Operation,
    ) -> Result<T, OperateError> {
        if self.is_draining() {
            return Err(OperateError::Draining);
        }
        self.check_operable(id)?;
        let commands = self.registry.commands(id);
        let commands = commands.ok_or_else(|| UseError::NotFound(id.to_string()))?;
        let (done, outcome) = oneshot::channel();
        // An actor that has ended answers nothing.
        let _ = commands.send(Command::Operate(operation(done))).await;
        drop(commands);
        match outcome.await {
            Ok(outcome) => outcome,
            Err(_) if self.leaving.is_cancelled() => Err(OperateError::Draining),
            Err(_) => {
                self.check_operable(id)?;
                Err(UseError::Deleted { id: id.clone() }.into())
            }
        }
    }

    /// What is refused at once rather than after what the sandbox is busy with.
    fn check_operable(&self, id: &SandboxId) -> Result<(), OperateError> {
        let view = self.view(id)?;
        let view = view.borrow();
        let (id, state) = (view.record.id.clone(), view.record.state);
        match (state, &view.record.failure) {
            (State::Running | State::Paused, _) => Ok(()),
            (State::Pausing | State::Resuming, _) => Err(OperateError::Busy { id, state }),
            (State::Failed, Some(failure)) => {
                let failure = failure.clone();
                Err(UseError::Failed { id, failure }.into())
            }
            _ => Err(UseError::NotRunning { id, state }.into()),
        }
    }
}

// === impl Actor ===

impl Actor {
    /// Does it and answers. When this is dropped, [`Actor::stop`] and the next
    /// start of the daemon can go on from wherever it was.
    pub(super) async fn perform(&mut self, operation: Operation) {
        // A caller that is gone has its sandbox changed all the same.
        match operation {
            Operation::Pause { cold, done } => {
                let outcome = self.pause(cold).await;
                let _ = done.send(outcome);
            }
            Operation::Resume { done } => {
                let outcome = self.resume().await;
                let _ = done.send(outcome);
            }
            Operation::Save { spec, done } => {
                let outcome = match self.record.state {
                    State::Running => self
                        .save(spec, Stopwatch::start())
                        .await
                        .map_err(Into::into),
                    State::Paused => self.save_paused(spec).await,
                    _ => Err(self.wrong_state()),
                };
                let _ = done.send(outcome);
            }
            Operation::RollBack { plan, done } => {
                let outcome = self.roll_back(*plan).await;
                let _ = done.send(outcome);
            }
            Operation::SetNetwork { policy, done } => {
                let outcome = self.set_policy(policy).await;
                let _ = done.send(outcome.map_err(Into::into));
            }
        }
    }

    fn wrong_state(&self) -> OperateError {
        let (id, state) = (self.record.id.clone(), self.record.state);
        UseError::NotRunning { id, state }.into()
    }

    fn operated(&self, watch: Stopwatch) -> Operated {
        Operated {
            record: self.record.clone(),
            stages: watch.finish(),
        }
    }

    async fn pause(&mut self, cold: bool) -> Result<Operated, OperateError> {
        let mut watch = Stopwatch::start();
        match self.record.state {
            State::Running => {}
            State::Paused => return Ok(self.operated(watch)),
            _ => return Err(self.wrong_state()),
        }
        let spec = SaveSpec {
            cold,
            ..SaveSpec::new(SnapshotKind::Pause)
        };
        let saved = self.save(spec, Stopwatch::start()).await?;
        watch.skip();
        for stage in saved
            .stages
            .into_iter()
            .filter(|stage| stage.name != "total")
        {
            watch.add(stage);
        }
        self.end_machine().await;
        self.publish();
        watch.lap("stop");
        tracing::info!(sandbox = %self.record.id, snapshot = %saved.snapshot.id, "paused");
        Ok(self.operated(watch))
    }

    /// Frees all that a sandbox has only while it runs.
    async fn end_machine(&mut self) {
        self.guest = None;
        if let Some(mut machine) = self.machine.take() {
            machine.stop().await;
        }
        let detached = self.detach();
        if let Err(error) = self.files.clear(None) {
            tracing::warn!(sandbox = %self.record.id, %error, "files of its last machine stay");
        }
        if let Some(reservation) = &mut self.reservation {
            reservation.release_machine();
        }
        detached.await;
    }

    async fn resume(&mut self) -> Result<Operated, OperateError> {
        let mut watch = Stopwatch::start();
        match self.record.state {
            State::Paused => {}
            State::Running => return Ok(self.operated(watch)),
            _ => return Err(self.wrong_state()),
        }
        let plan = self
            .pool
            .plan_to_resume(&self.record)
            .map_err(StartError::from)?;
        let layers = self.pool.open_layers(&plan).await;
        let layers = layers.map_err(StartError::from)?;
        let resuming = self.record.apply(Transition::Resume);
        let resuming = resuming.map_err(StartError::from)?;
        self.regain()?;
        // Stored with the monitor that it will have: a daemon that finds it paused
        // has lost nothing.
        self.record = resuming;
        self.publish();
        watch.lap("admission");
        self.come_back(plan, layers, watch).await
    }

    async fn roll_back(&mut self, plan: Plan) -> Result<Operated, OperateError> {
        let mut watch = Stopwatch::start();
        if !matches!(self.record.state, State::Running | State::Paused) {
            return Err(self.wrong_state());
        }
        // Whatever could be missing is found before anything is lost.
        let layers = self.pool.open_layers(&plan).await;
        let layers = layers.map_err(StartError::from)?;
        let was_paused = self.record.state == State::Paused;
        if was_paused {
            self.regain()?;
        }
        let step = Transition::RollBack {
            to: plan.snapshot.clone(),
            chains: plan.chains.clone(),
        };
        let before = self.record.clone();
        let next = before.apply(step).map_err(StartError::from)?;
        let stored = self
            .pool
            .store
            .commit(vec![Change::PutSandbox(next.clone())]);
        if let Err(error) = stored.await {
            if was_paused {
                self.end_machine().await;
            }
            return Err(StartError::from(error).into());
        }
        self.record = next;
        self.guest = None;
        self.publish();
        watch.lap("admission");
        if let Some(mut machine) = self.machine.take() {
            machine.stop().await;
            self.detach().await;
            watch.lap("stop");
        }
        self.come_back(plan, layers, watch).await
    }

    fn regain(&mut self) -> Result<(), OperateError> {
        let resources = self.record.resources;
        match &mut self.reservation {
            Some(reservation) => reservation.regain_machine(resources)?,
            None => self.reservation = Some(self.pool.admission.reserve(resources)?),
        }
        Ok(())
    }

    /// From state `resuming` to running, or back to paused.
    async fn come_back(
        &mut self,
        plan: Plan,
        layers: RestoreFiles,
        mut watch: Stopwatch,
    ) -> Result<Operated, OperateError> {
        let restored = self
            .restore_layers(&plan, layers, Identity::Resumed, &mut watch)
            .await;
        let ran = match restored {
            Ok(()) => self.transition(Transition::Run).await,
            Err(error) => Err(error),
        };
        match ran {
            Ok(()) => {
                tracing::info!(sandbox = %self.record.id, snapshot = %plan.snapshot, "running again");
                Ok(self.operated(watch))
            }
            Err(error) => {
                let error = self.explain(error).await;
                tracing::warn!(sandbox = %self.record.id, %error, "did not come back; it stays paused");
                self.end_machine().await;
                if let Err(error) = self.transition(Transition::Settle).await {
                    // A daemon that finds it coming back settles it so, too.
                    tracing::error!(sandbox = %self.record.id, %error, "that it is paused is not on disk");
                    self.publish();
                }
                Err(error.into())
            }
        }
    }

    /// Another snapshot of what a paused sandbox goes on from.
    async fn save_paused(&mut self, spec: SaveSpec) -> Result<Saved, OperateError> {
        let mut watch = Stopwatch::start();
        if spec.kind != SnapshotKind::User {
            return Err(self.wrong_state());
        }
        let Some(saved) = self.record.saved.clone() else {
            return Err(self.wrong_state());
        };
        let id = SnapshotId::random().map_err(SaveError::Random)?;
        let record = SnapshotRecord {
            id: id.clone(),
            sequence: self.pool.registry.next_sequence(),
            kind: spec.kind,
            state: SnapshotState::Ready,
            name: spec.name,
            template: self.record.template.clone(),
            base: self.record.base.clone(),
            sandbox: Some(self.record.id.clone()),
            chains: self.record.chains.clone(),
            resources: self.record.resources,
            labels: spec.labels,
            created_at: UnixMillis::now(),
            cold: false,
            memory_bytes: 0,
            disk_bytes: 0,
            key: None,
            stale: false,
        };
        // Without a record a folder is removed at the next start, so the record can
        // come last. Until then it is not ready, so that nobody finds it.
        let making = SnapshotRecord {
            state: SnapshotState::Making,
            ..record.clone()
        };
        let hold = self.pool.snapshots.begin(making).map_err(SaveError::from)?;
        let folder = self.pool.snapshots.files(&id);
        let from = self.pool.snapshots.files(&saved);
        let manifest = Manifest::of(&record, &self.pool.facts.cpu_model).to_json();
        let sealed = tokio::task::spawn_blocking(move || {
            folder.begin_copy(&from)?;
            folder.seal(&manifest, false)
        })
        .await
        .unwrap_or_else(|error| Err(std::io::Error::other(error)));
        let stored = match sealed {
            Ok(_) => {
                let put = vec![Change::PutSnapshot(record.clone())];
                self.pool.store.commit(put).await.map_err(SaveError::from)
            }
            Err(error) => Err(super::save::files(error)),
        };
        if let Err(error) = stored {
            self.pool.snapshots.remove(&id);
            // A folder without a record goes at the next start at the latest.
            let _ = self.pool.snapshots.files(&id).remove();
            return Err(error.into());
        }
        self.pool.snapshots.put(record.clone());
        watch.lap("sync");
        Ok(Saved {
            snapshot: record,
            stages: watch.finish(),
            paused: std::time::Duration::ZERO,
            hold,
        })
    }
}
