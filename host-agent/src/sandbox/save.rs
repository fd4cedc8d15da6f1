//! From a running machine to a snapshot of it.
//!
//! A snapshot's record is stored as `making` before the monitor is asked, and as
//! `ready` together with the sandbox's own once every file is on disk. Between the
//! two, the monitor has changed to the next disk layer: from then on the layer that
//! it wrote to is part of the disk, whether the snapshot comes to be or not.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd as _, BorrowedFd};
use std::time::Duration;

use soulbox_proto::guest::RPC_PORT;
use soulbox_proto::vmm::v1::{self as proto, error::Code, reply, request};
use tokio::time::timeout;

use super::actor::Actor;
use super::error::SaveError;
use super::start::MAX_SENTENCE_CHARS;
use crate::guest::Identity;
use crate::id::SnapshotId;
use crate::monitor::RequestError;
use crate::record::{Failure, SnapshotKind, SnapshotRecord, SnapshotState, State, Transition};
use crate::snapshot::{Draft, Hold, Layering, Manifest};
use crate::store::Change;
use crate::text::printable;
use crate::time::{Stage, Stopwatch, UnixMillis};

/// Connections to the agent that a snapshot keeps: one for the calls of the
/// daemon, the others for the first programs.
const SPARES: u32 = 4;
/// How long an agent may take to stop its programs, or to let them go on.
const AGENT: Duration = Duration::from_secs(10);

/// What is asked for.
#[derive(Debug, Clone)]
pub(super) struct SaveSpec {
    pub(super) kind: SnapshotKind,
    pub(super) name: Option<String>,
    pub(super) labels: BTreeMap<String, String>,
    pub(super) cold: bool,
    /// Of a template's own.
    pub(super) key: Option<String>,
}

/// A snapshot that is ready.
#[derive(Debug)]
pub struct Saved {
    pub snapshot: SnapshotRecord,
    pub stages: Vec<Stage>,
    /// How long no vCPU ran.
    pub paused: Duration,
    pub(super) hold: Hold,
}

/// A snapshot that is not ready yet.
#[derive(Debug)]
pub(super) struct Making {
    pub(super) record: SnapshotRecord,
    pub(super) layering: Layering,
    /// The machine writes to its next disk layer already.
    pub(super) swapped: bool,
}

// === impl SaveSpec ===

impl SaveSpec {
    pub(super) fn new(kind: SnapshotKind) -> Self {
        Self {
            kind,
            name: None,
            labels: BTreeMap::new(),
            cold: false,
            key: None,
        }
    }

    /// Whether the machine ends with it.
    fn is_last(&self) -> bool {
        matches!(self.kind, SnapshotKind::Pause | SnapshotKind::Template)
    }
}

// === impl Actor ===

impl Actor {
    /// Makes a snapshot of the machine, which runs on afterwards unless it is to
    /// be paused. On an error it runs on, or has been killed.
    pub(super) async fn save(
        &mut self,
        spec: SaveSpec,
        mut watch: Stopwatch,
    ) -> Result<Saved, SaveError> {
        let record = self.draft_record(&spec)?;
        let layering = Layering::above(&self.record.chains, &record.id);
        let hold = self.pool.snapshots.begin(record.clone())?;
        self.making = Some(Making {
            record: record.clone(),
            layering,
            swapped: false,
        });
        let mut changes = vec![Change::PutSnapshot(record)];
        if spec.kind == SnapshotKind::Pause {
            self.record = self.record.apply(Transition::Pause)?;
            changes.push(Change::PutSandbox(self.record.clone()));
        }
        let begun = match self.pool.store.commit(changes).await {
            Ok(()) => {
                self.publish();
                self.save_begun(&spec, &mut watch).await
            }
            Err(error) => Err(error.into()),
        };
        match begun {
            Ok((snapshot, paused)) => Ok(Saved {
                snapshot,
                stages: watch.finish(),
                paused,
                hold,
            }),
            Err(error) => {
                tracing::warn!(sandbox = %self.record.id, %error, "not saved");
                self.unsave().await;
                Err(error)
            }
        }
    }

    fn draft_record(&self, spec: &SaveSpec) -> Result<SnapshotRecord, SaveError> {
        let id = SnapshotId::random().map_err(SaveError::Random)?;
        let layering = Layering::above(&self.record.chains, &id);
        Ok(SnapshotRecord {
            id,
            sequence: self.pool.registry.next_sequence(),
            kind: spec.kind,
            state: SnapshotState::Making,
            name: spec.name.clone(),
            template: self.record.template.clone(),
            base: self.record.base.clone(),
            sandbox: self.is_listed.then(|| self.record.id.clone()),
            chains: layering.chains,
            resources: self.record.resources,
            labels: spec.labels.clone(),
            created_at: UnixMillis::now(),
            cold: spec.cold,
            memory_bytes: 0,
            disk_bytes: 0,
            key: spec.key.clone(),
            stale: false,
        })
    }

    async fn save_begun(
        &mut self,
        spec: &SaveSpec,
        watch: &mut Stopwatch,
    ) -> Result<(SnapshotRecord, Duration), SaveError> {
        self.quiet_down().await?;
        watch.lap("suspend");
        let paused = self.write_snapshot(spec, watch).await?;
        if !spec.is_last() {
            self.go_on().await?;
            watch.lap("continue");
        }
        let snapshot = self.seal(spec).await?;
        watch.lap("sync");
        self.settle(snapshot.clone()).await?;
        watch.lap("record");
        Ok((snapshot, paused))
    }

    /// Opens connections for the clones, and stops the guest's programs.
    async fn quiet_down(&mut self) -> Result<(), SaveError> {
        let (Some(machine), Some(guest)) = (&self.machine, &self.guest) else {
            return Err(SaveError::Ended);
        };
        let open = request::Op::OpenSpares(proto::OpenSpares {
            guest_port: RPC_PORT,
            count: SPARES,
        });
        // The agent accepts them while it is asked to suspend. A clone without any
        // is dialled.
        match machine.control.request(open, &[]).await {
            Ok(_) | Err(RequestError::Refused(_)) => {}
            Err(error) => return Err(refused(error)),
        }
        match timeout(AGENT, guest.suspend()).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(status)) => Err(agent(
                "stop its programs",
                printable(status.message(), MAX_SENTENCE_CHARS),
            )),
            Err(_) => Err(agent("stop its programs", "no answer".to_owned())),
        }
    }

    async fn write_snapshot(
        &mut self,
        spec: &SaveSpec,
        watch: &mut Stopwatch,
    ) -> Result<Duration, SaveError> {
        let (Some(machine), Some(making)) = (&self.machine, &mut self.making) else {
            return Err(SaveError::Ended);
        };
        let folder = self.pool.snapshots.files(&making.record.id);
        let top = self.files.layer(self.record.layer);
        let top = (!making.layering.merge_disk).then_some(top.as_path());
        let draft = folder.begin(top).map_err(files)?;
        let next = self.files.next_layer(self.record.layer + 1);
        let next = next.map_err(files)?;
        let (snapshot, fds) = snapshot_request(&making.layering, &draft, next.as_fd(), spec);
        let asked = machine
            .control
            .request(request::Op::Snapshot(snapshot), &fds);
        let limit = self.pool.config.timeouts.snapshot();
        let Ok(answered) = timeout(limit, asked).await else {
            // Nobody knows what it does, and to what.
            machine.process.kill();
            let error = SaveError::Slow {
                limit_ms: self.pool.config.timeouts.snapshot_ms,
            };
            self.verdict = Some(Failure::new("MONITOR_LOST", error.to_string()));
            return Err(error);
        };
        let snapshotted = match answered.map_err(refused)? {
            reply::Result::Snapshotted(snapshotted) => snapshotted,
            _ => return Err(SaveError::Protocol),
        };
        making.swapped = true;
        for stage in snapshotted.stages {
            let name = format!("snapshot.{}", stage.stage);
            watch.push(&name, Duration::from_nanos(stage.duration_ns));
        }
        watch.lap("snapshot");
        Ok(Duration::from_nanos(snapshotted.paused_ns))
    }

    /// Lets the guest's programs run on. A guest that cannot is of no use.
    pub(super) async fn go_on(&mut self) -> Result<(), SaveError> {
        let (Some(machine), Some(guest)) = (&self.machine, &self.guest) else {
            return Err(SaveError::Ended);
        };
        let message =
            match timeout(AGENT, guest.configure(Identity::Same, self.guest_network())).await {
                Ok(Ok(())) => return Ok(()),
                Ok(Err(status)) => printable(status.message(), MAX_SENTENCE_CHARS),
                Err(_) => "no answer".to_owned(),
            };
        let step = "let its programs run on";
        self.verdict.get_or_insert_with(|| {
            let message = format!("the guest's agent failed to {step}: {message}");
            Failure::new("AGENT_FAILED", message)
        });
        machine.process.kill();
        Err(agent(step, message))
    }

    /// Makes the files durable, under the snapshot's name.
    async fn seal(&self, spec: &SaveSpec) -> Result<SnapshotRecord, SaveError> {
        let Some(making) = &self.making else {
            return Err(SaveError::Ended);
        };
        let mut record = making.record.clone();
        let folder = self.pool.snapshots.files(&record.id);
        let manifest = Manifest::of(&record, &self.pool.facts.cpu_model).to_json();
        let cold = spec.cold;
        let sealed = tokio::task::spawn_blocking(move || folder.seal(&manifest, cold)).await;
        let sizes = sealed
            .unwrap_or_else(|error| Err(io::Error::other(error)))
            .map_err(files)?;
        record.state = SnapshotState::Ready;
        record.memory_bytes = sizes.memory_bytes;
        record.disk_bytes = sizes.disk_bytes;
        Ok(record)
    }

    /// Stores that the snapshot is there and what the sandbox goes on from.
    async fn settle(&mut self, snapshot: SnapshotRecord) -> Result<(), SaveError> {
        let step = match snapshot.kind {
            SnapshotKind::Pause => Transition::Paused {
                saved: snapshot.id.clone(),
                chains: snapshot.chains.clone(),
            },
            // Its sandbox goes with it.
            SnapshotKind::Template => {
                let put = vec![Change::PutSnapshot(snapshot.clone())];
                self.pool.store.commit(put).await?;
                self.making = None;
                self.pool.snapshots.put(snapshot);
                return Ok(());
            }
            _ => Transition::Saved {
                disk_chain: snapshot.chains.disk.clone(),
            },
        };
        let record = self.record.apply(step)?;
        let changes = vec![
            Change::PutSnapshot(snapshot.clone()),
            Change::PutSandbox(record.clone()),
        ];
        self.pool.store.commit(changes).await?;
        self.record = record;
        self.making = None;
        if self.record.state == State::Running {
            self.publish();
        }
        self.pool.snapshots.put(snapshot);
        // The snapshot has it under another name.
        let but = (self.record.state == State::Running).then_some(self.record.layer);
        if let Err(error) = self.files.remove_layers(but) {
            tracing::warn!(sandbox = %self.record.id, %error, "an old layer stays");
        }
        Ok(())
    }

    /// After a snapshot that did not come to be: lets the machine run on, and keeps
    /// of the snapshot what the machine needs.
    async fn unsave(&mut self) {
        let over = self
            .machine
            .as_ref()
            .is_none_or(super::machine::Machine::is_over);
        if over || !self.is_listed {
            // What is left is taken down with the sandbox.
            return;
        }
        let pausing = self.record.state == State::Pausing;
        let mut changes = match self.making.take() {
            Some(making) if making.swapped => self.keep_layer(making).await,
            Some(making) => self.forget_making(making),
            None => Vec::new(),
        };
        self.run_on().await;
        if pausing && let Ok(running) = self.record.apply(Transition::Continue) {
            self.record = running;
        }
        // Last: a daemon that finds it unfinished has it run on, too.
        changes.push(Change::PutSandbox(self.record.clone()));
        if let Err(error) = self.pool.store.commit(changes).await {
            tracing::error!(sandbox = %self.record.id, %error, "that it was not saved is not on disk; the next start of soulboxd will see to that");
        }
        self.publish();
    }

    /// Has machine and programs run on, wherever a snapshot has stopped them. What
    /// does not go on is killed.
    pub(super) async fn run_on(&mut self) {
        if let Some(machine) = &self.machine {
            // One that runs answers that it does.
            let resume = request::Op::Resume(proto::Resume {});
            if let Err(error) = machine.control.request(resume, &[]).await {
                tracing::debug!(sandbox = %self.record.id, %error, "not resumed");
            }
        }
        if let Err(error) = self.go_on().await {
            tracing::warn!(sandbox = %self.record.id, %error, "given up");
        }
    }

    /// Makes a layer of a snapshot that failed after the machine had changed to
    /// its next one. The changes are to be stored.
    pub(super) async fn keep_layer(&mut self, making: Making) -> Vec<Change> {
        let folder = self.pool.snapshots.files(&making.record.id);
        let kept = tokio::task::spawn_blocking(move || folder.keep_layer()).await;
        let disk_bytes = match kept.unwrap_or_else(|error| Err(io::Error::other(error))) {
            Ok(disk_bytes) => disk_bytes,
            Err(error) => {
                tracing::error!(sandbox = %self.record.id, %error, "a disk layer is not in its place; the next start of soulboxd will see to that");
                0
            }
        };
        let mut layer = making.record.into_layer();
        layer.disk_bytes = disk_bytes;
        let saved = Transition::Saved {
            disk_chain: making.layering.chains.disk,
        };
        if let Ok(record) = self.record.apply(saved) {
            self.record = record;
        }
        self.publish();
        self.pool.snapshots.put(layer.clone());
        if let Err(error) = self.files.remove_layers(Some(self.record.layer)) {
            tracing::warn!(sandbox = %self.record.id, %error, "an old layer stays");
        }
        vec![Change::PutSnapshot(layer)]
    }

    /// Removes what there is of a snapshot that nothing needs. The changes are to
    /// be stored.
    pub(super) fn forget_making(&self, making: Making) -> Vec<Change> {
        let id = making.record.id;
        if let Err(error) = self.pool.snapshots.files(&id).remove() {
            tracing::error!(snapshot = %id, %error, "files are left over until the next start");
        }
        if let Err(error) = self.files.remove_layers(Some(self.record.layer)) {
            tracing::debug!(sandbox = %self.record.id, %error, "a layer that was to be the next stays");
        }
        self.pool.snapshots.remove(&id);
        vec![Change::RemoveSnapshot(id)]
    }
}

fn snapshot_request<'fd>(
    layering: &Layering,
    draft: &'fd Draft,
    next_layer: BorrowedFd<'fd>,
    spec: &SaveSpec,
) -> (proto::Snapshot, Vec<BorrowedFd<'fd>>) {
    let mut fds = vec![draft.state.as_fd(), draft.memory.as_fd(), next_layer];
    let merged_layer_fd = draft.merged.as_ref().map(|merged| {
        fds.push(merged.as_fd());
        3
    });
    let keep = layering.chains.disk.len().saturating_sub(1);
    let snapshot = proto::Snapshot {
        state_fd: 0,
        memory_fd: 1,
        keep_memory_layers: layering.keep_memory,
        disks: vec![proto::SnapshotDisk {
            next_layer_fd: Some(2),
            merged_layer_fd,
            keep: u32::try_from(keep).unwrap_or(u32::MAX),
        }],
        leave_paused: spec.is_last(),
    };
    (snapshot, fds)
}

fn refused(error: RequestError) -> SaveError {
    match error {
        RequestError::Refused(error) if error.code() == Code::DiskFull => SaveError::DiskFull,
        RequestError::Refused(error) => SaveError::Refused {
            code: error.code(),
            message: error.message,
        },
        RequestError::Closed | RequestError::Send(_) => SaveError::Ended,
    }
}

pub(super) fn files(source: io::Error) -> SaveError {
    match source.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => SaveError::DiskFull,
        _ => SaveError::Files { source },
    }
}

fn agent(step: &'static str, message: String) -> SaveError {
    SaveError::Agent { step, message }
}
