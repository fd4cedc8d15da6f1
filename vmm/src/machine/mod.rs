//! The machine: built by one constructor, from then on driven by its one list
//! of devices.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::sync::Arc;
use std::time::Instant;

use kvm_bindings::CpuId;
use kvm_ioctls::VmFd;
use soulbox_proto::vmm::v1;

use crate::bus::{Bus, Overlap, SharedDevice, lock};
use crate::clock::monotonic_ns;
use crate::config::{Disk, Vsock};
use crate::console::Console;
use crate::devices::generation::GenerationError;
use crate::devices::virtio::block::BlockError;
use crate::devices::virtio::net::{NetConfig, NetError};
use crate::devices::virtio::vsock::{NewVsockError, Spare};
use crate::devices::{Chip, Place};
use crate::events::EventSender;
use crate::memory::pagemap::Pagemap;
use crate::memory::runs::{self, Pages};
use crate::memory::working_set::{Ahead, WorkingSet};
use crate::memory::{self, GuestMemory};
use crate::vcpu::{self, VcpuGone, VcpuThread, cpuid, features};

pub mod acpi;
mod backends;
mod frame;
pub mod kernel;
pub mod kvm;
pub mod layout;
mod restore;
mod save;
mod shape;
pub mod state;
#[cfg(test)]
pub(crate) mod tests;

pub use frame::{Frame, Wire};
pub use restore::RestoreError;
pub use save::{SaveError, SnapshotFiles};
pub use shape::{Kind, Shape, Slot};

use restore::{check_fit, fill_in, restore_devices};
use state::{CpuProfile, MachineState, MemoryState, NamedDevice, VmState};

/// What a machine is made of besides its frame, apart from how it starts.
#[derive(Debug)]
pub struct Parts {
    pub disks: Vec<Disk>,
    pub vsock: Option<Vsock>,
    pub net: Option<NetConfig>,
    pub pagemap: Option<File>,
}

/// Where a machine's state comes from.
#[derive(Debug)]
pub enum Origin<'a> {
    /// From nothing: a kernel, entered by the boot vCPU.
    Boot {
        kernel: &'a mut File,
        cmdline: &'a str,
    },
    /// From a snapshot and the memory layers it is mapped from.
    Restore {
        state: Box<MachineState>,
        /// Without the first where the frame has it.
        layers: Vec<File>,
        first_layer_prepared: bool,
        ahead: Ahead,
    },
}

/// What an [`Origin`] leaves to do once there are devices.
enum Started<'a> {
    Booting {
        kernel: &'a mut File,
        cmdline: &'a str,
    },
    Restoring {
        vm: Box<VmState>,
        devices: Vec<NamedDevice>,
    },
}

/// A device, what it is called and where it sits.
pub struct DeviceSlot {
    /// As in metrics: "serial", "block.root"…
    pub name: String,
    pub place: Place,
    pub device: SharedDevice,
}

/// A machine. Dropping it stops its vCPUs, then lets go of its devices, then of
/// the VM, then of memory; the fields are in that order.
pub struct Machine {
    /// By their number.
    vcpus: Vec<VcpuThread>,
    devices: Vec<DeviceSlot>,
    bus: Arc<Bus>,
    events: EventSender,
    vm: VmFd,
    memory: GuestMemory,
    /// What memory is mapped from; none when it is anonymous.
    mapped: MemoryState,
    /// Pages that were in memory before the guest ran; where what it reads is to
    /// be known.
    cached: Option<Vec<Pages>>,
    pagemap: Option<Pagemap>,
    shape: Shape,
    cpuid: CpuId,
    msr_indices: Arc<[u32]>,
    xsave_words: usize,
    /// No vCPU runs, and the devices stand still.
    paused: bool,
}

/// Measures the stages of an operation.
#[derive(Debug)]
pub struct Stopwatch {
    last: Instant,
    stages: Vec<v1::StageTime>,
}

#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    #[error(transparent)]
    Kvm(#[from] kvm::KvmError),
    #[error(transparent)]
    Memory(#[from] memory::MapError),
    #[error(transparent)]
    Kernel(#[from] kernel::KernelError),
    #[error(transparent)]
    Acpi(#[from] acpi::AcpiError),
    #[error(transparent)]
    Disk(#[from] BlockError),
    #[error(transparent)]
    Vsock(#[from] NewVsockError),
    #[error(transparent)]
    Net(#[from] NetError),
    #[error(transparent)]
    Generation(#[from] GenerationError),
    #[error(transparent)]
    Overlap(#[from] Overlap),
    #[error("the boot structures could not be written to guest memory")]
    BootTables(#[source] vm_memory::GuestMemoryError),
    #[error("an eventfd could not be made")]
    EventFd(#[source] io::Error),
    #[error("a vCPU's thread could not be started")]
    Thread(#[source] io::Error),
    #[error("{0} of the machine was not sent")]
    Missing(&'static str),
    #[error(transparent)]
    VcpuGone(#[from] VcpuGone),
    #[error(transparent)]
    Restore(#[from] RestoreError),
}

// === impl Machine ===

impl Machine {
    /// Builds a machine whose vCPUs have not run yet.
    pub fn new(
        frame: Frame,
        parts: Parts,
        origin: Origin<'_>,
        console: Console,
        events: EventSender,
        stages: &mut Stopwatch,
    ) -> Result<Self, BuildError> {
        let Frame {
            shape,
            slots,
            wires,
            rings,
            vcpus,
            mut cpuid,
            msr_indices,
            xsave_words,
            vm,
            memory,
            ..
        } = frame;

        let (vcpus, initial_msrs): (Vec<_>, Vec<_>) = vcpus
            .into_iter()
            .map(|vcpu| (vcpu.thread, vcpu.initial_msrs))
            .unzip();
        let mut restoring = Vec::new();
        let mut cached = None;
        let (mapped, origin) = match origin {
            Origin::Boot { kernel, cmdline } => {
                memory::map_anonymous(&memory)?;
                stages.mark("memory");
                let mapped = MemoryState {
                    layers: 0,
                    runs: Vec::new(),
                };
                (mapped, Started::Booting { kernel, cmdline })
            }
            Origin::Restore {
                state,
                layers,
                first_layer_prepared,
                ahead,
            } => {
                let count = layers.len() + usize::from(first_layer_prepared);
                check_fit(&state, shape, &parts, count)?;
                let missing = features::missing(&state.cpu.cpuid, cpuid.as_slice());
                if !missing.is_empty() {
                    return Err(RestoreError::Cpu(missing).into());
                }
                let new_cpuid = state.cpu.cpuid != cpuid.as_slice();
                if new_cpuid {
                    cpuid = CpuId::from_entries(&state.cpu.cpuid)
                        .map_err(|_| RestoreError::Cpu(vec!["a CPUID that KVM can take".into()]))?;
                }
                // vCPUs take their registers while memory is mapped, and the rest, after
                // which one fills in the working set, while devices are made.
                let mut own_states = Vec::with_capacity(vcpus.len());
                for ((index, vcpu), saved) in (0u8..).zip(&vcpus).zip(state.vcpus) {
                    let own = new_cpuid.then(|| cpuid::for_vcpu(&cpuid, index, shape.vcpu_count));
                    let saved = Arc::new(saved);
                    own_states.push(Arc::clone(&saved));
                    restoring.push(vcpu.call(move |fd| {
                        if let Some(cpuid) = own {
                            vcpu::state::set_cpuid(fd, &cpuid)?;
                        }
                        vcpu::state::restore_registers(fd, &saved, xsave_words)
                    })?);
                }
                let mut layers = layers.as_slice();
                if let Some((first, upper)) = layers.split_first().filter(|_| !first_layer_prepared)
                {
                    memory::map_first_layer(&memory, first)?;
                    layers = upper;
                }
                memory::map_upper_layers(&memory, layers, &state.memory.runs)?;
                stages.mark("memory");
                let mut working_set = match ahead {
                    Ahead::Nothing => None,
                    Ahead::FillIn(file) => Some(file),
                    Ahead::Record => {
                        memory::read_no_further(&memory)?;
                        cached = memory::resident(&memory).ok();
                        None
                    }
                };
                for ((vcpu, saved), initial_msrs) in vcpus.iter().zip(own_states).zip(initial_msrs)
                {
                    let working_set = working_set.take().map(|file| (file, memory.clone()));
                    restoring.push(vcpu.call(move |fd| {
                        vcpu::state::restore_system(fd, &saved, &initial_msrs)?;
                        if let Some((file, memory)) = working_set {
                            fill_in(fd, &memory, &file);
                        }
                        Ok(())
                    })?);
                }
                (
                    state.memory,
                    Started::Restoring {
                        vm: Box::new(state.vm),
                        devices: state.devices,
                    },
                )
            }
        };

        let mut backends = backends::Backends::new(parts, rings, console, &memory, &events);
        let mut devices = Vec::with_capacity(slots.len());
        let mut bus = Bus::default();
        for (slot, wire) in slots.into_iter().zip(wires) {
            let (name, device) = backends.device(slot.kind, wire)?;
            if let Some(range) = slot.place.range {
                bus.insert(range, Arc::clone(&device))?;
            }
            devices.push(DeviceSlot {
                name,
                place: slot.place,
                device,
            });
        }
        let pagemap = backends.pagemap;
        stages.mark("devices");

        match origin {
            Started::Booting { kernel, cmdline } => {
                renew_generation(&devices)?;
                let rsdp = acpi::write(&memory, shape.vcpu_count, &devices)?;
                let entry = kernel::load(&memory, kernel, cmdline, rsdp)?;
                vcpu::boot::write_tables(&memory).map_err(BuildError::BootTables)?;
                if let Some(boot_vcpu) = vcpus.first() {
                    let set = boot_vcpu.call(move |fd| vcpu::boot::set_registers(fd, entry))?;
                    set.wait()??;
                }
                stages.mark("kernel");
            }
            Started::Restoring {
                vm: saved,
                devices: states,
            } => {
                restore_devices(&devices, states)?;
                renew_generation(&devices)?;
                stages.mark("state");
                for (index, restored) in (0..shape.vcpu_count).cycle().zip(restoring) {
                    restored
                        .wait()?
                        .map_err(|error| RestoreError::Vcpu { index, error })?;
                }
                saved.restore(&vm)?;
                for slot in &devices {
                    let mut device = lock(&slot.device);
                    device.resume();
                    if let Chip::Generation(generation) = device.chip() {
                        generation.ring();
                    }
                }
                stages.mark("vcpus");
            }
        }

        Ok(Self {
            vcpus,
            devices,
            bus: Arc::new(bus),
            events,
            vm,
            memory,
            mapped,
            cached,
            pagemap,
            shape,
            cpuid,
            msr_indices,
            xsave_words,
            paused: false,
        })
    }

    /// Starts the vCPUs: the boot vCPU last, so that the others wait for its
    /// SIPI. Returns CLOCK_MONOTONIC, in nanoseconds, just before that.
    pub fn start(&mut self) -> Result<u64, BuildError> {
        let mut started_at_ns = 0;
        for vcpu in self.vcpus.iter().rev() {
            let events = self.events.try_clone().map_err(BuildError::EventFd)?;
            started_at_ns = monotonic_ns();
            vcpu.start(&self.bus, events)?;
        }
        Ok(started_at_ns)
    }

    /// Ends the vCPUs, for good.
    pub fn stop(&mut self) {
        // All are asked before any is waited for.
        for vcpu in &self.vcpus {
            vcpu.ask_to_stop();
        }
        self.vcpus.clear();
    }

    pub fn devices(&self) -> &[DeviceSlot] {
        &self.devices
    }

    /// Runs `f` on the first chip that it takes.
    pub fn with_chip<T>(&self, mut f: impl FnMut(Chip<'_>) -> Option<T>) -> Option<T> {
        self.devices
            .iter()
            .find_map(|slot| f(lock(&slot.device).chip()))
    }

    /// The host's ends of the spare connections that were restored, once.
    pub fn take_spares(&self) -> Vec<Spare> {
        let spares = self.with_chip(|chip| match chip {
            Chip::Vsock(vsock) => Some(vsock.take_spares()),
            _ => None,
        });
        spares.unwrap_or_default()
    }

    /// Exits, device counters and memory, since the machine was made.
    pub fn metrics(&self, console: &Console) -> v1::Metrics {
        let mut exits = HashMap::new();
        for vcpu in &self.vcpus {
            vcpu.add_exits(&mut exits);
        }
        let devices = self.devices.iter().map(|slot| {
            let counters = lock(&slot.device).counters();
            let values = counters
                .into_iter()
                .map(|(name, value)| (name.to_owned(), value))
                .collect();
            (slot.name.clone(), v1::Counters { values })
        });
        v1::Metrics {
            memory: Some(v1::MemoryMetrics {
                guest_bytes: self.shape.memory_bytes(),
                guest_private_bytes: self.private_bytes(),
            }),
            exits,
            devices: devices.collect(),
            console_tail: console.tail(),
            first_exit_ns: self.vcpus.first().map_or(0, VcpuThread::first_exit_ns),
        }
    }

    /// Writes which pages the guest has touched since its restore.
    pub fn record_working_set(&self, file: &File) -> Result<u64, SaveError> {
        let pagemap = self.pagemap.as_ref().ok_or(SaveError::NoPagemap)?;
        let written = pagemap.private(&self.memory)?;
        let read = match &self.cached {
            None => Vec::new(),
            Some(cached) => {
                let resident = memory::resident(&self.memory).map_err(SaveError::Memory)?;
                runs::without(&runs::without(&resident, cached), &written)
            }
        };
        let ram_pages = self.shape.memory_bytes() / memory::PAGE_BYTES;
        WorkingSet::new(ram_pages, written, read)
            .write(file)
            .map_err(SaveError::Memory)
    }

    fn private_bytes(&self) -> u64 {
        let private = self
            .pagemap
            .as_ref()
            .and_then(|pagemap| pagemap.private(&self.memory).ok());
        let pages: u64 = private
            .iter()
            .flatten()
            .map(|pages| pages.end - pages.start)
            .sum();
        pages * memory::PAGE_BYTES
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.stop();
    }
}

fn renew_generation(devices: &[DeviceSlot]) -> Result<(), GenerationError> {
    for slot in devices {
        if let Chip::Generation(generation) = lock(&slot.device).chip() {
            generation.renew()?;
        }
    }
    Ok(())
}

/// How the machine's CPUID came to be.
fn cpu_profile(cpuid: &CpuId) -> CpuProfile {
    CpuProfile {
        name: cpuid::PROFILE.to_owned(),
        cpuid: cpuid.as_slice().to_vec(),
    }
}

// === impl Stopwatch ===

impl Stopwatch {
    pub fn start() -> Self {
        Self {
            last: Instant::now(),
            stages: Vec::new(),
        }
    }

    /// Ends the stage that began with the last mark.
    pub fn mark(&mut self, stage: &str) {
        let now = Instant::now();
        self.stages.push(v1::StageTime {
            stage: stage.to_owned(),
            duration_ns: (now - self.last).as_nanos() as u64,
        });
        self.last = now;
    }

    pub fn into_stages(self) -> Vec<v1::StageTime> {
        self.stages
    }
}

// === impl BuildError ===

impl BuildError {
    /// What the control protocol calls it.
    pub fn code(&self) -> v1::error::Code {
        use v1::error::Code;
        match self {
            Self::Kvm(_) => Code::Kvm,
            Self::Memory(_) => Code::Memory,
            Self::Kernel(_) => Code::Kernel,
            Self::Disk(_) => Code::Disk,
            Self::Restore(RestoreError::Cpu(_)) => Code::Cpu,
            Self::Restore(_) => Code::Snapshot,
            Self::Acpi(_)
            | Self::Vsock(_)
            | Self::Net(_)
            | Self::Generation(_)
            | Self::Overlap(_)
            | Self::BootTables(_)
            | Self::EventFd(_)
            | Self::Missing(_)
            | Self::VcpuGone(_)
            | Self::Thread(_) => Code::Host,
        }
    }
}
