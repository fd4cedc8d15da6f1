//! From a snapshot to a guest that has run a program.

use std::fs::File;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use soulbox_proto::guest::RPC_PORT;
use soulbox_proto::vmm::v1::{self as proto, reply, request};
use tokio::time::timeout;

use super::actor::Actor;
use super::error::{RestoreError, StartError};
use super::files::BootFiles;
use super::launch::{Launched, Wanted};
use super::pool::Pool;
use crate::guest::{Guest, Identity};
use crate::id::SnapshotId;
use crate::kvm::UsableKvm;
use crate::monitor::RequestError;
use crate::record::{Chains, SandboxRecord, SnapshotRecord};
use crate::snapshot::{Hold, LayerError};
use crate::store::Change;
use crate::time::Stopwatch;

/// What a machine is restored from. Its files stay as long as it does.
#[derive(Debug, Clone)]
pub(super) struct Plan {
    pub(super) snapshot: SnapshotId,
    pub(super) chains: Chains,
    /// What the guest touches is to be recorded.
    pub(super) records: bool,
    rootfs: Arc<File>,
    _hold: Arc<Hold>,
}

#[derive(Debug)]
pub(super) struct RestoreFiles {
    state: File,
    memory: Vec<File>,
    disk: Vec<File>,
    /// That of the root: what is touched first is much the same in all that build
    /// on it.
    working_set: Option<File>,
}

// === impl Plan ===

impl Plan {
    /// `rootfs` is the image that the snapshot's disk lies on.
    pub(super) fn new(snapshot: &SnapshotRecord, hold: Hold, rootfs: File) -> Self {
        Self {
            snapshot: snapshot.id.clone(),
            chains: snapshot.chains.clone(),
            records: false,
            rootfs: Arc::new(rootfs),
            _hold: Arc::new(hold),
        }
    }
}

// === impl Pool ===

impl Pool {
    /// To make a sandbox from `snapshot`, or to take one back to it.
    pub(super) fn plan(&self, snapshot: &SnapshotRecord, hold: Hold) -> Result<Plan, RestoreError> {
        let template = self.templates.open(&snapshot.template)?;
        if template.manifest.rootfs.sha256 != snapshot.base.rootfs_sha256 {
            return Err(RestoreError::OtherDisk {
                snapshot: snapshot.id.clone(),
                template: snapshot.template.clone(),
            });
        }
        Ok(Plan::new(snapshot, hold, template.rootfs))
    }

    /// To go on with a sandbox that was saved.
    pub(super) fn plan_to_resume(&self, record: &SandboxRecord) -> Result<Plan, RestoreError> {
        let saved = record.saved.as_ref();
        let found = saved.and_then(|id| self.snapshots.take(id));
        let (snapshot, hold) = found.ok_or_else(|| RestoreError::Gone {
            sandbox: record.id.clone(),
        })?;
        self.plan(&snapshot, hold)
    }

    /// Opens every file of a snapshot, before anything is started with it.
    pub(super) async fn open_layers(&self, plan: &Plan) -> Result<RestoreFiles, RestoreError> {
        let failed = |layer: &SnapshotId, error| RestoreError::Layer {
            snapshot: plan.snapshot.clone(),
            layer: layer.clone(),
            error,
        };
        let state = self.snapshots.files(&plan.snapshot).open_state();
        let state = state.map_err(|error| failed(&plan.snapshot, error))?;
        let mut memory = Vec::new();
        for id in &plan.chains.memory {
            let (file, thawed) = self
                .snapshots
                .open_memory(id)
                .await
                .map_err(|error| failed(id, error))?;
            memory.push(file);
            if let Some(record) = thawed
                && let Err(error) = self.store.commit(vec![Change::PutSnapshot(record)]).await
            {
                tracing::warn!(snapshot = %id, %error, "that it is unpacked is not on disk");
            }
        }
        let disk = plan.chains.disk.iter().map(|id| {
            let opened: Result<File, LayerError> = self.snapshots.files(id).open_disk();
            opened.map_err(|error| failed(id, error))
        });
        let root = plan.chains.memory.first().filter(|_| !plan.records);
        let working_set = root.and_then(|id| self.snapshots.files(id).open_working_set());
        Ok(RestoreFiles {
            state,
            memory,
            working_set,
            disk: disk.collect::<Result<_, _>>()?,
        })
    }
}

// === impl Actor ===

impl Actor {
    /// On an error, or when this is dropped, what exists of the machine is in
    /// `self`. The sandbox's folder must hold nothing that is still wanted.
    pub(super) async fn restore(
        &mut self,
        plan: &Plan,
        identity: Identity<'_>,
        watch: &mut Stopwatch,
    ) -> Result<(), StartError> {
        let layers = self.pool.open_layers(plan).await?;
        self.restore_layers(plan, layers, identity, watch).await
    }

    /// As [`Self::restore`], with the layers open.
    pub(super) async fn restore_layers(
        &mut self,
        plan: &Plan,
        layers: RestoreFiles,
        identity: Identity<'_>,
        watch: &mut Stopwatch,
    ) -> Result<(), StartError> {
        let files = if identity == Identity::Resumed {
            self.files.renew(self.record.layer)?
        } else {
            self.files.create(self.record.layer)?
        };
        watch.lap("prepare");
        if self.attach().await? {
            watch.lap("network");
        }

        let launched = self.launch(Wanted::Shell, watch)?;
        // The monitor's log tells whose it is, so that nothing is lost when the
        // daemon dies before this is on disk.
        let noted = self.note();
        let limit = self.pool.config.timeouts.boot();
        let restoring = self.restore_machine(plan, &layers, &files, &launched, watch);
        let restored = timeout(limit, restoring).await;
        let spares = restored.map_err(|_| RestoreError::Slow {
            snapshot: plan.snapshot.clone(),
            limit_ms: self.pool.config.timeouts.boot_ms,
        })??;
        self.hand_over_tap();
        self.publish();
        watch.lap("restore");

        let guest = Guest::restored(&self.files.vsock_socket(), spares);
        // Asked for at once: the agent, suspended as it was saved, starts no program
        // before it has its identity.
        let network = self.guest_network();
        let contract = async {
            guest.configure(identity, network).await?;
            watch.lap("contract");
            Ok(())
        };
        let both = async { tokio::try_join!(contract, guest.prove_exec()).map(drop) };
        let step = "take its identity and the time, and run /bin/true";
        self.ask(step, both).await?;
        watch.lap("first_exec");
        noted.await?;
        self.guest = Some(guest);
        Ok(())
    }

    /// Hands the monitor its machine; returns the connections that its guest has
    /// accepted already.
    async fn restore_machine(
        &self,
        plan: &Plan,
        layers: &RestoreFiles,
        files: &BootFiles,
        launched: &Launched,
        watch: &mut Stopwatch,
    ) -> Result<Vec<OwnedFd>, StartError> {
        let kvm = if launched.is_shell {
            None
        } else {
            Some(self.pool.kvm.get().map_err(|error| StartError::Refused {
                code: proto::error::Code::Kvm,
                message: error.to_string(),
            })?)
        };
        let (restore, fds) = self.restore_request(plan, layers, files, launched, kvm.as_ref());
        let Some(machine) = &self.machine else {
            return Err(StartError::Protocol);
        };
        let answered = machine
            .control
            .exchange(request::Op::Restore(restore), &fds)
            .await;
        let (restored, spares) = match answered {
            Ok((reply::Result::Restored(restored), spares)) => (restored, spares),
            Ok(_) => return Err(StartError::Protocol),
            Err(RequestError::Refused(error)) => {
                return Err(RestoreError::Refused {
                    snapshot: plan.snapshot.clone(),
                    code: error.code(),
                    message: error.message,
                }
                .into());
            }
            Err(RequestError::Closed | RequestError::Send(_)) => {
                return Err(StartError::Gone);
            }
        };
        for stage in restored.stages {
            let name = format!("restore.{}", stage.stage);
            watch.push(&name, Duration::from_nanos(stage.duration_ns));
        }
        let ports = restored.spare_ports.into_iter();
        Ok(ports
            .zip(spares)
            .filter(|(port, _)| *port == RPC_PORT)
            .map(|(_, spare)| spare)
            .collect())
    }

    fn restore_request<'fd>(
        &'fd self,
        plan: &'fd Plan,
        layers: &'fd RestoreFiles,
        files: &'fd BootFiles,
        launched: &'fd Launched,
        kvm: Option<&'fd UsableKvm>,
    ) -> (proto::Restore, Vec<BorrowedFd<'fd>>) {
        let mut fds = Vec::new();
        let mut attach = |fd: BorrowedFd<'fd>| {
            fds.push(fd);
            u32::try_from(fds.len() - 1).unwrap_or(u32::MAX)
        };
        let first_layer = plan.chains.memory.first();
        let first_layer_prepared =
            first_layer.is_some() && launched.first_layer.as_ref() == first_layer && !plan.records;
        let memory = layers.memory.iter().skip(first_layer_prepared.into());
        // Upper layers lie over what was filled in of the first.
        let working_set = match (first_layer_prepared, layers.memory.len()) {
            (true, 1) => None,
            _ => layers.working_set.as_ref(),
        };
        let restore = proto::Restore {
            kvm_fd: kvm.map(|kvm| attach(kvm.device.as_fd())),
            state_fd: attach(layers.state.as_fd()),
            memory_fds: memory.map(|fd| attach(fd.as_fd())).collect(),
            first_layer_prepared,
            disks: vec![proto::RestoreDisk {
                base_fd: attach(plan.rootfs.as_fd()),
                frozen_layer_fds: layers.disk.iter().map(|fd| attach(fd.as_fd())).collect(),
                layer_fd: Some(attach(files.layer.as_fd())),
                rate_limit: None,
            }],
            vsock_listener_fd: Some(attach(files.vsock_listener.as_fd())),
            console_fd: None,
            control_listener_fd: Some(attach(files.control_listener.as_fd())),
            pagemap_fd: launched.pagemap.as_ref().map(|fd| attach(fd.as_fd())),
            working_set_fd: working_set.map(|fd| attach(fd.as_fd())),
            net: Some(self.net_device(&mut attach)),
            record_working_set: plan.records,
        };
        (restore, fds)
    }
}
