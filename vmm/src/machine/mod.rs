//! The machine: built by one constructor, from then on driven by its one list
//! of devices.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use kvm_ioctls::VmFd;
use soulbox_proto::vmm::v1;

use crate::bus::{Bus, Overlap, Range, SharedDevice, Space, lock};
use crate::config::{Disk, MachineConfig, Vsock};
use crate::console::Console;
use crate::devices::generation::{GenerationDevice, GenerationError};
use crate::devices::panic::PanicDevice;
use crate::devices::power::{self, PowerDevice};
use crate::devices::serial::SerialDevice;
use crate::devices::virtio::VirtioDevice;
use crate::devices::virtio::block::BlockError;
use crate::devices::virtio::mmio::VirtioMmio;
use crate::devices::virtio::vsock::NewVsockError;
use crate::devices::{Device, Place};
use crate::events::EventSender;
use crate::memory::{self, GuestMemory};
use crate::vcpu::{self, Vcpu, VcpuThread};

pub mod acpi;
mod backends;
pub mod kernel;
pub mod kvm;
pub mod layout;

/// What a machine is made of, apart from how it starts.
#[derive(Debug)]
pub struct Parts {
    pub config: MachineConfig,
    pub kvm: OwnedFd,
    pub memory: File,
    pub disks: Vec<Disk>,
    pub vsock: Option<Vsock>,
}

/// Where a machine's state comes from.
#[derive(Debug)]
pub enum Origin<'a> {
    /// From nothing: a kernel, entered by the boot vCPU.
    Boot { kernel: &'a mut File },
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
    vcpus: Vec<VcpuThread>,
    waiting: Vec<Vcpu>,
    devices: Vec<DeviceSlot>,
    bus: Arc<Bus>,
    events: EventSender,
    _vm: VmFd,
    _memory: GuestMemory,
    memory_file: Arc<File>,
    config: MachineConfig,
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
    Generation(#[from] GenerationError),
    #[error(transparent)]
    Overlap(#[from] Overlap),
    #[error("the boot structures could not be written to guest memory")]
    BootTables(#[source] vm_memory::GuestMemoryError),
    #[error("an eventfd could not be made")]
    EventFd(#[source] io::Error),
    #[error("a vCPU's thread could not be started")]
    Thread(#[source] io::Error),
}

// === impl Machine ===

impl Machine {
    /// Builds a machine whose vCPUs have not run yet.
    pub fn new(
        parts: Parts,
        origin: Origin<'_>,
        console: Console,
        events: EventSender,
        stages: &mut Stopwatch,
    ) -> Result<Self, BuildError> {
        let Parts {
            config,
            kvm,
            memory: memory_file,
            disks,
            vsock,
        } = parts;

        let kvm = kvm::open(kvm, usize::from(config.vcpu_count))?;
        let memory_file = Arc::new(memory_file);
        let memory = memory::map_shared(&memory_file, config.memory_bytes())?;
        stages.mark("memory");
        let vm = kvm::create_vm(&kvm, &memory)?;
        stages.mark("kvm");

        let mut list = DeviceList::default();
        list.add_fixed(&memory, console, &events)?;
        for disk in disks {
            let name = format!("block.{}", disk.id);
            list.add_virtio(name, backends::block(disk)?, &memory)?;
        }
        if let Some(vsock) = vsock {
            let events = events.try_clone().map_err(BuildError::EventFd)?;
            let chip = backends::vsock(vsock, events)?;
            list.add_virtio("vsock".into(), chip, &memory)?;
        }
        list.add_virtio("rng".into(), backends::rng(), &memory)?;
        let (devices, bus) = list.connect(&vm)?;
        stages.mark("devices");

        let template = vcpu::cpuid::template(&kvm)?;
        let mut waiting = Vec::new();
        for index in 0..config.vcpu_count {
            let fd = vm
                .create_vcpu(u64::from(index))
                .map_err(kvm::refused("KVM_CREATE_VCPU"))?;
            // CPUID first: it decides which MSRs there are.
            fd.set_cpuid2(&vcpu::cpuid::for_vcpu(&template, index, config.vcpu_count))
                .map_err(kvm::refused("KVM_SET_CPUID2"))?;
            vcpu::boot::set_msrs(&fd)?;
            waiting.push(Vcpu { index, fd });
        }
        stages.mark("vcpus");

        match origin {
            Origin::Boot { kernel } => {
                let rsdp = acpi::write(&memory, config.vcpu_count, &devices)?;
                let entry = kernel::load(&memory, kernel, &config.cmdline, rsdp)?;
                vcpu::boot::write_tables(&memory).map_err(BuildError::BootTables)?;
                if let Some(boot_vcpu) = waiting.first() {
                    vcpu::boot::set_registers(&boot_vcpu.fd, entry)?;
                }
                stages.mark("kernel");
            }
        }

        Ok(Self {
            vcpus: Vec::new(),
            waiting,
            devices,
            bus: Arc::new(bus),
            events,
            _vm: vm,
            _memory: memory,
            memory_file,
            config,
        })
    }

    /// Starts the vCPUs: the boot vCPU last, so that the others wait for its
    /// SIPI. Returns CLOCK_MONOTONIC, in nanoseconds, just before that.
    pub fn start(&mut self) -> Result<u64, BuildError> {
        let mut started_at_ns = 0;
        while let Some(vcpu) = self.waiting.pop() {
            let events = self.events.try_clone().map_err(BuildError::EventFd)?;
            started_at_ns = monotonic_ns();
            let thread = vcpu
                .spawn(Arc::clone(&self.bus), events)
                .map_err(BuildError::Thread)?;
            self.vcpus.push(thread);
        }
        Ok(started_at_ns)
    }

    pub fn devices(&self) -> &[DeviceSlot] {
        &self.devices
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
                guest_bytes: self.config.memory_bytes(),
                guest_resident_bytes: memory::resident_bytes(&self.memory_file),
            }),
            exits,
            devices: devices.collect(),
            console_tail: console.tail(),
        }
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        // All are asked before any is waited for.
        for vcpu in &self.vcpus {
            vcpu.ask_to_stop();
        }
    }
}

/// The list of devices while it grows.
#[derive(Default)]
struct DeviceList {
    slots: Vec<DeviceSlot>,
    virtio: u32,
}

// === impl DeviceList ===

impl DeviceList {
    /// What every machine has.
    fn add_fixed(
        &mut self,
        memory: &GuestMemory,
        console: Console,
        events: &EventSender,
    ) -> Result<(), BuildError> {
        let clone = || events.try_clone().map_err(BuildError::EventFd);
        let serial = SerialDevice::new(console).map_err(BuildError::EventFd)?;
        let com1 = ports(layout::COM1_PORT, layout::COM1_PORTS);
        self.add("serial", com1, Some(layout::COM1_GSI), serial);
        let power = ports(layout::POWER_PORT, power::PORTS);
        self.add("power", power, None, PowerDevice::new(clone()?));
        self.add(
            "panic",
            ports(layout::PANIC_PORT, 1),
            None,
            PanicDevice::new(clone()?),
        );
        let generation = GenerationDevice::new(memory)?;
        self.add("generation", None, Some(layout::GENERATION_GSI), generation);
        Ok(())
    }

    fn add_virtio(
        &mut self,
        name: String,
        chip: Box<dyn VirtioDevice>,
        memory: &GuestMemory,
    ) -> Result<(), BuildError> {
        let transport = VirtioMmio::new(chip, memory.clone()).map_err(BuildError::EventFd)?;
        let range = Range {
            space: Space::Memory,
            start: layout::VIRTIO_MMIO_START + u64::from(self.virtio) * layout::VIRTIO_MMIO_BYTES,
            bytes: layout::VIRTIO_MMIO_BYTES,
        };
        let gsi = layout::FIRST_VIRTIO_GSI + self.virtio;
        self.virtio += 1;
        self.add(name, Some(range), Some(gsi), transport);
        Ok(())
    }

    fn add(
        &mut self,
        name: impl Into<String>,
        range: Option<Range>,
        gsi: Option<u32>,
        device: impl Device + 'static,
    ) {
        self.slots.push(DeviceSlot {
            name: name.into(),
            place: Place { range, gsi },
            device: Arc::new(Mutex::new(device)),
        });
    }

    /// Wires every device to KVM and puts it on the bus.
    fn connect(self, vm: &VmFd) -> Result<(Vec<DeviceSlot>, Bus), BuildError> {
        let mut bus = Bus::default();
        for slot in &self.slots {
            lock(&slot.device)
                .connect(vm, &slot.place)
                .map_err(kvm::refused("KVM_IRQFD or KVM_IOEVENTFD"))?;
            if let Some(range) = slot.place.range {
                bus.insert(range, Arc::clone(&slot.device))?;
            }
        }
        Ok((self.slots, bus))
    }
}

fn ports(start: u16, count: u16) -> Option<Range> {
    Some(Range {
        space: Space::Port,
        start: u64::from(start),
        bytes: u64::from(count),
    })
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
            Self::Acpi(_)
            | Self::Vsock(_)
            | Self::Generation(_)
            | Self::Overlap(_)
            | Self::BootTables(_)
            | Self::EventFd(_)
            | Self::Thread(_) => Code::Host,
        }
    }
}

fn monotonic_ns() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}
