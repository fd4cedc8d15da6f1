//! A snapshot of a machine that goes on.

use std::fs::File;
use std::io;
use std::sync::Arc;
use std::time::Instant;

use soulbox_proto::vmm::v1;

use super::state::{MachineState, MemoryState, NamedDevice, VmState};
use super::{Machine, Stopwatch, cpu_profile, kvm};
use crate::bus::lock;
use crate::clock::monotonic_ns;
use crate::devices::Chip;
use crate::devices::virtio::block::{Block, Freeze, FreezeError};
use crate::memory::pagemap::PagemapError;
use crate::memory::{self, runs};
use crate::snapshot::{self, SnapshotError};
use crate::vcpu::{Answer, VcpuGone, state};

/// Where a snapshot goes, and what it builds on.
#[derive(Debug)]
pub struct SnapshotFiles {
    /// Empty.
    pub state: File,
    /// Empty.
    pub memory: File,
    pub keep_memory_layers: u32,
    /// One for each disk.
    pub disks: Vec<Freeze>,
    pub leave_paused: bool,
}

/// Why there is no snapshot. The machine goes on as it was.
#[derive(Debug, thiserror::Error)]
pub enum SaveError {
    #[error("the machine is paused already; send Resume first")]
    Paused,
    #[error("the machine has no pagemap; send pagemap_fd with Boot or Restore")]
    NoPagemap,
    #[error("{0}")]
    Request(String),
    #[error(transparent)]
    VcpuGone(#[from] VcpuGone),
    #[error(transparent)]
    Kvm(#[from] kvm::KvmError),
    #[error(transparent)]
    Pagemap(#[from] PagemapError),
    #[error("memory could not be written to the snapshot")]
    Memory(#[source] io::Error),
    #[error(transparent)]
    Disk(#[from] FreezeError),
    #[error(transparent)]
    State(#[from] SnapshotError),
}

impl Machine {
    /// Saves the machine. It stands still from here until the last of its files
    /// is written, or until [`Machine::resume`].
    pub fn snapshot(&mut self, files: SnapshotFiles) -> Result<v1::Snapshotted, SaveError> {
        self.check_request(&files)?;
        let mut stages = Stopwatch::start();
        let stopped = Instant::now();
        let leave_paused = files.leave_paused;
        if let Err(error) = self.pause() {
            // The devices have not been paused.
            self.resume_vcpus();
            return Err(error.into());
        }
        stages.mark("pause");
        match self.save(files, &mut stages) {
            Ok(mut snapshotted) => {
                if !leave_paused {
                    self.resume();
                    stages.mark("resume");
                }
                snapshotted.paused_ns = stopped.elapsed().as_nanos() as u64;
                snapshotted.stages = stages.into_stages();
                Ok(snapshotted)
            }
            Err(error) => {
                self.with_disks(Block::abandon_freeze);
                self.resume();
                Err(error)
            }
        }
    }

    /// Has a paused machine go on. Returns CLOCK_MONOTONIC, in nanoseconds.
    pub fn resume(&mut self) -> u64 {
        for slot in &self.devices {
            lock(&slot.device).resume();
        }
        let started_at_ns = monotonic_ns();
        self.resume_vcpus();
        started_at_ns
    }

    fn resume_vcpus(&mut self) {
        for vcpu in &self.vcpus {
            vcpu.resume();
        }
        self.paused = false;
    }

    pub fn is_paused(&self) -> bool {
        self.paused
    }

    fn check_request(&self, files: &SnapshotFiles) -> Result<(), SaveError> {
        if self.paused {
            return Err(SaveError::Paused);
        }
        let (keep, layers) = (files.keep_memory_layers, self.mapped.layers);
        if keep > layers || (keep == 0 && layers > 0) {
            return Err(SaveError::Request(format!(
                "keep_memory_layers is {keep} of {layers}; keep the root and at most all"
            )));
        }
        let disks = usize::from(self.shape.block_devices);
        if files.disks.len() != disks {
            let sent = files.disks.len();
            return Err(SaveError::Request(format!(
                "{sent} disks were sent for {disks}"
            )));
        }
        Ok(())
    }

    fn pause(&mut self) -> Result<(), VcpuGone> {
        self.paused = true;
        // All are asked before any is waited for.
        let pausing: Vec<_> = self
            .vcpus
            .iter()
            .map(crate::vcpu::VcpuThread::ask_to_pause)
            .collect::<Result<_, _>>()?;
        for vcpu in pausing {
            vcpu.wait()?;
        }
        for slot in &self.devices {
            lock(&slot.device).pause();
        }
        Ok(())
    }

    /// All that can fail comes before disks change their layers.
    fn save(
        &mut self,
        files: SnapshotFiles,
        stages: &mut Stopwatch,
    ) -> Result<v1::Snapshotted, SaveError> {
        let saving: Vec<_> = self
            .vcpus
            .iter()
            .map(|vcpu| {
                let (msr_indices, xsave_words) = (Arc::clone(&self.msr_indices), self.xsave_words);
                vcpu.call(move |fd| state::save(fd, &msr_indices, xsave_words))
            })
            .collect::<Result<_, _>>()?;
        let vcpus = saving
            .into_iter()
            .map(Answer::wait)
            .collect::<Result<Result<Vec<_>, _>, _>>()??;
        let vm = VmState::save(&self.vm)?;
        let devices = self.devices.iter().map(|slot| NamedDevice {
            name: slot.name.clone(),
            state: lock(&slot.device).save(),
        });
        let devices = devices.collect();
        stages.mark("state");

        let keep = files.keep_memory_layers;
        let pagemap = self.pagemap.as_ref().ok_or(SaveError::NoPagemap)?;
        let dirty = pagemap.private(&self.memory)?;
        let (written, runs) = if self.mapped.layers == 0 {
            // The new layer is the root, which everything is in.
            (dirty, Vec::new())
        } else {
            let written = runs::to_write(&self.mapped.runs, &dirty, keep);
            let runs = runs::overlay(&self.mapped.runs, &written, keep);
            (written, runs)
        };
        stages.mark("find");
        let write = match self.mapped.layers {
            0 => memory::write_root,
            _ => memory::write_layer,
        };
        let memory_bytes =
            write(&self.memory, &written, &files.memory).map_err(SaveError::Memory)?;
        stages.mark("memory");

        let mut disk_layers = Vec::new();
        let mut freezes = files.disks.into_iter();
        for slot in &self.devices {
            if let Chip::Disk(disk) = lock(&slot.device).chip()
                && let Some(freeze) = freezes.next()
            {
                let frozen = disk.frozen_layers();
                let kept = freeze.merge.as_ref().map_or(frozen, |merge| merge.keep);
                disk_layers.push((kept + usize::from(disk.is_writable())) as u32);
                disk.prepare_freeze(freeze)?;
            }
        }
        stages.mark("disks");

        let state = MachineState {
            shape: self.shape.save(),
            cpu: cpu_profile(&self.cpuid),
            memory: MemoryState {
                layers: keep + 1,
                runs,
            },
            disk_layers,
            vm,
            vcpus,
            devices,
        };
        snapshot::write(&files.state, &state)?;
        self.with_disks(Block::commit_freeze);
        stages.mark("write");
        Ok(v1::Snapshotted {
            memory_bytes,
            memory_layers: state.memory.layers,
            memory_runs: state.memory.runs.len() as u32,
            ..Default::default()
        })
    }

    fn with_disks(&self, mut f: impl FnMut(&mut Block)) {
        for slot in &self.devices {
            if let Chip::Disk(disk) = lock(&slot.device).chip() {
                f(disk);
            }
        }
    }
}

// === impl SaveError ===

impl SaveError {
    /// What the control protocol calls it.
    pub fn code(&self) -> v1::error::Code {
        use v1::error::Code;
        if self.disk_is_full() {
            return Code::DiskFull;
        }
        match self {
            Self::Paused | Self::NoPagemap | Self::VcpuGone(_) => Code::WrongState,
            Self::Request(_) | Self::Disk(FreezeError::Request(_)) => Code::Invalid,
            Self::Kvm(_) => Code::Kvm,
            Self::Memory(_) => Code::Memory,
            Self::Disk(_) => Code::Disk,
            Self::Pagemap(_) | Self::State(_) => Code::Host,
        }
    }

    fn disk_is_full(&self) -> bool {
        use crate::devices::virtio::block::LayerError;
        let error = match self {
            Self::Memory(error)
            | Self::Disk(FreezeError::Io(error) | FreezeError::Layer(LayerError::Io(error)))
            | Self::State(SnapshotError::Io(error)) => error,
            _ => return false,
        };
        matches!(
            error.kind(),
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded
        )
    }
}
