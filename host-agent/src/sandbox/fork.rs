//! Copies of a running sandbox, which come to run together or not at all.

use std::sync::Arc;

use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinSet;

use super::actor::Caller;
use super::create::{Created, Origin};
use super::error::{CreateError, OperateError, SaveError, StartError, UseError};
use super::pool::Pool;
use super::restore::Plan;
use super::save::{SaveSpec, Saved};
use super::spec::ForkSpec;
use crate::admission::Reservation;
use crate::id::SandboxId;
use crate::net::Policy;
use crate::record::{Resources, SandboxRecord, SnapshotKind, State};
use crate::status::Refusal;
use crate::store::Change;
use crate::time::{Stage, Stopwatch, UnixMillis};

/// The children, and how long their making took.
#[derive(Debug)]
pub struct Forked {
    pub children: Vec<Created>,
    pub stages: Vec<Stage>,
    pub parent_paused: std::time::Duration,
}

/// One child's part in coming to run with the others.
#[derive(Debug)]
pub(super) struct Together(mpsc::Sender<Proven>);

/// A child in which a program has been run. It waits until its record is stored
/// with those of the others.
#[derive(Debug)]
struct Proven {
    record: SandboxRecord,
    go: oneshot::Sender<()>,
}

// === impl Together ===

impl Together {
    /// Returns when the record is stored.
    pub(super) async fn proven(self, record: SandboxRecord) -> Result<(), StartError> {
        let (go, gone) = oneshot::channel();
        let proven = Proven { record, go };
        // Whoever does not wait any more has given all of them up.
        let told = self.0.send(proven).await;
        told.map_err(|_| StartError::CallerGone)?;
        gone.await.map_err(|_| StartError::CallerGone)
    }
}

// === impl Pool ===

impl Pool {
    /// When the caller drops this, no child stays.
    pub async fn fork(
        self: &Arc<Self>,
        parent: &SandboxId,
        spec: ForkSpec,
    ) -> Result<Forked, Refusal> {
        let mut watch = Stopwatch::start();
        let refuse = |error: OperateError| Refusal::from(&error);
        let ttl = super::spec::resolve_ttl(spec.ttl, &self.config.defaults, &self.config.limits);
        let ttl = ttl.map_err(|error| Refusal::from(&error))?;
        let (resources, network) = self.check_forkable(parent).map_err(refuse)?;
        // All of it before the parent stands still.
        let reservations = self.admission.reserve_many(resources, spec.count);
        let reservations = reservations.map_err(|error| refuse(error.into()))?;
        let count = reservations.len();
        self.shells.expect(resources.into(), count);
        watch.lap("admission");

        let saved = self
            .save_with(parent, SaveSpec::new(SnapshotKind::Fork))
            .await;
        let Saved {
            snapshot,
            stages,
            paused,
            hold,
        } = saved.map_err(refuse)?;
        watch.skip();
        for stage in stages.into_iter().filter(|stage| stage.name != "total") {
            watch.add(stage);
        }
        let plan = self.plan(&snapshot, hold);
        let plan = plan.map_err(|error| refuse(StartError::from(error).into()))?;
        let expires_at = ttl.map(|ttl| UnixMillis::now().plus(ttl));
        let child = |id| {
            let base = (snapshot.template.clone(), snapshot.base.clone());
            let origin = Origin::Restore(Box::new(plan.clone()));
            let mut record = self.new_record(id, resources, base, &origin);
            record.labels.clone_from(&spec.labels);
            record.expires_at = expires_at;
            record.network.clone_from(&network);
            record.parent = Some(parent.clone());
            record
        };
        let mut records = Vec::new();
        for _ in 0..count {
            let id = SandboxId::random();
            let id = id.map_err(|error| refuse(SaveError::Random(error).into()))?;
            records.push(child(id));
        }
        let ids: Vec<SandboxId> = records.iter().map(|record| record.id.clone()).collect();
        let created = self.run_together(records, reservations, &plan).await;
        let children = match created {
            Ok(children) => children,
            Err(refusal) => {
                tracing::warn!(sandbox = %parent, reason = refusal.reason, "not forked");
                for id in &ids {
                    // They go by themselves; this waits until they have.
                    let _ = self.delete(id, true).await;
                }
                return Err(refusal);
            }
        };
        drop(plan);
        watch.lap("children");
        if spec.delete_parent
            && let Err(error) = self.delete(parent, false).await
        {
            tracing::error!(sandbox = %parent, %error, "not deleted after its fork");
        }
        tracing::info!(sandbox = %parent, count, "forked");
        Ok(Forked {
            children,
            stages: watch.finish(),
            parent_paused: paused,
        })
    }

    /// What its children take, and what they may reach.
    fn check_forkable(
        &self,
        id: &SandboxId,
    ) -> Result<(Resources, Option<Box<Policy>>), OperateError> {
        if self.is_draining() {
            return Err(OperateError::Draining);
        }
        let view = self.view(id)?;
        let record = &view.borrow().record;
        match (record.state, &record.failure) {
            (State::Running, _) => Ok((record.resources, record.network.clone())),
            (State::Failed, Some(failure)) => Err(UseError::Failed {
                id: id.clone(),
                failure: failure.clone(),
            }
            .into()),
            (state, _) => Err(UseError::NotRunning {
                id: id.clone(),
                state,
            }
            .into()),
        }
    }

    /// Starts all of them, and has them run once each has run a program.
    async fn run_together(
        self: &Arc<Self>,
        records: Vec<SandboxRecord>,
        reservations: Vec<Reservation>,
        plan: &Plan,
    ) -> Result<Vec<Created>, Refusal> {
        let count = records.len();
        let (proven_tx, mut proven_rx) = mpsc::channel(count);
        let mut outcomes = JoinSet::new();
        for (index, (record, reservation)) in records.into_iter().zip(reservations).enumerate() {
            let (done, outcome) = oneshot::channel();
            let caller = Caller {
                claimed: None,
                together: Some(Together(proven_tx.clone())),
                done,
            };
            let origin = Origin::Restore(Box::new(plan.clone()));
            self.begin(record, origin, reservation, Stopwatch::start(), caller);
            outcomes.spawn(async move { (index, outcome.await) });
        }
        drop(proven_tx);
        let lost = || Refusal::from(&CreateError::ActorLost);
        let mut proven = Vec::with_capacity(count);
        while proven.len() < count {
            tokio::select! {
                Some(child) = proven_rx.recv() => proven.push(child),
                // Before they are let go, one that is over has failed.
                Some(Ok((_, Ok(Err(refusal))))) = outcomes.join_next() => return Err(refusal),
                else => return Err(lost()),
            }
        }
        let records = proven.iter().map(|child| child.record.clone());
        let changes = records.map(Change::PutSandbox).collect();
        let stored = self.store.commit(changes).await;
        stored.map_err(|error| Refusal::from(&CreateError::from(StartError::from(error))))?;
        for child in proven {
            // One whose machine has ended just now is found failed.
            let _ = child.go.send(());
        }
        let mut children = Vec::with_capacity(count);
        while let Some(ended) = outcomes.join_next().await {
            let (index, outcome) = ended.map_err(|_| lost())?;
            children.push((index, outcome.map_err(|_| lost())??));
        }
        children.sort_by_key(|(index, _)| *index);
        Ok(children.into_iter().map(|(_, child)| child).collect())
    }
}
