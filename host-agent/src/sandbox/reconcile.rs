//! What an earlier daemon left behind: adopted, finished or undone.
//!
//! Afterwards every record has an actor, and no file, socket or monitor is
//! without a record.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{Semaphore, mpsc};
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::actor::{Actor, MAX_COMMANDS};
use super::files::{remove_folder, sandboxes_dir, sockets_dir};
use super::machine::Machine;
use super::pool::Pool;
use super::start::MAX_SENTENCE_CHARS;
use crate::guest::Guest;
use crate::id::SandboxId;
use crate::monitor::{ControlSocket, MonitorProcess, stray_monitors};
use crate::record::{Failure, SandboxRecord, State, Transition};
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
    let mut kept = HashSet::new();
    let turns = Arc::new(Semaphore::new(AT_ONCE));
    let mut outcomes = JoinSet::new();
    for record in records {
        let (pool, turns) = (Arc::clone(pool), Arc::clone(&turns));
        outcomes.spawn(async move {
            // Nobody closes it.
            let _turn = turns.acquire().await;
            (record.id.clone(), one(&pool, record).await)
        });
    }
    for (id, outcome) in outcomes.join_all().await {
        match outcome {
            Outcome::Adopted => {
                summary.adopted += 1;
                kept.insert(id);
            }
            Outcome::Failed => summary.failed += 1,
            Outcome::Kept => {}
            Outcome::Undone => summary.undone += 1,
            Outcome::Deleted => summary.deleted += 1,
        }
    }
    kill_strays(pool, &kept, &mut summary).await;
    remove_stray_folders(pool, &kept, &mut summary);
    summary
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Outcome {
    Adopted,
    /// It has become failed just now.
    Failed,
    /// It had failed before.
    Kept,
    Undone,
    Deleted,
}

async fn one(pool: &Arc<Pool>, record: SandboxRecord) -> Outcome {
    let mut actor = Actor::new(pool, record);
    match actor.record.state {
        State::Running | State::Failed if actor.record.goes_with_exec => {
            tracing::warn!(sandbox = %actor.record.id, "was to go with a call, which is over; deleting it");
            remove(pool, &actor).await;
            Outcome::Deleted
        }
        State::Failed => {
            keep(actor);
            Outcome::Kept
        }
        State::Running => match adopt(&mut actor).await {
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
            remove(pool, &actor).await;
            Outcome::Undone
        }
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
    let mut machine = Machine::new(process, socket);
    let guest = Guest::new(&actor.files.vsock_socket());
    let asked = async {
        let monitor = machine.control.metrics().await;
        monitor.map_err(|error| format!("the monitor did not answer: {error}"))?;
        let agent = guest.health().await;
        agent.map_err(|status| {
            let said = printable(status.message(), MAX_SENTENCE_CHARS);
            format!("the guest's agent did not answer: {said}")
        })
    };
    let answered = match timeout(ANSWER, asked).await {
        Ok(answered) => answered.map(|_| ()),
        Err(_) => Err("neither monitor nor guest answered in time".to_owned()),
    };
    match answered {
        Ok(()) => {
            actor.reservation = Some(actor.pool.admission.adopt(actor.record.resources));
            actor.machine = Some(machine);
            actor.guest = Some(guest);
            Ok(())
        }
        Err(message) => {
            machine.stop().await;
            Err(lost(message))
        }
    }
}

async fn give_up(actor: &mut Actor, why: Failure) {
    tracing::warn!(sandbox = %actor.record.id, reason = why.reason, message = why.message, "could not be adopted; it is failed");
    if let Err(error) = actor.transition(Transition::Fail(why)).await {
        tracing::error!(sandbox = %actor.record.id, %error, "the failure is not on disk");
    }
    if let Err(error) = actor.files.remove() {
        tracing::error!(sandbox = %actor.record.id, %error, "files are left over");
    }
}

/// Gives the record its actor.
fn keep(actor: Actor) {
    let (commands, commands_rx) = mpsc::channel(MAX_COMMANDS);
    let pool = Arc::clone(&actor.pool);
    pool.registry.insert(actor.record.clone(), commands);
    actor.publish();
    pool.actors.spawn(actor.run_adopted(commands_rx));
}

/// Its monitor, its files, then its record.
async fn remove(pool: &Pool, actor: &Actor) {
    let record = &actor.record;
    if let Some(Ok(mut process)) = record.monitor.map(MonitorProcess::find) {
        process.end().await;
    }
    if let Err(error) = actor.files.remove() {
        tracing::error!(sandbox = %record.id, %error, "files are left over");
    }
    let mut changes = vec![Change::RemoveSandbox(record.id.clone())];
    if let Some(request_id) = &record.request_id {
        changes.extend(pool.requests.sandbox_gone(request_id, &record.id));
        // The call was cut off: its caller will ask again.
        pool.requests.forget_unanswered(request_id);
    }
    if let Err(error) = pool.store.commit(changes).await {
        tracing::error!(sandbox = %record.id, %error, "its record stays");
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
                .create(128)
                .unwrap();
        }
        SandboxFiles::new(&config.paths, &SandboxId::random().unwrap())
            .create(128)
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
