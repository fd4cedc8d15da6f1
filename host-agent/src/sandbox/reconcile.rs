//! What an earlier daemon left behind: adopted, finished or undone.
//!
//! Afterwards every record has an actor, and no file, socket or monitor is
//! without a record.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use soulbox_proto::vmm::v1::Metrics;
use tokio::sync::{Semaphore, mpsc};
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::actor::{Actor, MAX_COMMANDS};
use super::files::{remove_folder, sandboxes_dir, sockets_dir};
use super::machine::Machine;
use super::pool::Pool;
use super::save::Making;
use super::start::MAX_SENTENCE_CHARS;
use crate::admission::Amounts;
use crate::guest::Guest;
use crate::id::SandboxId;
use crate::monitor::{ControlSocket, MonitorProcess, stray_monitors};
use crate::record::{
    Failure, SandboxRecord, SnapshotKind, SnapshotRecord, SnapshotState, State, Transition,
};
use crate::snapshot::{Layering, SnapshotFiles};
use crate::store::Change;
use crate::text::printable;

/// How long a monitor and its guest may take to answer before they are given
/// up. They have nothing else to do.
const ANSWER: Duration = Duration::from_secs(5);
/// How many records are looked at at once.
const AT_ONCE: usize = 64;

/// What was done, for the log.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Summary {
    /// Sandboxes that run on.
    pub adopted: usize,
    /// Sandboxes that are paused.
    pub paused: usize,
    /// Sandboxes that ran, and whose end was found.
    pub failed: usize,
    /// Sandboxes in mid-start or mid-stop that were taken down.
    pub undone: usize,
    /// Sandboxes that were to go with a call, which is over.
    pub deleted: usize,
    /// Monitors without a record that were killed.
    pub stray_monitors: usize,
    /// Folders without a record that were removed.
    pub stray_folders: usize,
}

pub(super) async fn reconcile(pool: &Arc<Pool>, records: Vec<SandboxRecord>) -> Summary {
    let mut summary = Summary::default();
    // Those whose monitor is wanted, and those whose folder is.
    let (mut running, mut kept) = (HashSet::new(), HashSet::new());
    let mut making = unfinished(pool);
    let turns = Arc::new(Semaphore::new(AT_ONCE));
    let mut outcomes = JoinSet::new();
    for record in records {
        let (pool, turns) = (Arc::clone(pool), Arc::clone(&turns));
        let making = making.remove(&record.id);
        outcomes.spawn(async move {
            // Nobody closes it.
            let _turn = turns.acquire().await;
            (record.id.clone(), one(&pool, record, making).await)
        });
    }
    for (id, outcome) in outcomes.join_all().await {
        match outcome {
            Outcome::Adopted => {
                summary.adopted += 1;
                running.insert(id.clone());
                kept.insert(id);
            }
            Outcome::Paused => {
                summary.paused += 1;
                kept.insert(id);
            }
            Outcome::Failed => summary.failed += 1,
            Outcome::Kept => {}
            Outcome::Undone => summary.undone += 1,
            Outcome::Deleted => summary.deleted += 1,
        }
    }
    kill_strays(pool, &running, &mut summary).await;
    summary.stray_monitors += pool.shells.remove_strays().await;
    remove_stray_folders(pool, &kept, &mut summary);
    // What is left was to be of sandboxes that have no record.
    for making in making.into_values() {
        forget(pool, making).await;
    }
    tidy_snapshots(pool, &mut summary);
    pool.collect().await;
    summary
}

/// Snapshots that an earlier daemon was in the middle of, by their sandbox. Those
/// without one are of templates, and are begun anew.
fn unfinished(pool: &Pool) -> HashMap<SandboxId, SnapshotRecord> {
    let of = |record: &SnapshotRecord| {
        // Any key that no record has, so that it is found left over.
        record.sandbox.clone().or_else(|| SandboxId::random().ok())
    };
    pool.snapshots
        .list(|record| !record.is_ready())
        .into_iter()
        .filter_map(|record| Some((of(&record)?, record)))
        .collect()
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Outcome {
    Adopted,
    Paused,
    /// It has become failed just now.
    Failed,
    /// It had failed before.
    Kept,
    Undone,
    Deleted,
}

async fn one(pool: &Arc<Pool>, record: SandboxRecord, making: Option<SnapshotRecord>) -> Outcome {
    let mut actor = Actor::new(pool, record);
    actor.making = making.map(|making| {
        let layering = Layering::above(&actor.record.chains, &making.id);
        Making {
            record: making,
            layering,
            swapped: false,
        }
    });
    actor.attach_again();
    match actor.record.state {
        State::Running | State::Failed | State::Pausing | State::Paused | State::Resuming
            if actor.record.goes_with_exec =>
        {
            tracing::warn!(sandbox = %actor.record.id, "was to go with a call, which is over; deleting it");
            remove(pool, &mut actor).await;
            Outcome::Deleted
        }
        State::Failed => {
            keep(actor);
            Outcome::Kept
        }
        State::Paused => keep_paused(actor),
        State::Resuming => {
            end_monitor(&actor).await;
            tracing::warn!(sandbox = %actor.record.id, "was coming back when the last daemon ended; it stays paused");
            settle(&mut actor, Transition::Settle, Vec::new()).await;
            keep_paused(actor)
        }
        State::Pausing if actor.is_sealed() => {
            end_monitor(&actor).await;
            actor.detach().await;
            finish_pause(&mut actor).await;
            keep_paused(actor)
        }
        State::Running | State::Pausing => match adopt(&mut actor).await {
            Ok(()) => {
                tracing::info!(sandbox = %actor.record.id, "adopted");
                keep(actor);
                Outcome::Adopted
            }
            Err(why) => {
                give_up(&mut actor, why).await;
                keep(actor);
                Outcome::Failed
            }
        },
        State::Pending | State::Starting | State::Stopping | State::Stopped => {
            // Nothing of it stays, and who asked for it may ask again.
            tracing::warn!(sandbox = %actor.record.id, state = %actor.record.state, "was cut off; removing what is left of it");
            remove(pool, &mut actor).await;
            Outcome::Undone
        }
    }
}

impl Actor {
    /// Whether all files of the snapshot that it was in the middle of are there.
    fn is_sealed(&self) -> bool {
        self.making
            .as_ref()
            .is_some_and(|making| self.pool.snapshots.files(&making.record.id).is_sealed())
    }
}

/// Its monitor has written all of it: only the record is wanting.
async fn finish_pause(actor: &mut Actor) {
    let Some(making) = actor.making.take() else {
        return;
    };
    let snapshot = sealed(actor, making.record);
    let step = Transition::Paused {
        saved: snapshot.id.clone(),
        chains: snapshot.chains.clone(),
    };
    settle(actor, step, vec![Change::PutSnapshot(snapshot.clone())]).await;
    actor.pool.snapshots.put(snapshot);
}

/// The record of a snapshot whose files are all there.
fn sealed(actor: &Actor, record: SnapshotRecord) -> SnapshotRecord {
    let sizes = actor.pool.snapshots.files(&record.id).sizes();
    SnapshotRecord {
        state: SnapshotState::Ready,
        memory_bytes: sizes.memory_bytes,
        disk_bytes: sizes.disk_bytes,
        ..record
    }
}

/// Stores a step of a sandbox that has no machine.
async fn settle(actor: &mut Actor, step: Transition, mut changes: Vec<Change>) {
    match actor.record.apply(step) {
        Ok(next) => actor.record = next,
        Err(error) => tracing::error!(sandbox = %actor.record.id, %error, "not settled"),
    }
    changes.push(Change::PutSandbox(actor.record.clone()));
    if let Err(error) = actor.pool.store.commit(changes).await {
        tracing::error!(sandbox = %actor.record.id, %error, "what it is now is not on disk");
    }
}

fn keep_paused(mut actor: Actor) -> Outcome {
    if let Err(error) = actor.files.clear(None) {
        tracing::debug!(sandbox = %actor.record.id, %error, "files of its last machine stay");
    }
    let disk = Amounts::disk_of(actor.record.resources);
    actor.reservation = Some(actor.pool.admission.adopt(disk));
    tracing::info!(sandbox = %actor.record.id, "paused");
    keep(actor);
    Outcome::Paused
}

async fn end_monitor(actor: &Actor) {
    if let Some(Ok(mut process)) = actor.record.monitor.map(MonitorProcess::find) {
        process.end().await;
    }
}

/// Finds the monitor again and asks it and its guest whether they are well.
async fn adopt(actor: &mut Actor) -> Result<(), Failure> {
    let died = |message: String| Failure::new("MONITOR_DIED", message);
    let identity = actor
        .record
        .monitor
        .ok_or_else(|| died("its record names no monitor".to_owned()))?;
    let mut process = MonitorProcess::find(identity).map_err(|error| {
        died(format!(
            "the monitor ended while soulboxd was away: {error}"
        ))
    })?;
    let lost = |message: String| Failure::new("MONITOR_LOST", message);
    let socket = match ControlSocket::connect(&actor.files.control_socket()) {
        Ok(socket) => socket,
        Err(error) => {
            process.end().await;
            return Err(lost(format!(
                "the monitor's control socket does not answer ({error})"
            )));
        }
    };
    actor.machine = Some(Machine::new(process, socket));
    actor.guest = Some(Guest::new(&actor.files.vsock_socket()));
    // What stands still is heard after it has been told to run on.
    let answered = match timeout(ANSWER, ask_monitor(actor)).await {
        Ok(Ok(metrics)) => {
            finish_snapshot(actor, &metrics).await;
            limit_again(actor).await;
            match timeout(ANSWER, ask_guest(actor)).await {
                Ok(answered) => answered,
                Err(_) => Err("the guest's agent did not answer in time".to_owned()),
            }
        }
        Ok(Err(message)) => Err(message),
        Err(_) => Err("the monitor did not answer in time".to_owned()),
    };
    match answered {
        Ok(()) => {
            actor.reservation = Some(actor.pool.admission.adopt(actor.record.resources));
            Ok(())
        }
        Err(message) => {
            actor.guest = None;
            if let Some(mut machine) = actor.machine.take() {
                machine.stop().await;
            }
            Err(lost(message))
        }
    }
}

async fn ask_monitor(actor: &Actor) -> Result<Metrics, String> {
    let Some(machine) = &actor.machine else {
        return Err("there is no monitor".to_owned());
    };
    let metrics = machine.control.metrics().await;
    metrics.map_err(|error| format!("the monitor did not answer: {error}"))
}

/// A daemon that ended while it changed a policy may have told the firewall only, or
/// nobody: the slots take theirs from the records, and so does the monitor.
async fn limit_again(actor: &Actor) {
    let Some(policy) = &actor.record.network else {
        return;
    };
    if let Err(error) = actor.limit(policy).await {
        tracing::error!(sandbox = %actor.record.id, %error, "its network's limits may be those of an earlier policy; set them again");
    }
}

async fn ask_guest(actor: &Actor) -> Result<(), String> {
    let Some(guest) = &actor.guest else {
        return Err("there is no guest".to_owned());
    };
    let answered = guest.health().await;
    answered.map(|_| ()).map_err(|status| {
        let said = printable(status.message(), MAX_SENTENCE_CHARS);
        format!("the guest's agent did not answer: {said}")
    })
}

/// Ends a snapshot or a pause that an earlier daemon was in the middle of, and has
/// the machine run on.
async fn finish_snapshot(actor: &mut Actor, metrics: &Metrics) {
    let pausing = actor.record.state == State::Pausing;
    let is_sealed = actor.is_sealed();
    let Some(mut making) = actor.making.take() else {
        return;
    };
    let id = making.record.id.clone();
    tracing::warn!(sandbox = %actor.record.id, snapshot = %id, "was being saved when the last daemon ended; it runs on");
    let noted = actor.record.chains.disk.contains(&id);
    making.swapped = noted || has_swapped(actor, metrics);
    let mut changes = if making.swapped && is_sealed {
        let snapshot = sealed(actor, making.record);
        let disk_chain = making.layering.chains.disk;
        if let Ok(next) = actor.record.apply(Transition::Saved { disk_chain }) {
            actor.record = next;
        }
        actor.pool.snapshots.put(snapshot.clone());
        vec![Change::PutSnapshot(snapshot)]
    } else if noted {
        let layer = making.record.into_layer();
        actor.pool.snapshots.put(layer.clone());
        vec![Change::PutSnapshot(layer)]
    } else if making.swapped {
        actor.keep_layer(making).await
    } else {
        actor.forget_making(making)
    };
    actor.run_on().await;
    if pausing && let Ok(running) = actor.record.apply(Transition::Continue) {
        actor.record = running;
    }
    changes.push(Change::PutSandbox(actor.record.clone()));
    if let Err(error) = actor.pool.store.commit(changes).await {
        tracing::error!(sandbox = %actor.record.id, %error, "that its snapshot is settled is not on disk");
    }
    if let Err(error) = actor.files.remove_layers(Some(actor.record.layer)) {
        tracing::warn!(sandbox = %actor.record.id, %error, "an old layer stays");
    }
}

/// Whether the machine writes to another disk layer than its record says. The
/// monitor counts the layers that it has open, frozen ones and the top one.
fn has_swapped(actor: &Actor, metrics: &Metrics) -> bool {
    let layers = metrics
        .devices
        .get("block.root")
        .and_then(|counters| counters.values.get("layers"));
    let recorded = actor.record.chains.disk.len() as u64 + 1;
    layers.is_some_and(|layers| *layers != recorded)
}

async fn give_up(actor: &mut Actor, why: Failure) {
    tracing::warn!(sandbox = %actor.record.id, reason = why.reason, message = why.message, "could not be adopted; it is failed");
    if actor.is_sealed()
        && let Some(making) = actor.making.take()
    {
        // Whoever asked for it can have it, though its sandbox is gone.
        let snapshot = sealed(actor, making.record);
        let stored = vec![Change::PutSnapshot(snapshot.clone())];
        if let Err(error) = actor.pool.store.commit(stored).await {
            tracing::error!(snapshot = %snapshot.id, %error, "that it is whole is not on disk");
        }
        actor.pool.snapshots.put(snapshot);
    }
    actor.detach().await;
    actor.store_failure(why).await;
}

fn keep(actor: Actor) {
    let (commands, commands_rx) = mpsc::channel(MAX_COMMANDS);
    let pool = Arc::clone(&actor.pool);
    pool.registry.insert(actor.record.clone(), commands);
    actor.publish();
    pool.actors.spawn(actor.run_adopted(commands_rx));
}

async fn remove(pool: &Pool, actor: &mut Actor) {
    end_monitor(actor).await;
    actor.detach().await;
    let mut changes = match actor.making.take() {
        Some(making) => actor.forget_making(making),
        None => Vec::new(),
    };
    let record = &actor.record;
    if let Err(error) = actor.files.remove() {
        tracing::error!(sandbox = %record.id, %error, "files are left over");
    }
    changes.push(Change::RemoveSandbox(record.id.clone()));
    if let Some(request_id) = &record.request_id {
        changes.extend(pool.requests.sandbox_gone(request_id, &record.id));
        // The call was cut off: its caller will ask again.
        pool.requests.forget_unanswered(request_id);
    }
    if let Err(error) = pool.store.commit(changes).await {
        tracing::error!(sandbox = %record.id, %error, "its record stays");
    }
}

async fn forget(pool: &Pool, record: SnapshotRecord) {
    tracing::warn!(snapshot = %record.id, "was cut off; removing what is left of it");
    pool.snapshots.remove(&record.id);
    if let Err(error) = pool.snapshots.files(&record.id).remove() {
        tracing::error!(snapshot = %record.id, %error, "files are left over");
    }
    let removed = pool.store.commit(vec![Change::RemoveSnapshot(record.id)]);
    if let Err(error) = removed.await {
        tracing::error!(%error, "the record of a snapshot stays");
    }
}

/// Removes folders without a record, and of layers what is none.
fn tidy_snapshots(pool: &Pool, summary: &mut Summary) {
    let folder = pool.snapshots.folder();
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let Some(id) = name.to_str().and_then(SnapshotFiles::id_of) else {
            continue;
        };
        let files = pool.snapshots.files(&id);
        let tidied = match pool.snapshots.get(&id) {
            Some(record) if record.kind == SnapshotKind::Layer => files.keep_layer().map(|_| ()),
            Some(_) => Ok(()),
            None => {
                tracing::warn!(path = %entry.path().display(), "a folder without a snapshot; removing it");
                summary.stray_folders += 1;
                files.remove()
            }
        };
        if let Err(error) = tidied {
            tracing::error!(snapshot = %id, %error, "files of it stay");
        }
    }
}

async fn kill_strays(pool: &Pool, kept: &HashSet<SandboxId>, summary: &mut Summary) {
    for (id, mut process) in stray_monitors(&sandboxes_dir(&pool.config.paths)) {
        if !kept.contains(&id) {
            tracing::warn!(sandbox = %id, pid = process.identity().pid, "a monitor without a record; killing it");
            process.end().await;
            summary.stray_monitors += 1;
        }
    }
}

fn remove_stray_folders(pool: &Pool, kept: &HashSet<SandboxId>, summary: &mut Summary) {
    for parent in [
        sandboxes_dir(&pool.config.paths),
        sockets_dir(&pool.config.paths),
    ] {
        for entry in std::fs::read_dir(&parent).into_iter().flatten().flatten() {
            // What has no sandbox's name is not ours to remove.
            let Some(id) = entry
                .file_name()
                .to_str()
                .and_then(|name| name.parse().ok())
            else {
                continue;
            };
            if kept.contains(&id) {
                continue;
            }
            let path = entry.path();
            tracing::warn!(path = %path.display(), "a folder without a sandbox; removing it");
            match remove_folder(&path) {
                Ok(()) => summary.stray_folders += 1,
                Err(error) => tracing::error!(%error, "a stray folder stays"),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::admission::Amounts;
    use crate::config::{Config, Paths};
    use crate::host::HostFacts;
    use crate::record::tests::sample;
    use crate::record::{MonitorIdentity, RequestRecord};
    use crate::sandbox::files::SandboxFiles;
    use crate::store::Store;

    const CAPACITY: Amounts = Amounts {
        vcpus: 8,
        memory_mib: 4096,
        disk_mib: 4096,
    };

    #[tokio::test]
    async fn every_left_over_is_finished_or_removed() {
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
        let states = [
            State::Pending,
            State::Starting,
            State::Stopping,
            State::Running,
            State::Failed,
        ];
        let mut records: Vec<SandboxRecord> = states.map(sample).into();
        records[1].request_id = Some("cut-off".to_owned());
        records[2].request_id = Some("never answered".to_owned());
        records[4].failure = Some(Failure::new("GUEST_PANIC", "It panicked."));
        records[4].goes_with_exec = true;
        // A monitor that is not there any more.
        records[3].monitor = Some(MonitorIdentity {
            pid: i32::MAX,
            start_time_ticks: 1,
            boot_id: None,
        });
        let sandboxes = sandboxes_dir(&config.paths);
        std::fs::create_dir_all(&sandboxes).unwrap();
        for (sequence, record) in (1..).zip(&mut records) {
            record.sequence = sequence;
            SandboxFiles::new(&config.paths, &record.id)
                .create(0)
                .unwrap();
        }
        SandboxFiles::new(&config.paths, &SandboxId::random().unwrap())
            .create(0)
            .unwrap();
        std::fs::write(sandboxes.join("README"), "not ours").unwrap();
        {
            let (store, _) = Store::open(&config.paths.state_dir.join("state.redb")).unwrap();
            let mut changes = Vec::new();
            for (id, record) in [("cut-off", 1), ("never answered", 2)] {
                let request = RequestRecord {
                    body: serde_json::json!(1),
                    sandbox: records[record].id.clone(),
                    reply: None,
                    forget_at: None,
                };
                changes.push(Change::PutRequest(id.to_owned(), request));
            }
            changes.extend(records.iter().cloned().map(Change::PutSandbox));
            store.commit(changes).await.unwrap();
        }

        let (pool, summary) = Pool::open(
            config.clone(),
            HostFacts::default(),
            "/none".into(),
            CAPACITY,
        )
        .await
        .unwrap();
        assert_eq!(
            summary,
            Summary {
                failed: 1,
                undone: 3,
                deleted: 1,
                stray_folders: 2,
                ..Summary::default()
            }
        );
        let left = pool.list(0, 10, |_| true);
        assert_eq!(left.len(), 1);
        assert_eq!(left[0].failure.as_ref().unwrap().reason, "MONITOR_DIED");
        assert_eq!(pool.admission().allocatable(), CAPACITY);
        let files: Vec<_> = std::fs::read_dir(&sandboxes).unwrap().flatten().collect();
        assert_eq!(files.len(), 1, "{files:?}");

        // Deleting the failed one leaves nothing, also for many at once.
        let id = &left[0].id;
        let (first, second) = tokio::join!(pool.delete(id, false), pool.delete(id, true));
        first.unwrap();
        second.unwrap();
        pool.delete(id, false).await.unwrap();
        pool.leave().await;
        drop(pool);
        let (_store, loaded) = Store::open(&config.paths.state_dir.join("state.redb")).unwrap();
        assert!(loaded.sandboxes.is_empty() && loaded.requests.is_empty());
    }
}
