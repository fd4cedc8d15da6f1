//! Shells, restores and snapshots.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;

use soulbox_proto::vmm::v1;

use super::{Attached, ConfigError, Fds, RateLimit, checked_shape, invalid};
use crate::devices::virtio::block::{Freeze, Merge};
use crate::devices::virtio::net::NetConfig;
use crate::machine::{Shape, SnapshotFiles};
use crate::memory::working_set::Ahead;

/// A shell to be made.
#[derive(Debug)]
pub struct PrepareRequest {
    pub shape: Shape,
    pub kvm: OwnedFd,
    pub memory: Option<PreparedMemory>,
}

/// The first memory layer of what the shell is for.
#[derive(Debug)]
pub struct PreparedMemory {
    pub layer: File,
    pub working_set: Option<File>,
}

/// A snapshot and everything its machine may touch.
#[derive(Debug)]
pub struct RestoreRequest {
    /// None when there is to be a shell.
    pub kvm: Option<OwnedFd>,
    pub state: File,
    /// Memory layers, root first; without the root where that is prepared.
    pub memory: Vec<File>,
    pub first_layer_prepared: bool,
    pub attached: Attached,
    pub ahead: Ahead,
    pub disks: Vec<RestoreDisk>,
    pub vsock_listener: Option<UnixListener>,
    pub net: Option<NetConfig>,
}

#[derive(Debug)]
pub struct RestoreDisk {
    pub base: File,
    /// Root first.
    pub frozen: Vec<File>,
    pub layer: Option<File>,
    pub rate_limit: RateLimit,
}

// === impl PrepareRequest ===

impl PrepareRequest {
    pub fn from_message(prepare: v1::Prepare, fds: Vec<OwnedFd>) -> Result<Self, ConfigError> {
        let shape = prepare
            .shape
            .ok_or_else(|| invalid("shape", "is missing"))?;
        let shape = checked_shape(&shape)?;
        let mut fds = Fds::new(fds);
        let kvm = fds.take("kvm_fd", prepare.kvm_fd)?;
        let layer = fds.take_optional("memory_fd", prepare.memory_fd)?;
        let working_set = fds.take_optional("working_set_fd", prepare.working_set_fd)?;
        if layer.is_none() && working_set.is_some() {
            let why = "is of no use without memory_fd; send both";
            return Err(invalid("working_set_fd", why));
        }
        let memory = layer.map(|layer| PreparedMemory {
            layer: layer.into(),
            working_set: working_set.map(File::from),
        });
        fds.finish()?;
        Ok(Self { shape, kvm, memory })
    }
}

// === impl RestoreRequest ===

impl RestoreRequest {
    pub fn from_message(restore: v1::Restore, fds: Vec<OwnedFd>) -> Result<Self, ConfigError> {
        let mut fds = Fds::new(fds);
        let request = Self {
            kvm: fds.take_optional("kvm_fd", restore.kvm_fd)?,
            state: fds.take("state_fd", restore.state_fd)?.into(),
            memory: files(&mut fds, "memory_fds", &restore.memory_fds)?,
            first_layer_prepared: restore.first_layer_prepared,
            attached: Attached::take(
                &mut fds,
                restore.console_fd,
                restore.control_listener_fd,
                restore.pagemap_fd,
            )?,
            ahead: ahead(&restore, &mut fds)?,
            disks: restore
                .disks
                .into_iter()
                .map(|disk| RestoreDisk::from_message(&disk, &mut fds))
                .collect::<Result<_, _>>()?,
            vsock_listener: fds
                .take_optional("vsock_listener_fd", restore.vsock_listener_fd)?
                .map(UnixListener::from),
            net: restore
                .net
                .map(|net| NetConfig::from_message(net, &mut fds))
                .transpose()?,
        };
        fds.finish()?;
        Ok(request)
    }
}

// === impl RestoreDisk ===

impl RestoreDisk {
    fn from_message(disk: &v1::RestoreDisk, fds: &mut Fds) -> Result<Self, ConfigError> {
        Ok(Self {
            base: fds.take("disks.base_fd", disk.base_fd)?.into(),
            frozen: files(fds, "disks.frozen_layer_fds", &disk.frozen_layer_fds)?,
            layer: fds
                .take_optional("disks.layer_fd", disk.layer_fd)?
                .map(File::from),
            rate_limit: RateLimit::from_message("disks.rate_limit", disk.rate_limit)?,
        })
    }
}

/// The files of a Snapshot, and what is to become of the machine.
pub fn snapshot_files(
    snapshot: &v1::Snapshot,
    fds: Vec<OwnedFd>,
) -> Result<SnapshotFiles, ConfigError> {
    let mut fds = Fds::new(fds);
    let files = SnapshotFiles {
        state: fds.take("state_fd", snapshot.state_fd)?.into(),
        memory: fds.take("memory_fd", snapshot.memory_fd)?.into(),
        keep_memory_layers: snapshot.keep_memory_layers,
        disks: snapshot
            .disks
            .iter()
            .map(|disk| freeze(disk, &mut fds))
            .collect::<Result<_, _>>()?,
        leave_paused: snapshot.leave_paused,
    };
    fds.finish()?;
    Ok(files)
}

/// The file of a RecordWorkingSet.
pub fn working_set_file(
    record: &v1::RecordWorkingSet,
    fds: Vec<OwnedFd>,
) -> Result<File, ConfigError> {
    let mut fds = Fds::new(fds);
    let file = fds.take("file_fd", record.file_fd)?;
    fds.finish()?;
    Ok(file.into())
}

fn ahead(restore: &v1::Restore, fds: &mut Fds) -> Result<Ahead, ConfigError> {
    let working_set = fds.take_optional("working_set_fd", restore.working_set_fd)?;
    match (working_set, restore.record_working_set) {
        (Some(_), true) => Err(invalid(
            "record_working_set",
            "is of no use with working_set_fd; send one of them",
        )),
        (Some(file), false) => Ok(Ahead::FillIn(file.into())),
        (None, true) => Ok(Ahead::Record),
        (None, false) => Ok(Ahead::Nothing),
    }
}

fn freeze(disk: &v1::SnapshotDisk, fds: &mut Fds) -> Result<Freeze, ConfigError> {
    let merged = fds.take_optional("disks.merged_layer_fd", disk.merged_layer_fd)?;
    Ok(Freeze {
        next: fds
            .take_optional("disks.next_layer_fd", disk.next_layer_fd)?
            .map(File::from),
        merge: merged.map(|file| Merge {
            file: file.into(),
            keep: disk.keep as usize,
        }),
    })
}

fn files(fds: &mut Fds, field: &'static str, indices: &[u32]) -> Result<Vec<File>, ConfigError> {
    indices
        .iter()
        .map(|&index| fds.take(field, index).map(File::from))
        .collect()
}
