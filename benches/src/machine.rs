//! Monitors with tiny guests, in the steps that the benches time.

use std::io::PipeReader;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use soulbox_proto::vmm::v1::{self, reply::Result as Reply, request::Op};
use soulbox_vmm::testing::{BootSpec, Monitor, RestoreSpec, kvm};
use tempfile::TempDir;

use crate::clock::now_ns;
use crate::guest;

/// How long a process may take to go.
const PATIENCE: Duration = Duration::from_secs(60);

/// A snapshot of a tiny guest, whose copies go on at once.
pub(crate) struct Snapshot {
    folder: TempDir,
    memory_mib: u32,
    /// It has a network device.
    net: bool,
}

/// When a machine ran.
#[derive(Clone, Debug)]
pub(crate) struct Started {
    /// The request was sent here, with its descriptors open already.
    pub(crate) sent_ns: u64,
    /// Its first KVM_RUN, by the monitor's word.
    pub(crate) kvm_run_ns: u64,
    /// The guest's byte was read here.
    pub(crate) byte_ns: u64,
    stages: Vec<v1::StageTime>,
}

// === impl Started ===

impl Started {
    /// The monitor's own, in milliseconds.
    pub(crate) fn stages(&self) -> impl Iterator<Item = (&str, f64)> {
        self.stages
            .iter()
            .map(|stage| (stage.stage.as_str(), stage.duration_ns as f64 / 1e6))
    }
}

/// Boots a guest that dirties `dirty_mib` and waits until it has.
pub(crate) fn boot(monitor: &mut Monitor, dirty_mib: u32) -> Result<Started> {
    let kernel = guest::image(dirty_mib);
    let spec = BootSpec::new(1, guest::memory_mib(dirty_mib), &kernel)?;
    boot_as(monitor, spec)
}

fn boot_as(monitor: &mut Monitor, spec: BootSpec) -> Result<Started> {
    let (spec, mut console) = spec.with_pagemap(monitor)?.with_console()?;
    let sent_ns = now_ns();
    let id = monitor.control().post(Op::Boot(spec.boot), &spec.fds)?;
    // The monitor has its own copies; without ours the pipe ends with it.
    drop(spec.fds);
    guest::await_byte(&mut console, guest::READY, 1)?;
    let byte_ns = now_ns();
    match monitor.control().reply_to(id)?.0 {
        Reply::Booted(booted) => Ok(Started {
            sent_ns,
            kvm_run_ns: booted.started_at_ns,
            byte_ns,
            stages: booted.stages,
        }),
        other => bail!("Boot was answered with {other:?}"),
    }
}

/// Makes a shell of the shape that tiny guests have.
pub(crate) fn prepare(program: &Path, memory_mib: u32) -> Result<Monitor> {
    prepare_as(program, memory_mib, false)
}

fn prepare_as(program: &Path, memory_mib: u32, net: bool) -> Result<Monitor> {
    let mut monitor = spawn(program)?;
    monitor.control().prepare(v1::MachineShape {
        vcpu_count: 1,
        memory_mib,
        block_devices: 0,
        vsock: false,
        net,
    })?;
    Ok(monitor)
}

pub(crate) fn spawn(program: &Path) -> Result<Monitor> {
    Monitor::spawn(program).context("starting the monitor")
}

/// Waits until a process has ended: its descriptors are closed and its memory is
/// free. It is still to be reaped.
pub(crate) fn await_end(monitor: &Monitor) -> Result<()> {
    let pid = Pid::from_raw(monitor.pid() as i32).context("a monitor without a pid")?;
    let pidfd = pidfd_open(pid, PidfdFlags::empty())?;
    let timeout = Timespec {
        tv_sec: PATIENCE.as_secs() as i64,
        tv_nsec: 0,
    };
    let ended = poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], Some(&timeout))?;
    ensure!(ended == 1, "a monitor does not end");
    Ok(())
}

/// Tells a monitor to stop its machine, and waits until it is gone.
pub(crate) fn shut_down(monitor: &mut Monitor) -> Result<()> {
    let reply = monitor
        .control()
        .request(Op::Shutdown(v1::Shutdown {}), &[])?;
    ensure!(matches!(reply, Reply::ShuttingDown(_)), "{reply:?}");
    await_end(monitor)
}

// === impl Snapshot ===

impl Snapshot {
    /// Snapshots a guest that has said READY. Its copies are let go; it is not.
    pub(crate) fn take(
        monitor: &mut Monitor,
        dirty_mib: u32,
        folder: TempDir,
        leave_paused: bool,
    ) -> Result<(Self, v1::Snapshotted)> {
        let new = |name| -> Result<OwnedFd> {
            let path = folder.path().join(name);
            let file = std::fs::File::create_new(&path)
                .with_context(|| format!("creating {}", path.display()))?;
            Ok(file.into())
        };
        let snapshot = v1::Snapshot {
            state_fd: 0,
            memory_fd: 1,
            keep_memory_layers: 0,
            disks: Vec::new(),
            leave_paused,
        };
        let fds = [new("snapshot")?, new("memory")?];
        let snapshotted = match monitor.control().request(Op::Snapshot(snapshot), &fds)? {
            Reply::Snapshotted(snapshotted) => snapshotted,
            other => bail!("Snapshot was answered with {other:?}"),
        };
        guest::let_go(&folder.path().join("memory"))?;
        let snapshot = Self {
            folder,
            memory_mib: guest::memory_mib(dirty_mib),
            net: false,
        };
        Ok((snapshot, snapshotted))
    }

    /// Boots a guest, snapshots it and ends it.
    pub(crate) fn of_new_guest(program: &Path, dirty_mib: u32, folder: TempDir) -> Result<Self> {
        let mut parent = spawn(program)?;
        boot(&mut parent, dirty_mib)?;
        Ok(Self::take(&mut parent, dirty_mib, folder, true)?.0)
    }

    /// The same with a network device, which a driver uses: a copy has its TAP set up
    /// as that of a sandbox has.
    pub(crate) fn of_new_guest_with_net(program: &Path, folder: TempDir) -> Result<Self> {
        let mut parent = spawn(program)?;
        let kernel = guest::image(0);
        let spec = BootSpec::new(1, guest::memory_mib(0), &kernel)?.with_net(None);
        boot_as(&mut parent, spec)?;
        let (mut snapshot, _) = Self::take(&mut parent, 0, folder, true)?;
        guest::drive_net(&snapshot.folder.path().join("snapshot"))?;
        snapshot.net = true;
        Ok(snapshot)
    }

    pub(crate) fn memory_mib(&self) -> u32 {
        self.memory_mib
    }

    /// Makes a shell of its shape.
    pub(crate) fn prepare(&self, program: &Path) -> Result<Monitor> {
        prepare_as(program, self.memory_mib, self.net)
    }

    /// Restores a copy and waits until it runs.
    pub(crate) fn restore(&self, monitor: &mut Monitor, shell: bool) -> Result<Started> {
        self.restore_on(monitor, shell, None)
    }

    /// The same, its network device on a TAP.
    pub(crate) fn restore_on(
        &self,
        monitor: &mut Monitor,
        shell: bool,
        tap: Option<OwnedFd>,
    ) -> Result<Started> {
        let (mut console, writer) = std::io::pipe()?;
        let mut spec = self.spec(monitor, shell, writer.into())?;
        if self.net {
            spec = spec.with_net(tap);
        }
        let sent_ns = now_ns();
        let id = monitor
            .control()
            .post(Op::Restore(spec.restore), &spec.fds)?;
        drop(spec.fds);
        guest::await_byte(&mut console, guest::RESTORED, 1)?;
        let byte_ns = now_ns();
        match monitor.control().reply_to(id)?.0 {
            Reply::Restored(restored) => Ok(Started {
                sent_ns,
                kvm_run_ns: restored.started_at_ns,
                byte_ns,
                stages: restored.stages,
            }),
            other => bail!("Restore was answered with {other:?}"),
        }
    }

    /// Restores a copy that shares its console with others.
    pub(crate) fn restore_to(
        &self,
        monitor: &mut Monitor,
        shell: bool,
        console: &OwnedFd,
    ) -> Result<()> {
        let spec = self.spec(monitor, shell, console.try_clone()?)?;
        monitor.control().restore(spec)?;
        Ok(())
    }

    fn spec(&self, monitor: &Monitor, shell: bool, console: OwnedFd) -> Result<RestoreSpec> {
        let kvm = if shell { None } else { Some(kvm()?) };
        let mut spec = RestoreSpec::new(&[self.folder.path()], kvm)?.with_pagemap(monitor)?;
        spec.restore.console_fd = Some(spec.add_fd(console));
        Ok(spec)
    }
}

/// When the guest was left for the first time since its restore, by the monitor's
/// word.
pub(crate) fn first_exit_ns(monitor: &mut Monitor) -> Result<u64> {
    let metrics = monitor.control().metrics()?;
    ensure!(metrics.first_exit_ns > 0, "the guest has not run");
    Ok(metrics.first_exit_ns)
}

/// A console that many machines write to.
pub(crate) struct SharedConsole {
    reader: PipeReader,
    writer: OwnedFd,
}

// === impl SharedConsole ===

impl SharedConsole {
    pub(crate) fn new() -> Result<Self> {
        let (reader, writer) = std::io::pipe()?;
        Ok(Self {
            reader,
            writer: writer.into(),
        })
    }

    pub(crate) fn writer(&self) -> &OwnedFd {
        &self.writer
    }

    /// Waits until so many restored guests have run.
    pub(crate) fn await_restored(&mut self, count: usize) -> Result<()> {
        guest::await_byte(&mut self.reader, guest::RESTORED, count)
    }
}
